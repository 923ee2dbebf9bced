// H-Fac with a whole first moment in 8 bits on contiguous rows: the update, a second read of the gradient after
// `hfac_stats`. Arithmetic limits it: a division, a root and some thirty operations per element beside the 8 bytes that
// a bfloat16 parameter takes here.
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

  // The lowest byte of each.
  HFAC_HD void store(int8_t* p) const {
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
      const __m128i all = _mm512_cvtepi32_epi8((__m512i)part[0]);
#elif defined(__AVX2__)
      const __m256i low = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
      const __m256i high = _mm256_setr_epi32(-1, 0x0c080400, -1, -1, -1, 0x0c080400, -1, -1);
      const __m256i fours =
          _mm256_or_si256(_mm256_shuffle_epi8((__m256i)part[0], low), _mm256_shuffle_epi8((__m256i)part[1], high));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
      const __m128i all = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(fours, order));
#else
      const __m128i byte = _mm_set1_epi32(0xff);
      const __m128i all = _mm_packus_epi16(
          _mm_packs_epi32(_mm_and_si128((__m128i)part[0], byte), _mm_and_si128((__m128i)part[1], byte)),
          _mm_packs_epi32(_mm_and_si128((__m128i)part[2], byte), _mm_and_si128((__m128i)part[3], byte)));
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

// `size` with the sign of `sign`.
template <class T>
HFAC_HD Vec<T> with_sign(Vec<T> size, Vec<T> sign) {
  using V = Vec<T>;
  using Int = typename V::IntPart;
  HFAC_EACH_PART {
#if defined(__AVX512F__)  // one instruction, which compilers do not find
    const Int mask = sign_bit<T>() - Int{};
    size.part[k] = (typename V::Part)_mm512_ternarylogic_epi64((__m512i)mask, (__m512i)sign.part[k],
                                                               (__m512i)size.part[k], 0b11101010);
#else
    const auto bit = (Int)sign.part[k] & sign_bit<T>();
    size.part[k] = (typename V::Part)((Int)size.part[k] | bit);
#endif
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

// |y|, but at most 2^60, whose product with what it is divided by stays finite; of NaN also 2^60.
template <class T>
HFAC_HD Vec<T> limited(Vec<T> y) {
  constexpr T kMost = T(int64_t{1} << 60);
#if defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4) {
    y.part[0] = (typename Vec<T>::Part)_mm512_range_ps(y.part[0], _mm512_set1_ps(kMost), 0b1010);
    return y;
  }
#endif
  y = magnitude(y);
  HFAC_EACH_PART y.part[k] = lesser(y.part[k], kMost - typename Vec<T>::Part{});
  return y;
}

// To the nearest whole number, ties to even; what is no number becomes one whose lowest byte is 0.
template <class T>
HFAC_HD typename Vec<T>::IntPart nearest(typename Vec<T>::Part x) {
  using Int = typename Vec<T>::IntPart;
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return (Int)HFAC_INTRINSIC(cvtps_epi32)(x);
#endif
  // Adding 1.5 times the first number whose neighbours are whole leaves whole numbers in the lowest bits.
  const typename Vec<T>::Part whole = T(sizeof(T) == 4 ? T(12582912) : T(6755399441055744)) - typename Vec<T>::Part{};
  const auto sum = x + whole;
  return ((Int)sum - (Int)whole) & (Int)(sum == sum);
}

// The most that the code of y / (127.5^2 - q^2) may be, beside its sign: 127, or, where x has q's sign and is smaller
// than what q stands for, one less than |q|. `growth` is |y| - q^2.
template <class T>
HFAC_HD Vec<T> largest_code(Vec<T> y, Vec<T> q, Vec<T> growth) {
  using Part = typename Vec<T>::Part;
  using Int = typename Vec<T>::IntPart;
  Vec<T> most(T(127));
  const Vec<T> less = magnitude(q) - Vec<T>(T(1));
  HFAC_EACH_PART {
#if defined(__AVX512DQ__)
    const __m512i shrinks =
        _mm512_ternarylogic_epi64((__m512i)growth.part[k], (__m512i)y.part[k], (__m512i)q.part[k], 0b10010000);
    if constexpr (sizeof(T) == 4) {
      most.part[k] =
          (Part)_mm512_mask_mov_ps((__m512)most.part[k], _mm512_movepi32_mask(shrinks), (__m512)less.part[k]);
    } else {
      most.part[k] =
          (Part)_mm512_mask_mov_pd((__m512d)most.part[k], _mm512_movepi64_mask(shrinks), (__m512d)less.part[k]);
    }
#else
    const Int shrinks = (Int)growth.part[k] & ~((Int)y.part[k] ^ (Int)q.part[k]);
    most.part[k] = shrinks < 0 ? less.part[k] : most.part[k];
#endif
  }
  return most;
}

// Rows on their way at once: with four, most of what is on its way would lie on the stack.
constexpr int64_t kCodeRows = 2;

// How far on a prefetch is, in bytes, where `left` elements of its row are left: past the row's end it is for the row R
// further on.
template <int R>
HFAC_HD int64_t ahead(int64_t left, int64_t stride, int64_t bytes) {
  return kAhead + (left > kAhead / bytes ? 0 : (R - 1) * stride * bytes);
}

// A vector of each of R rows on its way through a step, in three parts that end with the start of a division, of a
// root, and the codes: what follows a division or a root waits for it, and a processor looks only so far ahead.
//
// With y = x D, D = 127.5^2 - q^2, what is held of x is q |q| / D and |x| / (1 + |x|) is |y| / (D + |y|), so that one
// division serves both, by the product of D and D + |y|.
template <class T, int R>
struct HfacInt8 {
  Vec<T> g[R], w[R], y[R], most[R], rest[R], ratio[R], sum[R];
  Codes<T> codes[R];

  static constexpr T kSquare = T(127.5 * 127.5);

  HFAC_HD void begin(const T* first, const T* row_scale, Vec<T> unit, Vec<T> scale) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> q = codes[r].numbers(), square = q * q, whole(kSquare);
      rest[r] = whole - square;
      g[r] = g[r] * scale * Vec<T>(row_scale[r]);
      y[r] = Vec<T>(first[r]) * unit * with_sign(square, q) + g[r] * rest[r];
      const Vec<T> growth = limited(y[r]) - square;
      sum[r] = growth + (y[r] * Vec<T>(T(0)) + whole);  // NaN where y is infinite: what is not finite has code 0
      ratio[r] = whole / (rest[r] * sum[r]);
      most[r] = largest_code(y[r], q, growth);
    }
  }
  HFAC_HD void update(Vec<T> held, Vec<T> step, Vec<T> decay) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      ratio[r] = y[r] * ratio[r];
      rest[r] = root(magnitude(ratio[r] * rest[r]));
      w[r] = w[r] - ((held * (ratio[r] * sum[r]) + step * g[r]) + decay * w[r]);
    }
  }
  HFAC_HD void encode() {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      HFAC_EACH_PART rest[r].part[k] = lesser(most[r].part[k], rest[r].part[k]);
      const Vec<T> code = with_sign(rest[r], y[r]);
      HFAC_EACH_PART codes[r].part[k] = nearest<T>(code.part[k]);
    }
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
  const Vec<T> held(a.beta1 * a.step / HfacInt8<T, R>::kSquare), step(a.step), decay(a.decay);
  const auto read = [&](int64_t j, HfacInt8<T, R>& x) __attribute__((always_inline)) {
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
  };
  const auto write = [&](int64_t j, HfacInt8<T, R>& x) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(w[r] + j, x.w[r]);
      x.codes[r].store(q[r] + j);
    }
  };
  HfacInt8<T, R> x;
  int64_t j = 0;
