"""H-Fac as a torch optimizer."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import matricize, ops
from ..types import Backend, FirstMoment, Master, Matricize, Nonfinite, Rounding, Scalar
from . import options
from .base import FactoredOptimizer
from .state import Side

#: a larger one is noticeable where gradients are smaller than 1e-6
LARGEST_USUAL_EPS = 1e-12


class HFac(FactoredOptimizer):
    r"""H-Fac: Adam's two moments as rank-1 factors, from factorized Hamiltonian descent.

    Nguyen, Chen, Liu, Liu, *Memory-Efficient Optimization with Factorized Hamiltonian Descent*, AISTATS 2025,
    arXiv 2406.09958, Algorithm 1. A matrix of m rows and n columns keeps m + n numbers for each moment; vectors and
    scalars keep both whole. docs/optimizers.md has each option at length; any of them may be a group's own.

    What it optimizes, and by which step:
        params: tensors, (name, tensor) pairs, or groups (dicts with "params"); float16, bfloat16, float32 or float64.
        lr: learning rate >= 0, a number or a 0-d tensor (default 1e-3).
        betas: decays of the first and second moment, each in [0, 1) (default (0.9, 0.999)).
        eps: added to every squared gradient, > 0 (default 1e-30). Not AdamW's.
        clip_threshold: d > 0 of the factor 1 / max(1, rms(U) / d) on U = G / sqrt(V), of all of the step where the
            first moment is whole; None does not clip (default 1.0; docs/clipping.md).
        weight_decay: decoupled, as in AdamW; >= 0, a number or a 0-d tensor (default 0).
        max_grad_norm: clips by the norm of all gradients, > 0, or None (default None; docs/release.md).
        maximize: ascend (default False).
        nonfinite: "propagate" lets inf and NaN in gradients through; "skip" leaves such a parameter and its state
            unchanged, "skip-step" all of them, and counts it in ``state[p]["skipped"]`` (default "propagate").
        amp_scaling: the step does what a `torch.amp.GradScaler` would do before it (default False).

    How it is stored (the first five cannot change once state exists):
        first_moment: of matrices, "factored", or "int8": whole, 1 byte per element (default "factored").
        dense: both moments whole, for any shape (default False).
        batch_dims: leading dimensions that index slices, each factored and clipped on its own; experts of shape
            E x a x b: 1 (default 0; docs/parameter-policy.md).
        views: equal pieces of a fused weight, each likewise; (3, heads) of a fused QKV weight (default 1).
        views_dim: the dimension after ``batch_dims`` that ``views`` cuts; 1 of weights that are in x out, as
            transformers' Conv1D has them (default 0).
        matricize: "balanced" splits dimensions so that rows + columns are fewest, "flatten" takes the first as rows
            (default "balanced").
        rounding: "nearest", or "stochastic" for bfloat16 and float16 parameters (default "nearest"; docs/bf16.md).
        seed: of the random bits of rounding, in [0, 2^64) (default 0).
        master: of bfloat16 parameters, None, "split" or "split8": the bits that a float32 has beyond them, in 2 or 1
            bytes per element (default None; docs/bf16.md).

    Where it runs:
        backend: "auto", "reference", "cpu", "triton" or "cuda" (default "auto"; docs/backends.md).
        capturable: for CUDA graphs; ``step`` stays on the device (default False; docs/compile-and-graphs.md).
        watch: the step records what `diagnostics` reports (default False; docs/diagnostics.md).

    State of a parameter, float32 (float64 of float64 parameters); k is `hfac.matricize.cut` of its shape:
        ``exp_avg_row``, ``exp_avg_sq_row`` of p.shape[:k], ``exp_avg_col``, ``exp_avg_sq_col`` of p.shape[k:]; with
        "int8", ``exp_avg_q``, int8 of p.shape, in place of ``exp_avg_row`` and ``exp_avg_col``; where moments are whole
        ``exp_avg``, ``exp_avg_sq`` of p.shape. And ``step``; with ``master``, ``master_low``, int16 or int8 of p.shape.
        With ``batch_dims``, factors are those of one slice with p.shape[:batch_dims] in front, then with ``views`` the
        number of pieces.

    Raises:
        TypeError, ValueError: an invalid option or parameter; the message says what is required.
        RuntimeError: a sparse or complex tensor; an unavailable backend, or one that lacks a step that is needed.
    """

    _algorithm = "hfac"
    _own_option = "matricize"
    _rules = {
        "betas": options.pair(options.number(0.0, 1.0, open_high=True)),
        "eps": options.number(0.0, open_low=True),
        "clip_threshold": options.number(0.0, open_low=True, none="no clipping"),
        "matricize": options.choice(*matricize.MATRICIZE),
        "first_moment": options.choice(*get_args(FirstMoment)),
    }
    _state_options = {"first_moment": "factored"}
    _elsewhere = {
        "beta": "pass betas=(beta, 0.999)",
        "decay_rate": "pass betas: the second moment decays by betas[1]",
        "growth_rate": "leave it out: betas[0] is the same in every step",
        "vector_reshape": "leave it out: moments of vectors are whole",
        "signs": "leave it out: HFac keeps no signs, and takes any placement",
        "weight_decay_mode": "leave it out: weight_decay is AdamW's",
    }

    @options.by_name(_elsewhere)
    @options.positional_to(
        "eps",
        "pass weight_decay, AdamW's next, and clip_threshold, which was the next here, by name.",
    )
    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-30,
        *,
        clip_threshold: float | None = 1.0,
        weight_decay: Scalar = 0.0,
        matricize: Matricize = "balanced",
        first_moment: FirstMoment = "factored",
        dense: bool = False,
        batch_dims: int = 0,
        views: int | tuple[int, ...] = 1,
        views_dim: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        backend: Backend = "auto",
        nonfinite: Nonfinite = "propagate",
        amp_scaling: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        master: Master | None = None,
        max_grad_norm: float | None = None,
        watch: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def _advice(self) -> Iterator[str]:
        yield from super()._advice()
        largest = max(group["eps"] for group in self.param_groups)
        if largest > LARGEST_USUAL_EPS:
            yield (
                f"eps={largest:g} is added to every squared gradient, where AdamW adds its own to the root of their "
                f"average: it weighs as much as gradients of {largest**0.5:.1g}, and makes updates smaller where they "
                "are no larger. Leave it out for the usual 1e-30."
            )

    def _check_param(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        super()._check_param(where, param, group)
        smallest = torch.finfo(ops.state_dtype(param.dtype)).tiny
        if group["eps"] < smallest:
            raise ValueError(
                f"{where} has dtype {param.dtype}, for which eps must be at least {smallest:.3g}, got {group['eps']}: "
                "it would round to zero, and a zero gradient would give 0/0"
            )

    def _sides(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> tuple[Side, Side] | None:
        k, dims = matricize.cut(shape, group["matricize"]), tuple(range(len(shape)))
        return None if k is None else ((shape[:k], dims[:k]), (shape[k:], dims[k:]))

    def _scalars(self, group: Mapping[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "clip_threshold": group["clip_threshold"]}
