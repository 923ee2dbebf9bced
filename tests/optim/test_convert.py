"""hfac.convert: the state that it makes against the state that the target itself would have, and trainings that switch.

H-Fac's state is linear in the gradients, so from Adam it is the same to rounding whatever the gradients were; SMMF's is
the same where nothing depends on the order of compression: see docs/convert.md.
"""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import gradient, shape_id
from running import SHAPES, bits, gradients, parameters, train
from subclasses import Codes
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import SMMF, HFac, matricize, param_groups
from hfac.signs import unpack_signs

EXACT = dict(rtol=1e-10, atol=1e-13)  # float64 against float64, along another order of the same sums
SHAPES4 = [*SHAPES, (2, 3, 5, 4), (0, 5)]
ADAM = pytest.mark.parametrize("source", [torch.optim.Adam, torch.optim.AdamW], ids=["adam", "adamw"])
TO = pytest.mark.parametrize(("to", "cls"), [("hfac", HFac), ("smmf", SMMF)], ids=["hfac", "smmf"])


def through_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def ran(optimizer_of, steps=7, dtype=torch.float64, shapes=SHAPES4, grads=gradients):
    """An optimizer after some steps whose gradients do not depend on the parameters."""
    params = parameters(shapes, dtype)
    optimizer = optimizer_of(params)
    for step in range(steps):
        grads(params, step)
        optimizer.step()
    return optimizer, params


def constant(params, step):
    """The same gradient in every step."""
    gradients(params, 0)


def assert_states(loaded, expected, tolerance=EXACT, only=lambda key: True):
    ours, theirs = loaded.state_dict()["state"], expected.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in theirs.items():
        assert ours[index].keys() == state.keys()
        for key, value in state.items():
            if only(key):
                torch.testing.assert_close(ours[index][key], value, **tolerance, msg=lambda m: f"{index} {key}: {m}")  # noqa: B023


def loaded(cls, converted, params=None, dtype=torch.float64, shapes=SHAPES4, **options):
    optimizer = cls(parameters(shapes, dtype) if params is None else params, **options)
    optimizer.load_state_dict(through_file(converted))
    return optimizer


@ADAM
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"foreach": False}, {"matricize": "flatten"}], ids=str)
def test_adam_to_hfac_is_the_state_that_hfac_would_have(source, options):
    """H-Fac's decays b_t = b (1 - b^(t-1)) / (1 - b^t) average what Adam divides by 1 - b^t; sums are linear."""
    betas, eps = (0.8, 0.95), 1e-3
    mine = {name: value for name, value in options.items() if name in ("maximize", "matricize")}
    theirs = {name: value for name, value in options.items() if name != "matricize"}
    adam, _ = ran(lambda params: source(params, betas=betas, **theirs))
    expected, _ = ran(lambda params: HFac(params, betas=betas, eps=eps, **mine))
    options = {name: value for name, value in mine.items() if name == "matricize"}
    converted = hfac.convert(adam.state_dict(), eps=eps, **options)
    assert_states(loaded(HFac, converted), expected)


def test_adam_to_hfac_goes_on_as_hfac_would():
    adam, _ = ran(lambda params: torch.optim.AdamW(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1))
    expected, params = ran(lambda params: HFac(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1))
    others = [Parameter(param.detach().clone()) for param in params]
    optimizer = loaded(HFac, hfac.convert(adam.state_dict()), others)
    train(expected, params, 3, start=7)
    train(optimizer, others, 3, start=7)
    torch.testing.assert_close(others, params, **EXACT)
    assert_states(optimizer, expected)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_adam_to_smmf_under_a_constant_gradient(steps):
    """Averages of weight 1 are then the gradient and its square whatever the decays; SMMF's first moment has the weight
    1 - prod b1t after its start from zero, its second 1, because its first decay is 0."""
    options = dict(beta=0.8, growth_rate=0.9)
    adam, _ = ran(lambda params: torch.optim.AdamW(params, betas=(0.8, 0.95)), steps, grads=constant)
    expected, _ = ran(lambda params: SMMF(params, **options), steps, grads=constant)
    assert_states(loaded(SMMF, hfac.convert(adam.state_dict(), to="smmf", growth_rate=0.9)), expected)


@TO
def test_adafactor_keeps_the_second_moment(to, cls):
    """Row and column sums of the same average where the decays are the same; constant gradients for H-Fac, whose are
    not. (24, 18) is its own square matrix, and its last two dimensions are all it has."""
    shapes = [(24, 18), (7,), (12,)]
    grads = constant if to == "hfac" else gradients
    adafactor, _ = ran(lambda params: torch.optim.Adafactor(params, beta2_decay=-0.7), shapes=shapes, grads=grads)
    own = {} if to == "hfac" else {"decay_rate": -0.7}
    expected, _ = ran(lambda params: cls(params, **own), shapes=shapes, grads=grads)
    optimizer = loaded(cls, hfac.convert(adafactor.state_dict(), to=to), shapes=shapes)
    # a vector of 12 is 4 x 3 in SMMF, whole in Adafactor: row and column sums all the same
    assert_states(optimizer, expected, only=lambda key: key.startswith("exp_avg_sq") or key == "step")
    firsts = [v for s in optimizer.state.values() for k, v in s.items() if "exp_avg" in k and "sq" not in k]
    assert firsts and not any(value.any() for value in firsts)


def test_adafactor_of_more_dimensions():
    """torch factors the last two dimensions, for each index of the others; we cut once."""
    (grad,) = [gradient((3, 4, 5), 1)]
    param = Parameter(torch.ones(3, 4, 5, dtype=torch.float64))
    adafactor = torch.optim.Adafactor([param])
    for _ in range(2):
        param.grad = grad
        adafactor.step()
    state = hfac.convert(adafactor.state_dict(), eps=1e-20)["state"][0]
    sq = grad**2
    estimate = sq.mean(2, keepdim=True) * sq.mean(1, keepdim=True) / sq.mean((1, 2), keepdim=True)
    torch.testing.assert_close(state["exp_avg_sq_row"], estimate.reshape(12, 5).sum(1).reshape(3, 4))
    torch.testing.assert_close(state["exp_avg_sq_col"], estimate.reshape(12, 5).sum(0))


