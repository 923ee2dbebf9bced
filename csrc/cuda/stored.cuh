// Accesses for parameters that are stored with more than one rounding to the nearest: stochastically, or as a bfloat16
// and what it lacks of a master weight (hfac/rounding.py; csrc/common/math/rounding.h on one element).
#pragma once

#include "block.cuh"

namespace hfac {

using common::Random;

static_assert(common::kDraws == kVector, "a vector takes one draw");

// A BitOffset on the device, with the launch's keys and step.
struct Draw {
  const Keys* keys;
  int64_t first;
  uint32_t position, step;
  HFAC_DEVICE Draw(const Arguments& a, const DeviceItem& it)
      : keys(&a.keys),
        first(it.storage.first),
        position(it.storage.position),
        step(static_cast<uint32_t>(static_cast<int64_t>(value_of(a.step, it.index)))) {}
  // Of eight elements that follow each other from a multiple of eight on.
  HFAC_DEVICE Random at(int64_t index) const {
    return common::philox(static_cast<uint64_t>(first + index) / kVector, step, position,
                          [this](int round, int which) { return keys->round[round][which]; });
  }
};

// Is one of them NaN? One comparison for the compiler, for which CUDA has no name.
HFAC_DEVICE bool unordered(float a, float b) { return !(a < b) && !(a >= b); }

// A NaN becomes the one whose lower bits are zero, which survives what is added to it below.
HFAC_DEVICE void quiet(float (&x)[kVector]) {
  bool nan = false;
#pragma unroll
  for (int k = 0; k < kVector; k += 2) nan = nan || unordered(x[k], x[k + 1]);
  if (!nan) return;
  HFAC_UNROLLED (k, kVector) x[k] = unordered(x[k], x[k]) ? float_of(0x7fc00000u) : x[k];
}

// The upper halves of two words, the first one's below; and the lower halves.
HFAC_DEVICE uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }
HFAC_DEVICE uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
// Bits 8 to 15 of four words.
HFAC_DEVICE uint32_t second_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0051), __byte_perm(c, d, 0x0051), 0x5410);
}

// A bfloat16 rounded stochastically.
template <class Sg>
struct DrawnAccess : BulkAccess<float, BFloat16, Sg> {
  using Base = BulkAccess<float, BFloat16, Sg>;
  using Base::param;
  using Base::store;
  struct Target {
    Operand param;
    Draw draw;
  };

  static HFAC_DEVICE Target target(const Arguments& a, const DeviceItem& it) { return {it.param, Draw(a, it)}; }
  static HFAC_DEVICE typename Base::Param param(const Target& t, const int64_t* layouts, int64_t at, int count) {
    return Base::param(t.param, layouts, at, count);
  }
  static HFAC_DEVICE void store(const Target& t, const int64_t*, int64_t at, int, float (&x)[kVector]) {
    const Random random = t.draw.at(at);
    quiet(x);
    Raw<BFloat16> raw;
    HFAC_UNROLLED (k, kVector / 2) {
      const uint32_t bits = random.word[k];
      raw.chunk[0].word[k] = upper_halves(bits_of(x[2 * k]) + (bits & 0xffffu), bits_of(x[2 * k + 1]) + (bits >> 16));
    }
    store_raw(global(static_cast<BFloat16*>(t.param.data)) + at, raw);
  }
};

// A bfloat16 and the 16 bits that it lacks of a float: exact.
template <class Sg>
struct SplitAccess : BulkAccess<float, BFloat16, Sg> {
  using Base = BulkAccess<float, BFloat16, Sg>;
  using Base::store;
  using Base::widen;
  static constexpr int kRows = 1;
  struct Param {
    Chunk high, low;
  };
  struct Target {
    BFloat16* high;
    int16_t* low;
  };

