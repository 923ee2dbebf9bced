"""The Triton kernels against the reference in Triton's interpreter; test_triton.py runs this file in a process of
its own, because TRITON_INTERPRET must be set before anything imports Triton.

The table is that of test_parity.py with two or three steps in place of twenty, its shapes one list. Shapes of more than
1024 elements are there for every row of options in float32, and for every type in the first row; `make test` has them
once, and smaller ones in their place. In bfloat16 a parameter may be one ulp off: the interpreter's stores truncate.
"""

import copy
import os

import calls
import numpy as np
import pytest
import test_parts
import torch
from cases import DTYPES, OPTIONS, SHAPES, gradient, shape_id
from suites import laid_out
from test_parity import (
    SUMS,
    ieee_square_roots,
    states_agree,
    step_with,
    test_autograd_notices_the_write,
)
from test_parity import truncated_agree as agree

import hfac
from hfac import matricize, ops, rounding, spec
from hfac.backends.contract import Operands
from hfac.signs import pack_signs

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/backends/test_triton.py"
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from hfac.triton_kernels import element, items, launcher, layouts, plan, records, shards, step, table  # noqa: E402
from hfac.triton_kernels import rounding as kernels  # noqa: E402

__all__ = ["ieee_square_roots", "test_autograd_notices_the_write"]
STEPS = 3
SMALL = [shape for shape in SHAPES if torch.Size(shape).numel() <= 1024]


def rows(shapes, taken, *marks):
    """Rows of the table, with these shapes; ``taken``: whether one is, by its options and by whether it is float32."""
    size = "all" if shapes is SHAPES else "small"
    return [
        pytest.param(name, options, dtype, shapes, id=f"{name}-{options}-{str(dtype)[6:]}-{size}", marks=marks)
        for name, table in OPTIONS.items()
        for options in table
        for dtype in DTYPES
        if taken(options, dtype == torch.float32)
    ]


#: the types of shards; the others are read and written by the same code
PARTS_OF = [
    dtype if dtype in (torch.float32, torch.bfloat16) else pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in DTYPES
]
# Larger shapes take minutes: with the first options in every type, and where kernels of their own step them.
ROWS = [
    *rows(SMALL, lambda options, single: options == "all" or single),
    *rows(SHAPES, lambda options, single: options == "all" or (options == "int8" and single), pytest.mark.slow),
    *rows(SMALL, lambda options, single: options != "all" and not single, pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "options", "dtype", "shapes"), ROWS)
def test_a_list_of_hostile_shapes(name, options, dtype, shapes):
    kwargs = OPTIONS[name][options]
    params = [torch.nn.Parameter(gradient(shape, 0, dtype)) for shape in shapes]
    optimizer = getattr(hfac, name)(params, **kwargs, backend="triton")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    reference = getattr(hfac, name)(twins, **kwargs, backend="reference")
    for t in range(1, 1 + (STEPS if shapes is SHAPES else 2)):
        befores = [p.detach().clone() for p in params]
        for i, (p, q, shape) in enumerate(zip(params, twins, shapes, strict=True)):
            q.data.copy_(p.data)
            reference.state[q] = copy.deepcopy(optimizer.state[p])
            grad = gradient(shape, 100 * t + i, dtype)
            if options == "skip" and (t + i) % 2 and grad.numel():
                grad.view(-1)[i % grad.numel()] = float("inf") if i % 3 else float("nan")
            p.grad = q.grad = grad
        optimizer.step()
        reference.step()
        for p, q, before, shape in zip(params, twins, befores, shapes, strict=True):
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
    return laid_out(gradient(shape, seed, torch.float32), how)


@pytest.mark.parametrize("how", ["transposed", "permuted", "padded", "shifted", "permuted, of many"])
@pytest.mark.parametrize("name", OPTIONS)
def test_layouts(name, how, monkeypatch):
    """Parameters and gradients of any layout: the same as of contiguous copies, and nothing outside them is touched.
    ``of many``: as where there are 2^31 elements, too many for products in place of divisions."""
    how, _, many = how.partition(", ")
    if many:
        monkeypatch.setattr(layouts, "factor_of", lambda size, reach: 0)
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


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_beside_other_layouts(name):
    """A gradient that does not lie as its parameter does, and one that is misaligned: of these only the first is read
    element by element."""
    for how, whole in (("shifted", True), ("transposed", False)):
        shape = (16, 24)
        param = torch.nn.Parameter(gradient(shape, 0, torch.float32))
        twin = torch.nn.Parameter(param.detach().clone())
        optimizer = getattr(hfac, name)([param], lr=0.1, backend="triton")
        reference = getattr(hfac, name)([twin], lr=0.1, backend="reference")
        for t in range(1, 3):
            twin.data.copy_(param.data)
            reference.state[twin] = copy.deepcopy(optimizer.state[param])
            before = param.detach().clone()
            grad = strided(shape, how, t)
            seen = []
            with pytest.MonkeyPatch.context() as patched:
                run = step.Room.run
                patched.setattr(step.Room, "run", lambda *of, run=run, seen=seen: (seen.append(of[1]), run(*of)))
                step_with(optimizer, [param], [grad])
            step_with(reference, [twin], [grad.contiguous()])
            agree(name, param.detach(), twin.detach(), before, 0.1)
            states_agree(name, optimizer.state[param], reference.state[twin], grad)
            of_gradients = [launch for launch in seen[0] if "ALIGNED" in launch.constants]
            assert of_gradients
            assert {(x.constants["WHOLE"], x.constants["ALIGNED"]) for x in of_gradients} == {
                (whole, 4 if whole else 16)
            }


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
    calls.hfac_step_([param], [grad], *([s] for s in state), **numbers, **options, backend="triton")
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    tensors["beta2"] = tensors["beta2"].reshape(1)
    calls.hfac_step_([twin], [grad], *([s] for s in twin_state), **tensors, **options, backend="triton")
    assert torch.equal(param, twin)
    assert all(torch.equal(a, b) for a, b in zip(state, twin_state, strict=True))


