// How kernels reach their elements, by name, and which way serves an item.
#pragma once

#include "table.h"

namespace hfac {

// How a kernel reaches its elements: types known when it was compiled and 16-byte accesses, or anything at all. The
// later ones store more than one rounding to the nearest: bfloat16 stochastically, or with 16 or 8 bits beside it, each
// also with float gradients; or anything at all.
enum class Access {
  kFloat,
  kBFloat16,
  kFloat16,
  kBFloat16Float,
  kFloatBFloat16,
  kAny,
  kDouble,
  kDrawn,
  kDrawnFloat,
  kSplit,
  kSplitFloat,
  kSplit8,
  kSplit8Float,
  kStored
};
constexpr int kAccesses = static_cast<int>(Access::kStored) + 1;
// Row lengths of H-Fac's statistics: held in registers, read again from L1, sums in memory.
enum class Width { kNarrow, kRegisters, kWide };

inline const char* name_of(Access access) {
  static const char* const names[] = {"float32",
                                      "bfloat16",
                                      "float16",
                                      "bfloat16/float32",
                                      "float32/bfloat16",
                                      "any",
                                      "float64",
                                      "bfloat16 drawn",
                                      "bfloat16 drawn/float32",
                                      "bfloat16+int16",
                                      "bfloat16+int16/float32",
                                      "bfloat16+int8",
                                      "bfloat16+int8/float32",
                                      "any stored"};
  return names[static_cast<int>(access)];
}

inline const char* name_of(Width width) {
  static const char* const names[] = {"narrow", "registers", "wide"};
  return names[static_cast<int>(width)];
}

inline bool is_double(const DeviceItem& it) { return static_cast<DType>(it.param.dtype) == DType::kFloat64; }

// A vector's random bits are one draw where it begins at a multiple of eight in the whole parameter.
inline Access stored_access(const DeviceItem& it, bool bulk) {
  const auto param = static_cast<DType>(it.param.dtype), grad = static_cast<DType>(it.grad.dtype);
  if (!bulk || param != DType::kBFloat16 || (grad != DType::kBFloat16 && grad != DType::kFloat32)) {
    return Access::kStored;
  }
  const bool wide = grad == DType::kFloat32, one_draw = it.storage.layout < 0 && it.storage.first % kVector == 0;
  const auto low = static_cast<Low>(it.storage.low.dtype);
  if (low == Low::kInt16) return wide ? Access::kSplitFloat : Access::kSplit;  // exact: bits do not matter
  if (it.storage.stochastic && !one_draw) return Access::kStored;
  if (low == Low::kInt8) return wide ? Access::kSplit8Float : Access::kSplit8;
  return wide ? Access::kDrawnFloat : Access::kDrawn;
}

inline Access pair_access(const DeviceItem& it, bool bulk) {
  constexpr auto f32 = static_cast<int32_t>(DType::kFloat32), bf16 = static_cast<int32_t>(DType::kBFloat16),
                 f16 = static_cast<int32_t>(DType::kFloat16);
  if (is_double(it)) return Access::kDouble;
  if (is_stored(it)) return stored_access(it, bulk);
  const int32_t w = it.param.dtype, g = it.grad.dtype;
  if (!bulk) return Access::kAny;
  if (w == f32 && g == f32) return Access::kFloat;
  if (w == bf16 && g == bf16) return Access::kBFloat16;
  if (w == f16 && g == f16) return Access::kFloat16;
  if (w == bf16 && g == f32) return Access::kBFloat16Float;
  if (w == f32 && g == bf16) return Access::kFloatBFloat16;
  return Access::kAny;
}

inline Access grad_access(const DeviceItem& it, bool bulk) {
  if (is_double(it)) return Access::kDouble;
  if (!bulk) return Access::kAny;
  switch (static_cast<DType>(it.grad.dtype)) {
    case DType::kFloat32:
      return Access::kFloat;
    case DType::kBFloat16:
      return Access::kBFloat16;
    case DType::kFloat16:
      return Access::kFloat16;
    default:
      return Access::kAny;
  }
}

inline Access state_access(const DeviceItem& it) { return is_double(it) ? Access::kDouble : Access::kAny; }

inline Width width_of(const DeviceItem& it, Access access) {
  if (it.cols <= kStatsNarrow) return Width::kNarrow;
  const bool bulk = access != Access::kAny && access != Access::kDouble;
  return it.cols <= kStatsRegisters && bulk ? Width::kRegisters : Width::kWide;
}

}  // namespace hfac