DATA = Path(__file__).parents[1] / "data"
CASES = [case for case in json.loads((DATA / "published.json").read_text()) if case["optimizer"] == "SMMF"]
ARRAYS = np.load(DATA / "published.npz")
PUBLISHED_OPTIONS = dict(beta=0.9, eps=1e-8, weight_decay=0.0, decay_rate=-0.5, growth_rate=0.999, vector_reshape=True)


def arrays(case):
    prefix = case["key"] + "_"
    return {n.removeprefix(prefix): torch.from_numpy(ARRAYS[n]) for n in ARRAYS.files if n.startswith(prefix)}


def published_state_dict(case, entry):
    group = {"lr": 1e-3, **PUBLISHED_OPTIONS, **case["kwargs"], "params": [0]}
    mode = group.pop("weight_decay_mode", None)  # the authors keep it beside the groups
    if mode == "adam":
        group["weight_decay"] = 0.0  # and do not use the gradient that it makes
    return {"state": {0: entry}, "param_groups": [group]}


def recorded(case, data):
    """The authors' state after step 6 as their optimizer holds it: pairs, and a step that counts the one to come."""
    entry = {"step": 7.0}
    for moment in ("momentum_m", "momentum_v"):
        if f"{moment}_row" in data:
            entry[moment] = (data[f"{moment}_row"], data[f"{moment}_col"])
        elif moment in data:
            entry[moment] = data[moment].reshape(case["shape"])
    if isinstance(entry["momentum_v"], tuple):
        entry["effective_shape"] = tuple(len(factor) for factor in entry["momentum_v"])
        if "sign" in data:
            entry["sign"] = data["sign"].bool().reshape(entry["effective_shape"])
    return entry


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['key']}-{'x'.join(map(str, case['shape']))}")
def test_published_trajectory_goes_on(case):
    """Six recorded steps by the authors' code, and six of ours after the conversion: as twelve of ours."""
    data = arrays(case)
    decay = {"weight_decay": 0.0} if case["kwargs"].get("weight_decay_mode") == "adam" else {}
    param, other = Parameter(data["w0"].double()), Parameter(data["w"][2].double())
    ours = SMMF([param], **{**case["kwargs"], **decay})
    grads = data["g"].double()
    for grad in grads:
        param.grad = grad
        ours.step()
    source = published_state_dict(case, recorded(case, data))
    before = bits(source)
    optimizer = SMMF([other])
    optimizer.load_state_dict(through_file(hfac.convert(source, [other], to="smmf")))
    assert bits(source) == before
    assert_states(optimizer, ours)
    for grad in grads:
        param.grad, other.grad = grad, grad.clone()
        ours.step(), optimizer.step()
    torch.testing.assert_close(other, param, **EXACT)
    assert_states(optimizer, ours)


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case["key"])
def test_published_state_in_the_middle(case):
    """From step 4 on: the weights that the authors' code recorded after step 6."""
    data = arrays(case)
    param = Parameter(data["w0"].double())
    ours = SMMF([param], **case["kwargs"])
    for grad in data["g"][:4].double():
        param.grad = grad
        ours.step()
    state = ours.state[param]
    n, m = matricize.square(param.numel())
    entry = {"step": 5.0, "effective_shape": (n, m)}
    entry["momentum_v"] = (state["exp_avg_sq_row"], state["exp_avg_sq_col"])
    if "exp_avg_row" in state:
        entry["momentum_m"] = (state["exp_avg_row"], state["exp_avg_col"])
        # as torch's loading leaves it: cast to the parameter's type
        entry["sign"] = unpack_signs(state["exp_avg_sign"], param.shape).reshape(n, m).double()
    optimizer = SMMF([param])
    optimizer.load_state_dict(hfac.convert(published_state_dict(case, entry), [param], to="smmf"))
    for grad in data["g"][4:].double():
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), data["w"][2], rtol=0, atol=1e-10 * float(data["w"][2].abs().max()))


def test_published_to_hfac():
    """By reconstruction: means and sums of the matrices that the factors stand for, at weight 1."""
    case = CASES[0]
    data = arrays(case)
    n, m = case["shape"]  # is its own square matrix
    entry = recorded(case, data)
    state = hfac.convert(published_state_dict(case, entry), [torch.empty(n, m)], eps=1e-20)["state"][0]
    M = torch.where(entry["sign"], 1.0, -1.0) * torch.outer(*entry["momentum_m"])
    M = M / (1 - np.prod([0.9 * 0.999**i for i in range(6)]))
    V = torch.outer(*entry["momentum_v"])
    expected = {"exp_avg_row": M.mean(1), "exp_avg_col": M.mean(0), "exp_avg_sq_row": V.sum(1), "step": torch.tensor(6)}
    for key, value in {**expected, "exp_avg_sq_col": V.sum(0)}.items():
        torch.testing.assert_close(state[key], value.float(), rtol=1e-5, atol=1e-7)


def test_published_first_moment_that_averages_nothing():
    """beta = 1, which the authors allow: the moment stays zero, and so does ours."""
    entry = {"step": 3.0, "momentum_m": torch.zeros(4, 6), "momentum_v": torch.ones(4, 6)}
    case = {"kwargs": dict(beta=1.0, growth_rate=1.0)}
    state = hfac.convert(published_state_dict(case, entry))["state"][0]
    assert not state["exp_avg_row"].any() and not state["exp_avg_col"].any()
    assert torch.equal(state["exp_avg_sq_row"], torch.full((4,), 6.0))


