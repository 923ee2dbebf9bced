"""What the Triton kernels report of a step, in Triton's interpreter, against plain torch; test_triton.py runs
this file."""

import pytest
import torch
import triton
import triton.language as tl
from cases import gradient
from hfac.triton_kernels import plan, step, table
from hfac.triton_kernels import rounding as kernels
from test_parity import ieee_square_roots
from triton_clipped import BF16, CASES, EVERY_OP, F32, NAN, Run, same_bits
from triton_interpreted import KINDS, hard_numbers, patched_once, pieces

from hfac import ops, reference, rounding, spec
from hfac.backends import triton as backend
from hfac.backends.contract import Operands

__all__ = ["ieee_square_roots", "patched_once"]
#: of kinds that are stored otherwise: vectors of 8 and not, several tiles, turned
STORED = [
    ((16, 24), "plain"),
    ((66, 20), "plain"),
    ((9, 10), "plain"),
    ((12, 16), "transposed"),
    ((11, 8), "padded"),
    ((0, 5), "plain"),
]
#: rows enough for several programs of a fold
LONG = [*CASES[:-1], ((300, 20), F32, F32, "plain"), CASES[-1]]


class Watched(Run):
    """Gradients with rows and columns that are zero, and some that only look like it by one of their sums."""

    def __init__(self, op, cases=CASES, kind=None):
        super().__init__(op, cases)
        self.scalars["lr"] = 0.002
        self.told = {}
        if kind is not None:
            places = [rounding.BitOffset(i) for i in range(len(cases))]
            self.told = pieces(kind, self.params, places, 0)
        if "master_lows" in self.told:
            self.states[spec.MASTER_LOW.name] = self.told["master_lows"]
        self.places = self.told.get("places")
        self.scalars |= {name: self.told[name] for name in ("seed", "step") if name in self.told}
        for i, grad in enumerate(self.grads):
            if grad.numel():
                flat = grad.flatten(1) if grad.ndim == 2 else grad
                flat[1] = 0
                flat[-2] = 0
                flat[..., -1] = 0
                flat[..., 0] = -0.0
                flat[2] = 0
                flat[2, ..., 1] = 1e-30 if grad.dtype != torch.float16 else 1e-4  # whose square underflows
                if i % 2:
                    flat[0] = 0
                    flat[0, ..., 1], flat[0, ..., 2] = 0.5, -0.5  # whose sum is nothing

    def bind(self):
        return backend.bind(Operands(spec.OPS[self.op], self.params, self.states, {}, self.places))

    def weights(self):
        """In the type of the arithmetic."""
        lows = self.states.get(spec.MASTER_LOW.name)
        if lows is not None:
            return [rounding.join(p, low) for p, low in zip(self.params, lows, strict=True)]
        return [p.to(ops.state_dtype(p.dtype)) for p in self.params]

    def expected(self, scale=1.0):
        """What a step would do to each parameter."""
        lows = self.states.get(spec.MASTER_LOW.name)
        old = [w.clone(memory_format=torch.contiguous_format) for w in self.weights()]
        new = [w.clone() for w in old]
        grads = [g.to(w.dtype) / scale for g, w in zip(self.grads, old, strict=True)]
        states = {n: [t.clone() for t in tensors] for n, tensors in self.states.items() if n != spec.MASTER_LOW.name}
        scalars = {name: value for name, value in self.scalars.items() if name not in ("seed", "step")}
        getattr(reference, self.op)(new, grads, **states, **scalars)
        rows = []
        for i, (before, after, grad) in enumerate(zip(old, new, grads, strict=True)):
            if not grad.numel():
                rows.append([0.0] * table.WATCHED.value)
                continue
            if lows is not None:
                near = rounding.join(*rounding.split(after, lows[i].dtype, None))
            else:
                near = after.to(self.params[i].dtype).to(after.dtype)
            change = (after - before).double().square().sum()
            row = [change, (near == before).sum(), self.direction(i, grad.double(), before.double(), states), 0, 0]
            if self.op == "hfac_step_":
                matrix = grad.reshape(states["exp_avg_rows"][i].numel(), -1)
                row[3:] = [(matrix == 0).all(1).sum(), (matrix == 0).all(0).sum()]
            rows.append([float(x) for x in row])
        return torch.tensor(rows, dtype=torch.float64)

    def direction(self, i, g, w, after):
        """The sum of squares of G / sqrt(V), of the new V, or of M / (sqrt(V) + eps)."""
        s, b1, b2 = self.scalars, self.scalars["beta1"], self.scalars["beta2"]
        if self.op == "hfac_step_":
            r, c = after["exp_avg_sq_rows"][i].double(), after["exp_avg_sq_cols"][i].double()
            g = g.reshape(r.numel(), c.numel())
            return (g.square() * r.sum() / r[:, None] / c).sum()
        if self.op == "hfac_dense_step_":
            return (g.square() / after["exp_avg_sqs"][i].double()).sum()
        g = (-g if s["maximize"] else g) + (0 if s["decoupled_weight_decay"] else s["weight_decay"] * w)
        if self.op == "smmf_dense_step_":
            m, v = self.states["exp_avgs"][i].double(), self.states["exp_avg_sqs"][i].double()
        else:
            m, v = (
                (self.states[f"{name}_rows"][i].double()[:, None] * self.states[f"{name}_cols"][i].double()).view(
                    g.shape
                )
                for name in ("exp_avg", "exp_avg_sq")
            )
            m = torch.where(reference.unpack_signs(self.states["exp_avg_signs"][i], g.shape), m, -m)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
        return (m / (v.sqrt() + s["eps"])).square().sum()

    def watched(self):
        return torch.zeros(len(self.params), table.WATCHED.value, dtype=torch.float64)


