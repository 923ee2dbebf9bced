"""How a parameter of any shape is viewed as a matrix.

Both views depend on the global shape alone, never on values or on how a tensor is sharded: state keeps its shape for
the whole training run, and a checkpoint fits any layout.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, get_args

from torch import Tensor

from .types import Matricize

MATRICIZE = get_args(Matricize)


def cut(shape: Sequence[int], matricize: Matricize = "balanced") -> int | None:
    """The k that views ``shape`` as (prod(shape[:k]), prod(shape[k:])) for H-Fac, or None if nothing can be factored.

    Args:
        shape: the parameter's (global) shape.
        matricize: "balanced" takes the k in 1..ndim-1 that minimises rows + columns, ties the smaller k: a Linear
            weight keeps its shape, a 64 x 3 x 7 x 7 convolution becomes 64 x 147. "flatten" takes k = 1.

    Returns:
        k, or None for fewer than two dimensions, or where there would be one row or one column, over which there is
        nothing to average: the moments are then kept whole.
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
    """(n, m) with n * m = numel, n >= m and n - m minimal: SMMF's square-matricization (SMMF, Algorithm 2).

    A prime gives (numel, 1) and an empty tensor (0, 1), neither of which is factored.
    """
    m = math.isqrt(numel)
    while m > 1 and numel % m:
        m -= 1
    m = max(m, 1)
    return numel // m, m


def sign_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of SMMF's packed sign bits for a parameter of ``shape``: (shape[0], ceil(prod(shape[1:]) / 8)) bytes.

    Each slice of the first dimension is padded to whole bytes, so that signs can be sharded as the parameter is.
    """
    return shape[0], -(-math.prod(shape[1:]) // 8)


class Block(NamedTuple):
    """A rectangle of the square matrix [n, m] whose elements are in a shard of the parameter.

    Element (a, b) of the block, a < rows and b < cols, is element ``first + a * stride + b`` of the flat shard, and is
    in row ``row + a * row_step`` and column ``col + b`` of the matrix.
    """

    first: int
    stride: int
    row: int
    row_step: int
    col: int
    rows: int
    cols: int

    @property
    def row_slice(self) -> slice:
        return slice(self.row, self.row + (self.rows - 1) * self.row_step + 1, self.row_step)

    @property
    def col_slice(self) -> slice:
        return slice(self.col, self.col + self.cols)

    def of(self, shard: Tensor) -> Tensor:
        """[rows, cols] view of a contiguous 1-d tensor of the shard."""
        return shard.as_strided((self.rows, self.cols), (self.stride, 1), shard.storage_offset() + self.first)


def blocks(runs: Iterable[tuple[int, int]], m: int) -> list[Block]:
    """Where the elements of a shard are in a row-major matrix of ``m`` columns, in as few blocks as can be merged.

    Args:
        runs: (first element, number of elements) of the runs of the whole parameter that make up the shard, in order.
    """
    pieces: list[Block] = []
    first = 0
    for start, length in runs:
        end = start + length
        while start < end:
            row, col = divmod(start, m)
            rows = 1 if col else max(1, (end - start) // m)
            cols = m if rows > 1 else min(m - col, end - start)
            pieces.append(Block(first, cols, row, 1, col, rows, cols))
            start, first = start + rows * cols, first + rows * cols
    return _joined(pieces)


def _joined(pieces: Iterable[Block]) -> list[Block]:
    """Merges single rows of the same columns, at regular distances, into blocks."""
    done: list[Block] = []
    growing: dict[tuple[int, int], Block] = {}
    for piece in pieces:
        if piece.rows > 1:
            done.append(piece)
            continue
        key = piece.col, piece.cols
        last = growing.get(key)
        if last is None:
            growing[key] = piece
            continue
        stride, step = piece.first - last.first, piece.row - last.row
        if last.rows > 1:
            stride, step = stride - (last.rows - 1) * last.stride, step - (last.rows - 1) * last.row_step
        if step > 0 and (last.rows == 1 or (stride, step) == (last.stride, last.row_step)):
            growing[key] = last._replace(stride=stride, row_step=step, rows=last.rows + 1)
        else:
            done.append(last)
            growing[key] = piece
    return done + list(growing.values())
