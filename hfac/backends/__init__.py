"""The table of backends: which there are, for which devices, and why one is not to be had.

A backend is a module with one function per op, all with the signatures of `hfac.reference`, or with a function
``bind(op, params, states)`` that returns such an op for these tensors, (grads, nonfinite, **scalars) -> None: what
kernels are told of them is then made once, not in every step. Where CUDA graphs can capture such an op, it has
``capturing()``, ``check_capture(grads, nonfinite, **scalars)``, which refuses what could not be captured, and
``captured``, a list of what replays need, which the op's owner may replace by one that lives longer. "auto" takes the
first of `PREFERENCE` that can serve the device; an explicit request is met or refused, never replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from .. import reference
from . import cpu, cuda, triton


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: what a user passes as ``backend=``.
        summary: one line for people.
        why_not: (device) -> None where the backend serves it, else the reason and what to do, as one sentence or two.
        load: the module that holds the ops; called only where why_not gave None.
    """

    name: str
    summary: str
    why_not: Callable[[torch.device], str | None]
    load: Callable[[], ModuleType]


TABLE: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cuda", "fused CUDA kernels", cuda.why_not, lambda: cuda),
        Backend("triton", "fused Triton kernels", triton.why_not, lambda: triton),
        Backend("cpu", "fused C++ kernels", cpu.why_not, lambda: cpu),
        Backend("reference", "plain torch, any device", lambda device: None, lambda: reference),
    )
}
PREFERENCE = tuple(TABLE)
NAMES = ("auto", *TABLE)


def available(device: torch.device) -> list[str]:
    """Names of the backends that serve ``device``, best first. On the CPU Triton's kernels are interpreted, which is
    slower than anything else."""
    here = [name for name in PREFERENCE if TABLE[name].why_not(device) is None]
    return sorted(here, key="triton".__eq__) if device.type == "cpu" else here


def resolve(name: str, device: torch.device, op: str | None = None) -> ModuleType:
    """The module whose ops serve ``device``; with ``op``, one of the ops that not every backend has, one that has it.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the one asked for cannot serve the device; the message says why, what is there and what to do.
    """
    if name == "auto":
        modules = (TABLE[here].load() for here in available(device))
        return next(module for module in modules if op is None or hasattr(module, op))
    if name not in TABLE:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    reason = TABLE[name].why_not(device)
    if reason is not None:
        here = ", ".join(map(repr, available(device)))
        raise RuntimeError(
            f"backend={name!r} was asked for tensors on {device}, but {reason} Present for {device}: {here}."
        )
    module = TABLE[name].load()
    if op is not None and not hasattr(module, op):
        raise RuntimeError(
            f"backend={name!r} was asked for, but it cannot update a part of a parameter ({op}), which sharded "
            "parameters need. Use backend='auto' or 'reference'."
        )
    return module


def found(name: str, device: torch.device, op: str | None = None) -> ModuleType:
    """As `resolve`, but asked once for as long as `TABLE` has the same rows: for what is called in every step."""
    return _resolved(name, device, op, tuple(TABLE.items()))


@lru_cache(maxsize=64)
def _resolved(name: str, device: torch.device, op: str | None, rows: tuple[tuple[str, Backend], ...]) -> ModuleType:
    return resolve(name, device, op)


def host_counters() -> ModuleType | None:
    """The module that reads and advances many steps on the host at once; None where the extension is not built."""
    return cpu if TABLE["cpu"].why_not(torch.device("cpu")) is None else None
