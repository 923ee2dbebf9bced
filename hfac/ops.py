"""One function per op: the only validation of tensors, and the choice of backend.

Every op takes lists with one entry per parameter, all on one device, and updates parameters and states in place.
What an op computes is defined, with shapes, by the function of the same name in `hfac.reference`. Arguments are
checked before anything is written; a `Bound` op checks a call now and makes it later, so that several calls can be
checked before the first one writes. Scalars (lr, decays, ...) have been checked where they were set
(`hfac.optim.options`).

Every op that writes parameters takes ``master_lows``, ``places``, ``seed`` and ``step``: how they are stored, where
that is more than one rounding to the nearest (`hfac.rounding`).

Errors of every op:
    ValueError: lists of different lengths; a shape, or the type of a state, that does not fit its parameter.
    RuntimeError: a sparse or complex tensor; tensors on different devices; a backend that cannot serve them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from operator import attrgetter, mul
from typing import Any

import torch
from torch import Tensor

from . import backends, clipping, rounding
from .matricize import Block, sign_shape
from .rounding import Place
from .schedules import Scalar

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATING = frozenset(PARAM_DTYPES)
Tensors = Sequence[Tensor]


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Type of the arithmetic and of the states: float64 for float64 parameters, else float32."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def hfac_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors,
    exp_avg_cols: Tensors,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """One step of H-Fac on parameters viewed as [m, n] matrices. Row states have m elements, column states n."""
    _call("hfac_step_", **locals())


def hfac_dense_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """One step of H-Fac with both moments whole: states have their parameter's shape."""
    _call("hfac_dense_step_", **locals())


def smmf_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors | None,
    exp_avg_cols: Tensors | None,
    exp_avg_signs: Tensors | None,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """One step of SMMF on parameters viewed as [n, m] matrices, n >= m. Row states are [n], column states [m], signs
    uint8 of `hfac.matricize.sign_shape`. beta1 None: no first moment, and its three lists are None."""
    _call("smmf_step_", **locals())


def smmf_dense_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors | None,
    exp_avg_sqs: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """One step of SMMF with both moments whole: states have their parameter's shape. beta1 None: exp_avgs is None."""
    _call("smmf_dense_step_", **locals())


def hfac_sums(
    grads: Tensors,
    old_rows: Tensors,
    row_sums: Tensors,
    new_rows: Tensors,
    col_sums: Tensors | None = None,
    col_squares: Tensors | None = None,
    col_ratios: Tensors | None = None,
    *,
    cols: Sequence[int],
    beta2: Scalar,
    eps: float,
    backend: str = "auto",
) -> None:
    """Fills the lists of sums with what one read of parts [m, n] of gradients gives; row lists are [m], column lists
    [n]."""
    rows = {"old_rows": old_rows, "row_sums": row_sums, "new_rows": new_rows}
    columns = {"col_sums": col_sums, "col_squares": col_squares, "col_ratios": col_ratios}
    if {value is None for value in columns.values()} == {False, True}:
        raise ValueError("col_sums, col_squares and col_ratios must be given together, or none of them")
    given = {name: tensors for name, tensors in columns.items() if tensors is not None}
    _check_parts(grads, {"cols": cols}, {**rows, **given}, [old.dtype for old in old_rows])
    for i, grad in enumerate(grads):
        if old_rows[i].dtype not in (torch.float32, torch.float64) or grad.dtype not in PARAM_DTYPES:
            raise ValueError(f"sums of {grad.dtype} in {old_rows[i].dtype} (old_rows[{i}]) are not to be had")
        for name, tensors in rows.items():
            if tensors[i].numel() != old_rows[i].numel():
                raise ValueError(
                    f"{name}[{i}] must have the {old_rows[i].numel()} elements of old_rows[{i}], got "
                    f"{tensors[i].numel()}"
                )
        for name, tensors in given.items():
            if tensors[i].numel() * old_rows[i].numel() != grad.numel():
                raise ValueError(
                    f"{name}[{i}] of {tensors[i].numel()} and old_rows[{i}] of {old_rows[i].numel()} elements do not "
                    f"make the {grad.numel()} of grads[{i}]"
                )
    _part_op("hfac_sums", grads, backend)(grads, **rows, **columns, cols=cols, beta2=beta2, eps=eps)


