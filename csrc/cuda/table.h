// What the kernels read of a list of parameters: plain structs, written by the host, kept in device memory between
// steps. Items and shards are those of csrc/ops.h, with layouts in place of pointers to the host.
#pragma once

#include <cstdint>

#include "../common/math/rounding.h"
#include "../ops.h"

namespace hfac {

constexpr int kVector = 8;         // neighbouring elements of a row that one thread holds
constexpr int kRowsInFlight = 4;   // rows whose loads a thread issues before it uses the first
constexpr int kTileThreads = 256;  // of the tile kernels, the folds and the dense ops
constexpr int kTileCols = kTileThreads * kVector;
constexpr int kWideRows = 16;             // that the path for longer rows reads twice at a time
constexpr int kFoldChunk = kTileThreads;  // rows of one block of a fold of H-Fac's
// Columns of it. While tiles are added up a thread has 16 bytes of float32 columns, and each warp takes tiles in turn.
constexpr int kFoldCols = 128, kFoldVector = 4, kFoldWays = kFoldChunk * kFoldVector / kFoldCols;
constexpr int kSmmfChunk = 64;           // rows and columns of a block of SMMF's: of each, 4 threads share the tiles
constexpr int64_t kRun = 4 * kTileCols;  // elements of a block of the dense ops
// Of each item in `Arguments::counters`: blocks that are done, then two words for flips at the ends of its signs.
constexpr int kCounters = 3;
constexpr int kSignEdges = 1;

// How H-Fac's statistics take rows, by their length: up to three vectors of a thread, whose columns' sums stay in
// registers; four; eight, of a block that has a multiprocessor's registers alone; or, with sums in memory, of any
// length.
enum class Width { kRows, kFour, kLong, kWide };
constexpr int kWidths = static_cast<int>(Width::kWide) + 1;
HFAC_HD constexpr int stats_threads(Width w) { return w == Width::kWide ? 512 : kTileThreads; }
// Do two blocks share a multiprocessor's registers? Three sums of 32 columns take 96 of the 128 that a thread then has.
HFAC_HD constexpr bool stats_in_pairs(Width w) { return w == Width::kRows || w == Width::kFour; }
// Of a thread and a row, at most.
HFAC_HD constexpr int stats_vectors(Width w) { return w == Width::kRows ? 3 : w == Width::kLong ? 8 : 4; }
constexpr int kLongVectors = 6;  // of long rows where that is enough: more warps then have some
HFAC_HD constexpr int64_t stats_cols(Width w) { return int64_t{stats_vectors(w)} * kVector * stats_threads(w); }
// Rows come through a ring of batches in shared memory. Of a batch a thread has 128 bytes, or one row. `element`: its
// bytes.
HFAC_HD constexpr int stats_rows(int vectors, int element) {
  const int most = 128 / (vectors * kVector * element);
  return most < 2 ? 1 : most < 4 ? 2 : most < 8 ? 4 : 8;
}
// So few threads share rows that are narrower than as many vectors: of 16 bits, those of 64 columns.
constexpr int kNarrowLanes = 8;
HFAC_HD constexpr int stats_batch_bytes(int vectors, int element, Width w) {
  return stats_rows(vectors, element) * vectors * kVector * element * stats_threads(w);
}
// Every GPU has 99 KB for a block; with three batches one is under way, or more, while two are used.
constexpr int kRingBytes = 96 << 10;
HFAC_HD constexpr int stats_stages(int vectors, int element, Width w) {
  return 3 * stats_batch_bytes(vectors, element, w) > kRingBytes ? 2 : 3;
}
HFAC_HD constexpr int stats_ring(int vectors, int element, Width w) {
  return stats_stages(vectors, element, w) * stats_batch_bytes(vectors, element, w);
}
// Of a block of a launch, which may have rows of several lengths.
HFAC_HD constexpr int stats_shared(Width w, int element) {
  return w == Width::kRows ? kRingBytes : stats_ring(stats_vectors(w), element, w);
}

struct Operand {
  void* data;
  DType dtype;
  int32_t layout;  // offset of {dimensions, sizes, strides} among the layouts, or -1: contiguous
};

// Type of what a bfloat16 parameter lacks of its master weight (hfac/rounding.py), by its bytes.
enum class Low : int32_t { kNone = 0, kInt8 = 1, kInt16 = 2 };

struct LowerPiece {
  void* data;
  Low kind;
  int32_t layout;  // as an operand's
};

// As Storage, with its BitOffset.
struct DeviceStorage {
  LowerPiece low;
  int64_t first;      // index of the first element in the whole parameter
  uint32_t position;  // of the parameter, in the optimizer
  int32_t layout;     // of the indices, among the layouts, or -1: they follow each other
  int32_t stochastic;
};

constexpr int kSmallRows = 2;  // of a thread, of a matrix of H-Fac's that a block holds

constexpr int kSmmfRows = 1024;  // of a tile of SMMF's at most
// Of a matrix of SMMF's that a warp takes, at most: as many as a thread of a block has of a tile of 32 K.
constexpr int kSmmfWarpRows = 128, kSmmfWarpElements = 4096;

// How a matrix is cut. `lanes` threads share a row; the others of the block take further rows. `vectors`: of a row and
// a thread, in H-Fac's statistics; `part_of_lane`: there 1 / lanes in units of 2^-kPartBits, rounded up, so that a
// thread's number times that is the quotient, without the 20 instructions of a division.
struct alignas(8) Tiling {  // two numbers are loaded at once
  int32_t rows, cols, row_tiles, col_tiles, lanes, vectors, part_of_lane;
};
constexpr int kPartBits = 20;  // exact for the few threads of a block

struct Operands {
  Operand param, grad;
};

// One parameter, or one block of a shard of SMMF's.
struct DeviceItem : Operands, Moments {
  int64_t sign_bytes;     // of all slices
  int64_t whole_cols;     // of a row of the whole matrix
  int32_t codes_layout;   // as an operand's
  int32_t single;         // 1: no whole vectors, but taken element by element in the launches of those
  int64_t workspace;      // bytes from its start
  int64_t partials;       // as `workspace`: tiles' sums of columns. Without tiles, sums of squares
  int32_t index;          // in the caller's list
  int32_t counter;        // its first among the counters
  int32_t collects;       // 1: H-Fac's tiles' sums do not outlast their group, so that they are collected
  int32_t chunks;         // of H-Fac's fold, where they are so few that each block of the update adds up what they have
  Tiling tiling, update;  // of the first pass; of H-Fac's second
  DeviceStorage storage;
};

// The Shard beside each item of an op on shards. H-Fac's item is the shard itself, SMMF's is one block of it, and
// blocks of a shard follow each other.
struct DeviceShard {
  int64_t rows, cols;  // of the whole matrix
  void *row[2], *col[3];
  int64_t first, stride, row_at, row_step, col_at;  // SMMF: of the Block
  int64_t blocks;                                   // SMMF: of the shard, on its first block; 0 on the others
};

struct alignas(8) Tile {  // loaded at once
  int32_t item, index;
};

// A step scalar: a value, or an address in device memory; `stride` is 1 where it has one entry per parameter.
struct Scalar {
  double value;
  const void* address;
  int32_t wide, stride;  // wide: double, else float
};

// Of every round of Philox: among a launch's constants they cost nothing, made from the seed two additions a round.
struct Keys {
  uint32_t round[common::kPhiloxRounds][2];
  HFAC_HD uint64_t seed() const { return static_cast<uint64_t>(round[0][1]) << 32 | round[0][0]; }
};

struct Scalars {
  Scalar lr, weight_decay, beta1, beta2;
  // Of whole parameters, to H-Fac's shards: sum of r, mean of U^2; where there are codes the sum of r as it was.
  Scalar totals, mean_squares, old_totals;
};

// Statistics of a watched step, for each parameter: the sum of (new - old)^2, before the new one is rounded; elements
// that stay what they are when it is rounded to the nearest; the sum of squares of the direction, before it is clipped.
// Of H-Fac's gradients also the rows and columns of zeros.
enum Watched { kMoved, kStill, kDirection, kZeroRows, kZeroCols, kWatchedNumbers };

// Arguments of every kernel.
struct Arguments {
  const DeviceItem* items;
  const DeviceShard* shards;  // one for each item, or null: parameters are whole
  const int64_t* layouts;
  const Tile* tiles;
  char* workspace;
  int32_t* counters;  // [items, kCounters], zero between steps
  int32_t* nonfinite;
  const float *grad_scale, *found_inf;
  const float* clip;     // of a launch that has nothing to do where it is 1
  double* squares;       // [entries] sums of squares, where the launch is to write them
  double* watched;       // [entries, kWatchedNumbers] what kernels add to, where a step is watched
  int32_t backward;      // tiles from the last to the first
  int32_t small_blocks;  // SMMF: the first blocks, each of whose warps has a tile, a small matrix (or none: item -1)
  Scalars scalars;
  Options options;
  Scalar step;  // with `keys`: what random bits depend on beside a BitOffset
  Keys keys;
};

inline Keys keys_of(uint64_t seed) {
  Keys keys;
  for (int k = 0; k < 2 * common::kPhiloxRounds; ++k) keys.round[k / 2][k % 2] = common::SeedKey{seed}(k / 2, k % 2);
  return keys;
}

HFAC_HD bool is_double(const DeviceItem& it) { return it.param.dtype == DType::kFloat64; }
HFAC_HD bool is_stored(const DeviceItem& it) { return it.storage.low.kind != Low::kNone || it.storage.stochastic; }
HFAC_HD int64_t ceil_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Of what is not negative by a number that the compiler knows: it then takes a third of the instructions.
HFAC_HD int64_t ceil_part(int64_t a, unsigned b) {
  return static_cast<int64_t>((static_cast<uint64_t>(a) + b - 1) / b);
}
HFAC_HD int64_t tiles_of(const Tiling& t) { return int64_t{t.row_tiles} * t.col_tiles; }
HFAC_HD int64_t fold_chunks(int64_t rows, int64_t cols, int chunk) {
  return ceil_quotient(rows > cols ? rows : cols, chunk);
}
// Of H-Fac's folds, whose warps share the columns' tiles.
HFAC_HD int64_t collect_chunks(const DeviceItem& it) { return ceil_part(it.cols, kFoldCols); }
HFAC_HD int64_t hfac_chunks(const DeviceItem& it) {
  const int64_t of_rows = ceil_part(it.rows, kFoldChunk), of_cols = collect_chunks(it);
  return of_rows > of_cols ? of_rows : of_cols;
}

// Layouts of a parameter's partial sums in the workspace: the host takes their size from these, kernels their
// addresses.
template <class T>
struct SmmfSpace {
  T* cols;    // [row_tiles, 2, cols] column sums, of |M| and of V, as everything here; first, so that they are aligned
  T* rows;    // [col_tiles, 2, rows]
  T* totals;  // [row_tiles * col_tiles, 2] sums of tiles
  T* end;
  HFAC_HD SmmfSpace(const DeviceItem& it, char* workspace) {
    cols = reinterpret_cast<T*>(workspace + it.workspace);
    rows = cols + it.tiling.row_tiles * 2 * it.cols;
    totals = rows + it.tiling.col_tiles * 2 * it.rows;
    end = totals + tiles_of(it.tiling) * 2;
  }
};

// The first address from p on where 16 bytes can be stored at a time.
template <class T>
HFAC_HD T* aligned(T* p) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + 15) & ~uintptr_t{15});
}

