"""Whether a backend computes what the reference computes: steps from the same state, compared within rounding.

`differences` asks it of whole steps of an optimizer (`hfac doctor --check`); the benchmarks compare single ops with
`param_difference` and `state_difference` before they time them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import ops, rounding, schedules, spec
from .signs import unpack_signs

Shape = tuple[int, ...]

#: Two orders of summation differ by rounding: bound relative to the largest magnitude that enters a sum.
_SUMS = {torch.float32: 4e-6, torch.float64: 1e-13}
#: Bound of a parameter's change, relative to the largest change of its tensor.
_CHANGE = {torch.float32: 2e-5, torch.float64: 1e-12}
#: Share of the elements that may round to the other neighbour in a type of 8 or 16 bits.
_ROUNDED_APART = 1e-3
_CPU = torch.device("cpu")


class Difference(NamedTuple):
    """Where a backend's step is not the reference's.

    Attributes:
        op: the op of `hfac.ops` that made the step; None where the step raised, which no single op need have done.
        shape: of the parameter; None likewise.
        step: number of the step, from 1.
        what: what differs, and by how much.
    """

    op: str | None
    shape: Shape | None
    step: int
    what: str

    def __str__(self) -> str:
        where = "" if self.op is None else f"{self.op}, shape {'x'.join(map(str, self.shape or ())) or 'scalar'}, "
        return f"{where}step {self.step}: {self.what}"


def gradient(shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of very different scales, with some zeros, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device=_CPU)
    scale = 10.0 ** torch.randint(-3, 2, shape, generator=generator, device=_CPU)
    zero = torch.rand(shape, generator=generator, device=_CPU) < 0.05
    return (values * scale).masked_fill(zero, 0.0).to(dtype)


def differences(
    optimizer: Callable[..., Any],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    steps: int = 3,
    slack: float = 1.0,
    **options: Any,
) -> list[Difference]:
    """Makes steps of one list of parameters with ``backend`` on ``device``, and with the reference on the CPU.

    Every step starts from the reference's parameters and state, so that a difference is that of one step. With
    nonfinite="skip" every third parameter's gradient holds an inf in the second step.

    Args:
        optimizer: `hfac.HFac` or `hfac.SMMF`.
        slack: times the bounds that rounding has.
        options: of the optimizer.

    Returns:
        The first difference of every op, or what the step raised; empty where all agree.
    """
    theirs = [Parameter(gradient(shape, i, dtype)) for i, shape in enumerate(shapes)]
    ours = [Parameter(param.detach().to(device, copy=True)) for param in theirs]
    found: dict[str | None, Difference] = {}
    step = 0
    try:
        mine, reference = optimizer(ours, backend=backend, **options), optimizer(theirs, backend="reference", **options)
        for step in range(1, steps + 1):
            finite = _start(step, mine, ours, reference, theirs, dtype)
            before = [(param.detach().clone(), _copied(reference.state[param])) for param in theirs]
            grads = [param.grad.clone() for param in theirs if param.grad is not None]  # clipping multiplies in place
            mine.step()
            reference.step()
            for i, (param, twin, (old, state)) in enumerate(zip(ours, theirs, before, strict=True)):
                op = _op(optimizer, state)
                what = (
                    None
                    if op in found
                    else _difference(mine, param, reference, twin, old, state, grads[i], step, slack)
                )
                if what is None and not finite[i] and not torch.equal(twin.detach(), old):
                    what = "a parameter whose gradient is not finite has moved"
                if what is not None:
                    found.setdefault(op, Difference(op, shapes[i], step, what))
    except Exception as error:  # whatever it raises, it has not computed the step
        found[None] = Difference(None, None, step, f"raised {type(error).__name__}: {error}")
    return list(found.values())


def _start(
    step: int,
    mine: torch.optim.Optimizer,
    ours: Sequence[Tensor],
    reference: torch.optim.Optimizer,
    theirs: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[bool]:
    """Gives both the same parameters, states and gradients; says which gradients are finite."""
    skips = mine.defaults["nonfinite"] == "skip"
    finite = []
    for i, (param, twin) in enumerate(zip(ours, theirs, strict=True)):
        grad = gradient(tuple(twin.shape), 100 * step + i, dtype)
        if skips and step == 2 and i % 3 == 1 and grad.numel():
            grad.view(-1)[-1] = float("inf")
        finite.append(bool(grad.isfinite().all()))
        param.data.copy_(twin.data)
        for key, value in reference.state[twin].items():
            mine.state[param][key].copy_(value)
        param.grad, twin.grad = grad.to(param.device, copy=True), grad
    return finite


def _difference(
    mine: torch.optim.Optimizer,
    param: Tensor,
    reference: torch.optim.Optimizer,
    twin: Tensor,
    old: Tensor,
    old_state: Mapping[str, Tensor],
    grad: Tensor,
    step: int,
    slack: float,
) -> str | None:
    """What differs in one parameter and its state after a step."""
    group = reference.param_groups[0]
    beta1 = schedules.smmf_decay_first(step, group["beta"], group["growth_rate"]) if group.get("beta") else 0.0
    state = {key: value.cpu() for key, value in mine.state[param].items() if isinstance(value, Tensor)}
    weights = param.detach().cpu(), twin.detach(), old
    ulp = None
    if "master_low" in state:
        lows = state["master_low"], reference.state[twin]["master_low"], old_state["master_low"]
        new, wanted, before = (rounding.join(weight, low) for weight, low in zip(weights, lows, strict=True))
        weights = new, wanted, before
        ulp = torch.finfo(torch.bfloat16).eps / 2 ** (8 * lows[0].itemsize)
    what = param_difference(*weights, ulp=ulp, slack=slack)
    for key, value in reference.state[twin].items():
        if key == "master_low":
            continue
        if key in ("step", "skipped"):
            wrong = None if torch.equal(state[key], value) else f"{key} is {state[key].item()}, not {value.item()}"
        else:
            wrong = state_difference(key, state[key], value, old_state, grad, beta1, slack)
        what = what or wrong
    return what


def _op(optimizer: Any, state: Mapping[str, Tensor]) -> str:
    """The op of `hfac.ops` that steps a parameter with this state."""
    return spec.ALGORITHMS[optimizer._algorithm].op_of(list(state)).name


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def param_difference(
    ours: Tensor, theirs: Tensor, before: Tensor, ulp: float | None = None, slack: float = 1.0
) -> str | None:
    """How a parameter differs from the reference's after one step that both began at ``before``; None where it does so
    by rounding at most. All have one shape, dtype and device. ``ulp``: how far neighbouring values lie apart, relative
    to them; None for the dtype's own. ``slack``: times the bound of the change."""
    if theirs.numel() == 0:
        return None
    wide = ops.state_dtype(theirs.dtype)
    ulp = torch.finfo(theirs.dtype).eps if ulp is None else ulp
    ours, theirs = ours.to(wide), theirs.to(wide)
    error = (ours - theirs).abs()
    bound = slack * _CHANGE[wide] * (theirs - before.to(wide)).abs().max()
    if not (error <= bound + ulp * theirs.abs()).all():
        return f"the parameter is off by up to {error.max():.3g} in magnitudes of up to {theirs.abs().max():.3g}"
    apart = int((error > bound + torch.finfo(wide).eps * theirs.abs()).sum())
    if apart > 1 + _ROUNDED_APART * error.numel():
        return f"{apart} of the parameter's {error.numel()} elements are rounded otherwise"
    return None


