"""What a sharded step sends, keeps and asks of the host, on 8 to 16,384 ranks that need not be here.

`python -m bench.sharding` makes the parameters of known models on the meta device, over a process group of which only
rank 0 exists, and prints for each layout and optimizer the collectives of a step, the state of the rank, and what the
host does in a step whose kernels and collectives do nothing. All but the milliseconds is counted. `--write` puts it
into docs/sharding-plan.md; the milliseconds are measured anew with `--host`, and else those of that page.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

import hfac
from hfac.cli import shapes
from hfac.cli.shapes import Shape, Shapes

from .imagined import Operations, equal_ranks, idle_kernels, imagined_ranks, unread_numbers
from .machine import describe

DOCUMENT = Path(__file__).parent.parent / "docs" / "sharding-plan.md"
#: the model of a collective: seconds for each hop of a tree, and bytes a second of each rank's link
HOP, LINK = 10e-6, 50e9
#: steps that are timed
ROUNDS = 5
HEAD = """# What a sharded step sends, keeps and asks of the host

This page answers: how many collectives does a sharded step make, of which size, how much state does a rank keep, and
what of it grows with the number of ranks?

Written by `python -m bench.sharding --write`. Parameters are bfloat16 and lie on the meta device; the process group
is torch's fake one, of which only rank 0 exists, at every number of ranks up to 16,384. So collectives, bytes and
calls are counted from what a step does, times on the network are those of a model. None of it has run on GPUs.

## Llama-3-8B on 64 ranks, by layout

Payload is the bytes of the buffers that are all-reduced, or broadcast to ranks that have copies of the same, in one
step; state is what rank 0, the fullest, keeps for its shards. For comparison: bfloat16 gradients are 16.1 GB a step,
and AdamW's state in float32 is 1,004 MB a rank.
"""
SENDS = """## 8 to 16,384 ranks: what a step sends

FSDP splits the first dimension of every parameter among all ranks. 16 x 64 is HSDP: 16 copies of the model, each
split among 64 ranks. DeepSeek-V3's experts are stacks of 256 matrices (`batch_dims=1`), as torchtitan keeps them, on
a mesh of their own: "4 x 64" splits each stack among 64 ranks by expert parallelism and what they hold among 4 more
by FSDP, so that a rank holds whole experts; the copies are those of HSDP. Each cell has collectives, their bytes in
all, and the time by a model: a collective among n ranks takes 10 microseconds for each of 2 log2(n) hops of a tree,
and its bytes pass a link of 50 GB/s (400 Gbit/s for each GPU) twice.
"""
KEEPS = """## What a rank keeps

Rank 0, the fullest. Weights are its bfloat16 shards, and how many times an even share they are; AdamW's state is two
float32 moments. (DeepSeek-V3 on 8 ranks fits no GPU; the row shows what grows.)
"""
HOST = """## What the host does

Calls to torch in one step, and milliseconds: of making the optimizer, and of a step (median of {rounds}) with
kernels and collectives that do nothing. Tensors lie on the meta device, where torch takes those of a list one after
the other, so the time of a step is an upper bound; on a GPU a list is one launch. One thread of {processor}, {when},
while others used the machine: times tell whether something grows by much, and no more.
"""
TAIL = """## What grows, what does not, and what gives out first

* **What a step sends does not grow with the ranks**: it is a few numbers for each column (HFac), or for each row and
  column of the square matrix (SMMF), of the whole parameter. Copies of the model add a broadcast of the same size. By
  the model, 8 times as many ranks add 60 microseconds to a collective, and at 16,384 ranks its latency is 0.28 ms,
  less than its bytes take for Llama-3-8B.
* **The host's work does not grow with the ranks**: the calls of a step depend on the layout, and where there are
  stacks of experts on their number. Neither does the time to make the optimizer. It once did, and was the first limit
  that was met: torch's own split of a tensor makes the pieces of all ranks, 20 ms for each tensor of the state at
  16,384 ranks, half a minute for Llama-3-70B. `hfac/distributed/layout.py` cuts this rank's alone.
* **State shrinks down to a floor**: row states, codes and sign bits are sharded; column states and SMMF's factors are
  not. The floor is most of what HFac keeps from 64 ranks on, and of what SMMF keeps from 1,024 on.
