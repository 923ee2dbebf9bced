"""Parameter groups of both optimizers: their options, checked once and again where they have changed, and what all
groups must agree in."""

from collections.abc import Collection, Iterable, Mapping
from operator import is_, itemgetter
from typing import Any, ClassVar, get_args

from torch import Tensor
from torch.optim import Optimizer

from .. import backends, ops, spec
from ..types import Master, Nonfinite, Rounding
from . import options

ROUNDING = get_args(Rounding)
MASTER = get_args(Master)
COMMON_RULES: dict[str, options.Rule] = {
    "lr": options.number(0.0, tensor=True),
    "weight_decay": options.number(0.0, tensor=True),
    "dense": options.flag,
    "batch_dims": options.whole(),
    "views": options.count,
    "views_dim": options.whole(),
    "maximize": options.flag,
    "capturable": options.flag,
    "nonfinite": options.choice(*get_args(Nonfinite)),
    "rounding": options.choice(*ROUNDING),
    "seed": options.whole(2**64 - 1),
    "master": options.choice(*MASTER, none="no master weights"),
    "amp_scaling": options.flag,
    "watch": options.flag,
    "max_grad_norm": options.number(0.0, open_low=True, none="no clipping by the norm"),
    "backend": lambda name, value: options.choice(*backends.names())(name, value),  # names may be registered
}
#: options that optimizers pickled by earlier versions lack, with the values that keep their behaviour
ADDED = {
    "dense": False,
    "batch_dims": 0,
    "views": 1,
    "views_dim": 0,
    "rounding": "nearest",
    "seed": 0,
    "master": None,
    "max_grad_norm": None,
    "watch": False,
}
#: options on which the shapes of the state depend
FIXED = ("dense", "batch_dims", "views", "views_dim")
#: options that schedulers write before every step, and on which no state depends
RATES = {"lr", "weight_decay"}
#: options that say how a step runs, not what it computes; loading a checkpoint keeps the running optimizer's
EXECUTION = ("capturable", "backend", "amp_scaling", "watch")


