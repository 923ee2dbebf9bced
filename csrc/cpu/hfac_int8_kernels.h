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

// Rows on their way at once in registers: with four, most of what is on its way would lie on the stack.
constexpr int64_t kCodeRows = 2;

// x, or NaN where y is not finite.
template <class T>
HFAC_HD Vec<T> where_finite(Vec<T> x, Vec<T> y) {
  using Part = typename Vec<T>::Part;
#if defined(__AVX512F__)  // what becomes of NaNs and of infinities stands in four bits each
  if constexpr (sizeof(T) == 4) {
    x.part[0] = (Part)_mm512_fixupimm_ps((__m512)x.part[0], (__m512)y.part[0], _mm512_set1_epi32(0x00330022), 0);
  } else {
    x.part[0] = (Part)_mm512_fixupimm_pd((__m512d)x.part[0], (__m512d)y.part[0], _mm512_set1_epi64(0x00330022), 0);
  }
#else
  const Part zero{};
  HFAC_EACH_PART x.part[k] = x.part[k] + y.part[k] * zero;
#endif
  return x;
}

// A vector on its way through a step, in parts that can take turns with those of other vectors: what follows a division
// or a root waits for it, longer than a processor looks ahead.
//
// With y = x D, D = 127.5^2 - q^2, what is held of x is q |q| / D and |x| / (1 + |x|) is |y| / (D + |y|), so that one
// division serves both, by the product of D and D + |y|.
template <class T>
struct HfacInt8 {
  Vec<T> g, y, rest, sum, ratio;
  Vec<T> bound;  // q^2, then |y| - q^2, and from `bind` on the most that the code may be

  static constexpr T kSquare = T(127.5 * 127.5);

  HFAC_HD void decode(Vec<T> grad, Vec<T> q, Vec<T> held, Vec<T> scale, Vec<T> row_scale) {
    bound = q * q;
    rest = Vec<T>(kSquare) - bound;
    g = grad * scale * row_scale;
    y = held * with_sign(bound, q) + g * rest;
  }
  HFAC_HD void divide() {
    const Vec<T> whole(kSquare);
    bound = limited(y) - bound;
    sum = where_finite(bound + whole, y);  // what is not finite has code 0
    ratio = whole / (rest * sum);
  }
  HFAC_HD void bind(Vec<T> q) { bound = largest_code(y, q, bound); }
  // Returns the new weights; `ratio` becomes the size of the code.
  HFAC_HD Vec<T> update(Vec<T> w, Vec<T> held, Vec<T> step, Vec<T> decay) {
    const Vec<T> part = y * ratio;
    ratio = root(magnitude(part * rest));
    return w - ((held * (part * sum) + step * g) + decay * w);
  }
  HFAC_HD Codes<T> encode() const {
    Codes<T> codes;
    Vec<T> size = ratio;
    HFAC_EACH_PART size.part[k] = lesser(bound.part[k], size.part[k]);
    size = with_sign(size, y);
    HFAC_EACH_PART codes.part[k] = nearest<T>(size.part[k]);
    return codes;
  }
};

