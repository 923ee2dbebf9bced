"""Every op of the package in plain torch: the definition that each backend is checked against.

H-Fac: Nguyen, Chen, Liu, Liu, *Memory-Efficient Optimization with Factorized Hamiltonian Descent*, AISTATS 2025.
SMMF: Park, Lee, *SMMF: Square-Matricized Momentum Factorization for Memory-Efficient Optimization*, AAAI 2025.

An op takes lists, one entry per parameter, and writes parameters and states in place. Its arguments are valid
(`hfac.ops` checks them). Symbols are the papers': a parameter W with gradient G is a matrix of m rows and n columns
for H-Fac, of n rows and m columns for SMMF; names ending in `_row` have one entry per row, in `_col` one per column.

Arithmetic is done in the type of the states: float32, or float64 for float64 parameters; only the new parameter is
rounded to its own type. `lr`, `weight_decay`, `beta1` and `beta2` are floats or 0-d tensors; the two decays, which
arrive evaluated for the step (`hfac.schedules`), may also be 1-d with one entry per parameter.

`nonfinite`, where given, is an int32 tensor [len(params)] that the op fills: 1 where a gradient holds an element whose
square, times the number of elements, is not finite: inf, NaN, or so large that a sum of squares could overflow. Such a
parameter and its states keep every bit. The test is of elements, so that no order of summation can change its outcome.

A new parameter is rounded to the nearest number of its type, but for two options (`hfac.rounding`). `master_lows`,
where given, are int16 or int8 tensors of the parameters' shapes: with its entry a bfloat16 parameter makes a master
weight, which is what is read and written. `places`, where given, ask for stochastic rounding with the random bits of
`seed` and `step`, the number t of the step, a float or a tensor, also 1-d with one entry per parameter.

`watched`, where given, is a float64 tensor [len(params), 5], to whose rows what the step tells of itself is added,
unless it is refused: the sum of squares of W's change before it is stored; how many elements stay as they are once the
new ones are rounded to the nearest of what is stored; the sum of squares of the direction (H-Fac: U before clipping;
SMMF: M / (sqrt(V) + eps)); and, of H-Fac's matrices, how many rows and columns of the gradient hold nothing but zeros.
"""

from .hfac import (
    hfac_apply_,
    hfac_dense_squares,
    hfac_dense_step_,
    hfac_int8_apply_,
    hfac_int8_step_,
    hfac_step_,
    hfac_sums,
)
from .smmf import nnmf, smmf_dense_step_, smmf_step_, smmf_sums_step_

__all__ = [
    "hfac_step_",
    "hfac_int8_step_",
    "hfac_sums",
    "hfac_apply_",
    "hfac_int8_apply_",
    "hfac_dense_step_",
    "hfac_dense_squares",
    "smmf_step_",
    "smmf_sums_step_",
    "smmf_dense_step_",
    "nnmf",
]
