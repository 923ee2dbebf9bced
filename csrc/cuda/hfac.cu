// H-Fac on matrices in three launches: sums from one read of the gradient, a fold of O(rows + columns), and the update
// with a second read.
//
// The statistics hold whole rows, because r_i is needed for the third column sum, that of g^2 / r_i, which gives the
// clip norm without a third read:
//     sum_ij U_ij^2 = R sum_j w_j / s_j,  w_j = sum_i g_ij^2 / r_i,  R = sum_i r_i.
//
// Where gradients are clipped by the norm of them all, the first launch comes in a phase of its own: the norm is made
// of its column sums, which `hfac_collect` adds up over the tiles to outlast the other groups. Then each group goes on
// from there; where the coefficient is not 1 it takes the statistics again, because r_i depends on it.
#include "../math/hfac.h"
#include "launchers.h"
#include "stored.cuh"

namespace hfac {
namespace {

using common::hfac_average;
using common::hfac_half_drift;
using common::hfac_update;
using common::root;

constexpr int kSums = 3;  // of a column: g, g^2, g^2 / r_i

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
  const Item& it;
  StatsShared<T>& shared;
  const Operand grad;
  const Gradient<T> gradient;
  const Decay<T> b2;
  const int lanes, x, y, ys, warps, width, tile_rows;
  const int64_t rows, cols, first_row;
  bool bad = false;

  HFAC_DEVICE Stats(const Arguments& a_, const Item& it_, int part, StatsShared<T>& shared_)
      : a(a_),
        it(it_),
        shared(shared_),
        grad(it_.grad),
        gradient(a_),
        b2(a_.scalars.beta2, it_.index),
        lanes(it_.tiling.lanes),
        x(static_cast<int>(threadIdx.x) % it_.tiling.lanes),
        y(static_cast<int>(threadIdx.x) / it_.tiling.lanes),
        ys(static_cast<int>(blockDim.x) / it_.tiling.lanes),
        warps(it_.tiling.lanes > kWarp ? it_.tiling.lanes / kWarp : 1),
        width(it_.tiling.lanes < kWarp ? it_.tiling.lanes : kWarp),
        tile_rows(static_cast<int>(it_.rows - static_cast<int64_t>(part) * it_.tiling.rows < it_.tiling.rows
                                       ? it_.rows - static_cast<int64_t>(part) * it_.tiling.rows
                                       : it_.tiling.rows)),
        rows(it_.rows),
        cols(it_.cols),
        first_row(static_cast<int64_t>(part) * it_.tiling.rows) {}

  HFAC_DEVICE typename A::Grad load(int row, int64_t col, int count) const {
    return A::grad(grad, a.layouts, (first_row + row) * cols + col, count, false);
  }

  // One thread's part of a row's sums. The sign of a maximized gradient is left to the fold.
  HFAC_DEVICE void add(const typename A::Grad& raw, T& sum, T& square) {
    T g[kVector];
    A::widen(raw, g);
    gradient.unscale(g);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      sum = sum + g[k];
      square = square + g[k] * g[k];
    }
    if (a.nonfinite) bad = bad || nonfinite(g, static_cast<T>(rows * cols));
  }

