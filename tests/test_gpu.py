"""The backends of a GPU on that GPU: parity with the reference, CUDA graphs, streams, no waiting for the device.

Without a GPU there is nothing here to run: the CUDA kernels run on the host in tests/test_cuda_emulated.py. Names with
"sanitized" are what `make gpu-report` runs under compute-sanitizer.
"""

import copy

import pytest
import test_cuda_clipping
import test_cuda_rounding
import test_cuda_watch
import test_parts
import torch
from cases import OPTIONS, SHAPES, gradient
from running import bits, gradients, parameters
from test_parity import ieee_square_roots, params_agree, states_agree  # noqa: F401 (a fixture)
from test_parts import BLOCK_PARTS, HFAC_OPTIONS, MATRIX_PARTS, SMMF_OPTIONS, BlockParts, MatrixParts
from torch.nn import Parameter

import hfac
from hfac import backends
from hfac.rounding import Place, join

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

DEVICE = torch.device("cuda")
BACKENDS = [name for name in backends.available(DEVICE) if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = [(300, 2100), (2100, 300), (40, 20000), (1024, 4096), (50257, 16)]
FEW = [(24, 18), (127, 129), (300, 2100), (1024,), (7,), ()]
BOTH = pytest.mark.parametrize("name", OPTIONS)
EACH = pytest.mark.parametrize("backend", BACKENDS)
PARTS = pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels are not built: hfac doctor says why")


def on_device(param, dtype=None):
    return Parameter(param.detach().to(DEVICE, dtype))


def compared(name, backend, kwargs, shapes, dtype, steps, layout=lambda x: x):
    """Steps on the GPU beside steps of the reference on the CPU, each from the same state."""
    params = [Parameter(gradient(shape, i, dtype).to(DEVICE)) for i, shape in enumerate(shapes)]
    twins = [Parameter(param.detach().cpu()) for param in params]
    optimizer = getattr(hfac, name)(params, **kwargs, backend=backend)
    reference = getattr(hfac, name)(twins, **kwargs, backend="reference")
    for step in range(1, steps + 1):
        before = []
        for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
            twin.data.copy_(param.data)
            before.append(twin.detach().clone())
            reference.state[twin] = {key: value.cpu().clone() for key, value in optimizer.state[param].items()}
            twin.grad = gradient(tuple(param.shape), 100 * step + i, dtype)
            if kwargs.get("nonfinite") == "skip" and step == 2 and i % 2 and twin.grad.numel():
                twin.grad.view(-1)[-1] = float("inf")
            param.grad = layout(twin.grad.to(DEVICE))
        optimizer.step()
        reference.step()
        for param, twin, old in zip(params, twins, before, strict=True):
            slack = max(1.0, max(param.shape, default=1) ** 0.5 / 16)
            params_agree(name, param.detach().cpu(), twin.detach(), old, kwargs["lr"], slack)
            ours = {key: value.cpu() for key, value in optimizer.state[param].items()}
            states_agree(name, ours, reference.state[twin], twin.grad, slack)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), [(name, key) for name, rows in OPTIONS.items() for key in rows])
def test_parity(name, options, dtype, backend):
    compared(name, backend, OPTIONS[name][options], [*SHAPES, *LARGE], dtype, steps=4)


@EACH
@BOTH
def test_sanitized_parity(name, backend):
    for dtype in DTYPES:
        compared(name, backend, OPTIONS[name]["all"], FEW, dtype, steps=2)
    compared(name, backend, OPTIONS[name]["skip"], FEW, torch.bfloat16, steps=2)


@EACH
@BOTH
def test_twenty_steps_of_every_shape(name, backend):
    compared(name, backend, OPTIONS[name]["all"], SHAPES, torch.float32, steps=20)


@EACH
@BOTH
def test_gradients_that_are_not_contiguous(name, backend):
    compared(
        name,
        backend,
        OPTIONS[name]["all"],
        [(24, 18), (65, 33), (8, 3, 5, 5)],
        torch.bfloat16,
        2,
        lambda grad: grad.transpose(0, -1).contiguous().transpose(0, -1),
    )


