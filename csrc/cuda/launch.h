// From a plan's launches to kernels, and their launch, with errors attributed to it, on a device or in the host
// emulation (csrc/emulation). For .cu files only.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "plan.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define HFAC_DEVICE_COMPILER
#include <cuda_runtime.h>
#else
#include "../emulation/emulation.h"
#endif

#define HFAC_DEVICE __device__ __forceinline__
// A loop over k = 0 ... n - 1 that leaves no loop.
#define HFAC_UNROLLED(k, n) HFAC_UNROLL for (int k = 0; k < (n); ++k)
#ifdef HFAC_DEVICE_COMPILER
#define HFAC_DEVICE_APART static __device__ __noinline__
#else
#define HFAC_DEVICE_APART static __attribute__((noinline))
#endif

namespace hfac {

// GPUs for which the compiler takes more registers than for those before them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kMoreRegisters = true;
#else
constexpr bool kMoreRegisters = false;
#endif

// Of the block, as many bytes as its launch asked for.
#ifdef HFAC_DEVICE_COMPILER
HFAC_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#else
using emulation::dynamic_shared;
#endif

constexpr int kWarp = 32, kTileWarps = kTileThreads / kWarp;
#if defined(__AMDGCN_WAVEFRONT_SIZE)
static_assert(__AMDGCN_WAVEFRONT_SIZE == kWarp, "row sums are written for warps of 32 threads");
#endif

using KernelFunction = void (*)(Arguments);

#define HFAC_DECLARE(name) KernelFunction name##_kernel(const Launch& launch, const Arguments& arguments);
HFAC_KERNELS(HFAC_DECLARE)
#undef HFAC_DECLARE
// Bytes of dynamic shared memory of the kernel that hfac_stats_kernel picks.
int hfac_stats_shared(const Launch& launch);
// Clears `count` flags where the coefficient at `clip` is not 1.
void launch_hfac_unflag(int32_t* flags, int64_t count, const float* clip, void* stream);

// Is it an error of something that ran, a kernel or a copy? Calls that start something report it though they did not
// cause it, and so does every call after them: the context is lost. Numbers are those of cudaError_t.
inline bool of_what_ran(cudaError_t status) {
  const int code = static_cast<int>(status);
  return code == 214 || code == 220 || code == 226 ||    // memory and NVLink: uncorrectable, contained
         code == 700 || code == 702 || code == 710 ||    // illegal address, timeout, assert
         (code >= 714 && code <= 719) || code == 721 ||  // stack, instruction, alignment, launch failure
         code == 999;
}

// Throws what `status` says of the call `name`, or of what was before it; `begun`: the call has been made.
inline void check(cudaError_t status, const char* name, bool begun = true) {
  if (static_cast<int>(status) == 0) return;
  const char* const blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
  // Where launches wait for their kernels, all that ran before has been reported.
  const bool waited = blocking && *blocking && std::string(blocking) != "0";
  const std::string of = name, said = cudaGetErrorString(status);
  if (begun && (waited || !of_what_ran(status))) throw std::runtime_error(of + ": " + said);
  throw std::runtime_error("an earlier CUDA operation had failed before " + of + " was launched: " + said +
                           "; set CUDA_LAUNCH_BLOCKING=1 to find it");
}

// begin() starts something on the device; errors that are there before it are not called its own.
template <class Begin>
void checked(const char* name, const Begin& begin) {
  check(cudaGetLastError(), name, false);
  begin();
  check(cudaGetLastError(), name);
}

// The device of the tensors is the current one while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    checked("the step", [&] {
      cudaGetDevice(&before_);
      if (device != before_) cudaSetDevice(device);
    });
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

constexpr int kSharedUnasked = 48 << 10;  // bytes of shared memory that a block has without asking for more

// `shared`: bytes of dynamic shared memory.
template <class... A>
void launch(const char* name, void (*kernel)(A...), int64_t blocks, int threads, int shared, void* stream,
            A... arguments) {
  checked(name, [&] {
#ifdef HFAC_DEVICE_COMPILER
    // Not once for all: devices and contexts each have their own.
    if (shared > kSharedUnasked) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),
             static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
    (void)stream;
    emulation::run_grid(name, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                        static_cast<size_t>(shared), [&] { kernel(arguments...); });
#endif
  });
}

inline void clear(void* p, size_t bytes, void* stream) {
  checked("clearing flags and counters", [&] { cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)); });
}

}  // namespace hfac
