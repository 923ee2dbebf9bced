"""The Triton kernels by several versions of Triton, each in an environment of its own: `make triton-check`.

Every version compiles every variant for sm_90, and what programs execute is held against its budgets
(bench/triton_check.py); the newest compiles plain steps for the other targets, too. All of it goes to
docs/triton-check.md. What a version found is kept in build/triton-check/ for as long as no source changes, so that a
run that was interrupted goes on where it was.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cuda_check import ROOT

#: The oldest that is claimed, those that come with torch 2.10 and 2.11, and the newest that has been run.
VERSIONS = ("3.3.0", "3.6.0", "3.7.1", "3.9.0")
#: Targets of every version, and of the newest.
TARGETS, MORE = ("sm_90",), ("sm_90", "sm_80", "sm_100", "gfx942")
DOCUMENT = ROOT / "docs" / "triton-check.md"
FOUND = ROOT / "build" / "triton-check"

HEAD = """Written by `make triton-check` with Triton {versions}, each in an environment of its own; no GPU was used and
nothing here was timed. {variants} variants, {complaints} complaints.

Asserted, of every version: on the bulk (contiguous, 16-byte aligned, rows of whole vectors of 8) global accesses of 128
bits and, except for SMMF's sign bytes, none of 8 or 16 bits; no more registers than the plan asks for, 128 of most
kernels; nothing spilled; shared memory within the target's; no fused multiply-adds but those that the source asks for;
roots and quotients rounded as IEEE's but for weights of 16 bits alone, and but for subnormal numbers, which Triton 3.3
takes for 0 there; and the budgets below. smmf_tiles with low bits, kernels that divide gradients or read them one by
one, and watched kernels may spill {spare} bytes per lane. With 16 low bits, elements are laid out as a float32's, which
takes accesses of 64 bits.

Not compiled: for Intel GPUs. Their compiler is in none of PyPI's wheels of Triton and comes with torch's own builds for
them."""
EVERY = """Registers / bytes spilled per lane / bytes of shared memory / 128-bit accesses."""
OTHERS = """As above. On gfx942 (MI300) a wavefront has 64 lanes, and programs have half as many wavefronts as warps
elsewhere, so that a lane still has 8 elements of 16 bits; a lane may have 512 registers there."""
ADDED = """Instructions per element on sm_90 by Triton {newest} beyond those of the same kernel with a plain store, on
the bulk; those of a program's beginning are counted too."""


