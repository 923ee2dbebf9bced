"""What `hfac compare` found: the best run of each optimizer, the table of them, and `compare.json`."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hfac import __version__

HEADERS = (
    "optimizer",
    "lr",
    "steps",
    "val loss",
    "bits/byte",
    "state bytes",
    "bytes/param",
    "optimizer ms/step",
    "total ms/step",
)


def best_runs(runs: list[dict]) -> list[dict]:
    """For each optimizer the run with the lowest validation loss, in the order they were trained.

    An interrupted run counts only if its optimizer has no complete one: with fewer steps it is no fair comparison.
    """
    best: dict[str, dict] = {}
    for run in runs:
        name = run["optimizer"]
        if name not in best or _rank(run) < _rank(best[name]):
            best[name] = run
    return list(best.values())


def _rank(run: dict) -> tuple[bool, float]:
    loss = run["val_loss"]
    return run["status"] == "interrupted", loss if math.isfinite(loss) else math.inf


def print_table(runs: list[dict], total_steps: int) -> None:
    """Print the best run of each optimizer, and all the learning rates where more than one was tried."""
    print_rows("Comparison of optimizers", HEADERS, [_row(run, total_steps) for run in best_runs(runs)])
    for line in learning_rate_lines(runs):
        print(line)


def print_rows(title: str | None, headers: Sequence[str], rows: list[list[str]]) -> None:
    """Print a table, the first column left-aligned: with rich and a title if there is a terminal and rich is installed;
    as lines of one number each if it is wider than the terminal. Numbers are never cut."""
    if sys.stdout.isatty():
        heads = [max(_folded(header).split("\n"), key=len) for header in headers]
        needed = sum(max(map(len, column)) + 2 for column in zip(heads, *rows, strict=True)) - 2
        if needed > shutil.get_terminal_size().columns:
            return _print_lines(title, headers, rows)
        try:
            return _print_rich(title, headers, rows)
        except ModuleNotFoundError:
            pass
    _print_plain(headers, rows)


def learning_rate_lines(runs: list[dict]) -> list[str]:
    """One line per optimizer tried at several learning rates: each rate's loss, the best one starred."""
    lines = []
    for best in best_runs(runs):
        tried = sorted((run for run in runs if run["optimizer"] == best["optimizer"]), key=lambda run: run["lr"])
        if len(tried) > 1:
            losses = (f"{run['lr']:.3g}: {_loss(run)}{'*' if run is best else ''}" for run in tried)
            edge = best in (tried[0], tried[-1])
            note = "  (best at the edge of the range: a wider one may do better)" if edge else ""
            lines.append(f"{best['optimizer']:<9} validation loss by learning rate  {'  '.join(losses)}{note}")
    return lines


def _row(run: dict, total_steps: int) -> list[str]:
    steps = str(run["steps"]) if run["status"] == "finished" else f"{run['steps']}/{total_steps} {run['status']}"
    return [
        run["optimizer"],
        f"{run['lr']:.3g}",
        steps,
        _loss(run),
        f"{run['bits_per_byte']:.4f}",
        f"{run['state_bytes']:,}",
        f"{run['state_bytes_per_parameter']:.4g}",
        f"{run['optimizer_ms_per_step']:.2f}",
        f"{run['total_ms_per_step']:.2f}",
    ]


def _loss(run: dict) -> str:
    """The last validation loss, and its step if training continued after it."""
    measured = run["history"][-1]["step"] if run["history"] else 0
    return f"{run['val_loss']:.4f}" + ("" if measured == run["steps"] else f" at step {measured}")


def _print_rich(title: str | None, headers: Sequence[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, header in enumerate(headers):
        table.add_column(_folded(header), justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _folded(header: str) -> str:
    """A header on two lines, so that all numbers fit on 80 columns."""
    return header.replace(" ", "\n") if " " in header else header.replace("/", "/\n")


def _print_lines(title: str | None, headers: Sequence[str], rows: list[list[str]]) -> None:
    if title:
        print(title)
    width = max(map(len, headers[1:]))
    for row in rows:
        print(row[0])
        for header, cell in zip(headers[1:], row[1:], strict=True):
            print(f"  {header.ljust(width)}  {cell}")


def _print_plain(headers: Sequence[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, ["-" * width for width in widths], *rows):
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]))


def environment(device: str) -> dict:
    """What the times, and the last digits of the losses, depend on besides the settings."""
    cuda = device.startswith("cuda")
    return {
        "hfac": __version__,
        "torch": str(torch.__version__),  # a TorchVersion, which no checkpoint may hold
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
    }


def write_json(path: Path, report: dict) -> None:
    """Write `report` under a temporary name, then rename it; numbers that are not finite become null."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
