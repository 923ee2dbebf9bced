"""H-Fac on sharded parameters: one all-reduce for all of them, three where both rows and columns are sharded.

A rank with whole rows knows u and r of them, and one read of the gradient gives the sums over columns, with those for
the clip (`hfac.reference.hfac_sums`). They are added up over the ranks; the update is the second and last read. With
whole columns the transposed matrix is treated alike. With neither, sums over rows are added up first, and last the
clip's, of which each rank then knows its columns' share.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import clipping, ops, spec
from ..functional import pick
from ..rounding import BitOffset
from ..schedules import Scalar
from . import layout
from .bucket import Bucket, Entry, Options
from .schedule import Job, Stage, reduced, stages

Numbers = list[Tensor]
#: state keys of the two moments: rows and columns of the first, then of the second; and both whole
_KEYS = [str(state.key) for state in spec.HFAC_STEP.states]
_DENSE_KEYS = [str(state.key) for state in spec.HFAC_DENSE_STEP.states]


def buckets(entries: Sequence[Entry]) -> list[Bucket]:
    """Entries sorted into buckets, in an order that is the same on every rank."""
    matrices: dict[tuple[object, ...], list[Entry]] = {}
    vectors: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        names = tuple(tuple(stage.name for stage in each) for each in _stages(entry))
        key = entry.group, entry.param.dtype, entry.storage, names, _transposed(entry)
        (vectors if _cut(entry) is None else matrices).setdefault(key, []).append(entry)
    return [Matrices(mine) for mine in matrices.values()] + [Vectors(mine) for mine in vectors.values()]


def _cut(entry: Entry) -> int | None:
    """How many of the parameter's dimensions make the rows; None where moments are whole."""
    row = entry.state.get(_KEYS[0])
    return None if row is None else row.ndim


def _mesh_dims(entry: Entry) -> tuple[list[int], list[int]]:
    """Mesh dimensions that shard the rows' dimensions, and those that shard the columns'; a vector's are all of the
    former."""
    by_dim = layout.sharded_by(entry.param)
    k = _cut(entry)
    k = len(by_dim) if k is None else k
    return sum(by_dim[:k], []), sum(by_dim[k:], [])


def _transposed(entry: Entry) -> bool:
    """Whether columns are summed first: where a rank has whole columns but not whole rows, and where it has neither and
    the ranks that share columns are the nearer ones, so that matrices of both kinds meet in their first collective."""
    by_rows, by_cols = _mesh_dims(entry)
    return bool(by_cols) and (not by_rows or max(by_cols) < max(by_rows))


def _stages(entry: Entry) -> tuple[list[Stage], list[Stage], list[Stage]]:
    """What completes the sums of first rows, then columns, after transposing, and last one number per matrix from those
    of columns. Each has the same bits on all ranks that have the same rows, the same columns, the same matrix."""
    mesh = entry.param.device_mesh  # type: ignore[attr-defined]
    by_rows, by_cols = _mesh_dims(entry)
    if _transposed(entry):
        by_rows, by_cols = by_cols, by_rows
    everywhere = set(range(mesh.ndim))
    return (
        stages(mesh, by_cols, everywhere.difference(by_rows)),
        stages(mesh, by_rows, everywhere.difference(by_cols)),
        stages(mesh, by_cols, everywhere),
    )


