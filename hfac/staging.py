"""Memory that host and device exchange: tables that the host writes and CUDA graphs copy anew in every replay, and
numbers on their way, for which neither waits."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

_C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device's current stream is captured in a CUDA graph: nothing can be waited for
    then, and no number fetched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Fetched:
    """Numbers on their way from the device to the host: the copy is queued behind what has been queued before, and only
    reading them waits for it.

    Args:
        numbers: 1-d, float32 or float64, contiguous. On the host they are there at once, and must stay as they are
            until they are read.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.is_here = numbers.is_cpu
        self._host = numbers
        if not self.is_here:
            self._host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            device = torch.get_device_module(numbers.device)
            self._copied = device.Event()
            self._copied.record(device.current_stream(numbers.device))

    def read(self) -> list[float]:
        if not self.is_here:
            self._copied.synchronize()
        return on_host(self._host)


def on_host(numbers: Tensor) -> list[float]:
    """The values of a contiguous float32 or float64 tensor on the host, read without an operation of torch."""
    values = _C_TYPES[numbers.dtype] * numbers.numel()
    return list(values.from_address(numbers.data_ptr())) if numbers.numel() else []


def write(numbers: Tensor, values: list[float]) -> None:
    """Writes values to a contiguous float64 tensor on the host, without an operation of torch."""
    found = (ctypes.c_double * len(values))(*values)
    ctypes.memmove(numbers.data_ptr(), found, ctypes.sizeof(found))


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device, which is handed them without waiting; of the device, the same tensor."""
    here = device.type == "cpu" or not numbers.is_cpu
    return numbers if here else numbers.pin_memory().to(device, non_blocking=True)


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
