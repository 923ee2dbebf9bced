"""Steps of sharded parameters in CUDA graphs: replays have the bits of plain steps, whatever is stepped between them.

On a GPU the process group is NCCL's, of one rank that takes its whole parameters for shards. Without one all of it is
rehearsed (tests/helpers/rehearsal.py): the other ranks are imagined, and have what this one has.
"""

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import OPTIONS as BOTH_OPTIMIZERS
from cases import gradient
from gpu_steps import DEVICE
from rehearsal import HAS_GPU, gpu  # noqa: F401 (one is a fixture)
from running import bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import hfac
from bench.imagined import imagined_ranks
from hfac import backends
from hfac.distributed import layout
from hfac.distributed.schedule import finished
from hfac.optim.units import Unit

BOTH = pytest.mark.parametrize("name", BOTH_OPTIMIZERS)
RANKS = 1 if HAS_GPU else 8
#: of this rank's shards: two of matrices, that of a vector, and that of a convolution
SHAPES = [(24, 18), (6,), (40, 72), (3, 8, 2)]
OPTIONS = {
    "plain": {},
    "clipped": dict(max_grad_norm=0.5),
    "skip-step": dict(nonfinite="skip-step", max_grad_norm=0.5),
    "scaled": dict(amp_scaling=True, nonfinite="skip-step"),
    "watched": dict(watch=True, max_grad_norm=0.5),
    "stored": dict(rounding="stochastic", master="split8"),
    "int8": dict(first_moment="int8"),
}
CASES = [
    pytest.param(name, key, marks=pytest.mark.slow if key in ("clipped", "stored", "int8") else ())
    for name in BOTH_OPTIMIZERS
    for key in OPTIONS
    if key != "int8" or name == "HFac"
]


class Done:
    def wait(self):
        return True


@contextmanager
def one_rank_of_nccl(monkeypatch):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def ranks(gpu, monkeypatch):  # noqa: F811
    """What all-reduces multiply by, a number on the device: how many ranks have what this one has."""
    why_not = backends.TABLE["cuda"].why_not(DEVICE)
    if why_not is not None:
        pytest.skip(why_not)
    if HAS_GPU:

        def sharded_by(tensor):
            places = tensor.placements if layout.is_dtensor(tensor) else ()
            return [[d for d, place in enumerate(places) if place.is_shard(dim)] for dim in range(tensor.ndim)]

        monkeypatch.setattr(layout, "sharded_by", sharded_by)
        with one_rank_of_nccl(monkeypatch):
            yield None
        return
    world = torch.full((), float(RANKS), device=DEVICE)

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op == dist.ReduceOp.SUM:
            tensor.mul_(world)
        return Done() if async_op else None

    with imagined_ranks(RANKS):
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        monkeypatch.setattr(dist, "broadcast", lambda tensor, *_, async_op=False, **__: Done() if async_op else None)
        yield world


class Side:
    """An optimizer of shards with gradients that stay where they are."""

    def __init__(self, name, mesh, **options):
        dtype = torch.bfloat16 if "master" in options else torch.float32

        def shard(shape, seed):
            return DTensor.from_local(gradient(shape, seed, dtype).to(DEVICE), mesh, [Shard(0)], run_check=False)

        self.params = [Parameter(shard(shape, k)) for k, shape in enumerate(SHAPES)]
        self.static = [shard(shape, 0) for shape in SHAPES]
        self.lr = torch.tensor(0.01, device=DEVICE)
        self.optimizer = getattr(hfac, name)(self.params, lr=self.lr, capturable=True, backend="cuda", **options)
        self.scale, self.found = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
        self.scaled = options.get("amp_scaling")
        self.assign()

    def assign(self):
        for param, grad in zip(self.params, self.static, strict=True):
            param.grad = grad

    def step(self):
        if self.scaled:  # as a GradScaler sets them
            self.optimizer.grad_scale, self.optimizer.found_inf = self.scale, self.found
        self.optimizer.step()

    def everything(self):
        states = [self.optimizer.state[param] for param in self.params]
        tensors = [*self.params, *(value for state in states for value in state.values())]
        found = [layout.local(tensor.detach()).cpu() for tensor in tensors]
        return bits(found)

    @property
    def norm(self):
        norm = self.optimizer.grad_norm
        return None if norm is None else bits(norm.cpu())


