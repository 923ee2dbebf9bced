"""The memory a step holds for a while beyond what it held before: its peak, in bytes."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hfac.backends import cpu


def peak_transient_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that one call allocates on ``device`` and has not freed at that moment.

    Call it after a first step, which makes states. On a GPU: the peak of torch's caching allocator. On the CPU: the
    peak of the running sum of torch's allocations, plus the most that an op of hfac's extension says it held, which
    torch does not see. What torch's own kernels keep on the stack or allocate behind its back is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _native_workspace() as workspace, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return _peak(profiler) + max(workspace, default=0)


def _peak(profiler: profile) -> int:
    """The peak of the running sum of a profile's allocations, read from its trace, the public form of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    running = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        running += event["args"]["Bytes"]
        peak = max(peak, running)
    return peak


@contextmanager
def _native_workspace() -> Iterator[list[int]]:
    """A list to which every op of hfac's extension adds the bytes of workspace that it held at most."""
    held: list[int] = []
    extension = cpu._C
    if extension is None:
        yield held
        return

    class Listener:
        def __getattr__(self, name: str) -> Any:
            op = getattr(extension, name)
            if not name.endswith("_step"):
                return op

            def call(**arguments: Any) -> int:
                held.append(op(**arguments))
                return held[-1]

            return call

    cpu._C = Listener()
    try:
        yield held
    finally:
        cpu._C = extension
