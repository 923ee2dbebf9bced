"""Launches of a plan: the first of each kernel goes through Triton, which compiles it or finds it compiled; those that
follow go straight to what came of that."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from . import table
from .plan import Launch, compile_options

_timed: list[tuple[str, float]] | None = None
#: How Triton launches what it has compiled. A version that does otherwise is left to do it.
_LAUNCH = "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata,"
_is_known = _LAUNCH in inspect.getsource(CompiledKernel.__getitem__)
#: where Triton keeps hooks around launches
_hooks: Any = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel


@contextmanager
def timed() -> Iterator[list[tuple[str, float]]]:
    """Kernels that are launched through Triton meanwhile, and the seconds until each was compiled, or found compiled,
    and launched."""
    global _timed
    before, _timed = _timed, []
    try:
        yield _timed
    finally:
        _timed = before


class Launcher:
    """Launches kernels over what lies in device memory: the records of a list (``items``), where its gradients are
    (``grad_table``), a step's numbers (``scalars``), which parameters keep their value (``flags``), and where sums of
    squares (``squares``) and what is watched of a step (``watched``) go."""

    device: torch.device
    items: Tensor
    grad_table: Tensor
    scalars: Tensor
    flags: Tensor
    squares: Tensor | None = None
    watched: Tensor | None = None

    def run(
        self, launches: Sequence[Launch], tiles: Sequence[Tensor], options: Mapping[str, bool]
    ) -> list[Callable[[], None] | None]:
        """``options``: of the step, by name (`table`); ``tiles``: a table for each launch. Returns what repeats each
        launch, on the same memory; None for one that went through Triton."""
        return [
            self._launch(launch, mine, options)
            for launch, mine in zip(launches, tiles, strict=True)
            if not launch.when or any([options[name] for name in launch.when])
        ]

    def _launch(self, launch: Launch, tiles: Tensor, options: Mapping[str, bool]) -> Callable[[], None] | None:
        """Triton compiles a kernel for its constants and for whether each address is a multiple of 16."""
        memory = self._memory(launch, tiles)
        addresses = [tensor.data_ptr() for tensor in memory]
        key = *[options[name] for name in launch.options], *[address % 16 for address in addresses]
        known = launch.compiled.get(key)
        if known is not None:
            again = known(*addresses)
            again()
            return again
        constants = launch.constants | {name: options[name] for name in launch.options}
        maker = "hip" if torch.version.hip else self.device.type
        given = dict(zip(launch.memory, memory, strict=True)) | constants
        begin = time.perf_counter()
        found = launch.kernel[(len(launch.tiles),)](**given, **compile_options(constants, launch.warps, maker))
        if _timed is not None:
            _timed.append((launch.name, time.perf_counter() - begin))
        if isinstance(found, CompiledKernel):  # the interpreter finds nothing, nor does a hook that stops Triton
            launch.compiled[key] = launched_by(found, launch, constants)
        return None

    def _memory(self, launch: Launch, tiles: Tensor) -> list[Tensor]:
        """What the kernel is told the addresses of, in order."""
        memory = {
            "tiles": tiles,
            "items": self.items,
            "grads": self.grad_table,
            "scalars": self.scalars,
            "flags": self.flags,
            "squares": self.squares,
            "watched": self.scalars if self.watched is None else self.watched,  # a kernel that watches nothing has both
        }
        return [memory[name] for name in launch.memory]

    def scale(self, numbers: Mapping[str, Any]) -> None:
        """Copies a GradScaler's tensors."""
        if numbers.get("grad_scale") is not None:
            at = table.GRAD_SCALE.value
            self.scalars[at : at + 1].copy_(numbers["grad_scale"])
        if numbers.get("found_inf") is not None:
            self.flags.add_(numbers["found_inf"].reshape(()) != 0)


def launched_by(
    compiled: CompiledKernel, launch: Launch, constants: Mapping[str, Any]
) -> Callable[..., Callable[[], None]]:
    """Given addresses, what launches a compiled kernel over them on the stream that is current then. What
    `JITFunction.run` does before takes ten times as long: it asks what the kernel is to be compiled for, and compares
    every global that it names. Launches that somebody observes are Triton's own."""
    grid = len(launch.tiles), 1, 1
    through = compiled[grid]
    others = [constants[name] for name in launch.kernel.arg_names if name in constants]

    def bound(*addresses: int) -> Callable[[], None]:
        if not _is_known or observed():
            return partial(through, *addresses, *others)
        known = compiled.function, compiled.packed_metadata, None, None, None  # of which the last three are for hooks
        return partial(compiled.run, *grid, current_stream(), *known, *addresses, *others)

    return bound


def observed() -> bool:
    """Whether Triton is to tell somebody of launches, such as a profiler."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def current_stream() -> Any:
    """The current device's, as Triton takes it."""
    driver = triton.runtime.driver.active
    return driver.get_current_stream(driver.get_current_device())