// Columns of R rows from the one at `from` on.
template <class T, class Sw, class Sg, int R>
HFAC_HD void hfac_int8_rows(const HfacUpdate<T>& given, int64_t i, int64_t from) {
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
  const Vec<T> held(a.beta1 * a.step / HfacInt8<T>::kSquare), step(a.step), decay(a.decay);
  HfacInt8<T> x[R];
  Vec<T> param[R];
  Codes<T> codes[R];
  const auto advance = [&](Vec<T> unit, Vec<T> scale) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> old = codes[r].numbers();
      x[r].decode(x[r].g, old, Vec<T>(first[r]) * unit, scale, Vec<T>(row_scale[r]));
      x[r].divide();
      x[r].bind(old);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) param[r] = x[r].update(param[r], held, step, decay);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) codes[r] = x[r].encode();
  };
  int64_t j = from;
  for (; j + L <= a.cols; j += L) {
    // All loads before the first store: of rows that lie 4096 bytes apart one would wait for a store to the other.
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t left = a.cols - j;
      __builtin_prefetch(reinterpret_cast<const char*>(g[r] + j) + along<R>(kAhead, left, a.grad_stride, sizeof(Sg)));
      __builtin_prefetch(reinterpret_cast<const char*>(w[r] + j) + along<R>(kAhead, left, a.param_stride, sizeof(Sw)),
                         1);
      __builtin_prefetch(reinterpret_cast<const char*>(q[r] + j) + along<R>(kAhead, left, a.cols, 1), 1);
      x[r].g = load(g[r] + j);
      param[r] = load(static_cast<const Sw*>(w[r] + j));
      codes[r] = Codes<T>::load(q[r] + j);
    }
    advance(load(a.col_first + j), load(a.col_scale + j));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(w[r] + j, param[r]);
      codes[r].store(q[r] + j);
    }
  }
  if (const int64_t left = a.cols - j; left > 0) {
    int8_t lanes[L] = {};
    for (int r = 0; r < R; ++r) {
      x[r].g = load_part<T>(g[r] + j, left);
      param[r] = load_part<T>(w[r] + j, left);
      memcpy(lanes, q[r] + j, static_cast<size_t>(left));
      codes[r] = Codes<T>::load(lanes);
    }
    advance(load_part<T>(a.col_first + j, left), load_part<T>(a.col_scale + j, left));
    for (int r = 0; r < R; ++r) {
      store_part(w[r] + j, param[r], left);
      codes[r].store(lanes);
      memcpy(q[r] + j, lanes, static_cast<size_t>(left));
    }
  }
}

#if HFAC_REGISTER > 16
// As many codes are made at a time as a register has bytes: numbers are packed as integers are, which keeps their
// signs, and what an old code has to say is then done for four registers at once.
constexpr int64_t kEncoded = HFAC_REGISTER;
constexpr int kBlock = kEncoded / Vec<float>::kLanes;  // vectors

// What the codes of a block are made of.
struct BlockInt8 {
  Vec<float> ratio[kBlock], y[kBlock], bound[kBlock];
};

HFAC_HD void encode_packed(const BlockInt8& x, int8_t* codes) {
  using Part = Vec<float>::Part;
  constexpr int kParts = Vec<float>::kParts;
  const auto part = [](const Vec<float>* of, int k)
                        __attribute__((always_inline)) { return of[k / kParts].part[k % kParts]; };
  // At most 127; what is no number becomes the least integer, which is packed to 0.
  const auto size = [&](int k) __attribute__((always_inline)) {
    return HFAC_INTRINSIC(cvtps_epi32)(lesser(127.0f - Part{}, part(x.ratio, k)));
  };
  const auto pair = [&](const Vec<float>* of, int k) __attribute__((always_inline)) {
    using Bytes = decltype(size(0));
    return HFAC_INTRINSIC(packs_epi32)((Bytes)part(of, k), (Bytes)part(of, k + 1));
  };
  const auto signs = [&](const Vec<float>* of) __attribute__((always_inline)) {
    return HFAC_INTRINSIC(packs_epi16)(pair(of, 0), pair(of, 2));
  };
  const auto y = signs(x.y), growth = signs(x.bound);
  auto code = HFAC_INTRINSIC(packs_epi16)(HFAC_INTRINSIC(packus_epi32)(size(0), size(1)),
                                          HFAC_INTRINSIC(packus_epi32)(size(2), size(3)));
  // Where x has q's sign and is smaller than what q stands for (`largest_code`), the code is less than |q|. What is
  // packed lies in an order of its own.
#if HFAC_REGISTER > 32
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // there and back
  const __m512i q = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
  const __m512i shrinks = _mm512_ternarylogic_epi64(growth, y, q, 0b10010000);
  const __m512i less = _mm512_add_epi8(_mm512_abs_epi8(q), _mm512_set1_epi8(-1));
  code = _mm512_mask_min_epu8(code, _mm512_movepi8_mask(shrinks), code, less);
  code = _mm512_mask_sub_epi8(code, _mm512_movepi8_mask(y), _mm512_setzero_si512(), code);
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, code));
#else
  const __m256i there = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), back = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i* const at = reinterpret_cast<__m256i*>(codes);
  const __m256i q = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(at), there);
  const __m256i shrinks = _mm256_andnot_si256(_mm256_xor_si256(y, q), growth);
  const __m256i less = _mm256_add_epi8(_mm256_abs_epi8(q), _mm256_set1_epi8(-1));
  code = _mm256_blendv_epi8(code, _mm256_min_epu8(code, less), shrinks);
  code = _mm256_sign_epi8(code, y);  // 0 where y is, as then the code is
  _mm256_storeu_si256(at, _mm256_permutevar8x32_epi32(code, back));