@TO
def test_to_itself(to, cls):
    own = dict(betas=(0.8, 0.95), eps=1e-6) if to == "hfac" else dict(beta=0.8, growth_rate=0.9, decay_rate=-0.8)
    optimizer, params = ran(lambda params: cls(params, lr=0.02, **own, nonfinite="skip"))
    optimizer.state[params[0]]["skipped"] += 3
    other = loaded(cls, hfac.convert(optimizer.state_dict(), params, to=to))
    assert_states(other, optimizer)
    drop = {"params", "backend"}
    assert [{k: v for k, v in g.items() if k not in drop} for g in other.param_groups] == [
        {k: v for k, v in g.items() if k not in drop} for g in optimizer.param_groups
    ]


def test_hfac_to_smmf_and_back_keeps_the_second_moment():
    """Both keep row and column sums; where they have the same matrix these survive, at any number of turns."""
    shapes = [(24, 18), (7,)]
    start, params = ran(lambda params: HFac(params, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1), shapes=shapes)
    there = hfac.convert(start.state_dict(), to="smmf")
    assert there["param_groups"][0]["beta"] == 0.8 and there["param_groups"][0]["lr"] == 0.02
    assert not there["state"][0].keys() & start.state[params[0]].keys() - {
        *("step", "exp_avg_row", "exp_avg_col", "exp_avg_sq_row", "exp_avg_sq_col")
    }
    back = loaded(HFac, hfac.convert(there, params, betas=(0.8, 0.95)), shapes=shapes)
    assert_states(back, start, only=lambda key: key.startswith("exp_avg_sq") or key == "step")
    M = (start.state[params[0]]["exp_avg_row"][:, None] + start.state[params[0]]["exp_avg_col"]).double()
    M = M - start.state[params[0]]["exp_avg_col"].mean()
    signs = unpack_signs(there["state"][0]["exp_avg_sign"], (24, 18))
    assert torch.equal(signs, M > 0)
    scaled = M.abs().sum(1) * (1 - np.prod([0.8 * 0.999**i for i in range(7)]))
    torch.testing.assert_close(there["state"][0]["exp_avg_row"], scaled.to(there["state"][0]["exp_avg_row"].dtype))


@pytest.mark.parametrize("options", [{"vector_reshape": False}, {"beta": None}], ids=str)
def test_options_that_give_another_state(options):
    """SMMF to SMMF with another layout, without training anew."""
    source, params = ran(lambda params: SMMF(params), grads=constant)
    expected, _ = ran(lambda params: SMMF(params, **options), grads=constant)
    other = loaded(SMMF, hfac.convert(source.state_dict(), params, to="smmf", **options), **options)
    assert [s.keys() for s in other.state.values()] == [s.keys() for s in expected.state.values()]
    for key in ("exp_avg_sq_row", "step"):
        torch.testing.assert_close(other.state_dict()["state"][0][key], expected.state_dict()["state"][0][key])


STACKS = {1: [(3, 4, 6), (2, 5), (4, 3, 2, 4), (2, 1, 7), (2, 0, 5), (0, 4, 3)], 2: [(2, 3, 4, 6), (3, 2, 5)]}
SOURCES = {"adam": torch.optim.AdamW, "hfac": HFac, "smmf": SMMF}


def stacked(cls, batch, **options):
    """An optimizer of stacks after some steps, and one of their slices, with the parameters of both."""
    stacks = parameters(STACKS[batch])
    singles = [[Parameter(part.clone()) for part in stack.detach().flatten(0, batch - 1)] for stack in stacks]
    one = cls(stacks, **options, **({} if cls is torch.optim.AdamW else {"batch_dims": batch}))
    other = cls([part for parts in singles for part in parts], **options)
    for step in range(3):
        gradients(stacks, step)
        for stack, parts in zip(stacks, singles, strict=True):
            for part, grad in zip(parts, stack.grad.flatten(0, batch - 1), strict=True):
                part.grad = grad.clone()
        one.step(), other.step()
    return one, stacks, other, singles


@TO
@pytest.mark.parametrize("batch", STACKS)
@pytest.mark.parametrize("source", SOURCES)
def test_stacks_are_converted_slice_by_slice(to, cls, batch, source):
    """To the last bit what the slices give as parameters of their own; and the optimizer takes it."""
    one, stacks, other, singles = stacked(SOURCES[source], batch)
    more = {"batch_dims": batch} if source == "adam" else {}  # else carried over
    told = None if source != "smmf" else stacks
    converted = hfac.convert(one.state_dict(), told, to=to, **more)
    expected = hfac.convert(other.state_dict(), None if told is None else [p for s in singles for p in s], to=to)
    alone = iter(expected["state"].values())
    assert converted["param_groups"][0]["batch_dims"] == batch and list(converted["state"]) == list(range(len(stacks)))
    for index, (stack, parts) in enumerate(zip(stacks, singles, strict=True)):
        state = converted["state"][index]
        assert float(state["step"]) == 3.0
        for i, _ in enumerate(parts):
            entry = next(alone)
            assert state.keys() == entry.keys()
            for key in entry.keys() - {"step"}:
                assert bits(state[key].flatten(0, batch - 1)[i]) == bits(entry[key]), (index, key)
        assert stack.numel() == 0 or any(state[key].any() for key in state if key.startswith("exp_avg_sq"))
    optimizer = loaded(cls, converted, stacks)
    train(optimizer, stacks, 1)
    assert optimizer.param_groups[0]["batch_dims"] == batch


def test_other_slices():
    """From none to some and back: what is known of the source is cut anew."""
    one, _, _, _ = stacked(HFac, 1, dense=True)
    whole = hfac.convert(one.state_dict(), batch_dims=0)
    assert whole["param_groups"][0]["dense"] and whole["param_groups"][0]["batch_dims"] == 0
    state = hfac.convert(one.state_dict(), dense=False, eps=1e-20)["state"][0]
    torch.testing.assert_close(state["exp_avg_row"], whole["state"][0]["exp_avg"].mean(2))
    torch.testing.assert_close(state["exp_avg_sq_col"], whole["state"][0]["exp_avg_sq"].sum(1))
    state = hfac.convert(whole, dense=False, batch_dims=0)["state"][0]
    torch.testing.assert_close(state["exp_avg_sq_col"], whole["state"][0]["exp_avg_sq"].sum((0, 1)))


