#include "plan.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace hfac {
namespace {

constexpr int64_t kWorkspaceCap = 64 << 20;  // of SMMF's and of parts' partial sums: longer lists are taken in groups
constexpr int64_t kFewBytes = 512ll << 20;   // of gradients; up to here the number of launches matters more than L2
constexpr int64_t kFewGroups = 6;

int64_t bytes_of(int32_t dtype) {
  const auto code = static_cast<DType>(dtype);
  return code == DType::kFloat64 ? 8 : code == DType::kFloat32 ? 4 : 2;
}
bool is_double(const Item& it) { return static_cast<DType>(it.param.dtype) == DType::kFloat64; }
int64_t state_bytes(const Item& it) { return is_double(it) ? 8 : 4; }
int64_t elements(const Item& it) { return it.rows * it.cols; }
int64_t grad_bytes(const Item& it) { return elements(it) * bytes_of(it.grad.dtype); }
int64_t low_bytes(const Item& it) {
  const auto low = static_cast<Low>(it.store.low.dtype);
  return low == Low::kInt16 ? 2 : low == Low::kInt8 ? 1 : 0;
}
int64_t param_bytes(const Item& it) { return elements(it) * (bytes_of(it.param.dtype) + low_bytes(it)); }

int32_t power_of_two(int64_t at_least) {
  int32_t p = 1;
  while (p < at_least) p *= 2;
  return p;
}

// Rows per tile: partial sums cost 1/32 byte per element and statistic at 256 rows; smaller matrices, whose partial
// sums stay in the L2 cache, take fewer, to make enough blocks. At least what the block has in flight at once.
int32_t tile_rows(int64_t elements, int threads, int32_t lanes) {
  const int32_t rows = elements < (4 << 20) ? 64 : elements < (16 << 20) ? 128 : 256;
  return std::max(rows, threads / lanes * kRowsInFlight);
}

// Columns are divided evenly, so that no tile of a row of tiles leaves most of its threads idle.
Tiling tiles_of(int64_t rows, int64_t cols) {
  Tiling t;
  t.col_tiles = static_cast<int32_t>(ceil_quotient(cols, kTileCols));
  t.cols = static_cast<int32_t>(ceil_quotient(ceil_quotient(cols, t.col_tiles), kVector) * kVector);
  t.lanes = power_of_two(t.cols / kVector);
  t.rows = tile_rows(rows * cols, kTileThreads, t.lanes);
  t.row_tiles = static_cast<int32_t>(ceil_quotient(rows, t.rows));
  return t;
}

Tiling rows_of(int64_t rows, int64_t cols) {
  Tiling t;
  t.col_tiles = 1;
  t.cols = 0;  // whole rows
  t.lanes = cols > kStatsNarrow ? kLongThreads : power_of_two(ceil_quotient(cols, kVector));
  t.rows = tile_rows(rows * cols, kStatsThreads, t.lanes);
  t.row_tiles = static_cast<int32_t>(ceil_quotient(rows, t.rows));
  return t;
}

// A vector's random bits are one draw where it begins at a multiple of eight in the whole parameter.
Access stored_access(const Item& it, bool bulk) {
  const auto param = static_cast<DType>(it.param.dtype), grad = static_cast<DType>(it.grad.dtype);
  if (!bulk || param != DType::kBFloat16 || (grad != DType::kBFloat16 && grad != DType::kFloat32)) {
    return Access::kStored;
  }
  const bool wide = grad == DType::kFloat32, one_draw = it.store.layout < 0 && it.store.first % kVector == 0;
  const auto low = static_cast<Low>(it.store.low.dtype);
  if (low == Low::kInt16) return wide ? Access::kSplitFloat : Access::kSplit;  // exact: bits do not matter
  if (it.store.drawn && !one_draw) return Access::kStored;
  if (low == Low::kInt8) return wide ? Access::kSplit8Float : Access::kSplit8;
  return wide ? Access::kDrawnFloat : Access::kDrawn;
}

Access pair_access(const Item& it, bool bulk) {
  constexpr auto f32 = static_cast<int32_t>(DType::kFloat32), bf16 = static_cast<int32_t>(DType::kBFloat16),
                 f16 = static_cast<int32_t>(DType::kFloat16);
  if (is_double(it)) return Access::kDouble;
  if (is_stored(it)) return stored_access(it, bulk);
  const int32_t w = it.param.dtype, g = it.grad.dtype;
  if (!bulk) return Access::kAny;
  if (w == f32 && g == f32) return Access::kFloat;
  if (w == bf16 && g == bf16) return Access::kBFloat16;
  if (w == f16 && g == f16) return Access::kFloat16;
  if (w == bf16 && g == f32) return Access::kBFloat16Float;
  if (w == f32 && g == bf16) return Access::kFloatBFloat16;
  return Access::kAny;
}

Access grad_access(const Item& it, bool bulk) {
  if (is_double(it)) return Access::kDouble;
  if (!bulk) return Access::kAny;
  switch (static_cast<DType>(it.grad.dtype)) {
    case DType::kFloat32:
      return Access::kFloat;
    case DType::kBFloat16:
      return Access::kBFloat16;
    case DType::kFloat16:
      return Access::kFloat16;
    default:
      return Access::kAny;
  }
}

Access state_access(const Item& it) { return is_double(it) ? Access::kDouble : Access::kAny; }

Width width_of(const Item& it, Access access) {
  if (it.cols <= kStatsNarrow) return Width::kNarrow;
  const bool bulk = access != Access::kAny && access != Access::kDouble;
  return it.cols <= kStatsRegisters && bulk ? Width::kRegisters : Width::kWide;
}

class Planner {
 public:
  Planner(std::vector<Item>& items, const std::vector<bool>& bulk, const PlanOptions& options,
          const std::vector<Part>& parts)
      : items_(items), bulk_(bulk), options_(options), parts_(parts) {}