#: How weights are stored: their type and the optimizer's options.
KINDS = {
    "bfloat16": (torch.bfloat16, dict(rounding="stochastic", seed=0xF123456789ABCDEF)),
    "float16": (torch.float16, dict(rounding="stochastic", seed=7)),
    "split": (torch.bfloat16, dict(master="split", rounding="stochastic")),
    "split8": (torch.bfloat16, dict(master="split8")),
    "split8-stochastic": (torch.bfloat16, dict(master="split8", rounding="stochastic", seed=2**32)),
}


@triton.jit
def rounded(
    values, drawn, out, lows, scalars, record, N: tl.constexpr, W: tl.constexpr, HOW: tl.constexpr, LOW: tl.constexpr
):
    """Random bits of N elements, and values stored by them; the last value is the first element's."""
    i = tl.arange(0, N)
    w = tl.load(values + i)
    bits = tl.zeros([N], tl.uint32)
    if HOW != table.NEAREST:
        seed, t, position, first, layout = kernels.counter(record, scalars, 0, HOW)
        at = kernels.calls(N, HOW)
        bits = kernels.random_bits(seed, t, position, first, layout, at, HOW)
        tl.store(drawn + i, tl.reshape(bits, [N]).to(tl.int32))
    kernels.store(w, bits, out + i, lows, 0, i, i < N, W, True, HOW, LOW)
    tl.store(values + i, kernels.load(out + i, lows, 0, i, i < N, tl.float32, True, LOW))


