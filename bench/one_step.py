"""Two steps of both optimizers on GPT-2 124M in bfloat16, for a profiler to look at: `python -m bench.one_step`."""

import argparse
import sys
from collections.abc import Sequence

import torch

import hfac
from bench import shapes
from bench.problem import LR, WEIGHT_DECAY, Problem
from bench.shapes import Shape


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the steps."""
    parser = argparse.ArgumentParser(prog="python -m bench.one_step", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu for a tiny list")
    parser.add_argument("--backend", default="auto", help="as the optimizers take it")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    sizes: list[Shape] = shapes.gpt2() if device.type == "cuda" else [(24, 16), (7,)]
    problem = Problem(sizes, torch.bfloat16, device)
    for cls in (hfac.HFac, hfac.SMMF):
        optimizer = cls(problem.params, lr=LR, weight_decay=WEIGHT_DECAY, backend=args.backend)
        for _ in range(2):
            optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"two steps each on {problem.elements:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
