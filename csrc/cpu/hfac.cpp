// H-Fac on matrices: the sums of one read of the gradient, a fold of O(rows + columns), and the update with a second
// read. On shards of a matrix the sums are one op and the update another.
#include "../common/math/hfac.h"

#include "driver.h"

namespace hfac {
namespace {

using common::hfac_average;
using common::hfac_clip_divisor;
using common::hfac_half_drift;
using common::root;

// Three sums per column and chunk: 1.2 % of the bytes of a parameter of 1024 rows and more. With fewer rows the same
// share would leave too few chunks to divide among threads.
int64_t chunk_rows(int64_t rows, int64_t cols, int64_t bytes) {
  const int64_t some = rows < 1024 ? 64 : bytes == 2 ? 512 : 256;
  return std::max(some, ceil_div(ceil_div(kChunkElements, cols), kRowsAtOnce) * kRowsAtOnce);
}

// What one read of rows [first, first + rows) gives: sums and new second moments of these rows, and in `sums`, where it
// is not null, three per column: of g, g^2 and g^2 / r_i. True where a square times the number of elements is not
// finite.
template <class T>
bool read_rows(const Item& it, double eps, const Route<T>& to, int64_t first, int64_t rows, T* row_sum, T* row_square,
               T* sums, Scratch& scratch) {
  HfacStats<T> a{};
  a.grad_stride = a.cols = it.cols;
  if (sums) {
    a.col_sum = sums;
    a.col_square = a.col_sum + padded(it.cols);
    a.col_ratio = a.col_square + padded(it.cols);
    std::fill_n(a.col_sum, 3 * padded(it.cols), T(0));
  }
  a.beta2 = static_cast<T>(it.beta2);
  a.rest2 = static_cast<T>(1 - it.beta2);
  a.eps_sum = static_cast<T>(static_cast<double>(it.shard ? it.shard->cols : it.cols) * eps);
  a.elements = static_cast<T>(it.rows * it.cols);
  const int64_t step = to.stage_grad ? std::min(rows, staged_rows(it.cols, to.scattered)) : rows;
  for (int64_t r = first; r < first + rows; r += step) {
    a.rows = std::min(step, first + rows - r);
    a.grad = at(it.grad, r * it.cols);
    if (to.stage_grad) {
      T* staged = static_cast<T*>(scratch.at(Scratch::kGrad, static_cast<size_t>(a.rows * it.cols) * sizeof(T)));
      gather(it.grad, r * it.cols, a.rows * it.cols, staged);
      a.grad = staged;
    }
    a.row_square_old = static_cast<const T*>(it.second_row) + r;
    a.row_sum = row_sum + r;
    a.row_square = row_square + r;
    to.grad->hfac_stats(a);
  }
  return a.nonfinite;
}

// The chunks' sums, one after the other from `sums` on, added up in the first one's place.
template <class T>
void add_chunks(T* sums, int64_t chunks, int64_t cols) {
  for (int64_t c = 1; c < chunks; ++c) {
    const T* more = sums + c * 3 * padded(cols);
    for (int64_t j = 0; j < 3 * padded(cols); ++j) sums[j] += more[j];
  }
}

template <class T>
class HfacSumsOp : public ItemsOp<T> {
 public:
  using ItemsOp<T>::ItemsOp, ItemsOp<T>::item, ItemsOp<T>::to;

  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).rows, rows_of(item(i))); }
  size_t workspace_bytes(int64_t i) const override {
    return item(i).shard->col_sum ? static_cast<size_t>(chunks(i, 0) * 3 * padded(item(i).cols)) * sizeof(T) : 0;
  }

  void chunk(int64_t i, int, int64_t c, void* workspace, Scratch& scratch) override {
    const Item& it = item(i);
    const Shard& shard = *it.shard;
    const int64_t first = c * rows_of(it), rows = std::min(rows_of(it), it.rows - first);
    T* sums = shard.col_sum ? static_cast<T*>(workspace) + c * 3 * padded(it.cols) : nullptr;
    read_rows(it, this->options_.eps, to(i), first, rows, static_cast<T*>(shard.row_sum),
              static_cast<T*>(shard.row_square), sums, scratch);
  }

  void finish(int64_t i, int, void* workspace) override {
    const Item& it = item(i);
    if (!it.shard->col_sum) return;
    const T* sums = static_cast<T*>(workspace);
    add_chunks(static_cast<T*>(workspace), chunks(i, 0), it.cols);
    for (void* const to : {it.shard->col_sum, it.shard->col_square, it.shard->col_ratio}) {
      std::copy_n(sums, it.cols, static_cast<T*>(to));
      sums += padded(it.cols);
    }
  }

 private:
  static int64_t rows_of(const Item& it) { return chunk_rows(it.rows, it.cols, bytes_of(it.grad)); }
};

// Phase 0 sums and folds, or folds sums that are given (a shard's) or kept; phase 1 updates. Statistics alone are
// phase 0 without the fold.
template <class T>
class HfacOp : public ItemsOp<T> {
  using Base = ItemsOp<T>;
  using Base::options_, Base::watch_, Base::item, Base::to;

