"""Whatever device, type or mode is torch's default while an optimizer is made, loaded or stepped: state is what and
where the parameter needs it, and every number is the same."""

import copy
from contextlib import contextmanager

import pytest
import torch
from running import AMBIENT, Int8, bits, gradients, parameters
from torch.nn import Parameter

from hfac import SMMF, HFac, convert, param_groups, release_gradients

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
IN_EACH = pytest.mark.parametrize("around", AMBIENT.values(), ids=AMBIENT.keys())
#: those in which a step is no other than outside
STEPPED = {name: around for name, around in AMBIENT.items() if name != "inference"}
SHAPES = [(4, 6), (5,), (3, 2, 4), (), (2, 8, 8)]
OPTIONS = {
    "plain": {},
    "reference": {"backend": "reference"},
    "skip": {"nonfinite": "skip"},
    "skip-reference": {"nonfinite": "skip", "backend": "reference"},
    "capturable": {"capturable": True},
    "clipped": {"max_grad_norm": 0.5},
    "clipped-reference": {"max_grad_norm": 0.5, "backend": "reference"},
    "stochastic": {"rounding": "stochastic", "backend": "reference"},
    "split": {"master": "split", "backend": "reference"},
    "watched": {"watch": True},
}


def run(cls, options, made, stepped, dtype=torch.bfloat16):
    """Every bit of parameters and state: made, loaded in the middle and looked at in ``made``, stepped in
    ``stepped``."""
    params = parameters(SHAPES, dtype)
    groups = [{"params": params[:4]}, {"params": params[4:], "batch_dims": 1}]
    with made():
        optimizer = cls(groups, **options)
    for seed in range(4):
        gradients(params, seed)
        if seed == 2:
            with made():
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = cls(groups, **options)
                optimizer.load_state_dict(saved)
        with stepped():
            optimizer.step()
    with made():
        saved = optimizer.state_dict()
    assert not any(value.is_inference() for state in saved["state"].values() for value in state.values())
    return bits([params, saved])


@contextmanager
def nothing():
    yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@BOTH
def test_every_bit_is_the_same(cls, options, dtype):
    wanted = run(cls, options, nothing, nothing, dtype)
    for name, around in AMBIENT.items():
        stepped = STEPPED.get(name, nothing)
        assert run(cls, options, around, stepped, dtype) == wanted, name


@BOTH
def test_step_inside_inference_mode(cls):
    """As with torch.optim: parameters made outside are updated. The state stays of use outside, too."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    optimizer, plain = cls(params, nonfinite="skip"), cls(others, nonfinite="skip")
    optimizer.state.clear()  # is made by the step
    for seed in range(3):
        gradients(params, seed)
        gradients(others, seed)
        with torch.inference_mode(seed != 1):
            optimizer.step()
        assert not any(value.is_inference() for state in optimizer.state.values() for value in state.values())
        plain.step()
    assert bits(params) == bits(others)


@BOTH
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("way", ["step", "step_param"])
def test_inference_parameter(cls, backend, way):
    """Not refused before it has a gradient, as in torch.optim, and then before anything is written."""
    (param,) = parameters([(4, 6)])
    with torch.inference_mode():
        frozen = Parameter(torch.ones(5, 6))
    optimizer = cls([param, frozen], backend=backend)
    gradients([param], 0)
    optimizer.step()
    frozen.grad = torch.ones(5, 6)
    before = bits([param, frozen, optimizer.state[param]])
    with pytest.raises(RuntimeError, match=r"parameter.* of group 0 \(shape \(5, 6\)\) is an inference tensor"):
        optimizer.step() if way == "step" else optimizer.step_param(frozen)
    assert bits([param, frozen, optimizer.state[param]]) == before


@BOTH
def test_state_replaced_by_inference_tensors(cls):
    """A trainer moves state inside inference mode."""
    params, others = parameters(), parameters()
    optimizer, plain = cls(params, nonfinite="skip", backend="reference"), cls(others, backend="reference")
    for seed in range(3):
        gradients(params, seed)
        gradients(others, seed)
        optimizer.step()
        plain.step()
        with torch.inference_mode():
            for state in optimizer.state.values():
                for key, value in state.items():
                    state[key] = value.clone()
    assert bits(params) == bits(others)


@BOTH
def test_gradients_made_in_inference_mode(cls):
    params, others = parameters(), parameters()
    for tensors, around in ((params, torch.inference_mode), (others, nothing)):
        optimizer = cls(tensors, max_grad_norm=0.1, backend="reference")
        for seed in range(2):
            with around():
                gradients(tensors, seed)
            optimizer.step()
    assert bits(params) == bits(others)


@IN_EACH
def test_convert(around):
    params = parameters()
    adam = torch.optim.AdamW(params)
    gradients(params, 0)
    adam.step()
    for to in ("hfac", "smmf"):
        wanted = bits(convert(adam.state_dict(), params, to=to))
        with around():
            found = convert(adam.state_dict(), params, to=to)
        assert bits(found) == wanted


@IN_EACH
@BOTH
def test_released_gradients(cls, around):
    """The hooks' clipping; the backward pass itself is torch's, so it is outside."""
    found = []
    for inside in (around, nothing):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 4)
        with inside():
            optimizer = cls(param_groups(net, lr=0.01), max_grad_norm=0.1, backend="reference")
            handle = release_gradients(net, optimizer)
        for param in net.parameters():  # which no hook has seen
            param.grad = torch.ones_like(param)
        with inside():
            optimizer.step()
        for _ in range(3):
            net(torch.ones(2, 6)).square().sum().backward()
            with inside():
                optimizer.step()
        with inside():
            handle.load_state_dict(copy.deepcopy(handle.state_dict()))
        found.append(bits([list(net.parameters()), optimizer.state_dict(), handle.state_dict()]))
    assert found[0] == found[1]
