"""nonfinite="skip-step": a step that is made of all parameters or of none; sharded parameters are in test_sharded.py,
CUDA graphs in test_captures.py."""

import pytest
import torch
from running import Int8, bits, gradients, parameters
from torch import nn

import hfac
from hfac import SMMF, HFac

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
NAN, INF = float("nan"), float("inf")
SHAPES = [(4, 6), (5,), (3, 4, 5), (), (17, 19), (0, 3)]


def everything(params, optimizer, but=()):
    states = [{key: value for key, value in optimizer.state[p].items() if key not in but} for p in params]
    return bits([list(params), states])


def grouped(cls, params, **options):
    """The third is a stack, the second has whole moments."""
    groups = [
        {"params": [params[0], *params[3:]]},
        {"params": [params[1]], "dense": True},
        {"params": [params[2]], "batch_dims": 1, "lr": 0.005},
    ]
    return cls(groups, **{"lr": 0.02, "weight_decay": 0.1, "nonfinite": "skip-step", **options})


OPTIONS = {
    "plain": {},
    "limit": {"max_grad_norm": 0.5},
    "capturable": {"capturable": True},
    "stored": {"master": "split8", "rounding": "stochastic"},
    "watch": {"watch": True, "max_grad_norm": 0.5},
}


@BOTH
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bad", [NAN, INF, 3e38])
def test_no_bit_changes_and_the_next_step_is_as_if_there_had_been_none(cls, options, bad, backend):
    """Whichever parameter has the bad gradient: of the stack, or with whole moments."""
    dtype = torch.bfloat16 if options == "stored" else torch.float32
    ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    options = dict(OPTIONS[options], backend=backend)
    one, other = grouped(cls, ours, **options), grouped(cls, theirs, **options)
    for step in range(6):
        gradients(ours, step)
        if step in (1, 2, 4):
            ours[step].grad.view(-1)[-1] = bad
            before = everything(ours, one, ("skipped",))
            one.step()
            assert everything(ours, one, ("skipped",)) == before
            assert not one.grad_norm.isfinite() or one.grad_norm > 1e19
            continue
        gradients(theirs, step)
        one.step()
        other.step()
        assert everything(ours, one, ("skipped",)) == everything(theirs, other, ("skipped",))
    for param in ours:
        assert int(one.state[param]["skipped"]) == 3 and int(one.state[param]["step"]) == 3


@BOTH
def test_steps_that_are_made_have_the_bits_of_plain_ones(cls, backend):
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    one, other = grouped(cls, ours, backend=backend), grouped(cls, theirs, backend=backend, nonfinite="propagate")
    for step in range(4):
        for params in (ours, theirs):
            gradients(params, step)
            params[step].grad = None
        kept = bits([p.grad for p in ours])
        one.step()
        other.step()
        assert bits([p.grad for p in ours]) == kept
        wanted = nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
        assert one.grad_norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert bits(ours) == bits(theirs)
    for p, q in zip(ours, theirs, strict=True):
        mine = {key: value for key, value in one.state[p].items() if key != "skipped"}
        assert bits(mine) == bits(dict(other.state[q]))


