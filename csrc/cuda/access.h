// How kernels reach their elements, by name, and which way serves an item.
#pragma once

#include "table.h"

namespace hfac {

// How a kernel reaches its elements: types known when it was compiled and 16-byte accesses, or anything at all. The
// later ones store more than one rounding to the nearest: bfloat16 stochastically, or with 16 or 8 bits beside it, each
// also with float gradients; or anything at all.
#define HFAC_ACCESSES(ACCESS)                   \
  ACCESS(kFloat, "float32")                     \
  ACCESS(kBFloat16, "bfloat16")                 \
  ACCESS(kFloat16, "float16")                   \
  ACCESS(kBFloat16Float, "bfloat16/float32")    \
  ACCESS(kFloatBFloat16, "float32/bfloat16")    \
  ACCESS(kAny, "any")                           \
  ACCESS(kDouble, "float64")                    \
  ACCESS(kDrawn, "bfloat16 drawn")              \
  ACCESS(kDrawnFloat, "bfloat16 drawn/float32") \
  ACCESS(kSplit, "bfloat16+int16")              \
  ACCESS(kSplitFloat, "bfloat16+int16/float32") \
  ACCESS(kSplit8, "bfloat16+int8")              \
  ACCESS(kSplit8Float, "bfloat16+int8/float32") \
  ACCESS(kStored, "any stored")
#define HFAC_ENUMERATOR(enumerator, name) enumerator,
enum class Access { HFAC_ACCESSES(HFAC_ENUMERATOR) };
#undef HFAC_ENUMERATOR
constexpr int kAccesses = static_cast<int>(Access::kStored) + 1;

inline const char* name_of(Access access) {
#define HFAC_NAME(enumerator, name) name,
  static const char* const names[] = {HFAC_ACCESSES(HFAC_NAME)};
#undef HFAC_NAME
  return names[static_cast<int>(access)];
}

inline const char* name_of(Width width) {
  static const char* const names[] = {"rows", "four", "long", "wide"};
  return names[static_cast<int>(width)];
}

// A vector's random bits are one draw where it begins at a multiple of eight in the whole parameter.
inline Access stored_access(const DeviceItem& it, bool bulk) {
  const DType param = it.param.dtype, grad = it.grad.dtype;
  if (!bulk || param != DType::kBFloat16 || (grad != DType::kBFloat16 && grad != DType::kFloat32)) {
    return Access::kStored;
  }
  const bool wide = grad == DType::kFloat32, one_draw = it.storage.layout < 0 && it.storage.first % kVector == 0;
  const Low low = it.storage.low.kind;
  if (low == Low::kInt16) return wide ? Access::kSplitFloat : Access::kSplit;  // exact: bits do not matter
  if (it.storage.stochastic && !one_draw) return Access::kStored;
  if (low == Low::kInt8) return wide ? Access::kSplit8Float : Access::kSplit8;
  return wide ? Access::kDrawnFloat : Access::kDrawn;
}

// Of whole vectors that are rounded to the nearest.
inline Access bulk_access(DType param, DType grad) {
  constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  if (param == f32 && grad == f32) return Access::kFloat;
  if (param == bf16 && grad == bf16) return Access::kBFloat16;
  if (param == f16 && grad == f16) return Access::kFloat16;
  if (param == bf16 && grad == f32) return Access::kBFloat16Float;
  if (param == f32 && grad == bf16) return Access::kFloatBFloat16;
  return Access::kAny;
}

inline Access pair_access(const DeviceItem& it, bool bulk) {
  if (is_double(it)) return Access::kDouble;
  if (is_stored(it)) return stored_access(it, bulk);
  return bulk ? bulk_access(it.param.dtype, it.grad.dtype) : Access::kAny;
}

inline Access grad_access(const DeviceItem& it, bool bulk) {
  if (is_double(it)) return Access::kDouble;
  return bulk ? bulk_access(it.grad.dtype, it.grad.dtype) : Access::kAny;
}

inline Access state_access(const DeviceItem& it) { return is_double(it) ? Access::kDouble : Access::kAny; }

// Bytes of an element of a gradient as the statistics hold it.
inline int held_bytes(Access access) {
  if (access == Access::kBFloat16 || access == Access::kFloat16) return 2;
  return access == Access::kDouble ? 8 : 4;
}

// Of long rows that are read element by element sums are in memory.
inline Width width_of(const DeviceItem& it, Access access) {
  const bool bulk = access != Access::kAny && access != Access::kDouble;
  for (const Width w : {Width::kRows, Width::kFour, Width::kLong}) {
    if (it.cols <= stats_cols(w) && (bulk || w == Width::kRows)) return w;
  }
  return Width::kWide;
}

}  // namespace hfac
