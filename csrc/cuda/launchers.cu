// Follows a plan: one launch after the other.
#include "launch.h"
#include "launchers.h"

namespace hfac {
namespace {

#define HFAC_PICK(name) name##_kernel,
constexpr KernelFunction (*kPick[])(const Launch&, const Arguments&) = {HFAC_KERNELS(HFAC_PICK)};
#undef HFAC_PICK

}  // namespace

void launch_all(const Plan& plan, Arguments arguments, int64_t flags, size_t counter_bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  const Phase phase = arguments.squares ? Phase::kSquares : Phase::kStep;
  const float* const clip = arguments.clip;
  if (arguments.nonfinite && phase == Phase::kStep && clip) {
    launch_hfac_unflag(arguments.nonfinite, flags, clip, stream);
  } else if (arguments.nonfinite) {
    clear(arguments.nonfinite, static_cast<size_t>(flags) * sizeof(int32_t), stream);
  }
  if (counter_bytes) clear(arguments.counters, counter_bytes, stream);
  const Tile* tiles = arguments.tiles;
  for (const Launch& launch : plan.launches) {
    if (launch.phase != phase) continue;
    arguments.clip = launch.conditional ? clip : nullptr;
    arguments.tiles = tiles + launch.first_tile;
    arguments.backward = launch.backward;
    hfac::launch(name_of(launch.kernel), kPick[static_cast<int>(launch.kernel)](launch, arguments), launch.tiles,
                 launch.threads, stream, arguments);
  }
}

}  // namespace hfac
