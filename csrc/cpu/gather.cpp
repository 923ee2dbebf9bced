// Gathers and scatters strided tensors, converting, rounding stochastically, and joining and splitting lower pieces.
#include "gather.h"

#include <algorithm>

#include "../common/math/rounding.h"
#include "level.h"

namespace hfac {
namespace {

using common::as_stored;
using common::kDraws;
using common::narrow;
using common::philox;
using common::random_bits;
using common::SeedKey;
using common::widen;

// Calls body(offset, step, count) for runs of elements that lie `step` apart, in row-major order.
template <class Body>
void each_run(const Strided& s, int64_t first, int64_t count, const Body& body) {
  int last = static_cast<int>(s.sizes.size()) - 1;
  // Trailing dimensions that lie one after the other are one run.
  int64_t length = last < 0 ? 1 : s.sizes[static_cast<size_t>(last)];
  const int64_t step = last < 0 ? 1 : s.strides[static_cast<size_t>(last)];
  while (last > 0 && s.strides[static_cast<size_t>(last) - 1] == length * step) {
    length *= s.sizes[static_cast<size_t>(--last)];
  }
  while (count > 0) {
    const int64_t within = first % length;
    int64_t rest = first / length, offset = within * step;
    for (int d = last - 1; d >= 0; --d) {
      const auto k = static_cast<size_t>(d);
      offset += rest % s.sizes[k] * s.strides[k];
      rest /= s.sizes[k];
    }
    const int64_t run = std::min(count, length - within);
    body(offset, step, run);
    first += run;
    count -= run;
  }
}

// Calls body(element, k) for elements [first, first + count) in row-major order, k counted from 0.
template <class S, class Body>
void each_element(S* data, const Strided* strided, int64_t first, int64_t count, const Body& body) {
  int64_t done = 0;
  const auto elements = [&](int64_t offset, int64_t step, int64_t run) {
    for (int64_t k = 0; k < run; ++k) body(data[offset + k * step], done + k);
    done += run;
  };
  strided ? each_run(*strided, first, count, elements) : elements(first, 1, count);
}

// Elements that are rounded, or joined of two pieces, at a time.
constexpr int64_t kPiece = 2048;

// Calls body(first, count, done) for pieces of [first, first + count), of which `done` elements precede.
template <class Body>
void each_piece(int64_t first, int64_t count, const Body& body) {
  for (int64_t done = 0; done < count; done += kPiece) body(first + done, std::min(kPiece, count - done), done);
}

// Contiguous elements [first, first + count): where they lie, or copied from where they lie apart.
template <class S>
const S* collected(const void* data, const Strided* strided, int64_t first, int64_t count, S* copy) {
  const S* from = static_cast<const S*>(data);
  if (!strided) return from + first;
  each_element(from, strided, first, count, [&](S x, int64_t k) { copy[k] = x; });
  return copy;
}

// Calls write(p) with the address of elements [first, first + count), or with a buffer whose values are then scattered.
template <class S, class Write>
void spread(void* data, const Strided* strided, int64_t first, int64_t count, S* copy, const Write& write) {
  S* to = static_cast<S*>(data);
  if (!strided) return write(to + first);
  write(copy);
  each_element(to, strided, first, count, [&](S& x, int64_t k) { x = copy[k]; });
}

// Room for the bits of a piece whose first and last element share their blocks with others.
struct Bits {
  uint16_t drawn[kPiece + 2 * kDraws + kDrawsAtOnce], spread[kPiece];
};

// Random bits of elements whose indices follow each other from `index` on.
const uint16_t* draw(const DrawKey& key, int64_t index, int64_t count, Bits& bits) {
  const int64_t block = index / kDraws, last = (index + count - 1) / kDraws;
  kernels().rounding.draw(static_cast<uint64_t>(block), last - block + 1, key, bits.drawn);
  return bits.drawn + index % kDraws;
}

// Random bits of the elements [first, first + count) of a piece.
const uint16_t* draw(const Storage& storage, int64_t first, int64_t count, Bits& bits) {
  const BitOffset& from = storage.bits;
  const DrawKey key{storage.step, from.position, storage.seed};
  if (!from.strided) return draw(key, from.first + first, count, bits);
  uint16_t* out = bits.spread;
  each_run(*from.strided, first, count, [&](int64_t offset, int64_t step, int64_t run) {
    const int64_t index = from.first + offset;
    if (step == 1) {
      std::copy_n(draw(key, index, run, bits), run, out);
    } else {
      for (int64_t k = 0; k < run; ++k) {
        const int64_t mine = index + k * step;
        const auto random = philox(static_cast<uint64_t>(mine / kDraws), key.step, key.position, SeedKey{key.seed});
        out[k] = static_cast<uint16_t>(random_bits(random, mine));
      }
    }
    out += run;
  });
  return bits.spread;
}

template <class Low, class Join>
void gather_joined(const TensorRef& from, int64_t first, int64_t count, float* out, const Join& join) {
  BFloat16 high[kPiece];
  Low low[kPiece];
  each_piece(first, count, [&](int64_t at, int64_t some, int64_t done) {
    const BFloat16* h = collected(from.data, from.strided, at, some, static_cast<BFloat16*>(high));
    const Low* l = collected(from.storage->low, from.storage->low_strided, at, some, static_cast<Low*>(low));
    join(h, l, some, out + done);
  });
}

template <class Low, class Split>
void scatter_split(const TensorRef& to, int64_t first, int64_t count, const float* values, const Split& split) {
  const Storage& storage = *to.storage;
  BFloat16 high[kPiece];
  Low low[kPiece];
  Bits room;
  each_piece(first, count, [&](int64_t at, int64_t some, int64_t done) {
    // What int16 holds needs no rounding.
    const uint16_t* bits = storage.stochastic && sizeof(Low) == 1 ? draw(storage, at, some, room) : nullptr;
    spread(to.data, to.strided, at, some, static_cast<BFloat16*>(high), [&](BFloat16* h) {
      spread(storage.low, storage.low_strided, at, some, static_cast<Low*>(low),
             [&](Low* l) { split(values + done, bits, some, h, l); });
    });
  });
}

template <class S, class Round>
void scatter_rounded(const TensorRef& to, int64_t first, int64_t count, const float* values, const Round& round) {
  S high[kPiece];
  Bits room;
  each_piece(first, count, [&](int64_t at, int64_t some, int64_t done) {
    const uint16_t* bits = draw(*to.storage, at, some, room);
    spread(to.data, to.strided, at, some, static_cast<S*>(high), [&](S* h) { round(values + done, bits, some, h); });
  });
}

template <class T>
void gather_any(const TensorRef& from, int64_t first, int64_t count, T* out) {
  as_stored(from.dtype, [&](auto stored) {
    using S = decltype(stored);
    each_element(static_cast<const S*>(from.data), from.strided, first, count,
                 [&](S x, int64_t k) { out[k] = static_cast<T>(widen(x)); });
  });
}

template <class T>
void scatter_any(const TensorRef& to, int64_t first, int64_t count, const T* values) {
  as_stored(to.dtype, [&](auto stored) {
    using S = decltype(stored);
    using Wide = decltype(widen(stored));
    each_element(static_cast<S*>(to.data), to.strided, first, count,
                 [&](S& x, int64_t k) { x = narrow(static_cast<Wide>(values[k]), S{}); });
  });
}

}  // namespace

void gather(const TensorRef& from, int64_t first, int64_t count, float* out) {
  const RoundingKernels& k = kernels().rounding;
  const int64_t low_bytes = from.storage ? from.storage->low_bytes : 0;
  if (low_bytes == 2) return gather_joined<int16_t>(from, first, count, out, k.join16);
  if (low_bytes == 1) return gather_joined<int8_t>(from, first, count, out, k.join8);
  if (!from.strided && from.dtype == DType::kBFloat16) {
    return k.widen_bfloat16(static_cast<const BFloat16*>(from.data) + first, count, out);
  }
  if (!from.strided && from.dtype == DType::kFloat16) {
    return k.widen_float16(static_cast<const Float16*>(from.data) + first, count, out);
  }
  gather_any(from, first, count, out);
}
void gather(const TensorRef& from, int64_t first, int64_t count, double* out) { gather_any(from, first, count, out); }

void scatter(const TensorRef& to, int64_t first, int64_t count, const float* values) {
  if (!to.storage) return scatter_any(to, first, count, values);
  const RoundingKernels& k = kernels().rounding;
  const int64_t low_bytes = to.storage->low_bytes;
  if (low_bytes == 2) return scatter_split<int16_t>(to, first, count, values, k.split16);
  if (low_bytes == 1) return scatter_split<int8_t>(to, first, count, values, k.split8);
  if (to.dtype == DType::kBFloat16) return scatter_rounded<BFloat16>(to, first, count, values, k.round_bfloat16);
  scatter_rounded<Float16>(to, first, count, values, k.round_float16);
}
void scatter(const TensorRef& to, int64_t first, int64_t count, const double* values) {
  scatter_any(to, first, count, values);
}

void gather(const int8_t* from, const Strided& lie, int64_t first, int64_t count, int8_t* out) {
  collected(from, &lie, first, count, out);
}
void scatter(int8_t* to, const Strided& lie, int64_t first, int64_t count, const int8_t* values) {
  each_element(to, &lie, first, count, [&](int8_t& x, int64_t k) { x = values[k]; });
}

}  // namespace hfac
