"""What earlier steps found in order, and how a later one sees that it still is."""

from __future__ import annotations  # an optimizer knows these, and they it

from collections.abc import Collection, Mapping
from itertools import chain
from operator import is_, itemgetter
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
        #: sharded parameters without state: they come in with their first gradient, on all ranks
        self._idle = [
            p
            for g in optimizer.param_groups
            for p in g["params"]
            if needs_others(p, g) and "step" not in optimizer.state.get(p, ())
        ]
        self._lists = list(map(list, self._walk(optimizer)))
        self._own = self._own_tensors(optimizer)
        self._options = self._execution(optimizer)

    def holds(self, optimizer: FactoredOptimizer) -> bool:
        if self._execution(optimizer) != self._options or any(p.grad is not None for p in self._idle):
            return False
        walk = self._walk(optimizer)
        if all(map(_same, walk, self._lists)):
            return True
        states, tensors, *rest = walk
        if not _same(self._own_tensors(optimizer), self._own) or not all(map(_same, rest, self._lists[2:])):
            return False
        self._lists[:2] = [list(states), tensors]  # a wrapper has put something else of its own there
        return True

    def gradients(self, group_index: int) -> list[Any]:
        """Of the parameters in `whole`, which each rank has all of, or whole slices of."""
        params = self.whole[group_index]
        if not self._dtensors:
            return [param.grad for param in params]
        label = f"a parameter of group {group_index}"
        return [layout.gradient(param, label) for param in params]

    def _walk(self, optimizer: FactoredOptimizer) -> list[Collection[Any]]:
        states = optimizer.state.values()
        try:
            tensors = list(chain.from_iterable(map(dict.values, states)))
        except TypeError:  # something of a wrapper's that belongs to no parameter
            tensors = [value for state in states if isinstance(state, dict) for value in state.values()]
        parts = [param._local_tensor for param in self._dtensors]
        return [states, tensors, parts, *(group["params"] for group in optimizer.param_groups)]

    @staticmethod
    def _own_tensors(optimizer: FactoredOptimizer) -> list[Any]:
        """Parameters, each with what the optimizer itself keeps of it."""
        return [
            thing
            for param, state in optimizer.state.items()
            if isinstance(param, Tensor)
            for thing in (param, *_own(optimizer, state))
        ]

    @staticmethod
    def _execution(optimizer: FactoredOptimizer) -> list[tuple[Any, ...]]:
        return list(map(_execution_of, optimizer.param_groups))


class Alone:
    """A parameter's place in the groups, and the parameter bound by itself: like `Seen`, for one, so that what a step
    of one parameter looks at does not grow with their number."""

    def __init__(self, group: dict[str, Any], group_index: int, index: int, param: Tensor, where: str) -> None:
        self.group, self.where = group, where
        self.bound: functional.Group | None = None
        self._group_index, self._index, self._param = group_index, index, param
        #: among all parameters, where random bits hang on it
        self._position: int | None = None

    def holds(self, optimizer: FactoredOptimizer) -> bool:
        """The place is the parameter's still."""
        groups, params = optimizer.param_groups, self.group["params"]
        if (
            self._group_index >= len(groups)
            or groups[self._group_index] is not self.group
            or self._index >= len(params)
            or params[self._index] is not self._param
        ):
            return False
        if self.bound is not None and not self._bound_as_it_is(optimizer):
            self.bound = None
        return True

    def _position_now(self, optimizer: FactoredOptimizer) -> int | None:
        if self.group["rounding"] == "nearest":
            return None
        before = optimizer.param_groups[: self._group_index]
        return sum(map(len, map(itemgetter("params"), before))) + self._index

    def _bound_as_it_is(self, optimizer: FactoredOptimizer) -> bool:
        return (
            optimizer.state.get(self._param) is self._state
            and (_same(self._state.values(), self._then.values()) or self._same_but_for_wrappers(optimizer))
            and self._position_now(optimizer) == self._position
            and getattr(self._param, "_local_tensor", None) is self._part
            and _execution_of(self.group) == self._options
        )

    def _same_but_for_wrappers(self, optimizer: FactoredOptimizer) -> bool:
        """Whether only what a wrapper keeps in the state has been replaced."""
        now = self._state
        same = _same(_own(optimizer, now), _own(optimizer, self._then))
        if same:
            self._then = dict(now)
        return same

    def bind(self, optimizer: FactoredOptimizer, grad: Tensor) -> None:
        self.bound = None
        optimizer._check_stepped(f"{type(optimizer).__name__}.step_param: {self.where}", self._param, self.group)
        optimizer._sync_param(self._param, self.group)
        self._state = optimizer.state[self._param]
        self._then = dict(self._state)
        self._part = getattr(self._param, "_local_tensor", None)
        self._options = _execution_of(self.group)
        self._position = self._position_now(optimizer)
        state = optimizer._local_state(self._param, self.group)
        place = optimizer._place(self._param, self.group, self._position or 0)
        self.bound = optimizer._bind(self.group, [layout.local(self._param)], [grad], [state], [place])


def _execution_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(group[n] for n in (*EXECUTION, "nonfinite", "rounding", "master")), group.get("beta", 0.0) is None)


def _own(optimizer: FactoredOptimizer, state: Mapping[str, Any]) -> list[Any]:
    """What the optimizer itself keeps of a parameter, without what wrappers do."""
    return [value for key, value in state.items() if optimizer._is_own(key)]


def _same(now: Collection[Any], then: Collection[Any]) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))
