// Loads and stores of a `Vec` from and to each storage type. No pointer need be aligned.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hfac {
namespace HFAC_LEVEL {

// How far ahead of a loop lines are asked for, in bytes; the streams of four rows outrun the hardware's own guess.
constexpr int64_t kAhead = 512;
// What loops of this level are compiled for besides: what AMD's processors want that have AVX-512, or that have not.
constexpr int64_t kOtherAhead = HFAC_REGISTER > 32 ? kNextRows : 256;

// So far is a line of a row of which `left` elements are left: past the row's end it is for the row R further on, since
// the next one is at work too. `stride` is elements from row to row, `bytes` those of an element.
template <int R>
HFAC_HD int64_t along(int64_t ahead, int64_t left, int64_t stride, int64_t bytes) {
  return ahead + (left > ahead / bytes ? 0 : (R - 1) * stride * bytes);
}

template <class T>
HFAC_HD Vec<T> load(const T* p) {
  Vec<T> a;  // register by register: a copy of 64 bytes may go through the stack
  HFAC_EACH_PART memcpy(&a.part[k], p + k * Vec<T>::kPartLanes, HFAC_REGISTER);
  return a;
}

template <class T>
HFAC_HD void store(T* p, Vec<T> a) {
  HFAC_EACH_PART memcpy(p + k * Vec<T>::kPartLanes, &a.part[k], HFAC_REGISTER);
}

HFAC_HD Vec<float> load(const BFloat16* p) {
  Vec<float> a;
#if defined(__AVX512F__)
  // Every number to the upper half of a lane by one permutation, which widening and shifting would do by two
  // instructions.
  const __m512i raw = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i lanes = _mm512_setr_epi32(0, 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x60000, 0x70000, 0x80000,
                                          0x90000, 0xa0000, 0xb0000, 0xc0000, 0xd0000, 0xe0000, 0xf0000);
  a.part[0] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, lanes, raw));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * k));
    a.part[k] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
#elif defined(__x86_64__)
  for (int k = 0; k < 2; ++k) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * k));
    a.part[2 * k] = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), raw));
    a.part[2 * k + 1] = _mm_castsi128_ps(_mm_unpackhi_epi16(_mm_setzero_si128(), raw));
  }
#else
  for (int l = 0; l < 16; ++l) a.part[l / 4][l % 4] = widen(p[l]);
#endif
  return a;
}

// What `narrow` does, in integers; the result's 16 bits stand in the upper half.
HFAC_HD typename Vec<float>::IntPart bfloat16_bits(typename Vec<float>::Part x) {
  using Bits = typename Vec<float>::IntPart;
  typedef uint32_t Unsigned __attribute__((vector_size(HFAC_REGISTER)));
  const Unsigned u = (Unsigned)x, upper = u >> 16, negative = 0xffff8000u - Unsigned{};
  // Less -0x8000 where the last bit kept is 1, less -0x7fff where it is 0.
#if defined(__AVX512F__)  // in one instruction, which compilers do not find
  const Unsigned less =
      (Unsigned)_mm512_ternarylogic_epi32((__m512i)upper, (__m512i)negative, _mm512_set1_epi32(1), 0b11001110);
#else
  const Unsigned less = (~upper & 1u) | negative;
#endif
  const Bits rounded = (Bits)(u - less);
  const Bits nan = (x != x);
  return nan ? 0x7fc00000 - Bits{} : rounded;
}

HFAC_HD void store(BFloat16* p, Vec<float> a) {
#if defined(__AVX512F__)
  const __m512i u = (__m512i)bfloat16_bits(a.part[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_srai_epi32((__m256i)bfloat16_bits(a.part[0]), 16);
  const __m256i high = _mm256_srai_epi32((__m256i)bfloat16_bits(a.part[1]), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
#elif defined(__x86_64__)
  for (int k = 0; k < 2; ++k) {
    const __m128i low = _mm_srai_epi32((__m128i)bfloat16_bits(a.part[2 * k]), 16);
    const __m128i high = _mm_srai_epi32((__m128i)bfloat16_bits(a.part[2 * k + 1]), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * k), _mm_packs_epi32(low, high));
  }
#else
  for (int l = 0; l < 16; ++l) p[l] = narrow(a.part[l / 4][l % 4], BFloat16{});
#endif
}

HFAC_HD Vec<float> load(const Float16* p) {
  Vec<float> a;
#if defined(__AVX512F__)
  a.part[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k) {
    a.part[k] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * k)));
  }
