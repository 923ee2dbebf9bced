// Statistics of a watched step (hfac/reference, `watched`). Kernels need not know: a watched step is staged in the
// arithmetic's type, so old and new weights are both at hand.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/math/roots.h"
#include "../common/math/rounding.h"
#include "gather.h"
#include "kernels.h"
#include "schedule.h"

namespace hfac {

constexpr int64_t kWatched = 5;

// Statistics of one chunk or parameter, in the order of `watched`.
struct Watched {
  double change = 0, unmoved = 0, direction = 0, zero_rows = 0, zero_cols = 0;
};

// Statistics by item and chunk, so that sums do not depend on the order in which threads finish. Empty where the step
// is not watched.
class Watch {
 public:
  explicit Watch(double* out) : out_(out) {}
  explicit operator bool() const { return out_; }

  void expect(int64_t chunks) { found_.emplace_back(static_cast<size_t>(chunks)); }  // of the next item
  Watched& at(int64_t item, int64_t chunk) { return found_[static_cast<size_t>(item)][static_cast<size_t>(chunk)]; }

  // Adds an item's chunks to the row of the list's entry `index`.
  void report(int64_t item, int64_t index) const {
    double* row = out_ + kWatched * index;
    for (const Watched& w : found_[static_cast<size_t>(item)]) {
      const double numbers[kWatched] = {w.change, w.unmoved, w.direction, w.zero_rows, w.zero_cols};
      for (int64_t k = 0; k < kWatched; ++k) row[k] += numbers[k];
    }
  }

 private:
  double* out_;
  std::vector<std::vector<Watched>> found_;
};

// The weights that a kernel is about to change.
template <class T>
const T* old_weights(const void* param, int64_t count, Scratch& scratch) {
  T* old = scratch.at<T>(Scratch::kOld, count);
  std::copy_n(static_cast<const T*>(param), count, old);
  return old;
}

// In lanes, which a compiler makes vectors of; short runs of them, which lose nothing in the arithmetic's type.
template <class T, class Nearest>
void watch_run(const T* old, const T* now, int64_t count, const Nearest& stored, Watched& watched) {
  constexpr int kLanes = 16;
  constexpr int64_t kShort = 64 * kLanes;
  for (int64_t first = 0; first < count; first += kShort) {
    const int64_t end = std::min(first + kShort, count);
    T sums[kLanes] = {};
    int32_t same[kLanes] = {};
    const auto add = [&](int l, int64_t at) __attribute__((always_inline)) {
      const T change = now[at] - old[at];
      sums[l] += change * change;
      same[l] += stored(now[at]) == old[at];
    };
    int64_t k = first;
    for (; k + kLanes <= end; k += kLanes) {
      for (int l = 0; l < kLanes; ++l) add(l, k + l);
    }
    for (int l = 0; k + l < end; ++l) add(l, k + l);
    for (int l = 0; l < kLanes; ++l) {
      watched.change += static_cast<double>(sums[l]);
      watched.unmoved += same[l];
    }
  }
}

inline void watch_change(const TensorRef&, const double* old, const void* now, int64_t count, Watched& watched) {
  watch_run(old, static_cast<const double*>(now), count, [](double x) { return x; }, watched);
}

// With 16 low bits a master weight is a whole float.
inline void watch_change(const TensorRef& param, const float* old, const void* fresh, int64_t count, Watched& watched) {
  const float* now = static_cast<const float*>(fresh);
  const int64_t low_bytes = param.storage ? param.storage->low_bytes : 0;
  const auto run = [&](const auto& stored) { watch_run(old, now, count, stored, watched); };
  const auto nearest = [](auto type) { return [=](float x) { return common::widen(common::narrow(x, type)); }; };
  if (low_bytes == 1) return run(common::nearest_of_24_bits);
  if (param.dtype == DType::kBFloat16 && low_bytes == 0) return run(nearest(BFloat16{}));
  if (param.dtype == DType::kFloat16) return run(nearest(Float16{}));
  run(nearest(float{}));
}

// Of the gradient.
template <class T>
void watch_rows(const T* g, int64_t rows, int64_t cols, Watched& watched) {
  const auto zero = [](T x) { return x == T(0); };
  for (int64_t k = 0; k < rows; ++k) watched.zero_rows += std::all_of(g + k * cols, g + (k + 1) * cols, zero);
}

inline double squared(double x) { return x * x; }

// H-Fac's U where both moments are whole, of the gradient and the new second moment.
template <class T>
void watch_hfac(const DenseRun<T>& run, Watched& watched) {
  const T* g = static_cast<const T*>(run.grad);
  for (int64_t k = 0; k < run.count; ++k) watched.direction += squared(g[k] / common::root(run.exp_avg_sq[k]));
}

// SMMF's M / (sqrt(V) + eps) where both moments are whole, of the new ones.
template <class T>
void watch_smmf(const Scalars<T>& s, const DenseRun<T>& run, const T* old, Watched& watched) {
  const T* grad = static_cast<const T*>(run.grad);
  for (int64_t k = 0; k < run.count; ++k) {
    const T g = s.negate ? -grad[k] : grad[k];
    const T first = run.exp_avg ? run.exp_avg[k] : s.coupled ? g + s.weight_decay * old[k] : g;
    watched.direction += squared(first / (common::root(run.exp_avg_sq[k]) + s.eps));
  }
}

}  // namespace hfac
