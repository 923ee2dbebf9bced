// A call of an op on a list of parameters, as the bindings hand it to the CPU's and the GPU's code: checked, by
// address.
#pragma once

#include <cstdint>
#include <vector>

#include "common/signs.h"
#include "common/tensor.h"

namespace hfac {

enum class OpKind {
  kHfac,
  kHfacDense,
  kSmmf,
  kSmmfDense,
  kHfacSums,
  kHfacApply,
  kSmmfSums,
  kSquares,
  kHfacInt8,
  kHfacInt8Apply
};

// What all parameters of a call share, beside scalars that may be tensors.
struct Options {
  double eps = 0, clip_threshold = 1;
  bool clip = false, maximize = false;
  bool coupled = false;      // SMMF: weight decay is added to the gradient
  bool first_moment = true;  // SMMF may do without
};

// A rectangle of a matrix: element (a, b) is element first + a * stride + b of a shard, and stands in row row + a *
// row_step and column col + b of the matrix (hfac.matricize.Block).
struct Block {
  int64_t first, stride, row, row_step, col, rows, cols;
};

// The matrix of which a parameter is a shard, and this shard's sums over the matrix's rows and columns.
// H-Fac: sums of the gradient; of its squares, or the new second moments; for columns also those of g^2 / r_i.
// SMMF: sums of |M| and of V, to which a step adds.
struct Shard {
  int64_t rows, cols;
  void *row_sum, *row_square;
  void *col_sum, *col_square, *col_ratio;
  double total, mean_square;  // H-Fac on the CPU: the sum of r over all rows; the mean of U^2
  double old_total;           // where the first moment is in 8 bits, also the sum of r as it was
  std::vector<Block> blocks;  // SMMF: the shard's elements
};

// First and second moments of a matrix, factored by row and column; where they are whole, `cols` is 1 and they stand in
// the row's. Their type is the arithmetic's: double for float64 parameters, else float.
struct Moments {
  int64_t rows, cols;
  void *first_row, *first_col, *second_row, *second_col;  // null where an op has none
  void* codes;                                            // int8: the first moment where H-Fac keeps it whole in 8 bits
  Signs signs;
};

// One parameter. `param` has a type even where an op reads gradients alone.
struct Item : Moments {
  int64_t index;  // in the caller's list
  TensorRef param, grad;
  double beta1, beta2;                     // on a GPU they arrive with the launch
  const Shard* shard = nullptr;            // null: the parameter is whole
  void* kept = nullptr;                    // H-Fac on the CPU: memory for the statistics of a step in two calls
  const Strided* codes_strided = nullptr;  // null: row-major
};

}  // namespace hfac
