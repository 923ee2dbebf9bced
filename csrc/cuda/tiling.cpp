// Sizes of tiles, by what a block of each kernel holds and by how many blocks a GPU is to have.
#include "tiling.h"

#include <algorithm>

namespace hfac {
namespace {

constexpr int kWarp = 32;

constexpr int64_t kStatsBlocks = 128, kStatsTile = 128 << 10;  // elements
constexpr int64_t kStatsRows = 8;                              // of a thread in a batch, at most
constexpr int32_t kSmmfLanes = 64;  // of SMMF's tiles where there are so many columns: 1 KB of a row of bfloat16
constexpr int32_t kCodeRows = 32;   // of a tile of the update of codes
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
// are as many as there can be, or a few times as many; of small launches half as many, because a tile's partial sums
// cost 24 bytes per column, written and read.
int32_t statistics_rows(int64_t launched, int64_t cols, Width width) {
  const int64_t blocks = stats_threads(width) == kTileThreads ? 2 * kStatsBlocks : kStatsBlocks;
  int64_t tile = ceil_quotient(launched, blocks);
  if (tile < kStatsTile) tile = ceil_quotient(launched, kStatsBlocks);
  const int64_t most = std::max<int64_t>(256, kStatsTile / 2 / cols), rows = ceil_quotient(tile, cols);
  return static_cast<int32_t>(std::max<int64_t>(16, ceil_quotient(rows, ceil_quotient(rows, most))));
}

bool in_one_block(const DeviceItem& it, bool bulk) {
  const int lanes = it.tiling.lanes;
  return pair_access(it, bulk) < Access::kAny && lanes <= kWarp && it.rows <= kSmallRows * (kTileThreads / lanes);
}

// Columns are divided evenly, so that no tile of a row of tiles leaves most of its threads idle. At least as many rows
// as the block has in flight at once.
Tiling cut_update(const DeviceItem& it, bool bulk, bool codes, int64_t launched) {
  Tiling t;
  t.col_tiles = static_cast<int32_t>(ceil_quotient(it.cols, kTileCols));
  const int64_t vectors = ceil_quotient(ceil_quotient(it.cols, t.col_tiles), kVector);
  t.cols = static_cast<int32_t>(vectors * kVector);
  t.lanes = power_of_two(vectors);
  const int32_t at_once = kTileThreads / t.lanes * (bulk ? kRowsInFlight : 1);
  const auto rows = bulk ? (codes ? kCodeRows : updated_rows(launched)) : static_cast<int32_t>(kAnyTile / t.cols);
  t.rows = std::max(rows, at_once);
  t.row_tiles = static_cast<int32_t>(ceil_quotient(it.rows, t.rows));
  return t;
}

// Whole rows, of whole warps or of lanes that a warp shares out evenly; tiles of whole batches, whatever the type and
// the layout, so that these change no bit.
Tiling cut_statistics(const DeviceItem& it, Access access, int32_t rows) {
  const Width width = width_of(it, access);
  Tiling t;
  t.col_tiles = 1;
  const int64_t vectors = ceil_quotient(it.cols, kVector);
  t.cols = static_cast<int32_t>(vectors * kVector);
  int64_t batch = kWideRows;
  t.lanes = stats_threads(width);
  if (width != Width::kWide) {
    const int64_t lanes = ceil_quotient(vectors, stats_vectors(width));
    const int rows_of_thread = stats_rows(width, held_bytes(access));
    t.lanes = lanes > 32 ? static_cast<int32_t>(ceil_quotient(lanes, 32) * 32)
                         : std::max({8, 2 * rows_of_thread, power_of_two(lanes)});
    batch = stats_threads(width) / t.lanes * kStatsRows;
  }
  t.rows = static_cast<int32_t>(ceil_quotient(rows, batch) * batch);
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
  Tiling t;
  t.lanes = lanes;
  t.col_tiles = static_cast<int32_t>(ceil_quotient(vectors, lanes));
  t.cols = static_cast<int32_t>(ceil_quotient(vectors, t.col_tiles) * kVector);
  const int64_t least = int64_t{kTileThreads} / lanes, most = kSmmfRows;
  t.rows = static_cast<int32_t>(std::clamp(smmf_tile(it) / (lanes * kVector), least, most));
  t.row_tiles = static_cast<int32_t>(ceil_quotient(it.rows, t.rows));
  return t;
}

}  // namespace hfac
