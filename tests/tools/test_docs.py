"""README and docs/: every link and every file they name is there, and every page says what it answers."""

import ast
import inspect
import pydoc
import re
from pathlib import Path

import pytest

import hfac

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
#: written by commands, which say what they are
GENERATED = {"cuda-check.md", "launch-plan.md", "triton-check.md"}
NAMED = re.compile(r"`((?:bench|csrc|docs|examples|hfac|tests|triton_kernels)/[\w./-]+\.(?:cpp|cuh?|h|md|py))`")

NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page, to be linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing(page: Path) -> list[str]:
    """Links of a page that lead nowhere, and files and tests that it names and that are not there."""
    text = page.read_text()
    found = [name for name in NAMED.findall(text) if not (ROOT / name).is_file()]
    for name, test in NAMED_TEST.findall(text):
        if not (ROOT / name).is_file() or f"def {test}(" not in (ROOT / name).read_text():
            found.append(f"{name}::{test}")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    assert missing(page) == []


def test_a_missing_file_a_dead_link_and_a_dead_anchor_are_noticed(tmp_path):
    (tmp_path / "other.md").write_text("# A heading: with `code`\n")
    page, test = tmp_path / "page.md", "tests/tools/test_docs.py::test_gone"
    page.write_text(
        f"`{test}` `hfac/no_such.py` `hfac/spec.py` [](gone.md) [](other.md#a-heading-with-code) [](other.md#gone)"
    )
    assert missing(page) == ["hfac/no_such.py", test, "gone.md", "other.md#gone"]


def test_what_sharded_training_supports_and_refuses_has_a_test():
    text = (DOCS / "distributed.md").read_text()
    start = text.index("| | what | test |")
    rows = text[start : text.index("\n\n", start)].splitlines()[2:]
    untested = [row for row in rows if not NAMED_TEST.search(row) and not NAMED.search(row)]
    assert len(rows) > 10 and untested == []


def test_every_page_is_in_the_index_and_says_what_it_answers():
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == pages
    silent = [name for name in pages - GENERATED if "\nThis page answers: " not in (DOCS / name).read_text()[:400]]
    assert silent == []


def test_the_optimizer_has_one_name_where_users_read():
    """HFac is the class; the algorithm's name, H-Fac, is for pages about kernels and code."""
    of_code = GENERATED | {"kernels.md", "architecture.md", "adding-an-optimizer.md", "planted-faults.md"}
    users = [page for page in PAGES if page.name not in of_code and page != DOCS / "README.md"]
    messages = sorted((ROOT / "hfac" / "cli").glob("*.py"))
    assert [page.name for page in users + messages if "H-Fac" in page.read_text()] == []


def test_pictures_say_what_they_show_to_those_who_cannot_see_them():
    for page in PAGES:
        for text in re.findall(r"!\[([^\]]*)\]\(", page.read_text()):
            assert len(text) > 60, (page.name, text)


@pytest.mark.parametrize("cls", [hfac.HFac, hfac.SMMF])
def test_help_fits_two_screens_and_describes_every_argument(cls):
    """The signature and what comes before the methods, at 100 columns beside help's own margin."""
    shown = pydoc.plain(pydoc.render_doc(cls)).partition("Method resolution order")[0].splitlines()
    assert sum(max(1, -(-len(line) // 124)) for line in shown) <= 80
    options = cls.__doc__.partition("State of a parameter")[0]
    described = re.findall(r"^        (\w+):", options, re.M)
    parameters = inspect.signature(cls).parameters.values()
    assert sorted(described) == sorted(parameter.name for parameter in parameters)
    for parameter in parameters:
        if parameter.default is not parameter.empty:
            said = re.search(rf"^        {parameter.name}: (.*?)(?=^        \w|\n\n)", options, re.M | re.S)[1]
            default = re.search(r"\(default (\([^)]*\)|[^);]+)", said)[1]
            assert ast.literal_eval(default) == parameter.default, parameter
    for page in re.findall(r"docs/[\w-]+\.md", cls.__doc__):
        assert (ROOT / page).is_file()
