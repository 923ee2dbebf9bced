// What the drivers of all ops share: kernels by type, operands staged or in place, chunks by shape.
#pragma once

#include <algorithm>
#include <type_traits>

#include "level.h"
#include "ops.h"
#include "schedule.h"
#include "tensor.h"

namespace hfac {

// How one parameter's operands reach the kernels: in place, or as rows staged in the arithmetic's type T, which is
// exact: widening loses nothing, and the store rounds once either way. Where it does not round to the nearest, it
// follows the kernel, so that no kernel knows of it.
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

// `staged`: whether both are staged whatever they are.
template <class T>
Route<T> route(const TensorRef& param, const TensorRef& grad, bool staged = false) {
  constexpr DType wide = std::is_same<T, double>::value ? DType::kFloat64 : DType::kFloat32;
  const bool apart = staged || param.strided || param.stored;
  bool stage_param = apart, stage_grad = staged || grad.strided;
  const PairKernels<T>* pair = &pair_kernels(stage_param ? wide : param.dtype, stage_grad ? wide : grad.dtype, T());
  if (!pair->smmf) {
    stage_param = apart || param.dtype != wide;
    stage_grad = grad.strided || grad.dtype != wide;
    pair = &pair_kernels(wide, wide, T());
  }
  const bool scattered = param.strided || grad.strided || (param.stored && param.stored->low_strided);
  return {pair, &grad_kernels(stage_grad ? wide : grad.dtype, T()), stage_param, stage_grad, scattered};
}

// The same where there is no parameter.
template <class T>
Route<T> route(const TensorRef& grad) {
  constexpr bool wide = std::is_same<T, double>::value;
  const bool direct = wide ? grad.dtype == DType::kFloat64 : grad_kernels(grad.dtype, T()).hfac_stats != nullptr;
  const bool stage = grad.strided || !direct;
  const DType seen = !stage ? grad.dtype : wide ? DType::kFloat64 : DType::kFloat32;
  return {nullptr, &grad_kernels(seen, T()), false, stage, grad.strided != nullptr};
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

// Room for a run of one of the items.
template <class T>
void reserve_runs(Scratch& scratch, const std::vector<DenseItem>& items, bool watched) {
  for (const DenseItem& it : items) {
    reserve_rows(scratch, route<T>(it.param, it.grad, watched), 1, std::min(kRun, it.count), watched);
  }
}

template <class T>
DenseRun<T> dense_run(const Route<T>& route, const TensorRef& param, const TensorRef& grad, T* exp_avg, T* exp_avg_sq,
                      int64_t first, int64_t count, Scratch& scratch) {
  DenseRun<T> run{};
  run.count = count;
  run.exp_avg = exp_avg ? exp_avg + first : nullptr;
  run.exp_avg_sq = exp_avg_sq + first;
  run.grad = at(grad, first);
  run.param = at(param, first);
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

// Is the arithmetic that of double?
template <class Item>
bool wide(const Item& item) {
  return item.param.dtype == DType::kFloat64;
}
inline bool wide(const HfacSumsItem& item) { return item.wide; }
inline bool wide(const SquaresItem& item) { return item.grad.dtype == DType::kFloat64; }

// Parameters of both arithmetics may share a list: an op for each.
template <template <class> class AnOp, class Item, class Options>
size_t run_both(const std::vector<Item>& items, const Options& options, int threads) {
  std::vector<Item> single, twice;
  for (const Item& item : items) (wide(item) ? twice : single).push_back(item);
  AnOp<float> one(std::move(single), options);
  AnOp<double> other(std::move(twice), options);
  return run({&one, &other}, threads);
}

}  // namespace hfac
