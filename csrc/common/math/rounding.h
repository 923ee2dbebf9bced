// How a new weight becomes what is stored, where that is more than one rounding to the nearest: hfac/rounding.py, to
// the bit. Random bits come from a counter; a master weight is a bfloat16 and the bits that it lacks.
#pragma once

#include "storage.h"

namespace hfac {
namespace HFAC_LEVEL {

// Philox 4x32-10: eight elements' random bits, 16 each.
struct Random {
  uint32_t word[4];
};

constexpr int kDraws = 8;
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;  // what the key grows by

HFAC_HD uint32_t upper_half(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// `block` is an element's index in its whole parameter, divided by kDraws; `position` that of the parameter in the
// optimizer; key(round, which) gives the two keys of a round.
template <class Key>
HFAC_HD Random philox(uint64_t block, uint32_t step, uint32_t position, const Key& key) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = upper_half(block), c2 = step, c3 = position;
  HFAC_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * kPhiloxFactor0;
    const uint64_t b = static_cast<uint64_t>(c2) * kPhiloxFactor1;
    c0 = upper_half(b) ^ c1 ^ key(round, 0);
    c1 = static_cast<uint32_t>(b);
    c2 = upper_half(a) ^ c3 ^ key(round, 1);
    c3 = static_cast<uint32_t>(a);
  }
  return Random{{c0, c1, c2, c3}};
}

// The keys that follow from a seed.
struct SeedKey {
  uint64_t seed;
  HFAC_HD uint32_t operator()(int round, int which) const {
    const auto k = static_cast<uint32_t>(round);
    return which ? upper_half(seed) + k * kPhiloxKey1 : static_cast<uint32_t>(seed) + k * kPhiloxKey0;
  }
};

// The 16 bits of the element at `index` in its whole parameter, of whose block `random` is.
HFAC_HD uint32_t random_bits(const Random& random, int64_t index) {
  const int at = static_cast<int>(index & (kDraws - 1));
  return (random.word[at >> 1] >> (16 * (at & 1))) & 0xffffu;
}

HFAC_HD bool is_finite(uint32_t u) { return (u & 0x7f800000u) != 0x7f800000u; }

HFAC_HD bool is_nan(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u; }

// Rounded up in magnitude with the probability of what would be cut off. The last argument says the type only.
HFAC_HD BFloat16 stochastic(float x, uint32_t bits, BFloat16) {
  const uint32_t u = bits_of(x), rounded = (u + (is_finite(u) ? bits : 0u)) >> 16;
  return BFloat16{static_cast<uint16_t>(is_nan(u) ? 0x7fc0u : rounded)};
}

HFAC_HD Float16 stochastic(float x, uint32_t bits, Float16) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const int exponent = static_cast<int>(magnitude >> 23);
  // Below 2^-14 lie the multiples of 2^-24, of which `shift` bits are cut.
  const int below = 126 - exponent, shift = below < 14 ? 14 : below > 24 ? 24 : below;
  const int lost = below < shift ? 0 : below - shift > 31 ? 31 : below - shift;
  const uint32_t significand = ((magnitude & 0x7fffffu) | 0x800000u) >> lost;
  const uint32_t small = (significand + ((bits << 8) >> (24 - shift))) >> shift;
  const uint32_t normal = ((magnitude + (bits >> 3)) >> 13) - (112u << 10);
  uint32_t rounded = exponent >= 113 ? normal : small;
  rounded = rounded > 0x7c00u ? 0x7c00u : rounded;  // inf, and beyond what is finite
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  return Float16{static_cast<uint16_t>(sign | (is_nan(u) ? nan : rounded))};
}

// The master weight of a bfloat16 and what it lacks: all 16 bits, or the upper 8 of them.
HFAC_HD float join(BFloat16 high, int16_t low) {
  return float_of((static_cast<uint32_t>(high.bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}
HFAC_HD float join(BFloat16 high, int8_t low) {
  return float_of((static_cast<uint32_t>(high.bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low) * 256));
}

// The two pieces of a master weight that fits in them: the bfloat16 nearest to it, ties away from zero, and the rest,
// which as a signed number is the bits below.
HFAC_HD void split_bits(uint32_t u, BFloat16& high, uint16_t& low) {
  high.bits = static_cast<uint16_t>(is_nan(u) ? 0x7fc0u : (u + 0x8000u) >> 16);
  low = static_cast<uint16_t>(is_nan(u) ? 0u : u);
}

HFAC_HD void split(float x, BFloat16& high, int16_t& low) {
  uint16_t rest;
  split_bits(bits_of(x), high, rest);
  low = static_cast<int16_t>(rest);
}

// To 24 bits, by `bits` that are added to the 8 which are cut off.
HFAC_HD void split_rounded(uint32_t u, uint32_t bits, BFloat16& high, int8_t& low) {
  uint16_t rest;
  split_bits(is_nan(u) ? u : (u + bits) & 0xffffff00u, high, rest);
  low = static_cast<int8_t>(static_cast<uint8_t>(rest >> 8));
}

// To 24 bits, to the nearest, ties to even.
HFAC_HD void split(float x, BFloat16& high, int8_t& low) {
  const uint32_t u = bits_of(x);
  split_rounded(u, 0x7fu + ((u >> 8) & 1u), high, low);
}

// What is read of a master weight of 24 bits that was stored to the nearest.
HFAC_HD float nearest_of_24_bits(float x) {
  BFloat16 high;
  int8_t low;
  split(x, high, low);
  return join(high, low);
}

// To 24 bits, stochastically by the upper half of an element's random bits.
HFAC_HD void split(float x, uint32_t bits, BFloat16& high, int8_t& low) {
  split_rounded(bits_of(x), bits >> 8, high, low);
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
