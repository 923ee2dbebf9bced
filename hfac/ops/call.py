"""An op bound to tensors: checked once, then called with the gradients and numbers of every step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, clipping, memory, spec, staging
from ..backends.contract import Moved
from ..backends.snapshots import Snapshot
from ..clipping import Clip, as_clip
from ..rounding import BitOffset
from ..schedules import Scalar
from ..spec import MASTER_LOW, REQUIRED, WATCHED
from .checks import FLOATING, Tensors, check_grads, check_length, check_operands, choose

_LAYOUT, _DTYPE, _DEVICE, _SHAPE = (attrgetter(name) for name in ("layout", "dtype", "device", "shape"))
_IS_CPU = attrgetter("is_cpu")


class Inputs(NamedTuple):
    """What one step brings, checked. Other threads may step the same parameters, so it is kept apart from them.

    Attributes:
        call: the backend's, which may be the reference's where these gradients have no memory that kernels can read;
            None where there are no parameters.
        grads: one for each parameter.
        numbers: of the op by name; ``seed`` and ``step`` where bits are drawn, ``watched`` where that is given.
        scaling: of ``grad_scale`` and ``found_inf`` what is given.
        double: whether a gradient is float64.
        negated: whether gradients may be views that negate, which must be copied before memory is read.
        seen: as `OpCall.prepare` takes it; None of gradients that kernels cannot read as they lie.
        unscales: whether gradients are multiplied as they are read, and stay as they are.
    """

    call: Callable[..., None] | None
    grads: list[Tensor]
    nonfinite: Tensor | None
    numbers: Mapping[str, Any]
    scaling: Mapping[str, Tensor]
    double: bool = False
    negated: bool = False
    seen: Snapshot | None = None
    unscales: bool = False

    def readable(self, grads: list[Tensor]) -> list[Tensor]:
        return memory.materialized(grads) if self.negated else grads

    def seen_as(self, grads: list[Tensor]) -> dict[str, Snapshot]:
        """What a call is told of gradients that it is handed, beside them."""
        if self.seen is None or grads is not self.grads or not getattr(self.call, "compares", False):
            return {}
        return {"seen": self.seen}


@dataclass(frozen=True)
class Statistics:
    """What a first read of the gradients gives, for the step to go on from.

    Attributes:
        found: norms of the gradients once they are unscaled, [parameters], where there are no ``sums``.
        grads: the gradients; with ``sums`` of a backend that does not unscale, divided by the scale.
        sums: the backend's, where it takes them in this read.
        dtype: of the norms: float32, or float64 for float64 gradients.
    """

    found: Tensor | None
    grads: list[Tensor]
    sums: backends.Statistics | None = None
    dtype: torch.dtype = torch.float32

    @property
    def norms(self) -> Tensor:
        """Of the gradients once they are unscaled: [parameters]."""
        if self.found is not None:
            return self.found
        assert self.sums is not None
        return clipping.roots(self.sums.squares, self.dtype)


def joined(statistics: Sequence[Statistics]) -> Tensor | None:
    """The norms of several calls' gradients, one behind the other, in as few operations as those of one take; None
    where they are not all known by their squares, of one type and device."""
    squares = [one.sums.squares for one in statistics if one.found is None and one.sums is not None]
    kinds = {(one.dtype, mine.device) for one, mine in zip(statistics, squares, strict=False)}
    if len(squares) != len(statistics) or len(kinds) != 1:
        return None
    return clipping.roots(torch.cat(squares) if len(squares) > 1 else squares[0], statistics[0].dtype)


class OpCall:
    """An op with the parameters and lists that it updates, found right once; `prepare` checks what a step brings,
    `statistics` reads the gradients for their norms, and `apply` makes the step, with statistics or without.

    To look at every tensor of many small ones anew in every step would cost more than the step: whoever keeps an op
    from step to step knows whether its tensors lie where they lay (`hfac.functional.Group`).

    Args:
        op: name of the op (`hfac.spec.OPS`).
        params: the parameters; gradients, of an op that updates none.
        lists: the op's lists by name, without those that it goes without, and ``master_lows`` where there are any.
        counts: the op's ``counts`` by name.
        places: where random bits come from. A step then brings ``seed`` and ``step``.
        backend: "auto", or one by name (`hfac.backends`).
        captured: a list to which the op adds its own memory that a CUDA graph reads in every replay, when a step is
            captured; it must live as long as the graph. None: it lives as long as this op.

    Raises:
        ValueError, RuntimeError: as every op, see `hfac.ops`.
    """

    def __init__(
        self,
        op: str,
        params: Tensors,
        lists: Mapping[str, Tensors],
        *,
        counts: Mapping[str, Sequence[Any]] | None = None,
        places: Sequence[BitOffset] | None = None,
        backend: str = "auto",
        captured: list[Any] | None = None,
    ) -> None:
        self.op = spec.OPS[op]
        self._params, self._backend, self.stochastic = list(params), backend, places is not None
        self._may_lack_first = self.op.without_first
        self._first = not self._may_lack_first or any(o.moment == 1 and o.name in lists for o in self.op.operands)
        self._lists = self._needed(lists)
        self._call: Callable[..., None] | None = None
        self._again: Callable[..., bool] | None = None
        self._statistics_again: Callable[..., backends.Statistics | None] | None = None
        #: (made, skipped) -> what counts steps on the device (`hfac.backends.step_counts`); None: plain torch does it
        self.step_counts: Callable[[Tensor, Tensor | None], Any] | None = None
        self._double = False  # of gradients that have been checked
        if not self._params:
            return
        self.device = self._params[0].device
        self._on_cpu = self.device.type == "cpu"
        self._operands = backends.Operands(self.op, self._params, self._lists, counts or {}, places and list(places))
        check_operands(self._operands)
        reason = self._why_no_kernel()
        kernels = choose(backend, self.device, reason, self.op)
        self._reads_memory = getattr(kernels, "READS_MEMORY", True)
        self._call = kernels.bind(self._operands)
        self.step_counts = getattr(kernels, "step_counts", None)
        self._again = getattr(self._call, "again", None)
        self._statistics_again = getattr(self._call, "statistics_again", None)
        if captured is not None and hasattr(self._call, "captured"):
            self._call.captured = captured
        self._shapes = list(map(_SHAPE, self._params))

    def _why_no_kernel(self) -> str | None:
        """Why memory cannot be read and written as it lies, as a clause; None where it can."""
        if not self.op.shard:
            return memory.reason({"params": self._params, **self._lists})
        # Bound anew in every step; what shards' sums are added to is the caller's own.
        if memory.plain(self._params) and not memory.bypassed():
            return None
        return memory.reason({"params" if self.op.updates else "grads": self._params}, negated=not self.op.updates)

    def _needed(self, lists: Mapping[str, Tensors | None]) -> dict[str, list[Tensor]]:
        """The op's lists in its order, without those that it goes without."""
        given = {name: list(entries) for name, entries in lists.items() if entries is not None}
        optional = not any(o.optional and o.name in given for o in self.op.operands)
        for o in self.op.operands:
            if o.name not in given and (self._first or o.moment != 1) and not (o.optional and optional):
                unless = " unless beta1 is None" if self._may_lack_first else ""
                raise ValueError(f"{o.name} is required by {self.op.name}{unless}")
        found = {o.name: given[o.name] for o in (*self.op.operands, MASTER_LOW) if o.name in given}
        for name, entries in found.items():
            check_length(name, entries, len(self._params))
        return found

    @property
    def unscales(self) -> bool:
        """Whether gradients that lie in memory are multiplied as they are read, and stay as they are."""
        return getattr(self._call, "unscales", False)

    def workspace_bytes(self) -> int:
        """Bytes on the device that the backend keeps from step to step."""
        return getattr(self._call, "workspace_bytes", lambda: 0)()

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, in whose replays what is launched now will run."""
        capturing = getattr(self._call, "capturing", None)
        if capturing is not None:
            return capturing()
        return self._call is not None and staging.capturing(self.device)

    def tensors(self) -> list[Tensor]:
        """The states that a step reads and writes."""
        return [tensor for tensors in self._lists.values() for tensor in tensors]

    def prepare(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int = 0,
        step: Scalar = 0.0,
        watched: Tensor | None = None,
        seen: Snapshot | None = None,
        **numbers: Any,
    ) -> Inputs:
        """Checks what a step brings. ``seen``: of gradients of which nothing but addresses can have changed since an
        earlier step found them right, and that kernels can read as they lie: a snapshot, the same object for as long as
        they lie where they lay. None of others, which are checked.

        ``seed`` and ``step`` are read where the op has places. ``grad_scale`` and ``found_inf`` are what
        `torch.amp.GradScaler` hands to an optimizer that unscales gradients itself: float32 tensors of one element.
        Gradients are divided by the one, and nothing is written where the other is not zero.
        """
        for number in self.op.numbers:
            if number.name not in numbers:
                if number.default is REQUIRED:
                    raise TypeError(f"{self.op.name} requires {number.name}")
                numbers[number.name] = number.default
        if self._may_lack_first and (numbers["beta1"] is not None) != self._first:
            raise ValueError("states of the first moment are required by SMMF exactly where beta1 is not None")
        given = {"grad_scale": grad_scale, "found_inf": found_inf}
        scaling = {name: tensor for name, tensor in given.items() if tensor is not None}
        grads, call, negated = list(grads), self._call, False
        if call is None:
            check_length("grads", grads, 0)
            return Inputs(None, grads, nonfinite, numbers, scaling)
        if seen is None:
            self._check_grads(grads)
            self._double = torch.float64 in map(_DTYPE, grads)
        self._check_given(len(grads), nonfinite, watched, scaling)
        if self.stochastic:
            numbers.update(seed=seed, step=step)
        if watched is not None:
            numbers["watched"] = watched
        unscales = getattr(call, "unscales", False)
        # The C++ kernels' backend sees by a null address which gradients are zeros without memory.
        zeros = seen is None and (unscales or self.op.shard) and any(map(Tensor._is_zerotensor, grads))
        if self._reads_memory and seen is None and (zeros or not memory.plain(grads) or memory.bypassed()):
            grads = memory.without_zerotensors(grads)
            reason = memory.reason({"grads": grads}, negated=True)
            if reason is not None:
                call = choose(self._backend, self.device, reason, self.op).bind(self._operands)
            elif unscales or self.op.shard:
                grads = memory.materialized(grads)
            else:
                negated = True  # they may have to be multiplied in place first
        unscales = getattr(call, "unscales", False)
        return Inputs(call, grads, nonfinite, numbers, scaling, self._double, negated, seen, unscales)

    def statistics(self, inputs: Inputs) -> Statistics:
        """The gradients' norms. Kernels on a GPU add up squares of the whole list at once; of H-Fac's matrices they and
        those of the CPU do it in the step's first read of the gradients, from which the step then goes on."""
        call = inputs.call
        if call is None:
            return Statistics(torch.zeros(0, dtype=torch.float32, device="cpu"), inputs.grads)
        take = getattr(call, "statistics", None)
        grads = None if take is None else _unscaled(inputs)
        if take is None or grads is None:
            norms, scale = torch.stack(clipping.norms(inputs.grads)), inputs.scaling.get("grad_scale")
            return Statistics(norms if scale is None else norms / scale, inputs.grads)
        scaling = inputs.scaling if inputs.unscales else {}
        seen = inputs.seen_as(grads)
        sums = take(inputs.readable(grads), inputs.nonfinite, **seen, **scaling, **inputs.numbers)
        return Statistics(None, grads, sums, torch.float64 if inputs.double else torch.float32)

    @property
    def repeats_statistics(self) -> bool:
        """Whether `statistics_again` may give any."""
        return self._statistics_again is not None

    def statistics_again(
        self,
        seen: Snapshot,
        seed: int,
        step: Scalar,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None = None,
        moved: Moved | None = None,
    ) -> Statistics | None:
        """What `statistics` would give of the inputs that `prepare` would make, for `again`, on the same terms as that.
        None, with nothing done, where it returns False."""
        if self._statistics_again is None:
            return None
        if self.stochastic:
            numbers = {**numbers, "seed": seed, "step": step}
        sums = self._statistics_again(seen, numbers, nonfinite, moved)
        # Nothing reads the gradients once more but the call, which knows where they are.
        return None if sums is None else Statistics(None, [], sums, torch.float64 if self._double else torch.float32)

    def check_capture(self, inputs: Inputs, statistics: Statistics | None = None) -> None:
        """Of a step in a CUDA graph that is being captured: that it can be part of it.

        Raises:
            RuntimeError: it needs memory on the host, which cannot be allocated then; nothing has been written.
        """
        check = getattr(inputs.call, "check_capture", None)
        if check is not None and (statistics is None or statistics.sums is None):  # else that has been checked
            check(inputs.grads, inputs.nonfinite, inputs.numbers.get("clip_threshold"))

    def check_capture_of_shards(self, grads: Tensors) -> None:
        """`check_capture` of an op on shards, before the step has its numbers."""
        check = getattr(self._call, "check_capture", None)
        if check is not None:
            check(grads, None, None)

    def apply(self, inputs: Inputs, statistics: Statistics | None = None, clip: Tensor | Clip | None = None) -> None:
        """Makes the step, once. ``statistics`` are those of the same inputs; ``clip`` is what the gradients are
        multiplied by, a 0-d float32 or float64 tensor, or a `Clip` of it for several calls.

        Backends that unscale multiply and divide gradients as they read them, and write none. For others gradients are
        multiplied in place, as `torch.nn.utils.clip_grad_norm_` and the scaler would do it, and what decides is read on
        the host.
        """
        call = inputs.call
        if call is None:
            return
        more: dict[str, Any] = {}
        clip = None if clip is None else as_clip(clip)
        sums = None if statistics is None or clip is None else statistics.sums
        if inputs.unscales:
            scaling = dict(inputs.scaling)
            if clip is not None:
                coefficient, single, divisor = clip.on(self.device)
                scale = scaling.get("grad_scale")
                divisor = divisor if scale is None else (scale.reshape(()) / coefficient).to(torch.float32)
                scaling["grad_scale"] = divisor
                if sums is not None:
                    more = {"clip": single, "statistics": sums}
            more |= scaling
            call(inputs.grads, inputs.nonfinite, **inputs.seen_as(inputs.grads), **more, **inputs.numbers)
            return
        taken = statistics is not None and statistics.sums is not None
        forbidden = taken and _is_forbidden(inputs)  # statistics may be older than what forbids
        grads = statistics.grads if taken and statistics is not None else _unscaled(inputs)
        if forbidden or grads is None:
            if inputs.nonfinite is not None:
                inputs.nonfinite.zero_()
            return
        if clip is not None:
            coefficient, *_ = clip.on(self.device)
            grads = clipping.scaled(grads, coefficient)
            if sums is not None and coefficient.item() == 1:
                more = {"statistics": sums}
        call(inputs.readable(grads), inputs.nonfinite, **inputs.seen_as(grads), **more, **inputs.numbers)

    def again(
        self,
        seen: Snapshot,
        seed: int,
        step: Scalar,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None = None,
        moved: Moved | None = None,
        clip: Clip | None = None,
        statistics: Statistics | None = None,
    ) -> bool:
        """Makes the step that `prepare` and `apply` would make of the gradients of ``seen``, where the last one was of
        them, too, or of those that they have ``moved`` from, and all that either was told beside are numbers,
        ``nonfinite`` as `prepare` checks it, ``clip``, and with that ``statistics``. False, with nothing done, where it
        was another, or gradients had to be written to clip them."""
        if self._again is None:
            return False
        if self.stochastic:
            numbers = {**numbers, "seed": seed, "step": step}
        if clip is None:
            return self._again(seen, numbers, nonfinite, moved)
        coefficient, single, divisor = clip.on(self.device)
        if statistics is not None and statistics.sums is not None:
            return self._again(seen, numbers, nonfinite, moved, divisor, statistics.sums, single)
        if self.unscales:
            return self._again(seen, numbers, nonfinite, moved, divisor)
        one = coefficient.is_cpu and type(coefficient) is Tensor and staging.on_host(coefficient) == [1.0]
        return one and self._again(seen, numbers, nonfinite, moved)

    def _check_given(
        self, count: int, nonfinite: Tensor | None, watched: Tensor | None, scaling: Mapping[str, Tensor]
    ) -> None:
        if watched is not None and (
            watched.shape != (count, WATCHED)
            or watched.dtype != torch.float64
            or watched.device != self.device
            or not watched.is_contiguous()
        ):
            raise ValueError(
                f"watched must be a contiguous float64 tensor of shape ({count}, {WATCHED}) on {self.device}, got "
                f"{watched.dtype} {tuple(watched.shape)} on {watched.device}"
            )
        if nonfinite is not None and (
            nonfinite.shape != (count,) or nonfinite.dtype != torch.int32 or nonfinite.device != self.device
        ):
            raise ValueError(
                f"nonfinite must be an int32 tensor of shape ({count},) on {self.device}, got {nonfinite.dtype} "
                f"{tuple(nonfinite.shape)} on {nonfinite.device}"
            )
        for name, tensor in scaling.items():
            if tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device != self.device:
                raise ValueError(
                    f"{name} must be one float32 on {self.device}, as torch.amp.GradScaler passes it, got "
                    f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"
                )

    def _check_grads(self, grads: Tensors) -> None:
        if (
            list(map(_SHAPE, grads)) != self._shapes
            or list(map(_LAYOUT, grads)).count(torch.strided) != len(grads)
            or not FLOATING.issuperset(map(_DTYPE, grads))
            or not (all(map(_IS_CPU, grads)) if self._on_cpu else {self.device}.issuperset(map(_DEVICE, grads)))
        ):
            check_grads(self._params, grads)


