"""Steps whose gradients are scaled, in every backend's kernels: divided by a GradScaler's scale, forbidden by its
found_inf, and clipped by a norm that H-Fac's statistics give, from which the step then goes on, to the bit a plain one.

Where Triton's kernels are interpreted, tests/backends/test_triton.py runs this file once more."""

import copy

import emulated
import pytest
import torch
from suites import ALL_OPS, BF16, F16, F32, F64, KERNELS, KINDS, SEVERAL, SMALLER, TWICE, Run, cases, laid_out, same
from test_parity import ieee_square_roots, params_agree, states_agree, truncated_agree

import hfac
from hfac import ops

__all__ = ["ieee_square_roots"]  # a fixture of every test here
pytestmark = pytest.mark.usefixtures("all_orders")
EACH = pytest.mark.parametrize("backend", KERNELS, indirect=True)
EACH_OP = pytest.mark.parametrize("op", ALL_OPS)
ON_GPUS = pytest.mark.parametrize("backend", [name for name in KERNELS if name != "cpu"], indirect=True)
#: of which kernels on a GPU add up squares alone, before the step
OTHER_OPS = pytest.mark.parametrize("op", [op for op in ALL_OPS if op not in TWICE])
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=TWICE)
def op(request):
    """Of H-Fac's matrices, unless a test is parametrized with some."""
    return request.param


#: Several tiles or chunks and one, rows that registers hold, that are read again and that are longer; whole vectors and
#: none.
SHAPES = [(24, 16), (300, 264), (700, 40), (19, 17), (0, 5), (5, 4104), (130, 7), (2, 14344), (9, 4100)]
SMALL = cases([(24, 16), (0, 5), (130, 7), (70, 24)])
LISTS = {
    "several": SEVERAL,
    "large float32": cases(SHAPES),
    "large bfloat16": cases(SHAPES, BF16),
    "large float16": cases(SHAPES, F16),
    "large float64": cases(SHAPES, F64),
    "large bfloat16 of float32": cases(SHAPES, BF16, F32),
    "large float32 of bfloat16": cases(SHAPES, F32, BF16),
    "large float64 of float16": cases(SHAPES, F64, F16),
}


def both(one, other, t, clip, alike=lambda grads: grads, flags=(None, None), **numbers):
    """A step that goes on from statistics beside a plain one of gradients multiplied by as much. Returns the sums of
    squares among the statistics."""
    clip = torch.tensor(clip)
    found = one.step(alike(one.grads(t)), flags[0], clip=clip, norm=True, **numbers)
    other.step(alike(other.grads(t)), flags[1], clip=None if clip == 1 else clip, **numbers)
    return found.sums.squares


def close(squares, grads, scale=1.0):
    exact = torch.stack([(grad.double() / scale).square().sum() for grad in grads])
    return squares.dtype == F64 and torch.allclose(squares, exact, rtol=1e-6, atol=0)


@pytest.mark.pairwise
@pytest.mark.parametrize("clip", [1.0, 0.3, NAN])
@pytest.mark.parametrize("these", LISTS.values(), ids=LISTS)
@EACH
def test_a_clipped_step_has_the_bits_of_a_plain_one(op, backend, these, clip):
    one, other = Run(op, these, backend), Run(op, these, backend)
    for t in range(2):
        squares = both(one, other, t, 1.0 if t == 0 else clip)
        assert close(squares, one.grads(t)) and one.agrees(other)


@pytest.mark.pairwise
@pytest.mark.parametrize("threshold", [0.7, None])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@EACH
def test_a_clipped_step_has_the_bits_of_one_of_smaller_gradients(op, backend, dtype, threshold):
    """Multiplied before, by what rounds nothing. The norms have the arithmetic's type."""
    found = []
    for times, clip in ((2, 0.5), (1, None), (2, None)):
        run = Run(op, cases([(24, 16), (5, 7), (0, 5), (130, 7)], dtype), backend)
        grads = [grad * times for grad in run.grads()]
        taken = run.step(grads, clip=clip and torch.tensor(clip), norm=clip is not None, clip_threshold=threshold)
        if taken is not None:
            assert taken.norms.dtype == (F64 if dtype == F64 else F32)
            wanted = [2 * grad.double().norm().item() for grad in run.grads()]
            assert taken.norms.tolist() == pytest.approx(wanted, rel=3e-6)
        found.append(run)
    assert found[0].agrees(found[1]) and not found[0].agrees(found[2])


