"""Does training in pure bfloat16 stall? The byte-level GPT of `hfac compare` in four precisions.

`python -m bench.bf16` trains it with HFac and SMMF: in float32, and with bfloat16 parameters that are rounded to
nearest, rounded stochastically, or the upper half of a master weight. Same initial weights (rounded), batches and
learning rate, a low one on purpose: where an update is smaller than half the distance between two bfloat16, a weight
that is rounded to nearest stays where it is. It draws docs/bf16.png and prints the table of docs/bf16.md.
"""

import argparse
from pathlib import Path
from typing import Any

from hfac.cli import outputs
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=outputs.folder, default=FOLDER)
    args = parser.parse_args()
    results = {optimizer: {p: train(optimizer, p, args) for p in PRECISIONS} for optimizer in args.only}
    head = f"{args.steps:,} steps at the constant learning rate {args.lr:g}, seed {args.seed}"
    plot(results, args.out / "bf16.png", f"Byte-level GPT of 0.4 million parameters: {head}")
    print(f"\n{head}\n\n{table(results)}")


if __name__ == "__main__":
    main()
