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
  typedef int8_t Packed __attribute__((vector_size(V::kPartLanes)));

  typename V::IntPart part[V::kParts];

  HFAC_HD static Codes load(const int8_t* p) {
    Codes q;
    HFAC_EACH_PART {
      Packed packed;
      memcpy(&packed, p + k * V::kPartLanes, sizeof(packed));
      q.part[k] = __builtin_convertvector(packed, typename V::IntPart);
    }
    return q;
  }
  HFAC_HD void store(int8_t* p) const {
    HFAC_EACH_PART {
      const Packed packed = __builtin_convertvector(part[k], Packed);
      memcpy(p + k * V::kPartLanes, &packed, sizeof(packed));
    }
  }

  // What they stand for: q |q| / (127.5^2 - q^2).
  HFAC_HD Vec<T> decoded() const {
    Vec<T> q;
    HFAC_EACH_PART q.part[k] = __builtin_convertvector(part[k], typename V::Part);
    return q * magnitude(q) / (Vec<T>(T(127.5 * 127.5)) - q * q);
  }

  // Those of `x`; `held` is what these here stand for. Where a code would stay although |x| is smaller it goes one
  // towards zero.
  HFAC_HD Codes next(Vec<T> x, Vec<T> held) const {
    const Vec<T> size = magnitude(x), was = magnitude(held);
    // Adding this leaves a whole number, rounded to the nearest, ties to even, in the lowest bits.
    const Vec<T> whole(sizeof(T) == 4 ? T(8388608) : T(4503599627370496));
    const Vec<T> scaled = Vec<T>(T(127.5)) * root(size / (Vec<T>(T(1)) + size)) + whole;
    Codes out;
    HFAC_EACH_PART {
      using Int = typename V::IntPart;
      Int code = (Int)scaled.part[k] & 0xff & (Int)(scaled.part[k] == scaled.part[k]);  // 0 for NaN
      code += (Int)(code > 127);
      const Int negative = (Int)(x.part[k] < 0);
      code = (code ^ negative) - negative;
      const Int stays = (Int)(code == part[k]) & (Int)(size.part[k] < was.part[k]);
      out.part[k] = code - (stays & ((Int)(code < 0) | 1));
    }
    return out;
  }
};

template <class T, class Sw, class Sg, int R>
HFAC_HD void hfac_int8_rows(const HfacUpdate<T>& a, int64_t i) {
  constexpr int64_t L = Vec<T>::kLanes;
  const Sg* g[R];
  Sw* w[R];
  int8_t* q[R];
  for (int r = 0; r < R; ++r) {
    g[r] = static_cast<const Sg*>(a.grad) + (i + r) * a.grad_stride;
    w[r] = static_cast<Sw*>(a.param) + (i + r) * a.param_stride;
    q[r] = a.codes + (i + r) * a.cols;
  }
  const Vec<T> beta1(a.beta1), rest1(a.rest1), lr(a.step), decay(a.decay);
  // Returns the new weights.
  const auto step = [&](int r, Vec<T> w, Vec<T> g, Vec<T> unit, Vec<T> scale, Codes<T>& codes)
                        __attribute__((always_inline)) {
                          const Vec<T> held = codes.decoded(), fresh = rest1 * (g * scale * Vec<T>(a.row_scale[i + r]));
                          const Vec<T> x = Vec<T>(a.row_first[i + r]) * unit * held + fresh;
                          codes = codes.next(x, held);
                          return hfac_int8_update(w, x, fresh, beta1, lr, decay);
                        };
  int64_t j = 0;
  for (; j + L <= a.cols; j += L) {
    const Vec<T> unit = load(a.col_first + j), scale = load(a.col_scale + j);
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(g[r] + j) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(w[r] + j) + kAhead, 1);
      __builtin_prefetch(reinterpret_cast<const char*>(q[r] + j) + kAhead / 2, 1);
      Codes<T> codes = Codes<T>::load(q[r] + j);
      store(w[r] + j, step(r, load(static_cast<const Sw*>(w[r] + j)), load(g[r] + j), unit, scale, codes));
      codes.store(q[r] + j);
    }
  }
  if (const int64_t left = a.cols - j; left > 0) {
    const Vec<T> unit = load_part<T>(a.col_first + j, left), scale = load_part<T>(a.col_scale + j, left);
    for (int r = 0; r < R; ++r) {
      int8_t lanes[L] = {};
      copy_part(static_cast<int8_t*>(lanes), static_cast<const int8_t*>(q[r] + j), left);
      Codes<T> codes = Codes<T>::load(lanes);
      const Vec<T> y = load_part<T>(w[r] + j, left);
      store_part(w[r] + j, step(r, y, load_part<T>(g[r] + j, left), unit, scale, codes), left);
      codes.store(lanes);
      copy_part(q[r] + j, static_cast<const int8_t*>(lanes), left);
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