@pytest.mark.pairwise
@pytest.mark.parametrize("scale", [8.0, 3.0])
@pytest.mark.parametrize("clip", [1.0, 0.3])
@EACH
def test_squares_are_of_unscaled_gradients(op, backend, clip, scale):
    one, other = Run(op, SMALLER, backend), Run(op, SMALLER, backend)
    squares = both(one, other, 0, clip, grad_scale=torch.tensor(scale))
    assert one.agrees(other)
    if backend != "cpu":  # which divides gradients in place, where 16 bits round them
        assert close(squares, one.grads(), scale)


@pytest.mark.pairwise
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.1])
@EACH
def test_other_options(op, backend, threshold, maximize):
    one, other = Run(op, SMALL, backend), Run(op, SMALL, backend)
    now = dict(clip_threshold=threshold, maximize=maximize, lr=torch.tensor(0.3, dtype=F64))
    for t, clip in enumerate((1.0, 0.3)):
        both(one, other, t, clip, **now)
        assert one.agrees(other)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["stochastic", "split stochastic", "split8 stochastic"])
@EACH
def test_parameters_that_are_stored_otherwise(op, backend, kind):
    small = [(shape, BF16, BF16, how) for shape, *_, how in SMALL]
    one, other = (Run(op, small, backend, kind=KINDS[kind]) for _ in range(2))
    for t, clip in enumerate((1.0, 0.3)):
        both(one, other, t, clip, step=float(t))
        assert one.agrees(other)


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("op", ["hfac_step_"])  # whose states hang on the statistics alone
@EACH
def test_statistics_are_taken_again_only_where_it_clips(op, backend, clip):
    """The gradient is changed in between: whose statistics are they?"""
    one, other = Run(op, SMALL, backend), Run(op, SMALL, backend)
    given, after = one.grads(0), one.grads(1)
    inputs = one.call.prepare(given, **one.numbers)
    found = one.call.statistics(inputs)
    for grad, new in zip(given, after, strict=True):
        grad.copy_(new)
    one.call.apply(inputs, found, torch.tensor(clip))
    other.step(other.grads(0) if clip == 1 else after, clip=torch.tensor(clip))
    for name, states in one.states.items():
        assert all(map(same, states, other.states[name]))


#: what is too large to be squared, unless it is clipped by 1e-15, and what no step takes
LARGE, BAD = (1, 4, 10), {2: NAN, 13: INF}


def spoilt(grads):
    for i in LARGE:
        grads[i][2, 3] = 1e30
    for i, bad in BAD.items():
        grads[i][-1, -1] = bad
    return grads


@pytest.mark.pairwise
@pytest.mark.parametrize("skips", [True, False], ids=["skip", "propagate"])
@pytest.mark.parametrize("clip", [1.0, 0.3, 1e-15, NAN])
@EACH
def test_refused_parameters(op, backend, clip, skips):
    """Flags are those of the gradients as they are stepped, and what is refused keeps every bit."""
    one, other = Run(op, SEVERAL, backend), Run(op, SEVERAL, backend)
    before, flags = one.kept(), (one.flags(), other.flags()) if skips else (None, None)
    squares = both(one, other, 0, clip, spoilt, flags, grad_scale=torch.tensor(3.0))
    assert one.agrees(other)
    assert squares.isfinite().logical_not().nonzero().flatten().tolist() == sorted([*LARGE, *BAD])
    if skips:
        assert torch.equal(*flags)
        refused = sorted({1e-15: BAD}.get(clip, [*LARGE, *BAD])) if clip == clip else [*range(len(SEVERAL) - 1)]
        assert flags[0].nonzero().flatten().tolist() == refused
        kept = [same(new, old) for new, old in zip(one.params, before, strict=False)]
        assert [i for i, stays in enumerate(kept) if stays] == sorted({*refused, len(SEVERAL) - 1})


@pytest.mark.parametrize(("clip", "scale"), [(1.0, None), (0.3, 3.0)])
@OTHER_OPS
@ON_GPUS
def test_other_ops_add_up_squares(op, backend, clip, scale):
    """Of one run of elements and of many; a step of other gradients comes between, which has the same memory."""
    these = [*SMALLER, *cases([(33000,)]), *cases([(9, 1000)], BF16)]
    one, other = Run(op, these, backend), Run(op, these, backend)
    more = {} if scale is None else {"grad_scale": torch.tensor(scale)}
    for t in range(2):
        squares = both(one, other, t, clip, **more)
        assert close(squares, one.grads(t), scale or 1.0) and one.agrees(other)


@pytest.mark.parametrize("clip", [1.0, 1e-15])
@OTHER_OPS
@ON_GPUS
def test_other_ops_refuse_parameters(op, backend, clip):
    test_refused_parameters(op, backend, clip, True)


