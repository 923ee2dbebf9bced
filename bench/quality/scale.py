"""The scale-up mode: a larger GPT on one GPU, in bfloat16 arithmetic with float32 weights, within a few minutes.

Every optimizer runs once, at its advised rate, for as many steps as all of them together can make in the time: nothing
is swept, so a difference may be the rate's.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from bench.quality.contenders import CONTENDERS
from bench.quality.runs import Spec, StudyRun
from bench.quality.study import RUNS, Cell, Plan
from bench.quality.tasks import EVALUATIONS, SCALE

TASK = "scale"
#: those that run where none are named: Adam's state, and what is to replace it
USUAL = ("adamw", "muon", "smmf", "hfac", "hfac-dense", "hfac-int8")
MINUTES = 4.0
#: of the time is planned; the rest is for files, tables and pictures
PLANNED = 0.9
WARM_UP, TIMED = 2, 5


def plan(
    optimizers: Sequence[str], steps: int | None, seconds: float, folder: Path, device: str, tiny: bool
) -> tuple[Plan, float]:
    """The plan, and the seconds that are left for it. Where ``steps`` is None they are those of the folder's earlier
    runs, and without any as many as fit."""
    begin = time.monotonic()
    steps = steps or _earlier(folder)
    if steps is None:
        trials = [_trial(name, device, tiny) for name in optimizers]
        steps = fitting(trials, PLANNED * seconds - (time.monotonic() - begin))
        print(f"{steps:,} steps fit for each of {len(optimizers)} optimizers.", flush=True)
    cells = tuple(Cell(TASK, steps, name) for name in optimizers)
    found = Plan(cells, seeds=1, first=1, tiny=tiny, device=device, autocast=True, sweep=False)
    return found, seconds - (time.monotonic() - begin)


def fitting(trials: Sequence[tuple[float, float, float]], seconds: float) -> int:
    """How many steps every run can make when all of them share the seconds: at least one for each evaluation.

    ``trials`` have, for each, the seconds of its set-up, of a step, and of an evaluation.
    """
    fixed = sum(setup + (EVALUATIONS + 1) * evaluation for setup, _, evaluation in trials)
    fit = int((seconds - fixed) / sum(step for _, step, _ in trials))
    return max(EVALUATIONS, fit - fit % EVALUATIONS)


def _trial(optimizer: str, device: str, tiny: bool) -> tuple[float, float, float]:
    spec = Spec(TASK, 1000, optimizer, CONTENDERS[optimizer].rate(SCALE), 0, tiny, device, True)
    times = [time.perf_counter()]
    run = StudyRun(spec)
    for count in (WARM_UP, TIMED):
        for _ in range(count):
            run.train_step()
        times.append(time.perf_counter())
    run.evaluate()
    begin, warm, trained, evaluated = *times, time.perf_counter()
    return warm - begin, (trained - warm) / TIMED, evaluated - trained


def _earlier(folder: Path) -> int | None:
    """The steps of the latest run of this mode in a folder, from its name."""
    files = sorted((folder / RUNS).glob(f"{TASK}-*.json"), key=lambda path: path.stat().st_mtime)
    return int(files[-1].name.split("-")[1]) if files else None
