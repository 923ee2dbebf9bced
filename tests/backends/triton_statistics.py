"""What only the Triton kernels have of clipped and watched steps, in Triton's interpreter: which kernels are launched,
and whose memory statistics are in. test_triton.py runs this file."""

import pytest
import torch
from hfac.triton_kernels import step, table
from suites import SEVERAL, SMALLER, Run

from hfac import spec

ONE = torch.tensor(1.0)
ZERO_ROWS = table.ZERO_ROWS.value


def made(these=SEVERAL[:1]):
    return Run("hfac_step_", these, "triton")


def test_what_is_launched(monkeypatch):
    """Nothing is added to a step that nobody asks for a norm."""
    names = []
    monkeypatch.setattr(step.Room, "_launch", lambda self, launch, tiles, options: names.append(launch.name))
    run = made()
    run.step(run.grads())
    assert names == ["hfac_stats", "hfac_fold", "hfac_scale", "hfac_update"]
    del names[:]
    inputs = run.call.prepare(run.grads(), **run.numbers)
    found = run.call.statistics(inputs)
    assert names == ["hfac_stats", "hfac_squares", "add_squares"]
    del names[:]
    run.call.apply(inputs, found, ONE)
    assert names == ["hfac_stats", "hfac_fold", "hfac_scale", "hfac_update"]
    empty = made(SEVERAL[-1:])
    assert empty.step(empty.grads(), clip=ONE, norm=True).sums.squares.tolist() == [0.0]


def test_statistics_own_their_memory():
    """Two threads may have some at a time, and each goes on with its own, once. Memory that nobody has any more serves
    the next."""
    run, twin = made(SEVERAL[:2]), made(SEVERAL[:2])
    grads, louder = run.grads(), [grad * 4 for grad in run.grads()]
    mine, theirs = (run.call.prepare(some, **run.numbers) for some in (grads, louder))
    found, others = run.call.statistics(mine), run.call.statistics(theirs)
    assert torch.allclose(others.norms, 4 * found.norms)
    for inputs, some in ((mine, grads), (theirs, louder)):  # the second time they are spent
        run.call.apply(inputs, found, ONE)
        twin.step(some)
        assert run.agrees(twin)
    del others, theirs
    kept = run.call.workspace_bytes()
    for _ in range(2):
        run.call.statistics(mine)
        assert run.call.workspace_bytes() == kept


def watched_of(run):
    return torch.zeros(len(run.params), spec.WATCHED, dtype=torch.float64)


def watched_step(run, grads, first, then):
    """A step whose statistics are told of ``first``, and that itself is told of ``then``."""
    before, after = (run.call.prepare(grads, watched=watched, **run.numbers) for watched in (first, then))
    run.call.apply(after, run.call.statistics(before), ONE)


def test_statistics_that_count_rows_are_not_taken_again(monkeypatch):
    """In the kernel's eyes: whether a program may leave where the coefficient is 1."""
    seen = []
    monkeypatch.setattr(step.Room, "_launch", lambda self, launch, tiles, options: seen.append(options["AGAIN"]))
    run = made()
    for first, then in ((None, None), (watched_of(run), None), (None, watched_of(run)), (watched_of(run),) * 2):
        inputs = run.call.prepare(run.grads(), watched=first, **run.numbers)
        found = run.call.statistics(inputs)
        del seen[:]
        run.call.apply(run.call.prepare(inputs.grads, watched=then, **run.numbers), found, ONE)
        assert set(seen) == {first is not None or then is None}


@pytest.mark.parametrize("told", [True, False])
def test_rows_are_counted_whether_statistics_are_told_or_not(told):
    """And what the workspace holds of an earlier step is not counted."""
    run, twin = made(SMALLER[:3]), made(SMALLER[:3])
    grads = run.grads()
    for grad in grads:
        grad[1] = 0
    watched, expected = watched_of(run), watched_of(run)
    watched_step(run, grads, watched if told else None, watched)
    twin.step(grads, watched=expected)
    assert run.agrees(twin) and torch.allclose(watched, expected, rtol=1e-12, atol=0)
    assert watched[:, ZERO_ROWS].all()
    full, watched = [grad.abs() + 1 for grad in grads], watched_of(run)
    watched_step(run, full, watched if told else None, watched)
    assert not watched[:, ZERO_ROWS:].any() and watched[:, 0].all()


def test_a_report_may_lie_across():
    """As a caller of the backend itself may have it."""
    found = []
    for watched in (torch.zeros(2, 5, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64).t()):
        run = made(SEVERAL[3:5])
        run.call._call(run.grads(), **run.numbers, watched=watched)
        found.append(watched)
    assert torch.equal(*found) and found[0].any()
