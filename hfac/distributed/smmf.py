"""SMMF on sharded parameters: one all-reduce for all of them.

A step reads the factors of the step before and no sums of its own gradients. So each rank updates its shards at once
and sends off the sums over them that make the next factors; while they are under way, it makes all other steps (of
other meshes and types, and of unsharded parameters), and at the end of the step it makes the factors.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import spec
from . import layout
from .bucket import Bucket, Entry, Joint, Options, who
from .schedule import Collective, Job, Stage, reduced


def buckets(entries: Sequence[Entry]) -> list[Shards]:
    """Entries sorted into buckets, in an order that is the same on every rank."""
    mesh_dims: dict[object, set[int]] = {}
    for entry in entries:
        mesh_dims.setdefault(_mesh(entry), set()).update(sum(layout.sharded_by(entry.param), []))
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        op = spec.ALGORITHMS["smmf"].op_of(list(entry.state))
        found.setdefault((entry.group, entry.param.dtype, entry.storage, _mesh(entry), op), []).append(entry)
    return [Shards(mine, op, sorted(mesh_dims[mesh])) for (*_, mesh, op), mine in found.items()]


def _mesh(entry: Entry) -> object:
    return entry.param.device_mesh  # type: ignore[attr-defined]


class Shards(Bucket):
    """Parameters of one mesh, whose sums go over all its dimensions that shard any of the mesh's parameters, so that
    one collective serves them all (`Joint`).

    Of a matrix every rank has whole factors, and the sums that make the next ones are sent off. Whole moments are
    sharded as their parameters are, and ranks share only who had a gradient.

    Args:
        op: on whole parameters, which takes states like these.
    """

    algorithm = "smmf"
    #: how the message ends in a step in which ranks turned out to disagree on a parameter
    OUTCOME = (
        "The step was made of all other parameters. Of this one, the ranks that had a gradient have updated their "
        "shards; go back to the last checkpoint."
    )

    def __init__(self, entries: Sequence[Entry], op: object, mesh_dims: Sequence[int]) -> None:
        super().__init__(entries)
        self.joint = Joint([entry.param for entry in entries], mesh_dims)
        self.op = spec.SMMF_SUMS_STEP if op is spec.SMMF_STEP else spec.SMMF_DENSE_STEP
        self.states = {
            state.name: [entry.local_state(state.key) for entry in entries]
            for state in self.op.states
            if state.key is not None and state.key in entries[0].state
        }
        self.counts = {name: [layout.blocks(entry.param) for entry in entries] for name in self.op.counts}  # type: ignore[arg-type]
        #: (factor, its sums) of rows and columns of the second moment, then of the first
        self.pairs = [
            (state.name, sums.name)
            for moment in (2, 1)
            for sums in self.op.operands
            if sums.key is None and sums.moment == moment
            if (state := self.op.operand(moment, sums.size)) is not None and state.name in self.states
        ]
        self._sizes = [factor.numel() for name, _ in self.pairs for factor in self.states[name]]
        #: how many numbers a step sends off
        self.size = sum(self._sizes) + len(entries)

    def _split(self, room: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
        """The lists of sums, and on how many ranks each parameter has been stepped."""
        count = len(self.entries)
        *pieces, present = room.split([*self._sizes, count])
        return {name: pieces[i * count : (i + 1) * count] for i, (_, name) in enumerate(self.pairs)}, present

    def step(self, room: Tensor, going: Sequence[int], grads: Sequence[Tensor | None], options: Options) -> None:
        """Steps the shards of the parameters in ``going`` and adds what is to be sent off to ``room``."""
        sums, present = self._split(room)
        lists: dict[str, Sequence[Any]] = {**self.states, **sums, **self.counts}
        self.call(self.op, going, grads, lists, options, self.decays(options), options.backend)
        for i, contributes in enumerate(self.joint.contributes):
            if not contributes:
                for values in sums.values():
                    values[i].zero_()
        present.copy_(self.contributed(going))

    def contributed(self, going: Sequence[int]) -> Tensor:
        """1 at the parameters in ``going`` that this rank contributes to the sums, 0 elsewhere."""
        return self.at([i for i in going if self.joint.contributes[i]])

    def take(self, room: Tensor) -> None:
        """Completes the step with the sums over all shards, and counts it.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient; the step is complete for all others.
        """
        sums, present = self._split(room)
        counts = present.tolist()
        going = [i for i in self._stepped if counts[i] == self.ranks[i]]
        factors = [(self.states[name], sums[new]) for name, new in self.pairs]
        for (rows, new_rows), (cols, new_cols) in zip(factors[::2], factors[1::2], strict=True):
            for i in going:
                rows[i].copy_(new_rows[i])
                total = new_cols[i].sum()
                cols[i].copy_(new_cols[i] / torch.where(total == 0, 1, total))
        self.advance(going)
        who(self.entries, counts, self.ranks, self._stepped, self.OUTCOME)

    def requests(self, skip: bool, norm: bool) -> list[tuple[Stage, int]]:
        return [(stage, 2 * len(self.entries)) for stage in self.joint.stages] if skip else []

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        here = [i for i, grad in enumerate(grads) if grad is not None]
        left: set[int] = set()
        if options.skip:

            def fill(room: Tensor) -> None:
                flags, present = room.split(len(self.entries))
                flags.copy_(self.flags(here, grads, options))
                present.copy_(self.contributed(here))

            flags, present = (yield from reduced(len(self.joint.stages), fill)).split(len(self.entries))
            _, refused = self.who_goes(present, flags, here)
            left.update(refused)
        going = [i for i in here if i not in left]
        self._stepped = going
        self._call = lambda room: self.step(room, going, grads, options)
        return lambda: self.count_skipped([i for i in here if i in left])

    def send(self, room: Tensor) -> None:
        """Makes the step of the last job."""
        self._call(room)
        del self._call  # and the gradients with it


@dataclass
class Pending:
    """Numbers on their way: an all-reduce of them, the stages that follow it, and each bucket's room in them."""

    buffer: Tensor
    work: dist.Work
    left: Sequence[Stage]
    rooms: list[tuple[Shards, Tensor]]


