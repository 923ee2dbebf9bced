"""An import may only go down: optim -> functional -> ops -> backends -> reference, kernels; no modules import each
other in a circle; and importing needs nothing optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: module (first part below hfac) -> modules of the package it may import
ALLOWED = {
    "__init__": {"_startup", "_version", "convert", "functional", "groups", "optim", "release"},
    "__main__": {"cli"},
    "_startup": set(),
    "_version": set(),
    "groups": {"optim", "types"},
    "matricize": {"types"},
    "schedules": {"staging"},
    "spec": {"schedules"},
    "types": {"schedules"},
    "rounding": {"schedules"},
    "codes": set(),
    "slicing": set(),
    "signs": {"matricize", "slicing"},
    "scratch": {"signs"},
    "clipping": {"backends", "memory", "staging"},
    "memory": set(),
    "reference": {"codes", "matricize", "rounding", "schedules", "signs"},
    "staging": set(),
    "backends": {
        "_C",
        "matricize",
        "memory",
        "reference",
        "rounding",
        "schedules",
        "spec",
        "staging",
        "triton_kernels",
    },
    "ops": {"spec", "backends", "clipping", "memory", "matricize", "rounding", "schedules", "staging"},
    "buckets": {"spec", "ops", "schedules", "scratch", "slicing"},
    "functional": {"buckets", "spec", "ops", "memory", "rounding", "schedules", "scratch", "slicing", "types"},
    "distributed": {
        "buckets",
        "spec",
        "functional",
        "ops",
        "clipping",
        "matricize",
        "rounding",
        "schedules",
        "scratch",
        "staging",
    },
    "optim": {
        "spec",
        "distributed",
        "functional",
        "ops",
        "backends",
        "clipping",
        "codes",
        "matricize",
        "rounding",
        "signs",
        "slicing",
        "types",
        "schedules",
    },
    "convert": {"optim", "codes", "matricize", "reference", "signs", "slicing", "types"},
    "release": {"optim", "distributed", "clipping"},
    "parity": {"spec", "ops", "reference", "rounding", "schedules", "signs"},
    "triton_kernels": {"memory", "spec", "staging"},
    "cli": {"", "_startup", "_version", "backends", "groups", "matricize", "optim", "parity", "signs", "spec"},
}


def name_of(path: Path) -> tuple[str, ...]:
    """The module that a file is, as a dotted name in parts."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("hfac", *parts) if parts[0] == "triton_kernels" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> set[tuple[str, ...]]:
    """Dotted names, in parts, of everything that a file imports: at its top, in functions and under TYPE_CHECKING. What
    it takes from a package or module has the package's or module's name in front."""
    name = name_of(path)
    package = name if path.stem == "__init__" else name[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    """Parts of hfac that a file imports: "ops" for hfac.ops and ..ops, "" for hfac itself."""
    parts = {(name[1] if len(name) > 1 else "") for name in imported(path) if name[0] == "hfac"}
    exported = {"HFac": "optim", "SMMF": "optim", "__version__": "_version"}
    return {exported.get(part, part) for part in parts} - set(name_of(path)[1:2])


FILES = sorted([*(ROOT / "hfac").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = parts[0] if parts[0] != "hfac" else parts[1]
    assert module in ALLOWED, f"{module} has no row in the layering"
    assert imports(path) <= ALLOWED[module]


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules each of which imports, by way of others or not, all of its set."""

    def reached(start: str) -> set[str]:
        found, left = set(), [start]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        return found

    below = {module: reached(module) for module in graph}
    return {
        frozenset(other for other in below[module] if module in below[other])
        for module in graph
        if module in below[module]
    }


def test_no_modules_import_each_other():
    """Of all modules, within packages as well; an import under TYPE_CHECKING or inside a function counts, too."""
    modules = {name_of(path): path for path in FILES}

    def module_of(name: tuple[str, ...]) -> tuple[str, ...]:
        return name if name in modules else name[:-1]

    graph = {
        ".".join(name): {".".join(module) for found in imported(path) if (module := module_of(found)) in modules}
        for name, path in modules.items()
    }
    assert "hfac.functional" in graph["hfac.optim.base"] and "hfac.optim.options" in graph["hfac.optim.smmf"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {frozenset("bc")}
    assert circles(graph) == set()


def test_optim_names_no_backend_module():
    for path in (ROOT / "hfac" / "optim").glob("*.py"):
        assert "reference" not in imports(path)
        assert not [line for line in path.read_text().splitlines() if "backends." in line and "import" in line]


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_import_needs_nothing_optional(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in ('triton', 'matplotlib', 'rich', 'numpy', 'hfac._C'): sys.modules[name] = None\n"
        "import hfac, torch\n"
        "p = torch.nn.Parameter(torch.ones(4, 3)); p.grad = torch.ones(4, 3)\n"
        "for c in (hfac.HFac, hfac.SMMF): c([p]).step()\n"
        "print(p.sum().item())"
    )
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_triton_kernels_is_not_a_top_level_package():
    refused = run_python("import triton_kernels", ROOT)
    assert refused.returncode != 0
    assert "hfac.triton_kernels" in refused.stderr


def test_an_uninstalled_checkout_works(tmp_path):
    done = run_python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hfac.triton_kernels, hfac; hfac.HFac", tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_every_package_is_installed():
    """setup.py names packages one by one; a checkout works without the names, a wheel does not."""
    (named,) = (
        {element.value for element in node.value.elts}
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "packages"
    )
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "hfac").rglob("__init__.py")}
    assert named == {".".join(folder.parts) for folder in folders} | {"hfac.triton_kernels"}
