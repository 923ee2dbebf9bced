"""Counts of the steps of sharded parameters that the device keeps: the host knows neither how many steps were made nor,
while it hands the device one, whether that will be made."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .lists import Members


class DeviceCounts:
    """The counts of some parameters.

    Args:
        steps: of each, 0-d float32, how many steps it has made.
        skipped: likewise 0-d int32, how many were left out; None where nobody counts them.
        may_move: as of `ops.DeviceCounters`.
    """

    def __init__(self, steps: Sequence[Tensor], skipped: Sequence[Tensor] | None, may_move: bool) -> None:
        self._made = ops.DeviceCounters(steps, may_move)
        self._left = None if skipped is None else ops.DeviceCounters(skipped, may_move)

    def holds(self) -> bool:
        """They lie where they lay."""
        return self._made.holds() and (self._left is None or self._left.holds())

    def made(self) -> Tensor:
        """[parameters], float32, which is not to be written."""
        return self._made.values()

    def advance(self, who: Members, forbidden: Tensor | None = None, refused: Tensor | None = None) -> None:
        """Counts a step of some of them. 0-d tensors, not read: whether ``forbidden`` it was not made, and whether
        ``refused`` it counts as skipped."""
        if who.all and forbidden is None:
            self._made.add_(1)
        elif who.index:
            made = who.flags if forbidden is None else who.flags * (forbidden == 0)
            self._made.add_(made.to(torch.float32))
        if self._left is not None and refused is not None and who.index:
            self._left.add_((who.flags * refused).to(torch.int32))