class Matrices(Bucket):
    """Matrices [m, n] of which a rank has some rows and some columns. "Rows" are those whose sums come first: where
    columns come first, everything is transposed here."""

    algorithm = "hfac"

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        self.transposed = _transposed(entries[0])
        self.row_stages, self.col_stages, self.number_stages = _stages(entries[0])
        keys = [_KEYS[i] for i in ((1, 0, 3, 2) if self.transposed else (0, 1, 2, 3))]
        self.u, self.v, self.r, self.s = ([entry.local_state(key).view(-1) for entry in entries] for key in keys)
        self.rows, self.cols = ([entry.state[key].numel() for entry in entries] for key in keys[:2])
        self.params = [self._turned(i, param) for i, param in enumerate(self.params)]
        if self.lows is not None:
            self.lows = [self._turned(i, low) for i, low in enumerate(self.lows)]
        if self.transposed and self.bit_offsets is not None:
            self.bit_offsets = [self._turned_offset(i, offset) for i, offset in enumerate(self.bit_offsets)]

    def _order(self, i: int) -> list[int]:
        """The parameter's dimensions, those of its columns first."""
        k = self.entries[i].state[_KEYS[0]].ndim
        return [*range(k, self.params[i].ndim), *range(k)]

    def _turned(self, i: int, shard: Tensor) -> Tensor:
        return shard.permute(self._order(i)) if self.transposed else shard

    def _turned_offset(self, i: int, offset: BitOffset | None) -> BitOffset:
        assert offset is not None
        shape = self.entries[i].param.shape
        strides = offset.strides or tuple(shape[d + 1 :].numel() for d in range(len(shape)))
        return offset._replace(strides=tuple(strides[d] for d in self._order(i)))

    def requests(self, skip: bool, norm: bool) -> list[tuple[Stage, int]]:
        count = len(self.entries)
        rows, cols = (sum(t.numel() for t in state) for state in (self.u, self.v))
        by_row = [(stage, 2 * rows + 2 * count) for stage in self.row_stages]
        by_col = [(stage, 3 * cols + 3 * count) for stage in self.col_stages]
        return [*by_row, *by_col, *((stage, (1 + norm) * count) for stage in self.number_stages)]

    def gradients(self) -> list[Tensor | None]:
        return [None if g is None else self._turned(i, g) for i, g in enumerate(super().gradients())]

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        count, eps = len(self.entries), options.scalars["eps"]
        here = [i for i, grad in enumerate(grads) if grad is not None]
        decays = self.decays(options)
        beta2 = decays[1]
        b2: list[float] = beta2.tolist()
        present, refused = self.at(here), self.flags(here, grads, options)
        m, n = ([t.numel() for t in state] for state in (self.u, self.v))

        def read(rows: tuple[Numbers, ...], cols: tuple[Numbers, ...], beta2: Scalar, eps: float) -> None:
            """One read of the gradients, with lists of row and column numbers as `hfac.reference.hfac_sums`."""
            lists = {**_lists(spec.HFAC_SUMS, (*rows, *cols)), "cols": self.cols}
            mine: dict[str, Any] = {name: pick(entries, here) for name, entries in lists.items()}
            ops.run("hfac_sums", None, pick(grads, here), **mine, beta2=beta2, eps=eps, backend=options.backend)

        row_sums, new_rows = _split(torch.zeros(2 * sum(m), dtype=self.dtype, device=self.device), m, 2)
        row_lists: tuple[Numbers, ...] = (self.r, row_sums, new_rows)
        if self.row_stages:

            def fill_rows(room: Tensor) -> None:
                sums, squares, there, skipped = _split(room, m, 2, 2)
                there.copy_(present)
                skipped.copy_(refused)
                read((self.r, sums, squares), (), 0.0, 0.0)

            room = yield from reduced(len(self.row_stages), fill_rows)
            row_sums, squares, present, refused = _split(room, m, 2, 2)
            # The second read must leave the rows' complete moments unchanged, so its decay is 1. The row sums that it
            # finds are of this shard only, and unused.
            new_rows = _averaged(self.r, squares, b2, [cols * eps for cols in self.cols])
            row_lists = (new_rows, *row_lists[1:])

        def fill_cols(room: Tensor) -> None:
            *sums, totals, there, skipped = _split(room, n, 3, 3)
            there.copy_(present)
            skipped.copy_(refused)
            decay = torch.ones(len(here), dtype=torch.float64, device="cpu") if self.row_stages else beta2[here]
            read(row_lists, tuple(sums), decay, eps)
            for total, rows in zip(pick(totals, here), pick(new_rows, here), strict=True):
                torch.sum(rows, 0, out=total)

        room = yield from reduced(len(self.col_stages), fill_cols)
        col_sums, col_squares, ratios, totals, present, refused = _split(room, n, 3, 3)
        numbers = [torch.stack([square.sum() for square in col_squares])] if options.norm else []
        new_cols = _averaged(self.s, col_squares, b2, [rows * eps for rows in self.rows])
        torch._foreach_div_(ratios, new_cols)
        numbers = [torch.stack([ratio.sum() for ratio in ratios]), *numbers]
        if self.number_stages:
            room = yield from reduced(len(self.number_stages), lambda room: room.copy_(torch.cat(numbers)))
            numbers = list(room.split(count))
        norms = numbers[0]
        if options.norm:
            self.squares_found = numbers[1]

        going, left = self.who_goes(present, refused, here)
        # In double, where no intermediate result overflows.
        elements = [a * b for a, b in zip(self.rows, self.cols, strict=True)]
        whole = torch.tensor(elements, dtype=torch.float64, device=self.device)
        mean_squares = (totals.double() * norms.double() / whole).to(self.dtype)

        def apply() -> None:
            self.count_skipped(left)
            values = (self.u, self.v, self.r, self.s, row_sums, new_rows, col_sums, new_cols)
            lists = {**_lists(spec.HFAC_APPLY, values), "rows": self.rows, "cols": self.cols}
            vectors = dict(totals=totals, mean_squares=mean_squares)
            self.call(spec.HFAC_APPLY, going, grads, lists, options, decays, options.backend, **vectors)
            self.advance(going)

        return apply


