"""Says how far a study is: a line for each run that ends, one a minute for those under way, and the time left."""

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.quality.runs import Spec
    from bench.quality.study import Cell, Study


class Progress:
    """Lines about a study, as readable in a log file as on a screen.

    The time left is that of the runs known to be needed: a sweep whose best is at its edge adds to it.
    """

    pause = 60.0

    def __init__(self, study: "Study", jobs: int, say: Callable[[str], None]) -> None:
        self.study, self.jobs, self.say = study, jobs, say
        self.active: dict[str, tuple[Cell, Spec, float]] = {}
        self.steps: dict[str, int] = {}

    def began(self, cell: "Cell", spec: "Spec") -> None:
        """A run has been started."""
        self.active[spec.name] = cell, spec, time.monotonic()
        self.steps[spec.name] = 0

    def reached(self, spec: "Spec", step: int) -> None:
        """A run has made so many steps."""
        self.steps[spec.name] = step

    def ended(self, cell: "Cell", spec: "Spec", run: dict[str, Any]) -> None:
        """A run is finished and in its study."""
        del self.active[spec.name]
        loss = self.study.losses(cell)[next(key for key, other in self.study.found[cell].items() if other is run)]
        said = "diverged" if math.isinf(loss) else f"loss {loss:.4f}"
        self.say(f"[{self._status()}] {_named(spec)}: {said} ({run['seconds']:.0f} s)")

    def failed(self, cell: "Cell", spec: "Spec", why: str) -> None:
        """A run could not be trained."""
        del self.active[spec.name]
        self.say(f"[{self._status()}] {_named(spec)}: FAILED, {why}")

    def tick(self) -> None:
        """Nothing has ended for a while."""
        under_way = (f"{_named(spec)} step {self.steps[name]}" for name, (_, spec, _) in self.active.items())
        self.say(f"[{self._status()}] under way: {'; '.join(under_way)}")

    def _status(self) -> str:
        finished = sum(map(len, self.study.found.values()))
        left = self.study.left()
        seconds = self._seconds(left)
        said = "" if seconds is None else f", about {duration(seconds)} left"
        return f"{finished} of at least {finished + sum(left.values())} runs{said}"

    def _seconds(self, left: "dict[Cell, int]") -> float | None:
        """Until the runs that are left have been trained; None as long as nothing has been."""
        per_step: dict[str, list[float]] = {}
        for cell, runs in self.study.found.items():
            for run in runs.values():
                if run["steps_made"]:
                    per_step.setdefault(cell.task, []).append(run["seconds"] / run["steps_made"])
        if not per_step:
            return None
        overall = statistics.fmean(statistics.median(times) for times in per_step.values())
        total = 0.0
        for cell, count in left.items():
            # An optimizer's own time is the best guess, that of its task the next.
            times = [run["seconds"] / run["steps_made"] for run in self.study.found[cell].values() if run["steps_made"]]
            times = times or per_step.get(cell.task, [overall])
            total += count * cell.steps * statistics.median(times)
        begun = sum(time.monotonic() - since for _, _, since in self.active.values())
        return max(0.0, total - begun) / self.jobs


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds where there is less than one of these."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _named(spec: "Spec") -> str:
    return f"{spec.task} {spec.steps} {spec.optimizer} lr {spec.lr:g} seed {spec.seed}"