constexpr int kSums = 3;        // of a column, for H-Fac: g, g^2, g^2 / r_i
constexpr int kFoldTotals = 3;  // of a chunk of its fold

template <class T>
struct HfacSpace {
  T *scale, *divisor, *growth;  // what all elements have in common (Scales), where `norms` are not few
  T *row_sum, *row_square;      // [rows] sum of the gradient, then phi / 2, of codes sqrt(r_old / r); the new r, then
                                // 1 / sqrt(r)
  T *col_first, *col_scale;     // [cols] psi / 2, of codes sqrt(s_old / s); 1 / sqrt(s)
  T* collected;                 // [3, cols] `cols` added up, where that outlasts its group; else null
  // [chunks, 3] sum of r; sum of w_j / s_j; of codes the sum of r as it was. Behind the rest, and the tiles' sums
  // wherever the host says: the statistics find what they write with few instructions.
  double* norms;
  void* end;
  T* cols;  // [row_tiles, 3, cols] sums of g, g^2, g^2 / r_i
  HFAC_HD HfacSpace(const DeviceItem& it, char* workspace) {
    scale = reinterpret_cast<T*>(workspace + it.workspace);
    divisor = scale + 1;
    growth = scale + 2;
    row_sum = scale + 3;
    row_square = row_sum + it.rows;
    col_first = aligned(row_square + it.rows);
    col_scale = col_first + it.cols;
    T* const rest = aligned(col_scale + it.cols);
    collected = it.collects ? rest : nullptr;
    norms = reinterpret_cast<double*>(aligned(rest + (it.collects ? kSums * it.cols : 0)));
    end = norms + hfac_chunks(it) * kFoldTotals;
    cols = reinterpret_cast<T*>(workspace + it.partials);
  }
};

template <class T>
struct DenseSpace {
  T* clip;   // what the direction is multiplied by
  T* norms;  // [runs] sums of U^2
  T* end;
  HFAC_HD DenseSpace(const DeviceItem& it, char* workspace) {
    clip = reinterpret_cast<T*>(workspace + it.workspace);
    norms = clip + 1;
    end = norms + ceil_quotient(it.rows, kRun);
  }
};

}  // namespace hfac
