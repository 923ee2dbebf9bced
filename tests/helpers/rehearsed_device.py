"""The GPU of a rehearsal (tests/helpers/rehearsal.py): its memory, streams, graphs and synchronizations.

Memory of the device is memory of the host that is noted here, by address, for as long as its storage lives.
"""

import ctypes
import gc
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CUDA, PINNED = "cuda", "pinned"
DEVICE = torch.device("cuda", 0)
#: Their results are places, which the next operation checks while it is captured.
_INDICES = {torch.ops.aten.repeat_interleave.Tensor}
_NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"


class Memory:
    """One allocation. It hangs on its storage, and goes with it."""

    alive = True

    def __init__(self, gpu: "Gpu", kind: str, address: int, nbytes: int) -> None:
        self.gpu, self.kind, self.address, self.nbytes = gpu, kind, address, nbytes
        self.stream = gpu.current
        self.pooled = gpu.capture is not None  # a graph's, which orders its own streams
        #: streams whose kernels read or wrote it since the last synchronization, and those that the allocator knows of
        self.used: set[int] = set()
        self.recorded: set[int] = set()

    def __del__(self) -> None:
        self.gpu.release(self)


class Tag:
    """What a storage holds of its `Memory`: that outlives it, for whoever wants to know whether it is alive."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __del__(self) -> None:
        self.memory.gpu.release(self.memory)


class Place:
    """Where a tensor lies: what a graph keeps of it, which keeps no memory alive."""

    def __init__(self, gpu: "Gpu", tensor: Tensor) -> None:
        self.memory = gpu.memory(tensor)
        assert self.memory is not None
        self.dtype, self.size, self.stride = tensor.dtype, tuple(tensor.shape), tensor.stride()
        self.offset = tensor.storage_offset()

    def tensor(self) -> Tensor:
        """The tensor, made anew from the address."""
        memory = self.memory
        if not memory.alive:
            raise RuntimeError(
                f"a graph's replay reads or writes a {memory.kind} tensor {list(self.size)} of {self.dtype} whose "
                "memory has been freed since the capture"
            )
        if not memory.nbytes or 0 in self.size:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="cpu")
        whole = torch.frombuffer((ctypes.c_ubyte * memory.nbytes).from_address(memory.address), dtype=torch.uint8)
        whole = whole[: memory.nbytes // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        return whole.as_strided(self.size, self.stride, self.offset)


class Gpu:
    """State of the device that a rehearsal has."""

    def __init__(self) -> None:
        self.by_address: dict[int, Memory] = {}
        self.addresses: list[int] = []  # the same, in order
        self.allocated = self.peak = 0
        self.current = 0  # stream
        self.streams = 0
        self.capture: Graph | None = None
        self.sync_debug = 0
        #: what would have gone wrong unnoticed; raised by the next synchronization, and at the end of the rehearsal
        self.faults: list[str] = []

    # Memory.

    def memory(self, tensor: Tensor) -> Memory | None:
        """What is known of a tensor's memory; None where it is the host's own."""
        try:
            tag = tensor.untyped_storage().__dict__.get("rehearsed")
        except NotImplementedError:  # it has no storage
            return None
        return None if tag is None else tag.memory

    def kind(self, tensor: Tensor) -> str | None:
        """CUDA, PINNED or None; of a DTensor what its shard is."""
        memory = self.memory(getattr(tensor, "_local_tensor", tensor))
        return None if memory is None else memory.kind

    def own(self, tensor: Tensor, kind: str) -> None:
        """Notes that a tensor's storage, which is new, is of that kind."""
        storage = tensor.untyped_storage()
        if "rehearsed" in storage.__dict__:
            return
        memory = Memory(self, kind, storage.data_ptr(), storage.nbytes())
        storage.rehearsed = Tag(memory)
        if memory.address:
            self.by_address[memory.address] = memory
            insort(self.addresses, memory.address)
        if kind == CUDA:
            self.allocated += memory.nbytes
            self.peak = max(self.peak, self.allocated)
            if self.capture is not None:
                self.capture.pool.append(storage)

    def release(self, memory: Memory) -> None:
        if not memory.alive:
            return
        memory.alive = False
        if self.by_address.get(memory.address) is memory:
            del self.by_address[memory.address]
            self.addresses.pop(bisect_right(self.addresses, memory.address) - 1)
        if memory.kind == CUDA:
            self.allocated -= memory.nbytes
            late = memory.used - memory.recorded - {memory.stream}
            if late and not memory.pooled:
                self.faults.append(
                    f"{memory.nbytes} bytes allocated on stream {memory.stream} were freed while stream {min(late)} "
                    "may still use them: neither a synchronization nor record_stream stood between"
                )

    def at(self, address: int) -> Memory | None:
        """The living memory that holds an address."""
        k = bisect_right(self.addresses, address) - 1
        memory = self.by_address[self.addresses[k]] if k >= 0 else None
        return memory if memory is not None and address < memory.address + memory.nbytes else None

    def record_stream(self, tensor: Tensor, stream: Any) -> None:
        memory = self.memory(tensor)
        if memory is None or memory.kind != CUDA:
            raise NotImplementedError("Could not run 'aten::record_stream' with arguments from the 'CPU' backend.")
        memory.recorded.add(stream.cuda_stream)

    # Synchronization.

    def synchronizes(self, what: str) -> None:
        """Something waits for the device."""
        self.forbid(what)
        if self.sync_debug == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")

    def forbid(self, what: str) -> None:
        """Something that a capture does not permit."""
        if self.capture is not None:
            self.capture.broken = what
            raise RuntimeError(f"{_NOT_PERMITTED} ({what})")

    def synchronize(self, *_: Any) -> None:
        self.forbid("a synchronization")
        for memory in self.by_address.values():
            memory.used.clear()
        self.raise_faults()

    def raise_faults(self) -> None:
        faults, self.faults = self.faults, []
        if faults:
            raise RuntimeError("; ".join(faults))

    # torch.cuda, as far as it is used.

    def names(self) -> dict[str, Any]:
        """Attributes of `torch.cuda` while the rehearsal lasts."""
        gpu = self

        class Stream:
            def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
                gpu.streams += 1
                self.cuda_stream, self.device = gpu.streams, DEVICE

            def synchronize(self) -> None:
                gpu.synchronize()

            def wait_stream(self, stream: Any) -> None:
                for memory in gpu.by_address.values():
                    if memory.stream == self.cuda_stream:
                        memory.used.discard(stream.cuda_stream)

            def wait_event(self, event: Any) -> None:
                if event.stream is not None:
                    self.wait_stream(event.stream)

            def record_event(self, event: Any = None) -> Any:
                event = event or Event()
                event.record(self)
                return event

            def query(self) -> bool:
                return True

            def __eq__(self, other: object) -> bool:
                return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

            def __hash__(self) -> int:
                return self.cuda_stream

            def __enter__(self) -> "Stream":
                self.before = [*getattr(self, "before", []), gpu.current]
                gpu.current = self.cuda_stream
                return self

            def __exit__(self, *_: object) -> None:
                gpu.current = self.before.pop()

        class Event:
            def __init__(self, enable_timing: bool = False, **_: Any) -> None:
                self.timed, self.time, self.stream = enable_timing, 0.0, None

            def record(self, stream: Any = None) -> None:
                self.time, self.stream = time.perf_counter(), stream or current_stream()

            def wait(self, stream: Any = None) -> None:
                (stream or current_stream()).wait_event(self)

            def query(self) -> bool:
                return True

            def synchronize(self) -> None:
                gpu.synchronize()

            def elapsed_time(self, end: Any) -> float:
                if not (self.timed and end.timed):
                    raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
                return max(1e3 * (end.time - self.time), 1e-4)

        def numbered(number: int) -> Any:
            stream = object.__new__(Stream)
            stream.cuda_stream, stream.device = number, DEVICE
            return stream

        def current_stream(device: Any = None) -> Any:
            return numbered(gpu.current)

        def graph(cuda_graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> AbstractContextManager[None]:
            return cuda_graph.capturing(stream or Stream())

        def set_sync_debug_mode(mode: int | str) -> None:
            gpu.sync_debug = mode if isinstance(mode, int) else ["default", "warn", "error"].index(mode)

        def index_of(device: Any = None) -> int:
            index = device if isinstance(device, int) else torch.device(DEVICE if device is None else device).index or 0
            if index:
                raise RuntimeError("CUDA error: invalid device ordinal")
            return index

        def properties(device: Any = None) -> SimpleNamespace:
            index_of(device)
            return SimpleNamespace(
                name="a rehearsal's GPU",
                major=9,
                minor=0,
                total_memory=80 * 10**9,
                multi_processor_count=132,
                L2_cache_size=50 << 20,
            )

        def reset_peak_memory_stats(device: Any = None) -> None:
            gpu.peak = gpu.allocated

        def nothing(*_: Any, **__: Any) -> None:
            pass

        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": nothing,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": index_of,
            "device": lambda device: nullcontext(index_of(device)),
            "get_device_properties": properties,
            "get_device_name": lambda device=None: properties(device).name,
            "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *_, **__: True,
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": lambda *_, **__: Graph(gpu),
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": current_stream,
            "default_stream": lambda device=None: numbered(0),
            "stream": lambda stream: nullcontext() if stream is None else stream,
            "set_stream": lambda stream: setattr(gpu, "current", stream.cuda_stream),
            "is_current_stream_capturing": lambda: gpu.capture is not None,
            "synchronize": gpu.synchronize,
            "set_sync_debug_mode": set_sync_debug_mode,
            "get_sync_debug_mode": lambda: gpu.sync_debug,
            "memory_allocated": lambda device=None: gpu.allocated,
            "memory_reserved": lambda device=None: gpu.allocated,
            "max_memory_allocated": lambda device=None: gpu.peak,
            "reset_peak_memory_stats": reset_peak_memory_stats,
            "mem_get_info": lambda device=None: (80 * 10**9 - gpu.allocated, 80 * 10**9),
            "empty_cache": nothing,
            "manual_seed": torch.manual_seed,
            "manual_seed_all": torch.manual_seed,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        }


