"""How parameters are stored, in every backend's kernels: with stochastic rounding, and as master weights in two pieces.
Each is to the bit what `hfac.rounding` makes of the weights that the same kernels write in float32.

Where Triton's kernels are interpreted, tests/backends/test_triton.py runs this file once more."""

import copy
import itertools

import calls
import pytest
import torch
from cases import OPTIONS, gradient, smmf_agrees
from suites import BACKENDS, BF16, F16, F32, KERNELS, KINDS, OPS, laid_out, same
from test_parity import ieee_square_roots, states_agree
from test_rounding import stored_agree, value_of, without_low

import hfac
from hfac import ops, rounding
from hfac.matricize import Block, sign_shape
from hfac.rounding import BitOffset

__all__ = ["ieee_square_roots"]  # a fixture of every test here
pytestmark = pytest.mark.usefixtures("all_orders")
SEED = 0xFEDCBA9876543210
SPECIAL = [float("nan"), float("inf"), -float("inf"), 3.3895e38, -3.3895e38, 1e-40, -0.0, 6e-8]

EACH = pytest.mark.parametrize("backend", KERNELS, indirect=True)
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def each_op(backends=KERNELS):
    """Backend and op are one parameter, so that where pairs are enough all kinds meet all of both."""
    return pytest.mark.parametrize(("backend", "op"), [*itertools.product(backends, OPS)], indirect=["backend"])


def master(shape, seed):
    """Weights in float32 with numbers among them that rounding must not spoil."""
    values = gradient(shape, seed, F32)
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return values


def stored(kind, W, layouts=("contiguous", "contiguous")):
    """W as a parameter of that kind, and what it lacks."""
    if kind.low is None:
        return laid_out(W.to(kind.dtype), layouts[0]), None
    high, low = rounding.split(W, kind.low)
    return laid_out(high, layouts[0]), laid_out(low, layouts[1])


def joined(param, low):
    return param.float() if low is None else rounding.join(param, low)


def rounded(kind, W, place, step):
    """What hfac.rounding stores of W."""
    bits = None
    if kind.drawn:
        bits = rounding.random_bits(place, W.shape, SEED, step, W.device)
    if kind.low is None:
        return rounding.stochastic(W, kind.dtype, bits), None
    return rounding.split(W, kind.low, bits)


def states(op, shapes, device="cpu"):
    """Zeros."""
    if "dense" in op:
        return {name: [torch.zeros(s, device=device) for s in shapes] for name in ("exp_avgs", "exp_avg_sqs")}
    found = {}
    for moment in ("exp_avg", "exp_avg_sq"):
        found[f"{moment}_rows"] = [torch.zeros(rows, device=device) for rows, _ in shapes]
        found[f"{moment}_cols"] = [torch.zeros(cols, device=device) for _, cols in shapes]
    if op == "smmf_step_":
        found["exp_avg_signs"] = [torch.zeros(sign_shape(s), dtype=torch.uint8, device=device) for s in shapes]
    return found


def scalars(op, t=1):
    found = dict(lr=0.02, beta1=0.8 if t > 1 else 0.1, beta2=1 - t**-0.8, eps=1e-8, weight_decay=0.1, maximize=False)
    return found | (dict(clip_threshold=0.7) if op.startswith("hfac") else dict(decoupled_weight_decay=True))


