"""From shapes, types and layouts to launches: which kernel runs over which tiles, in which order.

The tiling is a function of the shape alone, and nothing is tuned at run time: the order of every sum is fixed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl

from . import dense, hfac, smmf, table

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
_SIZES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.float64: 8}

Shape = tuple[int, int, int]
REGISTERS = 128

#: Partial sums of SMMF take at most these bytes; a longer list is taken in groups that share them.
WORKSPACE = 64 << 20

#: (rows in flight, columns, warps) of a tile: 8 elements per lane for SMMF, which needs many registers for each, 16 for
#: H-Fac; and one warp holds whole rows of the tile, so that their sums need no shared memory.
SMMF_TILES = ((32, 64, 8), (8, 256, 8))
NARROW, BROAD = HFAC_TILES = ((64, 64, 8), (16, 256, 8))
#: Of H-Fac's statistics, which hold whole rows. Rows beyond the last are read a second time.
STATS = (NARROW, BROAD, (4, 1024, 8), (2, 4096, 16))


@dataclass
class Item:
    """One parameter.

    Attributes:
        rows, cols: the matrix; dense: the elements and 1.
        slice: elements of one slice of the first dimension; 0 without signs.
        whole: contiguous and aligned, rows and runs in whole vectors of 8.
    """

    rows: int
    cols: int
    param: torch.dtype
    grad: torch.dtype
    whole: bool = True
    slice: int = 0
    tile_rows: int = 0
    row_tiles: int = 0
    col_tiles: int = 0
    spaces: dict[str, int] = field(default_factory=dict)  # name -> bytes from the start of the workspace

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.param == torch.float64 else torch.float32

    @property
    def signs(self) -> int:
        if not self.slice:
            return table.NO_SIGNS.value
        if self.slice == 1:
            return table.BYTE_PER_ELEMENT.value
        whole = self.cols % 8 == 0 and self.slice % 8 == 0
        return (table.WHOLE_BYTES if whole else table.SHARED_BYTES).value


@dataclass
class Launch:
    """A kernel over tiles.

    Attributes:
        arguments: names of what it takes besides tiles and items.
        constants: its compile-time arguments; those of a step's options come with the step.
        options: names of the latter.
    """

    kernel: Any
    tiles: list[tuple[int, int]]
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    constants: dict[str, Any]
    warps: int = 8
    when: tuple[str, ...] = ()  # runs only where one of these options is on; always, where there are none

    @property
    def name(self) -> str:
        return self.kernel.__name__ if hasattr(self.kernel, "__name__") else self.kernel.fn.__name__


def compile_options(constants: dict[str, Any], warps: int, maker: str) -> dict[str, Any]:
    """What Triton is told besides: for GPUs of ``maker``, "cuda", "hip" or another.

    A bound on registers lets two programs of 256 lanes run on a multiprocessor; without one ptxas aims at three of some
    kernels and parks registers in memory. A wave of AMD's has 64 lanes.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if maker == "cuda":
        options["maxnreg"] = REGISTERS if constants["T"] == tl.float32 else 2 * REGISTERS - 32
    if maker == "hip":
        options["num_warps"] = max(1, warps // 2)
    return options


@dataclass
class Plan:
    launches: list[Launch]
    workspace: int  # bytes


def make_plan(op: str, items: Sequence[Item]) -> Plan:
    """Launches of one op; sets each item's tiling and spaces."""
    if op == "smmf_step_":
        return _smmf(items)
    if op == "hfac_step_":
        return _hfac(items)
    return _dense(op, items)


def _cut(item: Item) -> None:
    """Rows per tile: partial sums of columns cost 1/32 byte per element and statistic at 256 rows; smaller matrices,
    whose partial sums stay in the cache, take fewer, to make enough programs."""
    elements = item.rows * item.cols
    item.tile_rows = 64 if elements < 4 << 20 else 128 if elements < 16 << 20 else 256
    item.row_tiles = -(-item.rows // item.tile_rows)
    item.col_tiles = -(-item.cols // _fit(HFAC_TILES, item)[1])


def _fit(shapes: tuple[Shape, ...], item: Item, fewer: int = 2) -> Shape:
    """The first that holds the item's columns, else the last; with fewer rows in flight where every element's address
    takes registers of its own."""
    rows, cols, warps = next((shape for shape in shapes if item.cols <= shape[1]), shapes[-1])
    return rows if item.whole else max(1, rows // fewer), cols, warps


def _parts(items: Sequence[Item], indices: Iterable[int], count: Callable[[Item], int]) -> list[tuple[int, int]]:
    return [(i, part) for i in indices for part in range(count(items[i]))]


def _classes(
    items: Sequence[Item], indices: Iterable[int], key: Callable[[Item], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[int]]:
    """Parameters by what a kernel is compiled for, in the order of their first."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i in indices:
        if items[i].rows * items[i].cols:
            found.setdefault(key(items[i]), []).append(i)
    return found


def _place(item: Item, at: int, sizes: dict[str, int]) -> int:
    for name, nbytes in sizes.items():
        item.spaces[name] = at
        at += -(-nbytes // 16) * 16
    return at


def _chunks(length: int) -> int:
    return -(-length // table.CHUNK.value)


def _runs(item: Item) -> int:
    return -(-item.rows * item.cols // table.RUN.value)


def _look(items: Sequence[Item], indices: Iterable[int]) -> list[Launch]:
    return [
        Launch(
            dense.look,
            _parts(items, mine, lambda it: -(-it.rows * it.cols // table.LOOKED.value)),
            ("grads", "flags"),
            (),
            {"G": TYPES[grad], "T": TYPES[wide], "WHOLE": whole},
            when=("SKIP",),
        )
        for (grad, wide, whole), mine in _classes(items, indices, lambda it: (it.grad, it.wide, it.whole)).items()
    ]


def _smmf(items: Sequence[Item]) -> Plan:
    groups: list[list[int]] = []
    at = workspace = 0
    for i, item in enumerate(items):
        _cut(item)
        size = _SIZES[item.wide]
        sizes = {
            "rows": 2 * item.col_tiles * item.rows * size,
            "cols": 2 * item.row_tiles * item.cols * size,
            "totals": 2 * _chunks(item.rows) * size,
        }
        end = _place(item, at, sizes)
        if not groups or end > WORKSPACE:
            groups.append([])
            end = _place(item, 0, sizes)
        groups[-1].append(i)
        at = end
        workspace = max(workspace, end)
    launches = []
    for group in groups:
        launches += _look(items, group)
        classes = _classes(items, group, lambda it: (it.param, it.grad, it.whole, it.signs, _fit(SMMF_TILES, it)))
        for (param, grad, whole, signs, (rows, cols, warps)), mine in classes.items():
            launches.append(
                Launch(
                    smmf.smmf_tiles,
                    _parts(items, mine, lambda it: it.row_tiles * it.col_tiles),
                    ("grads", "scalars", "flags"),
                    ("COUPLED", "NEGATE", "SKIP"),
                    {
                        "W": TYPES[param],
                        "G": TYPES[grad],
                        "T": TYPES[_wide(param)],
                        "R": rows,
                        "C": cols,
                        "WHOLE": whole,
                        "LAYOUT": signs,
                    },
                    warps,
                )
            )
        for (wide,), mine in _classes(items, group, lambda it: (it.wide,)).items():
            for kernel, side in ((smmf.smmf_fold, "rows"), (smmf.smmf_normalize, "cols")):
                launches.append(
                    Launch(
                        kernel,
                        _parts(items, mine, lambda it, side=side: _chunks(getattr(it, side))),
                        ("flags",),
                        ("FIRST", "SKIP"),
                        {"T": TYPES[wide]},
                        4,
                    )
                )
    return Plan(launches, workspace)


def _hfac(items: Sequence[Item]) -> Plan:
    at = 0
    for item in items:
        _cut(item)
        size = _SIZES[item.wide]
        at = _place(
            item,
            at,
            {
                "rows": item.rows * size,
                "squares": item.rows * size,
                "cols": 3 * item.row_tiles * item.cols * size,
                "psi": item.cols * size,
                "scale": item.cols * size,
                "totals": 16 * _chunks(max(item.rows, item.cols)),
            },
        )
    everything = range(len(items))
    launches = []

    def stats_shape(item: Item) -> tuple[Shape, bool]:
        wide = item.cols > STATS[-1][1]
        return _fit(HFAC_TILES if wide else STATS, item, 4), wide

    classes = _classes(items, everything, lambda it: (it.param, it.grad, it.whole, stats_shape(it)))
    merged: dict[tuple[Any, ...], list[int]] = {}
    for (param, *key), mine in classes.items():
        merged.setdefault((_wide(param), *key), []).extend(mine)
    for (wide, grad, whole, ((rows, cols, warps), twice)), mine in merged.items():
        launches.append(
            Launch(
                hfac.hfac_stats,
                _parts(items, mine, lambda it: it.row_tiles),
                ("grads", "scalars", "flags"),
                ("LOOK",),
                {"G": TYPES[grad], "T": TYPES[wide], "R": rows, "C": cols, "WHOLE": whole, "WIDE": twice},
                warps,
            )
        )
    for (wide,), mine in _classes(items, everything, lambda it: (it.wide,)).items():
        for kernel, count, options in (
            (hfac.hfac_fold, lambda it: _chunks(max(it.rows, it.cols)), ("NEGATE", "SKIP")),
            (hfac.hfac_scale, lambda it: _chunks(it.rows), ("CLIPPED", "SKIP")),
        ):
            tiles = _parts(items, mine, count)
            launches.append(Launch(kernel, tiles, ("scalars", "flags"), options, {"T": TYPES[wide]}, 4))
    classes = _classes(items, everything, lambda it: (it.param, it.grad, it.whole, _fit(HFAC_TILES, it)))
    for (param, grad, whole, (rows, cols, warps)), mine in classes.items():
        tiles = _parts(items, mine, lambda it: it.row_tiles * it.col_tiles)
        tiles.reverse()  # what was read last is the likeliest to be in the cache still
        launches.append(
            Launch(
                hfac.hfac_update,
                tiles,
                ("grads", "scalars", "flags"),
                ("NEGATE", "SKIP"),
                {
                    "W": TYPES[param],
                    "G": TYPES[grad],
                    "T": TYPES[_wide(param)],
                    "R": rows,
                    "C": cols,
                    "WHOLE": whole,
                },
                warps,
            )
        )
    return Plan(launches, at)


def _dense(op: str, items: Sequence[Item]) -> Plan:
    at = 0
    for item in items:
        at = _place(item, at, {"totals": _runs(item) * _SIZES[item.wide]})
    everything = range(len(items))
    classes = _classes(items, everything, lambda it: (it.param, it.grad, it.whole))
    if op == "smmf_dense_step_":
        launches = _look(items, everything)
        kernel, options = dense.smmf_dense, ("FIRST", "COUPLED", "NEGATE", "SKIP")
    else:
        kernel, options = dense.hfac_dense, ("CLIPPED", "NEGATE", "SKIP")
        launches = [
            Launch(
                dense.hfac_dense_look,
                _parts(items, mine, _runs),
                ("grads", "scalars", "flags"),
                ("LOOK",),
                {"G": TYPES[grad], "T": TYPES[_wide(param)], "WHOLE": whole},
                when=("CLIPPED", "SKIP"),
            )
            for (param, grad, whole), mine in classes.items()
        ]
    for (param, grad, whole), mine in classes.items():
        constants = {"W": TYPES[param], "G": TYPES[grad], "T": TYPES[_wide(param)], "WHOLE": whole}
        launches.append(Launch(kernel, _parts(items, mine, _runs), ("grads", "scalars", "flags"), options, constants))
    return Plan(launches, at)


def _wide(param: torch.dtype) -> torch.dtype:
    return torch.float64 if param == torch.float64 else torch.float32


def merged_layout(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """{dimensions, then size and stride of each}, the last dimension first, neighbours that lie as one made one."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = dims[-1][0] * size, dims[-1][1]
        else:
            dims.append((size, stride))
    return [len(dims), *(x for pair in dims for x in pair)]


def square_slice(shape: Sequence[int]) -> int:
    """Elements of one slice of the first dimension."""
    return math.prod(shape[1:])
