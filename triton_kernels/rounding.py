"""Stochastic rounding and split master weights: the functions of `hfac.rounding` by the same names, equal to the bit.

Rounded weights are stored as the bits of integers: a conversion to a 16-bit type would round again, and the
interpreter's truncates.
"""

import triton
import triton.language as tl

from .element import offsets, operand
from .table import *


@triton.jit
def counter(record, scalars, item, STOCHASTIC: tl.constexpr):
    """What the random bits of a parameter's elements have in common in a step: key, step, position, the first index and
    the address of the layout that gives the others."""
    seed, step, position, first, layout = 0, 0, 0, 0, 0
    if STOCHASTIC != NEAREST:
        low = tl.load(scalars + SEED).to(tl.uint32).to(tl.uint64)
        seed = (tl.load(scalars + SEED + 1).to(tl.uint32).to(tl.uint64) << 32) | low
        at = OWN + OWNED * tl.load(scalars + PER_PARAM).to(tl.int32) * (item + 1)
        step = tl.load(scalars + at + 2).to(tl.uint32)
        position = tl.load(record + POSITION).to(tl.uint32)
        first = tl.load(record + FIRST_INDEX)
        layout = tl.load(record + INDEX_LAYOUT)
    return seed, step, position, first, layout


@triton.jit
def calls(COUNT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """int64: the neighbours, of COUNT, that Philox is called for: all, or the first of every eight."""
    if STOCHASTIC == EACH:
        at = tl.arange(0, COUNT).to(tl.int64)
    else:
        at = 8 * tl.arange(0, COUNT // 8).to(tl.int64)
    return at


@triton.jit
def random_bits(seed, step, position, first, layout, at, STOCHASTIC: tl.constexpr):
    """uint32, each element's 16 random bits, where there are any. Where eight share a call, `at` is the first of every
    eight, and the result has three dimensions more, of 2, which are those of the eight."""
    bits = 0
    if STOCHASTIC != NEAREST:
        index = first + offsets(at, layout, STOCHASTIC == EIGHT)
        block = index >> 3
        w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), step, position)
        if STOCHASTIC == EACH:
            k = (index & 7).to(tl.uint32)
            word = tl.where(k < 4, tl.where(k < 2, w0, w1), tl.where(k < 6, w2, w3))
            bits = (word >> ((k & 1) * 16)) & 0xFFFF
        else:
            words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
            bits = tl.join(words & 0xFFFF, words >> 16)
    return bits