  static HFAC_DEVICE Target target(const Arguments&, const DeviceItem& it) {
    return {static_cast<BFloat16*>(it.param.data), static_cast<int16_t*>(it.storage.low.data)};
  }
  static HFAC_DEVICE Param param(const Target& t, const int64_t*, int64_t at, int) {
    return {load_chunk(global(t.high) + at, false), load_chunk(global(t.low) + at, false)};
  }
  static HFAC_DEVICE void widen(const Param& raw, float (&x)[kVector]) {
    HFAC_UNROLLED (k, kVector / 2) {
      const uint32_t high = raw.high.word[k], low = raw.low.word[k];
      x[2 * k] = float_of((high << 16) + static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(low))));
      x[2 * k + 1] = float_of((high & 0xffff0000u) + static_cast<uint32_t>(static_cast<int32_t>(low) >> 16));
    }
  }
  static HFAC_DEVICE void store(const Target& t, const int64_t*, int64_t at, int, float (&x)[kVector]) {
    quiet(x);
    Chunk high, low;
    HFAC_UNROLLED (k, kVector / 2) {
      const uint32_t a = bits_of(x[2 * k]), b = bits_of(x[2 * k + 1]);
      high.word[k] = upper_halves(a + 0x8000u, b + 0x8000u);
      low.word[k] = lower_halves(a, b);  // what is left of the rounding is the lower half, read as a signed number
    }
    store_chunk(global(t.high) + at, high);
    store_chunk(global(t.low) + at, low);
  }
  static HFAC_DEVICE float nearest(const Target&, float x) { return x; }
  static HFAC_DEVICE bool rough(const Target&) { return false; }
};

// A bfloat16 and 8 of the bits that it lacks of a float, rounded to the nearest even or stochastically.
template <class Sg>
struct Split8Access : BulkAccess<float, BFloat16, Sg> {
  using Base = BulkAccess<float, BFloat16, Sg>;
  using Base::store;
  using Base::widen;
  static constexpr int kRows = 1;
  struct Param {
    Chunk high;
    uint2 low;
  };
  struct Target {
    BFloat16* high;
    int8_t* low;
    bool stochastic;
    Draw draw;
  };

  static HFAC_DEVICE Target target(const Arguments& a, const DeviceItem& it) {
    return {static_cast<BFloat16*>(it.param.data), static_cast<int8_t*>(it.storage.low.data),
            it.storage.stochastic != 0, Draw(a, it)};
  }
  static HFAC_DEVICE Param param(const Target& t, const int64_t*, int64_t at, int) {
    return {load_chunk(global(t.high) + at, false), *reinterpret_cast<const uint2*>(global(t.low) + at)};
  }
  static HFAC_DEVICE void widen(const Param& raw, float (&x)[kVector]) {
    HFAC_UNROLLED (k, kVector) {
      const uint32_t high = raw.high.word[k / 2], low = (k < 4 ? raw.low.x : raw.low.y) << (24 - k % 4 * 8);
      x[k] = float_of((k % 2 ? high & 0xffff0000u : high << 16) +
                      static_cast<uint32_t>(static_cast<int32_t>(low) >> 16 & ~0xff));
    }
  }
  static HFAC_DEVICE void store(const Target& t, const int64_t*, int64_t at, int, float (&x)[kVector]) {
    quiet(x);
    uint32_t u[kVector];
    if (t.stochastic) {
      const Random random = t.draw.at(at);
      HFAC_UNROLLED (k, kVector) {
        u[k] = bits_of(x[k]) + (k % 2 ? random.word[k / 2] >> 24 : random.word[k / 2] >> 8 & 0xffu);
      }
    } else {
      HFAC_UNROLLED (k, kVector) u[k] = bits_of(x[k]) + 0x7fu + (bits_of(x[k]) >> 8 & 1u);
    }
    // The last 8 bits are not cut off: nothing below depends on them.
    Chunk high;
    HFAC_UNROLLED (k, kVector / 2) high.word[k] = upper_halves(u[2 * k] + 0x8000u, u[2 * k + 1] + 0x8000u);
    store_chunk(global(t.high) + at, high);
    *reinterpret_cast<uint2*>(global(t.low) + at) =
        make_uint2(second_bytes(u[0], u[1], u[2], u[3]), second_bytes(u[4], u[5], u[6], u[7]));
  }
  static HFAC_DEVICE float nearest(const Target&, float x) { return common::nearest_of_24_bits(x); }
  static HFAC_DEVICE bool rough(const Target&) { return false; }
};

