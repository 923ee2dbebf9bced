// Launches a step's plan: one kernel after the other.
#include "launch.h"
#include "step.h"

namespace hfac {
namespace {

#define HFAC_PICK(name) name##_kernel,
constexpr KernelFunction (*kPick[])(const Launch&, const Arguments&) = {HFAC_KERNELS(HFAC_PICK)};
#undef HFAC_PICK

}  // namespace

void Step::launch(const void* table, Arguments a, int device, void* stream) const {
  const DeviceGuard guard(device);
  const char* const at = static_cast<const char*>(table);
  const auto* const tiles = reinterpret_cast<const Tile*>(at + tiles_at());
  const Phase phase = a.squares ? Phase::kSquares : Phase::kStep;
  const float* const clip = a.clip;
  a.items = reinterpret_cast<const DeviceItem*>(at);
  a.shards = shards_.empty() ? nullptr : reinterpret_cast<const DeviceShard*>(at + shards_at());
  a.layouts = reinterpret_cast<const int64_t*>(at + layouts_at());
  if (a.nonfinite && phase == Phase::kStep && clip) {
    launch_hfac_unflag(a.nonfinite, entries_, clip, stream);
  } else if (a.nonfinite) {
    clear(a.nonfinite, static_cast<size_t>(entries_) * sizeof(int32_t), stream);
  }
  if (edged_) {
    a.counters = reinterpret_cast<int32_t*>(a.workspace + counters_at());
    clear(a.counters, counter_bytes(), stream);
  }
  for (const Launch& launch : plan_.launches) {
    if (launch.phase != phase) continue;
    a.clip = launch.conditional ? clip : nullptr;
    a.tiles = tiles + launch.first_tile;
    a.backward = launch.backward;
    a.small_blocks = static_cast<int32_t>(launch.small_blocks);
    hfac::launch(name_of(launch.kernel), kPick[static_cast<int>(launch.kernel)](launch, a), launch.blocks,
                 launch.threads, launch.kernel == Kernel::hfac_stats ? hfac_stats_shared(launch) : 0, stream, a);
  }
}

}  // namespace hfac
