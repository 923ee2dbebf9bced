"""Counts of steps that only the device knows, in plain torch: for backends that have no kernels for it."""

from typing import Any

import torch
from torch import Tensor

from .. import schedules
from ..backends.planned import Cuda, index_of
from ..schedules import DecayRule
from .counters import are_down

_CUDA = Cuda()


class StepMemory:
    """What one step at a time has on the device; as `hfac.backends.step_counts.StepMemory`."""

    def __init__(self, count: int, device: torch.device, skips: bool) -> None:
        dtype = schedules.step_dtype(device)
        self.nonfinite = torch.zeros(count, dtype=torch.int32, device=device) if skips else None
        self.decays = schedules.Decays(count, dtype, device)
        self.rows = self.decays.rows
        self.stream: Any = _CUDA.stream(device) if device.type == "cuda" else None


class StepCounts:
    """As `hfac.backends.step_counts.StepCounts`, which see."""

    def __init__(self, made: Tensor, skipped: Tensor | None) -> None:
        self._made, self._skipped, self._device = made, skipped, made.device
        self._index = index_of(made.device)

    def memory(self) -> StepMemory:
        return StepMemory(self._made.numel(), self._device, self._skipped is not None)

    def serves(self, memory: StepMemory) -> bool:
        if self._device.type == "cuda":
            return _CUDA.is_current(memory.stream, self._index)
        return self._device.type == "cpu"  # others' streams are not asked for

    def find_decays(self, memory: StepMemory, rule: DecayRule) -> None:
        memory.decays.find(rule, self._made)

    def add(self, memory: StepMemory) -> None:
        made, skipped, flags = self._made, self._skipped, memory.nonfinite
        made.add_(1)
        if skipped is not None and flags is not None and not are_down(flags):
            skipped.add_(flags)
            made.sub_(flags)