def run(name, backend, steps, use_graph, dtype=torch.float32, **kwargs):
    """Steps with a learning rate that changes; with ``use_graph`` the later ones are replays."""
    shapes = [(24, 18), (300, 2100), (1024,), (7,), (4096,)]
    params = [on_device(param) for param in parameters(shapes, dtype)]
    lr = torch.tensor(0.01, device=DEVICE)
    optimizer = getattr(hfac, name)(params, lr=lr, backend=backend, capturable=True, weight_decay=0.1, **kwargs)
    static = [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, static, strict=True):
        param.grad = grad

    def feed(step):
        for target, param in zip(static, parameters(shapes, dtype, seed=50 + step), strict=True):
            target.copy_(param.detach())
        lr.fill_(0.01 / (step + 1))

    graph = None
    for step in range(steps):
        feed(step)
        if use_graph and step == 3:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        if graph is not None:
            graph.replay()
        else:
            optimizer.step()
    torch.cuda.synchronize()
    return bits([[p.cpu() for p in params], [{k: v.cpu() for k, v in optimizer.state[p].items()} for p in params]])


@EACH
@BOTH
def test_a_replayed_graph_equals_eager_steps(name, backend):
    assert run(name, backend, 8, True) == run(name, backend, 8, False)


@EACH
@BOTH
def test_two_runs_have_the_same_bits(name, backend):
    assert run(name, backend, 5, False, torch.bfloat16) == run(name, backend, 5, False, torch.bfloat16)


@EACH
@BOTH
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_a_step_does_not_wait_for_the_device(name, backend, capturable):
    params = [on_device(param) for param in parameters([(24, 18), (300, 2100), (1024,)])]
    optimizer = getattr(hfac, name)(params, backend=backend, capturable=capturable)
    gradients(params, 0)
    for _ in range(2):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EACH
@BOTH
def test_on_a_stream_of_its_own(name, backend):
    expected, got = [], []
    for stream, found in ((None, expected), (torch.cuda.Stream(), got)):
        params = [on_device(param) for param in parameters([(300, 2100), (1024,)])]
        optimizer = getattr(hfac, name)(params, backend=backend)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for step in range(4):
                gradients_on_device(params, step)
                optimizer.step()
        torch.cuda.synchronize()
        found += bits([param.cpu() for param in params])
    assert got == expected


def gradients_on_device(params, seed):
    for i, param in enumerate(params):
        param.grad = gradient(tuple(param.shape), 10 * seed + i, param.dtype).to(DEVICE)