  HFAC_DEVICE void add(const typename A::Grad& raw, T inverse, T (&sums)[kSums][kVector]) const {
    T g[kVector];
    A::widen(raw, g);
    gradient.unscale(g);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const T square = g[k] * g[k];
      sums[0][k] = sums[0][k] + g[k];
      sums[1][k] = sums[1][k] + square;
      sums[2][k] = sums[2][k] + square * inverse;
    }
  }

  // Sums {sum, square} of this thread's rows base + r ys + y to shared memory; `at` is base's place there.
  HFAC_DEVICE void put_rows(T (&sums)[kVector], int at) {
    sum_lanes(sums, width, [&](int k, T sum) {
      const int row = at + k / 2 * ys + y;
      shared.sums[(row * 2 + k % 2) * warps + x / kWarp] = sum;
    });
  }

  // Between two barriers: the batch's r_i, and the inverses that its column sums need.
  HFAC_DEVICE void finish_rows(int base, int batch) {
    __syncthreads();
    const int64_t length = a.parts ? a.parts[&it - a.items].cols : cols;
    const T eps_sum = static_cast<T>(static_cast<double>(length) * a.scalars.eps);
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
  Stats<A> s(a, a.items[tile.item], tile.part, shared);
  T sums[kVectors][kSums][kVector];
#pragma unroll
  for (int k = 0; k < kVectors * kSums * kVector; ++k) {
    sums[k / (kSums * kVector)][k / kVector % kSums][k % kVector] = T(0);
  }
  const int64_t step = static_cast<int64_t>(s.lanes) * kVector, first_col = static_cast<int64_t>(s.x) * kVector;

  const int batch = s.ys * kRowsInFlight;
  for (int base = 0; base < s.tile_rows; base += batch) {
    typename A::Grad held[kRowsInFlight];
    T row_sums[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) row_sums[k] = T(0);
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
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t col = first_col + v * step;
      const int count = vector_count(col, s.cols);
      if (!count) continue;
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int row = base + r * s.ys + s.y;
        if (row >= s.tile_rows) continue;
        if (kVectors > 1) held[r] = s.load(row, col, count);
        s.add(held[r], shared.inverse[r * s.ys + s.y], sums[v]);
        if (kVectors > 1 && r % 2) keep_order();
      }
    }
  }
  s.finish();

  T* out = HfacSpace<T>(s.it, a.workspace).cols + static_cast<int64_t>(tile.part) * kSums * s.cols;
  if (s.ys == 1) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t col = first_col + v * step;
      const int count = vector_count(col, s.cols);
#pragma unroll
      for (int k = 0; k < kSums * kVector; ++k) {
        if (k % kVector < count) out[k / kVector * s.cols + col + k % kVector] = sums[v][k / kVector][k % kVector];
      }
    }
    return;
  }
  // Threads of the same columns: their sums meet in shared memory, in the order of y. Rows have one vector per thread.
#pragma unroll
  for (int statistic = 0; statistic < kSums; ++statistic) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
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
  Stats<A> s(a, a.items[tile.item], tile.part, shared);
  T* out = HfacSpace<T>(s.it, a.workspace).cols + static_cast<int64_t>(tile.part) * kSums * s.cols;
  for (int base = 0; base < s.tile_rows; base += kWideRows) {
    for (int part = 0; part < kWideRows; part += kRowsInFlight) {
      T row_sums[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) row_sums[k] = T(0);
      for (int64_t col = s.x * kVector; col < s.cols; col += kLongThreads * kVector) {
        const int count = vector_count(col, s.cols);
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
          const int row = base + part + r;
          if (row < s.tile_rows) s.add(s.load(row, col, count), row_sums[2 * r], row_sums[2 * r + 1]);
        }
      }
      s.put_rows(row_sums, part);
    }
    s.finish_rows(base, kWideRows);
    for (int64_t col = s.x * kVector; col < s.cols; col += kLongThreads * kVector) {
      const int count = vector_count(col, s.cols);
      T sums[kSums][kVector];
#pragma unroll
      for (int k = 0; k < kSums * kVector; ++k) {
        const bool kept = base > 0 && k % kVector < count;
        sums[k / kVector][k % kVector] = kept ? out[k / kVector * s.cols + col + k % kVector] : T(0);
      }
      for (int r = 0; r < kWideRows && base + r < s.tile_rows; ++r) {
        s.add(s.load(base + r, col, count), shared.inverse[r], sums);
      }
#pragma unroll
      for (int k = 0; k < kSums * kVector; ++k) {
        if (k % kVector < count) out[k / kVector * s.cols + col + k % kVector] = sums[k / kVector][k % kVector];
      }
    }
  }
  s.finish();
}

// The sums of column k over all tiles of rows, in their order; each(j, sum) sees those of a tile.
template <class T, class Each>
HFAC_DEVICE void sum_tiles(const T* cols, int tiles, int64_t width, int64_t k, T (&sums)[kSums], const Each& each) {
#pragma unroll
  for (int j = 0; j < kSums; ++j) sums[j] = T(0);
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      const T sum = cols[(static_cast<int64_t>(t) * kSums + j) * width + k];
      sums[j] = sums[j] + sum;
      each(j, sum);
    }
  }
}

