"""One norm of several optimizers and of stages of a pipeline; runs on every rank."""

import torch
import torch.distributed as dist
from sharded_agreement import _worst
from sharded_steps import difference, part_of, run_all
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import hfac

S0 = Shard(0)
LIMIT = 0.7


def of_several(cases):
    return run_all(cases, _of_several)


def titans_norm(params, pp_group):
    """The norm as torchtitan's clip_grad_norm_ finds it: of one stage, of its square the sum over stages, the root."""
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm **= 2.0
    dist.all_reduce(norm, group=pp_group)
    return norm ** (1 / 2.0)


def _of_several(how, backend):
    """Differences from torchtitan's arithmetic and plain steps of whole tensors. Two stages on two ranks each, which
    have two parts of the model with an optimizer each, HFac and SMMF; other shapes on each stage.

    ``how``: "dtensors"; "mixed", beside a plain tensor and a stack of which each rank has a slice; "experts", plain
    tensors that are others on each rank; "absent", a stage without gradients; "limit", the stage's optimizer has
    ``max_grad_norm`` and ``norm_group``; "skip-step", one gradient on one stage is not finite.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, rank = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    generator = torch.Generator().manual_seed(stage)
    shapes = [[(8, 6), (5 + stage, 4)], [(12,), (6, 4 + stage)]]
    places = [[S0, S0], [S0, S0]]
    if how in ("mixed", "experts"):
        shapes[0].append((2, 3, 4))
        places[0].append(None if how == "experts" else S0)
    if how == "mixed":
        shapes[1].append((7,))
        places[1].append(None)
    full = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in part] for part in shapes]

    def cut(value, place):
        if how == "experts" and place is None:
            return value[rank : rank + 1].clone()
        return part_of(value, mesh["dp"], None if place is None else [place])

    ours = [
        [nn.Parameter(cut(*each)) for each in zip(values, where, strict=True)]
        for values, where in zip(full, places, strict=True)
    ]
    theirs = [[nn.Parameter(value.clone()) for value in values] for values in full]

    def made(parts, **options):
        found = []
        for cls, params in zip((hfac.HFac, hfac.SMMF), parts, strict=False):
            groups = [
                {"params": params[:2]},
                {"params": params[2:], "batch_dims": int(params[2:3] != [] and cls is hfac.HFac)},
            ]
            found.append(cls([group for group in groups if group["params"]], lr=0.01, **options))
        return found

    skip = {"nonfinite": "skip-step"} if how == "skip-step" else {}
    if how == "limit":
        ours, theirs = ours[:1], theirs[:1]
        places = places[:1]
        skip["max_grad_norm"] = LIMIT
    optimizers, plain = made(ours, backend=backend, **skip), made(theirs, backend="reference")
    if how == "experts":
        optimizers[0].norm_group = {ours[0][2]: mesh["dp"].get_group()}
    if how == "limit":
        optimizers[0].norm_group = dict.fromkeys(ours[0], mesh["pp"])
    pairs = []
    for step, scale in enumerate((0.01, 1.0, 1.0, 0.01)):
        for part, twins, where in zip(ours, theirs, places, strict=True):
            for p, q, place in zip(part, twins, where, strict=True):
                q.grad = scale * torch.randn(q.shape, generator=generator, dtype=q.dtype)
                if how == "skip-step" and step == 2 and stage == 1 and part is ours[1]:
                    q.grad.view(-1)[-1] = float("nan")
                p.grad = cut(q.grad, place)
                if how == "absent" and stage == 0 and step == 1:
                    p.grad = q.grad = None
        every = [q for twins in theirs for q in twins]
        if how == "dtensors" or how == "limit":
            wanted = titans_norm([p for part in ours for p in part], mesh["pp"].get_group())
        else:
            # of whole gradients, of which each of two ranks has all
            wanted = (
                torch.stack([q.grad.norm() for q in every if q.grad is not None] or [torch.zeros(1).double()[0]]).norm()
                ** 2
            )
            dist.all_reduce(wanted, group=mesh["pp"].get_group())
            wanted = wanted.sqrt()
        kept = [p.grad.to_local().clone() if isinstance(p.grad, DTensor) else p.grad for part in ours for p in part]
        if how != "limit":
            norm = hfac.clip_grad_norm_(optimizers, LIMIT, mesh["pp"])
            for p, old in zip([p for part in ours for p in part], kept, strict=True):
                now = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                assert now is None or torch.equal(now.nan_to_num(9.0), old.nan_to_num(9.0))
        for optimizer in optimizers:
            optimizer.step()
        if how == "limit":
            norm = optimizers[0].grad_norm
        assert all(torch.equal(each.grad_norm.nan_to_num(9.0), norm.nan_to_num(9.0)) for each in optimizers)
        pairs.append((norm.nan_to_num(9.0), wanted.nan_to_num(9.0)))
        assert (wanted > LIMIT) == (scale == 1.0) or how == "skip-step"
        if how == "skip-step" and step == 2:
            continue
        nn.utils.clip_grads_with_norm_(every, LIMIT, wanted)
        for each in plain:
            each.step()
    errors = {"norm": max(difference(*pair) for pair in pairs)}
    for i, (part, twins, where) in enumerate(zip(ours, theirs, places, strict=True)):
        for j, (p, q, place) in enumerate(zip(part, twins, where, strict=True)):
            wanted = cut(q.detach(), place)
            found = p.detach()
            if isinstance(found, DTensor):
                found, wanted = found.to_local(), wanted.to_local()
            errors[f"{i}.{j}"] = difference(found, wanted)
    return _worst(errors)


def agree_to_the_bit():
    """On how many steps ranks have different norms, where each process group of stages adds up with a last bit of its
    own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    params = [nn.Parameter(part_of(torch.ones(8, 6), mesh["dp"], [S0]))]
    optimizer = hfac.HFac(params)
    real, different = dist.all_reduce, 0

    def all_reduce(numbers, *args, group=None, **kwargs):
        real(numbers, *args, group=group, **kwargs)
        if numbers.numel() == 1:
            numbers *= 1 + 1e-6 * dist.get_process_group_ranks(group)[0]  # of a float32 norm, some last bits

    dist.all_reduce = all_reduce
    try:
        for step in range(3):
            params[0].grad = part_of(torch.full((8, 6), 1.1 + step), mesh["dp"], [S0])
            norm = hfac.clip_grad_norm_(optimizer, 1.0, mesh["pp"]).double()
            optimizer.step()
            first = norm.clone()
            dist.broadcast(first, 0)
            different += int(first != norm)
    finally:
        dist.all_reduce = real
    return _worst({"norm": float(different)})


def sent():
    """(ranks, bytes) of what the norm of two optimizers of a stage sends, the second time."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    params = [nn.Parameter(part_of(torch.ones(8, 6), mesh["dp"], [S0])) for _ in range(3)]
    optimizers = [hfac.HFac(params[:2]), hfac.SMMF(params[2:])]
    found, real = [], {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}

    def counted(name):
        def call(numbers, *args, group=None, **kwargs):
            found.append((name, group.size(), numbers.nbytes))
            return real[name](numbers, *args, group=group, **kwargs)

        return call

    for p in params:
        p.grad = part_of(torch.ones(8, 6), mesh["dp"], [S0])
    hfac.clip_grad_norm_(optimizers, 1.0, mesh["pp"])
    for name in real:
        setattr(dist, name, counted(name))
    try:
        hfac.clip_grad_norm_(optimizers, 1.0, mesh["pp"])
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return found