  Plan make() {
    for (size_t i = 0; i < items_.size(); ++i) {
      Item& it = items_[i];
      it.counter = static_cast<int32_t>(i) * kCounters;
      if (elements(it) == 0) continue;  // part of a parameter: it has moments, and no tiles
      if (smmf_matrices()) it.tiling = tiles_of(it.rows, it.cols);
      if (options_.op == OpKind::kHfac || options_.op == OpKind::kHfacSums) it.tiling = rows_of(it.rows, it.cols);
      if (options_.op == OpKind::kHfac || options_.op == OpKind::kHfacApply) it.update = tiles_of(it.rows, it.cols);
    }
    switch (options_.op) {
      case OpKind::kSmmf:
      case OpKind::kSmmfSums:
        for (const auto& group : capped_groups()) smmf(group);
        break;
      case OpKind::kHfac:
        if (options_.norm) {
          hfac_after_norm();
        } else {
          for (const auto& group : hfac_groups(all())) hfac(group);
        }
        break;
      case OpKind::kHfacSums:
        for (const auto& group : capped_groups()) hfac_sums(group);
        break;
      case OpKind::kHfacApply:
        for (const auto& group : capped_groups()) hfac_apply(group);
        break;
      default:
        dense();
    }
    return std::move(plan_);
  }

 private:
  using Group = std::vector<int32_t>;

  static size_t at(int32_t i) { return static_cast<size_t>(i); }

  Group all() const {
    Group group(items_.size());
    std::iota(group.begin(), group.end(), 0);
    return group;
  }

  bool smmf_matrices() const { return options_.op == OpKind::kSmmf || options_.op == OpKind::kSmmfSums; }
  bool hfac_matrices() const {
    return options_.op == OpKind::kHfac || options_.op == OpKind::kHfacSums || options_.op == OpKind::kHfacApply;
  }

