"""Stochastic rounding and master weights in two pieces in the CUDA kernels, compiled for the host: to the bit what
`hfac.rounding` makes of the weights that the same kernels write in float32."""

import copy
import itertools

import calls
import emulated
import pytest
import torch
from cases import gradient
from suites import KINDS, OPS, laid_out, same
from test_parity import ieee_square_roots  # noqa: F401  (a fixture for every test here)

import hfac
from hfac import ops, rounding
from hfac.matricize import Block, sign_shape
from hfac.rounding import BitOffset

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("emulated_backend", "all_orders"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = 0xFEDCBA9876543210
SPECIAL = [float("nan"), float("inf"), -float("inf"), 3.3895e38, -3.3895e38, 1e-40, -0.0, 6e-8]


EACH_OP = pytest.mark.parametrize("op", OPS)
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


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
    found = zeros(op, shapes)
    return {name: [tensor.to(device) for tensor in tensors] for name, tensors in found.items()}


def zeros(op, shapes):
    if "dense" in op:
        return {name: [torch.zeros(s) for s in shapes] for name in ("exp_avgs", "exp_avg_sqs")}
    found = {}
    for moment in ("exp_avg", "exp_avg_sq"):
        found[f"{moment}_rows"] = [torch.zeros(rows) for rows, _ in shapes]
        found[f"{moment}_cols"] = [torch.zeros(cols) for _, cols in shapes]
    if op == "smmf_step_":
        found["exp_avg_signs"] = [torch.zeros(sign_shape(s), dtype=torch.uint8) for s in shapes]
    return found


def scalars(op, t=1):
    found = dict(lr=0.02, beta1=0.8 if t > 1 else 0.1, beta2=1 - t**-0.8, eps=1e-8, weight_decay=0.1, maximize=False)
    return found | (dict(clip_threshold=0.7) if op.startswith("hfac") else dict(decoupled_weight_decay=True))


class Pair:
    """An op on stored parameters beside the same op, of the same kernels, on their weights in float32."""

    def __init__(self, op, kind, shapes, layouts=None, places=None, backend=emulated.NAME, device="cpu"):
        self.op, self.kind, self.device = op, kind, device
        layouts = layouts or [("contiguous", "contiguous")] * len(shapes)
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
        calls.step(self.call, grads, seed=SEED, step=float(t) if steps is None else steps, **given)
        calls.step(self.twin, [grad.float() for grad in grads], **given)
        each = [t] * len(grads) if steps is None else steps.tolist()
        for W, place, step, param, low in zip(self.masters, self.places, each, *self.stored(), strict=True):
            expected, rest = rounded(self.kind, W, place, step)
            assert same(param, expected)
            assert low is None or torch.equal(low, rest)
            W.copy_(joined(param, low))
        for name, tensors in self.states.items():
            assert all(map(same, tensors, self.twins[name])), name

    def accesses(self):
        """Of the launches that write parameters, in the table's last plan."""
        plan = self.call._call._plain.step.plan()
        return {launch["access"] for launch in plan if launch["param_written"]}


def grads_of(shapes, t, dtype):
    return [gradient(shape, 100 * t + k, dtype) for k, shape in enumerate(shapes)]


#: Several tiles of rows and of columns, rows that share no vector's boundary, and less than a vector.
SHAPES = {
    "hfac": [(300, 40), (12, 2104), (37, 19), (9, 3), (24, 16)],
    "smmf": [(300, 40), (130, 129), (37, 19), (9, 3), (24, 16)],
}


@pytest.mark.parametrize("grad_dtype", [BF16, F32], ids=str)
@EACH_KIND
@EACH_OP
def test_what_is_stored_is_the_rounded_weight(op, kind, grad_dtype):
    """Places from 0 on, from a multiple of eight on, and from elsewhere on; the steps are in device memory, each
    parameter its own."""
    shapes = SHAPES[op[:4]]
    places = [BitOffset(0), BitOffset(2**32 - 1, 2**35 + 8), BitOffset(7), BitOffset(8, 5), BitOffset(9, 11)]
    pair = Pair(op, kind, shapes, places=places)
    for t in (1, 2):
        steps = torch.arange(t, t + len(shapes), dtype=torch.float64) if t == 2 else None
        pair.step(grads_of(shapes, t, grad_dtype), t, steps)
    expected = {"any stored"}
    if "dense" not in op:
        expected.add(kind.bulk[grad_dtype == F32])
    assert pair.accesses() == expected


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "layouts",
    [("shifted", "contiguous"), ("contiguous", "shifted"), ("transposed", "contiguous"), ("contiguous", "transposed")],
    ids="-".join,
)
@EACH_KIND
@EACH_OP
def test_any_layout(op, kind, layouts):
    shapes = [(24, 16), (16, 8)]
    places = [BitOffset(1, 16, (64, 1)), BitOffset(2, 3, (1, 40))]
    pair = Pair(op, kind, shapes, [layouts] * 2, places)
    pair.step(grads_of(shapes, 1, BF16))
    if "dense" not in op:
        moved = layouts[0] != "contiguous" or (kind.low is not None and layouts[1] != "contiguous")
        scattered = kind.drawn and kind.low != torch.int16  # of 16 bits no place matters
        assert pair.accesses() == {"any stored" if moved or scattered else kind.bulk[0]}


