"""One step of each optimizer by each backend, beside the same step of the reference: `python -m bench.first_steps`.

What fails is reported and does not hide what comes after it, not even where it leaves the device in a state of error.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hfac
from bench import gpu_child
from bench.contestants import OPTIMIZERS
from bench.problem import Problem
from hfac import backends

SHAPES = [(300, 2100), (24, 18), (64, 3, 7, 7), (1024,), (7,), ()]
LR = 1e-2
#: of the largest change of a weight: what the order of sums may leave between two backends in float32
APART = 1e-3


def step(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """What one step did; raises where it did something else than the reference on the CPU."""
    problem, twin = Problem(SHAPES, dtype, torch.device("cpu")), Problem(SHAPES, dtype, torch.device("cpu"))
    before = [param.detach().clone() for param in problem.params]
    ours = [torch.nn.Parameter(param.detach().to(device)) for param in problem.params]
    for mine, param in zip(ours, problem.params, strict=True):
        mine.grad = param.grad.to(device)
    getattr(hfac, name)(ours, lr=LR, weight_decay=0.1, backend=backend).step()
    getattr(hfac, name)(twin.params, lr=LR, weight_decay=0.1, backend="reference").step()
    worst = 0.0
    for mine, theirs, old in zip(ours, twin.params, before, strict=True):
        new, wanted = mine.detach().cpu().double(), theirs.detach().double()
        change = (wanted - old.double()).abs().max()
        error = ((new - wanted).abs() - torch.finfo(dtype).eps * wanted.abs()).clamp(min=0).max()
        worst = max(worst, float(error / change))
        if not error <= APART * change:
            raise AssertionError(
                f"shape {tuple(old.shape)} is off by {error:.3g}, where weights change by {change:.3g}"
            )
    return f"ok, at most {worst:.1g} of a change from the reference"


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the steps; the exit status is 1 where one of them was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_steps", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--rows", type=Path, help="file to which a line of JSON is added for each step")
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)  # the case to go on with
    parser.add_argument("--wrong", type=int, default=0, help=argparse.SUPPRESS)  # of those before
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    here = [backend for backend in backends.available(device) if backend != "reference"]
    cases = [(*case, dtype) for case in _pairs(here) for dtype in (torch.float32, torch.bfloat16)]
    wrong = args.wrong
    for number, (name, backend, dtype) in enumerate(cases[args.begin :], args.begin):
        try:
            said = step(name, backend, dtype, device)
        except Exception as error:  # whatever it is: the others are to be tried
            said = f"WRONG: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            traceback.print_exc()
            wrong += 1
        row: dict[str, Any] = {"optimizer": name, "backend": backend, "dtype": str(dtype)[6:], "step": said}
        print(*row.values(), flush=True)
        gpu_child.add(args.rows, [row])
        if said.startswith("WRONG") and not gpu_child.usable(device) and number + 1 < len(cases):
            gpu_child.start_anew("--begin", str(number + 1), "--wrong", str(wrong))
    print(f"{len(cases) - wrong} of {len(cases)} first steps are right, backends: {', '.join(here) or 'none'}")
    return 1 if wrong or not here else 0


def _pairs(here: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, backend) for backend in here for name in OPTIMIZERS]


if __name__ == "__main__":
    sys.exit(main())