class Pair:
    """An op on stored parameters beside the same op, of the same kernels, on their weights in float32."""

    def __init__(self, op, kind, shapes, backend, layouts=None, places=None, device="cpu"):
        self.op, self.kind, self.device, self.backend = op, kind, device, backend
        plain = ("contiguous", "contiguous")
        layouts = layouts or [plain] * len(shapes)
        # A program of Triton's has other rows where random bits are made one by one, where a tensor is not read by
        # whole vectors, and SMMF's where 8 low bits are stored; sums are then added in another order than in float32.
        other_rows = kind.drawn or layouts != [plain] * len(shapes) or (op == "smmf_step_" and kind.low == torch.int8)
        self.reordered = backend == "triton" and other_rows
        self.masters = [master(shape, k).to(device) for k, shape in enumerate(shapes)]
        pieces = [stored(kind, *each) for each in zip(self.masters, layouts, strict=True)]
        self.params, lows = (list(each) for each in zip(*pieces, strict=True))
        self.lows = None if kind.low is None else lows
        self.states, self.twins = states(op, shapes, device), states(op, shapes, device)
        self.places = places or [BitOffset(3 * k) for k in range(len(shapes))]
        given = self.states | ({} if self.lows is None else {"master_lows": self.lows})
        self.call = ops.OpCall(op, self.params, given, places=self.places if kind.drawn else None, backend=backend)
        for W, param, low in zip(self.masters, *self.stored(), strict=True):
            W.copy_(joined(param, low))
        self.twin = ops.OpCall(op, self.masters, self.twins, backend=backend)

    def stored(self):
        return self.params, self.lows or [None] * len(self.params)

    def step(self, grads, t=1, steps=None, **kwargs):
        """Both step; then the weights in float32 are what is stored. ``steps``: as a tensor, one per parameter."""
        grads = [grad.to(self.device) for grad in grads]
        given = scalars(self.op, t) | kwargs
        olds = [W.clone() for W in self.masters]
        calls.step(self.call, grads, seed=SEED, step=float(t) if steps is None else steps, **given)
        calls.step(self.twin, [grad.float() for grad in grads], **given)
        each = [t] * len(grads) if steps is None else steps.tolist()
        stepped = zip(self.masters, olds, self.places, each, *self.stored(), strict=True)
        for W, old, place, step, param, low in stepped:
            expected, rest = rounded(self.kind, W, place, step)
            if self.reordered and self.op.startswith("hfac"):
                states = ({} if piece is None else {"master_low": piece} for piece in (low, rest))
                share = stored_agree("HFac", param, next(states), expected, next(states), W, given["lr"])
                assert share > 0.95 or self.kind.low == torch.int16  # whose last bits nearly all are others
            else:
                fused = self.op in ("hfac_step_", "hfac_int8_step_") and self.backend.startswith("cuda")
                rough = (self.op == "smmf_step_" or fused) and low is None
                assert same(param, expected) or rough and smmf_agrees(param, expected, old, given["lr"], self.backend)
                assert low is None or torch.equal(low, rest)
            W.copy_(joined(param, low))
        for name, tensors in self.states.items():
            for mine, twin in zip(tensors, self.twins[name], strict=True):
                if self.reordered and mine.is_floating_point():
                    assert torch.allclose(mine, twin, rtol=1e-5, atol=1e-6, equal_nan=True), name
                    twin.copy_(mine)
                assert same(mine, twin), name

    def accesses(self):
        """Of the CUDA kernels' launches that write parameters, in the table's last plan."""
        plan = self.call._call._plain.step.plan()
        return {launch["access"] for launch in plan if launch["param_written"]}


def grads_of(shapes, t, dtype):
    return [gradient(shape, 100 * t + k, dtype) for k, shape in enumerate(shapes)]


#: Several tiles of rows and of columns, rows that share no vector's boundary, and less than a vector.
SHAPES = {
    "hfac": [(300, 40), (12, 2104), (37, 19), (9, 3), (24, 16)],
    "smmf": [(300, 40), (130, 129), (37, 19), (9, 3), (24, 16)],
}


def shapes_of(op, backend):
    """Those that are a tile each for Triton, whose interpreter takes a while for more."""
    return SHAPES[op[:4]][2 if backend == "triton" else 0 :]


@pytest.mark.pairwise
@pytest.mark.parametrize("grad_dtype", [BF16, F32], ids=str)
@EACH_KIND
@each_op()
def test_what_is_stored_is_the_rounded_weight(backend, op, kind, grad_dtype):
    """Places from 0 on, from a multiple of eight on, and from elsewhere on; the steps are in device memory, each
    parameter its own."""
    shapes = shapes_of(op, backend)
    places = [BitOffset(0), BitOffset(2**32 - 1, 2**35 + 8), BitOffset(7), BitOffset(8, 5), BitOffset(9, 11)]
    pair = Pair(op, kind, shapes, backend, places=places[: len(shapes)])
    for t in (1, 2):
        steps = torch.arange(t, t + len(shapes), dtype=torch.float64) if t == 2 else None
        pair.step(grads_of(shapes, t, grad_dtype), t, steps)


