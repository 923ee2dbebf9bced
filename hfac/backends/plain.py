"""The backend "reference": the functions of `hfac.reference`, in plain torch, on any device."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .. import reference
from ..rounding import Place
from ..spec import Op


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

    def bind(
        self,
        op: Op,
        params: Sequence[Tensor],
        lists: Mapping[str, Sequence[Tensor]],
        counts: Mapping[str, Sequence[Any]],
        places: Sequence[Place] | None = None,
    ) -> Callable[..., None]:
        named: dict[str, Any] = {operand.name: lists.get(operand.name) for operand in op.operands} | {**lists, **counts}
        if op.updates:
            named["params"] = params
        if places is not None:
            named["places"] = places
        step = partial(self.function(op.name), **named)
        return lambda grads, nonfinite=None, **numbers: step(grads=grads, **_given(nonfinite), **numbers)


def _given(nonfinite: Tensor | None) -> dict[str, Tensor]:
    return {} if nonfinite is None else {"nonfinite": nonfinite}


FORMULAS = Formulas(reference)
