"""Diagnostics as a person reads them: a table of text, of HTML in a notebook, and a picture."""

import html
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

#: metrics that are fractions of what they count
_FRACTIONS = {"unmoved"}
#: metrics that count
_COUNTS = {"zero_rows", "zero_cols", "skipped"}
#: metrics whose bars and pictures are relative to the largest one of all parameters
_SIZES = {"update_rms", "direction_rms", "clip_factor"}
_EMPTY = (
    "no numbers: no step has been watched, and no parameter has a gradient. Construct the optimizer with watch=True "
    "and ask after step(), or ask between backward() and zero_grad()"
)


class Diagnostics(dict[int | str, dict[str, Tensor]]):
    """What `FactoredOptimizer.diagnostics` returns: by parameter a dict of metrics.

    A dict like any other; a key that it lacks is a KeyError that lists those it has. Printed, it is a table with a row
    for each parameter (of a stack for each slice) and a column for each metric; as the last line of a notebook's cell a
    table with bars; ``plot()`` makes a picture. Each of these reads the values and waits for the device.
    """

    def __missing__(self, key: int | str) -> dict[str, Tensor]:
        raise KeyError(f"{key!r}: {', '.join(map(repr, self)) if self else _EMPTY}")

    def rows(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Of each parameter, of a stack of each slice ("experts.up[3]"), its name and its metrics as numbers."""
        for name, metrics in self.items():
            values = {metric: value.tolist() for metric, value in metrics.items()}
            yield from _slices(str(name), values)

    def columns(self) -> list[str]:
        """The metrics that any parameter has, in order."""
        return list(dict.fromkeys(metric for metrics in self.values() for metric in metrics))

    def __str__(self) -> str:
        if not self:
            return _EMPTY
        columns = self.columns()
        lines = [["parameter", *columns]]
        lines += [[name, *(_shown(metric, found.get(metric)) for metric in columns)] for name, found in self.rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        first, *others = widths
        return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines)

    def _repr_html_(self) -> str:
        """A table whose cells have bars: of fractions their part of 1, of sizes that of the largest in the column."""
        if not self:
            return f"<p>{html.escape(_EMPTY)}</p>"
        columns, rows = self.columns(), list(self.rows())
        largest = {metric: _largest(found.get(metric) for _, found in rows) for metric in columns}

        def cell(metric: str, value: float | None) -> str:
            part = _part(metric, value, largest[metric])
            bar = f"background:linear-gradient(90deg,#4c8bf555 {part:.0%},transparent {part:.0%});" if part else ""
            return f'<td style="text-align:right;padding:0 .5em;{bar}">{_shown(metric, value)}</td>'

        head = "".join(f"<th>{html.escape(metric)}</th>" for metric in columns)
        body = "".join(
            f'<tr><td style="text-align:left">{html.escape(name)}</td>'
            + "".join(cell(metric, found.get(metric)) for metric in columns)
            + "</tr>"
            for name, found in rows
        )
        return (
            f'<table><thead><tr><th style="text-align:left">parameter</th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )

    def plot(self) -> Any:
        """A matplotlib Figure with a row for each parameter: ``update_rms``, ``clip_factor`` and ``unmoved``, as far as
        there are such metrics.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"Diagnostics.plot requires matplotlib, which cannot be imported here ({error}); run: "
                "python -m pip install matplotlib, or print the diagnostics, which needs nothing"
            ) from error
        columns = [metric for metric in ("update_rms", "clip_factor", "unmoved") if metric in self.columns()]
        rows = list(self.rows())
        figure = Figure(figsize=(3 + 3 * len(columns), 1 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots(1, max(1, len(columns)), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, columns, strict=False):
            values = [found.get(metric, math.nan) for _, found in rows]
            axis.barh(range(len(rows)), values)
            axis.set_title(metric)
            if metric in _FRACTIONS:
                axis.set_xlim(0, 1)
            elif (sizes := [value for value in values if value > 0]) and max(sizes) > 30 * min(sizes):
                axis.set_xscale("log")
                axis.set_xlim(min(sizes) / 2, max(sizes) * 2)
            if metric == "clip_factor":
                axis.axvline(1, color="gray", linewidth=0.8)
        axes[0].set_yticks(range(len(rows)), [name for name, _ in rows])
        axes[0].invert_yaxis()  # the first parameter on top
        return figure


def _slices(name: str, values: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    first = next(iter(values.values()), 0)
    if not isinstance(first, list):
        yield name, values
        return
    for index in range(len(first)):
        yield from _slices(f"{name}[{index}]", {metric: value[index] for metric, value in values.items()})


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "nan"
    if metric in _COUNTS:
        return f"{value:.0f}"
    return f"{value:.1%}" if metric in _FRACTIONS else f"{value:.3g}"


def _largest(values: Iterator[float | None]) -> float:
    return max((value for value in values if value is not None and math.isfinite(value)), default=0.0)


def _part(metric: str, value: float | None, largest: float) -> float:
    """Of a cell, how much of it a bar covers."""
    if value is None or not math.isfinite(value):
        return 0.0
    if metric in _FRACTIONS:
        return value
    return value / largest if metric in _SIZES and largest > 0 else 0.0
