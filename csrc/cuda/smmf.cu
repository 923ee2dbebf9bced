// SMMF on matrices: one read of the gradient and one read and write of the parameter and its signs are the whole step.
//
// A block takes a tile of rows and up to 2048 columns. A thread holds eight neighbouring columns: their factors and
// their sums stay in its registers for the whole tile. Sums of rows go through shuffles to shared memory, with no
// barrier in the loop. Both leave as partial sums; a second launch adds them in fixed order and normalises.
#include "../common/math/smmf.h"
#include "stored.cuh"

namespace hfac {
namespace {

using common::root;
using common::smmf_first_moment;
using common::smmf_second_moment;
using common::smmf_update;

HFAC_DEVICE float flip_sign(float x, unsigned bits, int k) {
  return float_of(bits_of(x) ^ (bits << (31 - k) & 0x80000000u));
}
HFAC_DEVICE double flip_sign(double x, unsigned bits, int k) { return bits >> k & 1u ? -x : x; }

HFAC_DEVICE float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
HFAC_DEVICE double magnitude(double x) { return fabs(x); }

// Where an item's rows lie: one after the other, or as a block lies in its shard and in the whole's matrix.
template <bool kShard>
struct Layout {
  int64_t first = 0, stride, row_at = 0, row_step = 1, col_at = 0;
  HFAC_DEVICE Layout(const Arguments& a, int32_t item, int64_t cols) : stride(cols) {
    if constexpr (kShard) {
      const DeviceShard& shard = a.shards[item];
      first = shard.first;
      stride = shard.stride;
      row_at = shard.row_at;
      row_step = shard.row_step;
      col_at = shard.col_at;
    }
  }
  HFAC_DEVICE int64_t element(int64_t row, int64_t col) const {
    return kShard ? first + row * stride + col : row * stride + col;
  }
  HFAC_DEVICE int64_t row(int64_t i) const { return kShard ? row_at + i * row_step : i; }
  HFAC_DEVICE int64_t col(int64_t j) const { return kShard ? col_at + j : j; }
};

// Two blocks per multiprocessor: with the columns' factors and sums and four rows in flight, 128 registers suffice.
// Watched, more are needed, so that is a kernel of its own.
template <class A, bool kShard, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, A::kWhole && !kWatched ? 2 : 1) smmf_tiles(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kSharedSums];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;

  const Tiling tiling = it.tiling;
  const int64_t rows = it.rows, cols = it.cols;
  const int row_tile = tile.index / tiling.col_tiles, col_tile = tile.index % tiling.col_tiles;
  const int x = static_cast<int>(threadIdx.x) % tiling.lanes, y = static_cast<int>(threadIdx.x) / tiling.lanes;
  const int ys = kTileThreads / tiling.lanes;
  const int warps = tiling.lanes > kWarp ? tiling.lanes / kWarp : 1;  // that share a row
  const int width = tiling.lanes < kWarp ? tiling.lanes : kWarp;
  const int64_t first_row = static_cast<int64_t>(row_tile) * tiling.rows;
  const int tile_rows = static_cast<int>(rows - first_row < tiling.rows ? rows - first_row : tiling.rows);
  const int64_t tile_end = static_cast<int64_t>(col_tile + 1) * tiling.cols;
  const int64_t col = static_cast<int64_t>(col_tile) * tiling.cols + x * kVector;
  const int count = vector_count(col, tile_end < cols ? tile_end : cols);  // 8 or 0 where vectors are whole

  const Layout<kShard> layout(a, tile.item, cols);
  const Operand grad = it.grad;
  const auto param = A::target(a, it);
  const SharedSigns signs(a, it);
  const Gradient<T> gradient(a);
  const bool first = a.options.first_moment, coupled = a.options.coupled;
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const double lr_wide = value_of(a.scalars.lr, 0), decay_wide = value_of(a.scalars.weight_decay, 0);
  const T lr = static_cast<T>(lr_wide), weight_decay = static_cast<T>(decay_wide), eps = static_cast<T>(a.options.eps);
  const T shrink = static_cast<T>(1 - lr_wide * decay_wide);

  const T* row_m = global(static_cast<const T*>(it.first_row));
  const T* row_v = global(static_cast<const T*>(it.second_row));
  T col_m[kVector], col_v[kVector], sum_m[kVector], sum_v[kVector];
  HFAC_UNROLLED (k, kVector) {
    col_m[k] = first && k < count ? static_cast<const T*>(it.first_col)[layout.col(col + k)] : T(0);
    col_v[k] = k < count ? static_cast<const T*>(it.second_col)[layout.col(col + k)] : T(0);
    sum_m[k] = sum_v[k] = T(0);
  }

