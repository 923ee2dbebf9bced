"""Tables that the host writes, the device reads, and CUDA graphs copy anew in every replay."""

from collections.abc import Callable

import torch
from torch import Tensor


class Staged:
    """A table in device memory, and the host memory that it is copied from.

    No host memory can be pinned while a graph is being captured, so one buffer is kept ready for a capture. What a
    replay copies must stay as it is: the next writing takes other memory.

    Args:
        dtype: of the table's elements.
        host_memory: (count) -> memory on the host that a copy to the device need not wait for.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, host_memory: Callable[[int], Tensor]) -> None:
        self._device, self._dtype, self._host_memory = device, dtype, host_memory
        self.table: Tensor | None = None
        self.source: Tensor | None = None  # on the host: what replays of a graph copy, and no step has copied yet
        self._frozen: Tensor | None = None  # the table that is in a graph
        self._spare: Tensor | None = None  # on the host, for the table of the next graph

    def can_be_captured(self, count: int) -> bool:
        """Whether a table of so many elements can be written during a capture."""
        return self._spare is not None and self._spare.numel() >= count

    def bring(self, count: int, write: Callable[[Tensor], None] | None, capturing: bool) -> Tensor:
        """The table on the device, ``count`` elements. ``write`` fills them on the host, None: nothing changed."""
        if write is not None:
            if capturing:
                host, self._spare = self._spare, None
                assert host is not None
            else:
                host = self._host_memory(count)
            write(host)
            frozen = capturing or self.table is self._frozen
            if self.table is None or frozen or self.table.numel() < count:
                self.table = torch.empty(count, dtype=self._dtype, device=self._device)
            self.source = host
        assert self.table is not None
        if self.source is not None:
            self.table[:count].copy_(self.source[:count], non_blocking=True)
        if capturing:
            self._frozen = self.table
        else:
            self.source = None
            if not self.can_be_captured(count):
                self._spare = self._host_memory(count)
        return self.table


def refused(why: str) -> RuntimeError:
    """The error of a step that cannot be part of a graph."""
    return RuntimeError(
        f"a step cannot be part of the CUDA graph that is being captured: {why}, and what it needs on the host cannot "
        "be allocated during a capture. Take one step outside of graphs first, with gradients of the same types for "
        "the same parameters and with the same options. It serves one graph, or any number whose gradients lie where "
        "it found them."
    )
