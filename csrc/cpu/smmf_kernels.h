// SMMF on contiguous rows: one read of the gradient and of the parameter, one write of the parameter, is the whole
// step.
#pragma once

#include <type_traits>

#include "../common/math/smmf.h"
#include "kernels.h"
#include "simd_io.h"

namespace hfac {
namespace HFAC_LEVEL {

template <class T>
struct SmmfSplat {
  Vec<T> rest1, rest2, lr, eps, shrink, weight_decay;
  typename Vec<T>::Int flip;

  HFAC_HD explicit SmmfSplat(const Scalars<T>& s)
      : rest1(s.rest1),
        rest2(s.rest2),
        lr(s.lr),
        eps(s.eps),
        shrink(s.shrink),
        weight_decay(s.weight_decay),
        flip(flip_mask<T>(s.negate)) {}

  // (SMMF, weight_decay_mode) through the gradient, or on the parameter.
  template <bool kCoupled>
  HFAC_HD Vec<T> gradient(Vec<T> g, Vec<T> w) const {
    g = hfac::HFAC_LEVEL::flip(g, flip);
    return kCoupled ? g + weight_decay * w : g;
  }
  template <bool kCoupled>
  HFAC_HD Vec<T> decayed(Vec<T> w) const {
    return kCoupled ? w : w * shrink;
  }
};

// What R rows carry through their columns.
template <class T, int R>
struct SmmfRowState {
  T minus_b1_r[R], b2_r[R];  // -(beta1 r_M), beta2 r_V
  Vec<T> sum_m[R], sum_v[R];
  Vec<T> direction;  // of all R rows, where it is watched: sums of the squares of what W moves by, but for lr
};

// R rows and one vector of columns: their new moments, and all that these are needed for but the update.
template <class T, bool kFirst, int R>
struct SmmfMoments {
  Vec<T> first[R];  // holds the gradient at first
  Vec<T> root_second[R];
  uint32_t bits[R];
  Vec<T> sum_m, sum_v;  // of the columns

  HFAC_HD void step(const SmmfSplat<T>& s, SmmfRowState<T, R>& rows, Vec<T> col_m, Vec<T> col_v) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> g = first[r];
      const Vec<T> second = smmf_second_moment(Vec<T>(rows.b2_r[r]) * col_v, s.rest2, g);
      rows.sum_v[r] = rows.sum_v[r] + second;
      sum_v = r == 0 ? second : sum_v + second;
      root_second[r] = root(second);
      if constexpr (kFirst) {
        const Vec<T> old = flip_where(Vec<T>(rows.minus_b1_r[r]) * col_m, bits[r]);
        first[r] = smmf_first_moment(old, s.rest1, g);
        bits[r] = positive_bits(first[r]);
        const Vec<T> size = magnitude(first[r]);
        rows.sum_m[r] = rows.sum_m[r] + size;
        sum_m = r == 0 ? size : sum_m + size;
      }
    }
  }
};

// Row r of a block whose rows lie `stride` bytes apart; `stride3` is three of them, so that four rows cost three
// registers.
template <class P>
HFAC_HD P* row(P* base, int64_t stride, int64_t stride3, int r) {
  using Byte = std::conditional_t<std::is_const<P>::value, const char, char>;
  Byte* p = reinterpret_cast<Byte*>(base);
  return reinterpret_cast<P*>(r == 3 ? p + stride3 : p + r * stride);
}

// Where R rows stand in their matrix, or in padded copies of their last columns; strides in bytes.
template <class T, class Sw, class Sg>
struct SmmfPlace {
  const Sg* g;
  Sw* w;
  uint8_t* bits;
  int64_t g_stride, w_stride, bits_stride;
  int64_t next;  // rows to the next R ones, or 0
  const T *col_m, *col_v;
  T *sum_m, *sum_v;
};