@pytest.mark.parametrize("grad_dtype", [BF16, F16, F32], ids=str)
@EACH_OP
def test_split_equals_steps_in_float32(op, grad_dtype):
    """For as many steps as one likes: the weights in float32 go on by themselves."""
    shapes = [(300, 40), (5, 2104), (37, 19)] if op == "hfac_step_" else [(300, 40), (37, 19)]
    pair = Pair(op, KINDS["split"], shapes)
    for t in (1, 2, 3, 4):
        grads = grads_of(shapes, t, grad_dtype)
        calls.step(pair.call, grads, **scalars(op, t))
        calls.step(pair.twin, [grad.float() for grad in grads], **scalars(op, t))
    for param, low, W in zip(pair.params, pair.lows, pair.masters, strict=True):
        assert same(rounding.join(param, low), W)
    assert all(map(same, itertools.chain(*pair.states.values()), itertools.chain(*pair.twins.values())))


@EACH_KIND
@EACH_OP
def test_what_is_refused_keeps_every_bit(op, kind):
    """By found_inf, and by a gradient that is not finite: of its parameter, not of the other."""
    shapes = [(400, 24), (24, 16)]
    pair = Pair(op, kind, shapes)
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
@EACH_OP
def test_a_nan_stays_one(op, kind):
    """Also that of a GPU's arithmetic, all of whose bits are set: what is added to them must not make it a number."""
    shapes = [(24, 16), (37, 19)]
    pair, grads = Pair(op, kind, shapes), grads_of(shapes, 1, F32)
    for grad in grads:
        grad.view(torch.int32)[2:5, 3] = 0x7FFFFFFF
    pair.step(grads)
    assert all(param[2:5, 3].isnan().all() for param in pair.params)


PART = (slice(3, 20), slice(8, 24))  # of a matrix [32, 24]
PART_PLACES = [BitOffset(4, 80), BitOffset(4, 80, (24, 1)), BitOffset(4, 81)]


@pytest.mark.parametrize("contiguous", [False, True], ids=["strides", "rows"])
@EACH_KIND
def test_smmf_parts(kind, contiguous, backend=emulated.NAME, device="cpu"):
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
def test_hfac_parts(kind, place, backend=emulated.NAME, device="cpu"):
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


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
def test_a_list_of_all_kinds_equals_the_reference(capturable):
    """SMMF, whose parameters depend on no sum of their step: plain, stochastic, of two pieces of either size. Steps
    from the same state."""
    groups = [{}, dict(rounding="stochastic"), dict(master="split"), dict(master="split8")]
    groups.append(dict(rounding="stochastic", master="split8"))
    optimizers = []
    for backend in (emulated.NAME, "reference"):
        params = [[torch.nn.Parameter(gradient(s, k, BF16)) for k, s in enumerate([(40, 24), (9,)])] for _ in groups]
        given = [dict(params=mine, **group) for mine, group in zip(params, groups, strict=True)]
        options = dict(lr=0.02, weight_decay=0.1, seed=11, capturable=capturable, backend=backend)
        optimizers.append((hfac.SMMF(given, **options), [p for mine in params for p in mine]))
    (ours, params), (theirs, twins) = optimizers
    for t in (1, 2, 3):
        for k, (p, twin) in enumerate(zip(params, twins, strict=True)):
            # Some begin later: their steps, and with those their random bits, are others.
            p.grad = twin.grad = None if t == 1 and k % 4 == 3 else gradient(p.shape, 10 * t + k, BF16)
            twin.data.copy_(p.data)
            if ours.state[p]:
                theirs.state[twin] = copy.deepcopy(ours.state[p])
        ours.step()
        theirs.step()
        for p, twin in zip(params, twins, strict=True):
            assert torch.equal(p, twin)
            low, rest = (each.state[x].get("master_low") for each, x in ((ours, p), (theirs, twin)))
            assert low is rest is None or torch.equal(low, rest)
    assert len({p.detach().float().sum().item() for p in params[::2]}) >= 3  # the kinds differ from each other


