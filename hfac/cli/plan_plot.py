"""The plot of `hfac plan`: a GPU's memory under each optimizer, one panel per number of GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hfac.cli import outputs
from hfac.cli.footprints import Row
from hfac.cli.memory import human

# Okabe and Ito's colours, distinguishable with any colour vision; hatching repeats the distinction.
PARTS = {
    "weights": ("#999999", ""),
    "gradients": ("#E69F00", ""),
    "optimizer state": ("#0072B2", ""),
    "transient": ("#56B4E9", "////"),
}


def write_plot(path: Path, title: str, worlds: dict[int, list[Row]]) -> None:
    """Draw the rows of each number of ranks as stacked bars to a file of the type that its name ends in.

    Raises ModuleNotFoundError if matplotlib is not installed, OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    across = min(len(worlds), 3)
    down = math.ceil(len(worlds) / across)
    figure = Figure(figsize=(max(8.0, 5.0 * across), 4.2 * down + 0.4), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, (world, rows) in zip(panels, worlds.items(), strict=False):
        _draw(axes, rows)
        where = "one GPU" if world == 1 else f"each of {world:,} GPUs (FSDP2; the fullest)"
        axes.set_title(where if len(worlds) > 1 else f"{title}: memory of {where}, by optimizer")
    for axes in panels[len(worlds) :]:
        axes.remove()
    if len(worlds) > 1:
        figure.suptitle(f"{title}: memory of a GPU by optimizer")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False)
    outputs.save_figure(figure, path)


def _draw(axes: Any, rows: list[Row]) -> None:
    unit, size = ("GB", 1e9) if max(row.total for row in rows) >= 1e9 else ("MB", 1e6)
    names = [row.optimizer.title.replace(", ", ",\n").replace(" (", "\n(") for row in rows]
    left = [0.0] * len(rows)
    for part, (color, hatch) in PARTS.items():
        values = [_bytes(row, part) / size for row in rows]
        axes.barh(
            names, values, left=left, color=color, hatch=hatch, edgecolor="white", linewidth=0, height=0.7, label=part
        )
        left = [start + value for start, value in zip(left, values, strict=True)]
    for i, (row, end) in enumerate(zip(rows, left, strict=True)):
        more = " and more" if row.transient.bytes is None else ""
        label = f"{human(row.total)}{more}\nstate {human(row.state)}"
        axes.annotate(label, (end, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first optimizer on top, as in the table
    axes.set_xlim(0, 1.3 * max(left))  # with room for the labels
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _bytes(row: Row, part: str) -> int:
    if part == "transient":
        return row.transient.bytes or 0
    return {"weights": row.weights, "gradients": row.gradients, "optimizer state": row.state}[part]
