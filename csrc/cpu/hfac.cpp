// H-Fac on matrices: the sums of one read of the gradient, a fold of O(rows + columns), and the update with a second
// read. Of a part of a matrix the sums are an op of their own, and the rest another.
#include "../math/hfac.h"

#include <atomic>
#include <cmath>

#include "driver.h"
#include "ops.h"
#include "watch.h"

namespace hfac {
namespace {

using common::hfac_average;
using common::hfac_half_drift;
using common::root;

// max(1, rms / d), which keeps a NaN.
template <class T>
T clip_divisor(T rms, double threshold) {
  const T ratio = rms / static_cast<T>(threshold);
  return ratio <= T(1) ? T(1) : ratio;
}

// Three sums per column and chunk: 1.2 % of the bytes of a parameter of 1024 rows and more. With fewer rows the same
// share would leave too few chunks to divide among threads.
int64_t chunk_rows(int64_t rows, int64_t cols, int64_t bytes) {
  const int64_t some = rows < 1024 ? 64 : bytes == 2 ? 512 : 256;
  return std::max(some, ceil_div(ceil_div(kChunkElements, cols), kRowsAtOnce) * kRowsAtOnce);
}

// What one read of rows [first, first + rows) gives: the rows' sums, in place, and in `sums`, where it is not null,
// three per column: of g, g^2 and g^2 / r_i. True where a square times the number of elements is not finite.
template <class T>
bool read_rows(const HfacSumsItem& it, double eps, const Route<T>& to, int64_t first, int64_t rows, T* sums,
               Scratch& scratch) {
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
  a.eps_sum = static_cast<T>(static_cast<double>(it.whole_cols) * eps);
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
    a.row_square_old = static_cast<const T*>(it.old_row) + r;
    a.row_sum = static_cast<T*>(it.row_sum) + r;
    a.row_square = static_cast<T*>(it.new_row) + r;
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
class HfacSumsOp : public Op {
 public:
  HfacSumsOp(std::vector<HfacSumsItem> items, double eps) : items_(std::move(items)), eps_(eps) {
    routes_.reserve(items_.size());
    for (const HfacSumsItem& item : items_) routes_.push_back(route<T>(item.grad));
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).rows * item(i).cols; }
  int phases() const override { return 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).rows, rows_of(item(i))); }

  size_t workspace_bytes(int64_t i) const override {
    return item(i).col_sum ? static_cast<size_t>(chunks(i, 0) * 3 * padded(item(i).cols)) * sizeof(T) : 0;
  }

  void reserve(Scratch& scratch) const override {
    for (int64_t i = 0; i < items(); ++i) {
      reserve_rows(scratch, routes_[static_cast<size_t>(i)], item(i).rows, item(i).cols, false);
    }
  }

  void chunk(int64_t i, int, int64_t c, void* workspace, Scratch& scratch) override {
    const HfacSumsItem& it = item(i);
    const int64_t first = c * rows_of(it), rows = std::min(rows_of(it), it.rows - first);
    T* sums = it.col_sum ? static_cast<T*>(workspace) + c * 3 * padded(it.cols) : nullptr;
    read_rows(it, eps_, routes_[static_cast<size_t>(i)], first, rows, sums, scratch);
  }

  void finish(int64_t i, int, void* workspace) override {
    const HfacSumsItem& it = item(i);
    if (!it.col_sum) return;
    T* sums = static_cast<T*>(workspace);
    add_chunks(sums, chunks(i, 0), it.cols);
    std::copy_n(sums, it.cols, static_cast<T*>(it.col_sum));
    std::copy_n(sums + padded(it.cols), it.cols, static_cast<T*>(it.col_square));
    std::copy_n(sums + 2 * padded(it.cols), it.cols, static_cast<T*>(it.col_ratio));
  }

 private:
  const HfacSumsItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }
  static int64_t rows_of(const HfacSumsItem& it) { return chunk_rows(it.rows, it.cols, bytes_of(it.grad)); }

  std::vector<HfacSumsItem> items_;
  std::vector<Route<T>> routes_;
  double eps_;
};

