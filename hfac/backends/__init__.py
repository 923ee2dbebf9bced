"""The backends: which there are, for which devices, and why one is unavailable.

A backend registers itself (`register`). What it loads, a module or an object, has ``has(op)``, whether it has the op,
and one function for all of them: ``bind(operands)`` takes `Operands` and returns a call, (grads, nonfinite=None,
**numbers) -> None, that computes what the function of the op's name in `hfac.reference` does. ``numbers`` are the op's
numbers and vectors by name, where bits are drawn ``seed`` and ``step``, and ``watched``. Gradients lie in memory as
their strides say (`hfac.memory`), unless the backend has ``READS_MEMORY`` False. A call may have, besides,

* ``statistics(grads, nonfinite, **numbers)``, which gives `Statistics`, with all that a step goes on from of an op that
  ``reads_twice``, of others at least the squares, with ``nonfinite`` still to be filled; it then takes them by that
  name together with ``clip``, what gradients are multiplied by;
* ``unscales`` True: it takes ``grad_scale`` and ``found_inf``, and multiplies gradients as it reads them;
* ``compares`` True: it takes ``seen``, a snapshot (`hfac.backends.snapshots`) of the gradients, which is the same
  object for as long as they lie where they lay, or None;
* ``again(seen, numbers, nonfinite=None, moved=None)``, and of what ``unscales`` ``grad_scale=None`` behind, a call with
  the gradients of ``seen``, these numbers, all that the op has, and contiguous ``nonfinite``, that reads nothing else
  anew. It returns False, and has done nothing, where the last call was not one of the same gradients, or of those whose
  snapshot ``moved`` begins with (`contract.Moved`), or was told anything else. ``numbers`` that are one object have the
  same values, or lie in the same tensors;
* ``statistics_again(seen, numbers, nonfinite=None, moved=None)``, likewise of ``statistics``, with None where ``again``
  returns False. Such a call ``unscales``, and ``again`` takes its ``statistics`` and ``clip``;
* ``workspace_bytes()``: what it keeps on the device from step to step;
* where CUDA graphs can capture it, ``capturing()``, ``check_capture(grads, nonfinite, clip_threshold)``, which refuses
  what could not be captured, and ``captured``, a list of what replays need, which the call's owner may replace by one
  that lives longer.

What a backend loads may have, besides, ``step_counts(made, skipped)``, which gives what `step_counts.StepCounts` does.

"auto" takes the first of `TABLE` that can serve the device; an explicit request is met or refused, never replaced.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

from ..spec import Op
from . import cpu, cuda, plain, triton
from .contract import Operands, Statistics

__all__ = [
    "Backend",
    "Operands",
    "Statistics",
    "available",
    "found",
    "host_counters",
    "names",
    "register",
    "resolve",
    "unregister",
]


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: what a user passes as ``backend=``.
        summary: one line for people.
        why_not: (device) -> None where the backend serves it, else the reason and what to do, as one sentence or two.
        load: what has ``bind``; called only where why_not gave None.
        automatic: whether "auto" may take it.
    """

    name: str
    summary: str
    why_not: Callable[[torch.device], str | None]
    load: Callable[[], Any]
    automatic: bool = True


#: Backends by name, best first.
TABLE: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Makes a backend known, behind those that are; one of the same name is replaced."""
    TABLE[backend.name] = backend


def unregister(name: str) -> None:
    del TABLE[name]


def names() -> tuple[str, ...]:
    """What may be asked for."""
    return ("auto", *TABLE)


register(Backend("cuda", "fused CUDA kernels", cuda.why_not, lambda: cuda.KERNELS))
register(Backend("triton", "fused Triton kernels", triton.why_not, lambda: triton))
register(Backend("cpu", "fused C++ kernels", cpu.why_not, lambda: cpu))
register(Backend("reference", "plain torch, any device", lambda device: None, lambda: plain.FORMULAS))


def available(device: torch.device) -> list[str]:
    """Names of the backends that serve ``device``, best first. On the CPU Triton's kernels are interpreted, which is
    slower than anything else."""
    here = [name for name, backend in TABLE.items() if backend.automatic and backend.why_not(device) is None]
    return sorted(here, key="triton".__eq__) if device.type == "cpu" else here


def resolve(name: str, device: torch.device, op: Op | None = None) -> Any:
    """What has ``bind`` for tensors on ``device`` and, where it is given, this op.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the one asked for cannot serve the device, or lacks the op; the message says why, what is there
            and what to do.
    """
    if name == "auto":
        loaded = (TABLE[here].load() for here in available(device))
        return next(backend for backend in loaded if op is None or backend.has(op))
    if name not in TABLE:
        raise ValueError(f"backend must be one of {', '.join(map(repr, names()))}, got {name!r}")
    reason = TABLE[name].why_not(device)
    if reason is not None:
        here = ", ".join(map(repr, available(device)))
        raise RuntimeError(
            f"backend={name!r} was asked for tensors on {device}, but {reason} Present for {device}: {here}."
        )
    backend = TABLE[name].load()
    if op is not None and not backend.has(op):
        what = "update shards, the pieces of parameters that one rank has" if op.shard else f"make {_step(op)}"
        raise RuntimeError(
            f"backend={name!r} was asked for, but it cannot {what} ({op.name}). Use backend='auto' or 'reference'."
        )
    return backend


def options_of(op: Op) -> str:
    """The options that choose an op, as they are written."""
    return ", ".join(f"{name}={value!r}" for name, value in op.chosen_by)


def _step(op: Op) -> str:
    return f"the step of {options_of(op)}" if op.chosen_by else "this step"


def found(name: str, device: torch.device, op: Op) -> Any:
    """As `resolve`, but asked once for as long as `TABLE` has the same rows: for what is called in every step."""
    return _resolved(name, device, op, tuple(TABLE.values()))


@lru_cache(maxsize=64)
def _resolved(name: str, device: torch.device, op: Op, rows: tuple[Backend, ...]) -> Any:
    chosen = resolve(name, device, op)
    if name == "auto" and chosen is plain.FORMULAS and device.type in ("cpu", "cuda"):
        _warn_unbuilt()
    return chosen


@cache
def _warn_unbuilt() -> None:
    """Once for each process: nobody chose to be slow."""
    reason = TABLE["cpu"].why_not(torch.device("cpu"))
    if reason is not None:
        warnings.warn(f"hfac steps in plain torch, which is slow: {reason}", stacklevel=2)


def host_counters() -> ModuleType | None:
    """The module that reads, advances and copies many small tensors on the host at once; None where the extension is
    not built."""
    return cpu if TABLE["cpu"].why_not(torch.device("cpu")) is None else None
