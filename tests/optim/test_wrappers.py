"""What wrappers, trainers and users do to a running optimizer.

Entries of their own in its state and groups, steps set by hand, parameters whose contents are swapped, and thousands of
groups.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from running import Int8, bits, gradients, parameters, train
from torch import nn
from torch.nn import Parameter

from hfac import SMMF, HFac, release_gradients
from hfac.optim.state import StatefulOptimizer

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
SHAPES = [(4, 6), (5,), (3, 4, 4)]


# ---- entries of others in the state ----------------------------------------------------------------------------------


class Projector:
    """As GaLore keeps one."""

    def __init__(self):
        self.matrix, self.calls = torch.ones(3, 2), 0

    def __eq__(self, other):
        return bits(vars(self)) == bits(vars(other))


def extras(param):
    return {
        "lookahead_slow_buff": param.detach().clone(),
        "ema": param.detach().bfloat16(),
        "wide": param.detach().double(),
        "count": 7,
        "label": "x",
        "mask": torch.ones(3, dtype=torch.bool),
        "nested": {"a": [torch.arange(3), None], 2: (torch.ones(()),)},
        "projector": Projector(),
        0: torch.zeros(2).to_sparse(),
    }


def own(state):
    return {key: value for key, value in state.items() if str(key).startswith("exp_") or key in ("step", "skipped")}


def others(state):
    return {key: value for key, value in state.items() if key not in own(state)}


def same(found, wanted):
    """With the types that they have, sparse ones as well."""
    if isinstance(wanted, torch.Tensor):
        assert type(found) is type(wanted) and found.layout == wanted.layout
        assert bits(found.to_dense()) == bits(wanted.to_dense())
    elif isinstance(wanted, dict | list | tuple):
        assert type(found) is type(wanted) and len(found) == len(wanted)
        keys = wanted if isinstance(wanted, dict) else range(len(wanted))
        for key in keys:
            same(found[key], wanted[key])
    else:
        assert found == wanted


def reloaded(optimizer, cls, params):
    target = cls(params, nonfinite="skip", batch_dims=0)
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return target


def copied(optimizer, way):
    twin = way(optimizer)
    return twin, [param for group in twin.param_groups for param in group["params"]]


@pytest.mark.parametrize("way", ["load", "deepcopy", "pickle", "to-float64", "swapped-option", "diagnostics"])
@BOTH
def test_entries_of_others_are_left_alone(cls, way):
    params, plain = parameters(SHAPES), parameters(SHAPES)
    optimizer, reference = cls(params, nonfinite="skip"), cls(plain, nonfinite="skip")
    train(optimizer, params, 2)
    train(reference, plain, 2)
    wanted = [extras(param) for param in params]
    for param, entries in zip(params, wanted, strict=True):
        optimizer.state[param].update(entries)
    optimizer.state["of no parameter"] = {"k": [torch.ones(2)]}
    optimizer.state["number"] = 3
    wanted = copy.deepcopy(wanted)
    if way == "load":
        optimizer = reloaded(optimizer, cls, params)
    elif way == "deepcopy":
        optimizer, params = copied(optimizer, copy.deepcopy)
    elif way == "pickle":
        optimizer, params = copied(optimizer, lambda o: pickle.loads(pickle.dumps(o)))
    elif way == "to-float64":
        for param in (*params, *plain):
            param.grad, param.data = None, param.data.double()
    elif way == "swapped-option":
        for each in (optimizer, reference):
            each.param_groups[0]["capturable"] = True
    else:
        optimizer.diagnostics()
    for step in range(2, 5):
        for tensors, each in ((params, optimizer), (plain, reference)):
            gradients(tensors, step)
            each.step()
        for i, param in enumerate(params):
            same(others(optimizer.state[param]), wanted[i])
            wanted[i]["count"] = optimizer.state[param]["count"] = wanted[i]["count"] + 1  # it may change in every step
    assert bits(params) == bits(plain)
    found = optimizer.state_dict()["state"]
    assert [bits(own(found[i])) for i in range(3)] == [
        bits(entry) for entry in reference.state_dict()["state"].values()
    ]
    same(found["of no parameter"], {"k": [torch.ones(2)]})
    assert found["number"] == 3


@BOTH
def test_entries_of_others_are_copied_when_they_are_loaded(cls):
    (param,) = parameters([(4, 6)])
    optimizer = cls([param])
    optimizer.state[param]["slow"] = slow = torch.ones(2, requires_grad=True)
    optimizer.state[param]["list"] = [torch.ones(2)]
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    state = optimizer.state[param]
    assert state["slow"] is not slow and state["slow"].requires_grad
    state["list"][0].zero_()
    assert saved["state"][0]["list"][0].all()


@BOTH
def test_entries_of_others_do_not_cost_a_look_at_everything(cls, monkeypatch):
    """A wrapper that counts in the state does not make every step bind everything anew."""
    params = parameters(SHAPES)
    optimizer = cls(params)
    train(optimizer, params, 2)
    looks = []
    monkeypatch.setattr(optimizer, "_validate", lambda look=optimizer._validate: looks.append(1) or look())
    for step in range(3):
        for state in optimizer.state.values():
            state["count"] = step
        train(optimizer, params, 1)
    assert len(looks) <= 1  # for the key that was new
    optimizer.state[params[0]]["step"] = optimizer.state[params[0]]["step"].clone()
    train(optimizer, params, 1)
    assert len(looks) >= 1  # else this test shows nothing


@BOTH
def test_entries_that_are_called_as_ours_are_do_not_stand_for_ours(cls):
    """A whole moment of a wrapper beside factors: the step goes by the factors, and loading names the key."""
    params, plain = parameters([(4, 6)]), parameters([(4, 6)])
    optimizer, reference = cls(params), cls(plain)
    optimizer.state[params[0]]["exp_avg_sq"] = torch.ones(4, 6)
    train(optimizer, params, 2)
    train(reference, plain, 2)
    assert bits(params) == bits(plain)
    with pytest.raises(ValueError, match=r"must have the keys .* got .*'exp_avg_sq'"):
        cls(plain).load_state_dict(optimizer.state_dict())


@BOTH
def test_entries_of_a_frozen_parameter(cls):
    params = parameters([(4, 6), (5,)])
    params[1].requires_grad_(False)
    optimizer = cls(params)
    optimizer.state[params[1]]["slow"] = torch.ones(5)
    train(optimizer, params[:1], 1)
    assert list(optimizer.state[params[1]]) == ["slow"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    same(dict(optimizer.state[params[1]]), {"slow": torch.ones(5)})
    params[1].requires_grad_(True)
    train(optimizer, params, 1)
    assert float(optimizer.state[params[1]]["step"]) == 1 and "slow" in optimizer.state[params[1]]


@BOTH
def test_another_optimizers_state_is_refused(cls):
    params = parameters([(4, 6)])
    optimizer = cls(params)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] = {"lookahead_slow_buff": torch.ones(4, 6), "momentum_buffer": torch.ones(4, 6)}
    with pytest.raises(ValueError, match=r"parameter 0 .* must have the keys .*step.*saved by another optimizer"):
        optimizer.load_state_dict(saved)


@BOTH
def test_keys_of_others_in_groups(cls):
    params = parameters([(4, 6), (5,)])
    thing = Projector()
    optimizer = cls([{"params": params[:1], "rank": 4, "thing": thing}, {"params": params[1:]}])
    optimizer.param_groups[1]["lookahead_k"] = 6
    train(optimizer, params, 1)
    target = cls([{"params": params[:1]}, {"params": params[1:]}])
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert target.param_groups[0]["rank"] == 4 and target.param_groups[0]["thing"] == thing
    assert target.param_groups[1]["lookahead_k"] == 6


# ---- steps set by hand -----------------------------------------------------------------------------------------------

STEPS = {
    "int": 7,
    "float": 7.0,
    "numpy": np.int64(7),
    "int64": torch.tensor(7),
    "float64": torch.tensor(7.0, dtype=torch.float64),
    "bfloat16": torch.tensor(7.0, dtype=torch.bfloat16),
    "one-element": torch.tensor([7.0]),
    "one-element-int": torch.tensor([[7]]),
}


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "skip"}, {"capturable": True}], ids=lambda o: "-".join(o) or "plain"
)
@pytest.mark.parametrize("way", ["step", "step_param", "load", "state_dict"])
@pytest.mark.parametrize("value", STEPS.values(), ids=STEPS.keys())
@BOTH
def test_step_set_by_hand(cls, value, way, options):
    params, plain = parameters(SHAPES), parameters(SHAPES)
    optimizer, reference = cls(params, **options), cls(plain, **options)
    train(optimizer, params, 2)
    train(reference, plain, 2)
    for param in plain:
        reference.state[param]["step"].fill_(7.0)
    if way == "load":
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = value
        optimizer.load_state_dict(saved)
    else:
        for param in params:
            optimizer.state[param]["step"] = copy.deepcopy(value)
    if way == "state_dict":
        assert all(float(state["step"]) == 7 for state in optimizer.state_dict()["state"].values())
    for step in range(2, 4):
        gradients(params, step)
        gradients(plain, step)
        for param in params if way == "step_param" else ():
            optimizer.step_param(param)
        if way != "step_param":
            optimizer.step()
        reference.step()
    assert bits([params, optimizer.state_dict()["state"]]) == bits([plain, reference.state_dict()["state"]])


@BOTH
def test_skipped_set_by_hand(cls):
    params = parameters(SHAPES)
    optimizer = cls(params, nonfinite="skip")
    for param in params:
        optimizer.state[param]["skipped"] = 2
    gradients(params, 0)
    params[0].grad.fill_(float("nan"))
    optimizer.step()
    assert [int(optimizer.state[param]["skipped"]) for param in params] == [3, 2, 2]


# ---- parameters whose contents are swapped ---------------------------------------------------------------------------


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


SWAPPED = {
    "whole": {},
    "stack": {"batch_dims": 1},
    "stack-watched": {"batch_dims": 1, "watch": True},
    "stack-skip": {"batch_dims": 2, "nonfinite": "skip"},
    "stack-reference": {"batch_dims": 1, "backend": "reference"},
    "clipped": {"batch_dims": 1, "max_grad_norm": 0.1},
    "stochastic": {"batch_dims": 1, "rounding": "stochastic"},
}


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("way", ["step", "step_param", "released"])
@pytest.mark.parametrize("options", SWAPPED.values(), ids=SWAPPED.keys())
@BOTH
def test_modules_convert_by_swapping(cls, options, way):
    """Nothing that is kept from step to step owns a parameter: torch counts owners before it swaps."""
    clip = torch.ones(()) if "max_grad_norm" in options else None
    torch.manual_seed(0)
    net = nn.Module()
    net.w = Parameter(torch.randn(3, 4, 8, 4))
    optimizer = cls(net.parameters(), **options)
    handle = release_gradients(net, optimizer) if way == "released" else None
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        net.to(dtype)
        for _ in range(2):
            net.w.square().sum().backward()
            before, version = net.w.detach().clone(), net.w._version
            if handle is None:
                optimizer.step() if way == "step" else optimizer.step_param(net.w, clip=clip)
                assert net.w._version > version  # autograd is told of what is written through aliases
                assert not torch.equal(net.w, before)
            else:
                optimizer.step()
            optimizer.diagnostics()
            optimizer.zero_grad()
        net.load_state_dict(copy.deepcopy(net.state_dict()))
        assert optimizer.state_dict()["state"][0]["step"] > 0
        del before


# ---- thousands of groups ---------------------------------------------------------------------------------------------


class Counted(dict):
    """A group that writes down what of it is read."""

    reads = []

    def __getitem__(self, key):
        Counted.reads.append(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        Counted.reads.append(key)
        return super().get(key, default)


def costs(cls, count, monkeypatch):
    """How often groups are read, and states looked at, by what is done with ``count`` groups."""
    params = [Parameter(torch.ones(2, 3)) for _ in range(2 * count)]
    looked = []
    sync = StatefulOptimizer._sync_param
    monkeypatch.setattr(StatefulOptimizer, "_sync_param", lambda *args: looked.append(1) or sync(*args))
    groups = [{"params": params[2 * i : 2 * i + 2], "lr": 0.01 * (i + 1)} for i in range(count)]
    optimizer = cls(groups, max_grad_norm=1.0)
    found = {"construct": len(looked)}
    clip = torch.ones(())
    for param in params:
        param.grad = torch.ones(2, 3)
    acts = {
        "first step": optimizer.step,
        "step": optimizer.step,
        "step_param": lambda: [optimizer.step_param(param, clip=clip) for param in params],
        "report": lambda: [optimizer.report_per_parameter_metrics(param, "x", {}) for param in params],
        "diagnostics": optimizer.diagnostics,
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(optimizer.state_dict()),
        "add_param_group": lambda: optimizer.add_param_group({"params": [Parameter(torch.ones(2))]}),
    }
    for name, act in acts.items():
        optimizer.param_groups = [Counted(group) for group in optimizer.param_groups]
        looked.clear()
        Counted.reads.clear()
        act()
        # torch looks at the parameters of all groups where one is added
        found[name] = len(looked) + len([key for key in Counted.reads if name != "add_param_group" or key != "params"])
    monkeypatch.undo()
    return found


@BOTH
def test_cost_grows_with_the_groups_and_not_their_square(cls, monkeypatch):
    few, many = costs(cls, 8, monkeypatch), costs(cls, 64, monkeypatch)
    assert few["construct"] == 16 and few["add_param_group"] == many["add_param_group"]
    for name, cost in few.items():
        assert many[name] <= 10 * cost, (name, cost, many[name])


class CountedList(list):
    """A list of groups that counts how many of them are walked over."""

    reads = 0

    def __iter__(self):
        for group in super().__iter__():
            CountedList.reads += 1
            yield group


@BOTH
def test_released_gradients_do_not_look_at_all_groups_for_each(cls):
    walked = []
    for count in (8, 64):
        net = nn.ParameterList(Parameter(torch.ones(2, 3)) for _ in range(count))
        optimizer = cls([{"params": [p], "lr": 0.01} for p in net], max_grad_norm=1.0)
        release_gradients(net, optimizer)
        optimizer.param_groups = CountedList(optimizer.param_groups)
        for _ in range(2):
            CountedList.reads = 0
            sum(p.sum() for p in net).backward()
            optimizer.step()
        walked.append(CountedList.reads)
    assert walked[1] <= 10 * walked[0], walked
