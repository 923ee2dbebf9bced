"""Functional forms of both optimizers over lists of tensors, as `torch.optim` has them (``torch.optim.adamw.adamw``).

They advance the steps, evaluate the step's scalars, and hand tensors that can share a call to `hfac.ops` together.
The classes `hfac.HFac` and `hfac.SMMF` call them with the tensors of one parameter group.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
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
    memo: dict[Any, Any] | None = None,
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
        memo: a dict that the caller keeps from step to step, so that states which have been checked are not checked
            anew.

    Raises:
        ValueError, RuntimeError: as `hfac.ops`; nothing has been written then.
    """
    prepare("hfac", **locals())()


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
    memo: dict[Any, Any] | None = None,
) -> None:
    """One step of SMMF (AAAI 2025, Algorithm 1); see `hfac.SMMF` for the options.

    Args:
        params, grads: tensors of the same shapes; types as `hfac.SMMF` takes them.
        exp_avg_rows, exp_avg_sq_rows: per parameter, [n] of its square matrix (`hfac.matricize.square`), or None
            where the moments are whole.
        exp_avg_cols, exp_avg_sq_cols: likewise [m].
        exp_avg_signs: uint8 of `hfac.matricize.sign_shape`, likewise.
        exp_avgs, exp_avg_sqs: per parameter, whole moments of shape p.shape, or None where they are factored.
        state_steps, skipped, capturable, memo: as for `hfac`.

    With beta None there is no first moment: the entries of exp_avg_rows, exp_avg_cols, exp_avg_signs and exp_avgs
    are not read.

    Raises:
        ValueError, RuntimeError: as `hfac.ops`; nothing has been written then.
    """
    prepare("smmf", **locals())()


def prepare(
    algorithm: str,
    *,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    skipped: Sequence[Tensor] | None,
    capturable: bool,
    memo: dict[Any, Any] | None,
    **arguments: Any,
) -> Callable[[], None]:
    """Checks a call of `hfac` or `smmf` (arguments as they take them) and returns it, yet to be made.

    So the classes check all groups before the first one writes.
    """
    factored, dense, decays, scalars = {"hfac": _hfac, "smmf": _smmf}[algorithm](**arguments)
    count = len(params)
    for name, tensors in {**factored, **dense, "grads": grads, "state_steps": state_steps, "skipped": skipped}.items():
        if tensors is not None and len(tensors) != count:
            raise ValueError(f"{name} must have one entry per parameter ({count}), got {len(tensors)}")
    for name, tensors in (("params", params), ("grads", grads), ("state_steps", state_steps)):
        if not {Tensor, torch.nn.Parameter}.issuperset(map(type, tensors)):
            for i, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
    if skipped is not None:
        for i, (param, step, flag) in enumerate(zip(params, state_steps, skipped, strict=True)):
            if not param.device == step.device == flag.device or flag.dtype != torch.int32:
                raise RuntimeError(
                    f"state_steps[{i}] and skipped[{i}] (int32) must be on the device of params[{i}], {param.device}, "
                    f"where it shows what is skipped; got {step.device} and {flag.dtype} on {flag.device}"
                )
    whole = dense["exp_avg_sqs"]
    assert whole is not None
    calls = []
    for key, index in _buckets(params, grads, whole, state_steps, capturable).items():
        is_dense, device, *_, step = key

        def of(tensors: Any, index: list[int] = index) -> Any:
            return tensors if tensors is None or len(index) == count else [tensors[i] for i in index]

        steps = of(state_steps)
        t = torch.stack(steps).to(schedules.step_dtype(steps[0].device)) + 1 if step is None else step + 1
        flags = None if skipped is None else torch.zeros(len(index), dtype=torch.int32, device=device)
        call = ops.prepare(
            f"{algorithm}_dense_step_" if is_dense else f"{algorithm}_step_",
            of(params),
            of(grads),
            **{name: of(tensors) for name, tensors in (dense if is_dense else factored).items()},
            nonfinite=flags,
            checked=None if memo is None else memo.setdefault(key[:-1], {}),
            **decays(t),
            **scalars,
        )
        calls.append((call, index, steps, flags))

    def run() -> None:
        for call, index, steps, flags in calls:
            call()
            # A tensor of one, made once: a number would be wrapped anew for every step that lives on the host.
            torch._foreach_add_(steps, torch.ones((), device=steps[0].device), alpha=1)
            if flags is not None and skipped is not None:
                left = list(flags.unbind())
                torch._foreach_add_([skipped[i] for i in index], left)
                torch._foreach_sub_(steps, left)

    return run


