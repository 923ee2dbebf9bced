// Groups, workspaces and launches, from shapes and types.
#include "plan.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "footprint.h"
#include "tiling.h"

namespace hfac {
namespace {

constexpr int64_t kWorkspaceCap = 64 << 20;  // of SMMF's partial sums and of clipped H-Fac's: longer lists go in groups
// Of a group of H-Fac's: gradients that fit L2 would be read from memory once, but what that saves of a longer list
// costs more in launches, in blocks that the last wave of each lacks, and in the partial sums of short tiles.
constexpr int64_t kGroupElements = 512ll << 20;
constexpr size_t kFew = 64;                // matrices that one block holds, beside others
constexpr int kWarps = kTileThreads / 32;  // of a block
constexpr int64_t kFewChunks = 64;         // of a fold, whose sums a warp of the update adds up

class Planner : private Footprint {
 public:
  using Footprint::Footprint;

  Plan make() {
    int64_t of_list = 0;
    for (const DeviceItem& it : items_) of_list += elements(it);
    for (size_t i = 0; i < items_.size(); ++i) {
      DeviceItem& it = items_[i];
      it.counter = static_cast<int32_t>(i) * kCounters;
      it.whole_cols = shards_.empty() ? it.cols : shards_[i].cols;
      if (whole_hfac() && hfac_chunks(it) <= kFewChunks) it.chunks = static_cast<int32_t>(hfac_chunks(it));
      if (elements(it) == 0) continue;  // a shard that has moments, and no tiles
      const int64_t launched = std::max(elements(it), std::min(of_list, kGroupElements));
      if (smmf_matrices()) it.tiling = cut_smmf(it);
      if (whole_hfac() || applies()) it.update = cut_update(it, bulk_[i], launched);
    }
    if (whole_hfac() || options_.op == OpKind::kHfacSums) {
      for (const Group& group : hfac_groups(all())) cut_group(group);
    }
    if (options_.norm && !whole_hfac()) squares();
    switch (options_.op) {
      case OpKind::kHfac:
      case OpKind::kHfacInt8:
        options_.norm ? hfac_after_norm() : hfac();
        break;
      case OpKind::kHfacSums:
        in_groups(Kernel::hfac_stats, Kernel::hfac_sums_fold);
        break;
      case OpKind::kHfacApply:
        in_groups(Kernel::hfac_apply_fold, Kernel::hfac_update);
        break;
      case OpKind::kHfacInt8Apply:
        in_groups(Kernel::hfac_int8_apply_fold, Kernel::hfac_int8_update);
        break;
      case OpKind::kSmmf:
        in_groups(Kernel::smmf_tiles, Kernel::smmf_fold);
        break;
      case OpKind::kSmmfSums:
        in_groups(Kernel::smmf_tiles, Kernel::smmf_sums_fold);
        break;
      default:
        dense(options_.op == OpKind::kHfacDense);
    }
    return std::move(plan_);
  }

 private:
  using Group = std::vector<int32_t>;

  Group all() const {
    Group group(items_.size());
    std::iota(group.begin(), group.end(), 0);
    return group;
  }

  // Allots the group's workspaces one after the other; groups follow each other on a stream and share the memory.
  void allot(const Group& group) {
    int64_t at = 0;
    for (const int32_t i : group) {
      DeviceItem& it = item(i);
      it.workspace = padded(at);
      at = it.workspace + workspace_of(it);
      if (!smmf_matrices() && !is_dense(options_.op)) it.partials = at - tile_sums(it);
    }
    plan_.workspace_bytes = std::max(plan_.workspace_bytes, static_cast<size_t>(at));
  }