// R rows over `vectors` whole vectors of columns. Between a vector's square roots and its divisions, which depend on
// them, stand the divisions of the vector before: a processor looks ahead too short a way to find other work by itself.
// `kFetch`: which lines are asked for (fetch_ahead); a choice in the loop costs 2 to 4 % beyond the caches.
template <class T, class Sw, class Sg, bool kFirst, bool kCoupled, bool kWatch, int64_t kFetch, int R>
__attribute__((noinline)) void smmf_columns(const SmmfSplat<T>& s, SmmfRowState<T, R>& state, SmmfPlace<T, Sw, Sg> at,
                                            int64_t vectors) {
  constexpr int64_t L = Vec<T>::kLanes;
  constexpr int64_t kGradAhead = kFetch / (L * static_cast<int64_t>(sizeof(Sg)));
  constexpr int64_t kParamAhead = kFetch / (L * static_cast<int64_t>(sizeof(Sw)));
  const int64_t gs = at.g_stride, ws = at.w_stride, bs = at.bits_stride;
  const int64_t g_next = at.next * gs, w_next = at.next * ws;
  const int64_t gs3 = 3 * gs, ws3 = 3 * ws, bs3 = 3 * bs;
  const SmmfSplat<T> splat = s;
  SmmfRowState<T, R> rows = state;
  Vec<T> first[R], root_second[R], quotient[R];  // of the vector that waits for its update

  const auto moments = [&]() __attribute__((always_inline)) {
    SmmfMoments<T, kFirst, R> cell;
    // Past the end of its row a prefetch would find the next row, which is at work too; the row R further on is wanted.
    const int64_t g_ahead = kFetch == kNextRows ? g_next : vectors > kGradAhead ? kFetch : kFetch + (R - 1) * gs;
    const int64_t w_ahead = kFetch == kNextRows ? w_next : vectors > kParamAhead ? kFetch : kFetch + (R - 1) * ws;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Sg* g_at = row(at.g, gs, gs3, r);
      const Sw* w_at = row(at.w, ws, ws3, r);
      if constexpr (kFetch == kNextRows) {
        __builtin_prefetch(reinterpret_cast<const char*>(g_at) + g_ahead, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(w_at) + w_ahead, 0, 2);
      } else {
        __builtin_prefetch(reinterpret_cast<const char*>(g_at) + g_ahead);
        __builtin_prefetch(reinterpret_cast<const char*>(w_at) + w_ahead, 1);
      }
      cell.first[r] = splat.template gradient<kCoupled>(load(g_at), load(w_at));
      if constexpr (kFirst) cell.bits[r] = load_bits<T>(row(at.bits, bs, bs3, r));
    }
    Vec<T> c_m, c_v = load(at.col_v);
    if constexpr (kFirst) c_m = load(at.col_m);
    cell.step(splat, rows, c_m, c_v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      first[r] = cell.first[r];
      root_second[r] = cell.root_second[r];
      if constexpr (kFirst) store_bits<T>(row(at.bits, bs, bs3, r), cell.bits[r]);
    }
    store(at.sum_v, load(static_cast<const T*>(at.sum_v)) + cell.sum_v);
    if constexpr (kFirst) {
      store(at.sum_m, load(static_cast<const T*>(at.sum_m)) + cell.sum_m);
      at.bits += L / 8;
      at.col_m += L;
      at.sum_m += L;
    }
    at.g += L;
    at.w += L;
    at.col_v += L;
    at.sum_v += L;
  };
  // What follows is `smmf_update` in two halves.
  const auto divide = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) quotient[r] = first[r] / (root_second[r] + splat.eps);
    if constexpr (kWatch) {
      for (int r = 0; r < R; ++r) rows.direction = rows.direction + quotient[r] * quotient[r];
    }
  };
  // All loads stand before the first store: rows a multiple of 4096 bytes apart would else wait for each other.
  const auto update = [&](Sw* param) __attribute__((always_inline)) {
    Vec<T> w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      w[r] = splat.template decayed<kCoupled>(load(static_cast<const Sw*>(row(param, ws, ws3, r))));
      w[r] = w[r] - splat.lr * quotient[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(row(param, ws, ws3, r), w[r]);
  };

  if (vectors == 0) return;
  moments();
  while (--vectors > 0) {
    divide();
    moments();
    update(at.w - 2 * L);
  }
  divide();
  update(at.w - L);
  state = rows;
}