@BOTH
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_under_a_grad_scaler(cls, amp_scaling, backend):
    """What the scaler forbids is not counted; gradients are left out by their unscaled norm."""
    params = parameters(SHAPES)
    optimizer = grouped(cls, params, amp_scaling=amp_scaling, backend=backend, max_grad_norm=2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        gradients(params, step)
        scale = float(scaler.scale(torch.ones(())))
        for param in params:
            param.grad *= scale
        if step == 2:
            params[0].grad[1, 1] = INF
            before = everything(params, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert everything(params, optimizer) == before
        else:
            assert 2 < optimizer.grad_norm < 100
    assert all(int(optimizer.state[p]["step"]) == 3 and int(optimizer.state[p]["skipped"]) == 0 for p in params)
    if amp_scaling:  # the scaler has found nothing, and yet
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.zeros(1)
        gradients(params, 0)
        params[2].grad[0, 0, 0] = NAN
        before = everything(params, optimizer, ("skipped",))
        optimizer.step()
        assert everything(params, optimizer, ("skipped",)) == before
        assert all(int(optimizer.state[p]["skipped"]) == 1 for p in params)


@BOTH
@pytest.mark.parametrize("watch", [False, True])
def test_diagnostics_of_a_step_that_was_skipped(cls, watch, backend):
    """Say that no parameter was stepped, before and after."""
    params = parameters([(4, 6), (5, 8)])
    optimizer = cls(params, nonfinite="skip-step", watch=watch, backend=backend)
    for step, bad in enumerate((0.0, NAN, 0.0)):
        gradients(params, step)
        params[0].grad[0, 0] += bad
        found = [optimizer.diagnostics(ahead=True)]
        optimizer.step()
        if watch or cls is not SMMF:
            found.append(optimizer.diagnostics())
        for each in found:
            assert bool(each[1]["update_rms"].isnan()) == (step == 1)
    assert int(found[-1][1]["skipped"]) == 1


@BOTH
def test_no_value_is_read_to_decide(cls, backend, monkeypatch):
    """Kernels that look at found_inf themselves are given the norm's verdict as a tensor."""
    if backend in ("reference", "cpu"):
        pytest.skip("these read what decides on the host")
    params = parameters([(4, 6), (5,)])
    optimizer = cls(params, nonfinite="skip-step", max_grad_norm=1.0, capturable=True, backend=backend)
    gradients(params, 0)
    optimizer.step()

    def read(self):
        raise AssertionError("a value was read")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    optimizer.step()


@BOTH
def test_all_groups_must_agree(cls):
    params = parameters([(4, 6), (5,)])
    pattern = r"nonfinite='skip-step' must be the same in every group, .* got \['skip-step', 'skip'\]"
    groups = [{"params": params[:1]}, {"params": params[1:], "nonfinite": "skip"}]
    with pytest.raises(ValueError, match=pattern):
        cls(groups, nonfinite="skip-step")
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], nonfinite="skip-step")
    with pytest.raises(ValueError, match=r"got \['skip-step', 'skip-step', 'propagate'\]"):
        optimizer.add_param_group({"params": parameters([(3,)]), "nonfinite": "propagate"})
    assert len(optimizer.param_groups) == 2
    gradients(params, 0)
    before = everything(params, optimizer)
    optimizer.param_groups[1]["nonfinite"] = "skip"
    with pytest.raises(ValueError, match=pattern):
        optimizer.step()
    assert everything(params, optimizer) == before
    saved = optimizer.state_dict()
    optimizer.param_groups[1]["nonfinite"] = "skip-step"
    with pytest.raises(ValueError, match=pattern):
        optimizer.load_state_dict(saved)


@BOTH
def test_the_option_can_be_turned_on_and_off_and_is_saved(cls):
    params = parameters([(4, 6), (5,)])
    optimizer = cls(params, lr=0.01)
    for step, how in enumerate(("propagate", "skip-step", "skip", "skip-step")):
        optimizer.param_groups[0]["nonfinite"] = how
        gradients(params, step)
        if how == "skip-step":
            params[0].grad[0, 0] = NAN
        optimizer.step()
    assert [int(optimizer.state[p]["skipped"]) for p in params] == [2, 2]
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2]
    fresh = cls(parameters([(4, 6), (5,)]))
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["nonfinite"] == "skip-step"
    assert bits(fresh.state_dict()["state"]) == bits(optimizer.state_dict()["state"])


@BOTH
def test_single_parameters_are_refused(cls):
    net = nn.Linear(4, 3)
    optimizer = cls(net.parameters(), nonfinite="skip-step")
    with pytest.raises(RuntimeError, match=r"nonfinite='skip-step' looks at all gradients .* nonfinite='skip'"):
        hfac.release_gradients(net, optimizer)
    net(torch.ones(2, 4)).sum().backward()
    before = everything(list(net.parameters()), optimizer)
    with pytest.raises(RuntimeError, match=r"step_param: nonfinite='skip-step' looks at all gradients .* call step"):
        optimizer.step_param(net.weight)
    assert everything(list(net.parameters()), optimizer) == before
