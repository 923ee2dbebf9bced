"""The parameter lists that are measured, by name; the hostile ones are the tests' own table."""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

Shape = tuple[int, ...]

_FORM = "SIZES such as 1024x1024, or COUNTx SIZES such as '16x 1024x1024' or '200x 1024', joined by ' + '"
_PART = re.compile(r"(?:(\d+)x\s+)?(\d+(?:x\d+)*)")


def _load_cases() -> ModuleType:
    """tests/cases.py by its path: other packages, too, install something importable as ``tests``."""
    path = Path(__file__).parent.parent / "tests" / "cases.py"
    spec = importlib.util.spec_from_file_location("hfac_test_cases", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()


def gpt2() -> list[Shape]:
    """The 148 parameters of GPT-2 124M (head tied to the token embedding), weights as its code lays them out."""
    d, vocabulary, context, layers = 768, 50257, 1024, 12
    norm: list[Shape] = [(d,), (d,)]
    attention: list[Shape] = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp: list[Shape] = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(vocabulary, d), (context, d), *(layers * [*norm, *attention, *norm, *mlp]), *norm]


def resnet50() -> list[Shape]:
    """The 161 parameters of ResNet-50 for 1000 classes: convolutions without bias, two vectors per batch norm."""

    def convolution(out: int, into: int, size: int) -> list[Shape]:
        return [(out, into, size, size), (out,), (out,)]

    shapes = convolution(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, into, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (1000, into), (1000,)]


def llama3_8b() -> list[Shape]:
    """The 291 parameters of Llama-3-8B (8.03e9 elements): grouped-query attention with 8 of 32 heads for keys and
    values, untied embeddings. For plans only: no machine here holds it twice."""
    d, hidden, kv, vocabulary, layers = 4096, 14336, 1024, 128256, 32
    layer: list[Shape] = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(vocabulary, d), *(layers * layer), (d,), (vocabulary, d)]


#: name on the command line -> (what it is, the list)
NAMED: dict[str, tuple[str, Callable[[], list[Shape]]]] = {
    "gpt2": ("GPT-2 124M, all parameters", gpt2),
    "resnet50": ("ResNet-50, all parameters", resnet50),
    "hostile": ("scalars, primes, single rows, empty tensors, five dimensions", lambda: list(cases.SHAPES)),
}
FULL = ("4096x4096", "16x 1024x1024", "200x 1024", "400x 768 + 100x 64x64", "gpt2", "resnet50")
QUICK = ("2048x2048", "200x 1024")


def parse(name: str) -> list[Shape]:
    """The shapes that ``name`` stands for.

    Raises:
        ValueError: neither a name of `NAMED` nor of the written form.
    """
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
