"""One norm of the gradients of several optimizers, and of the stages of a pipeline."""

import pytest
import torch
from running import bits, gradients, parameters
from sharded import on_ranks
from test_sharded import agree
from torch import nn

import hfac


def test_the_norm_of_stages_is_torchtitans_and_steps_clip_by_it():
    """Of sharded and plain parameters, of stacks and experts, with an optimizer for each part of the model; copies have
    the same bits, and it sends few numbers: two per parameter over each optimizer's mesh, one over the stages, and one
    along each mesh and group, twice."""
    ways = ("dtensors", "mixed", "experts", "absent", "limit", "skip-step")
    cases = [(how, backend) for how in ways for backend in ("reference", "cpu")]
    found, bits_apart, sent = on_ranks(
        4,
        ("sharded_pipeline:of_several", cases),
        ("sharded_pipeline:agree_to_the_bit",),
        ("sharded_pipeline:sent",),
    )
    agree(found, 1e-12)
    assert bits_apart == {"norm": 0.0}
    assert sent == [
        ("all_reduce", 2, 32),
        ("all_reduce", 2, 16),
        ("all_reduce", 2, 8),
        *[("broadcast", 2, 4)] * 4,
    ]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip-step"])
def test_two_optimizers_step_as_after_torchs_own(nonfinite, backend):
    ours, theirs = parameters(), parameters()
    made = [
        [hfac.HFac(p[:4], lr=0.02, **more), hfac.SMMF(p[4:], lr=0.02, **more)]
        for p, more in ((ours, {"nonfinite": nonfinite, "backend": backend}), (theirs, {"backend": backend}))
    ]
    for step in range(4):
        for params, optimizers in zip((ours, theirs), made, strict=True):
            gradients(params, step, scale=0.01 if step == 2 else 1.0)
            kept = bits([p.grad for p in params])
            if optimizers is made[0]:
                norm = hfac.clip_grad_norm_(optimizers, 1.0)
                assert bits([p.grad for p in params]) == kept
            else:
                wanted = nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in optimizers:
                optimizer.step()
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-6) and (norm < 1) == (step == 2)
        assert all(each.grad_norm == norm for each in made[0])
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 1e-5 * q.abs().max()
    before = bits(ours)
    gradients(ours, 9)
    ours[6].grad[0, 0] = float("nan")
    assert hfac.clip_grad_norm_(made[0], 1.0).isnan()
    if nonfinite == "skip-step":
        for optimizer in made[0]:
            optimizer.step()
        assert bits(ours) == before and all(int(o.state[p]["skipped"]) == 1 for o in made[0] for p in o.state)


def test_a_step_clips_once_by_what_was_found():
    ours, theirs = parameters([(4, 6)]), parameters([(4, 6)])
    one, other = hfac.SMMF(ours), hfac.SMMF(theirs)
    for step in range(2):
        gradients(ours, step)
        gradients(theirs, step)
        if step == 0:
            hfac.clip_grad_norm_(one, 0.1)
            nn.utils.clip_grad_norm_(theirs, 0.1)
        one.step()
        other.step()
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6)
    assert one.grad_norm is None
    one.zero_grad()
    assert hfac.clip_grad_norm_(one, 0.1) == 0


def test_what_is_refused():
    params = parameters([(4, 6), (5,)])
    optimizer, limited = hfac.HFac(params[:1]), hfac.HFac(params[1:], max_grad_norm=1.0)
    skips = hfac.SMMF(params[1:], nonfinite="skip-step")
    gradients(params, 0)
    for given, limit, more, error, pattern in (
        ([optimizer, limited], 1.0, {}, ValueError, r"max_grad_norm=1\.0, .* clip\s+once more"),
        ([optimizer, skips], 1.0, {}, ValueError, r"'skip-step' must be the same in all optimizers"),
        ([optimizer, optimizer], 1.0, {}, ValueError, r"one or more different optimizers"),
        ([], 1.0, {}, ValueError, r"one or more different optimizers are required, got 0"),
        (params, 1.0, {}, TypeError, r"must be hfac.HFac and hfac.SMMF, got Parameter.*torch.nn.utils"),
        (optimizer, 0.0, {}, ValueError, r"max_norm must be a number in \(0, inf\), got 0.0"),
        (optimizer, 1.0, {"norm_group": "world"}, TypeError, r"norm_group must be .*, got 'world'"),
    ):
        with pytest.raises(error, match=pattern):
            hfac.clip_grad_norm_(given, limit, **more)
    assert optimizer._given_norm is None
