// Sizes of tiles, by what a block of each kernel holds and by how many blocks a GPU is to have.
#include "tiling.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>

namespace hfac {
namespace {

constexpr int kWarp = 32;

constexpr int64_t kMultiprocessors = 132;  // of an H100 and an H200; others have 108 to 148
// Rows of a tile of H-Fac's statistics: at least; at most of those that a thread adds up.
constexpr int64_t kStatsLeast = 16, kStatsMost = 256;
constexpr int64_t kAnyFactor = 5;     // how much longer statistics take where elements are read one by one
constexpr int32_t kSmmfLanes = 64;    // of SMMF's tiles where there are so many columns: 1 KB of a row of bfloat16
constexpr int64_t kAnyTile = 2048;    // elements of tiles that go one by one, which takes ten times as long
constexpr int64_t kAnyUpdate = 1024;  // the same of H-Fac's update
constexpr int32_t kUpdateMost = kRowsInFlight * kTileThreads;  // rows of its tiles, which lie in shared memory
constexpr int64_t kLeastLanes = 8;  // of its tiles, where a row is cut: 128 bytes of bfloat16

int32_t power_of_two(int64_t at_least) {
  int32_t p = 1;
  while (p < at_least) p *= 2;
  return p;
}

// The update has no partial sums, so it takes few rows, by the elements that are launched together: 16 M make 256
// blocks of 32 rows. With more blocks than that, rows read their columns' factors less often.
int32_t updated_rows(int64_t launched) { return launched < (8 << 20) ? 16 : launched < (32 << 20) ? 32 : 64; }

// Elements of SMMF's tiles: two blocks for each multiprocessor where a matrix has 16 M elements, and fewer partial sums
// where it has more; smaller tiles of small ones, which are launched last and fill what the others leave. By the matrix
// alone, so that it steps to the same bits in any list and in gradient release.
int64_t smmf_tile(const DeviceItem& it) {
  if (!whole(it)) return kAnyTile;
  const int64_t elements = it.rows * it.cols;
  return elements < (1 << 20) ? 32 << 10 : elements < (32 << 20) ? 64 << 10 : 128 << 10;
}

}  // namespace

bool in_one_block(const DeviceItem& it, bool bulk) {
  const int lanes = it.tiling.lanes;
  return pair_access(it, bulk) < Access::kAny && it.tiling.vectors == 1 && lanes <= kWarp &&
         it.rows <= kSmallRows * (kTileThreads / lanes);
}

// Into how many tiles the update cuts rows of so many vectors: the widest that leave the fewest threads idle, or nearly
// so. Narrower ones make up for it by more rows.
int64_t update_tiles(int64_t vectors) {
  int64_t best = 1, most = 0;  // vectors of 1024 threads
  for (int64_t lanes = kTileThreads; lanes >= kLeastLanes; lanes /= 2) {
    const int64_t tiles = ceil_quotient(vectors, lanes);
    const int64_t busy = 1024 * vectors / (tiles * power_of_two(ceil_quotient(vectors, tiles)));
    if (16 * busy <= 17 * most) continue;
    most = busy;
    best = tiles;
  }
  return best;
}

// Columns are divided evenly. At least as many rows as the block has in flight at once; where rows are cut although a
// block could hold them, as many elements as if they were not.
Tiling cut_update(const DeviceItem& it, bool bulk, int64_t launched) {
  Tiling t{};  // what has no meaning for an op is 0: tables are compared
  const int64_t whole_row = ceil_quotient(it.cols, kVector), least = ceil_quotient(it.cols, kTileCols);
  t.col_tiles = static_cast<int32_t>(bulk ? update_tiles(whole_row) : least);
  const int64_t vectors = ceil_quotient(ceil_quotient(it.cols, t.col_tiles), kVector);
  t.cols = static_cast<int32_t>(vectors * kVector);
  t.lanes = power_of_two(vectors);
  const int32_t at_once = kTileThreads / t.lanes * (bulk ? kRowsInFlight : 1);
  const int32_t wide = power_of_two(ceil_quotient(whole_row, least));
  const auto rows = bulk ? std::min(updated_rows(launched) * (wide / t.lanes), kUpdateMost)
                         : static_cast<int32_t>(kAnyUpdate / t.cols);
  const int64_t tiles = ceil_quotient(it.rows, std::max(rows, at_once));
  t.rows = static_cast<int32_t>(ceil_quotient(ceil_quotient(it.rows, tiles), at_once) * at_once);
  t.row_tiles = static_cast<int32_t>(ceil_quotient(it.rows, t.rows));
  return t;
}

// Threads that share a row of so many vectors when each has some: whole warps, or lanes that a warp shares out evenly.
// Never fewer than have the sums of a batch's rows, of which there are two where a thread has three vectors.
int32_t stats_lanes(int64_t vectors, int of_thread) {
  const int64_t lanes = ceil_quotient(vectors, of_thread);
  return lanes > kWarp ? static_cast<int32_t>(ceil_quotient(lanes, kWarp) * kWarp)
                       : std::max(of_thread == 3 ? 4 : 8, power_of_two(lanes));
}

// Vectors of a thread that leave the fewest threads idle. Two where that does not matter: with more of them there is
// less to do for every row, and more to keep. Where a warp has the row one, as in the step of small matrices, whose
// bits do not depend on the launches that serve; three where that would leave a quarter of the lanes idle, of matrices
// that are not small, and of whole vectors, since others may be read one by one (`in_single_vectors`).
int32_t vectors_of_thread(const DeviceItem& it) {
  const int64_t vectors = ceil_quotient(it.cols, kVector);
  if (vectors <= kWarp) {
    const int32_t lanes = stats_lanes(vectors, 1);
    const bool idle = lanes > 8 && 4 * vectors <= 3 * lanes, small = it.rows <= kSmallRows * (kTileThreads / lanes);
    return idle && !small && whole(it) ? 3 : 1;
  }
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

// As how many elements of a matrix that keeps all threads busy `elements` of another count. A multiprocessor with idle
// warps hides less of what the others wait for.
int64_t elements_of(int64_t elements, const Matrix& matrix, const Tiling& t) {
  const int64_t threads = stats_threads(width_of(*matrix.item, matrix.access)), busy = threads / t.lanes * t.lanes;
  const int64_t of_busy = busy == threads ? elements : elements * threads * 9 / (busy * 8);
  return of_busy * (whole(*matrix.item) ? 1 : kAnyFactor);
}

// Whole rows; tiles of whole batches, whatever the type and the layout, so that these change no bit; all of a matrix as
// large as each other. Where threads are idle, fewer elements take as long. Of rows that are read one by one as few as
// the block's threads share: they take long.
Tiling cut_statistics(const Matrix& matrix, int64_t tile) {
  const DeviceItem& it = *matrix.item;
  const Width width = width_of(it, matrix.access);
  Tiling t{};
  t.col_tiles = 1;
  const int64_t vectors = ceil_quotient(it.cols, kVector);
  t.cols = static_cast<int32_t>(vectors * kVector);
  int64_t batch = kWideRows, at_once = 1;
  t.lanes = stats_threads(width);
  t.vectors = width == Width::kRows ? vectors_of_thread(it) : stats_vectors(width);
  if (width == Width::kLong && vectors <= int64_t{kLongVectors} * stats_threads(width)) t.vectors = kLongVectors;
  if (width != Width::kWide) {
    t.lanes = stats_lanes(vectors, t.vectors);
    at_once = stats_threads(width) / t.lanes;
    batch = at_once * (whole(it) ? stats_rows(t.vectors, 2) : 1);
  }
  t.part_of_lane = static_cast<int32_t>(ceil_quotient(int64_t{1} << kPartBits, t.lanes));
  const int64_t elements = tile * 1024 / elements_of(1024, matrix, t);
  const int64_t rows = std::clamp(ceil_quotient(elements, it.cols), kStatsLeast, kStatsMost * at_once);
  const int64_t near = std::max<int64_t>(1, (rows + batch / 2) / batch) * batch, tiles = ceil_quotient(it.rows, near);
  t.rows = static_cast<int32_t>(ceil_quotient(ceil_quotient(it.rows, tiles), batch) * batch);
  t.row_tiles = static_cast<int32_t>(ceil_quotient(it.rows, t.rows));
  return t;
}

// One of 256 threads, of which a multiprocessor holds two, or half a block that it holds alone. Beginning and ending
// take 20 K elements and what a column's sums take, by the model of bench/launch_plan.py.
int64_t statistics_cost(const Matrix& matrix, const Tiling& t) {
  const int64_t elements = elements_of(std::min<int64_t>(t.rows, matrix.item->rows) * t.cols, matrix, t);
  return (elements + 12 * t.cols) / (stats_in_pairs(width_of(*matrix.item, matrix.access)) ? 1 : 2) + (20 << 10);
}

namespace {

// What the statistics in such tiles take, from the first block to the last, with what the fold takes for their partial
// sums: 24 bytes for a column and tile, written and read. The largest are launched first. `blocks` counts.
int64_t statistics_time(const std::vector<Matrix>& matrices, int64_t tile, size_t& blocks) {
  std::vector<std::pair<int64_t, int64_t>> found;  // what a block takes, and how many
  int64_t sums = 0;
  blocks = 0;
  for (const Matrix& matrix : matrices) {
    const Tiling t = cut_statistics(matrix, tile);
    found.emplace_back(statistics_cost(matrix, t), t.row_tiles);
    blocks += static_cast<size_t>(t.row_tiles);
    sums += int64_t{t.row_tiles} * t.cols;
  }
  std::sort(found.rbegin(), found.rend());
  const bool pairs = stats_in_pairs(width_of(*matrices[0].item, matrices[0].access));
  // A block that is alone on its multiprocessor takes 5/8 of the time.
  const int64_t slots = pairs && blocks > kMultiprocessors ? 2 * kMultiprocessors : kMultiprocessors;
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> free(
      std::greater<>(), std::vector<int64_t>(static_cast<size_t>(slots)));
  int64_t end = 0;
  for (const auto& [cost, count] : found) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = free.top() + cost;
      free.pop();
      free.push(at);
      end = std::max(end, at);
    }
  }
  return (pairs && slots == kMultiprocessors ? end * 5 / 8 : end) + sums / 24;
}

}  // namespace

