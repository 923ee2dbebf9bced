"""Whole steps on a GPU, each list's numbers on the disk before the next list begins: `python -m bench.gpu_steps`.

The parity gate of `bench.session` stands before the numbers. A list that cannot be measured does not cost the others
theirs, nor does one optimizer that fails the other.
"""

import argparse
import gc
import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import gpu_child, session, shapes
from bench.contestants import OPTIMIZERS
from bench.rivals import YARDSTICK


@dataclass(frozen=True)
class Case:
    """A list of parameters and their type; ``alone``: beside fused AdamW and a copy only, not all rivals."""

    shapes: str
    dtype: str
    alone: bool = True


CASES = {
    "first": (Case("llama-3-8b", "bfloat16"), Case("gpt2", "bfloat16")),
    "more": (
        Case("resnet50", "float32", alone=False),
        Case("2000x 64x64", "bfloat16", alone=False),
        Case("gpt2", "float32", alone=False),
        Case("2000x 64x64", "float32", alone=False),
    ),
    "dry": (Case("24x16 + 7", "bfloat16"), Case("24x16 + 7", "float32")),
    "dry-more": (Case("2x 24x16 + 7", "float32", alone=False),),
}
#: lists that are cut where the GPU has no room for them -> what is measured in their place
SMALLER = {"llama-3-8b": "llama-3-8b-4"}
#: of a bfloat16 list: parameters, gradients, two states of AdamW, and what is needed for a while
_BYTES_PER_ELEMENT = 2 * 4 * 1.2


def fitting(case: Case, device: torch.device) -> Case:
    """The case, or a smaller one where it has no room."""
    if case.shapes not in SMALLER or device.type != "cuda":
        return case
    needed = sum(map(math.prod, shapes.parse(case.shapes))) * _BYTES_PER_ELEMENT
    if torch.cuda.get_device_properties(device).total_memory >= needed:
        return case
    return Case(SMALLER[case.shapes], case.dtype, case.alone)


def measure(case: Case, args: argparse.Namespace, gates: dict) -> list[str]:
    """Measures the case and writes its rows; returns what went wrong. Both optimizers are measured beside each other
    or, where that fails, one after the other."""
    device = torch.device(args.device)
    case = fitting(case, device)
    failures: list[str] = []
    waiting: list[tuple[str, ...]] = [OPTIMIZERS]
    while waiting:
        optimizers = waiting.pop(0)
        plan = session.Plan(
            ops=(),
            optimizers=optimizers,
            shapes=(case.shapes,),
            dtypes=(case.dtype,),
            backends=tuple(args.backends),
            device=device,
            rounds=args.rounds,
            seconds=args.seconds,
            quick=args.quick,
            reference=not case.alone,
            rivals=(YARDSTICK,) if case.alone else None,
        )
        run = session.Session(plan, gates=gates)
        try:
            run.run()
        except Exception as error:  # whatever it is: the others are to be measured
            traceback.print_exc()
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if len(optimizers) > 1 and gpu_child.usable(device):
                waiting += [(optimizer,) for optimizer in optimizers]
            else:
                failures.append(f"{case.shapes} {case.dtype} {', '.join(optimizers)}: {said}")
        failures += run.failures
        gpu_child.add(args.rows, run.rows)
        del run
        gc.collect()
        if device.type == "cuda" and gpu_child.usable(device):
            torch.cuda.empty_cache()
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; the exit status is 1 where a gate was red or a list could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", choices=tuple(CASES), default="first")
    parser.add_argument("--backends", nargs="+", default=["cuda"], metavar="NAME")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contestant and list")
    parser.add_argument("--rows", type=Path, help="file to which a line of JSON is added for each number")
    parser.add_argument("--quick", action="store_true", help="kept with the numbers")
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)  # the case to go on with
    parser.add_argument("--failed", type=int, default=0, help=argparse.SUPPRESS)  # of those before
    args = parser.parse_args(argv)
    cases, failed, gates = CASES[args.cases], args.failed, {}
    for number, case in enumerate(cases[args.begin :], args.begin):
        begin = time.monotonic()
        failures = measure(case, args, gates)
        for failure in failures:
            print(f"WRONG: {failure}", flush=True)
        failed += bool(failures)
        print(f"{case.shapes} {case.dtype}: {time.monotonic() - begin:.1f} s", flush=True)
        if failures and not gpu_child.usable(torch.device(args.device)) and number + 1 < len(cases):
            gpu_child.start_anew("--begin", str(number + 1), "--failed", str(failed))
    print(f"{len(cases) - failed} of {len(cases)} lists measured")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
