"""The C++ kernels of `hfac._C` for tensors on the CPU: tensors become addresses, types and strides.

Same results as `hfac.reference`; `hfac.ops` has checked the arguments. Nothing here loops over parameters in Python
except the list comprehensions that read what the extension is told.
"""

import json
from collections.abc import Callable, Iterable, Sequence
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


def bind(op: str, params: Sequence[Tensor], states: dict[str, list[Tensor]]) -> Callable[..., None]:
    """The op of that name on these parameters and states, for as long as they lie where they lie: (grads, nonfinite,
    **scalars) -> None, as the function of `hfac.reference`.

    Of SMMF's states those of the first moment may be left out; beta1 is None then.
    """
    operands: dict[str, Any] = {"params": _addresses(params), "numels": _numels(params), "param_dtypes": _codes(params)}
    if not all(map(Tensor.is_contiguous, params)):
        operands["param_strides"] = _strides(params)
    operands.update(_factors(operands["numels"], states))
    operands.update({name: _addresses(tensors) for name, tensors in states.items()})
    if op.startswith("smmf"):
        operands = dict.fromkeys(_FIRST_MOMENT[op]) | operands

    def step(
        grads: Sequence[Tensor],
        nonfinite: Tensor | None = None,
        *,
        beta1: Scalar | None,
        beta2: Scalar,
        lr: Scalar,
        weight_decay: Scalar,
        **scalars: Any,
    ) -> None:
        places: dict[str, Any] = {}
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.resolve_neg() for grad in grads]
            places["grad_strides"] = _strides(grads)
        if places or "param_strides" in operands:
            places["shapes"] = [tuple(param.shape) for param in params]
        with _Flags(nonfinite) as flags:
            getattr(_C, op.removesuffix("_"))(
                **operands,
                **places,
                **scalars,
                grads=_addresses(grads),
                grad_dtypes=_codes(grads),
                beta1=None if beta1 is None else _scalar(beta1),
                beta2=_scalar(beta2),
                lr=_scalar(lr),
                weight_decay=_scalar(weight_decay),
                nonfinite=flags,
                threads=torch.get_num_threads(),
            )
        increment_version(params)

    return step


#: What the extension is told of a first moment, None where there is none.
_FIRST_MOMENT = {
    "smmf_step_": ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "sign_bytes", "sign_slices"),
    "smmf_dense_step_": ("exp_avgs",),
}


def _factors(numels: list[int], states: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Sizes of the factors, and how sign bits lie."""
    if "exp_avg_sq_rows" not in states:
        return {}
    found: dict[str, Any] = {"rows": _numels(states["exp_avg_sq_rows"]), "cols": _numels(states["exp_avg_sq_cols"])}
    if "exp_avg_signs" in states:
        sign_bytes = _numels(states["exp_avg_signs"])
        # A plain bit stream, and one element per byte, show in the number of bytes alone.
        odd = any(8 * b != n != b for b, n in zip(sign_bytes, numels, strict=True))
        slices = [sign.shape[0] for sign in states["exp_avg_signs"]] if odd else None
        found.update(sign_bytes=sign_bytes, sign_slices=slices)
    return found


def read_steps(steps: Iterable[Tensor]) -> list[float]:
    """The values of 0-d float32 tensors."""
    return _C.read_floats(_addresses(steps))


def advance_steps_(steps: Sequence[Tensor]) -> None:
    """Adds one to 0-d float32 tensors."""
    _C.advance_floats(_addresses(steps))
    increment_version(steps)


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
        if self.given is not None and self.dense is not None and self.dense is not self.given:
            self.given.copy_(self.dense)
