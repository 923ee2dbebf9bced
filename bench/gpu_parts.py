"""The parts of `bench.gpu_report`: which processes each consists of, and how long each may take."""

import csv
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import gpu_objects

ROOT = Path(__file__).parent.parent
#: in the order in which they are run; --only takes these names or their numbers, from 1
PARTS = ("build", "first", "parity", "steps", "profile", "sanitize", "triton", "more")
#: title of a table in the report's files
VERSIONS, FIRST, PROFILE, OPTIONS = "Versions", "First steps", "Kernels, profiled", "Options"
#: in the place of a title: rows of `bench.session`, which have tables of their own
MEASURED = "rows"
SANITIZER_FOUND = 9


@dataclass(frozen=True)
class Mode:
    """How much is done: seconds that each process may take, those of the whole, rounds, seconds per contestant and
    list. A process that has no seconds is not among the parts."""

    name: str
    seconds: Mapping[str, int]
    whole: int
    rounds: int
    per_list: float

    def limit(self, step: str, compiled: bool) -> int:
        """``compiled``: beforehand. What is not takes longer, at the cost of the parts that come last."""
        return self.seconds[step] if compiled else max(self.seconds[step], UNCOMPILED.get(step, 0))


FULL = Mode(
    "full",
    {
        "versions": 40,
        "build": 55,
        "first steps": 20,
        "parity": 60,
        "graphs": 25,
        "large": 20,
        "whole steps": 45,
        "profile": 30,
        "driver": 5,
        "memcheck": 15,
        "racecheck": 20,
        "triton parity": 30,
        "triton steps": 20,
        "more steps": 20,
        "options": 10,
    },
    whole=420,
    rounds=20,
    per_list=1.0,
)
QUICK = Mode(
    "quick",
    {"versions": 40, "build": 45, "first steps": 15, "parity": 40, "whole steps": 30},
    whole=180,
    rounds=8,
    per_list=0.4,
)
DRY = Mode("dry-run", dict.fromkeys(FULL.seconds, 240), whole=1800, rounds=2, per_list=0.01)
#: where `make gpu-objects` has not been run, or for other sources
UNCOMPILED = {"build": 150, "driver": 60}


@dataclass(frozen=True)
class Step:
    """One process of a part.

    Attributes:
        part: of `PARTS`.
        name: what the table of results calls it.
        command: with what it is run, from the checkout's root.
        rows: title of the table that its rows go to; it is then given a file for them: --rows FILE.
        missing: why it is not run, or nothing.
        wrong: the exit statuses that mean that something is not correct; None: all but 0.
        extension: whether it is of no use without the CUDA kernels.
        environment: variables besides those that are set.
    """

    part: str
    name: str
    command: Sequence[str]
    rows: str = ""
    missing: str = ""
    wrong: tuple[int, ...] | None = None
    extension: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def python(mode: Mode, module: str, *arguments: str) -> list[str]:
    """The command that runs a module; in a dry run the device "cuda" is pretended."""
    rehearsed = [str(ROOT / "tests/helpers/rehearsal.py")] if mode is DRY else []
    return [sys.executable, *rehearsed, "-m", module, *arguments]


def versions(mode: Mode) -> Step:
    return Step("build", "versions", python(mode, "bench.gpu_versions"), VERSIONS, extension=False)


def steps(mode: Mode, folder: Path, arch: str, objects: Path) -> tuple[list[Step], bool]:
    """All other processes of the mode, in order, and whether everything was compiled beforehand. ``folder``: for what
    tools write; ``arch``: the GPU's capability."""
    try:
        fresh, wanted, driver = (0, 0, gpu_objects.host_driver()) if mode is DRY else gpu_objects.ready(objects, arch)
    except Exception as error:  # whatever it is: there is a GPU here, and all can be compiled
        print(f"gpu-report: nothing that was compiled beforehand is used: {error!r}", file=sys.stderr)
        fresh, wanted, driver = 0, 0, None
    compiled = mode is DRY or (fresh == wanted > 0 and driver is not None)
    ordered = [
        *_build(mode, arch, objects if fresh else None),
        Step("first", "first steps", python(mode, "bench.first_steps"), FIRST),
        *_tests(mode, "parity", "tests/backends/test_gpu.py", ("parity", "graphs", "large")),
        Step("steps", "whole steps", _measure(mode, "first", "cuda"), MEASURED),
        _profile(mode, folder),
        *_sanitize(mode, folder, arch, driver),
        *_tests(mode, "triton", "tests/backends/test_gpu_triton.py", ("triton parity",)),
        Step("triton", "triton steps", _measure(mode, "first", "triton"), MEASURED, extension=False),
        Step("more", "more steps", _measure(mode, "more", "cuda"), MEASURED),
        Step("more", "options", _options(mode, folder), OPTIONS),
    ]
    return [step for step in ordered if step.name in mode.seconds], compiled


def _build(mode: Mode, arch: str, objects: Path | None) -> Iterator[Step]:
    environment = {"HFAC_CUDA": "1", "HFAC_CUDA_ARCHS": arch}
    if objects is not None:
        environment["HFAC_CUDA_OBJECTS"] = str(objects)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    missing = "a dry run has the kernels that make test-emulated built" if mode is DRY else ""
    yield Step("build", "build", command, missing=missing, extension=False, environment=environment)


