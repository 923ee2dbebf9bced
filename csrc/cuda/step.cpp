// Items become the table's records.
#include "step.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace hfac {
namespace {

bool same(const Operand& a, const Operand& b) { return a.data == b.data && a.dtype == b.dtype && a.layout == b.layout; }

bool aligned(const void* p, uintptr_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

int32_t laid_out(const Strided* strided, std::vector<int64_t>& layouts) {
  if (!strided) return -1;
  const auto at = static_cast<int32_t>(layouts.size());
  layouts.push_back(static_cast<int64_t>(strided->sizes.size()));
  layouts.insert(layouts.end(), strided->sizes.begin(), strided->sizes.end());
  layouts.insert(layouts.end(), strided->strides.begin(), strided->strides.end());
  return at;
}

Operand operand(const TensorRef& tensor, std::vector<int64_t>& layouts) {
  return {tensor.data, tensor.dtype, laid_out(tensor.strided, layouts)};
}

DeviceStorage stored(const Storage& from, std::vector<int64_t>& layouts) {
  const LowerPiece low{from.low, static_cast<Low>(from.low_bytes), laid_out(from.low_strided, layouts)};
  return {low, from.bits.first, from.bits.position, laid_out(from.bits.strided, layouts), from.stochastic};
}

// Can kernels read and write whole vectors?
bool is_bulk(const DeviceItem& it, const DeviceShard& shard, OpKind op) {
  const uintptr_t low_bytes = it.storage.low.kind == Low::kInt16 ? 16 : 8;
  return it.storage.low.layout < 0 && aligned(it.storage.low.data, low_bytes) && it.param.layout < 0 &&
         it.grad.layout < 0 && aligned(it.param.data) && aligned(it.grad.data) && it.codes_layout < 0 &&
         aligned(it.codes, kVector) && in_vectors(it, op) && shard.first % kVector == 0 &&
         shard.stride % kVector == 0 && (!is_dense(op) || (aligned(it.first_row) && aligned(it.second_row)));
}

}  // namespace

Step::Step(std::vector<Item> items, int64_t entries, const PlanOptions& options)
    : items_(std::move(items)), entries_(entries), options_(options) {
  for (size_t i = 0; i < items_.size(); ++i) {
    const Item& from = items_[i];
    std::vector<Block> blocks;
    DeviceShard shard{};
    if (from.shard) {
      const Shard& s = *from.shard;
      shard = {s.rows, s.cols, {s.row_sum, s.row_square}, {s.col_sum, s.col_square, s.col_ratio}};
      blocks = s.blocks;
    }
    if (blocks.empty()) blocks = {{0, from.cols, 0, 1, 0, from.rows, from.cols}};
    shard.blocks = static_cast<int64_t>(blocks.size());
    int64_t elements = 0;
    for (const Block& block : blocks) elements += block.rows * block.cols;
    DeviceItem it{};
    static_cast<Moments&>(it) = from;
    it.index = static_cast<int32_t>(from.index);
    if (it.signs.data) it.sign_bytes = elements / it.signs.slice * it.signs.slice_bytes;
    for (const Block& block : blocks) {
      const bool many = block.rows > 1;  // or the distance of its rows says nothing
      shard.first = block.first;
      shard.stride = many ? block.stride : block.cols;
      shard.row_at = block.row;
      shard.row_step = many ? block.row_step : 1;
      shard.col_at = block.col;
      it.rows = block.rows;
      it.cols = block.cols;
      table_.push_back(it);
      from_.push_back(i);
      if (from.shard) shards_.push_back(shard);
      shard.blocks = 0;
    }
  }
}

bool Step::prepare(const std::vector<TensorRef>& grads, bool clip, bool nonfinite) {
  std::vector<DeviceItem> table = table_;  // tilings and offsets stand until they are planned anew
  std::vector<int64_t> layouts;
  std::vector<bool> bulk;
  bool replan = !planned_ || clip != options_.clip || nonfinite != options_.nonfinite, changed = replan;
  for (size_t k = 0; k < table.size(); ++k) {
    const TensorRef& param = items_[from_[k]].param;
    DeviceItem& it = table[k];
    it.param = operand(param, layouts);
    it.grad = operand(grads[from_[k]], layouts);
    it.codes_layout = laid_out(items_[from_[k]].codes_strided, layouts);
    it.storage = stored(param.storage ? *param.storage : Storage{}, layouts);
    bulk.push_back(is_bulk(it, shards_.empty() ? DeviceShard{} : shards_[k], options_.op));
    replan = replan || bulk[k] != bulk_[k] || it.grad.dtype != table_[k].grad.dtype ||
             (it.grad.layout < 0) != (table_[k].grad.layout < 0) ||
             (it.param.layout < 0) != (table_[k].param.layout < 0);
    changed = changed || replan || !same(it.grad, table_[k].grad) || !same(it.param, table_[k].param);
  }
  if (!changed && layouts == layouts_) return false;
  table_ = std::move(table);
  layouts_ = std::move(layouts);
  bulk_ = std::move(bulk);
  options_.clip = clip;
  options_.nonfinite = nonfinite;
  if (replan) plan_ = make_plan(table_, bulk_, options_, shards_);
  planned_ = true;
  edged_ = options_.op == OpKind::kSmmfSums && std::any_of(table_.begin(), table_.end(), [](const DeviceItem& it) {
             return !(aligned(it.signs.data, 4) && aligned(it.signs.data + it.sign_bytes, 4));
           });
  return true;
}

void Step::write_table(void* host) const {
  char* to = static_cast<char*>(host);
  if (!table_.empty()) memcpy(to, table_.data(), table_.size() * sizeof(DeviceItem));
  if (!shards_.empty()) memcpy(to + shards_at(), shards_.data(), shards_.size() * sizeof(DeviceShard));
  if (!layouts_.empty()) memcpy(to + layouts_at(), layouts_.data(), layouts_.size() * sizeof(int64_t));
  if (!plan_.tiles.empty()) memcpy(to + tiles_at(), plan_.tiles.data(), plan_.tiles.size() * sizeof(Tile));
}

}  // namespace hfac