def hard_numbers(count):
    """float32 of any bits, many of them near the ends of float16's range, and all that is special."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    bits[::2] = bits[::2] & ~(0xFF << 23) | torch.randint(98, 145, (count // 2,), generator=generator) << 23
    special = [0, 1, 0x33000000, 0x33000001, 0x387FFFFF, 0x38800000, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF, 0x7F800000]
    special += [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x007FFFFF, 0x3F808000, 0x3F80807F, 0x3F808080, 0x3F808180]
    special = torch.tensor(special)
    bits[: 2 * len(special)] = torch.cat([special, special - 2**31])
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


PLACES = {
    "EIGHT": (rounding.BitOffset(2**32 - 1, 8 * (2**32 - 3)), (1024,)),
    "EIGHT_APART": (rounding.BitOffset(3, 16, (64 * 40, 64, 1)), (4, 16, 16)),
    "EACH": (rounding.BitOffset(0, 2**35 - 5, (1, 37)), (16, 64)),
    "NEAREST": (None, (1024,)),
}


@pytest.mark.parametrize(
    ("dtype", "low"), [(torch.bfloat16, 0), (torch.float16, 0), (torch.bfloat16, 8), (torch.bfloat16, 16)]
)
@pytest.mark.parametrize("how", PLACES)
def test_rounding_is_the_definition(how, dtype, low):
    """Bits and what is stored by them, of every kind of number and of indices beyond 32 bits."""
    place, shape = PLACES[how]
    if place is None and low == 0:
        return  # a plain store, which rounds to nearest
    values = hard_numbers(1024)
    seed, t = 0xFEDCBA9876543210, 2**24
    drawn, out = torch.zeros(1024, dtype=torch.int32), torch.zeros(1024, dtype=dtype)
    lows = torch.zeros(1024, dtype=torch.int8 if low == 8 else torch.int16)
    lists = {"master_lows": [lows.view(shape)]} if low else {}
    weights, places = [out.view(shape)], None if place is None else [place]
    found = records.Records(Operands(spec.HFAC_DENSE_STEP, weights, lists, {}, places), weights)
    (item,) = found.items
    if place is not None and low != 16:
        assert item.stochastic == getattr(table, how).value
    numbers = torch.tensor(found.numbers)
    record = found.filled(torch.tensor([item.record()]), 0, numbers.data_ptr())
    scalars = torch.tensor(
        records.scalar_values(records.scalars_of({"step": float(t)}, True), seed, 1), dtype=torch.float64
    )
    back = values.clone()
    HOW = getattr(table, how).value
    rounded[(1,)](back, drawn, out, lows, scalars, record, 1024, items.TYPES[dtype], HOW, low)
    bits = None
    if place is not None:
        bits = rounding.random_bits(place, shape, seed, float(t), torch.device("cpu")).view(-1)
        assert torch.equal(drawn.long(), bits)
    if low:
        high, rest = rounding.split(values, lows.dtype, bits)
        assert torch.equal(lows, rest)
        assert torch.equal(back.isnan(), values.isnan())
        assert torch.equal(back.nan_to_num(), rounding.join(high, rest).nan_to_num())
        assert low == 8 or torch.equal(back.nan_to_num(), values.nan_to_num())
    else:
        high = rounding.stochastic(values, dtype, bits)
    assert torch.equal(out.isnan(), values.isnan())
    same = out.view(torch.int16) == high.view(torch.int16)
    assert (same | values.isnan()).all(), values[~same]


@triton.jit
def rounded_to_nearest(values, N: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(values + i, kernels.nearest(tl.load(values + i), W, tl.float32, LOW))


@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, None)]
    + [(torch.bfloat16, low) for low in (torch.int8, torch.int16)],
    ids=str,
)
def test_nearest_is_the_definition(dtype, low):
    """Of every kind of number; what is none stays so, whatever its bits carry over."""
    values = hard_numbers(1024)
    wanted = values.to(dtype).float() if low is None else rounding.join(*rounding.split(values, low, None))
    rounded_to_nearest[(1,)](values, 1024, items.TYPES[dtype], 0 if low is None else 8 * low.itemsize)
    assert torch.equal(values.isnan(), wanted.isnan())
    assert torch.equal(values.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("kind", ["plain", "split8-stochastic"])
@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_is_compiled_anew(name, kind, monkeypatch):
    """What Triton compiles for: a kernel's constants, and of each argument its type and whether 16 divides its address
    (Triton's own key, without the device). A hundred steps with another learning rate, decay, weight decay and seed in
    each ask for what the first asked for, at other positions too; no argument is a number, which Triton would
    specialize on 1 and on multiples of 16."""
    keys, calls = set(), []

    def observe(self, launch, tiles, options):  # in place of the launch, which would take the interpreter minutes
        memory = self._memory(launch, tiles)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in memory)
        assert {*launch.kernel.arg_names} == {*launch.memory, *launch.options, *launch.constants}
        constants = launch.constants | {option: options[option] for option in launch.options}
        keys.add((launch.name, *(tensor.dtype for tensor in memory), *map(str, constants.items())))
        calls.append(launch.name)

    monkeypatch.setattr(step.Room, "_launch", observe)
    dtype, options = (torch.float32, {}) if kind == "plain" else KINDS[kind]
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((16, 24), (24,))]
    first = None
    for turn in range(2):
        optimizer = getattr(hfac, name)(params, weight_decay=0.1, backend="triton", **options)
        for t in range(50):
            optimizer.param_groups[0].update(lr=0.1 / (t + 1), weight_decay=0.01 * t, seed=2**33 * t + turn)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            first = first or (set(keys), len(calls))
        params = [torch.nn.Parameter(p.detach().clone()) for p in params[::-1]]
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


@pytest.mark.parametrize(("cols", "tile"), [(table.CHUNK.value * 17, 256), (1160, 2048), (504, 512)])
def test_rows_of_every_length(cols, tile, monkeypatch):
    """Rows beyond the widest that registers hold, which are read twice (the table's 3 x 4097 is one, and this one has
    several tiles); and those of tiles that only matrices of many more elements have."""
    shape = (70, cols)
    monkeypatch.setattr(items, "FINE", 0)
    assert items.stats_shape(items.Item(*shape, torch.float32, torch.float32))[1] == tile
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
    bound = ops.OpCall("hfac_step_", [param], {n: [s] for n, s in zip(names, states, strict=True)}, backend="triton")
    plain = gradient(shape, 1, torch.float32)
    kinds = [plain, plain, plain.clone(), strided(shape, "transposed", 2), strided(shape, "shifted", 3)]
    kinds += [strided(shape, "padded", 4), gradient(shape, 5, torch.bfloat16), torch._neg_view(plain), plain]
    for grad in kinds:
        twin.copy_(param)
        for old, new in zip(twin_states, states, strict=True):
            old.copy_(new)
        before = param.clone()
        calls.step(bound, [grad], **scalars)
        calls.hfac_step_([twin], [grad], *([s] for s in twin_states), **scalars, backend="reference")
        agree("HFac", param, twin, before, 0.1)
        ours, theirs = ({n.removesuffix("s"): s for n, s in zip(names, g, strict=True)} for g in (states, twin_states))
        states_agree("HFac", ours, theirs, grad.float())


def between(lists):
    """Copies of lists of vectors that lie in one buffer, unaligned, with NaN between them; and the buffer."""
    size = 1 + sum(t.numel() + 1 for tensors in lists for t in tensors)
    buffer = torch.full((size,), float("nan"), dtype=lists[0][0].dtype)
    at, found = 1, []
    for tensors in lists:
        found.append([])
        for t in tensors:
            found[-1].append(buffer[at : at + t.numel()].copy_(t))
            at += t.numel() + 1
    return found, buffer


def sums_agree(ours, theirs, terms, what, slack=1.0):
    """Sums of numbers up to ``terms`` in size, and their surroundings, which are NaN in both."""
    assert torch.equal(ours.isnan(), theirs.isnan()), what
    if not (ours == theirs).logical_or(ours.isnan()).all():
        scale = max(theirs.nan_to_num().abs().max().item(), terms)
        error = (ours - theirs).nan_to_num().abs().max().item()
        assert error <= slack * SUMS[theirs.dtype] * scale, f"{what} is off by {error / scale:.3g} of {scale:.3g}"


#: shape of the matrix, its rows and columns that are the part, how the part lies
RECTANGLES = [
    ((48, 40), (8, 24), (0, 40), "contiguous"),
    ((47, 40), (40, 47), (0, 40), "contiguous"),
    ((37, 21), (5, 30), (0, 21), "contiguous"),
    ((40, 48), (0, 40), (16, 32), "contiguous"),
    ((40, 48), (0, 40), (16, 32), "transposed"),
    ((30, 19), (0, 30), (7, 12), "padded"),
    ((33, 200), (3, 20), (72, 168), "contiguous"),
    ((33, 200), (20, 33), (1, 150), "shifted"),
    ((70, 300), (1, 69), (9, 293), "transposed"),
    ((9, 4200), (2, 7), (0, 4200), "contiguous"),
    ((12, 16), (12, 12), (0, 16), "contiguous"),
    ((12, 16), (0, 12), (5, 5), "contiguous"),
]


def rectangle(values, rows, cols, how):
    return laid_out(values[slice(*rows), slice(*cols)], how)


@pytest.mark.parametrize("dtype", PARTS_OF, ids=str)
@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
def test_sums_of_parts(dtype, columns):
    wide = ops.state_dtype(dtype)
    for decays in ("each", "one"):
        grads, old_rows, sizes = [], [], []
        for i, (shape, rows, cols, how) in enumerate(RECTANGLES):
            grad = rectangle(gradient(shape, i, dtype), rows, cols, how)
            grads.append(grad)
            sizes.append(grad.shape)
            old_rows.append(gradient((grad.shape[0],), 50 + i, wide).abs() + 1e-3)
        beta2 = 0.75
        if decays == "each":
            beta2 = torch.linspace(0, 1, len(grads), dtype=torch.float64)
        found = []
        for backend in ("triton", "reference"):
            lists = [[torch.full((m,), -7.0, dtype=wide) for m, _ in sizes] for _ in range(2)]
            if columns:
                lists += [[torch.full((n,), -7.0, dtype=wide) for _, n in sizes] for _ in range(3)]
            filled, buffer = between(lists)
            whole_cols = [shape[1] for shape, *_ in RECTANGLES]
            calls.hfac_sums(grads, old_rows, *filled, cols=whole_cols, beta2=beta2, eps=1e-6, backend=backend)
            found.append((filled, buffer))
        (ours, our_buffer), (theirs, their_buffer) = found
        assert torch.equal(our_buffer.isnan(), their_buffer.isnan())
        for kind, (mine, his) in enumerate(zip(ours, theirs, strict=True)):
            for grad, a, b, case in zip(grads, mine, his, RECTANGLES, strict=True):
                largest = grad.abs().max().to(wide).item() if grad.numel() else 0.0
                sums_agree(a, b, largest if kind in (0, 2) else 0.0, f"list {kind} of {case}")


def test_sums_of_parts_without_decay_and_eps():
    """Rows of a tile that the part does not have must not bring 0 / 0 into the columns' sums."""
    grad = torch.ones(5, 16)
    lists = [[torch.zeros(size)] for size in (5, 5, 5, 16, 16, 16)]
    calls.hfac_sums([grad], *lists, cols=[16], beta2=0.0, eps=0.0, backend="triton")
    assert [tensor[0].item() for (tensor,) in lists] == [0, 16, 16, 5, 5, 5 / 16]


@pytest.mark.parametrize("dtype", PARTS_OF, ids=str)
@pytest.mark.parametrize(
    "options", [dict(clip_threshold=0.7, maximize=False), dict(clip_threshold=None, maximize=True)], ids=["clip", "max"]
)
def test_update_of_parts(dtype, options):
    """With the sums of the whole, which the reference gives; parts without elements take their moments on."""
    wide = ops.state_dtype(dtype)
    scalars = dict(lr=0.02, weight_decay=0.1, **options)
    scalars["beta1"] = torch.linspace(0.9, 0, len(RECTANGLES), dtype=torch.float64)
    if options["maximize"]:
        scalars |= dict(beta1=0.8, lr=torch.tensor(0.02))
    params, grads, totals, mean_squares = [], [], [], []
    u, v, r, s, row_sums, new_rows, col_sums, new_cols = lists = [[] for _ in range(8)]
    for i, (shape, rows, cols, how) in enumerate(RECTANGLES):
        G = gradient(shape, i, dtype)
        params.append(rectangle(gradient(shape, 20 + i, dtype), rows, cols, how))
        grads.append(rectangle(G, rows, cols, how))
        G = G.to(wide)
        squares = G * G + 1e-6
        new_r, new_s = squares.sum(1), squares.sum(0)
        totals.append(new_r.sum())
        mean_squares.append((G * G / (new_r[:, None] * new_s / new_r.sum())).mean())
        for values, side, to in (
            (gradient(shape[:1], 30 + i, wide), rows, u),
            (gradient(shape[1:], 40 + i, wide), cols, v),
            (new_r / 2, rows, r),
            (new_s / 2, cols, s),
            (G.sum(1), rows, row_sums),
            (new_r, rows, new_rows),
            (G.sum(0), cols, col_sums),
            (new_s, cols, new_cols),
        ):
            to.append(values[slice(*side)])
    whole = dict(rows=[shape[0] for shape, *_ in RECTANGLES], cols=[shape[1] for shape, *_ in RECTANGLES])
    before = [param.clone() for param in params]
    twins = [param.clone(memory_format=torch.contiguous_format) for param in params]
    around = [param.as_strided((param.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0) for param in params]
    outside = [storage.isnan() for storage in around]
    found = []
    for backend, mine in (("triton", params), ("reference", twins)):
        copies, buffer = between(lists)
        numbers = torch.stack(totals), torch.stack(mean_squares)
        calls.hfac_apply_(mine, grads, *copies, *numbers, **whole, **scalars, backend=backend)
        found.append((copies, buffer))
    (ours, our_buffer), (theirs, their_buffer) = found
    assert torch.equal(our_buffer.isnan(), their_buffer.isnan())
    for i, case in enumerate(RECTANGLES):
        agree("HFac", params[i], twins[i], before[i], 0.02)
        assert torch.equal(around[i].isnan(), outside[i]), case
        largest = max(grads[i].abs().max().item(), 1.0) if grads[i].numel() else 1.0
        for mine, his in zip(ours[:2], theirs[:2], strict=True):
            assert not torch.equal(mine[i], lists[0][i]) or not mine[i].numel()
            sums_agree(mine[i], his[i], largest, case)
        for mine, his in zip(ours[2:], theirs[2:], strict=True):
            assert torch.equal(mine[i], his[i]), case


@pytest.mark.parametrize("layout", test_parts.LAYOUTS)
def test_codes_of_parts_of_any_layout(layout):
    dtype = torch.bfloat16 if layout == "contiguous" else torch.float32
    test_parts.test_hfac_int8_apply(next(iter(test_parts.MATRIX_PARTS)), dtype, layout, "clipped", "triton")


def test_codes_of_parts_of_several_types():
    test_parts.test_hfac_int8_takes_a_list_of_both_arithmetics("triton")


def test_update_of_parts_of_several_types():
    """Totals have one type, whatever the parameters'."""
    found = []
    for backend in ("triton", "reference"):
        params = [gradient((8, 16), i, dtype) for i, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16))]
        grads = [gradient((8, 16), 5, p.dtype) for p in params]
        lists = [[torch.ones(n, dtype=ops.state_dtype(p.dtype)) for p in params] for n in (8, 16, 8, 16, 8, 8, 16, 16)]
        totals, mean_squares = torch.linspace(1, 3, 6, dtype=torch.float64)[::2], torch.full((3,), 4.0)
        options = dict(lr=0.1, beta1=0.5, weight_decay=0.1, clip_threshold=1.0)
        whole = dict(rows=[8] * 3, cols=[16] * 3)
        calls.hfac_apply_(params, grads, *lists, totals, mean_squares, **whole, **options, backend=backend)
        found.append(params)
    for i, (mine, his) in enumerate(zip(*found, strict=True)):
        agree("HFac", mine, his, gradient((8, 16), i, mine.dtype), 0.1)


