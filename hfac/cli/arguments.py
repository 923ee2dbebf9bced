"""Types of command-line values. Their error messages say what is required and what was given."""

from __future__ import annotations

import argparse
import math
import re

from hfac.cli.optimizers import CHOICES
from hfac.cli.settings import EVERY_OPTIMIZER


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _whole_number(text, 1)


def nonnegative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _whole_number(text, 0)


def seed(text: str) -> int:
    """A whole number that torch takes as a seed, from 0 to 2**64 - 1."""
    return _whole_number(text, 0, 2**64 - 1)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"required is a number above 0, got {text!r}")
    return value


def nonnegative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"required is a number of at least 0, got {text!r}")
    return value


def optimizer_names(text: str) -> list[str]:
    """One name of `CHOICES`, or several with commas between."""
    names = [name for name in text.lower().split(",") if name]
    for name in names:
        if name not in CHOICES:
            raise argparse.ArgumentTypeError(f"required are names among {', '.join(CHOICES)}, got {name!r}")
    if not names:
        raise argparse.ArgumentTypeError(f"required is at least one of {', '.join(CHOICES)}, got {text!r}")
    return names


def learning_rates(text: str) -> list[tuple[str, float]]:
    """`LR` for all optimizers, `NAME=LR` for one, or several of these with commas between."""
    pairs = []
    for item in text.split(","):
        name, equals, value = item.rpartition("=")
        pairs.append((optimizer_names(name)[0] if equals else EVERY_OPTIMIZER, positive_float(value)))
    return pairs


def device_name(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"required is cpu, cuda or cuda:N, got {text!r}")
    return text


def _whole_number(text: str, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"required is a whole number {limits}, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"required is a number, got {text!r}") from None
