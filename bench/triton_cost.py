"""What programs of the Triton kernels execute, and what they may: `make triton-check` fails where one exceeds it.

One program of each kernel is walked through its machine code (bench/walk.py), and a launch over a matrix predicted as
those of the CUDA kernels are (bench/multiprocessor.py): by the largest of the times that bytes, issued instructions,
latency and the number of programs ask for. Needs no GPU; nothing here was timed.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hfac.triton_kernels import table
from hfac.triton_kernels.items import Item
from hfac.triton_kernels.layouts import merged_layout, packed_layout
from hfac.triton_kernels.plan import Launch, make_plan

from .cubin import Code, codes
from .cuda_check import find_cuobjdump
from .multiprocessor import GPUS, ISSUE_SHARE, MEMORY_LATENCY, SCHEDULERS, cycles, makespan
from .walk import LANES, Memory, Walker, Warp

#: The GPU that figures are for, and the target that its kernels are compiled for.
GPU, TARGET = GPUS["h200"], "sm_90"
#: Where arguments begin among an sm_90 kernel's constants.
_ARGUMENTS = 0x210
#: Addresses that kernels are told: of tables, and of all else, which comes from the GPU's memory.
_TABLES, _LAYOUTS, _OPERANDS, _APART = 1 << 20, 1 << 30, 1 << 40, 1 << 34
#: Bytes of shared memory that the GPU takes of each program.
RESERVED = 1024
F32, BF16 = torch.float32, torch.bfloat16
CHANNELS_LAST = 0


@dataclass(frozen=True)
class Budget:
    """Of one kernel over one matrix.

    Attributes:
        lies: how the gradient lies: 16, 4 or 2 bytes of which its address is a multiple; or CHANNELS_LAST, as the
            parameter does, too.
        instructions: of a lane for an element of the bulk of a tile, at most; that is without what a program does
            before its first row and after its last.
        barriers: for an iteration, over the R rows that are in flight.
        programs: at least.
    """

    kernel: str
    op: str
    shape: tuple[int, int]
    dtype: torch.dtype
    instructions: float
    barriers: float
    programs: int = 1
    lies: int = 16

    @property
    def item(self) -> Item:
        slice, codes = 8 if self.op.startswith("smmf") else 0, "int8" in self.op
        whole = self.lies != CHANNELS_LAST
        aligned = self.lies if whole else 16
        return Item(*self.shape, self.dtype, self.dtype, whole, slice, codes=codes, aligned=aligned)

    @property
    def layout(self) -> list[int]:
        """Of the parameter and of its gradient, as kernels read it."""
        if self.lies != CHANNELS_LAST:
            return [0]
        rows, cols = self.shape
        return packed_layout(merged_layout((rows, cols // 9, 3, 3), (cols, 1, cols // 3, cols // 9)))


#: What each costs today by whichever of the checked versions of Triton takes most; whoever makes one cheaper lowers it
#: here.
BUDGETS: Sequence[Budget] = (
    Budget("smmf_tiles", "smmf_step_", (4096, 4096), BF16, 44, 0, 256),
    Budget("smmf_tiles", "smmf_step_", (4096, 4096), F32, 72, 8, 512),
    Budget("hfac_stats", "hfac_step_", (65536, 256), BF16, 14.5, 0, 256),
    Budget("hfac_stats", "hfac_step_", (8192, 512), BF16, 15, 0, 128),
    Budget("hfac_stats", "hfac_step_", (4096, 1024), BF16, 12.5, 0, 128),
    Budget("hfac_stats", "hfac_step_", (8192, 2048), BF16, 19, 4, 128),
    Budget("hfac_stats", "hfac_step_", (4096, 4096), BF16, 15, 3, 128),
    Budget("hfac_stats", "hfac_step_", (4096, 14336), BF16, 17, 4, 128),
    Budget("hfac_stats", "hfac_step_", (4096, 1024), F32, 15.1, 10, 128),
    Budget("hfac_stats", "hfac_step_", (8192, 2048), F32, 18, 4, 128),
    Budget("hfac_stats", "hfac_step_", (4096, 4096), F32, 19.5, 3, 128),
    Budget("hfac_update", "hfac_step_", (4096, 4096), BF16, 15.1, 0, 256),
    Budget("hfac_update", "hfac_step_", (4096, 4096), F32, 15.1, 0, 256),
    Budget("hfac_update", "hfac_int8_step_", (4096, 4096), BF16, 60, 0, 256),
    Budget("hfac_update", "hfac_int8_step_", (4096, 4096), F32, 78, 2, 256),
    # Gradients at odd addresses, as DDP's buckets have them, and of channels-last convolutions.
    Budget("smmf_tiles", "smmf_step_", (4096, 4096), BF16, 48, 0, 256, 4),
    Budget("hfac_stats", "hfac_step_", (4096, 1024), BF16, 22, 16, 128, 4),
    Budget("hfac_stats", "hfac_step_", (4096, 4096), BF16, 20, 8, 128, 4),
    Budget("hfac_stats", "hfac_step_", (8192, 2048), F32, 21, 4, 128, 4),
    Budget("hfac_update", "hfac_step_", (4096, 4096), BF16, 16, 0, 256, 4),
    Budget("smmf_tiles", "smmf_step_", (2048, 1008), BF16, 122, 8, 32, CHANNELS_LAST),
    Budget("hfac_stats", "hfac_step_", (2048, 1008), BF16, 66, 12, 128, CHANNELS_LAST),
    Budget("hfac_update", "hfac_step_", (2048, 1008), BF16, 66, 2, 128, CHANNELS_LAST),
)

HEAD = f"""Executed by one program over a matrix that it divides, on the bulk, of a plain clipped step; found by a walk
through the code compiled for {TARGET}. Instructions of a lane per element: of the rows of a tile, and with what a
program does before and after them. Barriers and shuffles are for the rows that are in flight at a time. Kilobytes under
way on a multiprocessor of an {GPU.name}, what binds the launch there and its share of the copy rate are the model's of
docs/launch-plan.md, in a list of many such matrices, cut as one alone is, and of one matrix alone: nothing was timed.
What is copied to shared memory without registers is not seen in flight."""


@dataclass(frozen=True)
class Cost:
    """What a launch over one matrix costs."""

    budget: Budget
    tile: str
    programs: int
    registers: int
    instructions: float
    with_ends: float
    barriers: float
    shuffles: float
    in_flight: float
    bound: str
    share: float
    alone: float
    undecided: int
    local: int

    def faults(self) -> Iterable[str]:
        b = self.budget
        if self.instructions > b.instructions:
            yield f"{self.instructions:.1f} instructions per element, more than {b.instructions}"
        if self.barriers > b.barriers:
            yield f"{self.barriers:g} barriers per iteration, more than {b.barriers:g}"
        if self.programs < b.programs:
            yield f"{self.programs} programs, fewer than {b.programs}"
        if self.local and b.lies != CHANNELS_LAST:
            yield "local memory is used on the executed path"
        if self.undecided:
            yield f"{self.undecided} branches were not decided, so that its counts are not to be trusted"

    def row(self) -> str:
        b, wrong = self.budget, "".join(f" **{text}**" for text in self.faults())
        lies = {16: "", CHANNELS_LAST: ", channels last"}.get(b.lies, f", gradient at a multiple of {b.lies} bytes")
        cells = (
            b.kernel, f"{b.shape[0]}x{b.shape[1]}{lies}", str(b.dtype).removeprefix("torch."), self.tile, self.programs,
            self.registers, f"{self.instructions:.1f}, {self.with_ends:.1f}", f"{self.barriers:g}",
            f"{self.shuffles:g}", f"{self.in_flight / 1024:.0f}", self.bound, f"{100 * self.share:.0f} %",
            f"{100 * self.alone:.0f} %{wrong}",
        )  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


COLUMNS = (
    "kernel", "matrix", "type", "tile", "programs", "registers", "instructions", "barriers", "shuffles", "KB in flight",
    "binds", "share of the copy rate", "alone",
)  # fmt: skip


def dump(cubin: bytes, what: str) -> str:
    """What cuobjdump says of a cubin."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None, "triton's wheel has it"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump, what, file.name], check=True, capture_output=True, text=True).stdout