// Collected sums are those of one tile: adding them to zero changes no bit.
template <class T>
HFAC_DEVICE void sum_tiles(const HfacSpace<T>& space, const Item& it, int64_t k, T (&sums)[kSums]) {
  const bool collected = space.collected;
  sum_tiles(collected ? space.collected : space.cols, collected ? 1 : it.tiling.row_tiles, it.cols, k, sums,
            [](int, T) {});
}

// Column sums over all tiles, and the sum of squares of the whole gradient in double: of the tiles' sums, which lose
// less than those of whole columns.
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_collect(Arguments a) {
  __shared__ double shared[kTileThreads];
  const Tile tile = tile_of(a);
  const Item& it = a.items[tile.item];
  if (skipped(a)) {  // nothing was added up
    if (a.squares && tile.part == 0 && threadIdx.x == 0) a.squares[it.index] = static_cast<double>(NAN);
    return;
  }
  if (unclipped(a)) return;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t k = static_cast<int64_t>(tile.part) * kFoldChunk + threadIdx.x;
  double total = 0;
  if (k < it.cols) {
    T sums[kSums];
    sum_tiles(space.cols, it.tiling.row_tiles, it.cols, k, sums, [&](int j, T sum) {
      if (j == 1) total += static_cast<double>(sum);
    });
#pragma unroll
    for (int j = 0; j < kSums; ++j) space.collected[j * it.cols + k] = sums[j];
  }
  if (!a.squares) return;

  total = block_sum(total, shared);
  if (threadIdx.x == 0) space.norms[tile.part] = total;
  const int64_t chunks = collect_chunks(it);
  if (!last_block(a.counters + it.counter, chunks)) return;
  total = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kTileThreads) total += load_fresh(space.norms + c);
  total = block_sum(total, shared);
  if (threadIdx.x == 0) a.squares[it.index] = total;
}

// Flags of statistics that are about to be taken again.
__global__ void __launch_bounds__(kTileThreads) hfac_unflag(int32_t* flags, int64_t count, const float* clip) {
  if (*clip == 1.0f) return;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (k < count) flags[k] = 0;
}

