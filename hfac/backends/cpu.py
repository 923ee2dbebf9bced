"""The C++ kernels of `hfac._C` for tensors on the CPU: tensors become addresses, types and strides.

Same results as `hfac.reference`; `hfac.ops` has checked the arguments. Nothing here loops over parameters in Python
except the list comprehensions that read what the extension is told.
"""

import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tells autograd of writes that it cannot see. Called before them, for it refuses some tensors.
from torch.autograd.graph import increment_version

from .. import memory
from ..matricize import Block
from ..rounding import Place
from ..schedules import Scalar

Tensors = Sequence[Tensor]

try:
    _C: Any = import_module("hfac._C")
except ImportError as error:  # not built, or built for another Python: `why_not` tells
    _C, _IMPORT_ERROR = None, str(error)

#: Knows `master_lows` and `places`.
STORES = True
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


def bind(
    op: str, params: Sequence[Tensor], states: dict[str, list[Tensor]], *, places: Sequence[Place] | None = None
) -> "Bound":
    """The op of that name on these parameters and states, for as long as they lie where they lie.

    Of SMMF's states those of the first moment may be left out; beta1 is None then. ``master_lows`` are there where
    there are master weights, and where there are places every step brings ``seed`` and ``step``.
    """
    return Bound(op, params, states, places)


class Bound:
    """What `bind` returns."""

    def __init__(
        self, op: str, params: Sequence[Tensor], states: dict[str, list[Tensor]], places: Sequence[Place] | None
    ) -> None:
        self._op, self._params, self._places = op, params, places
        self._operands = _params(params, states.get("master_lows"), places)
        self._operands.update(_factors(self._operands["numels"], states))
        self._operands.update({name: _addresses(tensors) for name, tensors in states.items()})
        if op.startswith("smmf"):
            self._operands = dict.fromkeys(_FIRST_MOMENT[op]) | self._operands
        self._shapes = _needs_shapes(self._operands)

    def __call__(
        self,
        grads: Sequence[Tensor],
        nonfinite: Tensor | None = None,
        *,
        clip: Tensor | None = None,
        squares: Tensor | None = None,
        watched: Tensor | None = None,
        **scalars: Any,
    ) -> None:
        """A step, as the function of `hfac.reference`. ``clip``, a tensor of 1, says that `squares` was called with
        the same gradients and scalars, and returned ``squares``: its statistics are used."""
        more: dict[str, Any] = {}
        if clip is not None and squares is not None:
            more.update(stage="rest", kept=squares.data_ptr() + _kept_from(len(grads)))
        if watched is not None:
            more.update(watched=watched.data_ptr())
        increment_version(self._params)
        self._run(grads, nonfinite, more, **scalars)

    def squares(
        self,
        grads: Sequence[Tensor],
        nonfinite: Tensor | None = None,
        *,
        watched: Tensor | None = None,
        **scalars: Any,
    ) -> Tensor:
        """The sums of squares of the gradients, float64 [len(params)], of H-Fac's matrices: from the statistics of the
        step, which lie behind them in their memory: 2 numbers a row and 3 a column. ``watched`` is the step's to
        write."""
        sizes = {name: self._operands[name] for name in ("rows", "cols", "param_dtypes")}
        count, kept = len(grads), _kept_from(len(grads))
        room = torch.empty(kept + _C.hfac_kept(**sizes), dtype=torch.uint8, device="cpu")
        found = room[: 8 * count].view(torch.float64).zero_()
        address = room.data_ptr()
        places = {"kept": address + kept, "squares": address}
        self._run(grads, nonfinite, {"stage": "statistics", **places}, **scalars)
        return found

    def _run(
        self,
        grads: Sequence[Tensor],
        nonfinite: Tensor | None,
        more: dict[str, Any],
        *,
        beta1: Scalar | None,
        beta2: Scalar,
        lr: Scalar,
        weight_decay: Scalar,
        **scalars: Any,
    ) -> None:
        grads, strides = _resolved(grads)
        given = _grads(grads, strides, self._shapes)
        if 0 in given["grads"]:  # empty, or zeros without memory
            grads = memory.without_zerotensors(grads)
            given = _grads(grads, strides, self._shapes)
        if self._places is not None:
            scalars["step"] = _scalar(scalars["step"])
        with _Flags(nonfinite) as flags:
            getattr(_C, self._op.removesuffix("_"))(
                **self._operands,
                **given,
                **scalars,
                **more,
                beta1=None if beta1 is None else _scalar(beta1),
                beta2=_scalar(beta2),
                lr=_scalar(lr),
                weight_decay=_scalar(weight_decay),
                nonfinite=flags,
                threads=torch.get_num_threads(),
            )


