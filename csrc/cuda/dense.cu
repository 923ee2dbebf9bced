// Both optimizers where both moments are whole, and the look at gradients before a step that may refuse them. One block
// per run of 8192 elements, all parameters of a list in one launch.
#include <type_traits>

#include "../common/math/hfac.h"
#include "../common/math/smmf.h"
#include "stored.cuh"

namespace hfac {
namespace {

using common::hfac_average;
using common::hfac_clip_divisor;
using common::hfac_dense_update;
using common::root;
using common::smmf_first_moment;
using common::smmf_second_moment;
using common::smmf_update;

// Aligned contiguous moments of eight elements, or fewer.
template <class T>
HFAC_DEVICE void load_moment(const void* p, int64_t at, int count, T (&x)[kVector]) {
  const T* from = global(static_cast<const T*>(p));
  HFAC_UNROLLED (k, kVector) x[k] = k < count ? from[at + k] : T(0);
}
template <class T>
HFAC_DEVICE void store_moment(void* p, int64_t at, int count, const T (&x)[kVector]) {
  T* to = global(static_cast<T*>(p));
  HFAC_UNROLLED (k, kVector) {
    if (k < count) to[at + k] = x[k];
  }
}

// A plain parameter straight into its registers: through those of an access the compiler would spill.
template <class A, class Target, class T>
HFAC_DEVICE void load_param(const Target& target, const int64_t* layouts, int64_t at, int count, T (&x)[kVector]) {
  if constexpr (std::is_same_v<Target, Operand>) {
    load_any(target, layouts, at, count, x);
  } else {
    A::widen(A::param(target, layouts, at, count), x);
  }
}

// This block's run of its parameter, eight elements per thread at a time: body(at, count).
template <class Body>
HFAC_DEVICE void each_vector(const DeviceItem& it, int run, const Body& body) {
  const int64_t elements = it.rows * it.cols, first = static_cast<int64_t>(run) * kRun;
  const int64_t end = first + kRun < elements ? first + kRun : elements;
  for (int64_t at = first + static_cast<int64_t>(threadIdx.x) * kVector; at < end; at += kTileCols) {
    body(at, vector_count(at, end));
  }
}

template <class T>
HFAC_DEVICE bool run_nonfinite(const Arguments& a, const DeviceItem& it, int run) {
  const Gradient<T> gradient(a);
  bool bad = false;
  each_vector(it, run, [&](int64_t at, int count) {
    T g[kVector];
    load_any(it.grad, a.layouts, at, count, g);
    gradient.unscale(g);
    bad = bad || nonfinite(g, static_cast<T>(it.rows * it.cols));
  });
  return bad;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) look(Arguments a) {
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (run_nonfinite<T>(a, it, tile.index)) atomicOr(a.nonfinite + it.index, 1);
}

// A parameter of one run is looked at by the block that steps it; true: it keeps every bit.
template <class T>
HFAC_DEVICE bool refuse_run(const Arguments& a, const DeviceItem& it, T* shared) {
  if (!a.nonfinite) return false;
  if (it.rows * it.cols > kRun) return a.nonfinite[it.index];
  const T bad = block_sum(run_nonfinite<T>(a, it, 0) ? T(1) : T(0), shared);
  if (bad > T(0) && threadIdx.x == 0) a.nonfinite[it.index] = 1;
  return bad > T(0);
}

// Eight elements of H-Fac: new moments and the root of the second.
template <class T>
struct HfacDenseCell {
  T g[kVector], average[kVector], square[kVector], denominator[kVector];

  HFAC_DEVICE HfacDenseCell(const Arguments& a, const DeviceItem& it, const Gradient<T>& gradient, const Decay<T>& b1,
                            const Decay<T>& b2, int64_t at, int count) {
    load_any(it.grad, a.layouts, at, count, g);
    load_moment(it.first_row, at, count, average);
    load_moment(it.second_row, at, count, square);
    gradient(g);
    HFAC_UNROLLED (k, kVector) {
      average[k] = hfac_average(b1.beta, average[k], b1.rest, g[k]);
      square[k] = hfac_average(b2.beta, square[k], b2.rest, g[k] * g[k] + static_cast<T>(a.options.eps));
      denominator[k] = root(square[k]);
    }
  }

