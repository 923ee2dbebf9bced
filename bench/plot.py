"""Two pictures of a run: a roofline, and step times relative to fused AdamW."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import Row

#: Okabe and Ito's colours, told apart with any colour vision; markers and names say the same again.
STYLES = {
    ("HFac", "fused"): ("#0072B2", "^"),
    ("HFac", "reference"): ("#56B4E9", "v"),
    ("SMMF", "fused"): ("#009E73", "D"),
    ("SMMF", "reference"): ("#88CCAA", "d"),
    ("SMMF", "eager torch"): ("#CC79A7", "P"),
    ("AdamW", "fused"): ("#000000", "o"),
    ("AdamW", "torch foreach"): ("#777777", "X"),
    ("AdamW", "torch for-loop"): ("#BBBBBB", "p"),
    ("Adafactor", "torch"): ("#E69F00", "s"),
}
_FUSED = {"cpu", "triton", "cuda", "torch fused"}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draws both pictures of one run's rows to PNG files whose names begin with ``stem``; returns their paths."""
    pictures = []
    for name, figure in (("roofline", _roofline(rows)), ("step-times", _step_times(rows))):
        if figure is not None:
            pictures.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure.savefig(pictures[-1], dpi=130)
    return pictures


def _roofline(rows: Sequence[Row]) -> Figure:
    """Useful bandwidth against bytes per parameter, one panel per type: under a flat roof, the copy, lines of equal
    time rise from left to right. Letters say which list."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    lists = list(dict.fromkeys(row["shapes"] for row in rows))
    # Kernels by themselves are left out where whole steps were measured: the same points twice.
    kind = "step" if any(row["kind"] == "step" for row in rows) else "op"
    figure = Figure(figsize=(6.2 * len(dtypes) + 2.2, 5.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    shown: dict[str, object] = {}
    for axes, dtype in zip(panels, dtypes, strict=True):
        mine = [row for row in rows if row["dtype"] == dtype and row["kind"] == kind]
        for row in mine:
            color, marker = STYLES[_style(row)]
            counts = [(row["bytes_per_param"], row["gb_per_s"])]
            counts.append((row["bytes_per_param_reread"], row["gb_per_s_reread"]))
            # Where they differ, the two counts of one time lie on one line of equal time.
            x, y = zip(*dict.fromkeys(counts), strict=True)
            drawn = axes.plot(x, y, color=color, marker=marker, markersize=7, linewidth=1.5, alpha=0.9)
            shown.setdefault(_label(row), drawn[0])
            letter = _LETTERS[lists.index(row["shapes"])]
            axes.annotate(letter, (x[-1], y[-1]), xytext=(5, 3), textcoords="offset points", fontsize=7)
        copies = [row["copy_gb_per_s"] for row in mine]
        roof = axes.axhspan(min(copies), max(copies), color="#D55E00", alpha=0.25, linewidth=0)
        line = axes.axhline(sorted(copies)[len(copies) // 2], color="#D55E00", linewidth=2)
        shown.setdefault("a plain copy: median (line) and range", (roof, line))
        axes.set(yscale="log", title=f"{dtype} parameters", xlabel="bytes per parameter that a step must move")
        _equal_times(axes)
        axes.grid(alpha=0.25, which="major")
    panels[0].set_ylabel("useful bandwidth, GB/s")
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", frameon=False)
    what = "whole optimizer steps" if kind == "step" else "kernel calls"
    key = ", ".join(f"{letter}: {name}" for letter, name in zip(_LETTERS, lists, strict=False))
    figure.suptitle(
        f"{rows[0]['machine']}, {rows[0]['threads']} threads: {what} against a copy of memory\n"
        f"{key}; lists that fit the caches can lie above the copy",
        fontsize=10,
    )
    return figure


def _equal_times(axes: Axes) -> None:
    """Lines of equal time per parameter, within the limits that the points have set."""
    x, y = axes.get_xlim(), axes.get_ylim()
    along = [x[0] + (x[1] - x[0]) * i / 60 for i in range(61)]
    for exponent in range(-4, 6):
        time = 10.0**exponent  # nanoseconds per parameter = bytes per parameter / (GB/s)
        axes.plot(along, [place / time for place in along], color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        if y[0] < along[1] / time < y[1]:
            axes.text(along[1], along[1] / time, f"{time:g} ns/param", fontsize=7, color="#666666", va="bottom")
    axes.set(xlim=x, ylim=y)


def _step_times(rows: Sequence[Row]) -> Figure | None:
    """Bars of the step's time as a multiple of fused AdamW's, a panel per list and type; None without whole steps."""
    steps = [row for row in rows if row["kind"] == "step" and _relative(row) is not None]
    if not steps:
        return None
    lists = list(dict.fromkeys(row["shapes"] for row in steps))
    dtypes = list(dict.fromkeys(row["dtype"] for row in steps))
    bars = len(dict.fromkeys((row["name"], row["backend"]) for row in steps))
    figure = Figure(figsize=(5.4 * len(dtypes) + 1.5, (0.26 * bars + 0.7) * len(lists) + 0.9), layout="constrained")
    panels = figure.subplots(len(lists), len(dtypes), squeeze=False, sharex=True)
    times = [_relative(row) for row in steps]
    for i, shapes in enumerate(lists):
        for j, dtype in enumerate(dtypes):
            axes = panels[i][j]
            mine = [row for row in steps if row["shapes"] == shapes and row["dtype"] == dtype]
            relative = [_relative(row) for row in mine]
            spread = [_spread(row) for row in mine]
            drawn = axes.barh(
                [_label(row) for row in mine],
                relative,
                color=[STYLES[_style(row)][0] for row in mine],
                xerr=list(zip(*spread, strict=True)) if mine else None,
                error_kw=dict(ecolor="#555555", capsize=2, linewidth=1),
                height=0.72,
            )
            axes.bar_label(drawn, labels=[f"{time:.2f}" for time in relative], padding=4, fontsize=7)
            axes.axvline(1, color="black", linewidth=1)
            axes.invert_yaxis()
            axes.set(xscale="log", xlim=(min(times) / 2, max(times) * 4))
            axes.set_title(f"{shapes}, {dtype}", fontsize=9, loc="left")
            axes.tick_params(labelsize=8)
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
    for axes in panels[-1]:
        axes.set_xlabel("time of a step / time of torch AdamW(fused=True): less is better", fontsize=8)
    figure.suptitle(
        f"{steps[0]['machine']}, {steps[0]['threads']} threads: step times, medians, with 20 to 80 % of the rounds",
        fontsize=10,
    )
    return figure


def _relative(row: Row) -> float | None:
    """Time relative to fused AdamW's; 1 for itself, None where it was not measured."""
    if _is_yardstick(row):
        return 1.0
    ratio = row["speedup"].get("AdamW, torch fused")
    return None if ratio is None else 1 / ratio["median"]


def _spread(row: Row) -> tuple[float, float]:
    """Lengths of the error bar below and above the median; rounds may all lie on one side of the ratio of medians."""
    if _is_yardstick(row):
        return 0.0, 0.0
    ratio, median = row["speedup"]["AdamW, torch fused"], _relative(row)
    return max(0.0, median - 1 / ratio["q80"]), max(0.0, 1 / ratio["q20"] - median)


def _is_yardstick(row: Row) -> bool:
    return (row["name"], row["backend"]) == ("AdamW", "torch fused")


def _style(row: Row) -> tuple[str, str]:
    name = {"hfac": "HFac", "smmf": "SMMF"}.get(row["name"].split("_")[0], row["name"])
    return name, "fused" if row["backend"] in _FUSED else row["backend"]


def _label(row: Row) -> str:
    return f"{row['name']}, {row['backend']}"
