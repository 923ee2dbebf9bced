"""H-Fac on matrices: sums from one read of the gradient, a fold of O(rows + columns) (`hfac_folds`), the update with a
second read.

The statistics hold whole rows, because r_i is needed for the third column sum, that of g^2 / r_i, which gives the clip
norm without a third read:

    sum_ij U_ij^2 = R sum_j w_j / s_j,  w_j = sum_i g_ij^2 / r_i,  R = sum_i r_i.

Partial sums of a parameter of m rows and n columns, in float32 (norms in float64):

    rows     [m]              the gradient's sums; after the fold phi / 2
    squares  [m]              the new r; after `hfac_scale` sqrt(R / r_i) with the clipping
    cols     [row tiles, 3, n]   sums of g, g^2 and g^2 / r_i; then, if watched, [row tiles]: how many rows are zero
    psi, scale  [n]           psi / 2 and 1 / sqrt(s_j)
    totals   [chunks, 2]      shares of R and of sum_j w_j / s_j; before the fold, of the gradient's sum of squares

Where the first moment is whole, in codes of 8 bits, its unit sqrt(V) changes with every step. In place of phi and psi
the update then needs how much:

    rows     [m]              b1 rho_i, rho_i = sqrt(r_old / r) sqrt(R / R_old)
    psi      [n]              sigma_j = sqrt(s_old / s)
    totals   [chunks, 3]      R before, too; behind them what the step is multiplied by to clip it

The columns' sums of g^2 give the gradient's norm, too, so clipping by the norm of all gradients reads none of them
again. Gradients that are then clipped have other r_i, and their statistics are taken again.

Of a shard, the statistics leave rows and squares in the caller's lists and `hfac_shard_cols` the columns' sums;
`hfac_shard_fold` turns them, added up over the ranks, into what the update reads.
"""

import triton
import triton.language as tl

from .codes import decode, encode
from .element import (
    decays,
    divide,
    fetch,
    finite,
    gradient,
    gradients,
    length,
    offsets,
    offsets_beside,
    operand,
    pointer,
    program,
    seen,
    squares,
    tile_of,
    watch,
    zeros,
)
from .hfac_folds import clip_at
from .rounding import calls, counter, kept, load, random_bits, store, weights, widened
from .table import *


