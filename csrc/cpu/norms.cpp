// Sums of squares of gradients, for their norms: of a whole list in one call, with nothing of a gradient's size made.
#include "driver.h"
#include "ops.h"

namespace hfac {
namespace {

// In lanes, which a compiler makes vectors of; short runs of them, which lose nothing in the arithmetic's type. A float
// whose square is no float makes the sum infinite, as everywhere.
template <class T>
double sum_of_squares(const T* values, int64_t count) {
  constexpr int kLanes = 16;
  constexpr int64_t kShort = 32 * kLanes;
  double total = 0;
  for (int64_t first = 0; first < count; first += kShort) {
    const int64_t end = std::min(first + kShort, count);
    T lanes[kLanes] = {};
    int64_t k = first;
    for (; k + kLanes <= end; k += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += values[k + l] * values[k + l];
    }
    for (int l = 0; k + l < end; ++l) lanes[l] += values[k + l] * values[k + l];
    for (const T lane : lanes) total += static_cast<double>(lane);
  }
  return total;
}

template <class T>
class SquaresOp : public Op {
 public:
  SquaresOp(std::vector<SquaresItem> items, double* sums) : items_(std::move(items)), sums_(sums) {}

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }
  int64_t elements(int64_t i) const override { return item(i).count; }
  int phases() const override { return 1; }
  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).count, kRun); }
  size_t workspace_bytes(int64_t i) const override { return static_cast<size_t>(chunks(i, 0)) * sizeof(double); }

  void reserve(Scratch& scratch) const override {
    for (const SquaresItem& it : items_) {
      if (staged(it)) scratch.reserve(Scratch::kGrad, static_cast<size_t>(std::min(kRun, it.count)) * sizeof(T));
    }
  }

  void chunk(int64_t i, int, int64_t c, void* workspace, Scratch& scratch) override {
    const SquaresItem& it = item(i);
    const int64_t first = c * kRun, count = std::min(kRun, it.count - first);
    const T* values;
    if (staged(it)) {
      T* copy = static_cast<T*>(scratch.at(Scratch::kGrad, static_cast<size_t>(count) * sizeof(T)));
      gather(it.grad, first, count, copy);
      values = copy;
    } else {
      values = static_cast<const T*>(at(it.grad, first));
    }
    static_cast<double*>(workspace)[c] = sum_of_squares(values, count);
  }

  void finish(int64_t i, int, void* workspace) override {
    double total = 0;
    for (int64_t c = 0; c < chunks(i, 0); ++c) total += static_cast<const double*>(workspace)[c];
    sums_[item(i).index] = total;
  }

 private:
  static bool staged(const SquaresItem& it) {
    return it.grad.strided || size_of(it.grad.dtype) != static_cast<int64_t>(sizeof(T));
  }
  const SquaresItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }

  std::vector<SquaresItem> items_;
  double* sums_;
};

}  // namespace

size_t squares(const std::vector<SquaresItem>& items, double* sums, int threads) {
  return run_both<SquaresOp>(items, sums, threads);
}

}  // namespace hfac
