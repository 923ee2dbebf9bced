"""A step of each optimizer in bfloat16 for a profiler to look at, SMMF first: `python -m bench.one_step`.

The steps before it, which make states and plans, are outside of the range of the CUDA profiler: under
`ncu --profile-from-start off` the launches of one step of each are all that is seen.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

import hfac
from bench import shapes
from bench.problem import LR, WEIGHT_DECAY, Problem

#: Few launches: one for all matrices of SMMF, two for each matrix of H-Fac (and what adds up partial sums).
SHAPES = "4096x4096 + 14336x4096 + 50257x768"
TINY = "24x16 + 7"


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the steps."""
    parser = argparse.ArgumentParser(prog="python -m bench.one_step", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--backend", default="auto", help="as the optimizers take it")
    parser.add_argument("--shapes", default=SHAPES, metavar="LIST", help=f"as bench takes it (default: {SHAPES!r})")
    parser.add_argument("--tiny", action="store_const", dest="shapes", const=TINY, help=f"the list {TINY!r}")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    problem = Problem(shapes.parse(args.shapes), torch.bfloat16, device)
    optimizers = [
        cls(problem.params, lr=LR, weight_decay=WEIGHT_DECAY, backend=args.backend) for cls in (hfac.SMMF, hfac.HFac)
    ]
    for optimizer in optimizers:
        for _ in range(2):
            optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for optimizer in optimizers:
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"three steps each on {problem.elements:,} parameters, the last ones for the profiler")
    return 0


if __name__ == "__main__":
    sys.exit(main())
