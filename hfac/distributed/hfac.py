"""H-Fac on sharded parameters: one all-reduce for all of them, three where both rows and columns are cut.

With whole rows on a rank, u and r are known there, and one look at the gradient gives the sums over columns, the clip
norm's included (`hfac.reference.hfac_sums`): they are added up over the ranks, and the update is the second and last
look. With whole columns the same is done on the transposed matrix. With neither, sums over rows go first, and the
clip norm, of which each rank then knows its columns' part, last.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import clipping, ops, spec
from ..rounding import Place
from ..schedules import Scalar
from . import layout
from .bucket import Bucket, Entry, Options, pick
from .schedule import Job, reduced

Numbers = list[Tensor]


def buckets(entries: Sequence[Entry]) -> list[Bucket]:
    """Entries sorted into buckets, in an order that is the same on every rank."""
    matrices: dict[tuple[object, ...], list[Entry]] = {}
    vectors: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        names = tuple(tuple(g.group_name for g in groups) for groups in _groups(entry))
        key = entry.group, entry.param.dtype, entry.storage, names, _transposed(entry)
        (vectors if _cut(entry) is None else matrices).setdefault(key, []).append(entry)
    return [Matrices(mine) for mine in matrices.values()] + [Vectors(mine) for mine in vectors.values()]


def _cut(entry: Entry) -> int | None:
    row = entry.state.get("exp_avg_row")
    return None if row is None else row.ndim


def _mesh_dims(entry: Entry) -> tuple[list[int], list[int]]:
    """Mesh dimensions that cut the rows' dimensions, and those that cut the columns'; a vector's are all of the
    former."""
    by_dim = layout.cuts(entry.param)
    k = _cut(entry)
    k = len(by_dim) if k is None else k
    return sum(by_dim[:k], []), sum(by_dim[k:], [])


def _transposed(entry: Entry) -> bool:
    """Whether columns are summed first: where they are whole and rows are not, and where both are cut and the ranks
    that share columns are the nearer ones, so that matrices of both kinds meet in their first collective."""
    by_rows, by_cols = _mesh_dims(entry)
    return bool(by_cols) and (not by_rows or max(by_cols) < max(by_rows))


def _groups(entry: Entry) -> tuple[list[Any], list[Any]]:
    """Groups over which the sums of first rows, then columns are completed, after transposing."""
    mesh = entry.param.device_mesh  # type: ignore[attr-defined]
    by_rows, by_cols = (layout.groups(mesh, dims) for dims in _mesh_dims(entry))
    return (by_rows, by_cols) if _transposed(entry) else (by_cols, by_rows)


class Matrices(Bucket):
    """Matrices [m, n] of which a rank has some rows and some columns. Transposed ones are turned around here; below
    there are rows, whose sums come first, and columns."""

    algorithm = "hfac"

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        self.transposed = _transposed(entries[0])
        self.row_groups, self.col_groups = _groups(entries[0])
        names = ("exp_avg_row", "exp_avg_col", "exp_avg_sq_row", "exp_avg_sq_col")
        if self.transposed:
            names = ("exp_avg_col", "exp_avg_row", "exp_avg_sq_col", "exp_avg_sq_row")
        self.u, self.v, self.r, self.s = (
            [entry.local_state(name).view(-1) for entry in entries] for name in names
        )  # fmt: skip
        self.rows, self.cols = ([entry.state[name].numel() for entry in entries] for name in names[:2])
        self.params = [self._turned(i, param) for i, param in enumerate(self.params)]
        if self.lows is not None:
            self.lows = [self._turned(i, low) for i, low in enumerate(self.lows)]
        if self.transposed and self.places is not None:
            self.places = [self._turned_place(i, place) for i, place in enumerate(self.places)]

    def _order(self, i: int) -> list[int]:
        """The parameter's dimensions, those of its columns first."""
        k = self.entries[i].state["exp_avg_row"].ndim
        return [*range(k, self.params[i].ndim), *range(k)]

    def _turned(self, i: int, part: Tensor) -> Tensor:
        return part.permute(self._order(i)) if self.transposed else part

    def _turned_place(self, i: int, place: Place | None) -> Place:
        assert place is not None
        shape = self.entries[i].param.shape
        strides = place.strides or tuple(shape[d + 1 :].numel() for d in range(len(shape)))
        return place._replace(strides=tuple(strides[d] for d in self._order(i)))

    def requests(self, skip: bool, norm: bool) -> list[tuple[dist.ProcessGroup, int]]:
        count = len(self.entries)
        rows, cols = (sum(t.numel() for t in state) for state in (self.u, self.v))
        by_row = [(group, 2 * rows + 2 * count) for group in self.row_groups]
        by_col = [(group, 3 * cols + 3 * count) for group in self.col_groups]
        return [*by_row, *by_col, *((group, (1 + norm) * count) for group in self.row_groups)]

    def gradients(self) -> list[Tensor | None]:
        return [None if g is None else self._turned(i, g) for i, g in enumerate(super().gradients())]

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        count, eps = len(self.entries), options.scalars["eps"]
        here = [i for i, grad in enumerate(grads) if grad is not None]
        beta1, beta2 = self.decays(options)
        assert beta1 is not None
        b2: list[float] = beta2.tolist()
        present, refused = self.at(here), self.flags(here, grads, options)
        m, n = ([t.numel() for t in state] for state in (self.u, self.v))

        def look(rows: tuple[Numbers, ...], cols: tuple[Numbers, ...], beta2: Scalar, eps: float) -> None:
            """One look at the gradients; ``rows`` are what is read, and what is filled."""
            lists = [operand.name for operand in spec.HFAC_SUMS.operands]
            ops.run(
                "hfac_sums",
                None,
                pick(grads, here),
                **{name: pick(numbers, here) for name, numbers in zip(lists, (*rows, *cols), strict=False)},
                cols=pick(self.cols, here),
                beta2=beta2,
                eps=eps,
                backend=options.backend,
            )

        row_sums, new_rows = _split(torch.zeros(2 * sum(m), dtype=self.dtype, device=self.device), m, 2)
        read: tuple[Numbers, ...] = (self.r, row_sums, new_rows)
        if self.row_groups:

            def fill_rows(room: Tensor) -> None:
                sums, marks = room.split([2 * sum(m), 2 * count])
                marks.copy_(torch.cat([present, refused]))
                look((self.r, *_split(sums, m, 2)), (), 0.0, 0.0)

            room = yield from reduced(len(self.row_groups), fill_rows)
            sums, marks = room.split([2 * sum(m), 2 * count])
            present, refused = marks.split(count)
            # What is known goes through the second look unchanged: its decay is 1. What that look finds of rows is of
            # this part only, and goes where nobody reads.
            _, *nowhere = read
            row_sums, squares = _split(sums, m, 2)
            new_rows = _averaged(self.r, squares, b2, [cols * eps for cols in self.cols])
            read = (new_rows, *nowhere)

        def fill_cols(room: Tensor) -> None:
            sums, marks = room.split([3 * sum(n), 3 * count])
            decay = torch.ones(len(here), dtype=torch.float64, device="cpu") if self.row_groups else beta2[here]
            look(read, tuple(_split(sums, n, 3)), decay, eps)
            totals, *rest = marks.split(count)
            for total, rows in zip(pick(totals, here), pick(new_rows, here), strict=True):
                torch.sum(rows, 0, out=total)
            for mark, mine in zip(rest, (present, refused), strict=True):
                mark.copy_(mine)

        room = yield from reduced(len(self.col_groups), fill_cols)
        sums, marks = room.split([3 * sum(n), 3 * count])
        col_sums, col_squares, ratios = _split(sums, n, 3)
        numbers = [torch.stack([square.sum() for square in col_squares])] if options.norm else []
        totals, present, refused = marks.split(count)
        new_cols = _averaged(self.s, col_squares, b2, [rows * eps for rows in self.rows])
        torch._foreach_div_(ratios, new_cols)
        numbers = [torch.stack([ratio.sum() for ratio in ratios]), *numbers]
        if self.row_groups:
            room = yield from reduced(len(self.row_groups), partial(_copy, torch.cat(numbers)))
            numbers = list(room.split(count))
        norms = numbers[0]
        if options.norm:
            self.squares_found = numbers[1]

        going, left = self.who_goes(present, refused)
        # In double, where no partial result can overflow.
        elements = [a * b for a, b in zip(self.rows, self.cols, strict=True)]
        whole = torch.tensor(elements, dtype=torch.float64, device=self.device)
        mean_squares = (totals.double() * norms.double() / whole).to(self.dtype)

        def apply() -> None:
            self.count_skipped(left)
            if not going:
                return
            ops.run(
                "hfac_apply_",
                pick(self.params, going),
                pick(grads, going),
                exp_avg_rows=pick(self.u, going),
                exp_avg_cols=pick(self.v, going),
                exp_avg_sq_rows=pick(self.r, going),
                exp_avg_sq_cols=pick(self.s, going),
                row_sums=pick(row_sums, going),
                new_rows=pick(new_rows, going),
                col_sums=pick(col_sums, going),
                new_cols=pick(new_cols, going),
                totals=totals[going],
                mean_squares=mean_squares[going],
                rows=pick(self.rows, going),
                cols=pick(self.cols, going),
                beta1=beta1[going],
                **_scalars(options),
                **self.stored(going, options),
                backend=options.backend,
            )
            self.advance(going)

        return apply


