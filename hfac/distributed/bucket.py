"""Sharded parameters that step together, and what both algorithms do with them alike."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops, spec
from ..functional import pick
from ..rounding import BitOffset
from . import layout
from .schedule import Job, Needs, Stage, stages

#: state key of the lower bits of a master weight
LOW = str(spec.MASTER_LOW.key)


@dataclass(frozen=True)
class Entry:
    """A sharded parameter of an optimizer.

    Attributes:
        label: its name in messages.
        group: the index of its group.
        param: the DTensor.
        state: its state by key: DTensors, and plain ``step`` and ``skipped``.
        bit_offset: the random bits of this rank's shard, if it is rounded stochastically.
    """

    label: str
    group: int
    param: Tensor
    state: Mapping[str, Tensor]
    bit_offset: BitOffset | None = None

    @property
    def storage(self) -> tuple[torch.dtype | None, bool]:
        """How the parameter is stored; those that share a call agree in it."""
        low = self.state.get(LOW)
        return None if low is None else low.dtype, self.bit_offset is not None

    def local_state(self, key: str) -> Tensor:
        return layout.local(self.state[key])


@dataclass(frozen=True)
class Options:
    """What one group passes at every step; ``norm``: of H-Fac, whether the step also finds the gradients' norms."""

    scalars: Mapping[str, Any]
    skip: bool
    backend: str
    norm: bool = False


class Joint:
    """The ranks that share any of some parameters of one mesh: a single sum over them serves all those parameters.
    Where a parameter is replicated in one of the joint mesh dimensions, one rank contributes for its copies."""

    def __init__(self, params: Sequence[Tensor], mesh_dims: Sequence[int] | None = None) -> None:
        mesh = params[0].device_mesh  # type: ignore[attr-defined]
        own = [set(sum(layout.sharded_by(param), [])) for param in params]
        dims = set().union(*own) if mesh_dims is None else mesh_dims
        coordinate = mesh.get_coordinate()
        self.stages = stages(mesh, dims, range(mesh.ndim))
        #: by parameter, whether this rank contributes
        self.contributes = [all(coordinate[d] == 0 for d in dims if d not in mine) for mine in own]


