"""Steps of the optimizers on a GPU, for the modules of two backends: parity with the reference, no waiting for the GPU.
Each module says which backend by a fixture of that name, and imports all that is here.

Without a GPU they are rehearsed (rehearsal.py): with smaller tensors, because the kernels run on the host.
"""

import copy

import pytest
import torch
from cases import OPTIONS, SHAPES, gradient
from rehearsal import HAS_GPU
from running import bits, parameters
from test_parity import params_agree, states_agree
from torch.nn import Parameter

import hfac

DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("name", OPTIONS)


def sized(on_a_gpu, rehearsed):
    """What a test is to use where it runs."""
    return on_a_gpu if HAS_GPU else rehearsed


#: Rows that fill more than one block, and columns that fill more than one tile.
LARGE = sized(
    [(300, 2100), (2100, 300), (40, 20000), (1024, 4096), (50257, 16)],
    [(40, 2100), (700, 24)],
)
#: Small tensors beside one that fills several blocks.
MIXED = sized([(24, 18), (300, 2100), (1024,), (7,), (4096,)], [(24, 18), (60, 300), (1024,), (7,)])


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
            params_agree(name, param.detach().cpu(), twin.detach(), old, kwargs["lr"], slack, backend)
            ours = {key: value.cpu() for key, value in optimizer.state[param].items()}
            states_agree(name, ours, reference.state[twin], twin.grad, slack)


#: Of a rehearsal, whose kernels tests/backends/test_cuda_emulated.py compares in every type, bfloat16 with one row.
TYPES = [
    pytest.param(name, key, dtype, marks=pytest.mark.slow if dtype == DTYPES[2] else (), id=f"{name}-{key}-{dtype}")
    for name, rows in OPTIONS.items()
    for key in rows
    for dtype in DTYPES
    if HAS_GPU or key == "all" or dtype == DTYPES[0]
]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "options", "dtype"), TYPES)
def test_parity(name, options, dtype, backend):
    compared(name, backend, OPTIONS[name][options], [*SHAPES, *LARGE], dtype, steps=sized(4, 2))


@pytest.mark.parity
@BOTH
def test_more_steps_of_every_shape(name, backend):
    compared(name, backend, OPTIONS[name]["all"], SHAPES, torch.float32, steps=sized(20, 4))


@pytest.mark.parity
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
    shapes = MIXED
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


@pytest.mark.graphs
@BOTH
def test_a_replayed_graph_equals_eager_steps(name, backend):
    assert run(name, backend, 8, True) == run(name, backend, 8, False)


@pytest.mark.parity
@BOTH
def test_two_runs_have_the_same_bits(name, backend):
    assert run(name, backend, 5, False, torch.bfloat16) == run(name, backend, 5, False, torch.bfloat16)


def does_not_wait(step):
    """Once it is warm, on the device."""
    for _ in range(2):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_a_step_does_not_wait_for_the_device(name, backend, capturable):
    params = [on_device(param) for param in parameters(MIXED)]
    optimizer = getattr(hfac, name)(params, backend=backend, capturable=capturable)
    gradients_on_device(params, 0)
    does_not_wait(optimizer.step)


@pytest.mark.graphs
@BOTH
def test_on_a_stream_of_its_own(name, backend):
    expected, got = [], []
    for stream, found in ((None, expected), (torch.cuda.Stream(), got)):
        params = [on_device(param) for param in parameters(MIXED)]
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


@BOTH
def test_a_step_allocates_nothing_of_the_parameters_size(name, backend):
    size = sized(4096, 1024)
    params = [Parameter(torch.rand(size, size, device=DEVICE, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = getattr(hfac, name)(params, backend=backend)
    for param in params:
        param.grad = torch.rand_like(param)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() - before + optimizer.workspace_bytes()
    # Of few elements tiles have few rows, to make blocks for all multiprocessors, and so more partial sums.
    assert held <= sized(0.2, 0.4) * 2 * 2 * size**2


@pytest.mark.large
@BOTH
def test_beyond_two_to_the_31_elements(name, backend):
    """Parameter and gradient take 4.3 GB each; comparing another 2.2."""
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40e9:
        pytest.skip("needs a GPU with 40 GB: two of these may run at once")
    shape = sized((2**16 + 8, 2**15 + 8), (2**9 + 8, 2**8 + 8))
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


@pytest.mark.parity
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