  // Of U, before clipping.
  HFAC_DEVICE T squared_update(int k) const {
    const T update = g[k] / denominator[k];
    return update * update;
  }
};

// Sum of U^2 over a run, the same in every thread.
template <class T>
HFAC_DEVICE T run_norm(const Arguments& a, const DeviceItem& it, int run, T* shared) {
  const Gradient<T> gradient(a);
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  T norm = T(0);
  each_vector(it, run, [&](int64_t at, int count) {
    const HfacDenseCell<T> cell(a, it, gradient, b1, b2, at, count);
    HFAC_UNROLLED (k, kVector) {
      const T square = cell.squared_update(k);  // beyond count it may be that of 0 / 0
      if (k < count) norm = norm + square;
    }
  });
  return block_sum(norm, shared);
}

template <class T>
HFAC_DEVICE T dense_clip(const Arguments& a, const DeviceItem& it, T norm) {
  return T(1) / hfac_clip_divisor(root(norm / static_cast<T>(it.rows * it.cols)), a.options.clip_threshold);
}

// The norm of a parameter of several runs.
template <class T>
__global__ void __launch_bounds__(kTileThreads) dense_look(Arguments a) {
  __shared__ T shared[kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  const DenseSpace<T> space(it, a.workspace);
  if (a.nonfinite && run_nonfinite<T>(a, it, tile.index)) atomicOr(a.nonfinite + it.index, 1);
  const T norm = run_norm(a, it, tile.index, shared);
  if (threadIdx.x == 0) space.norms[tile.index] = norm;
  const int64_t runs = ceil_quotient(it.rows * it.cols, kRun);
  if (!last_block(a.counters + it.counter, runs)) return;
  T sum = T(0);
  for (int64_t r = threadIdx.x; r < runs; r += kTileThreads) sum = sum + load_fresh(space.norms + r);
  const T total = block_sum(sum, shared);
  if (threadIdx.x == 0) *space.clip = dense_clip(a, it, total);
}

template <class A>
HFAC_DEVICE void watched(const Arguments& a, const DeviceItem& it, const Watch<A>& watch) {
  __shared__ double shared[kTileThreads];
  watch.finish(a, it, shared);
}

template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads) hfac_dense(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refuse_run(a, it, shared)) return;
  T clip = T(1);
  if (a.options.clip) {
    clip =
        it.rows * it.cols > kRun ? *DenseSpace<T>(it, a.workspace).clip : dense_clip(a, it, run_norm(a, it, 0, shared));
  }
  const Gradient<T> gradient(a);
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const T lr = static_cast<T>(value_of(a.scalars.lr, 0));
  const T weight_decay = static_cast<T>(value_of(a.scalars.weight_decay, 0));
  const auto& param = A::target(a, it);
  Watch<A> watch;
  each_vector(it, tile.index, [&](int64_t at, int count) {
    const HfacDenseCell<T> cell(a, it, gradient, b1, b2, at, count);
    T w[kVector], old[kVector];
    load_param<A>(param, a.layouts, at, count, w);
    HFAC_UNROLLED (k, kVector) {
      old[k] = w[k];
      if (kWatched && k < count) watch.direction = watch.direction + cell.squared_update(k);
      w[k] = hfac_dense_update(w[k], cell.g[k], cell.average[k], cell.denominator[k], clip, b1.beta, b1.rest, lr,
                               weight_decay);
    }
    store_moment(it.first_row, at, count, cell.average);
    store_moment(it.second_row, at, count, cell.square);
    if constexpr (kWatched) watch.add(param, old, w, count);
    A::store(param, a.layouts, at, count, w);
  });
  if constexpr (kWatched) watched(a, it, watch);
}

template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads) smmf_dense(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refuse_run(a, it, shared)) return;
  const Gradient<T> gradient(a);
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const double lr_wide = value_of(a.scalars.lr, 0), decay_wide = value_of(a.scalars.weight_decay, 0);
  const T lr = static_cast<T>(lr_wide), weight_decay = static_cast<T>(decay_wide), eps = static_cast<T>(a.options.eps);
  const T shrink = static_cast<T>(1 - lr_wide * decay_wide);
  const auto& param = A::target(a, it);
  Watch<A> watch;
  each_vector(it, tile.index, [&](int64_t at, int count) {
    T g[kVector], w[kVector], m[kVector], v[kVector], old[kVector];
    load_any(it.grad, a.layouts, at, count, g);
    load_param<A>(param, a.layouts, at, count, w);
    load_moment(it.second_row, at, count, v);
    if (a.options.first_moment) load_moment(it.first_row, at, count, m);
    gradient(g);
    HFAC_UNROLLED (k, kVector) {
      old[k] = w[k];
      if (a.options.coupled) {
        g[k] = g[k] + weight_decay * w[k];
      } else {
        w[k] = w[k] * shrink;
      }
      m[k] = a.options.first_moment ? smmf_first_moment(b1.beta * m[k], b1.rest, g[k]) : g[k];
      v[k] = smmf_second_moment(b2.beta * v[k], b2.rest, g[k]);
      w[k] = smmf_update(w[k], lr, m[k], v[k], eps);
      if (kWatched && k < count) {
        const T direction = m[k] / (root(v[k]) + eps);
        watch.direction = watch.direction + direction * direction;
      }
    }
    if (a.options.first_moment) store_moment(it.first_row, at, count, m);
    store_moment(it.second_row, at, count, v);
    if constexpr (kWatched) watch.add(param, old, w, count);
    A::store(param, a.layouts, at, count, w);
  });
  if constexpr (kWatched) watched(a, it, watch);
}

}  // namespace

KernelFunction look_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, look); }
KernelFunction dense_look_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, dense_look); }
KernelFunction hfac_dense_kernel(const Launch& l, const Arguments& a) { HFAC_BY_ACCESS(l, a, AnyAccesses, hfac_dense); }
KernelFunction smmf_dense_kernel(const Launch& l, const Arguments& a) { HFAC_BY_ACCESS(l, a, AnyAccesses, smmf_dense); }

}  // namespace hfac
