"""What a study found: for each task and number of steps a row per optimizer, and the tables of them in Markdown."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.quality import grid
from bench.quality.contenders import BASE, CONTENDERS
from bench.quality.runs import ALL_TASKS
from bench.quality.study import Cell, Plan, Study

Row = dict[str, Any]

COLUMNS = {
    "optimizer": "",
    "state": "bytes of optimizer state per parameter, counted",
    "learning rate": f"best of the sweep, a grid of ratio {grid.RATIO:g} for all",
    "of AdamW's": "that rate relative to AdamW's best",
    "loss": "held-out loss, mean of a run's last three evaluations, then mean and standard deviation over seeds",
    "against AdamW": "mean and standard deviation over seeds of the difference to AdamW's run of the same seed",
    "seeds": "seeds at the best rate, of which the first also chose it",
}


def paired(losses: Mapping[int, float], base: Mapping[int, float]) -> tuple[float, float] | None:
    """Mean and standard deviation, in per cent, of the relative differences of two optimizers' losses seed by seed.

    Only seeds that both have count: None without one. The mean is infinite where a run diverged, and the standard
    deviation is NaN there and where there is a single seed.
    """
    both = sorted(losses.keys() & base.keys())
    if not both:
        return None
    return _mean_and_sd([100 * (losses[seed] / base[seed] - 1) for seed in both])


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def rows(study: Study) -> list[Row]:
    """One for each cell that has runs, in the plan's order."""
    return [_row(study, cell) for cell in study.plan.cells if study.found[cell]]


def _at_best(study: Study, cell: Cell) -> tuple[int, dict[int, float]] | None:
    """The best place of the grid, and the losses there by seed."""
    losses = study.losses(cell) if cell in study.found else {}
    place = grid.best(losses)
    if place is None:
        return None
    return place, {seed: loss for (other, seed), loss in sorted(losses.items()) if other == place}


def _row(study: Study, cell: Cell) -> Row:
    found, base = _at_best(study, cell), _at_best(study, Cell(cell.task, cell.steps, BASE))
    losses = study.losses(cell)
    row: Row = {"task": cell.task, "steps": cell.steps, "optimizer": cell.optimizer}
    row["sweep"] = [[grid.rate(p), loss] for (p, seed), loss in sorted(losses.items()) if seed == grid.SWEEP_SEED]
    if found is None:  # runs of other seeds alone
        return row | {"settled": False, "seeds": []}
    place, at_best = found
    mean, sd = _mean_and_sd(list(at_best.values()))
    runs = [run for (other, _), run in study.found[cell].items() if other == place]
    difference = paired(at_best, base[1]) if base and cell.optimizer != BASE else None
    return row | {
        "state_bytes_per_parameter": runs[0]["state_bytes_per_parameter"],
        "parameters": runs[0]["parameters"],
        "lr": grid.rate(place),
        "relative_lr": grid.RATIO ** (place - base[0]) if base else None,
        "settled": grid.settled(losses) and grid.LEAST < place < grid.MOST,
        "seeds": list(at_best),
        "losses": list(at_best.values()),
        "mean": mean,
        "sd": sd,
        "against": difference and difference[0],
        "against_sd": difference and difference[1],
        "seconds": [run["seconds"] for run in runs],
    }


def markdown(study: Study, left_out: Mapping[str, str], setting: Mapping[str, Any]) -> str:
    """All tables, what their columns mean, and what is missing in them."""
    found = rows(study)
    parts = []
    for key in dict.fromkeys((cell.task, cell.steps) for cell in study.plan.cells):
        mine = [row for row in found if (row["task"], row["steps"]) == key and "mean" in row]
        if not mine:
            continue
        task = ALL_TASKS[key[0]]
        parts.append(f"### {task.title[0].upper()}{task.title[1:]}, {key[1]:,} steps\n")
        parts.append(f"{mine[0]['parameters']:,} parameters; losses in {task.unit}.\n")
        parts.append("| " + " | ".join(COLUMNS) + " |\n| --- |" + " ---: |" * (len(COLUMNS) - 1))
        parts += [_line(row, study.plan) for row in mine]
        unsettled = [CONTENDERS[row["optimizer"]].title for row in mine if not row["settled"]]
        if not study.plan.sweep:
            parts.append("\nEach at the rate advised for it; no rate was swept, so a difference may be the rate's.")
        elif unsettled:
            parts.append(f"\nNot settled, the best rate may lie outside those tried: {', '.join(unsettled)}.")
        parts.append("")
    if not parts:
        return "No run is finished yet.\n"
    parts.append("\n".join(f"* {name}: {meaning}." for name, meaning in COLUMNS.items() if meaning) + "\n")
    if left_out:
        parts.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in left_out.items()) + ".\n")
    if study.plan.tiny:
        parts.append("**Tiny models, to try the command: these losses say nothing.**\n")
    versions = f"torch {setting['torch']}, hfac {setting['hfac']} ({(setting['commit'] or 'no commit')[:10]})"
    parts.append(f"{setting['machine']}, {versions}, {setting['date'][:10]}.")
    return "\n".join(parts) + "\n"


def _line(row: Row, plan: Plan) -> str:
    bold = "**" if row["optimizer"].startswith("hfac-int8") else ""
    relative = row["relative_lr"]
    cells = [
        bold + CONTENDERS[row["optimizer"]].title + bold,
        f"{row['state_bytes_per_parameter']:.3g}",
        f"{row['lr']:.3g}" + ("" if row["settled"] or not plan.sweep else " ?"),
        "" if relative is None else f"{relative:.2g}",
        _with_sd(row["mean"], row["sd"], "{:.4f}"),
        "" if row["against"] is None else _with_sd(row["against"], row["against_sd"], "{:+.2f}", " %"),
        str(len(row["seeds"])) + (f" of {plan.seeds}" if len(row["seeds"]) < plan.seeds else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _with_sd(mean: float, sd: float, form: str, unit: str = "") -> str:
    if math.isinf(mean):
        return "diverged"
    return form.format(mean) + ("" if math.isnan(sd) else f" ± {form.format(sd).lstrip('+')}") + unit


def into_page(page: str, stem: str, text: str) -> str:
    """A page with ``text`` between the two marks of ``stem``, in place of what stood there.

    Raises:
        ValueError: the page does not have both marks.
    """
    first, last = (f"<!-- {which} of what bench.quality writes: {stem} -->" for which in ("begin", "end"))
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"required are the lines {first} and {last}; put them where the tables belong")
    return f"{before}{begin}\n\n{text}\n{end}{after}"