HFAC_DEVICE bool is_minus_zero(float x) { return bits_of(x) == 0x80000000u; }
HFAC_DEVICE bool is_minus_zero(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits == uint64_t{1} << 63;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_fold(Arguments a) {
  __shared__ double shared[kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const Item& it = a.items[tile.item];
  if (refused(a, it)) return;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t m = it.rows, n = it.cols;
  const T rows = static_cast<T>(m), cols = static_cast<T>(n), sign = a.scalars.maximize ? T(-1) : T(1);
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const int64_t k = static_cast<int64_t>(tile.part) * kFoldChunk + threadIdx.x;

  // In double, where no partial result can overflow.
  double total = 0, norm = 0;
  double zeros[2] = {0, 0};  // rows and columns of zeros alone
  if (k < m) {
    T *u = static_cast<T*>(it.first_row), *r = static_cast<T*>(it.second_row);
    const T sum = space.row_sum[k], mean = sign * (sum + T(0)) / cols;
    zeros[0] = is_minus_zero(sum) ? 1 : 0;
    u[k] = hfac_average(b1.beta, u[k], b1.rest, mean);
    r[k] = space.row_square[k];
    space.row_sum[k] = hfac_half_drift(b1.beta, u[k], mean, r[k], cols);
    total = static_cast<double>(r[k]);
  }
  if (k < n) {
    T sums[kSums];
    sum_tiles(space, it, k, sums);
    T *v = static_cast<T*>(it.first_col), *s = static_cast<T*>(it.second_col);
    const T mean = sign * sums[0] / rows;
    v[k] = hfac_average(b1.beta, v[k], b1.rest, mean);
    s[k] = hfac_average(b2.beta, s[k], b2.rest, sums[1] + static_cast<T>(static_cast<double>(m) * a.scalars.eps));
    space.half_psi[k] = hfac_half_drift(b1.beta, v[k], mean, s[k], rows);
    space.col_scale[k] = T(1) / root(s[k]);
    norm = static_cast<double>(sums[2]) / static_cast<double>(s[k]);
    zeros[1] = sums[0] == T(0) && sums[1] == T(0) ? 1 : 0;
  }
  double* const watched = a.watched ? a.watched + int64_t{it.index} * kWatchedNumbers : nullptr;
  if (watched) {
    for (int j = 0; j < 2; ++j) {
      const double count = block_sum(zeros[j], shared);
      if (threadIdx.x == 0 && count > 0) atomicAdd(watched + kZeroRows + j, count);
    }
  }
  total = block_sum(total, shared);
  norm = block_sum(norm, shared);
  if (threadIdx.x == 0) {
    space.norms[tile.part * 2] = total;
    space.norms[tile.part * 2 + 1] = norm;
  }

  const int64_t chunks = fold_chunks(it);
  if (!last_block(a.counters + it.counter, chunks)) return;
  total = norm = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kTileThreads) {
    total += load_fresh(space.norms + c * 2);
    norm += load_fresh(space.norms + c * 2 + 1);
  }
  total = block_sum(total, shared);
  norm = block_sum(norm, shared);
  if (threadIdx.x > 0) return;
  if (watched) watched[kDirection] += total * norm;
  *space.scale = root(static_cast<T>(total));
  const double mean_square = total * norm / (static_cast<double>(m) * static_cast<double>(n));
  *space.divisor = a.scalars.clip ? clip_divisor(root(static_cast<T>(mean_square)), a.scalars.clip_threshold) : T(1);
}

// The statistics of a part, for the other ranks: the end of `hfac_sums`.
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_sums_fold(Arguments a) {
  const Tile tile = tile_of(a);
  const Item& it = a.items[tile.item];
  const Part& part = a.parts[tile.item];
  const HfacSpace<T> space(it, a.workspace);
  const int64_t k = static_cast<int64_t>(tile.part) * kFoldChunk + threadIdx.x;
  if (k < it.rows) {
    static_cast<T*>(part.row[0])[k] = space.row_sum[k] + T(0);  // -0 was a mark
    static_cast<T*>(part.row[1])[k] = space.row_square[k];
  }
  if (!part.col[0] || k >= it.cols) return;
  T sums[kSums];
  sum_tiles(space, it, k, sums);
#pragma unroll
  for (int j = 0; j < kSums; ++j) static_cast<T*>(part.col[j])[k] = sums[j];
}

// What `hfac_fold` leaves to the update, of sums over whole rows and columns that are known: the moments go on, also
// those of a part that has rows and no columns, or columns and no rows.
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_apply_fold(Arguments a) {
  const Tile tile = tile_of(a);
  const Item& it = a.items[tile.item];
  const Part& part = a.parts[tile.item];
  const HfacSpace<T> space(it, a.workspace);
  const T rows = static_cast<T>(part.rows), cols = static_cast<T>(part.cols), sign = a.scalars.maximize ? T(-1) : T(1);
  const Decay<T> b1(a.scalars.beta1, it.index);
  const int64_t k = static_cast<int64_t>(tile.part) * kFoldChunk + threadIdx.x;
  if (k < it.rows) {
    T *u = static_cast<T*>(it.first_row), *r = static_cast<T*>(it.second_row);
    const T mean = sign * static_cast<const T*>(part.row[0])[k] / cols;
    u[k] = hfac_average(b1.beta, u[k], b1.rest, mean);
    r[k] = static_cast<const T*>(part.row[1])[k];
    space.row_sum[k] = hfac_half_drift(b1.beta, u[k], mean, r[k], cols);
  }
  if (k < it.cols) {
    T *v = static_cast<T*>(it.first_col), *s = static_cast<T*>(it.second_col);
    const T mean = sign * static_cast<const T*>(part.col[0])[k] / rows;
    v[k] = hfac_average(b1.beta, v[k], b1.rest, mean);
    s[k] = static_cast<const T*>(part.col[1])[k];
    space.half_psi[k] = hfac_half_drift(b1.beta, v[k], mean, s[k], rows);
    space.col_scale[k] = T(1) / root(s[k]);
  }
  if (k > 0) return;
  *space.scale = root(static_cast<T>(value_of(a.scalars.totals, it.index)));
  const T mean_square = static_cast<T>(value_of(a.scalars.mean_squares, it.index));
  *space.divisor = a.scalars.clip ? clip_divisor(root(mean_square), a.scalars.clip_threshold) : T(1);
}

// No root and no division in the loop: a tile's rows are prepared in shared memory, its columns in registers.
// Watched, a kernel of its own: the plain one has no register for it.
template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, A::kWhole && !kWatched ? 2 : 1) hfac_update_tiles(Arguments a) {
  using T = typename A::T;
  __shared__ T shared_phi[kRowsInFlight * kTileThreads], shared_scale[kRowsInFlight * kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const Item& it = a.items[tile.item];
  if (refused(a, it)) return;
  const Tiling tiling = it.update;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t rows = it.rows, cols = it.cols;
  const int row_tile = tile.part / tiling.col_tiles, col_tile = tile.part % tiling.col_tiles;
  const int x = static_cast<int>(threadIdx.x) % tiling.lanes, y = static_cast<int>(threadIdx.x) / tiling.lanes;
  const int ys = kTileThreads / tiling.lanes;
  const int64_t first_row = static_cast<int64_t>(row_tile) * tiling.rows;
  const int tile_rows = static_cast<int>(rows - first_row < tiling.rows ? rows - first_row : tiling.rows);
  const int64_t tile_end = static_cast<int64_t>(col_tile + 1) * tiling.cols;
  const int64_t col = static_cast<int64_t>(col_tile) * tiling.cols + x * kVector;
  const int count = vector_count(col, tile_end < cols ? tile_end : cols);

  const T scale = *space.scale, divisor = *space.divisor;
  const T* r = static_cast<const T*>(it.second_row);
  for (int k = static_cast<int>(threadIdx.x); k < tile_rows; k += kTileThreads) {
    shared_phi[k] = space.row_sum[first_row + k];
    shared_scale[k] = scale * (T(1) / root(r[first_row + k])) / divisor;
  }
  T half_psi[kVector], col_scale[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    half_psi[k] = k < count ? space.half_psi[col + k] : T(0);
    col_scale[k] = k < count ? space.col_scale[col + k] : T(0);
  }
  const Operand grad = it.grad;
  const auto param = A::target(a, it);
  const Gradient<T> gradient(a);
  const T lr = static_cast<T>(value_of(a.scalars.lr, 0));
  const T weight_decay = static_cast<T>(value_of(a.scalars.weight_decay, 0));
  __syncthreads();
  if (!kWatched && !count) return;

  Watch<A> watch;
  for (int base = 0; base < (kWatched && !count ? 0 : tile_rows); base += ys * kRowsInFlight) {
    typename A::Grad g_raw[kRowsInFlight];
    typename A::Param w_raw[kRowsInFlight];
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      const int row = base + k * ys + y;
      if (row >= tile_rows) continue;
      const int64_t at = (first_row + row) * cols + col;
      g_raw[k] = A::grad(grad, a.layouts, at, count, true);
      w_raw[k] = A::param(param, a.layouts, at, count);
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      const int row = base + k * ys + y;
      if (row >= tile_rows) continue;
      T g[kVector], w[kVector];
      A::widen(g_raw[k], g);
      A::widen(w_raw[k], w);
      gradient(g);
      const T half_phi = shared_phi[row], row_scale = shared_scale[row];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        w[j] = hfac_update(w[j], g[j], half_phi, half_psi[j], col_scale[j], row_scale, lr, weight_decay);
      }
      if constexpr (kWatched) {
        T old[kVector];
        A::widen(w_raw[k], old);
        watch.add(param, old, w, count);
      }
      A::store(param, a.layouts, (first_row + row) * cols + col, count, w);
    }
  }
  if constexpr (kWatched) {
    __shared__ double shared[kTileThreads];
    watch.finish(a, it, shared);
  }
}