class GroupedOptimizer(Optimizer):
    """The base of both optimizers without state: parameter groups and their options."""

    #: name of the subclass's algorithm in `hfac.spec`
    _algorithm: ClassVar[str]
    #: rules of the subclass's own options
    _rules: ClassVar[dict[str, options.Rule]] = {}
    #: an option that every version of the subclass has and no other optimizer, which identifies its state dicts
    _own_option: ClassVar[str]
    #: the subclass's own options on which the keys of its state depend, which no state dict may change, with the values
    #: of optimizers and state dicts of earlier versions, which lack them
    _state_options: ClassVar[dict[str, Any]] = {}
    #: options that only other optimizers have, and what to do instead; groups with one of them are refused
    _elsewhere: ClassVar[dict[str, str]] = {}
    #: where each parameter was when last looked up: the index of its group, and its index there
    _index: dict[Tensor, tuple[int, int]]
    #: the groups' options as they were last checked
    _known: "KnownOptions"

    def _forget(self) -> None:
        """Drops everything that was cached from earlier steps."""
        raise NotImplementedError

    def _has_state(self, group: Mapping[str, Any]) -> bool:
        """Whether a parameter of this group has state."""
        raise NotImplementedError

    @property
    def _spec(self) -> spec.Algorithm:
        return spec.ALGORITHMS[self._algorithm]

    @classmethod
    def _all_rules(cls) -> dict[str, options.Rule]:
        """By the names of all options that groups may have."""
        return {**COMMON_RULES, **cls._rules}

    def _checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options among ``values``, each checked and converted by its rule."""
        rules = self._all_rules()
        return {
            name: rules[name](f"{type(self).__name__}: {name}", value)
            for name, value in values.items()
            if name in rules
        }

    def _check_changes(self, index: int) -> None:
        """Checks the options that have been changed in a group since they were last checked.

        Raises:
            TypeError, ValueError: as for the constructor; or an option was changed on which the keys and shapes of the
                state depend, once there is state.
        """
        group = self.param_groups[index]
        before = self._known.changed(index, group)
        if not before:
            return
        now = self._checked({name: group[name] for name in before})
        for name in before.keys() - RATES:
            old = before[name]
            fixed = name in (*FIXED, self._own_option, *self._state_options) and now[name] != old
            changes_keys = self._spec.has_first(group) != self._spec.has_first({**group, name: old})
            if (fixed or changes_keys) and self._has_state(group):
                raise ValueError(
                    f"{type(self).__name__}: {name} of group {index} cannot change once state exists, which depends on "
                    f"it: it was {old!r} and is {now[name]!r} now. Set it back, or make an optimizer with the new "
                    "value (hfac.convert translates state dicts)."
                )
        group.update(now)
        self._known.keep(index, group)

    @property
    def max_grad_norm(self) -> float | None:
        """The option, which is the same in every group.

        Raises:
            ValueError: the groups differ.
        """
        return self._common_limit(self.param_groups)

    def _common_limit(self, groups: Iterable[Mapping[str, Any]]) -> float | None:
        """``max_grad_norm`` of all these groups; groups pickled by an older version have none."""
        name = f"{type(self).__name__}: max_grad_norm"
        limits = [group.get("max_grad_norm") for group in groups] or [None]
        if limits.count(limits[0]) != len(limits):
            raise ValueError(
                f"{name} must be the same in every group, because the norm is that of all gradients together, got "
                f"{limits}. Set it once, for the optimizer."
            )
        return None if limits[0] is None else COMMON_RULES["max_grad_norm"](name, limits[0])

    def _skips_steps(self, groups: Iterable[Mapping[str, Any]]) -> bool:
        """Whether these groups have nonfinite="skip-step", which all must have, or none."""
        given = [group["nonfinite"] for group in groups]
        if "skip-step" not in given:
            return False
        if given.count("skip-step") != len(given):
            raise ValueError(
                f"{type(self).__name__}: nonfinite='skip-step' must be the same in every group, because it skips the "
                f"step of all parameters together, got {given}. Set it once, for the optimizer."
            )
        return True

    def _find(self, param: Tensor) -> tuple[int, int] | None:
        """The index of a parameter's group and the parameter's index there; None where no group has it. Looking up
        many parameters walks the groups once."""
        groups, found = self.param_groups, self._index.get(param)
        if found is None or not is_at(groups, param, *found):
            self._index = {p: (index, i) for index, group in enumerate(groups) for i, p in enumerate(group["params"])}
            found = self._index.get(param)
        return found

    def _label(self, param: Tensor) -> str:
        """A parameter of this optimizer in messages."""
        found = self._find(param)
        assert found is not None
        return f"parameter {found[1]} of group {found[0]}"


class KnownOptions:
    """The options of an optimizer's groups as they were last checked: users and schedulers write into groups."""

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._get = tuple(names), itemgetter(*names)
        #: by index the group, its options, and all of its values
        self._groups: dict[int, tuple[Mapping[str, Any], tuple[Any, ...], list[Any]]] = {}

    def keep(self, index: int, group: Mapping[str, Any]) -> None:
        self._groups[index] = group, self._get(group), list(group.values())

    def values(self, index: int) -> tuple[Any, ...]:
        """Those of a group that is known: the same object until one of them changes."""
        return self._groups[index][1]

    def unchanged(self, index: int, group: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """`values`; None where one of the group's values, option or not, is another object than it was."""
        known = self._groups.get(index)
        if known is None or known[0] is not group or not ops.values_are([group], known[2]):
            return None
        return known[1]

    def changed(self, index: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """By name, the former values of the options that are other objects now. Of a group that is not known, all, with
        their present values."""
        if self.unchanged(index, group) is not None:
            return {}
        known, before, _ = self._groups.get(index, (None, (), []))
        now = self._get(group)
        if known is not group:
            return dict(zip(self._names, now, strict=True))
        if all(map(is_, now, before)):  # others' entries have changed
            self._groups[index] = group, before, list(group.values())
            return {}
        pairs = zip(self._names, now, before, strict=True)
        return {name: old for name, new, old in pairs if new is not old}


def is_at(groups: list[dict[str, Any]], param: Tensor, group_index: int, index: int) -> bool:
    """Whether the parameter has this index in the group of that index."""
    params = groups[group_index]["params"] if group_index < len(groups) else []
    return index < len(params) and params[index] is param
