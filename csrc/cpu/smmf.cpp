// SMMF on matrices: chunks of rows whose column sums are added up in fixed order, then the columns' factors.
#include <atomic>

#include "driver.h"
#include "ops.h"
#include "watch.h"

namespace hfac {
namespace {

template <class T>
SmmfScalars<T> scalars(const SmmfOptions& o, double beta1, double beta2) {
  SmmfScalars<T> s;
  s.beta1 = static_cast<T>(beta1);
  s.rest1 = static_cast<T>(1 - beta1);
  s.beta2 = static_cast<T>(beta2);
  s.rest2 = static_cast<T>(1 - beta2);
  s.lr = static_cast<T>(o.lr);
  s.eps = static_cast<T>(o.eps);
  s.shrink = static_cast<T>(1 - o.lr * o.weight_decay);
  s.weight_decay = static_cast<T>(o.weight_decay);
  s.coupled = o.coupled;
  s.negate = o.maximize;
  return s;
}

// Two sums per column and chunk: 1.6 % of the parameter's bytes. A multiple of 8 rows keeps a chunk's sign bits in
// bytes of its own, and of kRowsAtOnce.
int64_t chunk_rows(int64_t cols, int64_t bytes) {
  const int64_t rows = bytes == 2 ? 256 : 128;
  return std::max(rows, ceil_div(ceil_div(kChunkElements, cols), 8) * 8);
}

// Rows of a block, `stride` elements apart in a tensor and one after the other in `values`.
template <class T>
void gather_rows(const TensorRef& from, const SmmfBlock& block, int64_t first, int64_t rows, T* values) {
  if (block.stride == block.cols) return gather(from, first, rows * block.cols, values);
  for (int64_t k = 0; k < rows; ++k) gather(from, first + k * block.stride, block.cols, values + k * block.cols);
}

template <class T>
void scatter_rows(const TensorRef& to, const SmmfBlock& block, int64_t first, int64_t rows, const T* values) {
  if (block.stride == block.cols) return scatter(to, first, rows * block.cols, values);
  for (int64_t k = 0; k < rows; ++k) scatter(to, first + k * block.stride, block.cols, values + k * block.cols);
}

// Do the signs of every row of a block begin and end with a byte?
inline bool whole_bytes(const SmmfItem& it, const SmmfBlock& block) {
  return block.cols % 8 == 0 && block.stride % 8 == 0 && block.first % 8 == 0 && it.signs.slice % 8 == 0;
}

// Room for what `step_rows` stages of a block, and for what is looked at before it.
template <class T>
void reserve_block(Scratch& scratch, const SmmfItem& it, const Route<T>& route, const SmmfBlock& block, bool watched) {
  reserve_rows(scratch, route, block.rows, block.cols, watched);
  if (route.stage_grad) {
    const int64_t run = std::min(kRun, block.rows * block.cols);
    scratch.reserve(Scratch::kGrad, static_cast<size_t>(run) * sizeof(T));
  }
  if (it.exp_avg_col && !whole_bytes(it, block)) {
    const int64_t rows = std::min(block.rows, staged_rows(block.cols, route.scattered));
    scratch.reserve(Scratch::kSigns, static_cast<size_t>(rows * (padded(block.cols) / 8)));
  }
}

// The step on rows [row, row + rows) of a block. `a` brings the factors from there on, of which the rows' become their
// sums, and the columns' sums; what the kernel reads of param, grad and signs is set here.
template <class T>
void step_rows(const SmmfScalars<T>& s, SmmfRows<T> a, const SmmfItem& it, const Route<T>& route,
               const SmmfBlock& block, int64_t row, int64_t rows, Scratch& scratch, Watched* watched = nullptr) {
  const bool stage_signs = a.col_m && !whole_bytes(it, block);
  const bool in_place = !route.stage_param && !route.stage_grad && !stage_signs;
  const int64_t step = in_place ? rows : std::min(rows, staged_rows(block.cols, route.scattered));
  const auto staged = [&](Scratch::Slot slot, const TensorRef& tensor, int64_t first) {
    T* values = static_cast<T*>(scratch.at(slot, static_cast<size_t>(a.rows * block.cols) * sizeof(T)));
    gather_rows(tensor, block, first, a.rows, values);
    return values;
  };
  a.cols = block.cols;
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
      a.signs = static_cast<uint8_t*>(scratch.at(Scratch::kSigns, static_cast<size_t>(a.rows * a.sign_stride)));
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
    if (route.stage_param) scatter_rows(it.param, block, first, a.rows, static_cast<const T*>(a.param));
    if (a.row_m) a.row_m += a.rows;
    a.row_v += a.rows;
  }
}

// Where a gradient may be refused it is read once before anything is written: phase 0 looks, phase 1 steps.
template <class T>
class SmmfOp : public Op {
 public:
  SmmfOp(std::vector<SmmfItem> items, const SmmfOptions& options)
      : items_(std::move(items)), options_(options), refused_(items_.size()), watch_(options.watched) {
    routes_.reserve(items_.size());
    for (const SmmfItem& item : items_) routes_.push_back(route<T>(item.param, item.grad, options.watched));
    if (watch_) watch_.expect(updates());
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).rows * item(i).cols; }
  int phases() const override { return options_.nonfinite ? 2 : 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).rows, rows_of(item(i))); }

  size_t workspace_bytes(int64_t i) const override {
    return static_cast<size_t>(chunks(i, 0) * 2 * padded(item(i).cols)) * sizeof(T);
  }

  void reserve(Scratch& scratch) const override {
    for (int64_t i = 0; i < items(); ++i) {
      reserve_block(scratch, item(i), routes_[static_cast<size_t>(i)], block(item(i)), static_cast<bool>(watch_));
    }
  }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    const SmmfItem& it = item(i);
    const Route<T>& route = routes_[static_cast<size_t>(i)];
    std::atomic<bool>& refused = refused_[static_cast<size_t>(i)];
    const int64_t first = c * rows_of(it), rows = std::min(rows_of(it), it.rows - first);
    if (phase + 1 < phases()) {
      if (nonfinite_range(route, it.grad, first * it.cols, rows * it.cols, elements(i), scratch)) refused = true;
      return;
    }
    if (refused) return;

    T* sums = static_cast<T*>(workspace) + c * 2 * padded(it.cols);
    std::fill_n(sums, 2 * padded(it.cols), T(0));
    SmmfRows<T> a{};
    a.row_m = it.exp_avg_row ? static_cast<T*>(it.exp_avg_row) + first : nullptr;
    a.row_v = static_cast<T*>(it.exp_avg_sq_row) + first;
    a.col_m = static_cast<const T*>(it.exp_avg_col);
    a.col_v = static_cast<const T*>(it.exp_avg_sq_col);
    a.sum_m = sums;
    a.sum_v = sums + padded(it.cols);
    step_rows(scalars<T>(options_, it.beta1, it.beta2), a, it, route, block(it), first, rows, scratch,
              watch_ ? &watch_.at(i, c) : nullptr);
  }

  // (SMMF, Algorithm 4) n >= m, so the columns' factors carry the normalisation; the rows' are sums as they stand.
  void finish(int64_t i, int phase, void* workspace) override {
    const SmmfItem& it = item(i);
    const bool refused = refused_[static_cast<size_t>(i)];
    if (phase + 1 < phases()) {
      options_.nonfinite[it.index] = refused;
      return;
    }
    if (refused) return;
    if (watch_) watch_.tell(i, it.index);
    T* sums = static_cast<T*>(workspace);
    if (it.exp_avg_col) factor(it, i, sums, static_cast<T*>(it.exp_avg_col));
    factor(it, i, sums + padded(it.cols), static_cast<T*>(it.exp_avg_sq_col));
  }

 private:
  const SmmfItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }
  static SmmfBlock block(const SmmfItem& it) { return {0, it.cols, 0, 1, 0, it.rows, it.cols}; }

  std::vector<int64_t> updates() const {
    std::vector<int64_t> counts;
    for (int64_t i = 0; i < items(); ++i) counts.push_back(chunks(i, 0));
    return counts;
  }

  static int64_t rows_of(const SmmfItem& it) { return chunk_rows(it.cols, bytes_of(it.param)); }

  void factor(const SmmfItem& it, int64_t i, T* sums, T* col) const {
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

  std::vector<SmmfItem> items_;
  std::vector<Route<T>> routes_;
  SmmfOptions options_;
  std::vector<std::atomic<bool>> refused_;
  Watch watch_;
};

