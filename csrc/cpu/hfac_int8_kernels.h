// H-Fac with a whole first moment in 8 bits on contiguous rows: the update, a second read of the gradient after
// `hfac_stats`. Two divisions and a root per element beside the 8 bytes that a bfloat16 parameter takes here.
#pragma once

#include "../common/math/hfac.h"
#include "kernels.h"
#include "simd_io.h"

namespace hfac {
namespace HFAC_LEVEL {

// As many codes as a vector has lanes, as whole numbers of the lanes' size.
template <class T>
struct Codes {
  using V = Vec<T>;
  using Int = typename V::IntPart;
  typedef int8_t Packed __attribute__((vector_size(V::kPartLanes)));

  Int part[V::kParts];

  static HFAC_HD Codes load(const int8_t* p) {
    Codes q;
#if defined(__x86_64__)  // compilers take conversions of bytes apart
    if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
      q.part[0] = (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
      for (int k = 0; k < 2; ++k) {
        q.part[k] = (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * k)));
      }
#else
      const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      const __m128i half[2] = {_mm_unpacklo_epi8(all, all), _mm_unpackhi_epi8(all, all)};
      for (int k = 0; k < 2; ++k) {
        q.part[2 * k] = (Int)_mm_srai_epi32(_mm_unpacklo_epi16(half[k], half[k]), 24);
        q.part[2 * k + 1] = (Int)_mm_srai_epi32(_mm_unpackhi_epi16(half[k], half[k]), 24);
      }
#endif
      return q;
    }
#endif
    HFAC_EACH_PART {
      Packed packed;
      memcpy(&packed, p + k * V::kPartLanes, sizeof(packed));
      q.part[k] = __builtin_convertvector(packed, Int);
    }
    return q;
  }

  HFAC_HD void store(int8_t* p) const {
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
      const __m128i all = _mm512_cvtepi32_epi8((__m512i)part[0]);
#elif defined(__AVX2__)
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)part[0], (__m256i)part[1]), 0xd8);
      const __m128i all = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
      const __m128i all = _mm_packs_epi16(_mm_packs_epi32((__m128i)part[0], (__m128i)part[1]),
                                          _mm_packs_epi32((__m128i)part[2], (__m128i)part[3]));
#endif
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), all);
      return;
    }
#endif
    HFAC_EACH_PART {
      const Packed packed = __builtin_convertvector(part[k], Packed);
      memcpy(p + k * V::kPartLanes, &packed, sizeof(packed));
    }
  }

  HFAC_HD Vec<T> numbers() const {
    Vec<T> q;
    HFAC_EACH_PART q.part[k] = __builtin_convertvector(part[k], typename V::Part);
    return q;
  }
};

// |what codes stand for|: q^2 / (127.5^2 - q^2).
template <class T>
HFAC_HD Vec<T> decoded_size(Vec<T> q) {
  const Vec<T> square = q * q;
  return square / (Vec<T>(T(127.5 * 127.5)) - square);
}

// `size` with the sign of `sign`.
template <class T>
HFAC_HD Vec<T> with_sign(Vec<T> size, Vec<T> sign) {
  using V = Vec<T>;
  HFAC_EACH_PART {
    const auto bit = (typename V::IntPart)sign.part[k] & sign_bit<T>();
    size.part[k] = (typename V::Part)((typename V::IntPart)size.part[k] | bit);
  }
  return size;
}

// The lesser of two, or b where one is no number.
template <class Part>
HFAC_HD Part lesser(Part a, Part b) {
#if defined(__x86_64__)
  if constexpr (sizeof(a[0]) == 4) return (Part)HFAC_INTRINSIC(min_ps)(a, b);
#endif
  return a < b ? a : b;
}

// Where |x| lies among the codes, before it is rounded to one: y^2, of which 127.5 times the root is the code.
template <class T>
HFAC_HD Vec<T> squared_level(Vec<T> x) {
  const Vec<T> size = magnitude(x);
  return size / (Vec<T>(T(1)) + size);
}

// The codes of `x`, whose squared level is given, after `q`, which stood for a number of the size `was`. Where a code
// would stay although |x| is smaller it goes one towards zero.
template <class T>
HFAC_HD Codes<T> encoded(Vec<T> x, Vec<T> level, Vec<T> q, Vec<T> was) {
  using Part = typename Vec<T>::Part;
  using Int = typename Vec<T>::IntPart;
  // Adding 1.5 times the first number whose neighbours are whole leaves whole numbers, rounded to the nearest, ties to
  // even, in the lowest bits.
  const Vec<T> whole(sizeof(T) == 4 ? T(12582912) : T(6755399441055744));
  const Vec<T> size = magnitude(x), kept = q + whole, scaled = Vec<T>(T(127.5)) * level;
  Codes<T> out;
  HFAC_EACH_PART {
    const Int sign = (Int)x.part[k] & sign_bit<T>();
    const Part at_most = lesser(T(127) - Part{}, scaled.part[k]);
    Part code = (Part)((Int)at_most | sign) + whole.part[k];
    const Int stays = (Int)(code == kept.part[k]) & (Int)(size.part[k] < was.part[k]);
    code -= (Part)(((Int)(T(1) - Part{}) | sign) & stays);
    out.part[k] = ((Int)code - (Int)whole.part[k]) & (Int)(code == code);  // 0 for NaN
  }
  return out;
}

