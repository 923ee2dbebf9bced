"""SMMF(signs="bytes"): signs in bytes, of which each step makes bits. To the bit what signs in bits give."""

import copy

import pytest
import torch
from running import bits, gradients, parameters, train
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import SMMF, signs

SHAPES = [(4, 6), (5,), (3, 2, 4), (), (1, 3), (7, 5), (17, 19), (12,), (0, 4), (2, 3, 3, 3)]
OPTIONS = {
    "plain": {},
    "no-first": {"beta": None},
    "vectors": {"vector_reshape": False},
    "limit": {"max_grad_norm": 0.5, "watch": True},
    "skip": {"nonfinite": "skip"},
    "skip-step": {"nonfinite": "skip-step"},
    "capturable": {"capturable": True},
    "stored": {"master": "split8", "rounding": "stochastic"},
    "stacks": {"batch_dims": 1},
    "views": {"views": 2},
}


def as_bits(param, state, dims=0):
    kept = state["exp_avg_sign"]
    assert kept.dtype == torch.bool and kept.shape == param.shape
    return signs.to_bits(kept, dims)


def agree(one, ours, other, theirs, dims=0):
    """Parameters, and states but for how signs are kept."""
    assert bits(ours) == bits(theirs)
    for p, q in zip(ours, theirs, strict=True):
        found, wanted = dict(one.state[p]), dict(other.state[q])
        if "exp_avg_sign" in wanted:
            assert bits(as_bits(p, found, dims)) == bits(wanted.pop("exp_avg_sign"))
            del found["exp_avg_sign"]
        assert bits(found) == bits(wanted)


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_are_those_of_bits(options, backend, monkeypatch):
    monkeypatch.setattr(signs, "TOGETHER", 7)  # in pieces of several slices, and of one that is larger
    dtype = torch.bfloat16 if options == "stored" else torch.float32
    chosen, dims = SHAPES, OPTIONS[options].get("batch_dims", 0)
    if options in ("stacks", "views"):
        chosen = [(4, 6), (6, 3, 5), (2, 2, 3, 3), (8,), (4, 0, 3)][: -1 if options == "stacks" else None]
        chosen = [shape for shape in chosen if len(shape) > dims]
    ours, theirs = parameters(chosen, dtype), parameters(chosen, dtype)
    more = dict(lr=0.02, weight_decay=0.1, backend=backend, **OPTIONS[options])
    one, other = SMMF(ours, signs="bytes", **more), SMMF(theirs, **more)
    for step in range(4):
        for params in (ours, theirs):
            gradients(params, step)
            if step == 2 and options.startswith("skip"):
                params[0].grad[1, 2] = float("nan")
            if step == 1:
                params[1].grad = None
        one.step()
        other.step()
        if options == "plain" and step == 1:
            one.state[ours[0]]["exp_avg_sign"].data = one.state[ours[0]]["exp_avg_sign"].data.clone()  # it has moved
    agree(one, ours, other, theirs, dims)
    if options == "limit":
        assert bits(dict(one.diagnostics())) == bits(dict(other.diagnostics()))
        assert bits(dict(one.diagnostics(ahead=True))) == bits(dict(other.diagnostics(ahead=True)))


