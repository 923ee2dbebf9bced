"""`make gpu-report`: all that only a GPU can show, in at most seven minutes with the build; `--quick` in at most three.

    python -m bench.gpu_report                 all parts
    python -m bench.gpu_report --quick         parts 1 to 4, with fewer rounds
    python -m bench.gpu_report --only 5,more   some of them: numbers or names
    python -m bench.gpu_report --dry-run       all parts, tiny, in tests/helpers/rehearsal.py's GPU: does it work?

Every part is one process or several, each in a group of its own that is killed as a whole when its time is over. What a
process has found is in the files before the next one begins; numbers and first steps are there a second after they were
found, so that a report that is killed loses the list it was measuring. A process that fails costs nobody else anything.

The files, three at most, go to --out DIR, else to the folder that the variable OUT names, else to bench/results (a dry
run: bench-out): <gpu>.json with all numbers and raw samples, <gpu>.md, and <gpu>-logs.tar.gz with what every process
printed. Those of --quick have names of their own. What an earlier report found and this one does not look for stays.

Seconds of each process on an H100 (estimates until it has run there) and its limit. What one leaves of its limit, the
later ones may use, each at most twice its own:

    part        what                                                           estimate   limit   --quick
    1 build     versions of everything (the first import of torch)                   15      40        40
                the build, all but the bindings compiled beforehand                  20      55        45
    2 first     one step of each optimizer and backend, beside the reference         10      20        15
    3 parity    tests/backends/test_gpu.py: parity, eight processes                  40      60        40
                graphs and streams                                                   12      25
                more than 2^31 elements                                              10      20
    4 steps     Llama-3-8B and GPT-2 in bfloat16, fused AdamW, a copy                28      45        30
    5 profile   ncu on smmf_tiles, hfac_stats, hfac_update                           20      30
    6 sanitize  the driver without torch; under memcheck; under racecheck      1 + 5 + 10   5+15+20
    7 triton    parity; whole steps                                             20 + 20     30+20
    8 more      ResNet-50, small tensors, float32; options                      25 + 20     20+10
    in all                                                                          256     415       170

When time is short, because the machine is slow or nothing was compiled beforehand (the build then takes about 150 s,
`make gpu-objects` says how to avoid that), the last parts are cut first: 8, then 7, 6, 5. The order is that of worth: a
number of part 4 is worth nothing unless part 3 says that it is right.

Exit status: 0; 1 where something is not correct; 2 where there is no GPU.
"""

import argparse
import datetime
import json
import os
import re
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import gpu_objects, gpu_parts, gpu_process, record
from bench.gpu_parts import DRY, FULL, MEASURED, PARTS, PROFILE, QUICK, VERSIONS, Mode, Step
from bench.report import Row
from hfac.cli import outputs

ROOT = Path(__file__).parent.parent
OK, WRONG, NO_GPU = 0, 1, 2
#: Less time than this is not worth a start.
_LEAST_SECONDS = 4.0
_ENDED_HERE = "not finished: the report ended here"


