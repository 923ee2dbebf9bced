"""What the Triton kernels do for clipping and for a GradScaler, in Triton's interpreter: gradients divided as they are
read, steps that found_inf forbids, and H-Fac's norm from the statistics. test_triton.py runs this file."""

import calls
import pytest
import torch
from cases import gradient
from hfac.triton_kernels import step as kernels
from test_parity import ieee_square_roots, states_agree
from triton_interpreted import agree, laid_out, patched_once

import hfac
from hfac import matricize, ops, reference, spec
from hfac.backends import triton as backend
from hfac.backends.contract import Operands

__all__ = ["ieee_square_roots", "patched_once"]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN = float("nan")
#: of a parameter: its shape, its type, its gradient's, how both lie. Several tiles of rows and of columns, rows that
#: are read twice, odd ones, one row, nothing
CASES = [
    ((16, 24), F32, F32, "plain"),
    ((70, 300), F32, F32, "plain"),
    ((3, 4100), F32, F32, "plain"),
    ((5, 7), F32, F32, "plain"),
    ((16, 24), BF16, BF16, "plain"),
    ((12, 16), BF16, F32, "plain"),
    ((9, 10), F16, F16, "plain"),
    ((16, 24), F64, F64, "plain"),
    ((6, 8), F32, F64, "plain"),
    ((16, 24), F32, F32, "transposed"),
    ((11, 8), F32, F32, "padded"),
    ((4, 3, 8, 5), F32, BF16, "permuted"),
    ((0, 5), F32, F32, "plain"),
]
SCALARS = {
    "hfac_step_": dict(eps=1e-12, clip_threshold=0.7, maximize=True),
    "hfac_dense_step_": dict(eps=1e-12, clip_threshold=0.7, maximize=True),
    "smmf_step_": dict(eps=1e-6, decoupled_weight_decay=False, maximize=True),
    "smmf_dense_step_": dict(eps=1e-6, decoupled_weight_decay=False, maximize=True),
}
EVERY_OP = pytest.mark.parametrize("op", SCALARS)


class Run:
    """Parameters, gradients and states of an op, in the middle of a run; the same ones every time."""

    def __init__(self, op, cases=CASES):
        self.op = op
        self.scalars = dict(lr=0.02, weight_decay=0.1, beta1=0.75, beta2=0.5) | SCALARS[op]
        self.params, self.grads = [], []
        self.states = {name: [] for name in calls.STATES[op]}
        for i, (shape, dtype, grad_dtype, how) in enumerate(cases):
            lie = (lambda t: t) if how == "plain" else (lambda t, how=how: laid_out(t, how))
            self.params.append(lie(gradient(shape, i, dtype)))
            self.grads.append(lie(gradient(shape, 50 + i, grad_dtype)))
            for k, (name, sizes) in enumerate(self.sizes(shape).items()):
                if name == "exp_avg_signs":
                    signs = gradient(sizes, 100 + i, F32) > 0
                    self.states[name].append(reference.pack_signs(signs) if signs.numel() else signs.byte())
                else:
                    values = gradient(sizes, 150 + 10 * k + i, ops.state_dtype(dtype))
                    self.states[name].append(values.abs() + 1e-3 if "sq" in name or "smmf" in op else values)

    def sizes(self, shape):
        if "dense" in self.op:
            return dict.fromkeys(self.states, shape)
        if "smmf" in self.op:
            n, m = matricize.square(torch.Size(shape).numel())
            return {name: shape if "signs" in name else (n,) if "rows" in name else (m,) for name in self.states}
        k = matricize.cut(shape) or 1
        m, n = torch.Size(shape[:k]).numel(), torch.Size(shape[k:]).numel()
        return {name: (m,) if "rows" in name else (n,) for name in self.states}

    def bind(self):
        return backend.bind(Operands(spec.OPS[self.op], self.params, self.states, {}))

    def flags(self):
        return torch.full((len(self.params),), 7, dtype=torch.int32)

    def everything(self):
        return [t.clone() for tensors in (self.params, *self.states.values()) for t in tensors]

    def agrees_with(self, other, before):
        """Up to the order of sums."""
        name = "HFac" if "hfac" in self.op else "SMMF"
        for i, param in enumerate(self.params):
            agree(name, param, other.params[i], before[i], 0.02)
            ours, theirs = ({n.removesuffix("s"): t[i] for n, t in run.states.items()} for run in (self, other))
            states_agree(name, ours, theirs, other.grads[i])


def same_bits(one, other):
    return all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(one, other, strict=True)
    )


