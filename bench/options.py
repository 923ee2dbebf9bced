"""What an option costs: whole steps with it, against plain ones of the same optimizer in the same run.

`python -m bench.options` measures each optimizer on each list, prints what it found and writes the tables of all that
it has found so far beside the other results. The contestants of one list are interleaved and work on the same
parameters and gradients; what has not agreed with the reference is not timed, and the exit status is then 1.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hfac
from bench import gate, gpu_child, machine, record, report, shapes, timing
from bench.contestants import OPTIMIZERS as CLASSES
from bench.contestants import ops_of
from bench.problem import LR, WEIGHT_DECAY, Problem
from bench.rivals import RIVALS, YARDSTICK
from bench.step_gate import why_red
from hfac import backends
from hfac.cli import outputs

LISTS = ("4096x4096", "16x 1024x1024")
SECONDS = 20.0
#: a norm that no gradient here has, and one that every list has many times over
NEVER, ALWAYS = 1e30, 1e-3
#: what a limit falls by from step to step, so that gradients that were clipped in place are clipped again
FALLS = 0.97

#: how bfloat16 parameters are stored
STORED: dict[str, dict[str, Any]] = {
    "stochastic": dict(rounding="stochastic"),
    "master split": dict(master="split"),
    "master split8": dict(master="split8"),
    "master split8, stochastic": dict(master="split8", rounding="stochastic"),
}
CLIPPED: dict[str, dict[str, Any]] = {
    "max_grad_norm, not reached": dict(max_grad_norm=NEVER),
    "max_grad_norm, clipped": dict(max_grad_norm=ALWAYS),
}
WATCHED: dict[str, dict[str, Any]] = {"watch": dict(watch=True)}
MOMENT: dict[str, dict[str, Any]] = {"first_moment int8": dict(first_moment="int8")}
BY_HAND = "clip_grad_norm_ and step"
AFTERWARDS = "step and diagnostics()"


def options_of(name: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Those that an optimizer with parameters of this type can have."""
    moment = MOMENT if name == "HFac" else {}
    return {**(STORED if dtype == torch.bfloat16 else {}), **CLIPPED, **WATCHED, **moment}


