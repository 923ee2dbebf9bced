"""The tests' own order: modules have unique names, every file of tests that is named anywhere exists, and where `make
test` leaves cases out of a table, every pair of values stays in."""

import re
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import sanitize

ROOT = Path(__file__).parents[2]
#: Names of this repository's tests where they are now; CHANGELOG.md names them where they were.
MENTIONING = [
    *(ROOT / file for file in ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci/run")),
    *(path for folder in ("docs", "examples") for path in sorted((ROOT / folder).rglob("*.*"))),
    *(
        path
        for folder in ("bench", "hfac", "tests", "triton_kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
    *(path for path in sorted((ROOT / "csrc").rglob("*.*"))),
]
MENTION = re.compile(r"\btests/[\w/*]+\.py\b")


def mentions(path):
    try:
        return MENTION.findall(path.read_text())
    except (UnicodeDecodeError, IsADirectoryError):  # pictures
        return []


def test_every_file_that_is_named_exists():
    named = {(file, name) for file in MENTIONING for name in mentions(file)}
    assert len(named) > 30
    assert not sorted(f"{file.relative_to(ROOT)}: {name}" for file, name in named if not list(ROOT.glob(name)))


def test_every_module_has_a_folder_and_a_name_of_its_own():
    modules = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len({path.name for path in modules}) == len(modules)
    assert {path.parent.name for path in modules} == set(conftest.FOLDERS)


def test_long_tests_exist():
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_layout.py")
    for name in conftest.LONG:
        assert list((ROOT / "tests").rglob(f"{name}*.py")) or f"def {name}" in text, name


def test_sanitizers_have_tests():
    assert all((ROOT / file).exists() for file in sanitize.TESTS)


def test_every_two_values_of_two_parameters_still_meet():
    sizes = {"dtype": 4, "shape": 24, "options": 9}
    cases = [dict(zip(sizes, values, strict=True)) for values in product(*map(range, sizes.values()))]
    left_out = conftest.left_out(range(len(cases)), cases)
    kept = [case for i, case in enumerate(cases) if i not in left_out]
    assert len(kept) < 1.2 * 24 * 9  # the two longest parameters alone make so many pairs
    for a, b in combinations(sizes, 2):
        assert {(case[a], case[b]) for case in kept} == set(product(range(sizes[a]), range(sizes[b])))


def test_parameters_that_are_given_together_are_one():
    marks = [pytest.mark.parametrize(names, []).mark for names in ("name, options", ("shape",))]
    params = {"name": "HFac", "options": "all", "shape": (3, 4), "device": "cpu"}  # the last of a fixture's
    item = SimpleNamespace(callspec=SimpleNamespace(params=params), iter_markers=lambda name: marks)
    assert set(conftest.values(item)) == {("name", "options"), ("shape",), ("device",)}