def hfac_apply_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors,
    exp_avg_cols: Tensors,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    row_sums: Tensors,
    new_rows: Tensors,
    col_sums: Tensors,
    new_cols: Tensors,
    totals: Tensor,
    mean_squares: Tensor,
    *,
    rows: Sequence[int],
    cols: Sequence[int],
    lr: Scalar,
    beta1: Scalar,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """The rest of a step of H-Fac on parts [m, n] of matrices of `rows` rows and `cols` columns, whose sums are known.
    Row lists are [m], column lists [n], totals and mean_squares [len(params)]."""
    by_row = dict(exp_avg_rows=exp_avg_rows, exp_avg_sq_rows=exp_avg_sq_rows, row_sums=row_sums, new_rows=new_rows)
    by_col = dict(exp_avg_cols=exp_avg_cols, exp_avg_sq_cols=exp_avg_sq_cols, col_sums=col_sums, new_cols=new_cols)
    lists = {"rows": rows, "cols": cols, "grads": grads, "totals": totals, "mean_squares": mean_squares}
    _check_parts(params, lists, {**by_row, **by_col}, [state_dtype(param.dtype) for param in params])
    _check_part_grads(params, grads)
    for i, param in enumerate(params):
        sizes = {tensors[i].numel() for tensors in by_row.values()}, {tensors[i].numel() for tensors in by_col.values()}
        if max(map(len, sizes)) > 1 or sizes[0].pop() * sizes[1].pop() != param.numel():
            raise ValueError(
                f"rows and columns of the lists' entries {i} do not agree with each other and with the "
                f"{param.numel()} elements of params[{i}]"
            )
    _part_op("hfac_apply_", params, backend)(
        params,
        grads,
        **by_row,
        **by_col,
        totals=totals,
        mean_squares=mean_squares,
        rows=rows,
        cols=cols,
        lr=lr,
        beta1=beta1,
        clip_threshold=clip_threshold,
        weight_decay=weight_decay,
        maximize=maximize,
        **_stored(params, master_lows, places, seed, step, backend),
    )


def smmf_sums_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors | None,
    exp_avg_cols: Tensors | None,
    exp_avg_signs: Tensors | None,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    new_rows: Tensors | None,
    new_cols: Tensors | None,
    new_sq_rows: Tensors,
    new_sq_cols: Tensors,
    *,
    blocks: Sequence[Sequence[Block]],
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """One step of SMMF on parts of parameters that lie in the whole's square matrix [n, m] as `blocks` say. The whole's
    factors, [n] and [m], are read; sums over the part are added to the new ones. beta1 None: no first moment, and its
    five lists are None."""
    second = dict(
        exp_avg_sq_rows=exp_avg_sq_rows,
        exp_avg_sq_cols=exp_avg_sq_cols,
        new_sq_rows=new_sq_rows,
        new_sq_cols=new_sq_cols,
    )
    first = {
        "exp_avg_rows": exp_avg_rows,
        "exp_avg_cols": exp_avg_cols,
        "exp_avg_signs": exp_avg_signs,
        "new_rows": new_rows,
        "new_cols": new_cols,
    }
    if {tensors is None for tensors in first.values()} != {beta1 is None}:
        raise ValueError("lists of the first moment are required exactly where beta1 is not None")
    given = {name: tensors for name, tensors in first.items() if tensors is not None}
    states = {**second, **given}
    signs = states.pop("exp_avg_signs", None)
    _check_parts(params, {"grads": grads, "blocks": blocks}, states, [state_dtype(param.dtype) for param in params])
    _check_part_grads(params, grads)
    if signs is not None:
        _check_parts(params, {}, {"exp_avg_signs": signs}, [torch.uint8] * len(params))
        held = [i for i, param in enumerate(params) if param.numel()]
        _check_signs([params[i] for i in held], [signs[i] for i in held])
    for i, param in enumerate(params):
        n, m = exp_avg_sq_rows[i].numel(), exp_avg_sq_cols[i].numel()
        if any(tensors[i].numel() != (n if "rows" in name else m) for name, tensors in states.items()):
            raise ValueError(f"moments of params[{i}] must have {n} rows and {m} columns throughout")
        if sum(block.rows * block.cols for block in blocks[i]) != param.numel() or any(
            block.row + (block.rows - 1) * block.row_step >= n or block.col + block.cols > m for block in blocks[i]
        ):
            raise ValueError(
                f"blocks[{i}] must place the {param.numel()} elements of params[{i}] in a matrix of {n} rows and {m} "
                "columns"
            )
    _part_op("smmf_sums_step_", params, backend)(
        params,
        grads,
        **second,
        **first,
        blocks=blocks,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        **_stored(params, master_lows, places, seed, step, backend),
    )


