// Sums of squares of gradients, for their norms: of a whole list in one call, with nothing of a gradient's size made.
#include "driver.h"

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
class SquaresOp : public ItemsOp<T> {
  using ItemsOp<T>::item;

 public:
  using ItemsOp<T>::ItemsOp;

  int64_t chunks(int64_t i, int) const override { return ceil_div(item(i).rows, kRun); }
  size_t workspace_bytes(int64_t i) const override { return static_cast<size_t>(chunks(i, 0)) * sizeof(double); }

  void reserve(Scratch& scratch) const override {
    for (const Item& it : this->items_) {
      if (staged(it)) scratch.reserve<T>(Scratch::kGrad, std::min(kRun, it.rows));
    }
  }

  void chunk(int64_t i, int, int64_t c, void* workspace, Scratch& scratch) override {
    const Item& it = item(i);
    const int64_t first = c * kRun, count = std::min(kRun, it.rows - first);
    const void* const values = operand<T>(staged(it), it.grad, first, count, Scratch::kGrad, scratch);
    static_cast<double*>(workspace)[c] = sum_of_squares(static_cast<const T*>(values), count);
  }

  void finish(int64_t i, int, void* workspace) override {
    double total = 0;
    for (int64_t c = 0; c < chunks(i, 0); ++c) total += static_cast<const double*>(workspace)[c];
    this->options_.squares[item(i).index] = total;
  }

 private:
  static bool staged(const Item& it) {
    return it.grad.strided || size_of(it.grad.dtype) != static_cast<int64_t>(sizeof(T));
  }
};

}  // namespace

size_t squares(std::vector<Item> items, const CpuOptions& options) {
  return run_both<SquaresOp>(std::move(items), options);
}

}  // namespace hfac
