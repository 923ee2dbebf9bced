// A tensor as the drivers see it, and its elements as contiguous rows whatever its strides and storage type.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace hfac {

struct Strided {
  std::vector<int64_t> sizes, strides;  // in elements
};

// What makes a parameter's store more than one rounding to the nearest (hfac/rounding.py): a lower piece, with which a
// bfloat16 is a master weight, or random bits, or both.
struct Stored {
  void* low;                   // null: none
  int64_t low_bytes;           // 1 or 2 per element
  const Strided* low_strided;  // null: contiguous
  bool stochastic;
  DrawKey key;
  int64_t first;           // the first element's index in its whole parameter
  const Strided* strided;  // of the indices; null: they follow each other
};

struct TensorRef {
  void* data;
  DType dtype;
  const Strided* strided;          // null: contiguous
  const Stored* stored = nullptr;  // null: rounded to the nearest
};

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Of an element with its lower piece: a master weight is cut into the chunks that a float32 is, and so has its bits.
inline int64_t bytes_of(const TensorRef& t) { return size_of(t.dtype) + (t.stored ? t.stored->low_bytes : 0); }

// Elements [first, first + count) in row-major order, converted to (and from, rounding once) the arithmetic's type.
void gather(const TensorRef& from, int64_t first, int64_t count, float* out);
void gather(const TensorRef& from, int64_t first, int64_t count, double* out);
void scatter(const TensorRef& to, int64_t first, int64_t count, const float* values);
void scatter(const TensorRef& to, int64_t first, int64_t count, const double* values);

}  // namespace hfac
