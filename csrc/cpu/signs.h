// SMMF's packed sign bits: slices of the first dimension, each padded to whole bytes (hfac.reference.pack_signs).
#pragma once

#include <cstdint>

namespace hfac {

struct Signs {
  uint8_t* data;
  int64_t slice;        // elements of one slice
  int64_t slice_bytes;  // ceil(slice / 8)
};

// Bits of elements [first, first + count) to and from `bits`, where they begin at bit 0 of byte 0. Neighbouring ranges
// may be written at the same time, also where they share a byte.
void read_signs(const Signs& signs, int64_t first, int64_t count, uint8_t* bits);
void write_signs(const Signs& signs, int64_t first, int64_t count, const uint8_t* bits);

}  // namespace hfac
