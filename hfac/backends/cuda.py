"""The CUDA kernels of `hfac._C`: lists of tensors become a plan, and a table in device memory where the kernels find
addresses and sizes. Both stay from step to step, and the table is copied anew only where an address changed: a step
waits for nothing and allocates nothing, but for the memory that grows with the list.

Everything here is written over a platform, which knows the module with the launch functions and the device's memory:
`Cuda`, or that of tests, for kernels that run on the host.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..memory import bump_versions
from ..spec import Op
from ..staging import Staged, refused
from . import addresses, cpu
from .contract import Moved, Operands, Statistics
from .planned import Cuda, Planned, address_of, addresses_of, index_of, scalar
from .snapshots import SAME, Snapshot, compare, snapshot
from .step_counts import StepCounts

Tensors = Sequence[Tensor]


def why_not(device: torch.device) -> str | None:
    """None where these kernels serve ``device``, else the reason and what to do."""
    if device.type != "cuda":
        return f"the CUDA kernels serve tensors on a GPU, not on {device}. Use backend='auto'."
    if cpu._C is None:
        return cpu.why_not(torch.device("cpu"))
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _unserved(cpu._C, index)


@functools.cache
def _unserved(native: Any, index: int) -> str | None:
    """Why the extension serves no tensors on the CUDA device of this index; None where it does. Asked once for each:
    devices' properties take milliseconds."""
    info = native.cuda_info()
    if not info["compiled"]:
        return (
            "the extension hfac._C was built without CUDA. Build it again with nvcc on the path: HFAC_CUDA=1 python -m "
            "pip install -e . in a checkout of hfac."
        )
    if info["why_not"] is not None:
        return f"no CUDA device can be used ({info['why_not']}). Check the driver: nvidia-smi."
    if index >= len(info["devices"]):
        return f"there is no CUDA device cuda:{index}; there are {len(info['devices'])}, counted from 0."
    found = info["devices"][index]
    if found["why_not"] is not None:
        return f"the CUDA kernels cannot run on cuda:{index}, a {found['name']}: {found['why_not']}."
    return None


