"""Validation of optimizer options: one rule per option, applied at construction, to every group and to loaded state
dicts.

A rule takes the option's name and a value and returns the value to keep. Strings are parsed as trainers pass them from
a command line ("0.9", "(0.9,0.95)", "true", "none"). Anything else raises, saying what was required and what was given:
a TypeError for a value of the wrong type, a ValueError for one out of range and for a string that cannot be parsed.
"""

import functools
import inspect
import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor

Rule = Callable[[str, Any], Any]
_NONE = ("none", "null")
_Init = TypeVar("_Init", bound=Callable[..., None])


def number(
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    tensor: bool = False,
    none: str | None = None,
) -> Rule:
    """A finite real number between the bounds. ``tensor`` allows a one-element tensor, whose value is checked if that
    takes no device synchronisation. ``none`` allows None, and says what it means."""
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"
    wanted = f"a number in {interval}" + (" or a 0-d tensor" if tensor else "") + (f" or None ({none})" if none else "")

    def inside(value: float) -> bool:
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        return above and below and math.isfinite(value)

    def rule(name: str, value: Any) -> Any:
        if isinstance(value, str):
            value = _read(value, float)
        if value is None and none:
            return None
        if isinstance(value, Tensor):
            if not tensor or value.numel() != 1 or value.is_complex():
                raise TypeError(
                    f"{name} must be {wanted}, got a tensor of shape {tuple(value.shape)} and {value.dtype}"
                )
            if value.device.type == "cpu" and not inside(value.item()):
                raise ValueError(f"{name} must be {wanted}, got {value.item()}")
            return value
        fits = not isinstance(value, bool) and hasattr(value, "__float__")
        if not fits or not inside(float(value)):
            raise _error(name, wanted, value, fits)
        return float(value)

    return rule


def pair(each: Rule) -> Rule:
    """Two values that follow the same rule; kept as a tuple."""

    def rule(name: str, value: Any) -> tuple[Any, Any]:
        if isinstance(value, str):
            value = [part for part in value.strip().strip("()[]").split(",") if part.strip()]
        if not isinstance(value, Sequence) or len(value) != 2:
            raise _error(name, "a pair of numbers such as (0.9, 0.999)", value, isinstance(value, Sequence))
        return each(f"{name}[0]", value[0]), each(f"{name}[1]", value[1])

    return rule


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if isinstance(value, str):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        value = words.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise _error(name, "true or false" if isinstance(value, str) else "True or False", value)
    return value


def choice(*names: str, none: str | None = None) -> Rule:
    """One of these names. ``none`` allows None, and says what it means."""
    wanted = f"one of {', '.join(map(repr, names))}" + (f" or None ({none})" if none else "")

    def rule(name: str, value: Any) -> str | None:
        if none and (value is None or (isinstance(value, str) and value.strip().lower() in _NONE)):
            return None
        if not isinstance(value, str) or value not in names:
            raise _error(name, wanted, value)
        return value

    return rule


def whole(high: float = math.inf) -> Rule:
    """A whole number from 0 to ``high``."""
    wanted = "a whole number >= 0" if high == math.inf else f"a whole number in [0, {high}]"

    def rule(name: str, value: Any) -> int:
        if isinstance(value, str):
            value = _read(value, int)
        fits = not isinstance(value, bool) and hasattr(value, "__index__")
        if not fits or not 0 <= operator.index(value) <= high:
            raise _error(name, wanted, value, fits)
        return operator.index(value)

    return rule


def count(name: str, value: Any) -> int:
    """A whole number >= 1, or several, whose product is kept."""
    if isinstance(value, str):
        value = [part for part in value.strip().strip("()[]").split(",") if part.strip()]
    each = whole()
    given = list(value) if isinstance(value, Sequence) else [value]
    found = math.prod(each(name, one) for one in given)
    if not given or found < 1:
        raise _error(name, "a whole number >= 1, or several such as (3, 16)", value, fits=True)
    return found


def _error(name: str, wanted: str, value: Any, fits: bool = False) -> Exception:
    """``fits``: whether the value is of the right type, a string apart."""
    kind = ValueError if fits or isinstance(value, str) else TypeError
    return kind(f"{name} must be {wanted}, got {value!r}")


def _read(text: str, kind: Callable[[str], Any]) -> Any:
    """The value that a command line means by ``text``; the text itself if it means none."""
    if text.strip().lower() in _NONE:
        return None
    try:
        return kind(text)
    except ValueError:
        return text


def positional_to(last: str, hint: str) -> Callable[[_Init], _Init]:
    """Has a constructor refuse further positional arguments, which would mean something else to another optimizer.

    Args:
        last: its last argument that may be given by position.
        hint: how the error's message ends.
    """

    def decorate(init: _Init) -> _Init:
        most = list(inspect.signature(init).parameters).index(last) + 1  # with self

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            if len(args) >= most:
                name, positional = type(self).__name__, f"{most - 1} positional arguments (to {last})"
                raise TypeError(f"{name} takes at most {positional}, got {len(args)}: {hint}")
            init(self, *args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """Names that are known, the most similar to ``name`` first; of a long form its initials, as lr of learning_rate."""
    names = list(dict.fromkeys(known))
    initials = "".join(word[:1] for word in name.split("_"))
    return initials if initials in names else ", ".join(get_close_matches(name, names, most, 0.0))


_LEFT_OUT = "leave it out: fused kernels are the default, and docs/backends.md says which run"
#: arguments of `torch.optim.AdamW` that no optimizer of hfac has, and what to do instead
_ADAMWS = {
    "fused": _LEFT_OUT,
    "foreach": _LEFT_OUT,
    "differentiable": "leave it out: steps are not differentiable",
    "amsgrad": "leave it out: there is no variant that keeps the maximum of the second moment",
}


def instead(name: str, known: Iterable[str], hints: Mapping[str, str]) -> str:
    """How the message ends that refuses an option: its hint, or the nearest names that are known."""
    return f"instead, {hints[name]}" if name in hints else f"the nearest: {nearest(name, known)}"


def by_name(hints: Mapping[str, str]) -> Callable[[_Init], _Init]:
    """Has a constructor refuse arguments that it does not have with the nearest that it has.

    Args:
        hints: options of other optimizers that the constructor lacks, and what to do instead; AdamW's ``fused`` and the
            like need none.
    """
    hints = {**_ADAMWS, **hints}

    def decorate(init: _Init) -> _Init:
        known = list(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            foreign = [
                f"has no argument {name!r}; {instead(name, known, hints)}" for name in kwargs if name not in known
            ]
            if foreign:
                raise TypeError(f"{type(self).__name__} {'. It '.join(foreign)}")
            init(self, *args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


#: whether optimizers are made here that the user does not
_internal: ContextVar[bool] = ContextVar("internal", default=False)


@contextmanager
def unadvised() -> Iterator[None]:
    """Optimizers that are made inside do not warn of what is allowed and yet hardly meant."""
    token = _internal.set(True)
    try:
        yield
    finally:
        _internal.reset(token)


def advise(message: str) -> None:
    """Warns of what is allowed and yet hardly meant."""
    if not _internal.get():
        warn(message)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns of what the caller of the package does."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hfac", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
