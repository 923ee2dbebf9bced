#include "tensor.h"

#include <algorithm>

namespace hfac {
namespace {

using common::Narrow;
using common::widen;

// Calls body(offset, step, count) for runs of elements that lie `step` apart, in row-major order.
template <class Body>
void each_run(const Strided& s, int64_t first, int64_t count, const Body& body) {
  int last = static_cast<int>(s.sizes.size()) - 1;
  // Trailing dimensions that lie one after the other are one run.
  int64_t length = last < 0 ? 1 : s.sizes[static_cast<size_t>(last)];
  const int64_t step = last < 0 ? 1 : s.strides[static_cast<size_t>(last)];
  while (last > 0 && s.strides[static_cast<size_t>(last) - 1] == length * step) {
    length *= s.sizes[static_cast<size_t>(--last)];
  }
  while (count > 0) {
    const int64_t within = first % length;
    int64_t rest = first / length, offset = within * step;
    for (int d = last - 1; d >= 0; --d) {
      const auto k = static_cast<size_t>(d);
      offset += rest % s.sizes[k] * s.strides[k];
      rest /= s.sizes[k];
    }
    const int64_t run = std::min(count, length - within);
    body(offset, step, run);
    first += run;
    count -= run;
  }
}

template <class S, class T>
void gather_as(const TensorRef& from, int64_t first, int64_t count, T* out) {
  const S* data = static_cast<const S*>(from.data);
  const auto copy = [&](int64_t offset, int64_t step, int64_t run) {
    for (int64_t k = 0; k < run; ++k) out[k] = static_cast<T>(widen(data[offset + k * step]));
    out += run;
  };
  from.strided ? each_run(*from.strided, first, count, copy) : copy(first, 1, count);
}

template <class S, class T>
void scatter_as(const TensorRef& to, int64_t first, int64_t count, const T* values) {
  S* data = static_cast<S*>(to.data);
  const auto copy = [&](int64_t offset, int64_t step, int64_t run) {
    for (int64_t k = 0; k < run; ++k) data[offset + k * step] = Narrow<S>::from(values[k]);
    values += run;
  };
  to.strided ? each_run(*to.strided, first, count, copy) : copy(first, 1, count);
}

template <class T>
void gather_any(const TensorRef& from, int64_t first, int64_t count, T* out) {
  switch (from.dtype) {
    case DType::kFloat32:
      return gather_as<float>(from, first, count, out);
    case DType::kBFloat16:
      return gather_as<BFloat16>(from, first, count, out);
    case DType::kFloat16:
      return gather_as<Float16>(from, first, count, out);
    case DType::kFloat64:
      return gather_as<double>(from, first, count, out);
  }
}

}  // namespace

void gather(const TensorRef& from, int64_t first, int64_t count, float* out) { gather_any(from, first, count, out); }
void gather(const TensorRef& from, int64_t first, int64_t count, double* out) { gather_any(from, first, count, out); }

// The arithmetic's type follows the parameter's: double for float64 parameters and for nothing else.
void scatter(const TensorRef& to, int64_t first, int64_t count, const float* values) {
  switch (to.dtype) {
    case DType::kBFloat16:
      return scatter_as<BFloat16>(to, first, count, values);
    case DType::kFloat16:
      return scatter_as<Float16>(to, first, count, values);
    default:
      return scatter_as<float>(to, first, count, values);
  }
}

void scatter(const TensorRef& to, int64_t first, int64_t count, const double* values) {
  scatter_as<double>(to, first, count, values);
}

}  // namespace hfac
