"""What is checked of an op's tensors before anything is written. `hfac.functional` checks its own lists besides."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from types import ModuleType

import torch
from torch import Tensor

from .. import backends, memory, rounding
from ..matricize import sign_shape
from ..rounding import Place

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATING = frozenset(PARAM_DTYPES)
#: The list, of any op, of what bfloat16 parameters lack of master weights.
LOWS = "master_lows"
Tensors = Sequence[Tensor]


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Type of the arithmetic and of the states: float64 for float64 parameters, else float32."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


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


def checked_list(name: str, tensors: Tensors | None, op: str, count: int) -> list[Tensor]:
    if tensors is None:
        raise ValueError(f"{name} is required by {op} unless beta1 is None")
    if len(tensors) != count:
        raise ValueError(f"{name} must have one entry per parameter ({count}), got {len(tensors)}")
    return list(tensors)


def check_params(params: Tensors) -> None:
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param)
        if param.dtype not in PARAM_DTYPES:
            raise ValueError(f"params[{i}] must be one of {names(PARAM_DTYPES)}, got {param.dtype}")
        if param.device != params[0].device:
            raise RuntimeError(f"params[{i}] is on {param.device}, but params[0] is on {params[0].device}")
        check_writable(f"params[{i}]", param)


def check_writable(name: str, param: Tensor) -> None:
    """Raises RuntimeError for a parameter that torch's own operations would not write, before any of them finds out."""
    if param.is_inference():
        raise RuntimeError(
            f"{name} is an inference tensor, which nothing but inference mode may write. Make it outside of "
            "torch.inference_mode(), or train a clone of it that is made outside."
        )
    if param._is_zerotensor():
        raise RuntimeError(f"{name} is a ZeroTensor, which has no elements to be written. Train a clone of it.")
    if type(param) in memory.PLAIN and memory.overlaps_itself(param):
        raise RuntimeError(
            f"{name} of shape {tuple(param.shape)} and strides {param.stride()} has elements that share memory, as "
            "an expanded tensor has, so they cannot be updated one by one. Train the tensor that was expanded, or "
            "a clone."
        )


def check_states(op: str, params: Tensors, states: Mapping[str, Tensors]) -> None:
    states = dict(states)
    if LOWS in states:
        check_lows(params, states.pop(LOWS))
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
        check_signs(params, states["exp_avg_signs"])


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


def check_signs(params: Tensors, signs: Tensors) -> None:
    for i, (param, sign) in enumerate(zip(params, signs, strict=True)):
        if param.ndim == 0 or tuple(sign.shape) != sign_shape(param.shape):
            wanted = sign_shape(param.shape) if param.ndim else "none: a scalar's moments are kept whole"
            raise ValueError(
                f"exp_avg_signs[{i}] for a parameter of shape {tuple(param.shape)} must have shape {wanted}, "
                f"got {tuple(sign.shape)}"
            )


def check_lows(params: Tensors, lows: Tensors) -> None:
    dtypes = tuple(rounding.LOW_DTYPES.values())
    for i, (param, low) in enumerate(zip(params, lows, strict=True)):
        if param.dtype != torch.bfloat16 or low.dtype not in dtypes or low.shape != param.shape:
            raise ValueError(
                f"{LOWS}[{i}] must be {names(dtypes)} of the shape of a bfloat16 parameter, got {low.dtype} "
                f"{tuple(low.shape)} for {param.dtype} {tuple(param.shape)}"
            )
        if low.device != param.device:
            raise RuntimeError(f"{LOWS}[{i}] must be on {param.device} like its parameter, got {low.device}")
    if len({low.dtype for low in lows}) > 1:
        raise ValueError(f"{LOWS} must be of one type, got {names(sorted({low.dtype for low in lows}, key=str))}")


def check_places(params: Tensors, places: Sequence[Place], lows: Tensors | None) -> None:
    if len(places) != len(params):
        raise ValueError(f"places must have one entry per parameter ({len(params)}), got {len(places)}")
    for i, (param, place) in enumerate(zip(params, places, strict=True)):
        if param.dtype not in rounding.DTYPES:
            raise ValueError(f"params[{i}] must be {names(rounding.DTYPES)} to be rounded, got {param.dtype}")
        if not 0 <= place.position < 2**32 or place.first < 0:
            raise ValueError(f"places[{i}] must have an unsigned 32-bit position and a first >= 0, got {place}")
        if place.strides is not None and (len(place.strides) != param.ndim or min(place.strides, default=0) < 0):
            raise ValueError(f"places[{i}] must have a stride >= 0 for each of {param.ndim} dimensions, got {place}")


def choose(backend: str, device: torch.device, reason: str | None, op: str | None = None) -> ModuleType:
    """The backend's module, `backends.resolve`; with a ``reason`` why memory cannot be read and written, the reference,
    which leaves that to torch's operations."""
    if reason is None or backend == "reference":
        return backends.found(backend, device, op)
    if backend == "auto":
        return backends.found("reference", device, op)
    backends.found(backend, device, op)
    raise RuntimeError(
        f"backend={backend!r} was asked for, whose kernels read and write memory, but {reason}. Use backend='auto' or "
        "'reference', which step such tensors through torch's operations."
    )


def check_stores(backend: str, device: torch.device) -> None:
    module = backends.found(backend, device)
    if not getattr(module, "STORES", False):
        raise RuntimeError(
            f"backend={backend!r} on {device} rounds to the nearest only; stochastic rounding and master weights in "
            "two pieces need another. Use backend='reference'."
        )


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