class CudaCall:
    """Steps of one op on whole parameters; see `hfac.backends` for what it takes.

    ``grad_scale`` and ``found_inf`` are 0-d float32 tensors on the device, as torch's fused optimizers take them:
    gradients are divided by the one, and nothing is written where the other is not zero. A graph replays the ``seed``,
    and reads a ``step`` that is a tensor. Several threads may step one list, whose table there is once: one at a time.
    """

    #: The kernels divide by a GradScaler's scale and look at its found_inf themselves.
    unscales = True
    #: Where gradients have not moved their addresses are not read anew.
    compares = True

    def __init__(self, platform: Cuda, operands: Operands) -> None:
        self.params = list(operands.params)
        device = self.params[0].device
        make = partial(_maker(platform, operands), l2_bytes=platform.l2_bytes(device))
        #: What a CUDA graph reads in every replay, and nobody may change or free. Only captures add to it; whoever
        #: keeps this replaces the list by one of its own, which then outlives it.
        self.captured: list[Any] = []
        self._lock = threading.Lock()
        self._new = lambda **more: Planned(platform, device, make(**more))
        self._plain = self._new()
        #: a plan whose statistics are taken before the norm of all gradients is known. Where all steps clip, the plain
        #: plan takes no memory.
        self._split: Planned | None = None

    def __call__(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        seen: Snapshot | None = None,
        statistics: Statistics | None = None,
        clip: Tensor | None = None,
        **numbers: Any,
    ) -> None:
        """The step. ``statistics`` are of the same gradients and numbers, except that ``grad_scale`` has since been
        divided by ``clip``, a 0-d float32 tensor on the device: where it is exactly 1 the step goes on from them, else
        they are taken again, and ``nonfinite`` with them; either way the bits are those of a step without."""
        bump_versions(self.params)
        with self._lock:
            plan, workspace = self._plain, None
            if statistics is not None:
                assert self._split is not None
                plan, workspace = self._split, statistics.memory
            plan.look(grads, nonfinite, numbers.get("clip_threshold"), seen)
            plan.launch(nonfinite, self.captured, workspace, {"clip": clip}, numbers)
            if statistics is not None:  # whose memory the next ones have
                plan.workspace, plan.squares = workspace, statistics.squares

    def statistics(
        self, grads: Tensors, nonfinite: Tensor | None = None, *, seen: Snapshot | None = None, **numbers: Any
    ) -> Statistics:
        """Of the step that the same arguments would make: for every gradient, divided by ``grad_scale``, the sum of its
        squares, 0 for what is empty, NaN where ``found_inf`` is not zero; squares are float32, so their sums may be
        inf. ``nonfinite`` is set as the step sets it where that goes on from more than squares (an op that
        ``reads_twice``)."""
        with self._lock:
            if self._split is None:
                self._split = self._new(norm=True)
            plan = self._split
            plan.look(grads, nonfinite, numbers.get("clip_threshold"), seen)
            squares = plan.squares_room(len(grads))
            plan.launch(nonfinite, self.captured, None, {"squares": squares}, numbers)
            found = Statistics(squares, plan.workspace)
            plan.workspace = plan.squares = None  # others that take statistics have memory of their own
            return found

    def statistics_again(
        self,
        seen: Snapshot,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None = None,
        moved: Moved | None = None,
    ) -> Statistics | None:
        with self._lock:
            plan = self._split
            if plan is None or plan.squares is None:
                return None
            if not plan.again(seen, numbers, nonfinite, moved, squares=plan.squares):
                return None
            found = Statistics(plan.squares, plan.workspace)
            plan.workspace = plan.squares = None
            return found

    def again(
        self,
        seen: Snapshot,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None = None,
        moved: Moved | None = None,
        grad_scale: Tensor | None = None,
        statistics: Statistics | None = None,
        clip: Tensor | None = None,
    ) -> bool:
        with self._lock:
            bump_versions(self.params)
            if statistics is not None and self._split is not None:
                plan = self._split
                plan.workspace, plan.squares = statistics.memory, statistics.squares  # the next ones have them
                return plan.again(seen, numbers, nonfinite, moved, True, grad_scale=grad_scale, clip=clip)
            if grad_scale is None:
                return self._plain.again(seen, numbers, nonfinite, moved)
            return self._plain.again(seen, numbers, nonfinite, moved, grad_scale=grad_scale)

    def capturing(self) -> bool:
        """Whether a graph is being captured, in whose replays what is launched now will run."""
        return self._plain.platform.capturing()

    def check_capture(self, grads: Tensors, nonfinite: Tensor | None, clip_threshold: float | None) -> None:
        """That a plain step of these gradients can be part of the graph that is being captured.

        Raises:
            RuntimeError: it needs memory on the host; the message says what to do.
        """
        self._plain.look(grads, nonfinite, clip_threshold)
        self._plain.check_room()

    def workspace_bytes(self) -> int:
        """Bytes on the device that are kept from step to step: partial sums, and tables."""
        return sum(plan.workspace_bytes() for plan in (self._plain, self._split) if plan is not None)


