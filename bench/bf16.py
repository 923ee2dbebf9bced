"""Does training in pure bfloat16 stall? The byte-level GPT of `hfac compare` in four precisions.

`python -m bench.bf16` trains it with HFac and SMMF: in float32, and with bfloat16 parameters that are rounded to
nearest, rounded stochastically, or the upper half of a master weight. Same initial weights (rounded), batches and
learning rate, a low one on purpose: where an update is smaller than half the distance between two bfloat16, a weight
that is rounded to nearest stays where it is. It draws docs/bf16.png and prints the table of docs/bf16.md.

`python -m bench.bf16 --cost` times whole steps instead: interleaved, on the same gradients, against those of parameters
that are rounded to nearest.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hfac
from bench import gate, machine, report, shapes, timing
from bench.contestants import OPTIMIZERS as CLASSES
from bench.contestants import ops_of
from bench.problem import LR, WEIGHT_DECAY, Problem
from bench.rivals import RIVALS, YARDSTICK
from hfac import backends
from hfac.cli.corpus import load_corpus
from hfac.cli.optimizers import CHOICES
from hfac.cli.settings import Settings
from hfac.cli.training import TrainingRun

FOLDER = Path(__file__).parent.parent / "docs"
#: name: (settings, colour, line)
PRECISIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "float32": ({}, "#000000", "-"),
    "bfloat16, nearest": (dict(dtype="bfloat16"), "#D55E00", ":"),
    "bfloat16, stochastic": (dict(dtype="bfloat16", rounding="stochastic"), "#0072B2", "--"),
    "bfloat16, master split": (dict(dtype="bfloat16", master="split"), "#009E73", "-."),
}
OPTIMIZERS = ("hfac", "smmf")


def train(optimizer: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(
        steps=args.steps,
        eval_every=max(1, args.steps // 20),
        schedule="constant",
        seed=args.seed,
        **PRECISIONS[precision][0],
    )
    settings.check()
    run = TrainingRun(settings, load_corpus((), settings.max_bytes, settings.context), optimizer, args.lr)
    run.evaluate()
    while not run.finished:
        run.train_step()
        if run.step % settings.eval_interval == 0 or run.step == settings.steps:
            run.evaluate()
    result = run.result("finished")
    print(
        f"{optimizer:5} {precision:24} {result['val_loss']:.4f}  {result['total_ms_per_step']:.0f} ms a step",
        flush=True,
    )
    return result


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = [
        "| | "
        + " | ".join(f"{CHOICES[o].title}, loss | against float32 | state, bytes per parameter" for o in results),
        "| --- |" + " ---: | ---: | ---: |" * len(results),
    ]
    for precision in PRECISIONS:
        cells = []
        for runs in results.values():
            loss, base = runs[precision]["val_loss"], runs["float32"]["val_loss"]
            cells += [f"{loss:.4f}", f"{100 * (loss / base - 1):+.2f} %"]
            cells.append(f"{runs[precision]['state_bytes_per_parameter']:.2f}")
        rows.append(f"| {precision} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(results: dict[str, dict[str, dict[str, Any]]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for axes, (optimizer, runs) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        for precision, (_, colour, line) in PRECISIONS.items():
            history = runs[precision]["history"][1:]  # the untrained model's loss would flatten what differs
            axes.plot(
                [point["step"] for point in history],
                [point["val_loss"] for point in history],
                color=colour,
                linestyle=line,
                linewidth=3 if precision == "float32" else 2,
                alpha=0.4 if precision == "float32" else 1,
                label=f"{precision}: {history[-1]['val_loss']:.3f}",
            )
        axes.set(title=CHOICES[optimizer].title, xlabel="training steps")
        axes.grid(alpha=0.3)
        axes.legend(title="parameters: last validation loss", frameon=False)
    figure.axes[0].set_ylabel("validation loss, nats per byte")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


#: how bfloat16 parameters are stored
STORED: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": dict(rounding="stochastic"),
    "master split": dict(master="split"),
    "master split8": dict(master="split8"),
    "master split8, stochastic": dict(master="split8", rounding="stochastic"),
}
_CPU = torch.device("cpu")


def why_red(name: str, stored: dict[str, Any], backend: str) -> str | None:
    """None if three steps of the backend store what the reference stores, but for one element in a thousand, which the
    order of sums may have rounded otherwise."""
    for op in ops_of(name):
        reason = gate.why_red(op, backend, torch.bfloat16, _CPU)
        if reason is not None:
            return reason
    found = []
    for chosen in (backend, "reference"):
        problem = Problem([(520, 1030), (97,)], torch.bfloat16, _CPU)
        optimizer = getattr(hfac, name)(problem.params, lr=1e-3, backend=chosen, **stored)
        for _ in range(3):
            optimizer.step()
        found.append(optimizer.fp32_state_dict(torch.nn.ParameterList(problem.params)))
    apart = [
        int(((ours - theirs).abs() > 1e-6 * theirs.abs()).sum())
        for ours, theirs in zip(*(weights.values() for weights in found), strict=True)
    ]
    return f"{sum(apart)} weights are stored otherwise" if sum(apart) > 500 else None


def cost(args: argparse.Namespace) -> None:
    """Prints, for each optimizer and list, how many times the time of the plain bfloat16 step another one takes."""
    backend = backends.available(_CPU)[0]
    print(f"{report.setting(machine.describe(_CPU))}, backend {backend}\n")
    print("| | parameters | " + " | ".join([*STORED, "float32", "fused AdamW"]) + " |")
    print("| --- | --- |" + " ---: |" * (len(STORED) + 2))
    for name in CLASSES:
        reds = {how: why_red(name, stored, backend) for how, stored in STORED.items()}
        if any(reds.values()):
            raise SystemExit(f"parity gate red, {name}: {reds}")
        for shape in ("4096x4096", "16x 1024x1024"):
            calls: dict[str, Callable[[], object]] = {}
            for how, options in [*STORED.items(), ("float32", {}), ("fused AdamW", None)]:
                problem = Problem(shapes.parse(shape), torch.float32 if how == "float32" else torch.bfloat16, _CPU)
                if options is None:
                    calls[how] = RIVALS[YARDSTICK](problem.params).step
                else:
                    built = getattr(hfac, name)(problem.params, lr=LR, weight_decay=WEIGHT_DECAY, **options)
                    calls[how] = built.step
            samples = timing.measure(calls, _CPU, args.rounds, 20.0)
            cells = []
            for how in calls:
                ratio = timing.speedup(samples["nearest"], samples[how])
                time = timing.quantiles(samples[how]).median * 1e3
                cells.append(f"{ratio.median:.2f} [{ratio.q20:.2f}-{ratio.q80:.2f}], {time:.1f} ms")
            print(f"| {name} | {shape} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--cost", action="store_true", help="time whole steps instead of training")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of --cost")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.cost:
        return cost(args)
    results = {optimizer: {p: train(optimizer, p, args) for p in PRECISIONS} for optimizer in args.only}
    head = f"{args.steps:,} steps at the constant learning rate {args.lr:g}, seed {args.seed}"
    plot(results, args.out / "bf16.png", f"Byte-level GPT of 0.4 million parameters: {head}")
    print(f"\n{head}\n\n{table(results)}")


if __name__ == "__main__":
    main()
