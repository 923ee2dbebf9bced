"""The sharded parameters of an optimizer: the same numbers on any number of ranks.

Each rank computes sums over its shard of every parameter; a few numbers per row and column are added up over the ranks;
each rank updates its shard. See docs/distributed.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from torch import Tensor

from .. import clipping
from . import hfac, layout, norm, schedule, smmf
from .bucket import Bucket, Entry, Options
from .norm import Found, Total
from .schedule import Sent

__all__ = ["Entry", "Found", "Options", "Sent", "Sharded", "Total", "layout"]


class Sharded:
    """The sharded parameters of all groups of an optimizer, for as long as they and their states are the same objects.

    Args:
        algorithm: "hfac" or "smmf".
        entries: in the optimizer's order, which is that of every rank.
    """

    def __init__(self, algorithm: str, entries: Sequence[Entry]) -> None:
        self._shards: list[smmf.Shards] = smmf.buckets(entries) if algorithm == "smmf" else []
        self._buckets: Sequence[Bucket] = self._shards or hfac.buckets(entries)
        self._entries = list(entries)
        states = [value for entry in entries for value in entry.state.values() if layout.is_dtensor(value)]
        self._dtensors = [*(entry.param for entry in entries), *states]
        self._addresses = self._addresses_now()
        self._norms: list[norm.Norms] | None = None
        self._ready: list[Callable[[], None]] | None = None

    def is_valid(self) -> bool:
        """Whether the shards of parameters and states are still in the same memory."""
        return self._addresses_now() == self._addresses

    def _addresses_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, map(_LOCAL, self._dtensors)))

    def norms(self, options: Mapping[int, Options]) -> list[tuple[int, Tensor]]:
        """(group, norm of the whole gradient) of every parameter. Every rank must ask for them.

        H-Fac has them from the numbers that a step adds up anyway; that step is then ready but for clipping. SMMF takes
        one all-reduce for each mesh.
        """
        if self._shards:
            return [
                (entry.group, value)
                for mesh in self._by_mesh()
                for entry, value in zip(mesh.entries, mesh.of(), strict=True)
            ]
        self._ready = self._run({group: replace(mine, norm=True) for group, mine in options.items()})
        return [
            (bucket.group, square)
            for bucket in self._buckets
            for square in clipping.roots(bucket.squares_found.double(), bucket.dtype).unbind()
        ]

    def _by_mesh(self) -> list[norm.Norms]:
        if self._norms is None:
            self._norms = norm.by_mesh(self._entries)
        return self._norms

    def _run(self, options: Mapping[int, Options]) -> list[Callable[[], None]]:
        each = [(bucket, options[bucket.group]) for bucket in self._buckets]
        jobs = [bucket.job(bucket.gradients(), mine) for bucket, mine in each]
        return schedule.run(jobs, [bucket.needs(mine.skip, mine.norm) for bucket, mine in each])

    def _scale_(self, factor: Tensor) -> None:
        """Multiplies the gradients in place, however they are placed."""
        grads = [entry.param.grad for entry in self._entries]
        clipping.scaled([layout.local(grad) for grad in grads if grad is not None], factor)

    def prepare(
        self, options: Mapping[int, Options], norm_coefficient: Tensor | None = None
    ) -> Callable[[], Callable[[], None]]:
        """Adds up over the ranks what the step needs, checks it, and returns a function that begins the step. That one
        returns another, which completes the step and must be called in any case.

        Args:
            options: by group.
            norm_coefficient: what the gradients are multiplied by, the same number on every rank. Where it is 1, the
                sums that `norms` added up are used; it is read on the host, which waits for H-Fac's sums anyway.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient; nothing has been written. SMMF finds
                out here only where it adds up something before the step (``norm_coefficient``, nonfinite="skip"), and
                otherwise when the step is completed: `smmf.Shards.take`.
        """
        ready, self._ready = self._ready, None
        if ready is None or norm_coefficient is None or norm_coefficient.item() != 1:
            if norm_coefficient is not None:
                self._scale_(norm_coefficient)
            ready = self._run(options)

        def begin() -> Callable[[], None]:
            pending = smmf.send(self._shards)
            for finish in ready:
                finish()
            return lambda: smmf.take(pending)

        return begin

    def collectives(self, skip: Mapping[int, bool], clips: bool) -> tuple[list[Sent], list[Sent]]:
        """The collectives of a step, with the bytes of each: until the norms of the gradients are known, and
        afterwards. Where H-Fac's gradients turn out to need clipping, those of a step without ``clips`` are the latter.

        Args:
            skip: by group, whether nonfinite="skip".
            clips: whether the norm of the gradients is needed.
        """
        norms = self._by_mesh() if clips and self._shards else []
        first = [(stage, mesh.bytes) for mesh in norms for stage in mesh.joint.stages]
        needs = [bucket.needs(skip[bucket.group], clips) for bucket in self._buckets]
        planned, sent = (
            [(collective.stage, collective.bytes) for collective in found]
            for found in (schedule.collectives(needs), smmf.sends(self._shards))
        )
        return (planned, sent) if clips and not self._shards else (first, planned + sent)


_LOCAL = attrgetter("_local_tensor")
