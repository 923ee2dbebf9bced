// A tensor as the drivers see it, and its elements as contiguous rows whatever its strides and storage type.
#pragma once

#include <cstdint>
#include <vector>

#include "../math/storage.h"

namespace hfac {

struct Strided {
  std::vector<int64_t> sizes, strides;  // in elements
};

struct TensorRef {
  void* data;
  DType dtype;
  const Strided* strided;  // null: contiguous
};

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Elements [first, first + count) in row-major order, converted to (and from, rounding once) the arithmetic's type.
void gather(const TensorRef& from, int64_t first, int64_t count, float* out);
void gather(const TensorRef& from, int64_t first, int64_t count, double* out);
void scatter(const TensorRef& to, int64_t first, int64_t count, const float* values);
void scatter(const TensorRef& to, int64_t first, int64_t count, const double* values);

}  // namespace hfac
