// What the threads of a block do together: sums in a fixed order, step scalars, the last block of a launch.
#pragma once

#include "element.cuh"

namespace hfac {

HFAC_DEVICE int log2_of(int power) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(power);
#else
  return __builtin_ctz(static_cast<unsigned>(power));
#endif
}

template <class T>
HFAC_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of lane `source`.
template <class T>
HFAC_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

// As below, transposed: the number of values halves with the distance, so that 9 shuffles do the work of 40.
template <class T, class Put>
HFAC_DEVICE void sum_lanes_transposed(T (&v)[kVector], int width, const Put& put) {
  const int lane = static_cast<int>(threadIdx.x), half = width / 2, quarter = width / 4, eighth = width / 8;
  const bool a = lane & half, b = lane & quarter, c = lane & eighth;
  HFAC_UNROLLED (k, 4) {
    const T sent = a ? v[k] : v[k + 4], kept = a ? v[k + 4] : v[k];
    v[k] = kept + shuffle_xor(sent, half);
  }
  HFAC_UNROLLED (k, 2) {
    const T sent = b ? v[k] : v[k + 2], kept = b ? v[k + 2] : v[k];
    v[k] = kept + shuffle_xor(sent, quarter);
  }
  const T sent = c ? v[0] : v[1], kept = c ? v[1] : v[0];
  T sum = kept + shuffle_xor(sent, eighth);
  for (int mask = eighth / 2; mask > 0; mask /= 2) sum = sum + shuffle_xor(sum, mask);
  if ((lane & (eighth - 1)) == 0) put((a ? 4 : 0) + (b ? 2 : 0) + (c ? 1 : 0), sum);
}

// Sums eight values over the `width` threads (a power of two, at most a warp) that share them, and passes each sum to
// one of them: put(k, sum).
template <class T, class Put>
HFAC_DEVICE void sum_lanes(T (&v)[kVector], int width, const Put& put) {
  if (width == kWarp) return sum_lanes_transposed(v, kWarp, put);
  if (width >= kVector) return sum_lanes_transposed(v, width, put);
  for (int mask = width / 2; mask > 0; mask /= 2) {
    HFAC_UNROLLED (k, kVector) v[k] = v[k] + shuffle_xor(v[k], mask);
  }
  if ((static_cast<int>(threadIdx.x) & (width - 1)) == 0) {
    HFAC_UNROLLED (k, kVector) put(k, v[k]);
  }
}

// Sums of each of n values, a power of two, over the lanes of a warp that share them, at least n: lane k has that of
// value k % n. Transposed: the number of values halves while the distance doubles.
template <int n, class T>
HFAC_DEVICE T sum_values(T (&v)[n], int lanes) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
  for (int mask = 1; mask < n; mask *= 2) {
    const bool odd = lane & mask;
    HFAC_UNROLLED (k, n / (2 * mask)) {
      const T sent = odd ? v[2 * k] : v[2 * k + 1], kept = odd ? v[2 * k + 1] : v[2 * k];
      v[k] = kept + shuffle_xor(sent, mask);
    }
  }
  T sum = v[0];
#pragma unroll
  for (int mask = n; mask < kWarp; mask *= 2) {
    if (mask < lanes) sum = sum + shuffle_xor(sum, mask);
  }
  return sum;
}

// Sums over a warp, in every thread.
template <int n, class T>
HFAC_DEVICE void warp_sums(T (&values)[n]) {
  HFAC_UNROLLED (k, n) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) values[k] = values[k] + shuffle_xor(values[k], mask);
  }
}

// Sums over the block, in every thread and always in the same order: over a warp by exchange, then over the warps.
// `shared` has n elements for each warp.
template <int n, class T>
HFAC_DEVICE void block_sums(T (&values)[n], T* shared) {
  warp_sums(values);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) {
    HFAC_UNROLLED (k, n) shared[warp * n + k] = values[k];
  }
  __syncthreads();
  HFAC_UNROLLED (k, n) {
    values[k] = shared[k];
    HFAC_UNROLLED (w, kTileWarps - 1) values[k] = values[k] + shared[(w + 1) * n + k];
  }
  __syncthreads();
}
template <class T>
HFAC_DEVICE T block_sum(T value, T* shared) {
  T values[] = {value};
  block_sums(values, shared);
  return values[0];
}

// True in the last of `blocks` blocks to come here: it may read (`load_fresh`) what the others wrote before.
HFAC_DEVICE bool last_block(int32_t* counter, int64_t blocks) {
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == static_cast<int>(blocks) - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Adds up what `blocks` blocks have, each in its place among `partials`, always in the same order; the last of them
// stores the total. `shared` has one element for each warp.
HFAC_DEVICE void add_up(double mine, int64_t block, int64_t blocks, double* partials, int32_t* counter, double* shared,
                        double* total) {
  mine = block_sum(mine, shared);
  if (threadIdx.x == 0) partials[block] = mine;
  if (!last_block(counter, blocks)) return;
  mine = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kTileThreads) mine += load_fresh(partials + b);
  mine = block_sum(mine, shared);
  if (threadIdx.x == 0) *total = mine;
}

HFAC_DEVICE double value_of(const Scalar& s, int32_t index) {
  if (!s.address) return s.value;
  const int64_t at = static_cast<int64_t>(index) * s.stride;
  return s.wide ? static_cast<const double*>(s.address)[at]
                : static_cast<double>(static_cast<const float*>(s.address)[at]);
}

