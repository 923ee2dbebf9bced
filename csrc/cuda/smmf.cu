// SMMF on matrices: one read of the gradient and one read and write of the parameter and its signs are the whole step.
//
// A block takes a tile of rows and up to 2048 columns. A thread holds eight neighbouring columns: their factors and
// their sums stay in its registers for the whole tile. Sums of rows go through shuffles to shared memory, with no
// barrier in the loop. Both leave as partial sums, which a second launch adds in fixed order and normalises; of a
// matrix that is one tile the block does that itself. Matrices so small that a block's threads would have little more
// to do than to begin and end have a warp each, eight in a block, with no barrier at all.
#include <type_traits>

#include "../common/math/smmf.h"
#include "approximate.cuh"
#include "smmf_tile.cuh"

namespace hfac {
namespace {

using common::root;
using common::smmf_first_moment;
using common::smmf_second_moment;

// Below it the root of a subnormal V counts beside eps, and the approximate root takes that for 0.
constexpr double kRoughEps = 0x1p-43;

// Where bits are drawn compilers for sm_80 and sm_90 have no register for a gradient's scale.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
template <class A>
constexpr bool kLeanScale = std::is_same_v<A, DrawnAccess<BFloat16>>;
#else
template <class A>
constexpr bool kLeanScale = false;
#endif

// Of whole vectors that are rounded to the nearest, batches of rows that are all there have a body of their own.
template <class A>
constexpr bool kPlainRows = SingleOf<A>::kThere;

template <class A, bool kShard, bool kWatched, class Team>
HFAC_DEVICE void step_tile(const Arguments& a, const Team& team, typename A::T (&shared)[kShared],
                           typename A::T (&tile_sums)[2 * kTileWarps]) {
  using T = typename A::T;
  const Tile tile = team.tile;
  const DeviceItem& it = a.items[tile.item];
  const int threads = team.threads, thread = static_cast<int>(threadIdx.x) & (threads - 1);
  const Tiling tiling = it.tiling;
  const Place p(it, tile, threads, thread);
  const int64_t cols = it.cols, first_row = p.first_row, col = p.col;
  const int x = p.x, y = p.y, ys = p.ys, warps = p.warps, tile_rows = p.tile_rows, count = p.count;
  const int width = tiling.lanes < kWarp ? tiling.lanes : kWarp;
  // Rows are numbered by their place in shared memory.
  const int begin = team.lift, behind = begin + tile_rows, end = count ? behind : 0;  // `end` of this thread's

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
  if constexpr (A::kAhead) load(loads[0], begin + y, at);

  // What the loop needs of a row and of the step, so that it takes none of it from memory or from double.
  const std::conditional_t<kLeanScale<A>, LeanGradient<T>, Gradient<T>> gradient(a);
  const bool coupled = a.options.coupled;
  const bool changed = gradient.scaled || gradient.negate || coupled;  // the gradient
  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  const double lr_wide = value_of(a.scalars.lr, 0), decay_wide = value_of(a.scalars.weight_decay, 0);
  T lr = static_cast<T>(lr_wide), weight_decay = static_cast<T>(decay_wide), eps = static_cast<T>(a.options.eps);
  T shrink = coupled ? T(1) : static_cast<T>(1 - lr_wide * decay_wide), rest1 = b1.rest, rest2 = b2.rest;
  lr = kept(lr);
  eps = kept(eps);
  const bool rough = A::rough(param) && eps >= static_cast<T>(kRoughEps);
  shrink = kept(shrink);
  rest1 = kept(rest1);
  rest2 = kept(rest2);
  const bool simple = first && !changed && rough == A::rough(param);
  int ways = (changed ? 1 : 0) | (rough ? 2 : 0) | (kPlainRows<A> && simple ? 4 : 0);
  if constexpr (kPlainRows<A> || !Team::kAnew) ways = kept(ways);

  auto* row_factors = reinterpret_cast<Both<T>*>(shared + kHalf);
  if constexpr (kPlainRows<A> && A::kRows > 1) row_factors = kept_shared(row_factors);
  const auto take_row_factors = [&] {
    for (int k = thread; k < tile_rows; k += threads) {
      const int64_t row = layout.row(first_row + k);
      row_factors[begin + k] = {first ? b1.beta * global(static_cast<const T*>(it.first_row))[row] : T(0),
                                b2.beta * global(static_cast<const T*>(it.second_row))[row]};
    }
  };
  if constexpr (A::kWhole) take_row_factors();
  T col_m[kVector], col_v[kVector], sum_m[kVector], sum_v[kVector];
  HFAC_UNROLLED (k, kVector) {
    col_m[k] = first && k < count ? global(static_cast<const T*>(it.first_col))[layout.col(col + k)] : T(0);
    col_v[k] = k < count ? global(static_cast<const T*>(it.second_col))[layout.col(col + k)] : T(0);
    sum_m[k] = sum_v[k] = T(0);
  }
  // Behind loads that nobody waits for until the rows; of whole vectors the compiler sees to that.
  if constexpr (!A::kWhole) take_row_factors();
  if (team.threads == kWarp) {
    meet<kWarp>();
  } else {
    meet<kTileThreads>();
  }

  Watch<A> watch;
  // `plain`: a step with a first moment of gradients as they are, so that nothing of that is asked for each row.
  const auto step = [&](const Loads<A>& loaded, int r, int row, int64_t from, T& total_m, T& total_v, auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    T g[kVector], w[kVector], m[kVector];
    A::widen(loaded.g[r], g);
    A::widen(loaded.w[r], w);
    if (!kPlain && (ways & 1)) {
      gradient(g);
      if (coupled) {
        HFAC_UNROLLED (k, kVector) g[k] = g[k] + weight_decay * w[k];
      }
    }
    const Both<T> row_factor = row_factors[row];
    if (kPlain || first) {
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
      if (kPlain ? A::rough(param) : (ways & 2) != 0) {
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

  for (int base = begin; base < behind; base += ys * kRowsInFlight, at += kRowsInFlight * row_step) {
    T sums[kVector];
    const auto rows_of_batch = [&](auto plain) {
      constexpr bool kPlain = decltype(plain)::value;
      HFAC_UNROLLED (s, kRowsInFlight / A::kRows) {
        const int row = base + s * A::kRows * ys + y;
        const int64_t from = at + s * A::kRows * row_step;
        // The next rows are under way while these are worked on.
        if constexpr (A::kAhead) {
          load(loads[(s + 1) % 2], row + A::kRows * ys, from + A::kRows * row_step);
        } else {
          load(loads[s % 2], row, from);
        }
        HFAC_UNROLLED (r, A::kRows) {
          T total_m = T(0), total_v = T(0);
          if (kPlain || row + r * ys < end) {
            step(loads[s % 2], r, row + r * ys, from + r * row_step, total_m, total_v, plain);
          }
          sums[2 * (s * A::kRows + r)] = total_m;
          sums[2 * (s * A::kRows + r) + 1] = total_v;
        }
      }
    };
    if (kPlainRows<A> && (ways & 4) && base + ys * kRowsInFlight <= end) {
      rows_of_batch(std::true_type());
    } else {
      rows_of_batch(std::false_type());
    }
    sum_lanes(sums, width, [&](int k, T sum) {
      const int row = base + k / 2 * ys + y;
      if (row < behind) shared[(row * 2 + k % 2) * warps + x / kWarp] = sum;
    });
  }
  if constexpr (kWatched) watch.finish(a, it, team.threads);
  const bool small = Team::kAnew && static_cast<int>(blockIdx.x) < a.small_blocks;
  if (small) {
    meet<kWarp>();
  } else {
    meet<kTileThreads>();
  }
  const Team same = Team::kAnew ? Team(a) : team;
  const DeviceItem& here = Team::kAnew ? a.items[same.tile.item] : it;
  if (small) {
    finish_tile<kShard, kWarp>(a, here, same, p, shared, tile_sums, sum_m, sum_v);
  } else {
    finish_tile<kShard, kTileThreads>(a, here, same, p, shared, tile_sums, sum_m, sum_v);
  }
}

// Two blocks per multiprocessor: with the columns' factors and sums and four rows in flight, 128 registers suffice.
// Watched, more are needed, so that is a kernel of its own; and so is one of a launch in which matrices are small.
template <class A, bool kShard, bool kSmall, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, A::kWhole && !kWatched ? 2 : 1) smmf_tiles(Arguments a) {
  using T = typename A::T;
  __shared__ T shared[kShared];
  __shared__ T tile_sums[2 * kTileWarps];
  if (skipped(a)) return;
  const Team<kSmall> team(a);
  if (kSmall && team.tile.item < 0) return;
  const DeviceItem& it = a.items[team.tile.item];
  if (refused(a, it)) return;
  // Vectors, and other rows of no whole vectors: of known types, if nothing is in the way.
  if constexpr (std::is_same_v<A, AnyAccess<float>> && !kShard && !kWatched) {
    if (it.param.layout < 0 && it.grad.layout < 0 && it.param.dtype == it.grad.dtype) {
      if (it.param.dtype == DType::kFloat32) {
        return step_tile<SingleAccess<float, float, float>, kShard, kWatched>(a, team, shared, tile_sums);
      }
      if (it.param.dtype == DType::kBFloat16) {
        return step_tile<SingleAccess<float, BFloat16, BFloat16>, kShard, kWatched>(a, team, shared, tile_sums);
      }
    }
  }
  step_tile<A, kShard, kWatched>(a, team, shared, tile_sums);
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
  add_alternate(total, static_cast<int>(threadIdx.x), tile_sums);
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
    // Where speed is not what counts, one for launches with and without small matrices.
    if constexpr (!kPlainStep) {
      if (a.shards) return smmf_tiles<A, true, false, false>;
      if (a.watched) return smmf_tiles<A, false, true, true>;
    }
    if (l.small_blocks || !A::kWhole) return smmf_tiles<A, false, true, false>;
    return smmf_tiles<A, false, !A::kWhole, false>;
  });
}
KernelFunction smmf_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, smmf_fold); }
KernelFunction smmf_sums_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, smmf_sums_fold); }

}  // namespace hfac
