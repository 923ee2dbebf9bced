"""The backend "reference": the functions of `hfac.reference`, in plain torch, on any device."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .. import reference
from ..spec import Op
from .contract import Operands


class Formulas:
    """A backend of functions that have the names of ops and take their arguments by name.

    Args:
        functions: where they are found: a module, or anything else with attributes.
    """

    #: The functions leave memory to torch's operations, which know of views that negate and of tensors without any.
    READS_MEMORY = False

    def __init__(self, functions: Any) -> None:
        self._functions = [functions]

    def add(self, functions: Any) -> None:
        """Makes more functions known, of ops that are described outside of this package."""
        self._functions.append(functions)

    def has(self, op: Op) -> bool:
        return any(hasattr(functions, op.name) for functions in self._functions)

    def function(self, name: str) -> Callable[..., Any]:
        for functions in reversed(self._functions):
            if hasattr(functions, name):
                return getattr(functions, name)
        raise AttributeError(f"there is no function {name} for this op")

    def bind(self, operands: Operands) -> Callable[..., None]:
        op = operands.op
        given: dict[str, Any] = {operand.name: None for operand in op.operands}  # what the op goes without
        given |= {**operands.lists, **operands.counts}
        if op.updates:
            given["params"] = operands.params
        if operands.places is not None:  # of which functions that draw no bits need not know
            given["places"] = operands.places
        step = partial(self.function(op.name), **given)

        def call(grads: Any, nonfinite: Any = None, **numbers: Any) -> None:
            flags = {} if nonfinite is None else {"nonfinite": nonfinite}
            step(grads=grads, **flags, **numbers)

        return call


FORMULAS = Formulas(reference)
