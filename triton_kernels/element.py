"""What kernels share: which tile a program has, loads of records, gradients and scalars, exact roots and quotients.

Arithmetic has one type, T: float32, or float64 for float64 parameters. Kernels are launched without contraction to
fused multiply-adds, so that a product and a sum round as they do in `hfac.reference`.

Pointer arguments of kernels are described by `table.MEMORY`. Compile-time arguments, of all kernels:

    W, G, T       types of the parameter, of the gradient, of the arithmetic
    R, C          rows in flight and columns of a tile
    WHOLE         contiguous, aligned but perhaps for the gradient, rows of whole vectors of 8
    ALIGNED       bytes of which a WHOLE gradient's address is a multiple
    LAYOUT        how SMMF's signs are packed (`table.NO_SIGNS` and so on)
    SHARD         the matrix is a block of a larger one
    STOCHASTIC    how random bits are drawn (`table.NEAREST` and so on)
    LOW           low bits of the weight that are stored apart: 0, 8 or 16
    ROUGH         roots and quotients of single elements may be approximate: weights of 16 bits alone
    PIECES, APART how a tile of H-Fac's statistics lies in lanes (`plan`)
    WIDE          rows are longer than C
    COLUMNS       columns are summed, too
    FIRST         there is a first moment
    CODES         H-Fac's first moment is in codes of 8 bits (`codes`)
    COUPLED       weight decay is added to the gradient
    NEGATE        the objective is maximized
    CLIPPED       H-Fac clips its own update
    SCALED        gradients are divided by a number
    LOOK          flags are set where a gradient is not finite
    SKIP          parameters whose flag is set keep their values
    AGAIN         statistics are there, and are taken again only where gradients are clipped
    WATCH         what the step does is reported
"""

import triton
import triton.language as tl

from .table import *


@triton.jit
def program(tiles, items):
    """What this program works on: the parameter, its record, and the index of the tile."""
    at = tiles + 2 * tl.program_id(0).to(tl.int64)
    item = tl.load(at).to(tl.int64)
    return item, items + item * FIELDS, tl.load(at + 1).to(tl.int64)


@triton.jit
def tile_of(record, index):
    """Of a tile: its position among the tiles of rows and of columns, its first row and the one after its last."""
    tile_rows = tl.load(record + TILE_ROWS)
    col_tiles = tl.load(record + COL_TILES).to(tl.int32)
    row_tile = (index.to(tl.int32) // col_tiles).to(tl.int64)
    col_tile = (index.to(tl.int32) % col_tiles).to(tl.int64)
    first_row = row_tile * tile_rows
    return row_tile, col_tile, first_row, tl.minimum(first_row + tile_rows, tl.load(record + ROWS))


@triton.jit
def root(x):
    """The square root rounded once (IEEE), which `tl.sqrt` is not in float32."""
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)
    return y


@triton.jit
def divide(x, y):
    """The quotient rounded once (IEEE)."""
    if y.dtype == tl.float64:
        z = x / y
    else:
        z = tl.div_rn(x, y)
    return z


@triton.jit
def stretch(eps):
    """What `quotient` multiplies V and its root by. An approximate root takes what is below 2^-126 for 0, which beside
    an eps of 2^-40 and more is nothing; with a smaller one V is brought above it."""
    small = eps < 2.0**-40
    return tl.where(small, 2.0**24, 1.0).to(eps.dtype), tl.where(small, 2.0**-12, 1.0).to(eps.dtype)


@triton.jit
def quotient(M, V, eps, up, down, ROUGH: tl.constexpr):
    """M / (sqrt(V) + eps), each rounded as IEEE's; ROUGH: off by a few units in the last place, which a weight of 16
    bits does not hold. Three instructions then divide: 1 / y is the square of 1 / sqrt(y), and y is not negative."""
    if ROUGH:
        inverse = tl.rsqrt(tl.fma(tl.sqrt(V * up), down, eps))
        x = M * inverse * inverse
    else:
        x = divide(M, root(V) + eps)
    return x


@triton.jit
def moved(w, lr, direction, ROUGH: tl.constexpr):
    """w - lr direction; ROUGH: rounded once."""
    if ROUGH:
        w = tl.fma(direction, -lr, w)
    else:
        w = w - lr * direction
    return w


