"""What a plan knows of one parameter, and how it is cut into tiles.

The tiling is a function of the shape alone, but for how many rows a tile of H-Fac's statistics has in lists so long
that their partial sums would take too much memory, or so short that most of a GPU would be idle (`plan`).
"""

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import torch
import triton.language as tl

from . import layouts, table

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}

Shape = tuple[int, int, int]

#: (rows in flight, columns, warps) of a tile: 8 elements per lane for SMMF and for H-Fac's codes, which need many
#: registers for each, 16 for H-Fac. One warp holds whole rows of the tile, so that their sums need no shared memory: of
#: 32 bits a lane holds 4 neighbours, and a row is half as long. Where elements are read one by one a warp's lanes hold
#: neighbours, and the wider a tile is the more of a row's elements are a lane's own. Of narrow rows of 32 bits a lane
#: has 4 elements: with 8 of them, Triton 3.9 spills registers. All rows whose signs are a byte each, those of vectors,
#: are cut so, because there it spills in the wider tile, too.
SMMF_TILES = ((32, 64, 8), (8, 256, 8))
SMMF_32_BITS = ((16, 64, 8), (16, 128, 8))
SMMF_ANY = (*SMMF_TILES, (2, 1024, 8))
NARROW, BROAD = HFAC_TILES = ((64, 64, 8), (16, 256, 8))
#: Of H-Fac's statistics, which hold whole rows: up to 1024 columns one warp does, beyond that all of a program's. Rows
#: beyond the last are read a second time. The more neighbours of a long row a lane has, the fewer lanes meet for its
#: sums: 16, but of aligned rows of 32 bits that are bound by bytes 8, of which more warps wait for memory. Of 64 bits a
#: lane can hold half as many, and half as many rows are in flight. All lanes of a tile compute, those beyond the last
#: column for nothing.
STATS = (NARROW, BROAD, (8, 512, 8), (8, 1024, 8), (4, 2048, 8), (2, 4096, 8))
STATS_32_BITS = (*STATS[:-1], (2, 4096, 16))
STATS_64_BITS = (NARROW, (8, 256, 8), (4, 512, 8), (4, 1024, 8), (2, 2048, 8), (1, 4096, 8))
#: Columns of the tiles that matrices of so many elements and more have; for smaller ones the next wider tile does, as a
#: launch of their own would take longer than the lanes that it saves.
FINER, FINE = (512, 2048), 2 << 20
FEWEST_ROWS = 16


