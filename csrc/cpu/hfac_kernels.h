// H-Fac on contiguous rows: the statistics hold a few rows in cache, so that one read of the gradient gives every sum,
// the clip norm's included; the update is a second read.
#pragma once

#include "../common/math/hfac.h"
#include "kernels.h"
#include "simd_io.h"

namespace hfac {
namespace HFAC_LEVEL {

template <class T, class Sg>
bool nonfinite_square(const void* grad, int64_t count, T elements) {
  constexpr int64_t L = Vec<T>::kLanes;
  const Sg* g = static_cast<const Sg*>(grad);
  Vec<T> poison[2] = {Vec<T>(T(0)), Vec<T>(T(0))};  // x - x is 0 where x is finite, NaN elsewhere
  int64_t j = 0;
  for (; j + 2 * L <= count; j += 2 * L) {
    for (int k = 0; k < 2; ++k) {
      const Vec<T> x = load(g + j + k * L), all = x * x * Vec<T>(elements);
      poison[k] = poison[k] + (all - all);
    }
  }
  for (; j < count; j += L) {
    const Vec<T> x = load_part<T>(g + j, count - j < L ? count - j : L), all = x * x * Vec<T>(elements);
    poison[0] = poison[0] + (all - all);
  }
  return sum(poison[0] + poison[1]) != T(0);
}

// R rows from row `i` on: their sums, and their new r.
template <class T, class Sg, int R, bool kSums>
struct HfacRowSums {
  const Sg* g[R];
  Vec<T> total[R], square[R];

  HFAC_HD HfacRowSums(const HfacStats<T>& a, int64_t i) {
    for (int r = 0; r < R; ++r) {
      g[r] = static_cast<const Sg*>(a.grad) + (i + r) * a.grad_stride;
      total[r] = square[r] = Vec<T>(T(0));
    }
  }
  HFAC_HD void add(int r, Vec<T> x) {
    if (kSums) total[r] = total[r] + x;
    square[r] = square[r] + x * x;
  }
  HFAC_HD void add_rest(int64_t j, int64_t left) {
    for (int r = 0; r < R; ++r) add(r, load_part<T>(g[r] + j, left));
  }
  HFAC_HD void finish(HfacStats<T>& a, int64_t i) {
    for (int r = 0; r < R; ++r) {
      const T squares = sum(square[r]);
      if (kSums) a.row_sum[i + r] = sum(total[r]);
      a.row_square[i + r] = hfac_average(a.beta2, a.row_square_old[i + r], a.rest2, squares + a.eps_sum);
      // Only an element decides, but none does where even the sum stays finite.
      const T all = squares * a.elements;
      if (!(all - all == T(0)) && nonfinite_square<T, Sg>(g[r], a.cols, a.elements)) a.nonfinite = true;
    }
  }
};

// What R rows from row `i` on, whose r are known, add to the columns' sums.
template <class T, class Sg, int R, bool kSums>
struct HfacColSums {
  const Sg* g[R];
  Vec<T> inverse[R];

  HFAC_HD HfacColSums(const HfacStats<T>& a, int64_t i) {
    for (int r = 0; r < R; ++r) {
      g[r] = static_cast<const Sg*>(a.grad) + (i + r) * a.grad_stride;
      inverse[r] = Vec<T>(T(1) / a.row_square[i + r]);
    }
  }
  HFAC_HD void add(const HfacStats<T>& a, int64_t j, const Vec<T>* x) const {
    Vec<T> total(T(0));
    if (kSums) total = load(static_cast<const T*>(a.col_sum + j));
    Vec<T> square = load(static_cast<const T*>(a.col_square + j));
    Vec<T> ratio = load(static_cast<const T*>(a.col_ratio + j));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> xx = x[r] * x[r];
      if (kSums) total = total + x[r];
      square = square + xx;
      ratio = ratio + xx * inverse[r];
    }
    if (kSums) store(a.col_sum + j, total);
    store(a.col_square + j, square);
    store(a.col_ratio + j, ratio);
  }
  HFAC_HD void add_rest(const HfacStats<T>& a, int64_t j, int64_t left) const {
    Vec<T> x[R];
    for (int r = 0; r < R; ++r) x[r] = load_part<T>(g[r] + j, left);
    add(a, j, x);
  }
};

// Half of the next R rows, `next` elements further on, are called from memory meanwhile.
template <class T, class Sg, int R, bool kSums>
HFAC_HD void hfac_row_sums(HfacStats<T>& a, int64_t i, int64_t next) {
  constexpr int64_t L = Vec<T>::kLanes;
  HfacRowSums<T, Sg, R, kSums> rows(a, i);
  int64_t j = 0;
  for (; j + L <= a.cols; j += L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r < R / 2) __builtin_prefetch(rows.g[r] + next + j, 0, 2);
      rows.add(r, load(rows.g[r] + j));
    }
  }
  if (j < a.cols) rows.add_rest(j, a.cols - j);
  rows.finish(a, i);
}

