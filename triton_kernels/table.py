"""Layouts of what kernels and launches share in device memory: records of parameters, scalars of a step, reports.

Each parameter has one record of int64 fields. A field that holds an address is absolute; a kernel turns it into a
pointer with `element.pointer`. Kernels import all constants by name (Triton keys its cache of compiled kernels on such
globals, and would miss a change of ``table.ROWS``); the host finds fields in `FIELD`, by their names in lower case.
"""

from itertools import count

import triton.language as tl

from .. import spec

_field = count()


def _fields(number: int) -> list[tl.constexpr]:
    """The next fields of a record, in the order in which they lie."""
    return [tl.constexpr(next(_field)) for _ in range(number)]


#: address of the parameter; address of its layout (`layouts.packed_layout`)
PARAM, PARAM_LAYOUT = _fields(2)
#: the matrix; for whole moments: the elements and 1
ROWS, COLS = _fields(2)
#: addresses of the states. H-Fac: u, v, r, s. SMMF: r_M, c_M, r_V, c_V. Whole moments: in the row fields
FIRST_ROW, FIRST_COL, SECOND_ROW, SECOND_COL, SIGNS = _fields(5)
#: elements and bytes of one slice along the first dimension (`hfac.signs.pack_signs`), and what divides by the
#: elements (`layouts.factor_of`)
SLICE, SLICE_BYTES, SLICE_FACTOR = _fields(3)
#: tiling of the matrix; rows of a tile of H-Fac's statistics, of which there are ROW_TILES
TILE_ROWS, ROW_TILES, COL_TILES, STATS_ROWS = _fields(4)
#: addresses of partial sums, see each kernel; in a shard's record, lists that `hfac_sums` fills take the rows' place
SPACE_ROWS, SPACE_SQUARES, SPACE_COLS, SPACE_PSI, SPACE_SCALE, SPACE_TOTALS = _fields(6)
#: rows and columns of the whole matrix, of which a shard has some
ALL_ROWS, ALL_COLS = _fields(2)
#: addresses, of shards only. H-Fac: sums of g, of g^2 (or the new r and s) and of g^2 / r, then sum(r), the mean of U^2
#: and, of a first moment in codes, sum(r) before. SMMF: sums of |M| and of V over the whole matrix, to be added to
SUM_ROW, SUM_COL, NEW_ROW, NEW_COL, RATIO_COL, TOTAL, MEAN_SQUARE, OLD_TOTAL = _fields(8)
#: of SMMF's shards, whose matrices are blocks (`hfac.matricize.Block`): where the block begins in the shard, its
#: stride, and its position in the whole matrix. The state fields then hold the address of the block's first row or
#: column. BLOCKS: how many records from this one on are blocks of the same parameter
START, STRIDE, ROW, ROW_STEP, COL, BLOCKS = _fields(6)
#: addresses of a master weight's low bits and of their layout
LOW_BITS, LOW_LAYOUT = _fields(2)
#: addresses of a first moment's codes of 8 bits (`hfac.codes`) and of their layout
CODES_AT, CODES_LAYOUT = _fields(2)
#: of random bits (`hfac.rounding.BitOffset`): the parameter's position, the index of its first element, and the address
#: of the layout that gives the others' indices
POSITION, FIRST_INDEX, INDEX_LAYOUT = _fields(3)

FIELD: dict[str, int] = {name.lower(): at.value for name, at in list(globals().items()) if isinstance(at, tl.constexpr)}
FIELDS = tl.constexpr(len(FIELD))

#: Scalars of a step, in float64. Those that parameters may each have for themselves stand from OWN on: once for all,
#: then once for each parameter.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
EPS = tl.constexpr(2)
CLIP = tl.constexpr(3)
PER_PARAM = tl.constexpr(4)  # 1 where each parameter has its own
SEED = tl.constexpr(5)  # its low and its high 32 bits
GRAD_SCALE = tl.constexpr(7)  # gradients are divided by it
COEFFICIENT = tl.constexpr(8)  # gradients are multiplied by it, to clip the norm of all of them
OWN = tl.constexpr(9)
OWNED = tl.constexpr(4)  # a power of two; the last is unused
#: In this order; the first so many are the same for all parameters.
SCALARS = ("lr", "weight_decay", "eps", "clip_threshold", "beta1", "beta2", "step")
SHARED = 4

#: Types of the kernels' pointer arguments, by name: int32 [programs, 2], the parameter and the index of the tile; int64
#: [parameters, FIELDS]; int64 [parameters, 2], each gradient's address and that of its layout; scalars; int32
#: [parameters], not 0 where a parameter keeps its value; sums of squares of gradients; [parameters, WATCHED], added to.
#: All other arguments are compile-time constants.
MEMORY = {
    "tiles": "*i32",
    "items": "*i64",
    "grads": "*i64",
    "scalars": "*fp64",
    "flags": "*i32",
    "squares": "*fp64",
    "watched": "*fp64",
}

#: Elements of one program of the kernels on whole moments, and of one that only tests for finite values; rows and
#: columns of one program of a fold; tiles whose partial sums a fold loads at once, and those of all three of H-Fac's.
RUN = tl.constexpr(2048)
LOOKED = tl.constexpr(16 * 2048)
CHUNK = tl.constexpr(256)
AT_ONCE = tl.constexpr(8)
MANY_AT_ONCE = tl.constexpr(16)

#: What a watched step reports of a parameter, in float64: the sum of squares of W's change; how many elements, rounded
#: to nearest, keep their value; the sum of squares of the direction; how many rows and columns of the gradient are
#: zero.
CHANGE, KEPT, DIRECTION, ZERO_ROWS, ZERO_COLS = map(tl.constexpr, range(5))
WATCHED = tl.constexpr(spec.WATCHED)

#: How SMMF's signs are packed: whole bytes of a row, one byte per element, or bits of bytes that rows and tiles share.
NO_SIGNS, WHOLE_BYTES, BYTE_PER_ELEMENT, SHARED_BYTES = map(tl.constexpr, range(4))

#: How random bits are drawn: not at all; eight neighbours from one call, whose indices follow each other or come from a
#: layout; or one call per element.
NEAREST, EIGHT, EIGHT_APART, EACH = map(tl.constexpr, range(4))

__all__ = [name for name, value in list(globals().items()) if isinstance(value, tl.constexpr)]