  // What a block of an item takes, where the longest are launched first, so that what multiprocessors still have to do
  // when there are no more is short; else 0, as of an update that is bound by its bytes. Blocks of a shard stay
  // together. Of gradients that do not fit the cache the update with codes begins with its longest blocks, at the end
  // of the list: there the statistics take them in the same order, so that it meets first what was read last.
  int64_t cost_of(Kernel kernel, int32_t i) const {
    const DeviceItem& it = item(i);
    const int64_t updated = std::min<int64_t>(it.update.rows, it.rows) * it.update.cols;
    if (kernel == Kernel::hfac_stats) return by_update_ ? -updated : statistics_cost(matrix(i), it.tiling);
    if (kernel == Kernel::hfac_fold || kernel == Kernel::hfac_int8_fold) {
      return std::min<int64_t>(it.rows, kFoldChunk) + int64_t{12} * it.tiling.row_tiles;
    }
    if (kernel == Kernel::hfac_int8_update) return next_.backward ? -updated : updated;
    const bool whole_smmf = kernel == Kernel::smmf_tiles && options_.op == OpKind::kSmmf;
    return whole_smmf ? std::min<int64_t>(it.tiling.rows, it.rows) * it.tiling.cols : 0;
  }

  // Does a warp take it, beside those of its block? They begin first: a warp takes as long as a block does of a tile.
  bool in_warps(Kernel kernel, int32_t i) const {
    return kernel == Kernel::smmf_tiles && options_.op == OpKind::kSmmf && in_one_warp(item(i));
  }

  // One launch per access (and width) that occurs in the group.
  void emit(Kernel kernel, Group group) {
    const bool by_width = kernel == Kernel::hfac_stats;
    std::stable_sort(group.begin(), group.end(),
                     [&](int32_t a, int32_t b) { return cost_of(kernel, a) > cost_of(kernel, b); });
    for (int w = 0; w < (by_width ? kWidths : 1); ++w) {
      for (int a = 0; a < kAccesses; ++a) {
        Launch launch = next_;
        launch.kernel = kernel;
        launch.access = static_cast<Access>(a);
        launch.width = static_cast<Width>(w);
        launch.threads = by_width ? stats_threads(launch.width) : kTileThreads;
        if (by_width && launch.width != Width::kWide) {
          launch.shared = stats_shared(launch.width, held_bytes(launch.access));
        }
        launch.first_tile = static_cast<int64_t>(plan_.tiles.size());
        Group others;
        for (const int32_t i : group) {
          const Access its = cut_for(kernel, i).first;
          if (its != launch.access || (by_width && width_of(item(i), its) != launch.width)) continue;
          if (!in_warps(kernel, i)) {
            others.push_back(i);
            continue;
          }
          plan_.tiles.push_back({i, 0});
          count(kernel, item(i), cached_, launch.bytes);
        }
        while ((plan_.tiles.size() - static_cast<size_t>(launch.first_tile)) % kWarps) plan_.tiles.push_back({-1, 0});
        const auto after = static_cast<int64_t>(plan_.tiles.size());
        launch.small_blocks = (after - launch.first_tile) / kWarps;
        for (const int32_t i : others) {
          const int64_t n = cut_for(kernel, i).second;
          for (int64_t p = 0; p < n; ++p) plan_.tiles.push_back({i, static_cast<int32_t>(p)});
          if (n) count(kernel, item(i), cached_, launch.bytes);
        }
        launch.blocks = launch.small_blocks + static_cast<int64_t>(plan_.tiles.size()) - after;
        if (launch.blocks) plan_.launches.push_back(launch);
      }
    }
  }

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

  // Two kernels, one after the other, for each group whose partial sums fit the workspace; statistics of shards in the
  // groups that their tiles were cut for.
  void in_groups(Kernel first, Kernel second) {
    const auto bytes = [this](const DeviceItem& it) { return workspace_of(it) + 16; };
    const bool cut = first == Kernel::hfac_stats;
    for (const Group& group : cut ? hfac_groups(all()) : divided(all(), kWorkspaceCap, bytes)) {
      allot(group);
      if (options_.nonfinite) emit(Kernel::look, group);
      emit(first, group);
      emit(second, group);
      ++next_.group;
    }
  }

  int64_t cache() const { return static_cast<int64_t>(static_cast<double>(options_.l2_bytes) * options_.l2_share); }

