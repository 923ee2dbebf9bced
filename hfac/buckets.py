"""Buckets: parameters of a group that share one call, and a step of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import ops, schedules, spec
from .scratch import Scratch
from .slicing import slices


@dataclass(eq=False)
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
    views: list[int] | None  # of each parameter, how many pieces it is cut into
    views_dim: int  # the dimension that is cut, after the batch dimensions
    counts: list[int]  # of each parameter, how many entries of the call are its slices
    in_together: bool = False  # the device counts its steps, or those that were skipped: a `Together` has it

    def count(self, forbidden: Tensor | None) -> None:
        """Counts a step of what the host alone counts. ``forbidden``: 0-d, whether it was not made at all."""
        assert self.on_host is not None
        self.on_host.advance()
        if forbidden is not None:  # another group of the optimizer has amp_scaling
            ops.DeviceCounters(self.steps).add_(forbidden.view(()), alpha=-1)

    def among(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Its parameters' entries of a list that has one for each parameter of the group."""
        return tensors if self.index is None else pick(tensors, self.index)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the call takes of such a list."""
        return list(slices(self.among(tensors), self.batch_dims, self.views, self.views_dim))

    def moved(self, before: ops.Snapshot, seen: ops.Snapshot, grads: list[Tensor]) -> ops.Moved | None:
        """What the call is told of gradients like the last ones that lie elsewhere; None where they have not moved."""
        return None if seen is before else (before, self.of(grads))


@dataclass
class Marks:
    """What the device says of one step of buckets that are counted together.

    Attributes:
        flags: which entries of their calls were skipped, those of one bucket behind those of another; None where none
            can be.
        of: each bucket's.
        forbidden: 0-d, whether the step is not made at all; None where nothing forbids it.
        memory: the step's where it stays for later ones.
    """

    flags: Tensor | None
    of: Sequence[Tensor | None]
    forbidden: Tensor | None
    memory: "StepParts | None" = None


class StepParts:
    """Of one step that the device counts: the memory that it is counted in, each bucket's part of that, and what the
    bucket is told.

    Args:
        own: its own (`hfac.ops.step_counts.StepMemory`).
        parts: (entries of all buckets' calls) -> those of each.
        again: whether later steps may have it.
    """

    def __init__(self, own: Any, parts: Callable[[Tensor], Sequence[Tensor]], again: bool) -> None:
        self.own, self.again = own, again
        self.flags = None if own.nonfinite is None else parts(own.nonfinite)
        self.first, self.second, self.steps = map(parts, own.rows)
        #: the options that the last step was told of, none of which is a tensor, and what each bucket was told
        self.known: tuple[Mapping[str, Any], list[tuple[Bucket, Any, dict[str, Any]]]] | None = None


class Together:
    """Buckets whose steps, or the skipped ones, are counted on one device: all of it is one operation for all.

    Args:
        may_move: whether counts may be given other memory.
        capturing: whether a graph is being captured.
        has_rule: whether the algorithm has a rule by which decays follow from steps.
    """

    def __init__(self, buckets: Sequence[Bucket], may_move: bool, capturing: bool, has_rule: bool) -> None:
        self.buckets = buckets
        self.device = buckets[0].steps[0].device
        self._on_host = buckets[0].on_host is not None
        self._made = ops.DeviceCounters([s for b in buckets for s in b.steps], may_move, one_by_one=capturing)
        self._left = None
        if buckets[0].skipped is not None:
            skipped = [s for b in buckets for s in b.skipped or ()]
            self._left = ops.DeviceCounters(skipped, may_move, one_by_one=capturing)
        self._entries = [sum(bucket.counts) for bucket in buckets]
        sliced = any(bucket.batch_dims or bucket.views is not None for bucket in buckets)
        #: with batch dimensions, where the device must know whose slice is whose
        self.owners = Owners([n for b in buckets for n in b.counts], self.device) if sliced else None
        self._counts: Any = self._bind_counts() if has_rule else None
        #: of earlier steps, for later ones
        self._spare: list[StepParts] = []
        for bucket in buckets:
            bucket.in_together = True

    def told(
        self, algorithm: spec.Algorithm, options: Mapping[str, Any], marks: Marks
    ) -> Sequence[tuple[Bucket, Any, dict[str, Any]]]:
        """Of the buckets whose steps the device alone knows, the number of their next step, where bits are drawn with
        it, and what else it is told."""
        if self._on_host:
            return ()
        if marks.memory is not None:
            return self._told_in_place(algorithm, options, marks.memory)
        t = schedules.following(self._made.values())
        if isinstance(t, schedules.Steps) and not algorithm.takes_steps:
            t = t.now
        found = {**algorithm.decays(t, options), **algorithm.constants(options)}
        if any(bucket.call.stochastic for bucket in self.buckets):
            found["step"] = t.now if isinstance(t, schedules.Steps) else t
        own = [name for name, value in found.items() if isinstance(value, Tensor) and value.ndim]
        values = [found[name] if self.owners is None else self.owners.spread(found[name]) for name in own]
        parts = [*map(self._parts, values)]
        told = [
            {**found, **{name: mine[i] for name, mine in zip(own, parts, strict=True)}}
            for i in range(len(self.buckets))
        ]
        return [(bucket, mine.pop("step", 0.0), mine) for bucket, mine in zip(self.buckets, told, strict=True)]

    def _told_in_place(
        self, algorithm: spec.Algorithm, options: Mapping[str, Any], memory: StepParts
    ) -> Sequence[tuple[Bucket, Any, dict[str, Any]]]:
        assert algorithm.decay_rule is not None
        self._counts.find_decays(memory.own, algorithm.decay_rule(options))
        known = memory.known
        if known is not None and known[0] is options:
            return known[1]
        constants, has_first = algorithm.constants(options), algorithm.has_first(options)
        told = [
            (bucket, step, {"beta1": first if has_first else None, "beta2": second, **constants})
            for bucket, first, second, step in zip(self.buckets, memory.first, memory.second, memory.steps, strict=True)
        ]
        if not any(isinstance(value, Tensor) for value in options.values()):  # which may be written in place
            memory.known = options, told
        return told

    def marks(self, found_inf: Tensor | None, skips_steps: bool, again: bool = False) -> Marks:
        """Of a step that a GradScaler may forbid. ``skips_steps``: so may its gradients' norm, and ``forbidden`` is the
        step's own, for that to be written. ``again``: it is told nothing but gradients and numbers, no graph is being
        captured, and nothing of it is looked at once it has been counted."""
        memory = None if self._counts is None else self._memory(again)
        if skips_steps:
            forbidden = torch.zeros((), dtype=torch.float32, device=self.device)
            forbidden = forbidden if found_inf is None else found_inf.reshape(()).clone()
            return Marks(None, [None] * len(self.buckets), forbidden, memory)
        if self._left is None:
            return Marks(None, [None] * len(self.buckets), found_inf, memory)
        if memory is not None and memory.flags is not None:
            return Marks(memory.own.nonfinite, memory.flags, found_inf, memory)
        flags = torch.zeros(sum(self._entries), dtype=torch.int32, device=self.device)
        return Marks(flags, self._parts(flags), found_inf)

    def _memory(self, again: bool) -> StepParts:
        """Several threads may make steps: each has memory of its own."""
        try:
            while again:
                memory = self._spare.pop()
                if self._counts.serves(memory.own):
                    return memory
        except IndexError:  # nothing is left
            pass
        return StepParts(self._counts.memory(), self._parts, again)

    def count(self, marks: Marks, refused: Tensor | None) -> None:
        """Counts a step. ``refused``: 0-d, whether it counts as skipped where it was forbidden."""
        made, left, flags, forbidden = self._made, self._left, marks.flags, marks.forbidden
        memory = marks.memory
        if memory is not None and forbidden is None:
            self._counts.add(memory.own)
            if memory.again:
                self._spare.append(memory)
            return
        if self._on_host:
            for bucket in self.buckets:
                bucket.count(None)
        else:
            made.add_(1)
        if left is not None and flags is not None and not ops.are_down(flags):
            some, every = (flags, flags) if self.owners is None else self.owners.left(flags)
            left.add_(some)
            made.add_(every, alpha=-1)
        if forbidden is not None:
            made.add_(forbidden.view(()), alpha=-1)
        if left is not None and refused is not None:
            left.add_(refused)

    def _bind_counts(self) -> Any:
        """What counts steps where all counts lie side by side, one for each entry of the calls: kernels, where all
        buckets' backend has them, or plain torch. None elsewhere."""
        made, left = self._made.together, None if self._left is None else self._left.together
        if made is None or (left is None and self._left is not None) or self._on_host or self.owners is not None:
            return None
        bind, *others = [bucket.call.step_counts for bucket in self.buckets]
        return (ops.StepCounts if bind is None or others.count(bind) < len(others) else bind)(made, left)

    def _parts(self, entries: Tensor) -> Sequence[Tensor]:
        """Each bucket's of what has an entry for each entry of their calls."""
        return entries.split_with_sizes(self._entries) if len(self._entries) > 1 else [entries]


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


class Repeated:
    """A step of a `Group` in which nothing but addresses of gradients, numbers, flags and what it is clipped by differ
    from an earlier one: the buckets' calls are made again, and prepared only where they cannot be.

    Args: as `Step`'s.

    Attributes:
        flags: of each bucket that has any.
        marks: of each `Together` that `apply` is to count.
    """

    __slots__ = ("_before", "_grads", "_inputs", "_seed", "_seen", "_statistics", "_told", "flags", "marks")

    def __init__(
        self,
        inputs: Callable[..., ops.Inputs],
        grads: list[Tensor],
        before: ops.Snapshot,
        seen: ops.Snapshot,
        told: list[tuple[Bucket, Any, dict[str, Any]]],
        seed: int,
    ) -> None:
        self._inputs, self._grads, self._before, self._seen, self._told = inputs, grads, before, seen, told
        self._seed = seed
        self.flags: Mapping[Bucket, Tensor | None] = _NO_FLAGS
        self.marks: Sequence[tuple[Together, Marks]] = ()
        #: of each bucket's gradients, once `take_statistics` has found them
        self._statistics: list[ops.Statistics] | None = None

    def take_statistics(self) -> list[ops.Statistics] | None:
        """Of all buckets, for `apply` to go on from; None where one's must be taken in another way."""
        if not all([bucket.call.repeats_statistics for bucket, *_ in self._told]):
            return None
        found = []
        for bucket, t, numbers in self._told:
            moved = bucket.moved(self._before, self._seen, self._grads)
            one = bucket.call.statistics_again(self._seen, self._seed, t, numbers, self.flags.get(bucket), moved)
            if one is None:
                return None
            found.append(one)
        self._statistics = found
        return found

    def apply(self, clip: ops.Clip | None = None) -> None:
        """Makes the step, on gradients multiplied by ``clip``, and counts what the host counts, and ``marks``."""
        before, seen, seed, found = self._before, self._seen, self._seed, None
        for i, (bucket, t, numbers) in enumerate(self._told):
            if self._statistics is not None:
                found = self._statistics[i]
            flags, moved = self.flags.get(bucket), None
            if seen is not before:
                moved = bucket.moved(before, seen, self._grads)
            if not bucket.call.again(seen, seed, t, numbers, flags, moved, clip, found):
                scaling = {"grad_scale": None, "found_inf": None}
                with torch.no_grad():  # which calls that are made again do without
                    inputs = self._inputs(bucket, self._grads, t, numbers, scaling, seed, seen, flags)
                    bucket.call.apply(inputs, found, clip)
            if not bucket.in_together:
                assert bucket.on_host is not None
                bucket.on_host.advance()
        for together, mine in self.marks:
            together.count(mine, None)

    @property
    def unscales(self) -> bool:
        return any(bucket.call.unscales for bucket, *_ in self._told)


_NO_FLAGS: dict[Bucket, Tensor | None] = {}


def flags_of(marks: Sequence[tuple[Together, Marks]]) -> dict[Bucket, Tensor | None]:
    """Of each bucket that is counted together with others its flags, where it can have any up."""
    return {b: flags for together, mine in marks for b, flags in zip(together.buckets, mine.of, strict=True)}


def norms_of(statistics: Sequence[ops.Statistics]) -> list[Tensor]:
    """The gradients' norms, those of all buckets in one tensor where they are of one kind."""
    together = ops.joined(statistics)
    return [one.norms for one in statistics] if together is None else [together]


class Step:
    """A validated step of a `Group`: ask for its norms, or not, then apply it, once.

    Args:
        inputs: (bucket, grads, t, numbers, scaling, seed, seen, flags) -> what the bucket's call is handed, checked.
        grads: of the group's parameters.
        before, seen: snapshots of the last step's gradients and of these, where nothing but addresses can have changed
            since an earlier step checked them: the same object if they have not.
        told: of each bucket the number of the step and its other numbers.
        marks: of each `Together` what the device says of this step.
        scaling: ``grad_scale`` and ``found_inf``, or None.
        options: which the numbers come from.
        captured: where what a CUDA graph reads is added.
        scratch: states that ops cannot take as they are kept.
        repeats: whether the buckets' calls may be made again as they last were, with other numbers.
    """

    def __init__(
        self,
        inputs: Callable[..., ops.Inputs],
        grads: list[Tensor],
        before: ops.Snapshot | None,
        seen: ops.Snapshot | None,
        told: list[tuple[Bucket, Any, dict[str, Any]]],
        marks: Sequence[tuple[Together, Marks]],
        scaling: Mapping[str, Tensor | None],
        options: Mapping[str, Any],
        captured: list[Any],
        scratch: Sequence[Scratch],
        repeats: bool,
    ) -> None:
        self._make, self._grads, self._seen, self._told = inputs, grads, seen, told
        self._marks, self._captured, self._scratch = marks, captured, scratch
        self._scaling, self._options, self._found_inf = scaling, options, scaling["found_inf"]
        #: of each bucket, where they can be up, and what forbids its step
        self._flags = flags_of(marks)
        self._forbidden = {bucket: mine.forbidden for together, mine in marks for bucket in together.buckets}
        #: for as long as nothing has been checked that may differ from an earlier step
        self._repeated: Repeated | None = None
        if repeats:
            self._repeated = Repeated(inputs, grads, before, seen, told, options.get("seed", 0))
            self._repeated.flags = self._flags
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
            self._repeated = None
        return self._checked

    def _inputs(self, bucket: Bucket, t: Any, numbers: Mapping[str, Any]) -> ops.Inputs:
        seed, flags, scaling = self._options.get("seed", 0), self._flags.get(bucket), self._scaling
        if bucket in self._forbidden:
            scaling = {**scaling, "found_inf": self._forbidden[bucket]}
        return self._make(bucket, self._grads, t, numbers, scaling, seed, self._seen, flags)

    def norms(self) -> list[Tensor]:
        """The gradients' norms, those of slices where there are batch dimensions. `apply` goes on from the statistics
        that give them."""
        found = None if self._repeated is None else self._repeated.take_statistics()
        if found is None:
            found = [bucket.call.statistics(inputs) for bucket, inputs in self.check()]
        self._statistics = [*found]
        norms = norms_of(found)
        self._joined = len(norms) < len(found)  # those of all buckets are one tensor
        return norms

    def refuse(self, refused: Tensor) -> None:
        """Before `apply`, of a group that ``skips_steps``: where this 0-d float32 tensor, which is not read, is not
        zero, nothing is written, and the step is counted as skipped unless ``found_inf`` forbids it as well."""
        self._refused = refused
        for _, marks in self._marks:
            assert marks.forbidden is not None
            torch.maximum(marks.forbidden, refused.to(marks.forbidden.device), out=marks.forbidden)

    def owners(self) -> list[list[int]]:
        """Of each entry of the `norms` that have been found, whose it is: the position in the group's lists."""
        indices = [(bucket.index or range(len(bucket.counts)), bucket.counts) for bucket, *_ in self._told]
        found = [[i for i, n in zip(index, counts, strict=True) for _ in range(n)] for index, counts in indices]
        return [[i for mine in found for i in mine]] if self._joined else found

    @property
    def unscales(self) -> bool:
        """Whether gradients are multiplied as they are read, and stay as they are."""
        if self._repeated is not None:
            return self._repeated.unscales
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

    def check_capture(self, clip: Tensor | ops.Clip | None = None) -> None:
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
            captured += [*bucket.call.tensors(), *bucket.steps, *(bucket.skipped or ())]
            captured += [inputs.nonfinite, inputs.numbers.get("watched"), inputs.scaling.get("found_inf")]
        # Of those that are counted together no more than their memory: their buckets hold this list.
        captured += [together.owners for together, _ in self._marks]
        captured += [mine.memory.own for _, mine in self._marks if mine.memory is not None]
        captured += [clip, self._refused, *self._scaling.values(), *self._options.values()]
        captured += [tensor for scratch in self._scratch for tensor in scratch.tensors()]

    def apply(self, clip: Tensor | ops.Clip | None = None) -> None:
        """Makes the step, on gradients multiplied by ``clip``, and counts it."""
        factor = None if clip is None else ops.as_clip(clip)
        if self._repeated is not None:
            self._repeated.apply(factor)
        else:
            for scratch in self._scratch:
                scratch.fill()
            for (bucket, inputs), found in zip(self.check(), self._statistics, strict=True):
                bucket.call.apply(inputs, found, factor)
                self._count(bucket)
            for scratch in self._scratch:
                scratch.empty()
        for together, marks in self._marks:
            refused = None if self._refused is None else marks.forbidden
            if refused is not None and self._found_inf is not None:
                refused = refused - self._found_inf.view(()).to(refused.device)
            together.count(marks, refused)

    def _count(self, bucket: Bucket) -> None:
        if not bucket.in_together:
            bucket.count(self._found_inf)