* **The next limit is FSDP's, not the step's**: ranks beyond a parameter's rows hold nothing of it. Over 16,384 ranks
  FSDP gives a matrix of 4,096 rows to the first 4,096, and the fullest rank 2.7 times an even share of Llama-3-8B.
  The step stays right with such shards (`tests/distributed/test_sharded.py`); use HSDP, as for AdamW.
* **Whole experts are limited by their number**: where FSDP and expert parallelism together have more ranks than a
  layer has experts, torchtitan shards the second dimension of the stacks, which with `batch_dims=1` {experts}. Beyond
  256 ranks add copies (HSDP), as in the tables, or leave `batch_dims=0`, with which HFac and SMMF factor a stack as
  one matrix.
* **Buffers** are as large as what is sent, in float32, and stay from step to step.
"""
#: where a parameter lies: by its name and shape, the sizes of a mesh and the placements on it
Layout = Callable[[str, Shape], tuple[tuple[int, ...], list[Any]]]
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "HFac": hfac.HFac,
    "HFac, int8": partial(hfac.HFac, first_moment="int8"),
    "SMMF": hfac.SMMF,
}


def fsdp(ranks: int, copies: int = 1) -> Layout:
    """FSDP over so many ranks; with copies of it, HSDP."""
    if copies == 1:
        return lambda name, shape: ((ranks,), [Shard(0)])
    return lambda name, shape: ((copies, ranks), [Replicate(), Shard(0)])


def fsdp_tp(ranks: int, parallel: int) -> Layout:
    """As Llama is usually cut: o and down by columns, other matrices by rows, and then FSDP over what is left."""

    def place(name: str, shape: Shape) -> tuple[tuple[int, ...], list[Any]]:
        if len(shape) == 1:
            return (ranks, parallel), [Shard(0), Replicate()]
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        return (ranks, parallel), (
            [Shard(0), Shard(1)] if by_columns else [_StridedShard(0, split_factor=parallel), Shard(0)]
        )

    return place


def experts(ranks: int, parallel: int, copies: int = 1, dim: int = 0) -> Layout:
    """FSDP, and for experts a mesh of copies, FSDP along ``dim``, and expert parallelism, as torchtitan makes it."""
    rest = ranks // parallel
    others = fsdp(ranks, copies)

    def place(name: str, shape: Shape) -> tuple[tuple[int, ...], list[Any]]:
        if not is_stack(name):
            return others(name, shape)
        within = _StridedShard(0, split_factor=parallel) if dim == 0 else Shard(dim)
        return (copies, rest, parallel), [Replicate(), within, Shard(0)]

    return place


def is_stack(name: str) -> bool:
    """Whether a parameter is a stack of experts, each factored on its own."""
    return ".experts." in name


@dataclass(frozen=True)
class Case:
    """A model on so many ranks."""

    model: str
    shapes: Shapes
    ranks: int
    layout: str
    place: Layout


def _scales(model: str, shapes_of: Shapes) -> Iterator[Case]:
    for ranks in (8, 64, 1024, 16384):
        yield Case(model, shapes_of, ranks, "FSDP", fsdp(ranks))
        if ranks > 64:
            yield Case(model, shapes_of, ranks, f"{ranks // 64:,} x 64", fsdp(64, ranks // 64))


def _expert_scales(model: str, shapes_of: Shapes) -> Iterator[Case]:
    for ranks, copies, parallel in ((8, 1, 8), (64, 1, 64), (1024, 4, 64), (16384, 64, 64)):
        within = ranks // copies
        words = f"{copies} x {within}" if copies > 1 else "FSDP"
        words += f", experts {within // parallel} x {parallel}" if within > parallel else f", experts {parallel}"
        yield Case(model, shapes_of, ranks, words, experts(within, parallel, copies))


LAYOUTS = [
    Case("Llama-3-8B", shapes.llama3_8b(), 64, "FSDP, 64", fsdp(64)),
    Case("Llama-3-8B", shapes.llama3_8b(), 64, "HSDP, 8 x 8", fsdp(8, 8)),
    Case("Llama-3-8B", shapes.llama3_8b(), 64, "FSDP x TP, 8 x 8", fsdp_tp(8, 8)),
]
SCALES = [
    *_scales("Llama-3-8B", shapes.llama3_8b()),
    *_scales("Llama-3-70B", shapes.llama3_70b()),
    *_expert_scales("DeepSeek-V3", shapes.deepseek_v3()),
]
#: those whose host's work is measured: the fewest and the most ranks
HOSTED = [case for case in SCALES if case.ranks in (8, 16384)]


def parameters(case: Case) -> dict[str, Parameter]:
    """This rank's parts, without memory behind them. In a process group of the case's ranks."""
    meshes: dict[tuple[int, ...], DeviceMesh] = {}
    made = {}
    for name, shape in case.shapes.items():
        sizes, places = case.place(name, shape)
        if sizes not in meshes:
            meshes[sizes] = init_device_mesh("cpu", sizes)
        local, _ = compute_local_shape_and_global_offset(torch.Size(shape), meshes[sizes], places)
        part = torch.empty(local, dtype=torch.bfloat16, device="meta")
        stride = torch.empty(shape, device="meta").stride()
        made[name] = Parameter(
            DTensor.from_local(part, meshes[sizes], places, run_check=False, shape=torch.Size(shape), stride=stride)
        )
    return made


def optimizer_of(make: Callable[..., Any], params: dict[str, Parameter], **options: Any) -> Any:
    """An optimizer of them, with experts as stacks."""
    stacks = [param for name, param in params.items() if is_stack(name)]
    rest = [param for name, param in params.items() if not is_stack(name)]
    return make([{"params": rest}, {"params": stacks, "batch_dims": 1}] if stacks else rest, **options)


@dataclass(frozen=True)
class Counted:
    """Of one case: bytes of bfloat16 weights on the rank, how many times an even share that is, bytes of AdamW's state;
    and by optimizer the (ranks, bytes) of every collective, and bytes of state."""

    weights: int
    share: float
    adamw: int
    sent: dict[str, list[tuple[int, int]]]
    state: dict[str, int]


def count(case: Case, rank: int = 0) -> Counted:
    """What a step of the rank sends, and what it keeps."""
    with imagined_ranks(case.ranks, rank):
        params = parameters(case)
        here = sum(map(_elements, params.values()))
        even = sum(param.numel() / _shards(param) for param in params.values())
        sent, state = {}, {}
        for name, make in OPTIMIZERS.items():
            optimizer = optimizer_of(make, params)
            sent[name] = optimizer.collectives()
            values = [value for entry in optimizer.state.values() for value in entry.values()]
            state[name] = sum(_elements(value) * value.itemsize for value in values)
    return Counted(2 * here, here / even, 8 * here, sent, state)


def _elements(tensor: Any) -> int:
    """On this rank."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).numel()


