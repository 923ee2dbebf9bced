"""The order of a step's collectives on every rank of large meshes, planned and made over process groups that do not
exist."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import hfac
from bench.imagined import idle_kernels, unread_numbers

S0, S1, R = Shard(0), Shard(1), Replicate()
STAGES = "stages"  # two halves of the ranks, each with a mesh of its own
#: name: [(sizes of a mesh, [placements of a parameter on it, and its batch dimensions])]
LAYOUTS = {
    "fsdp": [((256,), [([S0], 0), ([S0], 0)])],
    "hsdp": [((4, 8), [([R, S0], 0)])],
    "fsdp-tp": [((4, 4), [([S0, S1], 0), ([S1, S0], 0), ([S0, R], 0), ([S0, S0], 0)]), ((16,), [([S0], 0)])],
    "hsdp-tp": [((2, 4, 4), [([R, S0, S1], 0), ([R, R, S0], 0), ([R, S0, R], 0), ([S0, R, S1], 0)])],
    "experts": [((16,), [([S0], 0)]), ((4, 4), [([R, S0], 1), ([S0, R], 1), ([S0, S0], 1)])],
    "pipeline": [(STAGES, [([S0], 0)]), (STAGES, [([S0], 1)])],
    "pipeline-tp": [(STAGES, [([S0, S1], 0), ([S0, R], 0)])],
}
#: of which the second half of the ranks lacks all parameters that need sums
ONLY_FIRST = "pipeline-tp"

_CALLS = itertools.count()


def sequence(name, rank, world, cls, options, made=()):
    """(ranks of the group, whether it copies, bytes, type) of a step's collectives, in this rank's order. They are
    those of steps that are ``made``, whoever has a gradient in them."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    call = next(_CALLS)

    def names(ndim):  # never twice the same: torch remembers meshes that are equal, with groups that are gone
        return tuple(f"{name}-{call}-{d}" for d in range(ndim))

    try:
        groups = []
        for shape, params in LAYOUTS[name]:
            if shape == STAGES:
                halves = [torch.arange(world // 2) + start for start in (0, world // 2)]
                if name == ONLY_FIRST:
                    halves = [half.view(2, -1) for half in halves]
                meshes = [DeviceMesh("cpu", half, mesh_dim_names=names(half.ndim)) for half in halves]
                second = rank >= world // 2
                mesh = meshes[second]
                if name == ONLY_FIRST and second:
                    groups.append({"params": [torch.nn.Parameter(torch.empty(8, 8, device="meta"))]})
                    continue
            else:
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=names(len(shape)))
            for places, batch_dims in params:
                local = torch.empty(16, 32, 8, device="meta")
                part = DTensor.from_local(local, mesh, places, run_check=False)
                groups.append({"params": [torch.nn.Parameter(part)], "batch_dims": batch_dims})
        optimizer = cls(groups, **options)
        planned = [
            (ranks_of(sent.stage.group), sent.stage.copies, sent.bytes, sent.dtype) for sent in optimizer._collectives()
        ]
        for which in made:
            assert stepped(optimizer, which) == planned, which
        return planned
    finally:
        dist.destroy_process_group()


def stepped(optimizer, which):
    """What a step sends, of which some parameters have a gradient: "all", "none", "first" or "last"."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    some = {"all": params, "none": [], "first": params[:1], "last": params[-1:]}[which]
    for p in params:
        p.grad = torch.zeros_like(p) if any(p is one for one in some) else None
    calls = []
    with pytest.MonkeyPatch.context() as patch:

        def count(tensor, *args, group=None, copies, **kwargs):
            calls.append((ranks_of(group), copies, tensor.numel() * tensor.itemsize, tensor.dtype))
            return Done()

        patch.setattr(dist, "all_reduce", partial(count, copies=False))
        patch.setattr(dist, "broadcast", partial(count, copies=True))
        optimizer.step()
    return calls


class Done:
    def wait(self):
        return True


def ranks_of(group):
    return tuple(dist.get_process_group_ranks(group))


def carried_out(sequences):
    """What is left when every collective is made for which all of its ranks are waiting: nothing, if no rank waits for
    another for ever."""
    left = {rank: list(reversed(sequence)) for rank, sequence in enumerate(sequences)}
    waiting = set(left)
    while waiting:
        rank = waiting.pop()
        if not left[rank]:
            continue
        call = left[rank][-1]
        if all(left[other] and left[other][-1] == call for other in call[0]):
            for other in call[0]:
                left[other].pop()
            waiting.update(call[0])
    return {rank: sequence[::-1] for rank, sequence in left.items() if sequence}


#: who has a gradient in a step
WHO = ("all", "none", "first", "last", "all")
OPTIONS = [{}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}, {"max_grad_norm": 1.0, "nonfinite": "skip"}]


@pytest.mark.parametrize("cls", [hfac.HFac, hfac.SMMF], ids=["hfac", "smmf"])
@pytest.mark.parametrize("name", [pytest.param("fsdp", marks=pytest.mark.slow), *list(LAYOUTS)[1:]])
def test_no_rank_waits_for_another_for_ever(name, cls):
    """Every rank of a group sends it the same, in the same order, whoever has a gradient; and nothing else changes what
    a step sends: one that clips sends what one does that need not."""
    world = {"fsdp": 256, "hsdp": 32, "hsdp-tp": 32}.get(name, 16)
    batched = any(batch_dims for _, params in LAYOUTS[name] for _, batch_dims in params)
    with idle_kernels() as backend, unread_numbers():
        for options in OPTIONS if world < 256 else OPTIONS[1:2]:
            if batched and "nonfinite" in options:
                continue  # refused
            made = {0: WHO, world - 1: WHO}
            sequences = [
                sequence(name, rank, world, cls, options | {"backend": backend}, made.get(rank, WHO[:1]))
                for rank in range(world)
            ]
            assert carried_out(sequences) == {}, options
            assert any(sequences)


def test_a_rank_that_waits_for_ever_is_seen():
    pair, other = (0, 1), (1, 2)
    agreed = [[(pair, False, 4)], [(pair, False, 4), (other, False, 4)], [(other, False, 4)]]
    assert carried_out(agreed) == {}
    assert carried_out([agreed[0], agreed[1], [(other, False, 8)]])  # of another size
    assert carried_out([agreed[0], agreed[1], [(other, True, 4)]])  # another collective
    for dropped in range(3):
        assert carried_out([[] if rank == dropped else mine for rank, mine in enumerate(agreed)])
    circle = [[((0, 1), False, 4), ((2, 0), False, 4)], [((1, 2), False, 4), ((0, 1), False, 4)], []]
    circle[2] = [((2, 0), False, 4), ((1, 2), False, 4)]
    assert len(carried_out(circle)) == 3