@pytest.mark.parametrize("given", ["bytes", "bits"])
def test_loading_converts_and_training_goes_on_unchanged(given):
    wanted = {"bytes": "bits", "bits": "bytes"}[given]
    params, unbroken = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = SMMF(params, lr=0.02, signs=given), SMMF(unbroken, lr=0.02, signs=wanted)
    train(optimizer, params, 3)
    train(other, unbroken, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["signs"] == given
    resumed = SMMF(params, lr=0.02, signs=wanted)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["signs"] == wanted
    train(resumed, params, 2, start=3)
    assert bits(params) == bits(unbroken)
    assert [bits(resumed.state[p]) for p in params] == [bits(other.state[p]) for p in unbroken]


@pytest.mark.parametrize("options", [{}, {"batch_dims": 1}, {"views": 2}], ids=str)
def test_converting_state_dicts_either_way(options):
    params = parameters([(4, 6), (6, 3, 5)])
    kept = {mode: SMMF(params, lr=0.02, signs=mode, **options) for mode in ("bits", "bytes")}
    train(kept["bits"], params, 2)
    kept["bytes"].load_state_dict(kept["bits"].state_dict())
    for mode, optimizer in kept.items():
        saved = optimizer.state_dict()
        for wanted in kept:
            found = hfac.convert(saved, params, to="smmf", signs=wanted, **options)
            assert found["param_groups"][0]["signs"] == wanted
            for i, param in enumerate(params):
                mine = kept[wanted].state[param]["exp_avg_sign"]
                assert bits(found["state"][i]["exp_avg_sign"]) == bits(mine), (mode, wanted)
        assert hfac.convert(saved, params, to="smmf")["param_groups"][0]["signs"] == mode
        if mode == "bytes":  # which tell the parameters' shapes
            assert bits(hfac.convert(saved, to="smmf")["state"]) == bits(
                hfac.convert(saved, params, to="smmf")["state"]
            )
    adamw = torch.optim.AdamW(params)
    adamw.step()
    with pytest.raises(ValueError, match=r"hfac\.convert\(state_dict, params, to='smmf', signs='bytes'\) translates"):
        SMMF(params, signs="bytes").load_state_dict(adamw.state_dict())


def test_a_group_of_its_own_added_later_and_copies():
    params, same = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = SMMF(params[:4], lr=0.02), SMMF(same, lr=0.02)
    optimizer.add_param_group({"params": params[4:], "signs": "bytes"})
    train(optimizer, params, 2)
    optimizer = copy.deepcopy(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    train(optimizer, params, 2, start=2)
    train(other, same, 4)
    assert bits(params) == bits(same)
    assert optimizer.state[params[0]]["exp_avg_sign"].dtype == torch.uint8
    assert optimizer.state[params[5]]["exp_avg_sign"].dtype == torch.bool


def test_optimizers_of_earlier_versions_have_bits():
    params = parameters()
    optimizer = SMMF(params)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["signs"]
    target = SMMF(params, signs="bytes")
    target.load_state_dict(saved)
    assert target.param_groups[0]["signs"] == "bytes"
    optimizer.defaults.pop("signs")
    optimizer.param_groups[0].pop("signs")
    again = copy.deepcopy(optimizer)
    assert again.defaults["signs"] == again.param_groups[0]["signs"] == "bits"


def test_released_in_the_backward_pass():
    found = []
    for mode in ("bits", "bytes"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = SMMF(model.parameters(), lr=0.02, signs=mode)
        with hfac.release_gradients(model, optimizer):
            for _ in range(3):
                model(torch.ones(2, 6)).square().sum().backward()
                optimizer.step()
        found.append(bits(list(model.parameters())))
    assert found[0] == found[1]


def test_functional_form_takes_bytes():
    param, grad = Parameter(torch.ones(4, 6)), torch.arange(24.0).view(4, 6) - 11
    state = dict(SMMF([param], signs="bytes").state[param])
    lists = [[state[f"exp_avg_{key}"]] for key in ("row", "col", "sign", "sq_row", "sq_col")]
    options = dict(lr=0.1, beta=0.9, eps=1e-8, weight_decay=0.0, decay_rate=-0.5, growth_rate=0.999)
    with torch.no_grad():
        hfac.functional.smmf([param], [grad], *lists, [None], [None], [state["step"]], **options)
    assert torch.equal(state["exp_avg_sign"], grad > 0)


def test_memory_kept_beside_the_bytes_is_told():
    params = parameters([(64, 32), (100, 10)])
    optimizer = SMMF(params, signs="bytes", backend="cpu")
    gradients(params, 0)
    optimizer.step()
    assert optimizer.workspace_bytes() == 64 * 32 // 8 + 100 * 2
    plain = SMMF(params, backend="cpu")
    plain.step()
    assert plain.workspace_bytes() == 0


def test_what_is_refused():
    params = parameters([(4, 6)])
    with pytest.raises(ValueError, match=r"SMMF: signs must be one of 'bits', 'bytes', got 'bool'"):
        SMMF(params, signs="bool")
    optimizer = SMMF(params, signs="bytes")
    saved = optimizer.state_dict()
    for wrong, told in (
        (torch.zeros(4, 6, dtype=torch.int8), r"'exp_avg_sign' must be torch.bool, got torch.int8"),
        (torch.zeros(6, 4, dtype=torch.bool), r"'exp_avg_sign' must have shape \(4, 6\), got \(6, 4\)"),
        (torch.zeros(4, 2, dtype=torch.uint8), r"'exp_avg_sign' must have shape \(4, 6\), got \(4, 2\)"),
    ):
        damaged = copy.deepcopy(saved)
        damaged["state"][0]["exp_avg_sign"] = wrong
        with pytest.raises(ValueError, match=told):
            optimizer.load_state_dict(damaged)
    state = dict(optimizer.state[params[0]])
    lists = [[state[f"exp_avg_{key}"]] for key in ("row", "col", "sign", "sq_row", "sq_col")]
    options = dict(lr=0.1, beta=0.9, eps=1e-8, weight_decay=0.0, decay_rate=-0.5, growth_rate=0.999)
    for wrong, told in (
        (torch.zeros(4, 5, dtype=torch.bool), r"exp_avg_signs\[0\], signs in bytes, must have its parameter's shape"),
        (torch.zeros(6, 4, dtype=torch.bool).T, r"exp_avg_signs\[0\] must be contiguous"),
    ):
        lists[2] = [wrong]
        with pytest.raises(ValueError, match=told), torch.no_grad():
            hfac.functional.smmf(params, [torch.ones(4, 6)], *lists, [None], [None], [state["step"]], **options)
    assert int(state["step"]) == 0 and not params[0].isnan().any()