def environment(version: str) -> Path:
    """The Python of an environment that has this Triton, and all else of the one that runs this."""
    folder = ROOT / f".venv-triton-{version}"
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        venv.create(folder, clear=True, symlinks=True)
        (packages,) = folder.glob("lib/python3*/site-packages")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
        subprocess.run([*install, f"triton=={version}"], check=True)
        (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.touch()
    return python


def sources() -> str:
    """Of the kernels and of what examines them; changes with either."""
    examiners = ("triton_check", "triton_cost", "walk", "sass", "sass_results", "multiprocessor", "cubin")
    paths = [*sorted((ROOT / "triton_kernels").glob("*.py")), *(ROOT / "bench" / f"{name}.py" for name in examiners)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def started(version: str, targets: Sequence[str]) -> tuple[Path, subprocess.Popen[bytes] | None]:
    """Where what a version finds lies, or will once the process has ended."""
    FOUND.mkdir(parents=True, exist_ok=True)
    path = FOUND / f"{version}-{'-'.join(targets)}-{sources()}.json"
    if path.exists():
        return path, None
    command = [environment(version), "-m", "bench.triton_check", *targets, "--json", path]
    mine = os.environ | {"TRITON_CACHE_DIR": str(FOUND / f"cache-{version}")}
    return path, subprocess.Popen(list(map(str, command)), cwd=ROOT, env=mine)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_versions", description=__doc__.splitlines()[0])
    parser.add_argument(
        "versions", nargs="*", help=f"(default: {' '.join(VERSIONS)}, which writes docs/triton-check.md)"
    )
    parser.add_argument("--python", action="store_true", help="only make the environments, and print their Pythons")
    args = parser.parse_args(arguments)
    versions = args.versions or list(VERSIONS)
    if args.python:
        print(*map(environment, versions), sep="\n")
        return 0
    found: dict[str, Any] = {}
    for version in versions:
        path, process = started(version, MORE if version == VERSIONS[-1] else TARGETS)
        if process is not None:
            process.wait()
        if not path.exists():
            print(f"triton {version}: the check ended without a result, by its output above")
            return 1
        found[version] = json.loads(path.read_text())
    if versions == list(VERSIONS):
        DOCUMENT.write_text(document(found))
        print(f"written to {DOCUMENT}")
    count = sum(map(len, map(complaints, found.values())))
    print(f"{count} complaints of triton {', '.join(versions)}")
    return 1 if count else 0


def complaints(found: dict[str, Any]) -> list[str]:
    """All of one version."""
    of_variants = [
        f"{row['kernel']} {row['label']} {target}: {text}"
        for row in found["variants"]
        for target, report in row["targets"].items()
        for text in report["complaints"]
    ]
    return [*found["exceeded"], *of_variants]


def document(found: dict[str, Any]) -> str:
    """The page, of versions in their order."""
    from . import triton_check, triton_cost

    versions, newest = list(found), list(found)[-1]
    of_newest = found[newest]["variants"]
    costs = [row for rows in zip(*(one["costs"] for one in found.values()), strict=True) for row in rows]
    head = HEAD.format(
        versions=", ".join(versions),
        variants=len(of_newest),
        complaints=sum(map(len, map(complaints, found.values()))),
        spare=triton_check.SPARE,
    )
    parts = [
        "# What the Triton kernels compile to",
        head,
        "## What programs execute",
        triton_cost.HEAD,
        "\n".join([
            "| triton | " + " | ".join(triton_cost.COLUMNS) + " |",
            "| --- " * (len(triton_cost.COLUMNS) + 1) + "|",
            *(f"| {versions[k % len(versions)]} {row}" for k, row in enumerate(costs)),
        ]),
        "## Every variant on sm_90",
        EVERY,
        "\n".join(_table(found, versions, "sm_90")),
        f"## Plain steps on other GPUs, by Triton {newest}",
        OTHERS,
        "\n".join(_of_targets(of_newest)),
        "## What storing otherwise adds",
        ADDED.format(newest=newest),
        "\n".join([
            "| kernel | variant | instructions |",
            "| --- | --- | --- |",
            *(f"| {row['kernel']} | {row['label']} | {row['instructions']:.1f} |" for row in found[newest]["added"]),
        ]),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _cell(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    numbers = " / ".join(str(report[name]) for name in ("registers", "spills", "shared", "wide"))
    return numbers + "".join(f" **{text}**" for text in report["complaints"])


def _table(found: dict[str, Any], versions: Sequence[str], target: str) -> list[str]:
    """A row for each variant, a column for each version."""
    lines = ["| kernel | variant | " + " | ".join(versions) + " |", "| --- | --- |" + " --- |" * len(versions)]
    for rows in zip(*(found[version]["variants"] for version in versions), strict=True):
        cells = " | ".join(_cell(row["targets"].get(target)) for row in rows)
        lines.append(f"| {rows[0]['kernel']} | {rows[0]['label']} | {cells} |")
    return lines


def _of_targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each variant that was compiled for them, a column for each target."""
    targets = [name for name in MORE if name not in TARGETS]
    lines = ["| kernel | variant | " + " | ".join(targets) + " |", "| --- | --- |" + " --- |" * len(targets)]
    for row in rows:
        if any(name in row["targets"] for name in targets):
            cells = " | ".join(_cell(row["targets"].get(name)) for name in targets)
            lines.append(f"| {row['kernel']} | {row['label']} | {cells} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
