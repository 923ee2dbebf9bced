// Contiguous weights to what is stored of them, and back, where that is not one rounding to the nearest: the functions
// of math/rounding.h in loops that compilers turn into vectors, and their random bits in vectors by hand.
#pragma once

#include "../common/math/rounding.h"
#include "kernels.h"
#include "simd_io.h"

namespace hfac {
namespace HFAC_LEVEL {

// A block of random bits per lane, whose words stand in the lower halves; what is left in the upper ones is never read.
typedef uint64_t Blocks __attribute__((vector_size(HFAC_REGISTER)));
constexpr int kBlocks = HFAC_REGISTER / 8;
static_assert(kDraws * kBlocks <= kDrawsAtOnce, "no more than there is room for");

// The products of the lower halves.
HFAC_HD Blocks times(Blocks a, uint32_t factor) {
  const Blocks b = static_cast<uint64_t>(factor) - Blocks{};
#if defined(__x86_64__)
  using Signed = long long __attribute__((vector_size(HFAC_REGISTER)));
  return (Blocks)HFAC_INTRINSIC(mul_epu32)((Signed)a, (Signed)b);
#else
  return (a & 0xffffffffu) * b;
#endif
}

// The upper halves in the lower ones' place. A shuffle, because shifts would wait for the multiplications' port.
HFAC_HD Blocks upper(Blocks a) {
#if defined(__AVX512F__)
  return (Blocks)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  return (Blocks)_mm256_shuffle_epi32((__m256i)a, 0xf5);
#elif defined(__x86_64__)
  return (Blocks)_mm_shuffle_epi32((__m128i)a, 0xf5);
#else
  return a >> 32;
#endif
}

// Bits of `blocks` blocks of kDraws elements from `block` on; `bits` has room for whole vectors of them.
inline void draw(uint64_t block, int64_t blocks, const DrawKey& key, uint16_t* bits) {
  Blocks keys[kPhiloxRounds][2], lane;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int which = 0; which < 2; ++which) keys[round][which] = SeedKey{key.seed}(round, which) - Blocks{};
  }
  for (int l = 0; l < kBlocks; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int64_t done = 0; done < blocks; done += kBlocks) {
    const Blocks counter = lane + (block + static_cast<uint64_t>(done));
    Blocks c0 = counter, c1 = upper(counter), c2 = key.step - Blocks{}, c3 = key.position - Blocks{};
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Blocks a = times(c0, kPhiloxFactor0), b = times(c2, kPhiloxFactor1);
      c0 = upper(b) ^ c1 ^ keys[round][0];
      c1 = b;
      c2 = upper(a) ^ c3 ^ keys[round][1];
      c3 = a;
    }
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int l = 0; l < kBlocks; ++l) {
      const Random random{{static_cast<uint32_t>(c0[l]), static_cast<uint32_t>(c1[l]), static_cast<uint32_t>(c2[l]),
                           static_cast<uint32_t>(c3[l])}};
      for (int k = 0; k < kDraws; ++k) *bits++ = static_cast<uint16_t>(random_bits(random, k));
    }
#else
    // Words 0 and 1 of each block, words 2 and 3, and then block after block.
    const Blocks front = (c0 & 0xffffffffu) | (c1 << 32), back = (c2 & 0xffffffffu) | (c3 << 32);
    Blocks low, high;
    for (int l = 0; l < kBlocks; ++l) {
      low[l] = static_cast<uint64_t>(l / 2 + l % 2 * kBlocks);
      high[l] = low[l] + kBlocks / 2;
    }
    const Blocks out[2] = {__builtin_shuffle(front, back, low), __builtin_shuffle(front, back, high)};
    memcpy(bits, out, sizeof(out));
    bits += kDraws * kBlocks;
#endif
  }
}

template <class S>
void widen_all(const S* from, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) store(out + k, load(from + k));
  for (; k < count; ++k) out[k] = widen(from[k]);
}

template <class Low>
void join_all(const BFloat16* high, const Low* low, int64_t count, float* out) {
  for (int64_t k = 0; k < count; ++k) out[k] = join(high[k], low[k]);
}

template <class S>
void round_all(const float* values, const uint16_t* bits, int64_t count, S* out) {
  for (int64_t k = 0; k < count; ++k) out[k] = stochastic(values[k], bits[k], S{});
}

// `bits` null: to the nearest.
template <class Low>
void split_all(const float* values, const uint16_t* bits, int64_t count, BFloat16* high, Low* low) {
  if constexpr (sizeof(Low) == 1) {
    if (bits) {
      for (int64_t k = 0; k < count; ++k) split(values[k], bits[k], high[k], low[k]);
      return;
    }
  }
  for (int64_t k = 0; k < count; ++k) split(values[k], high[k], low[k]);
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
