// Both optimizers where both moments are whole, and the look at gradients before a step that may refuse them. One block
// per run of 8192 elements, all parameters of a list in one launch for each way to reach their elements.
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

// The elements of a block: whole vectors of eight, and behind a parameter's last one fewer than eight. Whatever the
// access, a thread takes the same elements in the same order, so that sums do not depend on it.
struct Run {
  int64_t first, end;  // of whole vectors
  int rest;            // elements from `end` on
  HFAC_DEVICE Run(const DeviceItem& it, int index) {
    const int64_t elements = it.rows * it.cols;
    first = static_cast<int64_t>(index) * kRun;
    const int64_t last = first + kRun < elements ? first + kRun : elements;
    rest = static_cast<int>(last % kVector);
    end = last - rest;
  }
};

// Every thread's vectors, `kTogether` at a time: load(at) of all of them comes before body(loaded, at, count) of the
// first. Where vectors are whole warps stay together, because their threads exchange what they store: those that have
// nothing left go along with zeros and a count of 0.
template <class A, int kTogether, class Load, class Body>
HFAC_DEVICE void each_vector(const Run& run, const Load& load, const Body& body) {
  using Loaded = decltype(load(run.first));
  const int thread = static_cast<int>(threadIdx.x), own = thread * kVector, warps = thread / kWarp * kWarp * kVector;
  const int length = static_cast<int>(run.end - run.first);
  for (int base = 0; base < length; base += kTogether * kTileCols) {
    Loaded loaded[kTogether];
    HFAC_UNROLLED (k, kTogether) {
      const int offset = base + k * kTileCols;
      loaded[k] = Loaded{};
      if (own + offset < length) loaded[k] = load(run.first + own + offset);
    }
    HFAC_UNROLLED (k, kTogether) {
      const int offset = base + k * kTileCols;
      if ((A::kWhole ? warps : own) + offset >= length) continue;
      body(loaded[k], run.first + own + offset, own + offset < length ? kVector : 0);
    }
  }
}

// The elements behind the last whole vector: body(at), for one thread each of the warp that has the fewest vectors.
template <class Body>
HFAC_DEVICE void each_rest(const Run& run, const Body& body) {
  const int k = static_cast<int>(threadIdx.x) - (kTileThreads - kWarp);
  if (0 <= k && k < run.rest) body(run.end + k);
}

// One element in place of eight: the compiler computes it once.
template <class T>
HFAC_DEVICE void repeat(T (&x)[kVector]) {
  HFAC_UNROLLED (k, kVector) x[k] = x[0];
}

template <class A, class = void>
struct RestAccess {
  using Type = A;
  static constexpr bool kAny = true;
};
// Of vectors that are whole the rest is taken one by one; what is stored in other ways has none (see the plan).
template <class A>
struct RestAccess<A, std::enable_if_t<A::kWhole>> {
  using Type = AnyAccess<typename A::T>;
  static constexpr bool kAny = std::is_same_v<decltype(A::target(Arguments(), DeviceItem())), const Operand&>;
};
template <class A>
HFAC_DEVICE Operand rest_of(const Operand& o) {
  return {o.data, o.dtype, A::kWhole ? -1 : o.layout};
}

// Eight moments of a thread, or fewer.
template <class A, class T>
HFAC_DEVICE void load_moments(const T* p, int64_t at, int count, T (&x)[kVector]) {
  if constexpr (A::kWhole) {
    unpack(load_raw(global(p) + at, false), x);
  } else {
    HFAC_UNROLLED (k, kVector) x[k] = k < count ? global(p)[at + k] : T(0);
  }
}

// Whole vectors of a warp, from `at` on, of which those from `end` on are nobody's. Two threads exchange four of their
// floats, so that together they write 32 neighbouring bytes at a time: memory is written in pieces of 32.
HFAC_DEVICE void store_pairs(float* p, int64_t at, int64_t end, const float (&x)[kVector]) {
  const bool odd = threadIdx.x & 1;
  Chunk first, second;
  HFAC_UNROLLED (k, 4) {
    const uint32_t low = bits_of(x[k]), high = bits_of(x[k + 4]);
    const uint32_t received = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    first.word[k] = odd ? received : low;
    second.word[k] = odd ? high : received;
  }
  const int64_t from = odd ? at - 4 : at;
  if (from < end) store_chunk(global(p) + from, first);
  if (from + kVector < end) store_chunk(global(p) + from + kVector, second);
}

