"""What H-Fac's kernels do between the two reads of the gradient, on rows and columns: sums of tiles, new moments, and
what the update needs of them (`hfac`, which also says where all of it lies)."""

import triton
import triton.language as tl

from .codes import unit_change
from .element import decays, divide, excess, partial_sums, pointer, program, root, watch, zeros
from .table import *


@triton.jit
def hfac_squares(tiles, items, T: tl.constexpr):
    """Shares of the gradient's sum of squares, each of a chunk of columns, from what the statistics left of their
    tiles; in double, as the totals."""
    _, record, index = program(tiles, items)
    n = tl.load(record + COLS)
    row_tiles = tl.load(record + ROW_TILES).to(tl.int32)
    k = index * CHUNK + tl.arange(0, CHUNK)
    sums = pointer(record, SPACE_COLS, T)
    square = partial_sums(sums + n, 3 * n, row_tiles, k, k < n, tl.float64)
    tl.store(pointer(record, SPACE_TOTALS, tl.float64) + index * 2, tl.sum(square, 0))


@triton.jit
def column_sums(record, n, row_tiles, k, in_cols, T: tl.constexpr):
    """Sums of g, g^2 and g^2 / r over columns, from those of their tiles, in one loop."""
    start = pointer(record, SPACE_COLS, T)
    sum_g = tl.zeros([MANY_AT_ONCE, CHUNK], T)
    square = tl.zeros([MANY_AT_ONCE, CHUNK], T)
    ratio = tl.zeros([MANY_AT_ONCE, CHUNK], T)
    for first in range(0, row_tiles, MANY_AT_ONCE):
        t = (first + tl.arange(0, MANY_AT_ONCE)).to(tl.int64)
        keep = (t < row_tiles)[:, None] & in_cols[None, :]
        at = start + t[:, None] * 3 * n + k[None, :]
        sum_g += tl.load(at, keep, 0.0)
        square += tl.load(at + n, keep, 0.0)
        ratio += tl.load(at + 2 * n, keep, 0.0)
    return tl.sum(sum_g, 0), tl.sum(square, 0), tl.sum(ratio, 0)


@triton.jit
def half_drift(old_at, mask, sum_g, length, square, beta, rest, T: tl.constexpr, NEGATE: tl.constexpr):
    """Advances a first moment of rows or columns by a step, in place, and returns half of phi_i (or psi_j):
    b1 (u - mean) / sqrt(r / length) / 2. Halving is exact, so the sum of two halves is the reference's (phi + psi) / 2.
    """
    if NEGATE:
        sum_g = -sum_g
    lengths = tl.full([CHUNK], 1.0, T) * length.to(T)
    mean = divide(sum_g, lengths)
    new = beta * tl.load(old_at, mask, 0.0) + rest * mean
    tl.store(old_at, new, mask)
    return divide(beta * (new - mean), root(divide(square, lengths))) * 0.5


@triton.jit
def fold_rows(record, k, in_rows, sum_g, length, r, beta, rest, T: tl.constexpr, NEGATE: tl.constexpr):
    """Stores new moments of rows, and phi / 2 for the update; length: of a whole row."""
    u_at = pointer(record, FIRST_ROW, T) + k
    half_phi = half_drift(u_at, in_rows, sum_g, length, r, beta, rest, T, NEGATE)
    tl.store(pointer(record, SECOND_ROW, T) + k, r, in_rows)
    tl.store(pointer(record, SPACE_ROWS, T) + k, half_phi, in_rows)


@triton.jit
def fold_cols(
    record, k, in_cols, sum_g, length, s, beta, rest, T: tl.constexpr, NEGATE: tl.constexpr, CODES: tl.constexpr
):
    """Stores new moments of columns, and psi / 2 (or sigma) and 1 / sqrt(s) for the update; length: of a whole
    column."""
    second = pointer(record, SECOND_COL, T) + k
    if CODES:
        drift = divide(root(tl.load(second, in_cols, 1.0)), root(s))
    else:
        v_at = pointer(record, FIRST_COL, T) + k
        drift = half_drift(v_at, in_cols, sum_g, length, s, beta, rest, T, NEGATE)
    tl.store(second, s, in_cols)
    tl.store(pointer(record, SPACE_PSI, T) + k, drift, in_cols)
    tl.store(pointer(record, SPACE_SCALE, T) + k, divide(tl.full([CHUNK], 1.0, T), root(s)), in_cols)


