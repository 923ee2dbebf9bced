"""The norm of sharded gradients: two numbers per parameter, its square and on how many ranks there is a gradient, added
up over the ranks of a mesh in one all-reduce."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import clipping, schedules
from . import layout
from .bucket import Entry, ranks_that_share, who


class Norms:
    """The gradients' norms of parameters on one mesh. As in `smmf.Parts`, sums go over all mesh dimensions that cut any
    of them, and where a parameter is not cut in one of these, one rank speaks for its copies."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        mesh = entries[0].param.device_mesh  # type: ignore[attr-defined]
        cuts = [set(sum(layout.cuts(entry.param), [])) for entry in entries]
        dims = sorted(set().union(*cuts))
        coordinate = mesh.get_coordinate()
        self.joint = layout.joint_group(mesh, dims)
        self.speaks = [all(coordinate[d] == 0 for d in dims if d not in own) for own in cuts]
        self.ranks = [ranks_that_share(entry.param) for entry in entries]
        self.device = layout.local(entries[0].param).device
        #: sums of squares, which overflow before norms do
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
        here = [i for i, speaks in enumerate(self.speaks) if speaks and grads[i] is not None]
        numbers = torch.zeros(2, len(grads), dtype=self.dtype, device=self.device)
        squares, present = numbers
        if here:
            norms = clipping.norms([grad for i in here if (grad := grads[i]) is not None])
            squares[here] = torch.stack([norm.to(self.dtype) for norm in norms]).square()
            present[here] = 1
        dist.all_reduce(numbers, group=self.joint)
        who(self.entries, present.tolist(), self.ranks)
        double = any(entry.param.dtype == torch.float64 for entry in self.entries)
        return list(squares.sqrt().to(torch.float64 if double else torch.float32).unbind())


def by_mesh(entries: Sequence[Entry]) -> list[Norms]:
    """In an order that is the same on every rank."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.param.device_mesh, []).append(entry)  # type: ignore[attr-defined]
    return [Norms(mine) for mine in found.values()]