  Watch<A> watch;
  for (int base = 0; base < tile_rows; base += ys * kRowsInFlight) {
    T sums[kVector];
#pragma unroll
    for (int half = 0; half < kRowsInFlight; half += A::kRows) {
      typename A::Grad g_raw[A::kRows];
      typename A::Param w_raw[A::kRows];
      unsigned bits[A::kRows];
      T r_m[A::kRows], r_v[A::kRows];
      HFAC_UNROLLED (r, A::kRows) {
        const int row = base + (half + r) * ys + y;
        if (row >= tile_rows || !count) continue;
        const int64_t i = first_row + row, at = layout.element(i, col), whole_row = layout.row(i);
        g_raw[r] = A::grad(grad, a.layouts, at, count, true);
        w_raw[r] = A::param(param, a.layouts, at, count);
        bits[r] = first ? A::signs(signs, at, count) : 0u;
        r_m[r] = first ? row_m[whole_row] : T(0);
        r_v[r] = row_v[whole_row];
      }
      HFAC_UNROLLED (r, A::kRows) {
        const int row = base + (half + r) * ys + y;
        T total_m = T(0), total_v = T(0);
        if (row < tile_rows && count) {
          const int64_t at = layout.element(first_row + row, col);
          T g[kVector], w[kVector], m[kVector];
          A::widen(g_raw[r], g);
          A::widen(w_raw[r], w);
          gradient(g);
          if (coupled) {
            HFAC_UNROLLED (k, kVector) g[k] = g[k] + weight_decay * w[k];
          } else {
            HFAC_UNROLLED (k, kVector) w[k] = w[k] * shrink;
          }
          if (first) {
            const T minus_b1_r = -(b1.beta * r_m[r]);
            unsigned fresh = 0;
            HFAC_UNROLLED (k, kVector) {
              m[k] = smmf_first_moment(flip_sign(minus_b1_r * col_m[k], bits[r], k), b1.rest, g[k]);
              if (A::kWhole || k < count) {
                fresh |= (m[k] > T(0) ? 1u : 0u) << k;
                const T size = magnitude(m[k]);
                total_m = total_m + size;
                sum_m[k] = sum_m[k] + size;
              }
            }
            A::store(signs, at, count, bits[r], fresh);
          } else {
            HFAC_UNROLLED (k, kVector) m[k] = g[k];
          }
          const T b2_r = b2.beta * r_v[r];
          HFAC_UNROLLED (k, kVector) {
            const T v = smmf_second_moment(b2_r * col_v[k], b2.rest, g[k]);
            if (A::kWhole || k < count) {
              total_v = total_v + v;
              sum_v[k] = sum_v[k] + v;
            }
            w[k] = smmf_update(w[k], lr, m[k], v, eps);
            if constexpr (kWatched) {
              const T direction = m[k] / (root(v) + eps);
              if (A::kWhole || k < count) watch.direction = watch.direction + direction * direction;
            }
          }
          if constexpr (kWatched) {
            T old[kVector];
            A::widen(w_raw[r], old);
            watch.add(param, old, w, count);
          }
          A::store(param, a.layouts, at, count, w);
        }
        sums[2 * (half + r)] = total_m;
        sums[2 * (half + r) + 1] = total_v;
      }
    }
    sum_lanes(sums, width, [&](int k, T sum) {
      const int row = base + k / 2 * ys + y;
      if (row < tile_rows) shared[(row * 2 + k % 2) * warps + x / kWarp] = sum;
    });
  }
  __syncthreads();

  if constexpr (kWatched) {
    __shared__ double watched[kTileThreads];
    watch.finish(a, it, watched);
  }

  const SmmfSpace<T> space(it, a.workspace);
  T* row_sums = space.rows + static_cast<int64_t>(col_tile) * 2 * rows + first_row;
  for (int k = static_cast<int>(threadIdx.x); k < 2 * tile_rows; k += kTileThreads) {
    T sum = T(0);
    for (int w = 0; w < warps; ++w) sum = sum + shared[k * warps + w];
    row_sums[k % 2 * rows + k / 2] = sum;
  }

  T* col_sums = space.cols + static_cast<int64_t>(row_tile) * 2 * cols + (col - x * kVector);
  if (ys == 1) {
    HFAC_UNROLLED (k, kVector) {
      if (k >= count) continue;
      col_sums[x * kVector + k] = sum_m[k];
      col_sums[cols + x * kVector + k] = sum_v[k];
    }
    return;
  }
  // Threads of the same columns: their sums meet in shared memory, in the order of y.
  __syncthreads();
  HFAC_UNROLLED (k, kVector) {
    shared[k * kTileThreads + static_cast<int>(threadIdx.x)] = sum_m[k];
    shared[(kVector + k) * kTileThreads + static_cast<int>(threadIdx.x)] = sum_v[k];
  }
  __syncthreads();
  if (y >= 2 * kVector) return;
  for (int k = y; k < 2 * kVector; k += ys) {
    T sum = T(0);
    for (int from = 0; from < ys; ++from) sum = sum + shared[k * kTileThreads + from * tiling.lanes + x];
    if (k % kVector < count) col_sums[k / kVector * cols + x * kVector + k % kVector] = sum;
  }
}

