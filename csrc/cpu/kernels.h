// The contract between the drivers, compiled once for any processor, and the kernels, compiled once per instruction
// set.
//
// Kernels see rows of contiguous elements and nothing of lists, threads or strides. Only plain structs stand here: a
// function in a header shared by all levels could be merged by the linker across them.
#pragma once

#include <cstdint>

#include "../common/math/storage.h"

namespace hfac {

// Partial column sums are written in whole vectors: their rows are padded to this many elements (64 bytes of float).
constexpr int64_t kPad = 16;

// Rows that share one read of the column factors. A chunk that is handed over in pieces (staged rows) must be cut at
// multiples of it, for the order of the column sums hangs on it.
constexpr int64_t kRowsAtOnce = 4;

// Lines of the next rows are asked for, into the second cache, and none further along the rows (fetch_ahead).
constexpr int64_t kNextRows = 0;

// Numbers of a step.
template <class T>
struct Scalars {
  T beta1, rest1;  // rest = 1 - beta, formed in double and rounded once, as torch does with a Python scalar
  T beta2, rest2;
  T lr, eps;
  T shrink;  // SMMF's decoupled decay: 1 - lr weight_decay
  T weight_decay;
  bool coupled;
  bool negate;  // maximize
  T clip;       // H-Fac's whole moments: what the direction is multiplied by, 1 = not clipped
};

// Rows of one matrix [rows, cols]; first-moment pointers are null where there is no first moment.
template <class T>
struct SmmfRows {
  const void* grad;
  void* param;
  int64_t grad_stride, param_stride;  // elements from row to row
  uint8_t* signs;                     // each row begins at a whole byte
  int64_t sign_stride;                // bytes from row to row
  T *row_m, *row_v;                   // [rows] old factors in, new ones out
  const T *col_m, *col_v;             // [cols] old factors
  T *sum_m, *sum_v;                   // [cols, padded] column sums, added to
  int64_t rows, cols;
  double* direction;  // where param and grad are T: added to, sum of (M / (sqrt(V) + eps))^2; null: not watched
  int64_t ahead;      // (fetch_ahead)
};

template <class T>
struct HfacStats {
  const void* grad;
  int64_t grad_stride;
  const T* row_square_old;              // [rows] r of the last step
  T* row_sum;                           // [rows] out: sum of the gradient; null: nor are columns summed up
  T* row_square;                        // [rows] out: the new r
  T *col_sum, *col_square, *col_ratio;  // [cols, padded] added to: sums of g, g^2, g^2 / r_i; null: rows only
  T beta2, rest2, eps_sum;              // eps_sum = cols * eps
  int64_t rows, cols;
  T elements;      // of the whole matrix
  int64_t ahead;   // (fetch_ahead)
  bool nonfinite;  // out, set and never cleared: an element's square times `elements` is not finite
};

template <class T>
struct HfacUpdate {
  const void* grad;
  void* param;
  int64_t grad_stride, param_stride;
  // [rows] and [cols], scales negative where the gradient is maximized. Factored first moment: half of phi and of psi,
  // these and the rows' scale times lr. In 8 bits: b1 rho and sigma, by which what is held of it changes its unit, and
  // the rows' scale times 1 - b1.
  const T *row_first, *row_scale;
  const T *col_first, *col_scale;
  T decay;  // lr weight_decay
  int64_t rows, cols;
  int8_t* codes;  // [rows, cols] the first moment in 8 bits, else null
  T beta1, step;  // then also read: step = lr times the clip factor
  int64_t ahead;  // (fetch_ahead)
};

// A run of elements whose moments are kept whole; exp_avg is null where there is no first moment.
template <class T>
struct DenseRun {
  const void* grad;
  void* param;
  T *exp_avg, *exp_avg_sq;
  int64_t count;
};

// One pair of storage types (parameter, gradient).
template <class T>
struct PairKernels {
  void (*smmf)(const Scalars<T>&, const SmmfRows<T>&);
  void (*smmf_dense)(const Scalars<T>&, const DenseRun<T>&);
  void (*hfac_update)(const HfacUpdate<T>&);
  void (*hfac_int8)(const HfacUpdate<T>&);
  T (*hfac_dense_norm)(const Scalars<T>&, const DenseRun<T>&);  // sum of U^2; writes nothing
  void (*hfac_dense)(const Scalars<T>&, const DenseRun<T>&);
};

// One storage type of gradients.
template <class T>
struct GradKernels {
  void (*hfac_stats)(HfacStats<T>&);
  // Is there an element whose square times `elements` is not finite? If not, no sum of that many squares overflows.
  bool (*nonfinite)(const void* grad, int64_t count, T elements);
};

// What random bits hang on beside an element's index in its whole parameter (math/rounding.h).
struct DrawKey {
  uint32_t step, position;
  uint64_t seed;
};

// Runs of contiguous elements between float and what is stored of them.
struct RoundingKernels {
  // Bits of `blocks` blocks of 8 elements from `block` on; `bits` has room for kDrawsAtOnce more than those.
  void (*draw)(uint64_t block, int64_t blocks, const DrawKey&, uint16_t* bits);
  void (*widen_bfloat16)(const BFloat16*, int64_t count, float* out);
  void (*widen_float16)(const Float16*, int64_t count, float* out);
  void (*round_bfloat16)(const float*, const uint16_t* bits, int64_t count, BFloat16* out);
  void (*round_float16)(const float*, const uint16_t* bits, int64_t count, Float16* out);
  void (*join16)(const BFloat16*, const int16_t*, int64_t count, float* out);
  void (*join8)(const BFloat16*, const int8_t*, int64_t count, float* out);
  // `bits` null: to the nearest.
  void (*split16)(const float*, const uint16_t* bits, int64_t count, BFloat16*, int16_t*);
  void (*split8)(const float*, const uint16_t* bits, int64_t count, BFloat16*, int8_t*);
};
constexpr int64_t kDrawsAtOnce = 64;

// Indexed by DType; a null pointer means that the pair has no kernel of its own and is staged in the arithmetic's type.
template <class T>
struct Arithmetic {
  PairKernels<T> pairs[kDTypes][kDTypes];
  GradKernels<T> grads[kDTypes];
};

struct Kernels {
  Arithmetic<float> of_float;
  Arithmetic<double> of_double;
  RoundingKernels rounding;
};

}  // namespace hfac
