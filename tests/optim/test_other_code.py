"""What other people's code brings to an optimizer: one more example of each kind of fault that was found once.

torch.optim.AdamW is the yardstick: what it takes, both optimizers take, with the numbers of an undisturbed run.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import SMMF, HFac

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF], ids=["hfac", "smmf"])
ALL = pytest.mark.parametrize("cls", [torch.optim.AdamW, HFac, SMMF], ids=["adamw", "hfac", "smmf"])
SHAPES = [(12, 8), (9,), (3, 4, 5)]


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for i, param in enumerate(params):
            param.grad = randn(param.shape, 10 * step + i)
        optimizer.step()


def parameters():
    return [Parameter(randn(shape, 50 + i)) for i, shape in enumerate(SHAPES)]


def entries(optimizer):
    return [(state, key, value) for state in optimizer.state.values() for key, value in list(state.items())]


def noncontiguous(optimizer):
    """As views of a larger buffer are."""
    for state, key, value in entries(optimizer):
        buffer = torch.zeros(*value.shape, 2, dtype=value.dtype)
        buffer[..., 0] = value
        state[key] = buffer[..., 0]


def freed_and_back(optimizer):
    """As FSDP and offloading trainers empty tensors whose objects stay."""
    kept = [(value, value.clone(), value.untyped_storage().size()) for _, _, value in entries(optimizer)]
    for value, _, _ in kept:
        value.untyped_storage().resize_(0)
    for value, copied, size in kept:
        value.untyped_storage().resize_(size)
        value.copy_(copied)


def set_elsewhere(optimizer):
    for _, _, value in entries(optimizer):
        value.set_(value.clone())


def swapped(optimizer):
    for _, _, value in entries(optimizer):
        torch.utils.swap_tensors(value, value.clone())


def shared_with_processes(optimizer):
    for param, state in optimizer.state.items():
        for value in (param.data, *state.values()):
            value.share_memory_()


def as_parameters(optimizer):
    for state, key, value in entries(optimizer):
        state[key] = Parameter(value, requires_grad=False)


def rebound(optimizer):
    optimizer.state = type(optimizer.state)(
        dict, {param: {key: value.clone() for key, value in state.items()} for param, state in optimizer.state.items()}
    )


WAYS = [noncontiguous, freed_and_back, set_elsewhere, swapped, shared_with_processes, as_parameters, rebound]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@ALL
def test_state_that_is_moved_is_the_state(cls, way):
    params, others = parameters(), parameters()
    optimizer, undisturbed = cls(params, lr=0.02), cls(others, lr=0.02)
    for step in range(4):
        train(optimizer, params, 1, step)
        train(undisturbed, others, 1, step)
        way(optimizer)
    assert all(map(torch.equal, params, others))


LAID_OUT = {
    "windows": lambda g: g.as_strided((12, 8), (1, 2)),
    "rows that meet": lambda g: g.as_strided((12, 8), (5, 1)),
    "expanded": lambda g: g[:8].expand(12, 8),
}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 1e9}], ids=str)
@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@BOTH
def test_a_gradient_whose_elements_share_memory_is_its_copy(cls, backend, layout, options):
    """Also where it is clipped: every element once."""
    left = []
    for copied in (False, True):
        param = Parameter(randn((12, 8), 0))
        optimizer = cls([param], lr=0.02, backend=backend, **options)
        for step in range(2):
            grad = LAID_OUT[layout](randn((100,), 1 + step))
            param.grad = grad.clone(memory_format=torch.contiguous_format) if copied else grad
            optimizer.step()
        left.append(param.detach())
    assert torch.allclose(*left, rtol=1e-5, atol=1e-6)


FROZEN = {
    "uint4": lambda: torch.zeros(4, 4, dtype=torch.uint8).view(torch.uint4),
    "float4": lambda: torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "scales": lambda: torch.zeros(4, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "complex32": lambda: torch.zeros(4, dtype=torch.complex32),
    "mkldnn": lambda: torch.ones(4, 4).to_mkldnn(),
    "blocks": lambda: torch.eye(8).to_sparse_bsr((2, 2)),
    "expanded": lambda: torch.ones(1).expand(8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FROZEN)
@ALL
def test_frozen_parameters_of_any_kind(cls, kind):
    net = nn.Linear(8, 6)
    try:
        net.base = Parameter(FROZEN[kind](), requires_grad=False)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this torch has no such tensors: {error}")
    optimizer = cls(net.parameters())
    for _ in range(2):
        net(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(optimizer.state) == 2


@ALL
def test_a_wrapper_may_keep_modules_and_functions(cls):
    """GaLore's projectors, Lookahead's counters, a function of a schedule."""
    params = parameters()
    optimizer = cls(params)
    train(optimizer, params, 1)
    for state in optimizer.state.values():
        state.update(projector=nn.Linear(2, 3), schedule=torch.relu, weight_sum=1.5, none=None)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 1, 1)
    state = optimizer.state[params[0]]
    assert state["projector"].weight.shape == (3, 2) and state["schedule"] is torch.relu
    assert (state["weight_sum"], state["none"], float(state["step"])) == (1.5, None, 2.0)


STEPS = {
    "int32": torch.tensor(3, dtype=torch.int32),
    "half": torch.tensor(3.0).half(),
    "trained": torch.tensor(3.0, requires_grad=True),
    "one of many": torch.arange(8.0)[3],
    "expanded": torch.tensor(3.0).expand(1),
}


@pytest.mark.parametrize("value", STEPS.values(), ids=STEPS.keys())
@ALL
def test_a_step_set_by_hand_in_any_form(cls, value):
    params, others = parameters(), parameters()
    optimizer, plain = cls(params), cls(others)
    train(optimizer, params, 1)
    train(plain, others, 1)
    for state in optimizer.state.values():
        state["step"] = value.detach().clone().requires_grad_(value.requires_grad)
    for state in plain.state.values():
        state["step"].fill_(3.0)
    train(optimizer, params, 2, 1)
    train(plain, others, 2, 1)
    assert all(map(torch.equal, params, others))


def adams(changes=(), options=()):
    state = {"exp_avg": torch.ones(4, 6), "exp_avg_sq": torch.ones(4, 6), "step": 3.0, **dict(changes)}
    group = {"params": [0], "lr": 1e-3, "betas": (0.9, 0.999), **dict(options)}
    return {"state": {0: state}, "param_groups": [group]}


REFUSED = {
    "ADOPT": (adams(options={"clip_lambda": None}), "is that of ADOPT"),
    "ADOPT of timm": (adams(options={"clip_exp": 0.333, "decoupled": True}), "is that of ADOPT"),
    "Yogi": (adams(options={"initial_accumulator": 1e-6}), "is that of Yogi"),
    "LaProp": (adams({"exp_avg_lr_1": 1.0, "exp_avg_lr_2": 1.0}), "is that of LaProp"),
    "codes": (adams({"exp_avg": torch.ones(4, 6, dtype=torch.int8)}), r"'exp_avg' has dtype torch.int8, codes"),
    "complex": (adams({"exp_avg_sq": torch.ones(4, 6) * 1j}), "'exp_avg_sq' must be .*real.* is complex"),
    "sparse": (adams({"exp_avg": torch.eye(6)[:4].to_sparse()}), "'exp_avg' must be a dense tensor"),
    "meta": (adams({"exp_avg": torch.ones(4, 6, device="meta")}), "'exp_avg' must be .* without values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_states_that_only_look_like_adams_are_refused(name):
    saved, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"parameter 0.*{message}"):
        hfac.convert(saved)


@pytest.mark.parametrize("to", ["hfac", "smmf"])
def test_adams_state_in_other_forms_is_converted(to):
    """Moments in float8 as some trainers store them, betas as tensors (capturable)."""
    plain = hfac.convert(adams(), to=to, lr=0.1)
    narrow = {"exp_avg": torch.ones(4, 6).to(torch.float8_e4m3fn), "exp_avg_sq": torch.ones(4, 6).to(torch.float8_e5m2)}
    for other in (adams(narrow), adams(options={"betas": tuple(torch.tensor((0.9, 0.999), dtype=torch.float64))})):
        found = hfac.convert(other, to=to, lr=0.1)
        assert found["param_groups"] == plain["param_groups"]
        for key, value in plain["state"][0].items():
            assert torch.equal(found["state"][0][key], value)
