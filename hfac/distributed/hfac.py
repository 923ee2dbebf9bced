"""H-Fac on sharded parameters: one all-reduce for all of them, three where both rows and columns are cut.

With whole rows on a rank, u and r are known there, and one look at the gradient gives the sums over columns, the clip
norm's included (`hfac.reference.hfac_sums`): they are added up over the ranks, and the update is the second and last
look. With whole columns the same is done on the transposed matrix. With neither, sums over rows go first, and the
clip norm, of which each rank then knows its columns' part, last.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from . import layout
from .bucket import Bucket, Entry, Options, pick, ranks_that_share
from .schedule import Job, reduced


def buckets(entries: Sequence[Entry]) -> list[Bucket]:
    """Entries sorted into buckets, in an order that is the same on every rank."""
    matrices: dict[tuple[object, ...], list[Entry]] = {}
    vectors: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        names = tuple(tuple(g.group_name for g in groups) for groups in _groups(entry))
        key = entry.group, entry.param.dtype, names, _transposed(entry)
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
        self.ranks = [ranks_that_share(entry.param) for entry in entries]

    def _turned(self, i: int, part: Tensor) -> Tensor:
        if not self.transposed:
            return part
        k = self.entries[i].state["exp_avg_row"].ndim
        return part.permute(*range(k, part.ndim), *range(k))

    def requests(self, skip: bool) -> list[tuple[dist.ProcessGroup, int]]:
        count = len(self.entries)
        rows, cols = (sum(t.numel() for t in state) for state in (self.u, self.v))
        by_row = [(group, 2 * rows + 2 * count) for group in self.row_groups]
        by_col = [(group, 3 * cols + 3 * count) for group in self.col_groups]
        return [*by_row, *by_col, *((group, count) for group in self.row_groups)]

    def gradients(self) -> list[Tensor | None]:
        return [None if g is None else self._turned(i, g) for i, g in enumerate(super().gradients())]

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        count, backend = len(self.entries), options.backend
        eps = options.scalars["eps"]
        here = [i for i, grad in enumerate(grads) if grad is not None]
        mine = [grad for grad in grads if grad is not None]
        beta1, beta2 = self.decays(options)
        b2 = beta2.tolist()
        present, refused = self.at(here), self.flags(here, grads, options)
        m, n = ([t.numel() for t in state] for state in (self.u, self.v))

        def rows_of(numbers: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            pieces = numbers.split([*m, *m])
            return list(pieces[:count]), list(pieces[count:])

        found = rows_of(torch.zeros(2 * sum(m), dtype=self.dtype, device=self.device))
        row_sums, new_rows, old_rows, decay = *found, self.r, beta2[here]
        if self.row_groups:

            def fill_rows(room: Tensor) -> None:
                sums, marks = room[: 2 * sum(m)], room[2 * sum(m) :]
                marks.copy_(torch.cat([present, refused]))
                all_sums, squares = (pick(rows, here) for rows in rows_of(sums))
                ops.hfac_sums(
                    mine, pick(self.r, here), all_sums, squares,
                    cols=pick(self.cols, here), beta2=0.0, eps=0.0, backend=backend,
                )  # fmt: skip

            room = yield from reduced(len(self.row_groups), fill_rows)
            row_sums, squares = rows_of(room[: 2 * sum(m)])
            present, refused = room[2 * sum(m) :].split([count, count])
            # What is known goes through the second look at the gradient unchanged: its decay is 1.
            new_rows = old_rows = _averaged(self.r, squares, b2, [cols * eps for cols in self.cols])
            decay = torch.ones(len(here), dtype=torch.float64)

        sizes = [*n, *n, *n, count, count, count]

        def fill_cols(room: Tensor) -> None:
            pieces = room.split(sizes)
            totals, marks, flags = pieces[3 * count :]
            marks.copy_(present)
            flags.copy_(refused)
            ops.hfac_sums(
                mine, pick(old_rows, here), *(pick(rows, here) for rows in found),
                *(pick(pieces[k * count : (k + 1) * count], here) for k in range(3)),
                cols=pick(self.cols, here), beta2=decay, eps=eps, backend=backend,
            )  # fmt: skip
            for i in here:
                torch.sum(new_rows[i], 0, out=totals[i])

        room = yield from reduced(len(self.col_groups), fill_cols)
        pieces = room.split(sizes)
        col_sums, col_squares, ratios = (list(pieces[k * count : (k + 1) * count]) for k in range(3))
        totals, present, refused = pieces[3 * count :]
        new_cols = _averaged(self.s, col_squares, b2, [rows * eps for rows in self.rows])
        torch._foreach_div_(ratios, new_cols)
        norms = torch.stack([ratio.sum() for ratio in ratios])
        if self.row_groups:
            norms = yield from reduced(len(self.row_groups), lambda room, own=norms: room.copy_(own))

        with_gradient = self.who(present.tolist(), self.ranks)
        left = {i for i, flag in enumerate(refused.tolist()) if flag}
        going = [i for i in with_gradient if i not in left]
        # In double, where no partial result can overflow.
        whole = torch.tensor([a * b for a, b in zip(self.rows, self.cols, strict=True)], dtype=torch.float64)
        mean_squares = (totals.double() * norms.double() / whole.to(self.device)).to(self.dtype)

        def apply() -> None:
            self.count_skipped([i for i in with_gradient if i in left])
            if not going:
                return
            ops.hfac_apply_(
                pick(self.params, going),
                pick(grads, going),
                *(pick(state, going) for state in (self.u, self.v, self.r, self.s)),
                pick(row_sums, going),
                pick(new_rows, going),
                pick(col_sums, going),
                pick(new_cols, going),
                totals[going],
                mean_squares[going],
                rows=pick(self.rows, going),
                cols=pick(self.cols, going),
                beta1=beta1[going],
                **_scalars(options),
                backend=backend,
            )
            self.advance(going)

        return apply


class Vectors(Bucket):
    """Parameters whose moments are whole and cut as they are: one number each, the clip norm, is shared."""

    algorithm = "hfac"

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        self.groups = _groups(entries[0])[1]
        self.averages, self.squares = (
            [entry.local_state(name) for entry in entries] for name in ("exp_avg", "exp_avg_sq")
        )
        self.ranks = [ranks_that_share(entry.param) for entry in entries]

    def requests(self, skip: bool) -> list[tuple[dist.ProcessGroup, int]]:
        return [(group, 3 * len(self.entries)) for group in self.groups]

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        count, eps = len(self.entries), options.scalars["eps"]
        here = [i for i, grad in enumerate(grads) if grad is not None]
        beta1, beta2 = self.decays(options)

        def fill(room: Tensor) -> None:
            norms, present, refused = room.split([count] * 3)
            present.copy_(self.at(here))
            refused.copy_(self.flags(here, grads, options))
            if here and options.scalars["clip_threshold"] is not None:
                sums = ops.hfac_dense_squares(
                    pick(grads, here), pick(self.squares, here), beta2=beta2[here], eps=eps
                )  # fmt: skip
                norms[here] = torch.stack(sums)

        room = yield from reduced(len(self.groups), fill)
        norms, present, refused = room.split([count] * 3)
        with_gradient = self.who(present.tolist(), self.ranks)
        left = {i for i, flag in enumerate(refused.tolist()) if flag}
        going = [i for i in with_gradient if i not in left]
        mean_squares = norms / torch.tensor(self.elements, dtype=self.dtype, device=self.device)

        def apply() -> None:
            self.count_skipped([i for i in with_gradient if i in left])
            if not going:
                return
            ops.hfac_dense_apply_(
                *(pick(tensors, going) for tensors in (self.params, grads, self.averages, self.squares)),
                mean_squares[going],
                beta1=beta1[going],
                beta2=beta2[going],
                eps=eps,
                **_scalars(options),
            )
            self.advance(going)

        return apply


def _scalars(options: Options) -> dict[str, Any]:
    return {name: options.scalars[name] for name in ("lr", "weight_decay", "maximize", "clip_threshold")}


def _averaged(
    old: Sequence[Tensor], squares: Sequence[Tensor], decays: Sequence[float], eps: Sequence[float]
) -> list[Tensor]:
    """decay old + (1 - decay) (squares + eps), for every entry."""
    new = torch._foreach_mul(list(old), list(decays))
    fresh = torch._foreach_add(list(squares), list(eps))
    torch._foreach_mul_(fresh, [1 - decay for decay in decays])
    torch._foreach_add_(new, fresh)
    return list(new)
