"""Which parameters decay, which keep their moments whole and which are stacks; and what a group's options do there."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from cases import gradient
from running import bits, gradients, train
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import SMMF, HFac, backends

CLASSES = {"hfac": HFac, "smmf": SMMF}
BOTH = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


class PerHeadRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(torch.ones(2, 4))


class Odd(PerHeadRMSNorm):
    """A norm by its base alone."""


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Parameter(torch.ones(2, 4))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_bias = Parameter(torch.ones(3, 4))
        self.gain = Parameter(torch.ones(3, 4))
        self.up = Parameter(torch.ones(3, 4, 6))
        self.tied = self.up


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_norm, self.odd, self.q_norm, self.scale = PerHeadRMSNorm(), Odd(), Scale(), Scale()
        self.norm = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.experts = Experts()
        self.k_norm = Parameter(torch.ones(2, 4))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(8, 4)
        self.bag = nn.EmbeddingBag(8, 4)
        self.pos_embed = Parameter(torch.ones(1, 5, 4))
        self.embed_to = Parameter(torch.ones(5, 4))
        self.block = Block()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.temperature = Parameter(torch.ones(()))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.tokens.weight
        self.after = nn.Linear(4, 4, bias=False)
        self.again = self.after


DECAYS = [
    "embed_to",
    "block.scale.weight",
    "block.norm.weight",
    "block.attention.in_proj_weight",
    "block.attention.out_proj.weight",
    "block.experts.gain",
    "block.experts.up",
    "convolution.weight",
    "after.weight",
]


def by_key(groups):
    """(batch_dims, dense, weight_decay) -> names; no key comes twice."""
    found = {}
    for group in groups:  # an optimizer's have names of their own
        names = group.get("param_names") or [name for name, _ in group["params"]]
        assert found.setdefault((group["batch_dims"], group["dense"], group["weight_decay"]), names) is names
    return found


def test_usual_groups():
    model = Model()
    groups = hfac.param_groups(model)
    found = by_key(groups)
    assert list(found) == [(0, False, 0.1), (0, False, 0.0)]
    every = [name for name, param in model.named_parameters() if param.requires_grad]
    # names in the model's order, of which it says itself that a tied one counts once
    assert sorted(every, key=lambda name: (name not in DECAYS, every.index(name))) == sum(found.values(), [])
    assert set(found[0, False, 0.1]) == set(DECAYS)
    assert all(param is model.get_parameter(name) for group in groups for name, param in group["params"])


def test_weight_decay_changes_nothing_else():
    model = Model()
    assert [[n for n, _ in g["params"]] for g in hfac.param_groups(model, 0.0)] == list(
        by_key(hfac.param_groups(model, 0.3)).values()
    )


def test_patterns():
    """Of names and of classes and their bases; one text is one pattern; tied ones match by each name and class."""
    model = Model()

    def dense(*patterns):
        return {n for g in hfac.param_groups(model, dense=patterns) if g["dense"] for n, _ in g["params"]}

    assert dense("block.*norm*") == {
        "block.head_norm.weight",
        "block.q_norm.weight",
        "block.norm.weight",
        "block.norm.bias",
        "block.k_norm",
    }
    assert dense("PerHeadRMSNorm") == {"block.head_norm.weight", "block.odd.weight"}
    assert dense("Odd", "convolution.[wb]*") == {"block.odd.weight", "convolution.weight", "convolution.bias"}
    assert dense("head.weight") == dense("tokens.weight") == {"tokens.weight"}
    assert "tokens.weight" in dense("Linear") and "tokens.weight" in dense("Embedding")
    assert dense("again.*", "*.tied") == {"after.weight", "block.experts.up"}
    assert dense("frozen.*") == set()  # they exist, and are left out
    assert hfac.param_groups(model, dense="head.weight") == hfac.param_groups(model, dense=["head.weight"])

    undecayed = by_key(hfac.param_groups(model, no_decay=["Conv2d", "after.weight"]))[0, False, 0.0]
    usual = by_key(hfac.param_groups(model))[0, False, 0.0]
    assert set(undecayed) == {*usual, "convolution.weight", "after.weight"}


def test_stacks():
    """A dimension that counts slices makes no matrix of a vector."""
    found = by_key(
        hfac.param_groups(Model(), dense=["*.up"], batch_dims={"*.experts.*": 1, "*.attention.in_proj_weight": 1})
    )
    assert list(found) == [(0, False, 0.1), (0, False, 0.0), (1, False, 0.0), (1, True, 0.1)]
    assert found[1, True, 0.1] == ["block.experts.up"]
    assert found[1, False, 0.0] == [
        "block.attention.in_proj_weight",
        "block.experts.down_bias",
        "block.experts.gain",
    ]
    later = hfac.param_groups(Model(), batch_dims={"*.experts.*": 1, "*.up": 2})
    assert [n for g in later if g["batch_dims"] == 2 for n, _ in g["params"]] == ["block.experts.up"]


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        (
            {"dense": ["blocks.*"]},
            ValueError,
            r"dense: 'blocks\.\*' .* names are block\.[a-z_.]+, .*and \d+ more; the nearest classes, Block, ",
        ),
        ({"no_decay": ["after.weight", "nothing"]}, ValueError, "no_decay: 'nothing' matches no parameter"),
        ({"batch_dims": {"*.Up": 1}}, ValueError, r"batch_dims: '\*\.Up' matches no parameter"),
        ({"dense": "Module"}, ValueError, "dense: 'Module' matches no"),
        ({"batch_dims": {"*.experts.*": 2}}, ValueError, r"2 for block.experts.down_bias, .*\(3, 4\).* from 0 to 1"),
        ({"batch_dims": {"after.bias*": 0, "temperature": 1}}, ValueError, "matches no"),
        ({"batch_dims": {"temperature": 1}}, ValueError, "from 0 to 0"),
        ({"batch_dims": {"*.up": -1}}, ValueError, "from 0 to 2"),
        ({"batch_dims": 1}, TypeError, "batch_dims must be a mapping"),
        ({"params": []}, TypeError, "'params'"),
    ],
)
def test_what_cannot_be(arguments, error, pattern):
    with pytest.raises(error, match=pattern):
        hfac.param_groups(Model(), **arguments)


def test_models_that_cannot_be():
    with pytest.raises(TypeError, match="needs the model.* got generator"):
        hfac.param_groups(Model().parameters())
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        hfac.param_groups(Model().requires_grad_(False))


@BOTH
def test_an_optimizer_of_the_groups(cls):
    """Names reach the state dict; options of every group arrive; every parameter is trained as its group says."""
    model = Model()
    groups = hfac.param_groups(model, dense=["head.weight"], batch_dims={"*.up": 1}, lr=0.5, eps=1e-3)
    optimizer = cls(groups, lr=0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    names = [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
    assert len(names) == len(set(names)) == sum(p.requires_grad for p in model.parameters())
    assert set(optimizer.state[model.tokens.weight]) == {"exp_avg", "exp_avg_sq", "step"}
    assert optimizer.state[model.block.experts.up]["exp_avg_row"].shape[0] == 3
    # A zero gradient leaves a first step with the decay alone.
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    for name in names:
        model.get_parameter(name).grad = torch.zeros_like(before[name])
    optimizer.step()
    for name, value in before.items():
        wanted = value * (1 - 0.5 * 0.1) if name in DECAYS else value
        torch.testing.assert_close(model.get_parameter(name).detach(), wanted, msg=name)


def test_examples_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "parameter-policy.md").read_text()
    transformer, experts, fused = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(transformer, names)
    assert by_key(names["optimizer"].param_groups)[0, False, 0.1] == [
        f"layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    ]
    exec(experts, names)
    assert by_key(names["optimizer"].param_groups) == {
        (0, False, 0.1): ["head.weight"],
        (0, False, 0.0): ["head.bias"],
        (0, True, 0.0): ["tokens.weight"],
        (1, False, 0.1): ["experts.up", "experts.down"],
        (1, False, 0.0): ["experts.down_bias"],
    }
    model, optimizer = names["model"], names["optimizer"]
    model["head"](model["experts"](model["tokens"](torch.arange(4)))).logsumexp(1).sum().backward()
    optimizer.step()
    assert optimizer.state[model["experts"].up]["exp_avg_sign"].shape == (8, 64, 16)
    exec(fused, names)
    attention = names["model"][1]
    assert attention(torch.ones(1, 2, 64)).shape == (1, 2, 64)
    assert names["optimizer"].state[attention.qkv.weight]["exp_avg_row"].shape == (12, 16)
    assert "exp_avg_row" in names["optimizer"].state[attention.out.weight]


@BOTH
def test_options_are_keyword_only_with_neutral_defaults(cls):
    for name, default in (("dense", False), ("batch_dims", 0), ("views", 1)):
        parameter = inspect.signature(cls).parameters[name]
        assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, default)
        assert cls([Parameter(torch.ones(2, 2))]).param_groups[0][name] == default


SHAPES = [(3, 2, 4), (5, 3), (6,), (4, 3, 2, 2)]
OPTIONS = {
    HFac: dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
    SMMF: dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
}


def params_of(shapes=SHAPES, dtype=torch.float32):
    return [Parameter(gradient(shape, 5 + i, dtype)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("cls", "option"),
    [(HFac, {"matricize": "flatten"}), (HFac, {"dense": True}), (SMMF, {"dense": True})],
    ids=["hfac-matricize", "hfac-dense", "smmf-dense"],
)
def test_a_group_with_the_option_beside_one_without(cls, option):
    """Each steps as in an optimizer that has its option throughout; both go on from a checkpoint."""
    mixed, without, having = params_of(SHAPES * 2), params_of(SHAPES * 2)[:4], params_of(SHAPES * 2)[4:]
    optimizer = cls([{"params": mixed[:4]}, {"params": mixed[4:], **option}], **OPTIONS[cls])
    apart = [cls(without, **OPTIONS[cls]), cls(having, **{**OPTIONS[cls], **option})]

    def steps(count, start):
        for seed in range(start, start + count):
            gradients(mixed, seed)
            for param, other in zip(mixed, without + having, strict=True):
                other.grad = param.grad.clone()
            for each in (optimizer, *apart):
                each.step()

    steps(2, 0)
    saved = optimizer.state_dict()
    optimizer = cls([{"params": mixed[:4]}, {"params": mixed[4:]}])
    optimizer.load_state_dict(saved)
    steps(2, 2)
    assert bits([param.detach() for param in mixed]) == bits([param.detach() for param in without + having])
    states = [each.state[param] for each, of in zip(apart, (without, having), strict=True) for param in of]
    assert bits([optimizer.state[param] for param in mixed]) == bits(states)
    assert bits(mixed[0].detach()) != bits(mixed[4].detach())


@BOTH
@pytest.mark.parametrize("backend", backends.available(torch.device("cpu")))
def test_dense_is_what_a_vector_of_the_elements_does(cls, backend):
    """Whole moments have no rows and columns: the shape, and the order in memory, change nothing."""
    value = gradient((6, 5, 4), 1, torch.bfloat16)
    shaped = Parameter(value.transpose(0, 2).contiguous().transpose(0, 2))
    flat = Parameter(value.flatten().clone())
    options = {**OPTIONS[cls], "dense": True, "backend": backend}
    optimizers = cls([shaped], **options), cls([flat], **options)
    for seed in range(3):
        shaped.grad = gradient((6, 5, 4), 10 + seed, torch.bfloat16)
        flat.grad = shaped.grad.flatten()
        for optimizer in optimizers:
            optimizer.step()
    assert bits(shaped.detach().flatten()) == bits(flat.detach())
    state, alone = optimizers[0].state[shaped], optimizers[1].state[flat]
    assert state.keys() == alone.keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "exp_avg": (6, 5, 4),
        "exp_avg_sq": (6, 5, 4),
        "step": (),
    }
    assert bits([value.flatten() for value in state.values()]) == bits([value.flatten() for value in alone.values()])


def test_dense_without_a_first_moment():
    params = params_of()
    optimizer = SMMF(params, beta=None, dense=True)
    train(optimizer, params, 2)
    assert all(set(state) == {"exp_avg_sq", "step"} for state in optimizer.state.values())


@BOTH
@pytest.mark.parametrize(("value", "error"), [(1, TypeError), (None, TypeError), ("perhaps", ValueError)])
def test_dense_is_true_or_false(cls, value, error):
    with pytest.raises(error, match=r"dense must be (T|t)rue or (F|f)alse"):
        cls(params_of(), dense=value)
    assert cls(params_of(), dense="true").param_groups[0]["dense"] is True
