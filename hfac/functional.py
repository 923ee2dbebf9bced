"""Functional forms of both optimizers over lists of tensors, as `torch.optim` has them (``torch.optim.adamw.adamw``).

They advance the steps, evaluate the step's scalars, and hand tensors that can share a call to `hfac.ops` together.
The classes `hfac.HFac` and `hfac.SMMF` keep a `Group` of the tensors of each parameter group from step to step.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import memory, ops, schedules, spec
from .rounding import BitOffset
from .schedules import Scalar
from .scratch import Scratch
from .slicing import cut, slices
from .spec import MASTER_LOW
from .types import Backend, WeightDecayMode

States = Sequence[Tensor | None]


def hfac(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: States,
    exp_avg_cols: States,
    exp_avg_sq_rows: States,
    exp_avg_sq_cols: States,
    exp_avgs: States,
    exp_avg_sqs: States,
    state_steps: Sequence[Tensor],
    skipped: Sequence[Tensor] | None = None,
    master_lows: States | None = None,
    exp_avg_qs: States | None = None,
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    places: Sequence[BitOffset | None] | None = None,
    seed: int = 0,
    capturable: bool = False,
    backend: Backend = "auto",
    batch_dims: int = 0,
) -> None:
    """One step of H-Fac (AISTATS 2025, Algorithm 1); see `hfac.HFac` for the options.

    Args:
        params, grads: tensors of the same shapes; types as `hfac.HFac` takes them.
        exp_avg_rows, exp_avg_sq_rows: per parameter, state of shape p.shape[:k] (`hfac.matricize.cut`), or None
            where the moments are whole.
        exp_avg_cols, exp_avg_sq_cols: likewise of shape p.shape[k:].
        exp_avgs, exp_avg_sqs: per parameter, whole moments of shape p.shape, or None where they are factored.
        state_steps: 0-d float32 tensors, the number of steps made so far; advanced by one.
        skipped: 0-d int32 tensors. Where given, a parameter whose gradient is not finite keeps its value and its state,
            its step included, and its entry here is advanced instead.
        master_lows: int16 or int8 of p.shape: what a bfloat16 parameter lacks of its master weight, or None
            (`hfac.rounding`).
        places: of parameters that are rounded stochastically, where their random bits come from
            (`hfac.rounding.BitOffset`) together with ``seed``; None for those that are rounded to nearest.
        exp_avg_qs: per parameter, int8 of p.shape, the whole first moment of first_moment="int8" (then exp_avg_rows and
            exp_avg_cols are None), or None; None alone where no parameter has one.
        capturable: read the steps on their device (needed in a CUDA graph). The kernels of "cuda" and "triton" cannot
            be captured in this form, whose tables are made anew in every call: capture a step of `hfac.HFac`, or of a
            `Group` that has made one before and lives as long as the graph.
        batch_dims: so many leading dimensions of every parameter and every state, but not of steps and ``skipped``,
            count slices; the shapes above are then those of one slice, which is stepped as a parameter of its own. With
            ``skipped`` a slice keeps its values where its own gradient is not finite; a parameter's entry there is
            advanced where any slice did, and its step unless every slice did.

    Raises:
        ValueError, RuntimeError: as `hfac.ops`; nothing has been written then.
    """
    _step("hfac", **locals())


def smmf(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: States,
    exp_avg_cols: States,
    exp_avg_signs: States,
    exp_avg_sq_rows: States,
    exp_avg_sq_cols: States,
    exp_avgs: States,
    exp_avg_sqs: States,
    state_steps: Sequence[Tensor],
    skipped: Sequence[Tensor] | None = None,
    master_lows: States | None = None,
    *,
    lr: Scalar,
    beta: float | None,
    eps: float,
    weight_decay: Scalar,
    decay_rate: float,
    growth_rate: float,
    weight_decay_mode: WeightDecayMode = "adamw",
    maximize: bool = False,
    places: Sequence[BitOffset | None] | None = None,
    seed: int = 0,
    capturable: bool = False,
    backend: Backend = "auto",
    batch_dims: int = 0,
) -> None:
    """One step of SMMF (AAAI 2025, Algorithm 1); see `hfac.SMMF` for the options.

    Args:
        params, grads: tensors of the same shapes; types as `hfac.SMMF` takes them.
        exp_avg_rows, exp_avg_sq_rows: per parameter, [n] of its square matrix (`hfac.matricize.square`), or None
            where the moments are whole.
        exp_avg_cols, exp_avg_sq_cols: likewise [m].
        exp_avg_signs: likewise, uint8 of `hfac.matricize.sign_shape`; or bool of p.shape, True where the sign is
            positive, of which bits are made for the step, in an eighth of their memory.
        exp_avgs, exp_avg_sqs: per parameter, whole moments of shape p.shape, or None where they are factored.
        state_steps, skipped, master_lows, places, seed, capturable, batch_dims: as for `hfac`.

    With beta None there is no first moment: the entries of exp_avg_rows, exp_avg_cols, exp_avg_signs and exp_avgs
    are not read.

    Raises:
        ValueError, RuntimeError: as `hfac.ops`; nothing has been written then.
    """
    _step("smmf", **locals())


def _step(algorithm: str, grads: Sequence[Tensor], **arguments: Any) -> None:
    described = spec.ALGORITHMS[algorithm]
    states = {state.name: arguments.pop(state.name) for state in (*described.states, MASTER_LOW)}
    names = ("params", "state_steps", "skipped", "capturable", "backend", "places", "batch_dims")
    bound = {name: arguments.pop(name) for name in names}
    first = described.has_first(arguments)
    step = Group(algorithm, grads=grads, states=states, has_first=first, **bound).prepare(grads, **arguments)
    assert step is not None  # just bound
    step.check_capture()
    step.apply()


@dataclass
class _Bucket:
    """Parameters that share one call: they agree in layout of state, device, types and step. The call is on their
    slices, where they have batch dimensions."""

    call: ops.OpCall
    index: list[int] | None  # places in the group's lists; None where it is all of them
    grad_dtype: torch.dtype
    steps: list[Tensor]
    skipped: list[Tensor] | None
    on_host: ops.Counters | None  # the steps are read, and agree; else each parameter has its own decays, on the device
    batch_dims: int
    owners: "_Owners | None"  # with batch dimensions, where the device must know whose slice is whose
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

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the call takes of a list that has one entry for each parameter of the group."""
        mine = tensors if self.index is None else pick(tensors, self.index)
        return list(slices(mine, self.batch_dims, self.views, self.views_dim))


