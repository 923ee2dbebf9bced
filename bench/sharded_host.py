"""What a sharded step costs the host: operations of torch, and time, with kernels and collectives that do nothing.

`python -m bench.sharded_host` steps lists of small parameters, three matrices to two vectors, of which rank 0 of 8 has
its shards; the other ranks need not be here. Operations are counted where torch hands them to Python
(`TorchDispatchMode`). `--out` writes a JSON file of them all, with a table in Markdown beside it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import hfac

from .imagined import Operations, equal_ranks, idle_kernels, imagined_ranks
from .machine import describe
from .report import plain_table

RANKS = 8
SHAPES = [(64, 64), (64,), (64, 192), (192, 64), (64,)]
#: what a step does besides -> options
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "skip": {"nonfinite": "skip"},
    "skip-step": {"nonfinite": "skip-step"},
    "capturable": {"capturable": True, "max_grad_norm": 1.0},
}


def optimizer_of(name: str, count: int, device: str = "cpu", **options: Any) -> torch.optim.Optimizer:
    """An optimizer of so many sharded parameters, with gradients. In a process group of `RANKS`."""
    mesh = init_device_mesh("cpu" if device == "meta" else device, (RANKS,))

    def part(shape: Sequence[int]) -> DTensor:
        local = torch.randn(shape[0] // RANKS, *shape[1:], device=device)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    shapes = [SHAPES[i % len(SHAPES)] for i in range(count)]
    params = [torch.nn.Parameter(part(shape)) for shape in shapes]
    for param, shape in zip(params, shapes, strict=True):
        param.grad = part(shape)
    return getattr(hfac, name)(params, **options)


def measured(name: str, count: int, mode: str, backend: str, rounds: int) -> dict[str, Any]:
    optimizer = optimizer_of(name, count, backend=backend, **MODES[mode])
    for _ in range(3):
        optimizer.step()
    with Operations() as counted:
        optimizer.step()
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    found = {"optimizer": name, "parameters": count, "step": mode, "operations": len(counted.names)}
    return found | {"ms": statistics.median(times or [0.0]), "times_ms": times}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sharded_host", description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a JSON file to write, raw times included, with a table beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with imagined_ranks(RANKS), equal_ranks(), idle_kernels() as backend:
        rows = [
            measured(name, count, mode, backend, args.rounds)
            for name in ("HFac", "SMMF")
            for count in args.parameters
            for mode in MODES
        ]
    table = plain_table([{key: value for key, value in row.items() if key != "times_ms"} for row in rows])
    print(table)
    if args.out:
        args.out.write_text(json.dumps(describe(torch.device("cpu")) | {"rows": rows}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(f"# {__doc__.splitlines()[0]}\n\n{table}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
