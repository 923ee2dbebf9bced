// What differs between a launch on a device and one in the host emulation (csrc/emulation); included by the .cu files
// only.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define HFAC_DEVICE_COMPILER
#include <cuda_runtime.h>
#else
#include "../emulation/emulation.h"
#endif

#define HFAC_DEVICE __device__ __forceinline__
#ifdef HFAC_DEVICE_COMPILER
#define HFAC_DEVICE_APART static __device__ __noinline__
#else
#define HFAC_DEVICE_APART static __attribute__((noinline))
#endif

namespace hfac {

constexpr int kWarp = 32;
#if defined(__AMDGCN_WAVEFRONT_SIZE)
static_assert(__AMDGCN_WAVEFRONT_SIZE == kWarp, "row sums are written for warps of 32 threads");
#endif

#ifdef HFAC_DEVICE_COMPILER
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The device of the tensors is the current one while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class... A>
void launch(const char* name, void (*kernel)(A...), int64_t blocks, int threads, void* stream, A... arguments) {
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  check(cudaGetLastError(), name);
}

inline void clear(void* p, size_t bytes, void* stream) {
  check(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing the flags of `nonfinite`");
}
#else
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

template <class... A>
void launch(const char*, void (*kernel)(A...), int64_t blocks, int threads, void*, A... arguments) {
  emulation::run_grid(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments...); });
}

inline void clear(void* p, size_t bytes, void*) { memset(p, 0, bytes); }
#endif

}  // namespace hfac
