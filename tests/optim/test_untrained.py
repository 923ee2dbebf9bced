"""Parameters that are not trained, or not yet: frozen ones of any kind, and those of lazy modules.

As with torch.optim they are nobody's business until they have a gradient; what a step cannot take is refused then,
before anything is written.
"""

import copy

import pytest
import torch
from running import bits
from torch import nn
from torch.nn import Parameter

from hfac import SMMF, HFac, param_groups, release_gradients

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF], ids=["hfac", "smmf"])
KINDS = {
    "uint8": lambda: torch.zeros(64, 1, dtype=torch.uint8),
    "int8": lambda: torch.zeros(8, 8, dtype=torch.int8),
    "int64": lambda: torch.zeros((), dtype=torch.int64),
    "bool": lambda: torch.zeros(8, dtype=torch.bool),
    "float8": lambda: torch.zeros(8, 8).to(torch.float8_e4m3fn),
    "complex64": lambda: torch.ones(8, 8, dtype=torch.complex64),
    "sparse": lambda: torch.eye(8).to_sparse(),
    "sparse-csr": lambda: torch.eye(8).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(8, 8, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
    "scalar-beside-stacks": lambda: torch.ones(()),
}
OPTIONS = [{}, {"batch_dims": 1, "nonfinite": "skip"}, {"max_grad_norm": 0.1, "watch": True}, {"master": "split"}]


def model(kind):
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(16, 8, bias=False), "b": nn.Linear(8, 4, bias=False)})
    if kind is not None:
        net.base = Parameter(KINDS[kind](), requires_grad=False)
    return net


def loss(net):
    return net["b"](net["a"](torch.ones(2, 16))).square().sum()


@pytest.mark.pairwise
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_frozen(cls, kind, options):
    """Steps, checkpoints, diagnostics and copies: as if it were not there."""
    found = []
    for net in (model(kind), model(None)):
        optimizer = cls(net.parameters(), **options)
        for step in range(4):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()
            optimizer.diagnostics()
            if step == 1:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if step == 2 and not kind.startswith("sparse"):  # which torch does not copy so
                net, optimizer = copy.deepcopy((net, optimizer))
        assert len(optimizer.state) == 2
        found.append(bits([net["a"].weight, net["b"].weight, list(optimizer.state.values())]))
    assert found[0] == found[1]


BAD = {
    "complex64": (RuntimeError, r"is complex \(torch.complex64\)"),
    "sparse": (RuntimeError, r"has layout torch.sparse_coo"),
    "float8": (ValueError, r"has dtype torch.float8_e4m3fn"),
    "scalar-beside-stacks": (ValueError, r"batch_dims=1 needs more than 1 dimension"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("group", [0, 1], ids=["same-group", "own-group"])
@pytest.mark.parametrize("kind", BAD)
@BOTH
def test_unfrozen(cls, kind, group):
    net = model(kind)
    rest, more = [net["a"].weight, net["b"].weight], {"batch_dims": int(kind.endswith("stacks"))}
    groups = [{"params": [*rest, net.base]}] if group == 0 else [{"params": rest}, {"params": [net.base]}]
    optimizer = cls(groups, **more)
    loss(net).backward()
    optimizer.step()
    optimizer.state_dict()
    before = bits(rest)
    net.base.requires_grad_(True)
    assert len(optimizer.state_dict()["state"]) == 2
    optimizer.step()
    before = bits(rest)
    net.base.grad = net.base.detach().clone()
    error, pattern = BAD[kind]
    for _ in range(2):
        with pytest.raises(error, match=rf"parameter {2 if group == 0 else 0} of group {group} .*{pattern}"):
            optimizer.step()
    assert bits(rest) == before and all(float(optimizer.state[p]["step"]) == 2 for p in rest)
    net.base.grad = None
    optimizer.step()
    assert bits(rest) != before


@pytest.mark.parametrize("way", ["step", "step_param"])
@BOTH
def test_unfrozen_where_nothing_else_was_trained(cls, way):
    """Its group had made no step when its first gradient came."""
    frozen, other = Parameter(torch.ones(4, 6), requires_grad=False), Parameter(torch.ones(4, 6))
    optimizer = cls([{"params": [frozen]}, {"params": [other]}])
    for step in range(3):
        other.grad = torch.ones(4, 6)
        if step:
            frozen.requires_grad_(True)
            frozen.grad = torch.ones(4, 6)
        if way == "step":
            optimizer.step()
        else:
            optimizer.step_param(frozen)
    assert float(optimizer.state[frozen]["step"]) == 2 and not torch.equal(frozen, torch.ones(4, 6))


def lazy():
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4, bias=False))


@pytest.mark.parametrize("when", ["before", "after", "stepped-before"])
@BOTH
def test_lazy_modules(cls, when):
    """Made before the first forward pass or after it; a step before it does nothing."""
    net = lazy()
    if when == "after":
        net(torch.ones(2, 6))
    optimizer = cls(net.parameters(), lr=0.1, max_grad_norm=1.0)
    if when == "stepped-before":
        optimizer.step()
        assert optimizer.state_dict()["state"] == {}
    torch.manual_seed(1)
    for step in range(3):
        optimizer.zero_grad()
        net(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
        if step == 0:
            start = [param.detach().clone() for param in net.parameters()]
        optimizer.step()
    twins = [Parameter(value) for value in start]
    other = cls(twins, lr=0.1, max_grad_norm=1.0)
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    twin[0].weight, twin[0].bias, twin[2].weight = twins
    for _ in range(3):
        other.zero_grad()
        twin(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
        other.step()
    assert bits([list(net.parameters()), optimizer.state_dict()]) == bits([twins, other.state_dict()])


@BOTH
def test_lazy_modules_that_need_a_forward_pass(cls):
    net, twin = lazy(), lazy()
    twin(torch.ones(2, 6)).sum().backward()
    trained = cls(twin.parameters())
    trained.step()
    optimizer = cls(net.parameters())
    with pytest.raises(ValueError, match="parameter 0, which has no shape yet. Run a forward pass first"):
        optimizer.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet.*forward pass"):
        param_groups(net)
    net(torch.ones(2, 6))
    optimizer.load_state_dict(trained.state_dict())
    assert len(param_groups(net)) == 2


@BOTH
def test_lazy_modules_release_gradients(cls):
    net = lazy()
    optimizer = cls(net.parameters())
    with release_gradients(net, optimizer):
        net(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [1.0] * 3
