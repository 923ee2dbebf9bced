// Packed sign bits: bits and bytes that neighbouring ranges share.
#include "signs.h"

#include <algorithm>
#include <cstring>

namespace hfac {
namespace {

// `count` (1 to 8) bits from bit `at` on. No byte beyond the last of them is read. The loads are atomic because a
// neighbour may be writing its own bits of the same byte.
inline unsigned get_bits(const uint8_t* p, int64_t at, int64_t count) {
  p += at >> 3;
  const int shift = static_cast<int>(at & 7);
  unsigned bits = static_cast<unsigned>(__atomic_load_n(p, __ATOMIC_RELAXED)) >> shift;
  if (shift + count > 8) bits |= static_cast<unsigned>(__atomic_load_n(p + 1, __ATOMIC_RELAXED)) << (8 - shift);
  return bits & ((1u << count) - 1u);
}

inline void or_bits(uint8_t* p, int64_t at, int64_t count, unsigned bits) {
  p += at >> 3;
  const int shift = static_cast<int>(at & 7);
  p[0] = static_cast<uint8_t>(p[0] | bits << shift);
  if (shift + count > 8) p[1] = static_cast<uint8_t>(p[1] | bits >> (8 - shift));
}

// One byte per element (tensors of one dimension): eight bytes hold eight bits, gathered and spread by a
// multiplication.
constexpr uint64_t kLowBits = 0x0101010101010101u;

inline uint8_t join(const uint8_t* bytes) {
  uint64_t x;
  memcpy(&x, bytes, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  x = __builtin_bswap64(x);
#endif
  return static_cast<uint8_t>(((x & kLowBits) * 0x0102040810204080u) >> 56);
}

inline void spread(uint8_t bits, uint8_t* bytes) {
  uint64_t x = (bits * kLowBits) & 0x8040201008040201u;
  x = ((x + 0x7f7f7f7f7f7f7f7fu) >> 7) & kLowBits;
  // A byte of 0x80 carries out of the addition only in its own place: 0x80 + 0x7f = 0xff.
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  x = __builtin_bswap64(x);
#endif
  memcpy(bytes, &x, 8);
}

// Calls body(byte of the slice's data, first bit in the slice, position in `bits`, count).
template <class Body>
void each_slice(const Signs& s, int64_t first, int64_t count, const Body& body) {
  int64_t slice = first / s.slice, within = first % s.slice, at = 0;
  while (count > 0) {
    const int64_t run = std::min(count, s.slice - within);
    body(s.data + slice * s.slice_bytes, within, at, run);
    ++slice;
    within = 0;
    at += run;
    count -= run;
  }
}

}  // namespace

void read_signs(const Signs& s, int64_t first, int64_t count, uint8_t* bits) {
  int64_t at = 0;
  if (s.slice == 1) {
    for (; at + 8 <= count; at += 8) bits[at / 8] = join(s.data + first + at);
    if (at < count) bits[at / 8] = 0;
    for (; at < count; ++at) bits[at / 8] = static_cast<uint8_t>(bits[at / 8] | (s.data[first + at] & 1u) << (at & 7));
    return;
  }
  memset(bits, 0, static_cast<size_t>((count + 7) / 8));
  each_slice(s, first, count, [&](const uint8_t* data, int64_t within, int64_t to, int64_t run) {
    for (int64_t k = 0; k < run; k += 8) {
      const int64_t some = std::min<int64_t>(8, run - k);
      or_bits(bits, to + k, some, get_bits(data, within + k, some));
    }
  });
}

void write_signs(const Signs& s, int64_t first, int64_t count, const uint8_t* bits) {
  if (s.slice == 1) {
    int64_t at = 0;
    for (; at + 8 <= count; at += 8) spread(bits[at / 8], s.data + first + at);
    for (; at < count; ++at) s.data[first + at] = static_cast<uint8_t>(bits[at / 8] >> (at & 7) & 1u);
    return;
  }
  each_slice(s, first, count, [&](uint8_t* data, int64_t within, int64_t from, int64_t run) {
    while (run > 0) {
      const int shift = static_cast<int>(within & 7);
      const int64_t some = std::min<int64_t>(8 - shift, run);
      const unsigned fresh = get_bits(bits, from, some) << shift;
      uint8_t* byte = data + (within >> 3);
      if (shift == 0 && (some == 8 || within + some == s.slice)) {
        *byte = static_cast<uint8_t>(fresh);  // the slice's padding stays zero
      } else {                                // another thread's elements may share the byte
        __atomic_fetch_and(byte, static_cast<uint8_t>(~(((1u << some) - 1u) << shift)), __ATOMIC_RELAXED);
        __atomic_fetch_or(byte, static_cast<uint8_t>(fresh), __ATOMIC_RELAXED);
      }
      within += some;
      from += some;
      run -= some;
    }
  });
}

}  // namespace hfac