template <class A>
void (*update_kernel(bool watched))(Arguments) {
  return watched ? hfac_update_tiles<A, true> : hfac_update_tiles<A, false>;
}

template <class A>
void (*stats_kernel(Width width))(Arguments) {
  if (width == Width::kNarrow) return hfac_stats<A, 1>;
  if constexpr (A::kWhole) {
    if (width == Width::kRegisters) return hfac_stats<A, kStatsVectors>;
  }
  return hfac_stats_wide<A>;
}

}  // namespace

void launch_hfac_stats(const Launch& l, const Arguments& a, void* stream) {
  const auto with = [&](void (*kernel)(Arguments)) { launch("hfac_stats", kernel, l.tiles, l.threads, stream, a); };
  switch (l.access) {
    case Access::kFloat:
      return with(stats_kernel<Float>(l.width));
#if !defined(HFAC_FLOAT_OPERANDS)
    case Access::kBFloat16:
      return with(stats_kernel<Brain>(l.width));
    case Access::kFloat16:
      return with(stats_kernel<Half>(l.width));
#endif
    case Access::kDouble:
      return with(stats_kernel<AnyAccess<double>>(l.width));
    default:
      return with(stats_kernel<AnyAccess<float>>(l.width));
  }
}

void launch_hfac_collect(const Launch& l, const Arguments& a, void* stream) {
  launch("hfac_collect", l.access == Access::kDouble ? hfac_collect<double> : hfac_collect<float>, l.tiles, l.threads,
         stream, a);
}