#if HFAC_REGISTER > 32  // 32 registers hold two vectors on their way
  if (j + L <= a.cols) {
    read(j, x);
    x.begin(first, row_scale, load(a.col_first + j), load(a.col_scale + j));
    for (; j + 2 * L <= a.cols; j += L) {
      HfacInt8<T, R> next;
      read(j + L, next);
      x.update(held, step, decay);
      next.begin(first, row_scale, load(a.col_first + j + L), load(a.col_scale + j + L));
      x.encode();
      write(j, x);
      x = next;
    }
    x.update(held, step, decay);
    x.encode();
    write(j, x);
    j += L;
  }
#else
  for (; j + L <= a.cols; j += L) {
    read(j, x);
    x.begin(first, row_scale, load(a.col_first + j), load(a.col_scale + j));
    x.update(held, step, decay);
    x.encode();
    write(j, x);
  }
#endif
  if (const int64_t left = a.cols - j; left > 0) {
    int8_t lanes[L] = {};
    for (int r = 0; r < R; ++r) {
      x.g[r] = load_part<T>(g[r] + j, left);
      x.w[r] = load_part<T>(w[r] + j, left);
      memcpy(lanes, q[r] + j, static_cast<size_t>(left));
      x.codes[r] = Codes<T>::load(lanes);
    }
    x.begin(first, row_scale, load_part<T>(a.col_first + j, left), load_part<T>(a.col_scale + j, left));
    x.update(held, step, decay);
    x.encode();
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
  for (; i + kCodeRows <= a.rows; i += kCodeRows) hfac_int8_rows<T, Sw, Sg, kCodeRows>(a, i);
  for (; i < a.rows; ++i) hfac_int8_rows<T, Sw, Sg, 1>(a, i);
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
