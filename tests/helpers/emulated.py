"""The CUDA kernels compiled for the host, for tests only: as the backend "cuda-emulated" of tensors on the CPU, and in
a rehearsal (tests/helpers/rehearsal.py) in the place of the GPU's."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hfac import backends
from hfac.backends import cpu, cuda

try:
    native: Any = import_module("hfac._emulated")
except ImportError:
    native = None

NAME = "cuda-emulated"
#: in which blocks may run, one after the other
ORDERS = ["forward", "reverse", "shuffled"]
#: bytes behind every workspace
GUARD = 64
WHY_NOT = "hfac._emulated is not built: make test-emulated"


class Host:
    """The host as a device: no streams, and a workspace in which every partial sum that nobody wrote is NaN. Behind its
    end lie bytes that no kernel may write."""

    def __init__(self) -> None:
        self.native = native
        self._guard = torch.empty(0, dtype=torch.uint8, device="cpu")

    def l2_bytes(self, device: torch.device) -> int:
        return 0

    def stream(self, device: torch.device) -> int:
        return 0

    def is_current(self, stream: int, index: int) -> bool:
        return stream == self.stream(torch.device("cpu"))

    def used_on_another_stream(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        pass

    def capturing(self) -> bool:
        return False

    def host_table(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def before_launch(self, workspace: Tensor) -> None:
        self.check()
        storage, end = workspace.untyped_storage(), workspace.numel()
        if storage.nbytes() == end:
            storage.resize_(end + GUARD)
        whole = workspace.new_empty(0).set_(storage)
        whole.fill_(0xFF)  # as floats and as doubles: NaN
        self._guard = whole[end:]

    def check(self) -> None:
        """Raises AssertionError where the last launch, or the one before it, wrote behind its workspace."""
        size = self._guard.numel()  # read past torch: some tests forbid the host to read a tensor
        found = ctypes.string_at(self._guard.data_ptr(), size) if size else b""
        assert found == b"\xff" * size, "a kernel has written behind the end of its workspace"


ops = cuda.Kernels(Host())


def set_orders(monkeypatch: pytest.MonkeyPatch, orders: Iterator[str]) -> None:
    """The order of blocks of each launch from now on."""
    fill = Host.before_launch

    def before_launch(host: Host, workspace: Tensor) -> None:
        native.set_block_order(next(orders))
        fill(host, workspace)

    monkeypatch.setattr(Host, "before_launch", before_launch)


@contextmanager
def registered() -> Iterator[None]:
    """Makes the backend known to `hfac.backends` for a while, by name only: "auto" never takes it."""

    def why_not(device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it is for the CPU."

    backends.register(backends.Backend(NAME, "CUDA kernels on the host", why_not, lambda: ops, automatic=False))
    try:
        yield
        ops.platform.check()
    finally:
        backends.unregister(NAME)


#: Lists of addresses among the arguments of `CudaStep`'s functions, and numbers of a launch that may be addresses.
LISTS = {
    *("params", "grads", "master_lows", "exp_avgs", "exp_avg_sqs"),
    *(f"exp_avg_{what}" for what in ("rows", "cols", "signs", "qs", "sq_rows", "sq_cols")),
    *("old_rows", "row_sums", "new_rows", "col_sums", "col_squares", "col_ratios", "new_cols"),
    *("new_sq_rows", "new_sq_cols"),
}
SCALARS = ("lr", "weight_decay", "beta1", "beta2", "step", "totals", "mean_squares", "old_totals")


class Launching:
    """What of the native module launches ``what``, which reads and writes memory of a rehearsal's device and no other;
    in a capture launches are noted for the replays."""

    def __init__(self, gpu: Any, what: str) -> None:
        self.gpu, self.what = gpu, what

    def _at(self, name: str, address: int, index: int | None = None) -> Any:
        memory = self.gpu.at(address)
        if memory is None or memory.kind != "cuda":
            where = "the host's" if memory is None else memory.kind
            name = name if index is None else f"{name}[{index}]"
            raise AssertionError(f"{self.what}: {name} must lie in memory of the device, but is {where} memory")
        return memory

    def _use(self, memories: dict[str, list[Any]]) -> None:
        for name, found in memories.items():
            for k, one in enumerate(found):
                if one is None:
                    continue
                one.used.add(self.gpu.current)
                if not one.alive:
                    raise AssertionError(f"{self.what}: {name}[{k}] has been freed, and a launch would read it")


class Counts(Launching):
    """`StepCounts` of the native module."""

    def __init__(self, gpu: Any, made: int, skipped: int, count: int) -> None:
        super().__init__(gpu, "StepCounts")
        self._own = {"made": made, "skipped": skipped}
        self._counts = native.StepCounts(made, skipped, count)

    def decays(self, *rule: Any, to: int, device: int, stream: int) -> None:
        self._launch({"decays": to}, partial(self._counts.decays, *rule, to=to))

    def add(self, nonfinite: int, device: int, stream: int) -> None:
        self._launch({"nonfinite": nonfinite}, partial(self._counts.add, nonfinite))

    def _launch(self, addresses: dict[str, int], launch: Callable[[], None]) -> None:
        memories = {name: [self._at(name, at)] for name, at in {**self._own, **addresses}.items() if at}

        def node() -> None:
            self._use(memories)
            launch()

        if self.gpu.capture is None:
            node()
        else:
            self.gpu.capture.nodes.append(node)


class Plan(Launching):
    """A plan of the native module."""

    def __init__(self, gpu: Any, make: Callable[..., Any], **arguments: Any) -> None:
        super().__init__(gpu, make.__name__)
        self.make, self.arguments = make, arguments
        self.memories = self._found(arguments)
        self._plan = make(**arguments)
        self.prepared: dict[str, Any] | None = None
        self.of_grads: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def prepare(self, **arguments: Any) -> bool:
        self.prepared, self.of_grads = arguments, self._found(arguments)
        return self._plan.prepare(**arguments)

    def write_table(self, host: int) -> None:
        found = self.gpu.at(host)
        if found is not None and found.kind == "cuda":
            raise AssertionError(f"{self.what}: the table is written by the host, but lies on the device")
        self._plan.write_table(host)

    def launch(self, numbers: dict[str, Any], memory: dict[str, int], device: int = 0, stream: int = 0) -> None:
        # A gradient may have the place of one that was freed. Ops on shards are made of theirs.
        self.of_grads = self._found(self.prepared or {"grads": self.arguments.get("grads")})
        given = {name: address for name, address in memory.items() if address}
        given |= {name: value[0] for name in SCALARS if isinstance(value := numbers.get(name), tuple)}
        memories = {**self.memories, **self.of_grads, **{name: [self._at(name, at)] for name, at in given.items()}}
        if self.gpu.capture is None:
            self._use(memories)
            self._plan.launch(numbers, memory)
            return
        frozen = self._plan
        if self.prepared is not None:  # a graph keeps the launches of now, whatever this plan will be told
            frozen = self.make(**self.arguments)
            frozen.prepare(**self.prepared)
        expected = _table_of(frozen)

        def node() -> None:
            self._use(memories)
            if not _agrees(memory["table"], *expected):
                raise AssertionError(f"{self.what}: a replay reads a table that is not the one it was captured with")
            frozen.launch(numbers, memory)

        self.gpu.capture.nodes.append(node)

    def _found(self, arguments: dict[str, Any]) -> dict[str, list[Any]]:
        return {
            name: [self._at(name, at, k) if at else None for k, at in enumerate(arguments[name])]
            for name in LISTS & arguments.keys()
            if arguments[name] is not None
        }


def _table_of(plan: Any) -> tuple[bytes, bytes]:
    """A plan's table, written over zeros and over ones: where they differ nothing is written."""
    found = []
    for fill in (0, 255):
        room = ctypes.create_string_buffer(bytes([fill]) * plan.table_bytes, plan.table_bytes + 1)
        plan.write_table(ctypes.addressof(room))
        found.append(room.raw[: plan.table_bytes])
    return found[0], found[1]