// Column sums of the same rows, now in cache, while the other half of the next R rows is on its way.
template <class T, class Sg, int R, bool kSums>
HFAC_HD void hfac_col_sums(const HfacStats<T>& a, int64_t i, int64_t next) {
  constexpr int64_t L = Vec<T>::kLanes;
  const HfacColSums<T, Sg, R, kSums> cols(a, i);
  Vec<T> x[R];
  int64_t j = 0;
  for (; j + L <= a.cols; j += L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r >= R / 2) __builtin_prefetch(cols.g[r] + next + j, 0, 2);
      x[r] = load(cols.g[r] + j);
    }
    cols.add(a, j, x);
  }
  if (j < a.cols) cols.add_rest(a, j, a.cols - j);
}

// As many groups of R rows as there are; returns the first row beyond.
template <class T, class Sg, int R, bool kSums>
HFAC_HD int64_t hfac_stats_by(HfacStats<T>& a, int64_t i) {
  for (; i + R <= a.rows; i += R) {
    const int64_t next = i + 2 * R <= a.rows ? R * a.grad_stride : 0;
    hfac_row_sums<T, Sg, R, kSums>(a, i, next);
    if (a.col_sum) hfac_col_sums<T, Sg, R, kSums>(a, i, next);
  }
  return i;
}

#if HFAC_REGISTER > 32
// Likewise, with the columns' sums of R rows, which are in cache, and the sums of the R rows behind them, which come
// from memory, in one loop: memory is waited for while there is something to add up.
template <class T, class Sg, int R, bool kSums>
HFAC_HD int64_t hfac_stats_in_turn(HfacStats<T>& a, int64_t i) {
  constexpr int64_t L = Vec<T>::kLanes;
  if (i + R > a.rows) return i;
  hfac_row_sums<T, Sg, R, kSums>(a, i, 0);
  for (; i + 2 * R <= a.rows; i += R) {
    HfacRowSums<T, Sg, R, kSums> rows(a, i + R);
    const HfacColSums<T, Sg, R, kSums> cols(a, i);
    int64_t j = 0;
    for (; j + L <= a.cols; j += L) {
      const int64_t ahead = along<R>(kAhead, a.cols - j, a.grad_stride, sizeof(Sg));
      Vec<T> x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows.g[r] + j) + ahead);
        rows.add(r, load(rows.g[r] + j));
        x[r] = load(cols.g[r] + j);
      }
      cols.add(a, j, x);
    }
    if (const int64_t left = a.cols - j; left > 0) {
      rows.add_rest(j, left);
      cols.add_rest(a, j, left);
    }
    rows.finish(a, i + R);
  }
  hfac_col_sums<T, Sg, R, kSums>(a, i, 0);
  return i + R;
}
#endif

template <class T, class Sg, bool kSums>
HFAC_HD void hfac_stats_of(HfacStats<T>& a) {
  int64_t i = 0;
#if HFAC_REGISTER > 32  // 32 registers hold eight rows; the columns' sums are then read and written half as often
  // Of 16 bits a row's sums take longer to add up than its lines to come: in one loop with them columns' sums wait.
  if (sizeof(Sg) >= 4 && a.col_sum && a.ahead != kNextRows) i = hfac_stats_in_turn<T, Sg, 8, kSums>(a, i);
  i = hfac_stats_by<T, Sg, 8, kSums>(a, i);
#endif
  i = hfac_stats_by<T, Sg, kRowsAtOnce, kSums>(a, i);
  hfac_stats_by<T, Sg, 1, kSums>(a, i);
}

template <class T, class Sg>
void hfac_stats(HfacStats<T>& a) {
  a.row_sum ? hfac_stats_of<T, Sg, true>(a) : hfac_stats_of<T, Sg, false>(a);
}

// `kFetch`: which lines are asked for (fetch_ahead).
template <class T, class Sw, class Sg, int64_t kFetch, int R>
HFAC_HD void hfac_update_rows(const HfacUpdate<T>& a, int64_t i) {
  constexpr int64_t L = Vec<T>::kLanes;
  const Sg* g[R];
  Sw* w[R];
  for (int r = 0; r < R; ++r) {
    g[r] = static_cast<const Sg*>(a.grad) + (i + r) * a.grad_stride;
    w[r] = static_cast<Sw*>(a.param) + (i + r) * a.param_stride;
  }
  const int64_t next = i + 2 * R <= a.rows ? R * a.param_stride : 0;  // to where the next R rows are
  const Vec<T> decay(a.decay);
  const auto step = [&](int r, Vec<T> w, Vec<T> g, Vec<T> half_psi, Vec<T> col_scale) __attribute__((always_inline)) {
    return hfac_update_by_lr(w, g, Vec<T>(a.row_first[i + r]), half_psi, col_scale, Vec<T>(a.row_scale[i + r]), decay);
  };
  int64_t j = 0;
  for (; j + L <= a.cols; j += L) {
    const Vec<T> half_psi = load(a.col_first + j), col_scale = load(a.col_scale + j);
    Vec<T> x[R], y[R];
    const int64_t left = a.cols - j;
    const int64_t g_ahead = along<R>(kFetch == kNextRows ? kAhead : kFetch, left, a.grad_stride, sizeof(Sg));
    const int64_t w_ahead = along<R>(kFetch, left, a.param_stride, sizeof(Sw));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(g[r] + j) + g_ahead);
      if constexpr (kFetch == kNextRows) {  // the gradient, which the statistics have read, is nearer
        __builtin_prefetch(w[r] + next + j, 0, 2);
      } else {
        __builtin_prefetch(reinterpret_cast<const char*>(w[r] + j) + w_ahead, 1);
      }
      x[r] = load(g[r] + j);
      y[r] = load(static_cast<const Sw*>(w[r] + j));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(w[r] + j, step(r, y[r], x[r], half_psi, col_scale));
  }
  if (const int64_t left = a.cols - j; left > 0) {
    const Vec<T> half_psi = load_part<T>(a.col_first + j, left), col_scale = load_part<T>(a.col_scale + j, left);
    for (int r = 0; r < R; ++r) {
      const Vec<T> y = load_part<T>(w[r] + j, left);
      store_part(w[r] + j, step(r, y, load_part<T>(g[r] + j, left), half_psi, col_scale), left);
    }
  }
}