@triton.jit
def row_scale(
    record, index, r, total, mean_square, scalars, T: tl.constexpr, CLIPPED: tl.constexpr, CODES: tl.constexpr
):
    """Each row's factor of U: sqrt(R / r_i) / max(1, rms(U) / d). The quotient R / r_i could overflow and is not
    formed. Beside codes the clip is the whole step's, one number for a parameter."""
    scale = root(total) * divide(tl.full([CHUNK], 1.0, T), root(r))
    if CODES:
        clip = tl.full([], 1.0, T)
        if CLIPPED:
            clip = divide(clip, excess(mean_square, scalars, T))
        if index == 0:
            tl.store(clip_at(record), clip.to(tl.float64))
    elif CLIPPED:
        scale = divide(scale, excess(mean_square, scalars, T))
    return scale


@triton.jit
def clip_at(record):
    """Where a step's clip is, beside codes: behind the totals."""
    chunks = tl.cdiv(tl.maximum(tl.load(record + ROWS), tl.load(record + COLS)), CHUNK)
    return pointer(record, SPACE_TOTALS, tl.float64) + 3 * chunks


@triton.jit
def hfac_fold(
    tiles,
    items,
    scalars,
    flags,
    watched,
    T: tl.constexpr,
    CODES: tl.constexpr,
    NEGATE: tl.constexpr,
    SKIP: tl.constexpr,
    WATCH: tl.constexpr,
):
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    m = tl.load(record + ROWS)
    n = tl.load(record + COLS)
    row_tiles = tl.load(record + ROW_TILES).to(tl.int32)
    b1, rest1, b2, rest2 = decays(scalars, item, T)
    k = index * CHUNK + tl.arange(0, CHUNK)

    in_rows = k < m
    r = tl.load(pointer(record, SPACE_SQUARES, T) + k, in_rows, 1.0)
    old_r = r
    if CODES:  # the rows' old r is needed once R is known
        old_r = tl.load(pointer(record, SECOND_ROW, T) + k, in_rows, 0.0)
    else:
        sum_g = tl.load(pointer(record, SPACE_ROWS, T) + k, in_rows, 0.0)
        fold_rows(record, k, in_rows, sum_g, n, r, b1, rest1, T, NEGATE)

    in_cols = k < n
    sum_g, square, ratio = column_sums(record, n, row_tiles, k, in_cols, T)
    old = tl.load(pointer(record, SECOND_COL, T) + k, in_cols, 1.0)
    s = b2 * old + rest2 * (square + (m.to(tl.float64) * tl.load(scalars + EPS)).to(T))
    fold_cols(record, k, in_cols, sum_g, m, s, b1, rest1, T, NEGATE, CODES)
    if WATCH:
        counts_at = pointer(record, SPACE_COLS, T) + row_tiles * 3 * n
        counts = tl.load(counts_at + k, k < row_tiles, 0.0)  # there are no more tiles than rows
        watch(watched, item, ZERO_ROWS, tl.sum(counts, 0))
        watch(watched, item, ZERO_COLS, tl.sum(zeros(sum_g, square, in_cols), 0))

    # In double, where no partial result can overflow.
    totals = pointer(record, SPACE_TOTALS, tl.float64) + index * (3 if CODES else 2)
    tl.store(totals, tl.sum(tl.where(in_rows, r.to(tl.float64), 0.0), 0))
    tl.store(totals + 1, tl.sum(tl.where(in_cols, ratio.to(tl.float64) / s.to(tl.float64), 0.0), 0))
    if CODES:
        tl.store(totals + 2, tl.sum(old_r.to(tl.float64), 0))