def _shards(param: Any) -> int:
    """Among how many ranks a parameter is split."""
    sizes = zip(param.device_mesh.shape, param.placements, strict=True)
    return math.prod(size for size, placement in sizes if hasattr(placement, "dim"))


def seconds(sent: Iterable[tuple[int, int]]) -> float:
    """What collectives take by the model: each passes a tree of the ranks up and down, and its bytes a link twice."""
    return sum(2 * HOP * math.ceil(math.log2(ranks)) + 2 * (ranks - 1) / ranks * size / LINK for ranks, size in sent)


@dataclass(frozen=True)
class Host:
    """Calls to torch in a step; milliseconds of making the optimizer, and of each of some steps."""

    calls: int
    making: float
    steps: list[float]


def host(case: Case, name: str, rounds: int = ROUNDS) -> Host:
    """A step with kernels and collectives that do nothing."""
    with imagined_ranks(case.ranks), equal_ranks(), idle_kernels() as backend, unread_numbers():
        params = parameters(case)
        for param in params.values():
            param.grad = torch.empty_like(param)
        start = time.perf_counter()
        optimizer = optimizer_of(OPTIMIZERS[name], params, backend=backend)
        making = time.perf_counter() - start
        for _ in range(2):
            optimizer.step()
        with Operations() as counted:
            optimizer.step()
        steps = []
        for _ in range(rounds):
            start = time.perf_counter()
            optimizer.step()
            steps.append(1e3 * (time.perf_counter() - start))
    return Host(len(counted.names), 1e3 * making, steps)