def rows_of(shape, first, last):
    """A range of slices of the first dimension: the part's shape, and where it lies in the whole."""
    size = torch.Size(shape[1:]).numel()
    return shape, (last - first, *shape[1:]), [(first * size, (last - first) * size)]


def cols_of(shape, rows, first, last):
    """The same columns of some rows: one run for each."""
    return shape, (len(rows), last - first), [(row * shape[1] + first, last - first) for row in rows]


#: shapes of the whole and of the part, and the runs of the whole that the part consists of
BLOCKS = {
    "whole-rows": rows_of((64, 48), 16, 40),
    "head-and-tail": rows_of((96, 24), 3, 10),
    "uneven": rows_of((50, 24), 11, 33),
    "odd": rows_of((23, 19), 4, 17),
    "within-a-row": rows_of((96, 24), 2, 3),
    "three-dims": rows_of((10, 4, 9), 3, 7),
    "vector": rows_of((96,), 16, 80),
    "odd-vector": rows_of((97 * 3,), 10, 201),
    "empty": rows_of((64, 48), 64, 64),
    "columns": cols_of((20, 48), range(20), 16, 32),
    "odd-columns": cols_of((60, 22), range(60), 3, 10),
    "every-third-row": cols_of((32, 40), range(1, 32, 3), 0, 40),
    "some-rows": cols_of((32, 40), [0, 1, 4, 9, 11, 12, 13, 30], 0, 40),
    "tile": cols_of((32, 40), range(8, 24), 8, 40),
}


