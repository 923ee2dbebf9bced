// Storage types and their exact conversions. Arithmetic never happens in a 16-bit type: load, compute in float, round
// once.
#pragma once

#include <cstdint>
#include <cstring>

#include "config.h"

namespace hfac {

// The codes that Python passes; hfac/backends/cpu.py holds the same table.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kDTypes = 4;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace HFAC_LEVEL {

HFAC_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof(u));
  return u;
}

HFAC_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof(x));
  return x;
}

HFAC_HD float widen(float x) { return x; }
HFAC_HD double widen(double x) { return x; }
HFAC_HD float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

HFAC_HD float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) {  // inf, or a NaN made quiet as the hardware does
    return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  }
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float
    return float_of(sign | bits_of(static_cast<float>(mantissa) * 5.9604644775390625e-8f));
  }
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Rounded to the nearest even; every NaN becomes a quiet one. The last argument says the type only.
HFAC_HD float narrow(float x, float) { return x; }
HFAC_HD double narrow(double x, double) { return x; }
HFAC_HD BFloat16 narrow(float x, BFloat16) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return BFloat16{0x7fc0};
  return BFloat16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

HFAC_HD Float16 narrow(float x, Float16) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return Float16{static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu))};
  }
  if (magnitude >= 0x477ff000u) return Float16{static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and beyond round to inf
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the float's end
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    return Float16{static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return Float16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Calls body with a value of the type that is stored.
template <class Body>
HFAC_HD void as_stored(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
  }
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