  int64_t workspace_of(const Item& item) const {
    Item it = item;
    it.workspace = 0;
    char* const base = reinterpret_cast<char*>(uintptr_t{4096});  // only differences matter
    int64_t bytes = 0;
    const auto end_of = [&](auto zero) {
      using T = decltype(zero);
      if (smmf_matrices()) return reinterpret_cast<char*>(SmmfSpace<T>(it, base).end) - base;
      if (hfac_matrices()) return reinterpret_cast<char*>(HfacSpace<T>(it, base).end) - base;
      return reinterpret_cast<char*>(DenseSpace<T>(it, base).end) - base;
    };
    bytes = is_double(it) ? end_of(double()) : end_of(float());
    return bytes;
  }

  // Places the group's workspaces one after the other; groups follow each other on a stream and share the memory.
  void place(const Group& group) {
    int64_t at = 0;
    for (const int32_t i : group) {
      Item& it = items_[static_cast<size_t>(i)];
      it.workspace = (at + 15) / 16 * 16;
      at = it.workspace + workspace_of(it);
    }
    plan_.workspace_bytes = std::max(plan_.workspace_bytes, static_cast<size_t>(at));
  }

  // One launch per access (and width) that occurs in the group.
  void emit(Kernel kernel, const Group& group, const std::function<Access(int32_t)>& access,
            const std::function<int64_t(const Item&)>& parts, const std::function<void(const Item&, Bytes&)>& count,
            bool backward = false) {
    const bool by_width = kernel == Kernel::kHfacStats;
    for (int w = 0; w < (by_width ? 3 : 1); ++w) {
      for (int a = 0; a < kAccesses; ++a) {
        Launch launch{};
        launch.kernel = kernel;
        launch.access = static_cast<Access>(a);
        launch.width = static_cast<Width>(w);
        launch.group = group_;
        launch.phase = phase_;
        launch.conditional = conditional_;
        launch.backward = backward;
        launch.threads = !by_width ? kTileThreads : launch.width == Width::kNarrow ? kStatsThreads : kLongThreads;
        launch.first_tile = static_cast<int64_t>(plan_.tiles.size());
        for (const int32_t i : group) {
          const Item& it = items_[static_cast<size_t>(i)];
          if (access(i) != launch.access || (by_width && width_of(it, launch.access) != launch.width)) continue;
          const int64_t n = parts(it);
          for (int64_t p = 0; p < n; ++p) plan_.tiles.push_back({i, static_cast<int32_t>(p)});
          if (n) count(it, launch.bytes);
        }
        launch.tiles = static_cast<int64_t>(plan_.tiles.size()) - launch.first_tile;
        if (launch.tiles) plan_.launches.push_back(launch);
      }
    }
  }

  Access pair(int32_t i) const { return pair_access(items_[static_cast<size_t>(i)], bulk_[static_cast<size_t>(i)]); }
  Access grad(int32_t i) const { return grad_access(items_[static_cast<size_t>(i)], bulk_[static_cast<size_t>(i)]); }
  Access state(int32_t i) const { return state_access(items_[static_cast<size_t>(i)]); }
  Access any(int32_t i) const { return is_stored(items_[static_cast<size_t>(i)]) ? Access::kStored : state(i); }

  static int64_t runs(const Item& it) { return ceil_quotient(elements(it), kRun); }

  std::vector<Group> capped_groups() const {
    return capped_groups(kWorkspaceCap, [this](const Item& it) { return workspace_of(it) + 16; });
  }

  // Blocks of one part stay together, because one fold adds them up.
  std::vector<Group> capped_groups(int64_t cap, const std::function<int64_t(const Item&)>& bytes) const {
    std::vector<Group> groups;
    int64_t held = 0;
    const auto count = static_cast<int32_t>(items_.size());
    for (int32_t i = 0, end = 0; i < count; i = end) {
      int64_t mine = 0;
      for (end = i; end < count && items_[at(end)].index == items_[at(i)].index; ++end) {
        mine += bytes(items_[at(end)]);
      }
      if (groups.empty() || held + mine > cap) {
        groups.emplace_back();
        held = 0;
      }
      for (int32_t k = i; k < end; ++k) groups.back().push_back(k);
      held += mine;
    }
    return groups;
  }

