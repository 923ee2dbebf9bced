// H-Fac's update of one element, of both forms of the first moment. `rough`: of a parameter of 16 bits without a master
// weight, products and sums are fused, which rounds less often than the reference does and takes 3 instructions less;
// all others take the reference's operations, to the bit.
#pragma once

#include "../common/math/hfac.h"
#include "element.cuh"

namespace hfac {

template <class T>
HFAC_DEVICE T updated(T w, T g, T half_phi, T half_psi, T col_scale, T row_scale, T lr, T weight_decay, bool rough) {
  if (!rough) return common::hfac_update(w, g, half_phi, half_psi, col_scale, row_scale, lr, weight_decay);
  const T direction = fused(g * col_scale, row_scale, half_phi + half_psi);
  return fused(-lr, fused(weight_decay, w, direction), w);
}

template <class T>
HFAC_DEVICE T updated_by_moment(T w, T moment, T fresh, T beta1, T step, T decay, bool rough) {
  if (!rough) return common::hfac_int8_update(w, moment, fresh, beta1, step, decay);
  return fused(-step, fused(beta1, moment, fresh), fused(-decay, w, w));
}

}  // namespace hfac
