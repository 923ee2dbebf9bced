"""The plot of `hfac compare`: validation loss against steps, and the optimizer's memory, side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hfac.cli import outputs
from hfac.cli.optimizers import CHOICES
from hfac.cli.report import best_runs

# Okabe and Ito's colours, distinguishable with any colour vision; line style and marker repeat the distinction.
STYLES = {
    "adamw": ("#000000", "-", "o"),
    "adafactor": ("#E69F00", "--", "s"),
    "hfac": ("#0072B2", "-", "^"),
    "smmf": ("#009E73", "-.", "D"),
    "hfac-int8": ("#CC79A7", ":", "v"),
}


def write_plot(path: Path, runs: list[dict]) -> None:
    """Draw the best run of each optimizer, and faintly the other learning rates tried, to a PNG file.

    Raises ModuleNotFoundError if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    best = best_runs(runs)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    loss_axes, memory_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(loss_axes, runs, best)
    _draw_memory(memory_axes, best)
    figure.suptitle(f"Training the same {_millions(best[0]['parameters'])} byte-level GPT with each optimizer")
    outputs.save_figure(figure, path)


def _draw_losses(axes: Any, runs: list[dict], best: list[dict]) -> None:
    for run in runs:
        if run not in best:
            axes.plot(*_curve(run), color=STYLES[run["optimizer"]][0], linewidth=0.8, alpha=0.3)
    for run in best:
        color, line, marker = STYLES[run["optimizer"]]
        note = "" if run["status"] == "finished" else f" ({run['status']})"
        name = f"{CHOICES[run['optimizer']].title}, lr {run['lr']:.3g}: {run['val_loss']:.3f}{note}"
        axes.plot(*_curve(run), color=color, linestyle=line, marker=marker, markersize=4, label=name)
    # The untrained model's loss is the same for all and so high that it would flatten what differs.
    trained = [point["val_loss"] for run in best for point in run["history"] if point["step"] > 0]
    trained = [loss for loss in trained if math.isfinite(loss)]
    if trained:
        margin = 0.05 * (max(trained) - min(trained)) or 0.1
        axes.set_ylim(min(trained) - margin, max(trained) + margin)
    axes.set(title="Validation loss (lower is better)", xlabel="training steps", ylabel="loss, nats per byte")
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(title="optimizer, learning rate: last loss", frameon=False)


def _draw_memory(axes: Any, best: list[dict]) -> None:
    names = [CHOICES[run["optimizer"]].title.replace(" ", "\n") for run in best]
    sizes = [run["state_bytes_per_parameter"] for run in best]
    bars = axes.barh(names, sizes, color=[STYLES[run["optimizer"]][0] for run in best], height=0.6)
    axes.bar_label(bars, labels=[_compared(run, best) for run in best], padding=4)
    axes.invert_yaxis()  # the first optimizer on top, as in the table
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 4, max(sizes) * 12)  # with room for the labels
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(title="Optimizer state (less is better)", xlabel="bytes per model parameter (logarithmic scale)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _compared(run: dict, best: list[dict]) -> str:
    """Bytes of state per parameter, and how many times less that is than AdamW's."""
    size = run["state_bytes_per_parameter"]
    adamw = next((other["state_bytes_per_parameter"] for other in best if other["optimizer"] == "adamw"), size)
    return f"{size:.3g}" + (f"  ({adamw / size:.0f} times less)" if adamw > 1.5 * size else "")


def _curve(run: dict) -> tuple[list[int], list[float]]:
    return [point["step"] for point in run["history"]], [point["val_loss"] for point in run["history"]]


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g}-million-parameter" if parameters >= 1e5 else f"{parameters:,}-parameter"
