// H-Fac on matrices in three launches: sums from one read of the gradient (hfac_stats.cu), a fold of O(rows + columns),
// and the update with a second read.
//
// Where gradients are clipped by the norm of them all, the first launch comes in a phase of its own: the norm is made
// of its column sums, which `hfac_collect` adds up over the tiles to outlast the other groups. Then each group goes on
// from there; where the coefficient is not 1 it takes the statistics again, because r_i depends on it.
#include "../common/math/hfac.h"
#include "stored.cuh"

namespace hfac {
namespace {

using common::hfac_average;
using common::hfac_clip_divisor;
using common::hfac_half_drift;
using common::hfac_update;
using common::root;

// The sums of column k over all tiles of rows, in their order; each(j, sum) sees those of a tile.
template <class T, class Each>
HFAC_DEVICE void sum_tiles(const T* cols, int tiles, int64_t width, int64_t k, T (&sums)[kSums], const Each& each) {
  HFAC_UNROLLED (j, kSums) sums[j] = T(0);
  for (int t = 0; t < tiles; ++t) {
    HFAC_UNROLLED (j, kSums) {
      const T sum = cols[(static_cast<int64_t>(t) * kSums + j) * width + k];
      sums[j] = sums[j] + sum;
      each(j, sum);
    }
  }
}

// Collected sums are those of one tile: adding them to zero changes no bit.
template <class T>
HFAC_DEVICE void sum_tiles(const HfacSpace<T>& space, const DeviceItem& it, int64_t k, T (&sums)[kSums]) {
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
  const DeviceItem& it = a.items[tile.item];
  if (skipped(a)) {  // nothing was added up
    if (a.squares && tile.index == 0 && threadIdx.x == 0) a.squares[it.index] = static_cast<double>(NAN);
    return;
  }
  if (unclipped(a)) return;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;
  double total = 0;
  if (k < it.cols) {
    T sums[kSums];
    sum_tiles(space.cols, it.tiling.row_tiles, it.cols, k, sums, [&](int j, T sum) {
      if (j == 1) total += static_cast<double>(sum);
    });
    HFAC_UNROLLED (j, kSums) space.collected[j * it.cols + k] = sums[j];
  }
  if (!a.squares) return;

  total = block_sum(total, shared);
  if (threadIdx.x == 0) space.norms[tile.index] = total;
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

// Stores new moments of row (or column) k, and returns half of phi (or psi). `length`: elements of a whole row.
template <class T>
HFAC_DEVICE T step_moments(void* first, void* second, int64_t k, T mean, T square, T length, const Decay<T>& b1) {
  T* const average = static_cast<T*>(first) + k;
  *average = hfac_average(b1.beta, *average, b1.rest, mean);
  static_cast<T*>(second)[k] = square;
  return hfac_half_drift(b1.beta, *average, mean, square, length);
}

template <class T>
HFAC_DEVICE T clip_divisor(const Options& o, T mean_square) {
  return o.clip ? hfac_clip_divisor(root(mean_square), o.clip_threshold) : T(1);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_fold(Arguments a) {
  __shared__ double shared[kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t m = it.rows, n = it.cols;
  const T rows = static_cast<T>(m), cols = static_cast<T>(n), sign = a.options.maximize ? T(-1) : T(1);
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;

  // In double, where no partial result can overflow.
  double total = 0, norm = 0;
  double zeros[2] = {0, 0};  // rows and columns of zeros alone
  if (k < m) {
    const T sum = space.row_sum[k], r = space.row_square[k];
    zeros[0] = is_minus_zero(sum) ? 1 : 0;
    space.row_sum[k] = step_moments(it.first_row, it.second_row, k, sign * (sum + T(0)) / cols, r, cols, b1);
    total = static_cast<double>(r);
  }
  if (k < n) {
    T sums[kSums];
    sum_tiles(space, it, k, sums);
    const T old = static_cast<const T*>(it.second_col)[k];
    const T square = sums[1] + static_cast<T>(static_cast<double>(m) * a.options.eps);
    const T s = hfac_average(b2.beta, old, b2.rest, square);
    space.half_psi[k] = step_moments(it.first_col, it.second_col, k, sign * sums[0] / rows, s, rows, b1);
    space.col_scale[k] = T(1) / root(s);
    norm = static_cast<double>(sums[2]) / static_cast<double>(s);
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
    space.norms[tile.index * 2] = total;
    space.norms[tile.index * 2 + 1] = norm;
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
  const double mean_square = total * norm / (static_cast<double>(m) * static_cast<double>(n));
  *space.scale = root(static_cast<T>(total));
  *space.divisor = clip_divisor(a.options, static_cast<T>(mean_square));
}

// The statistics of a shard, for the other ranks: the end of `hfac_sums`.
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_sums_fold(Arguments a) {
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  const DeviceShard& shard = a.shards[tile.item];
  const HfacSpace<T> space(it, a.workspace);
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;
  if (k < it.rows) {
    static_cast<T*>(shard.row[0])[k] = space.row_sum[k] + T(0);  // -0 was a mark
    static_cast<T*>(shard.row[1])[k] = space.row_square[k];
  }
  if (!shard.col[0] || k >= it.cols) return;
  T sums[kSums];
  sum_tiles(space, it, k, sums);
  HFAC_UNROLLED (j, kSums) static_cast<T*>(shard.col[j])[k] = sums[j];
}

// What `hfac_fold` leaves to the update, of sums over whole rows and columns that are known: the moments go on, also
// those of a shard that has rows and no columns, or columns and no rows.
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_apply_fold(Arguments a) {
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  const DeviceShard& shard = a.shards[tile.item];
  const HfacSpace<T> space(it, a.workspace);
  const T rows = static_cast<T>(shard.rows), cols = static_cast<T>(shard.cols),
          sign = a.options.maximize ? T(-1) : T(1);
  const Decay<T> b1(a.scalars.beta1, it.index);
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;
  if (k < it.rows) {
    const T sum = static_cast<const T*>(shard.row[0])[k], r = static_cast<const T*>(shard.row[1])[k];
    space.row_sum[k] = step_moments(it.first_row, it.second_row, k, sign * sum / cols, r, cols, b1);
  }
  if (k < it.cols) {
    const T sum = static_cast<const T*>(shard.col[0])[k], s = static_cast<const T*>(shard.col[1])[k];
    space.half_psi[k] = step_moments(it.first_col, it.second_col, k, sign * sum / rows, s, rows, b1);
    space.col_scale[k] = T(1) / root(s);
  }
  if (k > 0) return;
  *space.scale = root(static_cast<T>(value_of(a.scalars.totals, it.index)));
  *space.divisor = clip_divisor(a.options, static_cast<T>(value_of(a.scalars.mean_squares, it.index)));
}

// No root and no division in the loop: a tile's rows are prepared in shared memory, its columns in registers.
// Watched, a kernel of its own: the plain one has no register for it.
template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, A::kWhole && !kWatched ? 2 : 1) hfac_update_tiles(Arguments a) {
  using T = typename A::T;
  __shared__ T shared_phi[kRowsInFlight * kTileThreads], shared_scale[kRowsInFlight * kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;
  const Tiling tiling = it.update;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t rows = it.rows, cols = it.cols;
  const int row_tile = tile.index / tiling.col_tiles, col_tile = tile.index % tiling.col_tiles;
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
  HFAC_UNROLLED (k, kVector) {
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
    HFAC_UNROLLED (k, kRowsInFlight) {
      const int row = base + k * ys + y;
      if (row >= tile_rows) continue;
      const int64_t at = (first_row + row) * cols + col;
      g_raw[k] = A::grad(grad, a.layouts, at, count, true);
      w_raw[k] = A::param(param, a.layouts, at, count);
    }
    HFAC_UNROLLED (k, kRowsInFlight) {
      const int row = base + k * ys + y;
      if (row >= tile_rows) continue;
      T g[kVector], w[kVector];
      A::widen(g_raw[k], g);
      A::widen(w_raw[k], w);
      gradient(g);
      const T half_phi = shared_phi[row], row_scale = shared_scale[row];
      HFAC_UNROLLED (j, kVector) {
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

}  // namespace

KernelFunction hfac_collect_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_collect); }
KernelFunction hfac_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_fold); }
KernelFunction hfac_sums_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_sums_fold); }
KernelFunction hfac_apply_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_apply_fold); }
KernelFunction hfac_update_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, PairAccesses, hfac_update_tiles);
}

void launch_hfac_unflag(int32_t* flags, int64_t count, const float* clip, void* stream) {
  launch("hfac_unflag", hfac_unflag, ceil_quotient(count, kTileThreads), kTileThreads, stream, flags, count, clip);
}

}  // namespace hfac