def run(
    op: str,
    params: Tensors | None,
    grads: Tensors,
    nonfinite: Tensor | None = None,
    clip: Tensor | None = None,
    **arguments: Any,
) -> None:
    """Makes one call of an op on tensors that are not the same in every step.

    Args:
        params: None for an op that updates none.
        clip: as `OpCall.apply` takes it.
        arguments: the op's lists, counts, vectors and numbers by name (`hfac.spec.OPS`), how parameters are stored
            (``master_lows``, ``places``, ``seed``, ``step``), and ``backend``.
    """
    described = spec.OPS[op]
    bound: dict[str, Any] = {name: arguments.pop(name) for name in ("places", "backend") if name in arguments}
    lists = {o.name: arguments.pop(o.name) for o in (*described.operands, MASTER_LOW) if o.name in arguments}
    first = {o.name for o in described.operands if o.moment == 1} if arguments.get("beta1") is not None else ()
    lists = {name: tensors for name, tensors in lists.items() if tensors is not None or name in first}
    if params is None:
        params = grads = memory.without_zerotensors(grads)
    counts = {name: arguments.pop(name) for name in described.counts}
    for name, entries in (counts | {name: arguments.get(name) for name in described.vectors}).items():
        check_length(name, entries, len(params))
    call = OpCall(op, params, lists, counts=counts, **bound)
    call.apply(call.prepare(grads, nonfinite, **arguments), clip=clip)


def _unscaled(inputs: Inputs) -> list[Tensor] | None:
    """The gradients divided by the scale, in place, unless the backend does that as it reads them; None where found_inf
    forbids the step."""
    scale = inputs.scaling.get("grad_scale")
    if inputs.unscales:
        return inputs.grads
    if _is_forbidden(inputs):
        return None
    if scale is None:
        return inputs.grads
    grads = memory.writable(inputs.grads)
    if any(map(Tensor.is_neg, grads)):  # torch takes no lists of tensors that negate
        for grad in grads:
            grad.div_(scale)
    else:
        torch._foreach_div_(grads, scale)
    return grads


def _is_forbidden(inputs: Inputs) -> bool:
    """Whether found_inf forbids the step; the host reads it."""
    found_inf = inputs.scaling.get("found_inf")
    return found_inf is not None and bool(found_inf.item())