@TO
def test_stacks_without_state(to, cls):
    """Nothing tells their dimensions, and nobody asks."""
    params = parameters([(3, 4, 6), (2, 5, 4)])
    adam = torch.optim.AdamW(params)
    gradients(params[1:], 0)
    adam.step()
    converted = hfac.convert(adam.state_dict(), to=to, batch_dims="1")
    loaded(cls, converted, params)
    assert list(converted["state"]) == [1]


@pytest.mark.parametrize("start", [torch.optim.AdamW, lambda params, **more: HFac(params, eps=1e-6, **more)])
def test_whole_moments(start):
    """dense=True: exact from Adam and from dense H-Fac, which factors itself exactly when asked to."""
    betas = dict(betas=(0.8, 0.95))
    dense = {"dense": True} if start is not torch.optim.AdamW else {}
    source, params = ran(lambda params: start(params, **betas, **dense))
    for more in ({"dense": True}, {"dense": False}):
        expected, _ = ran(lambda params: HFac(params, eps=1e-6, **betas, **more))  # noqa: B023
        assert_states(loaded(HFac, hfac.convert(source.state_dict(), eps=1e-6, **more)), expected)
    source, _ = ran(lambda params: start(params, **betas, **dense), grads=constant)
    expected, _ = ran(lambda params: SMMF(params, beta=0.8, dense=True), grads=constant)
    converted = hfac.convert(source.state_dict(), to="smmf", dense=True)
    assert_states(loaded(SMMF, converted), expected)
    assert_states(loaded(SMMF, hfac.convert(converted, params, to="smmf")), expected)  # carried over


def low_dict(master, **options):
    """Of a bfloat16 stack and a vector in float32, and the optimizer."""
    params = [*parameters([(3, 4, 6)], torch.bfloat16), *parameters([(2, 5)])]
    optimizer = HFac(params, lr=1e-3, batch_dims=1, master=master, **options)
    train(optimizer, params, 2)
    return optimizer, params


@TO
@pytest.mark.parametrize("master", ["split", "split8"])
def test_master_weights_are_carried_over(to, cls, master):
    """With all options of theirs, with and without parameters, by bits."""
    source, params = low_dict(master, rounding="stochastic", seed=5)
    low = source.state[params[0]]["master_low"]
    assert low.any()
    before = bits(source.state_dict())
    for given in (None, params):
        converted = hfac.convert(source.state_dict(), given, to=to)
        assert bits(converted["state"][0]["master_low"]) == bits(low) and "master_low" not in converted["state"][1]
        converted["state"][0]["master_low"].add_(1)
        assert bits(source.state_dict()) == before
        converted["state"][0]["master_low"].sub_(1)
    optimizer = cls(params)
    optimizer.load_state_dict(through_file(converted))
    group = optimizer.param_groups[0]
    assert (group["master"], group["rounding"], group["seed"], group["batch_dims"]) == (master, "stochastic", 5, 1)
    assert bits(optimizer.state[params[0]]["master_low"]) == bits(low)
    weights = optimizer._fp32(params[0])
    assert bits(weights) == bits(source._fp32(params[0]))
    train(optimizer, params, 1)
    assert not torch.equal(optimizer._fp32(params[0]), weights)


@pytest.mark.parametrize(
    ("target", "wide"), [({"master": None}, False), ({"master": "split8"}, False), ({}, True)], ids=str
)
def test_master_weights_that_are_left_out(target, wide):
    """Another piece, none, or parameters that need none: said once, and what is loaded is what the optimizer makes."""
    source, params = low_dict("split")
    params = [Parameter(param.detach().float()) for param in params] if wide else params
    with pytest.warns(UserWarning, match=r"master_low of 1 parameter.*first being 0.*load_fp32_state_dict") as said:
        converted = hfac.convert(source.state_dict(), params, **target)
    assert len(said) == 1 and said[0].filename == __file__
    optimizer = HFac(params)
    optimizer.load_state_dict(converted)
    low = converted["state"][0].get("master_low")
    assert (low is None) == (target.get("master") is None)
    assert low is None or (low.dtype == torch.int8 and not low.any())


@TO
@pytest.mark.parametrize(("master", "dtype"), [("split", torch.int16), ("split8", torch.int8)])
def test_new_master_weights(to, cls, master, dtype):
    """Nothing is known below the bfloat16 that the parameter is; others have none."""
    params = [*parameters([(4, 6)], torch.bfloat16), *parameters([(5,)])]
    adam = torch.optim.AdamW(params)
    train(adam, params, 2)
    converted = hfac.convert(adam.state_dict(), params, to=to, master=master)
    low = converted["state"][0]["master_low"]
    assert low.dtype == dtype and low.shape == (4, 6) and not low.any()
    assert "master_low" not in converted["state"][1]
    optimizer = loaded(cls, converted, params)
    before = params[0].detach().float()
    assert bits(optimizer._fp32(params[0])) == bits(before)
    train(optimizer, params, 1)
    assert optimizer.state[params[0]]["master_low"].any()


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6))
    x = torch.randn(256, 12)
    return model, x, torch.sin(x @ torch.randn(12, 6))


def descend(optimizer, model, x, y, steps):
    """The loss before every step, and the RMS of each parameter's change in the first and the last one."""
    losses, changes = [], []
    for _ in range(steps):
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        squares = [(p.detach() - b).square().mean() for p, b in zip(model.parameters(), before, strict=True)]
        changes.append(torch.stack(squares).sqrt())
    return losses, changes[0], changes[-1]