class Vectors(Bucket):
    """Parameters whose moments are whole and cut as they are: one number each, the clip norm, is shared, and where it
    is asked for the gradient's."""

    algorithm = "hfac"

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        self.groups = _groups(entries[0])[1]
        self.averages, self.squares = (
            [entry.local_state(name) for entry in entries] for name in ("exp_avg", "exp_avg_sq")
        )

    def requests(self, skip: bool, norm: bool) -> list[tuple[dist.ProcessGroup, int]]:
        return [(group, (3 + norm) * len(self.entries)) for group in self.groups]

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        count, eps = len(self.entries), options.scalars["eps"]
        here = [i for i, grad in enumerate(grads) if grad is not None]
        beta1, beta2 = self.decays(options)
        assert beta1 is not None

        def fill(room: Tensor) -> None:
            norms, present, refused, *squares = room.split(count)
            present.copy_(self.at(here))
            refused.copy_(self.flags(here, grads, options))
            if squares and here:
                squares[0][here] = torch.stack(clipping.norms(pick(grads, here))).to(self.dtype).square()
            if here and options.scalars["clip_threshold"] is not None:
                sums = ops.hfac_dense_squares(pick(grads, here), pick(self.squares, here), beta2=beta2[here], eps=eps)
                norms[here] = torch.stack(sums)

        room = yield from reduced(len(self.groups), fill)
        norms, present, refused, *squares = room.split(count)
        if squares:
            (self.squares_found,) = squares
        going, left = self.who_goes(present, refused)
        mean_squares = norms / torch.tensor(self.elements, dtype=self.dtype, device=self.device)

        def apply() -> None:
            self.count_skipped(left)
            if not going:
                return
            ops.run(  # in plain torch with every backend: vectors are few
                "hfac_dense_step_",
                pick(self.params, going),
                pick(grads, going),
                exp_avgs=pick(self.averages, going),
                exp_avg_sqs=pick(self.squares, going),
                mean_squares=mean_squares[going],
                beta1=beta1[going],
                beta2=beta2[going],
                eps=eps,
                **_scalars(options),
                **self.stored(going, options),
                backend="reference",
            )
            self.advance(going)

        return apply


def _scalars(options: Options) -> dict[str, Any]:
    return {name: options.scalars[name] for name in ("lr", "weight_decay", "maximize", "clip_threshold")}


def _split(numbers: Tensor, sizes: Sequence[int], times: int) -> list[Numbers]:
    """So many lists of tensors of these sizes."""
    pieces = numbers.split([*sizes] * times)
    return [list(pieces[k * len(sizes) : (k + 1) * len(sizes)]) for k in range(times)]


def _copy(numbers: Tensor, room: Tensor) -> None:
    room.copy_(numbers)


def _averaged(
    old: Sequence[Tensor], squares: Sequence[Tensor], decays: Sequence[float], eps: Sequence[float]
) -> list[Tensor]:
    """decay old + (1 - decay) (squares + eps), for every entry."""
    new = torch._foreach_mul(list(old), list(decays))
    fresh = torch._foreach_add(list(squares), list(eps))
    torch._foreach_mul_(fresh, [1 - decay for decay in decays])
    torch._foreach_add_(new, fresh)
    return list(new)
