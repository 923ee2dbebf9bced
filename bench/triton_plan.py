"""Predicted times of the Triton kernels' launches in a step over a list: the model of bench/launch_model.py, whose
launches are those of `hfac.triton_kernels.plan` and whose instructions are those of the code that the installed Triton
makes of the kernels. Needs no GPU; nothing here was timed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import triton
from hfac.triton_kernels import table
from hfac.triton_kernels.items import Item
from hfac.triton_kernels.plan import Launch, Plan, make_plan

from . import triton_check, triton_cost
from .cubin import Code, codes
from .launch_model import Predicted, Walked, Walks
from .launch_plan import OPTIMIZERS, Step, factored, instances, shapes_of
from .multiprocessor import ISSUE_SHARE, SCHEDULERS, Gpu, makespan
from .shapes import Shape
from .walk import LANES

#: Kernels of which a program takes a tile of rows and columns -> where its item says how many rows.
_CUT = {"hfac_stats": "stats_rows", "smmf_tiles": "tile_rows", "hfac_update": "tile_rows"}
#: Kernels of which a program takes a chunk of rows and one of columns.
_CHUNKS = "smmf_fold", "hfac_fold"

HEAD = """The same step by the Triton kernels, as Triton {version} compiles them for sm_90, beside the CUDA kernels' of
the tables above, on an {gpu}. Gradients that are read again, and partial sums, count as coming from memory."""


def plans(optimizer: str, shapes: Sequence[Shape], dtype: torch.dtype) -> list[tuple[Plan, list[Item]]]:
    """The plans of one step, of factored parameters and of those with whole moments, with their items. ``optimizer``: a
    name of `launch_plan.OPTIMIZERS`."""
    algorithm = OPTIMIZERS[optimizer]
    stem = algorithm.removesuffix("_int8")
    matrices, vectors = factored(algorithm, shapes)
    found = []
    for op, sides in ((f"{algorithm}_step_", matrices), (f"{stem}_dense_step_", [(n, 1, 0) for n in vectors])):
        items = []
        for rows, cols, slice in sides:
            item = Item(rows, cols, dtype, dtype, slice=slice, codes="int8" in op)
            item.whole = (rows if cols == 1 else cols) % 8 == 0 and item.signs != table.SHARED_BYTES.value
            items.append(item)
        if items:
            found.append((make_plan(op, items), items))
    return found


class Model:
    """Predicts launches for one GPU, whose code is `triton_cost.TARGET`'s."""

    def __init__(self, gpu: Gpu = triton_cost.GPU) -> None:
        self.gpu, self.walks = gpu, Walks("triton-walks")
        self._codes: dict[object, tuple[Code, int]] = {}

    def launches(self, plan: Plan, items: Sequence[Item]) -> Iterator[Predicted]:
        """Those of a plain step that clips its own update. Launches that are alike are one, with their number."""
        known: dict[object, Predicted] = {}
        for launch in plan.launches:
            if launch.when and "CLIPPED" not in launch.when:
                continue
            of = self._programs(launch)
            alike = (
                launch.name,
                *map(str, launch.constants.items()),
                *((items[i].rows, items[i].cols, n) for i, n in of),
            )
            if alike in known:
                known[alike].launches += 1
            else:
                known[alike] = self._launch(launch, [(items[i], n) for i, n in of])
        self.walks.save()
        yield from known.values()

    @staticmethod
    def _programs(launch: Launch) -> list[tuple[int, int]]:
        """Items and how many programs each has, in their order."""
        counts: dict[int, int] = {}
        for item, _ in launch.tiles:
            counts[item] = counts.get(item, 0) + 1
        return list(counts.items())

    def _code(self, launch: Launch) -> tuple[Code, int]:
        """The kernel and its bytes of shared memory."""
        key = launch.name, launch.warps, *map(str, launch.constants.items())
        if key not in self._codes:
            target, _ = triton_check.TARGETS[triton_cost.TARGET]
            kernel = triton_check.compile_variant(triton_check.plain(launch), target)
            (code,) = codes(kernel.asm["cubin"], triton_cost.dump(kernel.asm["cubin"], "-sass"))
            self._codes[key] = code, kernel.metadata.shared + triton_cost.RESERVED
        return self._codes[key]

    def _launch(self, launch: Launch, of: Sequence[tuple[Item, int]]) -> Predicted:
        gpu = self.gpu
        code, shared = self._code(launch)
        threads, blocks = LANES * launch.warps, len(launch.tiles)
        resident = gpu.resident(threads, code.registers, shared)
        few = min(resident, math.ceil(blocks / gpu.multiprocessors))
        c = launch.constants
        instance = str(c.get("G", c.get("T", ""))) + (f" {c['R']}x{c['C']}" if "R" in c else "")
        found = Predicted(
            launch.name, instance + ("" if c.get("WHOLE", True) else ", any layout"), 1, blocks,
            blocks / (gpu.multiprocessors * resident), code.registers, resident, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            threads,
        )  # fmt: skip
        order: list[tuple[int, float]] = []
        latency = 0.0
        for item, n in of:
            found.elements += item.elements
            found.bytes += round(triton_cost.moved(launch.name, item))
            for count, index, rows in _classes(launch, item, n):
                one = self._block(code, launch, item, index, rows, {few, resident})
                found.in_flight = max(found.in_flight, one.in_flight * resident)
                for name in ("instructions", "mufu", "shuffles", "barriers", "wide", "local", "undecided"):
                    setattr(found, name, getattr(found, name) + count * getattr(one, name))
                order.append((count, one.cycles[few] / gpu.clock))
                latency += count * one.cycles[resident] / gpu.clock
        found.times = {
            "bytes": found.bytes / gpu.copy,
            "issue": found.instructions / (gpu.multiprocessors * SCHEDULERS * ISSUE_SHARE * gpu.clock),
            "latency": latency / (gpu.multiprocessors * resident),
            "waves": makespan(order, gpu.multiprocessors * few),
        }
        return found

    def _block(
        self, code: Code, launch: Launch, item: Item, index: int, rows: float | None, residents: set[int]
    ) -> Walked:
        """A program. One of many rows is walked with few and with twice as many, and the rest is a line."""
        if rows is None:
            return self._walk(code, launch, item, index, None, residents)
        few = 4 * launch.constants["R"]
        if rows <= 2.5 * few:
            return self._walk(code, launch, item, index, math.ceil(rows), residents)
        one, two = (self._walk(code, launch, item, index, n, residents) for n in (few, 2 * few))
        return one.between(two, (rows - few) / few)

    def _walk(
        self, code: Code, launch: Launch, item: Item, index: int, rows: int | None, residents: set[int]
    ) -> Walked:
        of = ("triton", item.rows, item.cols, item.slice, item.row_tiles, item.col_tiles, index, rows, launch.warps)

        def make() -> list:
            field = _CUT.get(launch.name)
            before = None if field is None else getattr(item, field)
            if field is not None:
                setattr(item, field, rows)
            try:
                alone = Launch(launch.kernel, [(0, index)], launch.constants, launch.warps)
                return [triton_cost.walked(code, alone, [item])] * launch.warps
            finally:
                if field is not None:
                    setattr(item, field, before)

        return self.walks.walk(self.gpu, code, of, make, sorted(residents))