def hfac_dense_squares(grads: Tensors, exp_avg_sqs: Tensors, *, beta2: Scalar, eps: float) -> list[Tensor]:
    """Sums of U^2 over parts of vectors. In plain torch with every backend: vectors are few."""
    return backends.TABLE["reference"].load().hfac_dense_squares(grads, exp_avg_sqs, beta2=beta2, eps=eps)


def hfac_dense_apply_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, mean_squares: Tensor, **scalars: Any
) -> None:
    """`hfac_dense_step_` on parts of vectors whose means of U^2 are known, in plain torch likewise."""
    step = backends.TABLE["reference"].load().hfac_dense_step_
    step(params, grads, exp_avgs, exp_avg_sqs, mean_squares=mean_squares, **scalars)


def nonfinite(grads: Tensors, elements: Sequence[int]) -> Tensor:
    """int32 [len(grads)]: 1 where a gradient that is part of a tensor of so many elements must be refused, by the rule
    of `hfac.reference`. Nothing of a gradient's size is made."""
    flags = torch.zeros(len(grads), dtype=torch.int32, device=grads[0].device if grads else None)
    for i, grad in enumerate(grads):
        if grad.numel():
            largest = torch.stack(torch.aminmax(grad)).to(state_dtype(grad.dtype))
            flags[i] = ~(largest * largest * elements[i]).isfinite().all()
    return flags


#: Ops on parts of parameters, whose wholes lie on several ranks (`hfac.distributed`).
PART_OPS = {"hfac": ("hfac_sums", "hfac_apply_"), "smmf": ("smmf_sums_step_",)}


def _part_op(op: str, tensors: Tensors, backend: str) -> Callable[..., None]:
    return getattr(backends.resolve(backend, tensors[0].device if tensors else _HOST, op), op)


def _check_parts(
    tensors: Tensors,
    lists: Mapping[str, Sequence[Any] | Tensor],
    states: Mapping[str, Tensors],
    dtypes: Sequence[torch.dtype],
) -> None:
    for name, entries in {**lists, **states}.items():
        if len(entries) != len(tensors):
            raise ValueError(f"{name} must have one entry per parameter ({len(tensors)}), got {len(entries)}")
    for i, tensor in enumerate(tensors):
        check_tensor(f"part {i}", tensor)
        for name, entries in states.items():
            if not entries[i].is_contiguous() or entries[i].device != tensor.device:
                raise ValueError(f"{name}[{i}] must be contiguous and on {tensor.device}")
            if entries[i].dtype != dtypes[i]:
                raise ValueError(f"{name}[{i}] must be {dtypes[i]}, got {entries[i].dtype}")


def _check_part_grads(params: Tensors, grads: Tensors) -> None:
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check_tensor(f"grads[{i}]", grad)
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"grads[{i}] must have its parameter's shape {tuple(param.shape)} and device {param.device}, got "
                f"{tuple(grad.shape)} on {grad.device}"
            )
        if {param.dtype, grad.dtype} - _FLOATING:
            raise ValueError(f"params[{i}] and grads[{i}] must be of {_names(PARAM_DTYPES)}")


