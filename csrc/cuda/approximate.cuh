// Arithmetic that a GPU does fast and not to the bit, each off by 2 units in the last place at most. On the host it is
// wrong by as much on purpose (csrc/emulation), so that tests see what the bounds of their users are worth.
//
// Subnormal numbers are zero, as operands and as results.
#pragma once

#include "launch.h"

namespace hfac {

HFAC_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

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
// The compiler is not to form x again wherever it is used: from step scalars, in double, that is ten times the work.
HFAC_DEVICE void keep(float& x) { asm volatile("" : "+f"(x)); }
HFAC_DEVICE void keep(int& x) { asm volatile("" : "+r"(x)); }
#else
HFAC_DEVICE float approximate_root(float x) {
  const float flushed = emulation::flushed(x);
  return emulation::nearly(sqrt(static_cast<double>(flushed)), flushed);
}
HFAC_DEVICE float approximate_inverse(float x) {
  const float flushed = emulation::flushed(x);
  return emulation::nearly(1 / static_cast<double>(flushed), flushed);
}
HFAC_DEVICE void keep(float&) {}
HFAC_DEVICE void keep(int&) {}
#endif
HFAC_DEVICE void keep(double&) {}

}  // namespace hfac
