"""One function per op: the only validation of tensors, and the choice of backend.

Every op takes lists with one entry per parameter, all on one device, and updates parameters and states in place.
What an op computes is defined, with shapes, by the function of the same name in `hfac.reference`. Arguments are
checked before anything is written; `prepare` checks a call now and makes it later, so that several calls can be
checked before the first one writes. Scalars (lr, decays, ...) have been checked where they were set
(`hfac.optim.options`).

Errors of every op:
    ValueError: lists of different lengths; a shape, or the type of a state, that does not fit its parameter.
    RuntimeError: a sparse or complex tensor; tensors on different devices; a backend that cannot serve them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from operator import attrgetter, is_, mul
from typing import Any

import torch
from torch import Tensor

from . import backends
from .matricize import sign_shape
from .schedules import Scalar

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    backend: str = "auto",
) -> None:
    """One step of H-Fac on parameters viewed as [m, n] matrices. Row states have m elements, column states n."""
    prepare("hfac_step_", **locals())()


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
    backend: str = "auto",
) -> None:
    """One step of H-Fac with both moments whole: states have their parameter's shape."""
    prepare("hfac_dense_step_", **locals())()


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
    backend: str = "auto",
) -> None:
    """One step of SMMF on parameters viewed as [n, m] matrices, n >= m. Row states are [n], column states [m], signs
    uint8 of `hfac.matricize.sign_shape`. beta1 None: no first moment, and its three lists are None."""
    prepare("smmf_step_", **locals())()


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
    backend: str = "auto",
) -> None:
    """One step of SMMF with both moments whole: states have their parameter's shape. beta1 None: exp_avgs is None."""
    prepare("smmf_dense_step_", **locals())()


def prepare(
    op: str,
    params: Tensors,
    grads: Tensors,
    *,
    backend: str = "auto",
    checked: dict[str, Any] | None = None,
    **arguments: Any,
) -> Callable[[], None]:
    """Checks a call of the op of that name (arguments as the op takes them) and returns it, yet to be made.

    ``checked`` holds the parameters and states of an earlier call that were found right. The same tensors need no
    second look, which for many small tensors would cost more than the step; gradients are looked at every time.
    """
    states = {name: arguments[name] for name in _STATES[op]}
    if op.startswith("smmf") and arguments["beta1"] is None:
        for name in set(states) & {"exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "exp_avgs"}:
            del states[name]
    for name, tensors in states.items():
        if tensors is None:
            raise ValueError(f"{name} is required by {op} unless beta1 is None")
    for name, tensors in (("grads", grads), *states.items()):
        if len(tensors) != len(params):
            raise ValueError(f"{name} must have one entry per parameter ({len(params)}), got {len(tensors)}")
    if not params:
        return lambda: None
    _check_grads(params, grads)
    _check_flags(params, arguments["nonfinite"])
    shapes = list(map(_SHAPE, params))  # of the same tensor when its data was replaced
    known = {"params": params, **states}
    if checked is None or checked.get("shapes") != shapes or not _same(known, checked["tensors"]):
        _check_states(op, params, states)
        if checked is not None:
            kept = {name: list(tensors) for name, tensors in known.items()}
            checked.update(shapes=shapes, tensors=kept)
    return partial(getattr(backends.resolve(backend, params[0].device), op), params, grads, **arguments)


_STATES = {
    "hfac_step_": ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "hfac_dense_step_": ("exp_avgs", "exp_avg_sqs"),
    "smmf_step_": ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "smmf_dense_step_": ("exp_avgs", "exp_avg_sqs"),
}


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


def _same(tensors: dict[str, Tensors], others: dict[str, Tensors]) -> bool:
    """The same tensor objects in the same places."""
    return tensors.keys() == others.keys() and all(
        len(mine) == len(others[name]) and all(map(is_, mine, others[name])) for name, mine in tensors.items()
    )


def _check_grads(params: Tensors, grads: Tensors) -> None:
    """Layout, type, shape and device of every gradient, and the device of every parameter."""
    device = params[0].device
    if (
        set(map(_LAYOUT, grads)) == {torch.strided}
        and set(map(_DTYPE, grads)) <= set(PARAM_DTYPES)
        and set(map(_DEVICE, grads)) == {device} == set(map(_DEVICE, params))
        and list(map(_SHAPE, grads)) == list(map(_SHAPE, params))
    ):
        return
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check_tensor(f"params[{i}]", param)
        check_tensor(f"grads[{i}]", grad)
        if grad.dtype not in PARAM_DTYPES:
            raise ValueError(f"grads[{i}] must be one of {_names(PARAM_DTYPES)}, got {grad.dtype}")
        if grad.shape != param.shape:
            raise ValueError(
                f"grads[{i}] must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
            )
        if param.device != device or grad.device != device:
            raise RuntimeError(
                f"params[{i}] is on {param.device} and grads[{i}] on {grad.device}, expected both on {device}"
            )


def _check_flags(params: Tensors, nonfinite: Tensor | None) -> None:
    device = params[0].device
    if nonfinite is not None and (
        nonfinite.shape != (len(params),) or nonfinite.dtype != torch.int32 or nonfinite.device != device
    ):
        raise ValueError(
            f"nonfinite must be an int32 tensor of shape ({len(params)},) on {device}, got {nonfinite.dtype} "
            f"{tuple(nonfinite.shape)} on {nonfinite.device}"
        )


def _check_states(op: str, params: Tensors, states: dict[str, Tensors]) -> None:
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param)
        if param.dtype not in PARAM_DTYPES:
            raise ValueError(f"params[{i}] must be one of {_names(PARAM_DTYPES)}, got {param.dtype}")
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


def _check_factors(params: Tensors, states: dict[str, Tensors]) -> None:
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


def _check_cut(params: Tensors, states: dict[str, Tensors]) -> None:
    """Rows are the leading dimensions of the parameter; only then do they mean what they meant when they were made."""
    for i, param in enumerate(params):
        m = states["exp_avg_sq_rows"][i].numel()
        if m not in accumulate(param.shape[:-1], mul):
            raise ValueError(
                f"exp_avg_sq_rows[{i}] has {m} elements, which no leading dimensions of params[{i}] of shape "
                f"{tuple(param.shape)} make; hfac.matricize.cut gives their number"
            )


def _check_square(params: Tensors, states: dict[str, Tensors]) -> None:
    for i in range(len(params)):
        n, m = states["exp_avg_sq_rows"][i].numel(), states["exp_avg_sq_cols"][i].numel()
        if n < m:
            raise ValueError(
                f"exp_avg_sq_rows[{i}] must be the longer factor, got {n} rows and {m} columns; "
                "hfac.matricize.square gives (rows, columns)"
            )


def _check_whole(params: Tensors, states: dict[str, Tensors]) -> None:
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


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_LAYOUT, _DTYPE, _DEVICE, _SHAPE = (attrgetter(name) for name in ("layout", "dtype", "device", "shape"))
