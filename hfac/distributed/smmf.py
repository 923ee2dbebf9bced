"""SMMF on sharded parameters: one all-reduce for all of them.

A step needs the factors of the step before and nothing of this one. So each rank updates its part at once and sends off
the sums over it that make the next factors; while they are under way it makes what other steps there are (of other
meshes and types, and of parameters that are not sharded), and at the end of the step it makes the factors of them.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from . import layout
from .bucket import Bucket, Entry, Options, pick, who
from .schedule import Collective, Job, reduced


def buckets(entries: Sequence[Entry]) -> list[Parts]:
    """Entries sorted into buckets, in an order that is the same on every rank."""
    mesh_dims: dict[object, set[int]] = {}
    for entry in entries:
        mesh_dims.setdefault(_mesh(entry), set()).update(sum(layout.cuts(entry.param), []))
    found: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        factored = "exp_avg_sq_row" in entry.state
        key = entry.group, entry.param.dtype, entry.storage, _mesh(entry), factored
        found.setdefault(key, []).append(entry)
    return [
        (Factored if factored else Whole)(mine, sorted(mesh_dims[mesh])) for (*_, mesh, factored), mine in found.items()
    ]


def _mesh(entry: Entry) -> object:
    return entry.param.device_mesh  # type: ignore[attr-defined]


class Parts(Bucket):
    """Parameters of one mesh. Sums go over all mesh dimensions that cut any of the mesh's parameters, so that one
    collective serves them all; where a parameter is not cut in one of these, one rank speaks for its copies."""

    algorithm = "smmf"
    #: what a message says of a step in which ranks turned out to disagree on a parameter
    OUTCOME = (
        "The step was made of all other parameters. Of this one, the ranks that had a gradient have updated their "
        "parts; go back to the last checkpoint."
    )

    def __init__(self, entries: Sequence[Entry], mesh_dims: Sequence[int]) -> None:
        super().__init__(entries)
        mesh = entries[0].param.device_mesh  # type: ignore[attr-defined]
        self.joint = layout.joint_group(mesh, mesh_dims)
        coordinate = mesh.get_coordinate()
        self.speaks = []
        for entry in entries:
            own = sum(layout.cuts(entry.param), [])
            self.speaks.append(all(coordinate[d] == 0 for d in mesh_dims if d not in own))

    #: numbers that a step sends off
    size: int

    def step(self, room: Tensor, going: Sequence[int], grads: Sequence[Tensor | None], options: Options) -> None:
        """Makes the step on the parts of the parameters in ``going`` and adds what is to be sent off to ``room``."""
        raise NotImplementedError

    def present(self, room: Tensor) -> Tensor:
        """Where in ``room`` it is said on how many ranks each parameter has made the step."""
        raise NotImplementedError

    def complete(self, room: Tensor, going: Sequence[int]) -> None:
        """Makes the factors of parameters of the sums over all parts."""

    def take(self, room: Tensor) -> None:
        """Completes the step with the sums over all parts, and counts it.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient; the step is complete for all others.
        """
        counts = self.present(room).tolist()
        going = [i for i, count in enumerate(counts) if count and count == self.ranks[i]]
        self.complete(room, going)
        self.advance(going)
        who(self.entries, counts, self.ranks, self.OUTCOME)

    def requests(self, skip: bool, norm: bool) -> list[tuple[dist.ProcessGroup, int]]:
        return [(self.joint, 2 * len(self.entries))] if skip else []

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        here = [i for i, grad in enumerate(grads) if grad is not None]
        left: set[int] = set()
        if options.skip:

            def fill(room: Tensor) -> None:
                flags, present = room.split(len(self.entries))
                flags.copy_(self.flags(here, grads, options))
                present.copy_(self.at([i for i in here if self.speaks[i]]))

            flags, present = (yield from reduced(1, fill)).split(len(self.entries))
            _, refused = self.who_goes(present, flags)
            left.update(refused)
        going = [i for i in here if i not in left]
        self._call = lambda room: self.step(room, going, grads, options)
        return lambda: self.count_skipped([i for i in here if i in left])

    def send(self, room: Tensor) -> None:
        """The step that has been planned."""
        self._call(room)
        del self._call  # and the gradients with it


class Factored(Parts):
    """Matrices whose factors every rank has."""

    def __init__(self, entries: Sequence[Entry], mesh_dims: Sequence[int]) -> None:
        super().__init__(entries, mesh_dims)
        second = ("exp_avg_sq_row", "exp_avg_sq_col")
        first = ("exp_avg_row", "exp_avg_col") if "exp_avg_row" in entries[0].state else ()
        self.factors = [[entry.local_state(name) for entry in entries] for name in (*second, *first)]
        self.signs = [entry.local_state("exp_avg_sign") for entry in entries] if first else None
        self.blocks = [layout.blocks(entry.param) for entry in entries]  # type: ignore[arg-type]
        self._sizes = [factor.numel() for factors in self.factors for factor in factors]
        self.size = sum(self._sizes) + len(entries)

    def _split(self, room: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        """Sums as `factors` are, and who had a gradient."""
        count = len(self.entries)
        *pieces, present = room.split([*self._sizes, count])
        return [pieces[k : k + count] for k in range(0, len(pieces), count)], present

    def step(self, room: Tensor, going: Sequence[int], grads: Sequence[Tensor | None], options: Options) -> None:
        sums, present = self._split(room)
        beta1, beta2 = self.decays(options)
        old, new = ([pick(factor, going) for factor in factors] for factors in (self.factors, sums))
        none: list[Any] = [None, None]
        second, first = old[:2], old[2:] or none
        new_second, new_first = new[:2], new[2:] or none
        if going:
            ops.run(
                "smmf_sums_step_",
                pick(self.params, going),
                pick(grads, going),
                exp_avg_rows=first[0],
                exp_avg_cols=first[1],
                exp_avg_signs=None if self.signs is None else pick(self.signs, going),
                exp_avg_sq_rows=second[0],
                exp_avg_sq_cols=second[1],
                new_rows=new_first[0],
                new_cols=new_first[1],
                new_sq_rows=new_second[0],
                new_sq_cols=new_second[1],
                blocks=pick(self.blocks, going),
                beta1=None if beta1 is None else beta1[list(going)],
                beta2=beta2[list(going)],
                **_scalars(options),
                **self.stored(going, options),
                backend=options.backend,
            )
        for i, speaks in enumerate(self.speaks):
            if not speaks:
                for factors in sums:
                    factors[i].zero_()
        present.copy_(self.at([i for i in going if self.speaks[i]]))

    def present(self, room: Tensor) -> Tensor:
        return self._split(room)[1]

    def complete(self, room: Tensor, going: Sequence[int]) -> None:
        sums, _ = self._split(room)
        for rows, cols, new_rows, new_cols in zip(
            self.factors[::2], self.factors[1::2], sums[::2], sums[1::2], strict=True
        ):
            for i in going:
                rows[i].copy_(new_rows[i])
                total = new_cols[i].sum()
                cols[i].copy_(new_cols[i] / torch.where(total == 0, 1, total))


class Whole(Parts):
    """Parameters whose moments are whole and cut as they are: nothing but who had a gradient is shared."""

    def __init__(self, entries: Sequence[Entry], mesh_dims: Sequence[int]) -> None:
        super().__init__(entries, mesh_dims)
        self.squares = [entry.local_state("exp_avg_sq") for entry in entries]
        self.averages = [entry.local_state("exp_avg") for entry in entries] if "exp_avg" in entries[0].state else None
        self.size = len(entries)

    def step(self, room: Tensor, going: Sequence[int], grads: Sequence[Tensor | None], options: Options) -> None:
        beta1, beta2 = self.decays(options)
        if going:
            ops.run(
                "smmf_dense_step_",
                pick(self.params, going),
                pick(grads, going),
                exp_avgs=None if self.averages is None else pick(self.averages, going),
                exp_avg_sqs=pick(self.squares, going),
                beta1=None if beta1 is None else beta1[list(going)],
                beta2=beta2[list(going)],
                **_scalars(options),
                **self.stored(going, options),
                backend=options.backend,
            )
        room.copy_(self.at([i for i in going if self.speaks[i]]))

    def present(self, room: Tensor) -> Tensor:
        return room


def _scalars(options: Options) -> dict[str, Any]:
    scalars = {name: options.scalars[name] for name in ("lr", "eps", "weight_decay", "maximize")}
    return scalars | {"decoupled_weight_decay": options.scalars["weight_decay_mode"] == "adamw"}


@dataclass
class Sent:
    """An all-reduce under way, and whose sums it brings."""

    work: dist.Work
    rooms: list[tuple[Parts, Tensor]]


def sends(parts: Sequence[Parts]) -> list[Collective]:
    """The all-reduces that a step sends off: one for each group and type."""
    found: dict[tuple[object, ...], Collective] = {}
    for i, bucket in enumerate(parts):
        collective = found.setdefault(
            (bucket.joint.group_name, bucket.dtype, bucket.device),
            Collective(bucket.joint, bucket.dtype, bucket.device, [], []),
        )
        collective.jobs.append(i)
        collective.sizes.append(bucket.size)
    return list(found.values())


def send(parts: Sequence[Parts]) -> list[Sent]:
    """Makes the steps that were planned and sends off their sums."""
    sent = []
    for collective in sends(parts):
        buffer = torch.zeros(sum(collective.sizes), dtype=collective.dtype, device=collective.device)
        rooms = list(zip([parts[i] for i in collective.jobs], buffer.split(collective.sizes), strict=True))
        for bucket, room in rooms:
            bucket.send(room)
        work = dist.all_reduce(buffer, group=collective.group, async_op=True)
        assert work is not None
        sent.append(Sent(work, rooms))
    return sent


def take(sent: Sequence[Sent]) -> None:
    """Completes the steps that were sent off. On a GPU `wait` holds up the stream, not the host, which then reads whose
    step it was.

    Raises:
        RuntimeError: as `Parts.take`, once everything else is complete.
    """
    errors = []
    for each in sent:
        each.work.wait()
        for bucket, room in each.rooms:
            try:
                bucket.take(room)
            except RuntimeError as error:
                errors.append(error)
    if errors:
        raise errors[0]
