"""What a sharded step sends and keeps, counted for Llama-3-8B on 64 ranks that need not be here.

`python -m bench.sharding` prints, for each layout and optimizer, the collectives of a step with their ranks and bytes,
and the optimizer state of rank 0. Parameters are made on the meta device over a process group of which only this rank
exists; the numbers are `optimizer.collectives()`, which is what a step does. `--write` puts them in
docs/sharding-plan.md.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import hfac

from .shapes import Shape, llama3_8b

DOCUMENT = Path(__file__).parent.parent / "docs" / "sharding-plan.md"
WORLD = 64
HEAD = """# What a sharded step sends and keeps

This page answers: how many collectives does a sharded step make, of which size, and how much state does a rank keep?

Written by `python -m bench.sharding --write`: Llama-3-8B (bfloat16 parameters) on 64 ranks, counted on the meta device
from what a step does. Payload is the bytes of the buffers that are all-reduced, or broadcast to ranks that have copies
of the same, in one step; state is what rank 0 keeps for its shards. For comparison: bfloat16 gradients are 16.1 GB a
step, and AdamW's state in float32 is 1,004 MB a rank.
Nothing here has been timed.
"""
Placements = Callable[[int, Shape], list[Any]]


@contextmanager
def imagined_ranks(world: int) -> Iterator[None]:
    """A process group of which this process is rank 0 and the others do not exist; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fsdp(position: int, shape: Shape) -> list[Any]:
    return [Shard(0)]


def _hsdp(position: int, shape: Shape) -> list[Any]:
    return [Replicate(), Shard(0)]


def _fsdp_tp(position: int, shape: Shape) -> list[Any]:
    """As Llama is usually cut: o and down by columns, other matrices by rows, and then FSDP over what is left."""
    if len(shape) == 1:
        return [Shard(0), Replicate()]
    in_layer = (position - 1) % 9 if shape[0] != 128256 else 0
    return [Shard(0), Shard(1)] if in_layer in (3, 6) else [_StridedShard(0, split_factor=8), Shard(0)]


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "HFac": hfac.HFac,
    "HFac, int8": partial(hfac.HFac, first_moment="int8"),
    "SMMF": hfac.SMMF,
}
LAYOUTS: dict[str, tuple[tuple[int, ...], Placements]] = {
    "FSDP, 64": ((64,), _fsdp),
    "HSDP, 8 x 8": ((8, 8), _hsdp),
    "FSDP x TP, 8 x 8": ((8, 8), _fsdp_tp),
}


def parameters(shapes: Sequence[Shape], mesh: DeviceMesh, placements: Placements) -> list[torch.nn.Parameter]:
    """This rank's parts, without memory behind them."""
    made = []
    for position, shape in enumerate(shapes):
        places = placements(position, shape)
        local = list(shape)
        for d, place in enumerate(places):
            if hasattr(place, "dim"):
                local[place.dim] = -(-local[place.dim] // mesh.size(d))
        part = torch.empty(local, dtype=torch.bfloat16, device="meta")
        stride = torch.empty(shape, device="meta").stride()
        made.append(
            torch.nn.Parameter(
                DTensor.from_local(part, mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)
            )
        )
    return made


def count() -> dict[tuple[str, str], tuple[list[tuple[int, int]], int]]:
    """By layout and optimizer: (ranks, bytes) of every collective, and bytes of state on rank 0."""
    found = {}
    with imagined_ranks(WORLD):
        for layout, (shape, placements) in LAYOUTS.items():
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
            for name, make in OPTIMIZERS.items():
                optimizer = make(parameters(llama3_8b(), mesh, placements))
                state = sum(
                    math.prod(value.to_local().shape if isinstance(value, DTensor) else value.shape) * value.itemsize
                    for entry in optimizer.state.values()
                    for value in entry.values()
                )
                found[layout, name] = optimizer.collectives(), state
    return found


def table() -> str:
    """The numbers as Markdown."""
    lines = [
        "| layout | optimizer | collectives of a step: ranks x payload | payload in all | state of a rank |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for (layout, name), (calls, state) in count().items():
        each = ", ".join(f"{ranks} x {size / 1e6:.1f} MB" for ranks, size in calls)
        total = sum(size for _, size in calls)
        lines.append(f"| {layout} | {name} | {each} | {total / 1e6:.1f} MB | {state / 1e6:.1f} MB |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Counts what a sharded step of Llama-3-8B sends and keeps.")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    args = parser.parse_args()
    text = f"{HEAD}\n{table()}\n"
    print(text)
    if args.write:
        DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
