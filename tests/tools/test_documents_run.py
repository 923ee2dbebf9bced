"""README.md and docs/: every block of code is run as it is printed, and every command is one that is there."""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import documents
import pytest
from processes import Forked

import hfac
from hfac import cli

ROOT, PAGES = documents.ROOT, documents.PAGES
BLOCKS = [block for page in PAGES for block in documents.blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
#: every block of Python that is not run, by the library for which it waits
NOT_RUN = [
    ("docs/trainers.md", "axolotl"),
    ("docs/trainers.md", "torchtitan"),
    ("docs/trainers.md", "deepspeed"),
    ("docs/trainers.md", "composer"),
]
#: warnings of other packages that no line of the page could prevent
SILENT = {
    "docs/trainers.md": (
        "ignore:Starting from v1.9.0, `tensorboardX`",
        "ignore:.isinstance.treespec, LeafSpec",
        "ignore:Precision bf16-mixed is not supported by the model summary",
        "ignore:The 'train_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:'pin_memory' argument is set as true",
    )
}
RUN = """
import os, sys, tempfile, warnings
import torch
import documents

page, *silent = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
for filter in ["error", "ignore:hfac steps in plain torch", *silent]:  # where nothing has been compiled
    action, _, message = filter.partition(":")
    warnings.filterwarnings(action, message)
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    documents.run(page)
    os.chdir("/")
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRITON_INTERPRET": "1"}


def ended(page, *silent):
    if page == "docs/kernels.md":  # Triton has to be told to interpret before torch imports it
        environment = os.environ | OFFLINE | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", RUN, page, *silent]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return Forked(RUN, [page, *silent], OFFLINE).ended(600)


@pytest.mark.parametrize("page", list(dict.fromkeys(block.page for block in PYTHON)))
def test_a_page_runs_as_it_is_printed(page):
    done = ended(page, *SILENT.get(page, ()))
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_block_that_fails_warns_or_is_not_marked_is_noticed(tmp_path):
    for mark, text, said in [
        ("run", "1 / 0", "ZeroDivisionError"),
        ("run", "import warnings; warnings.warn('look here')", "look here"),
        ("run after: imports", "hfac.HFacc", "HFacc"),
        ("part of: tests/tools/test_documents_run.py", "no such" + " line", "not in tests"),
        ("not run: needs nothing", "def (", "SyntaxError"),
        ("of no kind", "pass", "neither that it is run nor why not"),
    ]:
        page = tmp_path / "page.md"
        page.write_text(f"# A page\n\n<!-- {mark} -->\n```python\n{text}\n```\n")
        done = ended(page)
        assert done.returncode == 1 and said in done.stderr, (mark, text, done.stderr)
        assert 'page.md", line 5' in done.stderr or mark != "run"


def test_every_block_is_found():
    for page in PAGES:
        python = [block for block in documents.blocks(page) if block.language == "python"]
        assert page.read_text().count("```python") == len(python), page
    assert len(PYTHON) > 20


def test_what_is_not_run_is_listed_and_waits_for_a_library_that_is_not_there():
    marked = [(block.page, block.after("not run")) for block in PYTHON if block.after("not run")]
    assert marked == [(page, f"needs {library}") for page, library in NOT_RUN]
    assert [library for _, library in NOT_RUN if importlib.util.find_spec(library)] == []  # these could be run


def named(value):
    """Every string in what a file of YAML holds."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from named(entry)
    elif isinstance(value, str):
        yield value


def test_yaml_holds_names_that_are_there_and_options_that_are_accepted():
    yaml = pytest.importorskip("yaml")
    found = [block for block in BLOCKS if block.language == "yaml"]
    assert found
    for block in found:
        held = yaml.safe_load(block.text)
        classes = [name for name in named(held) if re.fullmatch(r"\w+(\.\w+)+", name)]
        assert classes, block
        for name in classes:
            module, _, attribute = name.rpartition(".")
            if module != "hfac":  # the module is a block of the page
                its = [other.text for other in PYTHON if other.page == block.page and f"# {module}.py" in other.text]
                assert its and f"class {attribute}(" in its[0], (str(block), name)
                continue
            options = {key: value for key, value in held["optimizer"].items() if key != "_component_"}
            getattr(hfac, attribute)(documents.Model().parameters(), **options)


def commands(page):
    """Commands of a page: those on indented lines, and those in the text between backquotes."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    of = r"(?:hfac|make|python -m|torchrun|pytest) "
    lines = re.findall(rf"^    ({of}.*)$", text, re.M) + re.findall(rf"`({of}[^`]+)`", text)
    return [re.sub(r"\s+", " ", line) for line in lines]


def faults(command):
    """What of a command is not there."""
    command = re.sub(r"  ?\(or:.*", "", command).split(" | ")[0]
    usage = re.sub(r"\[(.*?)\]", r"\1", command)  # "[--json]" may be left out
    program, *words = [word for word in shlex.split(usage, comments=True) if not re.match(r"[A-Z_]+=\d", word)]
    words = [{"FILE": "file.png", "NAME": "hfac"}.get(word, word.split("|")[0]) for word in words]  # "bf16|fp32"
    if program == "hfac":
        return parsed(words) if words[1:] else [word for word in words if word not in cli.COMMANDS]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        gone = [word for word in words if "=" not in word and word not in targets]
        given = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
        if words[0] in cli.COMMANDS and given and "..." not in given[0]:
            gone += parsed([words[0], *shlex.split(given[0])])
        return gone
    if program == "python" and words[1].startswith("bench"):
        module = importlib.util.find_spec(words[1])
        if module is None:
            return [words[1]]
        source = "".join(path.read_text() for path in ROOT.joinpath("bench").rglob("*.py"))
        return [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]
    return [word for word in words if word.endswith(".py") and not (ROOT / word).is_file()]


def parsed(words):
    """Nothing, where the command line takes the words."""
    try:
        cli.build_parser().parse_args(words)
    except (SystemExit, argparse.ArgumentError):
        return [" ".join(words)]
    return []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_commands_are_there(page):
    assert {command: gone for command in commands(page) if (gone := faults(command))} == {}


def test_commands_that_are_not_there_are_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "    make no-such  # a remark\n\n`hfac plan --no-such`, `hfac no-such`\n"
        "`python -m bench.no_such`, `python -m bench.options --no-such`\n    torchrun -n 2 examples/no_such.py\n"
        "    hfac plan llama-3-8b --world-size 1,64\n    make plan ARGS='--no-such'\n"
    )
    assert sorted(command for command in commands(page) if faults(command)) == [
        "hfac no-such",
        "hfac plan --no-such",
        "make no-such # a remark",
        "make plan ARGS='--no-such'",
        "python -m bench.no_such",
        "python -m bench.options --no-such",
        "torchrun -n 2 examples/no_such.py",
    ]
