"""Caches validated state between steps and detects when it is stale."""

from collections.abc import Collection, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from .. import spec
from ..distributed import Gradients, layout
from ..ops import grads_of, identical, values_are
from .param_groups import EXECUTION
from .slices import needs_reduction
from .state import has_state, own_keys

Groups = list[dict[str, Any]]
#: an optimizer's ``state``: of each parameter by key, and whatever wrappers of the optimizer add
States = Mapping[Any, Any]


class StepCache:
    """The parameters and states of the last step that validated them all. As long as they are the same objects, a
    step need not create, move or drop state, and what it bound before can be used again.

    Args:
        groups: the optimizer's ``param_groups``.
        state: the optimizer's ``state``.
        algorithm: the optimizer's. Wrappers may replace entries of the state under other keys than its own.
    """

    def __init__(self, groups: Groups, state: States, algorithm: spec.Algorithm) -> None:
        self._algorithm, self._own_keys = algorithm, own_keys(algorithm)
        everything = [(param, group) for group in groups for param in group["params"]]
        #: by group, the parameters whose step needs no sums over ranks
        self.local = [[p for p in group["params"] if not needs_reduction(p, group)] for group in groups]
        #: of every parameter, its position among all of the optimizer's
        self.positions = {param: i for i, (param, _) in enumerate(everything)}
        #: in the optimizer's order
        self.dtensors = [param for param, _ in everything if layout.is_dtensor(param)]
        #: sharded parameters without state, which all ranks create when the first gradient arrives
        self._without_state = [p for p, group in everything if needs_reduction(p, group) and not has_state(state, p)]
        self._objects = list(map(list, self._collect(groups, state)))
        self._own = self._own_objects(state)
        self._options = self._cached_options(groups)

    def is_valid(self, groups: Groups, state: States) -> bool:
        """Whether groups, parameters and the optimizer's own state are still the same objects under the same options,
        and no sharded parameter needs its first state."""
        if self._cached_options(groups) != self._options or any(p.grad is not None for p in self._without_state):
            return False
        states = list(state.values())
        if not all(map(identical, self._others(groups), self._objects[2:])):
            return False
        if identical(states, self._objects[0]) and values_are(states, self._objects[1]):
            return True
        if not identical(self._own_objects(state), self._own):
            return False
        self._objects[:2] = self._collect(groups, state)[:2]  # a wrapper has replaced entries of its own
        return True

    def gradients(self, group_index: int, found: Gradients) -> list[Any]:
        """This rank's gradients of the parameters in ``local``; None where there is none."""
        params = self.local[group_index]
        if not self.dtensors:
            return grads_of(params)
        label = f"a parameter of group {group_index}"
        return [found.of(param, label) for param in params]

    def _collect(self, groups: Groups, state: States) -> list[list[Any]]:
        """All objects that must stay the same: states, their values, local tensors, and each group's parameters."""
        states = list(state.values())  # a wrapper's entry may belong to no parameter
        values = [value for entry in states if isinstance(entry, dict) for value in entry.values()]
        return [states, values, *self._others(groups)]

    def _others(self, groups: Groups) -> list[list[Any]]:
        return [[param._local_tensor for param in self.dtensors], *(list(group["params"]) for group in groups)]

    def _cached_options(self, groups: Groups) -> list[tuple[Any, ...]]:
        return [_cached_options(group, self._algorithm) for group in groups]

    def _own_objects(self, state: States) -> list[Any]:
        return [
            thing
            for param, entry in state.items()
            if isinstance(param, Tensor)
            for thing in (param, *_own_values(entry, self._own_keys))
        ]


class SingleParamCache:
    """One parameter of the optimizer, bound by itself: what `StepCache` is for all of them, so that the cost of
    `step_param` does not grow with their number.

    Args:
        groups, algorithm: as for `StepCache`.
        group_index, index: the parameter's group, and its index in the group.
    """

    def __init__(self, groups: Groups, group_index: int, index: int, algorithm: spec.Algorithm) -> None:
        self.group, self.label = groups[group_index], f"parameter {index} of group {group_index}"
        self.param: Tensor = self.group["params"][index]
        #: by itself, or with others (`hfac.optim.units.Unit`)
        self.bound: Any = None
        self.group_index, self._index = group_index, index
        self._algorithm, self._own_keys = algorithm, own_keys(algorithm)

    def is_in(self, groups: Groups) -> bool:
        """Whether the parameter still has its index in its group."""
        index, params = self._index, self.group["params"]
        here = self.group_index < len(groups) and groups[self.group_index] is self.group
        return here and index < len(params) and params[index] is self.param

    def position(self, groups: Groups) -> int:
        """The parameter's position among all of the optimizer's, which its random bits depend on; 0 without."""
        if self.group["rounding"] == "nearest":
            return 0
        return sum(map(len, map(itemgetter("params"), groups[: self.group_index]))) + self._index

    def keep(self, bound: Any, groups: Groups, state: States) -> None:
        """Keeps the bound parameter until any of what it was made of changes."""
        self._state, self._values = state[self.param], list(state[self.param].values())
        self._own = _own_values(self._state, self._own_keys)
        self._shard = getattr(self.param, "_local_tensor", None)
        self._options, self._position = _cached_options(self.group, self._algorithm), self.position(groups)
        self._given_options: Any = None  # of which ``_options`` are some
        self._is_drawn = self.group["rounding"] != "nearest"  # else its position says nothing
        self.bound = bound

    def holds(self, groups: Groups, state: States, options: Any = None) -> bool:
        """Whether all that ``bound`` was made of is what it was. ``options``: the group's, one object until one of them
        changes; None: they are compared."""
        entry = state.get(self.param)
        if entry is not self._state:
            return False
        if not values_are([entry], self._values):
            if not identical(_own_values(entry, self._own_keys), self._own):
                return False
            self._values = list(entry.values())  # a wrapper has replaced entries of its own
        if options is None or options is not self._given_options:
            if _cached_options(self.group, self._algorithm) != self._options:
                return False
            self._given_options = options
        shard = None if self.param.__class__ is Parameter else getattr(self.param, "_local_tensor", None)
        return shard is self._shard and not (self._is_drawn and self.position(groups) != self._position)


_BOUND = itemgetter(*EXECUTION, "nonfinite", "rounding", "master")


def _cached_options(group: Mapping[str, Any], algorithm: spec.Algorithm) -> tuple[Any, ...]:
    """The options that binding depends on."""
    return *_BOUND(group), algorithm.has_first(group)


def _own_values(entry: Mapping[str, Any], keys: Collection[str]) -> list[Any]:
    return [value for key, value in entry.items() if key in keys]
