// What an op's kernels take of its items: how each reaches them and in how many blocks, the memory of their workspaces,
// and the bytes that they move. The planner (plan.cpp) asks; nothing here decides.
#pragma once

#include <utility>
#include <vector>

#include "plan.h"

namespace hfac {

inline int64_t state_bytes(const DeviceItem& it) { return is_double(it) ? 8 : 4; }
inline int64_t elements(const DeviceItem& it) { return it.rows * it.cols; }
inline int64_t grad_bytes(const DeviceItem& it) { return elements(it) * size_of(it.grad.dtype); }
inline int64_t param_bytes(const DeviceItem& it) {
  return elements(it) * (size_of(it.param.dtype) + static_cast<int64_t>(it.storage.low.kind));
}

inline int64_t runs(const DeviceItem& it) { return ceil_quotient(elements(it), kRun); }
inline int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

class Footprint {
 public:
  Footprint(std::vector<DeviceItem>& items, const std::vector<bool>& bulk, const PlanOptions& options,
            const std::vector<DeviceShard>& shards)
      : items_(items), bulk_(bulk), options_(options), shards_(shards) {}

 protected:
  DeviceItem& item(int32_t i) const { return items_[static_cast<size_t>(i)]; }

  bool smmf_matrices() const { return options_.op == OpKind::kSmmf || options_.op == OpKind::kSmmfSums; }
  bool whole_hfac() const { return options_.op == OpKind::kHfac || options_.op == OpKind::kHfacInt8; }
  bool applies() const { return options_.op == OpKind::kHfacApply || options_.op == OpKind::kHfacInt8Apply; }
  bool codes() const { return options_.op == OpKind::kHfacInt8 || options_.op == OpKind::kHfacInt8Apply; }

  // Of an item of H-Fac's the sums of its tiles; of any item all that lies in the workspace.
  static int64_t tile_sums(const DeviceItem& it);
  int64_t workspace_of(const DeviceItem& item) const;

  // How a kernel reaches an item's elements, and the tiles it takes for them, each one block.
  std::pair<Access, int64_t> cut_for(Kernel kernel, int32_t i) const;

  // Adds what a kernel moves for an item. `cached`: the share of the gradients that is in the cache when they are read
  // again.
  void count(Kernel kernel, const DeviceItem& it, double cached, Bytes& b) const;

  std::vector<DeviceItem>& items_;
  const std::vector<bool>& bulk_;
  PlanOptions options_;
  const std::vector<DeviceShard>& shards_;
};

}  // namespace hfac