// Tried are sizes from four blocks on every multiprocessor to less than one: blocks are few, so that their sizes decide
// how many multiprocessors are idle at the end, and small ones cost more than they gain.
int64_t statistics_tile(const std::vector<Matrix>& matrices) {
  int64_t launched = 0, best = 0, least = 0;
  for (const Matrix& matrix : matrices) launched += matrix.item->rows * matrix.item->cols;
  const int64_t most = ceil_quotient(launched, kMultiprocessors * 3 / 4);
  for (int64_t tile = ceil_quotient(launched, 8 * kMultiprocessors); tile <= most; tile += tile / 32 + 1) {
    size_t blocks = 0;
    const int64_t time = statistics_time(matrices, tile, blocks);
    if (best == 0 || time < least) {
      least = time;
      best = tile;
    }
    if (blocks == matrices.size()) break;  // and none is cut in larger tiles
  }
  return best;
}

bool in_single_vectors(const DeviceItem& it) { return vectors_of_thread(it) == 1; }

bool whole(const DeviceItem& it) { return it.cols % kVector == 0 && it.signs.slice % kVector == 0; }

bool in_one_warp(const DeviceItem& it) {
  return whole(it) && it.tiling.lanes <= kWarp && it.rows <= kSmmfWarpRows && it.rows * it.cols <= kSmmfWarpElements;
}

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
