"""Functional forms of both optimizers over lists of tensors, as `torch.optim` has them (``torch.optim.adamw.adamw``).

They advance the steps, evaluate the step's scalars, and hand tensors that can share a call to `hfac.ops` together.
The classes `hfac.HFac` and `hfac.SMMF` keep a `Group` of the tensors of each parameter group from step to step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
) -> None:
    """One step of H-Fac (AISTATS 2025, Algorithm 1); see `hfac.HFac` for the options.

    Args:
        params, grads: tensors of the same shapes; types as `hfac.HFac` takes them.
        exp_avg_rows, exp_avg_sq_rows: per parameter, state of shape p.shape[:k] (`hfac.matricize.cut`), or None
            where the moments are whole.
        exp_avg_cols, exp_avg_sq_cols: likewise of shape p.shape[k:].
        exp_avgs, exp_avg_sqs: per parameter, whole moments of shape p.shape, or None where they are factored.
        state_steps: 0-d float32 tensors, the number of steps made so far; advanced by one.
        skipped: 0-d int32 tensors. Where given, a parameter whose gradient is not finite keeps its value and its state,
            its step included, and its entry here is advanced instead.
        capturable: read the steps on their device (needed in a CUDA graph).

    Raises:
        ValueError, RuntimeError: as `hfac.ops`; nothing has been written then.
    """
    _step("hfac", **locals())


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
    _step("smmf", **locals())


def _step(
    algorithm: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    skipped: Sequence[Tensor] | None,
    capturable: bool,
    backend: str,
    **arguments: Any,
) -> None:
    states = {name: arguments.pop(name) for name in ALGORITHMS[algorithm].states}
    first_moment = arguments.get("beta", 0.0) is not None
    group = Group(algorithm, params, grads, states, state_steps, skipped, first_moment, capturable, backend)
    update = group.prepare(grads, **arguments)
    assert update is not None  # just bound
    update()


@dataclass(frozen=True)
class Algorithm:
    """What tells the two apart here.

    Attributes:
        factored, whole: names of the state lists of a matrix, and of what keeps whole moments.
        decays: (step t, options) -> the op's decays beta1 and beta2.
        scalars: (options) -> the op's other scalars.
    """

    factored: tuple[str, ...]
    whole: tuple[str, ...]
    decays: Callable[[Any, dict[str, Any]], dict[str, Any]]
    scalars: Callable[[dict[str, Any]], dict[str, Any]]

    @property
    def states(self) -> tuple[str, ...]:
        return self.factored + self.whole


def _hfac_decays(step: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {name: schedules.hfac_decay(step, options[name]) for name in ("beta1", "beta2")}


def _hfac_scalars(options: dict[str, Any]) -> dict[str, Any]:
    return {"eps": options["eps"], "clip_threshold": options["clip_threshold"]}


def _smmf_decays(step: Any, options: dict[str, Any]) -> dict[str, Any]:
    beta = options["beta"]
    return {
        "beta1": None if beta is None else schedules.smmf_decay_first(step, beta, options["growth_rate"]),
        "beta2": schedules.smmf_decay_second(step, options["decay_rate"]),
    }


def _smmf_scalars(options: dict[str, Any]) -> dict[str, Any]:
    mode = options["weight_decay_mode"]
    if mode not in ("adamw", "adam"):
        raise ValueError(f"weight_decay_mode must be 'adamw' or 'adam', got {mode!r}")
    return {"eps": options["eps"], "decoupled_weight_decay": mode == "adamw"}


ALGORITHMS = {
    "hfac": Algorithm(
        ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols"),
        ("exp_avgs", "exp_avg_sqs"),
        _hfac_decays,
        _hfac_scalars,
    ),
    "smmf": Algorithm(
        ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "exp_avg_sq_rows", "exp_avg_sq_cols"),
        ("exp_avgs", "exp_avg_sqs"),
        _smmf_decays,
        _smmf_scalars,
    ),
}


@dataclass
class _Bucket:
    """Parameters that share one call: they agree in layout of state, device, types and step."""

    call: ops.Bound
    index: list[int] | None  # places in the group's lists; None where it is all of them
    steps: list[Tensor]
    skipped: list[Tensor] | None
    on_host: bool  # the steps are read, and agree; else each parameter has its own decays, on the device

    def of(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors if self.index is None else [tensors[i] for i in self.index]


class Group:
    """The parameters of one group with their states, bucketed and checked once; every step brings gradients and
    options.

    Args: as `hfac` and `smmf`; ``states`` are their lists of states by name, and without ``first_moment`` those of the
        first are not read. ``grads`` are read for their types only.
    """

    def __init__(
        self,
        algorithm: str,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, States],
        state_steps: Sequence[Tensor],
        skipped: Sequence[Tensor] | None,
        first_moment: bool,
        capturable: bool,
        backend: str,
    ) -> None:
        self._algorithm = ALGORITHMS[algorithm]
        lists: dict[str, States | None] = {"grads": grads, **states, "state_steps": state_steps, "skipped": skipped}
        for name, tensors in lists.items():
            if tensors is not None and len(tensors) != len(params):
                raise ValueError(f"{name} must have one entry per parameter ({len(params)}), got {len(tensors)}")
        for name, tensors in (("params", params), ("grads", grads), ("state_steps", state_steps)):
            for i, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
        for i, step in enumerate(state_steps):
            if step.ndim or step.dtype != torch.float32:
                raise TypeError(f"state_steps[{i}] must be a 0-d float32 tensor, got {step.dtype} {tuple(step.shape)}")
        if skipped is not None:
            for i, (param, step, flag) in enumerate(zip(params, state_steps, skipped, strict=True)):
                if not param.device == step.device == flag.device or flag.dtype != torch.int32:
                    raise RuntimeError(
                        f"state_steps[{i}] and skipped[{i}] (int32) must be on the device of params[{i}], "
                        f"{param.device}, where it shows what is skipped; got {step.device} and {flag.dtype} on "
                        f"{flag.device}"
                    )
        self._grad_dtypes = list(map(_DTYPE, grads))
        indices: dict[tuple[Any, ...], list[int]] = {}
        for i, (param, grad, step) in enumerate(zip(params, grads, state_steps, strict=True)):
            on_host = step.is_cpu and not capturable
            factored = states["exp_avg_sqs"][i] is None
            key = (factored, param.device, param.dtype, grad.dtype, on_host, step.item() if on_host else None)
            indices.setdefault(key, []).append(i)
        self._buckets = []
        for (factored, *_, on_host, _), index in indices.items():

            def of(tensors: Sequence[Any], index: list[int] = index) -> list[Any]:
                return [tensors[i] for i in index]

            names = self._algorithm.factored if factored else self._algorithm.whole
            mine = {name: of(states[name]) for name in names if first_moment or name not in ops.FIRST_MOMENT}
            op = f"{algorithm}_step_" if factored else f"{algorithm}_dense_step_"
            self._buckets.append(
                _Bucket(
                    ops.Bound(op, of(params), mine, backend=backend),
                    None if len(index) == len(params) else index,
                    of(state_steps),
                    None if skipped is None else of(skipped),
                    on_host,
                )
            )

    def holds(self, grads: Sequence[Tensor]) -> bool:
        """Parameters and states lie where they lay, and the gradients have the types that they had."""
        return list(map(_DTYPE, grads)) == self._grad_dtypes and all(bucket.call.holds() for bucket in self._buckets)

    def workspace_bytes(self) -> int:
        """Bytes on the device that fused kernels keep from step to step."""
        return sum(bucket.call.workspace_bytes() for bucket in self._buckets)

    def prepare(
        self,
        grads: Sequence[Tensor],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> Callable[..., None] | None:
        """Checks a step with these gradients and returns it, yet to be made; ``options`` are those of `hfac` or `smmf`
        that are no tensors' lists, ``grad_scale`` and ``found_inf`` as `ops.Bound.prepare` takes them, whose ``clip``
        the step takes. None where the steps of one bucket have come apart: it must be bound anew."""
        scalars = {
            **self._algorithm.scalars(options),
            "maximize": options["maximize"],
            **{name: schedules.as_scalar(name, options[name]) for name in ("lr", "weight_decay")},
        }
        calls = []
        for bucket in self._buckets:
            t: Any
            if bucket.on_host:
                steps = ops.read_steps(bucket.steps)
                if steps.count(steps[0]) != len(steps):
                    return None
                t = steps[0] + 1
            else:
                t = torch.stack(bucket.steps)
                t = t.to(schedules.step_dtype(t.device)) + 1
            flags = None
            if bucket.skipped is not None:
                flags = torch.zeros(len(bucket.steps), dtype=torch.int32, device=bucket.steps[0].device)
            decays = self._algorithm.decays(t, options)
            call = bucket.call.prepare(
                bucket.of(grads), flags, grad_scale=grad_scale, found_inf=found_inf, **decays, **scalars
            )
            calls.append((bucket, call, flags))

        def run(clip: Tensor | None = None) -> None:
            for bucket, call, flags in calls:
                call(clip)
                ops.advance_steps_(bucket.steps)
                if flags is not None and bucket.skipped is not None:
                    left = flags.unbind()
                    torch._foreach_add_(bucket.skipped, left)
                    torch._foreach_sub_(bucket.steps, left)
                if found_inf is not None:
                    torch._foreach_sub_(bucket.steps, [found_inf.view(())] * len(bucket.steps))

        return run


_DTYPE = attrgetter("dtype")
