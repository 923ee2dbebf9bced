"""What a watched step tells of its numbers, in the CUDA kernels compiled for the host: beside the same numbers, made
with torch of what the same kernels write in float32."""

import calls
import emulated
import pytest
import torch
from cases import gradient
from test_cuda_clipping import all_orders  # noqa: F401  (a fixture for every test here)
from test_cuda_rounding import KINDS, Kind, laid_out, same
from test_cuda_rounding import SHAPES as BY_OPTIMIZER
from test_parity import ieee_square_roots  # noqa: F401  (a fixture for every test here)

from hfac import rounding
from hfac.matricize import sign_shape
from hfac.rounding import BitOffset

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("all_orders"),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPS = ["hfac_step", "hfac_dense_step", "smmf_step", "smmf_dense_step"]
EACH_OP = pytest.mark.parametrize("op", OPS)
PLAIN = {"float32": Kind(F32), "bfloat16": Kind(BF16), "nearest float16": Kind(F16), "float64": Kind(F64)}
EVERY = PLAIN | KINDS
EMPTY = (0, 5)


def scalars(op, t=2, **options):
    found = dict(lr=0.01, beta1=0.8 if t > 1 else 0.0, beta2=0.5 if t > 1 else 0.0, eps=1e-8, weight_decay=0.1)
    return found | (dict(clip_threshold=0.3) if op.startswith("hfac") else {}) | options


def made(op, shapes, dtype, device="cpu"):
    new = dict(dtype=dtype, device=device)
    if "dense" in op:
        return {name: [torch.zeros(shape, **new) for shape in shapes] for name in ("exp_avgs", "exp_avg_sqs")}
    found = {
        f"exp_avg_{moment}{side}s": [torch.zeros(shape[d], **new) for shape in shapes]
        for moment in ("", "sq_")
        for d, side in enumerate(("row", "col"))
    }
    if op == "smmf_step":
        found["exp_avg_signs"] = [torch.zeros(sign_shape(s), dtype=torch.uint8, device=device) for s in shapes]
    return found


class Watched:
    """An op on parameters of a kind, and the same op on their weights in float32 (float64)."""

    def __init__(self, op, kind, shapes, layouts=("contiguous", "contiguous"), first=True, device="cpu", ops=None):
        self.op, self.kind = op, kind
        ops = ops or emulated.ops
        self.wide = F64 if kind.dtype == F64 else F32
        weights = [gradient(shape, k, self.wide).to(device) for k, shape in enumerate(shapes)]
        self.lows = None
        if kind.low is not None:
            pieces = [rounding.split(weight, kind.low) for weight in weights]
            weights, self.lows = (list(each) for each in zip(*pieces, strict=True))
            self.lows = [laid_out(low, layouts[1]) for low in self.lows]
        self.params = [laid_out(weight.to(kind.dtype), layouts[0]) for weight in weights]
        self.states, self.twins = made(op, shapes, self.wide, device), made(op, shapes, self.wide, device)
        if not first:
            for states in (self.states, self.twins):
                for name in [name for name in states if "sq" not in name]:
                    del states[name]
        places = [BitOffset(3 * k) for k in range(len(shapes))] if kind.drawn else None
        given = self.states | ({} if self.lows is None else {"master_lows": self.lows})
        self.step = calls.bind(ops, op, self.params, given, places=places)
        self.weights = self.joined()
        self.twin = calls.bind(ops, op, self.weights, self.twins)

    def joined(self):
        if self.lows is None:
            return [param.to(self.wide, copy=True).contiguous() for param in self.params]
        return [rounding.join(*pieces) for pieces in zip(self.params, self.lows, strict=True)]

    def nearest(self, weight):
        if self.kind.low is not None:
            return rounding.join(*rounding.split(weight, self.kind.low))
        return weight.to(self.kind.dtype).to(self.wide)

    def everything(self):
        return [*self.params, *(self.lows or []), *(x for states in self.states.values() for x in states)]

    def watch(self, grads, watched, *flags, **options):
        """A step that adds to ``watched``. Returns what it should have added to zeros."""
        now = scalars(self.op, **options)
        seed = dict(seed=5, step=3.0) if self.kind.drawn else {}
        old, states = self.joined(), {n: [x.clone() for x in xs] for n, xs in self.twins.items()}
        self.step(grads, *flags, **now, **seed, watched=watched)
        self.twin(grads, *(flag.clone() for flag in flags), **now)
        rows = []
        for k, (weight, fresh) in enumerate(zip(old, self.weights, strict=True)):
            grad = grads[k].double() / (options["grad_scale"].double() if "grad_scale" in options else 1)
            moved = (fresh - weight).square().double().sum()
            still = (self.nearest(fresh) == weight).sum()
            matrix = self.op == "hfac_step" and grad.numel() > 0
            zeros = [(grad == 0).all(d).sum() if matrix else 0 for d in (1, 0)]
            found = [moved, still, self.direction(k, grad, weight, states, now).square().sum(), *zeros]
            rows.append(torch.tensor([float(number) for number in found], dtype=F64))
            fresh.copy_(self.joined()[k])  # and the twin goes on from what is stored
        return torch.stack(rows)

    def direction(self, k, grad, weight, before, now):
        after = {name: states[k].double() for name, states in self.twins.items() if "signs" not in name}
        before = {name: states[k] for name, states in before.items()}
        if self.op == "hfac_step":
            r, s = after["exp_avg_sq_rows"], after["exp_avg_sq_cols"]
            return grad / (r[:, None] * s / r.sum()).sqrt()
        if self.op == "hfac_dense_step":
            return grad / after["exp_avg_sqs"].sqrt()
        if now.get("maximize"):
            grad = -grad
        if not now.get("decoupled_weight_decay", True):
            grad = grad + now["weight_decay"] * weight.double()
        if self.op == "smmf_dense_step":
            return after.get("exp_avgs", grad) / (after["exp_avg_sqs"].sqrt() + now["eps"])
        rows, cols = before["exp_avg_sq_rows"].double(), before["exp_avg_sq_cols"].double()
        square = now["beta2"] * rows[:, None] * cols + (1 - now["beta2"]) * grad.square()
        first = grad
        if now["beta1"] is not None:
            bits = before["exp_avg_signs"][..., None] >> torch.arange(8, device=grad.device) & 1
            signs = 2.0 * bits.flatten(-2)[:, : grad.shape[1]].double() - 1
            old = signs * before["exp_avg_rows"].double()[:, None] * before["exp_avg_cols"].double()
            first = now["beta1"] * old + (1 - now["beta1"]) * grad
        return first / (square.sqrt() + now["eps"])