class Pair:
    """Two optimizers: steps of the one may be replays, of the other none is."""

    def __init__(self, name, **options):
        mesh = init_device_mesh("cuda", (RANKS,))
        self.sides = [Side(name, mesh, **options) for _ in range(2)]
        self.feeds, self.last = 0, None

    def step(self, replay=None, bad=None, found=0.0):
        """One step of both with new gradients and another learning rate, the first one's by the replay of a graph.
        ``bad``: an element of the gradients; ``found``: what a GradScaler has found."""
        self.feeds += 1
        for side in self.sides:
            for k, grad in enumerate(side.static):
                local = layout.local(grad)
                local.copy_(gradient(tuple(local.shape), 10 * self.feeds + k, local.dtype))
            if bad is not None:
                layout.local(side.static[2])[5, 7] = bad
            side.lr.fill_(0.01 / self.feeds)
            side.scale.fill_(2.0**self.feeds)
            side.found.fill_(found)
        ours, theirs = self.sides
        ours.step() if replay is None else replay.replay()
        theirs.step()
        torch.cuda.synchronize()
        assert ours.everything() == theirs.everything()
        self.last = replay and self.last
        assert replay is not self.last or ours.norm == theirs.norm  # that of the last step, or of the last capture

    def capture(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.sides[0].step()
        self.last = graph
        return graph


def elsewhere(grad):
    """The same gradient in other memory."""
    local = layout.local(grad).clone()
    return DTensor.from_local(local, grad.device_mesh, grad.placements, run_check=False)


def moved(param):
    param.grad = elsewhere(param.grad)


def missing(param):
    param.grad = None


@pytest.mark.graphs
@pytest.mark.parametrize(("name", "options"), CASES)
def test_replays_equal_steps(name, options):
    """Among them steps that are left out, and plain steps between that plan anew."""
    pair = Pair(name, **OPTIONS[options])
    pair.step()
    pair.step()
    graph = pair.capture()
    pair.step(graph)
    if "nonfinite" in OPTIONS[options]:
        before = pair.sides[0].everything()
        for bad in (math.nan, math.inf):
            pair.step(graph, bad)
        steps = {int(state["step"]) for state in pair.sides[0].optimizer.state.values()}
        skipped = {int(state["skipped"]) for state in pair.sides[0].optimizer.state.values()}
        assert steps == {3} and skipped == {2} and before != pair.sides[0].everything()
    if options == "scaled":
        pair.step(graph, math.inf, found=1.0)
        assert {int(state["skipped"]) for state in pair.sides[0].optimizer.state.values()} == {2}
    for change in (moved, missing):
        for side in pair.sides:
            change(side.params[0])
        pair.step()
        pair.step()
        for side in pair.sides:
            side.assign()
        pair.step(graph)
    pair.step()
    again = pair.capture()
    for replay in (graph, again):
        pair.step(replay)
    if options == "watched":
        ours, theirs = (side.optimizer.diagnostics() for side in pair.sides)
        assert ours.keys() == theirs.keys() and len(ours) == len(SHAPES)
        for key, metrics in ours.items():
            for what, value in metrics.items():
                torch.testing.assert_close(value, theirs[key][what], rtol=0, atol=0, equal_nan=True)


@pytest.mark.graphs
@pytest.mark.parametrize("options", ["plain", "clipped"])
@BOTH
def test_what_no_step_has_made_is_refused(name, options):
    """Before anything is captured: a first step, and one of other parameters."""
    pair = Pair(name, **OPTIONS[options])
    ours = pair.sides[0]
    before = ours.everything()
    with pytest.raises(RuntimeError, match="first step on these tensors.*Take one step outside of graphs first"):
        pair.capture()
    assert ours.everything() == before
    pair.step()
    ours.params[1].grad = None
    with pytest.raises(RuntimeError, match="first step on these tensors"):
        pair.capture()
    ours.assign()
    pair.step()
    pair.step(pair.capture())


@pytest.mark.graphs
@BOTH
def test_gradients_elsewhere_are_captured_once(name):
    """Their table needs memory on the host, of which one is kept ready."""
    pair = Pair(name)
    pair.step()
    for side in pair.sides:
        side.static = list(map(elsewhere, side.static))
        side.assign()
    graph = pair.capture()
    pair.step(graph)
    old = [side.static for side in pair.sides]
    for side in pair.sides:
        side.static = list(map(elsewhere, side.static))
        side.assign()
    with pytest.raises(RuntimeError, match="not where the last step found them"):
        pair.capture()
    for side, grads in zip(pair.sides, old, strict=True):
        side.static = grads
        side.assign()
    pair.step(graph)


@pytest.mark.graphs
@BOTH
def test_a_graph_waits_for_nothing(name):
    """No number is fetched while it is captured, nor in the next plain step but for what replays have found."""
    pair = Pair(name, nonfinite="skip-step", max_grad_norm=0.5)
    pair.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pair.capture().replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.graphs
@BOTH
def test_a_captured_step_sends_what_a_plain_one_does(name, monkeypatch):
    """In the same order, as the optimizer says, and on one stream: the one that captures."""
    pair = Pair(name, amp_scaling=True, nonfinite="skip-step", max_grad_norm=0.5, watch=True)
    optimizer, sent = pair.sides[0].optimizer, []

    def noted(real, tensor, *given, group=None, **more):
        bytes_, stream = tensor.numel() * tensor.itemsize, torch.cuda.current_stream().cuda_stream
        sent.append(((dist.get_world_size(group), bytes_), stream))
        return real(tensor, *given, group=group, **more)

    for kind in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, kind, partial(noted, getattr(dist, kind)))
    pair.step()
    found = []
    for act in (pair.sides[0].step, pair.capture):
        sent.clear()
        act()
        found.append([what for what, _ in sent])
        streams = {stream for _, stream in sent}
    assert found[0] == found[1] == optimizer.collectives() and len(found[0]) >= 4
    assert len(streams) == 1 and streams != {torch.cuda.current_stream().cuda_stream}


