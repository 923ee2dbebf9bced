"""Live progress of `hfac compare`: bars where there is a terminal and rich, a line per evaluation elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time

from hfac.cli.training import TrainingRun

#: what a bar with its numbers takes; narrower terminals would cut the numbers
BAR_COLUMNS = 80


class PlainProgress:
    """Prints one line per evaluation: as readable in a log file as on a screen."""

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stdout.flush()

    def start(self, run: TrainingRun) -> None:
        """Announce a run, from wherever it stands."""
        self.began = time.perf_counter()

    def stepped(self, run: TrainingRun) -> None:
        """Nothing: a line per step would be thousands."""

    def evaluated(self, run: TrainingRun) -> None:
        """Print the validation loss just measured."""
        seconds = time.perf_counter() - self.began
        print(
            f"{label(run)}  step {run.step:>6}/{run.settings.steps}  {seconds:7.1f} s  loss: {losses(run)}", flush=True
        )


class RichProgress:
    """One bar per run, the finished ones staying in view."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # so that all of it fits on 80 columns
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[losses]}"),
        )

    def __enter__(self) -> RichProgress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def start(self, run: TrainingRun) -> None:
        """Add the bar of a run, from wherever it stands."""
        total = run.settings.steps
        self.task = self.bars.add_task(label(run), total=total, completed=run.step, losses=losses(run))

    def stepped(self, run: TrainingRun) -> None:
        """Advance the bar of the run by the step just taken."""
        self.bars.update(self.task, completed=run.step, losses=losses(run))

    def evaluated(self, run: TrainingRun) -> None:
        """Show the validation loss just measured."""
        self.bars.update(self.task, losses=losses(run))


def make_progress() -> PlainProgress | RichProgress:
    """Bars if standard output is a terminal wide enough for them and rich is installed, plain lines if not."""
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= BAR_COLUMNS:
        try:
            return RichProgress()
        except ModuleNotFoundError:
            pass
    return PlainProgress()


def label(run: TrainingRun) -> str:
    """The optimizer and learning rate of a run, in columns."""
    return f"{run.name:<9} lr {run.lr:<7.3g}"


def losses(run: TrainingRun) -> str:
    """The losses last seen of a run, in nats per byte."""
    train = "" if math.isnan(run.train_loss) else f"train {run.train_loss:.3f}  "
    return f"{train}validation {run.history[-1]['val_loss']:.4f}" if run.history else train
