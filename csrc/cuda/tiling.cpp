// Sizes of tiles, by what a block of each kernel holds and by how many blocks a GPU is to have.
#include "tiling.h"

#include <algorithm>

namespace hfac {
namespace {

constexpr int kWarp = 32;

constexpr int64_t kStatsBlocks = 128, kStatsTile = 128 << 10;  // elements
constexpr int64_t kManyWaves = 256 << 20;                      // elements of a launch that has two if it can
constexpr int32_t kSmmfLanes = 64;  // of SMMF's tiles where there are so many columns: 1 KB of a row of bfloat16
constexpr int64_t kAnyTile = 2048;  // elements of tiles that go one by one, which takes ten times as long

int32_t power_of_two(int64_t at_least) {
  int32_t p = 1;
  while (p < at_least) p *= 2;
  return p;
}

// The update has no partial sums, so it takes few rows, by the elements that are launched together: 16 M make 256
// blocks of 32 rows. With more blocks than that, rows read their columns' factors less often.
int32_t updated_rows(int64_t launched) { return launched < (8 << 20) ? 16 : launched < (32 << 20) ? 32 : 64; }

// Elements of SMMF's tiles: two blocks for each multiprocessor where a matrix has 16 M elements, and fewer partial sums
// where it has more. By the matrix alone, so that it steps to the same bits in any list and in gradient release.
int64_t smmf_tile(const DeviceItem& it) {
  if (!whole(it)) return kAnyTile;
  return it.rows * it.cols < (32 << 20) ? 64 << 10 : 128 << 10;
}

}  // namespace

// Rows per tile of H-Fac's statistics, of which `launched` elements are launched together. A multiprocessor, of which
// there are 108 to 148, holds two blocks, or one of long rows. All that are held at a time take as long, and so tiles
// are as many as there can be, or a few times as many: matrices are no multiples of a tile, and so the last ones would
// leave most of a large wave empty. Of small launches half as many, because a tile's partial sums cost 24 bytes per
// column, written and read; of very large ones fewer, of which the last wave is a small part.
int32_t statistics_rows(int64_t launched, int64_t cols, Width width) {
  const int64_t blocks = stats_threads(width) == kTileThreads ? 2 * kStatsBlocks : kStatsBlocks;
  int64_t tile = ceil_quotient(launched, blocks);
  if (tile < kStatsTile) tile = ceil_quotient(launched, kStatsBlocks);
  const int64_t most = std::max<int64_t>(256, kStatsTile / 2 / cols), rows = ceil_quotient(tile, cols);
  int64_t waves = ceil_quotient(rows, most);
  if (launched <= kManyWaves) waves = std::max(waves, std::min<int64_t>(2, rows / 64));
  return static_cast<int32_t>(std::max<int64_t>(16, ceil_quotient(rows, waves)));
}

bool in_one_block(const DeviceItem& it, bool bulk) {
  const int lanes = it.tiling.lanes;
  return pair_access(it, bulk) < Access::kAny && it.tiling.vectors == 1 && lanes <= kWarp &&
         it.rows <= kSmallRows * (kTileThreads / lanes);
}

// Columns are divided evenly, so that no tile of a row of tiles leaves most of its threads idle. At least as many rows
// as the block has in flight at once.
Tiling cut_update(const DeviceItem& it, bool bulk, int64_t launched) {
  Tiling t{};  // what has no meaning for an op is 0: tables are compared
  t.col_tiles = static_cast<int32_t>(ceil_quotient(it.cols, kTileCols));
  const int64_t vectors = ceil_quotient(ceil_quotient(it.cols, t.col_tiles), kVector);
  t.cols = static_cast<int32_t>(vectors * kVector);
  t.lanes = power_of_two(vectors);
  const int32_t at_once = kTileThreads / t.lanes * (bulk ? kRowsInFlight : 1);
  const auto rows = bulk ? updated_rows(launched) : static_cast<int32_t>(kAnyTile / t.cols);
  t.rows = std::max(rows, at_once);
  t.row_tiles = static_cast<int32_t>(ceil_quotient(it.rows, t.rows));
  return t;
}

// Threads that share a row of so many vectors when each has some: whole warps, or lanes that a warp shares out evenly.
// Never fewer than have a row's sums.
int32_t stats_lanes(int64_t vectors, int of_thread) {
  const int64_t lanes = ceil_quotient(vectors, of_thread);
  return lanes > kWarp ? static_cast<int32_t>(ceil_quotient(lanes, kWarp) * kWarp) : std::max(8, power_of_two(lanes));
}

// Vectors of a thread that leave the fewest threads idle. Two where that does not matter: with more of them there is
// less to do for every row, and more to keep. One where a warp has the row, which adds as the step of small matrices
// does.
int32_t vectors_of_thread(int64_t vectors) {
  if (vectors <= kWarp) return 1;
  int32_t best = 0;
  int64_t most = 0;
  for (const int32_t v : {2, 3, 1}) {
    if (vectors > int64_t{v} * kTileThreads) continue;
    const int64_t at_once = vectors * (kTileThreads / stats_lanes(vectors, v)) * 60 / v;
    if (most == 0 || at_once * 20 > most * 21) {
      most = at_once;
      best = v;
    }
  }
  return best;
}

// Whole rows; tiles of whole batches, whatever the type and the layout, so that these change no bit; all of a matrix as
// large as each other.
Tiling cut_statistics(const DeviceItem& it, Access access, int32_t rows) {
  const Width width = width_of(it, access);
  Tiling t{};
  t.col_tiles = 1;
  const int64_t vectors = ceil_quotient(it.cols, kVector);
  t.cols = static_cast<int32_t>(vectors * kVector);
  int64_t batch = kWideRows;
  t.lanes = stats_threads(width);
  t.vectors = width == Width::kRows ? vectors_of_thread(vectors) : stats_vectors(width);
  if (width != Width::kWide) {
    t.lanes = stats_lanes(vectors, t.vectors);
    batch = stats_threads(width) / t.lanes * stats_rows(t.vectors, 2, false);
  }
  const int64_t near = std::max<int64_t>(1, (rows + batch / 2) / batch) * batch, tiles = ceil_quotient(it.rows, near);
  t.rows = static_cast<int32_t>(ceil_quotient(ceil_quotient(it.rows, tiles), batch) * batch);
  t.row_tiles = static_cast<int32_t>(ceil_quotient(it.rows, t.rows));
  return t;
}

bool whole(const DeviceItem& it) { return it.cols % kVector == 0 && it.signs.slice % kVector == 0; }

// A tile has partial sums for its rows and its columns, so it is nearly square; its width is the one that leaves the
// fewest threads idle.
Tiling cut_smmf(const DeviceItem& it) {
  const int64_t vectors = ceil_quotient(it.cols, kVector);
  int32_t lanes = power_of_two(vectors);
  if (lanes > kSmmfLanes) {
    lanes = kSmmfLanes;
    for (const int32_t other : {kSmmfLanes * 2, kSmmfLanes / 2}) {
      if (ceil_quotient(vectors, other) * other < ceil_quotient(vectors, lanes) * lanes) lanes = other;
    }
  }
  Tiling t{};
  t.lanes = lanes;
  t.col_tiles = static_cast<int32_t>(ceil_quotient(vectors, lanes));
  t.cols = static_cast<int32_t>(ceil_quotient(vectors, t.col_tiles) * kVector);
  const int64_t least = int64_t{kTileThreads} / lanes, most = kSmmfRows;
  t.rows = static_cast<int32_t>(std::clamp(smmf_tile(it) / (lanes * kVector), least, most));
  t.row_tiles = static_cast<int32_t>(ceil_quotient(it.rows, t.rows));
  return t;
}

}  // namespace hfac
