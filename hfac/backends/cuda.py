"""The CUDA kernels of `hfac._C`: lists of tensors become a plan, and a table in device memory where the kernels find
addresses and sizes. Of whole parameters both stay from step to step, and the table is copied anew only where an address
changed: a step waits for nothing and allocates nothing, but for the memory that grows with the list.

Everything here is written over a platform, which knows the module with the launch functions and the device's memory:
`Cuda`, or that of tests, for kernels that run on the host.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # tells autograd of writes that it cannot see

from ..spec import COLS, HFAC_INT8_STEP, ROWS, WHOLE, Op
from . import addresses, cpu
from .contract import Operands, Statistics
from .planned import Cuda, Planned, launch_arguments, scalar

Tensors = Sequence[Tensor]

#: Steps of which there are no CUDA kernels yet.
MISSING = (HFAC_INT8_STEP,)
#: Codes of the kernels' Low (csrc/cuda/table.h).
_LOWS = {torch.int16: 1, torch.int8: 2}


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

    def __init__(self, platform: Cuda, operands: Operands) -> None:
        self.params = params = list(operands.params)
        found, device = addresses.of_operands(operands), params[0].device
        arguments = {name: found[name] for name in ("params", "numels", "param_dtypes")}
        arguments.update(op=operands.op.name.removesuffix("_"), l2_bytes=platform.l2_bytes(device))
        arguments.update(rows=found["numels"], cols=[1] * len(params), first_cols=None, second_cols=None)
        arguments |= {name: found[name] for name in (ROWS, COLS, "sign_bytes", "sign_slices") if found.get(name)}
        for state in operands.op.states:  # by the names that the kernels have for both moments, of factors and whole
            side = {ROWS: "rows", WHOLE: "rows", COLS: "cols"}.get(state.size)
            name = state.name if side is None else f"{('first', 'second')[state.moment - 1]}_{side}"
            arguments[name] = found[state.name]
        stored = _storage(operands)
        if stored or "param_strides" in found:
            shapes = [tuple(p.shape) for p in params]
            arguments.update(shapes=shapes, param_strides=addresses.strides(params), **stored)
        #: What a CUDA graph reads in every replay, and nobody may change or free. Only captures add to it; whoever
        #: keeps this replaces the list by one of its own, which then outlives it.
        self.captured: list[Any] = []
        self._lock = threading.Lock()
        self._new = lambda **more: Planned(platform, device, platform.native.CudaStep(**arguments, **more))
        self._plain = self._new()
        #: of H-Fac's matrices: a plan whose statistics are taken before the norm of all gradients is known. Where all
        #: steps clip, the plain plan takes no memory.
        self._split: Planned | None = None

    def __call__(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        statistics: Statistics | None = None,
        clip: Tensor | None = None,
        **numbers: Any,
    ) -> None:
        """The step. ``statistics`` are of the same gradients and numbers, except that ``grad_scale`` has since been
        divided by ``clip``, a 0-d float32 tensor on the device: where it is exactly 1 the step goes on from them, else
        they are taken again, and ``nonfinite`` with them; either way the bits are those of a step without."""
        increment_version(self.params)
        with self._lock:
            plan, workspace, read = self._plain, None, grads
            if statistics is not None:
                assert self._split is not None
                plan, (workspace, read) = self._split, statistics.memory
            read = plan.look(read, nonfinite, numbers.get("clip_threshold"))
            plan.launch(nonfinite, self._captured_with(grads, read), workspace, {"clip": clip}, numbers)
            if statistics is not None:  # whose memory the next ones have
                plan.workspace, plan.squares = workspace, statistics.squares

    def statistics(self, grads: Tensors, nonfinite: Tensor | None = None, **numbers: Any) -> Statistics:
        """Of the step that the same arguments would make: for every gradient, divided by ``grad_scale``, the sum of its
        squares, 0 for what is empty, NaN where ``found_inf`` is not zero; squares are float32, so their sums may be
        inf. ``nonfinite`` is set as the step sets it."""
        with self._lock:
            if self._split is None:
                self._split = self._new(norm=True)
            plan = self._split
            read = plan.look(grads, nonfinite, numbers.get("clip_threshold"))
            squares = plan.squares_room(len(grads))
            plan.launch(nonfinite, self._captured_with(grads, read), None, {"squares": squares}, numbers)
            found = Statistics(squares, (plan.workspace, read))
            plan.workspace = plan.squares = None  # others that take statistics have memory of their own
            return found

    def _captured_with(self, grads: Tensors, read: Tensors) -> list[Any]:
        """What a capture adds to, with copies of gradients, which are read in their place."""
        if read is not grads and self.capturing():
            self.captured += [mine for mine, grad in zip(read, grads, strict=True) if mine is not grad]
        return self.captured

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
    """One call of an op on shards, whose table is for this once."""

    def __init__(self, platform: Cuda, operands: Operands) -> None:
        self._platform, self._operands = platform, operands
        self._make = getattr(platform.native.CudaParts, operands.op.name.removesuffix("_"))
        stored = _storage(operands)
        self._told = addresses.of_operands(operands) | stored
        self._shapes = bool(stored) or "param_strides" in self._told

    def __call__(self, grads: Tensors, nonfinite: None = None, **numbers: Any) -> None:
        grads, given = addresses.of_grads(grads, self._shapes)
        plan = self._make(**self._told, **given)
        if plan.table_bytes:
            self._launch(plan, numbers)
        if self._operands.written:
            increment_version(self._operands.written)

    def _launch(self, plan: Any, numbers: dict[str, Any]) -> None:
        """Scalars on the host that have one entry per parameter go to the device with the table, in the same copy, so
        that nothing waits for the device."""
        if self._platform.capturing():
            raise RuntimeError(
                "an op on shards of parameters brings its table from the host in every call, and cannot be part of the "
                "CUDA graph that is being captured. Step sharded parameters outside of graphs."
            )
        device = self._operands.params[0].device
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
                found[name] = scalar(value, device, held)
        host = self._platform.host_table(end)
        table = torch.empty(end, dtype=torch.uint8, device=device)
        plan.write_table(host.data_ptr())
        for name, (value, first, last) in ranges.items():
            host[first:last].view(torch.float64).copy_(value)
            found[name] = table.data_ptr() + first, True, 1
        table.copy_(host, non_blocking=True)
        workspace = torch.empty(max(plan.workspace_bytes, 1), dtype=torch.uint8, device=device)
        self._platform.before_launch(workspace)
        memory = {"table": table, "workspace": workspace, "counters": None}
        plan.launch(**launch_arguments(self._platform.stream(device), device, memory, found))


def _storage(operands: Operands) -> dict[str, Any]:
    """What the kernels are told of how parameters are stored; they need shapes with it."""
    found: dict[str, Any] = {}
    lows = operands.lows
    if lows is not None:
        found.update(master_lows=addresses.addresses(lows), master_low_dtypes=[_LOWS[low.dtype] for low in lows])
        found.update(master_low_strides=addresses.strides(lows))
    if operands.places is not None:
        found.update(places=list(operands.places))
    return found


class Kernels:
    """The backend on one platform."""

    def __init__(self, platform: Cuda) -> None:
        self.platform = platform

    def has(self, op: Op) -> bool:
        native = self.platform.native
        known = native.CudaParts if op.shard else cpu._C
        return op not in MISSING and hasattr(known, op.name.removesuffix("_"))

    def bind(self, operands: Operands) -> CudaCall | CudaShardCall:
        return (CudaShardCall if operands.op.shard else CudaCall)(self.platform, operands)


KERNELS = Kernels(Cuda())
