// SMMF on matrices: one read of the gradient and one read and write of the parameter and its signs are the whole step.
//
// A block takes a tile of rows and up to 2048 columns. A thread holds eight neighbouring columns: their factors and
// their sums stay in its registers for the whole tile. Sums of rows go through shuffles to shared memory, with no
// barrier in the loop. Both leave as partial sums, which a second launch adds in fixed order and normalises; of a
// matrix that is one tile the block does that itself.
#include "../common/math/smmf.h"
#include "approximate.cuh"
#include "stored.cuh"

namespace hfac {
namespace {

using common::root;
using common::smmf_first_moment;
using common::smmf_second_moment;

// Below it the root of a subnormal V counts beside eps, and the approximate root takes that for 0.
constexpr double kRoughEps = 0x1p-43;

// x, or -x where bit k is 0: the old moment's sign.
template <class T>
HFAC_DEVICE T signed_by(T x, unsigned bits, int k) {
  return bits >> k & 1u ? x : -x;
}

// `bits` moved up by one, with "is x above zero" in the place of the first. (No NaN of a GPU's arithmetic has a sign.)
HFAC_DEVICE unsigned push_sign(unsigned bits, float x) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_l(bits_of(0.0f - x), bits, 1);
#else
  return bits << 1 | (x > 0.0f ? 1u : 0u);
#endif
}
HFAC_DEVICE unsigned push_sign(unsigned bits, double x) { return bits << 1 | (x > 0.0 ? 1u : 0u); }

// Of both moments.
template <class T>
struct alignas(2 * sizeof(T)) Both {
  T m, v;
};

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

// Rows of a thread whose loads are issued together, before those of the last ones are used.
template <class A>
struct Loads {
  typename A::Grad g[A::kRows];
  typename A::Param w[A::kRows];
  unsigned signs[A::kRows];
};

// Sums of a tile's rows, one by each warp of a row, and factors of its rows; then sums of its columns.
constexpr int kShared = kTileThreads * 2 * kVector;
static_assert(kShared >= kSmmfRows * 4, "of each moment: a sum and a factor; rows of several warps are fewer");

// Adds values of which even threads have |M|'s and odd ones V's; `shared` has as many elements as twice the warps.
// Every thread may read the sums after a barrier.
template <class T>
HFAC_DEVICE void add_alternate(T value, T* shared) {
  for (int mask = kWarp / 2; mask > 1; mask /= 2) value = value + shuffle_xor(value, mask);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane < 2) shared[threadIdx.x / kWarp * 2 + lane] = value;
}
template <class T>
HFAC_DEVICE T alternate_sum(const T* shared, int moment) {
  T sum = T(0);
  HFAC_UNROLLED (w, kTileWarps) sum = sum + shared[2 * w + moment];
  return sum;
}

// (SMMF, Algorithm 4) n >= m, so the columns' factors carry the normalisation; the rows' are sums as they stand.
template <class T>
HFAC_DEVICE T normalised(T sum, T total) {
  return sum / (total == T(0) ? T(1) : total);
}

