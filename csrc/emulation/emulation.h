// What the kernels of csrc/cuda use of CUDA, for a C++ compiler: blocks run one after the other on the host. For tests
// only: nothing of this is in an installed package.
//
// A block's threads are fibers of one thread (fast), or one std::thread each (what ThreadSanitizer understands).
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

namespace hfac {
namespace emulation {

struct Index {
  unsigned x, y, z;
};

// An asynchronous copy to shared memory, of which `read` bytes are read and the rest becomes zero.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, read;
};

// One CUDA thread; `copies`: groups of those that it has begun and not waited for, the last one still open; `turn` is
// the number of exchanges its warp has made, `barriers` those of its block that it came to.
struct Lane {
  Index thread, block, block_size, grid_size;
  unsigned turn, barriers;
  std::vector<std::vector<Copy>> copies;
};

extern thread_local Lane* self;

void block_barrier();
void warp_barrier();
// Two sets of slots per warp, used in turn: whoever writes a set again has passed a barrier that every reader of its
// last values had reached.
uint64_t* slots(unsigned turn);

template <class T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one slot");
  uint64_t* mine = slots(self->turn++);
  memcpy(&mine[self->thread.x % 32], &value, sizeof(T));
  warp_barrier();
  memcpy(&value, &mine[source], sizeof(T));
  return value;
}

// A copy is carried out where its thread waits for it; from its beginning on what it writes to is NaN, so that a read
// before the wait is seen in every result, and one by another thread, without a barrier behind the wait, is a race.
void begin_copy(void* to, const void* from, size_t bytes, size_t read);
void commit_copies();
// Until no more than `left` of the groups committed are under way.
void wait_for_copies(size_t left);

// Of the block that runs: as many bytes as the launch gave it, NaN until they are written.
char* dynamic_shared();

void run_grid(const char* name, unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& kernel);

// "forward", "reverse" or "shuffled"; "fibers", "threads" or "none" (nothing runs). Else std::invalid_argument.
void set_block_order(const std::string& order);
void set_threading(const std::string& threading);
// Launches since the last call of this function.
int64_t take_launches();

// An error for `cudaGetLastError`, once that many more launches have been made.
void inject_error(int code, const std::string& text, int64_t launches);

// What is done wrong on purpose in every launch of `smmf_tiles`, to see that it is found: "barrier" leaves out the
// first barrier of each block, "block" the last block; in every launch of `hfac_stats` and of `hfac_small`: "wait"
// leaves out waits for copies. "" is nothing.
void inject_fault(const std::string& fault);

// Memory that kernels may touch, where any is named: `touches` ends the program (exit status 4) at an access outside
// it, which it checks to the byte, as AddressSanitizer cannot below a buffer's first byte.
void name_memory(const void* p, size_t bytes);
void forget_memory(const void* p);
void touches(const void* p, size_t bytes);

// A subnormal number is zero to those instructions of a GPU that are approximate.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
// What such an instruction may make of `x`: off from the exact result by -2 to 2 units in the last place, the same for
// the same operand. What is 0, infinite or no number stays that.
inline float nearly(double exact, float x) {
  const float nearest = static_cast<float>(exact);
  if (!std::isnormal(nearest)) return flushed(nearest);
  uint32_t bits, of;
  memcpy(&of, &x, sizeof(of));
  memcpy(&bits, &nearest, sizeof(bits));
  bits += (of * 2654435761u >> 16) % 5 - 2;
  float off;
  memcpy(&off, &bits, sizeof(off));
  return off;
}

}  // namespace emulation
}  // namespace hfac

#define threadIdx (hfac::emulation::self->thread)
#define blockIdx (hfac::emulation::self->block)
#define blockDim (hfac::emulation::self->block_size)
#define gridDim (hfac::emulation::self->grid_size)

// The runtime, with one device.
enum cudaError_t : int { cudaSuccess = 0 };
using cudaStream_t = void*;
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t status);
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaSetDevice(int) {}
inline void cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { memset(p, value, bytes); }

struct [[gnu::may_alias]] alignas(8) uint2 {
  unsigned x, y;
};
struct [[gnu::may_alias]] alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint4 __ldcs(const uint4* p) { return *p; }

// Of the eight bytes of b and a the four that the digits of `selector` count, the last one's lowest.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned chosen = 0;
  for (unsigned k = 0; k < 4; ++k)
    chosen |= static_cast<unsigned>(bytes >> (selector >> 4 * k & 7u) * 8 & 0xffu) << 8 * k;
  return chosen;
}

inline void __syncthreads() { hfac::emulation::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { hfac::emulation::warp_barrier(); }
inline void __threadfence() {}  // blocks run one after the other

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return hfac::emulation::exchange(value, (threadIdx.x % 32) ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return hfac::emulation::exchange(value, static_cast<unsigned>(source));
}

inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline double atomicAdd(double* p, double value) { return std::atomic_ref<double>(*p).fetch_add(value); }
inline int atomicXor(int* p, int value) {
  const int old = __atomic_fetch_xor(p, value, __ATOMIC_RELAXED);  // of 4 bytes, as on a GPU: sanitizers see them all
  hfac::emulation::touches(p, sizeof(int));
  return old;
}
inline int atomicOr(int* p, int value) { return __atomic_fetch_or(p, value, __ATOMIC_RELAXED); }
