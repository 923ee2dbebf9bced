"""Ranks clip together or not at all, by one norm, and replicas end with the same bits."""

import re

import pytest
from processes import Forked
from sharded import on_ranks
from test_sharded import agree
from torch.distributed.tensor import Replicate, Shard

NAMES = ("HFac", "SMMF")


def test_the_norm_of_what_each_rank_steps_alone():
    """Experts that are cut, or declared to differ by rank, count on all ranks; also where some rank has no gradient of
    them, or one that is not finite."""
    ways = ("cut", "plain", "absent", "skip", "propagate", "skip-step", "skip-step-plain")
    cases = [(name, how, backend) for name in NAMES for how in ways for backend in ("reference", "cpu")]
    (found,) = on_ranks(2, ("sharded_agreement:norms_of_experts", cases))
    agree(found, 1e-12)


def test_a_last_bit_decides_for_all_ranks_or_for_none():
    cases = [(name, how) for name in NAMES for how in ("fsdp-tp", "plain", "two-meshes")]
    (found,) = on_ranks(4, ("sharded_agreement:last_bits", cases))
    agree(found, 0)


@pytest.mark.parametrize("options", [(), (("max_grad_norm", 0.5), ("nonfinite", "skip"))], ids=["plain", "clipped"])
def test_replicas_are_the_same_however_each_group_adds_up(options):
    cases = [(name, layout, options) for name in NAMES for layout in ("hsdp", "both", "hsdp-tp")]
    (found,) = on_ranks(4, ("sharded_agreement:noisy_replicas", cases))
    agree(found, 0)


OFFLOADED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
import hfac
dist.init_process_group("cuda:fake", store=FakeStore(), rank=0, world_size=4)
mesh = init_device_mesh("cpu", (2, 2))
for places in ([Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(1), Shard(0)], [Replicate(), Replicate()]):
    part = DTensor.from_local(torch.ones(4, 16), mesh, places, run_check=False)
    for cls in (hfac.HFac, hfac.SMMF):
        try:
            cls([torch.nn.Parameter(part)])
            print("taken")
        except ValueError as error:
            print(error)
"""


def test_a_process_group_that_cannot_reach_the_shards_is_refused_at_construction():
    """As with parameters that FSDP keeps on the CPU, and NCCL alone. What needs no sums needs no group."""
    done = Forked(OFFLOADED).ended()
    assert done.returncode == 0, done.stderr
    *refused, third, fourth = done.stdout.splitlines()
    assert len(refused) == 6 and third == fourth == "taken"
    for line in refused:
        assert re.fullmatch(
            r"(HFac|SMMF): parameter 0 of the group has its shards on cpu, .* backends for cuda only.*", line
        )
        assert 'init_process_group("cpu:gloo,cuda:nccl")' in line


def test_a_rank_without_plain_parameters_has_part_in_the_norm_of_those_of_others():
    for largest, least, wanted in on_ranks(2, *(("sharded_agreement:norm_where_one_rank_has_more", n) for n in NAMES)):
        assert largest == least == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("how", ["fine", "missing", "otherwise"])
def test_ranks_find_out_together_whether_all_can_redistribute(how):
    """In the first step and later; of a parameter of which ranks have shards, and of one of which they have copies."""
    steps = (0,) if how == "otherwise" else (0, 2)
    cases = [(name, place, how, step) for name in NAMES for place in (Shard(0), Replicate()) for step in steps]
    (found,) = on_ranks(2, ("sharded_agreement:redistributed", cases))
    for case, ranks in found.items():
        for said, changed in ranks:
            assert changed == 0, case
            *_, fails_in = case
            for step, message in enumerate(said):
                if how == "fine" or step != fails_in:
                    assert message == "", case
                elif how == "missing":
                    assert "must be redistributed as" in message and "2 ranks" in message, case
                else:
                    assert "on one rank and" in message and "Nothing was updated" in message, case