template <class A, class T>
HFAC_DEVICE void store_moments(T* p, int64_t at, int count, int64_t end, const T (&x)[kVector]) {
  if constexpr (A::kWhole) {
    store_pairs(p, at, end, x);
  } else {
    HFAC_UNROLLED (k, kVector) {
      if (k < count) global(p)[at + k] = x[k];
    }
  }
}

template <class A, class Target, class T>
HFAC_DEVICE void store_param(const Target& target, const int64_t* layouts, int64_t at, int count, int64_t end,
                             T (&x)[kVector]) {
  if constexpr (std::is_same_v<typename A::Param, Raw<float>>) {
    store_pairs(static_cast<float*>(target.data), at, end, x);
  } else if (count) {
    A::store(target, layouts, at, count, x);
  }
}

// A run's gradients, unscaled: body(g, count), where those from `count` on repeat one of the others or are zeros.
template <class A, int kTogether, class Body>
HFAC_DEVICE void each_gradient(const Arguments& a, const DeviceItem& it, const Run& run, const Body& body) {
  using T = typename A::T;
  const Gradient<T> gradient(a);
  const Operand grad = it.grad;
  each_vector<A, kTogether>(
      run, [&](int64_t at) { return A::grad(grad, a.layouts, at, kVector, false); },
      [&](const typename A::Grad& raw, int64_t, int count) {
        T g[kVector];
        A::widen(raw, g);
        gradient.unscale(g);
        body(g, count);
      });
  each_rest(run, [&](int64_t at) {
    T g[kVector];
    load_any(rest_of<A>(it.grad), a.layouts, at, 1, g);
    repeat(g);
    gradient.unscale(g);
    body(g, 1);
  });
}

template <class A, int kTogether>
HFAC_DEVICE bool run_nonfinite(const Arguments& a, const DeviceItem& it, const Run& run) {
  using T = typename A::T;
  const T elements = static_cast<T>(it.rows * it.cols);
  bool bad = false;
  each_gradient<A, kTogether>(a, it, run, [&](const T(&g)[kVector], int) {
    const bool here = nonfinite(g, elements);
    bad = bad || here;
  });
  return bad;
}

template <class A>
__global__ void __launch_bounds__(kTileThreads) look(Arguments a) {
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (run_nonfinite<A, A::kWhole ? 4 : 1>(a, it, Run(it, tile.index))) atomicOr(a.nonfinite + it.index, 1);
}

// Sums of squares of gradients: of each thread's elements in the arithmetic's type, of all threads and blocks in
// double.
template <class A>
__global__ void __launch_bounds__(kTileThreads) squares(Arguments a) {
  using T = typename A::T;
  __shared__ double shared[kTileWarps];
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (skipped(a)) {
    if (tile.index == 0 && threadIdx.x == 0) a.squares[it.index] = static_cast<double>(NAN);
    return;
  }
  T sum = T(0);
  each_gradient<A, A::kWhole ? 4 : 1>(a, it, Run(it, tile.index), [&](const T(&g)[kVector], int count) {
    HFAC_UNROLLED (k, kVector) sum = sum + (k < count ? g[k] * g[k] : T(0));
  });
  double* const sums = reinterpret_cast<double*>(a.workspace + it.partials);
  const int64_t runs = ceil_quotient(it.rows * it.cols, kRun);
  add_up(static_cast<double>(sum), tile.index, runs, sums, a.counters + it.counter, shared, a.squares + it.index);
}

