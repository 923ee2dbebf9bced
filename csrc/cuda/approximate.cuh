// Arithmetic that a GPU does fast and not to the bit, each off by 2 units in the last place at most. On the host it is
// wrong by as much on purpose (csrc/emulation), so that tests see what the bounds of their users are worth.
//
// Subnormal numbers are zero, as operands and as results.
#pragma once

#include "launch.h"

namespace hfac {

#if defined(HFAC_DEVICE_COMPILER)
HFAC_DEVICE float approximate_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HFAC_DEVICE float approximate_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
HFAC_DEVICE float approximate_root(float x) {
  const float flushed = emulation::flushed(x);
  return emulation::nearly(sqrt(static_cast<double>(flushed)), flushed);
}
HFAC_DEVICE float approximate_inverse(float x) {
  const float flushed = emulation::flushed(x);
  return emulation::nearly(1 / static_cast<double>(flushed), flushed);
}
#endif

}  // namespace hfac
