"""Functional forms of both optimizers over lists of tensors, as `torch.optim` has them (``torch.optim.adamw.adamw``).

They advance the steps, evaluate the step's scalars, and hand tensors that can share a call to `hfac.ops` together.
The classes `hfac.HFac` and `hfac.SMMF` keep a `Group` of the tensors of each parameter group from step to step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import memory, ops, spec
from .buckets import Bucket, Marks, Repeated, Step, Together, flags_of, pick
from .buckets import norms_of as norms_of  # for optimizers
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


class Numbers:
    """A step's numbers, which parameters that are stepped one by one share: evaluated once for a number of the step,
    for as long as the options are the same object."""

    def __init__(self) -> None:
        self._known: tuple[Mapping[str, Any], float, dict[str, Any]] | None = None

    def of(self, algorithm: spec.Algorithm, options: Mapping[str, Any], t: float) -> dict[str, Any]:
        """All that an op has; the same object for as long as nothing changes."""
        known = self._known  # another thread may replace it
        if known is not None and known[0] is options and known[1] == t:
            return known[2]
        found = {**algorithm.decays(t, options), **algorithm.constants(options)}
        if not any(isinstance(value, Tensor) for value in options.values()):  # which may be written in place
            self._known = options, t, found
        return found


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
        # One parameter's after the other's, as they were made: thousands are read faster in the order of memory.
        kept_of = zip(params, *read.values(), state_steps, *(() if skipped is None else (skipped,)), strict=True)
        self._tensors = [tensor for mine in kept_of for tensor in mine if tensor is not None]
        if dims:
            if batch_dims:
                _check_batch(batch_dims, params, read)
            self._params = list(params)
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
            counts = [param.shape[:dims].numel() for param in mine]
            self._buckets.append(
                Bucket(
                    call,
                    None if len(index) == len(params) else index,
                    grad_dtype,
                    steps,
                    None if skipped is None else pick(skipped, index),
                    ops.Counters(steps) if on_host else None,
                    batch_dims,
                    None if views is None else pick(views, index),
                    views_dim,
                    counts,
                )
            )
        # States of an optimizer may be moved, unless a graph reads them where they are, or would do the moving.
        capturing = any(bucket.call.capturing() for bucket in self._buckets)
        may_move = captured is not None and not captured and not capturing
        counted: dict[tuple[torch.device, bool], list[Bucket]] = {}
        for bucket in self._buckets:
            if bucket.on_host is None or bucket.skipped is not None:
                counted.setdefault((bucket.steps[0].device, bucket.on_host is not None), []).append(bucket)
        has_rule = self._algorithm.decay_rule is not None
        self._together = [
            Together(mine, may_move and not read, capturing, has_rule) for (_, read), mine in counted.items()
        ]
        self._known = ops.snapshot(self._tensors)  # which the counters may have moved
        #: whether a step is told nothing but gradients, numbers and flags, unless it is clipped or scaled
        self.repeats = not (self._scratch or watch or skips_steps)
        #: of gradients that have been found right
        self._known_grads: ops.Snapshot | None = None

    def look(self, grads: list[Tensor]) -> tuple[ops.Snapshot | None, ops.Snapshot | None]:
        """Two snapshots, of the last step's gradients and of these, where such of the same types, devices, shapes and
        strides have been found right and kernels can read them as they lie: the same object for as long as they lie
        where they lay. For the second None of others, which must be checked."""
        before = known = self._known_grads
        found = ops.compare(grads, known)
        if found == ops.ALIKE:
            self._known_grads = known = ops.snapshot(grads)
        return before, None if found == ops.OTHER or memory.bypassed() else known

    def repeated(self, grads: list[Any], options: Mapping[str, Any], numbers: Numbers) -> Repeated | None:
        """What `prepare` would give where the step is told nothing but gradients like the last ones and ``numbers``,
        and they are not scaled. None where it is another, or a graph is being captured; entries may be None then."""
        if not self.repeats or ops.compare(self._tensors, self._known) != ops.SAME:
            return None
        before, seen = self.look(grads)
        if seen is None or (self._together and any([bucket.call.capturing() for bucket in self._buckets])):
            return None
        marks: Sequence[tuple[Together, Marks]] = ()
        if self._together:
            marks = [(together, together.marks(None, False, again=True)) for together in self._together]
        told = self._told(options, numbers, marks)
        if told is None:
            return None
        step = Repeated(self._inputs, grads, before, seen, told, options.get("seed", 0))
        if marks:
            step.marks, step.flags = marks, flags_of(marks)
        return step

    def _told(
        self, options: Mapping[str, Any], numbers: Numbers, marks: Sequence[tuple[Together, Marks]]
    ) -> list[tuple[Bucket, Any, dict[str, Any]]] | None:
        """Of each bucket the number of its next step, and what else the step is told; None where the steps of one have
        come apart."""
        told: list[tuple[Bucket, Any, dict[str, Any]]] = []
        for bucket in self._buckets:
            if bucket.on_host is not None:
                made = bucket.on_host.common(hold=True)
                if made is None:
                    return None
                told.append((bucket, made + 1, numbers.of(self._algorithm, options, made + 1)))
        if len(told) < len(self._buckets):
            for together, mine in marks:
                told += together.told(self._algorithm, options, mine)
        return told

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
    ) -> Step | None:
        """Checks a step with these gradients; ``options`` are those of `hfac` or `smmf` that are no tensors' lists,
        ``grad_scale`` and ``found_inf`` as `ops.OpCall.prepare` takes them. None where the group must be bound anew:
        parameters or states do not lie where they lay, gradients have other types than they had, or the steps of one
        bucket have come apart."""
        grads = list(grads)
        if ops.compare(self._tensors, self._known) != ops.SAME:
            return None
        before, seen = self.look(grads)
        if seen is None:
            self._known_grads = None
            if self._batch_dims:
                ops.check_grads(self._params, grads)
        if seen is None and not all(
            grad.dtype == bucket.grad_dtype for bucket in self._buckets for grad in bucket.among(grads)
        ):
            return None
        marks = [(together, together.marks(found_inf, self._skips_steps)) for together in self._together]
        told = self._told(options, Numbers(), marks)
        if told is None:
            return None
        given = {"grad_scale": grad_scale, "found_inf": found_inf}
        repeats = self.repeats and seen is not None and grad_scale is found_inf is None
        step = Step(
            self._inputs, grads, before, seen, told, marks, given, options, self._captured, self._scratch, repeats
        )
        if not repeats:
            step.check()
        if seen is None and memory.plain(grads) and not any(map(Tensor._is_zerotensor, grads)):
            self._known_grads = ops.snapshot(grads)
        return step

    def _inputs(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        t: Any,
        numbers: Mapping[str, Any],
        scaling: Mapping[str, Tensor | None],
        seed: int,
        seen: ops.Snapshot | None,
        flags: Tensor | None,
    ) -> ops.Inputs:
        """What a bucket's call is handed in the step ``t``, checked, with memory for what the step says of itself."""
        mine, watched = bucket.of(grads), None
        if self._watch:
            watched = torch.zeros(len(mine), spec.WATCHED, dtype=torch.float64, device=mine[0].device)
        return bucket.call.prepare(
            mine,
            flags,
            grad_scale=scaling["grad_scale"],
            found_inf=scaling["found_inf"],
            seed=seed,
            step=t,
            watched=watched,
            seen=seen,
            **numbers,
        )


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
