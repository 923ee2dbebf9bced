"""H-Fac as a torch optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import matricize, ops
from ..schedules import Scalar
from . import options
from .base import FactoredOptimizer
from .state import Side


class HFac(FactoredOptimizer):
    r"""H-Fac: Adam's two moments as rank-1 factors, from factorized Hamiltonian descent.

    Nguyen, Chen, Liu, Liu, *Memory-Efficient Optimization with Factorized Hamiltonian Descent*, AISTATS 2025,
    arXiv 2406.09958, Algorithm 1. For a parameter viewed as a matrix of m rows and n columns the state is m + n
    numbers for each moment; vectors, scalars and matrices with one row or column keep both moments whole.

    Args:
        params: tensors, (name, tensor) pairs, or groups (dicts with "params" and any option below). float16, bfloat16,
            float32 or float64; gradients may have another of these types. Arithmetic and state are float32 (float64 for
            float64 parameters).
        lr: learning rate >= 0, a number or a 0-d tensor (default 1e-3).
        betas: decays of the first and second moment, each in [0, 1) (default (0.9, 0.999)).
        eps: added to every squared gradient, > 0 (default 1e-30).
        clip_threshold: d of the clip factor c = 1 / max(1, rms(U) / d), U = G / sqrt(V), > 0, or None for no clipping
            (default 1.0). Whole moments multiply their whole direction by c, factored matrices U alone, as in the
            paper: where all rows or all columns of a gradient are alike and it is larger than those before, their step
            may go against it (docs/clipping.md).
        weight_decay: decoupled, as in AdamW: lr * weight_decay * W is taken off; >= 0, a number or a 0-d tensor
            (default 0).
        matricize: "balanced" cuts a tensor's dimensions in two so that rows + columns are fewest; "flatten" takes
            the first dimension as rows (default "balanced"). Fixed once state exists.
        dense: keep both moments whole, whatever the shape (default False). Fixed once state exists.
        batch_dims: so many leading dimensions count slices (stacked experts E x a x b: 1); each slice is factored and
            clipped as a parameter of its own would be (default 0). With nonfinite="skip" a slice whose gradient is not
            finite stays as it is while the others go on: ``skipped`` counts the steps in which any stayed, ``step``
            all but those in which every one did. Fixed once state exists.
        maximize: climb instead of descend (default False).
        capturable: keep ``step`` on the parameter's device and never read it on the host, for CUDA graphs (default
            False). Make one step outside of graphs before a capture, and keep the optimizer for as long as the graph is
            replayed: it owns what replays read and write.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; an explicit one that cannot be had raises.
        nonfinite: "propagate" lets inf and NaN in a gradient through, as torch.optim does; "skip" leaves such a
            parameter and its state as they are, without synchronising the device, and counts it in
            ``state[p]["skipped"]``. A rank-1 state spreads one NaN over a whole matrix for ever. An
            element also counts as non-finite when its square times the number of elements overflows.
        amp_scaling: leave unscaling, and whether to step at all, to the step when a `torch.amp.GradScaler` drives it,
            as torch's fused optimizers do: the CUDA kernels then do both as they go, and the host waits for nothing
            (default False, because some trainers refuse gradient clipping with such an optimizer).
        rounding: "nearest", or "stochastic" for bfloat16 and float16 parameters: a new value is rounded up or down with
            the probability of its distance from either, so that updates smaller than half the distance between two
            values of the type are not lost but made now and then. The random bits hang on ``seed``, the step, the
            parameter's position among the optimizer's and the element's index alone (`hfac.rounding`): the same on
            any number of ranks, on any backend and after a resume (default "nearest").
        seed: of the random bits, in [0, 2^64) (default 0).
        master: None, or master weights for bfloat16 parameters, of which the parameter is the rounded value and the
            state ``master_low`` the rest: "split" keeps 16 bits, 2 bytes per parameter, and steps exactly as on float32
            parameters; "split8" keeps 8 bits, 1 byte. See `fp32_state_dict` and `load_fp32_state_dict`. Other types
            have no use for them; float16 is refused (default None).
        max_grad_norm: clip by the norm of all gradients of the optimizer, > 0, as `torch.nn.utils.clip_grad_norm_`
            before the step does; one number for all groups (default None, no clipping). The norm, `grad_norm`, is
            formed in float32, of gradients without a GradScaler's scale, and not read on the host. The fused kernels
            have that of a matrix from the step's first read of its gradient; where they then clip, they read it once
            more. On a GPU no gradient is written; elsewhere they are multiplied in place. With nonfinite="skip"
            gradients (of stacks: slices) whose norm is not finite are left out of it; with "propagate" they make all
            gradients NaN or 0, as in torch. Sharded gradients have one norm on all ranks, from the sums that a step
            adds up; where they are clipped, these are added up again.
        watch: the step's kernels sum up what `diagnostics` tells, which is then exact, of the step as it was made, and
            there when the gradients are gone; it stays on the device until it is asked for. Changes no bit of what
            is computed, and costs time. Not for sharded parameters (default False).

    State of a parameter (k is `hfac.matricize.cut` of its shape): ``exp_avg_row``, ``exp_avg_sq_row`` of shape
    p.shape[:k], ``exp_avg_col``, ``exp_avg_sq_col`` of shape p.shape[k:]; or ``exp_avg``, ``exp_avg_sq`` of p.shape;
    and ``step``. With ``batch_dims`` it is that of one slice with p.shape[:batch_dims] in front, and one ``step``. With
    ``master`` also ``master_low``, int16 or int8 of p.shape.

    Raises:
        TypeError, ValueError: an option or a parameter that cannot be; the message says what is required.
        RuntimeError: a sparse or complex tensor; a backend that cannot be had.
    """

    _algorithm = "hfac"
    _own_option = "matricize"
    _rules = {
        "betas": options.pair(options.number(0.0, 1.0, open_high=True)),
        "eps": options.number(0.0, open_low=True),
        "clip_threshold": options.number(0.0, open_low=True, none="no clipping"),
        "matricize": options.choice(*matricize.MATRICIZE),
    }

    def __init__(
        self,
        params: Any,
        lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-30,
        clip_threshold: float | None = 1.0,
        weight_decay: Scalar = 0.0,
        *,
        matricize: str = "balanced",
        dense: bool = False,
        batch_dims: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        nonfinite: str = "propagate",
        amp_scaling: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        master: str | None = None,
        max_grad_norm: float | None = None,
        watch: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            clip_threshold=clip_threshold,
            weight_decay=weight_decay,
            matricize=matricize,
            dense=dense,
            batch_dims=batch_dims,
            maximize=maximize,
            capturable=capturable,
            backend=backend,
            nonfinite=nonfinite,
            amp_scaling=amp_scaling,
            rounding=rounding,
            seed=seed,
            master=master,
            max_grad_norm=max_grad_norm,
            watch=watch,
        )
        super().__init__(params, defaults)

    def _check_param(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        super()._check_param(where, param, group)
        smallest = torch.finfo(ops.state_dtype(param.dtype)).tiny
        if group["eps"] < smallest:
            raise ValueError(
                f"{where} has dtype {param.dtype}, for which eps must be at least {smallest:.3g}, got {group['eps']}: "
                "in the arithmetic's type it would be zero, and a zero gradient would give 0/0"
            )

    def _sides(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> tuple[Side, Side] | None:
        k, dims = matricize.cut(shape, group["matricize"]), tuple(range(len(shape)))
        return None if k is None else ((shape[:k], dims[:k]), (shape[k:], dims[k:]))

    def _scalars(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "clip_threshold": group["clip_threshold"],
        }