@pytest.mark.skipif(HAS_GPU, reason="one rank cannot disagree")
@pytest.mark.graphs
@BOTH
def test_ranks_that_disagree_in_a_replay_are_found_after_it(name, ranks):
    """By the next plain step, or when the state is saved, and once."""
    pair = Pair(name)
    pair.step()
    graph, optimizer = pair.capture(), pair.sides[0].optimizer
    for look in (optimizer.step, optimizer.state_dict):
        ranks.fill_(3.0)
        graph.replay()
        ranks.fill_(float(RANKS))
        with pytest.raises(RuntimeError, match=r"on 3 of the 8 ranks.*found after a graph's replay.*last checkpoint"):
            look()
    optimizer.state_dict()
    graph.replay()
    optimizer.step()


@pytest.mark.graphs
@BOTH
def test_what_cannot_be_captured_is_refused(name):
    """Steps that the host counts, gradients that ranks must redistribute, and steps in the backward pass. (Triton's
    kernels: test_captures.py.)"""
    pair = Pair(name)
    pair.step()
    ours = pair.sides[0]
    before, optimizer, graph = ours.everything(), ours.optimizer, torch.cuda.CUDAGraph()
    unit = Unit(optimizer, ours.params)
    finished(unit.step(None, 1.0))
    with pytest.raises(RuntimeError, match="capture a step.. without release_gradients"), torch.cuda.graph(graph):
        finished(unit.step(None, 1.0))
    optimizer.step()
    optimizer._gradients._moved.add(ours.params[1])  # as after a step that has redistributed it
    with pytest.raises(RuntimeError, match="the gradient of parameter 1 .*param.grad.redistribute"):
        pair.capture()
    optimizer._gradients._moved.clear()
    optimizer.param_groups[0]["capturable"] = False
    with pytest.raises(RuntimeError, match="capturable=True"):
        pair.capture()
    assert ours.everything() != before
