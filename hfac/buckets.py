"""Buckets: parameters of a group that share one call, and a step of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import ops, schedules, spec
from .scratch import Scratch
from .slicing import slices


@dataclass
class Bucket:
    """Parameters that share one call: they agree in layout of state, device, types and step. The call is on their
    slices, where they have batch dimensions."""

    call: ops.OpCall
    index: list[int] | None  # places in the group's lists; None where it is all of them
    grad_dtype: torch.dtype
    steps: list[Tensor]
    skipped: list[Tensor] | None
    on_host: ops.Counters | None  # the steps are read, and agree; else each parameter has its own decays, on the device
    batch_dims: int
    owners: "Owners | None"  # with batch dimensions, where the device must know whose slice is whose
    views: list[int] | None  # of each parameter, how many pieces it is cut into
    views_dim: int  # the dimension that is cut, after the batch dimensions
    counts: list[int]  # of each parameter, how many entries of the call are its slices
    made: ops.DeviceCounters | None = None  # the steps, where the device counts them
    left: ops.DeviceCounters | None = None  # steps that were skipped

    def count(self, flags: Tensor | None, forbidden: Tensor | None, refused: Tensor | None) -> None:
        """Counts a step. ``flags``: of the call's entries, which were skipped; ``forbidden``: 0-d, whether the step was
        not made at all; ``refused``: 0-d, whether that counts as skipped."""
        made = self.made
        if self.on_host is not None:
            self.on_host.advance()
        elif made is not None:
            made.add_(1)
        if made is None and forbidden is not None:  # another group of the optimizer has amp_scaling
            made = ops.DeviceCounters(self.steps)
        if made is not None and self.left is not None and flags is not None and not _are_down(flags):
            some, every = (flags, flags) if self.owners is None else self.owners.left(flags)
            self.left.add_(some)
            made.add_(every, alpha=-1)
        if made is not None and forbidden is not None:
            made.add_(forbidden, alpha=-1)
        if self.left is not None and refused is not None:
            self.left.add_(refused)

    def among(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Its parameters' entries of a list that has one for each parameter of the group."""
        return tensors if self.index is None else pick(tensors, self.index)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the call takes of such a list."""
        return list(slices(self.among(tensors), self.batch_dims, self.views, self.views_dim))


class Together:
    """Buckets whose steps, or the skipped ones, are counted on one device: their decays are computed together."""

    def __init__(self, buckets: Sequence[Bucket], may_move: bool, capturing: bool) -> None:
        self._ends = list(accumulate(len(bucket.steps) for bucket in buckets))
        self._buckets = buckets
        self._counters = [
            ops.DeviceCounters([s for bucket in buckets for s in bucket.steps], may_move, one_by_one=capturing)
        ]
        for bucket in buckets:
            bucket.made = ops.DeviceCounters(bucket.steps, one_by_one=capturing)
        if buckets[0].skipped is not None:
            self._counters.append(
                ops.DeviceCounters([s for b in buckets for s in b.skipped or ()], may_move, one_by_one=capturing)
            )
            for bucket in buckets:
                bucket.left = ops.DeviceCounters(bucket.skipped or (), one_by_one=capturing)

    def decays(
        self, algorithm: spec.Algorithm, options: Mapping[str, Any]
    ) -> Iterator[tuple[Bucket, Any, dict[str, Any]]]:
        """Of the buckets whose steps the device alone knows, the number of their next step, where bits are drawn with
        it, and their decays."""
        if self._buckets[0].on_host is not None:
            return
        made = self._counters[0].values()
        t = made.to(schedules.step_dtype(made.device)) + 1
        found = algorithm.decays(t, options)
        for bucket, end in zip(self._buckets, self._ends, strict=True):
            start = end - len(bucket.steps)
            told = {**found, "step": t} if bucket.call.stochastic else found
            mine = told
            if len(self._ends) > 1:
                mine = {n: v[start:end] if isinstance(v, Tensor) and v.ndim else v for n, v in told.items()}
            if bucket.owners is not None:
                spread = bucket.owners.spread
                mine = {n: spread(v) if isinstance(v, Tensor) and v.ndim else v for n, v in mine.items()}
            yield bucket, mine.get("step", 0.0), {n: v for n, v in mine.items() if n != "step"}


def _are_down(flags: Tensor) -> bool:
    """Whether no flag is up, where the host can say so without waiting."""
    return flags.is_cpu and type(flags) is Tensor and not flags.any()


class Owners:
    """Whose slice each entry of a call is. Nothing here comes from the host, so that a CUDA graph may hold it."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self._of = torch.cat([torch.full((n,), i, dtype=torch.int64, device=device) for i, n in enumerate(counts)])
        self._counts = self._sums(torch.ones_like(self._of, dtype=torch.int32), len(counts))

    def spread(self, per_param: Tensor) -> Tensor:
        """One entry for each slice."""
        self._use()
        return per_param[self._of]

    def left(self, flags: Tensor) -> tuple[Tensor, Tensor]:
        """1 for parameters of which a slice has its flag up, and for those of which all have."""
        self._use()
        up = self._sums(flags, len(self._counts))
        some = up.clamp(max=1)
        return some, some * (up == self._counts)

    def _use(self) -> None:
        """Tells the allocator of the stream that reads this now, which may not be the one that it was made on."""
        device = self._of.device
        if device.type in ("cuda", "xpu"):
            stream = getattr(torch, device.type).current_stream(device)
            for tensor in (self._of, self._counts):
                tensor.record_stream(stream)

    def _sums(self, flags: Tensor, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=flags.device).index_add_(0, self._of, flags)


