"""What a sharded step asks of the host: few operations of torch, however many parameters there are, and nothing that
waits for the device. Kernels and other ranks are imagined (bench/imagined.py)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import sharded_host
from bench.imagined import equal_ranks, idle_kernels, imagined_ranks, unread_numbers
from hfac.staging import Fetched

#: of torch, for a step of any number of parameters
OPERATIONS = 200


@pytest.fixture
def idle():
    """The name of a backend whose kernels do nothing, in a process group of which this is one rank."""
    with imagined_ranks(sharded_host.RANKS), equal_ranks(), idle_kernels() as backend:
        yield backend


@pytest.mark.parametrize("mode", sharded_host.MODES)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_operations_of_a_step(idle, name, mode):
    few, many = (sharded_host.measured(name, count, mode, idle, 0)["operations"] for count in (100, 300))
    assert many == few <= OPERATIONS


aten = torch.ops.aten
#: A number that the host reads; lists of the host that become indices.
FORBIDDEN = (aten._local_scalar_dense, aten.equal, aten.index, aten.index_put, aten.index_put_, aten.lift_fresh)


class Device(TorchDispatchMode):
    """Takes "meta" for the device: nothing can be read of a tensor there, and nothing may be copied to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [arg for arg in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)]
        devices = {tensor.device.type for tensor in inputs if tensor.ndim} | {"meta"}
        found = func(*args, **kwargs)
        target = found.device.type if isinstance(found, torch.Tensor) else "meta"
        assert func.overloadpacket not in FORBIDDEN, func
        assert devices == {"meta"} and target == "meta", f"{func} takes tensors of the host"
        return found


@pytest.mark.parametrize("mode", sharded_host.MODES)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_nothing_is_exchanged_with_the_device(idle, name, mode, monkeypatch):
    """After the first step, but for what is fetched behind the sums; and of that, where not single parameters are left
    out, nothing is read before the next step."""
    optimizer = sharded_host.optimizer_of(name, 10, backend=idle, device="meta", **sharded_host.MODES[mode])
    with unread_numbers():
        for _ in range(2):
            optimizer.step()
        if mode != "skip":
            optimizer._settle()
            monkeypatch.setattr(Fetched, "read", _read)
        with Device():
            optimizer.step()
        monkeypatch.undo()


def _read(fetched):
    raise AssertionError("the host waits for a number")