STEP = dict(numels=[12], param_dtypes=1, shapes=[(3, 4)])
STEP |= dict.fromkeys(("params", "exp_avgs", "exp_avg_sqs"), [4096])
LOW = dict(master_lows=[4096], low_bytes=[2])
LAUNCH = dict(table=4096, workspace=4096, counters=4096, lr=0.1, weight_decay=0.0, beta1=0.5, beta2=0.5, eps=1e-8)
LAUNCH |= dict(clip_threshold=None, maximize=False, coupled=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (LOW | dict(param_dtypes=0), "master_lows: .*no bfloat16"),
        (LOW | dict(master_lows=[0]), "master_lows: .*null"),
        (LOW | dict(master_lows=[4096, 4096]), "master_lows: 2 entries"),
        (LOW | dict(low_bytes=[3]), "low_bytes: .*1 or 2 is needed"),
        (LOW | dict(low_bytes=None), "low_bytes: "),
        (LOW | dict(low_strides=[(1,)]), "low_strides: .*dimensions"),
        (LOW | dict(low_strides=[(4, 1)], shapes=None), "shapes: needed"),
        (dict(places=[(1, 0, None)], param_dtypes=0), "places: .*only bfloat16 and float16"),
        (dict(places=[]), "places: 0 entries"),
        (dict(places=[(1, 0)]), "places: .*position, first, strides"),
        (dict(places=[(2**32, 0, None)]), "places: .*32 bits"),
        (dict(places=[(-1, 0, None)]), "places: .*negative"),
        (dict(places=[(1, -1, None)]), "places: .*negative"),
        (dict(places=[(1, 2**63 - 4, None)]), "places: .*overflows"),
        (dict(places=[(1, 0, (1,))]), "places: .*dimensions"),
        (dict(places=[(1, 0, (-4, 1))]), "places: .*negative"),
        (dict(places=[(1, 0, (2**62, 2**62))]), "places: .*overflows"),
        (dict(places=[(1, 2**62, (2**61, 2**60))]), "places: .*overflows"),
        (dict(places=[(1, 0, (4, 1))], shapes=None), "shapes: needed"),
        (dict(places=[(1, 0, (4, 1))], shapes=[(3, 5)]), "shapes: .*elements"),
    ],
)
def test_bad_calls_are_refused(given, message):
    emulated.native.CudaStep.smmf_dense_step(**STEP, **LOW, places=[(1, 0, (4, 1))])
    with pytest.raises(ValueError, match=message):
        emulated.native.CudaStep.smmf_dense_step(**STEP | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(step=1.0), "seed: "),
        (dict(seed=-1, step=1.0), "seed: "),
        (dict(seed=2**64, step=1.0), "seed: "),
        (dict(seed=1.5, step=1.0), "seed: "),
        (dict(seed=0), "step: needed"),
        (dict(seed=0, step=-1.0), "step: "),
        (dict(seed=0, step=2.0**32), "step: "),
        (dict(seed=0, step=float("nan")), "step: "),
        (dict(seed=0, step=(0, 1, 0)), "step: .*null"),
    ],
)
def test_a_launch_without_seed_or_step_is_refused(given, message):
    step = emulated.native.CudaStep.smmf_dense_step(**STEP, places=[(1, 0, None)])
    with pytest.raises(ValueError, match=message):
        step.launch(**LAUNCH, **given)
