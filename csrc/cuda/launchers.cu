#include "launch.h"
#include "launchers.h"

namespace hfac {

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
    switch (launch.kernel) {
      case Kernel::kLook:
        launch_look(launch, arguments, stream);
        break;
      case Kernel::kSmmfTiles:
        launch_smmf_tiles(launch, arguments, stream);
        break;
      case Kernel::kSmmfFold:
        launch_smmf_fold(launch, arguments, stream);
        break;
      case Kernel::kSmmfSumsFold:
        launch_smmf_sums_fold(launch, arguments, stream);
        break;
      case Kernel::kHfacStats:
        launch_hfac_stats(launch, arguments, stream);
        break;
      case Kernel::kHfacCollect:
        launch_hfac_collect(launch, arguments, stream);
        break;
      case Kernel::kHfacFold:
        launch_hfac_fold(launch, arguments, stream);
        break;
      case Kernel::kHfacSumsFold:
        launch_hfac_sums_fold(launch, arguments, stream);
        break;
      case Kernel::kHfacApplyFold:
        launch_hfac_apply_fold(launch, arguments, stream);
        break;
      case Kernel::kHfacUpdate:
        launch_hfac_update(launch, arguments, stream);
        break;
      case Kernel::kDenseLook:
        launch_dense_look(launch, arguments, stream);
        break;
      case Kernel::kHfacDense:
        launch_hfac_dense(launch, arguments, stream);
        break;
      case Kernel::kSmmfDense:
        launch_smmf_dense(launch, arguments, stream);
        break;
    }
  }
}

}  // namespace hfac
