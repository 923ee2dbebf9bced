// H-Fac on one element (H-Fac, Algorithm 1); V is float, double, or a vector of them.
#pragma once

#include "roots.h"

namespace hfac {
namespace HFAC_LEVEL {

// old <- b old + (1 - b) new, for means and sums alike.
template <class V>
HFAC_HD V hfac_average(V beta, V old, V rest, V fresh) {
  return beta * old + rest * fresh;
}

// Half of phi_i (or psi_j): b1 (u - mean) / sqrt(r / length) / 2. Halving is exact, so the sum of two halves is the
// reference's (phi + psi) / 2.
template <class V>
HFAC_HD V hfac_half_drift(V beta1, V average, V mean, V square, V length) {
  return beta1 * (average - mean) / root(square / length) * V(0.5);
}

// W - lr (drift + clip(U) + wd W) with U = g / sqrt(s_j) * (sqrt(R / r_i), clip factor included).
template <class V>
HFAC_HD V hfac_update(V w, V g, V half_phi, V half_psi, V col_scale, V row_scale, V lr, V weight_decay) {
  return w - lr * (((half_phi + half_psi) + g * col_scale * row_scale) + weight_decay * w);
}

// The same with lr, and its sign where the gradient's is flipped, in the factors: `half_phi` and `half_psi` times lr,
// `row_scale` times +-lr; `decay` is lr wd.
template <class V>
HFAC_HD V hfac_update_by_lr(V w, V g, V half_phi, V half_psi, V col_scale, V row_scale, V decay) {
  return w - (((half_phi + half_psi) + g * col_scale * row_scale) + decay * w);
}

// W - lr (c (b1 x + (1 - b1) U) + wd W) with the moment x in units of sqrt(V), of which the new gradient's share
// `fresh` is (1 - b1) U; `step` is lr c, `decay` lr wd.
template <class V>
HFAC_HD V hfac_int8_update(V w, V x, V fresh, V beta1, V step, V decay) {
  return w - (step * (beta1 * x + fresh) + decay * w);
}

// W - lr (c (b1 m + (1 - b1) g) / sqrt(q) + wd W) where both moments are whole: the clip factor c scales the whole
// direction. Divided first, so that no product of small numbers underflows.
template <class V>
HFAC_HD V hfac_dense_update(V w, V g, V average, V denominator, V clip, V beta1, V rest1, V lr, V weight_decay) {
  return w - lr * (hfac_average(beta1, average, rest1, g) / denominator * clip + weight_decay * w);
}

// What the update is divided by so that its root mean square is at most `threshold`: max(1, rms / threshold), which
// keeps a NaN.
template <class T>
HFAC_HD T hfac_clip_divisor(T rms, double threshold) {
  const T ratio = rms / static_cast<T>(threshold);
  return ratio <= T(1) ? T(1) : ratio;
}

}  // namespace HFAC_LEVEL
}  // namespace hfac
