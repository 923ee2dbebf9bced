// From the launches of a plan to kernels.
#pragma once

#include "plan.h"

namespace hfac {

using KernelFunction = void (*)(Arguments);

#define HFAC_DECLARE(name) KernelFunction name##_kernel(const Launch& launch, const Arguments& arguments);
HFAC_KERNELS(HFAC_DECLARE)
#undef HFAC_DECLARE
// Clears `count` flags where the coefficient at `clip` is not 1.
void launch_hfac_unflag(int32_t* flags, int64_t count, const float* clip, void* stream);

// Launches one phase of a plan: that of the norm if `squares` is given, else the step. Sets the device meanwhile.
// Clears the flags of refused gradients, unless a phase of the norm has set them and the coefficient at `clip` is 1,
// and so many bytes of counters.
void launch_all(const Plan& plan, Arguments arguments, int64_t flags, size_t counter_bytes, int device, void* stream);

}  // namespace hfac
