"""`make gpu-report`: all that only a GPU can show, in one command of at most nine minutes.

Builds the extension for the GPU that is here, runs the tests of the GPU backends, looks for errors of memory and races
with compute-sanitizer, measures whole steps beside their rivals and profiles the main kernels; writes what was checked
and what was measured to bench/results/<gpu>.json and .md. Every part has a time of its own and may fail by itself:
what has been found by then is written.

Exit status: 0; 1 where something is not correct; 2 where there is no GPU.

    python -m bench.gpu_report              nine minutes
    python -m bench.gpu_report --quick      two minutes, written to bench-out/
    python -m bench.gpu_report --dry-run    tiny, on the CPU through the backend of the tests: does this script work?
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import machine, record, session
from bench.machine import ROOT
from bench.report import Row
from hfac import backends
from hfac.cli import outputs

OK, WRONG, NO_GPU = 0, 1, 2

#: lists, types, whether plain torch takes part: (a) to (d) of what the report is for
CASES = (
    ("llama-3-8b", ("bfloat16",), False),
    ("gpt2", ("bfloat16", "float32"), True),
    ("resnet50", ("float32",), True),
    ("2000x 64x64", ("bfloat16", "float32"), True),
)
QUICK_CASES = (("llama-3-8b-4", ("bfloat16",), False), ("gpt2", ("bfloat16",), True))
DRY_CASES = (("2x 24x16 + 7", ("float32", "bfloat16"), True),)
#: a list of less than this share of the memory of the GPU is not cut: parameters, gradients, two states of AdamW
LLAMA = "llama-3-8b"
LLAMA_BYTES = 8.03e9 * 2 * 4 * 1.2


@dataclass(frozen=True)
class Times:
    """Seconds that each part may take; rounds, and seconds per contestant and case, of the measurements."""

    build: int
    parity: int
    sanitizer: int
    bench: int
    options: int
    profile: int
    rounds: int
    seconds: float


FULL = Times(build=150, parity=110, sanitizer=40, bench=120, options=40, profile=35, rounds=20, seconds=1.0)
QUICK = Times(build=60, parity=20, sanitizer=0, bench=35, options=0, profile=0, rounds=8, seconds=0.4)
DRY = Times(build=0, parity=60, sanitizer=0, bench=60, options=0, profile=0, rounds=2, seconds=0.01)


@dataclass
class Report:
    """What was checked and measured so far."""

    out: Path
    device: torch.device
    backends: tuple[str, ...]
    checks: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        return all(check["result"] != "WRONG" for check in self.checks)

    def run(self, name: str, command: Sequence[str], seconds: int, **environment: str) -> bool:
        """Runs a part as a process of its own. Returns whether it ended well."""
        begin = time.monotonic()
        print(f"== {name}: {' '.join(Path(part).name if os.sep in part else part for part in command)}", flush=True)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
            output, ended = done.stdout, done.returncode == 0
            result = "ok" if ended else "WRONG"
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else ""
            ended, result = False, f"cut off after {seconds} s"
        except OSError as error:
            output, ended, result = str(error), False, "could not be started"
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"gpu-report-{name}.log").write_text(output)
        print(output[-3000:], flush=True)
        self.note(name, result, time.monotonic() - begin, last_line(output))
        return ended

    def note(self, name: str, result: str, seconds: float, said: str) -> None:
        self.checks.append(
            {
                "name": name,
                "result": result,
                "seconds": seconds,
                "said": said,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "machine": machine.describe(self.device)["machine"],
            }
        )

    def measure(self, cases: Sequence[tuple[str, tuple[str, ...], bool]], times: Times) -> None:
        """Whole steps, list by list; the parity gate of `bench.session` stands before the numbers."""
        begin = time.monotonic()
        failures: list[str] = []
        left_out = []
        for shapes, dtypes, reference in cases:
            for dtype in dtypes:
                if time.monotonic() - begin > times.bench:
                    left_out.append(f"{shapes} {dtype}")
                    continue
                plan = session.Plan(
                    ops=(),
                    optimizers=("HFac", "SMMF"),
                    shapes=(shapes,),
                    dtypes=(dtype,),
                    backends=self.backends,
                    device=self.device,
                    rounds=times.rounds,
                    seconds=times.seconds,
                    quick=times is not FULL,
                    reference=reference,
                )
                run = session.Session(plan)
                try:
                    run.run()
                except RuntimeError as error:  # a list too large for this GPU must not cost the others
                    failures.append(f"{shapes} {dtype}: {last_line(str(error))}")
                failures += run.failures
                for row in run.rows:
                    self.rows.append({**row, "number": len(self.rows)})
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        said = "; ".join([*failures, *(f"no time was left for {what}" for what in left_out)])
        self.note("measurements", "WRONG" if failures else "ok", time.monotonic() - begin, said)

    def write(self) -> Path:
        path = record.result_path(self.out, machine.describe(self.device)["machine"])
        self.out.mkdir(parents=True, exist_ok=True)
        record.write(path, self.rows, self.checks)
        return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the report and returns its exit status."""
    args = build_parser().parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            f"gpu-report: there is no GPU that torch {torch.__version__} can use here. It needs a CUDA device and a "
            "torch built with CUDA: check nvidia-smi. --dry-run shows on the CPU that the script works.",
            file=sys.stderr,
        )
        return NO_GPU
    if args.dry_run:
        return _dry_run(args.out or ROOT / "bench-out")
    times = QUICK if args.quick else FULL
    device = torch.device("cuda")
    report = Report(args.out or ROOT / ("bench-out" if args.quick else "bench/results"), device, ())
    python = sys.executable
    if args.built is None:
        return _build(report, times)
    report.note("build", "ok", args.built, "")
    report.backends = tuple(name for name in backends.available(device) if name != "reference")
    marked = ["-q", "-x", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    report.run("parity", [python, "-m", "pytest", *marked], times.parity)
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if times.sanitizer else ():
        if sanitizer is None:
            report.note(tool, "not run", 0, "compute-sanitizer is not on the path")
            continue
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            python,
            "-m",
            "pytest",
            *marked,
            "-k",
            "sanitized",
        ]
        report.run(tool, command, times.sanitizer, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    free = torch.cuda.get_device_properties(device).total_memory
    cases = QUICK_CASES if args.quick else CASES
    cases = tuple((f"{LLAMA}-4" if name == LLAMA and free < LLAMA_BYTES else name, *rest) for name, *rest in cases)
    report.measure(cases, times)
    if times.options:
        command = [python, "-m", "bench.options", "--device", "cuda", "--rounds", "9", "--out", str(report.out)]
        report.run("options", command, times.options)
    profiler = shutil.which("ncu")
    if times.profile and profiler is None:
        report.note("profile", "not run", 0, "ncu is not on the path")
    elif times.profile:
        metrics = (
            "gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread"
        )
        command = [profiler, "--csv", "--metrics", metrics, "--kernel-name", "regex:hfac|smmf", "--launch-count", "24"]
        report.run("profile", [*command, python, "-m", "bench.one_step"], times.profile)
    print(f"Written: {report.write()}")
    return OK if report.correct else WRONG


def _build(report: Report, times: Times) -> int:
    """Builds the extension, then starts anew: this process has imported what was there before."""
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if not report.run("build", command, times.build, HFAC_CUDA="1", HFAC_CUDA_ARCHS=capability):
        print(f"Written: {report.write()}")
        return WRONG
    sys.stdout.flush()
    again = [sys.executable, "-m", "bench.gpu_report", *sys.argv[1:], "--built", str(report.checks[0]["seconds"])]
    return subprocess.run(again, cwd=ROOT, check=False).returncode


def _dry_run(out: Path) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated

    if emulated.native is None:
        print(f"gpu-report --dry-run: {emulated.WHY_NOT}", file=sys.stderr)
        return WRONG
    report = Report(out, torch.device("cpu"), (emulated.NAME,))
    report.run("one-step", [sys.executable, "-m", "bench.one_step", "--device", "cpu"], DRY.parity)
    with emulated.registered():
        report.measure(DRY_CASES, DRY)
    print(f"Written: {report.write()}")
    return OK if report.correct else WRONG


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes instead of nine; written to bench-out/")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: does the script itself work?")
    parser.add_argument("--built", type=float, metavar="SECONDS", help=argparse.SUPPRESS)  # the build is done
    parser.add_argument("--out", type=outputs.folder, metavar="DIR", help="where the files go (default: bench/results)")
    return parser


def last_line(text: str) -> str:
    """The last line that says something, without escape sequences."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200]


if __name__ == "__main__":
    sys.exit(main())
