// The ops over lists, as the bindings call them. Arguments are valid: the bindings have checked what can be
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "signs.h"
#include "tensor.h"

namespace hfac {

// What is known of a matrix of which a parameter is a part [m, n]: sums of the gradient over whole rows and columns,
// the new second moments, their sum over all rows, and the mean of U^2.
struct HfacPart {
  const void *row_sum, *new_row;  // [m]
  const void *col_sum, *new_col;  // [n]
  int64_t rows, cols;             // of the whole
  double total, mean_square;
};

// States have the arithmetic's type: double for float64 parameters, else float. `index` is the place in the caller's
// list.
struct HfacItem {
  int64_t index;
  TensorRef param, grad;
  int64_t rows, cols;
  void *exp_avg_row, *exp_avg_col, *exp_avg_sq_row, *exp_avg_sq_col;
  double beta1, beta2;
  const HfacPart* part = nullptr;  // null: the matrix is whole, and summed up here
  void* kept = nullptr;            // hfac_kept_bytes of memory, where a step is made in two calls
};

// A step whole, or in two calls between which the norm of all gradients is found: the statistics alone, which are put
// into the items' `kept` and change nothing else, then what is left.
enum class HfacStage { kWhole, kStatistics, kRest };

// The sums of a gradient; the columns' are null where only rows are summed.
struct HfacSumsItem {
  TensorRef grad;
  bool wide;  // sums in double
  int64_t rows, cols;
  int64_t whole_cols;  // of the matrix that the gradient is a part of
  const void* old_row;
  void *row_sum, *new_row;                 // [rows]
  void *col_sum, *col_square, *col_ratio;  // [cols]
  double beta2;
};

struct SmmfItem {
  int64_t index;
  TensorRef param, grad;
  int64_t rows, cols;
  void *exp_avg_row, *exp_avg_col;  // null without a first moment, as are the signs
  Signs signs;
  void *exp_avg_sq_row, *exp_avg_sq_col;
  double beta1, beta2;
};

// A rectangle of a matrix: element (a, b) is element first + a * stride + b of a part, and stands in row row + a *
// row_step and column col + b (hfac.matricize.Block).
struct SmmfBlock {
  int64_t first, stride, row, row_step, col, rows, cols;
};

// A part of a matrix [rows, cols]: its factors are read, and sums over the part's blocks added to the new ones.
struct SmmfSumsItem : SmmfItem {
  std::vector<SmmfBlock> blocks;
  void *new_row, *new_col, *new_sq_row, *new_sq_col;
};

struct DenseItem {
  int64_t index;
  TensorRef param, grad;
  int64_t count;
  void *exp_avg, *exp_avg_sq;
  double beta1, beta2;
};

// A gradient whose squares are summed.
struct SquaresItem {
  int64_t index;
  TensorRef grad;
  int64_t count;
};

struct HfacOptions {
  double lr, eps, clip_threshold, weight_decay;
  bool clip, maximize;
  int32_t* nonfinite;  // one entry per list entry, or null; read by kRest, else written
  int threads;
  double* watched = nullptr;  // [list, 5], or null (watch.h)
  HfacStage stage = HfacStage::kWhole;
  double* squares = nullptr;  // [list] of kStatistics: sums of squares of the gradients
};

struct SmmfOptions {
  double lr, eps, weight_decay;
  bool coupled, maximize;
  int32_t* nonfinite;
  int threads;
  double* watched = nullptr;
};

size_t hfac_kept_bytes(int64_t rows, int64_t cols, bool wide);

// Each returns the bytes of workspace that the call held at most.
size_t hfac_step(const std::vector<HfacItem>& items, const HfacOptions& options);
size_t hfac_sums(const std::vector<HfacSumsItem>& items, double eps, int threads);
size_t hfac_dense_step(const std::vector<DenseItem>& items, const HfacOptions& options);
size_t smmf_step(const std::vector<SmmfItem>& items, const SmmfOptions& options);
size_t smmf_sums_step(const std::vector<SmmfSumsItem>& items, const SmmfOptions& options);
size_t smmf_dense_step(const std::vector<DenseItem>& items, const SmmfOptions& options);
// Writes the sums of the items, by their index.
size_t squares(const std::vector<SquaresItem>& items, double* sums, int threads);

}  // namespace hfac
