#include "step.h"

#include <cstring>
#include <utility>

#include "launchers.h"

namespace hfac {
namespace {

bool same(const Operand& a, const Operand& b) { return a.data == b.data && a.dtype == b.dtype && a.layout == b.layout; }

bool on_parts(OpKind op) { return op == OpKind::kHfacSums || op == OpKind::kHfacApply || op == OpKind::kSmmfSums; }

bool aligned(const void* p, uintptr_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

int32_t laid_out(const Strided* strided, std::vector<int64_t>& layouts) {
  if (!strided) return -1;
  const auto at = static_cast<int32_t>(layouts.size());
  layouts.push_back(static_cast<int64_t>(strided->sizes.size()));
  layouts.insert(layouts.end(), strided->sizes.begin(), strided->sizes.end());
  layouts.insert(layouts.end(), strided->strides.begin(), strided->strides.end());
  return at;
}

Operand operand(void* data, DType dtype, const Strided* strided, std::vector<int64_t>& layouts) {
  return {data, static_cast<int32_t>(dtype), laid_out(strided, layouts)};
}

}  // namespace

Step::Step(std::vector<BoundItem> items, int64_t entries, const PlanOptions& options)
    : bound_(std::move(items)), entries_(entries), options_(options) {
  if (!on_parts(options.op)) return;
  for (const BoundItem& item : bound_) parts_.push_back(item.part);
}

Store Step::store(const BoundStore& from, std::vector<int64_t>& layouts) const {
  Store s{};
  s.low = {from.low, static_cast<int32_t>(from.kind), laid_out(from.low_strided, layouts)};
  s.first = from.first;
  s.position = from.position;
  s.layout = laid_out(from.place, layouts);
  s.drawn = from.drawn;
  return s;
}

bool Step::bulk(const Item& it, const Part& part) const {
  const bool whole_bytes = !it.signs || it.slice % kVector == 0;
  const uintptr_t low_bytes = static_cast<Low>(it.store.low.dtype) == Low::kInt16 ? 16 : 8;
  return it.store.low.layout < 0 && aligned(it.store.low.data, low_bytes) && it.param.layout < 0 &&
         it.grad.layout < 0 && aligned(it.param.data) && aligned(it.grad.data) && it.cols % kVector == 0 &&
         part.first % kVector == 0 && part.stride % kVector == 0 && whole_bytes;
}

bool Step::prepare(const std::vector<BoundGrad>& grads, bool clip, bool nonfinite) {
  std::vector<Item> items(bound_.size());
  std::vector<int64_t> layouts;
  std::vector<bool> whole;
  bool replan = !planned_ || clip != options_.clip || nonfinite != options_.nonfinite;
  bool changed = replan;
  for (size_t i = 0; i < bound_.size(); ++i) {
    const BoundItem& from = bound_[i];
    Item& it = items[i];
    if (planned_) it = items_[i];  // its tiling and places stand until it is planned anew
    it.rows = from.rows;
    it.cols = from.cols;
    it.first_row = from.first_row;
    it.first_col = from.first_col;
    it.second_row = from.second_row;
    it.second_col = from.second_col;
    it.signs = from.signs;
    it.slice = from.slice;
    it.slice_bytes = from.slice_bytes;
    it.sign_bytes = from.sign_bytes;
    it.index = static_cast<int32_t>(from.index);
    it.param = operand(from.param.data, from.param.dtype, from.param.strided, layouts);
    it.grad = operand(grads[i].data, grads[i].dtype, grads[i].strided, layouts);
    it.store = store(from.store, layouts);
    whole.push_back(bulk(it, from.part));
    if (planned_ && !replan) {
      replan = whole[i] != bulk_[i] || it.grad.dtype != items_[i].grad.dtype;
      changed = changed || replan || !same(it.grad, items_[i].grad) || !same(it.param, items_[i].param);
    }
  }
  changed = changed || replan || layouts != layouts_;
  if (!changed) return false;
  items_ = std::move(items);
  layouts_ = std::move(layouts);
  bulk_ = std::move(whole);
  options_.clip = clip;
  options_.nonfinite = nonfinite;
  if (replan) plan_ = make_plan(items_, bulk_, options_, parts_);
  planned_ = true;
  edged_ = false;
  for (const Item& it : items_) {
    if (options_.op != OpKind::kSmmfSums) break;
    edged_ = edged_ || (it.signs && !(aligned(it.signs, 4) && aligned(it.signs + it.sign_bytes, 4)));
  }
  return true;
}

size_t Step::parts_at() const { return items_.size() * sizeof(Item); }
size_t Step::layouts_at() const { return parts_at() + parts_.size() * sizeof(Part); }
size_t Step::tiles_at() const { return layouts_at() + layouts_.size() * sizeof(int64_t); }
size_t Step::table_bytes() const { return tiles_at() + plan_.tiles.size() * sizeof(Tile); }

void Step::write_table(void* host) const {
  char* to = static_cast<char*>(host);
  if (!items_.empty()) memcpy(to, items_.data(), items_.size() * sizeof(Item));
  if (!parts_.empty()) memcpy(to + parts_at(), parts_.data(), parts_.size() * sizeof(Part));
  if (!layouts_.empty()) memcpy(to + layouts_at(), layouts_.data(), layouts_.size() * sizeof(int64_t));
  if (!plan_.tiles.empty()) memcpy(to + tiles_at(), plan_.tiles.data(), plan_.tiles.size() * sizeof(Tile));
}

void Step::launch(const Memory& memory, const Scalars& scalars, const Given& given, int device, void* stream) const {
  const char* table = static_cast<const char*>(memory.table);
  Arguments a{};
  a.items = reinterpret_cast<const Item*>(table);
  a.parts = parts_.empty() ? nullptr : reinterpret_cast<const Part*>(table + parts_at());
  a.layouts = reinterpret_cast<const int64_t*>(table + layouts_at());
  a.tiles = reinterpret_cast<const Tile*>(table + tiles_at());
  a.workspace = static_cast<char*>(memory.workspace);
  a.counters = static_cast<int32_t*>(memory.counters);
  a.nonfinite = given.nonfinite;
  a.grad_scale = given.grad_scale;
  a.found_inf = given.found_inf;
  a.clip = given.clip;
  a.squares = given.squares;
  a.watched = given.watched;
  a.scalars = scalars;
  if (edged_) a.counters = reinterpret_cast<int32_t*>(a.workspace + counters_at());
  launch_all(plan_, a, entries_, edged_ ? counter_bytes() : 0, device, stream);
}

}  // namespace hfac