def _tests(mode: Mode, part: str, file: str, names: Sequence[str]) -> Iterator[Step]:
    for name in names:
        marker = name.split()[-1]
        command = ["-v", "-p", "no:cacheprovider", "--tb=short", "-m", marker, file]  # -v: a line as each test ends
        if mode is DRY:
            command += DRY_TESTS[name]
        elif marker == "parity":
            command += ["-n", "8"]
        yield Step(part, name, python(mode, "pytest", *command), extension=part != "triton")


#: what a dry run takes of each
DRY_TESTS = {
    "parity": ["-k", "checkpoint"],
    "graphs": ["-k", "replayed_graph_equals"],
    "large": ["--collect-only"],
    "triton parity": ["--collect-only"],
}


def _measure(mode: Mode, cases: str, backend: str) -> list[str]:
    if mode is DRY:  # Triton's kernels take no part in a rehearsal
        cases, backend = {"first": "dry", "more": "dry-more"}[cases], {"triton": "reference"}.get(backend, backend)
    settings = ["--rounds", str(mode.rounds), "--seconds", str(mode.per_list)]
    settings += [] if mode is FULL else ["--quick"]
    return python(mode, "bench.gpu_steps", "--cases", cases, "--backends", backend, *settings)


def _options(mode: Mode, folder: Path) -> list[str]:
    settings = ["--device", "cuda", "--rounds", "3" if mode is DRY else "9", "--seconds", str(mode.per_list)]
    settings += ["--out", str(folder)]
    settings += ["--shapes", "24x16", "--dtypes", "bfloat16"] if mode is DRY else []
    return python(mode, "bench.options", *settings)


#: what the profiler collects of each launch: rates, registers, occupancy, why warps wait
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
METRICS = "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread"


def _profile(mode: Mode, folder: Path) -> Step:
    """One run of `bench.one_step`, which opens the profiler's range around one step of SMMF and then one of H-Fac; at
    most 24 launches, of these kernels, with the clocks left as they are."""
    ncu = find("ncu")
    command = [ncu or "ncu", "--csv", "--page", "raw", "--log-file", str(folder / PROFILED)]
    command += ["--clock-control", "none", "--profile-from-start", "off", "--launch-count", "24"]
    command += ["--kernel-name", "regex:smmf_tiles|hfac_stats|hfac_update", "--metrics", METRICS]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += [sys.executable, "-m", "bench.one_step"]
    missing = "" if ncu else "ncu is not on the path"
    if mode is DRY:
        return Step("profile", "profile", python(mode, "bench.one_step", "--tiny"))
    return Step("profile", "profile", command, missing=missing, wrong=())


def _sanitize(mode: Mode, folder: Path, arch: str, driver: Path | None) -> Iterator[Step]:
    """The kernels without torch: its allocators hide what is read past a tensor, and its import takes 40 s under a
    sanitizer. An error of the CUDA API is reported by the driver itself."""
    program = str(driver or folder / "driver")
    target = ["--host", "--float"] if mode is DRY else ["--arch", arch]
    build = [sys.executable, "-m", "bench.device_driver", "--out", program, *target]
    how = "--quick --once --fibers" if mode is DRY else ""  # else every thread of a block is one of the host
    first = '"$@" && ' if driver is None or not driver.exists() else ""
    yield Step("sanitize", "driver", ["sh", "-c", f'{first}exec "$0" {how}', program, *build], extension=False)
    tool = find("compute-sanitizer")
    missing = "" if tool else "compute-sanitizer is not on the path"
    for name, own, options in (
        ("memcheck", ["--report-api-errors", "no"], ["--once"]),
        ("racecheck", [], ["--quick", "--once"]),
    ):
        command = [tool or "compute-sanitizer", "--tool", name, *own, "--error-exitcode", str(SANITIZER_FOUND)]
        command += ["--print-limit", "20", program, *options]
        yield Step("sanitize", name, command, missing=missing, wrong=(SANITIZER_FOUND,), extension=False)


def find(tool: str) -> str | None:
    """A program of the CUDA toolkit, on the path or where the toolkit is."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(places))


PROFILED = "profile.csv"
_STALLED = re.compile(r"average_warps?_issue_stalled_(\w+?)_per_issue_active|issue_stalled_(\w+?)(?:_per_warp_active)")
_SHOWN = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}


def profiled(path: Path) -> list[dict[str, Any]]:
    """Rows of what ncu wrote as raw CSV: one per launch, with the three reasons that warps wait for most."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    begin = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    launches = list(csv.DictReader(lines[begin:]))
    units = launches.pop(0) if launches and not launches[0]["ID"] else {}
    found = []
    for launch in launches:
        kernel = re.search(r"smmf_tiles|hfac_stats\w*|hfac_update\w*", launch["Kernel Name"])
        row = {"kernel": kernel[0] if kernel else launch["Kernel Name"], "grid": launch["Grid Size"]}
        row["block"] = launch["Block Size"]
        for metric, name in _SHOWN.items():
            row[name] = f"{launch.get(metric, '')} {units.get(metric, '').strip('%')}".strip()
        stalls = {}
        for metric, value in launch.items():
            match = _STALLED.search(metric or "")
            if match and _number(value):
                stalls[match[1] or match[2]] = _number(value)
        most = sorted(stalls.items(), key=lambda item: -item[1])[:3]
        row["stalls"] = ", ".join(f"{reason} {value:.2g}" for reason, value in most)
        found.append(row)
    return found


def _number(text: str | None) -> float:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return 0.0
