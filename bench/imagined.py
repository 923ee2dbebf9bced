"""What a sharded step needs and need not be here, so that its host's part can be counted and timed alone: other ranks,
kernels, and numbers that come from a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hfac import backends
from hfac.distributed import bucket
from hfac.spec import Op
from hfac.staging import Fetched


@contextmanager
def imagined_ranks(world: int, rank: int = 0) -> Iterator[None]:
    """A process group of which this process is one rank and the others do not exist; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def equal_ranks() -> Iterator[None]:
    """Within `imagined_ranks`: all-reduces find on the other ranks what is on this one, without being counted."""
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **kwargs: Any) -> Any:
        if op == dist.ReduceOp.SUM:
            with _disable_current_modes():
                tensor.mul_(dist.get_world_size(group))
        return real(tensor, op, group=group, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = real


class Nothing:
    """A backend of kernels that do nothing, and take what CUDA's take."""

    class Call:
        unscales = True

        def __call__(self, grads: Any, nonfinite: Any = None, **numbers: Any) -> None:
            pass

    def has(self, op: Op) -> bool:
        return True

    def bind(self, operands: Any) -> Call:
        return self.Call()


@contextmanager
def idle_kernels() -> Iterator[str]:
    """The name of a backend of them."""
    backends.register(backends.Backend("idle", "nothing", lambda device: None, Nothing, automatic=False))
    try:
        yield "idle"
    finally:
        backends.unregister("idle")


@contextmanager
def unread_numbers() -> Iterator[None]:
    """Numbers that a step fetches from the meta device, which has none: of refused gradients there are none, and on
    which ranks there is a gradient is not checked."""
    begin, read, agreed = Fetched.__init__, Fetched.read, bucket.agreed

    def count(fetched: Any, numbers: Tensor) -> None:
        assert numbers.is_meta
        fetched.is_here, fetched._host = False, numbers

    Fetched.__init__ = count
    Fetched.read = lambda fetched: [0.0] * len(fetched._host)
    bucket.agreed = lambda *args: None
    try:
        yield
    finally:
        Fetched.__init__, Fetched.read, bucket.agreed = begin, read, agreed


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})
