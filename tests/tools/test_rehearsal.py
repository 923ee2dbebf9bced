"""The rehearsal itself (rehearsal.py): it refuses what a GPU would refuse, and replays read what is there now."""

import copy
import subprocess
import sys
from pathlib import Path

import calls
import emulated
import pytest
import torch
from gpu_steps import on_device
from rehearsal import HAS_GPU, gpu  # noqa: F401 (a fixture)
from running import gradients, parameters
from torch.nn import Linear, Parameter

import hfac
from hfac import backends

pytestmark = pytest.mark.skipif(HAS_GPU, reason="there is a GPU here: nothing is rehearsed")
BUILT = pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)
DEVICE = torch.device("cuda")
TWO_DEVICES = "Expected all tensors to be on the same device"
CAPTURING = "not permitted when stream is capturing"


def devices(*tensors):
    return {str(tensor.device) for tensor in tensors}


def test_tensors_keep_the_device_that_they_were_asked_for():
    x, host = torch.arange(6.0, device="cuda"), torch.arange(6.0)
    p = Parameter(x.view(2, 3))
    (p * p).sum().backward()
    made = [x, x[1:], x.view(2, 3).t(), x + 1, x.clone(), x.detach(), p, p.data, p.grad, host.cuda(), host.to(x)]
    made += [torch.empty_like(host, device=DEVICE), torch.empty_like(x), x.new_zeros(3), x.bfloat16(), x.sum()]
    made += [*x.unbind(), *x.split(2), *torch._foreach_mul([x, x], 2), torch.add(x, x, out=torch.empty_like(x))]
    made += [
        copy.deepcopy(x),
        copy.deepcopy(p),
        torch.tensor([1.0], device="cuda"),
        torch.as_tensor(host, device="cuda"),
    ]
    made += [*Linear(2, 3).cuda().state_dict().values(), *Linear(2, 3, device="cuda").parameters()]
    assert devices(*made) == {"cuda:0"} and all(one.is_cuda and not one.is_cpu for one in made)
    assert devices(x.cpu(), x.to("cpu"), host, host + 1, torch.zeros_like(x, device="cpu"), p.grad.cpu()) == {"cpu"}
    pinned = torch.empty(3, pin_memory=True)
    assert pinned.is_pinned() and pinned.device.type == "cpu" and host.pin_memory().is_pinned() and not x.is_pinned()


def test_a_default_device():
    torch.set_default_device("cuda")
    try:
        assert devices(torch.zeros(3), torch.tensor(1.0), torch.arange(3)) == {"cuda:0"}
        assert devices(torch.zeros(3, device="cpu"), torch.tensor(1.0, device="cpu")) == {"cpu"}
        with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
            torch.empty(3, pin_memory=True)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, generator=torch.Generator())
    finally:
        torch.set_default_device(None)
    with torch.device("cuda"):
        assert torch.zeros(3).is_cuda
    assert torch.zeros(3).is_cpu