HFAC_DEVICE_APART Random draw_apart(uint64_t block, uint32_t step, uint32_t position, uint64_t seed) {
  return common::philox(block, step, position, common::SeedKey{seed});
}

// Any type, stride and alignment, with or without a lower piece, with or without random bits.
struct StoredAccess : AnyAccess<float> {
  using Base = AnyAccess<float>;
  using Base::param;
  using Base::store;
  struct Target {
    Operand param;
    DeviceStorage storage;
    uint32_t step;
    uint64_t seed;
  };

  static HFAC_DEVICE Target target(const Arguments& a, const DeviceItem& it) {
    return {it.param, it.storage, Draw(a, it).step, a.keys.seed()};
  }

  static HFAC_DEVICE float nearest(const Target& t, float x) {
    if (t.storage.low.kind == Low::kInt16) return x;
    if (t.storage.low.kind == Low::kInt8) return common::nearest_of_24_bits(x);
    return Base::nearest(t.param, x);
  }

  static HFAC_DEVICE bool rough(const Target& t) { return t.storage.low.kind == Low::kNone; }

  static HFAC_DEVICE int64_t offset_in(int32_t layout, const int64_t* layouts, int64_t at) {
    return layout < 0 ? at : offset_of(layouts + layout, at);
  }

  static HFAC_DEVICE Param param(const Target& t, const int64_t* layouts, int64_t at, int count) {
    Eight e = Base::param(t.param, layouts, at, count);
    const LowerPiece& low = t.storage.low;
    if (low.kind == Low::kNone) return e;
    HFAC_UNROLLED (k, kVector) {
      if (k >= count) continue;
      const BFloat16 high{static_cast<uint16_t>(bits_of(e.x[k]) >> 16)};
      const int64_t offset = offset_in(low.layout, layouts, at + k);
      e.x[k] = low.kind == Low::kInt16 ? common::join(high, global(static_cast<const int16_t*>(low.data))[offset])
                                       : common::join(high, global(static_cast<const int8_t*>(low.data))[offset]);
    }
    return e;
  }

  static HFAC_DEVICE void store(const Target& t, const int64_t* layouts, int64_t at, int count,
                                const float (&x)[kVector]) {
    const LowerPiece& low = t.storage.low;
    Random random{};
    uint64_t block = ~uint64_t{0};  // that of no element
    HFAC_UNROLLED (k, kVector) {
      if (k >= count) continue;
      uint32_t bits = 0;
      if (t.storage.stochastic) {
        const int64_t within = t.storage.layout < 0 ? at + k : offset_of(layouts + t.storage.layout, at + k);
        const int64_t index = t.storage.first + within;
        if (static_cast<uint64_t>(index) / common::kDraws != block) {
          block = static_cast<uint64_t>(index) / common::kDraws;
          random = draw_apart(block, t.step, t.storage.position, t.seed);
        }
        bits = common::random_bits(random, index);
      }
      const int64_t offset = offset_in(t.param.layout, layouts, at + k);
      BFloat16* const brain = global(static_cast<BFloat16*>(t.param.data)) + offset;
      switch (low.kind) {
        case Low::kInt16:
          common::split(x[k], *brain, global(static_cast<int16_t*>(low.data))[offset_in(low.layout, layouts, at + k)]);
          break;
        case Low::kInt8: {
          int8_t& piece = global(static_cast<int8_t*>(low.data))[offset_in(low.layout, layouts, at + k)];
          if (t.storage.stochastic) {
            common::split(x[k], bits, *brain, piece);
          } else {
            common::split(x[k], *brain, piece);
          }
          break;
        }
        case Low::kNone:
          if (t.param.dtype == DType::kBFloat16) {
            *brain = common::stochastic(x[k], bits, BFloat16());
          } else {
            global(static_cast<Float16*>(t.param.data))[offset] = common::stochastic(x[k], bits, Float16());
          }
          break;
      }
    }
  }
};