@EVERY_OP
@pytest.mark.parametrize("scale", [3.0, 2.0**-40])
def test_gradients_are_divided(op, scale):
    """As of the reference with quotients for gradients; what has become too large to be squared is refused. The
    gradients stay."""
    ours, theirs = Run(op), Run(op)
    kept = [grad.clone() for grad in ours.grads]
    for run in (ours, theirs):
        for i in (0, 4, 9, 11):
            run.grads[i][0, 1] = 1e9
            kept[i][0, 1] = 1e9
    theirs.grads = [g.to(ops.state_dtype(p.dtype)) / scale for p, g in zip(theirs.params, theirs.grads, strict=True)]
    before = ours.everything()
    mine, his = ours.flags(), ours.flags()
    ours.bind()(ours.grads, mine, **ours.scalars, grad_scale=torch.tensor([scale]))
    getattr(reference, op)(theirs.params, theirs.grads, **theirs.states, nonfinite=his, **theirs.scalars)
    assert torch.equal(mine, his.masked_fill(his == 7, 0))
    assert mine.nonzero().flatten().tolist() == ([] if scale > 1 else [0, 4, 9, 11])
    ours.agrees_with(theirs, before)
    assert same_bits(ours.grads, kept)


@EVERY_OP
def test_found_inf_keeps_every_bit(op):
    run = Run(op, CASES[3:5])
    step, before = run.bind(), run.everything()
    run.grads[0][1, 2] = float("inf")
    for flags in (run.flags(), None):
        for scale in (None, torch.tensor(4.0)):
            step(run.grads, flags, **run.scalars, grad_scale=scale, found_inf=torch.ones(1))
            assert same_bits(run.everything(), before)
            assert flags is None or not flags.any()
    flags = run.flags()
    step(run.grads, flags, **run.scalars, found_inf=torch.tensor(0.0))
    assert flags.tolist() == [1, 0]
    other = Run(op, CASES[3:5])
    other.grads = run.grads
    other.bind()(other.grads, other.flags(), **other.scalars)
    assert same_bits(run.everything(), other.everything()) and not same_bits(run.everything(), before)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_squares_are_the_gradients(scale):
    run = Run("hfac_step_")
    before, kept = run.everything(), [grad.clone() for grad in run.grads]
    scaled = {} if scale is None else dict(grad_scale=torch.tensor(scale))
    found = run.bind().statistics(run.grads, **run.scalars, **scaled).squares
    assert found.dtype == F64 and found.shape == (len(CASES),)
    for square, grad in zip(found, run.grads, strict=True):
        exact = (grad.double() / (scale or 1)).square().sum().item()
        assert square.item() == pytest.approx(exact, rel=1e-6, abs=0)
    assert same_bits(run.everything(), before) and same_bits(run.grads, kept)


def large(run):
    """Gradients too large to be squared, unless they are clipped by 1e-15."""
    for i in (1, 4, 10):
        run.grads[i][2, 3] = 1e30
    run.grads[2][1, 4099] = NAN
    return run


@pytest.mark.parametrize("nonfinite", [True, False], ids=["skip", "propagate"])
@pytest.mark.parametrize("clip", [1.0, 0.3, 1e-15, NAN])
def test_a_clipped_step_is_a_step_of_scaled_gradients(clip, nonfinite):
    """To the bit, and so are the flags: where the coefficient is 1 with the statistics that were taken for the norm."""
    ours, theirs = large(Run("hfac_step_")), large(Run("hfac_step_"))
    first, mine, his = (ours.flags() if nonfinite else None for _ in range(3))
    scale, coefficient = torch.tensor(3.0), torch.tensor(clip)
    step = ours.bind()
    found = step.statistics(ours.grads, first, **ours.scalars, grad_scale=scale)
    step(ours.grads, mine, **ours.scalars, grad_scale=scale / coefficient, statistics=found, clip=coefficient)
    plain = {} if clip == 1 else dict(grad_scale=scale / coefficient)
    theirs.bind()(theirs.grads, his, **theirs.scalars, **dict(grad_scale=scale) | plain)
    assert same_bits(ours.everything(), theirs.everything())
    assert found.squares.isfinite().logical_not().nonzero().flatten().tolist() == [1, 2, 4, 10]
    if nonfinite:
        assert torch.equal(mine, his)
        assert first.nonzero().flatten().tolist() == [1, 2, 4, 10]
        refused = {1.0: [1, 2, 4, 10], 0.3: [1, 2, 4, 10], 1e-15: [2]}.get(clip, list(range(len(CASES) - 1)))
        assert mine.nonzero().flatten().tolist() == refused


def test_without_a_scale_the_coefficient_is_all():
    found = []
    for clip in (1.0, 0.25):
        ours, theirs = Run("hfac_step_", CASES[:2]), Run("hfac_step_", CASES[:2])
        step = ours.bind()
        known = dict(statistics=step.statistics(ours.grads, **ours.scalars), clip=torch.tensor(clip))
        step(ours.grads, **ours.scalars, grad_scale=torch.tensor(1 / clip), **known)
        scaled = {} if clip == 1 else dict(grad_scale=torch.tensor(4.0))
        theirs.bind()(theirs.grads, **theirs.scalars, **scaled)
        assert same_bits(ours.everything(), theirs.everything())
        found.append(ours.everything())
    assert not same_bits(*found)