def smmf_parts(cases, dtype, first):
    """Arguments of smmf_sums_step_ but for the scalars, by name."""
    wide = ops.state_dtype(dtype)
    found = {name: [] for name in ("params", "grads", "blocks")}
    sides = ("rows", "cols", "sq_rows", "sq_cols") if first else ("sq_rows", "sq_cols")
    found |= {f"{kind}{side}": [] for kind in ("exp_avg_", "new_") for side in sides}
    if first:
        found["exp_avg_signs"] = []
    for i, (whole, shape, runs) in enumerate(cases):
        n, m = matricize.square(torch.Size(whole).numel())
        found["params"].append(gradient(shape, i, dtype))
        found["grads"].append(gradient(shape, 20 + i, dtype))
        found["blocks"].append(matricize.blocks(runs, m))
        for side in sides:
            length = n if "rows" in side else m
            for seed, kind in ((40, "exp_avg_"), (60, "new_")):
                found[kind + side].append(gradient((length,), seed + i, wide).abs())
        if first:
            signs = gradient(shape, 80 + i, wide) > 0
            packed = torch.zeros(matricize.sign_shape(shape), dtype=torch.uint8)
            found["exp_avg_signs"].append(pack_signs(signs) if signs.numel() else packed)
    return found


def copied(arguments):
    """Those that a step writes, its own; its sums lie as a bucket of a collective has them."""
    new = {name: [t.clone() for t in tensors] for name, tensors in arguments.items() if name != "blocks"}
    names = [name for name in new if name.startswith("new_")]
    lists, buffer = between([new[name] for name in names])
    return {**new, **dict(zip(names, lists, strict=True)), "blocks": arguments["blocks"]}, buffer