  void smmf(const Group& group) {
    place(group);
    const auto partial = [](const Item& it) {
      return state_bytes(it) * 2 * (it.tiling.col_tiles * it.rows + it.tiling.row_tiles * it.cols);
    };
    const int moments = options_.first ? 2 : 1;
    if (options_.nonfinite) look(group);
    emit(
        Kernel::kSmmfTiles, group, [&](int32_t i) { return pair(i); },
        [](const Item& it) { return int64_t{it.tiling.row_tiles} * it.tiling.col_tiles; },
        [&](const Item& it, Bytes& b) {
          b.grad += grad_bytes(it);
          b.param_read += param_bytes(it);
          b.param_written += param_bytes(it);
          if (options_.first) b.signs += 2 * (it.slice ? elements(it) / it.slice * it.slice_bytes : elements(it) / 8);
          b.partial += partial(it) * moments / 2;
          b.states += state_bytes(it) * moments * (it.rows + it.cols);
        });
    const bool sums = options_.op == OpKind::kSmmfSums;  // that the part's rows and columns of the whole are added to
    emit(
        sums ? Kernel::kSmmfSumsFold : Kernel::kSmmfFold, group, [&](int32_t i) { return state(i); },
        [&](const Item& it) {
          if (!sums) return fold_chunks(it);
          const Part& part = parts_[static_cast<size_t>(&it - items_.data())];
          return part.blocks ? fold_chunks(part.rows, part.cols) : 0;
        },
        [&](const Item& it, Bytes& b) {
          b.partial += partial(it) * moments / 2;
          b.states += state_bytes(it) * moments * (it.rows + it.cols);
        });
    ++group_;
  }

  // Is an element of the gradient not finite? Reads it before anything is written.
  void look(const Group& group) {
    emit(
        Kernel::kLook, group, [&](int32_t i) { return state(i); }, runs,
        [](const Item& it, Bytes& b) { b.grad += grad_bytes(it); });
  }

  int64_t cache() const { return static_cast<int64_t>(static_cast<double>(options_.l2_bytes) * options_.l2_share); }

  // Gradients that fit the cache together are one group, in the list's order. Lists with few bytes get few groups, if
  // need be larger than the cache.
  std::vector<Group> hfac_groups(const Group& among) const {
    int64_t total = 0;
    for (const int32_t i : among) total += grad_bytes(items_[at(i)]);
    std::vector<Group> groups;
    for (int64_t limit = std::max<int64_t>(cache(), 1);; limit += limit / 16 + 1) {
      groups.clear();
      int64_t held = 0;
      for (const int32_t i : among) {
        const int64_t mine = grad_bytes(items_[at(i)]);
        if (groups.empty() || held + mine > limit) {
          groups.emplace_back();
          held = 0;
        }
        groups.back().push_back(i);
        held += mine;
      }
      if (total > kFewBytes || static_cast<int64_t>(groups.size()) <= kFewGroups) return groups;
    }
  }

  int64_t gradients(const Group& group) const {
    int64_t bytes = 0;
    for (const int32_t i : group) bytes += grad_bytes(items_[at(i)]);
    return bytes;
  }

  void hfac(const Group& group) {
    place(group);
    const int64_t bytes = gradients(group);
    const double kept = bytes ? static_cast<double>(std::min(bytes, cache())) / static_cast<double>(bytes) : 0;
    statistics(group);
    fold(group);
    // What is left in the cache of a group that does not fit is its end, so the update begins there.
    update(group, bytes > cache(), kept);
    ++group_;
  }

