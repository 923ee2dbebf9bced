// Reads and writes ranges of SMMF's packed sign bits.
#pragma once

#include "../common/signs.h"

namespace hfac {

// Bits of elements [first, first + count) to and from `bits`, where they begin at bit 0 of byte 0. Neighbouring ranges
// may be written at the same time, also where they share a byte.
void read_signs(const Signs& signs, int64_t first, int64_t count, uint8_t* bits);
void write_signs(const Signs& signs, int64_t first, int64_t count, const uint8_t* bits);

}  // namespace hfac
