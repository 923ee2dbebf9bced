"""What watched steps did to sharded parameters, of which each rank knows its shards'."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import spec
from .bucket import Entries, Entry, Joint

#: of the numbers of a watched step those that are sums over elements; rows and columns that are zero are not
SUMS = 3


class Watched(Entries):
    """The sums of the watched parameters of one mesh, added up over its ranks."""

    def __init__(self, entries: Sequence[Entry], device: torch.device) -> None:
        super().__init__(entries, torch.float64, device)
        self.joint = Joint([entry.param for entry in entries])

    @property
    def bytes(self) -> int:
        return SUMS * len(self.entries) * self.dtype.itemsize

    def of(self, found: Mapping[Entry, Tensor]) -> dict[Tensor, Tensor]:
        """By parameter that has been watched, its numbers, the same on every rank; those of rows and columns are NaN.

        Args:
            found: those of this rank's shards.
        """
        numbers = torch.zeros(len(self.entries), SUMS, dtype=self.dtype, device=self.device)
        for row, entry, contributes in zip(numbers, self.entries, self.joint.contributes, strict=True):
            if contributes and entry in found:
                row.copy_(found[entry][:SUMS])
        for stage in self.joint.stages:
            stage.run(numbers)
        rows = torch.full((len(self.entries), spec.WATCHED), torch.nan, dtype=self.dtype, device=self.device)
        rows[:, :SUMS] = numbers
        return {entry.param: row for entry, row in zip(self.entries, rows, strict=True) if entry in found}


def by_mesh(entries: Sequence[Entry], device: torch.device) -> list[Watched]:
    """In an order that is the same on every rank."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.param.device_mesh, []).append(entry)  # type: ignore[attr-defined]
    return [Watched(mine, device) for mine in found.values()]