class Bucket:
    """Entries of one group with the same types and process groups. Subclasses say what is summed."""

    algorithm: str
    #: by entry, sums of squares of the gradients over all ranks, after a job with `Options.norm`
    squares_found: Tensor

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.group = entries[0].group
        self.params = [layout.local(entry.param) for entry in entries]
        self.elements = [entry.param.numel() for entry in entries]
        self.ranks = [ranks_that_share(entry.param) for entry in entries]
        self.dtype = ops.state_dtype(entries[0].param.dtype)
        self.device = self.params[0].device
        low, stochastic = entries[0].storage
        self.lows = None if low is None else [entry.local_state(LOW) for entry in entries]
        self.bit_offsets = [entry.bit_offset for entry in entries] if stochastic else None

    def requests(self, skip: bool, norm: bool) -> list[tuple[Stage, int]]:
        """`schedule.Needs.requests` of a step."""
        raise NotImplementedError

    def needs(self, skip: bool, norm: bool) -> Needs:
        return Needs(self.requests(skip, norm), self.dtype, self.device)

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        """A step with these gradients, to be run by `schedule.run`."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor | None]:
        """This rank's shards of the gradients, redistributed as their parameters are."""
        return [layout.gradient(entry.param, entry.label) for entry in self.entries]

    def decays(self, options: Options) -> tuple[Tensor | None, Tensor]:
        """beta1 and beta2 of the next step, one entry per parameter."""
        found = spec.ALGORITHMS[self.algorithm].decays(_steps(self.entries) + 1, options.scalars)
        return found["beta1"], found["beta2"]

    def call(
        self,
        op: spec.Op,
        going: Sequence[int],
        grads: Sequence[Tensor | None],
        lists: Mapping[str, Sequence[Any]],
        options: Options,
        decays: tuple[Tensor | None, Tensor],
        backend: str,
        **vectors: Tensor,
    ) -> None:
        """Calls an op on the parameters in ``going``, with its lists and counts that have one entry for each of the
        bucket's, and its vectors."""
        if not going:
            return
        numbers = {**options.scalars, **spec.ALGORITHMS[self.algorithm].scalars(options.scalars)}
        numbers["beta1"], numbers["beta2"] = (None if beta is None else beta[list(going)] for beta in decays)
        given = {number.name: numbers[number.name] for number in op.numbers}
        given |= {name: pick(entries, going) for name, entries in lists.items()}
        if self.lows is not None:
            given[spec.MASTER_LOW.name] = pick(self.lows, going)
        if self.bit_offsets is not None:
            steps = _steps(pick(self.entries, going))
            given.update(places=pick(self.bit_offsets, going), seed=options.scalars["seed"], step=steps + 1)
        given |= {name: vector[list(going)] for name, vector in vectors.items()}
        ops.run(op.name, pick(self.params, going), pick(grads, going), **given, backend=backend)

    def flags(self, here: Sequence[int], grads: Sequence[Tensor | None], options: Options) -> Tensor:
        """With nonfinite="skip", 1 at the parameters in ``here`` whose shard of the gradient is not finite; else 0."""
        flags = torch.zeros(len(self.entries), dtype=self.dtype, device=self.device)
        if options.skip and here:
            found = ops.nonfinite([g for g in grads if g is not None], [self.elements[i] for i in here])
            flags[list(here)] = found.to(self.dtype)
        return flags

    def at(self, here: Sequence[int]) -> Tensor:
        """1 at the entries in ``here``, 0 elsewhere."""
        ones = torch.zeros(len(self.entries), dtype=self.dtype, device=self.device)
        ones[list(here)] = 1
        return ones

    def count_skipped(self, refused: Sequence[int]) -> None:
        for i in refused:
            self.entries[i].state["skipped"].add_(1)

    def advance(self, going: Sequence[int]) -> None:
        if going:
            steps = [self.entries[i].state["step"] for i in going]
            ops.counters_of(steps).advance_steps_(steps)

    def who_goes(self, present: Tensor, refused: Tensor, here: Sequence[int]) -> tuple[list[int], list[int]]:
        """From sums over all ranks: the parameters that step, and those whose gradient is not finite. ``here``: those
        that have a gradient on this rank."""
        with_gradient = who(self.entries, present.tolist(), self.ranks, here)
        flags = refused.tolist()
        return [i for i in with_gradient if not flags[i]], [i for i in with_gradient if flags[i]]


def who(
    entries: Sequence[Entry],
    counts: Sequence[float],
    expected: Sequence[int],
    here: Sequence[int],
    outcome: str = "Nothing was updated.",
) -> list[int]:
    """The parameters that have a gradient, on all ranks that share them.

    Args:
        counts: by entry, on how many ranks there is a gradient; of replicas, the first's.
        expected: by entry, on how many there must be if there is one on any.
        here: the entries that have one on this rank.
        outcome: how the message ends.

    Raises:
        RuntimeError: a parameter has a gradient on some of its ranks only.
    """
    mine = set(here)
    for i, (entry, count, all_of_them) in enumerate(zip(entries, counts, expected, strict=True)):
        if count in (0, all_of_them) and bool(count) != (i in mine):
            raise RuntimeError(
                f"{entry.label} (shape {tuple(entry.param.shape)}) has {'no' if count else 'a'} gradient on this rank, "
                f"but {'one' if count else 'none'} on the replica that adds up the sums for all. All replicas need one "
                "or none: let every rank use the parameter in its loss (a zero times its output will do), or set "
                f"requires_grad to False on all. {outcome}"
            )
        if count not in (0, all_of_them):
            raise RuntimeError(
                f"{entry.label} (shape {tuple(entry.param.shape)}) has a gradient on {int(count)} of the {all_of_them} "
                "ranks that share it. A sharded parameter needs one on all of them or on none: let every rank use the "
                "parameter in its loss (a zero times its output will do), or set requires_grad to False on all. "
                f"{outcome}"
            )
    return [i for i, count in enumerate(counts) if count]


def _steps(entries: Sequence[Entry]) -> Tensor:
    """The steps made so far, on the host in double."""
    steps = [entry.state["step"] for entry in entries]
    return torch.tensor(ops.counters_of(steps).read_steps(steps), dtype=torch.float64, device="cpu")


def ranks_that_share(param: Tensor) -> int:
    """How many shards the parameter has."""
    mesh = param.device_mesh  # type: ignore[attr-defined]
    return torch.Size(mesh.size(d) for dims in layout.sharded_by(param) for d in dims).numel()