@OTHER_OPS
@ON_GPUS
def test_found_inf_keeps_every_bit_of_other_ops(op, backend):
    test_found_inf_keeps_every_bit_of_a_clipped_step(op, backend, 0.5)


@EACH
def test_flags_that_are_not_contiguous(op, backend):
    run = Run(op, SMALL, backend)
    for clip in (1.0, 0.5):
        grads = run.grads()
        grads[0][3, 4] = INF
        flags = torch.full((2 * len(grads),), 7, dtype=torch.int32)[::2]
        run.step(grads, flags, clip=torch.tensor(clip), norm=True)
        assert flags.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("clip", [1.0, 0.5, NAN])
@EACH
def test_found_inf_keeps_every_bit_of_a_clipped_step(op, backend, clip):
    one, other = Run(op, SMALL, backend), Run(op, SMALL, backend)
    for t, skip in enumerate((0.0, 1.0, 0.0)):
        before, flags = one.kept(), torch.zeros(4, dtype=torch.int32)
        now = torch.tensor(clip if skip else 1.0)
        found = one.step(one.grads(t), flags, clip=now, norm=True, found_inf=torch.tensor(skip))
        if backend == emulated.NAME:
            assert found.sums.squares[[0, 2, 3]].isnan().tolist() == [bool(skip)] * 3 and found.sums.squares[1] == 0
        assert one.agrees(before) == bool(skip)
        assert not flags.any()
        if not skip:
            other.step(other.grads(t))
        assert one.agrees(other)


@EACH
def test_gradients_at_other_addresses_and_plain_steps_between(op, backend):
    one, other = Run(op, SMALL, backend), Run(op, SMALL, backend)
    for t, clip in enumerate((1.0, None, 0.3, 1.0, None, None, 0.3)):
        alike = (lambda grads: grads) if t % 2 else (lambda grads: [grad.double() for grad in grads])
        if clip is None:
            one.step(alike(one.grads(t)))
            other.step(alike(other.grads(t)))
        else:
            assert close(both(one, other, t, clip, alike), one.grads(t))
        assert one.agrees(other)


@EACH
def test_copies_of_gradients_live_until_the_step(op, backend):
    """A view that negates is copied, and the step reads where the statistics have read."""
    one, other = Run(op, SMALL, backend), Run(op, SMALL, backend)
    inputs = one.call.prepare([torch._neg_view(-grad) for grad in one.grads()], **one.numbers)
    found = one.call.statistics(inputs)
    litter = [torch.full_like(grad, NAN) for grad in one.grads() for _ in range(20)]
    one.call.apply(inputs, found, torch.tensor(0.5))
    del litter
    other.step(other.grads(), clip=torch.tensor(0.5))
    assert one.agrees(other)


def norm_and_step(run, grads, limit):
    """As an optimizer does it: nothing is read on the host. Returns the coefficient."""
    inputs = run.call.prepare(grads, **run.numbers)
    found = run.call.statistics(inputs)
    clip = (limit / torch.linalg.vector_norm(found.norms)).clamp(max=1.0).to(F32)
    run.call.apply(inputs, found, clip)
    return clip


@EACH
def test_the_norm_decides(op, backend):
    one, other = Run(op, SMALL, backend), Run(op, SMALL, backend)
    limit = 10 * sum(float(grad.double().square().sum()) for grad in one.grads()) ** 0.5
    for t in range(4):
        louder = 100.0 if t % 2 else 1.0
        clip = norm_and_step(one, [grad * louder for grad in one.grads(t)], limit)
        assert (clip < 1) == bool(t % 2)
        other.step([grad * louder for grad in other.grads(t)], clip=clip if clip < 1 else None)
        assert one.agrees(other)


@EACH_OP
@EACH
def test_gradients_divided_by_a_power_of_two_give_the_same_bits(backend, op):
    """And are left as they are by kernels that divide them as they read them."""
    one, other = Run(op, SMALLER, backend), Run(op, SMALLER, backend)
    grads = [32.0 * grad for grad in one.grads()]
    kept = [grad.clone() for grad in grads]
    one.step(grads, grad_scale=torch.tensor(32.0))
    other.step(other.grads())
    assert one.agrees(other) and all(map(same, grads, kept)) == (backend != "cpu")


