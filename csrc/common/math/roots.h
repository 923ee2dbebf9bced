// IEEE square roots, rounded once, on host and device.
#pragma once

#include "config.h"

namespace hfac {
namespace HFAC_LEVEL {

#ifdef __CUDA_ARCH__
HFAC_HD float root(float x) { return __fsqrt_rn(x); }
HFAC_HD double root(double x) { return __dsqrt_rn(x); }
#else
HFAC_HD float root(float x) { return __builtin_sqrtf(x); }
HFAC_HD double root(double x) { return __builtin_sqrt(x); }
#endif

}  // namespace HFAC_LEVEL
}  // namespace hfac
