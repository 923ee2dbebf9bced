"""Ops bound to tensors: the validation of what they are given, and the choice of backend.

Every op takes lists with one entry per parameter, all on one device, and updates parameters and states in place. What
it is given is described in `hfac.spec`, what it computes, with shapes, by the function of the same name in
`hfac.reference`. Arguments are checked before anything is written; an `OpCall` prepares a step and makes it later, so
that several can be checked before the first one writes. Scalars (lr, decays, ...) have been checked where they were set
(`hfac.optim.options`).

Errors of every op:
    ValueError: lists of different lengths; a shape, or the type of a state, that does not fit its parameter.
    RuntimeError: a sparse or complex tensor; tensors on different devices; a backend that cannot serve them.
"""

from ..backends.contract import Moved
from ..backends.snapshots import (
    ALIKE,
    OTHER,
    SAME,
    Snapshot,
    compare,
    grads_of,
    holds_none,
    identical,
    snapshot,
    values_are,
)
from ..clipping import Clip, as_clip
from .call import Inputs, OpCall, Statistics, joined, run
from .checks import PARAM_DTYPES, check_grads, check_length, check_tensor, check_writable, state_dtype
from .counters import Counters, DeviceCounters, are_down, copier, hfac_dense_squares, nonfinite
from .step_counts import StepCounts

__all__ = [
    "ALIKE",
    "Clip",
    "Counters",
    "DeviceCounters",
    "Inputs",
    "Moved",
    "OTHER",
    "OpCall",
    "PARAM_DTYPES",
    "SAME",
    "Snapshot",
    "Statistics",
    "StepCounts",
    "are_down",
    "as_clip",
    "check_grads",
    "check_length",
    "check_tensor",
    "check_writable",
    "compare",
    "copier",
    "grads_of",
    "hfac_dense_squares",
    "holds_none",
    "identical",
    "joined",
    "nonfinite",
    "run",
    "snapshot",
    "state_dtype",
    "values_are",
]