def _agrees(address: int, zeros: bytes, ones: bytes) -> bool:
    here = ctypes.string_at(address, len(zeros))
    return all(a == b or c != b for a, b, c in zip(here, zeros, ones, strict=True))


class Kernels:
    """`hfac._emulated` as the platform of a GPU sees it."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        ops = [op for op in native.slots() if hasattr(native.CudaStep, op)]
        self.LaunchNumbers = self.LaunchMemory = dict  # which a plan looks at
        self.StepCounts = partial(Counts, gpu)
        self.CudaStep = SimpleNamespace(**{op: partial(Plan, gpu, getattr(native.CudaStep, op)) for op in ops})

    def __getattr__(self, name: str) -> Any:
        return getattr(native, name)


class HostKernels:
    """`hfac._C`, which must not be given memory of a rehearsal's device."""

    def __init__(self, gpu: Any, extension: Any) -> None:
        self._gpu, self._extension = gpu, extension

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._extension, name)
        if not callable(found) or isinstance(found, type):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            for key, value in (*enumerate(args), *kwargs.items()):
                for k, one in enumerate(value if isinstance(value, list) else [value]):
                    memory = self._gpu.at(one) if isinstance(one, int) and one > 1 << 32 else None
                    if memory is not None and memory.kind == "cuda":
                        raise AssertionError(f"{name} of the CPU's kernels: {key}[{k}] is memory of the device")
            return found(*args, **kwargs)

        return call


@contextmanager
def instead_of_a_gpu(gpu: Any) -> Iterator[None]:
    """The backend "cuda" serves what a rehearsal says is on a GPU, with these kernels; Triton's take no part."""

    class Platform(cuda.Cuda):
        native = Kernels(gpu)

        def is_current(self, stream: Any, index: int) -> bool:
            return stream == torch.cuda.current_stream(index)

        def before_launch(self, workspace: Tensor) -> None:
            workspace.fill_(0xFF)

    def serves(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the CUDA kernels serve tensors on a GPU, not on {device}. Use backend='auto'."
        return None if native is not None else WHY_NOT

    def triton(device: torch.device) -> str | None:
        return (
            "Triton's kernels take no part in a rehearsal." if device.type == "cuda" else rows["triton"].why_not(device)
        )

    rows, kernels = dict(backends.TABLE), cuda.Kernels(Platform())
    with mock.patch.dict(backends.TABLE), ExitStack() as stack:
        if cpu._C is not None:
            stack.enter_context(mock.patch.object(cpu, "_C", HostKernels(gpu, cpu._C)))
        backends.register(replace(rows["cuda"], why_not=serves, load=lambda: kernels))
        backends.register(replace(rows["triton"], why_not=triton))
        yield
