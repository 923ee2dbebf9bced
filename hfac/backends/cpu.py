"""The C++ kernels of `hfac._C` for tensors on the CPU: tensors become addresses, types and strides.

Same signatures and results as `hfac.reference`; `hfac.ops` has checked the arguments. Nothing here loops over
parameters in Python except the list comprehensions that read what the extension is told.
"""

import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # tells autograd of writes that it cannot see

from ..schedules import Scalar

try:
    _C: Any = import_module("hfac._C")
except ImportError as error:  # not built, or built for another Python: `why_not` tells
    _C, _IMPORT_ERROR = None, str(error)

#: The codes of csrc/math/storage.h.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_DTYPE = attrgetter("dtype")
_BUILD_INFO = Path(__file__).parents[1] / "_build_info.json"


def why_not(device: torch.device) -> str | None:
    """None where these kernels serve ``device``, else the reason and what to do."""
    if _C is None:
        return (
            f"the extension hfac._C is not built ({_build_failure()}). Build it with: python -m pip install -e . in a "
            "checkout of hfac, on a machine with a C++17 compiler."
        )
    if device.type != "cpu":
        return f"the C++ kernels serve tensors on the CPU, not on {device}. Use backend='auto'."
    return None


def _build_failure() -> str:
    try:
        reason = json.loads(_BUILD_INFO.read_text())["why_not"]
    except (OSError, ValueError, KeyError):
        reason = None
    return reason or _IMPORT_ERROR


def hfac_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: Sequence[Tensor],
    exp_avg_cols: Sequence[Tensor],
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool,
) -> None:
    """See `hfac.reference.hfac_step_`."""
    with _Flags(nonfinite) as flags:
        _C.hfac_step(
            **_operands(params, grads),
            rows=_numels(exp_avg_sq_rows),
            cols=_numels(exp_avg_sq_cols),
            exp_avg_rows=_addresses(exp_avg_rows),
            exp_avg_cols=_addresses(exp_avg_cols),
            exp_avg_sq_rows=_addresses(exp_avg_sq_rows),
            exp_avg_sq_cols=_addresses(exp_avg_sq_cols),
            beta1=_scalar(beta1),
            beta2=_scalar(beta2),
            lr=_scalar(lr),
            eps=eps,
            clip_threshold=clip_threshold,
            weight_decay=_scalar(weight_decay),
            maximize=maximize,
            nonfinite=flags,
        )
    increment_version(params)


def hfac_dense_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool,
) -> None:
    """See `hfac.reference.hfac_dense_step_`."""
    with _Flags(nonfinite) as flags:
        _C.hfac_dense_step(
            **_operands(params, grads),
            exp_avgs=_addresses(exp_avgs),
            exp_avg_sqs=_addresses(exp_avg_sqs),
            beta1=_scalar(beta1),
            beta2=_scalar(beta2),
            lr=_scalar(lr),
            eps=eps,
            clip_threshold=clip_threshold,
            weight_decay=_scalar(weight_decay),
            maximize=maximize,
            nonfinite=flags,
        )
    increment_version(params)


def smmf_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: Sequence[Tensor] | None,
    exp_avg_cols: Sequence[Tensor] | None,
    exp_avg_signs: Sequence[Tensor] | None,
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """See `hfac.reference.smmf_step_`."""
    operands = _operands(params, grads)
    first: dict[str, Any] = dict.fromkeys(
        ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "sign_bytes", "sign_slices", "beta1")
    )
    if beta1 is not None:
        assert exp_avg_rows is not None and exp_avg_cols is not None and exp_avg_signs is not None
        sign_bytes = _numels(exp_avg_signs)
        # A plain bit stream, and one element per byte, show in the number of bytes alone.
        odd = any(8 * b != n != b for b, n in zip(sign_bytes, operands["numels"], strict=True))
        first = {
            "exp_avg_rows": _addresses(exp_avg_rows),
            "exp_avg_cols": _addresses(exp_avg_cols),
            "exp_avg_signs": _addresses(exp_avg_signs),
            "sign_bytes": sign_bytes,
            "sign_slices": [sign.shape[0] for sign in exp_avg_signs] if odd else None,
            "beta1": _scalar(beta1),
        }
    with _Flags(nonfinite) as flags:
        _C.smmf_step(
            **operands,
            **first,
            rows=_numels(exp_avg_sq_rows),
            cols=_numels(exp_avg_sq_cols),
            exp_avg_sq_rows=_addresses(exp_avg_sq_rows),
            exp_avg_sq_cols=_addresses(exp_avg_sq_cols),
            beta2=_scalar(beta2),
            lr=_scalar(lr),
            eps=eps,
            weight_decay=_scalar(weight_decay),
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            nonfinite=flags,
        )
    increment_version(params)


def smmf_dense_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """See `hfac.reference.smmf_dense_step_`."""
    with _Flags(nonfinite) as flags:
        _C.smmf_dense_step(
            **_operands(params, grads),
            exp_avgs=None if beta1 is None or exp_avgs is None else _addresses(exp_avgs),
            exp_avg_sqs=_addresses(exp_avg_sqs),
            beta1=None if beta1 is None else _scalar(beta1),
            beta2=_scalar(beta2),
            lr=_scalar(lr),
            eps=eps,
            weight_decay=_scalar(weight_decay),
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            nonfinite=flags,
        )
    increment_version(params)


def _operands(params: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Any]:
    """What every op is told of parameters and gradients. Strides are read only where something is not contiguous."""
    operands = {
        "numels": _numels(params),
        "param_dtypes": _codes(params),
        "grad_dtypes": _codes(grads),
        "threads": torch.get_num_threads(),
    }
    if not all(map(Tensor.is_contiguous, params)):
        operands.update(shapes=[tuple(p.shape) for p in params], param_strides=_strides(params))
    if not all(map(Tensor.is_contiguous, grads)):
        grads = [grad.resolve_neg() for grad in grads]
        operands.update(shapes=[tuple(p.shape) for p in params], grad_strides=_strides(grads))
    operands.update(params=_addresses(params), grads=_addresses(grads))
    return operands


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _numels(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.numel, tensors))


def _codes(tensors: Sequence[Tensor]) -> int | list[int]:
    """One code where all tensors have one type, else one code each."""
    dtypes = list(map(_DTYPE, tensors))
    if dtypes and dtypes.count(dtypes[0]) == len(dtypes):
        return _CODES[dtypes[0]]
    return [_CODES[dtype] for dtype in dtypes]


def _strides(tensors: Iterable[Tensor]) -> list[tuple[int, ...] | None]:
    return [None if tensor.is_contiguous() else tensor.stride() for tensor in tensors]


def _scalar(value: Scalar) -> float | list[float]:
    return value.tolist() if isinstance(value, Tensor) else value


class _Flags:
    """The address of a contiguous int32 array for ``nonfinite`` (0 for None), whatever its strides."""

    def __init__(self, nonfinite: Tensor | None) -> None:
        self.given = nonfinite
        self.dense = None if nonfinite is None else nonfinite.contiguous()

    def __enter__(self) -> int:
        return 0 if self.dense is None else self.dense.data_ptr()

    def __exit__(self, *exception: object) -> None:
        if self.given is not None and self.dense is not self.given:
            self.given.copy_(self.dense)