// Phase 0 sums and folds, or folds sums that are given (a part's) or kept; phase 1 updates. Statistics alone are
// phase 0 without the fold.
template <class T>
class HfacOp : public Op {
 public:
  HfacOp(std::vector<HfacItem> items, const HfacOptions& options)
      : items_(std::move(items)), options_(options), refused_(items_.size()), watch_(options.watched) {
    routes_.reserve(items_.size());
    for (const HfacItem& item : items_) routes_.push_back(route<T>(item.param, item.grad, options.watched));
    if (watch_) watch_.expect(updates());
    if (!rest() || !options_.nonfinite) return;
    for (size_t i = 0; i < items_.size(); ++i) refused_[i] = options_.nonfinite[items_[i].index] != 0;
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).rows * item(i).cols; }
  int phases() const override { return options_.stage == HfacStage::kStatistics ? 1 : 2; }
  int64_t chunks(int64_t i, int phase) const override {
    const HfacItem& it = item(i);
    if (phase == 0) return it.part || rest() ? 1 : ceil_div(it.rows, rows_of(it));
    return elements(i) == 0 ? 0 : ceil_div(it.rows, update_rows(it));
  }

  size_t workspace_bytes(int64_t i) const override {
    if (rest()) return 0;
    const int64_t rows = item(i).kept ? 0 : 2 * padded(item(i).rows);
    return static_cast<size_t>(rows + chunks(i, 0) * 3 * padded(item(i).cols)) * sizeof(T);
  }

  void reserve(Scratch& scratch) const override {
    for (int64_t i = 0; i < items(); ++i) {
      reserve_rows(scratch, routes_[static_cast<size_t>(i)], item(i).rows, item(i).cols, static_cast<bool>(watch_));
    }
  }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    phase == 0 ? statistics(i, c, workspace, scratch) : update(i, c, workspace, scratch);
  }

  void finish(int64_t i, int phase, void* workspace) override {
    const bool refused = refused_[static_cast<size_t>(i)];
    if (phase > 0) {
      if (watch_ && !refused) watch_.tell(i, item(i).index);
      return;
    }
    if (options_.nonfinite && !rest()) options_.nonfinite[item(i).index] = refused;
    if (options_.stage == HfacStage::kStatistics) {
      keep(i, workspace);
    } else if (!refused) {
      item(i).part ? fold_part(i, workspace) : fold(i, workspace);
    }
  }

 private:
  // Two numbers per row: the gradient's sum and the new r, then half of phi and the row's scale. Three per column and
  // chunk: sums of g, g^2 and g^2 / r_i, then, in the first chunk's place, half of psi and the column's scale.
  struct Space {
    T *row_a, *row_b, *cols;
  };

  const HfacItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }

  std::vector<int64_t> updates() const {
    std::vector<int64_t> counts;
    for (int64_t i = 0; i < items(); ++i) counts.push_back(chunks(i, 1));
    return counts;
  }

  bool rest() const { return options_.stage == HfacStage::kRest; }

  // What is kept of a step in two calls has its rows there from the beginning, and its columns' sums from `keep` on.
  Space space(const HfacItem& it, void* workspace) const {
    T* base = static_cast<T*>(it.kept ? it.kept : workspace);
    T* cols = it.kept && !rest() ? static_cast<T*>(workspace) : base + 2 * padded(it.rows);
    return {base, base + padded(it.rows), cols};
  }

  void keep(int64_t i, void* workspace) const {
    const HfacItem& it = item(i);
    const Space at = space(it, workspace);
    add_chunks(at.cols, chunks(i, 0), it.cols);
    std::copy_n(at.cols, 3 * padded(it.cols), static_cast<T*>(it.kept) + 2 * padded(it.rows));
    const T* square = at.cols + padded(it.cols);
    double sum = 0;
    for (int64_t j = 0; j < it.cols; ++j) sum += static_cast<double>(square[j]);
    options_.squares[it.index] = sum;
  }

  static int64_t rows_of(const HfacItem& it) { return chunk_rows(it.rows, it.cols, bytes_of(it.param)); }

  static int64_t update_rows(const HfacItem& it) {
    return std::max<int64_t>(kRowsAtOnce, ceil_div(ceil_div(kChunkElements * 4, it.cols), kRowsAtOnce) * kRowsAtOnce);
  }

  void statistics(int64_t i, int64_t c, void* workspace, Scratch& scratch) {
    const HfacItem& it = item(i);
    if (it.part || rest()) return;
    const Space at = space(it, workspace);
    const int64_t first = c * rows_of(it), rows = std::min(rows_of(it), it.rows - first);
    const HfacSumsItem sums{it.grad,  wide(it), it.rows, it.cols, it.cols, it.exp_avg_sq_row,
                            at.row_a, at.row_b, nullptr, nullptr, nullptr, it.beta2};
    T* cols = at.cols + c * 3 * padded(it.cols);
    const bool nonfinite = read_rows(sums, options_.eps, routes_[static_cast<size_t>(i)], first, rows, cols, scratch);
    if (nonfinite && options_.nonfinite) refused_[static_cast<size_t>(i)] = true;
  }

  void fold(int64_t i, void* workspace) {
    const HfacItem& it = item(i);
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
    T* s = static_cast<T*>(it.exp_avg_sq_col);
    for (int64_t j = 0; j < n; ++j) {
      s[j] = hfac_average(beta2, s[j], rest2, square[j] + eps_sum);
      norm += static_cast<double>(ratio[j]) / static_cast<double>(s[j]);
    }
    const double mean_square = total * norm / (static_cast<double>(m) * static_cast<double>(n));
    if (watched) watched->direction = total * norm;
    step(it, at, {at.row_a, at.row_b, at.cols, s, m, n, total, mean_square});
  }

  void fold_part(int64_t i, void* workspace) const { step(item(i), space(item(i), workspace), *item(i).part); }

  // Every moment's step, and of each row and column what `update` reads. The sums may lie where that is written.
  void step(const HfacItem& it, const Space& at, const HfacPart& known) const {
    T divisor = T(1);
    if (options_.clip) divisor = clip_divisor(root(static_cast<T>(known.mean_square)), options_.clip_threshold);

    const T* s =
        step_side(it, it.cols, known.col_sum, known.new_col, known.rows, it.exp_avg_col, it.exp_avg_sq_col, at.cols);
    T* col_scale = at.cols + padded(it.cols);
    for (int64_t j = 0; j < it.cols; ++j) col_scale[j] = T(1) / root(s[j]);

    const T* r =
        step_side(it, it.rows, known.row_sum, known.new_row, known.cols, it.exp_avg_row, it.exp_avg_sq_row, at.row_a);
    const T scale = root(static_cast<T>(known.total)), lr = static_cast<T>(options_.lr);
    const T step = options_.maximize ? -lr : lr;
    for (int64_t k = 0; k < it.rows; ++k) at.row_b[k] = step * (scale * (T(1) / root(r[k])) / divisor);
  }

  // The moments of one side, each entry of which stands for `length` elements, and lr times half of its drift. Returns
  // the new second moment.
  const T* step_side(const HfacItem& it, int64_t count, const void* sums, const void* fresh, int64_t length,
                     void* first, void* second, T* half_drift) const {
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
    if (refused_[static_cast<size_t>(i)]) return;
    const HfacItem& it = item(i);
    const Route<T>& to = routes_[static_cast<size_t>(i)];
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
      const DenseRun<T> run =
          dense_run<T>(to, it.param, it.grad, nullptr, space_.row_a, r * it.cols, a.rows * it.cols, scratch);
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

  std::vector<HfacItem> items_;
  std::vector<Route<T>> routes_;
  HfacOptions options_;
  std::vector<std::atomic<bool>> refused_;
  Watch watch_;
};