class Vectors(Bucket):
    """Parameters whose moments are whole and sharded as they are: ranks share one number for the clip of each, and one
    for the gradient's norm where that is needed."""

    algorithm = "hfac"

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        self.stages = _stages(entries[0])[1]
        self.averages, self.squares = ([entry.local_state(key) for entry in entries] for key in _DENSE_KEYS)

    def requests(self, skip: bool, norm: bool) -> list[tuple[Stage, int]]:
        return [(stage, (3 + norm) * len(self.entries)) for stage in self.stages]

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        count = len(self.entries)
        here = [i for i, grad in enumerate(grads) if grad is not None]
        decays = self.decays(options)

        def fill(room: Tensor) -> None:
            norms, present, refused, *squares = room.split(count)
            present.copy_(self.at(here))
            refused.copy_(self.flags(here, grads, options))
            if squares and here:
                squares[0][here] = torch.stack(clipping.norms(pick(grads, here))).to(self.dtype).square()
            if here and options.scalars["clip_threshold"] is not None:
                beta2, eps = decays[1][here], options.scalars["eps"]
                sums = ops.hfac_dense_squares(pick(grads, here), pick(self.squares, here), beta2=beta2, eps=eps)
                norms[here] = torch.stack(sums)

        room = yield from reduced(len(self.stages), fill)
        norms, present, refused, *squares = room.split(count)
        if squares:
            (self.squares_found,) = squares
        going, left = self.who_goes(present, refused, here)
        mean_squares = norms / torch.tensor(self.elements, dtype=self.dtype, device=self.device)

        def apply() -> None:
            self.count_skipped(left)
            op, lists = spec.HFAC_DENSE_STEP, _lists(spec.HFAC_DENSE_STEP, (self.averages, self.squares))
            # In plain torch with every backend: vectors are few.
            self.call(op, going, grads, lists, options, decays, "reference", mean_squares=mean_squares)
            self.advance(going)

        return apply


def _lists(op: spec.Op, values: Sequence[Sequence[Tensor]]) -> dict[str, Sequence[Tensor]]:
    """An op's lists by name, from as many of them as are given, in its order."""
    return {operand.name: each for operand, each in zip(op.operands, values, strict=False)}


def _split(room: Tensor, sizes: Sequence[int], times: int, vectors: int = 0) -> list[Any]:
    """``times`` lists of tensors of these sizes, then so many vectors with one number for each of the sizes."""
    count = len(sizes)
    pieces = room.split([*sizes] * times + [count] * vectors)
    lists = (list(pieces[k * count : (k + 1) * count]) for k in range(times))
    return [*lists, *pieces[times * count :]]


def _averaged(
    old: Sequence[Tensor], squares: Sequence[Tensor], decays: Sequence[float], eps: Sequence[float]
) -> list[Tensor]:
    """decay old + (1 - decay) (squares + eps), for every entry."""
    new = torch._foreach_mul(list(old), list(decays))
    fresh = torch._foreach_add(list(squares), list(eps))
    torch._foreach_mul_(fresh, [1 - decay for decay in decays])
    torch._foreach_add_(new, fresh)
    return list(new)
