"""A plan of the CUDA kernels over tensors that stay, and the memory that its launches and the graphs of them use.

While a CUDA graph is captured no memory is allocated on the host: a step finds what earlier ones left, or is refused
before anything is launched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..staging import Staged, refused
from . import addresses, cpu
from .contract import Moved
from .snapshots import SAME, Snapshot, compare, identical, snapshot

Tensors = Sequence[Tensor]
#: What a launch is told by address.
_MEMORY = ("grad_scale", "found_inf", "watched")
#: What a launch that is repeated may be told by address.
_REPEATED = frozenset(("nonfinite", "grad_scale", "squares", "clip"))
#: Types of numbers that a launch takes as they are.
_NUMBERS = frozenset((float, int, bool, type(None)))
#: numbers, the module that has read them, and what launches take of them
ReadNumbers = tuple[Mapping[str, Any], Any, Any]
#: of the last ones that are all of these types: parameters that are stepped one by one share them
_last_read: ReadNumbers | None = None
#: of the index of a CUDA device; torch without CUDA has no such function
_address_of_current = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Cuda:
    """The platform that kernels run on: the extension's module, and the GPU through torch's allocators and streams."""

    @property
    def native(self) -> Any:
        return cpu._C

    def l2_bytes(self, device: torch.device) -> int:
        return getattr(torch.cuda.get_device_properties(index_of(device)), "L2_cache_size", 0)

    def stream(self, device: torch.device) -> Any:
        """The current one: its address, or an object that has it as ``cuda_stream``."""
        return torch.cuda.current_stream(device)

    def is_current(self, stream: Any, index: int) -> bool:
        """Whether what `stream` gave is current still on the device of this index: to be asked in every step, at a
        tenth of what an object of the current one costs."""
        if _address_of_current is None:
            return stream == torch.cuda.current_stream(index)
        return stream.cuda_stream == _address_of_current(index)

    def after(self, stream: Any, device: torch.device) -> None:
        """What is launched from now on waits for what has been launched on ``stream``."""
        torch.cuda.current_stream(device).wait_stream(stream)

    def used_on_another_stream(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        for tensor in tensors:  # so that torch's allocator waits for that stream before it hands the memory out again
            tensor.record_stream(torch.cuda.current_stream(device))

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def host_table(self, nbytes: int) -> Tensor:
        # torch's allocator of pinned memory does not hand a buffer out again before the copies from it are done.
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def before_launch(self, workspace: Tensor) -> None:
        """For tests, which fill the workspace."""


class Planned:
    """A plan over tensors that stay where they are, with the memory on the device that its launches use.

    Launches follow each other on the device, whatever streams they are made on, because they share that memory; replays
    of a graph are ordered by whoever makes them, as they are for parameters and states.
    """

    def __init__(self, platform: Cuda, device: torch.device, step: Any) -> None:
        self.platform, self.device, self.index, self.step = platform, device, index_of(device), step
        self.staged = Staged(device, torch.uint8, platform.host_table)
        self.stale = True  # the table is not the plan's
        self.counters: Tensor | None = None
        self.workspace: Tensor | None = None  # None while statistics have it
        self.squares: Tensor | None = None  # likewise
        self.stream: Any = None  # of the last launch outside of captures
        self.stream_at = 0  # its address
        self.looked: tuple[Snapshot | None, bool, bool] | None = None  # what `look` has told the plan
        #: the last launch's workspace and the addresses that every launch is told, by name and as launches take them,
        #: where these serve the next one
        self.last: tuple[Tensor, dict[str, int], Any] | None = None
        #: of the last numbers of which some lie in tensors where launches read them
        self.read: ReadNumbers | None = None

    def squares_room(self, count: int) -> Tensor:
        """Where sums of squares of so many gradients go; what nothing writes there is 0."""
        if self.squares is None:
            if self.platform.capturing():
                self.check_room()
            self.squares = torch.zeros(count, dtype=torch.float64, device=self.device)
        return self.squares

    def launch(
        self,
        nonfinite: Tensor | None,
        captured: list[Any],
        workspace: Tensor | None,
        memory: dict[str, Tensor | None],
        numbers: dict[str, Any],
    ) -> None:
        """The plan's launches on gradients that `look` has seen.

        ``workspace``: that of statistics, which is not to be overwritten; None: the plan's own. ``memory``: what a
        launch is told by address, and ``numbers`` the rest."""
        self.last = None
        capturing, stream = self.platform.capturing(), self.platform.stream(self.device)
        if capturing:
            self.check_room()
        elif stream != self.stream:
            self._follow(stream, workspace, *memory.values())
        self._bring(capturing)
        if workspace is None:
            workspace = self._room()
            self.platform.before_launch(workspace)
        flags = None if nonfinite is None else nonfinite.contiguous()
        memory |= {"nonfinite": flags, **{name: numbers.pop(name) for name in _MEMORY if name in numbers}}
        own, told, kept = self._held(workspace), addresses_of(memory), list[Tensor]()
        self.step.launch(self._told(numbers, kept), own | told, self.index, address_of(stream))
        if not capturing and flags is nonfinite and told.keys() <= _REPEATED:
            self.last = workspace, own, self.platform.native.LaunchMemory(own)
        if nonfinite is not None and flags is not None and flags is not nonfinite:
            nonfinite.copy_(flags)
        if capturing:
            captured += [self.staged.source, self.table, workspace, self.counters, *memory.values(), *kept]

    def again(
        self,
        seen: Snapshot,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None,
        moved: Moved | None,
        goes_on: bool = False,
        **memory: Tensor | None,
    ) -> bool:
        """A launch on the same gradients as the last one, or on what has ``moved`` from there, with these numbers and
        this ``memory`` in place of all that it was told beside; False where that was told more. ``goes_on``: from
        statistics of the same gradients in the workspace."""
        looked, workspace, platform, last = self.looked, self.workspace, self.platform, self.last
        if last is None or workspace is None or looked is None:
            return False
        here = looked[0] is seen
        if not here and (goes_on or moved is None or looked[0] is not moved[0]):
            return False
        threshold = numbers.get("clip_threshold")
        if looked[1:] != (threshold is not None, nonfinite is not None):
            return False
        if platform.capturing() or not platform.is_current(self.stream, self.index):
            return False
        if moved is not None and not here:
            self.look(moved[1], nonfinite, threshold, seen)
            self._bring(False)
            workspace, last = self._room(), None
        if not goes_on:
            platform.before_launch(workspace)
        if last is None or last[0] is not workspace:
            own = self._held(workspace)
            self.last = last = workspace, own, platform.native.LaunchMemory(own)
        _, own, told = last
        if memory or nonfinite is not None:
            told = own | addresses_of({"nonfinite": nonfinite, **memory})
        native = platform.native
        for read in (_last_read, self.read):
            if read is not None and read[0] is numbers and read[1] is native:
                self.step.launch(read[2], told, self.index, self.stream_at)
                return True
        kept: list[Tensor] = []  # until the launch
        given = self._told(numbers, kept)
        if kept and identical(kept, [value for value in numbers.values() if isinstance(value, Tensor)]):
            given = native.LaunchNumbers(given)
            self.read = numbers, native, given
        self.step.launch(given, told, self.index, self.stream_at)
        return True

    def _held(self, workspace: Tensor) -> dict[str, int]:
        """What every launch is told by address."""
        return addresses_of({"table": self.table, "workspace": workspace, "counters": self.counters})

    def _told(self, numbers: Mapping[str, Any], kept: list[Tensor]) -> Any:
        """A launch's numbers; to ``kept`` are added the tensors whose addresses are among them."""
        read = _read(numbers, self.platform.native)
        if read is not None:
            return read
        device, plain = self.device, _NUMBERS
        return {name: value if type(value) in plain else scalar(value, device, kept) for name, value in numbers.items()}

    @property
    def table(self) -> Tensor | None:
        return self.staged.table

    def workspace_bytes(self) -> int:
        """Bytes on the device that are kept from step to step: partial sums, and the table."""
        kept = (self.table, self.workspace, self.counters)
        return sum(tensor.numel() for tensor in kept if tensor is not None)

    def look(
        self,
        grads: Tensors,
        nonfinite: Tensor | None,
        clip_threshold: float | None,
        seen: Snapshot | None = None,
    ) -> None:
        """Tells the plan what this step brings. ``seen``: as `hfac.backends` describes it; None: they are compared
        here."""
        options = clip_threshold is not None, nonfinite is not None
        if self.looked is not None and options == self.looked[1:]:
            before = self.looked[0]
            if before is seen is not None or (seen is None and compare(list(grads), before) == SAME):
                return
        seen = snapshot(list(grads)) if seen is None else seen
        self.looked = self.last = None
        if self.step.prepare(**addresses.of_grads(grads), clip=options[0], nonfinite=options[1]):
            self.stale = True  # until the table is written, whatever may fail before
        self.looked = seen, *options

    def check_room(self) -> None:
        """That a graph can be captured of what `look` has seen.

        Raises:
            RuntimeError: memory on the host is needed.
        """
        if self.counters is None:
            raise refused("this is the first step on these tensors")
        if self.stale and not self.staged.can_be_captured(self.step.table_bytes):
            raise refused("its gradients are not where the last step found them, or not of the same kind")

    def _follow(self, stream: Any, *more: Tensor | None) -> None:
        """Goes on on another stream: after what the last one was given, and with memory that is not handed out again
        before both are done with it."""
        if self.stream is not None:
            self.platform.after(self.stream, self.device)
            mine = (self.table, self.workspace, self.counters, *more)
            self.platform.used_on_another_stream([tensor for tensor in mine if tensor is not None], self.device)
        self.stream, self.stream_at = stream, address_of(stream)

    def _bring(self, capturing: bool) -> None:
        """The plan's table to the device, where it is not there, and counters."""
        if not (self.stale or capturing or self.counters is None or self.staged.source is not None):
            return
        write = (lambda host: self.step.write_table(host.data_ptr())) if self.stale else None
        self.staged.bring(max(self.step.table_bytes, 1), write, capturing)
        self.stale = False
        if self.counters is None and not capturing:
            self.counters = torch.zeros(max(self.step.counter_bytes, 1), dtype=torch.uint8, device=self.device)

    def _room(self) -> Tensor:
        """The workspace of a launch, as large as the plan asks for."""
        wanted = max(self.step.workspace_bytes, 1)
        if self.workspace is None or self.workspace.numel() < wanted:
            self.workspace = torch.empty(wanted, dtype=torch.uint8, device=self.device)
        return self.workspace


def _read(numbers: Mapping[str, Any], native: Any) -> Any:
    """Numbers as launches take them, read once for as long as they are the same object, which nobody changes; None
    where some lie in tensors."""
    global _last_read
    known = _last_read  # another thread may replace it
    if known is not None and known[0] is numbers and known[1] is native:
        return known[2]
    if not _NUMBERS.issuperset(map(type, numbers.values())):
        return None
    found = native.LaunchNumbers(numbers)
    _last_read = numbers, native, found
    return found


def addresses_of(memory: Mapping[str, Tensor | None]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in memory.items() if tensor is not None}


def address_of(stream: Any) -> int:
    return getattr(stream, "cuda_stream", stream)


def scalar(value: Any, device: torch.device, kept: list[Tensor]) -> Any:
    """A number, or of a tensor, which is not read here, its address on the device, whether it is of doubles, and 1 for
    one entry per parameter. What lies there is added to ``kept``."""
    if value.__class__ is float or not isinstance(value, Tensor):
        return value
    if value.dtype not in (torch.float32, torch.float64) or value.device != device:
        value = value.to(device=device, dtype=torch.float64)
    kept.append(value.contiguous())
    return kept[-1].data_ptr(), value.dtype == torch.float64, value.ndim


def index_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index