@TO
@pytest.mark.parametrize("source", ["adamw", "adafactor"])
def test_training_goes_on(to, cls, source):
    """The first change after the switch has the size of AdamW's last one, within a factor of 2, and the loss falls
    on, by two thirds or more of what AdamW would gain; after Adafactor, without a first moment, changes are smaller."""
    model, x, y = problem()
    kinds = {
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.03),
    }
    optimizer = kinds[source](model)
    losses, _, last = descend(optimizer, model, x, y, 60)
    converted = hfac.convert(optimizer.state_dict(), to=to, **({} if source == "adamw" else {"lr": 1e-2}))
    stayed = copy.deepcopy(model)
    switched, staying = cls(model.parameters()), torch.optim.AdamW(stayed.parameters())
    switched.load_state_dict(through_file(converted))
    assert switched.param_groups[0]["lr"] == 1e-2
    after, first, _ = descend(switched, model, x, y, 60)
    assert max(after) == after[0] < losses[-1]  # no spike
    if source == "adafactor":
        assert (first < 2 * last).all() and after[-1] < 0.8 * after[0]
        return
    staying.load_state_dict(optimizer.state_dict())
    unswitched, _, _ = descend(staying, stayed, x, y, 60)
    assert (first < 2 * last).all() and (first > last / 2).all()
    assert after[0] - after[-1] > 2 / 3 * (unswitched[0] - unswitched[-1])


@TO
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_names_for_keys(to, cls, flatten):
    """What torch.distributed.checkpoint makes of state dicts, converted, loads through it."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, x, y = problem()
    adam = torch.optim.AdamW(
        [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.05}]
    )
    nn.functional.mse_loss(model(x), y).backward()
    adam.step()
    named = dcp.get_optimizer_state_dict(model, adam, options=options)
    converted = hfac.convert(named, to=to)
    by_index = hfac.convert(adam.state_dict(), to=to)
    optimizer = cls([{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}])
    dcp.set_optimizer_state_dict(model, optimizer, through_file(converted), options=options)
    assert bits(optimizer.state_dict()["state"]) == bits(by_index["state"])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.05]
    # names tell which parameter is which, in any order
    again = hfac.convert(converted, dict(reversed(list(model.named_parameters()))), to=to)
    assert again.keys() == converted.keys()
    if not flatten:
        optimizer.load_state_dict(again)


def test_some_parameters_have_no_state():
    params = parameters([(4, 6), (5, 4)])
    adam = torch.optim.AdamW(params)
    gradients(params[1:], 0)
    adam.step()
    converted = hfac.convert(adam.state_dict())
    assert list(converted["state"]) == [1]
    other = loaded(HFac, converted, dtype=torch.float32, shapes=[(4, 6), (5, 4)])
    assert {key: float(state["step"]) for key, state in other.state_dict()["state"].items()} == {0: 0.0, 1: 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@TO
def test_types(to, cls, dtype):
    """Factors are float32 for narrow parameters, whose Adam has narrow moments."""
    adam, params = ran(torch.optim.AdamW, dtype=dtype)
    converted = hfac.convert(adam.state_dict(), params, to=to)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {
        v.dtype for s in converted["state"].values() for k, v in s.items() if k not in ("step", "exp_avg_sign")
    } == {wide}
    loaded(cls, converted, dtype=dtype)


@TO
@pytest.mark.parametrize("shape", [(), (1, 64), (31, 8), (6, 4, 3, 3), (2, 3, 5, 7, 2)], ids=shape_id)
def test_zero_gradients(to, cls, shape):
    """No division of nothing by nothing, and rows that never had a gradient stay finite."""
    param = Parameter(torch.ones(shape))
    for source in (torch.optim.AdamW, torch.optim.Adafactor, HFac, SMMF):
        optimizer = source([param])
        for _ in range(2):
            param.grad = torch.zeros(shape)
            optimizer.step()
        converted = hfac.convert(optimizer.state_dict(), [param], to=to)
        assert all(value.isfinite().all() for value in converted["state"][0].values())
        other = loaded(cls, converted, [param])
        param.grad = torch.ones(shape)
        other.step()
        assert param.isfinite().all()


def group_of(optimizer, to, params=None, **options):
    return hfac.convert(optimizer.state_dict(), params, to=to, **options)["param_groups"][0]


def test_options_that_mean_the_same():
    make = [(4, 6)]
    adamw, params = ran(
        lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.95), weight_decay=0.3, maximize=True), shapes=make
    )
    found = group_of(adamw, "hfac")
    assert (found["lr"], found["betas"], found["weight_decay"], found["maximize"]) == (0.02, (0.8, 0.95), 0.3, True)
    assert found["eps"] == 1e-30  # Adam's is another quantity
    found = group_of(adamw, "smmf")
    assert (found["lr"], found["beta"], found["weight_decay"], found["weight_decay_mode"]) == (0.02, 0.8, 0.3, "adamw")
    assert group_of(adamw, "hfac", lr=0.5, betas=(0.5, 0.6))["betas"] == (0.5, 0.6)

    adam, _ = ran(lambda p: torch.optim.Adam(p, weight_decay=0.3), shapes=make)
    if "decoupled_weight_decay" in adam.param_groups[0]:  # older versions do not tell Adam from AdamW
        assert group_of(adam, "smmf")["weight_decay_mode"] == "adam"
        with pytest.warns(UserWarning, match=r"weight_decay=0\.3 times W to the gradient"):
            assert group_of(adam, "hfac")["weight_decay"] == 0.0

    adafactor, _ = ran(
        lambda p: torch.optim.Adafactor(p, lr=0.5, d=2.0, beta2_decay=-0.6, weight_decay=0.3), shapes=make
    )
    found = group_of(adafactor, "hfac")
    assert (found["lr"], found["clip_threshold"], found["weight_decay"]) == (1e-3, 2.0, 0.3)
    assert group_of(adafactor, "smmf")["decay_rate"] == -0.6


def test_schedulers_start():
    """initial_lr goes along with lr, and not with another lr."""
    adam, _ = ran(torch.optim.AdamW, shapes=[(4, 6)])
    torch.optim.lr_scheduler.StepLR(adam, 5)
    assert group_of(adam, "hfac")["initial_lr"] == 1e-3
    assert "initial_lr" not in group_of(adam, "hfac", lr=0.5)


def test_names_of_parameters_go_along():
    params = parameters([(4, 6), (5,)])
    adam = torch.optim.AdamW([("first", params[0]), ("second", params[1])])
    train(adam, params, 1)
    assert group_of(adam, "hfac")["param_names"] == ["first", "second"]


def test_amsgrad_is_said_to_be_left_out():
    adam, _ = ran(lambda params: torch.optim.AdamW(params, amsgrad=True), shapes=[(4, 6)])
    plain, _ = ran(torch.optim.AdamW, shapes=[(4, 6)])
    with pytest.warns(UserWarning, match="max_exp_avg_sq has no counterpart"):
        converted = hfac.convert(adam.state_dict())
    assert bits(converted["state"]) == bits(hfac.convert(plain.state_dict())["state"])


def test_nadam_has_adams_moments():
    nadam, _ = ran(torch.optim.NAdam, shapes=[(4, 6)])
    adam, _ = ran(torch.optim.Adam, shapes=[(4, 6)])
    assert bits(hfac.convert(nadam.state_dict())["state"]) == bits(hfac.convert(adam.state_dict())["state"])


@pytest.mark.parametrize("how", [dict(lr=0.02, relative_step=False, scale_parameter=False), dict(beta1=0.9), {}])
@pytest.mark.parametrize("shape", [(24, 18), (7,), (3, 4, 5)], ids=str)
def test_adafactor_of_transformers(shape, how):
    """The second moment is torch's Adafactor's of the same gradients, to its eps."""
    transformers = pytest.importorskip("transformers")
    theirs, params = ran(lambda params: transformers.Adafactor(params, **how), shapes=[shape])
    torchs, _ = ran(lambda params: torch.optim.Adafactor(params, eps=(1e-30, 1e-3)), shapes=[shape])
    for to in ("hfac", "smmf"):
        options = dict(betas=(0.9, 0.999)) if to == "hfac" else dict(lr=1e-3)
        ours = hfac.convert(theirs.state_dict(), params, to=to, **options)
        expected = hfac.convert(torchs.state_dict(), params, to=to, **options)
        for key, value in expected["state"][0].items():
            torch.testing.assert_close(ours["state"][0][key], value, rtol=1e-6, atol=1e-12)
    found = group_of(theirs, "hfac", params)
    assert found["clip_threshold"] == 1.0 and found["lr"] == how.get("lr", 1e-3)
    assert group_of(theirs, "smmf", params, lr=0.1)["decay_rate"] == -0.8


@TO
def test_moments_in_eight_bits(to, cls):
    codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6)
    held = renamed(["exp_avg", "exp_avg_sq"])
    plain = copy.deepcopy(held)
    for key, scale in (("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        held["state"][0][key], plain["state"][0][key] = Codes(codes, torch.tensor(scale)), codes * scale
    options = {"lr": 1e-3}
    assert bits(hfac.convert(held, to=to, **options)) == bits(hfac.convert(plain, to=to, **options))


@pytest.mark.parametrize(
    "options",
    [{"dense": True}, {"dense": True, "batch_dims": 1, "nonfinite": "skip"}, {"clip_threshold": None}],
    ids=str,
)
def test_back_to_adamw(options):
    """Whole moments are AdamW's; of factors, the sums of squares over rows and columns are."""
    dense = options.pop("dense", False)
    shapes = [(3, 4, 5), (7, 6), (5, 2)] if "batch_dims" in options else SHAPES4
    ours, params = ran(lambda params: HFac(params, lr=0.25, weight_decay=0.5, dense=dense, **options), shapes=shapes)
    adamw, _ = ran(lambda params: torch.optim.AdamW(params, lr=0.25, weight_decay=0.5), shapes=shapes)
    converted = hfac.convert(ours.state_dict(), params, to="adamw")
    found = loaded(torch.optim.AdamW, converted, params)
    if dense:
        assert_states(found, adamw)
    else:
        for state, expected in zip(found.state.values(), adamw.state.values(), strict=True):
            k = matricize.cut(expected["exp_avg_sq"].shape) or 0
            for dims in (range(k), range(k, expected["exp_avg_sq"].ndim)):
                sums = [
                    each["exp_avg_sq"].sum(list(dims)) if dims else each["exp_avg_sq"] for each in (state, expected)
                ]
                torch.testing.assert_close(*sums, **EXACT)
    for group, expected in zip(found.param_groups, adamw.param_groups, strict=True):
        assert {**group, "params": 0} == {**expected, "params": 0}
    gradients(params, 8)
    found.step()


