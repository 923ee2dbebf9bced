"""Trainers that flatten parameters leave no rows and columns to factor: they are refused by name, at any time."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import hfac
from bench.imagined import imagined_ranks

EACH = pytest.mark.parametrize("cls", [hfac.HFac, hfac.SMMF], ids=["HFac", "SMMF"])


def trained(cls):
    """An optimizer of two groups, matrices and vectors, that has made a step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    weights, biases = ([p for p in net.parameters() if p.ndim == n] for n in (2, 1))
    optimizer = cls([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=1e-3)
    net(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    return optimizer


def as_zero(optimizer):
    """As DeepSpeed's ZeRO 1 and 2 (0.19.8, deepspeed/runtime/zero/stage_1_and_2.py): of each group a padded vector of
    all its parameters, of which this rank trains a partition in float32."""
    for group in optimizer.param_groups:
        flat = torch.cat([param.detach().flatten() for param in group["params"]])
        partition = nn.functional.pad(flat, (0, -len(flat) % 8)).chunk(2)[0].detach().clone().float()
        partition.requires_grad = True
        group["params"] = [partition]


def as_megatron(optimizer):
    """As Megatron's distributed optimizer (0.16.1, megatron/core/optimizer/distrib_optimizer.py): of each parameter the
    elements that are in this rank's range of the buffer."""
    for group in optimizer.param_groups:
        group["params"] = [param.detach().view(-1)[:5].clone().float().requires_grad_() for param in group["params"]]


def stepped(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()


@EACH
@pytest.mark.parametrize("act", [stepped, lambda optimizer: optimizer.state_dict()], ids=["step", "state_dict"])
@pytest.mark.parametrize("flattened", [as_zero, as_megatron])
def test_vectors_in_the_place_of_matrices_are_refused(flattened, act, cls):
    optimizer = trained(cls)
    state = {param: {key: value.clone() for key, value in entry.items()} for param, entry in optimizer.state.items()}
    flattened(optimizer)
    values = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    for _ in range(2):  # not only once
        with pytest.raises(TypeError, match=r"the 2 matrices .*\(4, 6\).* ZeRO stages 1 and 2 .*fully_shard"):
            act(optimizer)
    assert [len(entry) for entry in optimizer.state.values()] == [len(entry) for entry in state.values()]
    for param, entry in state.items():
        assert all(torch.equal(optimizer.state[param][key], value) for key, value in entry.items())
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(map(torch.equal, params, values))


@EACH
def test_other_replacements_are_none(cls):
    """Copies in the shapes of the parameters, as DeepSpeed's stage 0 makes; vectors that were there before."""
    optimizer = trained(cls)
    for group in optimizer.param_groups:
        group["params"] = [param.detach().clone().requires_grad_() for param in group["params"]]
    stepped(optimizer)
    optimizer = trained(cls)
    optimizer.param_groups[0]["params"] = []
    stepped(optimizer)
    assert {param.ndim for param in optimizer.state} == {1}


@EACH
def test_partitions_of_zero_3_are_refused(cls):
    """The placeholders of partitioned parameters, and the vectors that are trained in their place, have ``ds_id``."""
    param = nn.Parameter(torch.empty(0))
    param.ds_id = 7
    with pytest.raises(TypeError, match=r"parameter 0 of the group is partitioned by DeepSpeed's ZeRO stage 3"):
        cls([param])
    optimizer = trained(cls)
    as_zero(optimizer)
    for group in optimizer.param_groups:
        group["params"][0].ds_id = "0_3"
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is partitioned by DeepSpeed's ZeRO stage 3"):
        stepped(optimizer)


@EACH
@pytest.mark.parametrize("rows", [(2, 2), (4, 2)], ids=["as-torch", "otherwise"])
def test_shards_that_are_cut_otherwise_are_refused(rows, cls):
    """Megatron-FSDP splits a buffer of many parameters evenly: a DTensor whose shard has another number of rows."""
    with imagined_ranks(2, rank=1):
        mesh = init_device_mesh("cpu", (2,))
        shard = DTensor.from_local(
            torch.ones(rows), mesh, [Shard(0)], run_check=False, shape=torch.Size((5, 2)), stride=(2, 1)
        )
        if rows == (2, 2):
            cls([nn.Parameter(shard)])
            return
        with pytest.raises(ValueError, match=r"a shard of shape \(2, 2\), but it has one of \(4, 2\).*Megatron-FSDP"):
            cls([nn.Parameter(shard)])
