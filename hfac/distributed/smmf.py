"""SMMF on sharded parameters: one all-reduce for all of them.

A step reads the factors of the step before and no sums of its own gradients. So each rank updates its shards at once
and sends off the sums over them that make the next factors; while they are under way, it makes all other steps (of
other meshes and types, and of unsharded parameters), and at the end of the step it makes the factors.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, spec
from ..scratch import Scratch
from ..staging import on_host
from . import layout
from .bucket import OUTCOME, Bucket, Entry, Joint, Options
from .lists import Flat, Members, Pieces
from .schedule import Collective, Job, Stage, reduced


def buckets(entries: Sequence[Entry], may_move: bool) -> list[Shards]:
    """Entries sorted into buckets, in an order that is the same on every rank; ``may_move`` as of `Bucket`."""
    mesh_dims: dict[object, set[int]] = {}
    for entry in entries:
        mesh_dims.setdefault(_mesh(entry), set()).update(sum(layout.sharded_by(entry.param), []))
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        op = spec.ALGORITHMS["smmf"].op_of(list(entry.state))
        found.setdefault((entry.group, entry.param.dtype, entry.storage, _mesh(entry), op), []).append(entry)
    return [Shards(mine, op, sorted(mesh_dims[mesh]), may_move) for (*_, mesh, op), mine in found.items()]


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

    def __init__(self, entries: Sequence[Entry], op: object, mesh_dims: Sequence[int], may_move: bool = False) -> None:
        super().__init__(entries, may_move)
        self.joint = Joint([entry.param for entry in entries], mesh_dims)
        self.op = spec.SMMF_SUMS_STEP if op is spec.SMMF_STEP else spec.SMMF_DENSE_STEP
        self.states: dict[str, Sequence[Any]] = {
            state.name: [entry.local_state(state.key) for entry in entries]
            for state in self.op.states
            if state.key is not None and state.key in entries[0].state
        }
        #: signs, where they are kept in bytes
        self.scratch = [
            Scratch(state.name, self.states[state.name], self.params)
            for state in self.op.states
            if state.size == spec.SIGNS and state.name in self.states
        ]
        self.states |= {scratch.name: scratch.taken for scratch in self.scratch}
        #: rows' and columns' factors of the second moment, then of the first, and of each the list of its sums
        self.factors = [
            (self.states[state.name], sums.name)
            for moment in (2, 1)
            for sums in self.op.operands
            if sums.key is None and sums.moment == moment
            if (state := self.op.operand(moment, sums.size)) is not None and state.name in self.states
        ]
        self.pieces = [Pieces([factor.numel() for factor in mine], self.device) for mine, _ in self.factors]
        #: how many numbers a step sends off: sums, and on how many ranks each parameter has been stepped
        self.size = sum(pieces.total for pieces in self.pieces) + len(entries)

    def send_from(self, room: Tensor) -> None:
        """Takes the room that every step fills with what it sends off."""
        sizes = [pieces.total for pieces in self.pieces]
        *self.sums, self.present = room.split([*sizes, len(self.entries)])
        self.sums_of = [flat.split(pieces.sizes) for flat, pieces in zip(self.sums, self.pieces, strict=True)]
        lists: dict[str, Sequence[Any]] = {**self.states}
        for (_, name), pieces in zip(self.factors, self.sums_of, strict=True):
            # What a rank finds that does not contribute goes nowhere.
            lists[name] = [
                sums if contributes else torch.zeros_like(sums)
                for sums, contributes in zip(pieces, self.joint.contributes, strict=True)
            ]
        lists |= {name: [layout.blocks(entry.param) for entry in self.entries] for name in self.op.counts}  # type: ignore[arg-type]
        self.ops["step"] = self.op, lists

    def contributed(self, who: Members) -> Tensor:
        """1 at the members that this rank contributes to the sums, 0 elsewhere."""
        if "contributed" not in who.bound:
            who.bound["contributed"] = self.members([i for i in who.index if self.joint.contributes[i]]).flags
        return who.bound["contributed"]

    def requests(self, skip: bool) -> list[tuple[Stage, int]]:
        return [(stage, 2 * len(self.entries)) for stage in self.joint.stages] if skip else []

    def use(self, rooms: Sequence[Tensor]) -> None:
        super().use(rooms)
        self.rooms = rooms

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        who, here = self.with_gradient(grads)
        self.told = who.index
        here, clip = self.clipped(self.call("step", who, options.backend), here, options)
        going = None
        if self.rooms:

            def fill() -> None:
                flags, present = self.rooms[0].split(len(self.entries))
                flags.copy_(self.flags(who, here, clip, options))
                present.copy_(self.contributed(who))

            yield from reduced(self.rooms, fill)
            refused, present = self.rooms[-1].split(len(self.entries))
            self.verify(present, who)
            going = self.going(refused, who, options)

        def step() -> None:
            self.stepped = members = who if going is None else going()
            self.options = options
            call, taken = self.call("step", members, options.backend), who.part(here, members)
            for scratch in self.scratch:
                scratch.fill(members.index)
            self.run(call, taken, clip, options, self.decays(members, options), ("step", members))
            for scratch in self.scratch:
                scratch.empty(members.index)
            self.present.copy_(self.contributed(members))

        return step

    @cached_property
    def before(self) -> list[Flat]:
        """Of each list of factors those of the last step, to be read as one."""
        return [
            Flat(mine, torch.empty(pieces.total, dtype=self.dtype, device=self.device))
            for (mine, _), pieces in zip(self.factors, self.pieces, strict=True)
        ]

    def copies_of(self, who: Members) -> Callable[[], object]:
        """What brings members' factors from the room to their states."""
        if "copies" not in who.bound:
            factors = [factor for mine, _ in self.factors for factor in who.of(mine)]
            who.bound["copies"] = ops.copier(factors, [sums for mine in self.sums_of for sums in who.of(mine)])
        return who.bound["copies"]

    def take(self) -> None:
        """Completes the step with the sums over all shards, and counts it.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient; the step is complete for all others.
        """
        who, forbidden = self.stepped, self.options.forbidden
        if self.present.is_cpu:  # what ranks disagree on stays as it is
            found = on_host(self.present)
            who = self.members([i for i in who.index if found[i] == self.ranks[i]])
        for k in range(0, len(self.factors), 2):
            total = self.pieces[k + 1].sums(self.sums[k + 1])
            self.sums[k + 1].div_(self.pieces[k + 1].spread(total.masked_fill_(total == 0, 1).to(self.dtype)))
        if forbidden is not None:
            for old, sums in zip(self.before, self.sums, strict=True):
                sums.copy_(torch.where(forbidden != 0, old.read(), sums))
        self.copies_of(who)()
        self.advance(who, self.options)
        self.verify(self.present, self.stepped, now=OUTCOME)