def test_to_hfac_and_back_to_adamw():
    """Of factors nothing remains; whole moments do, and so do options, names, and the form of the state dict."""
    adamw, params = ran(lambda params: torch.optim.AdamW(params, lr=0.5, betas=(0.8, 0.9), eps=1e-3, maximize=True))
    there = hfac.convert(adamw.state_dict(), params, dense=True)
    back = hfac.convert(there, params, to="adamw", eps=1e-3, amsgrad=True)
    assert_states(loaded(torch.optim.AdamW, back), adamw)
    (group,) = back["param_groups"]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-3)
    assert group["maximize"] and group["amsgrad"]
    int8 = hfac.convert(hfac.convert(adamw.state_dict(), params, first_moment="int8"), params, to="adamw")
    for index, state in adamw.state_dict()["state"].items():
        first = int8["state"][index]["exp_avg"]
        torch.testing.assert_close(
            first.sign() * state["exp_avg"].sign() >= 0, torch.ones(first.shape, dtype=torch.bool)
        )
        if first.numel() > 1:
            assert (first - state["exp_avg"]).norm() < 0.02 * state["exp_avg"].norm()


@pytest.mark.parametrize("beta", [0.8, None])
def test_smmf_to_adamw_under_a_constant_gradient(beta):
    shapes = [(5,), (7,)]  # whole moments
    smmf, params = ran(lambda params: SMMF(params, beta=beta), shapes=shapes, grads=constant)
    converted = hfac.convert(smmf.state_dict(), params, to="adamw")
    betas = (beta or 0.0, 0.999)
    adamw, _ = ran(lambda params: torch.optim.AdamW(params, betas=betas), shapes=shapes, grads=constant)
    assert converted["param_groups"][0]["betas"] == betas
    only = (lambda key: True) if beta else (lambda key: key != "exp_avg")
    assert_states(loaded(torch.optim.AdamW, converted, shapes=shapes), adamw, only=only)


