"""Steps on the CPU beside torch's fused AdamW, by list, type and number of threads: ``python -m bench.cpu_table``.

The contestants take turns on the same parameters and gradients, and what has not agreed with the reference is not
timed. A row has medians and least times, and of lists that are limited by memory the share of AdamW's bytes per second.
Other processes disturb a measurement on few cores: a case whose ratios are wide is measured again, the steadiest try is
kept, and with it the share of the machine that others had meanwhile.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine, record, report, shapes, timing
from bench.contestants import Contestant, rival_contestant, step_contestant
from bench.host import OPTIMIZERS
from bench.problem import Problem, unhealthy
from bench.report import Row
from bench.rivals import YARDSTICK
from bench.step_gate import why_red
from hfac.cli import outputs

CPU = torch.device("cpu")
LISTS = (
    *("64x64", "128x128", "256x256", "512x512", "1024x1024", "2048x2048", "4096x4096", "8192x4096"),
    *("200x 1024", "400x 768 + 100x 64x64", "300x 64x64", "16x 1024x1024"),
)
#: the quantiles of 20 and 80 % of steady ratios are no further apart
STEADY = 1.1
#: where a step of AdamW moves more bytes than this, memory limits it
LARGE_BYTES = 2**26
#: of the time of one contestant and case
SECONDS = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the tables; returns 1 where a gate was red, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_table", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", default=LISTS, metavar="LIST", help="parameter lists, as bench takes them")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    add("--rounds", type=int, default=24)
    add("--tries", type=int, default=4, help="of a case whose ratios are wide (default: %(default)s)")
    add("--out", type=outputs.folder, default=machine.ROOT / "bench" / "results", help="folder of the files")
    args = parser.parse_args(argv)
    setting = machine.describe(CPU) | {"threads": " and ".join(map(str, args.threads))}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{record.slug(setting['machine'])}-cpu-table.json"
    rows: list[Row] = []
    reds: list[str] = []
    for dtype in args.dtypes:
        optimizers = dict(green(dtype, reds))
        for threads in args.threads if optimizers else ():
            torch.set_num_threads(threads)
            for shape in args.shapes:
                found = steadiest(shape, getattr(torch, dtype), optimizers, args.rounds, args.tries)
                rows += [{"list": shape, "dtype": dtype, "threads": threads} | row for row in found]
                said = "; ".join(f"{row['optimizer']} {cell(row)}" for row in found)
                print(f"{dtype}, {threads} threads, {shape}: {said}", flush=True)
    for red in reds:
        print(red, file=sys.stderr)
    if rows:
        path.write_text(json.dumps({"setting": setting, "rows": rows, "red": reds}, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(setting, rows, reds), encoding="utf-8")
        print(f"Numbers: {path}\nTables:  {path.with_suffix('.md')}")
    return int(bool(reds))


def green(dtype: str, reds: list[str]) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """The optimizers that agree with the reference; why others do not is added to ``reds``."""
    for name, (kind, options) in OPTIMIZERS.items():
        reason = why_red(kind, options, "cpu", getattr(torch, dtype), CPU)
        if reason is None:
            yield name, (kind, options)
        else:
            reds.append(f"PARITY GATE RED: {name}, {dtype}: {reason}. It gets no numbers.")


def steadiest(
    shape: str, dtype: torch.dtype, optimizers: Mapping[str, tuple[str, dict[str, Any]]], rounds: int, tries: int
) -> list[Row]:
    """Rows of one list: of the try whose ratios to AdamW differ least from round to round."""
    params = Problem(shapes.parse(shape), dtype, CPU).params
    contestants = {"AdamW": rival_contestant(YARDSTICK, params)}
    for name, (kind, options) in optimizers.items():
        contestants[name] = step_contestant(kind, "cpu", params, **options)
    best: list[Row] = []
    for _ in range(tries):
        found = measured(contestants, rounds)
        if not best or spread(found) < spread(best):
            best = found
        if spread(best) <= STEADY:
            break
    return best


def spread(rows: Sequence[Row]) -> float:
    return max(row["ratio_q80"] / row["ratio_q20"] for row in rows)


def measured(contestants: Mapping[str, Contestant], rounds: int) -> list[Row]:
    """A row for each contestant, AdamW's first."""
    before = busy(), time.perf_counter()
    samples = timing.measure({name: one.call for name, one in contestants.items()}, CPU, rounds, SECONDS)
    others = (busy() - before[0]) / (time.perf_counter() - before[1]) / (os.cpu_count() or 1)
    yardstick, rows = samples["AdamW"], []
    moved = contestants["AdamW"].traffic().most
    rate = moved / timing.quantiles(yardstick).median
    for name, one in contestants.items():
        if wrong := unhealthy(one.tensors()):
            raise RuntimeError(f"after {name} {wrong}, and its times would mislead")
        elements = sum(tensor.numel() for tensor in one.tensors() if isinstance(tensor, torch.nn.Parameter))
        took, ratio, traffic = timing.quantiles(samples[name]), timing.speedup(samples[name], yardstick), one.traffic()
        rows.append(
            {
                "optimizer": name,
                "ms": took.median * 1e3,
                "ms_least": min(samples[name].values()) * 1e3,
                "ratio": ratio.median,
                "ratio_q20": ratio.q20,
                "ratio_q80": ratio.q80,
                "ratio_of_least": min(yardstick.values()) / min(samples[name].values()),
                "bytes_per_param": traffic.least / elements,
                "bytes_per_param_reread": traffic.most / elements,
                "large": moved > LARGE_BYTES,
                "share_of_rate": traffic.most / took.median / rate,
                "others": max(0.0, others),
                "ms_samples": [seconds * 1e3 for seconds in samples[name].values()],
            }
        )
    return rows


