"""Codes of 8 bits for H-Fac's first moment: the functions of `hfac.codes`, element by element.

ROUGH: a root and a quotient are off by a few units in the last place, which moves 1 code of some 30,000 to its
neighbour.
"""

import triton
import triton.language as tl

from .element import divide, root


@triton.jit
def unit_change(old, new, total_old, total, T: tl.constexpr):
    """What a row's share of sqrt(V) was, divided by what it is; 0 before the first step."""
    rho = divide(root(old), root(new)) * divide(root(total), root(total_old))
    return tl.where(total_old == 0, 0.0, rho).to(T)


@triton.jit
def decode(q, T: tl.constexpr, ROUGH: tl.constexpr):
    """What codes (int32) stand for."""
    above = (q * tl.abs(q)).to(T)
    below = 16256.25 - (q * q).to(T)
    if ROUGH:
        x = above / below
    else:
        x = divide(above, below)
    return x


@triton.jit
def encode(x, old, held, ROUGH: tl.constexpr):
    """int8 codes of x; `held` is what the `old` codes (int32) stand for. What is beyond 126 has the last code, as 126
    has; what is not finite has 0."""
    size = tl.abs(x)
    within = tl.minimum(size, 126.0)
    if ROUGH:  # s / sqrt(s + s^2); an s of which that is not normal has code 0
        within = tl.maximum(within, 2.0**-60)
        level = within * tl.rsqrt(tl.fma(within, within, within))
    else:
        level = root(divide(within, within + 1.0))
    # Adding a number of which only whole ones are neighbours rounds to the nearest of these, ties to even.
    if x.dtype == tl.float64:
        level = 127.5 * level + 6755399441055744.0
        code = (level.to(tl.int64, bitcast=True) - 0x4338000000000000).to(tl.int32)
    else:
        if ROUGH:
            level = tl.fma(level, 127.5, 12582912.0)
        else:
            level = 127.5 * level + 12582912.0
        code = level.to(tl.int32, bitcast=True) - 0x4B400000
    code = tl.where(size < float("inf"), code, 0)
    code = tl.where(x < 0, -code, code)
    # Where it would stay although |x| is smaller it goes one towards zero, or small codes would never come to rest.
    stays = (code == old) & (size < tl.abs(held))
    code = tl.where(stays, code - tl.where(old < 0, -1, 1), code)
    return code.to(tl.int8)