// The access types that a family of kernels is compiled for, by the name that the plan gives them.
template <Access kName, class A>
struct Case {};
template <class... Cases>
struct CaseList {};

// The kernel that `kernel` returns for the access type of this name.
template <class Kernel, Access... kNames, class... As>
KernelFunction kernel_for(Access name, CaseList<Case<kNames, As>...>, const Kernel& kernel) {
  KernelFunction found = nullptr;
  (void)((name == kNames && (found = kernel(As()), true)) || ...);
  if (!found) throw std::logic_error("compiled without these operands");
  return found;
}

// Drivers that are compiled with HFAC_FLOAT_OPERANDS have no gradients of 16 bits.
#if defined(HFAC_FLOAT_OPERANDS)
#define HFAC_CASES_OF_16_BITS(...)
#else
#define HFAC_CASES_OF_16_BITS(...) __VA_ARGS__
#endif
using Float = Case<Access::kFloat, BulkAccess<float, float, float>>;
using Half = Case<Access::kFloat16, BulkAccess<float, Float16, Float16>>;
using Brain = Case<Access::kBFloat16, BulkAccess<float, BFloat16, BFloat16>>;
using BrainFloat = Case<Access::kBFloat16Float, BulkAccess<float, BFloat16, float>>;
using FloatBrain = Case<Access::kFloatBFloat16, BulkAccess<float, float, BFloat16>>;
using Drawn = Case<Access::kDrawn, DrawnAccess<BFloat16>>;
using DrawnFloat = Case<Access::kDrawnFloat, DrawnAccess<float>>;
using Split = Case<Access::kSplit, SplitAccess<BFloat16>>;
using SplitFloat = Case<Access::kSplitFloat, SplitAccess<float>>;
using Split8 = Case<Access::kSplit8, Split8Access<BFloat16>>;
using Split8Float = Case<Access::kSplit8Float, Split8Access<float>>;
using AnyFloat = Case<Access::kAny, AnyAccess<float>>;
using AnyDouble = Case<Access::kDouble, AnyAccess<double>>;
using AnyStored = Case<Access::kStored, StoredAccess>;

#if defined(HFAC_PLAIN_STEP)
// What a plain step of float32 or bfloat16 runs, for bench/launch_plan.py, which has no use for minutes of compiling.
constexpr bool kPlainStep = true;
using AnyAccesses = CaseList<AnyFloat>;
using GradAccesses = CaseList<Brain, Float, AnyFloat>;
using PairAccesses = GradAccesses;
using NearestAccesses = CaseList<Brain, Float>;  // of whole vectors
#else
constexpr bool kPlainStep = false;
using AnyAccesses = CaseList<AnyFloat, AnyDouble, AnyStored>;
using GradAccesses = CaseList<HFAC_CASES_OF_16_BITS(Brain, Half, ) Float, AnyFloat, AnyDouble>;
using PairAccesses = CaseList<HFAC_CASES_OF_16_BITS(Brain, Half, BrainFloat, FloatBrain, Drawn, Split, Split8, ) Float,
                              DrawnFloat, SplitFloat, Split8Float, AnyFloat, AnyDouble, AnyStored>;
using NearestAccesses = CaseList<HFAC_CASES_OF_16_BITS(Brain, Half, BrainFloat, FloatBrain, ) Float>;
#endif

// Kernels that write parameters, watched and not.
#define HFAC_BY_ACCESS(launch, arguments, accesses, kernel)                           \
  return kernel_for((launch).access, accesses(), [&](auto access) -> KernelFunction { \
    using A = decltype(access);                                                       \
    if constexpr (!kPlainStep) {                                                      \
      if ((arguments).watched) return kernel<A, true>;                                \
    }                                                                                 \
    return kernel<A, false>;                                                          \
  })
// Kernels that touch states alone, of double or float.
#define HFAC_BY_STATE(launch, kernel) return (launch).access == Access::kDouble ? kernel<double> : kernel<float>

}  // namespace hfac