def pick(entries: Sequence[Any], index: Sequence[int]) -> list[Any]:
    return list(itemgetter(*index)(entries)) if len(index) > 1 else [entries[i] for i in index]


class Step:
    """A validated step of a `Group`: ask for its norms, or not, then apply it, once.

    Args:
        inputs: (bucket, grads, t, numbers, scaling, seed, seen) -> what the bucket's call is handed, checked.
        grads: of the group's parameters.
        seen: their snapshot, where nothing but addresses can have changed since an earlier step checked them.
        told: of each bucket the number of the step and its other numbers.
        scaling: ``grad_scale`` and ``found_inf``, or None.
        options: which the numbers come from.
        captured: where what a CUDA graph reads is added.
        scratch: states that ops cannot take as they are kept.
    """

    def __init__(
        self,
        inputs: Callable[..., ops.Inputs],
        grads: list[Tensor],
        seen: ops.Snapshot | None,
        told: list[tuple[Bucket, Any, dict[str, Any]]],
        scaling: Mapping[str, Tensor | None],
        options: Mapping[str, Any],
        captured: list[Any],
        scratch: Sequence[Scratch],
    ) -> None:
        self._make, self._grads, self._seen, self._told = inputs, grads, seen, told
        self._captured, self._scratch = captured, scratch
        self._scaling, self._options, self._found_inf = scaling, options, scaling["found_inf"]
        self._refused: Tensor | None = None
        #: what is made of ``told`` for the buckets' calls, if it has been
        self._checked: list[tuple[Bucket, ops.Inputs]] | None = None
        self._statistics: list[ops.Statistics | None] = [None] * len(told)
        self._joined = False  # the norms of all buckets have been found together

    def check(self) -> list[tuple[Bucket, ops.Inputs]]:
        """What the buckets' calls are handed, checked the first time. Of gradients that an earlier step has checked
        nothing is refused, so a step that repeats the last one need not ask for it."""
        if self._checked is None:
            self._checked = [(bucket, self._inputs(bucket, t, numbers)) for bucket, t, numbers in self._told]
        return self._checked

    def _inputs(self, bucket: Bucket, t: Any, numbers: Mapping[str, Any]) -> ops.Inputs:
        seed = self._options.get("seed", 0)
        return self._make(bucket, self._grads, t, numbers, self._scaling, seed, self._seen)

    def norms(self) -> list[Tensor]:
        """The gradients' norms, those of slices where there are batch dimensions. `apply` goes on from the statistics
        that give them."""
        found = [bucket.call.statistics(inputs) for bucket, inputs in self.check()]
        self._statistics = [*found]
        together = ops.joined(found)
        self._joined = together is not None
        return [statistics.norms for statistics in found] if together is None else [together]

    def refuse(self, refused: Tensor) -> None:
        """Before `apply`, of a group that ``skips_steps``: where this 0-d float32 tensor, which is not read, is not
        zero, nothing is written, and the step is counted as skipped unless ``found_inf`` forbids it as well."""
        self._refused = refused
        for _, inputs in self.check():
            forbidden = inputs.scaling["found_inf"]
            torch.maximum(forbidden, refused.to(forbidden.device), out=forbidden)

    def owners(self) -> list[list[int]]:
        """Of each entry of the `norms` that have been found, whose it is: the position in the group's lists."""
        indices = [(bucket.index or range(len(bucket.counts)), bucket.counts) for bucket, *_ in self._told]
        found = [[i for i, n in zip(index, counts, strict=True) for _ in range(n)] for index, counts in indices]
        return [[i for mine in found for i in mine]] if self._joined else found

    @property
    def unscales(self) -> bool:
        """Whether gradients are multiplied as they are read, and stay as they are."""
        return any(inputs.unscales for _, inputs in self.check())

    def watched(self) -> Iterator[tuple[list[int] | None, Tensor]]:
        """Of a step that has been made and was watched: places in the group's lists (None: all of them, in order), and
        rows as `hfac.reference` describes them, those of a parameter's slices one after the other; NaN where no step
        was made."""
        for bucket, inputs in self.check():
            found = inputs.numbers.get("watched")
            if found is not None:
                if inputs.nonfinite is not None:
                    found = found.masked_fill((inputs.nonfinite != 0)[:, None], math.nan)
                forbidden = inputs.scaling.get("found_inf")
                if forbidden is not None:
                    found = found.masked_fill(forbidden.reshape(1, 1) != 0, math.nan)
                yield bucket.index, found

    def check_capture(self, clip: Tensor | None = None) -> None:
        """Checks, before `apply` and with its arguments, that the step can be part of a CUDA graph that is being
        captured, if one is, and keeps what the graph reads in every replay.

        Raises:
            RuntimeError: it cannot be: it needs memory on the host; nothing has been written.
        """
        if not any(bucket.call.capturing() for bucket, *_ in self._told):
            return
        captured = self._captured
        for (bucket, inputs), found in zip(self.check(), self._statistics, strict=True):
            bucket.call.check_capture(inputs, found)
            captured += [*bucket.call.tensors(), *bucket.steps, *(bucket.skipped or ()), bucket.owners]
            captured += [inputs.nonfinite, inputs.numbers.get("watched"), inputs.scaling.get("found_inf")]
        captured += [clip, self._refused, *self._scaling.values(), *self._options.values()]
        captured += [tensor for scratch in self._scratch for tensor in scratch.tensors()]

    def apply(self, clip: Tensor | None = None) -> None:
        """Makes the step, on gradients multiplied by ``clip``, and counts it."""
        if self._checked is None and clip is None and self._seen is not None:
            self._repeat(self._seen)
            return
        for scratch in self._scratch:
            scratch.fill()
        for (bucket, inputs), found in zip(self.check(), self._statistics, strict=True):
            self._apply(bucket, inputs, found, clip)
        for scratch in self._scratch:
            scratch.empty()

    def _repeat(self, seen: ops.Snapshot) -> None:
        """Has the buckets repeat their last calls, with other numbers."""
        seed = self._options.get("seed", 0)
        for bucket, t, numbers in self._told:
            if bucket.call.again(seen, seed, t, numbers):
                bucket.count(None, None, None)
            else:
                self._apply(bucket, self._inputs(bucket, t, numbers), None, None)

    def _apply(
        self, bucket: Bucket, inputs: ops.Inputs, statistics: ops.Statistics | None, clip: Tensor | None
    ) -> None:
        bucket.call.apply(inputs, statistics, clip)
        forbidden = inputs.scaling.get("found_inf")
        refused = None
        if forbidden is not None:
            forbidden = refused = forbidden.view(())
            if self._found_inf is not None:
                refused = forbidden - self._found_inf.view(()).to(forbidden.device)
        bucket.count(inputs.nonfinite, forbidden, None if self._refused is None else refused)
