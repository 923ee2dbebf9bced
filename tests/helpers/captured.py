"""A stand-in for CUDA graphs on the CPU, where the CUDA kernels compiled for the host (emulated.py) and Triton's
in its interpreter are captured and replayed. Whatever memory is made in it is known by its address, dead or alive.

It knows no devices: tests/helpers/rehearsal.py does, and Triton's kernels take no part in that."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import emulated
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfac import backends
from hfac.backends import cuda

_HIDDEN = ("table", "workspace", "counters", "squares")
_ADDRESSES = (*_HIDDEN, "nonfinite", "grad_scale", "found_inf", "clip", "watched")


class Block:
    """An allocation. What it held stays readable when it has been freed, so that a test fails instead of crashing."""

    def __init__(self, device: "Device", nbytes: int) -> None:
        self.whole, self.host, self.alive = np.zeros(nbytes + 64, np.uint8), False, True
        self.device, self.stream = device, device.stream
        #: streams whose launches read or write it, the last of them, and those that the allocator knows of
        self.used: set[int] = set()
        self.last: int | None = None
        self.recorded = {self.stream}
        start = -self.whole.ctypes.data % 64
        self.first, self.nbytes = start, nbytes
        self.address = self.whole.ctypes.data + start

    def own(self) -> Tensor:
        """Its bytes; it is freed with this tensor's storage."""
        bytes_ = self.whole[self.first : self.first + self.nbytes]
        weakref.finalize(bytes_, self.free)
        return torch.from_numpy(bytes_)

    def free(self) -> None:
        self.alive = False
        late = self.used - self.recorded
        if late:
            self.device.faults.append(f"{self.nbytes} bytes were freed while streams {late} may use them")

    def launch(self) -> None:
        """It is read or written by a launch on the current stream."""
        stream = self.device.stream
        if self.last not in (None, stream) and (stream, self.last) not in self.device.waits:
            self.device.faults.append(f"stream {stream} uses {self.nbytes} bytes without waiting for {self.last}")
        self.used.add(stream)
        self.last = stream

    def look(self) -> Tensor:
        assert self.alive, "a replay reads or writes memory that has been freed since the capture"
        return torch.from_numpy(self.whole[self.first : self.first + self.nbytes])


class Place:
    """A tensor, by its address."""

    def __init__(self, block: Block, tensor: Tensor) -> None:
        self.block, self.dtype, self.offset = block, tensor.dtype, tensor.storage_offset()
        self.size, self.stride = tuple(tensor.shape), tensor.stride()

    def tensor(self) -> Tensor:
        return _shaped(self.block.look(), self.dtype, self.size, self.stride, self.offset)