def missing(first):
    names = ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "new_rows", "new_cols")
    return {} if first else dict.fromkeys(names)


SMMF_PARTS = {
    "adamw": dict(lr=0.02, weight_decay=0.1, eps=1e-6, decoupled_weight_decay=True, maximize=False),
    "adam": dict(lr=0.02, weight_decay=0.1, eps=1e-8, decoupled_weight_decay=False, maximize=True),
    "no-first": dict(lr=0.02, weight_decay=0.1, eps=1e-8, decoupled_weight_decay=True, maximize=True),
}


def smmf_agree(ours, theirs, before):
    for name, tensors in theirs.items():
        if name in ("blocks", "grads"):
            continue
        for i, his in enumerate(tensors):
            mine, old = ours[name][i], before[name][i]
            if name == "params":
                agree("SMMF", mine, his, old, 0.02)
            elif name.startswith("new_"):
                sums_agree(mine, his, 0.0, f"{name}[{i}]")
            else:
                assert torch.equal(mine, his), f"{name}[{i}]"


@pytest.mark.parametrize("dtype", PARTS_OF, ids=str)
@pytest.mark.parametrize("options", SMMF_PARTS)
def test_smmf_on_parts(options, dtype):
    first = options != "no-first"
    arguments = smmf_parts(list(BLOCKS.values()), dtype, first)
    count = len(arguments["params"])
    decays = dict(beta1=torch.linspace(0.9, 0, count).double(), beta2=torch.linspace(0, 0.99, count).double())
    if options == "adam":
        decays = dict(beta1=0.8, beta2=torch.tensor(0.75))
    scalars = SMMF_PARTS[options] | decays | ({} if first else {"beta1": None})
    found = []
    for backend in ("triton", "reference"):
        own, buffer = copied(arguments)
        calls.smmf_sums_step_(**own, **missing(first), **scalars, backend=backend)
        found.append((own, buffer))
    (ours, our_buffer), (theirs, their_buffer) = found
    assert torch.equal(our_buffer.isnan(), their_buffer.isnan())
    smmf_agree(ours, theirs, arguments)


def test_gradients_of_parts_are_clipped():
    test_parts.test_gradients_are_clipped("triton")