def _call(
    op: str,
    params: Tensors,
    grads: Tensors,
    nonfinite: Tensor | None,
    backend: str,
    places: Sequence[Place] | None,
    master_lows: Tensors | None,
    **arguments: Any,
) -> None:
    states = {name: arguments.pop(name) for name in STATES[op]}
    if arguments["beta1"] is None:
        states = {name: tensors for name, tensors in states.items() if name not in FIRST_MOMENT}
    if master_lows is not None:
        states[LOWS] = master_lows
    Bound(op, params, states, places=places, backend=backend).prepare(grads, nonfinite, **arguments)()


def _stored(
    params: Tensors,
    master_lows: Tensors | None,
    places: Sequence[Place] | None,
    seed: int,
    step: Scalar,
    backend: str,
) -> dict[str, Any]:
    """What a backend's op on parts is told of how parameters are stored, checked."""
    found: dict[str, Any] = {}
    if master_lows is not None:
        found[LOWS] = master_lows
        _check_lows(params, _entries(LOWS, master_lows, "a part op", len(params)))
    if places is not None:
        found.update(places=places, seed=seed, step=step)
        _check_places(params, places, master_lows)
    if found and params:
        _check_stores(backend, params[0].device)
    return found


#: State lists of each op.
STATES = {
    "hfac_step_": ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "hfac_dense_step_": ("exp_avgs", "exp_avg_sqs"),
    "smmf_step_": ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "smmf_dense_step_": ("exp_avgs", "exp_avg_sqs"),
}
#: Those that SMMF does without where beta1 is None.
FIRST_MOMENT = frozenset(("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "exp_avgs"))
#: The list, of any op, of what bfloat16 parameters lack of master weights.
LOWS = "master_lows"


class Bound:
    """An op with the parameters and states it updates, found right once; every step brings gradients and scalars.

    To look at every state of many small tensors anew in every step would cost more than the step. What a step must
    know is whether a tensor lies where it lay: `holds`.

    Args:
        op: name of the op.
        states: lists by the names that the op gives them; SMMF without a first moment leaves its lists out, and
            `LOWS` is there where there are master weights.
        places: as the op takes it. A step then brings ``seed`` and ``step`` among its scalars.
        backend: as the op takes it.

    Raises:
        ValueError, RuntimeError: as every op, see above.
    """

    def __init__(
        self,
        op: str,
        params: Tensors,
        states: Mapping[str, Tensors],
        *,
        places: Sequence[Place] | None = None,
        backend: str = "auto",
    ) -> None:
        self._op = op
        self._first = not op.startswith("smmf") or not FIRST_MOMENT.isdisjoint(states)
        needed = STATES[op] if self._first else [name for name in STATES[op] if name not in FIRST_MOMENT]
        self._params = list(params)
        if LOWS in states:
            needed = [*needed, LOWS]
        self._states = {name: _entries(name, states.get(name), op, len(params)) for name in needed}
        self._step: Callable[..., None] | None = None
        if not params:
            return
        self._device = params[0].device
        _check_params(self._params)
        _check_states(op, self._params, self._states)
        self._stochastic = places is not None
        stored: dict[str, Any] = {}
        if places is not None:
            _check_places(self._params, places, self._states.get(LOWS))
            stored["places"] = list(places)
        if LOWS in states or stored:
            _check_stores(backend, self._device)
        module = backends.resolve(backend, self._device)
        self._unscales = getattr(module, "UNSCALES", False)
        if hasattr(module, "bind"):
            self._step = module.bind(op, self._params, self._states, **stored)
        else:
            missing = dict.fromkeys(set(STATES[op]) - set(needed))
            self._step = partial(getattr(module, op), self._params, **self._states, **missing, **stored)
        self._layout = whereabouts(self._params, self._states.values())
        self._shapes = self._layout[2]

    def holds(self) -> bool:
        """Parameters and states have the places, shapes and types that they had."""
        return self._step is None or whereabouts(self._params, self._states.values()) == self._layout

    def workspace_bytes(self) -> int:
        """Bytes on the device that the backend keeps from step to step."""
        return getattr(self._step, "workspace_bytes", lambda: 0)()

    def prepare(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int = 0,
        step: Scalar = 0.0,
        **scalars: Any,
    ) -> Callable[..., None]:
        """Checks a step with these gradients and returns it, yet to be made: (clip=None) -> None. ``clip`` is a 0-d
        float32 or float64 tensor, known when all steps have been checked; gradients are multiplied by it.

        ``seed`` and ``step`` are read where the op has places. ``grad_scale`` and ``found_inf`` are what
        `torch.amp.GradScaler` hands to an optimizer that unscales gradients itself: float32 tensors of one element.
        Gradients are divided by the one, and nothing is written where the other is not zero. The CUDA kernels do all of
        this as they go and write no gradient; for other backends gradients are multiplied in place, as
        `torch.nn.utils.clip_grad_norm_` and the scaler would do it, and found_inf is read on the host.
        """
        if len(grads) != len(self._params):
            raise ValueError(f"grads must have one entry per parameter ({len(self._params)}), got {len(grads)}")
        if (scalars["beta1"] is not None) != self._first:
            raise ValueError("states of the first moment are required by SMMF exactly where beta1 is not None")
        if self._step is None:
            return lambda clip=None: None
        self._check_grads(grads)
        if nonfinite is not None and (
            nonfinite.shape != (len(grads),) or nonfinite.dtype != torch.int32 or nonfinite.device != self._device
        ):
            raise ValueError(
                f"nonfinite must be an int32 tensor of shape ({len(grads)},) on {self._device}, got {nonfinite.dtype} "
                f"{tuple(nonfinite.shape)} on {nonfinite.device}"
            )
        if self._stochastic:
            scalars.update(seed=seed, step=step)
        run = partial(self._run, nonfinite=nonfinite, **scalars)
        given = {"grad_scale": grad_scale, "found_inf": found_inf}
        scaling = {name: tensor for name, tensor in given.items() if tensor is not None}
        for name, tensor in scaling.items():
            if tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device != self._device:
                raise ValueError(
                    f"{name} must be one float32 on {self._device}, as torch.amp.GradScaler passes it, got "
                    f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"
                )

        def fused(clip: Tensor | None = None) -> None:
            if clip is not None:
                clip = clip.to(self._device)
                divisor = clip.reciprocal() if grad_scale is None else grad_scale.reshape(()) / clip
                scaling["grad_scale"] = divisor.to(torch.float32)
            run(grads, **scaling)

        def in_place(clip: Tensor | None = None) -> None:
            if found_inf is not None and found_inf.item():
                if nonfinite is not None:
                    nonfinite.zero_()
                return
            mine = list(grads)
            if clip is not None:
                clip = clip.to(self._device)
                mine = clipping.scaled(mine, clip if grad_scale is None else clip / grad_scale.reshape(()))
            elif grad_scale is not None:
                torch._foreach_div_(mine, grad_scale)
            run(mine)

        return fused if self._unscales else in_place

    def _run(self, *args: Any, **kwargs: Any) -> None:
        """A prepared step holds this object, and so the states whose addresses the backend was given."""
        assert self._step is not None
        self._step(*args, **kwargs)

    def _check_grads(self, grads: Tensors) -> None:
        if (
            list(map(_SHAPE, grads)) == self._shapes
            and {torch.strided}.issuperset(map(_LAYOUT, grads))
            and _FLOATING.issuperset(map(_DTYPE, grads))
            and {self._device}.issuperset(map(_DEVICE, grads))
        ):
            return
        for i, (param, grad) in enumerate(zip(self._params, grads, strict=True)):
            check_tensor(f"grads[{i}]", grad)
            if grad.dtype not in PARAM_DTYPES:
                raise ValueError(f"grads[{i}] must be one of {_names(PARAM_DTYPES)}, got {grad.dtype}")
            if grad.shape != param.shape:
                raise ValueError(
                    f"grads[{i}] must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
                )
            if grad.device != self._device:
                raise RuntimeError(
                    f"params[{i}] is on {param.device} and grads[{i}] on {grad.device}, expected both on {self._device}"
                )


def whereabouts(params: Tensors, states: Iterable[Tensors]) -> list[list[Any]]:
    """Of parameters all that ``p.data = ...`` can change; states are contiguous, and only move."""
    found = [list(map(get, params)) for get in (Tensor.data_ptr, _DTYPE, _SHAPE, Tensor.stride)]
    return found + [list(map(Tensor.data_ptr, tensors)) for tensors in states]


def read_steps(steps: Tensors) -> list[float]:
    """The values of 0-d tensors on the host."""
    native = backends.host_counters()
    return [step.item() for step in steps] if native is None else native.read_steps(steps)


def advance_steps_(steps: Tensors) -> None:
    """Adds one to 0-d tensors, which all lie on the host or all on one device."""
    native = backends.host_counters() if steps[0].is_cpu else None
    if native is not None:
        native.advance_steps_(steps)
    else:
        # A tensor of one, made once: a number would be wrapped anew for every step that lives on the host.
        torch._foreach_add_(list(steps), torch.ones((), device=steps[0].device), alpha=1)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError for a sparse or complex tensor, saying which (``name``) and what to do."""
    if tensor.layout != torch.strided:
        raise RuntimeError(
            f"{name} has layout {tensor.layout}; row and column sums need a dense tensor. Use sparse=False in the "
            "layer that makes it (nn.Embedding), call .to_dense() on it, or give that parameter to "
            "torch.optim.SparseAdam."
        )
    if tensor.is_complex():
        raise RuntimeError(
            f"{name} is complex ({tensor.dtype}); only real tensors are supported. Optimize "
            "torch.view_as_real(parameter) instead."
        )


def _entries(name: str, tensors: Tensors | None, op: str, count: int) -> list[Tensor]:
    if tensors is None:
        raise ValueError(f"{name} is required by {op} unless beta1 is None")
    if len(tensors) != count:
        raise ValueError(f"{name} must have one entry per parameter ({count}), got {len(tensors)}")
    return list(tensors)


def _check_params(params: Tensors) -> None:
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param)
        if param.dtype not in PARAM_DTYPES:
            raise ValueError(f"params[{i}] must be one of {_names(PARAM_DTYPES)}, got {param.dtype}")
        if param.device != params[0].device:
            raise RuntimeError(f"params[{i}] is on {param.device}, but params[0] is on {params[0].device}")


def _check_states(op: str, params: Tensors, states: Mapping[str, Tensors]) -> None:
    states = dict(states)
    if LOWS in states:
        _check_lows(params, states.pop(LOWS))
    for i, param in enumerate(params):
        for name, tensors in states.items():
            tensor = tensors[i]
            if tensor is None:
                raise ValueError(f"{name}[{i}] is None; {op} needs this state for every parameter")
            wanted = torch.uint8 if name == "exp_avg_signs" else state_dtype(param.dtype)
            if tensor.dtype != wanted:
                raise ValueError(f"{name}[{i}] must be {wanted} for a {param.dtype} parameter, got {tensor.dtype}")
            if tensor.device != param.device:
                raise RuntimeError(f"{name}[{i}] must be on {param.device} like its parameter, got {tensor.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous, got strides {tensor.stride()}")
    if "dense" in op:
        _check_whole(params, states)
    else:
        _check_factors(params, states)
    if op == "smmf_step_":
        _check_square(params, states)
    if op == "hfac_step_":
        _check_cut(params, states)
    if "exp_avg_signs" in states:
        _check_signs(params, states["exp_avg_signs"])


def _check_factors(params: Tensors, states: Mapping[str, Tensors]) -> None:
    """Rows times columns are the parameter's elements, and both moments agree on them."""
    rows = [name for name in states if name.endswith("rows")]
    for row_name in rows:
        col_name = row_name.replace("rows", "cols")
        for i, param in enumerate(params):
            m, n = states[row_name][i].numel(), states[col_name][i].numel()
            if m * n != param.numel() or m != states[rows[0]][i].numel():
                raise ValueError(
                    f"{row_name}[{i}] and {col_name}[{i}] have {m} and {n} elements, which do not make the "
                    f"{param.numel()} elements of params[{i}] of shape {tuple(param.shape)} as in its other factors"
                )


def _check_cut(params: Tensors, states: Mapping[str, Tensors]) -> None:
    """Rows are the leading dimensions of the parameter; only then do they mean what they meant when they were made."""
    for i, param in enumerate(params):
        m = states["exp_avg_sq_rows"][i].numel()
        if m not in accumulate(param.shape[:-1], mul):
            raise ValueError(
                f"exp_avg_sq_rows[{i}] has {m} elements, which no leading dimensions of params[{i}] of shape "
                f"{tuple(param.shape)} make; hfac.matricize.cut gives their number"
            )


def _check_square(params: Tensors, states: Mapping[str, Tensors]) -> None:
    for i in range(len(params)):
        n, m = states["exp_avg_sq_rows"][i].numel(), states["exp_avg_sq_cols"][i].numel()
        if n < m:
            raise ValueError(
                f"exp_avg_sq_rows[{i}] must be the longer factor, got {n} rows and {m} columns; "
                "hfac.matricize.square gives (rows, columns)"
            )


def _check_whole(params: Tensors, states: Mapping[str, Tensors]) -> None:
    for name, tensors in states.items():
        for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name}[{i}] must have its parameter's shape {tuple(param.shape)}, got {tuple(tensor.shape)}"
                )


