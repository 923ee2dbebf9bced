"""The CUDA kernels on a GPU: gpu_steps.py and gpu_graphs.py, and the ops themselves on parts of parameters, on stored
parameters, of clipped and watched steps. Without a GPU all of it is rehearsed (tests/helpers/rehearsal.py).

    pytest tests/backends/test_gpu.py -m parity     against the reference
    pytest tests/backends/test_gpu.py -m graphs     CUDA graphs and streams
    pytest tests/backends/test_gpu.py -m large      more than 2^31 elements
"""

import copy

import pytest
import test_parts
import test_stored_steps
import test_watched_steps
import torch
from gpu_graphs import *  # noqa: F403
from gpu_steps import *  # noqa: F403
from gpu_steps import BOTH, DEVICE, DTYPES, LARGE, MIXED, does_not_wait, gradients_on_device, on_device, run, sized
from rehearsal import HAS_GPU, gpu  # noqa: F401 (one is a fixture)
from running import bits, parameters
from suites import KINDS, OPS, Run, cases
from test_clipped_steps import norm_and_step
from test_parity import ieee_square_roots, params_agree  # noqa: F401 (one is a fixture)
from test_parts import BLOCK_PARTS, HFAC_OPTIONS, MATRIX_PARTS, SMMF_OPTIONS, BlockParts, MatrixParts
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn import Parameter

import hfac
from bench import sharded_host
from bench.imagined import equal_ranks, imagined_ranks
from hfac import backends
from hfac.rounding import BitOffset, join


@pytest.fixture(autouse=True)
def backend(gpu):  # noqa: F811
    why_not = backends.TABLE["cuda"].why_not(DEVICE)
    if why_not is not None:
        pytest.skip(why_not)
    return "cuda"