def _classes(launch: Launch, item: Item, n: int) -> Iterable[tuple[int, int, float | None]]:
    """(programs, the index of one that stands for them, rows of its tile)."""
    field = _CUT.get(launch.name)
    if field is not None:
        rows = item.rows / math.ceil(item.rows / getattr(item, field))
        col_tiles = 1 if launch.name == "hfac_stats" else item.col_tiles
        if col_tiles > 1:
            yield n - n // col_tiles, 0, rows
        yield n // col_tiles, col_tiles - 1, rows
    elif launch.name in _CHUNKS:
        both = min(n, *(math.ceil(length / table.CHUNK.value) for length in (item.rows, item.cols)))
        yield both, 0, None
        if n > both:
            yield n - both, n - 1, None
    else:
        if n > 1:
            yield n - 1, 0, None
        yield 1, n - 1, None


def predicted(parameters: str, optimizer: str, dtype: str, model: Model | None = None) -> Step:
    """One step, as `launch_plan.predicted`."""
    model = model or Model()
    shapes, launched = shapes_of(parameters), []
    for plan, items in plans(optimizer, shapes, getattr(torch, dtype)):
        launched += list(model.launches(plan, items))
    total = sum(launch.bytes * launch.launches for launch in launched)
    return Step(parameters, optimizer, dtype, model.gpu, total / sum(map(math.prod, shapes)), launched)


def section(parameters: Sequence[str], optimizers: Sequence[str], dtypes: Sequence[str], native: Sequence[Step]) -> str:
    """Steps beside those of the CUDA kernels, and their kernels, as Markdown."""
    model = Model()
    found = [
        predicted(name, optimizer, dtype, model) for name in parameters for optimizer in optimizers for dtype in dtypes
    ]
    head = HEAD.format(version=triton.__version__, gpu=model.gpu.name)
    return "\n\n".join([head, beside(found, native), instances(found)])


def beside(found: Sequence[Step], native: Sequence[Step]) -> str:
    """Steps, and where there are the CUDA kernels' on the same GPU, what these take, as Markdown."""
    known = {(step.parameters, step.optimizer, step.dtype, step.gpu.name): step for step in native}
    lines = [
        "| parameters | optimizer | type | launches | bytes per parameter | Triton | CUDA | Triton / CUDA |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step in found:
        other = known.get((step.parameters, step.optimizer, step.dtype, step.gpu.name))
        cells = "" if other is None else f"{other.milliseconds:.3g} ms | {step.milliseconds / other.milliseconds:.2f}"
        lines.append(
            f"| {step.parameters} | {step.optimizer} | {step.dtype} | {step.launches} | {step.bytes_per_param:.2f} "
            f"| {step.milliseconds:.3g} ms | {cells or '|'} |"
        )
    return "\n".join(lines)
