"""The sharded parameters of an optimizer: the same numbers on any number of ranks.

Each rank computes sums over its shard of every parameter; a few numbers per row and column are added up over the ranks;
each rank updates its shard. See docs/distributed.md.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor

from ..buckets import pick
from ..staging import Fetched, capturing, refused
from . import hfac, layout, norm, schedule, smmf, watch
from .bucket import Bucket, Entries, Entry, Options
from .gradients import Gradients
from .norm import Found, Norms, Total
from .schedule import Collective, Sent, process_groups

__all__ = [
    "Entry",
    "Found",
    "Gradients",
    "Norms",
    "Options",
    "Sent",
    "Sharded",
    "Total",
    "layout",
    "norm",
    "process_groups",
    "schedule",
]


class Sharded:
    """The sharded parameters of all groups of an optimizer, for as long as they and their states are the same objects.

    Args:
        algorithm: "hfac" or "smmf".
        entries: in the optimizer's order, which is that of every rank.
        gradients: the optimizer's.
        may_move: whether counts of steps on the device may be given other memory (`hfac.ops.DeviceCounters`).

    Raises:
        RuntimeError: a CUDA graph is being captured, in which nothing can be bound.
    """

    def __init__(self, algorithm: str, entries: Sequence[Entry], gradients: Gradients, may_move: bool = False) -> None:
        if capturing(layout.local(entries[0].param).device):
            raise refused("this is the first step on these tensors")
        self._shards: list[smmf.Shards] = smmf.buckets(entries, may_move) if algorithm == "smmf" else []
        self._buckets: Sequence[Bucket] = self._shards or hfac.buckets(entries, may_move)
        #: whether the device counts steps, and may be told whether to make one (`Options.forbidden`)
        self.decides_on_device = all(bucket.counted is not None for bucket in self._buckets)
        self._sendings = smmf.sendings(self._shards)
        self._entries, self._gradients_of = list(entries), gradients.of_all
        states = [value for entry in entries for value in entry.state.values() if layout.is_dtensor(value)]
        self._dtensors = [*(entry.param for entry in entries), *states]
        self._addresses = self._addresses_now()
        self._stream = self._stream_now()
        self._norms: list[norm.Norms] | None = None
        #: by which groups are watched
        self._watchers: dict[tuple[int, ...], list[watch.Watched]] = {}
        #: of the last step by parameter that was watched, what it tells of itself (``watched`` of `hfac.reference`)
        self.watched: dict[Tensor, Tensor] = {}
        #: what the rooms of the buckets were made for, and the collectives that they are in
        self._planned: tuple[list[bool], list[Collective]] | None = None
        #: which of the entries those of a bucket are, or of a mesh
        self._places: dict[Entries, list[int]] = {}
        #: what steps have been made (`_kind`), and who has stepped in graphs
        self._kinds: set[tuple[object, ...]] = set()
        self._in_graphs: list[object] = []
        #: of the step that is being prepared, by entry
        self._grads: list[Tensor | None] | None = None

    def is_valid(self) -> bool:
        """Whether the shards of parameters and states are still in the same memory, and steps on the same stream: a
        step on another must not meet the last one in its buffers. One that is captured in a graph takes the buffers of
        the steps before; whoever replays it orders it among them."""
        return (
            (self.capturing or self._stream_now() == self._stream)
            and self._addresses_now() == self._addresses
            and all(bucket.counted is None or bucket.counted.holds() for bucket in self._buckets)
        )

    @property
    def device(self) -> torch.device:
        """That of the shards."""
        return self._buckets[0].device

    @property
    def capturing(self) -> bool:
        """Whether a step would be captured in a CUDA graph."""
        return capturing(self.device)

    def workspace_bytes(self) -> int:
        """As `Bucket.workspace_bytes`, of all."""
        return sum(bucket.workspace_bytes() for bucket in self._buckets)

    def _stream_now(self) -> object:
        device = self._buckets[0].device
        if device.type in ("cpu", "meta"):
            return None
        return torch.get_device_module(device).current_stream(device)

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, map(_LOCAL, self._dtensors)))

    def settle(self) -> None:
        """Checks of the last step, and of replays since, what no one has waited for, before the next. Not while a graph
        is being captured, when nothing can be waited for.

        Raises:
            RuntimeError: ranks did not agree on which parameters have a gradient.
        """
        self._grads = None
        if not self.capturing:
            settle([*self._buckets, *(self._norms or ())])

    def norms(self, options: Mapping[int, Options]) -> list[Found]:
        """The norms of whole gradients. Every rank must ask for them: one all-reduce for each mesh."""
        skips = {group: option.skip for group, option in options.items()}
        if self.capturing and self._present() not in (present for present, *_ in self._kinds):
            raise refused("this is the first step on these tensors")
        return [found for mesh in self._by_mesh() for found in mesh.by_skip(mesh.of(self._of(mesh)), skips)]

    def skip(self, refused: Tensor) -> bool:
        """Whether the step is left out, because this number, which is the same on all ranks, is not zero, and counts it
        as skipped: for where the host decides."""
        if not Fetched(refused[None]).read()[0]:
            return False
        for entry, grad in zip(self._entries, self._gradients(), strict=True):
            if grad is not None:
                entry.state["skipped"].add_(1)
        self._grads = None
        self.watched = {param: torch.full_like(numbers, torch.nan) for param, numbers in self.watched.items()}
        return True

    def _gradients(self) -> list[Tensor | None]:
        """By entry, this rank's shards of the gradients, redistributed as their parameters are, once in a step."""
        if self._grads is None:
            self._grads = self._gradients_of(self._entries)
        return self._grads

    def _of(self, each: Entries) -> list[Tensor | None]:
        """The gradients of some of the entries."""
        if each not in self._places:
            place = {entry: i for i, entry in enumerate(self._entries)}
            self._places[each] = [place[entry] for entry in each.entries]
        return pick(self._gradients(), self._places[each])

    def _by_mesh(self) -> list[norm.Norms]:
        if self._norms is None:
            self._norms = norm.by_mesh(self._entries)
        return self._norms

    def _collectives(self, skips: Sequence[bool]) -> list[Collective]:
        """Those of a step but for what SMMF sends off."""
        needs = [bucket.needs(skip) for bucket, skip in zip(self._buckets, skips, strict=True)]
        return schedule.collectives(needs)

    def _plan(self, options: Mapping[int, Options]) -> list[Collective]:
        """The collectives of a step with these options, and memory for what they send."""
        skips = [options[bucket.group].skip for bucket in self._buckets]
        if self._planned is None or self._planned[0] != skips:
            planned = self._collectives(skips)
            for sending in self._sendings:
                sending.make()
            for bucket, rooms in zip(self._buckets, schedule.rooms_of(planned, len(self._buckets)), strict=True):
                bucket.use(rooms)
            self._planned = skips, planned
        return self._planned[1]

    def prepare(self, options: Mapping[int, Options]) -> Callable[[], Callable[[], None]]:
        """Adds up over the ranks what the step needs and returns a function that begins the step. That one returns
        another, which completes the step and must be called in any case. Neither waits for the device, except with
        nonfinite="skip".

        Args:
            options: by group.

        Raises:
            RuntimeError: a CUDA graph is being captured of which the step cannot be part; or ranks do not agree on
                which parameters have a gradient. On the CPU it is raised before
                anything is written; elsewhere it may be found when the step has been made (`settle`), and of SMMF,
                which sends its sums off during the step, when that is completed (`smmf.Shards.take`).
        """
        return schedule.finished(self.preparing(options))

    def preparing(
        self, options: Mapping[int, Options], async_op: bool = False
    ) -> Generator[dist.Work, None, Callable[[], Callable[[], None]]]:
        """`prepare`, which with ``async_op`` stops at every collective and yields it, to be waited for before it goes
        on."""
        kind = self._kind(options)
        if self.capturing:
            self._check_capture(kind, options)
        planned = self._plan(options)
        jobs = [bucket.job(bucket.turned(self._of(bucket)), options[bucket.group]) for bucket in self._buckets]
        self._grads = None
        found = yield from schedule.running(jobs, planned, async_op)
        steps = dict(zip(self._buckets, found, strict=True))

        first = next(iter(options.values()))  # what forbids a step is one number for all of it

        def begin() -> Callable[[], None]:
            works = []
            for sending in self._sendings:
                sending.clear()
                for shards in sending.shards:
                    steps.pop(shards)()
                works.append(sending.send())
            for step in steps.values():
                step()

            def complete() -> None:
                pending = zip(self._sendings, works, strict=True)
                errors = [error for sending, work in pending for error in sending.take(work)]
                if errors:
                    raise errors[0]
                self._watch([group for group, option in options.items() if option.watch], first.forbidden)
                self._kinds.add(kind)

            return complete

        return begin

    def _kind(self, options: Mapping[int, Options]) -> tuple[object, ...]:
        """What a step makes once, the first of its kind: who has a gradient, and what is done besides."""
        besides = [
            (group, each.skip, each.watch, each.clip is None, each.forbidden is None, each.backend)
            + (each.scalars.get("eps"), each.scalars.get("clip_threshold") is None)
            for group, each in options.items()
        ]
        return (self._present(), *besides)

    def _present(self) -> tuple[bool, ...]:
        """Which entries have a gradient."""
        return tuple(grad is not None for grad in self._gradients())

    def _check_capture(self, kind: tuple[object, ...], options: Mapping[int, Options]) -> None:
        """That a step of this kind can be part of the CUDA graph that is being captured; and keeps what that reads in
        every replay, for as long as this object lives.

        Raises:
            RuntimeError: it needs memory on the host, or waits for numbers.
        """
        if not self.decides_on_device:
            raise RuntimeError(
                "sharded parameters whose steps the host counts cannot be part of the CUDA graph that is being "
                "captured. Set capturable=True in all groups."
            )
        if kind not in self._kinds:
            raise refused("this is the first step on these tensors")
        for bucket in self._buckets:
            self._in_graphs.append(bucket.check_capture(bucket.turned(self._of(bucket))))

    def _by_watched(self, groups: Sequence[int]) -> list[watch.Watched]:
        key = tuple(groups)
        if key not in self._watchers:
            entries = [entry for entry in self._entries if entry.group in key]
            self._watchers[key] = watch.by_mesh(entries, self._buckets[0].device)
        return self._watchers[key]

    def _watch(self, groups: Sequence[int], forbidden: Tensor | None) -> None:
        """Adds up over the ranks what the step has told of itself: one all-reduce for each mesh, on every rank. NaN
        where it was ``forbidden``."""
        self.watched = {}
        found: dict[Entry, Tensor] = {}
        for bucket in self._buckets:
            if bucket.watched is not None:
                found |= {bucket.entries[i]: bucket.watched[i] for i in bucket.told}
                bucket.watched = None
        for mesh in self._by_watched(groups) if groups else ():
            self.watched |= mesh.of(found)
        if forbidden is not None:
            nothing = forbidden != 0
            self.watched = {param: row.masked_fill(nothing, torch.nan) for param, row in self.watched.items()}

    def collectives(
        self, skip: Mapping[int, bool], clips: bool, watched: Sequence[int] = ()
    ) -> tuple[list[Sent], list[Sent]]:
        """The collectives of a step, with the bytes of each: until the norms of the gradients are known, and
        afterwards.

        Args:
            skip: by group, whether nonfinite="skip".
            clips: whether the norm of the gradients is needed.
            watched: the groups that are watched.
        """
        norms = self._by_mesh() if clips else []
        first = [Sent(stage, mesh.bytes, mesh.dtype) for mesh in norms for stage in mesh.joint.stages]
        sent = [each.sent() for each in self._collectives([skip[bucket.group] for bucket in self._buckets])]
        sent += [sending.collective.sent(stage) for sending in self._sendings for stage in sending.sums]
        sent += [sending.collective.sent(stage) for sending in self._sendings for stage in sending.copies]
        for mesh in self._by_watched(watched) if watched else ():
            sent += [Sent(stage, mesh.bytes, mesh.dtype) for stage in mesh.joint.stages]
        return first, sent


def settle(everything: Iterable[Entries]) -> None:
    """Checks what of the last step is left to be checked.

    Raises:
        RuntimeError: ranks did not agree on which parameters have a gradient.
    """
    everything = list(everything)
    for each in everything:
        each.verify_replays()
    checks = [check for each in everything for check in each.unverified]
    for each in everything:
        each.unverified = []  # what is wrong is said once
    for check in checks:
        check()


_LOCAL = attrgetter("_local_tensor")
