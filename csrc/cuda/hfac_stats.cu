// H-Fac's statistics: sums of rows and columns from one read of the gradient.
//
// They hold whole rows, because r_i is needed for the third column sum, that of g^2 / r_i, which gives the clip norm
// without a third read:
//     sum_ij U_ij^2 = R sum_j w_j / s_j,  w_j = sum_i g_ij^2 / r_i,  R = sum_i r_i.
#include "../common/math/hfac.h"
#include "stored.cuh"

namespace hfac {
namespace {

using common::hfac_average;

// What the statistics' threads share: sums of rows, one value per warp; 1 / r_i.
constexpr int kStatsRows = kRowsInFlight * kStatsThreads;
template <class T>
struct StatsShared {
  T sums[kStatsThreads * kVector];  // of rows [row][2][warps], then of columns [k][thread]
  T inverse[kStatsRows];
};

// A block's rows and where its threads stand in them.
template <class A>
struct Stats {
  using T = typename A::T;
  const Arguments& a;
  const DeviceItem& it;
  StatsShared<T>& shared;
  const int tile;
  const Operand grad = it.grad;
  const Gradient<T> gradient{a};
  const Decay<T> b2{a.scalars.beta2, it.index};
  const int lanes = it.tiling.lanes;
  const int x = static_cast<int>(threadIdx.x) % it.tiling.lanes;
  const int y = static_cast<int>(threadIdx.x) / it.tiling.lanes;
  const int ys = static_cast<int>(blockDim.x) / it.tiling.lanes;
  const int warps = it.tiling.lanes > kWarp ? it.tiling.lanes / kWarp : 1;
  const int width = it.tiling.lanes < kWarp ? it.tiling.lanes : kWarp;
  const int tile_rows = static_cast<int>(it.rows - static_cast<int64_t>(tile) * it.tiling.rows < it.tiling.rows
                                             ? it.rows - static_cast<int64_t>(tile) * it.tiling.rows
                                             : it.tiling.rows);
  const int64_t rows = it.rows, cols = it.cols, first_row = static_cast<int64_t>(tile) * it.tiling.rows;
  bool bad = false;

  HFAC_DEVICE typename A::Grad load(int row, int64_t col, int count) const {
    return A::grad(grad, a.layouts, (first_row + row) * cols + col, count, false);
  }

  // One thread's part of a row's sums. The sign of a maximized gradient is left to the fold.
  HFAC_DEVICE void add(const typename A::Grad& raw, T& sum, T& square) {
    T g[kVector];
    A::widen(raw, g);
    gradient.unscale(g);
    HFAC_UNROLLED (k, kVector) {
      sum = sum + g[k];
      square = square + g[k] * g[k];
    }
    if (a.nonfinite) bad = bad || nonfinite(g, static_cast<T>(rows * cols));
  }

  HFAC_DEVICE void add(const typename A::Grad& raw, T inverse, T (&sums)[kSums][kVector]) const {
    T g[kVector];
    A::widen(raw, g);
    gradient.unscale(g);
    HFAC_UNROLLED (k, kVector) {
      const T square = g[k] * g[k];
      sums[0][k] = sums[0][k] + g[k];
      sums[1][k] = sums[1][k] + square;
      sums[2][k] = sums[2][k] + square * inverse;
    }
  }

  // Sums {sum, square} of this thread's rows base + r ys + y to shared memory; `at` is base's offset there.
  HFAC_DEVICE void put_rows(T (&sums)[kVector], int at) {
    sum_lanes(sums, width, [&](int k, T sum) {
      const int row = at + k / 2 * ys + y;
      shared.sums[(row * 2 + k % 2) * warps + x / kWarp] = sum;
    });
  }

