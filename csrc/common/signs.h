// SMMF's packed sign bits: slices of the first dimension, each padded to whole bytes (hfac.signs.pack_signs).
#pragma once

#include <cstdint>

namespace hfac {

struct Signs {
  uint8_t* data;
  int64_t slice;        // elements of one slice
  int64_t slice_bytes;  // ceil(slice / 8)
};

}  // namespace hfac
