"""Launches of a plan: the first of each kernel goes through Triton, which compiles it or finds it compiled; those that
follow go straight to what came of that."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from . import table
from .plan import Launch, compile_options

_timed: list[tuple[str, float]] | None = None


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
        run = launch.compiled.get(key)
        if run is not None:
            run(*addresses)
            return partial(run, *addresses)
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


def launched_by(compiled: CompiledKernel, launch: Launch, constants: Mapping[str, Any]) -> Callable[..., None]:
    """Launches a compiled kernel, on the current stream, when called with addresses. What `JITFunction.run` does before
    takes ten times as long: it asks what the kernel is to be compiled for, and compares every global that it names."""
    run = compiled[len(launch.tiles), 1, 1]
    others = [constants[name] for name in launch.kernel.arg_names if name in constants]
    return lambda *addresses: run(*addresses, *others)
