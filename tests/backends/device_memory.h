// The driver's memory: each buffer an allocation of its own of exactly its bytes, so that a sanitizer knows where it
// ends. On the host, or from cudaMalloc where a CUDA compiler compiles the driver; there the device and a stream, too.
#pragma once

#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "../../csrc/emulation/emulation.h"
#endif

namespace hfac {
namespace driver {

#ifdef __CUDACC__
constexpr bool kOnDevice = true;
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
// False where there is nothing to run on.
inline bool open() {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess || count == 0) {
    std::fprintf(stderr, "no GPU: %s\n", found == cudaSuccess ? "no CUDA device" : cudaGetErrorString(found));
    return false;
  }
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("%s, sm_%d%d\n", properties.name, properties.major, properties.minor);
  return true;
}
// Of the emulation alone.
inline void set_block_order(const char*) {}
inline void set_threading(const char*) {}
inline void inject_fault(const std::string&) {}
inline void name_memory(const void*, size_t) {}
inline void forget_memory(const void*) {}
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  if (bytes) check(cudaMalloc(&p, bytes), "cudaMalloc");
  return p;
}
inline void release(void* p) { cudaFree(p); }
inline void copy(void* to, const void* from, size_t bytes) {
  if (bytes) check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
// One that does not wait for the default stream: nothing of a step may be there.
inline void* stream() {
  static cudaStream_t one = nullptr;
  if (!one) check(cudaStreamCreateWithFlags(&one, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return one;
}
inline void wait(const char* what) {
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream())), what);
  check(cudaGetLastError(), what);
}
#else
using namespace emulation;
constexpr bool kOnDevice = false;
inline bool open() { return true; }
inline void* allocate(size_t bytes) { return operator new(bytes, std::align_val_t{16}); }
inline void release(void* p) { operator delete(p, std::align_val_t{16}); }
inline void copy(void* to, const void* from, size_t bytes) {
  if (bytes) memcpy(to, from, bytes);
}
inline void* stream() { return nullptr; }
inline void wait(const char*) {}
#endif

// `offset` bytes before `data()` belong to nobody: on the host accesses to them are found (`emulation::touches`).
class Buffer {
 public:
  explicit Buffer(std::vector<unsigned char> start, size_t offset = 0)
      : bytes_(start.size()), base_(static_cast<unsigned char*>(allocate(offset + bytes_))), data_(base_ + offset) {
    name_memory(data_, bytes_);
    copy(data_, start.data(), bytes_);
  }
  ~Buffer() {
    if (!base_) return;
    forget_memory(data_);
    release(base_);
  }
  Buffer(Buffer&& other) noexcept
      : bytes_(other.bytes_), base_(std::exchange(other.base_, nullptr)), data_(other.data_) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  unsigned char* data() const { return data_; }
  std::vector<unsigned char> read() const {
    std::vector<unsigned char> values(bytes_);
    copy(values.data(), data_, bytes_);
    return values;
  }

 private:
  size_t bytes_;
  unsigned char *base_, *data_;
};

}  // namespace driver
}  // namespace hfac