class Graph:
    """A CUDA graph. A capture carries out nothing that writes memory of the device: it notes operations by the
    addresses that they read and write, and a replay carries them out on what lies there then. Memory that is allocated
    during the capture is the graph's for as long as it lives, whoever else drops it; no other memory is."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.nodes: list[Callable[[], None]] | None = None
        self.pool: list[Any] = []  # storages
        self.broken: str | None = None

    @contextmanager
    def capturing(self, stream: Any) -> Any:
        gc.collect()
        self.gpu.synchronize()
        with stream:
            self.capture_begin()
            try:
                yield
            finally:
                self.gpu.capture = None
        self.capture_end()

    def capture_begin(self, *_: Any, **__: Any) -> None:
        if self.gpu.capture is not None:
            raise RuntimeError("a capture is under way")
        self.gpu.capture, self.nodes = self, []

    def capture_end(self) -> None:
        self.gpu.capture = None
        if self.broken is not None:
            self.nodes = None
            raise RuntimeError(f"CUDA error: operation failed due to a previous error during capture ({self.broken})")

    def replay(self) -> None:
        self.gpu.forbid("a replay")
        if self.nodes is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        for node in self.nodes:
            node()

    def reset(self) -> None:
        self.nodes, self.pool = None, []

    def pool_handle(self) -> tuple[int, int]:
        return (0, id(self))

    # A function of torch, called during the capture.

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Notes an operation for the replays. Where it makes new tensors they are returned, with nothing in them that
        means anything yet."""
        gpu, schema = self.gpu, func._schema

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Place(gpu, value) if gpu.memory(value) is not None else value.detach().clone()
            return type(value)(map(kept, value)) if isinstance(value, list | tuple) else value

        assert self.nodes is not None
        mine, named = list(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}
        if schema.is_mutable:
            self.nodes.append(lambda: func(*map(placed, mine), **{n: placed(v) for n, v in named.items()}))
            written = [
                kwargs.get(a.name, args[i] if i < len(args) else None)
                for i, a in enumerate(schema.arguments)
                if a.alias_info is not None and a.alias_info.is_write
            ]
            return None if not schema.returns else written[0] if len(schema.returns) == 1 else tuple(written)
        return mine, named

    def note_results(self, func: Any, kept: Any, results: Any) -> None:
        """The new tensors of an operation that `note` has taken the arguments of: every replay fills them."""
        args, kwargs = kept
        places = [Place(self.gpu, one) for one in flat(results)]
        for one in flat(results):
            if one.is_floating_point():
                one.fill_(float("nan"))
            elif one.dtype != torch.bool and func not in _INDICES:
                one.fill_(1)  # which may be a place

        def node() -> None:
            found = func(*map(placed, args), **{name: placed(value) for name, value in kwargs.items()})
            for place, one in zip(places, flat(found), strict=True):
                place.tensor().copy_(one)

        assert self.nodes is not None
        self.nodes.append(node)


def placed(value: Any) -> Any:
    if isinstance(value, Place):
        return value.tensor()
    return type(value)(map(placed, value)) if isinstance(value, list | tuple) else value


def flat(value: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in flat(entry)]
    return []