class CudaShardCall:
    """Calls of one op on shards. ``grad_scale`` and ``found_inf`` are as for `CudaCall`, and the table stays likewise;
    where the host has one number of each parameter, these go to the device with the table in every call. Partial sums
    have memory of their own each time, so that many such ops keep none."""

    unscales = True

    def __init__(self, platform: Cuda, operands: Operands) -> None:
        self._platform, self._operands = platform, operands
        self._device = operands.params[0].device
        self._make = _maker(platform, operands)
        self._staged = Staged(self._device, torch.uint8, platform.host_table)
        self._plan: Any = None
        self._seen: Snapshot | None = None  # the gradients that the plan is of
        self._stale = True  # the table is not the plan's
        #: as of `CudaCall`
        self.captured: list[Any] = []

    def __call__(self, grads: Tensors, nonfinite: None = None, **numbers: Any) -> None:
        self._look(grads)
        if self._plan.table_bytes:
            self._launch(numbers)
        if self._operands.written:
            bump_versions(self._operands.written)

    def capturing(self) -> bool:
        """As `CudaCall.capturing`."""
        return self._platform.capturing()

    def check_capture(self, grads: Tensors, nonfinite: None, clip_threshold: float | None) -> None:
        """As `CudaCall.check_capture`."""
        self._look(grads)
        self._check_room()

    def workspace_bytes(self) -> int:
        """Bytes on the device that are kept from step to step: the table."""
        return 0 if self._staged.table is None else self._staged.table.numel()

    def _look(self, grads: Tensors) -> None:
        """Plans anew where gradients are others than in the last step, or lie elsewhere."""
        if self._plan is None or compare(list(grads), self._seen) != SAME:
            self._plan = self._seen = None  # whatever may fail before both are there
            self._plan, self._stale = self._make(**addresses.of_grads(grads)), True
            self._seen = snapshot(list(grads))

    def _check_room(self) -> None:
        if not self._plan.table_bytes:
            return
        if self._staged.table is None:
            raise refused("this is the first step on these tensors")
        if self._stale and not self._staged.can_be_captured(self._plan.table_bytes):
            raise refused("its gradients are not where the last step found them, or not of the same kind")

    def _launch(self, numbers: dict[str, Any]) -> None:
        """Numbers on the host that have one entry per parameter go to the device with the table, in the same copy, so
        that nothing waits for the device."""
        capturing, plan = self._platform.capturing(), self._plan
        memory: dict[str, Tensor | None] = {name: numbers.pop(name, None) for name in ("grad_scale", "found_inf")}
        end = -(-plan.table_bytes // 8) * 8
        found: dict[str, Any] = {}
        held: list[Tensor] = []
        ranges = {}
        for name, value in numbers.items():
            if isinstance(value, Tensor) and value.is_cpu and value.ndim and name not in self._operands.op.vectors:
                ranges[name] = value, end, end + 8 * value.numel()
                end = ranges[name][2]
            elif isinstance(value, Tensor) and value.is_cpu and not value.ndim:
                found[name] = value.item()
            else:
                found[name] = scalar(value, self._device, held)
        if capturing:
            self._check_room()
            if ranges:
                raise refused(f"the host has {' and '.join(ranges)} of each parameter, not the device")

        def write(host: Tensor) -> None:
            plan.write_table(host.data_ptr())
            for value, first, last in ranges.values():
                host[first:last].view(torch.float64).copy_(value)

        table = self._staged.bring(end, write if self._stale or ranges else None, capturing)
        self._stale = False
        for name, (_, first, _) in ranges.items():
            found[name] = table.data_ptr() + first, True, 1
        workspace = torch.empty(max(plan.workspace_bytes, 1), dtype=torch.uint8, device=self._device)
        self._platform.before_launch(workspace)
        memory |= {"table": table, "workspace": workspace, "counters": None}
        stream = address_of(self._platform.stream(self._device))
        plan.launch(found, addresses_of(memory), index_of(self._device), stream)
        if capturing:
            self.captured += [plan, self._staged.source, *memory.values(), *held]


def _maker(platform: Cuda, operands: Operands) -> Callable[..., Any]:
    """What makes the op's plan over these operands, of the arguments that are still missing."""
    make = getattr(platform.native.CudaStep, operands.op.name.removesuffix("_"))
    return partial(make, **addresses.of_operands(operands))


class Kernels:
    """The backend on one platform."""

    def __init__(self, platform: Cuda) -> None:
        self.platform = platform

    def has(self, op: Op) -> bool:
        return hasattr(self.platform.native.CudaStep, op.name.removesuffix("_"))

    def bind(self, operands: Operands) -> CudaCall | CudaShardCall:
        return (CudaShardCall if operands.op.shard else CudaCall)(self.platform, operands)

    def step_counts(self, made: Tensor, skipped: Tensor | None) -> StepCounts:
        return StepCounts(self.platform, made, skipped)


KERNELS = Kernels(Cuda())
