// One launcher per kernel: it picks the instantiation that a launch of the plan names.
#pragma once

#include "plan.h"

namespace hfac {

void launch_smmf_tiles(const Launch& launch, const Arguments& arguments, void* stream);
void launch_smmf_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_smmf_sums_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_stats(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_collect(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_unflag(int32_t* flags, int64_t count, const float* clip, void* stream);
void launch_hfac_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_sums_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_apply_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_update(const Launch& launch, const Arguments& arguments, void* stream);
void launch_look(const Launch& launch, const Arguments& arguments, void* stream);
void launch_dense_look(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_dense(const Launch& launch, const Arguments& arguments, void* stream);
void launch_smmf_dense(const Launch& launch, const Arguments& arguments, void* stream);

// One phase of a plan: that of the norm where there is a place for squares, else the step. Sets the device for as long
// as the launches take. Clears the flags of gradients that are refused, but for those that are still true: a step that
// was told of `clip` has them from the phase before, and where it is 1 they stand. Clears so many bytes of counters.
void launch_all(const Plan& plan, Arguments arguments, int64_t flags, size_t counter_bytes, int device, void* stream);

}  // namespace hfac
