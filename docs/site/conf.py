"""The site that `make docs` builds: README, the pages of docs/ and the docstrings, as they are.

Sphinx reads the whole checkout, so that pages may link to each other and to files beside docs/. The order of the pages
and their captions are those of the tables in docs/README.md. Docstrings are written to be read in a terminal, with
sections as Google has them: `as_rst` says what these are to Sphinx.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # an installed hfac may be another one

import hfac  # noqa: E402
from hfac.optim.base import FactoredOptimizer  # noqa: E402

project, author = "hfac", "the authors of hfac"
copyright = f"{author}, Apache-2.0"
release = version = hfac.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "bench/results/*.md"]
exclude_patterns = [".*", "build", "dist", "tests", "csrc", "*-out", "docs/site/_*", "**/__pycache__"]

html_theme = "furo"
html_title = f"hfac {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = False

myst_heading_anchors = 4  # named as GitHub names them
suppress_warnings = [
    "toc.not_included",  # results of measurements, which only their pages link to
    "myst.header",  # pages that commands write begin below their titles
]

nitpicky = True
#: what no inventory on this machine says where to find: the standard library's and other packages'
nitpick_ignore_regex = [
    ("py:.*", r"(torch|typing|typing_extensions|collections|matplotlib)\..*"),
    ("py:class", r"Any|Callable|Iterable|Iterator|Literal|Mapping|Sequence|Unpack|TypeVar"),
    ("py:class", r"bool|dict|float|int|list|object|str|tuple|type|BaseException|TracebackType"),
    ("py:class", r"Loss|Optimizer|Params|Scalar|Tensor|device"),
    ("py:exc", r".*Error"),
]
autodoc_default_options = {"member-order": "bysource"}
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
smartquotes = False  # what is quoted is mostly typed
toc_object_entries_show_parents = "hide"

#: by heading, the field of Sphinx that its lines are
FIELDS = {"Args": "param", "Attributes": "param", "Raises": "raises"}
#: in a section, the line that begins what is said of a name
ENTRY = re.compile(r"    (?P<names>\*{0,2}\w+(, \w+)*): (?P<rest>.*)")
#: a bar that is no part of a literal, which would begin a substitution
BAR = re.compile(r"\|(?=(?:[^`]|``[^`]*``|`[^`]*`)*$)")
PAGE = re.compile(r"(docs/[\w-]+)\.md")
API = (Path(__file__).parent / "api.rst").read_text()
REFERENCE = re.compile(r"(?<![`:])`(?P<text>[^`\n]+)`(?!`)")


def sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(heading, indented lines) of each section of a docstring; ("", lines) of what is between them."""
    start = 0
    while start < len(lines):
        end = start + 1
        is_section = re.fullmatch(r"\S.*[^:]:", lines[start]) and end < len(lines) and lines[end].startswith("    ")
        while end < len(lines) and (not is_section or not lines[end] or lines[end].startswith("    ")):
            if not is_section and re.fullmatch(r"\S.*[^:]:", lines[end]) and lines[end + 1 : end + 2] != [""]:
                break
            end += 1
        yield (lines[start][:-1], lines[start + 1 : end]) if is_section else ("", lines[start:end])
        start = end


def entries(lines: list[str], field: str | None) -> Iterator[str]:
    """The entries of a section as fields, or as the points of a list."""
    for line in lines:
        found = ENTRY.fullmatch(line)
        if found is None:
            yield line[6 if field is None else 0 :]
        elif field is None:
            yield f"* **{found['names']}**: {found['rest']}"
        else:
            names = found["names"].replace("*", "\\*")
            names = names.replace(", ", ",") if field == "param" else names  # of two words the first would be a type
            yield f":{field} {names}: {found['rest']}"


def with_blocks(lines: list[str]) -> Iterator[str]:
    """What is indented after an empty line is code."""
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("    ") and not before:
            yield from ("::", "")
        yield line


def as_rst(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Rewrites a docstring, in place, as reStructuredText."""
    made: list[str] = []
    for heading, body in sections(lines):
        if not heading:
            made += with_blocks(body)
        elif heading == "Returns":
            first, *more = body
            made += ["", f":returns: {first.strip()}", *more]
        elif heading in FIELDS:
            made += ["", *entries(body, FIELDS[heading])]
        elif any(map(ENTRY.fullmatch, body)):
            made += ["", f".. rubric:: {heading}", "", *entries(body, None), ""]
        else:
            made += ["", heading + ":", *body]
    lines[:] = [PAGE.sub(r":doc:`\g<0> </\1>`", BAR.sub(r"\\|", REFERENCE.sub(linked, line))) for line in made]


def linked(found: re.Match[str]) -> str:
    """What a docstring has in backticks: a link where it is of this package, which must then be on the site. Modules
    that the site does not describe are named only."""
    text = found["text"]
    path = ROOT / text.replace(".", "/")
    is_module = path.is_dir() or path.with_suffix(".py").is_file()
    if text.startswith("hfac.") and (not is_module or f"automodule:: {text}\n" in API):
        return f":py:obj:`{text}`"
    if any(text in vars(cls) for cls in FactoredOptimizer.__mro__ if cls.__module__.startswith("hfac.")):
        return f":py:obj:`{text} <hfac.optim.base.FactoredOptimizer.{text}>`"
    return f"``{text}``"


def with_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Gives the first page the table of contents, which the tables of docs/README.md are."""
    if page != root_doc:
        return
    text = (ROOT / "docs" / "README.md").read_text()
    trees = {"Reference": [("All pages", "docs/README"), ("API", "docs/site/api")]}
    for part in text.split("\n## ")[1:]:
        found = re.findall(r"^\| \[(.*?)\]\((.*?)\.md\)", part, re.M)
        trees[part.partition("\n")[0]] = [(name, f"docs/{page}") for name, page in found]
    trees["Project"] = [("contributing", "CONTRIBUTING"), ("changelog", "CHANGELOG")]
    for caption, pages in trees.items():
        lines = "\n".join(f"{title} <{page}>" for title, page in pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def for_the_site(app: Sphinx, tree: nodes.document) -> None:
    """Changes what GitHub shows and a site does not: links to folders, which become their names, and mermaid's
    flowcharts, which become rows of boxes."""
    here = Path(tree["source"]).parent
    for link in [node for node in tree.findall(nodes.Element) if node.get("reftype") == "myst"]:
        folder = (here / link["reftarget"]).resolve()
        if folder.is_dir():
            name = nodes.literal("", f"{folder.relative_to(ROOT)}/")
            says_so = link.astext().strip("/") == name.astext().strip("/")
            link.replace_self([name] if says_so else [*link.children, nodes.Text(" ("), name, nodes.Text(")")])
    for block in [node for node in tree.findall(nodes.literal_block) if node.get("language") == "mermaid"]:
        boxes = "".join(f"<li>{text}</li>" for text in re.findall(r'\["(.*?)"\]', block.astext()))
        block.replace_self(nodes.raw("", f'<ol class="flow">{boxes}</ol>', format="html"))


def with_an_index(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("source-read", with_contents)
    app.connect("doctree-read", for_the_site)
    app.connect("build-finished", with_an_index)
