"""The Triton kernels against the reference in Triton's interpreter; tests/test_triton.py runs this file in a process of
its own, because TRITON_INTERPRET must be set before anything imports Triton.

The table is that of tests/test_parity.py with three steps in place of twenty, its shapes one list. In bfloat16 a
parameter may be one ulp off: the interpreter's stores truncate.
"""

import copy
import os

import pytest
import torch
from cases import DTYPES, OPTIONS, SHAPES, gradient, shape_id
from test_parity import (
    ieee_square_roots,
    params_agree,
    states_agree,
    step_with,
    test_autograd_notices_the_write,
)

import hfac
from hfac import ops

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/test_triton.py"
triton = pytest.importorskip("triton")

from hfac.triton_kernels import plan, step, table  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

__all__ = ["ieee_square_roots", "test_autograd_notices_the_write"]
STEPS = 3


@pytest.fixture(scope="session", autouse=True)
def patched_once():
    """The interpreter patches the language anew for every function that a kernel calls, which takes most of its time.
    Once is enough where nothing runs uninterpreted."""
    if not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    original, seen = interpreter._patch_lang, set()

    def patch(fn):
        modules = frozenset(id(v) for v in fn.__globals__.values() if v in (triton.language, triton.language.core))
        if modules not in seen:
            seen.add(modules)
            original(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch
    yield
    interpreter._patch_lang = original


def agree(name, ours, theirs, before, lr):
    if ours.dtype == torch.bfloat16:
        ulp = torch.finfo(torch.bfloat16).eps * theirs.float().abs()
        off = (theirs.float() - ours.float()).abs()
        slack = 0 if name == "SMMF" else ulp + 1e-4 * (lr + (theirs.float() - before.float()).abs())
        assert (off <= ulp + slack).all(), f"off by {(off / ulp).max():.3g} ulp"
        return
    params_agree(name, ours, theirs, before, lr)


ROWS = [
    pytest.param(name, options, dtype, id=f"{name}-{options}-{str(dtype).removeprefix('torch.')}")
    for name, rows in OPTIONS.items()
    for options in rows
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "options", "dtype"), ROWS)
def test_a_list_of_hostile_shapes(name, options, dtype):
    kwargs = OPTIONS[name][options]
    params = [torch.nn.Parameter(gradient(shape, 0, dtype)) for shape in SHAPES]
    optimizer = getattr(hfac, name)(params, **kwargs, backend="triton")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    reference = getattr(hfac, name)(twins, **kwargs, backend="reference")
    for t in range(1, STEPS + 1):
        befores = [p.detach().clone() for p in params]
        for i, (p, q, shape) in enumerate(zip(params, twins, SHAPES, strict=True)):
            q.data.copy_(p.data)
            reference.state[q] = copy.deepcopy(optimizer.state[p])
            grad = gradient(shape, 100 * t + i, dtype)
            if options == "skip" and (t + i) % 2 and grad.numel():
                grad.view(-1)[i % grad.numel()] = float("inf") if i % 3 else float("nan")
            p.grad = q.grad = grad
        optimizer.step()
        reference.step()
        for p, q, before, shape in zip(params, twins, befores, SHAPES, strict=True):
            try:
                agree(name, p.detach(), q.detach(), before, kwargs["lr"])
                states_agree(name, optimizer.state[p], reference.state[q], q.grad)
            except AssertionError as error:
                raise AssertionError(f"{shape_id(shape)}, step {t}: {error}") from error
    if options == "skip":
        assert all(optimizer.state[p]["skipped"] > 0 for p in params if p.numel())


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_another_type(name):
    kwargs = OPTIONS[name]["all"]
    shapes = [(24, 18), (31, 8), (16, 24), (24,), (7,), (6, 4, 3, 3)]
    for dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        params = [torch.nn.Parameter(gradient(shape, 0, dtype)) for shape in shapes]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = getattr(hfac, name)(params, **kwargs, backend="triton")
        reference = getattr(hfac, name)(twins, **kwargs, backend="reference")
        for q, p in zip(twins, params, strict=True):
            reference.state[q] = copy.deepcopy(optimizer.state[p])
        grads = [gradient(shape, 1, grad_dtype) for shape in shapes]
        before = [p.detach().clone() for p in params]
        for opt, tensors in ((optimizer, params), (reference, twins)):
            step_with(opt, tensors, grads)
        for p, q, old, grad in zip(params, twins, before, grads, strict=True):
            agree(name, p.detach(), q.detach(), old, kwargs["lr"])
            states_agree(name, optimizer.state[p], reference.state[q], grad)