// A parameter of one run is looked at by the block that steps it; true: it keeps every bit.
template <class A>
HFAC_DEVICE bool refuse_run(const Arguments& a, const DeviceItem& it, typename A::T* shared) {
  using T = typename A::T;
  if (!a.nonfinite) return false;
  if (it.rows * it.cols > kRun) return a.nonfinite[it.index];
  const T bad = block_sum(run_nonfinite<A, 1>(a, it, Run(it, 0)) ? T(1) : T(0), shared);
  if (bad > T(0) && threadIdx.x == 0) a.nonfinite[it.index] = 1;
  return bad > T(0);
}

// H-Fac's second moment, and what the first is divided by.
template <class T>
struct HfacSquare {
  Decay<T> b2;
  T eps;
  HFAC_DEVICE HfacSquare(const Arguments& a, const DeviceItem& it)
      : b2(kept(Decay<T>(a.scalars.beta2, it.index))), eps(kept(static_cast<T>(a.options.eps))) {}
  HFAC_DEVICE T operator()(T g, T& square) const {
    square = hfac_average(b2.beta, square, b2.rest, g * g + eps);
    return root(square);
  }
};

// Sum of U^2, before clipping, over a run, the same in every thread.
template <class A>
HFAC_DEVICE typename A::T run_norm(const Arguments& a, const DeviceItem& it, const Run& run, typename A::T* shared) {
  using T = typename A::T;
  struct Loaded {
    typename A::Grad grad;
    T square[kVector];
  };
  const Operand grad = it.grad;
  const T* const squares = static_cast<const T*>(it.second_row);
  const Gradient<T> gradient(a);
  const HfacSquare<T> divisor(a, it);
  T norm = T(0);
  const auto add = [&](T(&g)[kVector], T(&square)[kVector], int count) {
    gradient(g);
    HFAC_UNROLLED (k, kVector) {
      const T update = g[k] / divisor(g[k], square[k]);
      if (k < count) norm = norm + update * update;
    }
  };
  each_vector<A, A::kWhole ? 2 : 1>(
      run,
      [&](int64_t at) {
        Loaded loaded;
        loaded.grad = A::grad(grad, a.layouts, at, kVector, false);
        load_moments<A>(squares, at, kVector, loaded.square);
        return loaded;
      },
      [&](Loaded& loaded, int64_t, int count) {
        T g[kVector];
        A::widen(loaded.grad, g);
        add(g, loaded.square, count);
      });
  each_rest(run, [&](int64_t at) {
    T g[kVector], square[kVector];
    load_any(rest_of<A>(it.grad), a.layouts, at, 1, g);
    load_moments<AnyAccess<T>>(squares, at, 1, square);
    repeat(g);
    repeat(square);
    add(g, square, 1);
  });
  return block_sum(norm, shared);
}

template <class T>
HFAC_DEVICE T dense_clip(const Arguments& a, const DeviceItem& it, T norm) {
  return T(1) / hfac_clip_divisor(root(norm / static_cast<T>(it.rows * it.cols)), a.options.clip_threshold);
}

// The norm of a parameter of several runs, whose last block adds those of all once. Gradients of 32 bits take more
// registers than a fourth block would leave.
template <class A>
constexpr int kLookBlocks = !A::kWhole                                 ? 1
                            : sizeof(typename A::Grad) > sizeof(Chunk) ? 3
                                                                       : 4;
template <class A>
__global__ void __launch_bounds__(kTileThreads, kLookBlocks<A>) dense_look(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kTileWarps];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  const DenseSpace<T> space(it, a.workspace);
  const Run run(it, tile.index);
  if (a.nonfinite && run_nonfinite<A, A::kWhole ? 4 : 1>(a, it, run)) atomicOr(a.nonfinite + it.index, 1);
  const T norm = run_norm<A>(a, it, run, shared);
  if (threadIdx.x == 0) space.norms[tile.index] = norm;
  const int64_t runs = ceil_quotient(it.rows * it.cols, kRun);
  if (!last_block(a.counters + it.counter, runs)) return;
  T sum = T(0);
  for (int64_t r = threadIdx.x; r < runs; r += int64_t{kTileThreads} * kVector) {
    T norms[kVector];
    HFAC_UNROLLED (k, kVector) {
      const int64_t at = r + k * kTileThreads;
      norms[k] = at < runs ? load_fresh(space.norms + at) : T(0);
    }
    HFAC_UNROLLED (k, kVector) sum = sum + norms[k];
  }
  const T total = block_sum(sum, shared);
  if (threadIdx.x == 0) *space.clip = dense_clip(a, it, total);
}