template <class T, class Sw, class Sg, bool kFirst, bool kCoupled, bool kWatch, int R>
HFAC_HD void smmf_rows_at_once(const Scalars<T>& scalars, const SmmfSplat<T>& s, const SmmfRows<T>& a, int64_t i) {
  constexpr int64_t L = Vec<T>::kLanes;
  SmmfPlace<T, Sw, Sg> at;
  at.g = static_cast<const Sg*>(a.grad) + i * a.grad_stride;
  at.w = static_cast<Sw*>(a.param) + i * a.param_stride;
  at.bits = kFirst ? a.signs + i * a.sign_stride : nullptr;
  at.g_stride = a.grad_stride * static_cast<int64_t>(sizeof(Sg));
  at.w_stride = a.param_stride * static_cast<int64_t>(sizeof(Sw));
  at.bits_stride = a.sign_stride;
  at.next = i + 2 * R <= a.rows ? R : 0;
  at.col_m = a.col_m;
  at.col_v = a.col_v;
  at.sum_m = a.sum_m;
  at.sum_v = a.sum_v;

  SmmfRowState<T, R> rows;
  for (int r = 0; r < R; ++r) {
    rows.b2_r[r] = scalars.beta2 * a.row_v[i + r];
    rows.sum_v[r] = Vec<T>(T(0));
    rows.minus_b1_r[r] = kFirst ? -(scalars.beta1 * a.row_m[i + r]) : T(0);
    rows.sum_m[r] = Vec<T>(T(0));
  }
  rows.direction = Vec<T>(T(0));
  auto* columns = smmf_columns<T, Sw, Sg, kFirst, kCoupled, kWatch, kAhead, R>;
  if constexpr (R > 1 && !kWatch) {
    if (a.ahead != kAhead) columns = smmf_columns<T, Sw, Sg, kFirst, kCoupled, kWatch, kOtherAhead, R>;
  }
  columns(s, rows, at, a.cols / L);
  if constexpr (kWatch) *a.direction += static_cast<double>(sum(rows.direction));

  // The last columns go through padded copies. The lanes beyond hold zeros, which add nothing to a sum.
  if (const int64_t left = a.cols % L; left > 0) {
    const int64_t done = a.cols - left, bytes = (left + 7) / 8;
    Sg g[R][L];
    Sw w[R][L];
    uint8_t bits[R][2] = {};
    T col_m[L], col_v[L];
    SmmfPlace<T, Sw, Sg> last = at;
    for (int r = 0; r < R; ++r) {
      read_lanes(static_cast<Sg*>(g[r]), at.g + r * a.grad_stride + done, left);
      read_lanes(static_cast<Sw*>(w[r]), static_cast<const Sw*>(at.w) + r * a.param_stride + done, left);
      if (kFirst) copy_part(static_cast<uint8_t*>(bits[r]), at.bits + r * a.sign_stride + done / 8, bytes);
    }
    read_lanes(static_cast<T*>(col_v), a.col_v + done, left);
    if (kFirst) read_lanes(static_cast<T*>(col_m), a.col_m + done, left);
    last.g = g[0];
    last.w = w[0];
    last.bits = bits[0];
    last.g_stride = sizeof(g[0]);
    last.w_stride = sizeof(w[0]);
    last.bits_stride = sizeof(bits[0]);
    last.col_m = col_m;
    last.col_v = col_v;
    last.sum_m += kFirst ? done : 0;
    last.sum_v += done;
    rows.direction = Vec<T>(T(0));
    smmf_columns<T, Sw, Sg, kFirst, kCoupled, kWatch, kAhead, R>(s, rows, last, 1);
    if constexpr (kWatch) {  // the lanes beyond may be 0 / 0
      T lanes[L];
      store(static_cast<T*>(lanes), rows.direction);
      for (int64_t l = 0; l < left; ++l) *a.direction += static_cast<double>(lanes[l]);
    }
    for (int r = 0; r < R; ++r) {
      write_lanes(at.w + r * a.param_stride + done, static_cast<const Sw*>(w[r]), left);
      if (kFirst) copy_part(at.bits + r * a.sign_stride + done / 8, static_cast<const uint8_t*>(bits[r]), bytes);
    }
  }

  for (int r = 0; r < R; ++r) {
    if constexpr (kFirst) a.row_m[i + r] = sum(rows.sum_m[r]);
    a.row_v[i + r] = sum(rows.sum_v[r]);
  }
}

