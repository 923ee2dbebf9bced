"""Types of arguments: the words of each choice, and the options of groups and of state dicts by name.

The words are the ones that are checked when the code runs, too: `typing.get_args` gives them to the options' rules.
"""

import sys
from typing import Literal, TypedDict

from .schedules import Scalar

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

__all__ = [
    "AdamWOptions",
    "Backend",
    "FirstMoment",
    "GroupOptions",
    "HFacOptions",
    "Master",
    "Matricize",
    "Nonfinite",
    "Rounding",
    "SMMFOptions",
    "Scalar",
    "Signs",
    "Unpack",
    "WeightDecayMode",
]

#: those that the package brings; who registers another one tells the type checker
Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
FirstMoment = Literal["factored", "int8"]
Master = Literal["split", "split8"]
Matricize = Literal["balanced", "flatten"]
Nonfinite = Literal["propagate", "skip", "skip-step"]
Rounding = Literal["nearest", "stochastic"]
Signs = Literal["bits", "bytes"]
WeightDecayMode = Literal["adamw", "adam"]


class _Both(TypedDict, total=False):
    lr: Scalar
    maximize: bool
    nonfinite: Nonfinite
    rounding: Rounding
    seed: int
    master: Master | None
    max_grad_norm: float | None


class _Policy(TypedDict, total=False):
    """What `hfac.param_groups` decides for each parameter."""

    weight_decay: Scalar
    dense: bool
    batch_dims: int
    views: int | tuple[int, ...]
    views_dim: int


class _HFac(TypedDict, total=False):
    betas: tuple[float, float]
    eps: float
    clip_threshold: float | None
    matricize: Matricize
    first_moment: FirstMoment


class _SMMF(TypedDict, total=False):
    beta: float | None
    eps: float
    decay_rate: float
    growth_rate: float
    vector_reshape: bool
    weight_decay_mode: WeightDecayMode
    signs: Signs


class _Execution(TypedDict, total=False):
    """How a step is carried out, which no state dict says."""

    capturable: bool
    backend: Backend
    amp_scaling: bool
    watch: bool


class HFacOptions(_Both, _Policy, _HFac, total=False):
    """Options of `hfac.HFac` that its state dicts hold."""


class SMMFOptions(_Both, _Policy, _SMMF, total=False):
    """Options of `hfac.SMMF` that its state dicts hold."""


class GroupOptions(_Both, _HFac, _SMMF, _Execution, total=False):
    """Options of either optimizer that every group of `hfac.param_groups` has in common."""


class AdamWOptions(TypedDict, total=False):
    """Options of `torch.optim.AdamW`."""

    lr: Scalar
    betas: tuple[Scalar, Scalar]
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