class _Together:
    """Buckets whose steps, or the skipped ones, are counted on one device: their decays are computed together."""

    def __init__(self, buckets: Sequence[_Bucket], may_move: bool, capturing: bool) -> None:
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

    def holds(self) -> bool:
        return all(counters.holds() for counters in self._counters)

    def decays(
        self, algorithm: spec.Algorithm, options: Mapping[str, Any]
    ) -> Iterator[tuple[_Bucket, Any, dict[str, Any]]]:
        """Of the buckets whose steps the device alone knows, the number of their next step, and their decays."""
        if self._buckets[0].on_host is not None:
            return
        made = self._counters[0].values()
        t = made.to(schedules.step_dtype(made.device)) + 1
        found = {"step": t, **algorithm.decays(t, options)}
        for bucket, end in zip(self._buckets, self._ends, strict=True):
            start = end - len(bucket.steps)
            mine = {n: v[start:end] if isinstance(v, Tensor) and v.ndim else v for n, v in found.items()}
            if bucket.owners is not None:
                spread = bucket.owners.spread
                mine = {n: spread(v) if isinstance(v, Tensor) and v.ndim else v for n, v in mine.items()}
            yield bucket, mine.pop("step"), mine


def _are_down(flags: Tensor) -> bool:
    """Whether no flag is up, where the host can say so without waiting."""
    return flags.is_cpu and type(flags) is Tensor and not flags.any()


class _Owners:
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
    return [entries[i] for i in index]