  Matrix matrix(int32_t i) const { return {&item(i), grad_access(item(i), bulk_[static_cast<size_t>(i)])}; }

  // Does it share the launches of whole vectors, one element at a time?
  bool is_single(int32_t i) const {
    const DeviceItem& it = item(i);
    const bool known = bulk_access(it.param.dtype, it.grad.dtype) != Access::kAny && !is_stored(it);
    return whole_hfac() && in_single_vectors(it) && known && !bulk_[static_cast<size_t>(i)] && it.param.layout < 0 &&
           it.grad.layout < 0;
  }

  // What is launched together goes by the shapes alone, as the order of sums does.
  void cut_group(const Group& group) {
    std::vector<Matrix> launched[2][kWidths];
    int64_t tile[2][kWidths] = {};
    const auto at = [&](int32_t i) {
      const bool beside = whole(item(i)) || (whole_hfac() && in_single_vectors(item(i)));
      return std::pair(beside, static_cast<int>(width_of(item(i), matrix(i).access)));
    };
    for (const int32_t i : group) {
      const auto [beside, width] = at(i);
      if (elements(item(i))) launched[beside][width].push_back(matrix(i));
    }
    for (int k = 0; k < 2 * kWidths; ++k) {
      const std::vector<Matrix>& matrices = launched[k / kWidths][k % kWidths];
      if (!matrices.empty()) tile[k / kWidths][k % kWidths] = statistics_tile(matrices);
    }
    for (const int32_t i : group) {
      DeviceItem& it = item(i);
      if (elements(it) == 0) continue;
      const auto [beside, width] = at(i);
      it.tiling = cut_statistics(matrix(i), tile[beside][width]);
      it.single = is_single(i);
    }
  }

  std::vector<Group> hfac_groups(const Group& among) const { return divided(among, kGroupElements, elements); }

  int64_t gradients(const Group& group) const {
    int64_t bytes = 0;
    for (const int32_t i : group) bytes += grad_bytes(item(i));
    return bytes;
  }

  // Matrices that one block holds, but for a few beside larger ones that are reached in the same way: by the model of
  // bench/launch_plan.py a launch of their own takes longer than their share of the others, whose bits are the same.
  std::vector<bool> in_one_block_each() const {
    std::vector<bool> small(items_.size());
    bool launched[kAccesses] = {};
    const auto access = [&](size_t i) {
      return static_cast<int>(pair_access(items_[i], bulk_[i] || items_[i].single));
    };
    for (size_t i = 0; i < small.size(); ++i) {
      small[i] = elements(items_[i]) && in_one_block(items_[i], bulk_[i]);
      if (!small[i] && elements(items_[i])) launched[access(i)] = true;
    }
    std::vector<size_t> few;
    for (size_t i = 0; i < small.size(); ++i) {
      if (small[i] && launched[access(i)]) few.push_back(i);
    }
    if (few.size() > kFew) return small;
    for (const size_t i : few) small[i] = false;
    return small;
  }

  void hfac() {
    Group small, larger;
    const std::vector<bool> one_block = in_one_block_each();
    for (const int32_t i : all()) (one_block[static_cast<size_t>(i)] ? small : larger).push_back(i);
    emit(codes() ? Kernel::hfac_int8_small : Kernel::hfac_small, small);
    next_.group += small.empty() ? 0 : 1;
    for (const Group& group : hfac_groups(larger)) {
      allot(group);
      const int64_t bytes = gradients(group);
      cached_ = bytes ? static_cast<double>(std::min(bytes, cache())) / static_cast<double>(bytes) : 0;
      by_update_ = codes() && bytes > cache();
      emit(Kernel::hfac_stats, group);
      by_update_ = false;
      fold_and_update(group);
    }
  }

  void fold_and_update(const Group& group) {
    emit(codes() ? Kernel::hfac_int8_fold : Kernel::hfac_fold, group);
    // What is left in the cache of a group that does not fit is its end, so the update begins there.
    next_.backward = gradients(group) > cache();
    emit(codes() ? Kernel::hfac_int8_update : Kernel::hfac_update, group);
    next_.backward = false;
    ++next_.group;
  }

