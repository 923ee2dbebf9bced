// How matrices are cut into tiles, one block each: with it goes the order in which sums are added.
#pragma once

#include "access.h"

namespace hfac {

// May it consist of whole vectors, by its shape?
bool whole(const DeviceItem& it);

// Of a matrix of SMMF.
Tiling cut_smmf(const DeviceItem& it);

// Rows of a tile of H-Fac's statistics, of which so many elements are launched together; and the tiles of so many.
int32_t statistics_rows(int64_t launched, int64_t cols, Width width);
Tiling cut_statistics(const DeviceItem& it, Access access, int32_t rows);

// Does a block hold the matrix, whose statistics are cut? Then one launch is its step.
bool in_one_block(const DeviceItem& it, bool bulk);

// Of H-Fac's update. `bulk`: in whole vectors.
Tiling cut_update(const DeviceItem& it, bool bulk, int64_t launched);

}  // namespace hfac
