"""Steps that only the device counts (csrc/cuda/step_counts.h): a launch before a step finds the decays that follow from
the counts, and one behind it counts the step. In plain torch (`hfac.ops.step_counts`) these are six to eight small
operations."""

import torch
from torch import Tensor

from ..schedules import DecayRule
from .planned import Cuda, address_of, index_of


class StepMemory:
    """What one step at a time has on the device, on the stream that is current when it is made.

    Attributes:
        rows: float64 [parameters] each: decays of the first moment, of the second, and the numbers of the steps.
        nonfinite: int32 [parameters], where the step says which gradients it has refused; None where it refuses none.
    """

    def __init__(self, platform: Cuda, count: int, device: torch.device, skips: bool) -> None:
        decays = torch.empty(3, count, dtype=torch.float64, device=device)
        self.rows = decays.unbind()
        self.nonfinite = torch.zeros(count, dtype=torch.int32, device=device) if skips else None
        self.stream = platform.stream(device)
        nonfinite = 0 if self.nonfinite is None else self.nonfinite.data_ptr()
        #: addresses of all three
        self.at = address_of(self.stream), decays.data_ptr(), nonfinite


class StepCounts:
    """Counts of the steps of parameters that lie side by side: float32 ``made``, and int32 ``skipped``, or None where
    no step can be skipped. They stay where they are."""

    def __init__(self, platform: Cuda, made: Tensor, skipped: Tensor | None) -> None:
        self._platform, self._made, self._skipped = platform, made, skipped
        self._index = index_of(made.device)
        at = made.data_ptr(), 0 if skipped is None else skipped.data_ptr()
        self._native = platform.native.StepCounts(*at, made.numel())

    def memory(self) -> StepMemory:
        """For steps on the current stream."""
        made = self._made
        return StepMemory(self._platform, made.numel(), made.device, self._skipped is not None)

    def serves(self, memory: StepMemory) -> bool:
        """Whether the stream that memory is for is the current one."""
        return self._platform.is_current(memory.stream, self._index)

    def find_decays(self, memory: StepMemory, rule: DecayRule) -> None:
        """Of the steps that follow."""
        stream, to, _ = memory.at
        self._native.decays(*rule, to=to, device=self._index, stream=stream)

    def add(self, memory: StepMemory) -> None:
        """Counts a step, as skipped where ``memory.nonfinite`` says so, else as made."""
        stream, _, nonfinite = memory.at
        self._native.add(nonfinite, device=self._index, stream=stream)
