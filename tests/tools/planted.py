"""Plants faults in a copy of this checkout, one after the other, and shows which tests notice.

    python tests/tools/planted.py                 # every fault of faults.py, with the tests named beside it
    python tests/tools/planted.py clip sharded    # those whose area, kind or tests contain one of these words
    python tests/tools/planted.py --all           # with all that `make test` runs
    python tests/tools/planted.py --write         # and put what was found into docs/planted-faults.md

Tests that are left out of `make test` take no part. Before the first fault the same tests must pass without any. The
copy lies in build/planted and is kept, so that the next run compiles less. Exit status 1 where a fault goes unnoticed.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "planted"
#: what --write keeps: one row for each fault of the list, of the last run that planted it
TABLE = ROOT / "docs" / "planted-faults.md"
HEAD = """# Planted faults

This page answers: which mistakes do the tests notice, and which test does?

`make planted` puts each of these into a copy of the checkout, one at a time, and runs the tests that
`tests/tools/faults.py` names for it, without those that `make test` leaves out. `make planted ARGS=--write` writes this
page; [CONTRIBUTING.md](../CONTRIBUTING.md) says when to add a fault.

| fault | in | the first test that fails |
| --- | --- | --- |
"""
#: seconds after which tests hang
LIMIT = 1800
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")


def places(fault: Fault, root: Path = ROOT) -> list[Path]:
    """The files of the fault's area that have its text, each as often as it stands there."""
    found = []
    for path in sorted((root / fault.area).rglob("*")):
        if path.suffix in SOURCES:
            found += [path] * path.read_text(encoding="utf-8").count(fault.old)
    return found


def copy() -> None:
    """Makes the copy what the checkout is, without writing what is the same: compilers go by dates."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    wanted = {name for name in listed if name and (ROOT / name).is_file()}
    for folder in ("hfac", "tests", "csrc", "triton_kernels", "bench"):
        for path in (COPY / folder).rglob("*"):
            if path.is_file() and path.relative_to(COPY).as_posix() not in wanted:
                path.unlink()
    for name in wanted:
        target, contents = COPY / name, (ROOT / name).read_bytes()
        if not target.exists() or target.read_bytes() != contents:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(contents)
    copy_built()


def copy_built() -> None:
    """Both extensions as they are here, without any fault."""
    for built in (*(ROOT / "hfac").glob("*.so"), ROOT / "hfac" / "_build_info.json"):
        shutil.copy2(built, COPY / "hfac" / built.name)


def build(place: Path) -> None:
    """The extensions that the file has part in, for the host."""
    ways = {"_C": {"HFAC_CUDA": "0"}, "_emulated": {"HFAC_EMULATION": "1"}}
    only = {"cpu": "_C", "cuda": "_emulated"}.get(place.parent.name)
    for name in [only] if only else ways:
        for built in (COPY / "hfac").glob(f"{name}.*so"):
            built.unlink()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=COPY, env=os.environ | ways[name], check=True)
        if not list((COPY / "hfac").glob(f"{name}.*so")):
            raise SystemExit("planted: the fault does not compile")


def run(tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status, and the first test that failed or the last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-rfE", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(COPY)}
    try:
        done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return 0, f"nothing in {LIMIT} s"
    if done.returncode < 0:
        return 1, f"pytest ends by {signal.Signals(-done.returncode).name}"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return done.returncode, (failed or lines[-1:])[0]


def named(faults: Sequence[Fault]) -> list[list[str]]:
    """The tests of these faults, those without -k in one call."""
    calls = [shlex.split(fault.tests) for fault in faults]
    files = sorted({file for call in calls if "-k" not in call for file in call})
    return [call for call in ([files] if files else [])] + [
        list(call) for call in dict.fromkeys(tuple(call) for call in calls if "-k" in call)
    ]


def rows() -> dict[str, str]:
    """The rows of the table by fault."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def keep(fault: Fault, said: str) -> None:
    """Puts a fault's row into the table, which has the order of the list and nothing that is no longer in it."""
    found = {f.kind: f"| {f.kind} | `{f.area}/` | not run yet |" for f in FAULTS} | rows()
    found[fault.kind] = f"| {fault.kind} | `{fault.area}/` | {said} |"
    TABLE.write_text(HEAD + "".join(f"{found[f.kind]}\n" for f in FAULTS), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose area, kind or tests contain one of these")
    parser.add_argument("--all", action="store_true", help="run what `make test` runs, not only the tests named")
    parser.add_argument("--write", action="store_true", help=f"write what was found to {TABLE.relative_to(ROOT)}")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without any fault first")
    args = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if not args.words or any(word in f"{f.area} {f.kind} {f.tests}" for word in args.words)]
    chosen.sort(key=lambda fault: fault.area == "csrc")  # what need not be compiled first
    for fault in chosen:
        if len(places(fault)) != 1:
            raise SystemExit(f"planted: {fault.kind}: {fault.old!r} occurs {len(places(fault))} times in {fault.area}/")
    copy()
    if not args.trust:
        for tests in [["-n", "auto"]] if args.all else named(chosen):
            status, said = run(tests)
            if status:
                raise SystemExit(f"planted: without any fault {shlex.join(tests)} fails: {said}")
    unnoticed = 0
    print("| fault | caught by | seconds |\n| --- | --- | ---: |", flush=True)
    for fault in chosen:
        (place,) = places(fault, COPY)
        good = place.read_text(encoding="utf-8")
        place.write_text(good.replace(fault.old, fault.new), encoding="utf-8")
        try:
            if fault.area == "csrc":
                build(place)
            begin = time.monotonic()
            status, said = run(["-n", "auto"] if args.all else shlex.split(fault.tests))
        finally:
            place.write_text(good, encoding="utf-8")
            copy_built()
        noticed = status == 1
        unnoticed += not noticed
        if args.write:
            keep(fault, f"`{said.split('[')[0]}`" if noticed else "none")
        print(
            f"| {fault.kind} | {said if noticed else f'NOTHING: {said}'} | {time.monotonic() - begin:.0f} |", flush=True
        )
    print(f"\n{len(chosen) - unnoticed} of {len(chosen)} faults were noticed.")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