@triton.jit
def pointer(record, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """A record's address as a pointer to TYPE."""
    return tl.load(record + FIELD).to(tl.pointer_type(TYPE))


@triton.jit
def operand(address, TYPE: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr = 16):
    """Pointer to a tensor. From a table it has lost its alignment, and without 16 bytes of it every access would be of
    one element; with 4, of 4 bytes."""
    p = address.to(tl.pointer_type(TYPE))
    if WHOLE:
        p = tl.multiple_of(p, ALIGNED)
    return p


@triton.jit
def length(record, FIELD: tl.constexpr, WHOLE: tl.constexpr):
    """A record's number of columns or elements. Where it is known to be one of whole vectors, so is every mask made of
    it. The hint belongs to the load: one on an argument of a function would be lost."""
    count = tl.load(record + FIELD)
    if WHOLE:
        count = tl.multiple_of(count, 8)
    return count


@triton.jit
def offsets(at, layout, WHOLE: tl.constexpr):
    """Where the row-major elements `at` (int64) lie, in elements from the start; any strides. Of fewer than 2^31
    elements with offsets below that (a negative number of dimensions) a product replaces each division."""
    if WHOLE:
        offset = at
    else:
        layout = layout.to(tl.pointer_type(tl.int64))
        dims = tl.load(layout).to(tl.int32)
        offset = at
        if dims < 0:
            short = at.to(tl.int32)
            lies = tl.zeros_like(short)
            for d in range(0, -1 - dims):
                outer = divided(short, tl.load(layout + 3 + 3 * d))
                inner = short - outer * tl.load(layout + 1 + 3 * d).to(tl.int32)
                lies += inner * tl.load(layout + 2 + 3 * d).to(tl.int32)
                short = outer
            lies += short * tl.load(layout - 1 - 3 * dims).to(tl.int32)
            offset = lies.to(tl.int64)
        elif dims > 0:
            rest = at
            offset = tl.zeros_like(at)
            for d in range(0, dims - 1):
                size = tl.load(layout + 1 + 3 * d)
                outer = rest // size
                offset += (rest - outer * size) * tl.load(layout + 2 + 3 * d)
                rest = outer
            offset += rest * tl.load(layout - 1 + 3 * dims)
    return offset


@triton.jit
def offsets_beside(at, layout, other, known, WHOLE: tl.constexpr):
    """As `offsets`, which are `known` of the `other` layout. Gradients mostly lie as their parameters do."""
    offset = known
    if not WHOLE:
        if layout != other:
            offset = offsets(at, layout, WHOLE)
    return offset


@triton.jit
def divided(n, factor):
    """Quotients of int32 numbers that are not negative by a size, of which `factor` (`layouts.factor_of`) has a shift
    and a multiplier in its upper and its lower 32 bits."""
    product = n.to(tl.uint32).to(tl.uint64) * factor.to(tl.uint32).to(tl.uint64)
    return (product >> (factor >> 32).to(tl.uint64)).to(tl.int32)


@triton.jit
def slices_of(at, slice, factor):
    """Which slice of so many elements each of the elements `at` (int64) is in, and where in it, as int64. `factor` as
    `divided` takes it; 0: numbers are too large for it."""
    if factor == 0:
        outer = at // slice
        within = at - outer * slice
    else:
        short = at.to(tl.int32)
        of = divided(short, factor)
        outer = of.to(tl.int64)
        within = (short - of * slice.to(tl.int32)).to(tl.int64)
    return outer, within


@triton.jit
def gradients(
    grads,
    scalars,
    item,
    G: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A parameter's gradient: pointer, address of its layout, and what it is divided by."""
    scale = 0
    if SCALED:
        scale = tl.load(scalars + GRAD_SCALE).to(T)
    return operand(tl.load(grads + 2 * item), G, WHOLE, ALIGNED), tl.load(grads + 2 * item + 1), scale


@triton.jit
def gradient(
    grad,
    at,
    layout,
    mask,
    scale,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    NEGATE: tl.constexpr = False,
):
    """Elements of the gradient as the step sees them."""
    return seen(tl.load(grad + offsets(at, layout, WHOLE), mask, 0.0), scale, mask, T, SCALED, NEGATE)


@triton.jit
def seen(g, scale, mask, T: tl.constexpr, SCALED: tl.constexpr, NEGATE: tl.constexpr):
    """Elements that have been loaded as the step sees them; 0 outside of the matrix."""
    g = g.to(T)
    if SCALED:
        g = tl.where(mask, divide(g, scale), 0.0)
    if NEGATE:
        g = -g
    return g


@triton.jit
def fetch(
    i, row_at, last_row, in_cols, in_bytes, j, jb, start_at, stride, grad, param, low, signs, r_M, r_V,
    LAYOUT: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Loads of what rows on the bulk need: gradient, weights and their low bits, signs (or codes, which are a byte per
    element, too), and two factors of each row."""
    in_rows = i < last_row
    mask = in_rows[:, None] & in_cols[None, :]
    at = start_at + i[:, None] * stride + j[None, :]
    g = tl.load(grad + at, mask, 0.0)
    w = tl.load(param + at, mask, 0.0)
    rest = w
    if LOW != 0:
        rest = tl.load(low + at, mask, 0)
    row_V = tl.load(r_V + row_at, in_rows, 0.0)
    row_M = row_V
    packed = w
    if LAYOUT == WHOLE_BYTES:
        byte_at = signs + start_at // 8 + i[:, None] * (stride // 8) + jb[None, :]
        packed = tl.load(byte_at, in_rows[:, None] & in_bytes[None, :], 0)
    elif LAYOUT == BYTE_PER_ELEMENT:
        packed = tl.load(signs + at, mask, 0)
    if LAYOUT != NO_SIGNS:
        row_M = tl.load(r_M + row_at, in_rows, 0.0)
    return g, w, rest, packed, row_M, row_V


@triton.jit
def decays(scalars, item, T: tl.constexpr):
    """b1, 1 - b1, b2, 1 - b2 of a parameter, the differences formed in double as the host forms them."""
    at = OWN + OWNED * tl.load(scalars + PER_PARAM).to(tl.int64) * (item + 1)
    b1 = tl.load(scalars + at)
    b2 = tl.load(scalars + at + 1)
    return b1.to(T), (1.0 - b1).to(T), b2.to(T), (1.0 - b2).to(T)


@triton.jit
def excess(mean_square, scalars, T: tl.constexpr):
    """max(1, rms(U) / d), what H-Fac's clip of its own update divides by; a NaN stays."""
    ratio = divide(root(mean_square), tl.load(scalars + CLIP).to(T))
    return tl.where(ratio <= 1, 1.0, ratio).to(T)


@triton.jit
def finite(g, count):
    """Could a sum of `count` squares like this one be finite? The test of `hfac.reference`, element by element."""
    return tl.abs(g * g * count.to(g.dtype)) < float("inf")


@triton.jit
def watch(watched, item, WHAT: tl.constexpr, value):
    """Adds a program's share, which is of the arithmetic's type, to what is watched of its parameter, in double and in
    whatever order programs end: it is a report, by which nothing goes."""
    tl.atomic_add(watched + item * WATCHED + WHAT, value.to(tl.float64), sem="relaxed")


@triton.jit
def squares(x, mask, AXIS: tl.constexpr):
    """Sums of squares along an axis."""
    return tl.sum(tl.where(mask, x * x, 0.0), AXIS)


@triton.jit
def zeros(sum_g, square, mask):
    """int32: which rows or columns of the gradient are zero, by their sums. Squares alone may underflow."""
    return (mask & (sum_g == 0) & (square == 0)).to(tl.int32)


@triton.jit
def partial_sums(start, stride, tiles, k, mask, T: tl.constexpr):
    """Sums of the elements `k` of `tiles` vectors, `stride` elements apart, in an order that depends on their number
    alone."""
    total = tl.zeros([AT_ONCE, CHUNK], T)
    for first in range(0, tiles, AT_ONCE):
        t = (first + tl.arange(0, AT_ONCE)).to(tl.int64)
        keep = (t < tiles)[:, None] & mask[None, :]
        total += tl.load(start + t[:, None] * stride + k[None, :], keep, 0.0)
    return tl.sum(total, 0)


@triton.jit
def total_of(start, count, STRIDE: tl.constexpr, T: tl.constexpr):
    """The sum of `count` numbers, `STRIDE` elements apart, in an order that depends on their number alone."""
    lanes = tl.zeros([CHUNK], T)
    for first in range(0, count, CHUNK):
        c = first + tl.arange(0, CHUNK)
        lanes += tl.load(start + STRIDE * c, c < count, 0.0)
    return tl.sum(lanes, 0)
