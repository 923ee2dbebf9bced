"""Where kernels run: pinned host memory, the current stream and device, and whether a CUDA graph is being captured."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def host_memory(device: torch.device, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Memory that a copy to the device need not wait for. torch's allocator of pinned memory does not hand a buffer
    out again before the copies from it are done."""
    return torch.empty(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured, in whose replays what is launched now will run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> Any:
    """The device's current stream; None where it has none."""
    return None if device.type == "cpu" else getattr(torch, device.type).current_stream(device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """The device made current, and with it the stream that torch uses there."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
