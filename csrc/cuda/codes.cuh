// H-Fac's first moment in codes of 8 bits (hfac/codes.py), eight neighbouring elements at a time.
//
// A code q is held as the byte q + 128, which the lowest byte of the number kRound + q is too: adding kRound to a
// number rounds it to the nearest whole one, ties to even, and leaves its byte there.
#pragma once

#include "../common/math/hfac.h"
#include "approximate.cuh"
#include "stored.cuh"

namespace hfac {

using common::root;

template <class T>
constexpr T kRound = sizeof(T) == sizeof(float) ? T(12582912 + 128) : T(6755399441055744 + 128);
constexpr uint32_t kBias = 0x80808080u;  // of four codes that are kept as signed bytes

// In shared memory: what all 256 bytes stand for, made by the block's threads: a division for each, where arithmetic
// would take one per element. A warp's codes lie in 32 banks, 8 of these to each.
template <class T>
struct CodeTable {
  T number[256];
  T round, one;
};

// Constants of the loop in registers, which are read from memory so that the compiler does not know them: an
// instruction has room for one number, and so it would bring others of the same instruction anew for every element.
template <class T>
struct CodeConstants {
  T round, one;  // kRound, 1
  HFAC_DEVICE explicit CodeConstants(const CodeTable<T>& table) : round(table.round), one(table.one) {}
};

// The same of what a block shares, which has a table where there are codes.
template <class T, bool kCodes>
struct Constants {
  template <class Shared>
  HFAC_DEVICE explicit Constants(const Shared&) {}
};
template <class T>
struct Constants<T, true> : CodeConstants<T> {
  template <class Shared>
  HFAC_DEVICE explicit Constants(const Shared& shared) : CodeConstants<T>(shared.table) {}
};

template <class T>
HFAC_DEVICE void make_table(CodeTable<T>& table) {
  static_assert(kTileThreads == 256, "one byte for each thread");
  const T q = static_cast<T>(static_cast<int>(threadIdx.x) - 128), size = q < T(0) ? -q : q;
  table.number[threadIdx.x] = q * size / (T(127.5 * 127.5) - q * q);
  if (threadIdx.x == 0) {
    table.round = kRound<T>;
    table.one = T(1);
  }
}

// Eight codes, as they lie in memory or biased.
struct Codes {
  uint32_t word[kVector / 4];
};
// From one to the other, and back.
HFAC_DEVICE Codes biased(const Codes& codes) { return {{codes.word[0] ^ kBias, codes.word[1] ^ kBias}}; }

// Where a parameter's codes lie: whole aligned vectors, or anything.
template <class A>
struct CodesAt {
  int8_t* data;
  const int64_t* layout;  // null: row-major
  HFAC_DEVICE CodesAt(const Arguments& a, const DeviceItem& it)
      : data(global(static_cast<int8_t*>(it.codes))),
        layout(A::kWhole || it.codes_layout < 0 ? nullptr : a.layouts + it.codes_layout) {}

