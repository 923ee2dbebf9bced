"""The runs of a comparison, one after the other, with checkpoints between and within them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from hfac.cli.checkpoint import save_checkpoint
from hfac.cli.corpus import Corpus
from hfac.cli.errors import DamagedCheckpoint
from hfac.cli.progress import PlainProgress, RichProgress
from hfac.cli.report import environment
from hfac.cli.settings import Settings
from hfac.cli.training import TrainingRun


class StopRequest:
    """While entered, the first Ctrl-C is noted and waits for the step under way; a second one stops at once.

    A step cut in two would leave some parameters updated and others not: no state to continue from.
    """

    requested = False

    def __enter__(self) -> StopRequest:
        # Not in a job that ignores Ctrl-C, as a shell's background jobs do, and only the main thread may.
        self._installed = (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and threading.current_thread() is threading.main_thread()
        )
        if self._installed:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Comparison:
    """The plan of (optimizer, learning rate) pairs, the results so far, and the run under way."""

    def __init__(self, settings: Settings, corpus: Corpus, save_to: Path | None, save_every: int) -> None:
        self.settings, self.corpus = settings, corpus
        self.save_to, self.save_every = save_to, save_every
        self.plan = settings.plan()
        self.finished: list[dict] = []
        self.current: TrainingRun | None = None
        self._resumed: TrainingRun | None = None

    @property
    def results(self) -> list[dict]:
        """Results of the finished runs, and of the one under way as far as it got."""
        return self.finished + ([self.current.result("interrupted")] if self.current else [])

    @property
    def complete(self) -> bool:
        """Whether all runs of the plan are finished."""
        return len(self.finished) == len(self.plan)

    def resume(self, checkpoint: dict) -> None:
        """Continue from a checkpoint of the same settings and text.

        Raises:
            DamagedCheckpoint: it holds something else than what was saved.
        """
        # The rates of the plan may be defaults, which another version of the package may have changed.
        try:
            plan = [(name, float(lr)) for name, lr in checkpoint["plan"]]
        except (TypeError, ValueError):
            plan = []
        finished = list(checkpoint["finished"])
        factors = len(self.settings.lr_factors)
        if [name for name, _ in plan] != [name for name in self.settings.optimizers for _ in range(factors)]:
            raise DamagedCheckpoint("its plan is not that of its settings")
        wanted = TrainingRun(self.settings, self.corpus, *plan[0]).result("finished").keys()
        if len(finished) > len(plan) or not all(
            isinstance(run, dict) and run.keys() == wanted and run["optimizer"] == name
            for run, (name, _) in zip(finished, plan, strict=False)
        ):
            raise DamagedCheckpoint("its finished runs are not those of its plan")
        if checkpoint["run"] is not None:
            if len(finished) == len(plan):
                raise DamagedCheckpoint("it has a run under way although all are finished")
            self._resumed = TrainingRun(self.settings, self.corpus, *plan[len(finished)])
            self._resumed.load_state_dict(checkpoint["run"])
        self.plan, self.finished = plan, finished

    def train_next(
        self, progress: PlainProgress | RichProgress, stop: StopRequest, attempt: Callable[[Callable], None]
    ) -> None:
        """Train the next run of the plan to its end; raise KeyboardInterrupt between two steps if asked to stop.

        Checkpoints are written through ``attempt``, which decides what becomes of one that cannot be."""
        run, self._resumed = self._resumed, None
        if run is None:
            run = TrainingRun(self.settings, self.corpus, *self.plan[len(self.finished)])
        self.current = run
        progress.start(run)
        if not run.history:
            run.evaluate()
            progress.evaluated(run)
        while not run.finished:
            run.train_step()
            progress.stepped(run)
            if run.step % self.settings.eval_interval == 0 or run.step == self.settings.steps:
                run.evaluate()
                progress.evaluated(run)
            if stop.requested:
                attempt(self.save)
                raise KeyboardInterrupt
            if run.step % self.save_every == 0 and not run.finished:
                attempt(self.save)
        self.finished.append(run.result("finished"))
        self.current = None
        attempt(self.save)

    def save(self) -> None:
        """Write a checkpoint of all that is trained so far, if there is a folder for it."""
        if self.save_to is not None:
            save_checkpoint(
                self.save_to,
                {
                    "settings": self.settings.as_dict(),
                    "text_sha256": self.corpus.sha256,
                    "environment": environment(self.settings.device),
                    "plan": self.plan,
                    "finished": self.finished,
                    "run": self.current.state_dict() if self.current else None,
                },
            )