def test_found_inf_leaves_every_bit_of_parts_alone():
    test_parts.test_found_inf_leaves_every_bit_alone("triton")


@pytest.mark.slow
def test_smmf_on_parts_of_several_tiles():
    """Blocks that share columns and rows with each other, over several tiles and chunks: the same sums twice, and the
    same where their partial sums do not fit the workspace at once."""
    cases = [rows_of((400, 136), 3, 397), cols_of((40, 1024), range(40), 256, 600), rows_of((622, 8), 4, 620)]
    arguments = smmf_parts(cases, torch.float32, True)
    scalars = SMMF_PARTS["adamw"] | dict(beta1=0.9, beta2=0.5)
    found = []
    for bound in (plan.WORKSPACE, plan.WORKSPACE, 4096):
        shards._planned.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "WORKSPACE", bound)
            own, _ = copied(arguments)
            calls.smmf_sums_step_(**own, **scalars, backend="triton")
            found.append(own)
    shards._planned.cache_clear()
    theirs, _ = copied(arguments)
    calls.smmf_sums_step_(**theirs, **scalars, backend="reference")
    smmf_agree(found[0], theirs, arguments)
    for again in found[1:]:
        for name in theirs:
            if name != "blocks":
                assert all(torch.equal(a, b) for a, b in zip(found[0][name], again[name], strict=True)), name


def test_smmf_on_rows_apart_over_several_tiles():
    """Every second row of the matrix, of more rows than a tile has, on the bulk and off it: each tile has factors of
    rows of its own."""
    cases = [cols_of((80, 320), range(80), first, last) for first, last in ((0, 160), (163, 180))]
    arguments = smmf_parts(cases, torch.float32, True)
    assert [(block.rows, block.row_step) for (block,) in arguments["blocks"]] == [(80, 2), (80, 2)]
    scalars = SMMF_PARTS["adamw"] | dict(beta1=0.9, beta2=0.5)
    ours, theirs = (copied(arguments)[0] for _ in range(2))
    calls.smmf_sums_step_(**ours, **scalars, backend="triton")
    calls.smmf_sums_step_(**theirs, **scalars, backend="reference")
    smmf_agree(ours, theirs, arguments)


def test_parts_of_any_layout():
    """A part need not be contiguous, nor its gradient of its type."""
    case = rows_of((16, 24), 2, 12)
    for how, grad_dtype in (("transposed", torch.float32), ("padded", torch.bfloat16), ("shifted", torch.float32)):
        arguments = smmf_parts([case], torch.float32, True)
        scalars = SMMF_PARTS["adam"] | dict(beta1=0.9, beta2=0.5)
        theirs, _ = copied(arguments)
        theirs["grads"] = [g.to(grad_dtype) for g in theirs["grads"]]
        ours, _ = copied(arguments)
        ours["params"], ours["grads"] = ([laid_out(t, how) for t in theirs[name]] for name in ("params", "grads"))
        calls.smmf_sums_step_(**ours, **scalars, backend="triton")
        calls.smmf_sums_step_(**theirs, **scalars, backend="reference")
        smmf_agree(ours, theirs, arguments)


def test_nothing_is_compiled_anew_for_parts(monkeypatch):
    """As of whole parameters: other numbers, and tensors that lie elsewhere, ask for the same kernels."""
    keys, launched = [], []

    def observe(self, launch, tiles, options):
        assert all(tensor.data_ptr() % 16 == 0 for tensor in self._memory(launch, tiles))
        keys[-1].append((launch.name, str(launch.constants), *(options[option] for option in launch.options)))
        launched.append(launch.name)

    monkeypatch.setattr(launcher.Launcher, "_launch", observe)
    cases = [BLOCKS["whole-rows"], BLOCKS["head-and-tail"]]
    for lr in (0.1, 1.0, 16.0):
        keys.append([])
        arguments, _ = copied(smmf_parts(cases, torch.float32, True))
        options = dict(eps=1e-8, decoupled_weight_decay=True, maximize=False)
        calls.smmf_sums_step_(
            **arguments, lr=lr, beta1=0.9 / lr, beta2=0.5, weight_decay=lr, **options, backend="triton"
        )
        grads, (old, *lists) = [torch.ones(16, 24)], ([torch.ones(size)] for size in (16, 16, 16, 24, 24, 24))
        calls.hfac_sums(grads, old, *lists, cols=[24], beta2=lr, eps=lr, backend="triton")
    assert keys[0] == keys[1] == keys[2]
    assert launched[:4] == ["smmf_tiles", "smmf_shard_fold", "hfac_stats", "hfac_shard_cols"]


