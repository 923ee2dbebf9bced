"""How far does a row move that wakes after long idleness? An embedding row has no gradient while its token is absent.

`python -m bench.waking` prints two tables. The first needs no training: a matrix of random gradients, of which one row
is zero for some steps; how far that row then moves, in learning rates. The second trains the byte-level GPT of
`hfac compare` on text in which other bytes appear every so many steps (the same text with the highest bit set, a few
windows at a time), and gives the loss on the usual text and on the rare one. `--out` writes both as JSON, with the
tables in Markdown beside it.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from bench.quality.contenders import CONTENDERS
from bench.quality.tasks import TASKS
from bench.report import plain_table
from hfac.cli.corpus import Corpus, training_batch, validation_batches
from hfac.cli.training import TrainingRun

OPTIMIZERS = ("adamw", "smmf", "hfac", "hfac-dense", "hfac-int8")
IDLE = (0, 10, 100, 1000, 5000)
#: steps with gradients before the row falls asleep, and after it has woken
BEFORE, AFTER = 100, 20
SHAPE = (256, 64)
#: what turns a byte of the text into a rare one
HIGH = 128


class Embedding(torch.nn.Module):
    """One matrix, named as those are that `dense=["*embedding*"]` keeps whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.zeros(SHAPE))


def woken(name: str, idle: int) -> dict[str, Any]:
    """The woken row's first update and the largest of `AFTER`, root mean square, in learning rates; those of the row
    below, which always has gradients, for comparison."""
    generator = torch.Generator().manual_seed(0)
    model = Embedding()
    optimizer = CONTENDERS[name].build(model, 1.0, 0.0, TASKS["gpt"])
    updates = []
    for step in range(BEFORE + idle + AFTER):
        model.embedding.grad = torch.randn(SHAPE, generator=generator)
        if BEFORE <= step < BEFORE + idle:
            model.embedding.grad[0] = 0
        before = model.embedding[:2].detach().clone()
        optimizer.step()
        if step >= BEFORE + idle:
            updates.append((model.embedding[:2].detach() - before).square().mean(1).sqrt().tolist())
    sizes = {"first": updates[0][0], "largest": max(row for row, _ in updates)}
    return {"optimizer": name, "idle steps": idle} | sizes | {"row beside it": max(other for _, other in updates)}


class RareText(TrainingRun):
    """A run of `hfac compare` whose batches hold a window of rare text every so many steps."""

    def __init__(self, name: str, lr: float, steps: int, every: int, seed: int) -> None:
        task = TASKS["gpt"]
        self._every, self._task = every, task
        super().__init__(task.settings(steps, seed), text(task), name, lr)

    def new_optimizer(self) -> Any:
        return CONTENDERS[self.name].build(self.model, self.lr, self.settings.weight_decay, self._task)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = training_batch(self.train_data, self.settings.batch_size, self.settings.context, self.batches)
        if self.step % self._every == self._every - 1:
            rare = torch.zeros(len(inputs), 1, dtype=inputs.dtype)
            rare[: len(inputs) // 4] = HIGH
            return inputs + rare, targets + rare
        return inputs, targets

    @torch.no_grad()
    def loss_on(self, high: int) -> float:
        settings = self.settings
        batches = validation_batches(self.validation_data, settings.batch_size, settings.context, settings.eval_batches)
        losses = [self.model.loss(inputs + high, targets + high).item() for inputs, targets in batches]
        return sum(losses) / len(losses)


def text(task: Any) -> Corpus:
    """The standard library's source without what is no ASCII."""
    corpus = task.load(task.settings(1, 0))
    return dataclasses.replace(corpus, **{name: getattr(corpus, name) % HIGH for name in ("train", "validation")})


def trained(name: str, lr: float, steps: int, every: int, seed: int) -> dict[str, Any]:
    run = RareText(name, lr, steps, every, seed)
    while run.step < steps:
        run.train_step()
    losses = {"usual text": run.loss_on(0), "rare text": run.loss_on(HIGH)}
    return {"optimizer": name, "lr": lr, "rare every": every, "seed": seed} | losses


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.waking", description=__doc__.split("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--idle", type=int, nargs="+", default=IDLE, metavar="STEPS")
    parser.add_argument("--steps", type=int, default=1000, help="of training; 0: none (default: 1000)")
    parser.add_argument(
        "--every", type=int, nargs="+", default=[100, 10**9], metavar="STEPS", help="between rare windows"
    )
    parser.add_argument("--adamw-lr", type=float, default=3e-3, help="the others take their advised multiples of it")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file to write, with the tables beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [woken(name, idle) for name in args.optimizers for idle in args.idle]
    print(first := plain_table(rows), flush=True)
    runs = [
        trained(name, args.adamw_lr * CONTENDERS[name].relative[0], args.steps, every, seed)
        for every in args.every
        for seed in range(args.seeds)
        for name in args.optimizers
        if args.steps
    ]
    print(second := plain_table(runs))
    if args.out:
        args.out.write_text(
            json.dumps(describe(torch.device("cpu")) | {"woken": rows, "trained": runs}, indent=1) + "\n"
        )
        args.out.with_suffix(".md").write_text(f"# {__doc__.splitlines()[0]}\n\n{first}\n\n{second}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