def test_found_inf_keeps_every_bit_of_a_clipped_step():
    for clip in (1.0, 0.5, NAN):
        run = large(Run("hfac_step_"))
        step, before, flags = run.bind(), run.everything(), run.flags()
        scalars = run.scalars | dict(found_inf=torch.tensor([1.0]))
        known = dict(statistics=step.statistics(run.grads, flags, **scalars), clip=torch.tensor(clip))
        assert not flags.any()
        step(run.grads, flags, **scalars, grad_scale=torch.tensor(1 / clip), **known)
        assert same_bits(run.everything(), before) and not flags.any()


def test_statistics_are_taken_again_only_where_gradients_are_clipped():
    """What must not happen shows it: gradients that change after their norm is known."""
    found = []
    for clip, times in ((1.0, 1.0), (1.0, 4.0), (0.25, 4.0), (0.5, 4.0)):
        run = Run("hfac_step_", CASES[:3])
        step = run.bind()
        known = dict(statistics=step.statistics(run.grads, **run.scalars), clip=torch.tensor(clip))
        for grad in run.grads:
            grad *= times
        step(run.grads, **run.scalars, grad_scale=torch.tensor(1 / clip), **known)
        found.append([t for tensors in run.states.values() for t in tensors])
    assert same_bits(found[0], found[1])  # statistics of then
    assert same_bits(found[0], found[2])  # taken anew, of four times the gradient times a quarter
    assert not any(map(torch.equal, found[0], found[3]))


def test_copies_of_gradients_live_until_the_step():
    """A view that negates is copied, and the step reads where the statistics have read."""
    runs = [Run("hfac_step_", CASES[:1]) for _ in range(2)]
    for run, neg in zip(runs, (True, False), strict=True):
        step = run.bind()
        grads = [torch._neg_view(-grad) if neg else grad for grad in run.grads]
        known = dict(statistics=step.statistics(grads, **run.scalars), clip=torch.tensor(0.5))
        litter = [torch.full_like(grad, NAN) for grad in grads for _ in range(20)]
        step(grads, **run.scalars, grad_scale=torch.tensor(2.0), **known)
        del litter
    assert same_bits(*(run.everything() for run in runs))


def test_what_is_launched(monkeypatch):
    """Nothing is added to a step that nobody asks for a norm."""
    names = []
    monkeypatch.setattr(kernels.Room, "_launch", lambda self, launch, tiles, options: names.append(launch.name))
    run = Run("hfac_step_", CASES[:1])
    step = run.bind()
    step(run.grads, **run.scalars)
    assert names == ["hfac_stats", "hfac_fold", "hfac_scale", "hfac_update"]
    del names[:]
    found = step.statistics(run.grads, **run.scalars)
    assert names == ["hfac_stats", "hfac_squares", "hfac_add_squares"]
    del names[:]
    step(run.grads, **run.scalars, statistics=found, clip=torch.tensor(1.0))
    assert names == ["hfac_stats", "hfac_fold", "hfac_scale", "hfac_update"]
    run = Run("hfac_step_", CASES[-1:])
    assert run.bind().statistics(run.grads, **run.scalars).squares.tolist() == [0.0]


def test_statistics_own_their_memory():
    """Two threads may have some at a time, and each goes on with its own, once. Memory that nobody has any more serves
    the next."""
    run, twin = (Run("hfac_step_", CASES[:2]) for _ in range(2))
    step, other, one = run.bind(), twin.bind(), torch.tensor(1.0)
    louder = [grad * 4 for grad in run.grads]
    mine, theirs = step.statistics(run.grads, **run.scalars), step.statistics(louder, **run.scalars)
    assert torch.allclose(theirs.squares, 16 * mine.squares)
    for grads in (run.grads, louder):  # the second time they are spent
        step(grads, **run.scalars, statistics=mine, clip=one)
        other(grads, **twin.scalars)
        assert same_bits(run.everything(), twin.everything())
    del theirs
    kept = step.workspace_bytes()
    for _ in range(2):
        step.statistics(run.grads, **run.scalars)
        assert step.workspace_bytes() == kept


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_max_grad_norm_leaves_gradients_alone(name):
    """And steps as after clip_grad_norm_."""
    shapes = [(16, 24), (7,), (5, 8)]
    values = [gradient(shape, i, F32) for i, shape in enumerate(shapes)]
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    optimizer = getattr(hfac, name)(ours, lr=0.02, max_grad_norm=0.5, backend="triton")
    other = getattr(hfac, name)(theirs, lr=0.02, backend="triton")
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad, q.grad = (gradient(tuple(p.shape), 10 + i, F32) for _ in range(2))
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    optimizer.step()
    other.step()
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6) and norm > 0.5
    for i, (p, q, value) in enumerate(zip(ours, theirs, values, strict=True)):
        assert torch.equal(p.grad, gradient(tuple(p.shape), 10 + i, F32))
        moved, wanted = (t.detach() - value for t in (p, q))
        assert (moved - wanted).abs().max() <= 1e-5 * wanted.abs().max()
