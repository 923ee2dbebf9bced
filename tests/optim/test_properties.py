"""What must hold whatever the numbers are: symmetries of H-Fac, independence of memory layout, repeatability."""

import copy

import pytest
import torch
from cases import OPTIONS, gradient
from hypothesis import given, settings
from hypothesis import strategies as st

import hfac
from hfac import matricize

STEPS = 5
MATRICES = [(24, 18), (7, 31), (1, 9), (13, 1), (2, 2)]


def train(name, start, grads, **options):
    """Parameter and state after one step per gradient."""
    param = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
    optimizer = getattr(hfac, name)([param], **options)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach(), dict(optimizer.state[param])


def problem(shape, scale=1.0, seed=0):
    grads = [scale * gradient(shape, seed + step) for step in range(1, STEPS + 1)]
    return gradient(shape, seed), grads


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", ["all", "unclipped"])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_hfac_transposed_problem_gives_transposed_result(shape, options):
    start, grads = problem(shape)
    result, state = train("HFac", start, grads, **OPTIONS["HFac"][options])
    result_t, state_t = train("HFac", start.T.contiguous(), [g.T for g in grads], **OPTIONS["HFac"][options])
    close(result_t.T, result)
    if "exp_avg_row" in state:
        for key in ("exp_avg", "exp_avg_sq"):
            close(state_t[f"{key}_row"], state[f"{key}_col"])
            close(state_t[f"{key}_col"], state[f"{key}_row"])
    else:
        close(state_t["exp_avg_sq"].T, state["exp_avg_sq"])


@pytest.mark.parametrize("options", ["all", "unclipped"])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_hfac_commutes_with_row_and_column_permutations(shape, options):
    start, grads = problem(shape)
    rows, cols = torch.randperm(shape[0]), torch.randperm(shape[1])
    result, _ = train("HFac", start, grads, **OPTIONS["HFac"][options])
    permuted, _ = train("HFac", start[rows][:, cols], [g[rows][:, cols] for g in grads], **OPTIONS["HFac"][options])
    close(permuted, result[rows][:, cols])


@pytest.mark.parametrize("scale", [1e-6, 7.0, 1e5])
@pytest.mark.parametrize("shape", [*MATRICES, (9,), (4, 3, 5)], ids=str)
def test_hfac_does_not_feel_the_scale_of_gradients(shape, scale):
    start, grads = problem(shape)
    options = OPTIONS["HFac"]["all"] | {"eps": 1e-60}
    close(train("HFac", start, [scale * g for g in grads], **options)[0], train("HFac", start, grads, **options)[0])


