// Steps that only the device counts, because it decides whether one is made: a kernel before a step finds the decays
// that follow from the counts, and one behind it counts the step.
#pragma once

#include <cstdint>

namespace hfac {

struct StepCounts {
  float* made;       // [count]
  int32_t* skipped;  // [count]; null where no step can be skipped
  int64_t count;     // of parameters
};

// How the decays of both moments follow from the number of the step, as in hfac/schedules.py.
enum class DecayRule { kHfac, kSmmf };

struct Decays {
  DecayRule rule;
  double first, second, growth;  // beta1, beta2; beta, decay_rate, growth_rate
};

// To `to`, [3, count], for each parameter the decay of its first moment, that of its second, and the number of the step
// that follows. The device is the current one meanwhile, as for what counts.
void launch_decays(const StepCounts& counts, const Decays& decays, double* to, int device, void* stream);
// Counts a step of each parameter: as skipped where its flag at `nonfinite` is not 0, else as made. Null: as made.
void launch_count(const StepCounts& counts, const int32_t* nonfinite, int device, void* stream);

}  // namespace hfac
