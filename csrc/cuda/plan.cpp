// Tilings, workspaces and launches, from shapes and types.
#include "plan.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace hfac {
namespace {

constexpr int64_t kWorkspaceCap = 64 << 20;  // of SMMF's and of shards' partial sums: longer lists are taken in groups
constexpr int64_t kFewBytes = 512ll << 20;   // of gradients; up to here the number of launches matters more than L2
constexpr int64_t kFewGroups = 6;

int64_t bytes_of(int32_t dtype) { return size_of(static_cast<DType>(dtype)); }
int64_t state_bytes(const DeviceItem& it) { return is_double(it) ? 8 : 4; }
int64_t elements(const DeviceItem& it) { return it.rows * it.cols; }
int64_t grad_bytes(const DeviceItem& it) { return elements(it) * bytes_of(it.grad.dtype); }
int64_t low_bytes(const DeviceItem& it) {
  const auto low = static_cast<Low>(it.storage.low.dtype);
  return low == Low::kInt16 ? 2 : low == Low::kInt8 ? 1 : 0;
}
int64_t param_bytes(const DeviceItem& it) { return elements(it) * (bytes_of(it.param.dtype) + low_bytes(it)); }

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

class Planner {
 public:
  Planner(std::vector<DeviceItem>& items, const std::vector<bool>& bulk, const PlanOptions& options,
          const std::vector<DeviceShard>& shards)
      : items_(items), bulk_(bulk), options_(options), shards_(shards) {}

  Plan make() {
    for (size_t i = 0; i < items_.size(); ++i) {
      DeviceItem& it = items_[i];
      it.counter = static_cast<int32_t>(i) * kCounters;
      if (elements(it) == 0) continue;  // a shard that has moments, and no tiles
      if (smmf_matrices()) it.tiling = tiles_of(it.rows, it.cols);
      if (options_.op == OpKind::kHfac || options_.op == OpKind::kHfacSums) it.tiling = rows_of(it.rows, it.cols);
      if (options_.op == OpKind::kHfac || options_.op == OpKind::kHfacApply) it.update = tiles_of(it.rows, it.cols);
    }
    switch (options_.op) {
      case OpKind::kHfac:
        if (options_.norm) {
          hfac_after_norm();
        } else {
          for (const Group& group : hfac_groups(all())) hfac(group);
        }
        break;
      case OpKind::kHfacDense:
      case OpKind::kSmmfDense:
        dense();
        break;
      default:
        for (const Group& group : capped_groups()) {
          smmf_matrices() ? smmf(group) : options_.op == OpKind::kHfacSums ? hfac_sums(group) : hfac_apply(group);
        }
    }
    return std::move(plan_);
  }

 private:
  using Group = std::vector<int32_t>;

  DeviceItem& item(int32_t i) const { return items_[static_cast<size_t>(i)]; }

  Group all() const {
    Group group(items_.size());
    std::iota(group.begin(), group.end(), 0);
    return group;
  }

  bool smmf_matrices() const { return options_.op == OpKind::kSmmf || options_.op == OpKind::kSmmfSums; }
  bool hfac_matrices() const {
    return options_.op == OpKind::kHfac || options_.op == OpKind::kHfacSums || options_.op == OpKind::kHfacApply;
  }

  int64_t workspace_of(const DeviceItem& item) const {
    DeviceItem it = item;
    it.workspace = 0;
    char* const base = reinterpret_cast<char*>(uintptr_t{4096});  // only differences matter
    const auto end_of = [&](auto zero) {
      using T = decltype(zero);
      if (smmf_matrices()) return reinterpret_cast<char*>(SmmfSpace<T>(it, base).end) - base;
      if (hfac_matrices()) return reinterpret_cast<char*>(HfacSpace<T>(it, base).end) - base;
      return reinterpret_cast<char*>(DenseSpace<T>(it, base).end) - base;
    };
    return is_double(it) ? end_of(double()) : end_of(float());
  }