class Sending:
    """The sums of a step of some shards, which pass the same stages in one buffer.

    Attributes:
        sums: stages of which the last is under way while other steps are made.
        copies: those after it.
    """

    def __init__(self, shards: Sequence[Shards]) -> None:
        first, *_ = self.shards = list(shards)
        stages = first.joint.stages
        last = max(i for i, stage in enumerate(stages) if not stage.copies)
        self.sums, self.copies = stages[: last + 1], stages[last + 1 :]
        self.collective = Collective(stages[0], first.dtype, first.device, [], [each.size for each in shards])

    def make(self) -> None:
        """Memory for the sums, for all steps."""
        for each, room in zip(self.shards, self.collective.rooms(), strict=True):
            each.send_from(room)

    def clear(self) -> None:
        self.collective.buffer.zero_()

    def send(self) -> dist.Work:
        """Sends off the sums of a step that has been made."""
        *before, last = self.sums
        for stage in before:
            stage.run(self.collective.buffer)
        work = last.run(self.collective.buffer, async_op=True)
        assert work is not None
        return work

    def take(self, work: dist.Work) -> list[RuntimeError]:
        """Completes the step; returns what ranks disagree on. On a GPU nothing here blocks the host."""
        work.wait()
        for stage in self.copies:
            stage.run(self.collective.buffer)
        errors = []
        for each in self.shards:
            try:
                each.take()
            except RuntimeError as error:
                errors.append(error)
        return errors


def sendings(shards: Sequence[Shards]) -> list[Sending]:
    """Those whose sums pass the same stages share a buffer."""
    found: dict[tuple[object, ...], list[Shards]] = {}
    for each in shards:
        key = tuple(stage.name for stage in each.joint.stages), each.dtype, each.device
        found.setdefault(key, []).append(each)
    return list(map(Sending, found.values()))