#: state lists by the op's names where factored and where whole, decays of a step t, and the remaining scalars
Call = tuple[dict[str, States | None], dict[str, States | None], Callable[[Any], dict[str, Any]], dict[str, Any]]


def _hfac(
    *,
    exp_avgs: States,
    exp_avg_sqs: States,
    beta1: float,
    beta2: float,
    lr: Scalar,
    weight_decay: Scalar,
    eps: float,
    clip_threshold: float | None,
    maximize: bool,
    backend: str,
    **factored: States,
) -> Call:
    def decays(step: Any) -> dict[str, Any]:
        return {"beta1": schedules.hfac_decay(step, beta1), "beta2": schedules.hfac_decay(step, beta2)}

    scalars = {
        "lr": schedules.as_scalar("lr", lr),
        "eps": eps,
        "clip_threshold": clip_threshold,
        "weight_decay": schedules.as_scalar("weight_decay", weight_decay),
        "maximize": maximize,
        "backend": backend,
    }
    return dict(factored), {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}, decays, scalars


def _smmf(
    *,
    exp_avgs: States,
    exp_avg_sqs: States,
    beta: float | None,
    decay_rate: float,
    growth_rate: float,
    lr: Scalar,
    weight_decay: Scalar,
    weight_decay_mode: str,
    eps: float,
    maximize: bool,
    backend: str,
    **factored: States,
) -> Call:
    if weight_decay_mode not in ("adamw", "adam"):
        raise ValueError(f"weight_decay_mode must be 'adamw' or 'adam', got {weight_decay_mode!r}")

    def decays(step: Any) -> dict[str, Any]:
        return {
            "beta1": None if beta is None else schedules.smmf_decay_first(step, beta, growth_rate),
            "beta2": schedules.smmf_decay_second(step, decay_rate),
        }

    scalars = {
        "lr": schedules.as_scalar("lr", lr),
        "eps": eps,
        "weight_decay": schedules.as_scalar("weight_decay", weight_decay),
        "decoupled_weight_decay": weight_decay_mode == "adamw",
        "maximize": maximize,
        "backend": backend,
    }
    states: dict[str, States | None] = dict(factored)
    whole: dict[str, States | None] = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if beta is None:
        whole["exp_avgs"] = None
        states.update(dict.fromkeys(("exp_avg_rows", "exp_avg_cols", "exp_avg_signs")))
    return states, whole, decays, scalars


def _buckets(
    params: Sequence[Tensor], grads: Sequence[Tensor], whole: States, state_steps: Sequence[Tensor], capturable: bool
) -> dict[tuple[Any, ...], list[int]]:
    """Indices of the parameters that agree in layout of state, device, types and step.

    A step on the host is read and part of the key; on a device it is None, and each parameter has its own decay.
    """
    keys = zip(
        [moment is not None for moment in whole],
        map(_DEVICE, params),
        map(_DTYPE, params),
        map(_DTYPE, grads),
        [None if capturable or not step.is_cpu else step.item() for step in state_steps],
        strict=True,
    )
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for i, key in enumerate(keys):
        buckets.setdefault(key, []).append(i)
    return buckets


_DEVICE, _DTYPE = attrgetter("device"), attrgetter("dtype")
