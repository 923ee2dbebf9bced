"""The sharded parameters of an optimizer: the same numbers on any number of ranks.

Each rank computes sums over its part of every parameter; a few numbers per row and column are added up over the ranks;
each rank updates its part. See docs/distributed.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from torch import Tensor

from .. import clipping
from . import hfac, layout, norm, schedule, smmf
from .bucket import Bucket, Entry, Options

__all__ = ["Entry", "Options", "Sharded", "layout"]


class Sharded:
    """The sharded parameters of all groups of an optimizer, for as long as they and their states are the same objects.

    Args:
        algorithm: "hfac" or "smmf".
        entries: in the optimizer's order, which is that of every rank.
    """

    def __init__(self, algorithm: str, entries: Sequence[Entry]) -> None:
        self._parts: list[smmf.Parts] = smmf.buckets(entries) if algorithm == "smmf" else []
        self._buckets: Sequence[Bucket] = self._parts or hfac.buckets(entries)
        self._entries = list(entries)
        states = [value for entry in entries for value in entry.state.values() if layout.is_dtensor(value)]
        self._dtensors = [*(entry.param for entry in entries), *states]
        self._parts_then = self._parts_now()
        self._norms: list[norm.Norms] | None = None
        self._ready: list[Callable[[], None]] | None = None

    def holds(self) -> bool:
        """The parts of parameters and states on this rank lie where they lay."""
        return self._parts_now() == self._parts_then

    def _parts_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, map(_LOCAL, self._dtensors)))

    def norms(self, options: Mapping[int, Options]) -> list[tuple[int, Tensor]]:
        """(group, norm of the gradient) of every parameter, over all ranks, which every rank must ask for.

        H-Fac has them from the numbers that the step adds up anyway, and the step is then ready but for its clipping.
        SMMF makes one all-reduce for each mesh.
        """
        if self._parts:
            return [
                (entry.group, value)
                for mesh in self._by_mesh()
                for entry, value in zip(mesh.entries, mesh.of(), strict=True)
            ]
        self._ready = self._run({group: replace(mine, norm=True) for group, mine in options.items()})
        return [
            (bucket.group, square)
            for bucket in self._buckets
            for square in bucket.squares_found.double().sqrt().to(bucket.dtype).unbind()
        ]

    def _by_mesh(self) -> list[norm.Norms]:
        if self._norms is None:
            self._norms = norm.by_mesh(self._entries)
        return self._norms

    def _run(self, options: Mapping[int, Options]) -> list[Callable[[], None]]:
        return schedule.run([bucket.plan(options[bucket.group]) for bucket in self._buckets])

    def _scale_(self, factor: Tensor) -> None:
        """Multiplies the gradients, in place, wherever and however they are placed."""
        grads = [entry.param.grad for entry in self._entries]
        clipping.scaled([layout.local(grad) for grad in grads if grad is not None], factor)

    def prepare(self, options: Mapping[int, Options], clip: Tensor | None = None) -> Callable[[], Callable[[], None]]:
        """Adds up over the ranks what the step needs, checks it, and returns the step, yet to be made. To call it
        begins the step, and to call what it returns completes it, which must happen in any case.

        Args:
            options: by group.
            clip: what the gradients are multiplied by, the same number on every rank. Where it is 1, what `norms` has
                added up stands; it is read on the host, which H-Fac's numbers are waited for anyway.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient; nothing has been written then. SMMF
                learns it here only where it adds up something before the step (``clip``, nonfinite="skip"), and else
                when the step is completed: `smmf.Parts.take`.
        """
        rest, self._ready = self._ready, None
        if rest is None or clip is None or clip.item() != 1:
            if clip is not None:
                self._scale_(clip)
            rest = self._run(options)

        def begin() -> Callable[[], None]:
            sent = smmf.send(self._parts)
            for finish in rest:
                finish()
            return lambda: smmf.take(sent)

        return begin

    def collectives(self, skip: Mapping[int, bool], clip: bool) -> list[tuple[int, int]]:
        """(ranks, bytes) of every all-reduce of a step; ``skip`` says by group whether nonfinite="skip", ``clip``
        whether the norm of the gradients is asked for. Where H-Fac's gradients are then clipped, those of a step
        that does not ask for it follow."""
        first = [(mesh.joint.size(), mesh.bytes) for mesh in self._by_mesh()] if clip and self._parts else []
        planned = []
        for bucket in self._buckets:
            requests = bucket.requests(skip[bucket.group], clip)
            planned.append(schedule.Planned(requests, bucket.dtype, bucket.device, _nothing()))
        found = [*schedule.collectives(planned), *smmf.sends(self._parts)]
        return first + [(collective.group.size(), collective.bytes) for collective in found]


_LOCAL = attrgetter("_local_tensor")


def _nothing() -> schedule.Job:
    yield
    return lambda: None
