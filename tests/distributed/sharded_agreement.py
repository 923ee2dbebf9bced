"""What ranks must agree on: norms that only some of them have, last bits that decide whether a collective follows, and
sums that replicas add up each for itself; runs on every rank."""

import math

import torch
import torch.distributed as dist
from sharded_steps import difference, part_of, run_all, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import hfac

S0, S1, R = Shard(0), Shard(1), Replicate()
LR = 0.01


def norms_of_experts(cases):
    return run_all(cases, _norms_of_experts)


def _norms_of_experts(name, how, backend):
    """Differences from a run in which one rank has everything. A stack of experts, of which each rank has two, beside a
    matrix that all have a shard of and a plain vector; in every other step the last rank's experts have a gradient that
    makes all clip.

    ``how``: "cut", the stack is a DTensor; "plain" and "skip", it is tensors that differ by rank and are declared to;
    "absent", no gradient reaches rank 0's experts in the last step; "skip", "propagate", "skip-step" and
    "skip-step-plain", one expert's is not finite there.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2 * world, 6, 5), (8, 6), (4,))]
    places, plain = [[S0], [S0], None], how in ("plain", "skip", "skip-step-plain")

    def part(i, value):
        found = part_of(value, mesh, places[i])
        return found.to_local() if plain and i == 0 else found

    def made(params, backend):
        skip = how.removesuffix("-plain") if how.startswith("skip") else "propagate"
        groups = [{"params": params[:1], "batch_dims": 1}, {"params": params[1:]}]
        return getattr(hfac, name)(groups, lr=LR, max_grad_norm=1.0, nonfinite=skip, backend=backend)

    ours = [torch.nn.Parameter(part(i, p)) for i, p in enumerate(full)]
    theirs = [torch.nn.Parameter(p.clone()) for p in full]
    optimizer, reference = made(ours, backend), made(theirs, "reference")
    if plain:
        optimizer.norm_group = {ours[0]: mesh.get_group()}
    norms = []
    for step, scale in enumerate((69, 1, 138, 1)):
        last = step == 3
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = torch.randn(q.shape, generator=generator, dtype=q.dtype)
            q.grad *= 0.1 / q.grad.norm()
            if i == 0:
                q.grad[-1] *= scale
                if last and (how.startswith("skip") or how == "propagate"):
                    q.grad[-2, 0, 0] = math.inf
                if last and how == "absent":
                    q.grad[:2] = 0
            p.grad = None if last and how == "absent" and i == 0 and rank == 0 else part(i, q.grad)
        optimizer.step()
        reference.step()
        norms.append((optimizer.grad_norm, reference.grad_norm))
    mine = slice(2 * rank, 2 * rank + 2)
    share = ours[0].detach() if plain else ours[0].detach().to_local()
    found = {str(i): (whole(ours[i].detach()), theirs[i].detach()) for i in (1, 2)}
    if how != "absent":  # a gradient of zeros decays moments; none leaves them alone
        found["experts"] = share, theirs[0].detach()[mine]
    found |= {f"norm {i}": pair for i, pair in enumerate(norms)}
    # NaN belongs where the reference has one.
    errors = {key: difference(torch.nan_to_num(a, 9.0), torch.nan_to_num(b, 9.0)) for key, (a, b) in found.items()}
    return _worst(errors)


def last_bits(cases):
    return run_all(cases, _last_bits)


def _last_bits(name, how):
    """On how many steps ranks have different norms, where some ranks' gradients of something that all have differ by
    a few last bits and the limit lies between: copies under FSDP x tensor parallelism, a plain parameter beside sharded
    ones, and copies that lie on one mesh beside shards on another."""
    mesh = init_device_mesh(
        "cpu", (4,) if how == "plain" else (2, 2), mesh_dim_names=("dp", "tp")[: 2 - (how == "plain")]
    )
    smaller = mesh["dp"] if how == "two-meshes" else mesh
    layouts = {
        "fsdp-tp": [((8, 16), [S0, S1], mesh), ((64, 16), [S0, R], mesh)],
        "plain": [((8, 16), [S0], mesh), ((64, 16), None, None)],
        "two-meshes": [((8, 16), [S0, S1], mesh), ((64, 16), [S0], smaller)],
    }[how]
    ours = [torch.nn.Parameter(part_of(torch.ones(shape), on, places)) for shape, places, on in layouts]
    norm = 25 * math.sqrt(sum(p.numel() for p in ours))
    optimizer = getattr(hfac, name)(ours, lr=LR, max_grad_norm=norm * (1 + 1.2e-7) + 1e-6)
    odd = dist.get_rank() % 2 == 1
    different = 0
    for _ in range(3):
        for i, p in enumerate(ours):
            value = 25.0 * (1 + 3e-7) if odd and i == 1 else 25.0
            p.grad = torch.full_like(p, value)
        optimizer.step()
        first = optimizer.grad_norm.clone()
        dist.broadcast(first, 0)
        different += int(first != optimizer.grad_norm)
    return _worst({"norm": float(different)})


def noisy_replicas(cases):
    return run_all(cases, _noisy_replicas)


def _noisy_replicas(name, layout, options):
    """How many bytes of parameters and states differ between ranks that have copies of the same, when every process
    group adds up with a last bit of its own."""
    shape, places = {
        "hsdp": ((2, 2), [[R, S0], [R, S0], [R, S0]]),
        "both": ((2, 2), [[S0, S0], [S0, S1], [S0, R]]),
        "hsdp-tp": ((2, 1, 2), [[R, S0, S1], [R, S0, S0], [R, R, S0]]),
    }[layout]
    mesh = init_device_mesh("cpu", shape)
    generator = torch.Generator().manual_seed(1)
    full = [torch.randn(s, generator=generator) for s in ((16, 16), (8, 32), (12,))]
    params = [torch.nn.Parameter(part_of(p, mesh, place)) for p, place in zip(full, places, strict=True)]
    optimizer = getattr(hfac, name)(params, lr=LR, **dict(options))
    real = dist.all_reduce

    def all_reduce(numbers, *args, group=None, **kwargs):
        work = real(numbers, *args, group=group, **{**kwargs, "async_op": False})
        lowest = dist.get_process_group_ranks(group)[0]
        numbers.copy_(torch.where(numbers.round() == numbers, numbers, numbers * (1 + 1.2e-7 * (lowest + 1))))
        return _Done() if kwargs.get("async_op") else work

    dist.all_reduce = all_reduce
    try:
        for _ in range(20):
            for p, value, place in zip(params, full, places, strict=True):
                p.grad = part_of(torch.randn(value.shape, generator=generator), mesh, place)
            optimizer.step()
    finally:
        dist.all_reduce = real
    others = {}
    for i, p in enumerate(params):
        for key, value in {"param": p.detach(), **optimizer.state[p]}.items():
            if isinstance(value, DTensor):
                copies = [d for d, place in enumerate(value.placements) if not isinstance(place, Shard)]
                local, count = value.to_local(), 0
                for d in copies:
                    first = local.clone()
                    dist.broadcast(first, dist.get_process_group_ranks(mesh.get_group(d))[0], group=mesh.get_group(d))
                    count += int((first != local).sum())
                others[f"{i}.{key}"] = float(count)
    return _worst(others)


class _Done:
    def wait(self):
        return True


def _worst(errors):
    """The largest of all ranks, for rank 0 to return."""
    values = torch.tensor(list(errors.values()), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(errors, values.tolist(), strict=True))


def redistributed(cases):
    return run_all(cases, _redistributed)


def _redistributed(name, place, how, fails_in):
    """What the steps say, of all ranks, and whether the failing one wrote anything, where a gradient is Partial and one
    rank has none ("missing"), or one that is placed as its parameter ("otherwise"), or all is well ("fine")."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [torch.nn.Parameter(part_of(torch.ones(8, 16), mesh, [S0]))]
    params += [torch.nn.Parameter(part_of(torch.ones(8, 16), mesh, [place]))]
    optimizer = getattr(hfac, name)(params, lr=LR)
    said, changed = [], 0
    for step in range(3):
        before = [p.detach().to_local().clone() for p in params]
        full = torch.full((8, 16), 1.0 + step)
        wrong = step == fails_in and dist.get_rank() == 1
        params[0].grad = part_of(full, mesh, [S0])
        params[1].grad = DTensor.from_local(full / mesh.size(), mesh, [Partial()], run_check=False)
        if wrong and how != "fine":
            params[1].grad = None if how == "missing" else part_of(full, mesh, [place])
        try:
            optimizer.step()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
            changed += sum(not torch.equal(p.detach().to_local(), old) for p, old in zip(params, before, strict=True))
    everyone = [None] * mesh.size()
    dist.all_gather_object(everyone, (said, changed))
    return everyone


def norm_where_one_rank_has_more(name):
    """The norm, and what it should be, where only the last rank has a plain parameter and all have a matrix's shards;
    the largest and the least of all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    last = dist.get_rank() == dist.get_world_size() - 1
    params = [torch.nn.Parameter(part_of(torch.ones(8, 6), mesh, [S0]))]
    params += [torch.nn.Parameter(torch.ones(5))] if last else []
    optimizer = getattr(hfac, name)(params, lr=LR, max_grad_norm=1.0)
    optimizer.norm_group = mesh.get_group()
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    norms = torch.stack([optimizer.grad_norm, -optimizer.grad_norm]).double()
    dist.all_reduce(norms, dist.ReduceOp.MAX)
    return norms[0].item(), -norms[1].item(), 2 * math.sqrt(8 * 6 + 5)
