// One op over one list of parameters, bound to their addresses: the plan, the table that the kernels read, the
// launches. Holds no memory of the device: the caller gives it, and says when a table has been copied.
#pragma once

#include <cstddef>
#include <vector>

#include "plan.h"

namespace hfac {

class Step {
 public:
  // `entries`: of the caller's list, empty tensors included. What items point at must live until `prepare` has
  // returned.
  Step(std::vector<Item> items, int64_t entries, const PlanOptions& options);

  // Gradients of this step, one per item, and what may change from step to step. True: the table in device memory is
  // out of date.
  bool prepare(const std::vector<TensorRef>& grads, bool clip, bool nonfinite);

  const std::vector<Item>& items() const { return items_; }
  size_t table_bytes() const { return tiles_at() + plan_.tiles.size() * sizeof(Tile); }
  size_t workspace_bytes() const { return edged_ ? counters_at() + counter_bytes() : plan_.workspace_bytes; }
  size_t counter_bytes() const { return table_.size() * kCounters * sizeof(int32_t); }
  void write_table(void* host) const;
  // `arguments` without what is in the table. With `squares` a launch is the phase of the norm; with `clip` that phase
  // was before. An op on shards has no counters that last. The device is the current one meanwhile. Flags of refused
  // gradients are cleared first, unless a phase of the norm has set them and the coefficient at `clip` is 1.
  void launch(const void* table, Arguments arguments, int device, void* stream) const;
  const Plan& plan() const { return plan_; }

 private:
  size_t shards_at() const { return table_.size() * sizeof(DeviceItem); }
  size_t layouts_at() const { return shards_at() + shards_.size() * sizeof(DeviceShard); }
  size_t tiles_at() const { return layouts_at() + layouts_.size() * sizeof(int64_t); }
  size_t counters_at() const { return (plan_.workspace_bytes + 15) / 16 * 16; }

  std::vector<Item> items_;
  int64_t entries_;
  PlanOptions options_;
  std::vector<DeviceItem> table_;    // of every item one, or of SMMF's shards one for each block
  std::vector<size_t> from_;         // its item
  std::vector<DeviceShard> shards_;  // as many, or none
  std::vector<int64_t> layouts_;
  std::vector<bool> bulk_;
  Plan plan_;
  bool planned_ = false;
  bool edged_ = false;  // SMMF's shards: counters in the workspace collect flips at the ends of signs
};

}  // namespace hfac
