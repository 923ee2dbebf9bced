// A tile of SMMF's: where its threads are, what they hold and share, and its end, where sums become factors.
#pragma once

#include "stored.cuh"

namespace hfac {

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
constexpr int kShared = kTileThreads * 2 * kVector, kHalf = kShared / 2;
static_assert(kHalf >= kSmmfRows * 2, "of each moment a sum, and a factor; rows of several warps are fewer");

// Until all threads that share a tile are here: a block's, or a warp's.
template <int kThreads>
HFAC_DEVICE void meet() {
  if constexpr (kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Which tile they have, where all are a block's.
template <bool kSmall>
struct Team {
  static constexpr bool kAnew = false;
  static constexpr int threads = kTileThreads, lift = 0;
  Tile tile;
  HFAC_DEVICE explicit Team(const Arguments& a) : tile(tile_of(a)) {}
};
// And where some are small matrices, a warp's. No register keeps any of that until the end of a tile.
template <>
struct Team<true> {
  static constexpr bool kAnew = true;
  int threads;
  int lift;  // rows of shared memory before its own: kSmmfWarpRows for each warp before it
  Tile tile;
  HFAC_DEVICE explicit Team(const Arguments& a) {
    const bool small = static_cast<int>(blockIdx.x) < a.small_blocks;
    // Exchanged, so that the compiler knows that all lanes have the same, and keeps what follows from it once.
    const int warp = small ? shuffle(thread_anew() / kWarp, 0) : 0;
    tile = a.tiles[warp + (small ? blockIdx.x * kTileWarps : blockIdx.x + (kTileWarps - 1) * a.small_blocks)];
    tile.item = shuffle(tile.item, 0);
    threads = small ? kWarp : kTileThreads;
    lift = warp * kSmmfWarpRows;
  }
};
static_assert(2 * kSmmfWarpRows * kTileWarps <= kHalf && kVector * kWarp <= kHalf / kTileWarps,
              "a warp's part is enough for its rows, and for its sums of columns");

// Where they are in the matrix, and one of them among them.
struct Place {
  int row_tile, col_tile, warps;  // warps that share a row
  int64_t first_row, tile_end;    // its first row, and the first column behind it
  int tile_rows, shift, ys;       // ys: rows that the team has at once
  int x, y, count;                // of the thread: which vector of a row, its first row; columns, 8 or 0 where whole
  int64_t col;
  HFAC_DEVICE Place(const DeviceItem& it, const Tile& tile, int threads, int thread) {
    const Tiling& tiling = it.tiling;
    row_tile = tile.index / tiling.col_tiles;
    col_tile = tile.index - row_tile * tiling.col_tiles;
    warps = tiling.lanes > kWarp ? tiling.lanes / kWarp : 1;
    first_row = static_cast<int64_t>(row_tile) * tiling.rows;
    tile_rows = static_cast<int>(it.rows - first_row < tiling.rows ? it.rows - first_row : tiling.rows);
    const int64_t end = static_cast<int64_t>(col_tile + 1) * tiling.cols;
    tile_end = end < it.cols ? end : it.cols;
    shift = log2_of(tiling.lanes);
    ys = threads >> shift;
    stand(tiling, thread);
  }
  HFAC_DEVICE void stand(const Tiling& tiling, int thread) {
    x = thread & (tiling.lanes - 1);
    y = thread >> shift;
    col = static_cast<int64_t>(col_tile) * tiling.cols + x * kVector;
    count = vector_count(col, tile_end);
  }
};

// Adds values of which even threads have |M|'s and odd ones V's; `shared` has as many elements as twice the warps.
// Every thread may read the sums after a barrier.
template <class T>
HFAC_DEVICE void add_alternate(T value, int thread, T* shared) {
  for (int mask = kWarp / 2; mask > 1; mask /= 2) value = value + shuffle_xor(value, mask);
  const int lane = thread % kWarp;
  if (lane < 2) shared[thread / kWarp * 2 + lane] = value;
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

// The end of a tile: sums of its rows, which lie in `shared`, and of its columns. It finds out anew what it knows of
// its thread: kept from the beginning that would take registers which the rows have no other place for.
template <bool kShard, int kThreads, class Team, class T>
HFAC_DEVICE void finish_tile(const Arguments& a, const DeviceItem& it, const Team& team, Place p, T* shared,
                             T* tile_sums, const T (&sum_m)[kVector], const T (&sum_v)[kVector]) {
  constexpr bool kSmall = kThreads == kWarp;
  const Tile tile = team.tile;
  const int thread = (Team::kAnew ? thread_anew() : static_cast<int>(threadIdx.x)) & (kThreads - 1);
  const Tiling tiling = it.tiling;
  if constexpr (Team::kAnew) {
    p = Place(it, tile, kThreads, thread);
  } else {
    p.stand(tiling, thread);
  }
  if (kSmall) {
    shared += 2 * team.lift;
    tile_sums += 2 * team.lift / kSmmfWarpRows;
  }
  const int64_t rows = it.rows, cols = it.cols;
  const bool alone = kSmall || (!kShard && tiles_of(tiling) == 1), first = a.options.first_moment;
  const SmmfSpace<T> space(it, a.workspace);
  const int odd = thread % 2;  // this thread's moment among the sums of rows
  T* row_to = space.rows + (static_cast<int64_t>(p.col_tile) * 2 + odd) * rows + p.first_row;
  if (alone) row_to = static_cast<T*>(odd ? it.second_row : it.first_row);
  T of_tile = T(0);
  for (int k = thread; k < 2 * p.tile_rows; k += kThreads) {
    T sum = T(0);
    for (int w = 0; w < p.warps; ++w) sum = sum + shared[k * p.warps + w];
    if (first || odd) global(row_to)[k / 2] = sum;
    of_tile = of_tile + sum;
  }
  add_alternate(of_tile, thread, tile_sums);
  meet<kThreads>();
  if (alone) {
    if (first && thread == 0) settle_signs(a, it);
  } else if (thread < 2) {
    space.totals[tile.index * 2 + thread] = alternate_sum(tile_sums, thread);
  }

  T *col_to_m = static_cast<T*>(it.first_col), *col_to_v = static_cast<T*>(it.second_col);
  if (!alone) {
    col_to_m =
        space.cols + static_cast<int64_t>(p.row_tile) * 2 * cols + static_cast<int64_t>(p.col_tile) * tiling.cols;
    col_to_v = col_to_m + cols;
  }
  const auto put = [&](int k, T sum) {
    const int moment = k / kVector;
    if (k % kVector >= p.count || !(first || moment)) return;
    T* const to = global(moment ? col_to_v : col_to_m) + p.x * kVector + k % kVector;
    if (alone) sum = normalised(sum, kThreads == kWarp ? tile_sums[moment] : alternate_sum(tile_sums, moment));
    *to = sum;
  };
  if (p.ys == 1) {
    HFAC_UNROLLED (k, kVector) {
      put(k, sum_m[k]);
      put(kVector + k, sum_v[k]);
    }
    return;
  }
  // Threads of the same columns: their sums meet in shared memory, in the order of y.
  HFAC_UNROLLED (k, kVector) {
    shared[k * kThreads + thread] = sum_m[k];
    shared[kHalf + k * kThreads + thread] = sum_v[k];
  }
  meet<kThreads>();
  if (p.y >= 2 * kVector) return;
  for (int k = p.y; k < 2 * kVector; k += p.ys) {
    const T* const sums = shared + k / kVector * kHalf + k % kVector * kThreads;
    T sum = T(0);
    for (int from = 0; from < p.ys; ++from) sum = sum + sums[from * tiling.lanes + p.x];
    put(k, sum);
  }
}

}  // namespace hfac
