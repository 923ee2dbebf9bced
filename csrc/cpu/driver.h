// Shared by the CPU ops: choice of kernels by type, staging of operands, chunk sizes, and the base class of all ops.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <utility>

#include "gather.h"
#include "level.h"
#include "ops.h"
#include "schedule.h"
#include "watch.h"

namespace hfac {

// How one parameter's operands reach the kernels: in place, or staged as rows of the arithmetic's type T. Staging is
// exact: widening loses nothing, and the store rounds once either way. Stochastic rounding and lower pieces are always
// staged, so kernels need not handle them.
template <class T>
struct Route {
  const PairKernels<T>* pair;
  const GradKernels<T>* grad;
  bool stage_param, stage_grad;
  bool scattered;  // what is staged lies apart
};

inline const PairKernels<float>& pair_kernels(DType param, DType grad, float) {
  return kernels().pairs[static_cast<int>(param)][static_cast<int>(grad)];
}
inline const PairKernels<double>& pair_kernels(DType param, DType grad, double) {
  static const PairKernels<double> none{};
  return param == DType::kFloat64 && grad == DType::kFloat64 ? kernels().pair_double : none;
}
inline const GradKernels<float>& grad_kernels(DType grad, float) { return kernels().grads[static_cast<int>(grad)]; }
inline const GradKernels<double>& grad_kernels(DType, double) { return kernels().grad_double; }

// `staged`: whether both are staged whatever they are. Without a parameter the gradient's statistics are all that is
// wanted.
template <class T>
Route<T> route(const TensorRef& param, const TensorRef& grad, bool staged = false) {
  constexpr DType wide = std::is_same<T, double>::value ? DType::kFloat64 : DType::kFloat32;
  const bool apart = staged || param.strided || param.storage;
  bool stage_param = apart, stage_grad = staged || grad.strided;
  const PairKernels<T>* pair = nullptr;
  if (!param.data) {
    stage_param = false;
    stage_grad |= wide == DType::kFloat64 ? grad.dtype != wide : !grad_kernels(grad.dtype, T()).hfac_stats;
  } else {
    pair = &pair_kernels(stage_param ? wide : param.dtype, stage_grad ? wide : grad.dtype, T());
    if (!pair->smmf) {
      stage_param = apart || param.dtype != wide;
      stage_grad = grad.strided || grad.dtype != wide;
      pair = &pair_kernels(wide, wide, T());
    }
  }
  const bool scattered = param.strided || grad.strided || (param.storage && param.storage->low_strided);
  return {pair, &grad_kernels(stage_grad ? wide : grad.dtype, T()), stage_param, stage_grad, scattered};
}

// Elements of a contiguous tensor from `first` on.
inline void* at(const TensorRef& t, int64_t first) { return static_cast<char*>(t.data) + first * size_of(t.dtype); }

constexpr int64_t kStaged = 4096;  // elements

// Rows staged at a time: enough of them that a transposed tensor's cache lines are used whole, few where rows are long;
// of what lies together as many as the first cache holds.
inline int64_t staged_rows(int64_t cols, bool scattered) {
  const int64_t some = std::max<int64_t>(kStaged / (cols * kRowsAtOnce), 1) * kRowsAtOnce;
  return scattered ? std::max<int64_t>(cols <= 4096 ? 16 : kRowsAtOnce, some) : some;
}

// Room for as many rows of `cols` elements as are staged at a time; `old` weights are where a step is watched.
template <class T>
void reserve_rows(Scratch& scratch, const Route<T>& to, int64_t rows, int64_t cols, bool old) {
  if (rows == 0 || cols == 0) return;
  const size_t bytes = static_cast<size_t>(std::min(rows, staged_rows(cols, to.scattered)) * cols) * sizeof(T);
  if (to.stage_param) scratch.reserve(Scratch::kParam, bytes);
  if (to.stage_grad) scratch.reserve(Scratch::kGrad, bytes);
  if (old) scratch.reserve(Scratch::kOld, bytes);
}

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// A chunk holds at least this many elements, so that thin matrices are not cut into crumbs.
constexpr int64_t kChunkElements = 32768;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs of elements whose moments are whole are cut here; a function of nothing but a constant.
constexpr int64_t kRun = 16384;

// Elements [first, first + count) of both, in place or staged; without moments.
template <class T>
DenseRun<T> operands(const Route<T>& route, const TensorRef& param, const TensorRef& grad, int64_t first, int64_t count,
                     Scratch& scratch) {
  DenseRun<T> run{at(grad, first), at(param, first), nullptr, nullptr, count};
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  if (route.stage_grad) {
    T* staged = static_cast<T*>(scratch.at(Scratch::kGrad, bytes));
    gather(grad, first, count, staged);
    run.grad = staged;
  }
  if (route.stage_param) {
    T* staged = static_cast<T*>(scratch.at(Scratch::kParam, bytes));
    gather(param, first, count, staged);
    run.param = staged;
  }
  return run;
}

// Is there an element in [first, first + count) whose square times `elements`, those of the whole tensor, is not
// finite?
template <class T>
bool nonfinite_range(const Route<T>& route, const TensorRef& grad, int64_t first, int64_t count, int64_t elements,
                     Scratch& scratch) {
  if (!route.stage_grad) return route.grad->nonfinite(at(grad, first), count, static_cast<T>(elements));
  for (int64_t done = 0; done < count; done += kRun) {
    const int64_t some = std::min(kRun, count - done);
    T* staged = static_cast<T*>(scratch.at(Scratch::kGrad, static_cast<size_t>(some) * sizeof(T)));
    gather(grad, first + done, some, staged);
    if (route.grad->nonfinite(staged, some, static_cast<T>(elements))) return true;
  }
  return false;
}

template <class T>
SmmfScalars<T> smmf_scalars(const CpuOptions& o, const Item& it) {
  SmmfScalars<T> s;
  s.beta1 = static_cast<T>(it.beta1);
  s.rest1 = static_cast<T>(1 - it.beta1);
  s.beta2 = static_cast<T>(it.beta2);
  s.rest2 = static_cast<T>(1 - it.beta2);
  s.lr = static_cast<T>(o.lr);
  s.eps = static_cast<T>(o.eps);
  s.shrink = static_cast<T>(1 - o.lr * o.weight_decay);
  s.weight_decay = static_cast<T>(o.weight_decay);
  s.coupled = o.coupled;
  s.negate = o.maximize;
  return s;
}

// Base of all ops: items, their routes, and which of them are refused.
template <class T>
class ItemsOp : public Op {
 public:
  ItemsOp(std::vector<Item> items, const CpuOptions& options)
      : items_(std::move(items)), options_(options), refused_(items_.size()), watch_(options.watched) {
    routes_.reserve(items_.size());
    for (const Item& item : items_) routes_.push_back(route<T>(item.param, item.grad, options.watched));
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).rows * item(i).cols; }
  int phases() const override { return 1; }
  size_t workspace_bytes(int64_t) const override { return 0; }
  void reserve(Scratch& scratch) const override {
    for (int64_t i = 0; i < items(); ++i)
      reserve_rows(scratch, to(i), item(i).rows, item(i).cols, static_cast<bool>(watch_));
  }

 protected:
  const Item& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }
  const Route<T>& to(int64_t i) const { return routes_[static_cast<size_t>(i)]; }
  std::atomic<bool>& refused(int64_t i) { return refused_[static_cast<size_t>(i)]; }

  // For constructors: the chunks of the last phase are watched.
  void expect_watched() {
    for (int64_t i = 0; watch_ && i < items(); ++i) watch_.expect(this->chunks(i, this->phases() - 1));
  }

  std::vector<Item> items_;
  std::vector<Route<T>> routes_;
  CpuOptions options_;
  std::vector<std::atomic<bool>> refused_;
  Watch watch_;
};

// Parameters of both arithmetics may share a list: an op for each.
template <template <class> class AnOp>
size_t run_both(std::vector<Item> items, const CpuOptions& options) {
  const auto is_single = [](const Item& item) { return item.param.dtype != DType::kFloat64; };
  const auto middle = std::stable_partition(items.begin(), items.end(), is_single);
  std::vector<Item> twice(middle, items.end());
  items.erase(middle, items.end());
  AnOp<float> one(std::move(items), options);
  AnOp<double> other(std::move(twice), options);
  return run({&one, &other}, options.threads);
}

}  // namespace hfac
