"""The kernels that one call launches on a GPU."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities


def count(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels of one call, copies and fills of memory not among them; None where there is no GPU to launch on, or
    torch's profiler sees none.

    Call it after a first step, which makes states.
    """
    if device.type != "cuda" or ProfilerActivity.CUDA not in supported_activities():
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events()
    )