 public:
  HfacOp(std::vector<Item> items, const CpuOptions& options) : Base(std::move(items), options) {
    this->expect_watched();
    for (int64_t i = 0; rest() && options.nonfinite && i < this->items(); ++i) {
      this->refused(i) = options.nonfinite[item(i).index] != 0;
    }
  }

  int phases() const override { return options_.stage == HfacStage::kStatistics ? 1 : 2; }
  int64_t chunks(int64_t i, int phase) const override {
    const Item& it = item(i);
    if (phase == 0) return it.shard || rest() ? 1 : ceil_div(it.rows, rows_of(it));
    return this->elements(i) == 0 ? 0 : ceil_div(it.rows, update_rows(it));
  }

  size_t workspace_bytes(int64_t i) const override {
    if (rest()) return 0;
    const int64_t rows = item(i).kept ? 0 : 2 * padded(item(i).rows);
    return static_cast<size_t>(rows + chunks(i, 0) * 3 * padded(item(i).cols)) * sizeof(T);
  }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    phase == 0 ? statistics(i, c, workspace, scratch) : update(i, c, workspace, scratch);
  }

  void finish(int64_t i, int phase, void* workspace) override {
    const bool refused = this->refused(i);
    if (phase > 0) {
      if (watch_ && !refused) watch_.report(i, item(i).index);
      return;
    }
    if (options_.nonfinite && !rest()) options_.nonfinite[item(i).index] = refused;
    if (options_.stage == HfacStage::kStatistics) {
      keep(i, workspace);
    } else if (!refused) {
      item(i).shard ? fold_shard(i, workspace) : fold(i, workspace);
    }
  }

 private:
  // Two numbers per row: the gradient's sum and the new r, then half of phi and the row's scale. Three per column and
  // chunk: sums of g, g^2 and g^2 / r_i, then, in the first chunk's place, half of psi and the column's scale.
  struct Space {
    T *row_a, *row_b, *cols;
  };

  bool rest() const { return options_.stage == HfacStage::kRest; }

  // What is kept of a step in two calls has its rows there from the beginning, and its columns' sums from `keep` on.
  Space space(const Item& it, void* workspace) const {
    T* base = static_cast<T*>(it.kept ? it.kept : workspace);
    T* cols = it.kept && !rest() ? static_cast<T*>(workspace) : base + 2 * padded(it.rows);
    return {base, base + padded(it.rows), cols};
  }

  void keep(int64_t i, void* workspace) const {
    const Item& it = item(i);
    const Space at = space(it, workspace);
    add_chunks(at.cols, chunks(i, 0), it.cols);
    std::copy_n(at.cols, 3 * padded(it.cols), static_cast<T*>(it.kept) + 2 * padded(it.rows));
    const T* square = at.cols + padded(it.cols);
    double sum = 0;
    for (int64_t j = 0; j < it.cols; ++j) sum += static_cast<double>(square[j]);
    options_.squares[it.index] = sum;
  }

  static int64_t rows_of(const Item& it) { return chunk_rows(it.rows, it.cols, bytes_of(it.param)); }

  static int64_t update_rows(const Item& it) {
    return std::max<int64_t>(kRowsAtOnce, ceil_div(ceil_div(kChunkElements * 4, it.cols), kRowsAtOnce) * kRowsAtOnce);
  }

  void statistics(int64_t i, int64_t c, void* workspace, Scratch& scratch) {
    const Item& it = item(i);
    if (it.shard || rest()) return;
    const Space at = space(it, workspace);
    const int64_t first = c * rows_of(it), rows = std::min(rows_of(it), it.rows - first);
    T* cols = at.cols + c * 3 * padded(it.cols);
    const bool nonfinite = read_rows(it, options_.eps, to(i), first, rows, at.row_a, at.row_b, cols, scratch);
    if (nonfinite && options_.nonfinite) this->refused(i) = true;
  }

  void fold(int64_t i, void* workspace) {
    const Item& it = item(i);
    const Space at = space(it, workspace);
    const int64_t m = it.rows, n = it.cols;
    const T beta2 = static_cast<T>(it.beta2), rest2 = static_cast<T>(1 - it.beta2);
    const T *square = at.cols + padded(n), *ratio = square + padded(n);
    add_chunks(at.cols, chunks(i, 0), n);
    Watched* watched = watch_ ? &watch_.at(i, 0) : nullptr;
    if (watched) {
      for (int64_t j = 0; j < n; ++j) watched->zero_cols += at.cols[j] == T(0) && square[j] == T(0);
    }

    // sum of U^2 = R sum_j w_j / s_j with w_j = sum_i g_ij^2 / r_i (see docs): in double, where no partial result can
    // overflow.
    double total = 0, norm = 0;
    for (int64_t k = 0; k < m; ++k) total += static_cast<double>(at.row_b[k]);
    const T eps_sum = static_cast<T>(static_cast<double>(m) * options_.eps);
    T* s = static_cast<T*>(it.second_col);
    for (int64_t j = 0; j < n; ++j) {
      s[j] = hfac_average(beta2, s[j], rest2, square[j] + eps_sum);
      norm += static_cast<double>(ratio[j]) / static_cast<double>(s[j]);
    }
    const double mean_square = total * norm / (static_cast<double>(m) * static_cast<double>(n));
    if (watched) watched->direction = total * norm;
    step(it, at, {m, n, at.row_a, at.row_b, at.cols, s, nullptr, total, mean_square, {}});
  }

  void fold_shard(int64_t i, void* workspace) const { step(item(i), space(item(i), workspace), *item(i).shard); }

  // Every moment's step, and of each row and column what `update` reads. The sums may lie where that is written.
  void step(const Item& it, const Space& at, const Shard& known) const {
    T divisor = T(1);
    if (options_.clip) divisor = hfac_clip_divisor(root(static_cast<T>(known.mean_square)), options_.clip_threshold);

    const T* s =
        step_side(it, it.cols, known.col_sum, known.col_square, known.rows, it.first_col, it.second_col, at.cols);
    T* col_scale = at.cols + padded(it.cols);
    for (int64_t j = 0; j < it.cols; ++j) col_scale[j] = T(1) / root(s[j]);

    const T* r =
        step_side(it, it.rows, known.row_sum, known.row_square, known.cols, it.first_row, it.second_row, at.row_a);
    const T scale = root(static_cast<T>(known.total)), lr = static_cast<T>(options_.lr);
    const T step = options_.maximize ? -lr : lr;
    for (int64_t k = 0; k < it.rows; ++k) at.row_b[k] = step * (scale * (T(1) / root(r[k])) / divisor);
  }

  // The moments of one side, each entry of which stands for `length` elements, and lr times half of its drift. Returns
  // the new second moment.
  const T* step_side(const Item& it, int64_t count, const void* sums, const void* fresh, int64_t length, void* first,
                     void* second, T* half_drift) const {
    const T beta1 = static_cast<T>(it.beta1), rest1 = static_cast<T>(1 - it.beta1);
    const T sign = options_.maximize ? T(-1) : T(1), lr = static_cast<T>(options_.lr);
    const T elements = static_cast<T>(length);
    const T* sum = static_cast<const T*>(sums);
    T *average = static_cast<T*>(first), *square = static_cast<T*>(second);
    if (fresh != second) std::copy_n(static_cast<const T*>(fresh), count, square);
#pragma GCC ivdep  // what lies in one place is one entry's
    for (int64_t k = 0; k < count; ++k) {
      const T mean = sign * sum[k] / elements;
      average[k] = hfac_average(beta1, average[k], rest1, mean);
      half_drift[k] = lr * hfac_half_drift(beta1, average[k], mean, square[k], elements);
    }
    return square;
  }

  // Chunks run backwards: the end of the gradient was read last and is the likeliest to be in cache still.
  void update(int64_t i, int64_t c, void* workspace, Scratch& scratch) {
    if (this->refused(i)) return;
    const Item& it = item(i);
    const Route<T>& to = this->to(i);
    const Space space_ = space(it, workspace);
    const int64_t first = (chunks(i, 1) - 1 - c) * update_rows(it), rows = std::min(update_rows(it), it.rows - first);
    HfacUpdate<T> a{};
    a.grad_stride = a.param_stride = a.cols = it.cols;
    a.half_psi = space_.cols;
    a.col_scale = space_.cols + padded(it.cols);
    a.decay = static_cast<T>(options_.lr * options_.weight_decay);
    const int64_t step = to.stage_param || to.stage_grad ? std::min(rows, staged_rows(it.cols, to.scattered)) : rows;
    for (int64_t r = first; r < first + rows; r += step) {
      a.rows = std::min(step, first + rows - r);
      const DenseRun<T> run = operands(to, it.param, it.grad, r * it.cols, a.rows * it.cols, scratch);
      a.grad = run.grad;
      a.param = run.param;
      a.half_phi = space_.row_a + r;
      a.row_scale = space_.row_b + r;
      const T* old = watch_ ? old_weights<T>(run.param, run.count, scratch) : nullptr;
      to.pair->hfac_update(a);
      if (watch_) {
        watch_change(it.param, old, run.param, run.count, watch_.at(i, c));
        watch_rows(static_cast<const T*>(run.grad), a.rows, it.cols, watch_.at(i, c));
      }
      if (to.stage_param) scatter(it.param, r * it.cols, a.rows * it.cols, static_cast<const T*>(run.param));
    }
  }
};

}  // namespace

size_t hfac_kept_bytes(int64_t rows, int64_t cols, bool wide) {
  return static_cast<size_t>(2 * padded(rows) + 3 * padded(cols)) * (wide ? sizeof(double) : sizeof(float));
}

size_t hfac_step(std::vector<Item> items, const CpuOptions& options) {
  return run_both<HfacOp>(std::move(items), options);
}
size_t hfac_sums(std::vector<Item> items, const CpuOptions& options) {
  return run_both<HfacSumsOp>(std::move(items), options);
}

}  // namespace hfac
