"""H-Fac's statistics before the norm of all gradients is known, in the CUDA kernels compiled for the host: the sums of
squares, and steps that go on from them, to the bit those of a plain step."""

import itertools

import calls
import emulated
import pytest
import torch
from cases import gradient
from test_cuda_emulated import ORDERS, layouts
from test_cuda_rounding import same
from test_parity import ieee_square_roots  # noqa: F401  (a fixture for every test here)

from hfac import ops, rounding
from hfac.backends import cuda
from hfac.rounding import BitOffset

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("all_orders"),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
#: Several tiles and one, rows that registers hold, that are read again and that are longer; whole vectors and none.
SHAPES = [(24, 16), (300, 264), (19, 17), (0, 5), (5, 4104), (130, 7), (2, 14344), (9, 4100)]
SMALL = [(24, 16), (0, 5), (130, 7), (70, 24)]


@pytest.fixture
def all_orders(monkeypatch):
    """The order of blocks changes from launch to launch."""
    orders, fill = itertools.cycle(ORDERS), emulated.Host.before_launch

    def before_launch(host, workspace):
        emulated.native.set_block_order(next(orders))
        fill(host, workspace)

    monkeypatch.setattr(emulated.Host, "before_launch", before_launch)
    yield
    emulated.native.set_block_order("forward")


def scalars(t):
    decays = dict(beta1=0.8 if t else 0.0, beta2=0.9 if t else 0.0)
    return dict(lr=0.02, eps=1e-12, weight_decay=0.1, clip_threshold=0.7, maximize=False) | decays


class Run:
    """The op on parameters and states that are the same in every run."""

    def __init__(self, shapes=SHAPES, dtype=F32, device="cpu", ops=None, places=None, low=None):
        self.ops, state = ops or emulated.ops, F64 if dtype == F64 else F32
        self.params = [gradient(shape, k, dtype).to(device) for k, shape in enumerate(shapes)]
        self.states = {
            f"exp_avg_{moment}{side}s": [torch.zeros(shape[d], dtype=state, device=device) for shape in shapes]
            for moment in ("", "sq_")
            for d, side in enumerate(("row", "col"))
        }
        if low is not None:
            pieces = [rounding.split(param.float() * 1.001, low) for param in self.params]
            self.params, self.states["master_lows"] = (list(each) for each in zip(*pieces, strict=True))
        self.step = calls.bind(self.ops, "hfac_step_", self.params, self.states, places=places)

    def everything(self):
        return [*self.params, *(tensor for tensors in self.states.values() for tensor in tensors)]


def agree(a, b):
    return all(map(same, a.everything(), b.everything()))


def grads_of(shapes, t, dtype=F32, layout=None):
    grads = [gradient(shape, 100 * t + k, dtype) for k, shape in enumerate(shapes)]
    if layout:
        grads = [layouts(grad)[layout] if grad.numel() else grad for grad in grads]
    return grads


def both(one, other, grads, t, clip, scale=None, **options):
    """A clipped step beside a plain one of gradients that are divided by as much; the sums of squares."""
    scale = None if scale is None else torch.tensor(scale)
    flags = [torch.full((len(grads),), 7, dtype=torch.int32) for _ in range(2)] if options.pop("flags", False) else None
    mine, theirs = flags or (None, None)
    squares = one.step.squares(grads, mine, **scalars(t), **options, grad_scale=scale)
    found = squares.clone()
    clip = torch.tensor(clip)
    divisor = clip.reciprocal() if scale is None else scale / clip
    one.step(grads, mine, **scalars(t), **options, grad_scale=divisor, clip=clip)
    other.step(grads, theirs, **scalars(t), **options, grad_scale=scale if clip == 1 else divisor)
    if flags:
        assert torch.equal(*flags)
    return found


def norm_and_step(run, grads, limit, t=1):
    """As an optimizer does it: nothing is read on the host. Returns the coefficient."""
    squares = run.step.squares(grads, **scalars(t))
    clip = (limit / squares.sum().sqrt()).clamp(max=1.0).to(F32)
    run.step(grads, **scalars(t), clip=clip, grad_scale=clip.reciprocal())
    return clip


