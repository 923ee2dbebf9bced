"""CUDA graphs and streams of the optimizers, for the modules of two backends, as gpu_steps.py: what a graph reads
must outlive whatever later steps plan anew."""

import pytest
import torch
from cases import gradient
from gpu_steps import BOTH, DEVICE, MIXED, gradients_on_device, on_device
from running import bits, parameters
from torch.nn import Parameter

import hfac

GRAPHS = pytest.mark.graphs


class Pair:
    """Two optimizers on equal parameters: steps of the one may be replays, of the other none is."""

    def __init__(self, name, backend, dtype=torch.float32, **options):
        options = dict(backend=backend, capturable=True, weight_decay=0.1) | options
        self.sides = []
        for _ in range(2):
            params = [on_device(param) for param in parameters(MIXED, dtype)]
            lr = torch.tensor(0.01, device=DEVICE)
            self.sides.append((params, getattr(hfac, name)(params, lr=lr, **options), lr))
        self.static = [torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in MIXED]
        self.feeds = 0
        self.assign()

    def assign(self):
        for params, _, _ in self.sides:
            for param, grad in zip(params, self.static, strict=True):
                param.grad = grad

    def feed(self):
        """New gradients and a new learning rate, where the old ones were."""
        self.feeds += 1
        for k, grad in enumerate(self.static):
            grad.copy_(gradient(tuple(grad.shape), 10 * self.feeds + k, grad.dtype))
        for _, _, lr in self.sides:
            lr.fill_(0.01 / self.feeds)

    def step(self, replay=None):
        """One step of both, the first one's by the replay of a graph."""
        self.feed()
        (_, ours, _), (_, theirs, _) = self.sides
        ours.step() if replay is None else replay.replay()
        theirs.step()
        torch.cuda.synchronize()
        self.check()

    def capture(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.sides[0][1].step()
        return graph

    def check(self):
        found = []
        for params, optimizer, _ in self.sides:
            states = [{key: value.cpu() for key, value in optimizer.state[param].items()} for param in params]
            found.append(bits([[param.detach().cpu() for param in params], states]))
        assert found[0] == found[1]


def missing(param):
    param.grad = None


def moved(param):
    param.grad = param.grad.clone()


def strided(param):
    param.grad = param.grad.t().contiguous().t()
    assert not param.grad.is_contiguous()


def of_another_type(param):
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch knows no gradients of another type than their parameter's")
    param.grad_dtype = None
    param.grad = param.grad.double()


CHANGES = pytest.mark.parametrize("change", [missing, moved, strided, of_another_type])


@GRAPHS
@CHANGES
@BOTH
def test_replays_go_on_after_a_step_that_was_planned_anew(name, change, backend):
    pair = Pair(name, backend)
    pair.step()
    graph = pair.capture()
    pair.step(graph)
    for _ in range(2):  # the second time round the plan of the graph is two plans old
        for params, _, _ in pair.sides:
            change(params[0])
        pair.step()
        pair.step()
        pair.assign()
        pair.step(graph)
    pair.step()
    pair.step(graph)


@GRAPHS
@CHANGES
@BOTH
def test_replays_of_clipped_steps_go_on_after_a_step_that_was_planned_anew(name, change, backend):
    pair = Pair(name, backend, max_grad_norm=0.5)
    pair.step()
    graph = pair.capture()
    pair.step(graph)
    for params, _, _ in pair.sides:
        change(params[0])
    pair.step()
    pair.assign()
    pair.step(graph)


@GRAPHS
@BOTH
def test_replays_go_on_after_new_state_is_loaded(name, backend):
    """Into the tensors that the graph reads or into others: what replays write is then nobody's, but they must not read
    memory that was freed."""
    pair = Pair(name, backend)
    pair.step()
    graph = pair.capture()
    (_, ours, lr), (_, theirs, _) = pair.sides
    ours.load_state_dict(theirs.state_dict())
    ours.param_groups[0]["lr"] = lr
    pair.step()
    graph.replay()
    torch.cuda.synchronize()


@GRAPHS
@BOTH
def test_a_first_step_inside_a_capture_is_refused(name, backend):
    """Or it works; it must not break halfway."""
    pair = Pair(name, backend)
    pair.feed()
    params, optimizer, _ = pair.sides[0]
    before = bits([param.detach().cpu() for param in params])
    try:
        graph = pair.capture()
    except RuntimeError as error:
        assert "one step" in str(error), error
        torch.cuda.synchronize()
        assert bits([param.detach().cpu() for param in params]) == before
        assert all(not state["step"] for state in optimizer.state.values())
        pair.step()
        graph = pair.capture()
    pair.step(graph)


@GRAPHS
@BOTH
def test_a_second_capture_without_a_step_between(name, backend):
    pair = Pair(name, backend)
    pair.step()
    graphs = [pair.capture() for _ in range(3)]
    for graph in (*graphs, *graphs):
        pair.step(graph)
    pair.step()


@GRAPHS
@BOTH
def test_a_second_capture_of_gradients_elsewhere(name, backend):
    """Works, or says that a step must come first."""
    pair = Pair(name, backend)
    pair.step()
    first, old = pair.capture(), pair.static
    pair.static = [grad.clone() for grad in old]
    pair.assign()
    try:
        second = pair.capture()
    except RuntimeError as error:
        assert "one step" in str(error), error
        pair.step()
        second = pair.capture()
    pair.step(second)
    pair.static = old
    pair.assign()
    pair.step(first)
    pair.step()


@GRAPHS
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@BOTH
def test_with_a_default_device(name, device, backend):
    """Of parameters on either device, with memory on the host that is not asked for by its device."""
    options = [{}, {"nonfinite": "skip"}, {"max_grad_norm": 0.5}, {"rounding": "stochastic", "seed": 3, "watch": True}]
    starts = [param.detach().to(device, torch.bfloat16) for param in parameters(MIXED)]
    grads = [
        [gradient(shape, 10 * t + k, torch.bfloat16).to(device) for k, shape in enumerate(MIXED)] for t in range(3)
    ]
    found = []
    for default in (None, "cuda"):
        torch.set_default_device(default)
        try:
            for each in options:
                params = [Parameter(start.clone()) for start in starts]
                optimizer = getattr(hfac, name)(params, backend=backend if device == "cuda" else "auto", **each)
                for step in grads:
                    for param, grad in zip(params, step, strict=True):
                        param.grad = grad.clone()  # a step that clips may scale it in place
                    optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.step()
                found.append(bits([param.detach().cpu() for param in params]))
        finally:
            torch.set_default_device(None)
    assert found[: len(options)] == found[len(options) :]


@GRAPHS
@BOTH
def test_steps_on_two_streams(name, backend):
    """A plan that grows on the second stream must leave the first one the memory that it still uses."""
    found = []
    for streams in ([torch.cuda.default_stream()], [torch.cuda.default_stream(), torch.cuda.Stream()]):
        params = [on_device(param) for param in parameters(MIXED)]
        optimizer = getattr(hfac, name)(params, backend=backend)
        for step, turn in enumerate((0, 1, 1, 0, 1, 1)):  # memory of the one stream is given up on the other
            stream = streams[turn % len(streams)]
            for other in streams:
                stream.wait_stream(other)
            with torch.cuda.stream(stream):
                gradients_on_device(params, step)
                for param in params[1 : 3 - (step + 1) // 3]:
                    param.grad = None
                optimizer.step()
        torch.cuda.synchronize()
        found.append(bits([param.detach().cpu() for param in params]))
    assert found[0] == found[1]
