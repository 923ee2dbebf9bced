// 64 bytes of float or double as one value, whatever the width of the registers.
//
// Every level has the same lanes, 16 of float and 8 of double, and adds them up in the same order, which is why SSE2,
// AVX2 and AVX-512 give the same bits. Arithmetic is written in GNU vector extensions; intrinsics stand only where
// those have no word.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/math/roots.h"
#include "../common/math/storage.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Bytes of a register, and the intrinsic of that size.
#if defined(__AVX512F__)
#define HFAC_REGISTER 64
#define HFAC_INTRINSIC(name) _mm512_##name
#elif defined(__AVX2__)
#define HFAC_REGISTER 32
#define HFAC_INTRINSIC(name) _mm256_##name
#else
#define HFAC_REGISTER 16
#define HFAC_INTRINSIC(name) _mm_##name
#endif

#define HFAC_EACH_PART _Pragma("GCC unroll 4") for (int k = 0; k < Vec<T>::kParts; ++k)

namespace hfac {
namespace HFAC_LEVEL {

template <class T>
struct Vec {
  static constexpr int kLanes = 64 / sizeof(T);
  static constexpr int kParts = 64 / HFAC_REGISTER;
  static constexpr int kPartLanes = kLanes / kParts;
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Part __attribute__((vector_size(HFAC_REGISTER)));
  typedef Int IntPart __attribute__((vector_size(HFAC_REGISTER)));

  Part part[kParts];

  HFAC_HD Vec() {}
  HFAC_HD explicit Vec(T x) { HFAC_EACH_PART part[k] = x - Part{}; }
};

#define HFAC_OPERATOR(op)                              \
  template <class T>                                   \
  HFAC_HD Vec<T> operator op(Vec<T> a, Vec<T> b) {     \
    HFAC_EACH_PART a.part[k] = a.part[k] op b.part[k]; \
    return a;                                          \
  }
HFAC_OPERATOR(+)
HFAC_OPERATOR(-)
HFAC_OPERATOR(*)
HFAC_OPERATOR(/)
#undef HFAC_OPERATOR

template <class T>
HFAC_HD Vec<T> root(Vec<T> a) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
    HFAC_EACH_PART a.part[k] = HFAC_INTRINSIC(sqrt_ps)(a.part[k]);
  } else {
    HFAC_EACH_PART a.part[k] = HFAC_INTRINSIC(sqrt_pd)(a.part[k]);
  }
#else
  HFAC_EACH_PART for (int l = 0; l < Vec<T>::kPartLanes; ++l) a.part[k][l] = root(a.part[k][l]);
#endif
  return a;
}

template <class T>
HFAC_HD typename Vec<T>::Int sign_bit() {
  return static_cast<typename Vec<T>::Int>(sizeof(T) == 4 ? INT32_MIN : INT64_MIN);
}

template <class T>
HFAC_HD Vec<T> magnitude(Vec<T> a) {
  using V = Vec<T>;
  HFAC_EACH_PART a.part[k] = (typename V::Part)((typename V::IntPart)a.part[k] & ~sign_bit<T>());
  return a;
}

// A mask that flips every sign (or none), for `flip`.
template <class T>
HFAC_HD typename Vec<T>::Int flip_mask(bool flip) {
  return flip ? sign_bit<T>() : 0;
}

template <class T>
HFAC_HD Vec<T> flip(Vec<T> a, typename Vec<T>::Int mask) {
  using V = Vec<T>;
  HFAC_EACH_PART a.part[k] = (typename V::Part)((typename V::IntPart)a.part[k] ^ mask);
  return a;
}

// Lane l is negated where bit l is 1.
template <class T>
HFAC_HD Vec<T> flip_where(Vec<T> a, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i u = _mm512_castps_si512(a.part[0]);
    a.part[0] = _mm512_castsi512_ps(
        _mm512_mask_xor_epi32(u, static_cast<__mmask16>(bits), u, _mm512_set1_epi32(sign_bit<float>())));
  } else {
    const __m512i u = _mm512_castpd_si512(a.part[0]);
    a.part[0] = _mm512_castsi512_pd(
        _mm512_mask_xor_epi64(u, static_cast<__mmask8>(bits), u, _mm512_set1_epi64(sign_bit<double>())));
  }
#else
  using V = Vec<T>;
  typename V::IntPart lane_bit;
  for (int l = 0; l < V::kPartLanes; ++l) lane_bit[l] = typename V::Int(1) << l;
  HFAC_EACH_PART {
    const typename V::IntPart mine = lane_bit & static_cast<typename V::Int>(bits >> (k * V::kPartLanes));
    a.part[k] = (typename V::Part)((typename V::IntPart)a.part[k] ^ ((mine != 0) & sign_bit<T>()));
  }
#endif
  return a;
}

// Bit l is 1 where lane l is greater than zero.
template <class T>
HFAC_HD uint32_t positive_bits(Vec<T> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(a.part[0], _mm512_setzero_ps(), _CMP_GT_OQ);
  } else {
    return _mm512_cmp_pd_mask(a.part[0], _mm512_setzero_pd(), _CMP_GT_OQ);
  }
#else
  uint32_t bits = 0;
  HFAC_EACH_PART {
    const auto positive = a.part[k] > 0;
    uint32_t mine = 0;
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
      mine = static_cast<uint32_t>(HFAC_INTRINSIC(movemask_ps)((typename Vec<T>::Part)positive));
    } else {
      mine = static_cast<uint32_t>(HFAC_INTRINSIC(movemask_pd)((typename Vec<T>::Part)positive));
    }
#else
    for (int l = 0; l < Vec<T>::kPartLanes; ++l) mine |= (positive[l] ? 1u : 0u) << l;
#endif
    bits |= mine << (k * Vec<T>::kPartLanes);
  }
  return bits;
#endif
}

// Sum of the lanes: l and l + half are added until one is left.
template <class T>
HFAC_HD T sum(Vec<T> a) {
  using V = Vec<T>;
  typedef T Quarter __attribute__((vector_size(16)));
  Quarter q[4];
  memcpy(q, a.part, 64);
  const Quarter x = (q[0] + q[2]) + (q[1] + q[3]);
  static_assert(V::kLanes == 16 || V::kLanes == 8, "64 bytes");
  if constexpr (sizeof(T) == 4) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    return x[0] + x[1];
  }
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