  // All statistics, then every group's step from what was collected of them. Where gradients are clipped a group takes
  // its statistics again, right before its update; where they are not, gradients of a list that does not fit the cache
  // are read from memory, and so they are counted.
  void hfac_after_norm() {
    const std::vector<Group> shares = place_collected();
    phase_ = Phase::kSquares;
    for (const Group& share : shares) {
      statistics(share);
      collect(share);
      ++group_;
    }
    phase_ = Phase::kStep;
    const double kept = gradients(all()) <= cache() ? 1 : 0;
    for (const Group& share : shares) {
      for (const Group& group : hfac_groups(share)) {
        conditional_ = true;
        statistics(group);
        collect(group);
        conditional_ = false;
        fold(group);
        update(group, gradients(group) > cache(), kept);
        ++group_;
      }
    }
  }

  // What lasts from phase to phase first: of an item 2 numbers per row, 5 per column and a few. Behind that the tiles'
  // sums, memory that the lists returned use in turn: as much as stays in the cache until it is collected.
  std::vector<Group> place_collected() {
    const auto sums = [](const Item& it) {
      return (state_bytes(it) * 3 * it.tiling.row_tiles * it.cols + 15) / 16 * 16;
    };
    int64_t lasting = 0, most = 0;
    for (Item& it : items_) {
      it.partials = 1;  // somewhere
      it.workspace = lasting;
      lasting = (lasting + workspace_of(it) + 15) / 16 * 16;
    }
    const std::vector<Group> shares = capped_groups(std::min(kWorkspaceCap, cache()), sums);
    for (const Group& share : shares) {
      int64_t end = lasting;
      for (const int32_t i : share) {
        items_[at(i)].partials = end;
        end += sums(items_[at(i)]);
      }
      most = std::max(most, end);
    }
    plan_.workspace_bytes = static_cast<size_t>(most);
    return shares;
  }

  void collect(const Group& group) {
    emit(
        Kernel::kHfacCollect, group, [&](int32_t i) { return state(i); },
        [](const Item& it) { return collect_chunks(it); },
        [](const Item& it, Bytes& b) { b.partial += state_bytes(it) * 3 * (it.tiling.row_tiles + 1) * it.cols; });
  }

  void fold(const Group& group) {
    emit(
        Kernel::kHfacFold, group, [&](int32_t i) { return state(i); }, chunks_of,
        [&](const Item& it, Bytes& b) {
          b.partial += options_.norm ? state_bytes(it) * (3 * it.cols + 2 * it.rows) : partial(it);
          b.states += state_bytes(it) * (3 * it.rows + 4 * it.cols);
        });
  }

  void hfac_sums(const Group& group) {
    place(group);
    statistics(group);
    emit(
        Kernel::kHfacSumsFold, group, [&](int32_t i) { return state(i); }, chunks_of,
        [](const Item& it, Bytes& b) {
          b.partial += partial(it);
          b.states += state_bytes(it) * (2 * it.rows + 3 * it.cols);
        });
    ++group_;
  }

  // The other ranks' numbers have come since the gradient was read: nothing of it is in the cache.
  void hfac_apply(const Group& group) {
    place(group);
    emit(
        Kernel::kHfacApplyFold, group, [&](int32_t i) { return state(i); }, chunks_of,
        [](const Item& it, Bytes& b) { b.states += state_bytes(it) * 6 * (it.rows + it.cols); });
    update(group, false, 0);
    ++group_;
  }

  static int64_t chunks_of(const Item& it) { return fold_chunks(it); }
  static int64_t partial(const Item& it) { return state_bytes(it) * (3 * it.tiling.row_tiles * it.cols + 2 * it.rows); }

  void statistics(const Group& group) {
    emit(
        Kernel::kHfacStats, group, [&](int32_t i) { return grad(i); },
        [](const Item& it) { return int64_t{it.tiling.row_tiles}; },
        [&](const Item& it, Bytes& b) {
          b.grad += grad_bytes(it);
          b.partial += partial(it);
          if (width_of(it, grad_access(it, true)) == Width::kWide) {  // whose column sums are in memory as they grow
            b.partial += state_bytes(it) * 2 * 3 * it.cols * ceil_quotient(it.rows, kWideRows);
          }
          b.states += state_bytes(it) * it.rows;
        });
  }

