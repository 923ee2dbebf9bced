"""What earlier steps found in order, and how a later one sees that it still is."""

from __future__ import annotations  # an optimizer knows these, and they it

from collections.abc import Collection, Mapping
from itertools import chain, takewhile
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import functional
from ..distributed import layout
from .state import EXECUTION, needs_others

if TYPE_CHECKING:
    from .base import FactoredOptimizer


class Seen:
    """Groups, parameters and states as a step found them in order. While they are the same objects, nothing need be
    made, moved or dropped, and what was bound still stands."""

    def __init__(self, optimizer: FactoredOptimizer) -> None:
        self.whole = [[p for p in g["params"] if not needs_others(p, g)] for g in optimizer.param_groups]
        self._dtensors = [p for group in optimizer.param_groups for p in group["params"] if layout.is_dtensor(p)]
        #: of each parameter among all of the optimizer's
        self.positions = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        self._lists = list(map(list, self._walk(optimizer)))
        self._options = self._execution(optimizer)

    def holds(self, optimizer: FactoredOptimizer) -> bool:
        return self._execution(optimizer) == self._options and all(map(_same, self._walk(optimizer), self._lists))

    def gradients(self, group_index: int) -> list[Any]:
        """Of the parameters in `whole`, which each rank has all of, or whole slices of."""
        params = self.whole[group_index]
        if not self._dtensors:
            return [param.grad for param in params]
        label = f"a parameter of group {group_index}"
        return [layout.gradient(param, label) for param in params]

    def _walk(self, optimizer: FactoredOptimizer) -> list[Collection[Any]]:
        states = optimizer.state
        tensors = list(chain.from_iterable(map(dict.values, states.values())))
        parts = [param._local_tensor for param in self._dtensors]
        return [states.keys(), states.values(), tensors, parts, *(group["params"] for group in optimizer.param_groups)]

    @staticmethod
    def _execution(optimizer: FactoredOptimizer) -> list[tuple[Any, ...]]:
        return list(map(_execution_of, optimizer.param_groups))


class Alone:
    """A parameter's place in the groups, and the parameter bound by itself: like `Seen`, for one, so that what a step
    of one parameter looks at does not grow with their number."""

    def __init__(self, group: dict[str, Any], index: int, position: int, param: Tensor, where: str) -> None:
        self.group, self.where = group, where
        self.bound: functional.Group | None = None
        self._index, self._position, self._param = index, position, param

    def holds(self, optimizer: FactoredOptimizer) -> bool:
        """The place is the parameter's still."""
        params = self.group["params"]
        here = self._index < len(params) and params[self._index] is self._param
        groups = optimizer.param_groups
        before = list(takewhile(lambda group: group is not self.group, groups))
        position = sum(len(group["params"]) for group in before) + self._index
        if not here or len(before) == len(groups) or position != self._position:
            return False
        if self.bound is not None and not self._bound_as_it_is(optimizer):
            self.bound = None
        return True

    def _bound_as_it_is(self, optimizer: FactoredOptimizer) -> bool:
        return (
            optimizer.state.get(self._param) is self._state
            and _same(self._state.values(), self._tensors)
            and getattr(self._param, "_local_tensor", None) is self._part
            and _execution_of(self.group) == self._options
        )

    def bind(self, optimizer: FactoredOptimizer, grad: Tensor) -> None:
        self.bound = None
        optimizer._sync_param(self._param, self.group)
        self._state = optimizer.state[self._param]
        self._tensors = list(self._state.values())
        self._part = getattr(self._param, "_local_tensor", None)
        self._options = _execution_of(self.group)
        state = {key: layout.local(value) for key, value in self._state.items()}
        place = optimizer._place(self._param, self.group, self._position)
        self.bound = optimizer._bind(self.group, [layout.local(self._param)], [grad], [state], [place])


def _execution_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(group[n] for n in (*EXECUTION, "nonfinite", "rounding", "master")), group.get("beta", 0.0) is None)


def _same(now: Collection[Any], then: Collection[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))
