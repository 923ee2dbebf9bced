// The lists that each op takes, by name, and how they become items.
#pragma once

// Are the CUDA kernels, or the emulated ones, part of the module?
#if defined(HFAC_WITH_CUDA) || defined(HFAC_EMULATED)
#define HFAC_CUDA_STEP
#endif

#include "lists.h"

namespace hfac {
namespace bindings {

// What a list has for each parameter: a tensor of one number per row, per column or per element, or sign bits.
enum class Extent { kRows, kCols, kElements, kSigns };
// When a list is needed: always, where there is a first moment, exactly where the one before it is given, or never.
enum class Need { kAlways, kFirstMoment, kAsBefore, kOptional };

// A list of addresses; each goes to one member of the item or of its shard.
struct Slot {
  Slot(const char* list, Extent has, Need when, void* Item::* to = nullptr)
      : name(list), extent(has), need(when), item(to) {}
  Slot(const char* list, Extent has, Need when, void* Shard::* to) : name(list), extent(has), need(when), shard(to) {}

  const char* name;
  Extent extent;
  Need need;
  void* Item::* item = nullptr;
  void* Shard::* shard = nullptr;
};

// Where an item's rows and columns come from: lists of both; all elements are rows; the rows of a gradient are given,
// or both of a matrix that blocks are part of.
enum class Sizes { kMatrix, kElements, kRowsOfGrad, kBlocks };

struct OpSlots {
  const char* name;
  OpKind kind;
  Sizes sizes;
  std::vector<Slot> slots;

  bool params() const { return kind != OpKind::kHfacSums && kind != OpKind::kSquares; }
  bool smmf() const { return kind == OpKind::kSmmf || kind == OpKind::kSmmfDense || kind == OpKind::kSmmfSums; }
  bool applies() const { return kind == OpKind::kHfacApply || kind == OpKind::kHfacInt8Apply; }
  bool reads_twice() const { return kind == OpKind::kHfac || kind == OpKind::kHfacInt8; }
  bool on_shards() const { return kind == OpKind::kHfacSums || kind == OpKind::kSmmfSums || applies(); }
};

const OpSlots& slots_of(OpKind kind);
// Of every op the names of its lists, in order.
py::dict slot_names();

// How parameters are kept, beside rounding to the nearest:
//   master_lows    addresses of lower pieces, low_bytes of an element of them (1 or 2), and low_strides;
//   places         of parameters that are rounded stochastically: (position, first, strides), a BitOffset;
//   seed, step     with which those give random bits; on a GPU they come with the launch.
class StorageLists {
 public:
  StorageLists(Keywords& k, bool on_cpu, py::ssize_t size);
  bool stochastic() const { return places_.has_value(); }
  // Of entry i; null where it is rounded to the nearest.
  const Storage* at(py::ssize_t i, DType dtype, int64_t numel, const std::optional<List>& shapes, Kept& kept) const;

 private:
  BitOffset offset(py::ssize_t i, int64_t numel, const std::optional<List>& shapes, Kept& kept) const;

  std::optional<List> lows_, low_bytes_, low_strides_, places_, steps_;
  uint64_t seed_ = 0;
};

// The lists of one call, opened and measured; `items` reads their entries.
class ItemLists {
 public:
  // On the GPU scalars come with the launch, and where an op is bound to its lists the gradients with every step.
  ItemLists(const OpSlots& op, Keywords& k, bool on_cpu, bool gradients = true);

  py::ssize_t size() const { return numels_->size(); }
  bool first_moment() const { return first_moment_; }
  bool stochastic() const { return storage_ && storage_->stochastic(); }
  // Without empty parameters, but for an update of H-Fac's shards, whose moments go on.
  std::vector<Item> items();
  // What the items point at; after the last call of `items`.
  Kept take() { return std::move(kept_); }

 private:
  void measure(py::ssize_t i, int64_t numel, Item& item) const;
  void put_shard(py::ssize_t i, int64_t numel, Item& item, Shard& shard) const;

  const OpSlots& op_;
  std::optional<Tensors> params_, grads_;
  std::optional<List> numels_, rows_, cols_, whole_rows_, whole_cols_, blocks_, totals_, old_totals_, mean_squares_;
  std::optional<List> sign_bytes_, sign_slices_, code_strides_, shapes_, state_dtypes_, beta1_, beta2_;
  std::optional<StorageLists> storage_;
  std::vector<std::optional<List>> lists_;
  bool first_moment_ = true;
  Kept kept_;
};

// The CPU's and CUDA's parts of the module, and what a warm step compares.
void define_cpu(py::module_& m);
void define_snapshots(py::module_& m);
void define_cuda(py::module_& m);
void define_step_counts(py::module_& m);

// A seed of random bits, of 64 bits.
uint64_t seed_of(const py::object& value);

}  // namespace bindings
}  // namespace hfac