// Parts of matrices, in blocks. Rows and columns that several blocks share are added up at the end, in the blocks'
// order.
template <class T>
class SmmfSumsOp : public Op {
 public:
  SmmfSumsOp(std::vector<SmmfSumsItem> items, const SmmfOptions& options)
      : items_(std::move(items)), options_(options) {
    routes_.reserve(items_.size());
    plans_.reserve(items_.size());
    for (const SmmfSumsItem& item : items_) {
      routes_.push_back(route<T>(item.param, item.grad));
      plans_.push_back(plan(item));
    }
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return plan_of(i).elements; }
  int phases() const override { return 1; }
  int64_t chunks(int64_t i, int) const override { return static_cast<int64_t>(plan_of(i).chunks.size()); }
  size_t workspace_bytes(int64_t i) const override { return static_cast<size_t>(plan_of(i).numbers) * sizeof(T); }

  void reserve(Scratch& scratch) const override {
    for (size_t i = 0; i < items_.size(); ++i) {
      for (const SmmfBlock& block : items_[i].blocks) reserve_block(scratch, items_[i], routes_[i], block, false);
    }
  }

  void chunk(int64_t i, int, int64_t c, void* workspace, Scratch& scratch) override {
    const SmmfSumsItem& it = items_[static_cast<size_t>(i)];
    const Plan& plan = plan_of(i);
    const Chunk& mine = plan.chunks[static_cast<size_t>(c)];
    const SmmfScalars<T> s = scalars<T>(options_, it.beta1, it.beta2);
    T *row_sums = static_cast<T*>(workspace), *col_sums = row_sums + mine.sums;
    std::fill_n(col_sums, 2 * width(mine), T(0));
    for (size_t p = mine.first; p < mine.last; ++p) {
      const Piece& piece = plan.pieces[p];
      const SmmfBlock& block = it.blocks[piece.block];
      const int64_t row = block.row + piece.row * block.row_step, col = block.col - mine.col;
      SmmfRows<T> a{};
      if (it.exp_avg_row) {
        a.row_m = row_sums + piece.sums;
        read_factors(it.exp_avg_row, row, block.row_step, piece.rows, a.row_m);
        a.col_m = static_cast<const T*>(it.exp_avg_col) + block.col;
        a.sum_m = col_sums + col;
      }
      a.row_v = row_sums + plan.rows + piece.sums;
      read_factors(it.exp_avg_sq_row, row, block.row_step, piece.rows, a.row_v);
      a.col_v = static_cast<const T*>(it.exp_avg_sq_col) + block.col;
      a.sum_v = col_sums + width(mine) + col;
      step_rows(s, a, it, routes_[static_cast<size_t>(i)], block, piece.row, piece.rows, scratch);
    }
  }

