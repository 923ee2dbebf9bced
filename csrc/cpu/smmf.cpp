// SMMF on matrices: chunks of rows whose column sums are added up in fixed order, then the columns' factors.
#include "driver.h"
#include "signs.h"

namespace hfac {
namespace {

// Two sums per column and chunk: 1.6 % of the parameter's bytes. A multiple of 8 rows keeps a chunk's sign bits in
// bytes of its own, and of kRowsAtOnce.
int64_t chunk_rows(int64_t cols, int64_t bytes) {
  const int64_t rows = bytes == 2 ? 256 : 128;
  return std::max(rows, ceil_div(ceil_div(kChunkElements, cols), 8) * 8);
}

// Calls move(first, count, done) for rows of a block, of which the first element is `first`: one by one, or all at once
// where they lie one after the other.
template <class Move>
void each_row(const Block& block, int64_t first, int64_t rows, const Move& move) {
  if (block.stride == block.cols) return move(first, rows * block.cols, 0);
  for (int64_t k = 0; k < rows; ++k) move(first + k * block.stride, block.cols, k * block.cols);
}

// Do the signs of every row of a block begin and end with a byte?
inline bool whole_bytes(const Item& it, const Block& block) {
  return block.cols % 8 == 0 && block.stride % 8 == 0 && block.first % 8 == 0 && it.signs.slice % 8 == 0;
}

// Room for what `step_rows` stages of a block, and for what is looked at before it.
template <class T>
void reserve_block(Scratch& scratch, const Item& it, const Route<T>& route, const Block& block, bool watched) {
  reserve_rows(scratch, route, block.rows, block.cols, watched);
  if (route.stage_grad) scratch.reserve<T>(Scratch::kGrad, std::min(kRun, block.rows * block.cols));
  if (it.first_col && !whole_bytes(it, block)) {
    const int64_t rows = std::min(block.rows, staged_rows(block.cols, route.scattered));
    scratch.reserve<uint8_t>(Scratch::kSigns, rows * (padded(block.cols) / 8));
  }
}

// The step on rows [row, row + rows) of a block. `a` brings the factors from there on, of which the rows' become their
// sums, and the columns' sums; what the kernel reads of param, grad and signs is set here.
template <class T>
void step_rows(const Scalars<T>& s, SmmfRows<T> a, const Item& it, const Route<T>& route, const Block& block,
               int64_t row, int64_t rows, Scratch& scratch, Watched* watched = nullptr) {
  const bool stage_signs = a.col_m && !whole_bytes(it, block);
  const bool in_place = !route.stage_param && !route.stage_grad && !stage_signs;
  const int64_t step = in_place ? rows : std::min(rows, staged_rows(block.cols, route.scattered));
  const auto staged = [&](Scratch::Slot slot, const TensorRef& tensor, int64_t first) {
    T* values = scratch.at<T>(slot, a.rows * block.cols);
    each_row(block, first, a.rows,
             [&](int64_t at, int64_t count, int64_t done) { gather(tensor, at, count, values + done); });
    return values;
  };
  a.cols = block.cols;
  a.ahead = fetch_ahead();
  a.grad_stride = route.stage_grad ? block.cols : block.stride;
  a.param_stride = route.stage_param ? block.cols : block.stride;
  a.sign_stride = stage_signs ? padded(block.cols) / 8 : block.stride / 8;
  for (int64_t done = 0; done < rows; done += a.rows) {
    a.rows = std::min(step, rows - done);
    const int64_t first = block.first + (row + done) * block.stride;
    a.grad = route.stage_grad ? staged(Scratch::kGrad, it.grad, first) : at(it.grad, first);
    a.param = route.stage_param ? staged(Scratch::kParam, it.param, first) : at(it.param, first);
    if (a.col_m && !stage_signs) a.signs = it.signs.data + first / 8;
    if (stage_signs) {
      a.signs = scratch.at<uint8_t>(Scratch::kSigns, a.rows * a.sign_stride);
      for (int64_t k = 0; k < a.rows; ++k)
        read_signs(it.signs, first + k * block.stride, block.cols, a.signs + k * a.sign_stride);
    }
    const T* old = nullptr;
    if (watched) {
      old = old_weights<T>(a.param, a.rows * block.cols, scratch);
      a.direction = &watched->direction;
    }
    route.pair->smmf(s, a);
    if (watched) watch_change(it.param, old, a.param, a.rows * block.cols, *watched);
    if (stage_signs) {
      for (int64_t k = 0; k < a.rows; ++k)
        write_signs(it.signs, first + k * block.stride, block.cols, a.signs + k * a.sign_stride);
    }
    if (route.stage_param) {
      each_row(block, first, a.rows, [&](int64_t at, int64_t count, int64_t done) {
        scatter(it.param, at, count, static_cast<const T*>(a.param) + done);
      });
    }
    if (a.row_m) a.row_m += a.rows;
    a.row_v += a.rows;
  }
}

// Where a gradient may be refused it is read once before anything is written: phase 0 looks, phase 1 steps.
template <class T>
class SmmfOp : public ItemsOp<T> {
  using Base = ItemsOp<T>;
  using Base::options_, Base::watch_, Base::item, Base::to;

