"""H-Fac as a torch optimizer."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import matricize, ops
from ..schedules import Scalar
from . import options
from .base import FactoredOptimizer
from .state import Side

FIRST_MOMENT = ("factored", "int8")
#: a larger one is noticeable where gradients are smaller than 1e-6
LARGEST_USUAL_EPS = 1e-12


class HFac(FactoredOptimizer):
    r"""H-Fac: Adam's two moments as rank-1 factors, from factorized Hamiltonian descent.

    Nguyen, Chen, Liu, Liu, *Memory-Efficient Optimization with Factorized Hamiltonian Descent*, AISTATS 2025,
    arXiv 2406.09958, Algorithm 1. For a parameter viewed as a matrix of m rows and n columns the state is m + n
    numbers for each moment; vectors, scalars and matrices with one row or column keep both moments whole.
    ``first_moment="int8"`` keeps the first moment of matrices whole, in one byte per element, and m + n numbers for the
    second: Adam's step with a rank-1 second moment.

    Args:
        params: tensors, (name, tensor) pairs, or groups (dicts with "params" and any option below). float16, bfloat16,
            float32 or float64; gradients may have another of these types. Arithmetic and state are float32 (float64 for
            float64 parameters).
        lr: learning rate >= 0, a number or a 0-d tensor (default 1e-3).
        betas: decays of the first and second moment, each in [0, 1) (default (0.9, 0.999)).
        eps: added to every squared gradient, > 0 (default 1e-30).
        clip_threshold: d of the clip factor c = 1 / max(1, rms(U) / d), U = G / sqrt(V), > 0, or None for no clipping
            (default 1.0). It multiplies the whole direction where the first moment is whole, and U alone where it is
            factored, as in the paper: there, a step may go against a gradient whose rows or columns are all alike and
            which is larger than those before (docs/clipping.md).
        weight_decay: decoupled, as in AdamW: subtracts lr * weight_decay * W; >= 0, a number or a 0-d tensor
            (default 0).
        matricize: "balanced" splits a tensor's dimensions in two so that rows + columns are fewest; "flatten" takes
            the first dimension as rows (default "balanced"). Cannot change once state exists.
        first_moment: of matrices, "factored", or "int8": a code for every element, which stands for the moment divided
            by the root of the second, so that no scales are kept. It costs 1 byte per parameter and trains better than
            the factored one (docs/choosing.md). Vectors, and with ``dense`` everything, keep whole moments either way.
            Kernels for it: "cuda" and "cpu"; elsewhere "auto" takes the reference (default "factored"). Cannot change
            once state exists; `hfac.convert` translates state dicts.
        dense: keep both moments whole for any shape (default False). Cannot change once state exists.
        batch_dims: number of leading dimensions that index slices (stacked experts E x a x b: 1). Each slice is
            factored and clipped like a parameter of its own (default 0). With nonfinite="skip" only slices whose
            gradient is not finite keep their values: ``skipped`` counts the steps in which any slice did, ``step`` all
            but those in which every slice did. Cannot change once state exists.
        maximize: maximize the objective instead of minimizing it (default False).
        capturable: keep ``step`` on the parameter's device and never read it on the host, for CUDA graphs (default
            False). Make one step outside of graphs before a capture, and keep the optimizer as long as the graph is
            replayed: it owns the memory that replays read and write.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; one that is named but unavailable raises.
        nonfinite: "propagate" lets inf and NaN in a gradient through, as torch.optim does. "skip" leaves such a
            parameter and its state unchanged, without synchronising the device, and counts it in
            ``state[p]["skipped"]``: with rank-1 state, one NaN would permanently poison the matrix. An element also
            counts as non-finite if its square times the number of elements overflows.
        amp_scaling: let the step do what a `torch.amp.GradScaler` otherwise does before it, unscaling and skipping, as
            torch's fused optimizers do. The CUDA kernels then do both on the fly, and the host never waits (default
            False, because some trainers refuse gradient clipping with such an optimizer).
        rounding: "nearest", or "stochastic" for bfloat16 and float16 parameters: a new value is rounded up or down with
            probabilities that preserve it on average, so that updates too small for the type are made now and then
            instead of lost. The random bits depend only on ``seed``, the step, the parameter's position among the
            optimizer's and the element's index (`hfac.rounding`): they are the same on any number of ranks, on any
            backend and after a resume (default "nearest").
        seed: of the random bits, in [0, 2^64) (default 0).
        master: None, or master weights for bfloat16 parameters: the parameter is their rounded value, and the state
            ``master_low`` holds the remaining bits. "split" keeps 16 bits, 2 bytes per parameter, and steps exactly as
            float32 parameters do; "split8" keeps 8 bits, 1 byte. See `fp32_state_dict` and `load_fp32_state_dict`.
            float16 is refused; other types do not need it (default None).
        max_grad_norm: clip by the norm of all gradients of the optimizer, > 0, as `torch.nn.utils.clip_grad_norm_`
            before the step does; one number for all groups (default None, no clipping). The norm, `grad_norm`, is
            computed in float32 from gradients without a GradScaler's scale, and not read on the host. The fused kernels
            get a matrix's norm from the step's first read of its gradient, and read that once more if they then clip.
            On a GPU gradients are not modified; elsewhere they are multiplied in place. With nonfinite="skip",
            gradients (of stacks: slices) whose norm is not finite are left out; with "propagate" they make all
            gradients NaN or 0, as in torch. Sharded gradients have one norm on all ranks, from the sums that a step
            adds up; if they are clipped, these are added up again.
        watch: have the step's kernels sum up what `diagnostics` reports, which is then exact and available after the
            gradients are gone; it stays on the device until asked for. Does not change the step's numbers, but takes
            time. Not for sharded parameters (default False).

    State of a parameter (k is `hfac.matricize.cut` of its shape): ``exp_avg_row``, ``exp_avg_sq_row`` of shape
    p.shape[:k], ``exp_avg_col``, ``exp_avg_sq_col`` of shape p.shape[k:]; with first_moment="int8" ``exp_avg_q``, int8
    of p.shape, in the place of ``exp_avg_row`` and ``exp_avg_col``; or ``exp_avg``, ``exp_avg_sq`` of p.shape; and
    ``step``. With ``batch_dims``, factors and moments are those of one slice with p.shape[:batch_dims] in front.
    With ``master`` also ``master_low``, int16 or int8 of p.shape.

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
        "first_moment": options.choice(*FIRST_MOMENT),
    }
    _state_options = {"first_moment": "factored"}

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
        matricize: Literal["balanced", "flatten"] = "balanced",
        first_moment: Literal["factored", "int8"] = "factored",
        dense: bool = False,
        batch_dims: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        nonfinite: Literal["propagate", "skip"] = "propagate",
        amp_scaling: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        master: Literal["split", "split8"] | None = None,
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