#else
  float lanes[16];
  for (int l = 0; l < 16; ++l) lanes[l] = widen(p[l]);
  a = load(lanes);
#endif
  return a;
}

HFAC_HD void store(Float16* p, Vec<float> a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * k), _mm256_cvtps_ph(a.part[k], _MM_FROUND_TO_NEAREST_INT));
  }
#else
  float lanes[16];
  store(lanes, a);
  for (int l = 0; l < 16; ++l) p[l] = narrow(lanes[l], Float16{});
#endif
}

// Copies less than a vector's worth.
template <class S>
HFAC_HD void copy_part(S* to, const S* from, int64_t count) {
  for (int64_t l = 0; l < count; ++l) to[l] = from[l];
}

#if defined(__AVX512F__)
// Elements of 8, 4 and 2 bytes under a mask, which is what rows shorter than a vector live on.
template <class S>
HFAC_HD void read_lanes(S* lanes, const S* p, int64_t count) {
  const auto mask = static_cast<uint32_t>((1u << count) - 1u);
  if constexpr (sizeof(S) == 8) _mm512_storeu_si512(lanes, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), p));
  if constexpr (sizeof(S) == 4) _mm512_storeu_si512(lanes, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), p));
  if constexpr (sizeof(S) == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
  }
}
template <class S>
HFAC_HD void write_lanes(S* p, const S* lanes, int64_t count) {
  const auto mask = static_cast<uint32_t>((1u << count) - 1u);
  if constexpr (sizeof(S) == 8) _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(mask), _mm512_loadu_si512(lanes));
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(mask), _mm512_loadu_si512(lanes));
  if constexpr (sizeof(S) == 2) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), raw);
  }
}
#else
template <class S>
HFAC_HD void read_lanes(S* lanes, const S* p, int64_t count) {
  memset(lanes, 0, 64 / (sizeof(S) == 2 ? 2 : 1));
  copy_part(lanes, p, count);
}
template <class S>
HFAC_HD void write_lanes(S* p, const S* lanes, int64_t count) {
  copy_part(p, lanes, count);
}
#endif

// The first `count` lanes from memory, the others zero; and back.
template <class T, class S>
HFAC_HD Vec<T> load_part(const S* p, int64_t count) {
  S lanes[Vec<T>::kLanes];
  read_lanes(static_cast<S*>(lanes), p, count);
  return load(static_cast<const S*>(lanes));
}

template <class T, class S>
HFAC_HD void store_part(S* p, Vec<T> a, int64_t count) {
  S lanes[Vec<T>::kLanes];
  store(static_cast<S*>(lanes), a);
  write_lanes(p, static_cast<const S*>(lanes), count);
}

HFAC_HD uint16_t little(uint16_t x) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return __builtin_bswap16(x);
#else
  return x;
#endif
}

// One vector's sign bits: two bytes for float, one for double.
template <class T>
HFAC_HD uint32_t load_bits(const uint8_t* p) {
  if constexpr (Vec<T>::kLanes == 8) return p[0];
  uint16_t bits;
  memcpy(&bits, p, 2);
  return little(bits);
}

template <class T>
HFAC_HD void store_bits(uint8_t* p, uint32_t bits) {
  if constexpr (Vec<T>::kLanes == 8) {
    p[0] = static_cast<uint8_t>(bits);
  } else {
    const uint16_t low = little(static_cast<uint16_t>(bits));
    memcpy(p, &low, 2);
  }
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
