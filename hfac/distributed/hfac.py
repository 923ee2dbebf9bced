"""H-Fac on sharded parameters: one all-reduce for all of them, three where both rows and columns are sharded.

A rank with whole rows knows u and r of them, and one read of the gradient gives the sums over columns, with those for
the clip (`hfac.reference.hfac_sums`). They are added up over the ranks; the update is the second and last read. With
whole columns the transposed matrix is treated alike. With neither, sums over rows are added up first, and last the
clip's, of which each rank then knows its columns' share.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops, spec
from ..rounding import BitOffset
from ..schedules import Scalar
from . import layout
from .bucket import Bucket, Entry, Options
from .lists import Flat, Joined, Members, Pieces, joined
from .schedule import Job, Stage, reduced, stages

#: state keys of the two moments: rows and columns of the first, then of the second; the first whole in 8 bits; and both
#: whole
_KEYS = [str(state.key) for state in spec.HFAC_STEP.states]
_CODES = str(spec.HFAC_INT8_STEP.states[0].key)
_DENSE_KEYS = [str(state.key) for state in spec.HFAC_DENSE_STEP.states]

#: elements of vectors that are stepped together
TOGETHER = 2**20


def buckets(entries: Sequence[Entry], may_move: bool) -> list[Bucket]:
    """Entries sorted into buckets, in an order that is the same on every rank; ``may_move`` as of `Bucket`."""
    matrices: dict[tuple[object, ...], list[Entry]] = {}
    vectors: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        names = tuple(tuple(stage.name for stage in each) for each in _stages(entry))
        key = entry.group, entry.param.dtype, entry.storage, names, _transposed(entry), _CODES in entry.state
        (vectors if _cut(entry) is None else matrices).setdefault(key, []).append(entry)
    found: list[Bucket] = [Matrices(mine, may_move) for mine in matrices.values()]
    return found + [Vectors(mine, may_move) for mine in vectors.values()]


def _cut(entry: Entry) -> int | None:
    """How many of the parameter's dimensions make the rows; None where moments are whole."""
    row = entry.state.get(_KEYS[2])
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
    columns come first, everything is transposed here. A first moment that is whole is sharded as its parameter is, and
    needs no sums of gradients."""

    algorithm = "hfac"

    def __init__(self, entries: Sequence[Entry], may_move: bool = False) -> None:
        super().__init__(entries, may_move)
        self.transposed = _transposed(entries[0])
        self.row_stages, self.col_stages, self.number_stages = _stages(entries[0])
        keys = [_KEYS[i] for i in ((1, 0, 3, 2) if self.transposed else (0, 1, 2, 3))]
        self.r, self.s = ([entry.local_state(key).view(-1) for entry in entries] for key in keys[2:])
        self.rows, self.cols = ([entry.state[key].numel() for entry in entries] for key in keys[2:])
        self.has_codes = _CODES in entries[0].state
        if self.has_codes:
            self.first = [self.turned([entry.local_state(_CODES) for entry in entries])]
        else:
            self.first = [[entry.local_state(key).view(-1) for entry in entries] for key in keys[:2]]
        self.params = self.turned(self.params)
        if self.lows is not None:
            self.lows = self.turned(self.lows)
        if self.transposed and self.bit_offsets is not None:
            self.bit_offsets = [self._turned_offset(i, offset) for i, offset in enumerate(self.bit_offsets)]

        count = len(entries)
        self.row_pieces, self.col_pieces = (
            Pieces([t.numel() for t in state], self.device) for state in (self.r, self.s)
        )
        m, n, sums = self.row_pieces.sizes, self.col_pieces.sizes, not self.has_codes
        #: lists in a room of rows, of this rank's: sums of gradients, unless they are not needed, and of squares; after
        #: them who has a gradient, and whose is refused
        self.row_lists = sums + 1
        self.row_room = [*m * self.row_lists, count, count]
        #: in one of columns: likewise, and sums of ratios; after them the sum of r, and of r as it was where that is
        #: needed, who has a gradient, and whose is refused
        self.col_lists = sums + 2
        self.col_room = [*n * self.col_lists, *[count] * (self.has_codes + 3)]
        self.whole = self.on_device([a * b for a, b in zip(self.rows, self.cols, strict=True)])
        self._eps: tuple[float, Tensor, Tensor] | None = None

    def _order(self, i: int) -> list[int]:
        """The parameter's dimensions, those of its columns first."""
        entry = self.entries[i]
        k = entry.state[_KEYS[2]].ndim
        return [*range(k, entry.param.ndim), *range(k)]

    def turned(self, shards: Sequence[Any]) -> list[Any]:
        if not self.transposed:
            return list(shards)
        return [None if shard is None else shard.permute(self._order(i)) for i, shard in enumerate(shards)]

    def _turned_offset(self, i: int, offset: BitOffset | None) -> BitOffset:
        assert offset is not None
        shape = self.entries[i].param.shape
        strides = offset.strides or tuple(shape[d + 1 :].numel() for d in range(len(shape)))
        return offset._replace(strides=tuple(strides[d] for d in self._order(i)))

    def requests(self, skip: bool) -> list[tuple[Stage, int]]:
        by_row = [(stage, sum(self.row_room)) for stage in self.row_stages]
        by_col = [(stage, sum(self.col_room)) for stage in self.col_stages]
        return [*by_row, *by_col, *((stage, len(self.entries)) for stage in self.number_stages)]

    def use(self, rooms: Sequence[Tensor]) -> None:
        super().use(rooms)
        i, j = len(self.row_stages), len(self.row_stages) + len(self.col_stages)
        self.row_rooms, self.col_rooms, self.number_rooms = rooms[:i], rooms[i:j], rooms[j:]
        count, m, n = len(self.entries), self.row_pieces, self.col_pieces

        def lists(room: Tensor, sizes: Sequence[int], times: int) -> list[Sequence[Tensor]]:
            pieces = room.split(sizes)
            return [pieces[k * count : (k + 1) * count] for k in range(times)]

        def kept(pieces: Pieces) -> tuple[Tensor, Sequence[Tensor]]:
            flat = torch.zeros(pieces.total, dtype=self.dtype, device=self.device)
            return flat, flat.split(pieces.sizes)

        (_, row_sums), (self.new_rows, new_rows), (self.new_cols, new_cols) = kept(m), kept(m), kept(n)
        (_, col_sums) = kept(n)
        self.old_rows, self.old_cols = Flat(self.r, self.new_rows), Flat(self.s, self.new_cols)
        self.rows_before = Flat(self.r, kept(m)[0]) if self.has_codes else None
        reading = [self.r, row_sums, new_rows]
        if self.row_stages:
            *sums, squares = lists(self.row_rooms[0], self.row_room, self.row_lists)
            self.ops["rows"] = _with_lists(spec.HFAC_SUMS, [self.r, *(sums or [row_sums]), squares], self)
            # The second read must leave the rows' complete moments unchanged, so its decay is 1. What it finds of rows
            # is unused.
            reading = [new_rows, row_sums, kept(m)[1]]
            row_sums, *_ = lists(self.row_rooms[-1], self.row_room, self.row_lists)
        *sums, squares, ratios = lists(self.col_rooms[0], self.col_room, self.col_lists)
        self.ops["cols"] = _with_lists(spec.HFAC_SUMS, [*reading, *(sums or [col_sums]), squares, ratios], self)
        if self.has_codes:
            op, found = spec.HFAC_INT8_APPLY, [new_rows, new_cols]
        else:
            col_sums, *_ = lists(self.col_rooms[-1], self.col_room, self.col_lists)
            op, found = spec.HFAC_APPLY, [row_sums, new_rows, col_sums, new_cols]
        self.ops["apply"] = _with_lists(op, [*self.first, self.r, self.s, *found], self)

    def eps_sums(self, eps: float) -> tuple[Tensor, Tensor]:
        """What eps adds to the sum of squares of every whole row, and of every whole column."""
        if self._eps is None or self._eps[0] != eps:
            rows, cols = (
                pieces.spread(self.on_device([length * eps for length in lengths]).to(self.dtype))
                for pieces, lengths in ((self.row_pieces, self.cols), (self.col_pieces, self.rows))
            )
            self._eps = eps, rows, cols
        return self._eps[1:]

    def average(self, old: Flat, sums: Tensor, beta2: Scalar, who: Members, of: Pieces) -> None:
        """beta2 old + (1 - beta2) sums, of every row or column, to where the old ones are read. ``sums`` is
        overwritten."""
        keep: Scalar
        rest: Scalar
        if isinstance(beta2, Tensor):
            keep, rest = (
                of.spread(who.filled(numbers, fill, self.device).to(self.dtype))
                for numbers, fill in ((beta2, 1.0), (1 - beta2, 0.0))
            )
        else:
            keep, rest = beta2, 1 - beta2
        old.read().mul_(keep).add_(sums.mul_(rest))

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        who, here = self.with_gradient(grads)
        self.told = who.index
        decays, backend = self.decays(who, options), options.backend
        here, clip = self.clipped(self.call("apply", who, backend), here, options)
        beta2, eps = decays["beta2"], options.scalars["eps"]
        row_eps, col_eps = self.eps_sums(eps)
        reading = {"beta2": beta2, "eps": eps}

        if self.row_stages:
            m = self.row_pieces.total * (self.row_lists - 1)

            def fill_rows() -> None:
                _, there, left = self.row_rooms[0].split(_ends(self.row_room, 2))
                there.copy_(who.flags)
                if options.skip:
                    left.copy_(self.flags(who, here, clip, options))
                self.run(self.call("rows", who, backend), here, clip, options, {"beta2": 0.0, "eps": 0.0})

            yield from reduced(self.row_rooms, fill_rows)
            squares = self.row_rooms[-1][m : m + self.row_pieces.total]
            self.average(self.old_rows, squares + row_eps, beta2, who, self.row_pieces)
            reading = {"beta2": 1.0, "eps": 0.0}

        def fill_cols() -> None:
            _, *old_totals, totals, there, left = self.col_rooms[0].split(_ends(self.col_room, 3 + self.has_codes))
            if self.rows_before is not None:
                old_totals[0].copy_(self.row_pieces.sums(self.rows_before.read()))
            if self.row_stages:
                _, present, refused = self.row_rooms[-1].split(_ends(self.row_room, 2))
                there.copy_(present)
                left.copy_(refused)
            else:
                there.copy_(who.flags)
                if options.skip:
                    left.copy_(self.flags(who, here, clip, options))
            self.run(self.call("cols", who, backend), here, clip, options, reading)
            totals.copy_(self.row_pieces.sums(self.new_rows))

        yield from reduced(self.col_rooms, fill_cols)
        _, *old_totals, totals, present, refused = self.col_rooms[-1].split(_ends(self.col_room, 3 + self.has_codes))
        n = self.col_pieces.total
        *_, squares, ratios = self.col_rooms[-1][: self.col_lists * n].split(n)
        self.average(self.old_cols, squares + col_eps, beta2, who, self.col_pieces)
        norms = self.col_pieces.sums(ratios.div_(self.new_cols))
        if self.number_rooms:
            yield from reduced(self.number_rooms, lambda: self.number_rooms[0].copy_(norms))
            norms = self.number_rooms[-1].to(norms.dtype)
        self.verify(present, who)
        going = self.going(refused, who, options)
        mean_squares = (totals * norms / self.whole).to(self.dtype)

        def apply() -> None:
            members = going()
            numbers = decays if members is who else self.decays(members, options)
            vectors = {"totals": members.numbers(totals), "mean_squares": members.numbers(mean_squares)}
            vectors |= dict(zip(("old_totals",), map(members.numbers, old_totals), strict=False))
            call, taken = self.call("apply", members, backend), who.part(here, members)
            self.run(call, taken, clip, options, numbers | vectors, ("apply", members))
            self.advance(members, options)

        return apply