def walked(code: Code, launch: Launch, items: Sequence[Item], index: int = 0, layout: Sequence[int] = (0,)) -> Warp:
    """The first warp of a program; others do the same. ``layout``: of parameters and of gradients, where they are not
    whole."""
    at = {name: _TABLES * (1 + k) for k, name in enumerate(table.MEMORY)}
    records, grads, free = [], [], _OPERANDS
    for item in items:
        record = item.record()
        for name, field in table.FIELD.items():
            if re.match(r"space_|sum_|new_|first_(row|col)|second_|signs|codes_at|param$|low_bits", name):
                record[field] = free
                free += _APART
            elif name.endswith("_layout"):
                record[field] = _LAYOUTS
        records += record
        grads += [free, _LAYOUTS]
        free += _APART
    # All that decides something; the rest is float, and not followed.
    scalars = [0.0] * (table.OWN.value + table.OWNED.value * (1 + len(items)))
    tables = {
        "tiles": ([x for tile in launch.tiles for x in tile], torch.int32),
        "items": (records, torch.int64),
        "grads": (grads, torch.int64),
        "scalars": (scalars, torch.float64),
        "flags": ([0] * len(items), torch.int32),
    }
    known = [(at[name], _bytes(*of)) for name, of in tables.items()]
    known.append((_LAYOUTS, _bytes(layout, torch.int64)))
    arguments = _bytes([at[name] for name in launch.memory], torch.int64)
    arguments += bytes(code.constants - _ARGUMENTS - len(arguments))  # Triton's own
    walker = Walker(code, Memory(known, operands=_OPERANDS))
    warps = walker.block(arguments, LANES * launch.warps, len(launch.tiles), index, alike=[0] * launch.warps)
    return warps[0]


