// The ops on the CPU over lists of items that have been checked.
#pragma once

#include <cstddef>

#include "../ops.h"

namespace hfac {

// A step whole, or in two calls between which the norm of all gradients is found: the statistics alone, which go to the
// items' `kept` and change nothing else, then what is left.
enum class HfacStage { kWhole, kStatistics, kRest };

struct CpuOptions : Options {
  double lr = 0, weight_decay = 0;
  int threads = 1;
  int32_t* nonfinite = nullptr;  // one flag per list entry, or null; read by kRest, else written
  double* watched = nullptr;     // [list, 5], or null (watch.h)
  double* squares = nullptr;     // [list] sums of squares of the gradients, of `squares` and kStatistics
  HfacStage stage = HfacStage::kWhole;
};

// Bytes of an item's `kept`.
size_t hfac_kept_bytes(int64_t rows, int64_t cols, bool wide);

// Each returns the bytes of workspace that the call held at most.
using CpuOp = size_t(std::vector<Item> items, const CpuOptions& options);
CpuOp hfac_step, hfac_int8_step, hfac_sums, hfac_dense_step, smmf_step, smmf_sums_step, smmf_dense_step, squares;

}  // namespace hfac