def close(squares, grads, scale=1.0):
    exact = torch.stack([(grad.double() / scale).square().sum() for grad in grads])
    return squares.dtype == F64 and torch.allclose(squares, exact, rtol=1e-6, atol=0)


KINDS = {
    "float32": (F32, F32),
    "bfloat16": (BF16, BF16),
    "float16": (F16, F16),
    "float64": (F64, F64),
    "bfloat16 of float32": (BF16, F32),
    "float32 of bfloat16": (F32, BF16),
    "float64 of float16": (F64, F16),
}


@pytest.mark.parametrize(("dtype", "grad_dtype"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("clip", [1.0, 0.3, float("nan")])
def test_a_clipped_step_has_the_bits_of_a_plain_one(clip, dtype, grad_dtype):
    one, other = Run(dtype=dtype), Run(dtype=dtype)
    for t in range(2):
        grads = grads_of(SHAPES, t, grad_dtype)
        assert close(both(one, other, grads, t, 1.0 if t == 0 else clip), grads)
        assert agree(one, other)


@pytest.mark.parametrize("layout", ["transposed", "every second", "shifted"])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_gradients_of_any_layout(clip, layout):
    one, other = Run(SMALL), Run(SMALL)
    grads = grads_of(SMALL, 0, layout=layout)
    assert close(both(one, other, grads, 0, clip), grads)
    assert agree(one, other)


@pytest.mark.parametrize("scale", [8.0, 3.0])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_squares_are_of_unscaled_gradients(clip, scale):
    one, other = Run(SMALL), Run(SMALL)
    for t in range(2):
        grads = [grad * scale for grad in grads_of(SMALL, t)]
        assert close(both(one, other, grads, t, clip, scale=scale), grads, scale)
        assert agree(one, other)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_other_options(threshold, maximize):
    one, other = Run(SMALL), Run(SMALL)
    now = scalars(1) | dict(clip_threshold=threshold, maximize=maximize, lr=torch.tensor(0.3, dtype=F64))
    for clip in (1.0, 0.3):
        grads = grads_of(SMALL, 1)
        one.step.squares(grads, **now)
        one.step(grads, **now, clip=torch.tensor(clip), grad_scale=torch.tensor(1 / clip))
        other.step(grads, **now, grad_scale=torch.tensor(1 / clip))
        assert agree(one, other)


@pytest.mark.parametrize("low", [torch.int16, torch.int8, None])
def test_parameters_that_are_stored_otherwise(low):
    runs = [Run(SMALL, BF16, places=[BitOffset(k, 0, None) for k in range(len(SMALL))], low=low) for _ in range(2)]
    for t, clip in enumerate((1.0, 0.3)):
        both(*runs, grads_of(SMALL, t, BF16), t, clip, seed=3, step=float(t))
        assert agree(*runs)


@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_statistics_are_taken_again_only_where_it_clips(clip):
    """The gradient is changed in between: whose statistics are they?"""
    one, other = Run(SMALL), Run(SMALL)
    before, after = grads_of(SMALL, 0), grads_of(SMALL, 1)
    given = [grad.clone() for grad in before]
    one.step.squares(given, **scalars(1))
    for grad, new in zip(given, after, strict=True):
        grad.copy_(new)
    one.step(given, **scalars(1), clip=torch.tensor(clip), grad_scale=torch.tensor(1 / clip))
    other.step(before if clip == 1 else after, **scalars(1), grad_scale=torch.tensor(1 / clip))
    for name, states in one.states.items():
        assert all(map(same, states, other.states[name]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("clip", [1.0, 1e-20])
def test_a_refused_parameter(clip, bad):
    """With 1e30 its square is not finite; clipped it may be."""
    one, other = Run(SMALL), Run(SMALL)
    both(one, other, grads_of(SMALL, 0), 0, 1.0, flags=True)
    before = one.params[2].clone(), one.params[3].clone()
    grads = grads_of(SMALL, 1)
    grads[2][129, 6] = bad
    flags = torch.full((len(grads),), 7, dtype=torch.int32)
    squares = one.step.squares(grads, flags, **scalars(1))
    assert flags.tolist() == [0, 0, 1, 0]
    assert not squares[2].isfinite() and close(squares[[0, 1, 3]], [grads[k] for k in (0, 1, 3)])
    one.step(grads, flags, **scalars(1), clip=torch.tensor(clip), grad_scale=torch.tensor(1 / clip))
    refused = not (bad == 1e30 and clip < 1)
    assert flags.tolist() == [0, 0, int(refused), 0]
    other.step(grads, torch.zeros_like(flags), **scalars(1), grad_scale=torch.tensor(1 / clip))
    assert agree(one, other)
    assert torch.equal(one.params[2], before[0]) == refused and not torch.equal(one.params[3], before[1])


def test_flags_that_are_not_contiguous():
    run, grads = Run(SMALL), grads_of(SMALL, 0)
    grads[0][3, 4] = float("inf")
    for clip in (1.0, 0.5):
        flags = torch.full((2 * len(grads),), 7, dtype=torch.int32)[::2]
        run.step.squares(grads, flags, **scalars(1))
        run.step(grads, flags, **scalars(1), clip=torch.tensor(clip), grad_scale=torch.tensor(1 / clip))
        assert flags.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("clip", [1.0, 0.5, float("nan")])
def test_found_inf_keeps_every_bit(clip):
    one, other = Run(SMALL), Run(SMALL)
    for t, skip in enumerate((0.0, 1.0, 0.0)):
        before, flags = [tensor.clone() for tensor in one.everything()], torch.zeros(4, dtype=torch.int32)
        found = dict(found_inf=torch.tensor(skip))
        now = clip if skip else 1.0
        squares = one.step.squares(grads_of(SMALL, t), flags, **scalars(t), **found)
        one.step(grads_of(SMALL, t), flags, **scalars(t), **found, clip=torch.tensor(now), grad_scale=torch.tensor(1.0))
        assert squares[[0, 2, 3]].isnan().tolist() == [bool(skip)] * 3 and squares[1] == 0
        assert all(map(same, one.everything(), before)) == bool(skip)
        assert not flags.any()
        if not skip:
            other.step(grads_of(SMALL, t), **scalars(t))
        assert agree(one, other)


@pytest.mark.parametrize(("l2_bytes", "shares", "groups"), [(1, 9, 9), (60_000, 4, 5), (0, 1, 1)])
def test_groups_share_the_memory_of_their_tiles(l2_bytes, shares, groups, monkeypatch):
    """Of an item 2 numbers per row and 5 per column last; the tiles' sums are in memory for one share of the list."""
    monkeypatch.setattr(emulated.Host, "l2_bytes", lambda host, device: l2_bytes)
    shapes = [(300, 264), (24, 16), (19, 17), (200, 40), (0, 5), (5, 4104), (9, 4100), (64, 64), (33, 8), (8, 33)]
    one, other = Run(shapes), Run(shapes)
    for t, clip in enumerate((1.0, 0.3, 1.0)):
        grads = grads_of(shapes, t)
        assert close(both(one, other, grads, t, clip), grads)
        assert agree(one, other)
    planned = one.step._split
    plan = planned.step.plan()
    assert len({launch["group"] for launch in plan if launch["phase"] == "squares"}) == shares
    assert len({launch["group"] for launch in plan if launch["phase"] == "step"}) == groups
    lasting = sum(4 * (2 * rows + 5 * cols) + 100 for rows, cols in shapes if rows)
    tiles = [4 * 3 * cols * -(-rows // 64) for rows, cols in shapes]
    assert planned.workspace.numel() <= lasting + (sum(tiles) if shares == 1 else max(max(tiles), 0.6 * l2_bytes))


def test_gradients_at_other_addresses_and_plain_steps_between():
    one, other = Run(SMALL), Run(SMALL)
    grads = grads_of(SMALL, 0)
    for t, clip in enumerate((1.0, None, 0.3, 1.0, None, None, 0.3)):
        grads = [grad.clone() for grad in grads] if t % 2 else [grad.double() for grad in grads]
        if clip is None:
            one.step(grads, **scalars(t))
            other.step(grads, **scalars(t))
        else:
            assert close(both(one, other, grads, t, clip), grads)
        assert agree(one, other)
    table = one.step._split.table.clone()
    both(one, other, grads, 1, 1.0)
    assert torch.equal(one.step._split.table, table)


def test_the_norm_decides():
    one, other = Run(), Run()
    for t in range(4):
        grads = [grad * (100.0 if t % 2 else 1.0) for grad in grads_of(SHAPES, t)]
        limit = 10 * sum(float(grad.square().sum()) for grad in grads_of(SHAPES, 0)) ** 0.5
        clip = norm_and_step(one, grads, limit, t)
        assert (clip < 1) == bool(t % 2)
        other.step(grads, **scalars(t), grad_scale=clip.reciprocal())
        assert agree(one, other)


def test_a_warm_step_keeps_its_memory():
    run, grads = Run(SMALL), grads_of(SMALL, 0)
    kept = []
    for t in range(3):
        squares = run.step.squares(grads, **scalars(t))
        run.step(grads, **scalars(t), clip=torch.tensor(1.0), grad_scale=torch.tensor(1.0))
        planned = run.step._split
        kept.append([x.data_ptr() for x in (squares, planned.table, planned.workspace, planned.counters)])
    assert kept[0] == kept[1] == kept[2]
    assert run.step._plain.table is None  # the plain plan was not asked for
    assert run.step.workspace_bytes() == planned.workspace_bytes() > 0


def test_the_launches_are_those_of_the_plan():
    run, grads = Run(SMALL), grads_of(SMALL, 0)
    emulated.native.take_launches()
    run.step.squares(grads, **scalars(1))
    plan = run.step._split.step.plan()
    counts = {phase: sum(launch["phase"] == phase for launch in plan) for phase in ("squares", "step")}
    assert emulated.native.take_launches() == counts["squares"]
    run.step(grads, **scalars(1), clip=torch.tensor(1.0), grad_scale=torch.tensor(1.0))
    assert emulated.native.take_launches() == counts["step"]
    assert {launch["kernel"] for launch in plan if launch["conditional"]} == {"hfac_stats", "hfac_collect"}


class Capturing(emulated.Host):
    """A host that says it is capturing a graph: what it launches then stands for the replays too."""

    now = False

    def capturing(self):
        return self.now


def test_what_a_graph_reads_is_left_alone():
    host = Capturing()
    run, plain = Run(SMALL, ops=cuda.Kernels(host)), Run(SMALL)
    first, second = grads_of(SMALL, 0), grads_of(SMALL, 1)
    clip = dict(clip=torch.tensor(1.0), grad_scale=torch.tensor(1.0))
    host.now = True
    with pytest.raises(RuntimeError, match="this is the first step on these tensors"):
        run.step.squares(first, **scalars(1))
    host.now = False
    kept = run.step.squares(first, **scalars(1))
    run.step(first, **scalars(1), **clip)
    plain.step(first, **scalars(1))
    host.now = True
    inside = run.step.squares(second, **scalars(1))
    run.step(second, **scalars(1), **clip)
    plain.step(second, **scalars(1))
    host.now, planned = False, run.step._split
    table = planned.table
    before = table.clone()
    captured = [one.data_ptr() for one in run.step.captured if one is not None]
    assert table.data_ptr() in captured and inside.data_ptr() in captured
    squares = run.step.squares(first, **scalars(1))
    run.step(first, **scalars(1), **clip)
    plain.step(first, **scalars(1))
    assert torch.equal(table, before) and planned.table is not table
    assert squares.data_ptr() == inside.data_ptr() == kept.data_ptr()
    assert close(squares, first) and agree(run, plain)


def test_other_ops_take_no_statistics():
    states = {name: [torch.zeros(5)] for name in ("exp_avgs", "exp_avg_sqs")}
    run = calls.bind(emulated.ops, "hfac_dense_step_", [torch.zeros(5)], states)
    assert run.squares([torch.ones(5)], **scalars(1)) is None
    empty = ops.OpCall("hfac_step_", [], {name: [] for name in calls.STATES["hfac_step_"]})
    inputs = empty.prepare([], **scalars(1))
    empty.apply(inputs, empty.statistics(inputs), torch.tensor(1.0))
