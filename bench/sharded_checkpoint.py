"""What it costs to save and load sharded optimizer state with torch.distributed.checkpoint, beside torch's AdamW.

`python -m bench.sharded_checkpoint` starts ranks that talk over gloo. Each has its shards of one model in bfloat16,
made in place without whole parameters, and for each optimizer makes a step, saves weights and state with `dcp.save`,
then with `dcp.async_save`, and loads them. Printed are, of the rank that needed most, seconds, the bytes by which its
resident memory rose at its highest, and the bytes that `state_dict()` allocates. `--out` writes a JSON file, with a
table in Markdown beside it.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import hfac

from .machine import describe
from .memory import peak_transient_bytes
from .report import plain_table

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, foreach=False),
    "HFac": hfac.HFac,
    "HFac, int8": partial(hfac.HFac, first_moment="int8"),
    "SMMF": hfac.SMMF,
}
#: a layer's matrices, and the width of its vectors
WIDTH, HIDDEN = 2048, 8192


class Peak:
    """The most resident memory of this process beyond what it has at first, looked at every few milliseconds."""

    def __enter__(self) -> "Peak":
        self.bytes, self._first, self._over = 0, _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, _resident() - self._first)

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._over.set()
        self._thread.join()
        self.bytes = max(self.bytes, _resident() - self._first)


def _resident() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def parameters(layers: int) -> dict[str, Parameter]:
    """This rank's shards of a decoder of so many layers, with gradients; 67 million elements a layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = {"up": (HIDDEN, WIDTH), "gate": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN), "norm": (WIDTH,)}
    shapes |= {f"attention.{part}": (WIDTH, WIDTH) for part in "qkvo"}

    def shard(shape: Sequence[int]) -> DTensor:
        rows = shape[0] // dist.get_world_size()
        return DTensor.from_local(torch.full((rows, *shape[1:]), 0.01).bfloat16(), mesh, [Shard(0)], run_check=False)

    made = {f"layers.{i}.{name}": Parameter(shard(shape)) for i in range(layers) for name, shape in shapes.items()}
    for param in made.values():
        param.grad = shard(param.shape)
    return made


def contents(params: dict[str, Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and state under names, as trainers save them; tensors share memory with what is trained."""
    names = list(params)
    state = optimizer.state_dict()["state"]
    named = {f"{names[i]}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    return {"weights": {name: param.detach() for name, param in params.items()}, "state": named}


def measured(name: str, layers: int, folder: str) -> dict[str, Any]:
    """One optimizer, on this rank."""
    params = parameters(layers)
    optimizer = OPTIMIZERS[name](params.values(), lr=1e-3)
    optimizer.step()
    for param in params.values():
        param.grad = None
    held = sum(_bytes(value) for entry in optimizer.state.values() for value in entry.values())
    found: dict[str, Any] = {"optimizer": name, "parameters": sum(param.numel() for param in params.values())}
    found |= {"weights_bytes": sum(map(_bytes, params.values())), "state_bytes": held}
    found["state_dict_bytes"] = peak_transient_bytes(lambda: optimizer.state_dict(), torch.device("cpu"))
    background = dist.new_group(backend="gloo")
    with Peak() as peak:
        dcp.save(contents(params, optimizer), checkpoint_id=f"{folder}/save")
    found |= {"save_s": peak.seconds, "save_bytes": peak.bytes}
    with Peak() as peak:
        start = time.perf_counter()
        saving = dcp.async_save(contents(params, optimizer), checkpoint_id=f"{folder}/async", process_group=background)
        found["async_blocked_s"] = time.perf_counter() - start
        saving.result()  # type: ignore[union-attr]
    found |= {"async_s": peak.seconds, "async_bytes": peak.bytes}
    with Peak() as peak:
        parts = contents(params, optimizer)
        dcp.load(parts, checkpoint_id=f"{folder}/async")
        saved = optimizer.state_dict()
        names = list(params)
        for i, entry in saved["state"].items():
            saved["state"][i] = {key: parts["state"][f"{names[i]}.{key}"] for key in entry}
        optimizer.load_state_dict(saved)
    found |= {"load_s": peak.seconds, "load_bytes": peak.bytes}
    return found


def _bytes(tensor: Any) -> int:
    shard = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return shard.numel() * shard.itemsize


def _rank(rank: int, ranks: int, layers: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        found = measured(name, layers, folder)
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, found)
        if rank == 0:
            worst = {
                key: value if isinstance(value, str) else max(r[key] for r in everyone) for key, value in found.items()
            }
            Path(folder, "row").write_text(json.dumps(worst))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def row_of(ranks: int, layers: int, name: str) -> dict[str, Any]:
    """The most that any rank needed with this optimizer. Ranks are started for each: memory that a process has freed is
    still resident, and would not count when it is used again."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, layers, name, folder), nprocs=ranks, start_method="spawn")
        return json.loads(Path(folder, "row").read_text())  # type: ignore[no-any-return]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In MB and seconds."""
    return plain_table(
        [
            {
                key.replace("_bytes", " MB").replace("_s", " s"): (
                    f"{value / 1e6:,.1f}" if key.endswith("_bytes") else f"{value:.1f}" if key.endswith("_s") else value
                )
                for key, value in row.items()
            }
            for row in rows
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharded_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=15, help="of 67 million parameters (default: %(default)s)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, help="a JSON file to write, with a table beside it")
    args = parser.parse_args(argv)
    rows = [row_of(args.ranks, args.layers, name) for name in args.optimizers]
    print(table(rows))
    if args.out:
        machine = describe(torch.device("cpu"))
        args.out.write_text(json.dumps(machine | {"ranks": args.ranks, "rows": rows}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(f"# {__doc__.splitlines()[0]}\n\n{table(rows)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
