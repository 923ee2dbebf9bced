// H-Fac on matrices in three launches: sums from one read of the gradient (hfac_stats.cu), a fold of O(rows + columns),
// and the update with a second read (hfac_update.cuh; of a first moment in codes of 8 bits in hfac_int8.cu).
//
// Where gradients are clipped by the norm of them all, the first launch comes in a phase of its own: the norm is made
// of its column sums, which `hfac_collect` adds up over the tiles to outlast the other groups. Then each group goes on
// from there; where the coefficient is not 1 it takes the statistics again, because r_i depends on it.
#include "hfac_moments.cuh"
#include "hfac_update.cuh"

namespace hfac {
namespace {

// What a thread has of a chunk's columns: of all tiles that its warp takes kFoldVector neighbours from `first` on, and
// when their sums have met column k, if there is one for it: in the last warps, since the first ones have rows.
struct FoldCol {
  const int lane = static_cast<int>(threadIdx.x % kWarp), way = static_cast<int>(threadIdx.x / kWarp);
  const int x = static_cast<int>(threadIdx.x) - (kTileThreads - kFoldCols);
  const int64_t first, k;
  const bool mine;
  HFAC_DEVICE FoldCol(int chunk, int64_t cols)
      : first(static_cast<int64_t>(chunk) * kFoldCols + lane * kFoldVector),
        k(static_cast<int64_t>(chunk) * kFoldCols + x),
        mine(x >= 0 && k < cols) {}
};
static_assert(kFoldCols == kWarp * kFoldVector, "a warp has a chunk's columns of a tile");

// Neighbouring numbers, 16 bytes at a time where they are aligned.
template <class T>
HFAC_DEVICE void load_aligned(const T* from, T (&to)[kFoldVector]) {
  HFAC_UNROLLED (c, static_cast<int>(sizeof(to)) / 16) {
    const Chunk chunk = load_chunk(reinterpret_cast<const char*>(from) + 16 * c, false);
    memcpy(reinterpret_cast<char*>(to) + 16 * c, &chunk, 16);
  }
}
template <class T>
HFAC_DEVICE void store_aligned(const T (&from)[kFoldVector], T* to) {
  HFAC_UNROLLED (c, static_cast<int>(sizeof(from)) / 16) {
    Chunk chunk;
    memcpy(&chunk, reinterpret_cast<const char*>(from) + 16 * c, 16);
    store_chunk(reinterpret_cast<char*>(to) + 16 * c, chunk);
  }
}
template <class T>
HFAC_DEVICE void load_some(const T* from, int64_t count, T (&to)[kFoldVector]) {
  HFAC_UNROLLED (k, kFoldVector) to[k] = k < count ? from[k] : T(0);
}

// By a whole block, to the thread of each of its columns: sums over all tiles of rows. Each warp takes every
// kFoldWays-th tile, in their order, several of them before it adds any; then the warps' sums are added in their order.
// each(j, sum) sees those of a tile.
template <class T, class Each>
HFAC_DEVICE void sum_tiles(const T* cols, int tiles, int64_t width, const FoldCol& col, T (&sums)[kSums],
                           const Each& each) {
  constexpr int kTogether = sizeof(T) == sizeof(float) ? 4 : 2, kStep = kFoldWays * kTogether;
  alignas(16) __shared__ T shared[kFoldWays][kSums][kFoldCols];
  T part[kSums][kFoldVector] = {};
  const auto add = [&](int j, const T(&loaded)[kFoldVector]) {
    HFAC_UNROLLED (u, kFoldVector) {
      part[j][u] = part[j][u] + loaded[u];
      each(j, loaded[u]);
    }
  };
  const int64_t count = width - col.first;
  const bool whole = width % kFoldVector == 0 && count > 0;
  const T* from = cols + int64_t{col.way} * kSums * width + col.first;  // the warp's next tile
  int t = col.way;
  if (whole) {
    for (; t + kStep - kFoldWays < tiles; t += kStep) {  // nothing is asked of any tile
      T loaded[kTogether][kSums][kFoldVector];
      HFAC_UNROLLED (u, kTogether) {
        HFAC_UNROLLED (j, kSums) load_aligned(from + j * width, loaded[u][j]);
        from += kFoldWays * kSums * width;
      }
      HFAC_UNROLLED (u, kTogether * kSums) add(u % kSums, loaded[u / kSums][u % kSums]);
    }
  }
  const auto add_rest = [&](const auto& load) {
    for (; t < tiles; t += kStep) {
      T loaded[kTogether][kSums][kFoldVector] = {};
      HFAC_UNROLLED (u, kTogether) {
        if (t + u * kFoldWays >= tiles) break;
        HFAC_UNROLLED (j, kSums) load(from + j * width, loaded[u][j]);
        from += kFoldWays * kSums * width;
      }
      HFAC_UNROLLED (u, kTogether * kSums) add(u % kSums, loaded[u / kSums][u % kSums]);
    }
  };
  if (whole) {
    add_rest([&](const T* at, T(&to)[kFoldVector]) { load_aligned(at, to); });
  } else if (width % kFoldVector) {
    add_rest([&](const T* at, T(&to)[kFoldVector]) { load_some(at, count, to); });
  }
  if (col.way < tiles) {  // others have nothing, which nobody reads
    HFAC_UNROLLED (j, kSums) store_aligned(part[j], &shared[col.way][j][col.lane * kFoldVector]);
  }
  __syncthreads();
  HFAC_UNROLLED (j, kSums) sums[j] = T(0);
  if (!col.mine) return;
  const auto add_way = [&](int w) {
    HFAC_UNROLLED (j, kSums) sums[j] = sums[j] + shared[w][j][col.x];
  };
  if (tiles < kFoldWays) {
    for (int w = 0; w < tiles; ++w) add_way(w);
  } else {
    HFAC_UNROLLED (w, kFoldWays) add_way(w);
  }
}

// Collected sums are those of one tile: adding them to zero, and zeros to them, changes no bit.
template <class T>
HFAC_DEVICE void sum_tiles(const HfacSpace<T>& space, const DeviceItem& it, const FoldCol& col, T (&sums)[kSums]) {
  const bool collected = space.collected;
  sum_tiles(collected ? space.collected : space.cols, collected ? 1 : it.tiling.row_tiles, it.cols, col, sums,
            [](int, T) {});
}

// Column sums over all tiles, and the sum of squares of the whole gradient in double: of the tiles' sums, which lose
// less than those of whole columns.
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_collect(Arguments a) {
  __shared__ double shared[kTileWarps];
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (skipped(a)) {  // nothing was added up
    if (a.squares && tile.index == 0 && threadIdx.x == 0) a.squares[it.index] = static_cast<double>(NAN);
    return;
  }
  if (unclipped(a)) return;
  const HfacSpace<T> space(it, a.workspace);
  const FoldCol col(tile.index, it.cols);
  double total = 0;
  T sums[kSums];
  sum_tiles(space.cols, it.tiling.row_tiles, it.cols, col, sums, [&](int j, T sum) {
    if (j == 1) total += static_cast<double>(sum);
  });
  if (col.mine) {
    HFAC_UNROLLED (j, kSums) space.collected[j * it.cols + col.k] = sums[j];
  }
  if (!a.squares) return;
  add_up(total, tile.index, collect_chunks(it), space.norms, a.counters + it.counter, shared, a.squares + it.index);
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

// By one thread: what `update_tile` reads of a whole matrix.
template <class T, bool kCodes>
HFAC_DEVICE void put_scales(const HfacSpace<T>& space, const Options& o, double total, double old, double mean_square) {
  *space.scale = root(static_cast<T>(total));
  *space.divisor = clip_divisor(o, static_cast<T>(mean_square));
  if (kCodes) *space.growth = growth_of(root(static_cast<T>(total)), old);
}

// `kCodes`: the first moment is whole, in 8 bits, whose unit changes with the second moment.
template <class T, bool kCodes>
HFAC_DEVICE void fold(const Arguments& a) {
  // Sums of r, of w_j / s_j and, of codes, of r as it was: in double, where no partial result can overflow.
  constexpr int kTotals = kCodes ? kFoldTotals : 2;
  __shared__ double shared[kFoldTotals * kTileWarps];
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  if (refused(a, it)) return;
  const HfacSpace<T> space(it, a.workspace);
  const int64_t m = it.rows, n = it.cols;
  const T rows = static_cast<T>(m), cols = static_cast<T>(n), sign = a.options.maximize ? T(-1) : T(1);
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;

  // All loads before the first store, behind which compilers leave none, and addresses with them.
  const int few = it.chunks, counter = it.counter;
  void *const first_row = it.first_row, *const second_row = it.second_row;
  void *const first_col = it.first_col, *const second_col = it.second_col;
  const FoldCol col(tile.index, n);
  const T sum = k < m ? space.row_sum[k] : T(0), r = k < m ? space.row_square[k] : T(0);
  const T row_before = k < m ? static_cast<const T*>(kCodes ? second_row : first_row)[k] : T(0);
  const T s_before = col.mine ? static_cast<const T*>(second_col)[col.k] : T(0);
  [[maybe_unused]] const T col_before = !kCodes && col.mine ? static_cast<const T*>(first_col)[col.k] : T(0);
  T sums[kSums];
  if (static_cast<int64_t>(tile.index) * kFoldCols < n) sum_tiles(space, it, col, sums);

  const Decay<T> b1(a.scalars.beta1, it.index), b2(a.scalars.beta2, it.index);
  double totals[kTotals] = {};
  double zeros[2] = {0, 0};  // rows and columns of zeros alone
  if (k < m) {
    zeros[0] = is_minus_zero(sum) ? 1 : 0;
    totals[0] = static_cast<double>(r);
    space.row_square[k] = T(1) / root(r);
    if constexpr (kCodes) {
      totals[2] = static_cast<double>(row_before);
      space.row_sum[k] = step_unit(second_row, k, row_before, r);
    } else {
      space.row_sum[k] = step_moments(first_row, second_row, k, row_before, sign * (sum + T(0)) / cols, r, cols, b1);
    }
  }
  if (col.mine) {
    const T square = sums[1] + static_cast<T>(static_cast<double>(m) * a.options.eps);
    const T s = hfac_average(b2.beta, s_before, b2.rest, square);
    if constexpr (kCodes) {
      space.col_first[col.k] = step_unit(second_col, col.k, s_before, s);
    } else {
      space.col_first[col.k] =
          step_moments(first_col, second_col, col.k, col_before, sign * sums[0] / rows, s, rows, b1);
    }
    space.col_scale[col.k] = T(1) / root(s);
    totals[1] = static_cast<double>(sums[2]) / static_cast<double>(s);
    zeros[1] = sums[0] == T(0) && sums[1] == T(0) ? 1 : 0;
  }
  double* const watched = a.watched ? a.watched + int64_t{it.index} * kWatchedNumbers : nullptr;
  if (watched) {
    block_sums(zeros, shared);
    HFAC_UNROLLED (j, 2) {
      if (threadIdx.x == 0 && zeros[j] > 0) atomicAdd(watched + kZeroRows + j, zeros[j]);
    }
  }
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  if (shuffle(static_cast<int>(k < m || col.mine), 0)) warp_sums(totals);
  if (lane == 0) {
    HFAC_UNROLLED (j, kTotals) shared[warp * kTotals + j] = totals[j];
  }
  __syncthreads();
  if (warp == 0 && lane < kTotals) {
    double sum = shared[lane];
    HFAC_UNROLLED (w, kTileWarps - 1) sum = sum + shared[(w + 1) * kTotals + lane];
    space.norms[tile.index * kFoldTotals + lane] = sum;
  }
  if (few) return;  // the update adds them up
  const int64_t chunks = hfac_chunks(it);
  if (!last_block(a.counters + counter, chunks)) return;
  HFAC_UNROLLED (j, kTotals) totals[j] = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kTileThreads) {
    HFAC_UNROLLED (j, kTotals) totals[j] += load_fresh(space.norms + c * kFoldTotals + j);
  }
  block_sums(totals, shared);
  if (threadIdx.x > 0) return;
  const double norm = totals[0] * totals[1];
  if (watched) watched[kDirection] += norm;
  put_scales<T, kCodes>(space, a.options, totals[0], kCodes ? totals[kTotals - 1] : 0.0,
                        norm / (static_cast<double>(m) * static_cast<double>(n)));
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_fold(Arguments a) {
  fold<T, false>(a);
}
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_int8_fold(Arguments a) {
  fold<T, true>(a);
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
  const FoldCol col(tile.index, it.cols);
  if (!shard.col[0] || static_cast<int64_t>(tile.index) * kFoldCols >= it.cols) return;
  T sums[kSums];
  sum_tiles(space, it, col, sums);
  if (!col.mine) return;
  HFAC_UNROLLED (j, kSums) static_cast<T*>(shard.col[j])[col.k] = sums[j];
}

// What `fold` leaves to the update, of sums over whole rows and columns that are known: the moments go on, also those
// of a shard that has rows and no columns, or columns and no rows.
template <class T, bool kCodes>
HFAC_DEVICE void apply_fold(const Arguments& a) {
  if (skipped(a)) return;
  const Tile tile = tile_of(a);
  const DeviceItem& it = a.items[tile.item];
  const DeviceShard& shard = a.shards[tile.item];
  const HfacSpace<T> space(it, a.workspace);
  const T rows = static_cast<T>(shard.rows), cols = static_cast<T>(shard.cols),
          sign = a.options.maximize ? T(-1) : T(1);
  const Decay<T> b1(a.scalars.beta1, it.index);
  const int64_t k = static_cast<int64_t>(tile.index) * kFoldChunk + threadIdx.x;
  if (k < it.rows) {
    const T r = static_cast<const T*>(shard.row[1])[k];
    space.row_square[k] = T(1) / root(r);
    if constexpr (kCodes) {
      space.row_sum[k] = step_unit(it.second_row, k, static_cast<const T*>(it.second_row)[k], r);
    } else {
      const T sum = static_cast<const T*>(shard.row[0])[k];
      const T before = static_cast<const T*>(it.first_row)[k];
      space.row_sum[k] = step_moments(it.first_row, it.second_row, k, before, sign * sum / cols, r, cols, b1);
    }
  }
  const FoldCol col(tile.index, it.cols);
  if (col.mine) {
    const T s = static_cast<const T*>(shard.col[1])[col.k];
    if constexpr (kCodes) {
      space.col_first[col.k] = step_unit(it.second_col, col.k, static_cast<const T*>(it.second_col)[col.k], s);
    } else {
      const T sum = static_cast<const T*>(shard.col[0])[col.k];
      const T before = static_cast<const T*>(it.first_col)[col.k];
      space.col_first[col.k] = step_moments(it.first_col, it.second_col, col.k, before, sign * sum / rows, s, rows, b1);
    }
    space.col_scale[col.k] = T(1) / root(s);
  }
  if (k > 0) return;
  put_scales<T, kCodes>(space, a.options, value_of(a.scalars.totals, it.index),
                        kCodes ? value_of(a.scalars.old_totals, it.index) : 0.0,
                        value_of(a.scalars.mean_squares, it.index));
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_apply_fold(Arguments a) {
  apply_fold<T, false>(a);
}
template <class T>
__global__ void __launch_bounds__(kTileThreads) hfac_int8_apply_fold(Arguments a) {
  apply_fold<T, true>(a);
}

// Watched, a kernel of its own: the plain one has no register for it.
template <class A, bool kWatched>
__global__ void __launch_bounds__(kTileThreads, A::kWhole && !kWatched ? 2 : 1) hfac_update_tiles(Arguments a) {
  update_tile<A, kWatched, false>(a);
}

}  // namespace

KernelFunction hfac_collect_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_collect); }
KernelFunction hfac_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_fold); }
KernelFunction hfac_sums_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_sums_fold); }
KernelFunction hfac_apply_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_apply_fold); }
KernelFunction hfac_int8_fold_kernel(const Launch& l, const Arguments&) { HFAC_BY_STATE(l, hfac_int8_fold); }
KernelFunction hfac_int8_apply_fold_kernel(const Launch& l, const Arguments&) {
  HFAC_BY_STATE(l, hfac_int8_apply_fold);
}
KernelFunction hfac_update_kernel(const Launch& l, const Arguments& a) {
  HFAC_BY_ACCESS(l, a, PairAccesses, hfac_update_tiles);
}

void launch_hfac_unflag(int32_t* flags, int64_t count, const float* clip, void* stream) {
  launch("hfac_unflag", hfac_unflag, ceil_quotient(count, kTileThreads), kTileThreads, 0, stream, flags, count, clip);
}

}  // namespace hfac
