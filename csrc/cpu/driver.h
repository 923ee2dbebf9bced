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

template <class T>
const Arithmetic<T>& arithmetic() {
  if constexpr (std::is_same<T, double>::value) {
    return kernels().of_double;
  } else {
    return kernels().of_float;
  }
}

// `staged`: whether both are staged whatever they are. Without a parameter the gradient's statistics are all that is
// wanted.
template <class T>
Route<T> route(const TensorRef& param, const TensorRef& grad, bool staged) {
  constexpr DType wide = std::is_same<T, double>::value ? DType::kFloat64 : DType::kFloat32;
  const bool param_apart = staged || param.strided || param.storage, grad_apart = staged || grad.strided;
  const bool scattered = param.strided || grad.strided || (param.storage && param.storage->low_strided);
  DType written = param_apart ? wide : param.dtype, read = grad_apart ? wide : grad.dtype;
  const auto pair = [&] { return &arithmetic<T>().pairs[static_cast<int>(written)][static_cast<int>(read)]; };
  const auto grads = [&] { return &arithmetic<T>().grads[static_cast<int>(read)]; };
  if (param.data ? !pair()->smmf : !grads()->hfac_stats) written = read = wide;
  return {pair(), grads(), param.data && (param_apart || written != param.dtype), grad_apart || read != grad.dtype,
          scattered};
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
  const int64_t count = std::min(rows, staged_rows(cols, to.scattered)) * cols;
  if (to.stage_param) scratch.reserve<T>(Scratch::kParam, count);
  if (to.stage_grad) scratch.reserve<T>(Scratch::kGrad, count);
  if (old) scratch.reserve<T>(Scratch::kOld, count);
}

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Arrays of a number per column that a loop works on beside several rows of as many elements of `size` bytes. Where
// such rows are a multiple of 4096 or of 2048 bytes long, all their lines at work fall into one set of the first cache
// or into two, and a load is taken for one that has to wait for a store 4096 bytes away: arrays there are in the rows'
// way. A thread then has them in memory of its own, where the rows never are; else they stay in their place.
template <class T>
class Columns {
 public:
  Columns(int64_t arrays, int64_t cols, int64_t size) : arrays_(arrays), length_(padded(cols)) {
    const int64_t bytes = cols * size;
    if (size == kSize && bytes % (kPage / 2) == 0) apart_ = (bytes % kPage == 0 ? kPage : kPage / 2) / 4 / kSize;
  }
  void reserve(Scratch& scratch) const {
    if (apart_ > 0) scratch.reserve<T>(Scratch::kColumns, room());
  }
  int64_t stride() const { return length_ + apart_; }
  // Where the first array lies while `rows` are worked on, if its place is at `own`; the next are `stride` further on.
  T* beside(const void* rows, T* own, Scratch& scratch) const {
    if (apart_ == 0) return own;
    T* const memory = scratch.at<T>(Scratch::kColumns, room());
    const auto from = reinterpret_cast<uintptr_t>(memory), to = reinterpret_cast<uintptr_t>(rows);
    const auto lines = (to - from + static_cast<uintptr_t>(apart_ * kSize)) % kPage / 64;
    return memory + static_cast<int64_t>(lines) * (64 / kSize);
  }
  void copy(const T* from, int64_t from_stride, T* to, int64_t to_stride) const {
    for (int64_t k = 0; from != to && k < arrays_; ++k) {
      std::copy_n(from + k * from_stride, length_, to + k * to_stride);
    }
  }

 private:
  static constexpr int64_t kPage = 4096, kSize = sizeof(T);
  int64_t room() const { return arrays_ * stride() + kPage / kSize; }

  int64_t arrays_, length_, apart_ = 0;
};

// A chunk holds at least this many elements, so that thin matrices are not cut into crumbs.
constexpr int64_t kChunkElements = 32768;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs of elements whose moments are whole are cut here; a function of nothing but a constant.
constexpr int64_t kRun = 16384;

// Elements [first, first + count) of a tensor: where they lie, or staged.
template <class T>
void* operand(bool staged, const TensorRef& tensor, int64_t first, int64_t count, Scratch::Slot slot,
              Scratch& scratch) {
  if (!staged) return at(tensor, first);
  T* values = scratch.at<T>(slot, count);
  gather(tensor, first, count, values);
  return values;
}

template <class T>
const void* gradient(const Route<T>& to, const Item& it, int64_t first, int64_t count, Scratch& scratch) {
  return operand<T>(to.stage_grad, it.grad, first, count, Scratch::kGrad, scratch);
}

// Elements [first, first + count) of both, without moments.
template <class T>
DenseRun<T> operands(const Route<T>& to, const Item& it, int64_t first, int64_t count, Scratch& scratch) {
  void* const param = operand<T>(to.stage_param, it.param, first, count, Scratch::kParam, scratch);
  return {gradient(to, it, first, count, scratch), param, nullptr, nullptr, count};
}

// Is there an element in [first, first + count) whose square times the number of elements of the whole tensor is not
// finite?
template <class T>
bool nonfinite_range(const Route<T>& to, const Item& it, int64_t first, int64_t count, Scratch& scratch) {
  const int64_t step = to.stage_grad ? kRun : count;
  for (int64_t done = 0; done < count; done += step) {
    const int64_t some = std::min(step, count - done);
    const void* const grad = gradient(to, it, first + done, some, scratch);
    if (to.grad->nonfinite(grad, some, static_cast<T>(it.rows * it.cols))) return true;
  }
  return false;
}

template <class T>
Scalars<T> scalars(const CpuOptions& o, const Item& it, T clip = T(1)) {
  Scalars<T> s;
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
  s.clip = clip;
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

  // To be called once: the chunks of the last phase are watched.
  void expect_watched() {
    for (int64_t i = 0; watch_ && i < items(); ++i) watch_.expect(this->chunks(i, this->phases() - 1));
  }

 protected:
  const Item& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }
  const Route<T>& to(int64_t i) const { return routes_[static_cast<size_t>(i)]; }
  std::atomic<bool>& refused(int64_t i) { return refused_[static_cast<size_t>(i)]; }
  // Of a chunk of the last phase, or null.
  Watched* watched(int64_t i, int64_t c) { return watch_ ? &watch_.at(i, c) : nullptr; }

  // The end of a phase of a step: tells whether the item is refused, and at last what has been watched of it. False
  // where it is refused.
  bool tell(int64_t i, int phase) {
    const bool refused = this->refused(i), last = phase + 1 == phases();
    if (!last && options_.nonfinite) options_.nonfinite[item(i).index] = refused;
    if (last && watch_ && !refused) watch_.report(i, item(i).index);
    return !refused;
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
  one.expect_watched();
  other.expect_watched();
  return run({&one, &other}, options.threads);
}

}  // namespace hfac