void launch_hfac_unflag(int32_t* flags, int64_t count, const float* clip, void* stream) {
  launch("hfac_unflag", hfac_unflag, ceil_quotient(count, kTileThreads), kTileThreads, stream, flags, count, clip);
}

void launch_hfac_fold(const Launch& l, const Arguments& a, void* stream) {
  launch("hfac_fold", l.access == Access::kDouble ? hfac_fold<double> : hfac_fold<float>, l.tiles, l.threads, stream,
         a);
}

void launch_hfac_sums_fold(const Launch& l, const Arguments& a, void* stream) {
  launch("hfac_sums_fold", l.access == Access::kDouble ? hfac_sums_fold<double> : hfac_sums_fold<float>, l.tiles,
         l.threads, stream, a);
}

void launch_hfac_apply_fold(const Launch& l, const Arguments& a, void* stream) {
  launch("hfac_apply_fold", l.access == Access::kDouble ? hfac_apply_fold<double> : hfac_apply_fold<float>, l.tiles,
         l.threads, stream, a);
}

void launch_hfac_update(const Launch& l, const Arguments& a, void* stream) {
  const auto with = [&](void (*kernel)(Arguments)) { launch("hfac_update", kernel, l.tiles, l.threads, stream, a); };
  switch (l.access) {
    case Access::kFloat:
      return with(update_kernel<Float>(a.watched));
    case Access::kAny:
      return with(update_kernel<AnyAccess<float>>(a.watched));
    case Access::kDouble:
      return with(update_kernel<AnyAccess<double>>(a.watched));
    case Access::kDrawnFloat:
      return with(update_kernel<DrawnFloat>(a.watched));
    case Access::kSplitFloat:
      return with(update_kernel<SplitFloat>(a.watched));
    case Access::kSplit8Float:
      return with(update_kernel<Split8Float>(a.watched));
    case Access::kStored:
      return with(update_kernel<StoredAccess>(a.watched));
#if !defined(HFAC_FLOAT_OPERANDS)
    case Access::kBFloat16:
      return with(update_kernel<Brain>(a.watched));
    case Access::kFloat16:
      return with(update_kernel<Half>(a.watched));
    case Access::kBFloat16Float:
      return with(update_kernel<BrainFloat>(a.watched));
    case Access::kFloatBFloat16:
      return with(update_kernel<FloatBrain>(a.watched));
    case Access::kDrawn:
      return with(update_kernel<Drawn>(a.watched));
    case Access::kSplit:
      return with(update_kernel<Split>(a.watched));
    case Access::kSplit8:
      return with(update_kernel<Split8>(a.watched));
#else
    default:
      throw std::logic_error("compiled without these operands");
#endif
  }
}

}  // namespace hfac
