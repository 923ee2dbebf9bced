"""Ops as functions with the arguments of `hfac.reference`, and ``backend``: ``calls.hfac_sums(grads, ...)``."""

from collections.abc import Callable
from functools import partial
from typing import Any

from hfac import ops, spec
from hfac.backends import Operands


def _call(op: spec.Op, *given: Any, **named: Any) -> None:
    params = ("params", "grads") if op.updates else ("grads",)
    flags = ("nonfinite",) if "nonfinite" in op.outputs else ()
    names = (*params, *(operand.name for operand in op.operands), *op.vectors, *flags)
    named |= dict(zip(names, given, strict=False))
    ops.run(op.name, named.pop("params", None), named.pop("grads"), named.pop("nonfinite", None), **named)


def __getattr__(name: str) -> Callable[..., None]:
    if name not in spec.OPS:
        raise AttributeError(name)
    return partial(_call, spec.OPS[name])


STATES = {op.name: tuple(state.name for state in op.states) for op in spec.OPS.values() if not op.shard}


class Bound:
    """A backend's call, whose last statistics the step goes on from where it is given ``clip``."""

    def __init__(self, op: spec.Op, call: Callable[..., None]) -> None:
        self.op, self.call, self.found = op, call, None

    def squares(self, *given: Any, **named: Any) -> Any:
        if not self.op.reads_twice:
            return None
        self.found = self.call.statistics(*given, **named)
        return self.found.squares

    def __call__(self, *given: Any, **named: Any) -> None:
        if "clip" in named:
            named["statistics"], self.found = self.found, None
        self.call(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)


def bind(backend: Any, op: str, params: Any, lists: Any, places: Any = None) -> Bound:
    """A backend's call on whole parameters."""
    found = spec.OPS[f"{op.removesuffix('_')}_"]
    return Bound(found, backend.bind(Operands(found, params, lists, {}, places)))


def step(call: ops.OpCall, grads: Any, nonfinite: Any = None, **arguments: Any) -> None:
    call.apply(call.prepare(grads, nonfinite, **arguments))
