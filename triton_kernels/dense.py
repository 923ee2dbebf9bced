"""Steps with whole moments, and the test for finite gradients: programs over runs of elements."""

import triton
import triton.language as tl

from .element import (
    decays,
    divide,
    excess,
    finite,
    gradient,
    gradients,
    length,
    moved,
    offsets,
    operand,
    pointer,
    program,
    quotient,
    root,
    squares,
    stretch,
    total_of,
    watch,
)
from .rounding import calls, counter, kept, load, random_bits, store, weights
from .table import *


@triton.jit
def looked_at(
    tiles,
    items,
    grads,
    scalars,
    G: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A program of LOOKED elements: the parameter, its record and the program's index among its own; how many elements
    there are; and the gradient, as of `gradients`."""
    item, record, index = program(tiles, items)
    count = tl.load(record + ROWS) * tl.load(record + COLS)
    if WHOLE:
        count = tl.multiple_of(count, 8)
    grad, layout, scale = gradients(grads, scalars, item, G, T, WHOLE, SCALED, ALIGNED)
    return item, record, index, count, grad, layout, scale


@triton.jit
def look(
    tiles,
    items,
    grads,
    scalars,
    flags,
    G: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """flags[parameter] = 1 where an element of its gradient is not finite. Every program that says so writes the same
    word."""
    item, record, index, count, grad, layout, scale = looked_at(
        tiles, items, grads, scalars, G, T, WHOLE, ALIGNED, SCALED
    )
    first = index * LOOKED
    bad = tl.zeros([RUN], tl.int32)
    for start in range(first, tl.minimum(first + LOOKED, count), RUN):
        at = start + tl.arange(0, RUN).to(tl.int64)
        g = gradient(grad, at, layout, at < count, scale, T, WHOLE, SCALED)
        bad |= (finite(g, count) == 0).to(tl.int32)
    found = tl.max(bad, 0)
    tl.store(flags + item, found, found != 0)


@triton.jit
def run_squares(
    tiles,
    items,
    grads,
    scalars,
    G: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Shares of a gradient's sum of squares, in double as their total."""
    item, record, index, count, grad, layout, scale = looked_at(
        tiles, items, grads, scalars, G, T, WHOLE, ALIGNED, SCALED
    )
    first = index * LOOKED
    total = tl.zeros([RUN], T)
    for start in range(first, tl.minimum(first + LOOKED, count), RUN):
        at = start + tl.arange(0, RUN).to(tl.int64)
        g = gradient(grad, at, layout, at < count, scale, T, WHOLE, SCALED)
        total += g * g
    tl.store(pointer(record, SPACE_TOTALS, tl.float64) + index * 2, tl.sum(total.to(tl.float64), 0))


@triton.jit
def add_squares(tiles, items, squares, OF_RUNS: tl.constexpr):
    """A parameter's shares added up: those of `run_squares`, or of chunks of columns (`hfac_folds.hfac_squares`)."""
    item, record, _ = program(tiles, items)
    cols = tl.load(record + COLS)
    if OF_RUNS:
        shares = tl.cdiv(tl.load(record + ROWS) * cols, LOOKED).to(tl.int32)
    else:
        shares = tl.cdiv(cols, CHUNK).to(tl.int32)
    tl.store(squares + item, total_of(pointer(record, SPACE_TOTALS, tl.float64), shares, 2, tl.float64))


@triton.jit
def run_bits(record, scalars, item, index, STOCHASTIC: tl.constexpr):
    """Random bits of a run's elements, where there are any."""
    seed, t, position, first, layout = counter(record, scalars, item, STOCHASTIC)
    at = index * RUN + calls(RUN, STOCHASTIC)
    return random_bits(seed, t, position, first, layout, at, STOCHASTIC)


@triton.jit
def watch_run(watched, item, w, before, direction, mask, W: tl.constexpr, T: tl.constexpr, LOW: tl.constexpr):
    """Reports what a step does to a run's elements."""
    watch(watched, item, CHANGE, squares(w - before, mask, 0))
    watch(watched, item, KEPT, tl.sum(kept(w, before, mask, W, T, LOW), 0))
    watch(watched, item, DIRECTION, squares(direction, mask, 0))


@triton.jit
def smmf_dense(
    tiles,
    items,
    grads,
    scalars,
    flags,
    watched,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOW: tl.constexpr,
    ROUGH: tl.constexpr,
    FIRST: tl.constexpr,
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
    at = index * RUN + tl.arange(0, RUN)
    mask = at < length(record, ROWS, WHOLE)
    b1, rest1, b2, rest2 = decays(scalars, item, T)
    lr = tl.load(scalars + LR)
    weight_decay = tl.load(scalars + WEIGHT_DECAY)
    eps = tl.load(scalars + EPS).to(T)
    grad, layout, scale = gradients(grads, scalars, item, G, T, WHOLE, SCALED, ALIGNED)
    g = gradient(grad, at, layout, mask, scale, T, WHOLE, SCALED, NEGATE)
    param, layout, low, low_layout = weights(record, W, WHOLE, LOW)
    to = param + offsets(at, layout, WHOLE)
    w = load(to, low, low_layout, at, mask, T, WHOLE, LOW)
    before = w
    if COUPLED:
        g = g + weight_decay.to(T) * w
    else:
        w = w * (1.0 - lr * weight_decay).to(T)
    M = g
    if FIRST:
        first = operand(tl.load(record + FIRST_ROW), T, WHOLE) + at
        M = b1 * tl.load(first, mask, 0.0) + rest1 * g
        tl.store(first, M, mask)
    second = operand(tl.load(record + SECOND_ROW), T, WHOLE) + at
    V = b2 * tl.load(second, mask, 0.0) + rest2 * (g * g)
    tl.store(second, V, mask)
    up, down = stretch(eps)
    direction = quotient(M, V, eps, up, down, ROUGH)
    w = moved(w, lr.to(T), direction, ROUGH)
    if WATCH:
        watch_run(watched, item, w, before, direction, mask, W, T, LOW)
    bits = run_bits(record, scalars, item, index, STOCHASTIC)
    store(w, bits, to, low, low_layout, at, mask, W, WHOLE, STOCHASTIC, LOW)


@triton.jit
def hfac_dense_look(
    tiles,
    items,
    grads,
    scalars,
    flags,
    G: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOOK: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Each run's sum of U^2, U = G / sqrt(q) with the new q, which the step forms again; and whether G is finite."""
    item, record, index = program(tiles, items)
    count = length(record, ROWS, WHOLE)
    at = index * RUN + tl.arange(0, RUN)
    mask = at < count
    b1, rest1, b2, rest2 = decays(scalars, item, T)
    grad, layout, scale = gradients(grads, scalars, item, G, T, WHOLE, SCALED, ALIGNED)
    g = gradient(grad, at, layout, mask, scale, T, WHOLE, SCALED)
    if LOOK:
        bad = tl.max((finite(g, count) == 0).to(tl.int32), 0)
        tl.store(flags + item, bad, bad != 0)
    old = tl.load(operand(tl.load(record + SECOND_ROW), T, WHOLE) + at, mask, 0.0)
    q = b2 * old + rest2 * (g * g + tl.load(scalars + EPS).to(T))
    U = tl.where(mask, divide(g, root(q)), 0.0)
    tl.store(pointer(record, SPACE_TOTALS, T) + index, tl.sum(U * U, 0))


@triton.jit
def hfac_dense_total(tiles, items, T: tl.constexpr):
    """A parameter's sum of U^2, behind its runs', so that no program of the step adds up all others'."""
    _, record, _ = program(tiles, items)
    runs = tl.cdiv(tl.load(record + ROWS) * tl.load(record + COLS), RUN).to(tl.int32)
    totals = pointer(record, SPACE_TOTALS, T)
    tl.store(totals + runs, total_of(totals, runs, 1, T))


@triton.jit
def hfac_dense(
    tiles,
    items,
    grads,
    scalars,
    flags,
    watched,
    W: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LOW: tl.constexpr,
    CLIPPED: tl.constexpr,
    NEGATE: tl.constexpr,
    SKIP: tl.constexpr,
    SCALED: tl.constexpr,
    WATCH: tl.constexpr,
):
    item, record, index = program(tiles, items)
    if SKIP:
        if tl.load(flags + item) != 0:
            return
    count = length(record, ROWS, WHOLE)
    at = index * RUN + tl.arange(0, RUN)
    mask = at < count
    b1, rest1, b2, rest2 = decays(scalars, item, T)
    grad, layout, scale = gradients(grads, scalars, item, G, T, WHOLE, SCALED, ALIGNED)
    g = gradient(grad, at, layout, mask, scale, T, WHOLE, SCALED, NEGATE)
    param, layout, low, low_layout = weights(record, W, WHOLE, LOW)
    to = param + offsets(at, layout, WHOLE)
    w = load(to, low, low_layout, at, mask, T, WHOLE, LOW)
    before = w
    first = operand(tl.load(record + FIRST_ROW), T, WHOLE) + at
    second = operand(tl.load(record + SECOND_ROW), T, WHOLE) + at
    m = b1 * tl.load(first, mask, 0.0) + rest1 * g
    q = b2 * tl.load(second, mask, 0.0) + rest2 * (g * g + tl.load(scalars + EPS).to(T))
    tl.store(first, m, mask)
    tl.store(second, q, mask)
    q = root(q)
    direction = divide(b1 * m + rest1 * g, q)
    if CLIPPED:
        runs = tl.cdiv(count, RUN).to(tl.int32)
        total = tl.load(pointer(record, SPACE_TOTALS, T) + runs)
        direction = direction * divide(tl.full([], 1.0, T), excess(divide(total, count.to(T)), scalars, T))
    lr = tl.load(scalars + LR).to(T)
    weight_decay = tl.load(scalars + WEIGHT_DECAY).to(T)
    w = w - lr * (direction + weight_decay * w)
    if WATCH:
        watch_run(watched, item, w, before, divide(g, q), mask, W, T, LOW)
    bits = run_bits(record, scalars, item, index, STOCHASTIC)
    store(w, bits, to, low, low_layout, at, mask, W, WHOLE, STOCHASTIC, LOW)