def stacks_on_second_dimension() -> str | None:
    """What the optimizer says of experts whose second dimension is sharded, as torchtitan does it where there are more
    ranks than experts; None where it takes them."""
    case = Case("DeepSeek-V3", shapes.deepseek_v3(4), 1024, "", experts(1024, 64, dim=1))
    with imagined_ranks(case.ranks):
        try:
            optimizer_of(hfac.HFac, parameters(case))
        except ValueError as error:
            return str(error)
    return None


def rows(lines: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; all columns but those of text are aligned to the right."""
    head, *body = lines
    aligned = ["---" if any(character.isalpha() for character in str(cell)) else "---:" for cell in body[0]]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, aligned, *body))


def table(cases: Sequence[Case] = LAYOUTS) -> str:
    """Every collective, by layout."""
    lines = [
        "| layout | optimizer | collectives of a step: ranks x payload | payload in all | state of a rank |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for case in cases:
        counted = count(case)
        for name, calls in counted.sent.items():
            each = ", ".join(f"{ranks} x {size / 1e6:.1f} MB" for ranks, size in calls)
            total, state = sum(size for _, size in calls), counted.state[name]
            lines.append(f"| {case.layout} | {name} | {each} | {total / 1e6:.1f} MB | {state / 1e6:.1f} MB |")
    return "\n".join(lines)


def scale_tables(cases: Sequence[Case]) -> tuple[str, str]:
    """What is sent, and what is kept."""
    sends: list[list[object]] = [["model", "ranks", "layout", *OPTIMIZERS]]
    keeps: list[list[object]] = [["model", "ranks", "layout", "weights", "AdamW's state", *OPTIMIZERS]]
    for case in cases:
        counted, where = count(case), [case.model, f"{case.ranks:,}", case.layout]
        sends.append(where + [_sent(counted.sent[name]) for name in OPTIMIZERS])
        weights = f"{counted.weights / 1e6:,.1f} MB, {counted.share:.2f} x"
        keeps.append([*where, weights, *(f"{n / 1e6:,.1f} MB" for n in (counted.adamw, *counted.state.values()))])
    return rows(sends), rows(keeps)


def _sent(calls: list[tuple[int, int]]) -> str:
    return f"{len(calls)}: {sum(size for _, size in calls) / 1e6:,.1f} MB, {1e3 * seconds(calls):.1f} ms"


def host_table(cases: Sequence[Case]) -> str:
    """Calls and milliseconds."""
    lines: list[list[object]] = [["model", "ranks", "layout", *(f"{n}: calls, making, step" for n in OPTIMIZERS)]]
    for case in cases:
        line: list[object] = [case.model, f"{case.ranks:,}", case.layout]
        for name in OPTIMIZERS:
            found = host(case, name)
            line.append(f"{found.calls}, {found.making:,.0f} ms, {statistics.median(found.steps):.1f} ms")
        lines.append(line)
    return rows(lines)


def host_part() -> str:
    """What the host does, measured now."""
    machine = describe(torch.device("cpu"))
    said = HOST.format(processor=machine["cpu"], when=machine["date"][:10], rounds=ROUNDS)
    return f"{said}\n{host_table(HOSTED)}\n"


def recorded_host_part() -> str:
    """The same as the page has it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text[text.index(HOST.splitlines()[0]) : text.index(TAIL.splitlines()[0])].strip() + "\n"


def ending() -> str:
    """The page's last part."""
    said = "is refused" if stacks_on_second_dimension() else "is taken"
    return TAIL.format(experts=said)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharding", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    parser.add_argument("--host", action="store_true", help="measure what the host does; else it is taken from there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    measured = host_part() if args.host else recorded_host_part()
    sends, keeps = scale_tables(SCALES)
    text = f"{HEAD}\n{table()}\n\n{SENDS}\n{sends}\n\n{KEEPS}\n{keeps}\n\n{measured}\n{ending()}"
    print(text)
    if args.write:
        DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