// Two blocks per multiprocessor: with the columns' factors and sums and four rows in flight, 128 registers suffice.
// Watched, more are needed, so that is a kernel of its own.
template <class A, bool kShard, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, A::kWhole && !kWatched ? 2 : 1) smmf_tiles(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kShared];
  __shared__ T tile_sums[2 * kTileWarps];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;

  const Tiling tiling = it.tiling;
  const bool alone = !kShard && tiles_of(tiling) == 1;
  const int64_t rows = it.rows, cols = it.cols;
  const int row_tile = tile.index / tiling.col_tiles, col_tile = tile.index - row_tile * tiling.col_tiles;
  const int shift = log2_of(tiling.lanes), x = static_cast<int>(threadIdx.x) & (tiling.lanes - 1);
  const int y = static_cast<int>(threadIdx.x) >> shift, ys = kTileThreads >> shift;
  const int warps = tiling.lanes > kWarp ? tiling.lanes / kWarp : 1;  // that share a row
  const int width = tiling.lanes < kWarp ? tiling.lanes : kWarp;
  const int64_t first_row = static_cast<int64_t>(row_tile) * tiling.rows;
  const int tile_rows = static_cast<int>(rows - first_row < tiling.rows ? rows - first_row : tiling.rows);
  const int64_t tile_end = static_cast<int64_t>(col_tile + 1) * tiling.cols;
  const int64_t col = static_cast<int64_t>(col_tile) * tiling.cols + x * kVector;
  const int count = vector_count(col, tile_end < cols ? tile_end : cols);  // 8 or 0 where vectors are whole
  const int end = count ? tile_rows : 0;                                   // of this thread's rows

  const Layout<kShard> layout(a, tile.item, cols);
  const Operand grad = it.grad;
  const auto param = A::target(a, it);
  const SharedSigns signs(a, it);
  const bool first = a.options.first_moment;

  int64_t at = layout.element(first_row + y, col);
  const int64_t row_step = layout.stride * ys;
  const auto load = [&](Loads<A>& into, int row, int64_t from) {
    HFAC_UNROLLED (r, A::kRows) {
      if (row + r * ys >= end) continue;
      into.g[r] = A::grad(grad, a.layouts, from + r * row_step, count, true);
      into.w[r] = A::param(param, a.layouts, from + r * row_step, count);
      into.signs[r] = first ? A::signs(signs, from + r * row_step, count) : 0u;
    }
  };
  Loads<A> loads[2];
  if constexpr (A::kWhole) load(loads[0], y, at);

  // What the loop needs of a row and of the step, so that it takes none of it from memory or from double.
  const Gradient<T> gradient(a);
  const bool coupled = a.options.coupled;
  int changed = gradient.scaled || gradient.negate || coupled;  // the gradient
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const double lr_wide = value_of(a.scalars.lr, 0), decay_wide = value_of(a.scalars.weight_decay, 0);
  T lr = static_cast<T>(lr_wide), weight_decay = static_cast<T>(decay_wide), eps = static_cast<T>(a.options.eps);
  T shrink = coupled ? T(1) : static_cast<T>(1 - lr_wide * decay_wide), rest1 = b1.rest, rest2 = b2.rest;
  lr = kept(lr);
  eps = kept(eps);
  int rough = A::rough(param) && eps >= static_cast<T>(kRoughEps);
  shrink = kept(shrink);
  rest1 = kept(rest1);
  rest2 = kept(rest2);
  changed = kept(changed);
  rough = kept(rough);

  auto* const row_factors = reinterpret_cast<Both<T>*>(shared + 2 * warps * tiling.rows);
  for (int k = static_cast<int>(threadIdx.x); k < tile_rows; k += kTileThreads) {
    const int64_t row = layout.row(first_row + k);
    row_factors[k] = {first ? b1.beta * global(static_cast<const T*>(it.first_row))[row] : T(0),
                      b2.beta * global(static_cast<const T*>(it.second_row))[row]};
  }
  T col_m[kVector], col_v[kVector], sum_m[kVector], sum_v[kVector];
  HFAC_UNROLLED (k, kVector) {
    col_m[k] = first && k < count ? global(static_cast<const T*>(it.first_col))[layout.col(col + k)] : T(0);
    col_v[k] = k < count ? global(static_cast<const T*>(it.second_col))[layout.col(col + k)] : T(0);
    sum_m[k] = sum_v[k] = T(0);
  }
  __syncthreads();

  Watch<A> watch;
  const auto step = [&](const Loads<A>& loaded, int r, int row, int64_t from, T& total_m, T& total_v) {
    T g[kVector], w[kVector], m[kVector];
    A::widen(loaded.g[r], g);
    A::widen(loaded.w[r], w);
    if (changed) {
      gradient(g);
      if (coupled) {
        HFAC_UNROLLED (k, kVector) g[k] = g[k] + weight_decay * w[k];
      }
    }
    const Both<T> row_factor = row_factors[row];
    if (first) {
      unsigned fresh = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const int k = kVector - 1 - j;
        m[k] = smmf_first_moment(signed_by(row_factor.m * col_m[k], loaded.signs[r], k), rest1, g[k]);
        fresh = push_sign(fresh, m[k]);
      }
      HFAC_UNROLLED (k, kVector) {
        if (!A::kWhole && k >= count) continue;
        total_m = k ? total_m + magnitude(m[k]) : magnitude(m[k]);
        sum_m[k] = sum_m[k] + magnitude(m[k]);
      }
      A::store(signs, from, count, loaded.signs[r], fresh);
    } else {
      HFAC_UNROLLED (k, kVector) m[k] = g[k];
    }
    T v[kVector];
    HFAC_UNROLLED (k, kVector) {
      v[k] = smmf_second_moment(row_factor.v * col_v[k], rest2, g[k]);
      if (!A::kWhole && k >= count) continue;
      total_v = k ? total_v + v[k] : v[k];
      sum_v[k] = sum_v[k] + v[k];
    }
    HFAC_UNROLLED (k, kVector) w[k] = w[k] * shrink;
    T direction[kVector];
    bool done = false;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rough) {
        HFAC_UNROLLED (k, kVector) {
          direction[k] = m[k] * approximate_inverse(approximate_root(v[k]) + eps);
          w[k] = fused(-lr, direction[k], w[k]);
        }
        done = true;
      }
    }
    if (!done) {
      HFAC_UNROLLED (k, kVector) {
        direction[k] = m[k] / (root(v[k]) + eps);
        w[k] = w[k] - lr * direction[k];
      }
    }
    if constexpr (kWatched) {
      HFAC_UNROLLED (k, kVector) {
        if (A::kWhole || k < count) watch.direction = watch.direction + direction[k] * direction[k];
      }
      T old[kVector];
      A::widen(loaded.w[r], old);
      watch.add(param, old, w, count);
    }
    A::store(param, a.layouts, from, count, w);
  };

  for (int base = 0; base < tile_rows; base += ys * kRowsInFlight, at += kRowsInFlight * row_step) {
    T sums[kVector];
    HFAC_UNROLLED (s, kRowsInFlight / A::kRows) {
      const int row = base + s * A::kRows * ys + y;
      const int64_t from = at + s * A::kRows * row_step;
      // The next rows are under way while these are worked on.
      if constexpr (A::kWhole) {
        load(loads[(s + 1) % 2], row + A::kRows * ys, from + A::kRows * row_step);
      } else {
        load(loads[s % 2], row, from);
      }
      HFAC_UNROLLED (r, A::kRows) {
        T total_m = T(0), total_v = T(0);
        if (row + r * ys < end) step(loads[s % 2], r, row + r * ys, from + r * row_step, total_m, total_v);
        sums[2 * (s * A::kRows + r)] = total_m;
        sums[2 * (s * A::kRows + r) + 1] = total_v;
      }
    }
    sum_lanes(sums, width, [&](int k, T sum) {
      const int row = base + k / 2 * ys + y;
      if (row < tile_rows) shared[(row * 2 + k % 2) * warps + x / kWarp] = sum;
    });
  }
  __syncthreads();

  if constexpr (kWatched) watch.finish(a, it);

  const SmmfSpace<T> space(it, a.workspace);
  const int odd = static_cast<int>(threadIdx.x) % 2;  // this thread's moment among the sums of rows
  T* row_to = space.rows + (static_cast<int64_t>(col_tile) * 2 + odd) * rows + first_row;
  if (alone) row_to = static_cast<T*>(odd ? it.second_row : it.first_row);
  T of_tile = T(0);
  for (int k = static_cast<int>(threadIdx.x); k < 2 * tile_rows; k += kTileThreads) {
    T sum = T(0);
    for (int w = 0; w < warps; ++w) sum = sum + shared[k * warps + w];
    if (first || odd) global(row_to)[k / 2] = sum;
    of_tile = of_tile + sum;
  }
  add_alternate(of_tile, tile_sums);
  __syncthreads();
  if (alone) {
    if (first && threadIdx.x == 0) settle_signs(a, it);
  } else if (threadIdx.x < 2) {
    space.totals[tile.index * 2 + threadIdx.x] = alternate_sum(tile_sums, static_cast<int>(threadIdx.x));
  }

  T *col_to_m = static_cast<T*>(it.first_col), *col_to_v = static_cast<T*>(it.second_col);
  if (!alone) {
    col_to_m = space.cols + static_cast<int64_t>(row_tile) * 2 * cols + static_cast<int64_t>(col_tile) * tiling.cols;
    col_to_v = col_to_m + cols;
  }
  const auto put = [&](int k, T sum) {
    const int moment = k / kVector;
    if (k % kVector >= count || !(first || moment)) return;
    T* const to = global(moment ? col_to_v : col_to_m) + x * kVector + k % kVector;
    *to = alone ? normalised(sum, alternate_sum(tile_sums, moment)) : sum;
  };
  if (ys == 1) {
    HFAC_UNROLLED (k, kVector) {
      put(k, sum_m[k]);
      put(kVector + k, sum_v[k]);
    }
    return;
  }
  // Threads of the same columns: their sums meet in shared memory, in the order of y.
  HFAC_UNROLLED (k, kVector) {
    shared[k * kTileThreads + static_cast<int>(threadIdx.x)] = sum_m[k];
    shared[(kVector + k) * kTileThreads + static_cast<int>(threadIdx.x)] = sum_v[k];
  }
  __syncthreads();
  if (y >= 2 * kVector) return;
  for (int k = y; k < 2 * kVector; k += ys) {
    T sum = T(0);
    for (int from = 0; from < ys; ++from) sum = sum + shared[k * kTileThreads + from * tiling.lanes + x];
    put(k, sum);
  }
}