def _shaped(bytes_: Tensor, dtype: torch.dtype, size: Any, stride: Any, offset: int) -> Tensor:
    whole = bytes_[: len(bytes_) // dtype.itemsize * dtype.itemsize].view(dtype)
    return whole.as_strided(size, stride, offset)


class Graph(list[Callable[[], Any]]):
    """What a capture has noted, and the memory that was allocated meanwhile, which is the graph's."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: list[Any] = []

    def replay(self) -> None:
        for node in self:
            node()


class Device(TorchDispatchMode):
    """Memory, streams and graphs. A capture carries out nothing but what the host writes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[int, Block] = {}
        self.graph: Graph | None = None
        self.stream = 0
        self.waits: set[tuple[int, int]] = (
            set()
        )  # a stream, and one that it has waited for since that one's last launch
        self.faults: list[str] = []

    def block_of(self, address: int) -> Block | None:
        return next((b for b in self.blocks.values() if b.address <= address < b.address + b.nbytes), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        graph, schema = self.graph, func._schema
        if graph is None or func.is_view or "empty" in schema.name:
            return self.adopted(func(*args, **kwargs), [*_flat(args), *_flat(kwargs)])
        if schema.is_mutable:
            written = kwargs.get("out", args[0])
            if all(block is not None and block.host for block in (self.block_of(w.data_ptr()) for w in _flat(written))):
                return func(*args, **kwargs)
            mine, named = (self.placed(args[0], Tensor.detach), *self.placed(args[1:])), self.placed(kwargs)
            graph.append(lambda: func(*_found(mine), **_found(named)))
            return written if schema.returns else None
        mine, named = self.placed(args), self.placed(kwargs)
        results = self.adopted(func(*args, **kwargs), [*_flat(args), *_flat(kwargs)])
        places = self.placed(_flat(results))

        def node() -> None:
            for place, one in zip(_found(places), _flat(func(*_found(mine), **_found(named))), strict=True):
                place.copy_(one)

        graph.append(node)
        for one in _flat(results):
            if one.is_floating_point():
                one.fill_(float("nan"))
        return results

    def adopted(self, results: Any, arguments: list[Tensor]) -> Any:
        """Results in memory that is known; those in memory of an argument stay."""
        if isinstance(results, list | tuple):
            return type(results)(self.adopted(one, arguments) for one in results)
        if not isinstance(results, Tensor):
            return results
        storage = results.untyped_storage()
        if not storage.nbytes() or any(storage.data_ptr() == one.untyped_storage().data_ptr() for one in arguments):
            return results
        block = Block(self, storage.nbytes())
        mine = _shaped(block.own(), results.dtype, results.shape, results.stride(), results.storage_offset())
        self.blocks[block.address] = block
        if self.graph is not None:
            self.graph.pool.append(mine.untyped_storage())
        return mine.copy_(results)

    def placed(self, value: Any, unknown: Callable[[Tensor], Tensor] = torch.clone) -> Any:
        """Tensors by their addresses; what becomes of those that were made elsewhere."""
        if isinstance(value, Tensor):
            block = self.block_of(value.data_ptr())
            return unknown(value) if block is None else Place(block, value)
        if isinstance(value, dict):
            return {name: self.placed(one, unknown) for name, one in value.items()}
        return type(value)(self.placed(one, unknown) for one in value) if isinstance(value, list | tuple) else value

    def on_host(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that returns pinned memory."""

        def made(*args: Any, **kwargs: Any) -> Tensor:
            assert self.graph is None, "memory of the host is allocated during a capture"
            tensor = make(*args, **kwargs)
            block = self.block_of(tensor.data_ptr())
            assert block is not None
            block.host = True
            return tensor

        return made

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        self.graph = Graph()
        try:
            yield self.graph
        finally:
            self.graph = None

    def launched(self, blocks: Iterable[Block]) -> None:
        """A launch on the current stream that uses what is hidden from the user."""
        for block in blocks:
            block.launch()
        self.waits = {(stream, other) for stream, other in self.waits if other != self.stream}

    def wait(self, other: int) -> None:
        self.waits.add((self.stream, other))

    def record(self, tensor: Tensor) -> None:
        block = self.block_of(tensor.data_ptr())
        if block is not None:
            block.recorded.add(self.stream)

    def named(self, addresses: Any) -> list[Block]:
        found = (self.block_of(address) for address in addresses if address)
        return [block for block in found if block is not None]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in _flat(one)] if isinstance(value, list | tuple) else []


def _found(value: Any) -> Any:
    if isinstance(value, Place):
        return value.tensor()
    if isinstance(value, dict):
        return {name: _found(one) for name, one in value.items()}
    return type(value)(map(_found, value)) if isinstance(value, list | tuple) else value


class Step:
    """`CudaStep`, whose launches a capture notes; a graph keeps those of then, whatever the plan is told later."""

    def __init__(self, device: Device, make: Any, **arguments: Any) -> None:
        self.device, self.make, self.step = device, partial(make, **arguments), make(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def prepare(self, **arguments: Any) -> bool:
        self.prepared = arguments
        return self.step.prepare(**arguments)

    def launch(self, numbers: dict[str, Any], memory: dict[str, int], device: int = 0, stream: int = 0) -> None:
        graph = self.device.graph
        if graph is None:
            self.device.launched(self.device.named(memory.get(name) for name in _HIDDEN))
            self.step.launch(numbers, memory)
            return
        step = self.make()
        step.prepare(**self.prepared)
        lists = [value for value in self.make.keywords.values() if isinstance(value, list)]
        addresses = [x for value in lists for x in value if isinstance(x, int)] + list(map(memory.get, _ADDRESSES))
        blocks = self.device.named([*addresses, *(v[0] for v in numbers.values() if isinstance(v, tuple))])
        graph.append(lambda: ([block.look() for block in blocks], step.launch(numbers, memory)))


class StepCounts:
    """`StepCounts` of the module, likewise."""

    def __init__(self, device: Device, made: int, skipped: int, count: int) -> None:
        self.device, self.own = device, (made, skipped)
        self.counts = emulated.native.StepCounts(made, skipped, count)

    def decays(self, *rule: Any, to: int, device: int, stream: int) -> None:
        self._launch(to, partial(self.counts.decays, *rule, to=to))

    def add(self, nonfinite: int, device: int, stream: int) -> None:
        self._launch(nonfinite, partial(self.counts.add, nonfinite))

    def _launch(self, address: int, launch: Callable[[], None]) -> None:
        hidden = self.device.named([address])
        if self.device.graph is None:
            self.device.launched(hidden)
            launch()
            return
        blocks = hidden + self.device.named(self.own)
        self.device.graph.append(lambda: ([block.look() for block in blocks], launch()))


class Host(emulated.Host):
    """The platform of `hfac.backends.cuda` on a stand-in."""

    def __init__(self, device: Device) -> None:
        self.device = device
        steps = emulated.native.CudaStep
        makers = {op: getattr(steps, op) for op in emulated.native.slots() if hasattr(steps, op)}
        found = {op: partial(Step, device, make) for op, make in makers.items()}
        self.native = SimpleNamespace(
            CudaStep=SimpleNamespace(**found),
            LaunchNumbers=dict,
            LaunchMemory=dict,
            StepCounts=partial(StepCounts, device),
        )
        self.host_table = device.on_host(super().host_table)

    def stream(self, device: torch.device) -> int:
        return self.device.stream

    def after(self, stream: int, device: torch.device) -> None:
        self.device.wait(stream)

    def used_on_another_stream(self, tensors: Any, device: torch.device) -> None:
        for tensor in tensors:
            self.device.record(tensor)

    def capturing(self) -> bool:
        return self.device.graph is not None

    def before_launch(self, workspace: Tensor) -> None:
        workspace.fill_(0xFF)


class Stream:
    """What Triton's launches ask of one."""

    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self) -> int:
        return self.number

    def wait_stream(self, other: "Stream") -> None:
        self.device.wait(other.number)


@contextmanager
def stand_in(backend: str) -> Iterator[Device]:
    """The backend, emulated.NAME or "triton", on a stand-in for a GPU."""
    device = Device()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "host_counters", lambda: None))  # steps are on the device
        if backend == "triton":
            from hfac.triton_kernels import platform
            from hfac.triton_kernels.launcher import Launcher

            launch = Launcher._launch

            def noted(self: Any, *given: Any) -> None:
                ours = {name: getattr(self, name) for name in ("items", "grad_table", "scalars", "flags")}
                if device.graph is None:
                    mine = [self.__dict__[name] for name in ("layouts", "workspace") if name in self.__dict__]
                    hidden = [*ours.values(), given[1], *mine]
                    device.launched(device.named(map(Tensor.data_ptr, hidden)))
                    launch(self, *given)
                    return
                more = {name: getattr(self, name) for name in ("squares", "watched")}
                ours |= {name: tensor for name, tensor in more.items() if tensor is not None}
                numbers = [
                    *self.items.flatten().tolist(),
                    *(self.grad_table if self.staged.source is None else self.staged.source).flatten().tolist(),
                ]
                blocks = device.named([*numbers, self.layouts.data_ptr()])
                places, tiles = device.placed(ours), device.placed(given[1])
                launcher = SimpleNamespace(device=self.device, squares=None, watched=None)

                def node() -> None:
                    for block in blocks:
                        block.look()
                    launcher.__dict__.update(_found(places))
                    launcher._memory = lambda *a: Launcher._memory(launcher, *a)
                    launch(launcher, given[0], _found(tiles), given[2])

                device.graph.append(node)

            def record_stream(tensor: Tensor, stream: Stream) -> None:
                device.record(tensor)

            stack.enter_context(mock.patch.object(Launcher, "_launch", noted))
            stack.enter_context(mock.patch.object(Tensor, "record_stream", record_stream))
            stack.enter_context(mock.patch.object(platform, "capturing", lambda _: device.graph is not None))
            stack.enter_context(mock.patch.object(platform, "stream_of", lambda _: Stream(device, device.stream)))
            stack.enter_context(mock.patch.object(platform, "host_memory", device.on_host(platform.host_memory)))
        else:
            if backend not in backends.TABLE:
                stack.enter_context(emulated.registered())
            ops = cuda.Kernels(Host(device))
            stack.enter_context(mock.patch.dict(backends.TABLE))
            backends.register(
                backends.Backend(backend, "", lambda _: None, lambda: ops, automatic=backend != emulated.NAME)
            )
        stack.enter_context(device)
        yield device
        assert not device.faults
