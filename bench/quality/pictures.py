"""The pictures of a study: loss over steps for each task, and the frontier, loss over bytes of optimizer state."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.quality import grid
from bench.quality.contenders import CONTENDERS
from bench.quality.runs import ALL_TASKS
from bench.quality.study import Cell, Study
from bench.quality.tables import Row
from hfac.cli import outputs
from hfac.cli.plot import STYLES as COMPARED

#: as `hfac compare` draws them; those it does not know in between
STYLES = COMPARED | {
    "adamw-0.95": ("#666666", "--", "P"),
    "nadam": ("#999999", "-.", "X"),
    "muon": ("#D55E00", "-", "*"),
    "adam8bit": ("#8B6914", "--", "p"),
    "adam8bit-bnb": ("#8B6914", ":", "h"),
    "smmf-0.9": ("#007A5A", "--", "v"),
    "smmf-0.5": ("#007A5A", ":", "1"),
    "hfac-dense": ("#56B4E9", "--", "<"),
    "hfac-int8-bf16": ("#7A3B69", "-.", ">"),
}
#: the untrained model and the first steps would flatten what differs
SHOWN_FROM = 0.2


def draw(study: Study, rows: list[Row], folder: Path, stem: str) -> list[Path]:
    """Draw all pictures of finished runs as PNG files into the folder, their names beginning with ``stem``, and return
    their paths.

    Raises ModuleNotFoundError if matplotlib is not installed.
    """
    rows = [row for row in rows if math.isfinite(row.get("mean", math.inf))]
    paths = []
    for task, steps in dict.fromkeys((row["task"], row["steps"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["steps"]) == (task, steps)]
        paths.append(folder / f"{stem}-loss-{task}-{steps}.png")
        _losses(study, mine, paths[-1])
    if rows:
        paths.append(folder / f"{stem}-frontier.png")
        _frontier(rows, paths[-1])
    return paths


def _losses(study: Study, rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    task, steps = ALL_TASKS[rows[0]["task"]], rows[0]["steps"]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        color, line, marker = STYLES[row["optimizer"]]
        found = study.found[Cell(row["task"], steps, row["optimizer"])]
        place = grid.nearest(row["lr"])
        histories = [run["history"] for (other, _), run in found.items() if other == place]
        shown = [points for points in zip(*histories, strict=True) if points[0]["step"] >= SHOWN_FROM * steps]
        x = [points[0]["step"] for points in shown]
        losses = [[point["val_loss"] for point in points] for points in shown]
        label = f"{CONTENDERS[row['optimizer']].title}, lr {row['lr']:.3g}: {row['mean']:.4f}"
        mean = [statistics.fmean(values) for values in losses]
        axes.plot(x, mean, color=color, linestyle=line, marker=marker, markersize=4, label=label)
        if len(histories) > 1:
            axes.fill_between(x, [*map(min, losses)], [*map(max, losses)], color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="training steps", ylabel=f"held-out loss, {task.unit}")
    axes.set_title(f"{task.title}, {rows[0]['parameters']:,} parameters: mean and range over seeds")
    axes.grid(alpha=0.3)
    axes.legend(title="optimizer, best learning rate: final loss", frameon=False, fontsize=8)
    outputs.save_figure(figure, path)


def _frontier(rows: list[Row], path: Path) -> None:
    """A panel for each task at its longest number of steps; lower and further left is better.

    The bars are the standard deviations of the differences to AdamW: what all seeds have in common says nothing about
    an optimizer.
    """
    from matplotlib.figure import Figure

    longest = {task: max(row["steps"] for row in rows if row["task"] == task) for task in _tasks(rows)}
    figure = Figure(figsize=(5.6 * len(longest), 5), layout="constrained")
    names: dict[Any, tuple[list[str], list[tuple[float, float]]]] = {}
    for axes, (task, steps) in zip(figure.subplots(1, len(longest), squeeze=False)[0], longest.items(), strict=True):
        mine = [row for row in rows if (row["task"], row["steps"]) == (task, steps)]
        for row in mine:
            color, _, marker = STYLES[row["optimizer"]]
            x, sd = row["state_bytes_per_parameter"], row["against_sd"]
            spread = None if sd is None or math.isnan(sd) else sd / 100 * row["mean"]
            axes.errorbar(x, row["mean"], spread, color=color, marker=marker, markersize=8, capsize=3, linestyle="none")
        _staircase(axes, mine)
        states = [math.log10(row["state_bytes_per_parameter"]) for row in mine]
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(min(states)), 10 ** (max(states) + 0.8))  # with room for the names
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(y=0.1)
        axes.set_title(f"{ALL_TASKS[task].title}, {steps:,} steps", fontsize=10)
        axes.set(xlabel="optimizer state, bytes per parameter", ylabel=f"held-out loss, {ALL_TASKS[task].unit}")
        axes.grid(alpha=0.3)
        places = [(row["state_bytes_per_parameter"], row["mean"]) for row in mine]
        names[axes] = [CONTENDERS[row["optimizer"]].title for row in mine], places
    figure.suptitle("Loss at its memory: lower left is better (bars: sd of the difference to AdamW over seeds)")
    figure.draw_without_rendering()  # from here on it is known where in the picture a point lies
    for axes, (titles, places) in names.items():
        _name(axes, titles, places)
    outputs.save_figure(figure, path)


def _name(axes: Any, names: Sequence[str], places: Sequence[tuple[float, float]]) -> None:
    """Each point's name beside it, from the lowest on; moved up where it would cover another's, or a point."""
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_bounds(across - 8, up - 8, 16, 16) for across, up in axes.transData.transform(places)]
    for name, place in sorted(zip(names, places, strict=True), key=lambda pair: pair[1][1]):
        text = axes.annotate(name, place, xytext=(7, 2), textcoords="offset points", fontsize=7)
        while any(text.get_window_extent().overlaps(other) for other in taken):
            across, up = text.get_position()
            text.set_position((across, up + 1))
        taken.append(text.get_window_extent())


def _staircase(axes: Any, rows: list[Row]) -> None:
    """A line through the optimizers that no other beats in both memory and loss."""
    best: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["state_bytes_per_parameter"], row["mean"])):
        if not best or row["mean"] < best[-1][1]:
            best.append((row["state_bytes_per_parameter"], row["mean"]))
    axes.step(*zip(*best, strict=True), where="post", color="#999999", linewidth=1, linestyle=":", zorder=0)


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))