// The folds' threads: `x` is a row and a column of the chunk, which take the tiles y, y + 4, ... each.
constexpr int kFoldShares = kTileThreads / kSmmfChunk;
static_assert(kFoldShares == 4 && kSmmfChunk % kWarp == 0,
              "each adds one of four sums; a warp reads neighbouring ones");

// Sums of a row, and of a column, over the tiles that have a part of it.
template <class T>
struct FoldSums {
  Both<T> row{T(0), T(0)}, col{T(0), T(0)};
};

// Adds a thread's share of sums [tiles, 2, length] of the one at k.
template <class T>
HFAC_DEVICE void add_share(Both<T>& to, const T* sums, int tiles, int64_t length, int64_t k, bool first) {
#pragma unroll 4
  for (int t = static_cast<int>(threadIdx.x) / kSmmfChunk; t < tiles; t += kFoldShares) {
    const T* const here = global(sums) + int64_t{2} * t * length + k;
    if (first) to.m = to.m + here[0];
    to.v = to.v + here[length];
  }
}

// Adds the shares in order: put(of the columns?, moment, sum) by one thread for each.
template <class T, class Put>
HFAC_DEVICE void add_shares(const FoldSums<T>& mine, T* shared, const Put& put) {
  const int x = static_cast<int>(threadIdx.x) % kSmmfChunk, y = static_cast<int>(threadIdx.x) / kSmmfChunk;
  const T values[] = {mine.row.m, mine.row.v, mine.col.m, mine.col.v};
  HFAC_UNROLLED (k, 4) shared[k * kTileThreads + static_cast<int>(threadIdx.x)] = values[k];
  __syncthreads();
  T sum = T(0);
  HFAC_UNROLLED (share, kFoldShares) sum = sum + shared[y * kTileThreads + share * kSmmfChunk + x];
  put(y / 2 == 1, y % 2, sum);
}