// H-Fac of one element: new moments and parameter. `direction` adds up U^2, before clipping.
template <class T>
struct HfacStep {
  Decay<T> b1;
  HfacSquare<T> divisor;
  T clip, lr, weight_decay;
  HFAC_DEVICE HfacStep(const Arguments& a, const DeviceItem& it, T clipped)
      : b1(kept(Decay<T>(a.scalars.beta1, it.index))),
        divisor(a, it),
        clip(clipped),
        lr(kept(static_cast<T>(value_of(a.scalars.lr, 0)))),
        weight_decay(kept(static_cast<T>(value_of(a.scalars.weight_decay, 0)))) {}
  HFAC_DEVICE bool with_first() const { return true; }
  HFAC_DEVICE void operator()(T g, T& w, T& first, T& second, T* direction) const {
    const T by = divisor(g, second);
    first = hfac_average(b1.beta, first, b1.rest, g);
    w = hfac_dense_update(w, g, first, by, clip, b1.beta, b1.rest, lr, weight_decay);
    if (direction) *direction = *direction + g / by * (g / by);
  }
};

// SMMF of one element.
template <class T>
struct SmmfStep {
  Decay<T> b1, b2;
  T lr, weight_decay, shrink, eps;
  bool coupled, first_moment;
  HFAC_DEVICE SmmfStep(const Arguments& a, const DeviceItem& it)
      : b1(kept(Decay<T>(a.scalars.beta1, it.index))),
        b2(kept(Decay<T>(a.scalars.beta2, it.index))),
        eps(kept(static_cast<T>(a.options.eps))),
        coupled(a.options.coupled),
        first_moment(a.options.first_moment) {
    const double wide = value_of(a.scalars.lr, 0), decay = value_of(a.scalars.weight_decay, 0);
    lr = kept(static_cast<T>(wide));
    weight_decay = kept(static_cast<T>(decay));
    shrink = kept(static_cast<T>(1 - wide * decay));
  }
  HFAC_DEVICE bool with_first() const { return first_moment; }
  HFAC_DEVICE void operator()(T g, T& w, T& first, T& second, T* direction) const {
    if (coupled) {
      g = g + weight_decay * w;
    } else {
      w = w * shrink;
    }
    first = first_moment ? smmf_first_moment(b1.beta * first, b1.rest, g) : g;
    second = smmf_second_moment(b2.beta * second, b2.rest, g);
    w = smmf_update(w, lr, first, second, eps);
    if (direction) {
      const T by = first / (root(second) + eps);
      *direction = *direction + by * by;
    }
  }
};