def grads_of(shapes, t, dtype=F32):
    """With rows and columns of zeros, some of them negative; and with a row and a column whose sums are 0."""
    found = [gradient(shape, 100 * t + k, dtype) for k, shape in enumerate(shapes)]
    for k, grad in enumerate(found):
        if min(grad.shape, default=0) > 2:
            grad[1], grad[2] = 0.0, 0.0
            grad[1, : 1 + k] = -0.0
            grad[:, -1] = 0.0
            grad[-1], grad[:, 0] = 0.0, 0.0
            grad[-1, 0], grad[-1, 1], grad[0, 0] = 2.0, -2.0, -2.0
    return found


def agree(watched, expected):
    counts = [1, 3, 4]
    assert torch.equal(watched[:, counts], expected[:, counts])
    assert torch.allclose(watched, expected, rtol=2e-5, atol=0)


def shapes_of(op):
    first, *rest = BY_OPTIMIZER[op[:4]]
    return [first, EMPTY, *rest]


@pytest.mark.parametrize("grad_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
@EACH_OP
def test_the_numbers_are_those_of_torch(op, kind, grad_dtype):
    shapes = shapes_of(op)
    run, untold = Watched(op, kind, shapes), Watched(op, kind, shapes)
    for t in (1, 2):
        grads, watched = grads_of(shapes, t, grad_dtype), torch.zeros(len(shapes), 5, dtype=F64)
        expected = run.watch(grads, watched, t=t)
        agree(watched, expected)
        untold.step(grads, **scalars(op, t), **(dict(seed=5, step=3.0) if kind.drawn else {}))
        assert all(map(same, run.everything(), untold.everything()))  # watching changes no bit
    size = sum(a * b for a, b in shapes)
    full = [k for k, shape in enumerate(shapes) if shape != EMPTY]
    assert watched[:, 1].sum() < size and watched[full][:, [0, 2]].min() > 0 and not watched[1].any()
    assert (watched[:, 3:] > 0).any() == (op == "hfac_step")


@pytest.mark.parametrize("layout", ["shifted", "transposed"])
@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
@EACH_OP
def test_any_layout(op, kind, layout):
    shapes = [(24, 16), (40, 8)]
    run = Watched(op, kind, shapes, (layout, "contiguous" if layout == "shifted" else "transposed"))
    for t in (1, 2):
        grads, watched = [laid_out(g, layout) for g in grads_of(shapes, t)], torch.zeros(2, 5, dtype=F64)
        agree(watched, run.watch(grads, watched, t=t))


EVERYWHERE = (dict(maximize=True, grad_scale=torch.tensor(4.0)), dict(eps=0.0))
OF_SMMF = (dict(decoupled_weight_decay=False, weight_decay=0.5), dict(beta1=None))


@pytest.mark.parametrize(
    ("op", "options"),
    [
        pytest.param(op, options, id=f"{op}-{next(iter(options))}")
        for op in OPS
        for options in (*EVERYWHERE, *(OF_SMMF if op.startswith("smmf") else (dict(clip_threshold=None),)))
    ],
)
def test_other_options(op, options):
    shapes, grads = shapes_of(op), grads_of(shapes_of(op), 2)
    if "eps" in options:  # 0 / 0 is no number, nor may it come from beyond a row's end
        grads = [torch.where(grad == 0, 1.0, grad) for grad in grads]
    run = Watched(op, PLAIN["bfloat16"], shapes, first="beta1" not in options)
    for t in (1, 2):
        watched = torch.zeros(len(shapes), 5, dtype=F64)
        agree(watched, run.watch(grads, watched, **{"t": t} | options))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
@EACH_OP
def test_where_nothing_moves_every_element_stays(op, kind, layout):
    shapes = [(24, 16), EMPTY, (37, 19), (300, 40)]
    run, watched = Watched(op, kind, shapes, (layout, "contiguous")), torch.zeros(4, 5, dtype=F64)
    agree(watched, run.watch(grads_of(shapes, 1), watched, lr=0.0, weight_decay=0.0))
    assert watched[:, 0].sum() == 0 and watched[:, 1].tolist() == [a * b for a, b in shapes]


@EACH_OP
def test_a_step_adds_to_what_is_there(op):
    shapes = shapes_of(op)
    run, start = Watched(op, PLAIN["bfloat16"], shapes), torch.arange(5.0 * len(shapes), dtype=F64).view(-1, 5)
    watched, expected = start.clone(), start.clone()
    for t in (1, 2, 3):
        expected += run.watch(grads_of(shapes, t), watched, t=t)
    assert torch.allclose(watched, expected, rtol=2e-5) and torch.equal(watched[1], start[1])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@EACH_OP
def test_nothing_is_added_for_what_keeps_every_bit(op, bad):
    shapes = [(400, 24), (24, 16), (30, 17), (400, 24)]  # of a dense op several blocks, and one
    run = Watched(op, PLAIN["float32"], shapes)
    grads, watched = grads_of(shapes, 1), torch.zeros(4, 5, dtype=F64)
    run.step(grads, **scalars(op), watched=watched, found_inf=torch.tensor(1.0))
    assert not watched.any()
    grads[0][399, 23] = grads[1][3, 4] = bad
    flags = torch.zeros(4, dtype=torch.int32)
    expected = run.watch(grads, watched, flags)
    assert flags.tolist() == [1, 1, 0, 0] and not watched[:2].any()
    agree(watched[2:], expected[2:])


@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_a_step_after_its_norm(clip):
    """Statistics that are taken twice are told of once."""
    shapes = shapes_of("hfac_step")
    one, other = Watched("hfac_step", PLAIN["bfloat16"], shapes), Watched("hfac_step", PLAIN["bfloat16"], shapes)
    grads, watched, expected = grads_of(shapes, 1), *torch.zeros(2, len(shapes), 5, dtype=F64).unbind()
    divisor = torch.tensor(1 / clip)
    one.step.squares(grads, **scalars("hfac_step"))
    one.step(grads, **scalars("hfac_step"), clip=torch.tensor(clip), grad_scale=divisor, watched=watched)
    other.step(grads, **scalars("hfac_step"), grad_scale=divisor, watched=expected)
    assert torch.allclose(watched, expected, rtol=1e-12) and watched[:, 3].sum() > 0


@EACH_OP
def test_a_large_list_has_several_tiles_of_all_kinds(op):
    """Rows that registers hold and longer ones; more columns than a tile has."""
    shapes = [(70, 4104), (2, 14344), (300, 2100)] if op.startswith("hfac") else [(300, 2104), (2100, 96)]
    for kind in (PLAIN["bfloat16"], PLAIN["float64"]):
        run, grads = Watched(op, kind, shapes), grads_of(shapes, 1)
        watched = torch.zeros(len(shapes), 5, dtype=F64)
        agree(watched, run.watch(grads, watched))
