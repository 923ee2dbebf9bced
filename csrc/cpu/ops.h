// The four ops over lists, as the bindings call them. Arguments are valid: the bindings have checked what can be
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "signs.h"
#include "tensor.h"

namespace hfac {

// States have the arithmetic's type: double for float64 parameters, else float. `index` is the place in the caller's
// list.
struct HfacItem {
  int64_t index;
  TensorRef param, grad;
  int64_t rows, cols;
  void *exp_avg_row, *exp_avg_col, *exp_avg_sq_row, *exp_avg_sq_col;
  double beta1, beta2;
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

struct DenseItem {
  int64_t index;
  TensorRef param, grad;
  int64_t count;
  void *exp_avg, *exp_avg_sq;
  double beta1, beta2;
};

struct HfacOptions {
  double lr, eps, clip_threshold, weight_decay;
  bool clip, maximize;
  int32_t* nonfinite;  // one entry per list entry, or null
  int threads;
};

struct SmmfOptions {
  double lr, eps, weight_decay;
  bool coupled, maximize;
  int32_t* nonfinite;
  int threads;
};

// Each returns the bytes of workspace that the call held at most.
size_t hfac_step(const std::vector<HfacItem>& items, const HfacOptions& options);
size_t hfac_dense_step(const std::vector<DenseItem>& items, const HfacOptions& options);
size_t smmf_step(const std::vector<SmmfItem>& items, const SmmfOptions& options);
size_t smmf_dense_step(const std::vector<DenseItem>& items, const SmmfOptions& options);

}  // namespace hfac