@pytest.mark.parametrize("scale", [3.0, 2.0**-40])
@EACH_OP
@ON_GPUS
def test_gradients_are_divided(backend, op, scale):
    """As in the reference with quotients for gradients; what has become too large to be squared is refused."""
    ours, theirs = Run(op, SEVERAL, backend), Run(op, SEVERAL, "reference")
    before, grads = ours.kept(), ours.grads()
    for i in (0, 4, 9, 11):
        grads[i][0, 1] = 1e9
    kept = [laid_out(grad, "contiguous") for grad in grads]
    quotients = [g.to(F64 if p.dtype == F64 else F32) / scale for p, g in zip(theirs.params, grads, strict=True)]
    flags = ours.flags(), torch.zeros(len(grads), dtype=torch.int32)
    ours.step(grads, flags[0], grad_scale=torch.tensor([scale]))
    theirs.step(quotients, flags[1])
    assert torch.equal(*flags) and all(map(same, grads, kept))
    assert flags[0].nonzero().flatten().tolist() == ([] if scale > 1 else [0, 4, 9, 11])
    name = "HFac" if "hfac" in op else "SMMF"
    for i, (param, twin) in enumerate(zip(ours.params, theirs.params, strict=True)):
        agree = truncated_agree if backend == "triton" else params_agree
        agree(name, param, twin, before[i], 0.02, backend=backend)
        states = ({n.removesuffix("s"): t[i] for n, t in run.states.items()} for run in (ours, theirs))
        states_agree(name, *states, quotients[i])


@EACH_OP
@EACH
def test_found_inf_keeps_every_bit(backend, op):
    run = Run(op, SEVERAL[3:5], backend)
    before = run.kept()

    def grads():
        found = run.grads()
        found[0][1, 2] = INF
        return found

    for flags in (run.flags(), None):
        for more in ({}, dict(grad_scale=torch.tensor(4.0))):
            run.step(grads(), flags, found_inf=torch.ones(1), **more)
            assert run.agrees(before) and (flags is None or not flags.any())
    flags, other = run.flags(), Run(op, SEVERAL[3:5], backend)
    run.step(grads(), flags, found_inf=torch.tensor(0.0))
    assert flags.tolist() == [1, 0]
    other.step(grads(), other.flags())
    assert run.agrees(other) and not run.agrees(before)


@pytest.mark.parametrize("bad", [INF, NAN, 1e19])
@EACH_OP
@EACH
def test_a_refused_parameter_keeps_every_bit(backend, op, bad):
    run = Run(op, cases([(400, 24), (24, 16)]), backend)  # a dense op of 400 x 24 has more than one block
    before, grads, flags = run.kept(), run.grads(), run.flags()
    grads[0][399, 23] = bad
    run.step(grads, flags)
    assert flags.tolist() == [1, 0]
    now = run.everything()
    stays = [same(a, b) for a, b in zip(now, before, strict=True)]
    assert stays == [i % 2 == 0 for i in range(len(now))]


def cold(optimizer, params, options):
    """An optimizer of copies of these parameters and gradients in the state of another one: it repeats nothing."""
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for twin, param in zip(twins, params, strict=True):
        twin.grad = param.grad.clone()
    other = type(optimizer)(twins, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twins, other


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
@EACH
def test_clipped_steps_that_repeat_the_last_one(name, backend, options, monkeypatch):
    """They have the bits of a new optimizer's, whether they clip or not, gradients have moved, or one is not finite."""
    repeated, again = [], ops.OpCall.statistics_again
    monkeypatch.setattr(ops.OpCall, "statistics_again", lambda *args: repeated.append(again(*args)) or repeated[-1])
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 16), (16, 40), (33,), (5, 7)]]
    given = {"lr": 0.1, "backend": backend, "max_grad_norm": 3.0, **options}
    optimizer = getattr(hfac, name)(params, **given)
    kept, coefficients = [], []
    for t in range(9):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
        for param in params:
            grad = torch.randn_like(param) * (0.01, 10.0, 1.0)[t % 3]
            if t in (0, 4, 5):
                param.grad = grad
                kept.append(grad)  # what comes later lies elsewhere
            else:
                param.grad.copy_(grad)
        if t == 7 and "nonfinite" in options:
            params[1].grad[2, 3] = NAN
        twins, other = cold(optimizer, params, given)
        repeated.clear()
        optimizer.step()
        warm = [each is not None for each in repeated]
        other.step()
        coefficients.append(min(1.0, 3.0 / optimizer.grad_norm.item()))
        assert torch.equal(optimizer.grad_norm, other.grad_norm)
        for param, twin in zip(params, twins, strict=True):
            assert same(param, twin)
            for key, value in optimizer.state[param].items():
                assert same(value, other.state[twin][key]), key
        bound_anew = t > 7 and "nonfinite" in options  # one has been skipped, and no longer steps with the others
        if t > 1 and not bound_anew and (backend == emulated.NAME or (backend == "triton" and not options)):
            assert warm and all(warm), t
    assert min(coefficients) < 1 and coefficients.count(1.0) >= 3