// A decay and its rest, formed in double and rounded once, as torch does with a Python scalar.
template <class T>
struct Decay {
  T beta, rest;
  HFAC_DEVICE Decay(const Scalar& s, int32_t index) {
    const double b = value_of(s, index);
    beta = static_cast<T>(b);
    rest = static_cast<T>(1 - b);
  }
};

template <class T>
HFAC_DEVICE Decay<T> kept(Decay<T> decay) {
  decay.beta = kept(decay.beta);
  decay.rest = kept(decay.rest);
  return decay;
}

// Must this parameter keep every bit? (torch's fused protocol: found_inf; a gradient that was looked at: nonfinite)
HFAC_DEVICE bool skipped(const Arguments& a) { return a.found_inf && *a.found_inf != 0.0f; }
// Are the statistics that were taken for the norm those of the step, because it does not clip? (NaN: no)
HFAC_DEVICE bool unclipped(const Arguments& a) { return a.clip && *a.clip == 1.0f; }
// Either of the two, by one branch.
HFAC_DEVICE bool has_statistics(const Arguments& a) {
  float found = 0.0f, clip = 0.0f;
  if (a.found_inf) found = *a.found_inf;
  if (a.clip) clip = *a.clip;
  return found != 0.0f || clip == 1.0f;
}
HFAC_DEVICE bool refused(const Arguments& a, const DeviceItem& it) { return a.nonfinite && a.nonfinite[it.index]; }

// Of a launch that never begins at the end.
HFAC_DEVICE Tile forward_tile(const Arguments& a) { return a.tiles[blockIdx.x]; }
HFAC_DEVICE Tile tile_of(const Arguments& a) { return a.tiles[a.backward ? gridDim.x - 1 - blockIdx.x : blockIdx.x]; }

// The gradient as the step sees it: unscaled (torch's fused protocol) and of the right sign.
template <class T>
struct Gradient {
  T scale;
  bool scaled, negate;
  HFAC_DEVICE explicit Gradient(const Arguments& a)
      : scale(a.grad_scale ? static_cast<T>(*a.grad_scale) : T(1)), scaled(a.grad_scale), negate(a.options.maximize) {}
  HFAC_DEVICE void unscale(T (&g)[kVector]) const {
    if (scaled) {
      HFAC_UNROLLED (k, kVector) g[k] = g[k] / scale;
    }
  }
  HFAC_DEVICE void operator()(T (&g)[kVector]) const {
    unscale(g);
    if (negate) {
      HFAC_UNROLLED (k, kVector) g[k] = -g[k];
    }
  }
};

// The same, whose scale is loaded where it is used: a step without one has no register for it.
template <class T>
struct LeanGradient {
  const float* scale;
  bool scaled, negate;
  HFAC_DEVICE explicit LeanGradient(const Arguments& a) : scaled(a.grad_scale), negate(a.options.maximize) {
    scale = a.grad_scale;
  }
  HFAC_DEVICE void unscale(T (&g)[kVector]) const {
    if (scaled) {
      const T by = static_cast<T>(load_fresh(global(scale)));
      HFAC_UNROLLED (k, kVector) g[k] = g[k] / by;
    }
  }
  HFAC_DEVICE void operator()(T (&g)[kVector]) const {
    unscale(g);
    if (negate) {
      HFAC_UNROLLED (k, kVector) g[k] = -g[k];
    }
  }
};

// Is there an element whose square, times the number of elements, is not finite?
template <class T>
HFAC_DEVICE bool nonfinite(T g, T elements) {
  const T all = g * g * elements;
  return !(all - all == T(0));
}
template <class T>
HFAC_DEVICE bool nonfinite(const T (&g)[kVector], T elements) {
  bool bad = false;
  HFAC_UNROLLED (k, kVector) bad = bad || nonfinite(g[k], elements);
  return bad;
}

// Of the elements that a thread writes, what a watched step tells of them.
template <class A>
struct Watch {
  using T = typename A::T;
  T moved = T(0), direction = T(0);
  int still = 0;

  template <class Target>
  HFAC_DEVICE void add(const Target& target, const T (&old)[kVector], const T (&fresh)[kVector], int count) {
    HFAC_UNROLLED (k, kVector) {
      if (k >= count) continue;
      const T by = fresh[k] - old[k];
      moved = moved + by * by;
      still += A::nearest(target, fresh[k]) == old[k] ? 1 : 0;
    }
  }

  // By all threads of a block, or of a warp that has the item alone. Blocks add in any order, which counts do not
  // notice.
  HFAC_DEVICE void finish(const Arguments& a, const DeviceItem& it, int threads = kTileThreads) const {
    __shared__ double shared[3 * kTileWarps];
    double values[] = {static_cast<double>(moved), static_cast<double>(still), static_cast<double>(direction)};
    if (threads == kWarp) {
      warp_sums(values);
    } else {
      block_sums(values, shared);
    }
    HFAC_UNROLLED (k, 3) {
      if ((threadIdx.x & (threads - 1)) == 0 && values[k] != 0) {
        atomicAdd(a.watched + int64_t{it.index} * kWatchedNumbers + k, values[k]);
      }
    }
  }
};

HFAC_DEVICE int vector_count(int64_t at, int64_t end) {
  const int64_t left = end - at;
  return left <= 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
}

}  // namespace hfac
