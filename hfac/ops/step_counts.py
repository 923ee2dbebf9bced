"""Counts of steps that only the device knows, in plain torch: for backends that have no kernels for it."""

from typing import Any

import torch
from torch import Tensor

from .. import schedules
from ..schedules import DecayRule
from .counters import are_down


class StepMemory:
    """What one step at a time has on the device; as `hfac.backends.step_counts.StepMemory`."""

    def __init__(self, count: int, device: torch.device, skips: bool) -> None:
        dtype = schedules.step_dtype(device)
        self.nonfinite = torch.zeros(count, dtype=torch.int32, device=device) if skips else None
        self.decays = schedules.Decays(count, dtype, device)
        self.rows = self.decays.rows
        self.stream = _stream_of(device)


class StepCounts:
    """As `hfac.backends.step_counts.StepCounts`, which see."""

    def __init__(self, made: Tensor, skipped: Tensor | None) -> None:
        self._made, self._skipped, self._device = made, skipped, made.device

    def memory(self) -> StepMemory:
        return StepMemory(self._made.numel(), self._device, self._skipped is not None)

    def serves(self, memory: StepMemory) -> bool:
        return _stream_of(self._device) == memory.stream

    def find_decays(self, memory: StepMemory, rule: DecayRule) -> None:
        memory.decays.find(rule, self._made)

    def add(self, memory: StepMemory) -> None:
        made, skipped, flags = self._made, self._skipped, memory.nonfinite
        made.add_(1)
        if skipped is not None and flags is not None and not are_down(flags):
            skipped.add_(flags)
            made.sub_(flags)


def _stream_of(device: torch.device) -> Any:
    """The current one; of devices whose streams are not known here, one that no other equals."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_stream(device) if device.type == "cuda" else object()