def _bytes(values: Sequence[Any], dtype: torch.dtype) -> bytes:
    return bytes(torch.tensor(values, dtype=dtype, device="cpu").view(torch.uint8).tolist())


def moved(kernel: str, item: Item) -> float:
    """Bytes that a launch of this name moves through the GPU's memory for a parameter, in a plain step that clips its
    own update: each number once, but a gradient as often as it is read."""
    rows, cols, n = item.rows, item.cols, item.elements
    w, g, t = item.dtype.itemsize, item.grad_dtype.itemsize, item.wide.itemsize
    column_sums = 3 * cols * item.row_tiles * t
    sums = 2 * (rows * item.col_tiles + cols * item.row_tiles) * t
    signs = {table.NO_SIGNS.value: 0, table.BYTE_PER_ELEMENT.value: 2 * n}.get(item.signs, n / 4)
    own = (rows + cols) * t
    return {
        "smmf_tiles": (2 * w + g) * n + signs + sums + 2 * own,
        "smmf_fold": sums + 2 * own,
        "smmf_normalize": 4 * cols * t,
        "smmf_dense": (2 * w + g + 4 * t) * n,
        "hfac_stats": (2 if item.constants["WIDE"] else 1) * g * n + column_sums + 3 * rows * t,
        "hfac_fold": column_sums + 7 * rows * t + 6 * cols * t,
        "hfac_scale": 2 * rows * t,
        "hfac_update": (2 * w + g + 2 * item.codes) * n + 2 * own,
        "hfac_dense_look": (g + t) * n,
        "hfac_dense_total": 0,
        "hfac_dense": (2 * w + g + 4 * t) * n,
    }[kernel]


def cost(budget: Budget, compiled: Callable[[Launch], Any]) -> Cost:
    """``compiled``: compiles the kernel of a launch for TARGET."""
    item = budget.item
    plan = make_plan(budget.op, [item])
    (launch,) = (one for one in plan.launches if one.kernel.fn.__name__ == budget.kernel)
    kernel = compiled(launch)
    (code,) = codes(kernel.asm["cubin"], dump(kernel.asm["cubin"], "-sass"))
    rows, cols = launch.constants["R"], launch.constants["C"]
    programs, warps = len(launch.tiles), launch.warps
    elements = item.elements / programs / (LANES * warps)
    index = launch.tiles.index((0, 0))
    whole = walked(code, launch, [item], index, budget.layout)
    # Twice as many rows of a tile, so that the ends fall out.
    tile_rows = item.stats_rows if budget.kernel == "hfac_stats" else item.tile_rows
    item.tile_rows, item.stats_rows = 2 * tile_rows, 2 * tile_rows
    more = walked(code, launch, [item], index, budget.layout)
    iterations = tile_rows / rows
    resident = GPU.resident(LANES * warps, code.registers, kernel.metadata.shared + RESERVED)
    few = min(resident, math.ceil(programs / GPU.multiprocessors))
    seconds = {n: cycles([[whole] * warps] * n, MEMORY_LATENCY * GPU.clock) / GPU.clock for n in {few, resident}}
    issued = programs * warps * whole.instructions
    times = {
        "bytes": moved(budget.kernel, item) / GPU.copy,
        "issue": issued / (GPU.multiprocessors * SCHEDULERS * ISSUE_SHARE * GPU.clock),
        "latency": programs * seconds[resident] / (GPU.multiprocessors * resident),
        "waves": makespan([(programs, seconds[few])], GPU.multiprocessors * few),
    }
    alone = max(times.values())
    listed = max(time for name, time in times.items() if name != "waves")
    return Cost(
        budget, f"{rows}x{cols}, {warps} warps", programs, code.registers,
        (more.instructions - whole.instructions) / elements, whole.instructions / elements,
        (more.barriers - whole.barriers) / iterations, (more.shuffles - whole.shuffles) / iterations,
        whole.in_flight * warps * resident, next(n for n, s in times.items() if s >= 0.97 * listed),
        times["bytes"] / listed, times["bytes"] / alone, sum(whole.undecided.values()), whole.local,
    )  # fmt: skip