def strided(shape, how, seed):
    """A tensor of this shape that is laid out otherwise than row by row."""
    values = gradient(shape, seed, torch.float32)
    if how == "transposed":
        return values.mT.contiguous().mT
    if how == "permuted":
        order = list(range(values.ndim))[::-1]
        return values.permute(order).contiguous().permute(order)
    if how == "padded":
        wide = torch.full((*shape[:-1], shape[-1] + 3), float("nan"))
        wide[..., 1:-2] = values
        return wide[..., 1:-2]
    assert how == "unaligned"
    return torch.cat([torch.full((1,), float("nan")), values.view(-1)])[1:].view(shape)


@pytest.mark.parametrize("how", ["transposed", "permuted", "padded", "unaligned"])
@pytest.mark.parametrize("name", OPTIONS)
def test_layouts(name, how):
    """Parameters and gradients of any layout: the same as of contiguous copies, and nothing outside them is touched."""
    kwargs = OPTIONS[name]["all"]
    for shape in ((16, 24), (4, 3, 8, 5), (5, 7)):
        param = torch.nn.Parameter(strided(shape, how, 0))
        around = param.detach().as_strided((param.untyped_storage().nbytes() // 4,), (1,), 0)
        outside = around.isnan()
        twin = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
        optimizer = getattr(hfac, name)([param], **kwargs, backend="triton")
        reference = getattr(hfac, name)([twin], **kwargs, backend="reference")
        for t in range(1, 3):
            twin.data.copy_(param.data)
            reference.state[twin] = copy.deepcopy(optimizer.state[param])
            before = param.detach().clone()
            grad = strided(shape, how, t)
            step_with(optimizer, [param], [grad])
            step_with(reference, [twin], [grad.contiguous()])
            agree(name, param.detach(), twin.detach(), before, kwargs["lr"])
            states_agree(name, optimizer.state[param], reference.state[twin], grad)
        assert torch.equal(around.isnan(), outside)


def test_expanded_gradients():
    """All elements in one place, as the gradient of a sum has them."""
    for name in OPTIONS:
        params = [torch.nn.Parameter(torch.ones(16, 24)) for _ in range(2)]
        for param, backend in zip(params, ("triton", "reference"), strict=True):
            optimizer = getattr(hfac, name)([param], lr=0.1, backend=backend)
            step_with(optimizer, [param], [torch.ones(()).expand(16, 24)])
        agree(name, params[0].detach(), params[1].detach(), torch.ones(16, 24), 0.1)


@pytest.mark.parametrize("name", OPTIONS)
def test_scalars_on_the_device(name):
    """Learning rate and decays as tensors give the bits that numbers give."""
    kwargs = OPTIONS[name]["all"]
    found = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(gradient(shape, 0, torch.float32)) for shape in ((16, 24), (7,), (24,))]
        optimizer = getattr(hfac, name)(params, **kwargs, capturable=capturable, backend="triton")
        for t in range(1, 4):
            for i, p in enumerate(params):
                p.grad = gradient(tuple(p.shape), 10 * t + i, torch.float32)
            optimizer.step()
        found.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_scalars_as_tensors_reach_the_kernels():
    param, state = torch.ones(16, 24), [torch.zeros(s) for s in ((16,), (24,), (16,), (24,))]
    twin, twin_state = param.clone(), [s.clone() for s in state]
    grad = gradient((16, 24), 1, torch.float32)
    options = dict(eps=1e-30, clip_threshold=1.0, maximize=False)
    numbers = dict(lr=0.1, weight_decay=0.3, beta1=0.5, beta2=0.25)
    ops.hfac_step_([param], [grad], *([s] for s in state), **numbers, **options, backend="triton")
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    tensors["beta2"] = tensors["beta2"].reshape(1)
    ops.hfac_step_([twin], [grad], *([s] for s in twin_state), **tensors, **options, backend="triton")
    assert torch.equal(param, twin)
    assert all(torch.equal(a, b) for a, b in zip(state, twin_state, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_is_compiled_anew(name, monkeypatch):
    """What Triton compiles for: a kernel's constants, and of each argument its type and whether 16 divides its address
    (Triton's own key, without the device). A hundred steps with another learning rate, decay and weight decay in each
    ask for what the first asked for; no argument is a number, which Triton would specialize on 1 and on multiples of
    16."""
    keys, calls = set(), []

    def observe(self, launch, tiles, options):  # in place of the launch, which would take the interpreter minutes
        key = [launch.name]
        for argument, value in self._arguments(launch, tiles, options).items():
            if isinstance(value, torch.Tensor):
                assert value.data_ptr() % 16 == 0
                key.append((argument, value.dtype))
            else:
                assert argument in launch.constants or argument in launch.options
                key.append((argument, str(value)))
        keys.add(tuple(key))
        calls.append(launch.name)

    monkeypatch.setattr(step.Bound, "_launch", observe)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((16, 24), (24,))]
    optimizer = getattr(hfac, name)(params, weight_decay=0.1, backend="triton")
    first = None
    for t in range(100):
        optimizer.param_groups[0].update(lr=0.1 / (t + 1), weight_decay=0.01 * t)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        first = first or (set(keys), len(calls))
    assert (keys, len(calls)) == (first[0], 100 * first[1])


def test_two_steps_from_one_state_give_the_same_bits():
    for name in OPTIONS:
        found = []
        for _ in range(2):
            params = [torch.nn.Parameter(gradient(shape, 0, torch.float32)) for shape in ((127, 129), (130,))]
            optimizer = getattr(hfac, name)(params, backend="triton")
            for i, p in enumerate(params):
                p.grad = gradient(tuple(p.shape), i, torch.float32)
            optimizer.step()
            found.append([p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_groups_of_a_long_list_share_their_partial_sums(monkeypatch):
    """SMMF beyond the bound of its workspace: in groups, with the same result."""
    shapes = [(64, 72), (24, 16), (40, 48), (7,)]
    found, sizes = [], []
    for bound in (plan.WORKSPACE, 2048):
        monkeypatch.setattr(plan, "WORKSPACE", bound)
        params = [torch.nn.Parameter(gradient(shape, 0, torch.float32)) for shape in shapes]
        optimizer = hfac.SMMF(params, backend="triton")
        for i, p in enumerate(params):
            p.grad = gradient(tuple(p.shape), i, torch.float32)
        optimizer.step()
        found.append([p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()])
        items = [plan.Item(*hfac.optim.smmf.matricize.square(p.numel()), p.dtype, p.dtype, slice=8) for p in params]
        sizes.append(plan.make_plan("smmf_step_", items).workspace)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert sizes[1] < sizes[0]


def test_wide_rows_are_read_twice():
    """Rows beyond the widest that registers hold; the table's 3 x 4097 is one, and this one has several tiles."""
    shape = (70, table.CHUNK.value * 17)
    params = [torch.nn.Parameter(gradient(shape, 0, torch.float32)) for _ in range(2)]
    grad = gradient(shape, 1, torch.float32)
    states = []
    for param, backend in zip(params, ("triton", "reference"), strict=True):
        before = param.detach().clone()
        param.grad = grad
        optimizer = hfac.HFac([param], lr=0.02, weight_decay=0.1, nonfinite="skip", backend=backend)
        optimizer.step()
        states.append(optimizer.state[param])
    agree("HFac", params[0].detach(), params[1].detach(), before, 0.02)
    states_agree("HFac", *states, grad)


def test_gradients_move_and_change_their_layout():
    """What a bound op knows of its gradients is found out anew where they changed, and only there."""
    shape = (16, 24)
    names = ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols")
    scalars = dict(lr=0.1, weight_decay=0.1, beta1=0.5, beta2=0.5, eps=1e-30, clip_threshold=1.0, maximize=False)
    param, states = gradient(shape, 0, torch.float32), [torch.zeros(s) for s in (16, 24, 16, 24)]
    twin, twin_states = param.clone(), [s.clone() for s in states]
    bound = ops.Bound("hfac_step_", [param], {n: [s] for n, s in zip(names, states, strict=True)}, backend="triton")
    plain = gradient(shape, 1, torch.float32)
    kinds = [plain, plain, plain.clone(), strided(shape, "transposed", 2), strided(shape, "unaligned", 3)]
    kinds += [strided(shape, "padded", 4), gradient(shape, 5, torch.bfloat16), torch._neg_view(plain), plain]
    for grad in kinds:
        twin.copy_(param)
        for old, new in zip(twin_states, states, strict=True):
            old.copy_(new)
        before = param.clone()
        bound.prepare([grad], **scalars)()
        ops.hfac_step_([twin], [grad], *([s] for s in twin_states), **scalars, backend="reference")
        agree("HFac", param, twin, before, 0.1)
        ours, theirs = ({n.removesuffix("s"): s for n, s in zip(names, g, strict=True)} for g in (states, twin_states))
        states_agree("HFac", ours, theirs, grad.float())