class Vectors(Bucket):
    """Parameters whose moments are whole and sharded as they are: ranks share one number for the clip of each. They are
    stepped in plain torch with every backend: those that are not small are few."""

    algorithm = "hfac"

    def __init__(self, entries: Sequence[Entry], may_move: bool = False) -> None:
        super().__init__(entries, may_move)
        self.stages = _stages(entries[0])[1]
        moments = [[entry.local_state(key) for entry in entries] for key in _DENSE_KEYS]
        self.lists = [*moments, self.params, *([] if self.lows is None else [self.lows])]

    @cached_property
    def joining_rooms(self) -> list[Tensor]:
        """For each of the lists memory in which some of its tensors lie one after the other."""
        if self.bit_offsets is not None:
            return []  # the random bits of a parameter are its own
        count = min(TOGETHER, sum(param.numel() for param in self.params))
        return [torch.empty(count, dtype=tensors[0].dtype, device=self.device) for tensors in self.lists]

    def requests(self, skip: bool) -> list[tuple[Stage, int]]:
        return [(stage, 3 * len(self.entries)) for stage in self.stages]

    def use(self, rooms: Sequence[Tensor]) -> None:
        super().use(rooms)
        self.rooms = rooms

    def joined(self, who: Members) -> list[Joined]:
        """The members' moments, parameters, and lower pieces of weights, if there are any; small ones together."""
        if "joined" not in who.bound:
            lists = [who.of(tensors) for tensors in self.lists]
            who.bound["joined"] = joined(lists, self.joining_rooms, self.device)
        return who.bound["joined"]

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        count = len(self.entries)
        who, here = self.with_gradient(grads)
        self.told = who.index
        decays, eps = self.decays(who, options), options.scalars["eps"]

        def gradient(of: Joined, taken: Sequence[Tensor]) -> Tensor:
            grad = of.one(taken[of.members]).to(self.dtype)
            return grad if options.clip is None else grad * options.clip

        def fill() -> None:
            norms, there, left = self.rooms[0].split(count)
            there.copy_(who.flags)
            if options.skip:
                left.copy_(self.flags(who, here, options.clip, options))
            if not here or options.scalars["clip_threshold"] is None:
                return
            sums = []
            for each in self.joined(who):
                beta2 = each.spread(decays["beta2"])
                found = ops.hfac_dense_squares(gradient(each, here), each.read(1), beta2=beta2, eps=eps)
                sums.append(each.pieces.sums(found))
            who.put(norms, torch.cat(sums))

        yield from reduced(self.rooms, fill)
        norms, present, refused = self.rooms[-1].split(count)
        self.verify(present, who)
        going = self.going(refused, who, options)
        mean_squares = (norms / self.sizes).to(self.dtype)

        def apply() -> None:
            members = going()
            numbers = decays if members is who else self.decays(members, options)
            taken = who.part(here, members)
            vector = {"mean_squares": members.numbers(mean_squares)}
            numbers = self.numbers(spec.HFAC_DENSE_STEP, options, numbers | vector)
            if options.watch:
                states = dict(zip((state.name for state in spec.HFAC_DENSE_STEP.states), self.lists, strict=False))
                self.watch(spec.HFAC_DENSE_STEP, states, members, taken, options.clip, numbers)
            places = None if self.bit_offsets is None else members.of(self.bit_offsets)
            for each in self.joined(members):
                given = {name: each.spread(value, True) for name, value in numbers.items()}
                average, square, param, *low = map(each.read, range(len(self.lists)))
                lists = zip((*spec.HFAC_DENSE_STEP.operands, spec.MASTER_LOW), (average, square, *low), strict=False)
                given |= {operand.name: [tensor] for operand, tensor in lists}
                if places is not None:
                    given["places"] = places[each.members]
                written = [average, square, param, *low]
                before = [tensor.clone() for tensor in written] if options.forbidden is not None else []
                ops.run("hfac_dense_step_", [param], [gradient(each, taken)], **given, backend="reference")
                if options.forbidden is not None:
                    for tensor, old in zip(written, before, strict=True):
                        tensor.copy_(torch.where(options.forbidden != 0, old, tensor))
                each.write()
            self.advance(members, options)

        return apply


def _with_lists(
    op: spec.Op, values: Sequence[Sequence[Tensor]], of: Matrices
) -> tuple[spec.Op, dict[str, Sequence[Any]]]:
    """An op and its lists by name, from as many of them as are given, in its order; and its counts."""
    found: dict[str, Sequence[Any]] = {operand.name: each for operand, each in zip(op.operands, values, strict=False)}
    return op, found | {name: getattr(of, name) for name in op.counts}


def _ends(sizes: Sequence[int], count: int) -> list[int]:
    """Sizes of a room's beginning, and of each of so many vectors at its end."""
    return [sum(sizes[:-count]), *sizes[-count:]]