class Group:
    """The parameters of one group with their states, bucketed and checked once; every step brings gradients and
    options.

    Args: as `hfac` and `smmf`; ``states`` are their lists of states by name, ``master_lows`` among them where there are
        any, and without ``has_first`` those of the first are not read. ``grads`` are read for their types only.
        ``watch``: whether a step tells of itself (`Step.watched`). ``skips_steps``: a step may be refused as a whole
        (`Step.refuse`), which ``skipped`` counts, instead of single gradients. ``views``: of each parameter, into how
        many pieces dimension batch_dims + ``views_dim`` is cut, which are stepped as slices. States with an entry per
        element are cut likewise; others have the pieces in a dimension of their own, after the batch dimensions.
        ``captured``: a list to which a step that a CUDA graph captures adds what the graph reads and writes in every
        replay, gradients and parameters apart: it must live as long as the graph. None: a list of the group's own,
        which must then live as long.
    """

    def __init__(
        self,
        algorithm: str,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, States | None],
        state_steps: Sequence[Tensor],
        skipped: Sequence[Tensor] | None,
        has_first: bool,
        capturable: bool,
        backend: str,
        places: Sequence[BitOffset | None] | None = None,
        batch_dims: int = 0,
        watch: bool = False,
        captured: list[Any] | None = None,
        skips_steps: bool = False,
        views: Sequence[int] | None = None,
        views_dim: int = 0,
    ) -> None:
        self._watch, self._skips_steps = watch, skips_steps
        self._captured: list[Any] = [] if captured is None else captured
        self._algorithm = spec.ALGORITHMS[algorithm]
        lists = {"grads": grads, **states, "state_steps": state_steps, "skipped": skipped, "places": places}
        for name, tensors in lists.items():
            if tensors is not None:
                ops.check_length(name, tensors, len(params))
        unread = () if has_first else {state.name for state in self._algorithm.states if state.moment == 1}
        read = {name: entries for name, entries in states.items() if entries is not None and name not in unread}
        for name, tensors in (("params", params), ("grads", grads), ("state_steps", state_steps)):
            for i, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
        for i, step in enumerate(state_steps):
            if step.ndim or step.dtype != torch.float32:
                raise TypeError(f"state_steps[{i}] must be a 0-d float32 tensor, got {step.dtype} {tuple(step.shape)}")
        if skipped is not None:
            for i, (param, step, flag) in enumerate(zip(params, state_steps, skipped, strict=True)):
                if not param.device == step.device == flag.device or flag.dtype != torch.int32:
                    raise RuntimeError(
                        f"state_steps[{i}] and skipped[{i}] (int32) must be on the device of params[{i}], "
                        f"{param.device}, where it shows what is skipped; got {step.device} and {flag.dtype} on "
                        f"{flag.device}"
                    )
        self._batch_dims = dims = batch_dims if views is None else batch_dims + 1
        if dims:
            if batch_dims:
                _check_batch(batch_dims, params, read)
            self._params = list(params)
            self._sliced = [*params, *(state for tensors in read.values() for state in tensors if state is not None)]
            self._known = ops.snapshot(self._sliced)
            # Slices are of what shares memory and version, and no more: a view would own its tensor, which torch then
            # refuses to swap (torch.utils.swap_tensors).
            params = [param.detach() for param in params]
            read = {name: [state if state is None else state.detach() for state in read[name]] for name in read}
        factors = {state.name for state in self._algorithm.states if state.size in (spec.ROWS, spec.COLS)}
        places = [None] * len(params) if places is None else list(places)
        if views is not None:
            d = batch_dims + views_dim
            places = [
                place if place is None else place.cut(param.shape, batch_dims, d, count)
                for place, param, count in zip(places, params, views, strict=True)
            ]
            params = cut(params, batch_dims, views, views_dim)
            for name in read.keys() - factors:
                found = zip(read[name], views, strict=True)
                read[name] = [
                    state if state is None else cut([state], batch_dims, [count], views_dim)[0]
                    for state, count in found
                ]
        kept = [
            Scratch(name, read[name], params, dims, strided=views is not None and views_dim > 0)
            for name in sorted(read.keys() - factors - {MASTER_LOW.name})
        ]
        read |= {each.name: each.taken for each in kept}
        self._scratch = [each for each in kept if each]
        # What shares memory is stepped one after the other, as torch does it, and not by kernels at once.
        sharing, twice = memory.sharing([(param, *(s[i] for s in read.values())) for i, param in enumerate(params)])
        if twice and backend not in ("auto", "reference"):
            raise RuntimeError(
                f"params[{min(twice)}] and its states share memory, which backend={backend!r} reads and writes at "
                "once. Give each memory of its own, or use backend='reference'."
            )
        indices: dict[tuple[Any, ...], list[int]] = {}
        for i, (param, grad, step) in enumerate(zip(params, grads, state_steps, strict=True)):
            on_host = step.is_cpu and not capturable and not memory.is_fake(step)
            op = self._algorithm.op_of([name for name, entries in read.items() if entries[i] is not None])
            low = read[MASTER_LOW.name][i] if MASTER_LOW.name in read else None
            stored = None if low is None else low.dtype, places[i] is not None
            like = param.device, param.dtype, grad.dtype
            alone = i if i in sharing else None, i in twice
            key = (op, *like, *stored, *alone, on_host, step.item() if on_host else None)
            indices.setdefault(key, []).append(i)
        self._buckets = []
        for (op, _, _, grad_dtype, low, stochastic, _, itself, on_host, _), index in indices.items():
            mine, steps = pick(params, index), pick(state_steps, index)
            names = [state.name for state in op.states if state.name in read]
            names += [MASTER_LOW.name] if low is not None else []
            offsets = zip(pick(places, index), mine, strict=True) if stochastic else ()
            call = ops.OpCall(
                op.name,
                slices(mine, dims),
                {name: slices(pick(read[name], index), dims) for name in names},
                places=[one for place, p in offsets for one in place.slices(p.shape, dims)] or None,
                backend="reference" if itself else backend,
                captured=self._captured,
            )
            told = dims and (skipped is not None or not on_host)
            counts = [param.shape[:dims].numel() for param in mine]
            self._buckets.append(
                _Bucket(
                    call,
                    None if len(index) == len(params) else index,
                    grad_dtype,
                    steps,
                    None if skipped is None else pick(skipped, index),
                    ops.Counters(steps) if on_host else None,
                    batch_dims,
                    _Owners(counts, steps[0].device) if told else None,
                    None if views is None else pick(views, index),
                    views_dim,
                    counts,
                )
            )
        # States of an optimizer may be moved, unless a graph reads them where they are, or would do the moving.
        capturing = any(bucket.call.capturing() for bucket in self._buckets)
        may_move = captured is not None and not captured and not capturing
        counted: dict[tuple[torch.device, bool], list[_Bucket]] = {}
        for bucket in self._buckets:
            if bucket.on_host is None or bucket.skipped is not None:
                counted.setdefault((bucket.steps[0].device, bucket.on_host is not None), []).append(bucket)
        self._together = [_Together(mine, may_move and not read, capturing) for (_, read), mine in counted.items()]

    def _holds(self, bucket: _Bucket) -> bool:
        """Parameters and states are where they were; of slices, the memory that they were taken of."""
        return ops.same(ops.snapshot(self._sliced), self._known) if self._batch_dims else bucket.call.holds()

    def workspace_bytes(self) -> int:
        """Bytes on the device that fused kernels keep between steps, and those of `Scratch`."""
        kept = sum(scratch.nbytes() for scratch in self._scratch)
        return kept + sum(bucket.call.workspace_bytes() for bucket in self._buckets)

    def prepare(
        self,
        grads: Sequence[Tensor],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> "Step | None":
        """Checks a step with these gradients; ``options`` are those of `hfac` or `smmf` that are no tensors' lists,
        ``grad_scale`` and ``found_inf`` as `ops.OpCall.prepare` takes them. None where the group must be bound anew:
        parameters or states do not lie where they lay, gradients have other types than they had, or the steps of one
        bucket have come apart."""
        scalars = {
            **self._algorithm.scalars(options),
            "maximize": options["maximize"],
            **{name: schedules.as_scalar(name, options[name]) for name in ("lr", "weight_decay")},
        }
        if self._batch_dims:
            ops.check_grads(self._params, grads)
        if not all(together.holds() for together in self._together):
            return None
        on_device = {
            id(bucket): (t, decays)
            for together in self._together
            for bucket, t, decays in together.decays(self._algorithm, options)
        }
        calls = []
        for bucket in self._buckets:
            mine = bucket.of(grads)
            known = bucket.call.knows(mine)
            if not self._holds(bucket) or not (known or all(grad.dtype == bucket.grad_dtype for grad in mine)):
                return None
            t: Any
            if bucket.on_host is None:
                t, decays = on_device[id(bucket)]
            else:
                made = bucket.on_host.common()
                if made is None:
                    return None
                t = made + 1
                decays = self._algorithm.decays(t, options)
            flags, watched = None, None
            forbidden = found_inf
            if self._skips_steps:  # the step's own, for `Step.refuse` to write
                forbidden = torch.zeros((), dtype=torch.float32, device=bucket.steps[0].device)
                forbidden = forbidden if found_inf is None else found_inf.reshape(()).clone()
            elif bucket.skipped is not None:
                flags = torch.zeros(len(mine), dtype=torch.int32, device=bucket.steps[0].device)
            if self._watch:
                watched = torch.zeros(len(mine), spec.WATCHED, dtype=torch.float64, device=mine[0].device)
            inputs = bucket.call.prepare(
                mine,
                flags,
                grad_scale=grad_scale,
                found_inf=forbidden,
                seed=options.get("seed", 0),
                step=t,
                watched=watched,
                known=known,
                **decays,
                **scalars,
            )
            calls.append((bucket, inputs))

        tensors = [value for value in (*options.values(), grad_scale) if isinstance(value, Tensor)]
        return Step(calls, found_inf, self._captured, tensors, self._scratch)


class Step:
    """A validated step of a `Group`: ask for its norms, or not, then apply it, once.

    ``captured``: what a graph reads is added there; ``tensors``: of what the step has been given; ``scratch``:
    states that ops cannot take as they are kept.
    """

    def __init__(
        self,
        calls: list[tuple[_Bucket, ops.Inputs]],
        found_inf: Tensor | None,
        captured: list[Any],
        tensors: list[Tensor],
        scratch: Sequence[Scratch] = (),
    ) -> None:
        self._calls, self._found_inf, self._scratch = calls, found_inf, scratch
        self._refused: Tensor | None = None
        self._captured, self._tensors = captured, tensors
        self._statistics: list[ops.Statistics | None] = [None] * len(calls)

    def norms(self) -> list[Tensor]:
        """The gradients' norms, those of slices where there are batch dimensions. `apply` goes on from the statistics
        that give them."""
        found = [bucket.call.statistics(inputs) for bucket, inputs in self._calls]
        self._statistics = [*found]
        return [statistics.norms for statistics in found]

    def refuse(self, refused: Tensor) -> None:
        """Before `apply`, of a group that ``skips_steps``: where this 0-d float32 tensor, which is not read, is not
        zero, nothing is written, and the step is counted as skipped unless ``found_inf`` forbids it as well."""
        self._refused = refused
        for _, inputs in self._calls:
            forbidden = inputs.scaling["found_inf"]
            torch.maximum(forbidden, refused.to(forbidden.device), out=forbidden)

    def owners(self) -> list[list[int]]:
        """Of each entry of the `norms`, whose it is: the position in the group's lists."""
        indices = [(bucket.index or range(len(bucket.counts)), bucket.counts) for bucket, _ in self._calls]
        return [[i for i, n in zip(index, counts, strict=True) for _ in range(n)] for index, counts in indices]

    @property
    def unscales(self) -> bool:
        """Whether gradients are multiplied as they are read, and stay as they are."""
        return any(inputs.unscales for _, inputs in self._calls)

    def watched(self) -> Iterator[tuple[list[int] | None, Tensor]]:
        """Of a step that has been made and was watched: places in the group's lists (None: all of them, in order), and
        rows as `hfac.reference` describes them, those of a parameter's slices one after the other; NaN where no step
        was made."""
        for bucket, inputs in self._calls:
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
        if not any(bucket.call.capturing() for bucket, _ in self._calls):
            return
        for (bucket, inputs), found in zip(self._calls, self._statistics, strict=True):
            bucket.call.check_capture(inputs, found)
            self._captured += [*bucket.call.tensors(), *bucket.steps, *(bucket.skipped or ()), bucket.owners]
            self._captured += [inputs.nonfinite, inputs.numbers.get("watched"), inputs.scaling.get("found_inf")]
        self._captured += [clip, self._refused, self._found_inf, *self._tensors]
        self._captured += [tensor for scratch in self._scratch for tensor in scratch.tensors()]

    def apply(self, clip: Tensor | None = None) -> None:
        """Makes the step, on gradients multiplied by ``clip``, and counts it."""
        for scratch in self._scratch:
            scratch.fill()
        for (bucket, inputs), found in zip(self._calls, self._statistics, strict=True):
            bucket.call.apply(inputs, found, clip)
            forbidden = inputs.scaling.get("found_inf")
            refused = None
            if forbidden is not None:
                forbidden = refused = forbidden.view(())
                if self._found_inf is not None:
                    refused = forbidden - self._found_inf.view(()).to(forbidden.device)
            bucket.count(inputs.nonfinite, forbidden, None if self._refused is None else refused)
        for scratch in self._scratch:
            scratch.empty()


def _check_batch(batch_dims: int, params: Sequence[Tensor], states: Mapping[str, States]) -> None:
    if batch_dims < 0:
        raise ValueError(f"batch_dims must be a whole number >= 0, got {batch_dims}")
    for i, param in enumerate(params):
        ops.check_tensor(f"params[{i}]", param)
        ops.check_writable(f"params[{i}]", param)  # of which a slice might see nothing
        if param.ndim <= batch_dims:
            raise ValueError(f"params[{i}] of shape {tuple(param.shape)} has nothing behind batch_dims={batch_dims}")
        for name, tensors in states.items():
            state = tensors[i]
            if state is None:
                continue
            if state.shape[:batch_dims] != param.shape[:batch_dims]:
                raise ValueError(
                    f"{name}[{i}] of shape {tuple(state.shape)} must begin with the batch dimensions "
                    f"{tuple(param.shape[:batch_dims])} of params[{i}] (batch_dims={batch_dims})"
                )
            if not state.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous, got strides {state.stride()}")