 public:
  using Base::Base;

  int phases() const override { return options_.nonfinite ? 2 : 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).rows, rows_of(item(i))); }

  size_t workspace_bytes(int64_t i) const override {
    return static_cast<size_t>(chunks(i, 0) * 2 * padded(item(i).cols)) * sizeof(T);
  }

  void reserve(Scratch& scratch) const override {
    for (int64_t i = 0; i < this->items(); ++i) {
      reserve_block(scratch, item(i), to(i), block(item(i)), static_cast<bool>(watch_));
      columns(i).reserve(scratch);
    }
  }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    const Item& it = item(i);
    std::atomic<bool>& refused = this->refused(i);
    const int64_t first = c * rows_of(it), rows = std::min(rows_of(it), it.rows - first);
    if (phase + 1 < phases()) {
      if (nonfinite_range(to(i), it, first * it.cols, rows * it.cols, scratch)) refused = true;
      return;
    }
    if (refused) return;

    T* const own = static_cast<T*>(workspace) + c * 2 * padded(it.cols);
    const Columns<T> columns = this->columns(i);
    T* const sums = columns.beside(at(it.param, first * it.cols), own, scratch);
    std::fill_n(sums, 2 * columns.stride(), T(0));
    SmmfRows<T> a{};
    a.row_m = it.first_row ? static_cast<T*>(it.first_row) + first : nullptr;
    a.row_v = static_cast<T*>(it.second_row) + first;
    a.col_m = static_cast<const T*>(it.first_col);
    a.col_v = static_cast<const T*>(it.second_col);
    a.sum_m = sums;
    a.sum_v = sums + columns.stride();
    step_rows(scalars<T>(options_, it), a, it, to(i), block(it), first, rows, scratch, this->watched(i, c));
    columns.copy(sums, columns.stride(), own, padded(it.cols));
  }

  // (SMMF, Algorithm 4) n >= m, so the columns' factors carry the normalisation; the rows' are sums as they stand.
  void finish(int64_t i, int phase, void* workspace) override {
    if (!this->tell(i, phase) || phase + 1 < phases()) return;
    const Item& it = item(i);
    T* sums = static_cast<T*>(workspace);
    if (it.first_col) factor(it, i, sums, static_cast<T*>(it.first_col));
    factor(it, i, sums + padded(it.cols), static_cast<T*>(it.second_col));
  }

 private:
  Columns<T> columns(int64_t i) const {
    return {2, item(i).cols, to(i).stage_param ? 0 : size_of(item(i).param.dtype)};
  }
  static Block block(const Item& it) { return {0, it.cols, 0, 1, 0, it.rows, it.cols}; }
  static int64_t rows_of(const Item& it) { return chunk_rows(it.cols, bytes_of(it.param)); }

  void factor(const Item& it, int64_t i, T* sums, T* col) const {
    const int64_t m = it.cols;
    for (int64_t c = 1; c < chunks(i, 0); ++c) {
      const T* more = sums + c * 2 * padded(m);
      for (int64_t j = 0; j < m; ++j) sums[j] += more[j];
    }
    T lanes[kPad] = {};
    for (int64_t j = 0; j < padded(m); j += kPad) {
      for (int64_t l = 0; l < kPad; ++l) lanes[l] += sums[j + l];
    }
    T total = 0;
    for (const T lane : lanes) total += lane;
    const T divisor = total == T(0) ? T(1) : total;
    for (int64_t j = 0; j < m; ++j) col[j] = sums[j] / divisor;
  }
};

// Shards of matrices, in blocks. Rows and columns that several blocks share are added up at the end, in the blocks'
// order.
template <class T>
class SmmfSumsOp : public ItemsOp<T> {
  using ItemsOp<T>::item, ItemsOp<T>::to;

 public:
  SmmfSumsOp(std::vector<Item> items, const CpuOptions& options) : ItemsOp<T>(std::move(items), options) {
    plans_.reserve(this->items_.size());
    for (const Item& item : this->items_) plans_.push_back(plan(item));
  }

  int64_t elements(int64_t i) const override { return plan_of(i).elements; }
  int64_t chunks(int64_t i, int) const override { return static_cast<int64_t>(plan_of(i).chunks.size()); }
  size_t workspace_bytes(int64_t i) const override { return static_cast<size_t>(plan_of(i).numbers) * sizeof(T); }

  void reserve(Scratch& scratch) const override {
    for (int64_t i = 0; i < this->items(); ++i) {
      for (const Block& block : item(i).shard->blocks) reserve_block(scratch, item(i), to(i), block, false);
    }
  }

