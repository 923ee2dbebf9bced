"""From shapes, types and layouts to launches: which kernel runs over which tiles, in which order.

The tiling is a function of the shape alone, and nothing is tuned at run time: the order of every sum is fixed.
"""

import itertools
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
        owner: of SMMF's parts, whose matrices are blocks: the parameter that the block is of.
        start, stride, row, row_step, col: the block's place (`hfac.matricize.Block`).
        all_rows, all_cols: of the whole matrix, where this is a part; 0 where it is none.
        stochastic: how its random bits are made (`table.NEAREST` and so on).
        low: bits of the lower piece of its master weight; 0 where it has none.
    """

    rows: int
    cols: int
    param: torch.dtype
    grad: torch.dtype
    whole: bool = True
    slice: int = 0
    owner: int = 0
    start: int = 0
    stride: int = 0
    row: int = 0
    row_step: int = 1
    col: int = 0
    all_rows: int = 0
    all_cols: int = 0
    stochastic: int = table.NEAREST.value
    low: int = 0
    tile_rows: int = 0
    row_tiles: int = 0
    col_tiles: int = 0
    blocks: int = 0  # from this one on, of its owner
    spaces: dict[str, int] = field(default_factory=dict)  # name -> bytes from the start of the workspace

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.param == torch.float64 else torch.float32

    @property
    def stored(self) -> tuple[int, int]:
        """How a new weight is stored, for which kernels are compiled."""
        return self.stochastic, self.low

    @property
    def signs(self) -> int:
        if not self.slice:
            return table.NO_SIGNS.value
        if self.slice == 1:
            return table.BYTE_PER_ELEMENT.value
        whole = all(length % 8 == 0 for length in (self.cols, self.slice, self.start, self.stride))
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


def dense_warps(kernel: Any, whole: bool, stochastic: int, low: int) -> int:
    """Of a step with whole moments: a lane has 8 elements of a run, or 4 where each of them has two addresses or random
    bits of its own. H-Fac's norm of what is a float32 in two pieces is summed as a float32's."""
    plain = not (stochastic or low) or (low == 16 and kernel is dense.hfac_dense)
    return 8 if whole or plain else 16


def compile_options(constants: dict[str, Any], warps: int, maker: str) -> dict[str, Any]:
    """What Triton is told besides: for GPUs of ``maker``, "cuda", "hip" or another.

    A bound on registers lets two programs of 256 lanes run on a multiprocessor; without one ptxas aims at three of some
    kernels and parks registers in memory. A wave of AMD's has 64 lanes.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if maker == "cuda":
        options["maxnreg"] = 2 * REGISTERS - 32 if constants.get("T") == tl.float64 else REGISTERS
    if maker == "hip":
        options["num_warps"] = max(1, warps // 2)
    return options


@dataclass
class Plan:
    """What a step launches.

    Attributes:
        workspace: bytes.
        statistics: the first so many launches are H-Fac's statistics.
        squares: launches between them and the rest for whoever asks for the gradients' sums of squares.
    """

    launches: list[Launch]
    workspace: int
    statistics: int = 0
    squares: list[Launch] = field(default_factory=list)


def make_plan(op: str, items: Sequence[Item]) -> Plan:
    """Launches of one op; sets each item's tiling and spaces."""
    return _dense(op, items) if "dense" in op else _MAKERS[op](items)


def _cut(item: Item) -> None:
    """Rows per tile: partial sums of columns cost 1/32 byte per element and statistic at 256 rows; smaller matrices,
    whose partial sums stay in the cache, take fewer, to make enough programs."""
    elements = item.rows * item.cols
    item.tile_rows = 64 if elements < 4 << 20 else 128 if elements < 16 << 20 else 256
    item.row_tiles = -(-item.rows // item.tile_rows)
    item.col_tiles = -(-item.cols // _fit(HFAC_TILES, item)[1])


def _fit(shapes: tuple[Shape, ...], item: Item, fewer: int = 2) -> Shape:
    """The first that holds the item's columns, else the last; with fewer rows in flight where every element's address
    takes registers of its own, and fewer still where its random bits do. A lower piece of 16 bits changes nothing: sums
    have the order that they have for a float32."""
    rows, cols, warps = next((shape for shape in shapes if item.cols <= shape[1]), shapes[-1])
    if item.stochastic == table.EACH.value:
        fewer *= 2
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
            ("grads", "scalars", "flags"),
            ("SCALED",),
            {"G": TYPES[grad], "T": TYPES[wide], "WHOLE": whole},
            when=("LOOK",),
        )
        for (grad, wide, whole), mine in _classes(items, indices, lambda it: (it.grad, it.wide, it.whole)).items()
    ]


def _smmf(items: Sequence[Item]) -> Plan:
    groups, workspace = _smmf_groups(items)
    launches = []
    for group in groups:
        launches += _look(items, group)
        launches += _smmf_tiles(items, group, False)
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


def _smmf_sums(items: Sequence[Item]) -> Plan:
    """Parts: items are blocks, those of one parameter behind each other."""
    groups, workspace = _smmf_groups(items)
    launches = []
    for group in groups:
        launches += _smmf_tiles(items, group, True)
        for (wide,), mine in _classes(items, group, lambda it: (it.wide,)).items():
            tiles = []
            for _, blocks in itertools.groupby(mine, lambda i: items[i].owner):
                first, *others = blocks
                items[first].blocks = 1 + len(others)
                touched = sorted({chunk for i in (first, *others) for chunk in _chunks_touched(items[i])})
                tiles += [(first, chunk) for chunk in touched]
            launches.append(Launch(smmf.smmf_part_fold, tiles, (), ("FIRST",), {"T": TYPES[wide]}, 4))
    return Plan(launches, workspace)


def _smmf_groups(items: Sequence[Item]) -> tuple[list[list[int]], int]:
    """Tilings and spaces, the groups that share a workspace, and its bytes."""
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
    return groups, workspace


def _smmf_tiles(items: Sequence[Item], group: Sequence[int], part: bool) -> list[Launch]:
    classes = _classes(
        items, group, lambda it: (it.param, it.grad, it.whole, it.stored, it.signs, _fit(SMMF_TILES, it))
    )
    return [
        Launch(
            smmf.smmf_tiles,
            _parts(items, mine, lambda it: it.row_tiles * it.col_tiles),
            ("grads", "scalars", "flags", "watched"),
            ("COUPLED", "NEGATE", "SKIP", "SCALED", "WATCH"),
            {
                "W": TYPES[param],
                "G": TYPES[grad],
                "T": TYPES[_wide(param)],
                "R": rows,
                "C": cols,
                "WHOLE": whole,
                "LAYOUT": signs,
                "PART": part,
                "STOCHASTIC": stochastic,
                "LOW": low,
            },
            warps,
        )
        for (param, grad, whole, (stochastic, low), signs, (rows, cols, warps)), mine in classes.items()
    ]


def _chunks_touched(block: Item) -> set[int]:
    """Of the whole's rows and columns, those that a block adds to."""
    last_row = block.row + (block.rows - 1) * block.row_step
    return {
        chunk
        for first, last in ((block.row, last_row), (block.col, block.col + block.cols - 1))
        for chunk in range(first // table.CHUNK.value, last // table.CHUNK.value + 1)
    }


def _hfac(items: Sequence[Item]) -> Plan:
    at = 0
    for item in items:
        _cut(item)
        at = _place(item, at, _row_sizes(item) | _col_sum_sizes(item) | _col_sizes(item) | _total_sizes(item))
    statistics = _hfac_stats(items, True)
    launches, squares = [], []
    for (wide,), mine in _classes(items, range(len(items)), lambda it: (it.wide,)).items():
        shares = _parts(items, mine, lambda it: _chunks(it.cols))
        squares.append(Launch(hfac.hfac_squares, shares, (), (), {"T": TYPES[wide]}, 4))
        for kernel, count, options in (
            (hfac.hfac_fold, lambda it: _chunks(max(it.rows, it.cols)), ("NEGATE", "SKIP", "WATCH")),
            (hfac.hfac_scale, lambda it: _chunks(it.rows), ("CLIPPED", "SKIP", "WATCH")),
        ):
            tiles = _parts(items, mine, count)
            memory = ("scalars", "flags", "watched")
            launches.append(Launch(kernel, tiles, memory, options, {"T": TYPES[wide]}, 4))
    if squares:
        sums = _parts(items, range(len(items)), lambda it: min(it.rows * it.cols, 1))
        squares.append(Launch(hfac.hfac_add_squares, sums, ("squares",), (), {}, 4))
    return Plan([*statistics, *launches, *_hfac_updates(items)], at, len(statistics), squares)


def _hfac_sums(items: Sequence[Item]) -> Plan:
    """The rows' sums go where the caller has them, so the workspace is the columns'."""
    at = 0
    for item in items:
        _cut(item)
        at = _place(item, at, _col_sum_sizes(item))
    launches = _hfac_stats(items, True)
    for (wide,), mine in _classes(items, range(len(items)), lambda it: (it.wide,)).items():
        tiles = _parts(items, mine, lambda it: _chunks(it.cols))
        launches.append(Launch(hfac.hfac_part_cols, tiles, (), (), {"T": TYPES[wide]}, 4))
    return Plan(launches, at)


def _hfac_row_sums(items: Sequence[Item]) -> Plan:
    for item in items:
        _cut(item)
    return Plan(_hfac_stats(items, False), 0)


def _hfac_apply(items: Sequence[Item]) -> Plan:
    at = 0
    for item in items:
        _cut(item)
        at = _place(item, at, _row_sizes(item) | _col_sizes(item))
    launches = []
    # Moments go on where only they are there, too.
    for wide in dict.fromkeys(item.wide for item in items):
        tiles = [
            (i, chunk)
            for i, item in enumerate(items)
            if item.wide == wide
            for chunk in range(_chunks(max(item.rows, item.cols)))
        ]
        if tiles:
            options = ("NEGATE", "CLIPPED")
            launches.append(Launch(hfac.hfac_part_fold, tiles, ("scalars",), options, {"T": TYPES[wide]}, 4))
    return Plan(launches + _hfac_updates(items), at)


def _row_sizes(item: Item) -> dict[str, int]:
    return {name: item.rows * _SIZES[item.wide] for name in ("rows", "squares")}


def _col_sum_sizes(item: Item) -> dict[str, int]:
    return {"cols": (3 * item.cols + 1) * item.row_tiles * _SIZES[item.wide]}


def _col_sizes(item: Item) -> dict[str, int]:
    return {name: item.cols * _SIZES[item.wide] for name in ("psi", "scale")}


def _total_sizes(item: Item) -> dict[str, int]:
    return {"totals": 16 * _chunks(max(item.rows, item.cols))}


def _hfac_stats(items: Sequence[Item], columns: bool) -> list[Launch]:
    def stats_shape(item: Item) -> tuple[Shape, bool]:
        wide = item.cols > STATS[-1][1]
        return _fit(HFAC_TILES if wide else STATS, item, 4), wide

    classes = _classes(items, range(len(items)), lambda it: (it.param, it.grad, it.whole, stats_shape(it)))
    merged: dict[tuple[Any, ...], list[int]] = {}
    for (param, *key), mine in classes.items():
        merged.setdefault((_wide(param), *key), []).extend(mine)
    return [
        Launch(
            hfac.hfac_stats,
            _parts(items, mine, lambda it: it.row_tiles),
            ("grads", "scalars", "flags"),
            ("LOOK", "SCALED", "AGAIN", "WATCH"),
            {
                "G": TYPES[grad],
                "T": TYPES[wide],
                "R": rows,
                "C": cols,
                "WHOLE": whole,
                "WIDE": twice,
                "COLUMNS": columns,
            },
            warps,
        )
        for (wide, grad, whole, ((rows, cols, warps), twice)), mine in merged.items()
    ]


def _hfac_updates(items: Sequence[Item]) -> list[Launch]:
    launches = []
    classes = _classes(
        items, range(len(items)), lambda it: (it.param, it.grad, it.whole, it.stored, _fit(HFAC_TILES, it))
    )
    for (param, grad, whole, (stochastic, low), (rows, cols, warps)), mine in classes.items():
        tiles = _parts(items, mine, lambda it: it.row_tiles * it.col_tiles)
        tiles.reverse()  # what was read last is the likeliest to be in the cache still
        constants = {"W": TYPES[param], "G": TYPES[grad], "T": TYPES[_wide(param)], "R": rows, "C": cols}
        constants |= {"WHOLE": whole, "STOCHASTIC": stochastic, "LOW": low}
        memory = ("grads", "scalars", "flags", "watched")
        options = ("NEGATE", "SKIP", "SCALED", "WATCH")
        launches.append(Launch(hfac.hfac_update, tiles, memory, options, constants, warps))
    return launches


def _dense(op: str, items: Sequence[Item]) -> Plan:
    at = 0
    for item in items:
        at = _place(item, at, {"totals": _runs(item) * _SIZES[item.wide]})
    everything = range(len(items))
    classes = _classes(items, everything, lambda it: (it.param, it.grad, it.whole))
    if op == "smmf_dense_step_":
        launches = _look(items, everything)
        kernel, options = dense.smmf_dense, ("FIRST", "COUPLED", "NEGATE", "SKIP", "SCALED", "WATCH")
    else:
        kernel, options = dense.hfac_dense, ("CLIPPED", "NEGATE", "SKIP", "SCALED", "WATCH")
        launches = [
            Launch(
                dense.hfac_dense_look,
                _parts(items, mine, _runs),
                ("grads", "scalars", "flags"),
                ("LOOK", "SCALED"),
                {"G": TYPES[grad], "T": TYPES[_wide(param)], "WHOLE": whole},
                when=("CLIPPED", "LOOK"),
            )
            for (param, grad, whole), mine in classes.items()
        ]
    stored = _classes(items, everything, lambda it: (it.param, it.grad, it.whole, it.stored))
    for (param, grad, whole, (stochastic, low)), mine in stored.items():
        constants = {"W": TYPES[param], "G": TYPES[grad], "T": TYPES[_wide(param)], "WHOLE": whole}
        constants |= {"STOCHASTIC": stochastic, "LOW": low}
        warps = dense_warps(kernel, whole, stochastic, low)
        tiles = _parts(items, mine, _runs)
        memory = ("grads", "scalars", "flags", "watched")
        launches.append(Launch(kernel, tiles, memory, options, constants, warps))
    return Plan(launches, at)


_MAKERS: dict[str, Callable[[Sequence[Item]], Plan]] = {
    "smmf_step_": _smmf,
    "hfac_step_": _hfac,
    "hfac_sums": _hfac_sums,
    "hfac_row_sums": _hfac_row_sums,
    "hfac_apply_": _hfac_apply,
    "smmf_sums_step_": _smmf_sums,
}


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


def bits_of(layout: Sequence[int], first: int, whole: bool) -> int:
    """How the random bits of a tensor are made, the first of whose elements has this index and whose others follow from
    this layout; ``whole``: rows and runs are whole vectors of 8."""
    dims, *pairs = layout
    steps = [stride for stride in pairs[1::2]]
    if not whole or first % 8 or steps[:1] not in ([], [1]) or any(n % 8 for n in (*pairs[:1], *steps[1:])):
        return table.EACH.value
    return (table.EIGHT_APART if dims > 1 else table.EIGHT).value


def square_slice(shape: Sequence[int]) -> int:
    """Elements of one slice of the first dimension."""
    return math.prod(shape[1:])
