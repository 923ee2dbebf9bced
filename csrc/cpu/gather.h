// A tensor's elements as contiguous rows in the arithmetic's type, whatever its strides and storage.
#pragma once

#include "../common/tensor.h"

namespace hfac {

// Bytes of an element with its lower piece: a master weight is cut into the chunks of a float32, and has its bits.
inline int64_t bytes_of(const TensorRef& t) { return size_of(t.dtype) + (t.storage ? t.storage->low_bytes : 0); }

// Elements [first, first + count) in row-major order, converted to (and from, rounding once) the arithmetic's type.
void gather(const TensorRef& from, int64_t first, int64_t count, float* out);
void gather(const TensorRef& from, int64_t first, int64_t count, double* out);
void scatter(const TensorRef& to, int64_t first, int64_t count, const float* values);
void scatter(const TensorRef& to, int64_t first, int64_t count, const double* values);

// Bytes that lie apart.
void gather(const int8_t* from, const Strided& lie, int64_t first, int64_t count, int8_t* out);
void scatter(int8_t* to, const Strided& lie, int64_t first, int64_t count, const int8_t* values);

}  // namespace hfac
