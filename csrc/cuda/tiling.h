// How matrices are cut into tiles, one block each: with it goes the order in which sums are added.
#pragma once

#include <vector>

#include "access.h"

namespace hfac {

// May it consist of whole vectors, by its shape?
bool whole(const DeviceItem& it);

// Does a thread of its H-Fac statistics have no more than a vector of a row? Then there are registers for rows that are
// read element by element in a launch of whole vectors.
bool in_single_vectors(const DeviceItem& it);

// Of a matrix of SMMF.
Tiling cut_smmf(const DeviceItem& it);
// Does a warp take it, which is cut and not in shards? By the matrix alone, as its sums are then added in another
// order.
bool in_one_warp(const DeviceItem& it);

// A matrix whose H-Fac statistics are taken, and how its gradient is read.
struct Matrix {
  const DeviceItem* item;
  Access access;
};
// Elements of a tile of the statistics of `matrices`, which are launched together; and a matrix in such tiles.
int64_t statistics_tile(const std::vector<Matrix>& matrices);
Tiling cut_statistics(const Matrix& matrix, int64_t tile);
// What a block of them takes, in the time of an element, of which there are as many in a full tile.
int64_t statistics_cost(const Matrix& matrix, const Tiling& tiling);

// Does a block hold the matrix, whose statistics are cut? Then one launch is its step.
bool in_one_block(const DeviceItem& it, bool bulk);

// Of H-Fac's update. `bulk`: in whole vectors.
Tiling cut_update(const DeviceItem& it, bool bulk, int64_t launched);

}  // namespace hfac
