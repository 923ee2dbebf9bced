// Tables of the ops' lists, and one reader for all of them.
#include "items.h"

namespace hfac {
namespace bindings {
namespace {

using Slots = std::vector<Slot>;

constexpr Extent kRows = Extent::kRows, kCols = Extent::kCols, kElements = Extent::kElements;
constexpr Need kAlways = Need::kAlways, kFirst = Need::kFirstMoment, kAsBefore = Need::kAsBefore,
               kOptional = Need::kOptional;

Slots operator+(Slots a, const Slots& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Slots first(Need need) {
  return {{"exp_avg_rows", kRows, need, &Item::first_row}, {"exp_avg_cols", kCols, need, &Item::first_col}};
}
Slots signs(Need need) { return {{"exp_avg_signs", Extent::kSigns, need}}; }
Slots codes() { return {{"exp_avg_qs", kElements, kAlways, &Item::codes}}; }
Slots second() {
  return {{"exp_avg_sq_rows", kRows, kAlways, &Item::second_row},
          {"exp_avg_sq_cols", kCols, kAlways, &Item::second_col}};
}
Slots whole(Need need) {
  return {{"exp_avgs", kElements, need, &Item::first_row}, {"exp_avg_sqs", kElements, kAlways, &Item::second_row}};
}
Slots hfac_sums() {
  return {{"old_rows", kRows, kAlways, &Item::second_row},       {"row_sums", kRows, kAlways, &Shard::row_sum},
          {"new_rows", kRows, kAlways, &Shard::row_square},      {"col_sums", kCols, kOptional, &Shard::col_sum},
          {"col_squares", kCols, kAsBefore, &Shard::col_square}, {"col_ratios", kCols, kAsBefore, &Shard::col_ratio}};
}
Slots hfac_known() {
  return {{"row_sums", kRows, kAlways, &Shard::row_sum},
          {"new_rows", kRows, kAlways, &Shard::row_square},
          {"col_sums", kCols, kAlways, &Shard::col_sum},
          {"new_cols", kCols, kAlways, &Shard::col_square}};
}
Slots second_known() {
  return {{"new_rows", kRows, kAlways, &Shard::row_square}, {"new_cols", kCols, kAlways, &Shard::col_square}};
}
Slots smmf_sums() {
  return {{"new_rows", kRows, kFirst, &Shard::row_sum},
          {"new_cols", kCols, kFirst, &Shard::col_sum},
          {"new_sq_rows", kRows, kAlways, &Shard::row_square},
          {"new_sq_cols", kCols, kAlways, &Shard::col_square}};
}

const OpSlots kOps[] = {
    {"hfac_step", OpKind::kHfac, Sizes::kMatrix, first(kAlways) + second()},
    {"hfac_dense_step", OpKind::kHfacDense, Sizes::kElements, whole(kAlways)},
    {"smmf_step", OpKind::kSmmf, Sizes::kMatrix, first(kFirst) + signs(kFirst) + second()},
    {"smmf_dense_step", OpKind::kSmmfDense, Sizes::kElements, whole(kFirst)},
    {"hfac_sums", OpKind::kHfacSums, Sizes::kRowsOfGrad, hfac_sums()},
    {"hfac_apply", OpKind::kHfacApply, Sizes::kMatrix, first(kAlways) + second() + hfac_known()},
    {"smmf_sums_step", OpKind::kSmmfSums, Sizes::kBlocks, first(kFirst) + signs(kFirst) + second() + smmf_sums()},
    {"squares", OpKind::kSquares, Sizes::kElements, {}},
    {"hfac_int8_step", OpKind::kHfacInt8, Sizes::kMatrix, codes() + second()},
    {"hfac_int8_apply", OpKind::kHfacInt8Apply, Sizes::kMatrix, codes() + second() + second_known()},
};

// Where the `numel` elements of a shard lie in a matrix of `rows` rows and `cols` columns: 7 numbers for each block.
std::vector<Block> read_blocks(const py::handle& value, int64_t numel, int64_t rows, int64_t cols) {
  const char* name = "blocks";
  const List list(py::reinterpret_borrow<py::object>(value), name, -1);
  std::vector<Block> out;
  out.reserve(static_cast<size_t>(list.size()));
  int64_t elements = 0;
  for (py::ssize_t b = 0; b < list.size(); ++b) {
    const List numbers(py::reinterpret_borrow<py::object>(list[b]), name, -1);
    if (numbers.size() != 7) list.bad(b, "7 numbers are needed, not " + std::to_string(numbers.size()));
    const Block block{numbers.count(0), numbers.count(1), numbers.count(2), numbers.count(3),
                      numbers.count(4), numbers.count(5), numbers.count(6)};
    if (block.rows == 0 || block.cols == 0) list.bad(b, "no elements");
    const bool many = block.rows > 1;
    if (many && (block.stride < block.cols || block.row_step == 0)) list.bad(b, "its rows overlap");
    const int64_t last = many ? product(block.rows - 1, block.stride, name) : 0;
    const int64_t last_row = many ? product(block.rows - 1, block.row_step, name) : 0;
    // Each comparison leaves out what the one before has shown to fit, so that no sum overflows.
    if (block.first > numel || last > numel - block.first || block.cols > numel - block.first - last) {
      list.bad(b, "it ends beyond the shard's " + std::to_string(numel) + " elements");
    }
    if (block.row >= rows || last_row >= rows - block.row || block.col > cols || block.cols > cols - block.col) {
      list.bad(b, "it leaves the matrix of " + std::to_string(rows) + " x " + std::to_string(cols));
    }
    elements += block.rows * block.cols;
    if (elements > numel) list.bad(b, "more elements than the shard's " + std::to_string(numel));
    out.push_back(block);
  }
  if (elements != numel) {
    refuse(name, std::to_string(elements) + " elements, but the shard has " + std::to_string(numel));
  }
  return out;
}

// How the sign bits of a parameter of `numel` elements lie: `bytes` of them, in `slices` slices of the first dimension
// (0 where the number does not matter because the bytes say all: whole bytes throughout, or one element per byte).
Signs read_signs(void* data, int64_t bytes, int64_t slices, int64_t numel, py::ssize_t i) {
  auto* p = static_cast<uint8_t*>(data);
  if (numel % 8 == 0 && bytes == numel / 8) return {p, numel, bytes};
  if (bytes == numel) return {p, 1, 1};
  if (slices > 0 && numel % slices == 0 && bytes == slices * ((numel / slices + 7) / 8)) {
    return {p, numel / slices, bytes / slices};
  }
  refuse("sign_bytes", "entry " + std::to_string(i) + ": " + std::to_string(bytes) + " bytes in " +
                           std::to_string(slices) + " slices do not hold the signs of " + std::to_string(numel) +
                           " elements");
}

}  // namespace

const OpSlots& slots_of(OpKind kind) { return kOps[static_cast<int>(kind)]; }

py::dict slot_names() {
  py::dict all;
  for (const OpSlots& op : kOps) {
    py::list names;
    for (const Slot& slot : op.slots) names.append(slot.name);
    if (!op.slots.empty()) all[op.name] = names;
  }
  return all;
}

uint64_t seed_of(const py::object& value) {
  const uint64_t seed = PyLong_AsUnsignedLongLong(PyLong_Check(value.ptr()) ? value.ptr() : py::int_(-1).ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    refuse("seed", "an integer in [0, 2^64) is needed where parameters are rounded stochastically");
  }
  return seed;
}

StorageLists::StorageLists(Keywords& k, bool on_cpu, py::ssize_t size)
    : lows_(k.optional_list("master_lows", size)),
      low_strides_(k.optional_list("low_strides", size)),
      places_(k.optional_list("places", size)) {
  const py::object bytes = k.optional("low_bytes");
  if (lows_) low_bytes_ = List::each(bytes, "low_bytes", size);
  if (!on_cpu) return;
  const py::object seed = k.optional("seed"), step = k.optional("step");
  if (!places_) return;
  seed_ = seed_of(seed);
  if (step.is_none()) refuse("step", "needed where places is given");
  steps_ = List::each(step, "step", size);
}

const Storage* StorageLists::at(py::ssize_t i, DType dtype, int64_t numel, const std::optional<List>& shapes,
                                Kept& kept) const {
  if (!lows_ && !places_) return nullptr;
  Storage s{};
  if (lows_) {
    s.low_bytes = low_bytes_->integer(i);
    if (s.low_bytes != 1 && s.low_bytes != 2) low_bytes_->bad(i, "1 or 2 is needed");
    if (dtype != DType::kBFloat16) lows_->bad(i, "of a parameter that is no bfloat16");
    s.low = lows_->address(i, true);
    s.low_strided = kept.layout(low_strides_, i, numel, shapes);
  }
  if (places_) {
    if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
      places_->bad(i, "of a parameter of more than 16 bits: only bfloat16 and float16 are rounded stochastically");
    }
    s.stochastic = true;
    s.bits = offset(i, numel, shapes, kept);
    s.seed = seed_;
    const double step = steps_ ? steps_->number(i) : 0;
    if (!(step >= 0 && step < 4294967296.0)) {
      refuse("step", "entry " + std::to_string(i) + ": a number in [0, 2^32) is needed");
    }
    s.step = static_cast<uint32_t>(step);
  }
  kept.storages.push_back(s);
  return &kept.storages.back();
}

BitOffset StorageLists::offset(py::ssize_t i, int64_t numel, const std::optional<List>& shapes, Kept& kept) const {
  const List place(py::reinterpret_borrow<py::object>((*places_)[i]), "places", -1);
  if (place.size() != 3) places_->bad(i, "(position, first, strides) is needed");
  const int64_t position = place.integer(0);
  if (position >> 32) places_->bad(i, "a position in [0, 2^32) is needed: 32 bits, not negative");
  const Strided* const strided = kept.layout(place[2], "places", i, numel, shapes);
  const BitOffset bits{static_cast<uint32_t>(position), place.count(1), strided};
  // The last element's index must be a number still.
  int64_t last = bits.first;
  bool over = !strided && __builtin_add_overflow(last, numel - 1, &last);
  for (size_t d = 0; strided && d < strided->sizes.size(); ++d) {
    int64_t along = 0;
    over |= __builtin_mul_overflow(strided->sizes[d] - 1, strided->strides[d], &along) ||
            __builtin_add_overflow(last, along, &last);
  }
  if (over) places_->bad(i, "the elements' indices overflow: the last one overflows an int64");
  return bits;
}

ItemLists::ItemLists(const OpSlots& op, Keywords& k, bool on_cpu, bool gradients) : op_(op) {
  if (op.params()) params_.emplace(k, "params", "param_dtypes", "param_strides", -1);
  numels_.emplace(k.take("numels"), "numels", params_ ? params_->size() : -1);
  if (gradients) grads_.emplace(k, "grads", "grad_dtypes", "grad_strides", size());
  shapes_ = k.optional_list("shapes", size());
  if (op.params()) storage_.emplace(k, on_cpu, size());
  const auto list = [&](const char* name) { return List(k.take(name), name, size()); };
  const auto each = [&](const char* name) { return List::each(k.take(name), name, size()); };
  if (op.sizes != Sizes::kElements) rows_ = list("rows");
  if (op.sizes == Sizes::kMatrix || op.sizes == Sizes::kBlocks) cols_ = list("cols");
  if (op.kind == OpKind::kHfacApply) whole_rows_ = list("whole_rows");
  if (op.kind == OpKind::kHfacApply || op.kind == OpKind::kHfacSums) whole_cols_ = list("whole_cols");
  if (op.kind == OpKind::kHfacSums) state_dtypes_ = each("state_dtypes");
  if (op.sizes == Sizes::kBlocks) blocks_ = list("blocks");
  if (op.kind == OpKind::kHfacInt8Apply) code_strides_ = k.optional_list("code_strides", size());
  if (on_cpu && op.applies()) {
    totals_ = list("totals");
    mean_squares_ = list("mean_squares");
  }
  if (on_cpu && op.kind == OpKind::kHfacInt8Apply) old_totals_ = list("old_totals");
  if (on_cpu && op.kind != OpKind::kHfacSums && op.kind != OpKind::kSquares) {
    const py::object beta1 = k.take("beta1");
    first_moment_ = !op.smmf() || !beta1.is_none();
    if (first_moment_) beta1_ = List::each(beta1, "beta1", size());
  }
  if (on_cpu && !op.applies() && op.kind != OpKind::kSquares) beta2_ = each("beta2");
  for (const Slot& slot : op.slots) {
    const py::object given = slot.need == Need::kOptional ? k.optional(slot.name) : k.take(slot.name);
    if (!on_cpu && lists_.empty() && slot.need != Need::kAlways) first_moment_ = !given.is_none();
    if (slot.need == Need::kAsBefore && given.is_none() == lists_.back().has_value()) {
      refuse(slot.name, "needed exactly where " + std::string((&slot - 1)->name) + " is given");
    }
    const bool open = slot.need == Need::kAlways || (slot.need == Need::kFirstMoment && first_moment_) ||
                      (slot.need != Need::kFirstMoment && !given.is_none());
    lists_.push_back(open ? std::optional<List>(List(given, slot.name, size())) : std::nullopt);
    if (slot.extent != Extent::kSigns) continue;
    const py::object bytes = k.optional("sign_bytes"), slices = k.optional("sign_slices");
    if (open) sign_bytes_.emplace(bytes, "sign_bytes", size());
    if (open && !slices.is_none()) sign_slices_.emplace(slices, "sign_slices", size());
  }
}

void ItemLists::measure(py::ssize_t i, int64_t numel, Item& item) const {
  item.rows = rows_ ? rows_->count(i) : numel;
  item.cols = cols_ ? cols_->count(i) : 1;
  if (op_.sizes == Sizes::kRowsOfGrad && numel > 0) {
    if (item.rows == 0 || numel % item.rows != 0) {
      rows_->bad(i, "no divisor of the shard's " + std::to_string(numel) + " elements: " + std::to_string(item.rows));
    }
    item.cols = numel / item.rows;
  }
  if (op_.sizes != Sizes::kMatrix) return;
  const int64_t elements = product(item.rows, item.cols, "rows");
  if (elements != numel) {
    refuse("rows", "entry " + std::to_string(i) + ": rows * cols is " + std::to_string(elements) + ", numels has " +
                       std::to_string(numel));
  }
}

void ItemLists::put_shard(py::ssize_t i, int64_t numel, Item& item, Shard& shard) const {
  shard.rows = whole_rows_ ? whole_rows_->count(i) : item.rows;
  shard.cols = whole_cols_ ? whole_cols_->count(i) : item.cols;
  if (totals_) shard.total = totals_->number(i);
  if (mean_squares_) shard.mean_square = mean_squares_->number(i);
  if (old_totals_) shard.old_total = old_totals_->number(i);
  if (blocks_) shard.blocks = read_blocks((*blocks_)[i], numel, item.rows, item.cols);
  item.shard = &shard;
}

std::vector<Item> ItemLists::items() {
  std::vector<Item> items;
  items.reserve(static_cast<size_t>(size()));
  for (py::ssize_t i = 0; i < size(); ++i) {
    const int64_t numel = numels_->count(i);
    Item item{};
    item.index = i;
    measure(i, numel, item);
    if (op_.applies() ? item.rows == 0 && item.cols == 0 : numel == 0) continue;
    if (grads_) item.grad = grads_->at(i, numel, shapes_, kept_);
    if (params_) {
      item.param = params_->at(i, numel, shapes_, kept_);
      if (numel > 0) item.param.storage = storage_->at(i, item.param.dtype, numel, shapes_, kept_);
    } else {
      item.param.dtype = state_dtypes_ ? state_dtypes_->dtype(i) : item.grad.dtype;
      if (state_dtypes_ && item.param.dtype != DType::kFloat32 && item.param.dtype != DType::kFloat64) {
        refuse("state_dtypes", "float32 or float64 is needed");
      }
    }
    if (numel > 0) item.codes_strided = kept_.layout(code_strides_, i, numel, shapes_);
    if (beta1_) item.beta1 = beta1_->number(i);
    if (beta2_) item.beta2 = beta2_->number(i);
    Shard* shard = op_.on_shards() ? &kept_.shards.emplace_back() : nullptr;
    if (shard) put_shard(i, numel, item, *shard);
    for (size_t k = 0; k < lists_.size(); ++k) {
      if (!lists_[k]) continue;
      const Slot& slot = op_.slots[k];
      const int64_t extent = slot.extent == Extent::kRows   ? item.rows
                             : slot.extent == Extent::kCols ? item.cols
                                                            : numel;
      void* const at = lists_[k]->address(i, extent > 0);
      if (slot.extent == Extent::kSigns) {
        item.signs = read_signs(at, sign_bytes_->count(i), sign_slices_ ? sign_slices_->count(i) : 0, numel, i);
      } else {
        (slot.item ? item.*slot.item : shard->*slot.shard) = at;
      }
    }
    items.push_back(item);
  }
  return items;
}

}  // namespace bindings
}  // namespace hfac
