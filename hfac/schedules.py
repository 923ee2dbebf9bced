"""Step scalars of both algorithms, in double precision.

Each function takes the step t (counted from 1) as a float, evaluated on the host, or as a tensor of any shape,
evaluated on its device in float64 (with ``capturable=True`` the step is on the device). Both give the same bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import staging

Scalar = float | Tensor
T = TypeVar("T", float, Tensor)


class Steps(NamedTuple):
    """The numbers of steps on a device and of those before them, for decays that depend on both: one operation.

    Attributes:
        both: [2, 1, parameters]: of the steps before, and of these.
    """

    both: Tensor

    @property
    def before(self) -> Tensor:
        return self.both[0, 0]

    @property
    def now(self) -> Tensor:
        return self.both[1, 0]


def hfac_decay(step: T, beta: float) -> T:
    """beta (1 - beta^(t-1)) / (1 - beta^t): 0 at t = 1, so the first step forgets the zero state (H-Fac, Algorithm
    1)."""
    return beta * (1.0 - beta ** (step - 1.0)) / (1.0 - beta**step)


def hfac_decays(step: Scalar | Steps, betas: Sequence[float]) -> list[Any]:
    """`hfac_decay` of every beta; of steps on a device, in as many operations as one beta takes."""
    if isinstance(step, Steps):
        both = step.both
    elif type(step) is Tensor and step.ndim == 1:
        both = step + _constants((-1.0, 0.0), 3, step.device, step.dtype)
    else:
        alone: Any = step
        return [hfac_decay(alone, beta) for beta in betas]
    each = _constants(tuple(betas), 2, both.device, both.dtype)
    before, now = torch.rsub(each.pow(both), 1.0).unbind()
    return list(before.mul_(each).div_(now).unbind())


def following(made: Tensor) -> Tensor | Steps:
    """The numbers of the steps that follow so many: float32 [parameters], in the type that scalars are evaluated in."""
    dtype = step_dtype(made.device)
    if type(made) is not Tensor:  # such as a fake tensor, beside which no other can be
        return made.to(dtype) + 1
    return Steps(made + _constants((0.0, 1.0), 3, made.device, dtype))


class DecayRule(NamedTuple):
    """How both decays follow from the number of a step, and the rule's numbers.

    Attributes:
        name: "hfac": `hfac_decay` of ``first`` and ``second``; "smmf": `smmf_decay_first` of ``first`` and ``growth``,
            and `smmf_decay_second` of ``second``.
    """

    name: str
    first: float
    second: float
    growth: float


class Decays:
    """Memory of the decays of so many parameters' steps, which the device counts.

    Attributes:
        rows: [parameters] each: decays of the first moment, of the second, and numbers of the steps.
    """

    def __init__(self, parameters: int, dtype: torch.dtype, device: torch.device) -> None:
        rows = torch.empty(4, parameters, dtype=dtype, device=device)
        first, second, self._before, now = rows.unbind()
        self.rows = first, second, now
        self._pair, self._both = rows[:2], rows[2:].unsqueeze(1)
        self._powers = torch.empty(2, 2, parameters, dtype=dtype, device=device)
        self._of_before, self._of_now = self._powers.unbind()
        self._steps, self._one = _constants((0.0, 1.0), 3, device, dtype), _constants((1.0,), 1, device, dtype)

    def find(self, rule: DecayRule, made: Tensor) -> None:
        """Of the steps that follow ``made``, with the bits of the functions above, in five operations."""
        (first, second, now), both, one = self.rows, self._both, self._one
        torch.add(made, self._steps, out=both)
        if rule.name == "hfac":
            powers, of_before = self._powers, self._of_before
            betas = _constants((rule.first, rule.second), 2, both.device, both.dtype)
            torch.pow(betas, both, out=powers)
            torch.sub(one, powers, out=powers)
            torch.div(of_before.mul_(betas), self._of_now, out=self._pair)
        elif rule.name == "smmf":
            torch.pow(rule.growth, self._before, out=first)
            first.mul_(rule.first)
            torch.pow(now, rule.second, out=second)
            torch.sub(one, second, out=second)
        else:
            raise ValueError(f"rule: 'hfac' or 'smmf' is needed, not {rule.name!r}")


#: numbers -> where they lie on a device. They stay, because graphs may read them.
_kept: dict[tuple[tuple[float, ...], int, torch.device, torch.dtype], Tensor] = {}
_MOST = 64


def _constants(values: tuple[float, ...], ndim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """These numbers along the first of so many dimensions. While a graph is captured nothing comes from the host."""
    key = values, ndim, device, dtype
    found = _kept.get(key)
    if found is not None:
        return found
    shape = (len(values), *[1] * (ndim - 1))
    if staging.capturing(device) or len(_kept) >= _MOST:
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values]).view(shape)
    found = torch.tensor(values, dtype=dtype, device="cpu").view(shape).to(device)
    _kept[key] = found
    return found


def smmf_decay_first(step: Scalar | Steps, beta: float, growth_rate: float) -> Any:
    """beta * growth_rate^(t-1): the decay of SMMF's first moment (SMMF, Algorithm 1)."""
    return beta * growth_rate ** (step.before if isinstance(step, Steps) else step - 1.0)


def smmf_decay_second(step: Scalar | Steps, decay_rate: float) -> Any:
    """1 - t^decay_rate: the decay of SMMF's second moment, 0 at t = 1 (SMMF, Algorithm 1)."""
    return 1.0 - (step.now if isinstance(step, Steps) else step) ** decay_rate


def as_scalar(name: str, value: Scalar) -> Scalar:
    """A float where reading it takes no device synchronisation, else a 0-d float64 tensor on its device.

    In float64, products such as 1 - lr * weight_decay equal those computed on the host.

    Raises:
        TypeError: ``value`` is neither a number nor a tensor; the message contains ``name``.
    """
    if value.__class__ is float:  # as nearly every one is
        return value
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else value.to(step_dtype(value.device)).reshape(())
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {value!r}")
    return float(value)


def step_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64