def contestants(
    name: str, shape: str, dtype: torch.dtype, device: torch.device, backend: str, red: Collection[str] = ()
) -> dict[str, Callable[[], object]]:
    """Steps by what they are called; the first is the plain one. Options among ``red`` are left out."""

    def made(**options: Any) -> Any:
        problem = Problem(shapes.parse(shape), dtype, device)
        return getattr(hfac, name)(problem.params, lr=LR, weight_decay=WEIGHT_DECAY, backend=backend, **options)

    def clipped(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        params = optimizer.param_groups[0]["params"]

        def step() -> None:
            nn.utils.clip_grad_norm_(params, NEVER)
            optimizer.step()

        return step

    def looked_at(optimizer: Any) -> Callable[[], object]:
        def step() -> None:
            optimizer.step()
            optimizer.diagnostics()

        return step

    def always_clipped(optimizer: Any) -> Callable[[], object]:
        group = optimizer.param_groups[0]
        group["max_grad_norm"] = nn.utils.get_total_norm([param.grad for param in group["params"]]).item()

        def step() -> None:
            group["max_grad_norm"] *= FALLS
            optimizer.step()

        return step

    calls: dict[str, Callable[[], object]] = {"plain": made().step}
    for how, options in options_of(name, dtype).items():
        if how in red:
            continue
        always = options.get("max_grad_norm") == ALWAYS
        calls[how] = always_clipped(made(**options)) if always else made(**options).step
    calls[BY_HAND] = clipped(made())
    calls[AFTERWARDS] = looked_at(made())
    if dtype == torch.bfloat16:
        problem = Problem(shapes.parse(shape), torch.float32, device)
        calls["float32"] = getattr(hfac, name)(problem.params, lr=LR, weight_decay=WEIGHT_DECAY, backend=backend).step
    calls["fused AdamW"] = RIVALS[YARDSTICK](Problem(shapes.parse(shape), dtype, device).params).step
    return calls


def rows(
    lists: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[list[report.Row]]:
    """For each optimizer and list: how many times the time of the plain step each takes. ``say`` takes what a red gate
    keeps from being measured."""
    backend = backends.available(device)[0]
    short = str(dtype).removeprefix("torch.")
    for name in CLASSES:
        plain = [reason for op in ops_of(name) if (reason := gate.why_red(op, backend, dtype, device))]
        if plain:
            say(f"PARITY GATE RED: {name}, {short}: {plain[0]}. It gets no numbers.")
            continue
        asked = options_of(name, dtype)
        reasons = {how: why_red(name, options, backend, dtype, device) for how, options in asked.items()}
        for how, reason in reasons.items():
            if reason is not None:
                say(f"PARITY GATE RED: {name} with {how}, {short}: {reason}. It gets no numbers.")
        red = {how for how, reason in reasons.items() if reason is not None}
        for shape in lists:
            calls = contestants(name, shape, dtype, device, backend, red)
            samples = timing.measure(calls, device, rounds, seconds)
            found = []
            for how in calls:
                ratio, time = timing.speedup(samples["plain"], samples[how]), timing.quantiles(samples[how])
                found.append(
                    {
                        "dtype": short,
                        "optimizer": name,
                        "shapes": shape,
                        "how": how,
                        "ratio": ratio.median,
                        "ratio_q20": ratio.q20,
                        "ratio_q80": ratio.q80,
                        "ms": time.median * 1e3,
                        "ms_samples": [each * 1e3 for each in samples[how].values()],
                    }
                )
            yield found


def table(found: Sequence[report.Row], dtype: str) -> str:
    """Markdown of the rows of one type: options by optimizer and list, those that are there."""
    columns: dict[str, dict[str, str]] = {}
    for row in found:
        if row["dtype"] == dtype:
            cell = f"{row['ratio']:.2f} [{row['ratio_q20']:.2f}-{row['ratio_q80']:.2f}], {row['ms']:.2f} ms"
            columns.setdefault(row["how"], {})[f"{row['optimizer']}, {row['shapes']}"] = cell
    heads = list(columns["plain"])
    lines = [f"| {dtype} | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    lines += [
        f"| {how} | " + " | ".join(cells.get(head, "") for head in heads) + " |" for how, cells in columns.items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 1 where a gate was red, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="per contestant and list (default: %(default)s)")
    parser.add_argument(
        "--shapes", nargs="+", default=LISTS, metavar="LIST", help="parameter lists, as bench takes them"
    )
    parser.add_argument("--rows", type=Path, help="file to which a line of JSON is added for each number")
    parser.add_argument(
        "--out", type=outputs.folder, default=machine.ROOT / "bench" / "results", help="folder of the table"
    )
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    setting = machine.describe(device)
    head = (
        f"{report.setting(setting)}, backend {backends.available(device)[0]}.\n\nHow many times the time of a plain "
        "step of the same optimizer: ratio of the medians [quantiles of 20 and 80 % of the rounds' ratios], and the "
        "median. Interleaved, on the same parameters and gradients, behind a parity gate: `python -m bench.options`."
    )
    path = args.out / f"{record.slug(setting['machine'])}-options.md"
    reds: list[str] = []
    so_far: list[report.Row] = []

    def say(line: str) -> None:
        reds.append(line)
        print(line, flush=True)

    for dtype in args.dtypes:
        for found in rows(args.shapes, getattr(torch, dtype), device, args.rounds, args.seconds, say):
            so_far += found
            gpu_child.add(args.rows, found)
            for row in found:
                place = f"{dtype}, {row['optimizer']}, {row['shapes']}, {row['how']}"
                print(f"{place}: {row['ratio']:.2f} of a plain step, {row['ms']:.3g} ms", flush=True)
            tables = [table(so_far, done) for done in dict.fromkeys(row["dtype"] for row in so_far)]
            path.write_text("\n\n".join(["# What options cost", head, *tables, *reds]) + "\n")
    print(f"{path.read_text() if so_far else ''}\n{len(so_far)} numbers, {len(reds)} gates red")
    return 1 if reds else 0


if __name__ == "__main__":
    sys.exit(main())