def _kept_from(count: int) -> int:
    """Where statistics begin behind ``count`` sums of squares: on a line of the cache."""
    return -(-8 * max(count, 1) // 64) * 64


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
) -> None:
    grads, strides = _resolved(grads)
    columns = {"col_sums": col_sums, "col_squares": col_squares, "col_ratios": col_ratios}
    _C.hfac_sums(
        **_grads(grads, strides),
        numels=_numels(grads),
        state_dtypes=_codes(old_rows),
        rows=_numels(old_rows),
        whole_cols=cols,
        old_rows=_addresses(old_rows),
        row_sums=_addresses(row_sums),
        new_rows=_addresses(new_rows),
        **{name: None if tensors is None else _addresses(tensors) for name, tensors in columns.items()},
        beta2=_scalar(beta2),
        eps=eps,
        threads=torch.get_num_threads(),
    )


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
    maximize: bool,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
) -> None:
    operands, (grads, strides) = _params(params, master_lows, places), _resolved(grads)
    increment_version(params)
    _C.hfac_apply(
        **operands,
        **_grads(grads, strides, _needs_shapes(operands)),
        **({} if places is None else {"seed": seed, "step": _scalar(step)}),
        rows=_numels(exp_avg_sq_rows),
        cols=_numels(exp_avg_sq_cols),
        whole_rows=rows,
        whole_cols=cols,
        exp_avg_rows=_addresses(exp_avg_rows),
        exp_avg_cols=_addresses(exp_avg_cols),
        exp_avg_sq_rows=_addresses(exp_avg_sq_rows),
        exp_avg_sq_cols=_addresses(exp_avg_sq_cols),
        row_sums=_addresses(row_sums),
        new_rows=_addresses(new_rows),
        col_sums=_addresses(col_sums),
        new_cols=_addresses(new_cols),
        totals=totals.tolist(),
        mean_squares=mean_squares.tolist(),
        beta1=_scalar(beta1),
        lr=_scalar(lr),
        clip_threshold=clip_threshold,
        weight_decay=_scalar(weight_decay),
        maximize=maximize,
        threads=torch.get_num_threads(),
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
    decoupled_weight_decay: bool,
    maximize: bool,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
) -> None:
    operands, (grads, strides) = _params(params, master_lows, places), _resolved(grads)
    first = {"exp_avg_rows": exp_avg_rows, "exp_avg_cols": exp_avg_cols, "new_rows": new_rows, "new_cols": new_cols}
    states = {"exp_avg_sq_rows": exp_avg_sq_rows, "exp_avg_sq_cols": exp_avg_sq_cols}
    if exp_avg_signs is not None:
        states["exp_avg_signs"] = exp_avg_signs
    increment_version(params)
    _C.smmf_sums_step(
        **operands,
        **_grads(grads, strides, _needs_shapes(operands)),
        **({} if places is None else {"seed": seed, "step": _scalar(step)}),
        **{"sign_bytes": None, "sign_slices": None} | _factors(operands["numels"], states),
        **{name: None if tensors is None else _addresses(tensors) for name, tensors in first.items()},
        exp_avg_signs=None if exp_avg_signs is None else _addresses(exp_avg_signs),
        exp_avg_sq_rows=_addresses(exp_avg_sq_rows),
        exp_avg_sq_cols=_addresses(exp_avg_sq_cols),
        new_sq_rows=_addresses(new_sq_rows),
        new_sq_cols=_addresses(new_sq_cols),
        blocks=blocks,
        beta1=None if beta1 is None else _scalar(beta1),
        beta2=_scalar(beta2),
        lr=_scalar(lr),
        eps=eps,
        weight_decay=_scalar(weight_decay),
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        threads=torch.get_num_threads(),
    )


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


def squares(grads: Tensors) -> Tensor:
    """The sum of squares of every tensor, [len(grads)] in float64: its bits do not depend on the number of threads."""
    found = torch.zeros(len(grads), dtype=torch.float64, device="cpu")
    grads, strides = _resolved(grads)
    _C.squares(
        **_grads(grads, strides),
        numels=_numels(grads),
        sums=found.data_ptr() if len(grads) else 0,
        threads=torch.get_num_threads(),
    )
    return found


def read_steps(steps: Iterable[Tensor]) -> list[float]:
    """The values of 0-d float32 tensors."""
    return _C.read_floats(_addresses(steps))


def advance_steps_(steps: Sequence[Tensor]) -> None:
    """Adds one to 0-d float32 tensors."""
    increment_version(steps)
    _C.advance_floats(_addresses(steps))


def _params(params: Tensors, lows: Tensors | None = None, places: Sequence[Place] | None = None) -> dict[str, Any]:
    """What the extension is told of parameters, of the pieces that master weights have beside them, and of where random
    bits come from."""
    found: dict[str, Any] = {"params": _addresses(params), "numels": _numels(params), "param_dtypes": _codes(params)}
    if not all(map(Tensor.is_contiguous, params)):
        found["param_strides"] = _strides(params)
    if lows:
        found.update(master_lows=_addresses(lows), low_bytes=lows[0].element_size())
        if not all(map(Tensor.is_contiguous, lows)):
            found["low_strides"] = _strides(lows)
    if places is not None:
        found.update(positions=[place.position for place in places], place_firsts=[place.first for place in places])
        if any(place.strides is not None for place in places):
            found["place_strides"] = [place.strides for place in places]
    return found


def _needs_shapes(operands: dict[str, Any]) -> bool:
    return not operands.keys().isdisjoint(("param_strides", "low_strides", "place_strides"))


def _resolved(grads: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Gradients that are no views that negate, which the caller holds while the extension reads, and their strides,
    where there are any."""
    if all(map(Tensor.is_contiguous, grads)):
        return grads, {}
    grads = [grad.resolve_neg() for grad in grads]
    return grads, {"grad_strides": _strides(grads)}


def _grads(grads: Tensors, strides: dict[str, Any], shapes: bool = False) -> dict[str, Any]:
    """Strides need shapes, a parameter's (``shapes``) as well as a gradient's."""
    found = {"grads": _addresses(grads), "grad_dtypes": _codes(grads)} | strides
    if strides or shapes:
        found["shapes"] = [tuple(grad.shape) for grad in grads]
    return found


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