  // Allots the group's workspaces one after the other; groups follow each other on a stream and share the memory.
  void allot(const Group& group) {
    int64_t at = 0;
    for (const int32_t i : group) {
      DeviceItem& it = item(i);
      it.workspace = (at + 15) / 16 * 16;
      at = it.workspace + workspace_of(it);
    }
    plan_.workspace_bytes = std::max(plan_.workspace_bytes, static_cast<size_t>(at));
  }

  // One launch per access (and width) that occurs in the group.
  void emit(Kernel kernel, const Group& group, Access (Planner::*access)(int32_t) const,
            const std::function<int64_t(const DeviceItem&)>& tiles,
            const std::function<void(const DeviceItem&, Bytes&)>& count, bool backward = false) {
    const bool by_width = kernel == Kernel::hfac_stats;
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
          const DeviceItem& it = item(i);
          const Access its = (this->*access)(i);
          if (its != launch.access || (by_width && width_of(it, its) != launch.width)) continue;
          const int64_t n = tiles(it);
          for (int64_t p = 0; p < n; ++p) plan_.tiles.push_back({i, static_cast<int32_t>(p)});
          if (n) count(it, launch.bytes);
        }
        launch.tiles = static_cast<int64_t>(plan_.tiles.size()) - launch.first_tile;
        if (launch.tiles) plan_.launches.push_back(launch);
      }
    }
  }

  Access pair(int32_t i) const { return pair_access(item(i), bulk_[static_cast<size_t>(i)]); }
  Access grad(int32_t i) const { return grad_access(item(i), bulk_[static_cast<size_t>(i)]); }
  Access state(int32_t i) const { return state_access(item(i)); }
  Access any(int32_t i) const { return is_stored(item(i)) ? Access::kStored : state(i); }

  static void count_param(const DeviceItem& it, Bytes& b) {
    b.param_read += param_bytes(it);
    b.param_written += param_bytes(it);
  }
  static int64_t runs(const DeviceItem& it) { return ceil_quotient(elements(it), kRun); }

  // Items in order, in groups of no more bytes than `limit`, or of one item. Blocks of one shard stay together, because
  // one fold adds them up.
  template <class BytesOf>
  std::vector<Group> divided(const Group& among, int64_t limit, const BytesOf& bytes) const {
    std::vector<Group> groups;
    int64_t held = 0;
    for (size_t k = 0, end = 0; k < among.size(); k = end) {
      int64_t mine = 0;
      for (end = k; end < among.size() && item(among[end]).index == item(among[k]).index; ++end) {
        mine += bytes(item(among[end]));
      }
      if (groups.empty() || held + mine > limit) {
        groups.emplace_back();
        held = 0;
      }
      for (size_t i = k; i < end; ++i) groups.back().push_back(among[i]);
      held += mine;
    }
    return groups;
  }

  std::vector<Group> capped_groups() const {
    return divided(all(), kWorkspaceCap, [this](const DeviceItem& it) { return workspace_of(it) + 16; });
  }

  void smmf(const Group& group) {
    allot(group);
    const auto partial = [](const DeviceItem& it) {
      return state_bytes(it) * 2 * (it.tiling.col_tiles * it.rows + it.tiling.row_tiles * it.cols);
    };
    const int moments = options_.first_moment ? 2 : 1;
    if (options_.nonfinite) look(group);
    emit(
        Kernel::smmf_tiles, group, &Planner::pair,
        [](const DeviceItem& it) { return int64_t{it.tiling.row_tiles} * it.tiling.col_tiles; },
        [&](const DeviceItem& it, Bytes& b) {
          b.grad += grad_bytes(it);
          count_param(it, b);
          if (options_.first_moment)
            b.signs += 2 * (it.slice ? elements(it) / it.slice * it.slice_bytes : elements(it) / 8);
          b.partial += partial(it) * moments / 2;
          b.states += state_bytes(it) * moments * (it.rows + it.cols);
        });
    const bool sums = options_.op == OpKind::kSmmfSums;  // to which the shard's are added
    emit(
        sums ? Kernel::smmf_sums_fold : Kernel::smmf_fold, group, &Planner::state,
        [&](const DeviceItem& it) {
          if (!sums) return fold_chunks(it);
          const DeviceShard& shard = shards_[static_cast<size_t>(&it - items_.data())];
          return shard.blocks ? fold_chunks(shard.rows, shard.cols) : 0;
        },
        [&](const DeviceItem& it, Bytes& b) {
          b.partial += partial(it) * moments / 2;
          b.states += state_bytes(it) * moments * (it.rows + it.cols);
        });
    ++group_;
  }

  // Is an element of the gradient not finite? Reads it before anything is written.
  void look(const Group& group) {
    emit(Kernel::look, group, &Planner::state, runs, [](const DeviceItem& it, Bytes& b) { b.grad += grad_bytes(it); });
  }

  int64_t cache() const { return static_cast<int64_t>(static_cast<double>(options_.l2_bytes) * options_.l2_share); }

  // Gradients that fit the cache together are one group, in the list's order. Lists with few bytes get few groups, if
  // need be larger than the cache.
  std::vector<Group> hfac_groups(const Group& among) const {
    for (int64_t limit = std::max<int64_t>(cache(), 1);; limit += limit / 16 + 1) {
      std::vector<Group> groups = divided(among, limit, grad_bytes);
      if (gradients(among) > kFewBytes || static_cast<int64_t>(groups.size()) <= kFewGroups) return groups;
    }
  }

  int64_t gradients(const Group& group) const {
    int64_t bytes = 0;
    for (const int32_t i : group) bytes += grad_bytes(item(i));
    return bytes;
  }

  void hfac(const Group& group) {
    allot(group);
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
    const std::vector<Group> shares = allot_collected();
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
  std::vector<Group> allot_collected() {
    const auto sums = [](const DeviceItem& it) {
      return (state_bytes(it) * 3 * it.tiling.row_tiles * it.cols + 15) / 16 * 16;
    };
    int64_t lasting = 0, most = 0;
    for (DeviceItem& it : items_) {
      it.partials = 1;  // somewhere
      it.workspace = lasting;
      lasting = (lasting + workspace_of(it) + 15) / 16 * 16;
    }
    const std::vector<Group> shares = divided(all(), std::min(kWorkspaceCap, cache()), sums);
    for (const Group& share : shares) {
      int64_t end = lasting;
      for (const int32_t i : share) {
        item(i).partials = end;
        end += sums(item(i));
      }
      most = std::max(most, end);
    }
    plan_.workspace_bytes = static_cast<size_t>(most);
    return shares;
  }

  void collect(const Group& group) {
    emit(
        Kernel::hfac_collect, group, &Planner::state, [](const DeviceItem& it) { return collect_chunks(it); },
        [](const DeviceItem& it, Bytes& b) { b.partial += state_bytes(it) * 3 * (it.tiling.row_tiles + 1) * it.cols; });
  }

  void fold(const Group& group) {
    emit(Kernel::hfac_fold, group, &Planner::state, chunks_of, [&](const DeviceItem& it, Bytes& b) {
      b.partial += options_.norm ? state_bytes(it) * (3 * it.cols + 2 * it.rows) : partial(it);
      b.states += state_bytes(it) * (3 * it.rows + 4 * it.cols);
    });
  }

  void hfac_sums(const Group& group) {
    allot(group);
    statistics(group);
    emit(Kernel::hfac_sums_fold, group, &Planner::state, chunks_of, [](const DeviceItem& it, Bytes& b) {
      b.partial += partial(it);
      b.states += state_bytes(it) * (2 * it.rows + 3 * it.cols);
    });
    ++group_;
  }

  // The other ranks' numbers have come since the gradient was read: nothing of it is in the cache.
  void hfac_apply(const Group& group) {
    allot(group);
    emit(Kernel::hfac_apply_fold, group, &Planner::state, chunks_of,
         [](const DeviceItem& it, Bytes& b) { b.states += state_bytes(it) * 6 * (it.rows + it.cols); });
    update(group, false, 0);
    ++group_;
  }

  static int64_t chunks_of(const DeviceItem& it) { return fold_chunks(it); }
  static int64_t partial(const DeviceItem& it) {
    return state_bytes(it) * (3 * it.tiling.row_tiles * it.cols + 2 * it.rows);
  }

  void statistics(const Group& group) {
    emit(
        Kernel::hfac_stats, group, &Planner::grad, [](const DeviceItem& it) { return int64_t{it.tiling.row_tiles}; },
        [&](const DeviceItem& it, Bytes& b) {
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
        Kernel::hfac_update, group, &Planner::pair,
        [](const DeviceItem& it) { return int64_t{it.update.row_tiles} * it.update.col_tiles; },
        [&](const DeviceItem& it, Bytes& b) {
          const auto again = static_cast<int64_t>(kept * static_cast<double>(grad_bytes(it)));
          b.grad += grad_bytes(it) - again;
          b.grad_again += again;
          count_param(it, b);
          b.partial += state_bytes(it) * 2 * (it.rows + it.cols);
        },
        backward);
  }

  // A short run is looked at by the block that steps it; of a longer one all blocks must have looked first.
  void dense() {
    const Group every = all();
    Group longer;
    for (const int32_t i : every) {
      if (elements(item(i)) > kRun) longer.push_back(i);
    }
    if (every.empty()) return;
    allot(every);
    const bool hfac = options_.op == OpKind::kHfacDense;
    if (hfac && options_.clip) {
      emit(Kernel::dense_look, longer, &Planner::state, runs, [](const DeviceItem& it, Bytes& b) {
        b.grad += grad_bytes(it);
        b.states += state_bytes(it) * elements(it);
        b.partial += state_bytes(it) * 2 * runs(it);
      });
    } else if (options_.nonfinite) {
      look(longer);
    }
    emit(hfac ? Kernel::hfac_dense : Kernel::smmf_dense, every, &Planner::any, runs,
         [&](const DeviceItem& it, Bytes& b) {
           b.grad += grad_bytes(it);
           b.param_read += param_bytes(it);
           b.param_written += param_bytes(it);
           b.states += state_bytes(it) * elements(it) * (options_.first_moment ? 4 : 2);
         });
    ++group_;
  }

  std::vector<DeviceItem>& items_;
  const std::vector<bool>& bulk_;
  PlanOptions options_;
  const std::vector<DeviceShard>& shards_;
  Plan plan_;
  int group_ = 0;
  Phase phase_ = Phase::kStep;  // of the launches that are added, as the next
  bool conditional_ = false;
};

}  // namespace

Plan make_plan(std::vector<DeviceItem>& items, const std::vector<bool>& bulk, const PlanOptions& options,
               const std::vector<DeviceShard>& shards) {
  return Planner(items, bulk, options, shards).make();
}

std::vector<bool> assumed_bulk(const std::vector<DeviceItem>& items) {
  std::vector<bool> bulk;
  for (const DeviceItem& it : items)
    bulk.push_back(it.cols % kVector == 0 && (it.slice == 0 || it.slice % kVector == 0));
  return bulk;
}

const char* name_of(Kernel kernel) {
#define HFAC_NAME(name) #name,
  static const char* const names[] = {HFAC_KERNELS(HFAC_NAME)};
#undef HFAC_NAME
  return names[static_cast<int>(kernel)];
}

const char* name_of(Phase phase) { return phase == Phase::kSquares ? "squares" : "step"; }

}  // namespace hfac