@triton.jit
def rounded(values, N: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(values + i, kernels.nearest(tl.load(values + i), W, tl.float32, LOW))


@pytest.mark.parametrize(
    ("dtype", "low"),
    [(BF16, None), (torch.float16, None), (F32, None), (BF16, torch.int8), (BF16, torch.int16)],
    ids=str,
)
def test_nearest_is_the_definition(dtype, low):
    """Of every kind of number; what is none stays so, whatever its bits carry over."""
    values = hard_numbers(1024)
    wanted = values.to(dtype).float() if low is None else rounding.join(*rounding.split(values, low, None))
    rounded[(1,)](values, 1024, plan.TYPES[dtype], 0 if low is None else 8 * low.itemsize)
    assert torch.equal(values.isnan(), wanted.isnan())
    assert torch.equal(values.nan_to_num(), wanted.nan_to_num())


def near(found, expected, run):
    """Sums within float32's rounding; elements of H-Fac that lie where two roundings part may be on the other side."""
    for what in (table.CHANGE.value, table.DIRECTION.value):
        assert torch.allclose(found[:, what], expected[:, what], rtol=1e-5, atol=0)
    kept, wanted = found[:, table.KEPT.value], expected[:, table.KEPT.value]
    off = torch.tensor([0.01 * p.numel() for p in run.params]).ceil() if "hfac" in run.op else 0
    assert ((kept - wanted).abs() <= off).all(), (kept, wanted)
    assert torch.equal(found[:, table.ZERO_ROWS.value :], expected[:, table.ZERO_ROWS.value :])


@EVERY_OP
@pytest.mark.parametrize("maximize", [False, True])
def test_what_is_watched(op, maximize):
    """Of every type and layout; with it a step has the bits that it has without."""
    run, twin = Watched(op, LONG), Watched(op, LONG)
    for one in (run, twin):
        one.scalars["maximize"] = maximize
        one.scalars |= dict(decoupled_weight_decay=maximize) if "smmf" in op else {}
    expected, watched = run.expected(), run.watched() + 1
    run.bind()(run.grads, **run.scalars, watched=watched)
    twin.bind()(twin.grads, **twin.scalars)
    assert same_bits(run.everything(), twin.everything())
    near(watched - 1, expected, run)
    kept = watched[:, table.KEPT.value] - 1
    assert (kept[[4, 5]] > 20).all() and (expected[:-1, [0, 2]] > 0).all()
    if op == "hfac_step_":
        assert (watched[:-1, table.ZERO_ROWS.value :] > 1).all()


@EVERY_OP
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_watched_of_weights_stored_otherwise(op, kind):
    """Rounding to nearest is what an element is kept by, whatever the random bits make of it."""
    dtype = KINDS[kind][0]
    cases = [(shape, dtype, F32 if i % 2 else dtype, how) for i, (shape, how) in enumerate(STORED)]
    run, twin = Watched(op, cases, kind), Watched(op, cases, kind)
    expected, watched = run.expected(), run.watched()
    run.bind()(run.grads, **run.scalars, watched=watched)
    twin.bind()(twin.grads, **twin.scalars)
    assert same_bits(run.everything(), twin.everything())
    near(watched, expected, run)
    assert kind == "split" or watched[:, table.KEPT.value].sum() > 0


@EVERY_OP
def test_nothing_is_watched_of_a_refused_parameter(op):
    run = Watched(op, CASES[3:6])
    run.grads[1][3, 2] = NAN
    watched, before = run.watched(), run.everything()
    bound = run.bind()
    bound(run.grads, run.flags(), **run.scalars, watched=watched, found_inf=torch.ones(()))
    assert not watched.any() and same_bits(run.everything(), before)
    expected = run.expected()
    expected[1] = 0
    bound(run.grads, run.flags(), **run.scalars, watched=watched)
    near(watched, expected, run)


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_a_clipped_step_is_watched(clip, told):
    """As a step of scaled gradients, whether the statistics before it were told so or not; those write nothing."""
    ours, theirs = Watched("hfac_step_", CASES[:8]), Watched("hfac_step_", CASES[:8])
    mine, his = ours.watched(), theirs.watched()
    flags = ours.flags()
    bound = ours.bind()
    found = bound.statistics(ours.grads, flags, **ours.scalars, **(dict(watched=mine) if told else {}))
    assert not mine.any()
    scale, known = torch.tensor(1 / clip), dict(statistics=found, clip=torch.tensor(clip))
    bound(ours.grads, flags, **ours.scalars, grad_scale=scale, **known, watched=mine)
    theirs.bind()(theirs.grads, theirs.flags(), **theirs.scalars, grad_scale=scale, watched=his)
    assert same_bits(ours.everything(), theirs.everything()) and not flags.any()
    assert torch.allclose(mine, his, rtol=1e-12, atol=0)
    near(his, Watched("hfac_step_", CASES[:8]).expected(1 / clip), theirs)


def test_statistics_that_count_rows_are_not_taken_again(monkeypatch):
    """In the kernel's eyes: whether a program may leave where the coefficient is 1."""
    seen = []
    monkeypatch.setattr(step.Room, "_launch", lambda self, launch, tiles, options: seen.append(options["AGAIN"]))
    run = Watched("hfac_step_", CASES[:1])
    bound, one = run.bind(), torch.tensor(1.0)
    for told, asked in ((None, None), (run.watched(), None), (None, run.watched()), (run.watched(), run.watched())):
        found = bound.statistics(run.grads, **run.scalars, watched=told)
        del seen[:]
        bound(run.grads, **run.scalars, statistics=found, clip=one, watched=asked)
        assert set(seen) == {told is not None or asked is None}


def test_unwatched_statistics_are_no_ones_rows():
    """What the workspace holds of an earlier step is not counted."""
    run = Watched("hfac_step_", CASES[:2])
    bound, watched = run.bind(), run.watched()
    bound(run.grads, **run.scalars, watched=run.watched())
    for grad in run.grads:
        grad.copy_(gradient(tuple(grad.shape), 9, F32).abs() + 1)
    one = torch.tensor(1.0)
    found = bound.statistics(run.grads, **run.scalars)
    bound(run.grads, **run.scalars, grad_scale=one, statistics=found, clip=one, watched=watched)
    assert not watched[:, table.ZERO_ROWS.value :].any() and watched[:, table.CHANGE.value].all()


@EVERY_OP
def test_where_the_report_lies(op):
    """In some rows of a larger one, which 16 bytes do not divide, or across it."""
    found = []
    for make in (
        lambda n: torch.zeros(n, 5, dtype=torch.float64),
        lambda n: torch.zeros(n + 2, 5, dtype=torch.float64)[1:-1],
        lambda n: torch.zeros(5, n, dtype=torch.float64).t(),
    ):
        run = Watched(op, CASES[3:5])
        watched = make(2)
        run.bind()(run.grads, **run.scalars, watched=watched)
        found.append(watched)
        assert watched._base is None or watched._base.count_nonzero() == watched.count_nonzero() > 0
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@EVERY_OP
def test_an_element_that_cannot_move_is_kept(op):
    """At a learning rate of nothing all are, whatever a weight is stored in; a NaN never is."""
    for kind in (None, "split8", "bfloat16"):
        run = Watched(op, [((16, 24), BF16, BF16, "plain"), ((9, 10), BF16, BF16, "plain")], kind)
        run.scalars |= dict(lr=0.0)
        run.params[1][4, 4] = NAN
        watched = run.watched()
        run.bind()(run.grads, **run.scalars, watched=watched)
        assert watched[:, table.KEPT.value].tolist() == [16 * 24, 89]
        assert watched[0, table.CHANGE.value] == 0