  void chunk(int64_t i, int, int64_t c, void* workspace, Scratch& scratch) override {
    const Item& it = item(i);
    const Plan& plan = plan_of(i);
    const Chunk& mine = plan.chunks[static_cast<size_t>(c)];
    const Scalars<T> s = scalars<T>(this->options_, it);
    T *row_sums = static_cast<T*>(workspace), *col_sums = row_sums + mine.sums;
    std::fill_n(col_sums, 2 * width(mine), T(0));
    for (size_t p = mine.first; p < mine.last; ++p) {
      const Piece& piece = plan.pieces[p];
      const Block& block = it.shard->blocks[piece.block];
      const int64_t row = block.row + piece.row * block.row_step, col = block.col - mine.col;
      SmmfRows<T> a{};
      if (it.first_row) {
        a.row_m = row_sums + piece.sums;
        read_factors(it.first_row, row, block.row_step, piece.rows, a.row_m);
        a.col_m = static_cast<const T*>(it.first_col) + block.col;
        a.sum_m = col_sums + col;
      }
      a.row_v = row_sums + plan.rows + piece.sums;
      read_factors(it.second_row, row, block.row_step, piece.rows, a.row_v);
      a.col_v = static_cast<const T*>(it.second_col) + block.col;
      a.sum_v = col_sums + width(mine) + col;
      step_rows(s, a, it, to(i), block, piece.row, piece.rows, scratch);
    }
  }

  void finish(int64_t i, int, void* workspace) override {
    const Shard& shard = *item(i).shard;
    const T* sums = static_cast<const T*>(workspace);
    if (item(i).first_row) add_up(shard, plan_of(i), sums, 0, shard.row_sum, shard.col_sum);
    add_up(shard, plan_of(i), sums, 1, shard.row_square, shard.col_square);
  }

 private:
  // Some rows of a block; `sums` is the offset of their sums in the workspace.
  struct Piece {
    size_t block;
    int64_t row, rows, sums;
  };
  // Pieces [first, last) share sums of columns [col, end), which lie at `sums` in the workspace.
  struct Chunk {
    size_t first, last;
    int64_t col, end, elements, sums;
  };
  struct Plan {
    std::vector<Piece> pieces;
    std::vector<Chunk> chunks;
    int64_t rows = 0, elements = 0, numbers = 0;
  };

  // A vector of sums may reach beyond its piece's columns, by less than kPad.
  static int64_t width(const Chunk& chunk) { return padded(chunk.end - chunk.col + kPad); }

  // Long blocks are cut like whole matrices; short ones share a chunk, so that thousands of them cost no more than
  // their elements, and the columns' sums less than those.
  static Plan plan(const Item& it) {
    Plan plan;
    const int64_t enough = std::max(kChunkElements, 16 * it.cols);
    for (size_t b = 0; b < it.shard->blocks.size(); ++b) {
      const Block& block = it.shard->blocks[b];
      const int64_t some = chunk_rows(block.cols, bytes_of(it.param));
      for (int64_t row = 0; row < block.rows; row += some) {
        const int64_t rows = std::min(some, block.rows - row), size = rows * block.cols;
        const size_t p = plan.pieces.size();
        if (plan.chunks.empty() || plan.chunks.back().elements + size > enough) {
          plan.chunks.push_back({p, p, block.col, block.col + block.cols, 0, 0});
        }
        Chunk& chunk = plan.chunks.back();
        chunk.col = std::min(chunk.col, block.col);
        chunk.end = std::max(chunk.end, block.col + block.cols);
        chunk.elements += size;
        ++chunk.last;
        plan.pieces.push_back({b, row, rows, plan.rows});
        plan.rows += rows;
        plan.elements += size;
      }
    }
    plan.numbers = 2 * plan.rows;
    for (Chunk& chunk : plan.chunks) {
      chunk.sums = plan.numbers;
      plan.numbers += 2 * width(chunk);
    }
    return plan;
  }

  static void read_factors(const void* factors, int64_t row, int64_t step, int64_t rows, T* out) {
    for (int64_t k = 0; k < rows; ++k) out[k] = static_cast<const T*>(factors)[row + k * step];
  }

  // Sums of the first moment (0) or the second (1).
  static void add_up(const Shard& shard, const Plan& plan, const T* sums, int64_t moment, void* new_row,
                     void* new_col) {
    for (const Piece& piece : plan.pieces) {
      const Block& block = shard.blocks[piece.block];
      const T* mine = sums + moment * plan.rows + piece.sums;
      T* row = static_cast<T*>(new_row) + block.row + piece.row * block.row_step;
      for (int64_t k = 0; k < piece.rows; ++k) row[k * block.row_step] += mine[k];
    }
    for (const Chunk& chunk : plan.chunks) {
      const T* mine = sums + chunk.sums + moment * width(chunk);
      T* col = static_cast<T*>(new_col) + chunk.col;
      for (int64_t j = 0; j < chunk.end - chunk.col; ++j) col[j] += mine[j];
    }
  }

  const Plan& plan_of(int64_t i) const { return plans_[static_cast<size_t>(i)]; }

  std::vector<Plan> plans_;
};

}  // namespace

size_t smmf_step(std::vector<Item> items, const CpuOptions& options) {
  return run_both<SmmfOp>(std::move(items), options);
}
size_t smmf_sums_step(std::vector<Item> items, const CpuOptions& options) {
  return run_both<SmmfSumsOp>(std::move(items), options);
}

}  // namespace hfac
