"""From shapes, types and layouts to launches: which kernel runs over which tiles, in which order.

How a parameter is cut into tiles depends on its shape (`items`), and nothing is tuned at run time: the order of every
sum is fixed.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton.language as tl

from . import dense, hfac, hfac_folds, smmf, table
from .items import HFAC_TILES, SMMF_TILES, Item, Shape, cut, cut_stats, fit, held, recut_stats, smmf_shapes, stats_shape

#: Of a lane, and of a multiprocessor.
REGISTERS, ALL_REGISTERS = 128, 1 << 16
#: Bytes that partial sums may take. A longer list of SMMF is taken in groups that share them; one of H-Fac, whose sums
#: are all needed at once where the norm of all gradients clips, in fewer tiles of more rows.
WORKSPACE, HFAC_WORKSPACE = 96 << 20, 128 << 20
#: Programs that a list's statistics are cut into where they can: one for each multiprocessor of a large GPU. More would
#: leave more sums than the fold adds up in the time that they save.
ENOUGH = 128


@dataclass
class Launch:
    """A kernel over tiles.

    Attributes:
        constants: compile-time arguments that follow from the items.
        when: it runs only where one of these options is on; always, where there are none.
        memory, options: names of its other arguments (`table.MEMORY`); of compile-time arguments that come with a step.
        compiled: what earlier launches have compiled (`launcher`), by what they were compiled for.
    """

    kernel: Any
    tiles: list[tuple[int, int]]
    constants: dict[str, Any]
    warps: int = 8
    when: tuple[str, ...] = ()
    compiled: dict[tuple[Any, ...], Callable[..., None]] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        names = self.kernel.arg_names
        self.memory = tuple(name for name in names if name in table.MEMORY)
        self.options = tuple(name for name in names if name not in table.MEMORY and name not in self.constants)

    @property
    def name(self) -> str:
        return self.kernel.__name__ if hasattr(self.kernel, "__name__") else self.kernel.fn.__name__


def compile_options(constants: dict[str, Any], warps: int, maker: str) -> dict[str, Any]:
    """Triton's own options of a launch, for GPUs of ``maker``: "cuda", "hip" or another.

    A bound on registers lets two programs of 256 lanes run on a multiprocessor; without one ptxas aims at three of some
    kernels and spills registers. A lane that holds the sums of several pieces of a row, of a long one of 32 bits, or of
    two pieces of a long one whose gradients it divides, or that loads misaligned gradients for them, has twice as many,
    and one program runs. AMD's waves have 64 lanes, and programs half as many of them; where a lane's elements are each
    of another row, a bit of every row for all lanes would be more than a wave can hold, and there are as many.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if maker == "cuda":
        pieces = constants.get("PIECES", 0)  # of H-Fac's statistics alone
        many = constants.get("T") == tl.float64 or pieces > 2
        if pieces > 0 and constants["C"] > 1024:
            many = many or constants["G"] == tl.float32 or (pieces > 1 and constants.get("SCALED", False))
        options["maxnreg"] = 2 * REGISTERS - 32 if many else REGISTERS
        if pieces > 0 and warps <= 8 and constants["ALIGNED"] < 16:
            options["maxnreg"] = 2 * REGISTERS - 1  # the most that a lane can have
        options["maxnreg"] = min(options["maxnreg"], ALL_REGISTERS // (32 * warps))
    if maker == "hip":
        scattered = constants.get("WIDE", False) and constants["WHOLE"] and constants["ALIGNED"] < 16
        options["num_warps"] = warps if scattered else max(1, warps // 2)
    return options


@dataclass
class Plan:
    """What a step launches.

    Attributes:
        workspace: bytes.
        statistics: the first so many launches are H-Fac's statistics.
        squares: launches after these, and after no others, where the gradients' sums of squares are asked for.
    """

    launches: list[Launch]
    workspace: int
    statistics: int = 0
    squares: list[Launch] = field(default_factory=list)


def make_plan(op: str, items: Sequence[Item]) -> Plan:
    """Launches of one op; sets each item's tiling and spaces."""
    return MAKERS[op](items)


def prepare(op: str, items: Sequence[Item], device: torch.device) -> tuple[Plan, torch.Tensor, list[torch.Tensor]]:
    """The plan; records without addresses, on the host; and a table of tiles for each launch (and each of ``squares``)
    on the device, alike aligned, so that no launch compiles its kernel anew."""
    plan = make_plan(op, items)
    records = torch.tensor([item.record() for item in items], dtype=torch.int64, device="cpu")
    tiles = [torch.tensor(one.tiles, dtype=torch.int32, device="cpu") for one in (*plan.launches, *plan.squares)]
    return plan, records, [table.to(device) for table in tiles]


def _launches(
    kernel: Any,
    items: Sequence[Item],
    count: Callable[[Item], int],
    *,
    of: Iterable[int] | None = None,
    shape: Callable[[Item], Shape] | None = None,
    warps: int = 4,
    when: tuple[str, ...] = (),
    empty: bool = False,
    **fixed: Any,
) -> list[Launch]:
    """Launches of a kernel: one for each set of constants that it is compiled for, in the order of their first items.

    Args:
        count: programs of an item.
        of: indices of the items that take part, instead of all.
        shape: rows and columns of a tile, where the kernel has them, and warps.
        warps: of a kernel without a shape.
        when: as of `Launch`.
        empty: items without elements take part, too.
        fixed: more constants.
    """
    found: dict[tuple[Any, ...], Launch] = {}
    for i in range(len(items)) if of is None else of:
        if not (items[i].elements or empty):
            continue
        rows, cols, warps = (0, 0, warps) if shape is None else shape(items[i])
        given = (
            items[i].constants | {"R": rows, "C": cols} | held(rows, cols, warps, items[i].constants["WIDE"]) | fixed
        )
        constants = {name: given[name] for name in kernel.arg_names if name in given}
        key = warps, *constants.values()
        if key not in found:
            found[key] = Launch(kernel, [], constants, warps, when)
        found[key].tiles += [(i, index) for index in range(count(items[i]))]
    return [launch for launch in found.values() if launch.tiles]


def _reserve(item: Item, at: int, sizes: dict[str, int]) -> int:
    """Gives the item room for partial sums from this byte of the workspace on, and returns where it ends."""
    for name, nbytes in sizes.items():
        item.spaces[name] = at
        at += -(-nbytes // 16) * 16
    return at


def _chunks(length: int) -> int:
    return -(-length // table.CHUNK.value)


def _runs(item: Item, length: int = table.RUN.value) -> int:
    return -(-item.elements // length)


def _tiles(item: Item) -> int:
    return -(-item.rows // item.tile_rows) * item.col_tiles


def _look(items: Sequence[Item], of: Iterable[int] | None = None) -> list[Launch]:
    return _launches(dense.look, items, lambda item: _runs(item, table.LOOKED.value), of=of, warps=8, when=("LOOK",))


def _squares(items: Sequence[Item], of: Iterable[int] | None = None) -> list[Launch]:
    shares = _launches(dense.run_squares, items, lambda item: _runs(item, table.LOOKED.value), of=of, warps=8)
    return shares + _launches(dense.add_squares, items, lambda item: 1, of=of, OF_RUNS=True)


def _smmf(items: Sequence[Item]) -> Plan:
    groups, workspace = _smmf_groups(items)
    launches, squares = [], []
    for group in groups:
        squares += _squares(items, group)
        launches += _look(items, group)
        launches += _smmf_tiles(items, group, False)
        launches += _launches(smmf.smmf_fold, items, lambda item: _chunks(item.rows), of=group)
        launches += _launches(smmf.smmf_normalize, items, lambda item: _chunks(item.cols), of=group)
    return Plan(launches, workspace, squares=squares)


def _smmf_sums(items: Sequence[Item]) -> Plan:
    """Shards: items are blocks, those of one parameter behind each other."""
    groups, workspace = _smmf_groups(items)
    launches = []
    for group in groups:
        launches += _smmf_tiles(items, group, True)
        for launch in _launches(smmf.smmf_shard_fold, items, lambda item: 1, of=group, warps=8):
            tiles = []
            for _, blocks in itertools.groupby((i for i, _ in launch.tiles), lambda i: items[i].owner):
                first, *others = blocks
                items[first].blocks = 1 + len(others)
                touched = sorted({chunk for i in (first, *others) for chunk in _chunks_touched(items[i])})
                tiles += [(first, chunk) for chunk in touched]
            launch.tiles = tiles
            launches.append(launch)
    return Plan(launches, workspace)


def _smmf_groups(items: Sequence[Item]) -> tuple[list[list[int]], int]:
    """Tilings and spaces, the groups that share a workspace, and its bytes."""
    groups: list[list[int]] = []
    at = workspace = 0
    for i, item in enumerate(items):
        cut(item, smmf_shapes(item))
        size = item.wide.itemsize
        sizes = {
            "space_rows": 2 * item.col_tiles * item.rows * size,
            "space_cols": 2 * item.row_tiles * item.cols * size,
            "space_totals": max(2 * _chunks(item.rows) * size, 16 * _runs(item, table.LOOKED.value)),
        }
        end = _reserve(item, at, sizes)
        if not groups or end > WORKSPACE:
            groups.append([])
            end = _reserve(item, 0, sizes)
        groups[-1].append(i)
        at = end
        workspace = max(workspace, end)
    return groups, workspace


def _smmf_tiles(items: Sequence[Item], group: Sequence[int], shard: bool) -> list[Launch]:
    return _launches(
        smmf.smmf_tiles, items, _tiles, of=group, shape=lambda item: fit(smmf_shapes(item), item), SHARD=shard
    )


def _chunks_touched(block: Item) -> set[int]:
    """Of the whole's rows and columns, those that a block adds to."""
    last_row = block.row + (block.rows - 1) * block.row_step
    sides, size = ((block.row, last_row), (block.col, block.col + block.cols - 1)), table.CHUNK.value
    return {chunk for first, last in sides for chunk in range(first // size, last // size + 1)}


def _hfac_spaces(items: Sequence[Item], *names: str) -> int:
    """Tilings, and the spaces of these names; returns the workspace's bytes."""
    for item in items:
        cut(item, HFAC_TILES)
        cut_stats(item)
    while sum(item.row_tiles for item in items) < ENOUGH:
        if not any([recut_stats(item, 0.5) for item in items]):
            break
    while (end := _hfac_reserve(items, names)) > HFAC_WORKSPACE and any(item.row_tiles > 1 for item in items):
        for item in items:
            recut_stats(item, 2)
    return end


def _hfac_reserve(items: Sequence[Item], names: Sequence[str]) -> int:
    at = 0
    for item in items:
        size, chunks = item.wide.itemsize, _chunks(max(item.rows, item.cols))
        sizes = {
            "space_rows": item.rows * size,
            "space_squares": item.rows * size,
            "space_cols": (3 * item.cols + 1) * item.row_tiles * size,
            "space_psi": item.cols * size,
            "space_scale": item.cols * size,
            "space_totals": 24 * chunks + 8 if item.codes else 16 * chunks,
        }
        at = _reserve(item, at, {name: sizes[name] for name in names})
    return at


def _hfac(items: Sequence[Item]) -> Plan:
    spaces = "space_rows", "space_squares", "space_cols", "space_psi", "space_scale", "space_totals"
    workspace = _hfac_spaces(items, *spaces)
    statistics = _hfac_stats(items, True)
    squares = _launches(hfac_folds.hfac_squares, items, lambda item: _chunks(item.cols))
    squares += _launches(dense.add_squares, items, lambda item: 1, OF_RUNS=False)
    folds = _launches(hfac_folds.hfac_fold, items, lambda item: _chunks(max(item.rows, item.cols)), warps=16)
    folds += _launches(hfac_folds.hfac_scale, items, lambda item: _chunks(item.rows))
    return Plan([*statistics, *folds, *_hfac_updates(items)], workspace, len(statistics), squares)


def _hfac_sums(items: Sequence[Item], columns: bool = True) -> Plan:
    """The rows' sums go where the caller has them, so the workspace is the columns'."""
    workspace = _hfac_spaces(items, *["space_cols"] * columns)
    sums = _launches(hfac_folds.hfac_shard_cols, items, lambda item: _chunks(item.cols), warps=16) if columns else []
    return Plan([*_hfac_stats(items, columns), *sums], workspace)


def _hfac_apply(items: Sequence[Item]) -> Plan:
    more = ["space_totals"] * any(item.codes for item in items)
    workspace = _hfac_spaces(items, "space_rows", "space_squares", "space_psi", "space_scale", *more)
    # A shard without elements still has moments of rows or columns.
    folds = _launches(hfac_folds.hfac_shard_fold, items, lambda item: _chunks(max(item.rows, item.cols)), empty=True)
    return Plan([*folds, *_hfac_updates(items)], workspace)


def _hfac_stats(items: Sequence[Item], columns: bool) -> list[Launch]:
    return _launches(hfac.hfac_stats, items, lambda item: item.row_tiles, shape=stats_shape, COLUMNS=columns)


def _hfac_updates(items: Sequence[Item]) -> list[Launch]:
    def shape(item: Item) -> Shape:
        rows, cols, warps = fit(SMMF_TILES if item.codes else HFAC_TILES, item)
        if item.low == 16 and not (item.whole or item.codes):  # of eight elements two addresses each are too many
            rows //= 2
        return rows, cols, warps

    launches = _launches(hfac.hfac_update, items, _tiles, shape=shape)
    for launch in launches:
        launch.tiles.reverse()  # what was read last is the likeliest to be in the cache still
    return launches


def _hfac_dense(items: Sequence[Item]) -> Plan:
    look = _launches(dense.hfac_dense_look, items, _runs, warps=8, when=("CLIPPED", "LOOK"))
    look += _launches(dense.hfac_dense_total, items, lambda item: 1, when=("CLIPPED",))
    return _dense(dense.hfac_dense, items, look)


def _smmf_dense(items: Sequence[Item]) -> Plan:
    return _dense(dense.smmf_dense, items, _look(items))


def _dense(kernel: Any, items: Sequence[Item], look: list[Launch]) -> Plan:
    def shape(item: Item) -> Shape:
        """A lane has 8 elements of a run, or 4 where each of them has two addresses or random bits of its own. H-Fac's
        norm of a float32 whose low bits are stored apart is summed as a float32's."""
        plain = not (item.stochastic or item.low) or (item.low == 16 and kernel is dense.hfac_dense)
        return 0, 0, 8 if item.whole or plain else 16

    at = 0
    for item in items:
        totals = (_runs(item) + 1) * item.wide.itemsize  # beside which the shares of `run_squares` are few
        at = _reserve(item, at, {"space_totals": totals})
    return Plan([*look, *_launches(kernel, items, _runs, shape=shape)], at, squares=_squares(items))


#: Plans of items, by op; of ``hfac_sums`` without lists of columns apart.
MAKERS: dict[str, Callable[[Sequence[Item]], Plan]] = {
    "smmf_step_": _smmf,
    "smmf_dense_step_": _smmf_dense,
    "hfac_step_": _hfac,
    "hfac_int8_step_": _hfac,
    "hfac_dense_step_": _hfac_dense,
    "hfac_sums": _hfac_sums,
    "hfac_row_sums": partial(_hfac_sums, columns=False),
    "hfac_apply_": _hfac_apply,
    "hfac_int8_apply_": _hfac_apply,
    "smmf_sums_step_": _smmf_sums,
}