  HFAC_DEVICE int8_t& at(int64_t index) const { return data[layout ? offset_of(layout, index) : index]; }
  HFAC_DEVICE Codes load(int64_t first, int count) const {
    if constexpr (A::kWhole) {
      const uint2 both = *reinterpret_cast<const uint2*>(data + first);
      return {{both.x, both.y}};
    }
    Codes codes{};
    HFAC_UNROLLED (k, kVector) {
      if (k < count) codes.word[k / 4] |= uint32_t{static_cast<uint8_t>(at(first + k))} << k % 4 * 8;
    }
    return codes;
  }
  HFAC_DEVICE void store(int64_t first, int count, const Codes& codes) const {
    if constexpr (A::kWhole) {
      *reinterpret_cast<uint2*>(data + first) = make_uint2(codes.word[0], codes.word[1]);
      return;
    }
    HFAC_UNROLLED (k, kVector) {
      if (k < count) at(first + k) = static_cast<int8_t>(codes.word[k / 4] >> k % 4 * 8 & 0xffu);
    }
  }
};

HFAC_DEVICE uint32_t low_word(float x) { return bits_of(x); }
HFAC_DEVICE uint32_t low_word(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint32_t>(bits);
}

HFAC_DEVICE float lesser(float x, float most) { return fminf(x, most); }
HFAC_DEVICE double lesser(double x, double most) { return fmin(x, most); }
HFAC_DEVICE float with_sign(float size, float sign) { return copysignf(size, sign); }
HFAC_DEVICE double with_sign(double size, double sign) { return copysign(size, sign); }
// x, or 0 where it is NaN; of an x that is not negative.
HFAC_DEVICE float or_zero(float x) { return fmaxf(x, 0.0f); }
HFAC_DEVICE double or_zero(double x) { return fmax(x, 0.0); }

// sqrt(s / (1 + s)) + zero for s of 0 to 126, and NaN for some s below 1e-37, whose code is 0 as that of NaN is.
#ifdef HFAC_DEVICE_COMPILER
HFAC_DEVICE float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// a b + c where subnormal numbers are 0, so that it is NaN where b is the inverse root of one.
HFAC_DEVICE float fused_flushed(float a, float b, float c) {
  float x;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(x) : "f"(a), "f"(b), "f"(c));
  return x;
}
// Rounded as IEEE's quotient and root are, for whose normal operands compilers emit the same: they add a branch to each
// for the others, which take registers and keep eight elements from being worked on together.
HFAC_DEVICE float level_of(float s, float zero) {
  const float d = 1.0f + s, rough = approximate_inverse(d), part = fused(fused(-d, rough, 1.0f), rough, rough),
              first = s * part;
  const float quotient = fused(fused(-d, first, s), part, first);
  const float y = inverse_root(quotient), near = fused_flushed(quotient, y, zero);
  return fused(fused(-near, near, quotient), 0.5f * y, near);
}
// Off by some units in the last place: s / sqrt(s + s^2), with one approximate root.
HFAC_DEVICE float rough_level_of(float s, float zero) { return fused_flushed(s, inverse_root(fused(s, s, s)), zero); }
#else
HFAC_DEVICE float level_of(float s, float zero) { return root(s / (1.0f + s)) + zero; }
// As far off as a GPU's may be: its root by -2 to 2 units.
HFAC_DEVICE float rough_level_of(float s, float zero) {
  const float square = fused(s, s, s);
  if (square < 1e-37f) return static_cast<float>(NAN);
  return fused(s, emulation::nearly(1 / sqrt(static_cast<double>(square)), square), zero);
}
#endif
HFAC_DEVICE double level_of(double s, double zero) { return root(s / (1.0 + s)) + zero; }

// kRound, which is `round`, + the code of x, before it comes to rest. What is beyond 126 has the last code, as 126 has.
// `x * 0` is NaN where x is not finite, whose code is 0. `rough`: 1 of some 30,000 codes may be a neighbour.
template <class T>
HFAC_DEVICE T nearest_code(T x, bool rough, T round) {
  const T size = lesser(magnitude(x), T(126)), zero = x * T(0);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (rough) return fused(127.5f, with_sign(or_zero(rough_level_of(size, zero)), x), round);
  }
  return T(127.5) * with_sign(or_zero(level_of(size, zero)), x) + kRound<T>;
}

// The numbers that eight codes, biased, of the moment stand for go on to x = first unit number + fresh, and the codes
// with them.
template <class T>
HFAC_DEVICE void step_codes(Codes& codes, const CodeTable<T>& table, T first, const T (&unit)[kVector],
                            const T (&fresh)[kVector], const CodeConstants<T>& constants, bool rough, T (&x)[kVector]) {
  T code[kVector];
  HFAC_UNROLLED (k, kVector) {
    const uint32_t byte = codes.word[k / 4] >> k % 4 * 8 & 0xffu;
    T old;
    if constexpr (sizeof(T) == sizeof(float)) {  // the bytes of kRound + q above the lowest do not depend on q
      old = float_of(__byte_perm(codes.word[k / 4], bits_of(constants.round), 0x7650u | static_cast<unsigned>(k % 4)));
    } else {
      old = constants.round - T(128) + static_cast<T>(byte);
    }
    const T held = table.number[byte];
    x[k] = first * unit[k] * held + fresh[k];
    code[k] = nearest_code(x[k], rough, constants.round);
    // Where it would stay although |x| is smaller it goes one towards zero, or small codes would never come to rest.
    if (code[k] == old && magnitude(x[k]) < magnitude(held)) code[k] = code[k] - with_sign(constants.one, x[k]);
  }
  HFAC_UNROLLED (k, kVector / 4) {
    const uint32_t low = __byte_perm(low_word(code[4 * k]), low_word(code[4 * k + 1]), 0x0040);
    const uint32_t high = __byte_perm(low_word(code[4 * k + 2]), low_word(code[4 * k + 3]), 0x0040);
    codes.word[k] = __byte_perm(low, high, 0x5410);
  }
}

}  // namespace hfac
