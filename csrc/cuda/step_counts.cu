// One thread for each parameter: a list of thousands takes a few blocks.
#include <cmath>

#include "launch.h"
#include "step_counts.h"

namespace hfac {
namespace {

HFAC_DEVICE int64_t parameter() { return int64_t{blockIdx.x} * kTileThreads + threadIdx.x; }

HFAC_DEVICE double hfac_decay(double beta, double t) {
  return beta * (1.0 - pow(beta, t - 1.0)) / (1.0 - pow(beta, t));
}

__global__ void __launch_bounds__(kTileThreads) next_decays(StepCounts counts, Decays decays, double* to) {
  const int64_t i = parameter();
  if (i >= counts.count) return;
  const double t = static_cast<double>(counts.made[i]) + 1.0;
  double first, second;
  if (decays.rule == DecayRule::kHfac) {
    first = hfac_decay(decays.first, t);
    second = hfac_decay(decays.second, t);
  } else {
    first = decays.first * pow(decays.growth, t - 1.0);
    second = 1.0 - pow(t, decays.second);
  }
  to[i] = first;
  to[i + counts.count] = second;
  to[i + 2 * counts.count] = t;
}

__global__ void __launch_bounds__(kTileThreads) count_steps(StepCounts counts, const int32_t* nonfinite) {
  const int64_t i = parameter();
  if (i >= counts.count) return;
  if (nonfinite && nonfinite[i]) {
    counts.skipped[i] += 1;
  } else {
    counts.made[i] += 1.0f;
  }
}

template <class... A>
void launch_for_each(const char* name, void (*kernel)(StepCounts, A...), const StepCounts& counts, int device,
                     void* stream, A... arguments) {
  if (counts.count == 0) return;
  const DeviceGuard guard(device);
  launch(name, kernel, (counts.count + kTileThreads - 1) / kTileThreads, kTileThreads, 0, stream, counts, arguments...);
}

}  // namespace

void launch_decays(const StepCounts& counts, const Decays& decays, double* to, int device, void* stream) {
  launch_for_each("next_decays", next_decays, counts, device, stream, decays, to);
}

void launch_count(const StepCounts& counts, const int32_t* nonfinite, int device, void* stream) {
  launch_for_each("count_steps", count_steps, counts, device, stream, nonfinite);
}

}  // namespace hfac