def test_autograd_notices_a_write_to_a_part():
    leaf = torch.ones(16, 24, requires_grad=True)
    loss = (leaf * leaf).sum()
    states = [[torch.ones(size)] for size in (16, 24, 16, 24, 16, 16, 24, 24)]
    options = dict(lr=0.1, beta1=0.5, clip_threshold=1.0, weight_decay=0.0, backend="triton")
    one = torch.ones(1)
    with torch.no_grad():
        calls.hfac_apply_([leaf], [torch.ones(16, 24)], *states, one, one, rows=[16], cols=[24], **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def rough_roots(monkeypatch):
    """Approximate roots as a GPU's: off by -2 to 2 units in the last place, and 0 for what is below 2^-126."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def off(exact):
        def rough(self, arg):
            x = np.where(np.abs(arg.data) < np.float32(2.0**-126), np.float32(0), arg.data)
            with np.errstate(divide="ignore", invalid="ignore"):
                y = exact(x)
            units = (x.view(np.int32) * 40503 >> 7) % 5 - 2
            inside = np.isfinite(y) & (y != 0)
            return TensorHandle(
                np.where(inside, y.view(np.int32) + units, y.view(np.int32)).view(np.float32), arg.dtype
            )

        return rough

    monkeypatch.setattr(InterpreterBuilder, "create_sqrt", off(np.sqrt))
    monkeypatch.setattr(InterpreterBuilder, "create_rsqrt", off(lambda x: (1 / np.sqrt(x)).astype(np.float32)))


@triton.jit
def directions(M, V, out, epsilon, N: tl.constexpr):
    i = tl.arange(0, N)
    eps = tl.load(epsilon)
    up, down = element.stretch(eps)
    tl.store(out + i, element.quotient(tl.load(M + i), tl.load(V + i), eps, up, down, True))


@pytest.mark.parametrize("eps", [1e-3, 1e-8, 1e-11, 1e-16, 1e-30, 0.0])
def test_an_approximate_quotient(rough_roots, eps):
    """Within 2^-18 of the exact one for all V that moments of gradients up to 2^50 have, subnormal ones among them; and
    it is not finite only where that is not."""
    powers = torch.arange(-149, 101).float()
    V = torch.cat(
        [torch.exp2(powers), 1.37 * torch.exp2(powers), torch.tensor([0.0, 1e-45, 1.1754942e-38, float("inf")])]
    )
    V = torch.cat([V, V, V, torch.zeros(1024 - 3 * len(V) % 1024)])[:1024]
    M = torch.sqrt(V.double()).float() * gradient(V.shape, 3, torch.float32)
    M[V == 0] = 0
    out = torch.full_like(V, 7.0)
    directions[(1,)](M, V, out, torch.tensor([eps]), 1024)
    exact = M.double() / (torch.sqrt(V.double()) + torch.tensor(eps).double())
    finite = exact.isfinite()
    assert out[finite].isfinite().all()
    error = (out.double() - exact).abs()[finite]
    assert (error <= 2.0**-18 * exact.abs()[finite] + 2.0**-149).all(), (error / exact.abs()[finite]).max()
    assert error.any(), "the roots were not approximate"


def test_weights_of_16_bits_alone_are_approximate(rough_roots):
    """Of these few elements are neighbours of the reference's (float16: the interpreter's stores of bfloat16 truncate),
    and weights of more bits, split ones among them, have every bit of exact roots."""
    shapes, optimizers = [(96, 80), (3000,), (17, 19)], {}
    kinds = {
        "rough": (torch.float16, {}),
        "exact": (torch.float32, {}),
        "split": (torch.bfloat16, dict(master="split8")),
    }
    for name, (of, options) in kinds.items():
        for backend in ("triton", "reference"):
            params = [torch.nn.Parameter(gradient(shape, i, of)) for i, shape in enumerate(shapes)]
            optimizer = hfac.SMMF(params, lr=0.02, weight_decay=0.1, vector_reshape=False, backend=backend, **options)
            optimizers[name, backend] = params, optimizer
    for t in range(2):
        for name in kinds:
            (ours, mine), (theirs, his) = (optimizers[name, backend] for backend in ("triton", "reference"))
            mine.load_state_dict(copy.deepcopy(his.state_dict()))
            before = [p.detach().clone() for p in theirs]
            for params in (ours, theirs):
                for i, (p, old) in enumerate(zip(params, before, strict=True)):
                    p.data.copy_(old)
                    p.grad = gradient(tuple(p.shape), 10 * t + i + 50, p.dtype)
            mine.step()
            his.step()
            for a, b, shape in zip(ours, theirs, shapes, strict=True):
                if name != "rough":
                    assert torch.equal(a, b), (name, shape)
                    continue
                apart = (a.detach().view(torch.int16).int() - b.detach().view(torch.int16).int()).abs()
                assert apart.max() <= 1 and apart.sum() <= max(1, apart.numel() / 1000), (shape, int(apart.sum()))
                for key, old in his.state[b].items():
                    if key in ("exp_avg_sign", "exp_avg", "exp_avg_sq"):  # no sum of many numbers
                        assert torch.equal(mine.state[a][key], old), (key, shape)
