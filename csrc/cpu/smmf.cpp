// SMMF on matrices: chunks of rows whose column sums are added up in fixed order, then the columns' factors.
#include <atomic>

#include "driver.h"
#include "ops.h"

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

// Where a gradient may be refused it is read once before anything is written: phase 0 looks, phase 1 steps.
template <class T>
class SmmfOp : public Op {
 public:
  SmmfOp(std::vector<SmmfItem> items, const SmmfOptions& options)
      : items_(std::move(items)), options_(options), refused_(items_.size()) {
    routes_.reserve(items_.size());
    for (const SmmfItem& item : items_) routes_.push_back(route<T>(item.param, item.grad));
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).rows * item(i).cols; }
  int phases() const override { return options_.nonfinite ? 2 : 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).rows, chunk_rows(item(i))); }

  size_t workspace_bytes(int64_t i) const override {
    return static_cast<size_t>(chunks(i, 0) * 2 * padded(item(i).cols)) * sizeof(T);
  }

  void chunk(int64_t i, int phase, int64_t c, void* workspace, Scratch& scratch) override {
    const SmmfItem& it = item(i);
    const Route<T>& route = routes_[static_cast<size_t>(i)];
    std::atomic<bool>& refused = refused_[static_cast<size_t>(i)];
    const int64_t first = c * chunk_rows(it), rows = std::min(chunk_rows(it), it.rows - first);
    if (phase + 1 < phases()) {
      if (nonfinite_range(route, it.grad, first * it.cols, rows * it.cols, elements(i), scratch)) refused = true;
      return;
    }
    if (refused) return;

    const SmmfScalars<T> s = scalars<T>(options_, it.beta1, it.beta2);
    SmmfRows<T> a{};
    T* sums = static_cast<T*>(workspace) + c * 2 * padded(it.cols);
    std::fill_n(sums, 2 * padded(it.cols), T(0));
    a.sum_m = sums;
    a.sum_v = sums + padded(it.cols);
    a.col_m = static_cast<const T*>(it.exp_avg_col);
    a.col_v = static_cast<const T*>(it.exp_avg_sq_col);
    a.cols = it.cols;
    const bool whole_bytes = it.cols % 8 == 0 && it.signs.slice % 8 == 0;
    const bool stage_signs = a.col_m && !whole_bytes;
    const bool in_place = !route.stage_param && !route.stage_grad && !stage_signs;
    const int64_t step = in_place ? rows : std::min(rows, staged_rows(it.cols));
    for (int64_t r = first; r < first + rows; r += step) {
      stage(a, it, route, r, std::min(step, first + rows - r), stage_signs, scratch);
      route.pair->smmf(s, a);
      if (stage_signs) {
        for (int64_t k = 0; k < a.rows; ++k)
          write_signs(it.signs, (r + k) * it.cols, it.cols, a.signs + k * a.sign_stride);
      }
      if (route.stage_param) scatter(it.param, r * it.cols, a.rows * it.cols, static_cast<const T*>(a.param));
    }
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
    T* sums = static_cast<T*>(workspace);
    if (it.exp_avg_col) factor(it, i, sums, static_cast<T*>(it.exp_avg_col));
    factor(it, i, sums + padded(it.cols), static_cast<T*>(it.exp_avg_sq_col));
  }

 private:
  const SmmfItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }

  // Two sums per column and chunk: 1.6 % of the parameter's bytes. A multiple of 8 rows keeps a chunk's sign bits in
  // bytes of its own, and of kRowsAtOnce.
  static int64_t chunk_rows(const SmmfItem& it) {
    const int64_t rows = size_of(it.param.dtype) == 2 ? 256 : 128;
    return std::max(rows, ceil_div(ceil_div(kChunkElements, it.cols), 8) * 8);
  }

  void stage(SmmfRows<T>& a, const SmmfItem& it, const Route<T>& route, int64_t r, int64_t rows, bool stage_signs,
             Scratch& scratch) const {
    const int64_t first = r * it.cols, count = rows * it.cols;
    a.rows = rows;
    a.grad_stride = a.param_stride = it.cols;
    a.row_m = static_cast<T*>(it.exp_avg_row) + (it.exp_avg_row ? r : 0);
    a.row_v = static_cast<T*>(it.exp_avg_sq_row) + r;
    const DenseRun<T> run =
        dense_run<T>(route, it.param, it.grad, nullptr, static_cast<T*>(it.exp_avg_sq_row), first, count, scratch);
    a.grad = run.grad;
    a.param = run.param;
    if (!a.col_m) return;
    a.sign_stride = stage_signs ? padded(it.cols) / 8 : it.cols / 8;
    a.signs = it.signs.data + first / 8;
    if (!stage_signs) return;
    a.signs = static_cast<uint8_t*>(scratch.at(Scratch::kSigns, static_cast<size_t>(rows * a.sign_stride)));
    for (int64_t k = 0; k < rows; ++k) read_signs(it.signs, first + k * it.cols, it.cols, a.signs + k * a.sign_stride);
  }

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
};

template <class T>
class SmmfDenseOp : public Op {
 public:
  SmmfDenseOp(std::vector<DenseItem> items, const SmmfOptions& options)
      : items_(std::move(items)), options_(options), refused_(items_.size()) {}

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).count; }
  int phases() const override { return options_.nonfinite ? 2 : 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).count, kRun); }
  size_t workspace_bytes(int64_t) const override { return 0; }

  void chunk(int64_t i, int phase, int64_t c, void*, Scratch& scratch) override {
    const DenseItem& it = item(i);
    const Route<T> to = route<T>(it.param, it.grad);
    std::atomic<bool>& refused = refused_[static_cast<size_t>(i)];
    const int64_t first = c * kRun, count = std::min(kRun, it.count - first);
    if (phase + 1 < phases()) {
      if (nonfinite_range(to, it.grad, first, count, it.count, scratch)) refused = true;
      return;
    }
    if (refused) return;
    const DenseRun<T> run = dense_run(to, it.param, it.grad, static_cast<T*>(it.exp_avg),
                                      static_cast<T*>(it.exp_avg_sq), first, count, scratch);
    to.pair->smmf_dense(scalars<T>(options_, it.beta1, it.beta2), run);
    if (to.stage_param) scatter(it.param, first, count, static_cast<const T*>(run.param));
  }

  void finish(int64_t i, int phase, void*) override {
    if (phase + 1 < phases()) options_.nonfinite[item(i).index] = refused_[static_cast<size_t>(i)];
  }

 private:
  const DenseItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }

  std::vector<DenseItem> items_;
  SmmfOptions options_;
  std::vector<std::atomic<bool>> refused_;
};

}  // namespace

size_t smmf_step(const std::vector<SmmfItem>& items, const SmmfOptions& options) {
  return by_arithmetic(items, [&](std::vector<SmmfItem> mine, auto zero) {
    SmmfOp<decltype(zero)> op(std::move(mine), options);
    return run(op, options.threads);
  });
}

size_t smmf_dense_step(const std::vector<DenseItem>& items, const SmmfOptions& options) {
  return by_arithmetic(items, [&](std::vector<DenseItem> mine, auto zero) {
    SmmfDenseOp<decltype(zero)> op(std::move(mine), options);
    return run(op, options.threads);
  });
}

}  // namespace hfac