// Both moments whole. Phase 0 looks for what is not finite and sums U^2, phase 1 steps; without either there is one
// phase.
template <class T>
class HfacDenseOp : public Op {
 public:
  HfacDenseOp(std::vector<DenseItem> items, const HfacOptions& options)
      : items_(std::move(items)),
        options_(options),
        refused_(items_.size()),
        clips_(items_.size(), T(1)),
        watch_(options.watched) {
    std::vector<int64_t> runs;
    for (int64_t i = 0; i < this->items(); ++i) runs.push_back(chunks(i, 0));
    if (watch_) watch_.expect(runs);
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).count; }
  int phases() const override { return options_.nonfinite || options_.clip ? 2 : 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).count, kRun); }
  size_t workspace_bytes(int64_t i) const override { return static_cast<size_t>(chunks(i, 0)) * sizeof(T); }

  void reserve(Scratch& scratch) const override { reserve_runs<T>(scratch, items_, static_cast<bool>(watch_)); }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    const DenseItem& it = item(i);
    const Route<T> to = route<T>(it.param, it.grad, options_.watched);
    std::atomic<bool>& refused = refused_[static_cast<size_t>(i)];
    const int64_t first = c * kRun, count = std::min(kRun, it.count - first);
    if (refused) return;
    const bool look = phase + 1 < phases();
    if (look && options_.nonfinite && nonfinite_range(to, it.grad, first, count, it.count, scratch)) {
      refused = true;
      return;
    }
    if (look && !options_.clip) return;
    const DenseRun<T> run = dense_run(to, it.param, it.grad, static_cast<T*>(it.exp_avg),
                                      static_cast<T*>(it.exp_avg_sq), first, count, scratch);
    const HfacDenseScalars<T> s = scalars(it, clips_[static_cast<size_t>(i)]);
    if (look) {
      static_cast<T*>(workspace)[c] = to.pair->hfac_dense_norm(s, run);
      return;
    }
    const T* old = watch_ ? old_weights<T>(run.param, count, scratch) : nullptr;
    to.pair->hfac_dense(s, run);
    if (watch_) {
      watch_change(it.param, old, run.param, count, watch_.at(i, c));
      watch_direction(s, run, old, watch_.at(i, c));
    }
    if (to.stage_param) scatter(it.param, first, count, static_cast<const T*>(run.param));
  }

  void finish(int64_t i, int phase, void* workspace) override {
    const bool refused = refused_[static_cast<size_t>(i)];
    if (phase + 1 == phases()) {
      if (watch_ && !refused) watch_.tell(i, item(i).index);
      return;
    }
    if (options_.nonfinite) options_.nonfinite[item(i).index] = refused;
    if (refused || !options_.clip) return;
    T total = 0;
    for (int64_t c = 0; c < chunks(i, 0); ++c) total += static_cast<const T*>(workspace)[c];
    const T rms = root(total / static_cast<T>(item(i).count));
    clips_[static_cast<size_t>(i)] = T(1) / clip_divisor(rms, options_.clip_threshold);
  }

 private:
  const DenseItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }

  HfacDenseScalars<T> scalars(const DenseItem& it, T clip) const {
    HfacDenseScalars<T> s;
    s.beta1 = static_cast<T>(it.beta1);
    s.rest1 = static_cast<T>(1 - it.beta1);
    s.beta2 = static_cast<T>(it.beta2);
    s.rest2 = static_cast<T>(1 - it.beta2);
    s.eps = static_cast<T>(options_.eps);
    s.lr = static_cast<T>(options_.lr);
    s.weight_decay = static_cast<T>(options_.weight_decay);
    s.clip = clip;
    s.negate = options_.maximize;
    return s;
  }

  std::vector<DenseItem> items_;
  HfacOptions options_;
  std::vector<std::atomic<bool>> refused_;
  std::vector<T> clips_;
  Watch watch_;
};

}  // namespace

size_t hfac_kept_bytes(int64_t rows, int64_t cols, bool wide) {
  return static_cast<size_t>(2 * padded(rows) + 3 * padded(cols)) * (wide ? sizeof(double) : sizeof(float));
}

size_t hfac_step(const std::vector<HfacItem>& items, const HfacOptions& options) {
  return run_both<HfacOp>(items, options, options.threads);
}

size_t hfac_sums(const std::vector<HfacSumsItem>& items, double eps, int threads) {
  return run_both<HfacSumsOp>(items, eps, threads);
}

size_t hfac_dense_step(const std::vector<DenseItem>& items, const HfacOptions& options) {
  return run_both<HfacDenseOp>(items, options, options.threads);
}

}  // namespace hfac