OF_PARTS = pytest.mark.parametrize("dtype", sized([*DTYPES, torch.float64], [torch.bfloat16, torch.float64]), ids=str)
STORED = [dict(rounding="stochastic"), dict(master="split"), dict(rounding="stochastic", master="split8")]
KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def moved(value, device=DEVICE):
    """A tensor, or lists and dicts of them, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(entry, device) for key, entry in value.items()}
    return [moved(entry, device) for entry in value]


def move(parts):
    for name in ("params", "grads", "by_row", "by_col", "states"):
        if hasattr(parts, name):
            setattr(parts, name, moved(getattr(parts, name)))


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@OF_PARTS
def test_parts_of_hfac(dtype, layout):
    parts, options = (
        MatrixParts(list(MATRIX_PARTS), [dtype] * len(MATRIX_PARTS), layout=layout),
        HFAC_OPTIONS["clipped"],
    )
    known, sums, before = parts.known(), parts.sums("reference"), parts.params
    grads = [grad.to(sums[0][0].dtype) for grad in parts.grads]
    params, states = parts.apply("reference", known, **options)
    move(parts)
    for k, (ours, theirs) in enumerate(zip(moved(parts.sums("cuda"), "cpu"), sums, strict=True)):
        for mine, other, grad in zip(ours, theirs, grads, strict=True):
            cancels = k in (0, 2) and grad.numel()  # sums of the gradient itself
            test_parts.close(mine, other, grad.abs().sum(1 if k == 0 else 0).max() if cancels else None)
    ours, our_states = moved(parts.apply("cuda", moved(known), **options), "cpu")
    for mine, other, old in zip(ours, params, before, strict=True):
        params_agree("HFac", mine, other, old, 0.02)
    for name, entries in our_states.items():
        for k, (mine, other) in enumerate(zip(entries, states[name], strict=True)):
            scale = torch.cat([known["row_sums"][k].abs(), known["col_sums"][k].abs(), mine.new_ones(1)]).max()
            test_parts.close(mine, other, scale)


@pytest.mark.parity
@pytest.mark.pairwise
@pytest.mark.parametrize("options", sized(list(SMMF_OPTIONS), ["coupled", "no first moment"]))
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@OF_PARTS
def test_parts_of_smmf(dtype, transposed, options):
    parts = BlockParts(list(BLOCK_PARTS), [dtype] * len(BLOCK_PARTS), transposed=transposed)
    theirs = parts.step("reference", **SMMF_OPTIONS[options])
    move(parts)
    ours = moved(parts.step("cuda", **SMMF_OPTIONS[options]), "cpu")
    parts.params, parts.states = moved(parts.params, "cpu"), moved(parts.states, "cpu")
    test_parts.smmf_agrees(parts, ours, theirs, "cuda")


def test_ops_on_parts_do_not_wait_for_the_device():
    names = ["rows", "columns"]
    parts, square_parts = (kind(names, [torch.float32] * 2) for kind in (MatrixParts, BlockParts))
    known, decays = moved(parts.known()), torch.tensor([0.8, 0.9], dtype=torch.float64)
    move(parts)
    move(square_parts)

    def steps():
        parts.sums("cuda", beta2=decays)
        parts.apply("cuda", known, beta1=decays, **HFAC_OPTIONS["clipped"])
        square_parts.step("cuda", **(SMMF_OPTIONS["decoupled"] | dict(beta1=decays, beta2=decays)))

    does_not_wait(steps)


@pytest.mark.parity
def test_two_runs_on_parts_have_the_same_bits():
    results = []
    for _ in range(2):
        parts = BlockParts(list(BLOCK_PARTS), [torch.bfloat16] * len(BLOCK_PARTS))
        move(parts)
        results.append(bits(moved(parts.step("cuda", **SMMF_OPTIONS["decoupled"]), "cpu")))
    assert results[0] == results[1]


@pytest.mark.parity
@pytest.mark.parametrize("grad_dtype", sized(DTYPES[:2], DTYPES[1:2]), ids=str)
@KIND
@pytest.mark.parametrize("op", OPS)
def test_stored_parameters(op, kind, grad_dtype):
    """To the bit what hfac.rounding makes of the weights that the same kernels write in float32."""
    shapes = [*test_stored_steps.SHAPES[op[:4]], sized((1024, 1024), (256, 72))]
    places = [BitOffset(k, first) for k, first in enumerate((0, 2**35 + 8, 7, 5, 11, 16))]
    pair = test_stored_steps.Pair(op, kind, shapes, "cuda", places=places, device=DEVICE)
    for t in (1, 2):
        steps = torch.arange(t, t + len(shapes), dtype=torch.float64, device=DEVICE) if t == 2 else None
        pair.step(test_stored_steps.grads_of(shapes, t, grad_dtype), t, steps)
    assert pair.accesses() == {kind.bulk[grad_dtype == torch.float32], "any stored"}


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["shifted", "transposed"])
@KIND
@pytest.mark.parametrize("op", OPS)
def test_stored_parameters_of_any_layout(op, kind, layout):
    shapes, places = [(24, 16), (16, 8)], [BitOffset(1, 16, (64, 1)), BitOffset(2, 3, (1, 40))]
    layouts = [(layout, "contiguous"), ("contiguous", layout)]
    pair = test_stored_steps.Pair(op, kind, shapes, "cuda", layouts, places, device=DEVICE)
    pair.step(test_stored_steps.grads_of(shapes, 1, torch.bfloat16))


@pytest.mark.parity
@KIND
def test_stored_parts(kind):
    here = dict(backend="cuda", device=DEVICE)
    for contiguous in (False, True):
        test_stored_steps.test_smmf_parts(kind=kind, contiguous=contiguous, **here)
    for place in test_stored_steps.PART_PLACES:
        test_stored_steps.test_hfac_parts(kind=kind, place=place, **here)


@pytest.mark.parity
@BOTH
def test_split_equals_steps_in_float32(name):
    shapes = [*MIXED, *LARGE]
    halves = [on_device(param, torch.bfloat16) for param in parameters(shapes)]
    floats = [Parameter(param.detach().float()) for param in halves]
    options = dict(backend="cuda", lr=0.01, weight_decay=0.1)
    split, plain = getattr(hfac, name)(halves, master="split", **options), getattr(hfac, name)(floats, **options)
    for step in range(4):
        gradients_on_device(halves, step)
        for half, whole in zip(halves, floats, strict=True):
            whole.grad = half.grad.float()
        split.step()
        plain.step()
    for half, whole in zip(halves, floats, strict=True):
        assert torch.equal(join(half.detach(), split.state[half]["master_low"]), whole)


@pytest.mark.graphs
@BOTH
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_replayed_graph_of_stored_parameters_equals_eager_steps(name, stored):
    """The step that random bits depend on is read on the device."""
    graph, eager = (run(name, "cuda", 8, use_graph, torch.bfloat16, **stored) for use_graph in (True, False))
    assert graph == eager


@pytest.mark.graphs
def test_a_replayed_graph_of_the_norm_and_the_step_equals_plain_steps():
    """Some replays clip and some do not."""
    shapes = [(24, 16), (0, 5), (127, 129), *LARGE]
    ours, theirs = (Run("hfac_step_", cases(shapes), "cuda", device=DEVICE) for _ in range(2))
    static = [torch.zeros(shape, device=DEVICE) for shape in shapes]
    limit, graph, clips = 2 * sum(map(torch.numel, static)) ** 0.5, None, []
    for step in range(8):
        for k, grad in enumerate(static):
            generator = torch.Generator().manual_seed(100 * step + k)
            grad.copy_(torch.randn(grad.shape, generator=generator) * (10.0 if step % 3 == 1 else 1.0))
        if step == 3:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                clip = norm_and_step(ours, static, limit)
        if graph is None or step == 6:  # between replays too
            clips.append(norm_and_step(ours, static, limit).clone())
        else:
            graph.replay()
            clips.append(clip.clone())
        theirs.step(static, clip=clips[-1])
        assert ours.agrees(theirs)
    assert [bool(clip < 1) for clip in clips] == [step % 3 == 1 for step in range(8)]


@pytest.mark.graphs
def test_a_norm_that_no_step_has_planned_is_refused_in_a_capture():
    """Or it works, as in tests/backends/gpu_graphs.py."""
    run = Run("hfac_step_", cases(MIXED[:2]), "cuda", device=DEVICE)
    grads = run.grads()
    run.step(grads)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            norm_and_step(run, grads, 1.0)
    except RuntimeError as error:
        assert "one step" in str(error), error
    norm_and_step(run, grads, 1.0)
    assert all(param.isfinite().all() for param in run.params)


def test_the_norm_and_the_step_do_not_wait_for_the_device():
    run = Run("hfac_step_", cases(MIXED[:2]), "cuda", device=DEVICE)
    grads = run.grads()
    does_not_wait(lambda: norm_and_step(run, grads, 1.0))


@pytest.mark.parity
@test_watched_steps.EACH_KIND
@pytest.mark.parametrize("op", OPS)
def test_numbers_of_watched_steps(op, kind):
    run = test_watched_steps.of_kind(op, kind, "cuda", device=DEVICE)
    for t in range(2):
        watched = run.table()
        expected = run.watch(run.zeroed(t), watched)
        test_watched_steps.agree(watched.cpu(), expected, run, "cuda")


@BOTH
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_step_of_stored_parameters_does_not_wait_for_the_device(name, stored):
    params = [on_device(param, torch.bfloat16) for param in parameters(MIXED)]
    optimizer = getattr(hfac, name)(params, backend="cuda", capturable=True, **stored)
    gradients_on_device(params, 0)
    does_not_wait(optimizer.step)


@pytest.mark.parametrize("mode", sharded_host.MODES)
@BOTH
def test_a_sharded_step_does_not_wait_for_the_device(name, backend, mode):
    """With other ranks that are imagined. Of refused gradients the host is told behind the sums."""
    with imagined_ranks(sharded_host.RANKS), equal_ranks():
        options = sharded_host.MODES[mode]
        optimizer = sharded_host.optimizer_of(name, 5, device="cuda", backend=backend, **options)
        does_not_wait(optimizer.step)


@BOTH
def test_that_ranks_disagree_is_found_after_the_step(name, backend):
    """Before the next one, and before the state is saved: the other ranks, which do nothing, have no gradient."""
    with imagined_ranks(sharded_host.RANKS):
        optimizer = sharded_host.optimizer_of(name, 5, device="cuda", backend=backend)
        for look in (optimizer.step, optimizer.state_dict):
            optimizer.step()
            with pytest.raises(RuntimeError, match=r"on 1 of the 8 ranks.*found after the step.*last checkpoint"):
                look()
        optimizer.state_dict()  # it is said once


@BOTH
def test_a_sharded_step_on_another_stream_has_buffers_of_its_own(name, backend):
    with imagined_ranks(sharded_host.RANKS), equal_ranks():
        optimizer = sharded_host.optimizer_of(name, 5, device="cuda", backend=backend)
        found = []
        for stream in (None, None, torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                optimizer.step()
            found.append(optimizer._sharded)
        torch.cuda.synchronize()
    assert found[0] is found[1] is not found[2]


def prepared_by_accelerate(net, optimizer, monkeypatch):
    """Both offloaded by accelerate's plugin; the process group is there already."""
    accelerate = pytest.importorskip("accelerate")
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for key, value in (ranks | {"ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(key, value)
    for state in (accelerate.state.PartialState, accelerate.state.AcceleratorState):
        monkeypatch.setattr(state, "_shared_state", {})  # that of this test alone
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True, auto_wrap_policy="no_wrap")
    return accelerate.Accelerator(fsdp_plugin=plugin).prepare(net, optimizer)


@pytest.mark.skipif(not HAS_GPU, reason="FSDP2's offload policy wants a GPU")
@pytest.mark.parametrize("by", ["fully_shard", "accelerate"])
@BOTH
def test_what_fsdp2_offloads_is_stepped_on_the_cpu(name, by, monkeypatch):
    """On one rank, beside the same model on the CPU."""
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 8))
        net = copy.deepcopy(plain).cuda()
        if by == "fully_shard":
            mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (1,))
            fully_shard(net, mesh=mesh, offload_policy=CPUOffloadPolicy())
        optimizers = [getattr(hfac, name)(each.parameters(), lr=0.01) for each in (net, plain)]
        if by == "accelerate":  # which shards what the optimizer has already
            net, optimizers[0] = prepared_by_accelerate(net, optimizers[0], monkeypatch)
        for seed in range(3):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
            for each, optimizer in zip((net, plain), optimizers, strict=True):
                each(x.cuda() if each is net else x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert p.to_local().is_cpu and all(v.device.type == "cpu" for v in optimizers[0].state[p].values())
            torch.testing.assert_close(p.to_local(), q.detach(), rtol=1e-3, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()
