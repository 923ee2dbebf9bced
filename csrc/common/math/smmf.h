// SMMF on one element (SMMF, Algorithm 1); V is float, double, or a vector of them. The association of every product is
// that of hfac/reference/smmf.py, which makes the results equal to the bit.
#pragma once

#include "roots.h"

namespace hfac {
namespace HFAC_LEVEL {

// M = (+-)(b1 r_i) c_j + (1 - b1) g; `old` is the signed product.
template <class V>
HFAC_HD V smmf_first_moment(V old, V rest1, V g) {
  return old + rest1 * g;
}

// V = (b2 r_i) c_j + (1 - b2) g^2; `old` is the product (or, whole, b2 V).
template <class V>
HFAC_HD V smmf_second_moment(V old, V rest2, V g) {
  return old + rest2 * (g * g);
}

template <class V>
HFAC_HD V smmf_update(V w, V lr, V first, V second, V eps) {
  return w - lr * (first / (root(second) + eps));
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