@dataclass
class Report:
    """What was checked and measured so far, in the files that it is written to."""

    out: Path
    mode: Mode
    folder: Path  # logs, and what the processes write
    machine: str = "gpu"
    checks: dict[str, Row] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)
    promised: float = 0.0  # seconds that the processes so far were allowed

    @property
    def correct(self) -> bool:
        return all(check["result"] != "WRONG" for check in self.checks.values())

    @property
    def path(self) -> Path:
        """The JSON file; the others lie beside it."""
        suffix = "" if self.mode is FULL else f"-{self.mode.name}"
        return self.out / f"{record.slug(self.machine)}{suffix}.json"

    @property
    def archive(self) -> Path:
        return self.path.with_name(f"{self.path.stem}-logs.tar.gz")

    def run(self, step: Step, limit: float, keep: bool = True) -> gpu_process.Ended | None:
        """Runs a process and writes what it found, unless ``keep`` is False; None where it was not run."""
        self.promised += limit
        left = self.begin + min(self.promised, self.mode.whole - 2) - time.monotonic()
        seconds = min(left, 2 * limit)
        why_not = step.missing or ("" if seconds >= _LEAST_SECONDS else "no time was left")
        if not why_not and step.extension and self.checks.get("build", {}).get("result") not in (None, "ok"):
            why_not = "" if self.mode is DRY else "the CUDA kernels were not built"
        if why_not:
            self.note(step, f"not run: {why_not}", 0.0, "")
            self.write()
            print(f"== {step.name}: not run: {why_not}", flush=True)
            return None
        print(f"== {step.name}, at most {seconds:.0f} s: {_shown(step.command)}", flush=True)
        if keep:
            self.note(step, _ENDED_HERE, 0.0, "")
            self.write()
        log, found = self.folder / f"{_file_name(step.name)}.log", self.folder / f"{_file_name(step.name)}.rows"
        found.unlink(missing_ok=True)
        command = [*step.command, "--rows", str(found)] if step.rows else list(step.command)
        taken = 0

        def collect() -> None:
            nonlocal taken
            lines = found.read_text(encoding="utf-8").split("\n")[:-1] if found.exists() else []
            if len(lines) > taken:
                self.add(step.rows, [json.loads(line) for line in lines[taken:]], fresh=taken == 0)
                taken = len(lines)
                if keep:
                    self.write()

        ended = gpu_process.run(command, log, seconds, collect, step.environment)
        collect()
        if step.name == "profile" and (launches := gpu_parts.profiled(self.folder / gpu_parts.PROFILED)):
            self.add(PROFILE, launches, fresh=True)
        output = log.read_text(errors="replace")
        self.failed += re.findall(r"^(?:FAILED|ERROR) (\S+::.+)", output, re.MULTILINE)
        result = "ok" if ended.status == 0 else ended.why or "WRONG"
        if result == "WRONG" and step.wrong is not None and ended.status not in step.wrong:
            result = f"failed: status {ended.status}"
        said = "" if last_line(output) == "KeyboardInterrupt" else last_line(output)
        if ended.why and (tests := _tests_so_far(output)):
            said = tests
            result = "WRONG" if "failed" in tests else result
        self.note(step, result, ended.seconds, said)
        if keep:
            self.write()
        print(f"{output[-1500:]}\n== {step.name}: {result}, {ended.seconds:.1f} s", flush=True)
        return ended

    def add(self, title: str, rows: list[Row], fresh: bool) -> None:
        """Rows of a process; the first of them take the place of what an earlier report has under the title. A rival
        that is measured again beside another backend keeps its first numbers."""
        if title == MEASURED:
            known = {row["key"] for row in self.rows}
            new = [row for row in rows if row["key"] not in known]
            self.rows += [{**row, "number": len(self.rows) + k} for k, row in enumerate(new)]
        else:
            self.tables[title] = [*([] if fresh else self.tables[title]), *rows]

    def note(self, step: Step, result: str, seconds: float, said: str) -> None:
        number = PARTS.index(step.part) + 1
        self.checks[step.name] = {
            "name": f"{number} {step.name}",
            "result": result,
            "seconds": seconds,
            "said": said,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": self.machine,
        }

    def write(self) -> None:
        """Each file is whole at every moment."""
        record.write(self.path, self.rows, list(self.checks.values()), self.tables)
        temporary = self.archive.with_name(self.archive.name + ".tmp")
        with tarfile.open(temporary, "w:gz") as archive:
            for file in sorted(self.folder.iterdir()):
                if file.suffix in (".log", ".csv", ".rows"):
                    archive.add(file, file.name)
        os.replace(temporary, self.archive)

    def take_earlier_logs(self) -> None:
        """Those of an earlier report in the same folder, so that the archive keeps them."""
        if self.archive.exists():
            with tarfile.open(self.archive) as archive:
                for member in archive.getmembers():
                    target = self.folder / Path(member.name).name
                    source = archive.extractfile(member)
                    if source is not None and not target.exists():
                        target.write_bytes(source.read())

    def summary(self) -> str:
        """The whole table, short: a line per process, per number of ours and per launch that was profiled."""
        lines = [f"{'part':<16} {'result':<20} {'s':>5}  what it said last"]
        for check in self.checks.values():
            name, result, said = check["name"], check["result"][:44], check["said"][:100]
            lines.append(f"{name:<16} {result:<20} {check['seconds']:>5.0f}  {said}")
        lines += [f"  {name[:150]}" for name in self.failed[:12]]
        lines += [f"  and {len(self.failed) - 12} more"] if len(self.failed) > 12 else []
        shown = [row for row in self.rows if row["backend"] in ("cuda", "triton", "torch fused")]
        if shown:
            lines.append(f"{'step':<27} {'':<19} {'ms':>8} {'20-80 %':>15}  {'copy of as many bytes':>21}  x AdamW")
        for row in shown:
            copy = row["ms"] * row["copy_share"]
            faster = row["speedup"].get("AdamW, torch fused", {}).get("median")
            lines.append(
                f"{row['shapes'][:16]:<16} {row['dtype']:<10} {row['name']:<6} {row['backend']:<12} {row['ms']:>8.3f} "
                f"{row['ms_q20']:>7.3f}-{row['ms_q80']:<7.3f}  {copy:>8.3f} ms, {row['copy_share']:>6.1%}  "
                + (f"{faster:>6.2f}" if faster else "")
            )
        for row in self.tables.get(PROFILE, []):
            lines.append(" | ".join(str(value) for value in row.values()))
        return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the report and returns its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    mode = DRY if args.dry_run else QUICK if args.quick else FULL
    out = args.out or default_out(mode)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the process under way is ended too
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        return _run(Report(out, mode, Path(folder)), args.only, args.objects)