def busy() -> float:
    """Seconds that other processes and, where this machine is a virtual one, others on it have had of the cores."""
    try:
        first = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return 0.0  # nobody tells
    user, nice, system, _, _, irq, soft, steal = map(int, first)
    mine = os.times()
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


def cell(row: Row) -> str:
    """Of AdamW its time; of others the ratio to it, how it differs, and where memory limits the list the share of its
    bytes per second."""
    if row["optimizer"] == "AdamW":
        return f"{row['ms']:.3g} ms"
    share = f", {100 * row['share_of_rate']:.0f} %" if row["large"] else ""
    return f"{row['ratio']:.2f} [{row['ratio_q20']:.2f}-{row['ratio_q80']:.2f}], {row['ms']:.3g} ms{share}"


def markdown(setting: Row, rows: Sequence[Row], reds: Sequence[str]) -> str:
    """A table for each type and number of threads: lists by optimizers."""
    parts = [
        "# Steps on the CPU beside fused AdamW",
        f"{report.setting(setting)}.",
        "Written by `python -m bench.cpu_table`; all times stand in the JSON file beside it. How many times as fast as "
        "`torch.optim.AdamW(fused=True)` in the same rounds: ratio of the medians [quantiles of 20 and 80 % of the "
        "rounds' ratios], the median, and where memory limits the step the bytes per second, the gradient's second "
        "read among them, as a share of AdamW's. **others** is what other processes had of the machine meanwhile.",
    ]
    tables: dict[tuple[str, int], dict[str, dict[str, Row]]] = {}
    for row in rows:
        of_list = tables.setdefault((row["dtype"], row["threads"]), {}).setdefault(row["list"], {})
        of_list[row["optimizer"]] = row
    for (dtype, threads), lists in tables.items():
        names = list(dict.fromkeys(name for by_name in lists.values() for name in by_name))
        lines = [f"| {dtype}, {threads} thread{'s' * (threads > 1)} | {' | '.join(names)} | others |"]
        lines.append("| --- |" + " ---: |" * (len(names) + 1))
        for shape, by_name in lists.items():
            cells = " | ".join(cell(by_name[name]) for name in names)
            lines.append(f"| {shape} | {cells} | {100 * by_name['AdamW']['others']:.0f} % |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *reds]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