@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    name=st.sampled_from(["HFac", "SMMF"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_flipping_signs_flips_the_step(shape, name, seed):
    """Both algorithms are odd in (W, G), except where SMMF counts a zero as negative: gradients here have no zeros."""
    start, grads = problem(shape, seed=seed)
    grads = [torch.where(g == 0, torch.ones_like(g), g) for g in grads]
    options = OPTIONS[name]["all"]
    close(train(name, -start, [-g for g in grads], **options)[0], -train(name, start, grads, **options)[0], 1e-9)


def strided(kind, tensor):
    """A tensor equal to ``tensor`` that lies differently in memory."""
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "channels-last":
        return tensor.to(memory_format=torch.channels_last)
    if kind == "offset":
        return torch.cat([torch.ones(3, dtype=tensor.dtype), tensor.flatten()])[3:].view(tensor.shape)
    if kind == "every-second":
        wide = torch.ones(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    raise AssertionError(kind)


LAYOUTS = [
    ("transposed", (24, 18)),
    ("transposed", (6, 4, 3, 5)),
    ("channels-last", (6, 4, 3, 5)),
    ("channels-last", (17, 3, 7, 7)),
    ("offset", (24, 18)),
    ("offset", (7,)),
    ("every-second", (24, 18)),
    ("every-second", (24,)),
    ("every-second", (1, 9)),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("what", ["param", "grad", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "shape"), LAYOUTS)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_memory_layout_does_not_matter(name, kind, shape, dtype, what, backend):
    start, grads = problem(shape)
    start, grads = start.to(dtype), [g.to(dtype) for g in grads]
    options = OPTIONS[name]["all"] | {"backend": backend}
    expected, expected_state = train(name, start, grads, **options)
    odd_start = strided(kind, start) if what != "grad" else start
    odd_grads = [strided(kind, g) for g in grads] if what != "param" else grads
    param = torch.nn.Parameter(odd_start.detach())
    optimizer = getattr(hfac, name)([param], **options)
    for grad in odd_grads:
        param.grad = grad
        optimizer.step()
    assert torch.equal(param, expected)
    assert param.data_ptr() == odd_start.data_ptr() and param.stride() == odd_start.stride()
    for key, value in expected_state.items():
        assert torch.equal(optimizer.state[param][key], value), key


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_expanded_gradient_equals_its_copy(name, backend):
    start, _ = problem((24, 18))
    grads = [gradient((18,), step).expand(24, 18) for step in range(STEPS)]
    options = OPTIONS[name]["all"] | {"backend": backend}
    expanded, _ = train(name, start, grads, **options)
    contiguous, _ = train(name, start, [g.contiguous() for g in grads], **options)
    assert torch.equal(expanded, contiguous)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_two_runs_give_the_same_bits(name, backend):
    shapes = [(127, 129), (64,), (6, 4, 3, 3), ()]
    runs = []
    for _ in range(2):
        params = [torch.nn.Parameter(gradient(shape, 0, torch.float32)) for shape in shapes]
        optimizer = getattr(hfac, name)(params, **OPTIONS[name]["all"], backend=backend)
        for step in range(STEPS):
            for param in params:
                param.grad = gradient(param.shape, step, torch.float32)
            optimizer.step()
        runs.append((params, copy.deepcopy(optimizer.state_dict()["state"])))
    for first, second in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(first, second)
    for index, state in runs[0][1].items():
        for key, value in state.items():
            assert torch.equal(value, runs[1][1][index][key]), (index, key)


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_a_list_equals_its_parameters_one_by_one(name):
    shapes = [(24, 18), (9,), (), (6, 4, 3, 3), (7,), (0, 3)]
    together = [torch.nn.Parameter(gradient(shape, 3)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [getattr(hfac, name)(together, **OPTIONS[name]["all"])]
    optimizers += [getattr(hfac, name)([p], **OPTIONS[name]["all"]) for p in alone]
    for step in range(STEPS):
        for p, q in zip(together, alone, strict=True):
            # One parameter has no gradient at first, so that steps differ inside the list.
            p.grad = q.grad = None if step < 2 and p.ndim == 1 else gradient(p.shape, step)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q)


@given(st.integers(1, 5000))
@settings(max_examples=200, deadline=None)
def test_square_is_the_most_nearly_square_factorization(numel):
    n, m = matricize.square(numel)
    best = min((a - numel // a, a) for a in range(1, numel + 1) if numel % a == 0 and a >= numel // a)
    assert (n, m) == (best[1], numel // best[1])


@pytest.mark.parametrize(
    ("shape", "balanced", "flatten"),
    [
        ((), None, None),
        ((5,), None, None),
        ((1, 64), None, None),
        ((64, 1), None, None),
        ((24, 18), 1, 1),
        ((64, 3, 7, 7), 1, 1),
        ((5, 6, 7), 2, 1),
        ((8, 128, 64), 2, 1),
        ((2, 2, 2, 2), 2, 1),
        ((1, 6, 7), 2, None),
        ((4, 2, 2), 1, 1),
        ((2, 2, 4), 2, 1),
        ((4, 4, 4), 1, 1),
    ],
    ids=str,
)
def test_cut(shape, balanced, flatten):
    assert matricize.cut(shape) == balanced
    assert matricize.cut(shape, "flatten") == flatten
