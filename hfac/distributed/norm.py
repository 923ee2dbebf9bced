"""The norm of sharded gradients, from one all-reduce per mesh of two numbers per parameter: the sum of squares, and on
how many ranks there is a gradient."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import clipping, schedules
from . import layout
from .bucket import Entry, Joint, ranks_that_share, who


class Norms:
    """The norms of the gradients of parameters on one mesh."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.joint = Joint(entries)
        self.ranks = [ranks_that_share(entry.param) for entry in entries]
        self.device = layout.local(entries[0].param).device
        #: of sums of squares, which overflow before norms do
        self.dtype = schedules.step_dtype(self.device)

    @property
    def bytes(self) -> int:
        return 2 * len(self.entries) * self.dtype.itemsize

    def of(self) -> list[Tensor]:
        """By parameter, the same on every rank; 0 where there is no gradient.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient.
        """
        grads = [layout.gradient(entry.param, entry.label) for entry in self.entries]
        here = [i for i, contributes in enumerate(self.joint.contributes) if contributes and grads[i] is not None]
        numbers = torch.zeros(2, len(grads), dtype=self.dtype, device=self.device)
        squares, present = numbers
        if here:
            norms = clipping.norms([grad for i in here if (grad := grads[i]) is not None])
            squares[here] = torch.stack([norm.to(self.dtype) for norm in norms]).square()
            present[here] = 1
        dist.all_reduce(numbers, group=self.joint.group)
        who(self.entries, present.tolist(), self.ranks)
        double = any(entry.param.dtype == torch.float64 for entry in self.entries)
        return list(clipping.roots(squares, torch.float64 if double else torch.float32).unbind())


def by_mesh(entries: Sequence[Entry]) -> list[Norms]:
    """In an order that is the same on every rank."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.param.device_mesh, []).append(entry)  # type: ignore[attr-defined]
    return [Norms(mine) for mine in found.values()]
