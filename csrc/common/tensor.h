// A tensor by address: its type and strides, and how a parameter is stored.
#pragma once

#include <cstdint>
#include <vector>

#include "math/storage.h"

namespace hfac {

struct Strided {
  std::vector<int64_t> sizes, strides;  // in elements
};

// Where an element's random bits come from: the parameter's position in the optimizer, and the element's index in its
// whole parameter, of which this may be a shard.
struct BitOffset {
  uint32_t position;
  int64_t first;           // index of the first element
  const Strided* strided;  // of the indices; null: they follow each other
};

// How a parameter is kept where that is more than rounding to the nearest (hfac/rounding.py): a lower piece, with which
// a bfloat16 is a master weight, or stochastic rounding, or both.
struct Storage {
  void* low;                   // null: none
  int64_t low_bytes;           // 1 or 2 per element, 0 without a lower piece
  const Strided* low_strided;  // null: contiguous
  bool stochastic;
  BitOffset bits;
  uint32_t step;  // with the seed and `bits`, what random bits depend on; both arrive with the launch on a GPU
  uint64_t seed;
};

struct TensorRef {
  void* data;
  DType dtype;
  const Strided* strided;            // null: contiguous
  const Storage* storage = nullptr;  // null: rounded to the nearest
};

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace hfac