@triton.jit
def hfac_stats(
    tiles,
    items,
    grads,
    scalars,
    flags,
    G: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECES: tl.constexpr,
    APART: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOOK: tl.constexpr,
    SCALED: tl.constexpr,
    AGAIN: tl.constexpr,
    WATCH: tl.constexpr,
):
    """A tile is a number of whole rows. Where a row fits the registers, a row's sum, its r_i and its share of the
    columns' sums come from one read; longer rows are read again once their r_i are known."""
    if AGAIN:
        if tl.load(scalars + COEFFICIENT) == 1:  # a NaN is not
            return
    item, record, row_tile = program(tiles, items)
    rows = tl.load(record + ROWS)
    cols = length(record, COLS, WHOLE)
    tile_rows = tl.load(record + STATS_ROWS)
    first_row = row_tile * tile_rows
    last_row = tl.minimum(first_row + tile_rows, rows)
    grad, layout, scale = gradients(grads, scalars, item, G, T, WHOLE, SCALED, ALIGNED)
    r_old = pointer(record, SECOND_ROW, T)
    row_sum = pointer(record, SPACE_ROWS, T)
    row_square = pointer(record, SPACE_SQUARES, T)
    b1, rest1, b2, rest2 = decays(scalars, item, T)
    eps_sum = (tl.load(record + ALL_COLS).to(tl.float64) * tl.load(scalars + EPS)).to(T)
    count = rows * cols
    bad = tl.zeros([PIECES, R, C // PIECES], tl.int32)
    zero_rows = tl.zeros([R], tl.int32)

    if WIDE:
        for step in range(first_row, last_row, R):
            i = step + tl.arange(0, R).to(tl.int64)
            in_rows = i < last_row
            sum_g = tl.zeros([R, C], T)
            sum_q = tl.zeros([R, C], T)
            for first_col in range(0, cols, C):
                j = first_col + tl.arange(0, C).to(tl.int64)
                mask = in_rows[:, None] & (j < cols)[None, :]
                at = i[:, None] * cols + j[None, :]
                g = gradient(grad, at, layout, mask, scale, T, WHOLE, SCALED)
                if LOOK:
                    bad |= (finite(g, count) == 0).to(tl.int32)[None, :, :]
                sum_g += g
                sum_q += g * g
            old = tl.load(r_old + i, in_rows, 0.0)
            tl.store(row_sum + i, tl.sum(sum_g, 1), in_rows)
            tl.store(row_square + i, b2 * old + rest2 * (tl.sum(sum_q, 1) + eps_sum), in_rows)
            if WATCH:
                zero_rows += zeros(tl.sum(sum_g, 1), tl.sum(sum_q, 1), in_rows)
        if COLUMNS:
            col_sums = pointer(record, SPACE_COLS, T) + row_tile * 3 * cols
            tl.debug_barrier()  # the r_i that some lanes wrote are read by others
            for first_col in range(0, cols, C):
                j = first_col + tl.arange(0, C).to(tl.int64)
                in_cols = j < cols
                sum_g = tl.zeros([1, APART, C], T)
                sum_q = tl.zeros([1, APART, C], T)
                sum_u = tl.zeros([1, APART, C], T)
                for step in range(first_row, last_row, R):
                    i = step + tl.arange(0, R).to(tl.int64)
                    in_rows = i < last_row
                    mask = in_rows[None, :, None] & in_cols[None, None, :]
                    at = i[None, :, None] * cols + j[None, None, :]
                    g = gradient(grad, at, layout, mask, scale, T, WHOLE, SCALED)
                    r = tl.load(row_square + i, in_rows, 1.0)
                    q = g * g
                    sum_g += in_lane(g, APART)
                    sum_q += in_lane(q, APART)
                    sum_u += in_lane(q * divide(tl.full([R], 1.0, T), r)[None, :, None], APART)
                store_columns(col_sums, cols, j[None, :], in_cols[None, :], sum_g, sum_q, sum_u)
    else:
        # Tensors are [PIECES, R, C / PIECES]; rows are given to warps, and all pieces of a row to one of them.
        PIECE: tl.constexpr = C // PIECES
        j = (PIECE * tl.arange(0, PIECES)[:, None] + tl.arange(0, PIECE)[None, :]).to(tl.int64)
        in_cols = j < cols
        sum_g = tl.zeros([PIECES, APART, PIECE], T)
        sum_q = tl.zeros([PIECES, APART, PIECE], T)
        sum_u = tl.zeros([PIECES, APART, PIECE], T)
        to_row = tl.arange(0, PIECE // 8)[None, :]
        if WHOLE:  # of the first rows; then the next rows are under way while these are summed
            g_next, r_next = rows_of(grad, r_old, first_row, last_row, cols, R, PIECES, PIECE)
        for step in range(first_row, last_row, R):
            # Not to be taken for neighbours, by which compilers would choose which lanes store the rows' sums.
            i = tl.max_contiguous(step + tl.arange(0, R).to(tl.int64), 1)
            in_rows = i < last_row
            mask = in_rows[None, :, None] & in_cols[:, None, :]
            if WHOLE:
                g, old = g_next, r_next
                g_next, r_next = rows_of(grad, r_old, step + R, last_row, cols, R, PIECES, PIECE)
                g = seen(tl.reshape(g, [PIECES, R, PIECE]), scale, mask, T, SCALED, False)
            else:
                at = i[None, :, None] * cols + j[:, None, :]
                g = gradient(grad, at, layout, mask, scale, T, WHOLE, SCALED)
                old = tl.load(r_old + i, in_rows, 1.0)
            if LOOK:
                bad |= (finite(g, count) == 0).to(tl.int32)
            q = g * g
            if COLUMNS:
                sum_g += in_lane(g, APART)
                sum_q += in_lane(q, APART)
            of_g, of_q = row_sums(g, q, C > 1024)
            r = b2 * old + rest2 * (of_q + eps_sum)
            store_rows(row_sum, i, of_g, in_rows, to_row)
            store_rows(row_square, i, r, in_rows, to_row)
            if WATCH:
                zero_rows += zeros(of_g, of_q, in_rows)
            if COLUMNS:
                # Where there are no more rows r may be 0.
                inverse = divide(tl.full([R], 1.0, T), tl.where(in_rows, r, 1.0))
                sum_u += in_lane(q * inverse[None, :, None], APART)
        if COLUMNS:
            col_sums = pointer(record, SPACE_COLS, T) + row_tile * 3 * cols
            store_columns(col_sums, cols, j, in_cols, sum_g, sum_q, sum_u)
    if LOOK:
        any_bad = tl.max(tl.max(tl.max(bad, 2), 1), 0)
        tl.store(flags + item, any_bad, any_bad != 0)
    if WATCH:
        counts = pointer(record, SPACE_COLS, T) + tl.load(record + ROW_TILES) * 3 * cols
        tl.store(counts + row_tile, tl.sum(zero_rows, 0).to(T))


@triton.jit
def rows_of(grad, r_old, first, last_row, cols, R: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """Loads of R rows on the bulk, one piece of all of them after the other, and of their old r. As a matrix: of three
    dimensions compilers deal warps out differently."""
    i = first + tl.arange(0, R).to(tl.int64)
    k = tl.arange(0, PIECES * R).to(tl.int64)
    row = first + k % R
    j = (k // R * PIECE)[:, None] + tl.arange(0, PIECE)[None, :]
    g = tl.load(grad + row[:, None] * cols + j, (row < last_row)[:, None] & (j < cols), 0.0)
    return g, tl.load(r_old + i, i < last_row, 1.0)


@triton.jit
def row_sums(g, q, TOGETHER: tl.constexpr):
    """Sums of rows. Pieces of a row are a lane's own; where a row is several warps', both sums go from warp to warp
    TOGETHER."""
    g = tl.sum(g, 0)
    q = tl.sum(q, 0)
    if TOGETHER:
        of_g, of_q = tl.split(tl.sum(tl.join(g, q), 1))
    else:
        of_g = tl.sum(g, 1)
        of_q = tl.sum(q, 1)
    return of_g, of_q


@triton.jit
def store_rows(to, i, sums, in_rows, lane):
    """Rows' sums leave by one of the lanes that hold the row: no other warp needs to be told of them."""
    sums = tl.broadcast_to(sums[:, None], [sums.shape[0], lane.shape[1]])
    tl.store(to + i[:, None] + lane, sums, in_rows[:, None] & (lane == 0))


@triton.jit
def in_lane(x, APART: tl.constexpr):
    """Sums of rows that one lane holds, of a tensor [pieces, rows, columns]."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // APART, APART, x.shape[2]]), 1)


@triton.jit
def store_columns(to, cols, j, in_cols, sum_g, sum_q, sum_u):
    tl.store(to + j, tl.sum(sum_g, 1), in_cols)
    tl.store(to + cols + j, tl.sum(sum_q, 1), in_cols)
    tl.store(to + 2 * cols + j, tl.sum(sum_u, 1), in_cols)


@triton.jit
def hfac_update(
    tiles,
    items,
    grads,
    scalars,
    flags,
    watched,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOW: tl.constexpr,
    ROUGH: tl.constexpr,
    CODES: tl.constexpr,
    NEGATE: tl.constexpr,
    SKIP: tl.constexpr,
    SCALED: tl.constexpr,
    WATCH: tl.constexpr,
):
    """W <- W - lr ((phi + psi) / 2 + clip(U) + wd W): no root and no division, all of them were the fold's. Of codes,
    X <- b1 rho sigma X + (1 - b1) U and W <- W - lr (clip (b1 X + (1 - b1) U) + wd W)."""
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    cols = length(record, COLS, WHOLE)
    _, col_tile, first_row, last_row = tile_of(record, index)
    param, param_layout, low, low_layout = weights(record, W, WHOLE, LOW)
    grad, grad_layout, scale = gradients(grads, scalars, item, G, T, WHOLE, SCALED, ALIGNED)
    seed, t, position, first, index_layout = counter(record, scalars, item, STOCHASTIC)
    half_phi = pointer(record, SPACE_ROWS, T)
    row_scale = pointer(record, SPACE_SQUARES, T)
    lr = tl.load(scalars + LR).to(T)
    weight_decay = tl.load(scalars + WEIGHT_DECAY).to(T)
    j = col_tile * C + tl.arange(0, C).to(tl.int64)
    in_cols = j < cols
    calls_at = col_tile * C + calls(C, STOCHASTIC)
    half_psi = tl.load(pointer(record, SPACE_PSI, T) + j, in_cols, 0.0)[None, :]
    col_scale = tl.load(pointer(record, SPACE_SCALE, T) + j, in_cols, 0.0)[None, :]
    if CODES:
        codes = operand(tl.load(record + CODES_AT), tl.int8, WHOLE)
        codes_layout = tl.load(record + CODES_LAYOUT)
        b1, rest1, b2, rest2 = decays(scalars, item, T)
        clip = tl.load(clip_at(record)).to(T)
    change = tl.zeros([R], T)
    same = tl.zeros([R], tl.int32)
    # Of codes much is computed, meanwhile the next rows are under way; of wider types they would not fit the registers.
    AHEAD: tl.constexpr = (CODES and WHOLE) and ROUGH
    if AHEAD:
        i = first_row + tl.arange(0, R).to(tl.int64)
        g_next, w_next, low_next, q_next, of_next, scale_next = fetch(
            i, i, last_row, in_cols, in_cols, j, j, 0, cols,
            grad, param, low, codes, half_phi, row_scale, BYTE_PER_ELEMENT, LOW,
        )  # fmt: skip
    for step in range(first_row, last_row, R):
        i = step + tl.arange(0, R).to(tl.int64)
        in_rows = i < last_row
        mask = in_rows[:, None] & in_cols[None, :]
        at = i[:, None] * cols + j[None, :]
        lies = offsets(at, param_layout, WHOLE)
        to = param + lies
        if AHEAD:
            g, w, rest, q, of_row, of_scale = g_next, w_next, low_next, q_next, of_next, scale_next
            g_next, w_next, low_next, q_next, of_next, scale_next = fetch(
                i + R, i + R, last_row, in_cols, in_cols, j, j, 0, cols,
                grad, param, low, codes, half_phi, row_scale, BYTE_PER_ELEMENT, LOW,
            )  # fmt: skip
            g = seen(g, scale, mask, T, SCALED, NEGATE)
            w = widened(w, rest, T, LOW)
        else:
            g = tl.load(grad + offsets_beside(at, grad_layout, param_layout, lies, WHOLE), mask, 0.0)
            g = seen(g, scale, mask, T, SCALED, NEGATE)
            w = load(to, low, low_layout, at, mask, T, WHOLE, LOW)
            of_row = tl.load(half_phi + i, in_rows, 0.0)
            of_scale = tl.load(row_scale + i, in_rows, 0.0)
        of_row = of_row[:, None]
        U = g * col_scale * of_scale[:, None]
        if CODES:
            code_at = codes + offsets(at, codes_layout, WHOLE)
            if not AHEAD:
                q = tl.load(code_at, mask, 0)
            q = q.to(tl.int32)
            held = decode(q, T, ROUGH)
            fresh = rest1 * U
            x = of_row * half_psi * held + fresh
            tl.store(code_at, encode(x, q, held, ROUGH), mask)
            direction = (b1 * x + fresh) * clip
        else:
            direction = (of_row + half_psi) + U
        old = w
        w = w - lr * (direction + weight_decay * w)
        if WATCH:
            change += squares(w - old, mask, 1)
            same += tl.sum(kept(w, old, mask, W, T, LOW), 1)
        drawn_at = i[:, None] * cols + calls_at[None, :]
        bits = random_bits(seed, t, position, first, index_layout, drawn_at, STOCHASTIC)
        store(w, bits, to, low, low_layout, at, mask, W, WHOLE, STOCHASTIC, LOW)
    if WATCH:
        watch(watched, item, CHANGE, tl.sum(change, 0))
        watch(watched, item, KEPT, tl.sum(same, 0))