@triton.jit
def not_a_number(u):
    return (u & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def stochastic(w, W: tl.constexpr, bits):
    """The bits of the type W that a float32 is rounded to."""
    u = w.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == W:
        rounded = (u + bits) >> 16
        nan = (u >> 16) | 0x40
    else:
        # Magnitude and exponent. What is below 2^-14 is a multiple of 2^-24, of which `shift` bits are cut.
        size = (u & 0x7FFFFFFF).to(tl.int32)
        drawn = bits.to(tl.int32)
        exponent = size >> 23
        shift = tl.minimum(tl.maximum(126 - exponent, 14), 24)
        gone = tl.minimum(tl.maximum(126 - exponent - shift, 0), 31)
        significand = ((size & 0x7FFFFF) | 0x800000) >> gone
        normal = ((size + (drawn >> 3)) >> 13) - (112 << 10)
        small = (significand + ((drawn << 8) >> (24 - shift))) >> shift
        rounded = tl.minimum(tl.where(exponent >= 113, normal, small), 0x7C00).to(tl.uint32) | ((u >> 31) << 15)
        nan = ((u >> 31) << 15) | 0x7E00
    return tl.where(not_a_number(u), nan, rounded).to(tl.int16)


@triton.jit
def join(high, low, LOW: tl.constexpr):
    """The float32 of a bfloat16 and LOW low bits."""
    u = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + (low.to(tl.int32) << (16 - LOW))
    return u.to(tl.float32, bitcast=True)


@triton.jit
def split(w, bits, STOCHASTIC: tl.constexpr, LOW: tl.constexpr):
    """The bits of a bfloat16, and the LOW low bits."""
    u = w.to(tl.uint32, bitcast=True)
    nan = not_a_number(u)
    high_nan = (u >> 16) | 0x40
    if LOW == 8:
        if STOCHASTIC != NEAREST:
            u = (u + (bits >> 8)) & 0xFFFFFF00
        else:
            u = (u + ((u >> 8) & 1) + 0x7F) & 0xFFFFFF00
    high = (u + 0x8000) >> 16
    low = tl.where(nan, 0, (u - (high << 16)).to(tl.int32) >> (16 - LOW))
    if LOW == 8:
        low = low.to(tl.int8)
    else:
        low = low.to(tl.int16)
    return tl.where(nan, high_nan, high).to(tl.int16), low


@triton.jit
def nearest(w, W: tl.constexpr, T: tl.constexpr, LOW: tl.constexpr):
    """The number that a new weight, rounded to nearest, would be stored as, in the type of the arithmetic. Sixteen low
    bits hold all of it."""
    if LOW == 8:
        high, rest = split(w, 0, NEAREST, LOW)
        w = join(high, rest, LOW)
    elif LOW == 0 and tl.bfloat16 == W:
        u = w.to(tl.uint32, bitcast=True)
        rounded = ((u + ((u >> 16) & 1) + 0x7FFF) & 0xFFFF0000).to(tl.float32, bitcast=True)
        w = tl.where(not_a_number(u), w, rounded)
    elif LOW == 0:
        w = w.to(W).to(T)
    return w


@triton.jit
def kept(w, old, mask, W: tl.constexpr, T: tl.constexpr, LOW: tl.constexpr):
    """int32: which elements would be stored as what they are."""
    return (mask & (nearest(w, W, T, LOW) == old)).to(tl.int32)


@triton.jit
def weights(record, W: tl.constexpr, WHOLE: tl.constexpr, LOW: tl.constexpr):
    """Pointers to a parameter and to its low bits, each followed by the address of its layout."""
    low, low_layout = 0, 0
    if LOW != 0:
        if LOW == 8:
            low = operand(tl.load(record + LOW_BITS), tl.int8, WHOLE)
        else:
            low = operand(tl.load(record + LOW_BITS), tl.int16, WHOLE)
        low_layout = tl.load(record + LOW_LAYOUT)
    return operand(tl.load(record + PARAM), W, WHOLE), tl.load(record + PARAM_LAYOUT), low, low_layout


@triton.jit
def load(to, low, layout, at, mask, T: tl.constexpr, WHOLE: tl.constexpr, LOW: tl.constexpr):
    """Weights in the type of the arithmetic."""
    w = tl.load(to, mask, 0.0)
    rest = w
    if LOW != 0:
        rest = tl.load(low + offsets(at, layout, WHOLE), mask, 0)
    return widened(w, rest, T, LOW)


@triton.jit
def widened(w, rest, T: tl.constexpr, LOW: tl.constexpr):
    """Weights, with their low bits where these are stored apart, in the type of the arithmetic."""
    if LOW == 0:
        w = w.to(T)
    else:
        w = join(w, rest, LOW)
    return w


@triton.jit
def store(
    w,
    bits,
    to,
    low,
    layout,
    at,
    mask,
    W: tl.constexpr,
    WHOLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOW: tl.constexpr,
):
    """New weights, in the type W or in two pieces."""
    if STOCHASTIC != NEAREST:
        bits = tl.reshape(bits, w.shape)
    if LOW != 0:
        high, rest = split(w, bits, STOCHASTIC, LOW)
        tl.store(to, high.to(W, bitcast=True), mask)
        tl.store(low + offsets(at, layout, WHOLE), rest, mask)
    elif STOCHASTIC != NEAREST:
        tl.store(to, stochastic(w, W, bits).to(W, bitcast=True), mask)
    else:
        tl.store(to, w.to(W), mask)