def state_difference(
    key: str, ours: Tensor, theirs: Tensor, old: Mapping[str, Tensor], grad: Tensor, beta1: Any, slack: float = 1.0
) -> str | None:
    """How a factor, a moment, its codes or the signs differ from the reference's after one step; None where by rounding
    at most.

    Args:
        key: name in the state.
        old: the state before the step.
        grad: the step's gradient.
        beta1: the step's decay of the first moment; read for SMMF's signs.
        slack: times the bound.
    """
    if grad.numel() == 0:  # a factor of an empty matrix may yet have entries
        return None if torch.equal(ours, theirs) else f"{key} of an empty parameter has changed"
    described = next(s for algorithm in spec.ALGORITHMS.values() for s in algorithm.states if s.key == key)
    if described.size == spec.SIGNS:
        wrong = _signs(ours, grad) != _signs(theirs, grad)
        flipped = int(wrong.logical_and(_decided(old, grad, beta1)).sum())
        return f"{flipped} signs of the first moment are wrong" if flipped else None
    if described.least is not None:
        off = (ours.int() - theirs.int()).abs()
        apart, most = int(off.count_nonzero()), int(off.max())
        if most <= 1 and apart <= 1 + _ROUNDED_APART * off.numel():
            return None
        return f"{apart} of {off.numel()} codes of {key} are off by up to {most}"
    scale = theirs.abs().max()
    if described.moment == 2 or described.size == spec.WHOLE:
        largest = scale
    else:
        largest = torch.maximum(scale, grad[grad.isfinite()].abs().max().to(theirs.dtype))  # means may cancel
    error = (ours - theirs).abs().max()
    if not error <= slack * _SUMS[theirs.dtype] * largest:
        return f"{key} is off by up to {error:.3g} in magnitudes of up to {scale:.3g}"
    return None


def _signs(packed: Tensor, grad: Tensor) -> Tensor:
    return unpack_signs(packed, grad.shape).flatten()


def _decided(old: Mapping[str, Tensor], grad: Tensor, beta1: Any) -> Tensor:
    """bool [numel]: where SMMF's new first moment is further from zero than its rounding, so that its sign is
    certain."""
    states = (spec.SMMF_STEP.operand(1, size) for size in (spec.ROWS, spec.COLS, spec.SIGNS))
    row, col, sign = (old[state.key] for state in states if state is not None and state.key is not None)
    magnitude = beta1 * torch.outer(row, col).double().flatten()
    past = torch.where(_signs(sign, grad), magnitude, -magnitude)
    fresh = (1 - beta1) * grad.double().flatten()
    slack = 4 * torch.finfo(row.dtype).eps
    return (past + fresh).abs() > slack * (past.abs() + fresh.abs())
