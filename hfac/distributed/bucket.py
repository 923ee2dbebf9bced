"""Sharded parameters that step together, and what both algorithms do with them alike."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import clipping, ops, schedules, spec
from ..functional import pick
from ..rounding import BitOffset
from ..staging import Fetched, capturing
from . import layout
from .counts import DeviceCounts
from .lists import Members
from .schedule import Job, Needs, Stage, stages

#: state key of the lower bits of a master weight
LOW = str(spec.MASTER_LOW.key)


@dataclass(frozen=True, eq=False)
class Entry:
    """A sharded parameter of an optimizer.

    Attributes:
        label: its name in messages.
        group: the index of its group.
        param: the DTensor.
        state: its state by key: DTensors, and plain ``step`` and ``skipped``.
        bit_offset: the random bits of this rank's shard, if it is rounded stochastically.
        capturable: whether ``step`` is read on its device, wherever that is.
    """

    label: str
    group: int
    param: Tensor
    state: Mapping[str, Tensor]
    bit_offset: BitOffset | None = None
    capturable: bool = False

    @property
    def counts_on_device(self) -> bool:
        """Whether the device counts steps, and may be told whether to make one (`Options.forbidden`)."""
        return self.capturable or not self.state["step"].is_cpu

    @property
    def storage(self) -> tuple[torch.dtype | None, bool]:
        """How the parameter is stored; those that share a call agree in it."""
        low = self.state.get(LOW)
        return None if low is None else low.dtype, self.bit_offset is not None

    @cached_property
    def placements(self) -> Any:
        return self.param.placements  # type: ignore[attr-defined]

    def local_state(self, key: str) -> Tensor:
        return layout.local(self.state[key])


@dataclass(frozen=True)
class Options:
    """What one group passes at every step.

    Attributes:
        skip: whether gradients that are not finite are left out, each by itself.
        clip: what gradients are multiplied by: 0-d, not read.
        watch: whether the step tells of itself (`Bucket.watch`).
        forbidden: 0-d float32, the same on all ranks, not read: where it is not zero no bit of a parameter or a state
            changes, and the step is not counted. Only where all steps are counted on the device.
        refused: likewise: whether a step that is forbidden counts as skipped.
    """

    scalars: Mapping[str, Any]
    skip: bool
    backend: str
    clip: Tensor | None = None
    watch: bool = False
    forbidden: Tensor | None = None
    refused: Tensor | None = None


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


class Entries:
    """Sharded parameters whose gradients the same ranks must have.

    Args:
        dtype: of what is added up over the ranks.

    Attributes:
        unverified: what is left to be checked of the last step; calls raise RuntimeError where ranks disagreed.
        disagreed: of captured steps, by entry, on how many ranks there was a gradient where that was wrong, else NaN;
            replays write it. None before the first capture.
    """

    def __init__(self, entries: Sequence[Entry], dtype: torch.dtype, device: torch.device) -> None:
        self.entries, self.dtype, self.device = list(entries), dtype, device
        self.ranks = [ranks_that_share(entry.param) for entry in entries]
        self.unverified: list[Callable[[], object]] = []
        self.disagreed: Tensor | None = None
        self._unseen = torch.full((len(entries),), torch.nan, dtype=dtype, device=device)
        self._all_ranks = torch.tensor(self.ranks, dtype=dtype, device="cpu").to(device)
        self._members: list[Members] = []

    def members(self, index: Sequence[int]) -> Members:
        """The same ones as in the last steps, where those were of the same entries."""
        found = next((known for known in self._members if known.index == index), None)
        if found is None:
            found = Members(index, len(self.entries), self.dtype, self.device)
            found.bound["expected"] = found.flags * self._all_ranks
            self._members = [*self._members[-7:], found]
        return found

    def with_gradient(self, grads: Sequence[Tensor | None]) -> tuple[Members, list[Tensor]]:
        who = self.members([i for i, grad in enumerate(grads) if grad is not None])
        return who, [grad for grad in grads if grad is not None]

    def verify(self, present: Tensor, who: Members, now: str = "Nothing was updated.") -> None:
        """Checks that ranks agree on who has a gradient, given on how many there is one: at once where that lies on the
        host, else before the next step, when the step will have been made; of replays of a graph that is being
        captured, when that is asked for (`settle`). ``now``: how the message ends at once."""
        if capturing(self.device):
            self.disagreed = self._unseen
            self.disagreed.copy_(torch.where(present == who.bound["expected"], self.disagreed, present))
            return
        numbers = Fetched(present)

        def check(outcome: str = f"This was found after the step. {OUTCOME}") -> None:
            if "ranks" not in who.bound:
                who.bound["ranks"] = [ranks * flag for ranks, flag in zip(self.ranks, who.listed(), strict=True)]
            found = numbers.read()
            if found != who.bound["ranks"]:
                agreed(self.entries, found, self.ranks, who.index, outcome)

        if numbers.is_here:
            check(now)
        else:
            self.unverified.append(check)

    def verify_replays(self) -> None:
        """Adds to ``unverified`` what replays have found since the last time, for which the host waits."""
        if self.disagreed is None:
            return
        found = self.disagreed.tolist()
        self.disagreed.fill_(torch.nan)
        wrong = [i for i, count in enumerate(found) if count == count]
        entries, counts, ranks = pick(self.entries, wrong), pick(found, wrong), pick(self.ranks, wrong)
        here = [k for k, count in enumerate(counts) if not count]  # else there would be nothing wrong
        outcome = f"This was found after a graph's replay. {OUTCOME}"
        self.unverified.append(lambda: agreed(entries, counts, ranks, here, outcome))


class Bucket(Entries):
    """Entries of one group with the same types and process groups. Subclasses say what is summed.

    Args:
        may_move: whether counts may be given other memory (`ops.DeviceCounters`).

    Nothing of a step waits for the device: buffers, and what depends on who has a gradient, stay from step to step
    (`Members`), and what the host must know comes to it behind the sums (`Fetched`).
    """

    algorithm: str

    def __init__(self, entries: Sequence[Entry], may_move: bool = False) -> None:
        self.params = [layout.local(entry.param) for entry in entries]
        super().__init__(entries, ops.state_dtype(entries[0].param.dtype), self.params[0].device)
        self.group = entries[0].group
        low, stochastic = entries[0].storage
        self.lows = None if low is None else [entry.local_state(LOW) for entry in entries]
        self.bit_offsets = [entry.bit_offset for entry in entries] if stochastic else None
        #: where the device counts steps
        self.counted: DeviceCounts | None = None
        if entries[0].counts_on_device:
            skipped = [entry.state["skipped"] for entry in entries if "skipped" in entry.state]
            counts = skipped if len(skipped) == len(entries) else None
            self.counted = DeviceCounts([entry.state["step"] for entry in entries], counts, may_move)
        #: by name, an op with lists and counts that have one entry for each of the bucket's
        self.ops: dict[str, tuple[spec.Op, Mapping[str, Sequence[Any]]]] = {}
        self.sizes = self.on_device([entry.param.numel() for entry in entries])
        #: of the last watched step: by entry, sums over this rank's shard, NaN where no step was made; and whose these
        #: are, which had a gradient
        self.watched: Tensor | None = None
        self.told: list[int] = []

    def watch(
        self,
        op: spec.Op,
        lists: Mapping[str, Sequence[Any]],
        who: Members,
        grads: Sequence[Tensor],
        clip: Tensor | None,
        numbers: Mapping[str, Any],
    ) -> None:
        """Keeps what a step is about to do to members' shards (``watched`` of `hfac.reference`), from the same step of
        copies in plain torch, of one parameter at a time: the step itself has the bits that it has unwatched."""
        self.watched = torch.full((len(self.entries), spec.WATCHED), torch.nan, dtype=torch.float64, device=self.device)
        lists = {**lists, "params": self.params} | ({} if self.lows is None else {spec.MASTER_LOW.name: self.lows})
        for k, (i, grad) in enumerate(zip(who.index, grads, strict=True)):
            mine = {
                name: [entries[i].clone() if isinstance(entries[i], Tensor) else entries[i]]
                for name, entries in lists.items()
            }
            own = {
                name: value[k : k + 1] if isinstance(value, Tensor) and value.ndim else value
                for name, value in numbers.items()
            }
            self.watched[i] = 0
            grad = grad if clip is None else grad * clip
            copies = mine.pop("params")
            given: dict[str, Any] = {**mine, **own, "watched": self.watched[i : i + 1]}
            ops.run(op.name, copies, [grad], **given, backend="reference")

    def on_device(self, numbers: Sequence[float]) -> Tensor:
        """Numbers that do not change from step to step."""
        return torch.tensor(numbers, dtype=schedules.step_dtype(self.device), device="cpu").to(self.device)

    def requests(self, skip: bool) -> list[tuple[Stage, int]]:
        """`schedule.Needs.requests` of a step."""
        raise NotImplementedError

    def needs(self, skip: bool) -> Needs:
        return Needs(self.requests(skip), self.dtype, self.device)

    def use(self, rooms: Sequence[Tensor]) -> None:
        """Takes the rooms of these requests, for all steps until others are given."""
        self._members = []

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        """A step with these gradients, to be run by `schedule.running`."""
        raise NotImplementedError

    def workspace_bytes(self) -> int:
        """Bytes on the device that backends keep from step to step."""
        calls = (value for who in self._members for value in who.bound.values() if isinstance(value, ops.OpCall))
        return sum(call.workspace_bytes() for call in calls)

    def turned(self, shards: Sequence[Any]) -> list[Any]:
        """Shards, or None, as parameters are seen here."""
        return list(shards)

    def steps(self, who: Members) -> ops.Counters:
        """Their counts of steps."""
        if "steps" not in who.bound:
            who.bound["steps"] = ops.Counters([entry.state["step"] for entry in who.of(self.entries)])
        return who.bound["steps"]

    def decays(self, who: Members, options: Options) -> dict[str, Any]:
        """beta1 and beta2 of the next step, and "step", its number: numbers, or, where members have made different
        numbers of steps, one entry for each on the host; where the device counts them, one for each there."""
        made: Any
        if self.counted is not None:
            made = who.numbers(self.counted.made()).to(schedules.step_dtype(self.device))
        else:
            counters = self.steps(who)
            made = counters.common()
            if made is None:
                made = torch.tensor(counters.read(), dtype=torch.float64, device="cpu") if counters else 0.0
        t = made + 1
        return {**spec.ALGORITHMS[self.algorithm].decays(t, options.scalars), "step": t}

    def advance(self, who: Members, options: Options) -> None:
        """Counts a step, as far as it was made."""
        if self.counted is not None:
            self.counted.advance(who, options.forbidden, options.refused)
        else:
            self.steps(who).advance()

    def call(self, name: str, who: Members, backend: str) -> ops.OpCall:
        """One of `ops`, bound to members."""
        found = who.bound.get(name)
        if found is None:
            op, lists = self.ops[name]
            given = {key: who.of(entries) for key, entries in lists.items()}
            counts = {key: given.pop(key) for key in op.counts}
            stored = op.updates and self.bit_offsets is not None
            if op.updates and self.lows is not None:
                given[spec.MASTER_LOW.name] = who.of(self.lows)
            places = who.of(self.bit_offsets or ()) if stored else None
            found = ops.OpCall(op.name, who.of(self.params), given, counts=counts, places=places, backend=backend)
            who.bound[name] = found
        return found

    def check_capture(self, grads: Sequence[Tensor | None]) -> Members:
        """That a step with these gradients, of which there has been one of its kind, can be captured; and who steps.

        Raises:
            RuntimeError: it needs memory on the host.
        """
        who, here = self.with_gradient(grads)
        for name in self.ops:
            if name in who.bound:
                who.bound[name].check_capture_of_shards(here)
        return who

    def clipped(self, call: ops.OpCall, grads: list[Tensor], options: Options) -> tuple[list[Tensor], Tensor | None]:
        """Gradients multiplied by ``options.clip`` in place; or as they are, and what is left to multiply them by, for
        kernels that do it as they read them."""
        if options.clip is None or call.unscales:
            return grads, options.clip
        return clipping.scaled(grads, options.clip), None

    def run(
        self,
        call: ops.OpCall,
        grads: list[Tensor],
        clip: Tensor | None,
        options: Options,
        numbers: Mapping[str, Any],
        watched: tuple[str, Members] | None = None,
    ) -> None:
        """Makes a call on gradients that are yet to be multiplied by ``clip``. ``numbers``: of this step, beside those
        of the group's options; ``watched``: of a step that may be watched, the name among `ops` and the members."""
        taken = self.numbers(call.op, options, numbers)
        if options.watch and watched is not None:
            self.watch(*self.ops[watched[0]], watched[1], grads, clip, taken)
        forbidden = options.forbidden if call.op.updates else None
        inputs = call.prepare(grads, found_inf=forbidden, **taken)
        if clip is not None and not inputs.unscales:  # gradients that the kernels cannot read
            inputs, clip = call.prepare([grad * clip for grad in grads], found_inf=forbidden, **taken), None
        call.apply(inputs, clip=clip)

    def numbers(self, op: spec.Op, options: Options, more: Mapping[str, Any]) -> dict[str, Any]:
        """An op's, of the group's options and ``more``."""
        known = {**options.scalars, **spec.ALGORITHMS[self.algorithm].scalars(options.scalars), **more}
        names = [*(number.name for number in op.numbers), *op.vectors, *op.shard_vectors, "seed", "step"]
        return {name: known[name] for name in names if name in known}

    def flags(self, who: Members, grads: list[Tensor], clip: Tensor | None, options: Options) -> Tensor:
        """With nonfinite="skip", 1 at members whose shard of the gradient is not finite, once multiplied by ``clip``;
        else 0."""
        flags = torch.zeros_like(who.flags)
        if options.skip and who.index:
            who.put(flags, ops.nonfinite(grads, who.numbers(self.sizes), clip))
        return flags

    def going(self, refused: Tensor, who: Members, options: Options) -> Callable[[], Members]:
        """Who steps, given how many ranks refuse each gradient; to be called once, when the host must know. With
        nonfinite="skip" it then waits for the sums, and counts who is skipped."""
        if not options.skip:
            return lambda: who
        numbers = Fetched(refused)

        def going() -> Members:
            left = numbers.read()
            forbidden = options.forbidden  # which is not counted
            one = 1 if forbidden is None else (forbidden == 0).to(torch.int32)
            for i in who.index:
                if left[i]:
                    self.entries[i].state["skipped"].add_(one)
            return self.members([i for i in who.index if not left[i]])

        return going


#: how the message ends that ranks disagree on a parameter, where the step has been made meanwhile
OUTCOME = (
    "The step was made of all other parameters. Of this one, the ranks that had a gradient have updated their shards; "
    "go back to the last checkpoint."
)


def agreed(
    entries: Sequence[Entry],
    counts: Sequence[float],
    expected: Sequence[int],
    here: Sequence[int],
    outcome: str = "Nothing was updated.",
) -> None:
    """Checks that parameters have a gradient on all ranks that share them, or on none.

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


def ranks_that_share(param: Tensor) -> int:
    """How many shards the parameter has."""
    mesh = param.device_mesh  # type: ignore[attr-defined]
    return torch.Size(mesh.size(d) for dims in layout.sharded_by(param) for d in dims).numel()
