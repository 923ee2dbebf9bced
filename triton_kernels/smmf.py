"""SMMF on matrices: a whole step is one read of the gradient and one read and write of the parameter and its signs.

A program takes a tile of the matrix and walks down its rows, R at a time. Its columns' factors stay in registers, and
so do the columns' sums, one per lane, until the tile is done; each row's sums leave as soon as it is. Both are partial
sums: `smmf_fold` adds them in fixed order, `smmf_normalize` divides.

A rank's shard of a matrix is some blocks of it, each with a record of its own. The same kernel steps their tiles;
`smmf_shard_fold` adds up the rows and columns that blocks share, and columns are divided when the sums of all shards
are known.

Which lane holds which element is Triton's choice, so sums are equal to the CUDA kernels' only within rounding; the
parameter depends on no sum of its own step and is equal to the bit, but where it has 16 bits alone and the root and
the quotient are approximate (`element.quotient`).
"""

import triton
import triton.language as tl

from .element import (
    decays,
    divide,
    fetch,
    gradients,
    length,
    moved,
    offsets,
    offsets_beside,
    operand,
    partial_sums,
    pointer,
    program,
    quotient,
    seen,
    slices_of,
    squares,
    stretch,
    tile_of,
    total_of,
    watch,
)
from .rounding import calls, counter, kept, load, random_bits, store, weights, widened
from .table import *


