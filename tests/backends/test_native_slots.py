"""csrc agrees with itself and with the package: the lists that the extension takes for each op are those that are
described there, in the same order, and an include only goes down."""

import re
from pathlib import Path

import pytest

from hfac import spec

CSRC = next(folder for folder in Path(__file__).parents if (folder / "csrc").is_dir()) / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s+"(.+)"', re.M)
#: folder of csrc -> where its files may include from, beside themselves; "" is csrc itself
BELOW = {
    "common": set(),
    "": {"common", "bindings", "cpu", "emulation"},
    "cpu": {"", "common"},
    "cuda": {"", "common", "emulation"},  # which stands in CUDA's place
    "emulation": set(),
    "bindings": {"", "cpu", "cuda"},
}


def folder(path: Path) -> str:
    parts = path.resolve().relative_to(CSRC.resolve()).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("name", BELOW)
def test_an_include_only_goes_down(name):
    files = [path for path in CSRC.rglob("*") if path.is_file() and folder(path) == name]
    assert files
    for path in files:
        for found in INCLUDE.findall(path.read_text()):
            target = path.parent / found
            assert target.exists(), f"{path}: {found}"
            assert folder(target) in BELOW[name] | {name}, f"{path} includes {found}"


def test_slots_are_the_lists_of_every_op():
    _C = pytest.importorskip("hfac._C", reason="the extension is not built: hfac doctor says why")
    described = {name.removesuffix("_"): [operand.name for operand in op.operands] for name, op in spec.OPS.items()}
    assert _C.slots() == described
