"""A rehearsal of what runs on a GPU, on a machine without one: tensors of the device "cuda" lie in the memory of the
host, but every one knows which device it was asked for, and they are refused together as torch refuses them.

    with rehearsal.rehearse():                     # or the fixture `gpu`, in a module of tests
    python tests/helpers/rehearsal.py -m bench.one_step    # any module, its __main__

The backend "cuda" is there (the kernels compiled for the host, emulated.py), with its own tables, streams and
graphs (rehearsed_device.py). Launches are checked: every address that the kernels are given must lie in living
memory of the device. Not rehearsed are times, races between streams, and what torch does in C++ for a CUDA device only.
"""

import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from rehearsed_device import CUDA, DEVICE, PINNED, Gpu, flat  # noqa: E402

CPU = torch.device("cpu")
aten = torch.ops.aten
#: Copies between devices.
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
#: What a GPU's result is waited for.
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.allclose.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
}
#: Not tagged as pointwise, but they take a scalar from the host likewise.
_TAKE_SCALARS = ("fill", "masked_fill", "_foreach", "scatter", "_amp", "_fused")


class Dispatch(TorchDispatchMode):
    """Sees every operation: refuses mixed devices, marks results, records captures."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.wanted: str | None = None  # the device that the call under way names: "cpu", CUDA or PINNED

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu, wanted = kwargs or {}, self.gpu, self.wanted
        tensors = flat(list(args)) + flat(list(kwargs.values()))
        kinds = list(map(gpu.kind, tensors))
        here = CUDA in kinds
        if not here and PINNED not in kinds and wanted in (None, "cpu"):
            return func(*args, **kwargs)
        if here and wanted is None and func not in _COPIES:
            self.refuse_mixed(func, args, tensors, kinds)
        if here and func in _READS:
            gpu.synchronizes(str(func))
        if func in _COPIES:
            source = kinds[1] if func is aten.copy_.default else kinds[0]
            target = kinds[0] if func is aten.copy_.default else source if wanted is None else wanted
            self.check_copy(source, None if target == "cpu" else target, args, kwargs)
        result_kind = wanted if wanted is not None else CUDA if here else None
        if gpu.capture is not None and (here or wanted == CUDA):
            return self.capture(func, args, kwargs, tensors, result_kind)
        results = func(*args, **kwargs)
        self.mark(results, tensors, result_kind)
        return results

    def mark(self, results: Any, tensors: list[Tensor], kind: str | None) -> list[Tensor]:
        """Notes new results as of that kind, and returns them; those in memory of an argument are what they were."""
        old = {tensor.untyped_storage()._cdata for tensor in tensors}
        new = [one for one in flat(results) if one.untyped_storage()._cdata not in old]
        if kind in (CUDA, PINNED):
            for one in new:
                self.gpu.own(one, kind)
        return new

    def capture(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], kind: str | None) -> Any:
        graph = self.gpu.capture
        assert graph is not None
        if torch.Tag.inplace_view in func.tags or func.is_view:
            return func(*args, **kwargs)
        kept = graph.note(func, args, kwargs)
        if func._schema.is_mutable:
            return kept
        results = func(*args, **kwargs)
        if self.mark(results, tensors, kind):
            with self.unseen():
                graph.note_results(func, kept, results)
        return results

    @contextmanager
    def unseen(self) -> Iterator[None]:
        graph, self.gpu.capture = self.gpu.capture, None
        try:
            yield
        finally:
            self.gpu.capture = graph

    def check_copy(self, source: str | None, target: str | None, args: Any, kwargs: Any) -> None:
        if (source == CUDA) == (target == CUDA):
            return
        host = source if target == CUDA else target
        waits = not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
        what = "a copy " + ("to" if target == CUDA else "from") + " the device"
        if host != PINNED:
            self.gpu.forbid(f"{what}, with memory of the host that is not pinned")
        if waits:
            self.gpu.synchronizes(f"{what} that is not non_blocking")

    def refuse_mixed(self, func: Any, args: Any, tensors: list[Tensor], kinds: list[str | None]) -> None:
        strangers = [tensor for tensor, kind in zip(tensors, kinds, strict=True) if kind != CUDA]
        if not strangers:
            return
        if func in _INDEXING:
            own = [args[0], *args[2:3]]
            indices = [one for one in flat(args[1]) if self.gpu.kind(one) != CUDA]
            if indices:
                self.gpu.synchronizes("indices from the host")
            strangers = [one for one in flat(own) if self.gpu.kind(one) != CUDA]
            if self.gpu.kind(args[0]) != CUDA:
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("_foreach") and self.apart(args):
            return
        written = flat([a for a, of in zip(args, func._schema.arguments, strict=False) if of.is_out or _writes(of)])
        scalars = torch.Tag.pointwise in func.tags or func in _INDEXING or name.startswith(_TAKE_SCALARS)
        if any(one.dim() or not scalars or any(one is other for other in written) for one in strangers):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func}: {', '.join(f'{list(t.shape)} on {k or CPU}' for t, k in zip(tensors, kinds, strict=True))})"
            )

    def apart(self, args: Any) -> bool:
        """Lists whose entries k are on one device, for every k: torch takes them one by one."""
        lists = [arg for arg in args if isinstance(arg, list | tuple) and flat(arg)]
        loose = [arg for arg in args if isinstance(arg, Tensor)]
        kinds = [{self.gpu.kind(one) == CUDA for one in entry} for entry in zip(*lists, strict=False)]
        return not loose and all(len(kind) == 1 for kind in kinds)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class Moved(torch.autograd.Function):
    """A copy on another device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return to(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back(grad), None, None


class Rehearsal(TorchFunctionMode):
    """Sees every call from Python: what a tensor says of its device, and in whose memory a new one is to be."""

    def __init__(self, gpu: Gpu, dispatch: Dispatch) -> None:
        super().__init__()
        self.gpu, self.dispatch = gpu, dispatch
        T = Tensor
        self.handlers: dict[Any, Callable[..., Any]] = {
            T.device.__get__: lambda f, x: DEVICE if gpu.kind(x) == CUDA else f(x),
            T.is_cuda.__get__: lambda f, x: gpu.kind(x) == CUDA,
            T.is_cpu.__get__: lambda f, x: gpu.kind(x) != CUDA and f(x),
            T.get_device: lambda f, x: 0 if gpu.kind(x) == CUDA else f(x),
            T.is_pinned: lambda f, x, *_: gpu.kind(x) == PINNED,
            T.type: self.type,
            T.grad.__set__: self.set_grad,
            T.to: self.to,
            T.cuda: lambda f, x, device=None, non_blocking=False, **_: self.move(x, CUDA, non_blocking=non_blocking),
            T.cpu: lambda f, x, *_, **__: self.move(x, "cpu"),
            T.pin_memory: self.pin,
            T.numpy: self.numpy,
            T.__array__: self.numpy,
            T.tolist: self.tolist,
            T.__deepcopy__: self.deepcopy,
            torch.as_tensor: self.as_tensor,
            torch.asarray: self.as_tensor,
        }
        self.factories = _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            self.check_generator(kwargs["generator"], args, kwargs.get("device"))
        if isinstance(func, FunctionType) and not func.__module__.startswith("torch"):
            func = _replaced(func)
        handler = self.handlers.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if "device" in kwargs or "pin_memory" in kwargs or func in self.factories:
            return self.made(func, args, dict(kwargs))
        return func(*args, **kwargs)

    def check_generator(self, generator: Any, args: Any, device: Any) -> None:
        tensor = next(iter(flat(list(args))), None)
        on = (
            CUDA if tensor is not None and self.gpu.kind(tensor) == CUDA else kind_of(device or default_device() or CPU)
        )
        if generator.device.type != on:
            raise RuntimeError(f"Expected a '{on}' device type for generator but found '{generator.device.type}'")

    def made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call that may name a device."""
        device = kwargs.pop("device", None)
        if device is None and func in self.factories:
            device = default_device()
        kind = None if device is None else kind_of(device)
        if kwargs.pop("pin_memory", False):
            if kind == CUDA:
                raise RuntimeError("Only dense CPU tensors can be pinned")
            self.gpu.forbid("an allocation of pinned memory")
            kind = PINNED
        if kind is None or kind == "other":
            return func(*args, **kwargs, **({} if device is None else {"device": device}))
        with self.asking(kind):
            result = func(*args, **kwargs, device=CPU)
        if isinstance(result, Tensor) and kind != "cpu" and self.gpu.kind(result) is None:
            # Such as torch.tensor, which dispatches nothing: numbers of the host.
            if kind == CUDA:
                self.gpu.synchronizes("a tensor of numbers that the host has")
            with self.asking(kind):
                return result.detach().clone().requires_grad_(result.requires_grad)
        return result

    @contextmanager
    def asking(self, kind: str | None) -> Iterator[None]:
        before, self.dispatch.wanted = self.dispatch.wanted, kind
        try:
            yield
        finally:
            self.dispatch.wanted = before

    def to(self, func: Any, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        other = args[0] if args else kwargs.pop("other", None)
        if isinstance(other, Tensor):
            kwargs.update(device=DEVICE if self.gpu.kind(other) == CUDA else CPU, dtype=other.dtype)
            args = args[1:]
        if len(args) > 3 or (len(args) == 3 and not isinstance(args[1], torch.dtype)):
            *args, copy = args
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        options = {} if memory_format is None else {"memory_format": memory_format}
        kind = None if device is None else kind_of(device)
        if kind == "other":
            return func(tensor, device, dtype or tensor.dtype, non_blocking, copy, **options)
        return self.move(tensor, kind, dtype, non_blocking, copy, options)

    def move(
        self,
        tensor: Tensor,
        kind: str | None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
        options: Any = None,
    ) -> Tensor:
        """`Tensor.to`."""
        dtype, options = dtype or tensor.dtype, options or {}
        here = self.gpu.kind(tensor)
        crosses = kind is not None and (here == CUDA) != (kind == CUDA)

        def to(x: Tensor) -> Tensor:
            with self.asking(kind if crosses else None):
                return Tensor.to(x, dtype, non_blocking, copy or crosses, **options)

        if crosses and tensor.requires_grad and torch.is_grad_enabled():
            back, of = ("cpu" if here != CUDA else CUDA), tensor.dtype
            return Moved.apply(tensor, to, lambda grad: self.move(grad, back, of))
        return to(tensor)

    def as_tensor(self, func: Any, data: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, Tensor):
            return data if dtype is None and device is None else self.to(None, data, device=device, dtype=dtype)
        return self.made(func, (data,), {"dtype": dtype, "device": device, **kwargs})

    def pin(self, func: Any, tensor: Tensor, *_: Any) -> Tensor:
        if self.gpu.kind(tensor) == CUDA:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        self.gpu.forbid("an allocation of pinned memory")
        if self.gpu.kind(tensor) == PINNED:
            return tensor
        with self.asking(PINNED):
            return tensor.clone()

    def type(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return func(tensor, *args, **kwargs)
        return func(tensor).replace("torch.", "torch.cuda.") if self.gpu.kind(tensor) == CUDA else func(tensor)

    def numpy(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gpu.kind(tensor) == CUDA and not kwargs.get("force"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        return func(tensor, *args, **kwargs)

    def tolist(self, func: Any, tensor: Tensor) -> Any:
        if self.gpu.kind(tensor) == CUDA:
            self.gpu.synchronizes("tolist")
        return func(tensor)

    def set_grad(self, func: Any, tensor: Tensor, grad: Tensor | None) -> None:
        if grad is not None and (self.gpu.kind(grad) == CUDA) != (self.gpu.kind(tensor) == CUDA):
            raise RuntimeError("assigned grad has data located on a different device")
        func(tensor, grad)

    def deepcopy(self, func: Any, tensor: Tensor, memo: Any) -> Tensor:
        """Copies a storage behind the dispatcher's back."""
        copied = func(tensor, memo)
        for one, of in ((copied, tensor), (copied.grad, tensor.grad)):
            kind = None if of is None else self.gpu.kind(of)
            if kind is not None:
                self.gpu.own(one, kind)
        return copied


def _replaced(func: Any) -> Any:
    """torch's own method, where a test has put ``func`` in its place, which has just called it: torch finds methods by
    their names."""
    names = (name for name, value in vars(Tensor).items() if value is func)
    return next((getattr(torch._C.TensorBase, name) for name in names), func)


class Generator(torch._C.Generator):
    """A generator that knows the device it was asked for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, device="cpu")
        made.asked = DEVICE if torch.device(device).type == "cuda" else CPU
        return made

    @property
    def device(self) -> torch.device:
        return self.asked


def kind_of(device: Any) -> str:
    """ "cpu", CUDA or "other"."""
    if isinstance(device, int):
        return CUDA
    device = torch.device(device)
    if device.type == "cuda" and device.index:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device.type if device.type in ("cpu", "cuda") else "other"


def default_device() -> torch.device | None:
    """What `torch.set_default_device` was told."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _grouped(gpu: Gpu) -> Callable[..., Any]:
    """torch's grouping of lists by device and type, which is made in C++."""
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for (device, dtype), (entries, indices) in group(lists, True).items():
            for k, index in enumerate(indices):
                first = next(one[k] for one in entries if one and one[k] is not None)
                key = (DEVICE if gpu.kind(first) == CUDA else device, dtype)
                new, at = found.setdefault(key, ([[] for _ in entries], []))
                for into, one in zip(new, entries, strict=True):
                    if one:
                        into.append(one[k])
                at.append(index)
        return found if with_indices else {key: (entries, []) for key, (entries, _) in found.items()}

    return grouped


def _without_cuda(init: Callable[..., None]) -> Callable[..., None]:
    """torch's profiler knows nothing of this GPU."""

    def of_the_host(profiler: Any, *, activities: Any = None, **options: Any) -> None:
        init(profiler, activities=[torch.profiler.ProfilerActivity.CPU], **options)

    return of_the_host


@contextmanager
def rehearse() -> Iterator[Gpu]:
    """Makes the machine look, to whatever runs inside, as if it had one GPU."""
    import emulated

    from bench import timing

    gpu = Gpu()
    dispatch = Dispatch(gpu)
    with ExitStack() as stack:
        for name, value in gpu.names().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", lambda x, stream: gpu.record_stream(x, stream)))
        stack.enter_context(mock.patch.multiple(torch.cuda.profiler, start=lambda: None, stop=lambda: None))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        grouping = "_group_tensors_by_device_and_dtype"
        stack.enter_context(mock.patch.object(torch._C, grouping, _grouped(gpu)))
        profile = torch.profiler.profile
        stack.enter_context(mock.patch.object(profile, "__init__", _without_cuda(profile.__init__)))
        stack.enter_context(mock.patch.dict(timing._COPY_BYTES, cuda=2**20))
        stack.enter_context(emulated.instead_of_a_gpu(gpu))
        stack.enter_context(dispatch)
        stack.enter_context(Rehearsal(gpu, dispatch))
        yield gpu
        gpu.raise_faults()


#: There is a GPU, or a rehearsal is under way: nothing is to be rehearsed.
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=not HAS_GPU)
def gpu() -> Iterator[Gpu | None]:
    """In a module that imports it, every test runs in a rehearsal, where there is no GPU."""
    if HAS_GPU:
        yield None
    else:
        with rehearse() as found:
            yield found


def main(arguments: list[str]) -> None:
    """The command."""
    if len(arguments) < 2 or arguments[0] != "-m":
        raise SystemExit("usage: python tests/helpers/rehearsal.py -m MODULE ARGUMENTS...")
    sys.argv = arguments[1:]
    with rehearse():
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