  // `kept`: the share of the gradients that is in the cache.
  void update(const Group& group, bool backward, double kept) {
    emit(
        Kernel::kHfacUpdate, group, [&](int32_t i) { return pair(i); },
        [](const Item& it) { return int64_t{it.update.row_tiles} * it.update.col_tiles; },
        [&](const Item& it, Bytes& b) {
          const auto again = static_cast<int64_t>(kept * static_cast<double>(grad_bytes(it)));
          b.grad += grad_bytes(it) - again;
          b.grad_again += again;
          b.param_read += param_bytes(it);
          b.param_written += param_bytes(it);
          b.partial += state_bytes(it) * 2 * (it.rows + it.cols);
        },
        backward);
  }

  // A short run is looked at by the block that steps it; of a longer one all blocks must have looked first.
  void dense() {
    const Group every = all();
    Group longer;
    for (const int32_t i : every) {
      if (elements(items_[at(i)]) > kRun) longer.push_back(i);
    }
    if (every.empty()) return;
    place(every);
    const bool hfac = options_.op == OpKind::kHfacDense;
    if (hfac && options_.clip) {
      emit(
          Kernel::kDenseLook, longer, [&](int32_t i) { return state(i); }, runs,
          [](const Item& it, Bytes& b) {
            b.grad += grad_bytes(it);
            b.states += state_bytes(it) * elements(it);
            b.partial += state_bytes(it) * 2 * runs(it);
          });
    } else if (options_.nonfinite) {
      look(longer);
    }
    emit(
        hfac ? Kernel::kHfacDense : Kernel::kSmmfDense, every, [&](int32_t i) { return any(i); }, runs,
        [&](const Item& it, Bytes& b) {
          b.grad += grad_bytes(it);
          b.param_read += param_bytes(it);
          b.param_written += param_bytes(it);
          b.states += state_bytes(it) * elements(it) * (options_.first ? 4 : 2);
        });
    ++group_;
  }

  std::vector<Item>& items_;
  const std::vector<bool>& bulk_;
  PlanOptions options_;
  const std::vector<Part>& parts_;
  Plan plan_;
  int group_ = 0;
  Phase phase_ = Phase::kStep;  // of the launches that are added, as the next
  bool conditional_ = false;
};

}  // namespace

Plan make_plan(std::vector<Item>& items, const std::vector<bool>& bulk, const PlanOptions& options,
               const std::vector<Part>& parts) {
  return Planner(items, bulk, options, parts).make();
}

std::vector<bool> assumed_bulk(const std::vector<Item>& items) {
  std::vector<bool> bulk;
  for (const Item& it : items) bulk.push_back(it.cols % kVector == 0 && (it.slice == 0 || it.slice % kVector == 0));
  return bulk;
}

const char* name_of(Kernel kernel) {
  static const char* const names[] = {"look",         "smmf_tiles", "smmf_fold",      "smmf_sums_fold",  "hfac_stats",
                                      "hfac_collect", "hfac_fold",  "hfac_sums_fold", "hfac_apply_fold", "hfac_update",
                                      "dense_look",   "hfac_dense", "smmf_dense"};
  return names[static_cast<int>(kernel)];
}

const char* name_of(Access access) {
  static const char* const names[] = {"float32",
                                      "bfloat16",
                                      "float16",
                                      "bfloat16/float32",
                                      "float32/bfloat16",
                                      "any",
                                      "float64",
                                      "bfloat16 drawn",
                                      "bfloat16 drawn/float32",
                                      "bfloat16+int16",
                                      "bfloat16+int16/float32",
                                      "bfloat16+int8",
                                      "bfloat16+int8/float32",
                                      "any stored"};
  return names[static_cast<int>(access)];
}

const char* name_of(Width width) {
  static const char* const names[] = {"narrow", "registers", "wide"};
  return names[static_cast<int>(width)];
}

const char* name_of(Phase phase) { return phase == Phase::kSquares ? "squares" : "step"; }

}  // namespace hfac