def test_a_rate_of_the_end_of_a_schedule_is_said(recwarn):
    adam, params = ran(torch.optim.AdamW, shapes=[(4, 6)])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 10)
    hfac.convert(adam.state_dict())
    assert not recwarn.list
    for _ in range(10):
        adam.step()
        scheduler.step()
    with pytest.warns(
        UserWarning, match=r"rate of group 0, 0, is carried over \(it began at 0.001\).*end of a schedule"
    ):
        hfac.convert(adam.state_dict())
    recwarn.clear()
    hfac.convert(adam.state_dict(), lr=1e-3)
    assert not recwarn.list


def test_smmf_wants_another_rate(recwarn):
    adam, params = ran(torch.optim.AdamW, shapes=[(4, 6)])
    with pytest.warns(UserWarning, match="carried over to SMMF, whose best one is 1.2 to 2 times AdamW's"):
        converted = hfac.convert(adam.state_dict(), params, to="smmf")
    recwarn.clear()
    hfac.convert(adam.state_dict(), params, to="smmf", lr=2e-3)
    hfac.convert(converted, params, to="smmf")
    assert not recwarn.list


def test_source_is_left_alone():
    adam, _ = ran(torch.optim.AdamW, dtype=torch.float32)
    source = adam.state_dict()
    before = bits(source)
    for to in ("hfac", "smmf"):
        converted = hfac.convert(source, to=to)
        for state in converted["state"].values():
            for value in state.values():
                value.zero_()
    assert bits(source) == before


def adam_dict(dtype=torch.float64):
    adam, _ = ran(torch.optim.AdamW, shapes=[(4, 6), (5,)], steps=1, dtype=dtype)
    return copy.deepcopy(adam.state_dict())


def smmf_dict():
    optimizer, _ = ran(SMMF, shapes=[(4, 6)], steps=1)
    return optimizer.state_dict()


def changed_low(**entry):
    saved = copy.deepcopy(low_dict("split")[0].state_dict())
    saved["state"][0].update(entry)
    return saved


def other_optimizer(name):
    optimizer, _ = ran(lambda params: getattr(torch.optim, name)(params), shapes=[(4, 6)], steps=1)
    return optimizer.state_dict()


def renamed(keys, step=3.0, **options):
    """A state of one parameter with these keys, in a group of Adam's options and these."""
    entry = {key: torch.ones(4, 6) for key in keys} | ({} if step is None else {"step": step})
    return {"state": {0: entry}, "param_groups": [{"params": [0], "lr": 1e-3, "betas": (0.9, 0.999), **options}]}


def changed(change):
    saved = adam_dict()
    change(saved)
    return saved


def shard(saved):
    """Looks like a DTensor to those who ask without importing it."""
    saved["state"][0]["exp_avg"].placements = ()