// This block's run of a parameter and of its moments, one step on.
template <class A, bool kWatched, class Step>
HFAC_DEVICE void step_run(const Arguments& a, const DeviceItem& it, const Run& run, const Step& step) {
  using T = typename A::T;
  struct Loaded {
    typename A::Grad grad;
    typename A::Param param;
    T first[kVector], second[kVector];
  };
  const Gradient<T> gradient(a);
  const auto param = A::target(a, it);
  T *const first = static_cast<T*>(it.first_row), *const second = static_cast<T*>(it.second_row);
  Watch<A> watch;
  const auto advance = [&](const auto& target, T(&g)[kVector], T(&w)[kVector], T(&m)[kVector], T(&v)[kVector],
                           int count) {
    T old[kVector];
    HFAC_UNROLLED (k, kVector) old[k] = w[k];
    gradient(g);
    HFAC_UNROLLED (k, kVector) step(g[k], w[k], m[k], v[k], kWatched && k < count ? &watch.direction : nullptr);
    if constexpr (kWatched) watch.add(target, old, w, count);
  };
  each_vector<A, 1>(
      run,
      [&](int64_t at) {
        Loaded loaded;
        loaded.grad = A::grad(it.grad, a.layouts, at, kVector, true);
        load_moments<A>(second, at, kVector, loaded.second);
        if (step.with_first()) load_moments<A>(first, at, kVector, loaded.first);
        loaded.param = A::param(param, a.layouts, at, kVector);
        return loaded;
      },
      [&](Loaded& loaded, int64_t at, int count) {
        T g[kVector], w[kVector];
        A::widen(loaded.grad, g);
        A::widen(loaded.param, w);
        advance(param, g, w, loaded.first, loaded.second, count);
        if (step.with_first()) store_moments<A>(first, at, count, run.end, loaded.first);
        store_moments<A>(second, at, count, run.end, loaded.second);
        store_param<A>(param, a.layouts, at, count, run.end, w);
      });
  if constexpr (RestAccess<A>::kAny) {
    using Rest = typename RestAccess<A>::Type;
    each_rest(run, [&](int64_t at) {
      T g[kVector], w[kVector], m[kVector]{}, v[kVector];
      std::remove_const_t<decltype(param)> target = A::target(a, it);
      if constexpr (A::kWhole) target = rest_of<A>(target);
      load_any(rest_of<A>(it.grad), a.layouts, at, 1, g);
      Rest::widen(Rest::param(target, a.layouts, at, 1), w);
      load_moments<Rest>(second, at, 1, v);
      if (step.with_first()) load_moments<Rest>(static_cast<T*>(it.first_row), at, 1, m);
      repeat(g);
      repeat(w);
      repeat(v);
      repeat(m);
      advance(target, g, w, m, v, 1);
      if (step.with_first()) store_moments<Rest>(first, at, 1, run.end, m);
      store_moments<Rest>(second, at, 1, run.end, v);
      Rest::store(target, a.layouts, at, 1, w);
    });
  }
  if constexpr (kWatched) watch.finish(a, it);
}

// Of a multiprocessor at a time. Pieces of a parameter and random bits take registers of their own.
template <class A, bool kWatched>
constexpr int kBlocks = !A::kWhole || kWatched ? 1
                        : RestAccess<A>::kAny  ? 3
                                               : 2;
// A third would leave too few for a parameter of 32 bits and a gradient of 16 there; two have 57 KB under way.
template <class A, bool kWatched>
constexpr int kHfacBlocks =
    kMoreRegisters && A::kWhole && sizeof(typename A::Grad) < sizeof(typename A::Param) && kBlocks<A, kWatched> > 2
        ? 2
        : kBlocks<A, kWatched>;

template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, kHfacBlocks<A, kWatched>) hfac_dense(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kTileWarps];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refuse_run<A>(a, it, shared)) return;
  const Run run(it, tile.index);
  T clip = T(1);
  if (a.options.clip) {
    clip = it.rows * it.cols > kRun ? *DenseSpace<T>(it, a.workspace).clip
                                    : dense_clip(a, it, run_norm<A>(a, it, run, shared));
  }
  step_run<A, kWatched>(a, it, run, HfacStep<T>(a, it, clip));
}

template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, kBlocks<A, kWatched>) smmf_dense(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kTileWarps];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refuse_run<A>(a, it, shared)) return;
  step_run<A, kWatched>(a, it, Run(it, tile.index), SmmfStep<T>(a, it));
}

// Kernels that touch gradients and states alone.
#define HFAC_BY_GRADIENT(launch, kernel)             \
  return kernel_for((launch).access, GradAccesses(), \
                    [](auto access) -> KernelFunction { return kernel<decltype(access)>; })

}  // namespace

KernelFunction look_kernel(const Launch& l, const Arguments&) { HFAC_BY_GRADIENT(l, look); }
KernelFunction squares_kernel(const Launch& l, const Arguments&) { HFAC_BY_GRADIENT(l, squares); }
KernelFunction dense_look_kernel(const Launch& l, const Arguments&) { HFAC_BY_GRADIENT(l, dense_look); }
KernelFunction hfac_dense_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, PairAccesses, hfac_dense);
}
KernelFunction smmf_dense_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, PairAccesses, smmf_dense);
}

}  // namespace hfac