  // All statistics, then every group's step from what was collected of them. Where gradients are clipped a group takes
  // its statistics again, right before its update; where they are not, gradients of a list that does not fit the cache
  // are read from memory, and so they are counted.
  void hfac_after_norm() {
    const std::vector<Group> shares = allot_collected();
    next_.phase = Phase::kSquares;
    for (const Group& share : shares) {
      statistics(share);
      ++next_.group;
    }
    next_.phase = Phase::kStep;
    cached_ = gradients(all()) <= cache() ? 1 : 0;
    for (const Group& share : shares) {
      for (const Group& group : hfac_groups(share)) {
        next_.conditional = true;
        statistics(group);
        next_.conditional = false;
        fold_and_update(group);
      }
    }
  }

  void statistics(const Group& group) {
    emit(Kernel::hfac_stats, group);
    emit(Kernel::hfac_collect, group);
  }

  // What lasts from phase to phase first: of an item 2 numbers per row, 5 per column and a few. Behind that the tiles'
  // sums, memory that the lists returned use in turn: as much as stays in the cache until it is collected.
  std::vector<Group> allot_collected() {
    int64_t lasting = 0, most = 0;
    for (DeviceItem& it : items_) {
      it.collects = 1;
      it.workspace = lasting;
      lasting = padded(lasting + workspace_of(it));
    }
    const std::vector<Group> shares = divided(all(), std::min(kWorkspaceCap, cache()), tile_sums);
    for (const Group& share : shares) {
      int64_t end = lasting;
      for (const int32_t i : share) {
        item(i).partials = end;
        end += tile_sums(item(i));
      }
      most = std::max(most, end);
    }
    plan_.workspace_bytes = static_cast<size_t>(most);
    return shares;
  }

  // The sums of the blocks lie where the step that follows has its own.
  void squares() {
    int64_t at = 0;
    for (DeviceItem& it : items_) {
      it.partials = at;
      at += runs(it) * int64_t{sizeof(double)};
    }
    plan_.workspace_bytes = static_cast<size_t>(at);
    next_.phase = Phase::kSquares;
    emit(Kernel::squares, all());
    next_.phase = Phase::kStep;
  }

  // A short run is looked at by the block that steps it; of a longer one all blocks must have looked first.
  void dense(bool hfac) {
    Group longer;
    for (const int32_t i : all()) {
      if (elements(item(i)) > kRun) longer.push_back(i);
    }
    allot(all());
    const bool norms = hfac && options_.clip;
    if (norms || options_.nonfinite) emit(norms ? Kernel::dense_look : Kernel::look, longer);
    emit(hfac ? Kernel::hfac_dense : Kernel::smmf_dense, all());
  }

  Plan plan_;
  Launch next_{};           // what the launches that are added next have in common
  double cached_ = 0;       // the share of their gradients that is in the cache when they are read again
  bool by_update_ = false;  // does the order of the update decide that of the statistics?
};

}  // namespace

Plan make_plan(std::vector<DeviceItem>& items, const std::vector<bool>& bulk, const PlanOptions& options,
               const std::vector<DeviceShard>& shards) {
  return Planner(items, bulk, options, shards).make();
}

bool is_dense(OpKind op) { return op == OpKind::kHfacDense || op == OpKind::kSmmfDense; }

bool in_vectors(const DeviceItem& it, OpKind op) {
  // What is left of a parameter that is one run of elements is taken one by one, and rounded to the nearest.
  if (is_dense(op)) return !is_stored(it) || elements(it) % kVector == 0;
  return whole(it);
}

std::vector<bool> assumed_bulk(const std::vector<DeviceItem>& items, OpKind op) {
  std::vector<bool> bulk;
  for (const DeviceItem& it : items) bulk.push_back(in_vectors(it, op));
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
