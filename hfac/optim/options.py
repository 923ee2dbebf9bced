"""Checking of optimizer options: one rule per option, used at construction, for every group and for loaded state dicts.

A rule takes the option's name and a value and returns the value to keep. Text is read as trainers pass it from a
command line ("0.9", "(0.9,0.95)", "true", "none"); whatever cannot be meant is refused with what was required and
what was given.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Rule = Callable[[str, Any], Any]
_NONE = ("none", "null")


def number(
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    tensor: bool = False,
    none: str | None = None,
) -> Rule:
    """A finite real number between the bounds; ``tensor`` allows a 0-d (or one-element) tensor, whose value is
    checked where that costs no device synchronisation; ``none`` says what None means, where None is allowed."""
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
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            error = ValueError if isinstance(value, str) else TypeError
            raise error(f"{name} must be {wanted}, got {value!r}")
        if not inside(float(value)):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        return float(value)

    return rule


def pair(each: Rule) -> Rule:
    """Two values that each follow a rule; kept as a tuple."""

    def rule(name: str, value: Any) -> tuple[Any, Any]:
        if isinstance(value, str):
            value = [part for part in value.strip().strip("()[]").split(",") if part.strip()]
        if not isinstance(value, Sequence) or len(value) != 2:
            error = ValueError if isinstance(value, Sequence) else TypeError
            raise error(f"{name} must be a pair of numbers such as (0.9, 0.999), got {value!r}")
        return each(f"{name}[0]", value[0]), each(f"{name}[1]", value[1])

    return rule


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if isinstance(value, str):
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            value.strip().lower(), value
        )
        if isinstance(value, str):
            raise ValueError(f"{name} must be true or false, got {value!r}")
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(*names: str, none: str | None = None) -> Rule:
    """One of some names; ``none`` says what None means, where None is allowed."""
    wanted = f"one of {', '.join(map(repr, names))}" + (f" or None ({none})" if none else "")

    def rule(name: str, value: Any) -> str | None:
        if none and (value is None or (isinstance(value, str) and value.strip().lower() in _NONE)):
            return None
        if not isinstance(value, str):
            raise TypeError(f"{name} must be {wanted}, got {value!r}")
        if value not in names:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        return value

    return rule


def whole(high: float = math.inf) -> Rule:
    """A whole number from 0 to ``high``."""
    wanted = "a whole number >= 0" if high == math.inf else f"a whole number in [0, {high}]"

    def rule(name: str, value: Any) -> int:
        if isinstance(value, str):
            value = _read(value, int)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            error = ValueError if isinstance(value, str) else TypeError
            raise error(f"{name} must be {wanted}, got {value!r}")
        if not 0 <= operator.index(value) <= high:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        return operator.index(value)

    return rule


def _read(text: str, kind: Callable[[str], Any]) -> Any:
    """The value a command line means by ``text``; the text itself where it means none."""
    if text.strip().lower() in _NONE:
        return None
    try:
        return kind(text)
    except ValueError:
        return text