@triton.jit
def smmf_tiles(
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
    LAYOUT: tl.constexpr,
    SHARD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOW: tl.constexpr,
    ROUGH: tl.constexpr,
    COUPLED: tl.constexpr,
    NEGATE: tl.constexpr,
    SKIP: tl.constexpr,
    SCALED: tl.constexpr,
    WATCH: tl.constexpr,
):
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    rows = tl.load(record + ROWS)
    cols = length(record, COLS, WHOLE)
    row_tile, col_tile, first_row, last_row = tile_of(record, index)
    param, param_layout, low, low_layout = weights(record, W, WHOLE, LOW)
    grad, grad_layout, scale = gradients(grads, scalars, item, G, T, WHOLE, SCALED, ALIGNED)
    seed, t, position, first, index_layout = counter(record, scalars, item, STOCHASTIC)
    if SHARD:
        start_at = length(record, START, WHOLE)
        stride = length(record, STRIDE, WHOLE)
        row_step = tl.load(record + ROW_STEP)
    else:
        start_at = 0
        stride = cols
        row_step = 1
    r_M = pointer(record, FIRST_ROW, T)
    r_V = pointer(record, SECOND_ROW, T)
    row_sums = pointer(record, SPACE_ROWS, T) + col_tile * 2 * rows

    b1, rest1, b2, rest2 = decays(scalars, item, T)
    lr_wide = tl.load(scalars + LR)
    decay_wide = tl.load(scalars + WEIGHT_DECAY)
    lr = lr_wide.to(T)
    weight_decay = decay_wide.to(T)
    shrink = (1.0 - lr_wide * decay_wide).to(T)
    eps = tl.load(scalars + EPS).to(T)
    up, down = stretch(eps)

    j = col_tile * C + tl.arange(0, C).to(tl.int64)
    if LOW == 16 and LAYOUT != BYTE_PER_ELEMENT:
        # A lane then holds four neighbours, as it does of float32, whose sums these must equal to the bit.
        j = tl.max_contiguous(j, 4)
    in_cols = j < cols
    c_V = tl.load(pointer(record, SECOND_COL, T) + j, in_cols, 0.0)
    sum_V = tl.zeros([R, C], T)
    signs = operand(tl.load(record + SIGNS), tl.uint8, WHOLE)
    if LAYOUT != NO_SIGNS:
        c_M = tl.load(pointer(record, FIRST_COL, T) + j, in_cols, 0.0)
        sum_M = tl.zeros([R, C], T)
    jb = j
    in_bytes = in_cols
    if LAYOUT == WHOLE_BYTES:
        jb = col_tile * (C // 8) + tl.arange(0, C // 8).to(tl.int64)
        in_bytes = 8 * jb < cols
        k = tl.arange(0, 8)[None, None, :]
    calls_at = col_tile * C + calls(C, STOCHASTIC)
    if LAYOUT == SHARED_BYTES:
        slice = tl.load(record + SLICE)
        slice_factor = tl.load(record + SLICE_FACTOR)
        slice_bytes = tl.load(record + SLICE_BYTES)
        start = tl.load(record + SIGNS)
    change = tl.zeros([R], T)
    sum_D = tl.zeros([R], T)
    same = tl.zeros([R], tl.int32)
    # A row's two sums leave as neighbours, by two lanes of those that hold the row: no other needs to be told of them.
    pair = tl.arange(0, C // 8)[None, :]

    if SHARD:
        r_M += first_row * row_step
        r_V += first_row * row_step
    if WHOLE:  # of the first rows; from then on what the next rows need is under way while these are worked on
        i = first_row + tl.arange(0, R).to(tl.int64)
        g_next, w_next, low_next, bits_next, r_M_next, r_V_next = fetch(
            i, rows_at(i, first_row, row_step, SHARD), last_row, in_cols, in_bytes, j, jb, start_at, stride,
            grad, param, low, signs, r_M, r_V, LAYOUT, LOW,
        )  # fmt: skip
    for step in range(first_row, last_row, R):
        i = step + tl.arange(0, R).to(tl.int64)
        in_rows = i < last_row
        mask = in_rows[:, None] & in_cols[None, :]
        at = start_at + i[:, None] * stride + j[None, :]
        lies = offsets(at, param_layout, WHOLE)
        to = param + lies
        byte_at = signs + start_at // 8 + i[:, None] * (stride // 8) + jb[None, :]
        byte_mask = in_rows[:, None] & in_bytes[None, :]
        if WHOLE:
            g, w, rest, packed, row_M, row_V = g_next, w_next, low_next, bits_next, r_M_next, r_V_next
            g_next, w_next, low_next, bits_next, r_M_next, r_V_next = fetch(
                i + R, rows_at(i + R, first_row, row_step, SHARD), last_row, in_cols, in_bytes, j, jb, start_at, stride,
                grad, param, low, signs, r_M, r_V, LAYOUT, LOW,
            )  # fmt: skip
            g = seen(g, scale, mask, T, SCALED, NEGATE)
            w = widened(w, rest, T, LOW)
        else:
            g = tl.load(grad + offsets_beside(at, grad_layout, param_layout, lies, WHOLE), mask, 0.0)
            g = seen(g, scale, mask, T, SCALED, NEGATE)
            w = load(to, low, low_layout, at, mask, T, WHOLE, LOW)
            row_at = rows_at(i, first_row, row_step, SHARD)
            row_V = tl.load(r_V + row_at, in_rows, 0.0)
            row_M = row_V
            if LAYOUT != NO_SIGNS:
                row_M = tl.load(r_M + row_at, in_rows, 0.0)
        before = w
        if COUPLED:
            g = g + weight_decay * w
        else:
            w = w * shrink

        # What lies outside of the matrix is read as 0, and so are its factors: it adds nothing to the sums.
        if LAYOUT == NO_SIGNS:
            M = g
        else:
            # M = b1 (+-) r_M c_M^T + (1 - b1) G  (SMMF, Algorithm 1; decompression is its Algorithm 3)
            if LAYOUT == WHOLE_BYTES:
                if not WHOLE:
                    packed = tl.load(byte_at, byte_mask, 0)
                bits = tl.reshape((packed.to(tl.int32)[:, :, None] >> k), [R, C])
            elif LAYOUT == BYTE_PER_ELEMENT:
                if not WHOLE:
                    packed = tl.load(signs + at, mask, 0)
                bits = packed.to(tl.int32)
            else:
                outer, within = slices_of(at, slice, slice_factor)
                byte = outer * slice_bytes + within // 8
                bits = tl.load(signs + byte, mask, 0).to(tl.int32) >> (within % 8).to(tl.int32)
            M = signed((b1 * row_M)[:, None] * c_M[None, :], bits) + rest1 * g
            positive = (M > 0).to(tl.int32)
            if LAYOUT == WHOLE_BYTES:
                packed = tl.sum(tl.reshape(positive, [R, C // 8, 8]) << k, 2)
                tl.store(byte_at, packed.to(tl.uint8), byte_mask)
            elif LAYOUT == BYTE_PER_ELEMENT:
                tl.store(signs + at, positive.to(tl.uint8), mask)
            else:
                # A byte may belong to several tiles. Each turns over its own bits, so no order of them changes the
                # result: an exclusive or of the aligned word that holds the bit.
                address = start + byte
                word = (address // 4 * 4).to(tl.pointer_type(tl.int32))
                bit = (8 * (address % 4) + within % 8).to(tl.int32)
                turned = positive ^ (bits & 1)
                tl.atomic_xor(word, turned << bit, mask & (turned != 0), sem="relaxed")
            sum_M += tl.abs(M)

        V = (b2 * row_V)[:, None] * c_V[None, :] + rest2 * (g * g)
        sum_V += V
        sums_at = row_sums + 2 * i[:, None] + pair
        by_one = in_rows[:, None] & (pair == 0)
        if LAYOUT != NO_SIGNS:
            tl.store(sums_at, tl.broadcast_to(tl.sum(tl.abs(M), 1)[:, None], [R, C // 8]), by_one)
        tl.store(sums_at + 1, tl.broadcast_to(tl.sum(V, 1)[:, None], [R, C // 8]), by_one)

        direction = quotient(M, V, eps, up, down, ROUGH)
        w = moved(w, lr, direction, ROUGH)
        if WATCH:
            change += squares(w - before, mask, 1)
            sum_D += squares(direction, mask, 1)
            same += tl.sum(kept(w, before, mask, W, T, LOW), 1)
        drawn_at = start_at + i[:, None] * stride + calls_at[None, :]
        drawn = random_bits(seed, t, position, first, index_layout, drawn_at, STOCHASTIC)
        store(w, drawn, to, low, low_layout, at, mask, W, WHOLE, STOCHASTIC, LOW)

    col_sums = pointer(record, SPACE_COLS, T) + row_tile * 2 * cols
    if LAYOUT != NO_SIGNS:
        tl.store(col_sums + j, tl.sum(sum_M, 0), in_cols)
    tl.store(col_sums + cols + j, tl.sum(sum_V, 0), in_cols)
    if WATCH:
        watch(watched, item, CHANGE, tl.sum(change, 0))
        watch(watched, item, KEPT, tl.sum(same, 0))
        watch(watched, item, DIRECTION, tl.sum(sum_D, 0))


@triton.jit
def rows_at(i, first_row, row_step, SHARD: tl.constexpr):
    """Where a block's rows are among the whole's, from the tile's first on: 32 bits, for want of registers."""
    at = i
    if SHARD:
        at = (i - first_row).to(tl.int32) * row_step.to(tl.int32)
    return at


@triton.jit
def signed(size, bits):
    """``size``, which is not negative, or where the lowest of ``bits`` is 0 its negative."""
    if size.dtype == tl.float64:
        x = tl.where(bits & 1 != 0, size, -size)
    else:
        x = (size.to(tl.int32, bitcast=True) ^ ((bits ^ 1) << 31)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def smmf_fold(tiles, items, flags, T: tl.constexpr, FIRST: tl.constexpr, SKIP: tl.constexpr):
    """Factors from partial sums, the columns' not yet normalized; and the total of each chunk of columns.

    (SMMF, Algorithm 4) n >= m, so the columns' factors carry the normalization; the rows' are sums as they stand.
    """
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    if FIRST:
        fold_moment(record, index, 0, FIRST_ROW, FIRST_COL, T)
    fold_moment(record, index, 1, SECOND_ROW, SECOND_COL, T)


@triton.jit
def fold_moment(record, index, WHICH: tl.constexpr, ROW_FIELD: tl.constexpr, COL_FIELD: tl.constexpr, T: tl.constexpr):
    """Factors of the first moment (0) or of the second (1)."""
    rows = tl.load(record + ROWS)
    cols = tl.load(record + COLS)
    row_tiles = tl.load(record + ROW_TILES).to(tl.int32)
    col_tiles = tl.load(record + COL_TILES).to(tl.int32)
    k = index * CHUNK + tl.arange(0, CHUNK)
    row = partial_sums(pointer(record, SPACE_ROWS, T) + WHICH, 2 * rows, col_tiles, 2 * k, k < rows, T)
    tl.store(pointer(record, ROW_FIELD, T) + k, row, k < rows)
    col = partial_sums(pointer(record, SPACE_COLS, T) + WHICH * cols, 2 * cols, row_tiles, k, k < cols, T)
    tl.store(pointer(record, COL_FIELD, T) + k, col, k < cols)
    tl.store(pointer(record, SPACE_TOTALS, T) + 2 * index + WHICH, tl.sum(col, 0))


@triton.jit
def smmf_shard_fold(tiles, items, flags, T: tl.constexpr, FIRST: tl.constexpr, SKIP: tl.constexpr):
    """Adds the sums of a parameter's blocks to those of the whole, block after block. A tile is the first of the blocks
    and a chunk of the whole's rows and columns, so that no two programs add to the same number."""
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    low = index * CHUNK
    k = low + tl.arange(0, CHUNK)
    in_rows = k < tl.load(record + ALL_ROWS)
    in_cols = k < tl.load(record + ALL_COLS)
    row_at = pointer(record, NEW_ROW, T) + k
    col_at = pointer(record, NEW_COL, T) + k
    row_V = tl.load(row_at, in_rows, 0.0)
    col_V = tl.load(col_at, in_cols, 0.0)
    if FIRST:
        row_at_M = pointer(record, SUM_ROW, T) + k
        col_at_M = pointer(record, SUM_COL, T) + k
        row_M = tl.load(row_at_M, in_rows, 0.0)
        col_M = tl.load(col_at_M, in_cols, 0.0)
    for b in range(0, tl.load(record + BLOCKS).to(tl.int32)):
        block = record + b * FIELDS
        rows = tl.load(block + ROWS)
        cols = tl.load(block + COLS)
        row = tl.load(block + ROW)
        row_step = tl.load(block + ROW_STEP)
        col = tl.load(block + COL)
        row_tiles = tl.load(block + ROW_TILES).to(tl.int32)
        col_tiles = tl.load(block + COL_TILES).to(tl.int32)
        row_sums = pointer(block, SPACE_ROWS, T)
        col_sums = pointer(block, SPACE_COLS, T)
        if (row < low + CHUNK) & (row + (rows - 1) * row_step >= low):
            i = (k - row) // row_step
            mine = (k >= row) & (i < rows) & (row + i * row_step == k)
            if FIRST:
                row_M += partial_sums(row_sums, 2 * rows, col_tiles, 2 * i, mine, T)
            row_V += partial_sums(row_sums + 1, 2 * rows, col_tiles, 2 * i, mine, T)
        if (col < low + CHUNK) & (col + cols > low):
            j = k - col
            mine = (j >= 0) & (j < cols)
            if FIRST:
                col_M += partial_sums(col_sums, 2 * cols, row_tiles, j, mine, T)
            col_V += partial_sums(col_sums + cols, 2 * cols, row_tiles, j, mine, T)
    if FIRST:
        tl.store(row_at_M, row_M, in_rows)
        tl.store(col_at_M, col_M, in_cols)
    tl.store(row_at, row_V, in_rows)
    tl.store(col_at, col_V, in_cols)


@triton.jit
def smmf_normalize(tiles, items, flags, T: tl.constexpr, FIRST: tl.constexpr, SKIP: tl.constexpr):
    """Columns' factors divided by their total; a zero total divides nothing."""
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    cols = tl.load(record + COLS)
    chunks = tl.cdiv(cols, CHUNK).to(tl.int32)
    totals = pointer(record, SPACE_TOTALS, T)
    k = index * CHUNK + tl.arange(0, CHUNK)
    in_cols = k < cols
    if FIRST:
        normalize(pointer(record, FIRST_COL, T) + k, totals, chunks, in_cols, T)
    normalize(pointer(record, SECOND_COL, T) + k, totals + 1, chunks, in_cols, T)


@triton.jit
def normalize(factors, totals, chunks, in_cols, T: tl.constexpr):
    total = total_of(totals, chunks, 2, T)
    total = tl.where(total == 0, 1.0, total).to(T)
    tl.store(factors, divide(tl.load(factors, in_cols, 0.0), total), in_cols)