// Every block adds up the tiles' totals itself, so that none has to wait for the others' columns.
template <class T>
__global__ void __launch_bounds__(kTileThreads) smmf_fold(Arguments a) {
  __shared__ T shared[4 * kTileThreads];
  __shared__ T tile_sums[2 * kTileWarps];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;
  const SmmfSpace<T> space(it, a.workspace);
  const Tiling tiling = it.tiling;
  const int64_t rows = it.rows, cols = it.cols;
  const int64_t k = static_cast<int64_t>(tile.index) * kSmmfChunk + threadIdx.x % kSmmfChunk;
  const bool first = a.options.first_moment;
  if (first && tile.index == 0 && threadIdx.x == 0) settle_signs(a, it);

  T total = T(0);
  const int totals = static_cast<int>(2 * tiles_of(tiling));
#pragma unroll 4
  for (int t = static_cast<int>(threadIdx.x); t < totals; t += kTileThreads) total = total + space.totals[t];
  FoldSums<T> sums;
  if (k < cols) add_share(sums.col, space.cols, tiling.row_tiles, cols, k, first);
  if (k < rows) add_share(sums.row, space.rows, tiling.col_tiles, rows, k, first);
  add_alternate(total, tile_sums);
  add_shares(sums, shared, [&](bool col, int moment, T sum) {
    if (k >= (col ? cols : rows) || !(first || moment)) return;
    T* const to =
        static_cast<T*>(col ? (moment ? it.second_col : it.first_col) : (moment ? it.second_row : it.first_row));
    to[k] = col ? normalised(sum, alternate_sum(tile_sums, moment)) : sum;
  });
}

// Adds the sums over a shard to those over the whole: block after block, each thread its tiles of all of them.
template <class T>
__global__ void __launch_bounds__(kTileThreads) smmf_sums_fold(Arguments a) {
  __shared__ T shared[4 * kTileThreads];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem* const items = a.items + tile.item;
  const DeviceShard* const shards = a.shards + tile.item;
  const int64_t rows = shards->rows, cols = shards->cols, blocks = shards->blocks;
  const int64_t k = static_cast<int64_t>(tile.index) * kSmmfChunk + threadIdx.x % kSmmfChunk;
  const bool first = a.options.first_moment;
  if (first && tile.index == 0 && threadIdx.x == 0) {
    for (int64_t b = 0; b < blocks; ++b) settle_signs(a, items[b]);
  }
  FoldSums<T> sums;
  for (int64_t b = 0; b < blocks; ++b) {
    const DeviceItem& it = items[b];
    const SmmfSpace<T> space(it, a.workspace);
    const DeviceShard& block = shards[b];
    const int64_t i = (k - block.row_at) / block.row_step, j = k - block.col_at;
    if (k >= block.row_at && i < it.rows && block.row_at + i * block.row_step == k) {
      add_share(sums.row, space.rows, it.tiling.col_tiles, it.rows, i, first);
    }
    if (j >= 0 && j < it.cols) add_share(sums.col, space.cols, it.tiling.row_tiles, it.cols, j, first);
  }
  add_shares(sums, shared, [&](bool col, int moment, T sum) {
    if (k >= (col ? cols : rows) || !(first || moment)) return;
    T* const to = static_cast<T*>(col ? shards->col[moment] : shards->row[moment]);
    to[k] = to[k] + sum;
  });
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