@dataclass
class Item:
    """One record: a parameter, or a block of an SMMF shard. What is named as a field of `table` is written to it.

    Attributes:
        rows, cols: the matrix; of whole moments: the elements and 1.
        slice: elements of one slice along the first dimension; 0 without signs.
        whole: contiguous and aligned, but perhaps for the gradient; rows and runs in whole vectors of 8.
        aligned: bytes of which the address of a whole item's gradient is a multiple: 16, 4 or those of an element.
        owner: of a block: the index of its parameter.
        start, stride, row, row_step, col: where the block lies (`hfac.matricize.Block`).
        all_rows, all_cols: of the whole matrix, where this is a shard; else 0.
        stochastic: how its random bits are drawn (`table.NEAREST` and so on).
        low: low bits of its master weight that are stored apart; 0: none.
        codes: H-Fac's first moment is in codes of 8 bits.
        tile_rows, row_tiles, col_tiles, stats_rows, blocks: set by `make_plan`, see `table`.
        spaces: where its partial sums begin in the workspace, in bytes, by field; set by `make_plan`.
    """

    rows: int
    cols: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
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
    codes: bool = False
    aligned: int = 16
    tile_rows: int = field(default=0, init=False)
    row_tiles: int = field(default=0, init=False)
    col_tiles: int = field(default=0, init=False)
    stats_rows: int = field(default=0, init=False)
    blocks: int = field(default=0, init=False)
    spaces: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def elements(self) -> int:
        return self.rows * self.cols

    @property
    def signs(self) -> int:
        if not self.slice:
            return table.NO_SIGNS.value
        if self.slice == 1:
            return table.BYTE_PER_ELEMENT.value
        whole = all(length % 8 == 0 for length in (self.cols, self.slice, self.start, self.stride))
        return (table.WHOLE_BYTES if whole else table.SHARED_BYTES).value

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for; each takes those that its signature names."""
        return {
            "W": TYPES[self.dtype],
            "G": TYPES[self.grad_dtype],
            "T": TYPES[self.wide],
            "WHOLE": self.whole,
            "ALIGNED": self.aligned if self.whole else 16,
            "LAYOUT": self.signs,
            "STOCHASTIC": self.stochastic,
            "LOW": self.low,
            "CODES": self.codes,
            "ROUGH": not self.low and self.dtype.itemsize == 2,
            "WIDE": self.cols > STATS[-1][1],
        }

    def record(self) -> list[int]:
        """Its record, but for addresses; its workspace begins at 0."""
        values = {
            **{name: value for name, value in vars(self).items() if name in table.FIELD},
            "slice_bytes": -(-self.slice // 8),
            "slice_factor": layouts.factor_of(self.slice, self.start + self.rows * (self.stride or self.cols)),
            "all_rows": self.all_rows or self.rows,
            "all_cols": self.all_cols or self.cols,
            **self.spaces,
        }
        return [values.get(name, 0) for name in table.FIELD]


#: What a plan depends on of an item, in the order of its arguments.
KEY = attrgetter(*(one.name for one in fields(Item) if one.init))


def cut_stats(item: Item) -> None:
    """Of H-Fac's statistics a program takes whole rows, so that a matrix has no more programs than tiles of rows, each
    of which leaves three sums of every column: 12 bytes for as many elements as it has rows."""
    least = 64 if item.elements < 32 << 20 else 128
    item.stats_rows = max(least, min(256, 1 << max(0, (item.rows // 64).bit_length() - 1)))
    item.row_tiles = -(-item.rows // item.stats_rows)


def recut_stats(item: Item, times: float) -> bool:
    """Tiles of so many times as many rows, but of no fewer than are in flight, and than 16: sums of columns would be
    nearly as many as elements. Returns whether there are others now."""
    before = item.stats_rows
    item.stats_rows = max(int(before * times), stats_shape(item)[0], FEWEST_ROWS)
    item.row_tiles = -(-item.rows // item.stats_rows)
    return item.stats_rows != before


def stats_shape(item: Item) -> Shape:
    if item.constants["WIDE"]:
        return fit(HFAC_TILES, item, 4)
    shapes = STATS
    if item.wide == torch.float64:
        shapes = STATS_64_BITS
    elif item.grad_dtype == torch.float32 and item.constants["ALIGNED"] == 16:
        shapes = STATS_32_BITS
    return fit(tuple(x for x in shapes if item.elements >= FINE or x[1] not in FINER), item, 4)


def smmf_shapes(item: Item) -> tuple[Shape, ...]:
    """A weight of 16 bits with 16 low bits steps as the float32 does, with the same sums."""
    if not item.whole:
        return SMMF_ANY
    if item.dtype != torch.float32 and item.low != 16:
        return SMMF_TILES
    return SMMF_32_BITS[:1] if item.signs == table.BYTE_PER_ELEMENT.value else SMMF_32_BITS


def cut(item: Item, shapes: tuple[Shape, ...]) -> None:
    """A tile's columns are those of its shape. Of its rows partial sums of columns cost 1/32 byte per element and
    statistic at 256; smaller matrices, whose partial sums stay in the cache, take fewer, to make enough programs."""
    item.tile_rows = 64 if item.elements < 4 << 20 else 128 if item.elements < 16 << 20 else 256
    item.row_tiles = -(-item.rows // item.tile_rows)
    item.col_tiles = -(-item.cols // fit(shapes, item)[1])


def fit(shapes: tuple[Shape, ...], item: Item, fewer: int = 2) -> Shape:
    """The first that holds the item's columns, else the last; with fewer rows in flight where every element's address
    takes registers of its own, and fewer still where its random bits do. Sixteen low bits change nothing: sums have the
    order that they have for a float32."""
    rows, cols, warps = next((shape for shape in shapes if item.cols <= shape[1]), shapes[-1])
    if item.stochastic == table.EACH.value:
        fewer *= 2
    return rows if item.whole else max(1, rows // fewer), cols, warps


def held(rows: int, cols: int, warps: int, wide: bool) -> dict[str, int]:
    """How a tile of the statistics lies in lanes that hold 8 neighbours of 16 bits: PIECES of each row that are a
    lane's own, and how many rows are APART, different lanes'; of those that are not, a lane adds up its own. Of rows of
    256 a warp holds two, so that what is done once for a row is done for both."""
    pieces = cols // 256 if 256 < cols <= 1024 else 2 if cols == 256 and not wide else max(1, cols // (256 * warps))
    apart = 1 if cols > 1024 else 256 * warps // max(1, cols // pieces)
    return {"PIECES": pieces, "APART": min(max(1, rows), apart)}
