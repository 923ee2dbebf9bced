"""A study: the finished runs in its folder, one file each, and the training of those that are missing."""

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.quality import grid
from bench.quality.contenders import CONTENDERS
from bench.quality.progress import Progress
from bench.quality.runs import ALL_TASKS, Spec, final_loss, train
from hfac.cli.errors import UsageError
from hfac.cli.report import write_json

RUNS = "runs"


@dataclass(frozen=True)
class Cell:
    """One optimizer on one task for one number of steps: a sweep, then the best rate with all seeds."""

    task: str
    steps: int
    optimizer: str

    @property
    def start(self) -> int:
        """Where its sweep begins."""
        return grid.nearest(CONTENDERS[self.optimizer].rate(ALL_TASKS[self.task]))


@dataclass(frozen=True)
class Plan:
    """What a study is to find out: every cell with ``first`` rates at the least, and its best with ``seeds`` seeds;
    with ``sweep=False`` without extending the first rates."""

    cells: tuple[Cell, ...]
    seeds: int
    first: int = 5
    tiny: bool = False
    device: str = "cpu"
    autocast: bool = False
    sweep: bool = True

    def spec(self, cell: Cell, place: int, seed: int) -> Spec:
        """A cell's run at a place of the grid."""
        lr = grid.rate(place)
        return Spec(cell.task, cell.steps, cell.optimizer, lr, seed, self.tiny, self.device, self.autocast)

    def next(self, cell: Cell, losses: grid.Losses) -> list[tuple[int, int]]:
        """What a cell needs next: places of the grid with seeds."""
        return grid.wanted(losses, cell.start, self.first, self.seeds, self.sweep)


class Study:
    """The runs of a plan in a folder.

    A run is there or it is not: its file is written when it ends, and what was interrupted begins anew.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder / RUNS
        self.folder.mkdir(parents=True, exist_ok=True)
        self.failures: dict[str, str] = {}
        self.found: dict[Cell, dict[tuple[int, int], dict[str, Any]]] = {cell: {} for cell in plan.cells}
        data: dict[str, tuple[str, str]] = {}
        for path in sorted(self.folder.glob("*.json")):
            run = _read(path)
            cell = Cell(run["task"], run["steps"], run["optimizer"])
            if cell not in self.found:
                continue
            place = grid.nearest(run["lr"])
            identity = plan.spec(cell, place, run["seed"]).identity()
            different = [key for key, value in identity.items() if run.get(key) != value]
            task_sha = data.setdefault(cell.task, (run["data"]["sha256"], path.name))
            if task_sha[0] != run["data"]["sha256"]:
                different.append(f"data, from those of {task_sha[1]}")
            if different:
                raise UsageError(
                    f"--out requires a folder whose runs have the settings and data of this study, and {path} differs "
                    f"in {', '.join(different)}; give another folder, or move that file away"
                )
            self.found[cell][place, run["seed"]] = run

    def losses(self, cell: Cell) -> dict[tuple[int, int], float]:
        """Of each finished run of a cell."""
        return {key: final_loss(run["history"]) for key, run in self.found[cell].items()}

    def wanted(self) -> Iterator[tuple[Cell, Spec]]:
        """What can be trained next, in the plan's order."""
        for cell in self.plan.cells:
            for place, seed in self.plan.next(cell, self.losses(cell)):
                spec = self.plan.spec(cell, place, seed)
                if spec.name not in self.failures:
                    yield cell, spec

    @property
    def complete(self) -> bool:
        """Whether nothing is left to train."""
        return not any(True for _ in self.wanted()) and not self.failures

    def left(self) -> dict[Cell, int]:
        """For each cell the number of runs that it needs at the least: a best at the edge of a sweep needs more."""
        left = {}
        for cell in self.plan.cells:
            losses = self.losses(cell)
            runs = self.plan.next(cell, losses)
            later = self.plan.seeds - 1 if any(seed == grid.SWEEP_SEED for _, seed in runs) else 0
            left[cell] = len(runs) + later
        return left

    def add(self, cell: Cell, run: dict[str, Any]) -> None:
        """Takes a finished run into the study; its file is there."""
        self.found[cell][grid.nearest(run["lr"]), run["seed"]] = run

    def file(self, spec: Spec) -> Path:
        return self.folder / f"{spec.name}.json"

    def train(self, jobs: int, seconds: float | None = None, say: Callable[[str], None] = print) -> None:
        """Trains what is missing, ``jobs`` runs at a time, each in a process of its own with one thread; with 0 in this
        process. Begins no run after so many seconds. A run that fails is noted in ``failures`` and the others go on."""
        progress = Progress(self, max(1, jobs), say)
        end = None if seconds is None else time.monotonic() + seconds
        if jobs:
            self._train_beside(jobs, end, progress)
            return
        while (end is None or time.monotonic() < end) and (found := next(self.wanted(), None)):
            cell, spec = found
            progress.began(cell, spec)
            run = train(spec, lambda step, spec=spec: progress.reached(spec, step))
            write_json(self.file(spec), run)
            self.add(cell, run)
            progress.ended(cell, spec, run)

    def _train_beside(self, jobs: int, end: float | None, progress: Progress) -> None:
        """As `train`, with a process and a thread that listens to it for each run."""
        ended: queue.Queue[tuple[Cell, Spec, str]] = queue.Queue()
        active: dict[str, subprocess.Popen[str]] = {}
        try:
            while True:
                open_to_more = end is None or time.monotonic() < end
                free = ((cell, spec) for cell, spec in self.wanted() if spec.name not in active)
                for cell, spec in list(itertools.islice(free, jobs - len(active) if open_to_more else 0)):
                    progress.began(cell, spec)
                    active[spec.name] = self._start(cell, spec, progress, ended)
                if not active:
                    return
                try:
                    cell, spec, error = ended.get(timeout=progress.pause)
                except queue.Empty:
                    progress.tick()
                    continue
                code = active.pop(spec.name).returncode
                if code == 0:
                    run = _read(self.file(spec))
                    self.add(cell, run)
                    progress.ended(cell, spec, run)
                else:
                    self.failures[spec.name] = f"exit status {code}: {error}"
                    progress.failed(cell, spec, self.failures[spec.name])
        finally:
            for process in active.values():
                with suppress(OSError):
                    process.kill()
                process.wait()

    def _start(
        self, cell: Cell, spec: Spec, progress: Progress, ended: "queue.Queue[tuple[Cell, Spec, str]]"
    ) -> subprocess.Popen[str]:
        given = json.dumps({"spec": vars(spec), "file": str(self.file(spec).resolve())})
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.quality.runs", given],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        def listen() -> None:
            assert process.stdout is not None
            said = "without a word"
            with process.stdout:
                for line in map(str.strip, process.stdout):
                    if line.isdecimal():
                        progress.reached(spec, int(line))
                    elif line:
                        said = line  # the last line of a traceback says why
            process.wait()
            ended.put((cell, spec, said))

        threading.Thread(target=listen, daemon=True).start()
        return process


def _read(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        # touched here, so that a file of something else is named
        (run["task"], run["steps"], run["optimizer"], run["seed"], run["data"]["sha256"], run["history"][0]["step"])
        grid.nearest(run["lr"])
        return run
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(
            f"--out requires a folder whose {RUNS}/ holds runs of this command, and {path} is none ({error!r}); "
            "move it away"
        ) from error