def sends(shards: Sequence[Shards]) -> list[Collective]:
    """The collectives of a step's sums, in order."""
    return [
        Collective(stage, mine[0].dtype, mine[0].device, [], [each.size for each in mine])
        for mine in _together(shards)
        for stage in mine[0].joint.stages
    ]


def _together(shards: Sequence[Shards]) -> list[list[Shards]]:
    """Those whose sums pass the same stages share a buffer."""
    found: dict[tuple[object, ...], list[Shards]] = {}
    for each in shards:
        key = tuple(stage.name for stage in each.joint.stages), each.dtype, each.device
        found.setdefault(key, []).append(each)
    return list(found.values())


def send(shards: Sequence[Shards]) -> list[Pending]:
    """Makes the planned steps and sends off their sums."""
    pending = []
    for mine in _together(shards):
        first, *_ = mine
        sizes = [each.size for each in mine]
        buffer = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        rooms = list(zip(mine, buffer.split(sizes), strict=True))
        for bucket, room in rooms:
            bucket.send(room)
        stages = first.joint.stages
        last = max(i for i, stage in enumerate(stages) if not stage.copies)
        for stage in stages[:last]:
            stage.run(buffer)
        work = stages[last].run(buffer, async_op=True)
        assert work is not None
        pending.append(Pending(buffer, work, stages[last + 1 :], rooms))
    return pending


def take(pending: Sequence[Pending]) -> None:
    """Completes the steps that were sent off. On a GPU `wait` blocks the stream, not the host, which then reads who had
    a gradient.

    Raises:
        RuntimeError: as `Shards.take`, once everything else is complete.
    """
    errors = []
    for each in pending:
        each.work.wait()
        for stage in each.left:
            stage.run(each.buffer)
        for bucket, room in each.rooms:
            try:
                bucket.take(room)
            except RuntimeError as error:
                errors.append(error)
    if errors:
        raise errors[0]