#endif
}

// How far on lines are asked for, in bytes: of one row at a time, and over the ends of pages, where the hardware stops
// reading ahead.
constexpr int64_t kRowAhead = 3072, kCodesAhead = 1024;

// All rows' columns before the one at `end`, a multiple of kEncoded. While a vector's root is taken, the one after it
// is divided and the next decoded, over the ends of rows: each part finds at hand what it needs, and all that is on its
// way fits the registers.
template <class Sw, class Sg>
void hfac_int8_whole(const HfacUpdate<float>& a, int64_t end) {
  constexpr int64_t L = Vec<float>::kLanes;
  const float *unit = a.col_first, *scale = a.col_scale;
  const Vec<float> held(a.beta1 * a.step / HfacInt8<float>::kSquare), step(a.step), decay(a.decay);
  // Where the next vector is decoded.
  const Sg* g;
  const int8_t* q;
  Vec<float> first, row_scale;
  const auto enter = [&](int64_t i) __attribute__((always_inline)) {
    g = static_cast<const Sg*>(a.grad) + i * a.grad_stride;
    q = a.codes + i * a.cols;
    first = Vec<float>(a.row_first[i]);
    row_scale = Vec<float>(a.row_scale[i]);
  };
  HfacInt8<float> x, next;
  const auto decode = [&](int64_t j) __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const char*>(g + j) + kRowAhead);
    next.decode(load(g + j), Codes<float>::load(q + j).numbers(), first * load(unit + j), load(scale + j), row_scale);
  };
  enter(0);
  decode(0);
  x = next;
  x.divide();
  decode(L);
  const int64_t rows = a.rows, stride = a.param_stride, cols = a.cols;
  Sw* w = static_cast<Sw*>(a.param);
  int8_t* codes = a.codes;
  for (int64_t i = 0; i < rows; ++i, w += stride, codes += cols) {
    for (int64_t j = 0; j < end; j += kEncoded) {
      const bool last = j + kEncoded == end;
      const int64_t ahead = last ? 0 : j + kEncoded;  // the next block, maybe the next row's first
      BlockInt8 block;
      __builtin_prefetch(codes + j + kCodesAhead, 1);
#pragma GCC unroll 4
      for (int k = 0; k < kBlock; ++k) {
        const int64_t at = j + k * L;
        __builtin_prefetch(reinterpret_cast<const char*>(w + at) + kRowAhead, 1);
        const Vec<float> fresh = x.update(load(static_cast<const Sw*>(w + at)), held, step, decay);
        block.ratio[k] = x.ratio;
        block.y[k] = x.y;
        block.bound[k] = x.bound;
        x = next;
        x.divide();
        if (k + 2 < kBlock) {
          decode(at + 2 * L);
        } else {
          if (k + 2 == kBlock && last && i + 1 < rows) enter(i + 1);  // behind the last row it is all decoded again
          decode(ahead + (k + 2 - kBlock) * L);
        }
        store(w + at, fresh);  // after all loads, of which one might wait for it
      }
      encode_packed(block, codes + j);
    }
  }
}
#endif

template <class T, class Sw, class Sg>
void hfac_int8(const HfacUpdate<T>& a) {
  int64_t from = 0;
#if HFAC_REGISTER > 16
  if constexpr (sizeof(T) == 4) {
    from = a.cols / kEncoded * kEncoded;
    if (from > 0) hfac_int8_whole<Sw, Sg>(a, from);
    if (from == a.cols) return;
  }
#endif
  int64_t i = 0;
  for (; i + kCodeRows <= a.rows; i += kCodeRows) hfac_int8_rows<T, Sw, Sg, kCodeRows>(a, i, from);
  for (; i < a.rows; ++i) hfac_int8_rows<T, Sw, Sg, 1>(a, i, from);
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