template <class T, class Sw, class Sg, bool kFirst, bool kCoupled, bool kWatch>
void smmf_all_rows(const Scalars<T>& scalars, const SmmfRows<T>& a) {
  const SmmfSplat<T> s(scalars);
  int64_t i = 0;
  for (; i + kRowsAtOnce <= a.rows; i += kRowsAtOnce) {
    smmf_rows_at_once<T, Sw, Sg, kFirst, kCoupled, kWatch, kRowsAtOnce>(scalars, s, a, i);
  }
  for (; i < a.rows; ++i) smmf_rows_at_once<T, Sw, Sg, kFirst, kCoupled, kWatch, 1>(scalars, s, a, i);
}

template <class T, class Sw, class Sg>
void smmf_rows(const Scalars<T>& scalars, const SmmfRows<T>& a) {
  constexpr bool kStaged = std::is_same<Sw, T>::value && std::is_same<Sg, T>::value;  // as all that is watched
  const auto choose = [](bool flag, const auto& body) { flag ? body(std::true_type()) : body(std::false_type()); };
  choose(a.col_m, [&](auto first) {
    choose(scalars.coupled, [&](auto coupled) {
      choose(a.direction, [&](auto watch) { smmf_all_rows<T, Sw, Sg, first, coupled, watch && kStaged>(scalars, a); });
    });
  });
}

template <class T, class Sw, class Sg>
void smmf_dense(const Scalars<T>& scalars, const DenseRun<T>& a) {
  constexpr int64_t L = Vec<T>::kLanes;
  const SmmfSplat<T> s(scalars);
  const Vec<T> beta1(scalars.beta1), beta2(scalars.beta2);
  const Sg* g_at = static_cast<const Sg*>(a.grad);
  Sw* w_at = static_cast<Sw*>(a.param);
  for (int64_t j = 0; j < a.count; j += L) {
    const int64_t left = a.count - j;
    const bool whole = left >= L;
    Vec<T> g = whole ? load(g_at + j) : load_part<T>(g_at + j, left);
    Vec<T> w = whole ? load(static_cast<const Sw*>(w_at + j)) : load_part<T>(w_at + j, left);
    Vec<T> second = whole ? load(static_cast<const T*>(a.exp_avg_sq + j)) : load_part<T>(a.exp_avg_sq + j, left);
    g = scalars.coupled ? s.template gradient<true>(g, w) : s.template gradient<false>(g, w);
    w = scalars.coupled ? w : s.template decayed<false>(w);
    Vec<T> first = g;
    if (a.exp_avg) {
      first = whole ? load(static_cast<const T*>(a.exp_avg + j)) : load_part<T>(a.exp_avg + j, left);
      first = smmf_first_moment(beta1 * first, s.rest1, g);
      whole ? store(a.exp_avg + j, first) : store_part(a.exp_avg + j, first, left);
    }
    second = smmf_second_moment(beta2 * second, s.rest2, g);
    w = smmf_update(w, s.lr, first, second, s.eps);
    whole ? store(a.exp_avg_sq + j, second) : store_part(a.exp_avg_sq + j, second, left);
    whole ? store(w_at + j, w) : store_part(w_at + j, w, left);
  }
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