MIXED = {
    "add": lambda x, y: x + y,
    "in place": lambda x, y: x.add_(y),
    "the other way round": lambda x, y: y.add_(x),
    "out": lambda x, y: torch.add(x, x, out=y),
    "a scalar of the device into the host's": lambda x, y: y.add_(x.sum()),
    "cat": lambda x, y: torch.cat([x, y]),
    "stack of scalars": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "matmul": lambda x, y: x @ y,
    "foreach": lambda x, y: torch._foreach_add_([x], [y]),
    "index of the host's": lambda x, y: y[x.long()],
    "values": lambda x, y: x.index_put_((x.long(),), y),
    "linear": lambda x, y: Linear(6, 6).cuda()(y),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_devices_are_not_mixed(mix):
    with pytest.raises(RuntimeError, match=f"{TWO_DEVICES}|indices should be either on"):
        mix(torch.zeros(6, device="cuda"), torch.zeros(6))


def test_what_torch_lets_cross():
    x, one = torch.zeros(3, device="cuda"), torch.tensor(2.0)
    assert devices(x + one, one * x, x.fill_(one), x.masked_fill(x > 0, one), torch.where(x > 0, x, one)) == {"cuda:0"}
    assert x.copy_(torch.ones(3)).cpu().tolist() == [1.0] * 3 and torch.zeros(3).copy_(x).tolist() == [1.0] * 3
    assert devices(x[torch.tensor([0, 1])]) == {"cuda:0"}
    p = Parameter(torch.ones(3))
    (p.cuda() * 2).sum().backward()
    assert devices(p.grad) == {"cpu"}


def test_a_gradient_on_another_device_is_refused():
    """What tests/backends/test_gpu.py once did: tests.running.gradients gives parameters gradients of the host."""
    params = [on_device(param) for param in parameters()]
    with pytest.raises(RuntimeError, match="assigned grad has data located on a different device"):
        gradients(params, 0)


@pytest.mark.parametrize("read", [torch.Tensor.numpy, torch.Tensor.__array__])
def test_the_host_has_no_view_of_the_device(read):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        read(torch.zeros(3, device="cuda"))


WAITS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a copy to the host": lambda x: torch.zeros(3).copy_(x),
    "a copy from the host": lambda x: x.copy_(torch.zeros(3)),
    "a tensor of numbers": lambda x: torch.tensor([1.0], device="cuda"),
    "indices": lambda x: x[torch.tensor([0])],
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_what_waits_for_the_device_is_refused_where_nothing_may(wait):
    x, pinned = torch.zeros(3, device="cuda"), torch.zeros(3).pin_memory()
    wait(x)
    torch.cuda.set_sync_debug_mode("error")
    x.copy_(pinned, non_blocking=True)
    pinned.copy_(x, non_blocking=True)
    x.add_(1.0).sum()
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        wait(x)


FORBIDDEN = {key: WAITS[key] for key in ("item", "tolist", "cpu", "a copy from the host")} | {
    "pinned memory": lambda x: torch.empty(3, pin_memory=True),
    "pageable memory": lambda x: x.copy_(torch.zeros(3), non_blocking=True),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("act", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_a_capture_forbids(act):
    x = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match=CAPTURING), torch.cuda.graph(torch.cuda.CUDAGraph()):
        act(x)
    graph = torch.cuda.CUDAGraph()
    ends = pytest.raises(RuntimeError, match="previous error during capture")
    with ends, torch.cuda.graph(graph), pytest.raises(RuntimeError, match=CAPTURING):
        act(x)
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()


def test_replays_read_what_lies_there_now():
    x, lr, host = torch.ones(3, device="cuda"), torch.tensor(1.0, device="cuda"), torch.ones(3).pin_memory()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new = x * 2
        x.add_(new, alpha=1).add_(lr)
        copied = torch.empty_like(x).copy_(host, non_blocking=True)
        torch._foreach_add_([x, new], [new, new])
    assert x.tolist() == [1.0] * 3 and new.isnan().all()  # a capture carries out nothing
    graph.replay()
    assert x.tolist() == [6.0] * 3 and new.tolist() == [4.0] * 3 and copied.tolist() == [1.0] * 3
    lr.fill_(-1.0)
    x[0], host[1] = 0.0, 7.0
    graph.replay()
    assert x.tolist() == [-1.0, 29.0, 29.0] and copied.tolist() == [1.0, 7.0, 1.0]


@pytest.mark.parametrize("what", ["cuda", "pinned"])
def test_a_replay_that_reads_freed_memory_is_refused(what):
    x = torch.zeros(3, device="cuda")
    source = torch.ones(3).pin_memory() if what == "pinned" else torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(source, non_blocking=True)
        inner = torch.ones_like(x)
        x.add_(inner)
    del inner  # the graph's own
    graph.replay()
    assert x.tolist() == [2.0] * 3
    del source
    with pytest.raises(RuntimeError, match=f"a {what} tensor .* freed since the capture"):
        graph.replay()


def test_the_allocator_counts():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    y = x + 1
    assert torch.cuda.memory_allocated() - before == 8000
    del y
    assert torch.cuda.memory_allocated() - before == 4000 and torch.cuda.max_memory_allocated() - before == 8000


SCALARS = dict(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)


def a_bound_op():
    states = {name: [torch.zeros(3, device="cuda")] for name in ("exp_avgs", "exp_avg_sqs")}
    params = [torch.zeros(3, device="cuda")]
    return calls.bind(backends.resolve("cuda", DEVICE), "smmf_dense_step_", params, states), states


@BUILT
def test_auto_takes_the_cuda_kernels():
    assert backends.available(DEVICE)[0] == "cuda" and backends.available(torch.device("cpu"))[0] != "cuda"
    with pytest.raises(RuntimeError, match="not on cpu"):
        hfac.SMMF([Parameter(torch.ones(3))], backend="cuda")


@BUILT
def test_kernels_are_given_memory_of_the_device_only():
    """Where the checks of hfac.ops let a tensor of the host pass."""
    bound, _ = a_bound_op()
    with pytest.raises(AssertionError, match=r"grads\[0\] must lie in memory of the device"):
        bound([torch.ones(3)], **SCALARS)
    with pytest.raises(AssertionError, match="grad_scale must lie in memory of the device"):
        bound([torch.ones(3, device="cuda")], **SCALARS, grad_scale=torch.tensor(1.0))
    with pytest.raises(AssertionError, match="memory of the device"):
        backends.resolve("cpu", torch.device("cpu")).squares([torch.ones(1, device="cuda")])


@BUILT
def test_a_launch_that_reads_freed_memory_is_refused():
    grads, (bound, states) = [torch.ones(3, device="cuda")], a_bound_op()
    bound(grads, **SCALARS)
    states["exp_avg_sqs"] = []
    with pytest.raises(AssertionError, match=r"exp_avg_sqs\[0\] has been freed"):
        bound(grads, **SCALARS)


@BUILT
def test_a_replay_that_reads_another_table_is_refused():
    grads, (bound, _) = [torch.ones(3, device="cuda")], a_bound_op()
    bound(grads, **SCALARS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound(grads, **SCALARS)
    graph.replay()
    bound._plain.table.fill_(1)
    with pytest.raises(AssertionError, match="a table that is not the one it was captured with"):
        graph.replay()


def test_memory_that_another_stream_still_uses_is_not_freed_unnoticed(gpu):  # noqa: F811
    side = torch.cuda.Stream()
    for safe in ("record", "wait", "synchronize", None):
        x = torch.zeros(3, device="cuda")
        gpu.memory(x).used.add(side.cuda_stream)  # as a launch on that stream does
        if safe == "record":
            x.record_stream(side)
        elif safe == "wait":
            torch.cuda.current_stream().wait_stream(side)
        elif safe == "synchronize":
            torch.cuda.synchronize()
        del x
        if safe is not None:
            torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="freed while stream 1 may still use them"):
        torch.cuda.synchronize()


@BUILT
def test_any_module_runs_in_it():
    root = Path(__file__).parents[2]
    command = [sys.executable, "tests/helpers/rehearsal.py", "-m", "hfac", "doctor"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "a rehearsal's GPU" in done.stdout