template <class T, class Sw, class Sg>
void hfac_update_all(const HfacUpdate<T>& a) {
  int64_t i = 0;
  if (a.ahead != kAhead) {
    for (; i + kRowsAtOnce <= a.rows; i += kRowsAtOnce) hfac_update_rows<T, Sw, Sg, kOtherAhead, kRowsAtOnce>(a, i);
  }
  for (; i + kRowsAtOnce <= a.rows; i += kRowsAtOnce) hfac_update_rows<T, Sw, Sg, kAhead, kRowsAtOnce>(a, i);
  for (; i < a.rows; ++i) hfac_update_rows<T, Sw, Sg, kAhead, 1>(a, i);
}

// Both moments whole: g, new m, new q and its root.
template <class T, class Sg>
struct HfacDense {
  const Scalars<T>& s;
  const DenseRun<T>& a;
  Vec<T> g, average, square, denominator;

  HFAC_HD void at(int64_t j) {
    constexpr int64_t L = Vec<T>::kLanes;
    const Sg* g_at = static_cast<const Sg*>(a.grad) + j;
    const int64_t left = a.count - j;
    const bool whole = left >= L;
    g = flip(whole ? load(g_at) : load_part<T>(g_at, left), flip_mask<T>(s.negate));
    average = whole ? load(static_cast<const T*>(a.exp_avg + j)) : load_part<T>(a.exp_avg + j, left);
    square = whole ? load(static_cast<const T*>(a.exp_avg_sq + j)) : load_part<T>(a.exp_avg_sq + j, left);
    average = hfac_average(Vec<T>(s.beta1), average, Vec<T>(s.rest1), g);
    square = hfac_average(Vec<T>(s.beta2), square, Vec<T>(s.rest2), g * g + Vec<T>(s.eps));
    denominator = root(square);
  }

  // Of U, before clipping.
  HFAC_HD Vec<T> squared_update() const {
    const Vec<T> update = g / denominator;
    return update * update;
  }
};

template <class T, class Sg>
T hfac_dense_norm(const Scalars<T>& s, const DenseRun<T>& a) {
  constexpr int64_t L = Vec<T>::kLanes;
  HfacDense<T, Sg> x{s, a, {}, {}, {}, {}};
  Vec<T> total(T(0));
  int64_t j = 0;
  for (; j + L <= a.count; j += L) {
    x.at(j);
    total = total + x.squared_update();
  }
  T norm = sum(total);
  if (j < a.count) {
    x.at(j);
    T lanes[L];
    store(lanes, x.squared_update());
    for (int64_t l = 0; l < a.count - j; ++l) norm += lanes[l];  // the lanes beyond may be 0 / 0
  }
  return norm;
}

template <class T, class Sw, class Sg>
void hfac_dense(const Scalars<T>& s, const DenseRun<T>& a) {
  constexpr int64_t L = Vec<T>::kLanes;
  const Vec<T> clip(s.clip), beta1(s.beta1), rest1(s.rest1), lr(s.lr), weight_decay(s.weight_decay);
  HfacDense<T, Sg> x{s, a, {}, {}, {}, {}};
  for (int64_t j = 0; j < a.count; j += L) {
    Sw* w_at = static_cast<Sw*>(a.param) + j;
    const int64_t left = a.count - j;
    const bool whole = left >= L;
    x.at(j);
    Vec<T> w = whole ? load(static_cast<const Sw*>(w_at)) : load_part<T>(w_at, left);
    w = hfac_dense_update(w, x.g, x.average, x.denominator, clip, beta1, rest1, lr, weight_decay);
    whole ? store(w_at, w) : store_part(w_at, w, left);
    whole ? store(a.exp_avg + j, x.average) : store_part(a.exp_avg + j, x.average, left);
    whole ? store(a.exp_avg_sq + j, x.square) : store_part(a.exp_avg_sq + j, x.square, left);
  }
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