@triton.jit
def hfac_scale(
    tiles,
    items,
    scalars,
    flags,
    watched,
    T: tl.constexpr,
    CODES: tl.constexpr,
    CLIPPED: tl.constexpr,
    SKIP: tl.constexpr,
    WATCH: tl.constexpr,
):
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    EACH_CHUNK: tl.constexpr = 3 if CODES else 2
    m = tl.load(record + ROWS)
    n = tl.load(record + COLS)
    chunks = tl.cdiv(tl.maximum(m, n), CHUNK).to(tl.int32)
    totals = pointer(record, SPACE_TOTALS, tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    norm = tl.zeros([CHUNK], tl.float64)
    total_old = tl.zeros([CHUNK], tl.float64)
    for first in range(0, chunks, CHUNK):
        c = first + tl.arange(0, CHUNK)
        total += tl.load(totals + EACH_CHUNK * c, c < chunks, 0.0)
        norm += tl.load(totals + EACH_CHUNK * c + 1, c < chunks, 0.0)
        if CODES:
            total_old += tl.load(totals + EACH_CHUNK * c + 2, c < chunks, 0.0)
    R = tl.sum(total, 0)
    k = index * CHUNK + tl.arange(0, CHUNK)
    in_rows = k < m
    at = pointer(record, SPACE_SQUARES, T) + k
    mean_square = R * tl.sum(norm, 0) / (m.to(tl.float64) * n.to(tl.float64))
    if WATCH:
        if index == 0:
            watch(watched, item, DIRECTION, R * tl.sum(norm, 0))
    r = tl.load(at, in_rows, 1.0)
    if CODES:
        b1, rest1, b2, rest2 = decays(scalars, item, T)
        code_rows(record, k, in_rows, r, b1, tl.sum(total_old, 0).to(T), R.to(T), T)
    scale = row_scale(record, index, r, R.to(T), mean_square.to(T), scalars, T, CLIPPED, CODES)
    tl.store(at, scale, in_rows)


@triton.jit
def code_rows(record, k, in_rows, r, b1, total_old, total, T: tl.constexpr):
    """Stores the new r of rows, and b1 rho for the update of codes."""
    second = pointer(record, SECOND_ROW, T) + k
    rho = unit_change(tl.load(second, in_rows, 1.0), r, total_old, total, T)
    tl.store(second, r, in_rows)
    tl.store(pointer(record, SPACE_ROWS, T) + k, b1 * rho, in_rows)


@triton.jit
def hfac_shard_cols(tiles, items, T: tl.constexpr):
    """The columns' sums of shards, from those of their tiles."""
    _, record, index = program(tiles, items)
    k = index * CHUNK + tl.arange(0, CHUNK)
    n = tl.load(record + COLS)
    row_tiles = tl.load(record + ROW_TILES).to(tl.int32)
    in_cols = k < n
    sum_g, square, ratio = column_sums(record, n, row_tiles, k, in_cols, T)
    tl.store(pointer(record, SUM_COL, T) + k, sum_g, in_cols)
    tl.store(pointer(record, NEW_COL, T) + k, square, in_cols)
    tl.store(pointer(record, RATIO_COL, T) + k, ratio, in_cols)


@triton.jit
def hfac_shard_fold(
    tiles,
    items,
    scalars,
    flags,
    T: tl.constexpr,
    CODES: tl.constexpr,
    NEGATE: tl.constexpr,
    CLIPPED: tl.constexpr,
    SKIP: tl.constexpr,
):
    """`hfac_fold` and `hfac_scale` of shards, whose sums over the whole are known. A shard without rows still has
    columns, and one without columns rows."""
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    b1, rest1, b2, rest2 = decays(scalars, item, T)
    k = index * CHUNK + tl.arange(0, CHUNK)

    in_rows = k < tl.load(record + ROWS)
    r = tl.load(pointer(record, NEW_ROW, T) + k, in_rows, 1.0)
    total = tl.load(pointer(record, TOTAL, T))
    mean_square = tl.load(pointer(record, MEAN_SQUARE, T))
    sum_g = r
    if CODES:
        code_rows(record, k, in_rows, r, b1, tl.load(pointer(record, OLD_TOTAL, T)), total, T)
    else:
        sum_g = tl.load(pointer(record, SUM_ROW, T) + k, in_rows, 0.0)
        fold_rows(record, k, in_rows, sum_g, tl.load(record + ALL_COLS), r, b1, rest1, T, NEGATE)
    scale = row_scale(record, index, r, total, mean_square, scalars, T, CLIPPED, CODES)
    tl.store(pointer(record, SPACE_SQUARES, T) + k, scale, in_rows)

    in_cols = k < tl.load(record + COLS)
    s = tl.load(pointer(record, NEW_COL, T) + k, in_cols, 1.0)
    if not CODES:
        sum_g = tl.load(pointer(record, SUM_COL, T) + k, in_cols, 0.0)
    fold_cols(record, k, in_cols, sum_g, tl.load(record + ALL_ROWS), s, b1, rest1, T, NEGATE, CODES)
