// One op over one list of parameters, bound to their addresses: the plan, the table that the kernels read, the
// launches. Holds no memory of the device: the caller gives it, and says when a table has been copied.
#pragma once

#include <cstddef>
#include <vector>

#include "../cpu/tensor.h"
#include "plan.h"

namespace hfac {

// As `Store`, with pointers in place of layouts.
struct BoundStore {
  void* low = nullptr;
  Low kind = Low::kNone;
  const Strided* low_strided = nullptr;
  bool drawn = false;
  uint32_t position = 0;
  int64_t first = 0;
  const Strided* place = nullptr;
};

// What stays from step to step; null addresses for what an op does not have.
struct BoundItem {
  int64_t index;
  TensorRef param;
  int64_t rows, cols;
  void *first_row, *first_col, *second_row, *second_col;
  uint8_t* signs;
  int64_t slice, slice_bytes, sign_bytes;
  Part part{};  // where the op is one on parts
  BoundStore store{};
};

struct BoundGrad {
  void* data;
  DType dtype;
  const Strided* strided;
};

struct Memory {
  void *table, *workspace, *counters;  // on the device; an op on parts has no counters that last
};

// The caller's tensors on the device; null where there is none. With `squares` a launch is the phase of the norm; with
// `clip` that phase was before.
struct Given {
  int32_t* nonfinite = nullptr;
  const float *grad_scale = nullptr, *found_inf = nullptr, *clip = nullptr;
  double *squares = nullptr, *watched = nullptr;
};

class Step {
 public:
  Step(std::vector<BoundItem> items, int64_t entries, const PlanOptions& options);

  // Gradients of this step, one per bound item, and what may change from step to step. True: the table in device
  // memory is out of date.
  bool prepare(const std::vector<BoundGrad>& grads, bool clip, bool nonfinite);

  const std::vector<BoundItem>& items() const { return bound_; }
  int64_t entries() const { return entries_; }  // of the caller's list, empty tensors included
  size_t table_bytes() const;
  size_t workspace_bytes() const { return edged_ ? counters_at() + counter_bytes() : plan_.workspace_bytes; }
  size_t counter_bytes() const { return bound_.size() * kCounters * sizeof(int32_t); }
  void write_table(void* host) const;
  void launch(const Memory& memory, const Scalars& scalars, const Given& given, int device, void* stream) const;
  const Plan& plan() const { return plan_; }

 private:
  Store store(const BoundStore& from, std::vector<int64_t>& layouts) const;
  bool bulk(const Item& item, const Part& part) const;
  size_t parts_at() const;
  size_t layouts_at() const;
  size_t tiles_at() const;
  size_t counters_at() const { return (plan_.workspace_bytes + 15) / 16 * 16; }

  std::vector<BoundItem> bound_;
  int64_t entries_;
  PlanOptions options_;
  std::vector<Item> items_;
  std::vector<Part> parts_;  // as many, or none
  std::vector<int64_t> layouts_;
  std::vector<bool> bulk_;
  Plan plan_;
  bool planned_ = false;
  bool edged_ = false;  // SMMF's parts: counters in the workspace collect flips at the ends of signs
};

}  // namespace hfac
