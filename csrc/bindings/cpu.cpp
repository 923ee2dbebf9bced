// The CPU kernels' part of the module: every op through one reader of its lists and scalars.
#include <algorithm>

#include "../cpu/ops.h"
#include "items.h"

namespace hfac {
namespace bindings {
namespace {

int threads_of(Keywords& k) {
  const int64_t threads = k.integer("threads", 1);
  if (threads < 1 || threads > INT32_MAX) refuse("threads", "at least 1, not " + std::to_string(threads));
  return static_cast<int>(threads);
}

HfacStage stage_of(const std::string& name) {
  if (name == "whole") return HfacStage::kWhole;
  if (name == "statistics") return HfacStage::kStatistics;
  if (name == "rest") return HfacStage::kRest;
  refuse("stage", "'whole', 'statistics' or 'rest' is needed, not '" + name + "'");
}

// The scalars that an op takes.
CpuOptions options_of(const OpSlots& op, Keywords& k) {
  CpuOptions o;
  o.threads = threads_of(k);
  if (op.kind == OpKind::kSquares) {
    o.squares = k.address<double>("sums");
    return o;
  }
  const bool sums = op.kind == OpKind::kHfacSums;
  if (!op.applies()) o.eps = k.number("eps");
  if (!sums) {
    o.lr = k.number("lr");
    o.weight_decay = k.number("weight_decay");
    o.maximize = k.flag("maximize");
  }
  if (op.smmf()) o.coupled = !k.flag("decoupled_weight_decay");
  if (!op.smmf() && !sums) {
    const std::optional<double> threshold = k.optional_number("clip_threshold");
    o.clip = threshold.has_value();
    o.clip_threshold = threshold.value_or(1.0);
  }
  if (!op.on_shards()) {
    o.nonfinite = k.address<int32_t>("nonfinite");
    o.watched = k.address<double>("watched");
  }
  if (op.reads_twice()) {
    o.stage = stage_of(k.text("stage", py::str("whole")));
    o.squares = k.address<double>("squares");
  }
  return o;
}

// Each item's memory for the statistics of a step in two calls.
void divide_kept(std::vector<Item>& items, char* kept) {
  for (Item& item : items) {
    item.kept = kept;
    kept += hfac_kept_bytes(item.rows, item.cols, item.param.dtype == DType::kFloat64);
  }
}

size_t run(OpKind kind, CpuOp* op, const py::kwargs& given) {
  const OpSlots& slots = slots_of(kind);
  Keywords k(given);
  ItemLists lists(slots, k, true);
  const CpuOptions options = options_of(slots, k);
  char* const kept = slots.reads_twice() ? k.address<char>("kept") : nullptr;
  k.done();
  const bool statistics = options.stage == HfacStage::kStatistics, whole = options.stage == HfacStage::kWhole;
  if (!whole && !kept && lists.size() > 0) refuse("kept", "a null address where a step is made in two calls");
  if (statistics && !options.squares && lists.size() > 0)
    refuse("squares", "a null address where statistics are taken");
  if (kind == OpKind::kSquares && !options.squares && lists.size() > 0) refuse("sums", "a null address");
  std::vector<Item> items = lists.items();
  if (!whole) divide_kept(items, kept);
  if (options.nonfinite && options.stage != HfacStage::kRest) std::fill_n(options.nonfinite, lists.size(), 0);
  const py::gil_scoped_release release;
  return op(std::move(items), options);
}

// Bytes of `kept` for a step in two calls.
size_t hfac_kept(const py::kwargs& given) {
  Keywords k(given);
  const List rows(k.take("rows"), "rows", -1), cols(k.take("cols"), "cols", rows.size());
  const List dtypes = List::each(k.take("param_dtypes"), "param_dtypes", rows.size());
  k.done();
  size_t bytes = 0;
  for (py::ssize_t i = 0; i < rows.size(); ++i) {
    if (product(rows.count(i), cols.count(i), "rows") == 0) continue;
    bytes += hfac_kept_bytes(rows.count(i), cols.count(i), dtypes.dtype(i) == DType::kFloat64);
  }
  return bytes;
}

void copy_memory(const py::object& to, const py::object& from, const py::object& bytes) {
  const List targets(to, "to", -1), sources(from, "from", -1), sizes(bytes, "bytes", -1);
  if (targets.size() != sizes.size() || sources.size() != sizes.size())
    refuse("to, from, bytes", "lists of one length are needed");
  for (const bool writes : {false, true}) {  // all of them are looked at before the first is written
    for (py::ssize_t i = 0; i < targets.size(); ++i) {
      const size_t count = static_cast<size_t>(sizes.count(i));
      void* const target = targets.address(i, count > 0);
      const void* const source = sources.address(i, count > 0);
      if (writes && count > 0) std::memcpy(target, source, count);
    }
  }
}

}  // namespace

void define_cpu(py::module_& m) {
  const std::pair<OpKind, CpuOp*> ops[] = {
      {OpKind::kHfac, hfac_step},          {OpKind::kHfacDense, hfac_dense_step},
      {OpKind::kSmmf, smmf_step},          {OpKind::kSmmfDense, smmf_dense_step},
      {OpKind::kHfacSums, hfac_sums},      {OpKind::kHfacApply, hfac_step},
      {OpKind::kSmmfSums, smmf_sums_step}, {OpKind::kSquares, squares},
      {OpKind::kHfacInt8, hfac_int8_step}, {OpKind::kHfacInt8Apply, hfac_int8_step},
  };
  for (const std::pair<OpKind, CpuOp*>& op : ops) {
    m.def(
        slots_of(op.first).name, [op](const py::kwargs& given) { return run(op.first, op.second, given); },
        "An op of hfac.reference on lists of addresses; returns the bytes of workspace that it held at most.");
  }
  m.def("hfac_kept", &hfac_kept, "Bytes that H-Fac's matrices keep between stage='statistics' and stage='rest'.");
  m.def("copy_memory", &copy_memory, py::arg("to"), py::arg("from"), py::arg("bytes"),
        "Copies so many bytes from each address to another, which do not overlap.");
}

}  // namespace bindings
}  // namespace hfac
