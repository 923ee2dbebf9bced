// What a thread of H-Fac's statistics knows of its rows, and what it adds up of them.
#pragma once

#include "../common/math/hfac.h"
#include "stored.cuh"

namespace hfac {

using common::hfac_average;

// What all rows of a block have in common: beta2 and its rest, eps of a whole row, what gradients are divided by, and
// of the parameter's elements how many; where the tile's gradient, moments and sums of rows begin, and its rows.
template <class T>
struct StatsNumbers {
  T beta, rest, eps, scale, elements;
  const void* data;
  const T* moments;
  T *fresh, *fresh_square;
  int rows, cols;
};

// A block's rows. `kOptions`: gradients may be scaled, those that are not finite looked for, and all left as it is
// where the step is to be skipped or has its statistics; the plain kernel has no instruction for any of them. `kLean`:
// the numbers are in shared memory and loaded for every use, where the columns' sums leave no registers for them.
template <class A, bool kOptions, bool kLean = false>
struct Stats {
  using T = typename A::T;
  using Grad = typename A::Grad;
  const Arguments& a;
  const DeviceItem& it;
  const Operand grad = it.grad;
  const int index;
  const int64_t first_row;
  const int tile_rows;
  const StatsNumbers<T>* shared = nullptr;
  StatsNumbers<T> own{};
  bool bad = false;

  HFAC_DEVICE Stats(const Arguments& arguments, const Tile& tile)
      : a(arguments),
        it(arguments.items[tile.item]),
        index(tile.index),
        first_row(static_cast<int64_t>(tile.index) * it.tiling.rows),
        tile_rows(tile.index + 1 < it.tiling.row_tiles ? it.tiling.rows : static_cast<int>(it.rows - first_row)) {}

  // By all threads: they go on together where the numbers are shared.
  HFAC_DEVICE void begin(StatsNumbers<T>& memory) {
    if (!kLean || threadIdx.x == 0) {
      const Decay<T> b2(a.scalars.beta2, it.index);
      own.beta = b2.beta;
      own.rest = b2.rest;
      own.eps = static_cast<T>(static_cast<double>(it.whole_cols) * a.options.eps);
      own.scale = kOptions && a.grad_scale ? static_cast<T>(*a.grad_scale) : T(1);
      own.elements = static_cast<T>(it.rows * it.cols);
      own.rows = tile_rows;
      own.cols = static_cast<int>(it.cols);
      own.data =
          static_cast<const char*>(grad.data) + first_row * it.cols * static_cast<int64_t>(sizeof(Grad) / kVector);
      own.moments = moments_before();
      own.fresh = of_rows(false);
      own.fresh_square = of_rows(true);
      if constexpr (kLean) memory = own;
    }
    if constexpr (kLean) {
      __syncthreads();
      shared = &memory;
    }
  }
  template <class N>
  HFAC_DEVICE N get(N StatsNumbers<T>::* which) const {
    if constexpr (kLean) return load_fresh(&(shared->*which));
    return own.*which;
  }
  HFAC_DEVICE int rows() const { return get(&StatsNumbers<T>::rows); }

  // Where the tile's sums go, those of its columns and of its rows; `odd`: r in place of the sum.
  HFAC_DEVICE T* of_columns() const {
    return HfacSpace<T>(it, a.workspace).cols + static_cast<int64_t>(index) * kSums * it.cols;
  }
  HFAC_DEVICE T* of_rows(bool odd) const {
    const HfacSpace<T> space(it, a.workspace);
    return (odd ? space.row_square : space.row_sum) + first_row;
  }
  HFAC_DEVICE const T* moments_before() const { return global(static_cast<const T*>(it.second_row)) + first_row; }

  HFAC_DEVICE Grad load(int row, int64_t col, int count) const {
    return A::grad(grad, a.layouts, (first_row + row) * it.cols + col, count, false);
  }

  // One by one, right before each is used: eight quotients at a time would take eight registers. The sign of a
  // maximized gradient is left to the fold.
  HFAC_DEVICE T unscaled(T g) const {
    if constexpr (kOptions) {
      if (a.grad_scale) return g / get(&StatsNumbers<T>::scale);
    }
    return g;
  }

  // Elements [from, to) of a vector in one thread's part of a row's sums.
  HFAC_DEVICE void add(const Grad& raw, T& sum, T& square, int from = 0, int to = kVector) {
    T g[kVector];
    A::widen(raw, g);
    HFAC_UNROLLED (k, kVector) {
      if (k < from || k >= to) continue;
      const T x = unscaled(g[k]);
      sum = sum + x;
      square = fused(x, x, square);
      if constexpr (kOptions) {
        if (a.nonfinite) bad = bad || nonfinite(x, get(&StatsNumbers<T>::elements));
      }
    }
  }

  HFAC_DEVICE void add(const Grad& raw, T inverse, T (&sums)[kSums][kVector], int from = 0, int to = kVector) const {
    T g[kVector];
    A::widen(raw, g);
    HFAC_UNROLLED (k, kVector) {
      if (k < from || k >= to) continue;
      const T x = unscaled(g[k]), square = x * x;
      sums[0][k] = sums[0][k] + x;
      sums[1][k] = sums[1][k] + square;
      sums[2][k] = fused(square, inverse, sums[2][k]);
    }
  }

  // r_i of a row whose sum of squares is known.
  HFAC_DEVICE T moment(T before, T square) const {
    using Numbers = StatsNumbers<T>;
    return hfac_average(get(&Numbers::beta), before, get(&Numbers::rest), square + get(&Numbers::eps));
  }
  // Of zeros alone the sum is -0: no other comes out as that.
  static HFAC_DEVICE T marked(T sum, T square) { return sum == T(0) && square == T(0) ? -T(0) : sum; }

  HFAC_DEVICE void finish() const {
    if (kOptions && a.nonfinite && bad) atomicOr(a.nonfinite + it.index, 1);
  }
};

// Which part of a block's rows a thread has.
struct RowThreads {
  int lanes, ys, y, x;  // threads that share a row; rows at once; the thread's row, and its place in it
  HFAC_DEVICE RowThreads(const Tiling& t, int threads, int thread)
      : lanes(t.lanes),
        ys(threads * t.part_of_lane >> kPartBits),
        y(thread * t.part_of_lane >> kPartBits),
        x(thread - y * lanes) {}
};

}  // namespace hfac