@EACH
@BOTH
def test_a_step_allocates_nothing_of_the_parameters_size(name, backend):
    params = [Parameter(torch.rand(4096, 4096, device=DEVICE, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = getattr(hfac, name)(params, backend=backend)
    for param in params:
        param.grad = torch.rand_like(param)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before + optimizer.workspace_bytes() <= 0.04 * 2 * 2 * 4096**2


@EACH
@BOTH
def test_beyond_two_to_the_31_elements(name, backend):
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40e9:
        pytest.skip("needs a GPU with 40 GB")
    shape = (2**16 + 8, 2**15 + 8)
    param = Parameter(torch.ones(shape, device=DEVICE, dtype=torch.bfloat16))
    options = {"beta": 0.0} if name == "SMMF" else {}
    optimizer = getattr(hfac, name)([param], backend=backend, lr=0.25, **options)
    param.grad = torch.full(shape, 0.5, device=DEVICE, dtype=torch.bfloat16)
    param.grad[-1] = -0.5
    optimizer.step()
    # SMMF: 1 - 0.25 sign(g). H-Fac: |U| = 1 everywhere, and so is its rms; the averages are the means, no drift.
    assert torch.equal(param[-1, -8:], torch.full((8,), 1.25, device=DEVICE, dtype=torch.bfloat16))
    assert torch.equal(param[0, :8], torch.full((8,), 0.75, device=DEVICE, dtype=torch.bfloat16))
    assert (param[:-1] == 0.75).all() and (param[-1] == 1.25).all()


@EACH
@BOTH
def test_a_checkpoint_goes_on_on_the_cpu(name, backend):
    params = [on_device(param) for param in parameters([(24, 18), (7,)])]
    optimizer = getattr(hfac, name)(params, backend=backend)
    gradients_on_device(params, 0)
    optimizer.step()
    twins = [Parameter(param.detach().cpu()) for param in params]
    other = getattr(hfac, name)(twins)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, twin in zip(params, twins, strict=True):
        ours = {key: value.cpu() for key, value in optimizer.state[param].items()}
        assert bits(ours) == bits(dict(other.state[twin]))


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


@PARTS
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
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


@PARTS
@pytest.mark.parametrize("options", SMMF_OPTIONS)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_parts_of_smmf(dtype, transposed, options):
    parts = BlockParts(list(BLOCK_PARTS), [dtype] * len(BLOCK_PARTS), transposed=transposed)
    theirs = parts.step("reference", **SMMF_OPTIONS[options])
    move(parts)
    ours = moved(parts.step("cuda", **SMMF_OPTIONS[options]), "cpu")
    parts.states = moved(parts.states, "cpu")
    test_parts.smmf_agrees(parts, ours, theirs)


@PARTS
def test_sanitized_parts():
    test_parts_of_hfac(torch.bfloat16, "contiguous")
    test_parts_of_smmf(torch.bfloat16, False, "decoupled")


@PARTS
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

    steps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@PARTS
def test_two_runs_on_parts_have_the_same_bits():
    results = []
    for _ in range(2):
        parts = BlockParts(list(BLOCK_PARTS), [torch.bfloat16] * len(BLOCK_PARTS))
        move(parts)
        results.append(bits(moved(parts.step("cuda", **SMMF_OPTIONS["decoupled"]), "cpu")))
    assert results[0] == results[1]


STORED = [dict(rounding="stochastic"), dict(master="split"), dict(rounding="stochastic", master="split8")]
KIND = pytest.mark.parametrize("kind", test_cuda_rounding.KINDS.values(), ids=test_cuda_rounding.KINDS)


@PARTS
@pytest.mark.parametrize("grad_dtype", DTYPES[:2], ids=str)
@KIND
@pytest.mark.parametrize("op", test_cuda_rounding.OPS)
def test_stored_parameters(op, kind, grad_dtype):
    """To the bit what hfac.rounding makes of the weights that the same kernels write in float32."""
    shapes = [*test_cuda_rounding.SHAPES[op[:4]], (1024, 1024)]
    places = [Place(k, first) for k, first in enumerate((0, 2**35 + 8, 7, 5, 11, 16))]
    pair = test_cuda_rounding.Pair(op, kind, shapes, places=places, backend="cuda", device=DEVICE)
    for t in (1, 2):
        steps = torch.arange(t, t + len(shapes), dtype=torch.float64, device=DEVICE) if t == 2 else None
        pair.step(test_cuda_rounding.grads_of(shapes, t, grad_dtype), t, steps)
    bulk = set() if "dense" in op else {kind.bulk[grad_dtype == torch.float32]}
    assert pair.accesses() == bulk | {"any stored"}


@PARTS
@pytest.mark.parametrize("layout", ["shifted", "transposed"])
@KIND
@pytest.mark.parametrize("op", test_cuda_rounding.OPS)
def test_stored_parameters_of_any_layout(op, kind, layout):
    shapes, places = [(24, 16), (16, 8)], [Place(1, 16, (64, 1)), Place(2, 3, (1, 40))]
    layouts = [(layout, "contiguous"), ("contiguous", layout)]
    pair = test_cuda_rounding.Pair(op, kind, shapes, layouts, places, backend="cuda", device=DEVICE)
    pair.step(test_cuda_rounding.grads_of(shapes, 1, torch.bfloat16))


@PARTS
@KIND
def test_stored_parts(kind):
    here = dict(backend="cuda", device=DEVICE)
    for contiguous in (False, True):
        test_cuda_rounding.test_smmf_parts(kind, contiguous, **here)
    for place in test_cuda_rounding.PART_PLACES:
        test_cuda_rounding.test_hfac_parts(kind, place, **here)


@PARTS
def test_sanitized_stored_parameters():
    for kind in test_cuda_rounding.KINDS.values():
        for op in test_cuda_rounding.OPS:
            test_stored_parameters(op, kind, torch.bfloat16)
        test_stored_parts(kind)


@PARTS
@BOTH
def test_split_equals_steps_in_float32(name):
    shapes = [(24, 18), (300, 2100), (1024, 4096), (1024,), (7,)]
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


@PARTS
@BOTH
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_replayed_graph_of_stored_parameters_equals_eager_steps(name, stored):
    """The step that random bits depend on is read on the device."""
    graph, eager = (run(name, "cuda", 8, use_graph, torch.bfloat16, **stored) for use_graph in (True, False))
    assert graph == eager


@PARTS
def test_a_replayed_graph_of_the_norm_and_the_step_equals_plain_steps():
    """Some replays clip and some do not."""
    shapes, ops = (
        [(300, 2100), (24, 16), (0, 5), (1024, 4096), (40, 20000), (127, 129)],
        backends.resolve("cuda", DEVICE),
    )
    ours, theirs = (test_cuda_clipping.Run(shapes, device=DEVICE, ops=ops) for _ in range(2))
    static = [torch.zeros(shape, device=DEVICE) for shape in shapes]
    limit, graph, clips = 2 * sum(map(torch.numel, static)) ** 0.5, None, []
    for step in range(8):
        for k, grad in enumerate(static):
            generator = torch.Generator().manual_seed(100 * step + k)
            grad.copy_(torch.randn(grad.shape, generator=generator) * (10.0 if step % 3 == 1 else 1.0))
        if graph is None and step == 3:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                clip = test_cuda_clipping.norm_and_step(ours, static, limit)
        if graph is None or step == 6:  # between replays too
            clips.append(test_cuda_clipping.norm_and_step(ours, static, limit).clone())
        else:
            graph.replay()
            clips.append(clip.clone())
        theirs.step(static, **test_cuda_clipping.scalars(1), grad_scale=clips[-1].reciprocal())
        assert test_cuda_clipping.agree(ours, theirs)
    assert [bool(clip < 1) for clip in clips] == [step % 3 == 1 for step in range(8)]


@PARTS
def test_the_norm_and_the_step_do_not_wait_for_the_device():
    run = test_cuda_clipping.Run([(300, 2100), (24, 16)], device=DEVICE, ops=backends.resolve("cuda", DEVICE))
    grads = [torch.ones_like(param) for param in run.params]
    for _ in range(2):
        test_cuda_clipping.norm_and_step(run, grads, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        test_cuda_clipping.norm_and_step(run, grads, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@PARTS
@pytest.mark.parametrize("kind", test_cuda_watch.EVERY.values(), ids=test_cuda_watch.EVERY)
@pytest.mark.parametrize("op", test_cuda_watch.OPS)
def test_sanitized_watched_steps(op, kind):
    shapes = test_cuda_watch.shapes_of(op)
    run = test_cuda_watch.Watched(op, kind, shapes, device=DEVICE, ops=backends.resolve("cuda", DEVICE))
    for t in (1, 2):
        grads = [grad.to(DEVICE) for grad in test_cuda_watch.grads_of(shapes, t)]
        watched = torch.zeros(len(shapes), 5, dtype=torch.float64, device=DEVICE)
        expected = run.watch(grads, watched, t=t)
        test_cuda_watch.agree(watched.cpu(), expected)


@PARTS
@BOTH
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_step_of_stored_parameters_does_not_wait_for_the_device(name, stored):
    params = [on_device(param, torch.bfloat16) for param in parameters([(24, 18), (300, 2100), (1024,)])]
    optimizer = getattr(hfac, name)(params, backend="cuda", capturable=True, **stored)
    gradients_on_device(params, 0)
    for _ in range(2):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
