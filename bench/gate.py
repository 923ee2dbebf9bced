"""The parity gate: an op is timed only after it has agreed with the reference, in this run and on this machine."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench.contestants import defaults, op_operands, op_scalars, optimizer_of
from bench.shapes import Shape, cases
from hfac import ops
from hfac.reference import unpack_signs

STEPS = 3
#: The tests' hostile shapes, and one that is large enough for several threads and chunks.
SHAPES: list[Shape] = [*cases.SHAPES, (520, 1030)]
#: Two orders of summation differ by rounding: bound relative to the largest magnitude that enters a sum.
_SUMS = {torch.float32: 4e-6, torch.float64: 1e-13}
#: Bound of a parameter's change, relative to the largest change of its tensor.
_CHANGE = {torch.float32: 2e-5, torch.float64: 1e-12}
#: Share of the elements that may round to the other neighbour in a 16-bit type.
_ROUNDED_APART = 1e-3


def why_red(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None if the op of this backend agrees with the reference over three steps, each from the reference's state, on
    the hostile shapes and with no option at its neutral value; else where it does not."""
    options = defaults(optimizer_of(op), **cases.OPTIONS[optimizer_of(op)]["all"])
    params = [Parameter(cases.gradient(shape, 0, dtype).to(device)) for shape in SHAPES]
    theirs, states = op_operands(op, params)
    ours = [param.detach().clone() for param in theirs]
    twins = {name: [tensor.clone() for tensor in tensors] for name, tensors in states.items()}
    for step in range(1, STEPS + 1):
        grads = [cases.gradient(tuple(param.shape), step, dtype).to(device) for param in theirs]
        before = [param.detach().clone() for param in theirs]
        old = {name: [tensor.clone() for tensor in tensors] for name, tensors in states.items()}
        for mine, reference in [(ours, before), *((twins[name], old[name]) for name in old)]:
            for target, source in zip(mine, reference, strict=True):
                target.copy_(source)
        scalars = op_scalars(op, float(step), options)
        with torch.no_grad():
            getattr(ops, op)(theirs, grads, **states, **scalars, backend="reference")
            try:
                getattr(ops, op)(ours, grads, **twins, **scalars, backend=backend)
            except Exception as error:  # whatever it raises, it has not computed the step
                return f"step {step} raised {type(error).__name__}: {error}"
        for i, param in enumerate(theirs):
            row = {name: tensors[i] for name, tensors in old.items()}
            wrong = _param_differs(ours[i], param.detach(), before[i])
            for name in states:
                wrong = wrong or _state_differs(name, twins[name][i], states[name][i], row, grads[i], scalars)
            if wrong:
                return f"step {step}, shape {cases.shape_id(tuple(param.shape))}: {wrong}"
    return None


def _param_differs(ours: Tensor, theirs: Tensor, before: Tensor) -> str | None:
    if theirs.numel() == 0:
        return None
    wide = ops.state_dtype(theirs.dtype)
    ours, theirs, ulp = ours.to(wide), theirs.to(wide), torch.finfo(theirs.dtype).eps
    error = (ours - theirs).abs()
    slack = _CHANGE[wide] * (theirs - before.to(wide)).abs().max()
    if not (error <= slack + ulp * theirs.abs()).all():
        return f"the parameter is off by up to {error.max():.3g} in magnitudes of up to {theirs.abs().max():.3g}"
    apart = int((error > slack + torch.finfo(wide).eps * theirs.abs()).sum())
    if apart > 1 + _ROUNDED_APART * error.numel():
        return f"{apart} of the parameter's {error.numel()} elements are rounded otherwise"
    return None


def _state_differs(
    name: str, ours: Tensor, theirs: Tensor, old: dict[str, Tensor], grad: Tensor, scalars: dict[str, Any]
) -> str | None:
    if grad.numel() == 0:  # a factor of an empty matrix may yet have entries
        return None if torch.equal(ours, theirs) else f"{name} of an empty parameter has changed"
    if name == "exp_avg_signs":
        flipped = int((_signs(ours, grad) != _signs(theirs, grad)).logical_and(_decided(old, grad, scalars)).sum())
        return f"{flipped} signs of the first moment are wrong" if flipped else None
    scale = theirs.abs().max()
    if name.startswith("exp_avg_sq") or name == "exp_avgs":
        largest = scale
    else:
        largest = torch.maximum(scale, grad.abs().max().to(theirs.dtype))  # means of both signs may cancel
    error = (ours - theirs).abs().max()
    if not error <= _SUMS[theirs.dtype] * largest:
        return f"{name} is off by up to {error:.3g} in magnitudes of up to {scale:.3g}"
    return None


def _signs(packed: Tensor, grad: Tensor) -> Tensor:
    return unpack_signs(packed, grad.shape).flatten()


def _decided(old: dict[str, Tensor], grad: Tensor, scalars: dict[str, Any]) -> Tensor:
    """bool [numel]: where SMMF's new first moment is further from zero than its rounding, so that its sign is
    certain."""
    magnitude = scalars["beta1"] * torch.outer(old["exp_avg_rows"], old["exp_avg_cols"]).double().flatten()
    past = torch.where(_signs(old["exp_avg_signs"], grad), magnitude, -magnitude)
    fresh = (1 - scalars["beta1"]) * grad.double().flatten()
    rounding = 4 * torch.finfo(old["exp_avg_rows"].dtype).eps
    return (past + fresh).abs() > rounding * (past.abs() + fresh.abs())
