"""What every kernel does with one element or one record: loads, stores, rounding, step scalars.

Arithmetic has one type, T: float32, or float64 for float64 parameters. Kernels are launched without contraction to
fused multiply-adds, so that a product and a sum round as they do in `hfac.reference`.
"""

import triton
import triton.language as tl

from .table import GRAD_SCALE, OWN, OWNED, PER_PARAM, WATCHED


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
def pointer(record, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """A record's address as a pointer to TYPE."""
    return tl.load(record + FIELD).to(tl.pointer_type(TYPE))


@triton.jit
def operand(address, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointer to a tensor. From a table it has lost its alignment, and without 16 bytes of it every access would be of
    one element."""
    p = address.to(tl.pointer_type(TYPE))
    if WHOLE:
        p = tl.multiple_of(p, 16)
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
def place(at, layout, WHOLE: tl.constexpr):
    """Where the row-major elements `at` (int64) lie, in elements from the start; any strides."""
    if WHOLE:
        offset = at
    else:
        layout = layout.to(tl.pointer_type(tl.int64))
        offset = tl.zeros_like(at)
        rest = at
        for d in range(0, tl.load(layout).to(tl.int32)):
            size = tl.load(layout + 1 + 2 * d)
            outer = rest // size
            offset += (rest - outer * size) * tl.load(layout + 2 + 2 * d)
            rest = outer
        offset += rest  # contiguous: no dimensions
    return offset


@triton.jit
def grad_scale(scalars, T: tl.constexpr, SCALED: tl.constexpr):
    """What gradients are divided by, where they are."""
    scale = 0
    if SCALED:
        scale = tl.load(scalars + GRAD_SCALE).to(T)
    return scale


@triton.jit
def gradient(grad, at, layout, mask, scale, T: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr):
    """Elements of the gradient as the step sees them, but for the sign of a maximized one."""
    g = tl.load(grad + place(at, layout, WHOLE), mask, 0.0).to(T)
    if SCALED:
        g = divide(g, scale)
    return g


@triton.jit
def decays(scalars, item, T: tl.constexpr):
    """b1, 1 - b1, b2, 1 - b2 of a parameter, the differences formed in double as the host forms them."""
    at = OWN + OWNED * tl.load(scalars + PER_PARAM).to(tl.int64) * (item + 1)
    b1 = tl.load(scalars + at)
    b2 = tl.load(scalars + at + 1)
    return b1.to(T), (1.0 - b1).to(T), b2.to(T), (1.0 - b2).to(T)


@triton.jit
def finite(g, count):
    """Could a sum of `count` squares like this one be finite? The test of `hfac.reference`, element by element."""
    return tl.abs(g * g * count.to(g.dtype)) < float("inf")


@triton.jit
def watch(watched, item, WHAT: tl.constexpr, value):
    """Adds a program's share to what is watched of its parameter, in whatever order programs end: it is a report, by
    which nothing goes."""
    tl.atomic_add(watched + item * WATCHED + WHAT, value.to(tl.float64), sem="relaxed")


@triton.jit
def squares(x, mask, AXIS: tl.constexpr):
    """Sums of squares along an axis, in double."""
    return tl.sum(tl.where(mask, x * x, 0.0), AXIS).to(tl.float64)


@triton.jit
def zeros(sum_g, square, mask):
    """int32: which rows or columns of the gradient are zero, by their sums. Squares alone may underflow."""
    return (mask & (sum_g == 0) & (square == 0)).to(tl.int32)


@triton.jit
def partial_sums(start, stride, tiles, k, mask, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, T: tl.constexpr):
    """Sums of the elements `k` of `tiles` vectors, `stride` elements apart, in an order that depends on their number
    alone."""
    total = tl.zeros([AT_ONCE, BLOCK], T)
    for first in range(0, tiles, AT_ONCE):
        t = (first + tl.arange(0, AT_ONCE)).to(tl.int64)
        keep = (t < tiles)[:, None] & mask[None, :]
        total += tl.load(start + t[:, None] * stride + k[None, :], keep, 0.0)
    return tl.sum(total, 0)
