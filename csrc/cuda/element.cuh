// Eight neighbouring elements between memory and registers: 16-byte accesses where types are known and rows aligned,
// one element at a time, with any strides and types, where not. In registers all is T, float or double.
#pragma once

#include "../common/signs.h"
#include "launch.h"

#ifdef HFAC_DEVICE_COMPILER
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace hfac {

using common::bits_of;
using common::float_of;
using common::narrow;
using common::widen;

// Addresses come from a table in memory. Declaring them global avoids generic loads.
template <class P>
HFAC_DEVICE P* global(P* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// What another block of the same launch wrote: past any cache that is not coherent.
template <class T>
HFAC_DEVICE T load_fresh(const T* p) {
  return *static_cast<const volatile T*>(p);
}

struct alignas(16) Chunk {
  uint32_t word[4];
};

// Eight elements of type S as they lie in memory.
template <class S>
struct Raw {
  static constexpr int kChunks = static_cast<int>(sizeof(S)) * kVector / 16;
  Chunk chunk[kChunks];
};

// `last`: the line will not be read again.
HFAC_DEVICE Chunk load_chunk(const void* p, bool last) {
  const auto* from = static_cast<const uint4*>(p);
  const uint4 v = last ? __ldcs(from) : *from;
  return {{v.x, v.y, v.z, v.w}};
}

HFAC_DEVICE void store_chunk(void* p, const Chunk& c) {
  *static_cast<uint4*>(p) = make_uint4(c.word[0], c.word[1], c.word[2], c.word[3]);
}

template <class S>
HFAC_DEVICE Raw<S> load_raw(const S* p, bool last) {
  Raw<S> raw;
  HFAC_UNROLLED (c, Raw<S>::kChunks) raw.chunk[c] = load_chunk(reinterpret_cast<const char*>(p) + 16 * c, last);
  return raw;
}

template <class S>
HFAC_DEVICE void store_raw(S* p, const Raw<S>& raw) {
  HFAC_UNROLLED (c, Raw<S>::kChunks) store_chunk(reinterpret_cast<char*>(p) + 16 * c, raw.chunk[c]);
}

HFAC_DEVICE float magnitude(float x) { return fabsf(x); }
HFAC_DEVICE double magnitude(double x) { return fabs(x); }

// a b + c with one rounding, also where the compiler must not fuse.
HFAC_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
HFAC_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// x, which the compiler then has to keep: from step scalars, in double, it would work it out anew in every turn of a
// loop.
#ifdef HFAC_DEVICE_COMPILER
HFAC_DEVICE float kept(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
HFAC_DEVICE int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <class P>
HFAC_DEVICE P* kept(P* p) {
  asm volatile("" : "+l"(p));
  return p;
}
// Of an address in shared memory, which then takes one register.
template <class P>
HFAC_DEVICE P* kept_shared(P* p) {
  auto at = static_cast<unsigned>(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(at));
  return static_cast<P*>(__cvta_shared_to_generic(at));
}
// The thread's number, which no register holds until then.
HFAC_DEVICE int thread_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
#else
HFAC_DEVICE int thread_anew() { return static_cast<int>(threadIdx.x); }
HFAC_DEVICE float kept(float x) { return x; }
HFAC_DEVICE int kept(int x) { return x; }
template <class P>
HFAC_DEVICE P* kept(P* p) {
  return p;
}
template <class P>
HFAC_DEVICE P* kept_shared(P* p) {
  return p;
}
#endif
HFAC_DEVICE double kept(double x) { return x; }

// 1 / x of a positive one, rounded as IEEE's: of floats in range by what the compiler emits, in fewer instructions.
#if defined(__CUDA_ARCH__)
HFAC_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  y = fmaf(y, fmaf(-x, y, 1.0f), y);
  if (bits_of(x) - 0x00800000u >= 0x7e000000u) y = 1.0f / x;
  return y;
}
#else
HFAC_DEVICE float reciprocal(float x) { return 1.0f / x; }
#endif
HFAC_DEVICE double reciprocal(double x) { return 1.0 / x; }

// Keeps loads on their side, where there are no registers for those that the compiler would like to hoist.
HFAC_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// Conversions for which a GPU has instructions; `nearest` is what is stored of x where it is rounded to the nearest.
HFAC_DEVICE float nearest(float x, float) { return x; }
#if defined(__CUDA_ARCH__)
HFAC_DEVICE float widened(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
HFAC_DEVICE float nearest(float x, BFloat16) { return __bfloat162float(__float2bfloat16_rn(x)); }
HFAC_DEVICE float nearest(float x, Float16) { return __half2float(__float2half_rn(x)); }
HFAC_DEVICE __nv_bfloat162 round_pair(float a, float b, BFloat16) { return __floats2bfloat162_rn(a, b); }
HFAC_DEVICE __half2 round_pair(float a, float b, Float16) { return __floats2half2_rn(a, b); }
#else
HFAC_DEVICE float widened(Float16 x) { return widen(x); }
template <class S>
HFAC_DEVICE float nearest(float x, S) {
  return widen(narrow(x, S()));
}
template <class S>
HFAC_DEVICE uint32_t round_pair(float a, float b, S) {
  return narrow(a, S()).bits | static_cast<uint32_t>(narrow(b, S()).bits) << 16;
}
#endif

HFAC_DEVICE void unpack(const Raw<float>& raw, float (&x)[kVector]) {
  HFAC_UNROLLED (k, kVector) x[k] = float_of(raw.chunk[k / 4].word[k % 4]);
}
HFAC_DEVICE void unpack(const Raw<BFloat16>& raw, float (&x)[kVector]) {
  HFAC_UNROLLED (k, kVector) {
    const uint32_t pair = raw.chunk[0].word[k / 2];
    x[k] = float_of(k % 2 ? pair & 0xffff0000u : pair << 16);
  }
}
HFAC_DEVICE void unpack(const Raw<Float16>& raw, float (&x)[kVector]) {
  HFAC_UNROLLED (k, kVector) {
    x[k] = widened(Float16{static_cast<uint16_t>(raw.chunk[0].word[k / 2] >> (k % 2 * 16))});
  }
}

template <class S>
HFAC_DEVICE void pack(const float (&x)[kVector], Raw<S>& raw) {
  HFAC_UNROLLED (k, kVector / 2) {
    const auto pair = round_pair(x[2 * k], x[2 * k + 1], S());
    memcpy(&raw.chunk[0].word[k], &pair, sizeof(pair));
  }
}
HFAC_DEVICE void pack(const float (&x)[kVector], Raw<float>& raw) {
  HFAC_UNROLLED (k, kVector) raw.chunk[k / 4].word[k % 4] = bits_of(x[k]);
}

// Of an element of a tensor that is not contiguous. Not inlined, as none of the slow path is: it would be by far the
// largest part of every kernel.
HFAC_DEVICE_APART int64_t offset_of(const int64_t* layout, int64_t at) {
  const int64_t dimensions = layout[0];
  const int64_t* sizes = layout + 1;
  int64_t offset = 0;
  for (int64_t d = dimensions - 1; d >= 0; --d) {
    offset += at % sizes[d] * sizes[dimensions + d];
    at /= sizes[d];
  }
  return offset;
}

template <class T, class S>
HFAC_DEVICE void load_run(const Operand& o, const int64_t* layout, int64_t at, int count, T (&x)[kVector]) {
  const S* data = global(static_cast<const S*>(o.data));
  HFAC_UNROLLED (k, kVector) {
    if (k < count) x[k] = static_cast<T>(widen(data[layout ? offset_of(layout, at + k) : at + k]));
  }
}

template <class T, class S>
HFAC_DEVICE void store_run(const Operand& o, const int64_t* layout, int64_t at, int count, const T (&x)[kVector]) {
  S* data = global(static_cast<S*>(o.data));
  HFAC_UNROLLED (k, kVector) {
    if (k < count) data[layout ? offset_of(layout, at + k) : at + k] = narrow(x[k], S());
  }
}

// Elements [at, at + count) of a tensor of any type and layout; the rest of x is zero.
template <class T>
HFAC_DEVICE void load_any(const Operand& o, const int64_t* layouts, int64_t at, int count, T (&x)[kVector]) {
  const int64_t* layout = o.layout < 0 ? nullptr : layouts + o.layout;
  HFAC_UNROLLED (k, kVector) x[k] = T(0);
  common::as_stored(o.dtype, [&](auto stored) { load_run<T, decltype(stored)>(o, layout, at, count, x); });
}

HFAC_DEVICE void store_any(const Operand& o, const int64_t* layouts, int64_t at, int count, const float (&x)[kVector]) {
  const int64_t* layout = o.layout < 0 ? nullptr : layouts + o.layout;
  switch (o.dtype) {
    case DType::kBFloat16:
      return store_run<float, BFloat16>(o, layout, at, count, x);
    case DType::kFloat16:
      return store_run<float, Float16>(o, layout, at, count, x);
    default:
      return store_run<float, float>(o, layout, at, count, x);
  }
}
HFAC_DEVICE void store_any(const Operand& o, const int64_t* layouts, int64_t at, int count,
                           const double (&x)[kVector]) {
  store_run<double, double>(o, o.layout < 0 ? nullptr : layouts + o.layout, at, count, x);
}

// SMMF's sign bits where threads of several blocks may own bits of one byte. A GPU has no atomic operation on a byte,
// so bits are flipped in the aligned word of 4 bytes around them; where part of that word lies outside the tensor, the
// flips are collected in a word of `edges`, which stands for it until `settle_signs` in the fold applies them.
struct SharedSigns : Signs {
  const uint8_t* end;
  int32_t* edges;  // [2]: of the word at the beginning, which may be all there is; of the word at the end
  HFAC_DEVICE SharedSigns(const Arguments& a, const DeviceItem& it)
      : Signs{it.signs}, end(it.signs.data + it.sign_bytes), edges(a.counters + it.counter + kSignEdges) {}
};

// SMMF's sign bits of [at, at + count) in bits 0.. of the result, and their return.
HFAC_DEVICE unsigned load_byte(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
  return *p;
#else
  return __atomic_load_n(p, __ATOMIC_RELAXED);  // a neighbour may be writing its own bits
#endif
}

HFAC_DEVICE void flip_bit(const SharedSigns& s, const uint8_t* p, unsigned bit) {
  const auto address = reinterpret_cast<uintptr_t>(p), word = address & ~uintptr_t{3};
  int32_t* target = reinterpret_cast<int32_t*>(word);
  if (word + 4 > reinterpret_cast<uintptr_t>(s.end)) target = s.edges + 1;
  if (word < reinterpret_cast<uintptr_t>(s.data)) target = s.edges;
  atomicXor(target, static_cast<int32_t>(1u << ((address & 3) * 8 + bit)));
}

// By one thread, in a launch after the one that flipped bits.
HFAC_DEVICE void settle_signs(const Arguments& a, const DeviceItem& it) {
  const SharedSigns s(a, it);
  const auto begin = reinterpret_cast<uintptr_t>(s.data), end = reinterpret_cast<uintptr_t>(s.end);
  if (((begin | end) & 3) == 0) return;
  for (int side = 0; side < 2; ++side) {
    const auto flips = static_cast<uint32_t>(s.edges[side]);
    if (!flips) continue;
    const uintptr_t word = (side ? end - 1 : begin) & ~uintptr_t{3};
    for (unsigned k = 0; k < 4; ++k) {
      const uint32_t bits = flips >> 8 * k & 0xffu;
      if (!bits) continue;  // outside, it may be
      auto* const byte = reinterpret_cast<uint8_t*>(word + k);
      *byte = static_cast<uint8_t>(*byte ^ bits);
    }
    s.edges[side] = 0;
  }
}

// Calls body(k, byte, bit) for the bits of [at, at + count).
template <class Body>
HFAC_DEVICE void each_sign(const Signs& s, int64_t at, int count, const Body& body) {
  int64_t slice = s.slice == 1 ? at : at / s.slice, within = at - slice * s.slice;
  for (int k = 0; k < count; ++k) {
    body(k, s.data + slice * s.slice_bytes + (within >> 3), static_cast<unsigned>(within & 7));
    if (++within < s.slice) continue;
    within = 0;
    ++slice;
  }
}

HFAC_DEVICE unsigned load_signs(const Signs& s, int64_t at, int count) {
  unsigned bits = 0;
  each_sign(s, at, count,
            [&](int k, const uint8_t* byte, unsigned bit) { bits |= (load_byte(byte) >> bit & 1u) << k; });
  return bits;
}

// Bytes may be shared between threads: each flips only bits of its own, and only those that changed.
HFAC_DEVICE void store_signs(const SharedSigns& s, int64_t at, int count, unsigned old, unsigned fresh) {
  each_sign(s, at, count, [&](int k, const uint8_t* byte, unsigned bit) {
    if ((old ^ fresh) >> k & 1u) flip_bit(s, byte, bit);
  });
}

// How a kernel reaches its operands; `target` is what it reads and writes a parameter by (stored.cuh has others). Bulk:
// whole aligned vectors of known types, whole bytes of signs.
template <class T_, class Sw, class Sg>
struct BulkAccess {
  using T = T_;
  using Param = Raw<Sw>;
  using Grad = Raw<Sg>;
  static constexpr bool kWhole = true, kAhead = true;
  // Rows whose loads SMMF issues together: 64 bytes, or too few registers are left for the arithmetic.
  static constexpr int kRows = sizeof(Sw) + sizeof(Sg) <= 4 ? 2 : 1;

  static HFAC_DEVICE Grad grad(const Operand& o, const int64_t*, int64_t at, int, bool last) {
    return load_raw(global(static_cast<const Sg*>(o.data)) + at, last);
  }
  static HFAC_DEVICE const Operand& target(const Arguments&, const DeviceItem& it) { return it.param; }
  static HFAC_DEVICE Param param(const Operand& o, const int64_t*, int64_t at, int) {
    return load_raw(global(static_cast<const Sw*>(o.data)) + at, false);
  }
  template <class R>
  static HFAC_DEVICE void widen(const R& raw, T (&x)[kVector]) {
    unpack(raw, x);
  }
  static HFAC_DEVICE void store(const Operand& o, const int64_t*, int64_t at, int, const T (&x)[kVector]) {
    Raw<Sw> raw;
    pack(x, raw);
    store_raw(global(static_cast<Sw*>(o.data)) + at, raw);
  }
  template <class Target>
  static HFAC_DEVICE T nearest(const Target&, T x) {
    return hfac::nearest(x, Sw());
  }
  // May what is not stored in the parameter be approximate? (Of a parameter of 16 bits without a master weight.)
  template <class Target>
  static HFAC_DEVICE bool rough(const Target&) {
    return sizeof(Sw) == 2;
  }
  // Unsigned: a quotient of what may be negative takes four instructions more.
  static HFAC_DEVICE unsigned signs(const Signs& s, int64_t at, int) {
    return global(s.data)[static_cast<uint64_t>(at) / 8];
  }
  static HFAC_DEVICE void store(const Signs& s, int64_t at, int, unsigned, unsigned fresh) {
    global(s.data)[static_cast<uint64_t>(at) / 8] = static_cast<uint8_t>(fresh);
  }
};

// Anything: types, strides, alignments and sign layouts at run time.
template <class T_>
struct AnyAccess {
  using T = T_;
  struct Eight {
    T x[kVector];
  };
  using Param = Eight;
  using Grad = Eight;
  static constexpr bool kWhole = false;
  static constexpr bool kAhead = false;  // are the loads of rows issued before the last ones are worked on?
  static constexpr int kRows = 1;

  static HFAC_DEVICE Grad grad(const Operand& o, const int64_t* layouts, int64_t at, int count, bool) {
    Eight e;
    load_any(o, layouts, at, count, e.x);
    return e;
  }
  static HFAC_DEVICE const Operand& target(const Arguments&, const DeviceItem& it) { return it.param; }
  static HFAC_DEVICE Param param(const Operand& o, const int64_t* layouts, int64_t at, int count) {
    return grad(o, layouts, at, count, false);
  }
  static HFAC_DEVICE void widen(const Eight& e, T (&x)[kVector]) {
    for (int k = 0; k < kVector; ++k) x[k] = e.x[k];
  }
  static HFAC_DEVICE void store(const Operand& o, const int64_t* layouts, int64_t at, int count,
                                const T (&x)[kVector]) {
    store_any(o, layouts, at, count, x);
  }
  static HFAC_DEVICE T nearest(const Operand& o, T x) {
    if constexpr (sizeof(T) > sizeof(float)) return x;  // a double parameter
    if (o.dtype == DType::kBFloat16) return hfac::nearest(x, BFloat16());
    if (o.dtype == DType::kFloat16) return hfac::nearest(x, Float16());
    return x;
  }
  static HFAC_DEVICE bool rough(const Operand& o) { return o.dtype == DType::kBFloat16 || o.dtype == DType::kFloat16; }
  static HFAC_DEVICE unsigned signs(const Signs& s, int64_t at, int count) { return load_signs(s, at, count); }
  static HFAC_DEVICE void store(const SharedSigns& s, int64_t at, int count, unsigned old, unsigned fresh) {
    store_signs(s, at, count, old, fresh);
  }
};

// Contiguous tensors whose rows or addresses are not those of whole vectors: one element at a time, of known types.
template <class T_, class Sw, class Sg>
struct SingleAccess : AnyAccess<T_> {
  using T = T_;
  using Eight = typename AnyAccess<T>::Eight;
  static constexpr bool kAhead = true;

  static HFAC_DEVICE Eight grad(const Operand& o, const int64_t*, int64_t at, int count, bool) {
    Eight e{};
    load_run<T, Sg>(o, nullptr, at, count, e.x);
    return e;
  }
  static HFAC_DEVICE Eight param(const Operand& o, const int64_t*, int64_t at, int count) {
    Eight e{};
    load_run<T, Sw>(o, nullptr, at, count, e.x);
    return e;
  }
  static HFAC_DEVICE void store(const Operand& o, const int64_t*, int64_t at, int count, const T (&x)[kVector]) {
    store_run<T, Sw>(o, nullptr, at, count, x);
  }
  static HFAC_DEVICE unsigned signs(const Signs& s, int64_t at, int count) {
    if (s.slice != 1) return load_signs(s, at, count);
    unsigned bits = 0;
    HFAC_UNROLLED (k, kVector) {
      if (k < count) bits |= (global(s.data)[at + k] & 1u) << k;
    }
    return bits;
  }
  // A vector's signs are a byte each, which is nobody else's.
  static HFAC_DEVICE void store(const SharedSigns& s, int64_t at, int count, unsigned old, unsigned fresh) {
    if (s.slice != 1) return store_signs(s, at, count, old, fresh);
    HFAC_UNROLLED (k, kVector) {
      if (k < count) global(s.data)[at + k] = static_cast<uint8_t>(fresh >> k & 1u);
    }
  }
  static HFAC_DEVICE T nearest(const Operand&, T x) { return hfac::nearest(x, Sw()); }
  static HFAC_DEVICE bool rough(const Operand&) { return sizeof(Sw) == 2; }
};

// Of an access of whole vectors that stores nothing but the nearest value, the one for items that are `single`.
template <class A>
struct SingleOf {
  static constexpr bool kThere = false;
};
template <class T, class Sw, class Sg>
struct SingleOf<BulkAccess<T, Sw, Sg>> {
  static constexpr bool kThere = true;
  using Type = SingleAccess<T, Sw, Sg>;
};

}  // namespace hfac