def _check_signs(params: Tensors, signs: Tensors) -> None:
    for i, (param, sign) in enumerate(zip(params, signs, strict=True)):
        if param.ndim == 0 or tuple(sign.shape) != sign_shape(param.shape):
            wanted = sign_shape(param.shape) if param.ndim else "none: a scalar's moments are kept whole"
            raise ValueError(
                f"exp_avg_signs[{i}] for a parameter of shape {tuple(param.shape)} must have shape {wanted}, "
                f"got {tuple(sign.shape)}"
            )


def _check_lows(params: Tensors, lows: Tensors) -> None:
    dtypes = tuple(rounding.LOW_DTYPES.values())
    for i, (param, low) in enumerate(zip(params, lows, strict=True)):
        if param.dtype != torch.bfloat16 or low.dtype not in dtypes or low.shape != param.shape:
            raise ValueError(
                f"{LOWS}[{i}] must be {_names(dtypes)} of the shape of a bfloat16 parameter, got {low.dtype} "
                f"{tuple(low.shape)} for {param.dtype} {tuple(param.shape)}"
            )
        if low.device != param.device:
            raise RuntimeError(f"{LOWS}[{i}] must be on {param.device} like its parameter, got {low.device}")
    if len({low.dtype for low in lows}) > 1:
        raise ValueError(f"{LOWS} must be of one type, got {_names(sorted({low.dtype for low in lows}, key=str))}")


