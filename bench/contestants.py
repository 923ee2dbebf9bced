"""What can be timed: one op of one backend, or the whole step of one optimizer, each ready to be called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import hfac
from bench import bytes as traffic
from bench.problem import LR, WEIGHT_DECAY, Problem
from bench.rivals import RIVALS
from hfac import ops, schedules

OPS = ("hfac_step_", "hfac_dense_step_", "smmf_step_", "smmf_dense_step_")
OPTIMIZERS = ("HFac", "SMMF")
#: The step at which an op's decays are evaluated: late enough for all of them to differ from 0.
_STEP = 10.0


@dataclass(frozen=True)
class Contestant:
    """One thing to time.

    Attributes:
        name: the op or the optimizer.
        backend: the backend of hfac, or how a rival is carried out.
        call: makes one step.
        tensors: parameters and states, made anew at every call because optimizers make theirs in the first step.
        traffic: bytes of one step, likewise.
        state_bytes: bytes of the whole state, likewise.
        kept_bytes: bytes of workspace kept from step to step.
    """

    name: str
    backend: str
    call: Callable[[], object]
    tensors: Callable[[], list[Tensor]]
    traffic: Callable[[], traffic.Traffic]
    state_bytes: Callable[[], int]
    kept_bytes: Callable[[], int] = lambda: 0

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.backend


def optimizer_of(op: str) -> str:
    """The class in `hfac` that calls the op."""
    return "HFac" if op.startswith("hfac") else "SMMF"


def ops_of(optimizer: str) -> list[str]:
    """The ops that a step of `hfac.HFac` or `hfac.SMMF` may call."""
    return [op for op in OPS if optimizer_of(op) == optimizer]


def op_operands(op: str, params: Sequence[Tensor], **options: Any) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The parameters among ``params`` that the op takes, and new states for them under the op's argument names.

    Which ones it takes, and the states, are as the optimizer has them. SMMF's dense op gets all vectors, for which
    ``vector_reshape=False`` asks; by default it would see only prime numbers of elements.
    """
    if op == "smmf_dense_step_":
        options["vector_reshape"] = False
    state = getattr(hfac, optimizer_of(op))(params, backend="reference", **options).state
    mine = [param for param in params if ("exp_avg_sq" in state[param]) == ("dense" in op)]
    keys = [key for key in state[mine[0]] if key != "step"] if mine else []
    return mine, {f"{key}s": [state[param][key] for param in mine] for key in keys}


def op_scalars(op: str, step: float, options: dict[str, Any]) -> dict[str, Any]:
    """The op's scalar arguments at a step (counted from 1), from complete options of its optimizer."""
    common = dict(lr=options["lr"], eps=options["eps"], weight_decay=options["weight_decay"])
    if optimizer_of(op) == "HFac":
        beta1, beta2 = (schedules.hfac_decay(step, beta) for beta in options["betas"])
        return dict(common, beta1=beta1, beta2=beta2, clip_threshold=options["clip_threshold"])
    beta1 = schedules.smmf_decay_first(step, options["beta"], options["growth_rate"])
    return dict(common, beta1=beta1, beta2=schedules.smmf_decay_second(step, options["decay_rate"]))


def defaults(optimizer: str, **options: Any) -> dict[str, Any]:
    """All options of `hfac.HFac` or `hfac.SMMF`, ``options`` over the defaults."""
    return getattr(hfac, optimizer)([torch.nn.Parameter(torch.ones(1))], **options).defaults


def op_contestant(op: str, backend: str, problem: Problem) -> Contestant | None:
    """The op on what it takes of the problem; None where it takes nothing of it."""
    params, states = op_operands(op, problem.params)
    if not sum(param.numel() for param in params):
        return None
    grads = [param.grad for param in params]
    flat = [tensor for tensors in states.values() for tensor in tensors]
    scalars = op_scalars(op, _STEP, defaults(optimizer_of(op), lr=LR, weight_decay=WEIGHT_DECAY))
    bound = ops.OpCall(op, params, states, backend=backend)  # as the optimizers call it: states are looked at once
    if op.startswith("smmf"):
        scalars["decoupled_weight_decay"] = True

    # As a warm step of the optimizers finds them: checked before, and where they lay.
    kept = [*params, *flat]
    bound.prepare(grads, maximize=False, **scalars)
    known, seen = ops.snapshot(kept), ops.snapshot(grads)

    @torch.no_grad()
    def call() -> None:
        assert ops.compare(kept, known) == ops.SAME
        bound.apply(bound.prepare(grads, maximize=False, seen=seen, **scalars))

    reread = sum(map(traffic.size, grads)) if op == "hfac_step_" else 0
    return Contestant(
        op,
        backend,
        call,
        lambda: kept,
        lambda: traffic.compulsory(params, grads, flat, reread),
        lambda: sum(map(traffic.size, flat)),
        bound.workspace_bytes,
    )


def step_contestant(optimizer: str, backend: str, params: Sequence[Tensor], **options: Any) -> Contestant:
    """The whole ``step()`` of an optimizer of hfac."""
    built = getattr(hfac, optimizer)(params, lr=LR, weight_decay=WEIGHT_DECAY, backend=backend, **options)
    return _whole(optimizer, backend, built, params)


def rival_contestant(rival: tuple[str, str], params: Sequence[Tensor]) -> Contestant:
    """The whole ``step()`` of one of `bench.rivals.RIVALS`."""
    return _whole(*rival, RIVALS[rival](params), params)


def _whole(name: str, backend: str, optimizer: Optimizer, params: Sequence[Tensor]) -> Contestant:
    def of_state(param: Tensor) -> dict[str, Tensor]:
        return {key: value for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}

    def states(*without: str) -> list[Tensor]:
        kept = [value for param in params for key, value in of_state(param).items() if key not in without]
        return list(traffic.plain(kept))

    def counted() -> traffic.Traffic:
        # The one factored state of each of the two whose statistics come before the update.
        twice = {"HFac": "exp_avg_sq_row", "Adafactor": "row_var"}.get(name)
        reread = sum(traffic.size(param.grad) for param in params if twice in of_state(param))
        return traffic.compulsory(params, [param.grad for param in params], states("step"), reread)

    return Contestant(
        name,
        backend,
        partial(optimizer.step),
        lambda: [*params, *states("step")],
        counted,
        lambda: sum(map(traffic.size, states())),
        getattr(optimizer, "workspace_bytes", lambda: 0),
    )
