// What H-Fac's folds make of the sums of a row or a column.
#pragma once

#include "../common/math/hfac.h"
#include "stored.cuh"

namespace hfac {

using common::hfac_average;
using common::hfac_clip_divisor;
using common::hfac_half_drift;
using common::root;

// Stores new moments of row (or column) k, and returns half of phi (or psi). `before`: the first one as it was;
// `length`: elements of a whole row.
template <class T>
HFAC_DEVICE T step_moments(void* first, void* second, int64_t k, T before, T mean, T square, T length,
                           const Decay<T>& b1) {
  const T average = hfac_average(b1.beta, before, b1.rest, mean);
  static_cast<T*>(first)[k] = average;
  static_cast<T*>(second)[k] = square;
  return hfac_half_drift(b1.beta, average, mean, square, length);
}

// Stores the new second moment of row (or column) k, and returns the root of what it was, divided by its root.
template <class T>
HFAC_DEVICE T step_unit(void* second, int64_t k, T before, T square) {
  static_cast<T*>(second)[k] = square;
  return root(before) / root(square);
}

template <class T>
HFAC_DEVICE T clip_divisor(const Options& o, T mean_square) {
  return o.clip ? hfac_clip_divisor(root(mean_square), o.clip_threshold) : T(1);
}

// Of codes how sqrt(R) has grown, 0 where R was 0.
template <class T>
HFAC_DEVICE T growth_of(T scale, double old) {
  return old == 0 ? T(0) : scale / root(static_cast<T>(old));
}

}  // namespace hfac
