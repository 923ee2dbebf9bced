"""The parameter lists that are measured, by name; models are those of `hfac plan`, hostile ones the tests' own."""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from hfac.cli import shapes as models
from hfac.cli.shapes import Shape

_FORM = "SIZES such as 1024x1024, or COUNTx SIZES such as '16x 1024x1024' or '200x 1024', joined by ' + '"
_PART = re.compile(r"(?:(\d+)x\s+)?(\d+(?:x\d+)*)")


def _load_cases() -> ModuleType:
    """tests/helpers/cases.py by its path: other packages, too, install something importable as ``tests``."""
    path = Path(__file__).parent.parent / "tests/helpers/cases.py"
    spec = importlib.util.spec_from_file_location("hfac_test_cases", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()


def gpt2() -> list[Shape]:
    """The 148 parameters of GPT-2 124M."""
    return list(models.gpt2().values())


def resnet50() -> list[Shape]:
    """The 161 parameters of ResNet-50 for 1000 classes."""
    return list(models.resnet50().values())


def llama3_8b(layers: int = 32) -> list[Shape]:
    """The 291 parameters of Llama-3-8B, 8.03e9 elements (with fewer ``layers``: embedding, head and those)."""
    return list(models.llama3_8b(layers).values())


#: name on the command line -> (what it is, the list)
NAMED: dict[str, tuple[str, Callable[[], list[Shape]]]] = {
    "gpt2": ("GPT-2 124M, all parameters", gpt2),
    "resnet50": ("ResNet-50, all parameters", resnet50),
    "llama-3-8b": ("Llama-3-8B, all parameters (16 GB of parameters in bfloat16, as much of gradients)", llama3_8b),
    "llama-3-8b-4": ("Llama-3-8B, embedding, head and 4 of 32 layers", lambda: llama3_8b(4)),
    "hostile": ("scalars, primes, single rows, empty tensors, five dimensions", lambda: list(cases.SHAPES)),
}
#: earlier names of the same lists
ALIASES = {**models.ALIASES, "llama3-8b-4": "llama-3-8b-4"}
FULL = ("4096x4096", "16x 1024x1024", "200x 1024", "400x 768 + 100x 64x64", "gpt2", "resnet50")
QUICK = ("2048x2048", "200x 1024")


def parse(name: str) -> list[Shape]:
    """The shapes that ``name`` stands for.

    Raises:
        ValueError: neither a name of `NAMED` nor of the written form.
    """
    name = name.strip()
    name = ALIASES.get(name, name)
    if name in NAMED:
        return NAMED[name][1]()
    shapes: list[Shape] = []
    for part in name.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"required is one of {', '.join(NAMED)}, or {_FORM}; got {name!r}")
        sizes = tuple(map(int, match[2].split("x")))
        shapes += int(match[1] or 1) * [sizes]
    if not sum(map(math.prod, shapes)):
        raise ValueError(f"required is a list with at least one element to update, got {name!r}; raise a 0 in it")
    return shapes