// The sum of row or column k over all tiles that have a part of it, in their order, from sums [tiles, 2, length].
template <class T>
HFAC_DEVICE T sum_tiles(const T* sums, int tiles, int moment, int64_t length, int64_t k) {
  T sum = T(0);
  for (int t = 0; t < tiles; ++t) sum = sum + sums[(t * 2 + moment) * length + k];
  return sum;
}

// (SMMF, Algorithm 4) n >= m, so the columns' factors carry the normalisation; the rows' are sums as they stand.
template <class T>
__global__ void __launch_bounds__(kTileThreads) smmf_fold(Arguments a) {
  __shared__ T shared[kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;
  const SmmfSpace<T> space(it, a.workspace);
  const int64_t rows = it.rows, cols = it.cols;
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;
  if (a.options.first_moment && tile.index == 0 && threadIdx.x == 0) settle_signs(a, it);
  T* const row_factor[2] = {static_cast<T*>(it.first_row), static_cast<T*>(it.second_row)};
  T* const col_factor[2] = {static_cast<T*>(it.first_col), static_cast<T*>(it.second_col)};

  for (int moment = a.options.first_moment ? 0 : 1; moment < 2; ++moment) {
    if (k < rows) row_factor[moment][k] = sum_tiles(space.rows, it.tiling.col_tiles, moment, rows, k);
    const T sum = k < cols ? sum_tiles(space.cols, it.tiling.row_tiles, moment, cols, k) : T(0);
    if (k < cols) col_factor[moment][k] = sum;
    const T total = block_sum(sum, shared);
    if (threadIdx.x == 0) space.totals[tile.index * 2 + moment] = total;
  }

  const int64_t chunks = fold_chunks(it);
  if (!last_block(a.counters + it.counter, chunks)) return;
  for (int moment = a.options.first_moment ? 0 : 1; moment < 2; ++moment) {
    T sum = T(0);
    for (int64_t c = threadIdx.x; c < chunks; c += kTileThreads) sum = sum + load_fresh(space.totals + c * 2 + moment);
    const T total = block_sum(sum, shared);
    const T divisor = total == T(0) ? T(1) : total;
    for (int64_t j = threadIdx.x; j < cols; j += kTileThreads) {
      col_factor[moment][j] = load_fresh(col_factor[moment] + j) / divisor;
    }
  }
}

// Adds the sums over a shard to those over the whole: block after block, each tile after tile.
template <class T>
__global__ void __launch_bounds__(kTileThreads) smmf_sums_fold(Arguments a) {
  const Tile tile = tile_of(a);
  const DeviceItem* const items = a.items + tile.item;
  const DeviceShard* const shards = a.shards + tile.item;
  const int64_t rows = shards->rows, cols = shards->cols, blocks = shards->blocks;
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;
  if (a.options.first_moment && k == 0) {
    for (int64_t b = 0; b < blocks; ++b) settle_signs(a, items[b]);
  }
  for (int moment = a.options.first_moment ? 0 : 1; moment < 2; ++moment) {
    T *const row_total = static_cast<T*>(shards->row[moment]), *const col_total = static_cast<T*>(shards->col[moment]);
    T row = k < rows ? row_total[k] : T(0), col = k < cols ? col_total[k] : T(0);
    for (int64_t b = 0; b < blocks; ++b) {
      const DeviceItem& it = items[b];
      const SmmfSpace<T> space(it, a.workspace);
      const DeviceShard& block = shards[b];
      const int64_t i = (k - block.row_at) / block.row_step, j = k - block.col_at;
      if (k >= block.row_at && i < it.rows && block.row_at + i * block.row_step == k) {
        row = row + sum_tiles(space.rows, it.tiling.col_tiles, moment, it.rows, i);
      }
      if (j >= 0 && j < it.cols) {
        col = col + sum_tiles(space.cols, it.tiling.row_tiles, moment, it.cols, j);
      }
    }
    if (k < rows) row_total[k] = row;
    if (k < cols) col_total[k] = col;
  }
}

}  // namespace

KernelFunction smmf_tiles_kernel(const Launch& l, const Arguments& a) {
  return kernel_for(l.access, PairAccesses(), [&](auto access) -> KernelFunction {
    using A = decltype(access);
    if constexpr (!kPlainStep) {
      if (a.shards) return smmf_tiles<A, true, false>;
      if (a.watched) return smmf_tiles<A, false, true>;
    }
    return smmf_tiles<A, false, false>;
  });
}
KernelFunction smmf_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, smmf_fold); }
KernelFunction smmf_sums_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, smmf_sums_fold); }

}  // namespace hfac
