"""How a parameter of any shape becomes a matrix.

Both choices depend on the global shape alone, never on values or on how a tensor is sharded: state keeps its shape
for the whole of a training run, and a checkpoint fits any layout.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

MATRICIZE = ("balanced", "flatten")


def cut(shape: Sequence[int], matricize: str = "balanced") -> int | None:
    """The k that views ``shape`` as (prod(shape[:k]), prod(shape[k:])) for H-Fac, or None if nothing can be factored.

    Args:
        shape: the parameter's (global) shape.
        matricize: "balanced" takes the k in 1..ndim-1 that minimises rows + columns, ties the smaller k: a Linear
            weight keeps its shape, a 64 x 3 x 7 x 7 convolution becomes 64 x 147. "flatten" takes k = 1.

    Returns:
        k, or None for fewer than two dimensions, or where the cut leaves one row or one column: a direction of size
        1 has nothing to average, so the moments are then kept whole.
    """
    return _cut(tuple(shape), matricize)


@lru_cache(maxsize=4096)
def _cut(shape: tuple[int, ...], matricize: str) -> int | None:
    if len(shape) < 2:
        return None

    def sides(k: int) -> tuple[int, int]:
        return math.prod(shape[:k]), math.prod(shape[k:])

    k = 1 if matricize == "flatten" else min(range(1, len(shape)), key=lambda k: sum(sides(k)))
    return None if 1 in sides(k) else k


@lru_cache(maxsize=4096)
def square(numel: int) -> tuple[int, int]:
    """(n, m) with n * m = numel, n >= m and n - m least: SMMF's square-matricization (SMMF, Algorithm 2).

    A prime gives (numel, 1), an empty tensor (0, 1): in both nothing is factored.
    """
    m = math.isqrt(numel)
    while m > 1 and numel % m:
        m -= 1
    m = max(m, 1)
    return numel // m, m


def sign_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of SMMF's packed sign bits for a parameter of ``shape``: (shape[0], ceil(prod(shape[1:]) / 8)) bytes.

    Each slice of the first dimension is padded to whole bytes, so that the signs shard as the parameter does.
    """
    return shape[0], -(-math.prod(shape[1:]) // 8)
