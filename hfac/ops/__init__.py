"""One function per op: the only validation of tensors, and the choice of backend.

Every op takes lists with one entry per parameter, all on one device, and updates parameters and states in place.
What an op computes is defined, with shapes, by the function of the same name in `hfac.reference`. Arguments are
checked before anything is written; a `Bound` op checks a call now and makes it later, so that several calls can be
checked before the first one writes. Scalars (lr, decays, ...) have been checked where they were set
(`hfac.optim.options`).

Every op that writes parameters takes ``master_lows``, ``places``, ``seed`` and ``step``: how they are stored, where
that is more than one rounding to the nearest (`hfac.rounding`). Those on whole parameters take ``watched``, to which
they add what a step tells of itself.

Errors of every op:
    ValueError: lists of different lengths; a shape, or the type of a state, that does not fit its parameter.
    RuntimeError: a sparse or complex tensor; tensors on different devices; a backend that cannot serve them.
"""

from ..memory import address, is_fake, sharing
from .checks import LOWS, PARAM_DTYPES, check_tensor, check_writable, state_dtype
from .parts import PART_OPS, hfac_apply_, hfac_dense_apply_, hfac_dense_squares, hfac_sums, nonfinite, smmf_sums_step_
from .steps import (
    FIRST_MOMENT,
    STATES,
    WATCHED,
    Bound,
    advance_steps_,
    counted_natively,
    hfac_dense_step_,
    hfac_step_,
    read_steps,
    smmf_dense_step_,
    smmf_step_,
    whereabouts,
)
from .update import Update

__all__ = [
    "Bound",
    "FIRST_MOMENT",
    "LOWS",
    "PARAM_DTYPES",
    "PART_OPS",
    "STATES",
    "Update",
    "WATCHED",
    "address",
    "advance_steps_",
    "check_tensor",
    "check_writable",
    "counted_natively",
    "hfac_apply_",
    "hfac_dense_apply_",
    "hfac_dense_squares",
    "hfac_dense_step_",
    "hfac_step_",
    "hfac_sums",
    "is_fake",
    "nonfinite",
    "read_steps",
    "sharing",
    "smmf_dense_step_",
    "smmf_step_",
    "smmf_sums_step_",
    "state_dtype",
    "whereabouts",
]
