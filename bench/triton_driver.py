"""A driver for Triton where there is no GPU: kernels are compiled for one that is named, and launches are handed to a
function instead. What Triton does on the host is all there.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

#: What a launch is told before the kernel's arguments: grid, stream, function, metadata and hooks.
_BEFORE = 9


class Driver:
    """What Triton asks of the active driver. ``launched``: takes a kernel's name, its grid and its arguments."""

    def __init__(
        self, target: GPUTarget, launched: Callable[[str, tuple[int, int, int], tuple[Any, ...]], None]
    ) -> None:
        self.target, self.launched = target, launched
        self.device = 99  # no GPU has this index, and none takes what is compiled for it for its own
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "warpSize": target.warp_size},
            load_binary=self._loaded,
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*given: Any) -> None:  # Triton keeps kernels for longer than drivers
            triton.runtime.driver.active.launched(metadata.name, given[:3], given[_BEFORE:])

        return launch

    def _loaded(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills; and of later versions the most threads."""
        more = "n_max_threads" in inspect.getsource(CompiledKernel._init_handles)
        return (0, 0, 0, 0, 1024) if more else (0, 0, 0, 0)


@contextmanager
def active(
    target: GPUTarget, launched: Callable[[str, tuple[int, int, int], tuple[Any, ...]], None] = lambda *of: None
) -> Iterator[Driver]:
    """Such a driver in place of the machine's, for Triton not in its interpreter."""
    driver = triton.runtime.driver
    before = dict(vars(driver))
    made = Driver(target, launched)
    driver.set_active(made)
    try:
        yield made
    finally:
        vars(driver).update(before)  # `reset_active` would look for a GPU