// How far on a prefetch is, in bytes, where `left` elements of its row are left: past the row's end it is for the row R
// further on.
template <int R>
HFAC_HD int64_t ahead(int64_t left, int64_t stride, int64_t bytes) {
  return kAhead + (left > kAhead / bytes ? 0 : (R - 1) * stride * bytes);
}

// R vectors of as many rows at once. Each step of the way is taken for all of them before the next: what follows a
// division or a root waits for it, and a processor looks only so far ahead.
template <class T, int R>
struct HfacInt8 {
  Vec<T> g[R], w[R];
  Codes<T> codes[R];

  HFAC_HD void step(const T* first, const T* row_scale, Vec<T> unit, Vec<T> scale, const HfacUpdate<T>& a) {
    const Vec<T> beta1(a.beta1), lr(a.step), decay(a.decay);
    Vec<T> q[R], was[R], x[R], level[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      q[r] = codes[r].numbers();
      was[r] = decoded_size(q[r]);
      g[r] = g[r] * scale * Vec<T>(row_scale[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = Vec<T>(first[r]) * unit * with_sign(was[r], q[r]) + g[r];
      level[r] = squared_level(x[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      level[r] = root(level[r]);
      w[r] = hfac_int8_update(w[r], x[r], g[r], beta1, lr, decay);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) codes[r] = encoded(x[r], level[r], q[r], was[r]);
  }
};

template <class T, class Sw, class Sg, int R>
HFAC_HD void hfac_int8_rows(const HfacUpdate<T>& given, int64_t i) {
  constexpr int64_t L = Vec<T>::kLanes;
  const HfacUpdate<T> a = given;  // a code may lie anywhere, for all that the compiler knows
  const Sg* g[R];
  Sw* w[R];
  int8_t* q[R];
  T first[R], row_scale[R];
  for (int r = 0; r < R; ++r) {
    g[r] = static_cast<const Sg*>(a.grad) + (i + r) * a.grad_stride;
    w[r] = static_cast<Sw*>(a.param) + (i + r) * a.param_stride;
    q[r] = a.codes + (i + r) * a.cols;
    first[r] = a.row_first[i + r];
    row_scale[r] = a.row_scale[i + r];
  }
  HfacInt8<T, R> x;
  int64_t j = 0;
  for (; j + L <= a.cols; j += L) {
    // All loads before the first store: of rows that lie 4096 bytes apart one would wait for a store to the other.
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(g[r] + j) + ahead<R>(a.cols - j, a.grad_stride, sizeof(Sg)));
      __builtin_prefetch(reinterpret_cast<const char*>(w[r] + j) + ahead<R>(a.cols - j, a.param_stride, sizeof(Sw)), 1);
      __builtin_prefetch(reinterpret_cast<const char*>(q[r] + j) + ahead<R>(a.cols - j, a.cols, 1), 1);
      x.g[r] = load(g[r] + j);
      x.w[r] = load(static_cast<const Sw*>(w[r] + j));
      x.codes[r] = Codes<T>::load(q[r] + j);
    }
    x.step(first, row_scale, load(a.col_first + j), load(a.col_scale + j), a);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(w[r] + j, x.w[r]);
      x.codes[r].store(q[r] + j);
    }
  }
  if (const int64_t left = a.cols - j; left > 0) {
    int8_t lanes[L] = {};
    for (int r = 0; r < R; ++r) {
      x.g[r] = load_part<T>(g[r] + j, left);
      x.w[r] = load_part<T>(w[r] + j, left);
      memcpy(lanes, q[r] + j, static_cast<size_t>(left));
      x.codes[r] = Codes<T>::load(lanes);
    }
    x.step(first, row_scale, load_part<T>(a.col_first + j, left), load_part<T>(a.col_scale + j, left), a);
    for (int r = 0; r < R; ++r) {
      store_part(w[r] + j, x.w[r], left);
      x.codes[r].store(lanes);
      memcpy(q[r] + j, lanes, static_cast<size_t>(left));
    }
  }
}

template <class T, class Sw, class Sg>
void hfac_int8(const HfacUpdate<T>& a) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= a.rows; i += kRowsAtOnce) hfac_int8_rows<T, Sw, Sg, kRowsAtOnce>(a, i);
  for (; i < a.rows; ++i) hfac_int8_rows<T, Sw, Sg, 1>(a, i);
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
