"""Functional forms of both optimizers over lists of tensors, as `torch.optim` has them (``torch.optim.adamw.adamw``).

They advance the steps, evaluate the step's scalars, and hand tensors that can share a call to `hfac.ops` together.
The classes `hfac.HFac` and `hfac.SMMF` call them with the tensors of one parameter group.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, schedules
from .schedules import Scalar

States = Sequence[Tensor | None]


def hfac(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: States,
    exp_avg_cols: States,
    exp_avg_sq_rows: States,
    exp_avg_sq_cols: States,
    exp_avgs: States,
    exp_avg_sqs: States,
    state_steps: Sequence[Tensor],
    skipped: Sequence[Tensor] | None = None,
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    capturable: bool = False,
    backend: str = "auto",
) -> None:
    """One step of H-Fac (AISTATS 2025, Algorithm 1); see `hfac.HFac` for the options.

    Args:
        params, grads: tensors of the same shapes; types as `hfac.HFac` takes them.
        exp_avg_rows, exp_avg_sq_rows: per parameter, state of shape p.shape[:k] (`hfac.matricize.cut`), or None
            where the moments are whole.
        exp_avg_cols, exp_avg_sq_cols: likewise of shape p.shape[k:].
        exp_avgs, exp_avg_sqs: per parameter, whole moments of shape p.shape, or None where they are factored.
        state_steps: 0-d float tensors, the number of steps made so far; advanced by one.
        skipped: 0-d int32 tensors. Where given, a parameter whose gradient is not finite keeps its value and its state,
            its step included, and its entry here is advanced instead.
        capturable: read the steps on their device (needed in a CUDA graph).

    Raises:
        ValueError, RuntimeError: as `hfac.ops`; nothing has been written then.
    """

    def decays(step: Any) -> dict[str, Any]:
        return {"beta1": schedules.hfac_decay(step, beta1), "beta2": schedules.hfac_decay(step, beta2)}

    scalars = {
        "lr": schedules.as_scalar(lr),
        "eps": eps,
        "clip_threshold": clip_threshold,
        "weight_decay": schedules.as_scalar(weight_decay),
        "maximize": maximize,
        "backend": backend,
    }
    factored = {
        "exp_avg_rows": exp_avg_rows,
        "exp_avg_cols": exp_avg_cols,
        "exp_avg_sq_rows": exp_avg_sq_rows,
        "exp_avg_sq_cols": exp_avg_sq_cols,
    }
    dense = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _run(
        "hfac",
        factored,
        dense,
        params,
        grads,
        state_steps,
        skipped,
        capturable,
        decays,
        scalars,
    )


def smmf(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: States,
    exp_avg_cols: States,
    exp_avg_signs: States,
    exp_avg_sq_rows: States,
    exp_avg_sq_cols: States,
    exp_avgs: States,
    exp_avg_sqs: States,
    state_steps: Sequence[Tensor],
    skipped: Sequence[Tensor] | None = None,
    *,
    lr: Scalar,
    beta: float | None,
    eps: float,
    weight_decay: Scalar,
    decay_rate: float,
    growth_rate: float,
    weight_decay_mode: str = "adamw",
    maximize: bool = False,
    capturable: bool = False,
    backend: str = "auto",
) -> None:
    """One step of SMMF (AAAI 2025, Algorithm 1); see `hfac.SMMF` for the options.

    Args:
        params, grads: tensors of the same shapes; types as `hfac.SMMF` takes them.
        exp_avg_rows, exp_avg_sq_rows: per parameter, [n] of its square matrix (`hfac.matricize.square`), or None
            where the moments are whole.
        exp_avg_cols, exp_avg_sq_cols: likewise [m].
        exp_avg_signs: uint8 of `hfac.matricize.sign_shape`, likewise.
        exp_avgs, exp_avg_sqs: per parameter, whole moments of shape p.shape, or None where they are factored.
        state_steps, skipped, capturable: as for `hfac`.

    With beta None there is no first moment: the entries of exp_avg_rows, exp_avg_cols, exp_avg_signs and exp_avgs
    are not read.

    Raises:
        ValueError, RuntimeError: as `hfac.ops`; nothing has been written then.
    """

    def decays(step: Any) -> dict[str, Any]:
        return {
            "beta1": None if beta is None else schedules.smmf_decay_first(step, beta, growth_rate),
            "beta2": schedules.smmf_decay_second(step, decay_rate),
        }

    scalars = {
        "lr": schedules.as_scalar(lr),
        "eps": eps,
        "weight_decay": schedules.as_scalar(weight_decay),
        "decoupled_weight_decay": weight_decay_mode == "adamw",
        "maximize": maximize,
        "backend": backend,
    }
    factored = {
        "exp_avg_rows": None if beta is None else exp_avg_rows,
        "exp_avg_cols": None if beta is None else exp_avg_cols,
        "exp_avg_signs": None if beta is None else exp_avg_signs,
        "exp_avg_sq_rows": exp_avg_sq_rows,
        "exp_avg_sq_cols": exp_avg_sq_cols,
    }
    dense = {"exp_avgs": None if beta is None else exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _run(
        "smmf",
        factored,
        dense,
        params,
        grads,
        state_steps,
        skipped,
        capturable,
        decays,
        scalars,
    )


def _run(
    stem: str,
    factored: dict[str, States | None],
    dense: dict[str, States | None],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    skipped: Sequence[Tensor] | None,
    capturable: bool,
    decays: Callable[[Any], dict[str, Any]],
    scalars: dict[str, Any],
) -> None:
    """Calls each op on the parameters that can share a call. All calls are checked before the first one writes."""
    count = len(params)
    for name, tensors in {**factored, **dense, "grads": grads, "state_steps": state_steps, "skipped": skipped}.items():
        if tensors is not None and len(tensors) != count:
            raise ValueError(f"{name} must have one entry per parameter ({count}), got {len(tensors)}")
    whole = dense["exp_avg_sqs"]
    assert whole is not None
    calls = []
    for (is_dense, device, *_, step), index in _buckets(params, grads, whole, state_steps, capturable).items():
        steps = [state_steps[i] for i in index]
        t = torch.stack(steps).to(schedules.step_dtype(steps[0].device)) + 1 if step is None else step + 1
        flags = None if skipped is None else torch.zeros(len(index), dtype=torch.int32, device=device)
        states = dense if is_dense else factored
        call = ops.prepare(
            f"{stem}_dense_step_" if is_dense else f"{stem}_step_",
            [params[i] for i in index],
            [grads[i] for i in index],
            **{name: None if tensors is None else [tensors[i] for i in index] for name, tensors in states.items()},
            nonfinite=flags,
            **decays(t),
            **scalars,
        )
        calls.append((call, index, steps, flags))
    for call, index, steps, flags in calls:
        call()
        torch._foreach_add_(steps, 1)
        if flags is not None and skipped is not None:
            left = list(flags.unbind())
            torch._foreach_add_([skipped[i] for i in index], left)
            torch._foreach_sub_(steps, left)


def _buckets(
    params: Sequence[Tensor], grads: Sequence[Tensor], whole: States, state_steps: Sequence[Tensor], capturable: bool
) -> dict[tuple[Any, ...], list[int]]:
    """Indices of the parameters that agree in layout of state, device, types and step.

    A step on the host is read and part of the key; on a device it is None, and each parameter has its own decay.
    """
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for i, (param, grad, step) in enumerate(zip(params, grads, state_steps, strict=True)):
        t = None if capturable or not step.is_cpu else step.item()
        buckets.setdefault((whole[i] is not None, param.device, param.dtype, grad.dtype, t), []).append(i)
    return buckets