def _check_places(params: Tensors, places: Sequence[Place], lows: Tensors | None) -> None:
    if len(places) != len(params):
        raise ValueError(f"places must have one entry per parameter ({len(params)}), got {len(places)}")
    for i, (param, place) in enumerate(zip(params, places, strict=True)):
        if param.dtype not in rounding.DTYPES:
            raise ValueError(f"params[{i}] must be {_names(rounding.DTYPES)} to be rounded, got {param.dtype}")
        if not 0 <= place.position < 2**32 or place.first < 0:
            raise ValueError(f"places[{i}] must have an unsigned 32-bit position and a first >= 0, got {place}")
        if place.strides is not None and (len(place.strides) != param.ndim or min(place.strides, default=0) < 0):
            raise ValueError(f"places[{i}] must have a stride >= 0 for each of {param.ndim} dimensions, got {place}")


def _check_stores(backend: str, device: torch.device) -> None:
    module = backends.resolve(backend, device)
    if not getattr(module, "STORES", False):
        raise RuntimeError(
            f"backend={backend!r} on {device} rounds to the nearest only; stochastic rounding and master weights in "
            "two pieces need another. Use backend='reference'."
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_HOST = torch.device("cpu")
_LAYOUT, _DTYPE, _DEVICE, _SHAPE = (attrgetter(name) for name in ("layout", "dtype", "device", "shape"))