def _run(report: Report, only: Sequence[str], objects: Path) -> int:
    mode = report.mode
    first = gpu_parts.versions(mode)
    ended = report.run(first, mode.seconds["versions"], keep=False)
    if ended is not None and ended.status == NO_GPU:
        said = report.checks["versions"]["said"]
        print(
            f"gpu-report: {said}. It needs a CUDA device and a torch built with CUDA: check nvidia-smi. --dry-run "
            "shows on the CPU that the script works.",
            file=sys.stderr,
        )
        return NO_GPU
    here = {row["what"]: row["version"] for row in report.tables.get(VERSIONS, [])}
    report.machine = here.get("GPU", report.machine)
    report.checks["versions"]["machine"] = report.machine
    arch = here.get("capability") or os.environ.get("HFAC_CUDA_ARCHS") or "90"
    report.out.mkdir(parents=True, exist_ok=True)
    report.take_earlier_logs()
    report.write()
    steps, compiled = gpu_parts.steps(mode, report.folder, arch, objects)
    for step in steps:
        if step.part in only:
            try:
                report.run(step, mode.limit(step.name, compiled))
            except Exception as error:  # whatever it is: the other parts are to be run
                traceback.print_exc()
                report.note(step, f"failed: {error!r}", 0.0, "")
    print(f"\nWritten: {report.path}, .md and {report.archive.name}, {time.monotonic() - report.begin:.0f} s\n")
    print(report.summary(), flush=True)
    return OK if report.correct else WRONG


def default_out(mode: Mode) -> Path:
    """Where the files go if nothing is said."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return ROOT / ("bench-out" if mode is DRY else "bench/results")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="parts 1 to 4 with fewer rounds, in three minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny, without a GPU: does the script itself work?")
    named = ", ".join(f"{number} {name}" for number, name in enumerate(PARTS, 1))
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="PART[,PART]", help=f"some of: {named}")
    parser.add_argument(
        "--out", type=outputs.folder, metavar="DIR", help="where the files go (default: $OUT, else bench/results)"
    )
    parser.add_argument(
        "--objects", type=Path, default=gpu_objects.FOLDER, metavar="DIR", help="what make gpu-objects compiled"
    )
    return parser


def _parts(text: str) -> tuple[str, ...]:
    names = {**{str(number): name for number, name in enumerate(PARTS, 1)}, **{name: name for name in PARTS}}
    try:
        return tuple(names[part.strip()] for part in text.split(","))
    except KeyError as error:
        raise argparse.ArgumentTypeError(
            f"required are parts of {', '.join(PARTS)}, or their numbers, joined by commas; got {text!r}"
        ) from error


def last_line(text: str) -> str:
    """The last line that says something, without escape sequences and rules."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" =\t\r") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200]


def _tests_so_far(output: str) -> str:
    """How many tests have ended in which way, of pytest's lines; nothing where it is another program's output."""
    found = {way.lower(): len(re.findall(rf"(?:\] | ){way}\b", output)) for way in ("PASSED", "FAILED", "ERROR")}
    return ", ".join(f"{count} {way}" for way, count in found.items() if count)


def _file_name(step: str) -> str:
    return step.replace(" ", "-")


def _shown(command: Sequence[str]) -> str:
    return " ".join(Path(part).name if part.startswith(os.sep) else part for part in command)[:300]


if __name__ == "__main__":
    sys.exit(main())
