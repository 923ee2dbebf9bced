"""Steps of single parameters, and gradients that are stepped and freed while the backward pass goes on."""

import copy

import pytest
import torch
from running import bits, gradients, parameters
from torch.nn import Parameter

from hfac import SMMF, HFac, functional

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF], ids=["hfac", "smmf"])
OPTIONS = {
    HFac: dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
    SMMF: dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
}
NAN = float("nan")


# ---- step_param ------------------------------------------------------------------------------------------------------


def two_groups(cls, params, **options):
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.005, "maximize": True}]
    return cls(groups, **{**OPTIONS[cls], **options})


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "skip"}, {"capturable": True}, {"backend": "reference"}], ids=str
)
def test_step_param_is_a_step_to_the_bit(cls, dtype, options):
    """In any order, mixed with whole steps, with gradients that are absent or not finite."""
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    one, whole = two_groups(cls, params, **options), two_groups(cls, others, **options)
    for step in range(6):
        for tensors in (params, others):
            gradients(tensors, step)
            tensors[step].grad = None
            if "nonfinite" in options:
                tensors[6].grad.view(-1)[-1] = NAN
        for optimizer in (one, whole):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        whole.step()
        if step == 3:
            one.step()
            continue
        groups = {param: group for group in one.param_groups for param in group["params"]}
        for i, param in enumerate(reversed(params)):
            one.step_param(param, groups[param] if i % 2 else None)
    assert bits(params) == bits(others)
    assert bits(one.state_dict()) == bits(whole.state_dict())


@BOTH
def test_step_param_follows_every_change(cls):
    """What was bound is bound anew where a state, the data, an option or the group is another."""

    def change(optimizer, param, step):
        if step == 1:
            optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
        elif step == 2:
            key = next(key for key in optimizer.state[param] if key.startswith("exp_avg_sq"))
            optimizer.state[param][key] = 2 * optimizer.state[param][key]
        elif step == 3:
            param.data = param.data.to(torch.bfloat16)
        elif step == 4:
            optimizer.param_groups[0]["nonfinite"] = "skip"
        elif step == 5:
            optimizer.param_groups.append({**optimizer.param_groups[0], "lr": 0.5})
            optimizer.param_groups[0]["params"] = []
        elif step == 6:
            optimizer.state.clear()
        elif step == 7:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    pairs = [parameters([(4, 6)]), parameters([(4, 6)])]
    one, whole = cls(pairs[0], **OPTIONS[cls]), cls(pairs[1], **OPTIONS[cls])
    for step in range(9):
        for optimizer, (param,) in zip((one, whole), pairs, strict=True):
            change(optimizer, param, step)
            param.grad = None
            gradients([param], step)
            if step == 4:
                param.grad[0, 0] = NAN
        one.step_param(pairs[0][0])
        whole.step()
        assert bits(pairs[0]) == bits(pairs[1]), step
        assert bits(one.state_dict()) == bits(whole.state_dict()), step


@BOTH
def test_step_param_binds_once(cls, monkeypatch):
    params = parameters()
    optimizer = cls(params)
    bound = []
    init = functional.Group.__init__
    monkeypatch.setattr(functional.Group, "__init__", lambda self, *args: (bound.append(args), init(self, *args))[1])
    for step in range(4):
        gradients(params, step)
        for param in params:
            optimizer.step_param(param)
    assert len(bound) == len(params)


@BOTH
def test_step_param_refuses(cls):
    params = parameters([(4, 6), (5,)])
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}])
    gradients(params, 0)
    before = bits([params, optimizer.state_dict()])
    with pytest.raises(ValueError, match=r"step_param: the parameter of shape \(4, 6\) is in none of .*not a copy"):
        optimizer.step_param(Parameter(params[0].detach().clone()))
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 was given with another group"):
        optimizer.step_param(params[1], optimizer.param_groups[0])
    with pytest.raises(ValueError, match=r"another group"):
        optimizer.step_param(params[1], dict(optimizer.param_groups[1]))
    with pytest.raises(TypeError, match=r"takes a parameter of this optimizer, got dict"):
        optimizer.step_param({"params": params})
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 0 of group 1 has layout torch.sparse_coo"):
        optimizer.step_param(params[1])
    assert bits([params, optimizer.state_dict()]) == before
    optimizer.step_param(params[0], optimizer.param_groups[0])
    del optimizer.param_groups[0]
    with pytest.raises(ValueError, match=r"in none of the optimizer's groups"):
        optimizer.step_param(params[0])


@BOTH
def test_step_param_leaves_hooks_to_the_step(cls):
    params = parameters()
    optimizer = cls(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    gradients(params, 0)
    optimizer.step_param(params[0])
    assert not seen and params[0].grad is not None
