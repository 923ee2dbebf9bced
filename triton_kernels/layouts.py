"""Layouts of tensors that are read through their strides, as kernels find an element's offset by them, and how random
bits of such tensors are drawn."""

import math
from collections.abc import Sequence

from . import table


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


def packed_layout(layout: Sequence[int]) -> list[int]:
    """A merged layout as kernels read it: dimensions, then of each size, stride and what divides by the size. Where
    the number of elements and all offsets are below 2^31, the number of dimensions is negative."""
    dims, *pairs = layout
    sizes, strides = pairs[::2], pairs[1::2]
    reach = max(math.prod(sizes), 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)))
    factors = [factor_of(size, reach) for size in sizes]
    packed = [x for one in zip(sizes, strides, factors, strict=True) for x in one]
    return [dims if 0 in factors else -dims, *packed]


def factor_of(size: int, reach: int) -> int:
    """What `element.divided` takes to divide by a size numbers below ``reach``; 0 where these are too large. With a
    shift by 31 bits more than the size has, the quotient of the multiplier's rounding stays below one half unit for all
    numbers below 2^31."""
    if size < 1 or max(size, reach) >= 1 << 31:
        return 0
    shift = 31 + (size - 1).bit_length()
    return shift << 32 | -(-(1 << shift) // size)


def bits_of(layout: Sequence[int], first: int, whole: bool) -> int:
    """How the random bits of a tensor are drawn, the first of whose elements has this index and whose others follow
    from this layout; ``whole``: rows and runs are whole vectors of 8."""
    dims, *pairs = layout
    steps = [stride for stride in pairs[1::2]]
    if not whole or first % 8 or steps[:1] not in ([], [1]) or any(n % 8 for n in (*pairs[:1], *steps[1:])):
        return table.EACH.value
    return (table.EIGHT_APART if dims > 1 else table.EIGHT).value
