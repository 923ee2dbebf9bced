// One launcher per kernel: it picks the instantiation that a launch of the plan names.
#pragma once

#include "plan.h"

namespace hfac {

void launch_smmf_tiles(const Launch& launch, const Arguments& arguments, void* stream);
void launch_smmf_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_smmf_sums_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_stats(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_sums_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_apply_fold(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_update(const Launch& launch, const Arguments& arguments, void* stream);
void launch_look(const Launch& launch, const Arguments& arguments, void* stream);
void launch_dense_look(const Launch& launch, const Arguments& arguments, void* stream);
void launch_hfac_dense(const Launch& launch, const Arguments& arguments, void* stream);
void launch_smmf_dense(const Launch& launch, const Arguments& arguments, void* stream);

// Sets the device for as long as the launches of a plan take, and clears the flags that `look` sets.
void launch_all(const Plan& plan, Arguments arguments, int64_t flags, int device, void* stream);

}  // namespace hfac