  void finish(int64_t i, int, void* workspace) override {
    const SmmfSumsItem& it = items_[static_cast<size_t>(i)];
    const T* sums = static_cast<const T*>(workspace);
    if (it.exp_avg_row) add_up(it, plan_of(i), sums, 0, it.new_row, it.new_col);
    add_up(it, plan_of(i), sums, 1, it.new_sq_row, it.new_sq_col);
  }

 private:
  // Some rows of a block; `sums` is the place of theirs in the workspace.
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
  static Plan plan(const SmmfSumsItem& it) {
    Plan plan;
    const int64_t enough = std::max(kChunkElements, 16 * it.cols);
    for (size_t b = 0; b < it.blocks.size(); ++b) {
      const SmmfBlock& block = it.blocks[b];
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
  static void add_up(const SmmfSumsItem& it, const Plan& plan, const T* sums, int64_t moment, void* new_row,
                     void* new_col) {
    for (const Piece& piece : plan.pieces) {
      const SmmfBlock& block = it.blocks[piece.block];
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

  std::vector<SmmfSumsItem> items_;
  std::vector<Route<T>> routes_;
  std::vector<Plan> plans_;
  SmmfOptions options_;
};

template <class T>
class SmmfDenseOp : public Op {
 public:
  SmmfDenseOp(std::vector<DenseItem> items, const SmmfOptions& options)
      : items_(std::move(items)), options_(options), refused_(items_.size()), watch_(options.watched) {
    std::vector<int64_t> runs;
    for (int64_t i = 0; i < this->items(); ++i) runs.push_back(chunks(i, 0));
    if (watch_) watch_.expect(runs);
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).count; }
  int phases() const override { return options_.nonfinite ? 2 : 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).count, kRun); }
  size_t workspace_bytes(int64_t) const override { return 0; }

  void reserve(Scratch& scratch) const override { reserve_runs<T>(scratch, items_, static_cast<bool>(watch_)); }

  void chunk(int64_t i, int phase, int64_t c, void*, Scratch& scratch) override {
    const DenseItem& it = item(i);
    const Route<T> to = route<T>(it.param, it.grad, options_.watched);
    std::atomic<bool>& refused = refused_[static_cast<size_t>(i)];
    const int64_t first = c * kRun, count = std::min(kRun, it.count - first);
    if (phase + 1 < phases()) {
      if (nonfinite_range(to, it.grad, first, count, it.count, scratch)) refused = true;
      return;
    }
    if (refused) return;
    const DenseRun<T> run = dense_run(to, it.param, it.grad, static_cast<T*>(it.exp_avg),
                                      static_cast<T*>(it.exp_avg_sq), first, count, scratch);
    const SmmfScalars<T> s = scalars<T>(options_, it.beta1, it.beta2);
    const T* old = watch_ ? old_weights<T>(run.param, count, scratch) : nullptr;
    to.pair->smmf_dense(s, run);
    if (watch_) {
      watch_change(it.param, old, run.param, count, watch_.at(i, c));
      watch_direction(s, run, old, watch_.at(i, c));
    }
    if (to.stage_param) scatter(it.param, first, count, static_cast<const T*>(run.param));
  }

  void finish(int64_t i, int phase, void*) override {
    const bool refused = refused_[static_cast<size_t>(i)];
    if (phase + 1 < phases()) {
      options_.nonfinite[item(i).index] = refused;
    } else if (watch_ && !refused) {
      watch_.tell(i, item(i).index);
    }
  }

 private:
  const DenseItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }

  std::vector<DenseItem> items_;
  SmmfOptions options_;
  std::vector<std::atomic<bool>> refused_;
  Watch watch_;
};

}  // namespace

size_t smmf_step(const std::vector<SmmfItem>& items, const SmmfOptions& options) {
  return run_both<SmmfOp>(items, options, options.threads);
}

size_t smmf_sums_step(const std::vector<SmmfSumsItem>& items, const SmmfOptions& options) {
  return run_both<SmmfSumsOp>(items, options, options.threads);
}

size_t smmf_dense_step(const std::vector<DenseItem>& items, const SmmfOptions& options) {
  return run_both<SmmfDenseOp>(items, options, options.threads);
}

}  // namespace hfac