  // Between two barriers: the batch's r_i, and the inverses that its column sums need.
  HFAC_DEVICE void finish_rows(int base, int batch) {
    __syncthreads();
    const int64_t length = a.shards ? a.shards[&it - a.items].cols : cols;
    const T eps_sum = static_cast<T>(static_cast<double>(length) * a.options.eps);
    for (int k = static_cast<int>(threadIdx.x); k < batch; k += static_cast<int>(blockDim.x)) {
      if (base + k >= tile_rows) continue;
      T sum = T(0), square = T(0);
      for (int w = 0; w < warps; ++w) {
        sum = sum + shared.sums[k * 2 * warps + w];
        square = square + shared.sums[(k * 2 + 1) * warps + w];
      }
      const int64_t i = first_row + base + k;
      const HfacSpace<T> space(it, a.workspace);
      const T r = hfac_average(b2.beta, static_cast<const T*>(it.second_row)[i], b2.rest, square + eps_sum);
      space.row_sum[i] = sum == T(0) && square == T(0) ? -T(0) : sum;  // of zeros alone: no sum comes out as -0
      space.row_square[i] = r;
      shared.inverse[k] = T(1) / r;
    }
    __syncthreads();
  }

  HFAC_DEVICE void finish() const {
    if (a.nonfinite && bad) atomicOr(a.nonfinite + it.index, 1);
  }
};

// Keeps loads on their side: the columns' sums leave no registers for loads that the compiler would like to hoist.
HFAC_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// Rows of up to kVectors vectors per thread; the columns' sums stay in registers for the whole tile. Short rows are
// held in registers between their own sums and their columns'; longer ones are read again while they are in L1.
template <class A, int kVectors>
__global__ void __launch_bounds__(kVectors == 1 ? kStatsThreads : kLongThreads, 1) hfac_stats(Arguments a) {
  using T = typename A::T;
  __shared__ StatsShared<T> shared;
  if (skipped(a) || unclipped(a)) return;
  const Tile tile = tile_of(a);
  Stats<A> s{a, a.items[tile.item], shared, tile.index};
  T sums[kVectors][kSums][kVector];
  HFAC_UNROLLED (k, kVectors * kSums * kVector) {
    sums[k / (kSums * kVector)][k / kVector % kSums][k % kVector] = T(0);
  }
  const int64_t step = static_cast<int64_t>(s.lanes) * kVector, first_col = static_cast<int64_t>(s.x) * kVector;

  const int batch = s.ys * kRowsInFlight;
  for (int base = 0; base < s.tile_rows; base += batch) {
    typename A::Grad held[kRowsInFlight];
    T row_sums[kVector];
    HFAC_UNROLLED (k, kVector) row_sums[k] = T(0);
    constexpr int kTogether = kVectors > 1 && sizeof(typename A::Grad) > 16 ? 2 : kRowsInFlight;
#pragma unroll
    for (int half = 0; half < kRowsInFlight; half += kTogether) {
#pragma unroll 1
      for (int64_t col = first_col; col < s.cols; col += step) {
        const int count = vector_count(col, s.cols);
#pragma unroll
        for (int r = half; r < half + kTogether; ++r) {
          const int row = base + r * s.ys + s.y;
          if (row < s.tile_rows) held[r] = s.load(row, col, count);
        }
#pragma unroll
        for (int r = half; r < half + kTogether; ++r) {
          const int row = base + r * s.ys + s.y;
          if (row < s.tile_rows) s.add(held[r], row_sums[2 * r], row_sums[2 * r + 1]);
        }
      }
    }
    s.put_rows(row_sums, 0);
    s.finish_rows(base, batch);
    HFAC_UNROLLED (v, kVectors) {
      const int64_t col = first_col + v * step;
      const int count = vector_count(col, s.cols);
      if (!count) continue;
      HFAC_UNROLLED (r, kRowsInFlight) {
        const int row = base + r * s.ys + s.y;
        if (row >= s.tile_rows) continue;
        if (kVectors > 1) held[r] = s.load(row, col, count);
        s.add(held[r], shared.inverse[r * s.ys + s.y], sums[v]);
        if (kVectors > 1 && r % 2) keep_order();
      }
    }
  }
  s.finish();

  T* out = HfacSpace<T>(s.it, a.workspace).cols + static_cast<int64_t>(tile.index) * kSums * s.cols;
  if (s.ys == 1) {
    HFAC_UNROLLED (v, kVectors) {
      const int64_t col = first_col + v * step;
      const int count = vector_count(col, s.cols);
      HFAC_UNROLLED (k, kSums * kVector) {
        if (k % kVector < count) out[k / kVector * s.cols + col + k % kVector] = sums[v][k / kVector][k % kVector];
      }
    }
    return;
  }
  // Threads of the same columns: their sums meet in shared memory, in the order of y. Rows have one vector per thread.
  HFAC_UNROLLED (statistic, kSums) {
    __syncthreads();
    HFAC_UNROLLED (k, kVector) {
      shared.sums[k * kStatsThreads + static_cast<int>(threadIdx.x)] = sums[0][statistic][k];
    }
    __syncthreads();
    for (int k = s.y; k < kVector; k += s.ys) {
      T sum = T(0);
      for (int from = 0; from < s.ys; ++from) sum = sum + shared.sums[k * kStatsThreads + from * s.lanes + s.x];
      if (k < vector_count(first_col, s.cols)) out[statistic * s.cols + s.x * kVector + k] = sum;
    }
  }
}

// Rows of any length: a few at a time, read twice, with the columns' sums in the workspace.
template <class A>
__global__ void __launch_bounds__(kLongThreads, 1) hfac_stats_wide(Arguments a) {
  using T = typename A::T;
  __shared__ StatsShared<T> shared;
  if (skipped(a) || unclipped(a)) return;
  const Tile tile = tile_of(a);
  Stats<A> s{a, a.items[tile.item], shared, tile.index};
  T* out = HfacSpace<T>(s.it, a.workspace).cols + static_cast<int64_t>(tile.index) * kSums * s.cols;
  for (int base = 0; base < s.tile_rows; base += kWideRows) {
    for (int first = 0; first < kWideRows; first += kRowsInFlight) {
      T row_sums[kVector];
      HFAC_UNROLLED (k, kVector) row_sums[k] = T(0);
      for (int64_t col = s.x * kVector; col < s.cols; col += kLongThreads * kVector) {
        const int count = vector_count(col, s.cols);
        HFAC_UNROLLED (r, kRowsInFlight) {
          const int row = base + first + r;
          if (row < s.tile_rows) s.add(s.load(row, col, count), row_sums[2 * r], row_sums[2 * r + 1]);
        }
      }
      s.put_rows(row_sums, first);
    }
    s.finish_rows(base, kWideRows);
    for (int64_t col = s.x * kVector; col < s.cols; col += kLongThreads * kVector) {
      const int count = vector_count(col, s.cols);
      T sums[kSums][kVector];
      HFAC_UNROLLED (k, kSums * kVector) {
        const bool kept = base > 0 && k % kVector < count;
        sums[k / kVector][k % kVector] = kept ? out[k / kVector * s.cols + col + k % kVector] : T(0);
      }
      for (int r = 0; r < kWideRows && base + r < s.tile_rows; ++r) {
        s.add(s.load(base + r, col, count), shared.inverse[r], sums);
      }
      HFAC_UNROLLED (k, kSums * kVector) {
        if (k % kVector < count) out[k / kVector * s.cols + col + k % kVector] = sums[k / kVector][k % kVector];
      }
    }
  }
  s.finish();
}

}  // namespace

KernelFunction hfac_stats_kernel(const Launch& l, const Arguments&) {
  return kernel_for(l.access, GradAccesses(), [&](auto access) -> KernelFunction {
    using A = decltype(access);
    if (l.width == Width::kNarrow) return hfac_stats<A, 1>;
    if constexpr (A::kWhole) {
      if (l.width == Width::kRegisters) return hfac_stats<A, kStatsVectors>;
    }
    return hfac_stats_wide<A>;
  });
}

}  // namespace hfac