LAYOUTS = [
    ("shifted", "contiguous"),
    ("contiguous", "shifted"),
    ("transposed", "contiguous"),
    ("contiguous", "transposed"),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@EACH_KIND
@each_op()
def test_any_layout(backend, op, kind, layouts):
    shapes = [(24, 16), (16, 8)]
    places = [BitOffset(1, 16, (64, 1)), BitOffset(2, 3, (1, 40))]
    pair = Pair(op, kind, shapes, backend, [layouts] * 2, places)
    pair.step(grads_of(shapes, 1, BF16))


#: Several chunks of the CPU's kernels, of rows and of elements whose moments are whole.
LONG = [(1100, 130), (400, 300), (20000, 2)]


@pytest.mark.parametrize("grad_dtype", [BF16, F16, F32], ids=str)
@each_op(BACKENDS)
def test_split_equals_steps_in_float32(backend, op, grad_dtype):
    """For as many steps as one likes: the weights in float32 go on by themselves."""
    shapes = [*shapes_of(op, backend), *(LONG if backend == "cpu" else [])]
    pair = Pair(op, KINDS["split"], shapes, backend)
    for t in range(1, 5 if backend != "triton" else 3):
        grads = grads_of(shapes, t, grad_dtype)
        calls.step(pair.call, grads, **scalars(op, t))
        calls.step(pair.twin, [grad.float() for grad in grads], **scalars(op, t))
    for param, low, W in zip(pair.params, pair.lows, pair.masters, strict=True):
        assert same(rounding.join(param, low), W)
    assert all(map(same, itertools.chain(*pair.states.values()), itertools.chain(*pair.twins.values())))


@EACH_KIND
@each_op()
def test_what_is_refused_keeps_every_bit(backend, op, kind):
    """By found_inf, and by a gradient that is not finite: of its parameter, not of the other."""
    shapes = [(400, 24), (24, 16)]
    pair = Pair(op, kind, shapes, backend)
    before = [[x.clone() for x in each if x is not None] for each in pair.stored()]

    def kept(k):
        now = [[x for x in each if x is not None] for each in pair.stored()]
        return all(same(a[k], b[k]) for a, b in zip(before, now, strict=True) if a)

    run = dict(seed=SEED, step=1.0, **scalars(op))
    grads = grads_of(shapes, 1, BF16)
    calls.step(pair.call, grads, found_inf=torch.tensor(1.0), **run)
    assert kept(0) and kept(1)
    grads[0][399, 23] = float("inf")
    flags = torch.zeros(2, dtype=torch.int32)
    calls.step(pair.call, grads, flags, **run)
    assert flags.tolist() == [1, 0] and kept(0) and not kept(1)


@EACH_KIND
@each_op()
def test_a_nan_stays_one(backend, op, kind):
    """Also that of a GPU's arithmetic, all of whose bits are set: what is added to them must not make it a number."""
    shapes = [(24, 16), (37, 19)]
    pair, grads = Pair(op, kind, shapes, backend), grads_of(shapes, 1, F32)
    for grad in grads:
        grad.view(torch.int32)[2:5, 3] = 0x7FFFFFFF
    pair.step(grads)
    assert all(param[2:5, 3].isnan().all() for param in pair.params)


@pytest.mark.parametrize("op", ["smmf_step_", "hfac_dense_step_"])
@EACH
def test_steps_of_random_bits(backend, op):
    """A number, a tensor, or one for each parameter; with it the bits change, and with nothing else."""
    shapes = [(24, 16), (7, 5)]

    def stepped(step):
        pair = Pair(op, KINDS["stochastic"], shapes, backend)
        calls.step(pair.call, grads_of(shapes, 1, F32), seed=3, step=step, **scalars(op))
        return pair.params

    (first, second), tensors, each = map(
        stepped, (3.0, torch.tensor(3.0), torch.tensor([3.0, 4.0], dtype=torch.float64))
    )
    assert same(first, tensors[0]) and same(second, tensors[1])
    assert same(first, each[0]) and not same(second, each[1])


PART = (slice(3, 20), slice(8, 24))  # of a matrix [32, 24]
PART_PLACES = [BitOffset(4, 80), BitOffset(4, 80, (24, 1)), BitOffset(4, 81)]


@pytest.mark.parametrize("contiguous", [False, True], ids=["strides", "rows"])
@EACH_KIND
@EACH
def test_smmf_parts(backend, kind, contiguous, device="cpu"):
    """A part is the slice of what a step of the whole writes."""
    part = (slice(8, 24), slice(0, 24)) if contiguous else PART
    shape, W = (32, 24), master((32, 24), 1).to(device)
    grad, before = gradient(shape, 2, BF16).to(device), states("smmf_step_", [shape], device)
    for name in ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols"):
        before[name][0].copy_(torch.rand(before[name][0].shape, generator=torch.Generator().manual_seed(5)))
    param, low = stored(kind, W)
    own, rest = param[part].clone(), None if low is None else low[part].clone()
    rows, cols = own.shape
    options = scalars("smmf_step_", 2) | dict(seed=SEED, backend=backend)
    sums = {f"new_{name[8:]}": [torch.zeros_like(t[0])] for name, t in before.items() if "signs" not in name}
    first = part[0].start * shape[1] + part[1].start
    calls.smmf_sums_step_(
        [own],
        [grad[part].clone()],
        *([t.clone() for t in before[name]] for name in ("exp_avg_rows", "exp_avg_cols")),
        [torch.zeros(sign_shape(own.shape), dtype=torch.uint8, device=device)],
        *([t.clone() for t in before[name]] for name in ("exp_avg_sq_rows", "exp_avg_sq_cols")),
        **sums,
        blocks=[[Block(0, cols, part[0].start, 1, part[1].start, rows, cols)]],
        master_lows=None if rest is None else [rest],
        places=[BitOffset(4, first, None if contiguous else (24, 1))] if kind.drawn else None,
        step=torch.tensor([3.0], dtype=torch.float64),
        **options,
    )
    lows = None if low is None else [low]
    places = [BitOffset(4)] if kind.drawn else None
    calls.smmf_step_([param], [grad], **before, master_lows=lows, places=places, step=3.0, **options)
    assert same(own, param[part])
    assert low is None or torch.equal(rest, low[part])


@pytest.mark.parametrize("place", PART_PLACES, ids=str)
@EACH_KIND
@EACH
def test_hfac_parts(backend, kind, place, device="cpu"):
    rows, cols = 17, 16
    W, grad = master((rows, cols), 1).to(device), gradient((rows, cols), 2, BF16).to(device)
    param, low = stored(kind, W)
    W = joined(param, low)
    generator = torch.Generator().manual_seed(5)

    def call(param, grad, **kwargs):
        by_row = ("exp_avg_rows", "exp_avg_sq_rows", "row_sums", "new_rows")
        by_col = ("exp_avg_cols", "exp_avg_sq_cols", "col_sums", "new_cols")
        generator.manual_seed(5)
        lists = {name: [(torch.rand(rows, generator=generator) + 0.5).to(device)] for name in by_row}
        lists |= {name: [(torch.rand(cols, generator=generator) + 0.5).to(device)] for name in by_col}
        given = {
            name: torch.tensor([value], device=device) for name, value in dict(totals=30.0, mean_squares=0.9).items()
        }
        lists |= given | dict(rows=[40], cols=[24])
        options = dict(lr=0.02, beta1=0.8, clip_threshold=0.7, weight_decay=0.1, backend=backend)
        calls.hfac_apply_([param], [grad], **lists, **options, **kwargs)

    places = [place] if kind.drawn else None
    call(param, grad, master_lows=None if low is None else [low], places=places, seed=SEED, step=7.0)
    call(W, grad.float())
    expected, rest = rounded(kind, W, place, 7)
    assert same(param, expected)
    assert low is None or torch.equal(low, rest)


#: whole vectors of each layout of signs, odd columns, odd bytes, a prime, one row, no dimension; and how they lie
OPTIMIZED = [
    ((40, 24), "contiguous"),
    ((24,), "contiguous"),
    ((8, 9), "contiguous"),
    ((17, 19), "contiguous"),
    ((7,), "contiguous"),
    ((1, 16), "contiguous"),
    ((), "contiguous"),
    ((12, 16), "transposed"),
    ((5, 8), "shifted"),
    ((6, 4, 3, 3), "permuted"),
    ((0, 5), "contiguous"),
]
#: options of a group, and the type of its parameters
GROUPS = {
    "plain": (BF16, {}),
    "stochastic": (BF16, dict(rounding="stochastic")),
    "float16": (F16, dict(rounding="stochastic")),
    "split": (BF16, dict(master="split")),
    "split8": (BF16, dict(master="split8")),
    "split8 stochastic": (BF16, dict(master="split8", rounding="stochastic")),
}


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("first", ["factored", "int8", "smmf"])
@EACH
def test_a_list_of_all_kinds_agrees_with_the_reference(backend, first, capturable):
    """The optimizer tells the kernels of seeds, steps and places. Some gradients are refused, which leaves both pieces
    untouched, and some parameters begin later. Steps from the same state."""
    groups = {key: group for key, group in GROUPS.items() if key != "plain" or backend != "triton"}  # which truncates
    name, moments = ("SMMF", {}) if first == "smmf" else ("HFac", {"first_moment": first})
    options = OPTIONS[name]["skip"] | dict(seed=2**64 - 3, capturable=capturable) | moments
    optimizers = []
    for which in (backend, "reference"):
        given = []
        for dtype, more in groups.values():
            values = [laid_out(gradient(shape, k, dtype), how) for k, (shape, how) in enumerate(OPTIMIZED)]
            given.append(dict(params=[torch.nn.Parameter(value) for value in values], **more))
        optimizer = getattr(hfac, name)(given, **options, backend=which)
        optimizers.append((optimizer, [p for group in given for p in group["params"]]))
    (ours, params), (theirs, twins) = optimizers
    for t in (1, 2, 3) if backend != "triton" else (1, 2):
        before = []
        for k, (p, twin) in enumerate(zip(params, twins, strict=True)):
            p.grad = twin.grad = None if t == 1 and k % 4 == 3 else gradient(p.shape, 10 * t + k, p.dtype)
            if t == 2 and k % 3 == 0 and p.numel():
                p.grad.view(-1)[-1] = float("inf")
            twin.data.copy_(p.data)
            if ours.state[p]:
                theirs.state[twin] = copy.deepcopy(ours.state[p])
            before.append((value_of(p, ours.state[p]).clone(), p.detach().clone()))
        ours.step()
        theirs.step()
        for k, (p, twin, (value, old)) in enumerate(zip(params, twins, before, strict=True)):
            mine, other = ours.state[p], theirs.state[twin]
            share = stored_agree(name, p, mine, twin, other, value, options["lr"], backend=backend)
            # Of master weights whole, nearly every one is off in its last bits; of coarser ones hardly any.
            assert share > 0.95 or p.numel() < 100 or "split" in str(groups) and mine.get("master_low") is not None
            if p.grad is not None:
                states_agree(name, without_low(mine), without_low(other), twin.grad)
            if t == 2 and k % 3 == 0 and p.numel():
                assert mine["skipped"] and same(p.detach(), old) and same(value_of(p, mine), value)
    ends = [value_of(p, ours.state[p]).sum().item() for p in params[:: len(OPTIMIZED)]]
    assert len(set(ends)) >= 3  # the kinds differ from each other
