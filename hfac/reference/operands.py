"""What the ops of all optimizers do with a parameter and its gradient: how they are read, refused, watched, written."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import rounding
from ..rounding import BitOffset
from ..schedules import Scalar


class Stored:
    """A parameter as it is stored: what is read as W, and what becomes of the new one."""

    def __init__(
        self,
        param: Tensor,
        i: int,
        master_lows: Sequence[Tensor] | None,
        places: Sequence[BitOffset] | None,
        seed: int,
        step: Scalar,
    ) -> None:
        self.param, self._seed, self._step = param, seed, entry(step, i)
        self._low = None if master_lows is None else master_lows[i]
        self._offset = None if places is None else places[i]

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.param.to(dtype) if self._low is None else rounding.join(self.param, self._low)

    def nearest(self, new: Tensor) -> Tensor:
        """What is read of new weights once they are stored, rounded to the nearest."""
        if self._low is None:
            return new.to(self.param.dtype).to(new.dtype)
        return rounding.join(*rounding.split(new, self._low.dtype))

    def write(self, new: Tensor, keep: Tensor | None) -> None:
        new, param = new.view(self.param.shape), self.param
        bits = None
        if self._offset is not None:
            bits = rounding.random_bits(self._offset, param.shape, self._seed, self._step, param.device)
        if self._low is not None:
            new, low = rounding.split(new, self._low.dtype, bits)
            write(self._low, low, keep)
        elif bits is not None:
            new = rounding.stochastic(new, param.dtype, bits)
        write(param, new, keep)


def operands(
    stored: Stored, grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype, maximize: bool
) -> tuple[Tensor, Tensor]:
    """Parameter and gradient as row-major matrices (or vectors) of the arithmetic's type.

    The gradient is made contiguous because torch's order of summation follows the strides."""
    G = grad.reshape(shape).to(dtype).contiguous()
    return stored.read(dtype).reshape(shape), -G if maximize else G


def entry(decay: Scalar, i: int) -> Scalar:
    return decay[i] if isinstance(decay, Tensor) and decay.ndim == 1 else decay


def must_keep(G: Tensor, nonfinite: Tensor | None, i: int) -> Tensor | None:
    """0-d bool: the parameter must keep its value; None where the caller did not ask. Nothing is read back to the
    host."""
    if nonfinite is None:
        return None
    keep = ~(G * G * G.numel()).isfinite().all()
    nonfinite[i] = keep
    return keep


def write(old: Tensor, new: Tensor, keep: Tensor | None) -> None:
    new = new.view(old.shape).to(old.dtype)
    old.copy_(new if keep is None else torch.where(keep, old, new))


def watch(row: Tensor, stored: Stored, new: Tensor, direction: Tensor, keep: Tensor | None, *zeros: Tensor) -> None:
    """Adds to a row of `watched`, before the new weights are written."""
    old = stored.read(new.dtype).reshape(new.shape)
    sums = [(new - old).double().square().sum(), (stored.nearest(new) == old).sum(), direction.double().square().sum()]
    numbers = torch.stack([number.double() for number in (*sums, *zeros)])
    row[: len(numbers)] += numbers if keep is None else torch.where(keep, 0, numbers)