BAD = [
    ("target", lambda: hfac.convert(adam_dict(), to="lion"), ValueError, "one of 'hfac', 'smmf', 'adamw', got 'lion'"),
    ("option", lambda: hfac.convert(adam_dict(), decay=1), TypeError, "decay"),
    ("value", lambda: hfac.convert(adam_dict(), lr=-1.0), ValueError, "lr must be"),
    ("execution", lambda: hfac.convert(adam_dict(), backend="cpu"), TypeError, "backend says how a step is"),
    *[
        (name.lower(), lambda name=name: hfac.convert(other_optimizer(name)), ValueError,
         f"parameter 0 is that of torch.optim.{name}\\. .*Start the new optimizer without")
        for name in ("RMSprop", "Adamax", "Adadelta", "Adagrad", "Rprop", "ASGD")
    ],
    *[
        (whose, lambda keys=keys, options=options: hfac.convert(renamed(keys, **options)), ValueError,
         f"parameter 0 is that of {whose}.*Start the new optimizer without")
        for whose, keys, options in (
            ("Prodigy", ["exp_avg", "exp_avg_sq", "s", "p0"], {"d": 1.0, "d0": 1.0, "d_coef": 1.0, "growth_rate": 2.0}),
            ("D-Adaptation", ["exp_avg", "exp_avg_sq"], {"d": 1e-6, "k": 5, "growth_rate": 2.0}),
            ("Lion", ["exp_avg"], {}),
            ("SGD", ["momentum_buffer"], {"momentum": 0.9}),
            ("Muon", ["momentum_buffer"], {"momentum": 0.9, "ns_steps": 5}),
            ("AdaBelief", ["exp_avg", "exp_avg_var"], {}),
        )
    ],
    ("bitsandbytes", lambda: hfac.convert(renamed(["state1", "state2", "qmap1", "absmax1"])), ValueError,
     "that of bitsandbytes.*dequantize_blockwise"),
    ("apex", lambda: hfac.convert(renamed(["exp_avg", "exp_avg_sq"], step=None)), ValueError, "no 'step'.*Apex"),
    ("wrapper", lambda: hfac.convert(renamed(["exp_avg", "exp_avg_sq", "slow_buffer"])), ValueError,
     r"\['slow_buffer'\] besides.*take them out"),
    ("nan", lambda: hfac.convert(changed(lambda s: s["state"][0]["exp_avg_sq"].view(-1)[:1].fill_(float("nan")))),
     ValueError, "parameter 0: the second moment of Adam holds inf or NaN"),
    ("inf", lambda: hfac.convert(changed(lambda s: s["state"][1]["exp_avg"].view(-1)[:1].fill_(float("inf")))),
     ValueError, "parameter 1: the first moment of Adam holds inf or NaN"),
    ("negative", lambda: hfac.convert(changed(lambda s: s["state"][0]["exp_avg_sq"].view(-1)[:1].fill_(-1.0))),
     ValueError, "parameter 0: the second moment of Adam holds numbers below zero"),
    ("no-dict", lambda: hfac.convert(3), TypeError, "'state' and 'param_groups'.*got int"),
    ("other-dict", lambda: hfac.convert({"model": 1}), TypeError, r"got \['model'\]"),
    ("empty", lambda: hfac.convert(changed(lambda s: s["state"].clear())), ValueError, "has made no step"),
    ("stray", lambda: hfac.convert(changed(lambda s: s["state"].update({9: {}}))), ValueError, "9, which is in none"),
    ("mixed", lambda: hfac.convert(
        {"state": {**adam_dict()["state"], 2: {"momentum_v": torch.ones(5), "step": 2.0}}, "param_groups": [
            *adam_dict()["param_groups"], {"params": [2], "beta": 0.9, "growth_rate": 0.9}]}), ValueError,
     "Adam and the authors' SMMF; one optimizer's at"),
    ("need-params", lambda: hfac.convert(smmf_dict()), ValueError, "SMMF's state.*not tell the.*shape.*Give convert"),
    ("few-params", lambda: hfac.convert(adam_dict(), parameters([(4, 6)])), ValueError, "have 2 .*, params has 1"),
    ("no-params", lambda: hfac.convert(adam_dict(), ["w", "b"]), TypeError, "got str"),
    ("shapes", lambda: hfac.convert(adam_dict(), parameters([(5,), (4, 6)])), ValueError,
     r"parameter 0: 'exp_avg' must have shape \(5,\).*got \(4, 6\)"),
    ("factors", lambda: hfac.convert(smmf_dict(), parameters([(7, 6)])), ValueError,
     r"parameter 0, exp_avg_sq: 'row' must have shape \(7,\).*got \(6,\)"),
    ("missing", lambda: hfac.convert(changed(lambda s: s["state"][0].update(exp_avg=None))), ValueError,
     "Adam's state of parameter 0.*not tell"),
    ("missing-given", lambda: hfac.convert(changed(lambda s: s["state"][0].update(exp_avg=None)), parameters(
        [(4, 6), (5,)])), ValueError, "parameter 0 has no tensor 'exp_avg'"),
    ("shard", lambda: hfac.convert(changed(shard)), ValueError, "'exp_avg' is a shard.*full_state_dict=True"),
    ("batch", lambda: hfac.convert(adam_dict(), batch_dims=1), ValueError, r"shape \(5,\); batch_dims=1 needs more"),
    ("stack", lambda: hfac.convert(low_dict(None)[0].state_dict(), parameters([(2, 4, 6), (2, 5)])), ValueError,
     r"parameter 0: 'exp_avg_row' must have shape \(2, 4\).*got \(3, 4\)"),
    ("slice", lambda: hfac.convert(low_dict(None)[0].state_dict(), parameters([(3, 5, 6), (2, 5)])), ValueError,
     r"parameter 0, slice 0: 'exp_avg_row' must have shape \(5,\).*got \(4,\)"),
    ("slice-missing", lambda: hfac.convert(changed_low(exp_avg_row=None), low_dict(None)[1]), ValueError,
     "parameter 0 has no tensor 'exp_avg_row'"),
    ("adamw-option", lambda: hfac.convert(adam_dict(), to="adamw", clip_threshold=1.0), TypeError,
     "options that torch.optim.AdamW refuses .*clip_threshold"),
    ("adamw-value", lambda: hfac.convert(adam_dict(), to="adamw", lr=-1.0), ValueError,
     "AdamW refuses .*learning rate"),
    ("low", lambda: hfac.convert(changed_low(master_low=torch.zeros(4, 6, dtype=torch.int16))), ValueError,
     r"parameter 0: 'master_low' must have shape \(3, 4, 6\).*got \(4, 6\)"),
    ("low-missing", lambda: hfac.convert(changed_low(master_low=None)), ValueError, "has no tensor 'master_low'"),
    ("master", lambda: hfac.convert(adam_dict(torch.float32), master="split"), ValueError,
     "master='split' is for bfloat16.*parameter 0 does not tell.*Give convert"),
    ("float16", lambda: hfac.convert(adam_dict(), parameters([(4, 6), (5,)], torch.float16), master="split"),
     ValueError, "is float16, and master='split'"),
    ("name", lambda: hfac.convert(
        {"state": {"w": adam_dict()["state"][0]},
         "param_groups": [{**adam_dict()["param_groups"][0], "params": ["w"]}]},
        {"v": torch.ones(4, 6)}), ValueError, r"no 'w'.*it has \['v'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in BAD])
def test_refused(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("cls", [HFac, SMMF])
def test_the_groups_of_a_policy_are_carried_over(cls):
    """AdamW does not know `dense`, `batch_dims` and `matricize`, and keeps them; our groups mean them."""
    model = torch.nn.ParameterDict({"experts": torch.ones(3, 4, 6), "head": torch.ones(6, 5), "bias": torch.ones(5)})
    groups = param_groups(model, batch_dims={"experts": 1}, dense=["head"], matricize="flatten", lr=0.01)
    adam = torch.optim.AdamW(groups)
    for param in model.values():
        param.grad = torch.randn_like(param)
    adam.step()
    converted = hfac.convert(adam.state_dict(), to=cls.__name__.lower())
    optimizer = cls(param_groups(model, batch_dims={"experts": 1}, dense=["head"]))
    optimizer.load_state_dict(converted)
    kept = {(group["batch_dims"], group["dense"]) for group in optimizer.param_groups}
    assert {(1, False), (0, True), (0, False)} == kept
    assert optimizer.state[model["experts"]]["exp_avg_sq_row"].shape[0] == 3
    assert optimizer.state[model["head"]]["exp_avg_sq"].shape == (6, 5)
