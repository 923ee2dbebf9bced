"""H-Fac's statistics before the norm of all gradients is known, in the CUDA kernels compiled for the host: plans,
memory and graphs. What every backend has to do is in test_clipped_steps.py."""

import calls
import emulated
import pytest
import torch
from suites import Run, cases
from test_clipped_steps import SMALL, both, close

from hfac import ops

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("emulated_backend", "all_orders"),
]
ONE = torch.tensor(1.0)


def made(these=SMALL, op="hfac_step_"):
    return Run(op, these, emulated.NAME)


def planned(run):
    """The plan of a step after its statistics."""
    return run.call._call._split


@pytest.mark.parametrize(("l2_bytes", "shares", "groups"), [(1, 9, 9), (60_000, 4, 4), (0, 1, 1)])
def test_groups_share_the_memory_of_their_tiles(l2_bytes, shares, groups, monkeypatch):
    """Of an item 2 numbers per row and 5 per column last, and 3 doubles for every 256 rows or 32 columns; the tiles'
    sums are in memory for one share of the list."""
    monkeypatch.setattr(emulated.Host, "l2_bytes", lambda host, device: l2_bytes)
    shapes = [(300, 264), (24, 16), (19, 17), (200, 40), (0, 5), (5, 4104), (9, 4100), (64, 64), (33, 8), (8, 33)]
    one, other = made(cases(shapes)), made(cases(shapes))
    for t, clip in enumerate((1.0, 0.3, 1.0)):
        assert close(both(one, other, t, clip), one.grads(t)) and one.agrees(other)
    plan = planned(one).step.plan()
    assert len({launch["group"] for launch in plan if launch["phase"] == "squares"}) == shares
    assert len({launch["group"] for launch in plan if launch["phase"] == "step"}) == groups
    doubles = [3 * max(-(-rows // 256), -(-cols // 32)) for rows, cols in shapes]
    lasting = sum(
        4 * (2 * rows + 5 * cols) + 8 * n + 100 for (rows, cols), n in zip(shapes, doubles, strict=True) if rows
    )
    tiles = [4 * 3 * cols * -(-rows // 16) for rows, cols in shapes]
    bound = lasting + (sum(tiles) if shares == 1 else max(max(tiles), 0.6 * l2_bytes))
    assert planned(one).workspace.numel() <= bound


def test_a_warm_step_keeps_its_memory():
    run, kept = made(), []
    grads = run.grads()
    for _ in range(3):
        squares = run.step(grads, clip=ONE, norm=True).sums.squares
        plan = planned(run)
        kept.append([x.data_ptr() for x in (squares, plan.table, plan.workspace, plan.counters)])
        del squares
    assert kept[0] == kept[1] == kept[2]
    assert run.call._call._plain.table is None  # the plain plan was not asked for
    assert run.call.workspace_bytes() == plan.workspace_bytes() > 0


def test_a_table_is_copied_anew_only_where_an_address_changed():
    run, grads = made(), made().grads()
    run.step(grads, clip=ONE, norm=True)
    table = planned(run).table.clone()
    run.step(grads, clip=ONE, norm=True)
    assert torch.equal(planned(run).table, table)
    run.step(run.grads(), clip=ONE, norm=True)
    assert not torch.equal(planned(run).table, table)


def test_the_launches_are_those_of_the_plan():
    run = made()
    emulated.native.take_launches()
    inputs = run.call.prepare(run.grads(), **run.numbers)
    found = run.call.statistics(inputs)
    plan = planned(run).step.plan()
    counts = {phase: sum(launch["phase"] == phase for launch in plan) for phase in ("squares", "step")}
    assert emulated.native.take_launches() == counts["squares"]
    run.call.apply(inputs, found, ONE)
    assert emulated.native.take_launches() == counts["step"]
    assert {launch["kernel"] for launch in plan if launch["conditional"]} == {"hfac_stats", "hfac_collect"}


def test_what_a_graph_reads_is_left_alone(monkeypatch):
    """The host says that it is capturing a graph: what it launches then stands for the replays too."""

    def capturing(now):
        monkeypatch.setattr(emulated.Host, "capturing", lambda host: now)

    run, plain = made(), made()
    first, second = run.grads(0), run.grads(1)
    capturing(True)
    with pytest.raises(RuntimeError, match="this is the first step on these tensors"):
        run.step(first, clip=ONE, norm=True)
    capturing(False)
    kept = run.step(first, clip=ONE, norm=True).sums.squares.data_ptr()
    plain.step(first)
    capturing(True)
    inside = run.step(second, clip=ONE, norm=True).sums.squares
    capturing(False)
    plain.step(second)
    table, held = planned(run).table, planned(run)
    before = table.clone()
    captured = [one.data_ptr() for one in run.call._call.captured if one is not None]
    assert table.data_ptr() in captured and inside.data_ptr() in captured
    squares = run.step(first, clip=ONE, norm=True).sums.squares
    plain.step(first)
    assert torch.equal(table, before) and held.table is not table
    assert squares.data_ptr() == inside.data_ptr() == kept
    assert close(squares, first) and run.agrees(plain)


def test_other_ops_read_gradients_once_more():
    """In a launch for each way to reach elements. SMMF's matrices are vectors throughout, or not at all."""
    for op, launches in (("hfac_dense_step_", 1), ("smmf_dense_step_", 1), ("smmf_step_", 2)):
        run = made(cases([(5,), (40000,), (24, 16)]), op)
        run.step(run.grads(), clip=ONE, norm=True)
        plan = planned(run).step.plan()
        assert [launch["kernel"] for launch in plan if launch["phase"] == "squares"] == ["squares"] * launches
        assert not any(launch["conditional"] for launch in plan)
        alone = made(cases([(5,), (40000,), (24, 16)]), op)
        alone.step(alone.grads())
        steps = [launch["kernel"] for launch in plan if launch["phase"] == "step"]
        assert steps == [launch["kernel"] for launch in alone.call._call._plain.step.plan()]
        assert run.call._call._plain.table is None


def test_an_empty_list_has_statistics():
    run = made()
    empty = ops.OpCall("hfac_step_", [], {name: [] for name in calls.STATES["hfac_step_"]})
    inputs = empty.prepare([], **run.numbers)
    empty.apply(inputs, empty.statistics(inputs), ONE)
