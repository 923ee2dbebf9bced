"""Some steps of sharded parameters beside the same steps of whole ones; runs on every rank."""

import traceback
from functools import lru_cache

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import hfac
from hfac import signs

STEPS = 5
#: how FSDP2 cuts what tensor parallelism has cut already
STRIDED = "strided"

#: name: (mesh, [(shape, placements)]). None: a plain parameter among sharded ones.
S0, S1, S2, S3, R = *map(Shard, range(4)), Replicate()
CASES = {
    "even": ((4,), [((8, 6), [S0]), ((16, 24), [S0]), ((12,), [S0])]),
    "uneven": ((4,), [((7, 6), [S0]), ((10, 9), [S0]), ((13,), [S0]), ((17, 2, 3), [S0])]),
    "empty-shards": ((4,), [((2, 6), [S0]), ((5, 4), [S0]), ((3,), [S0]), ((1, 7), [S0]), ((0, 3), [S0])]),
    "convolutions": ((4,), [((8, 3, 3, 3), [S0]), ((6, 4, 1, 1), [S0]), ((5, 2, 3, 3, 2), [S0]), ((6,), [S0])]),
    "columns": ((4,), [((6, 64), [S1]), ((32, 32), [S1]), ((9, 32), [S1])]),
    "columns-uneven": (  # pieces that are no whole bytes of signs, some of them empty
        (4,),
        [
            ((6, 10), [S1]),
            ((3, 5, 7), [S1]),
            ((4, 3, 6), [S2]),
            ((6, 3), [S1]),
            ((5, 3, 2, 7), [S1]),
            ((3, 4, 3, 5), [S3]),
            ((4, 2, 3, 3), [S2]),
        ],
    ),
    "whole": ((4,), [((8, 6), [R]), ((5,), [R])]),
    "mixed": ((4,), [((8, 6), [S0]), ((8, 6), None), ((12,), None), ((9, 4), [S0]), ((16, 32), [S1]), ((6, 5), [R])]),
    "hsdp": ((2, 2), [((8, 6), [R, S0]), ((7, 5), [R, S0]), ((9,), [R, S0])]),
    "fsdp-tp": (
        (2, 2),
        [
            ((8, 16), [S0, S1]),
            ((12, 16), STRIDED),
            ((16, 32), [S1, S0]),
            ((8, 8), [S0, R]),
            ((16,), [S0, R]),
            ((16,), STRIDED),
        ],
    ),
    "fsdp-tp-uneven": ((2, 2), [((7, 16), [S0, S1]), ((5, 32), [S0, S1]), ((3, 6), [S0, R]), ((9, 7), [S0, S0])]),
    "fsdp-tp-bytes": (
        (2, 2),
        [((6, 10), [S0, S1]), ((4, 6, 5), [S1, S2]), ((7, 5), [S1, R]), ((4, 9, 3), [S2, S1]), ((3, 9), [S1, S1])],
    ),
    "tp-only": ((2, 2), [((8, 16), [R, S1]), ((9, 6), [R, S0]), ((5,), [R, S0]), ((6,), [R, R])]),
    "three-dims": ((2, 1, 2), [((8, 16), [R, S0, S1]), ((8, 16), [S0, S0, S1]), ((9, 5), [S0, R, S0])]),
}
#: those whose placements split bytes of SMMF's sign bits, so that signs are kept in bytes
BYTES = ("columns-uneven", "fsdp-tp-bytes")
OPTIONS = {
    "HFac": {
        "all": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, clip_threshold=0.7),
        "unclipped": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, clip_threshold=None, maximize=True),
        "skip": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, clip_threshold=0.7, nonfinite="skip"),
        "limit": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, nonfinite="skip", max_grad_norm=0.5),
        "skip-step": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, nonfinite="skip-step"),
        "capturable": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, clip_threshold=0.7, capturable=True),
        "capturable-skip-step": dict(
            lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, nonfinite="skip-step", max_grad_norm=0.5, capturable=True
        ),
        "dense": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, clip_threshold=0.7, dense=True),
        "int8": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, clip_threshold=0.7, first_moment="int8"),
        "int8-limit": dict(
            lr=0.01, betas=(0.8, 0.95), first_moment="int8", nonfinite="skip", max_grad_norm=0.5, maximize=True
        ),
        "int8-capturable": dict(lr=0.01, first_moment="int8", nonfinite="skip-step", capturable=True),
        "int8-skip-step": dict(lr=0.01, first_moment="int8", nonfinite="skip-step", max_grad_norm=0.5),
    },
    "SMMF": {
        "all": dict(lr=0.01, weight_decay=0.1, decay_rate=-0.8),
        "adam": dict(lr=0.01, weight_decay=0.1, weight_decay_mode="adam", vector_reshape=False, maximize=True),
        "no-first": dict(lr=0.01, weight_decay=0.1, beta=None),
        "skip": dict(lr=0.01, weight_decay=0.1, nonfinite="skip"),
        "limit": dict(lr=0.01, weight_decay=0.1, nonfinite="skip", max_grad_norm=0.5),
        "skip-step": dict(lr=0.01, weight_decay=0.1, nonfinite="skip-step", max_grad_norm=0.5),
        "bytes": dict(lr=0.01, weight_decay=0.1, nonfinite="skip", max_grad_norm=0.5, signs="bytes"),
        "capturable": dict(lr=0.01, weight_decay=0.1, decay_rate=-0.8, capturable=True),
        "capturable-skip-step": dict(
            lr=0.01, weight_decay=0.1, nonfinite="skip-step", max_grad_norm=0.5, capturable=True
        ),
    },
}


def part_of(full, mesh, placements):
    """A DTensor of the parts that torch.chunk gives; independent of the package's own layout code."""
    if placements is None:
        return full.clone()
    if placements == STRIDED:  # tensor parallelism first, FSDP then
        part = full.chunk(mesh.size(1))[mesh.get_local_rank(1)].chunk(mesh.size(0))[mesh.get_local_rank(0)]
        placements = [_StridedShard(0, split_factor=mesh.size(1)), Shard(0)]
    else:
        part = full
        for d, placement in enumerate(placements):
            if isinstance(placement, Shard):
                size = -(-part.shape[placement.dim] // mesh.size(d))
                start = min(size * mesh.get_local_rank(d), part.shape[placement.dim])
                size = min(size, part.shape[placement.dim] - start)
                part = part.narrow(placement.dim, start, size)
    return DTensor.from_local(
        part.clone(memory_format=torch.contiguous_format),
        mesh,
        placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh_of(case):
    return _mesh(CASES[case][0])


@lru_cache
def _mesh(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b", "c")[: len(shape)])


def run_case(name, options, case, dtype, backend, steps=STEPS):
    """Largest difference from the run on whole tensors: of parameters, and of every state, relative to its size."""
    params, mesh = CASES[case][1], mesh_of(case)
    kwargs = OPTIONS[name][options]
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator, dtype=dtype) for shape, _ in params]
    ours = [torch.nn.Parameter(part_of(p, mesh, places)) for p, (_, places) in zip(full, params, strict=True)]
    theirs = [torch.nn.Parameter(p.clone()) for p in full]
    optimizer = getattr(hfac, name)(ours, **kwargs, backend=backend)
    reference = getattr(hfac, name)(theirs, **kwargs, backend="reference")
    schedulers = _scheduled(optimizer, reference) if kwargs.get("capturable") else []
    norms = []
    for step in range(steps):
        for i, (p, q, (shape, places)) in enumerate(zip(ours, theirs, params, strict=True)):
            grad = 0.1 * torch.randn(shape, generator=generator, dtype=dtype)
            if "max_grad_norm" in kwargs and step % 3 == 0:
                grad *= 0.01
            if step % 5 == 3 and i == 1:
                p.grad = q.grad = None  # a parameter that no rank used
                continue
            if "nonfinite" in kwargs and step == 2 and i in (0, 2) and grad.numel():
                grad.view(-1)[-1] = float("nan")
            q.grad, p.grad = grad, part_of(grad, mesh, places)
        before, grads = _bits(ours, optimizer), [None if p.grad is None else p.grad.clone() for p in ours]
        optimizer.step()
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
        if kwargs.get("nonfinite") == "skip-step" and step == 2:
            assert _bits(ours, optimizer) == before
            for p, grad in zip(ours, grads, strict=True):
                assert grad is None or difference(whole(p.grad).nan_to_num(9.0), whole(grad).nan_to_num(9.0)) == 0
            norms.append((torch.zeros(()), torch.zeros(())))
            assert not optimizer.grad_norm.isfinite()
            continue
        norms.append((optimizer.grad_norm, reference.grad_norm))
    state = optimizer.state_dict()["state"]
    errors = {}
    if "max_grad_norm" in kwargs:
        clipped = [bool(norm > kwargs["max_grad_norm"]) for _, norm in norms]
        assert any(clipped) and not all(clipped)
        errors["norm"] = max(difference(norm, wanted) for norm, wanted in norms)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        errors[f"{i}"] = difference(whole(p.detach()), q.detach())
        for key, value in reference.state_dict()["state"][i].items():
            found = whole(state[i][key])
            if found.dtype == torch.bool and (value.dtype == torch.bool or case in BYTES):
                assert found.shape == q.shape, (i, key, found.shape)
                found, value = (signs.to_bits(each) if each.dtype == torch.bool else each for each in (found, value))
            assert found.shape == value.shape and found.dtype == value.dtype, (i, key, found.shape, value.shape)
            errors[f"{i}.{key}"] = difference(found, value, spare_signs=int(dtype == torch.float32))
    return errors


def _scheduled(*optimizers):
    """Learning rates that are tensors, which a scheduler writes."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    return [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]


def _bits(params, optimizer):
    """Of this rank's parts of parameters and states; what counts skipped steps apart."""
    values = [value for p in params for key, value in sorted(optimizer.state[p].items()) if key != "skipped"]
    parts = [value.to_local() if isinstance(value, DTensor) else value for value in (*params, *values)]
    return [part.detach().reshape(-1).view(torch.uint8).tolist() if part.numel() else [] for part in parts]


def partial_gradient(name):
    """A gradient whose sum over the copies of a part is yet to be formed: as the whole one."""
    mesh = mesh_of("hsdp")
    full = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(part_of(full, mesh, [R, S0])), torch.nn.Parameter(full.clone())
    optimizer, reference = (getattr(hfac, name)([p], **OPTIONS[name]["all"]) for p in (ours, theirs))
    for step in range(3):
        theirs.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        part = part_of(theirs.grad, mesh, [R, S0]).to_local() * (0.25, 0.75)[mesh.get_local_rank(0)]
        ours.grad = DTensor.from_local(part, mesh, [Partial(), S0], run_check=False)
        optimizer.step()
        reference.step()
    return difference(whole(ours.detach()), theirs.detach())


def along_grown_gradient(larger, steps=20):
    """The least product of an element of the gradient and its step, where the gradient has become ``larger``: of
    parameters whose moments are whole, and of which every rank has a part."""
    mesh = mesh_of("even")
    generator = torch.Generator().manual_seed(0)
    shapes = [(13,), (300,), (1, 64), (64, 1), (10, 9)]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [torch.nn.Parameter(part_of(torch.zeros_like(grad), mesh, [S0])) for grad in grads]
    optimizer = hfac.HFac(params, dense=True)
    for step in range(steps + 1):
        for param, grad in zip(params, grads, strict=True):
            param.detach().zero_()  # the new weights are the step
            param.grad = part_of(grad * (larger if step == steps else 1), mesh, [S0])
        optimizer.step()
    return min(float((-grad * whole(param.detach())).min()) for param, grad in zip(params, grads, strict=True))


def difference(ours, theirs, spare_signs=0):
    """The largest, relative to the largest entry of ``theirs``; of packed signs and codes how many are others, above
    those that may be, because a number is within rounding of a border."""
    if not theirs.numel():
        return 0.0
    if theirs.dtype == torch.uint8:
        others = sum(((ours ^ theirs) >> bit & 1).sum().item() for bit in range(8))
        return float(max(0, others - spare_signs))
    if theirs.dtype == torch.int8:  # codes: equal or neighbours
        off = (ours.int() - theirs.int()).abs()
        return float(max(int(off.max()) - 1, int(off.sum()) - max(spare_signs, theirs.numel() // 1000), 0))
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def run_all(cases, run=run_case):
    """{case: errors, or the message of what it raised}."""
    found = {}
    for case in cases:
        try:
            found[case] = run(*case)
        except Exception:
            found[case] = traceback.format_exc()
    return found


#: how bfloat16 parameters are stored, and what the comparison below is of
STORED = {
    "stochastic": dict(rounding="stochastic", seed=2**40 + 3),
    "split": dict(master="split"),
    "split8": dict(master="split8", rounding="stochastic"),
}


def run_stored(name, stored, case, backend, steps=3):
    """Largest share of elements of a bfloat16 parameter that differ from those of the run on whole tensors; with master
    weights the largest difference of those."""
    params, mesh = CASES[case][1], mesh_of(case)
    kwargs = {**OPTIONS[name]["all"], **STORED[stored], "lr": 2e-3}
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator).bfloat16() for shape, _ in params]
    ours = [torch.nn.Parameter(part_of(p, mesh, places)) for p, (_, places) in zip(full, params, strict=True)]
    theirs = [torch.nn.Parameter(p.clone()) for p in full]
    optimizer = getattr(hfac, name)(ours, **kwargs, backend=backend)
    reference = getattr(hfac, name)(theirs, **kwargs, backend="reference")
    for _ in range(steps):
        for p, q, (shape, places) in zip(ours, theirs, params, strict=True):
            q.grad = (0.1 * torch.randn(shape, generator=generator)).bfloat16()
            p.grad = part_of(q.grad, mesh, places)
        optimizer.step()
        reference.step()
    values = [
        [whole(value) for value in opt.fp32_state_dict(torch.nn.ParameterList(tensors)).values()]
        for opt, tensors in ((optimizer, ours), (reference, theirs))
    ]
    moved = [float((p != start.float()).float().mean()) for p, start in zip(values[1], full, strict=True) if p.numel()]
    assert min(moved) > 0.1, moved
    if stored == "split":
        return {str(i): difference(p, q) for i, (p, q) in enumerate(zip(*values, strict=True))}
    return {str(i): float((p != q).float().mean()) for i, (p, q) in enumerate(zip(*values, strict=True)) if p.numel()}


def stored_all(cases):
    return run_all(cases, run_stored)


def fused_all(cases):
    return run_all(cases, _fused)


#: by the dimension that is cut: shapes of fused weights, the first ones of eight pieces, the last of three; of the
#: columns some pieces split bytes of SMMF's sign bits, and some do not
FUSED = {0: ((24, 5), (24,), (6, 4)), 1: ((5, 24), (3, 64), (4, 6))}


def _fused(name, options, along=0):
    """Differences of fused weights, of which every rank has whole pieces, from those of whole tensors; what a step
    sends, and what is said where a rank would have part of a piece. Of eight pieces four ranks have two each, of
    three one, one, one and none."""
    mesh, kwargs, place = _mesh((4,)), {"lr": 0.01, **dict(options)}, [Shard(along)]
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in FUSED[along]]
    ours = [torch.nn.Parameter(part_of(p, mesh, place)) for p in full]
    theirs = [torch.nn.Parameter(p.clone()) for p in full]

    def made(p):
        groups = [{"params": p[:2], "views": (2, 4)}, {"params": p[2:], "views": 3}]
        return getattr(hfac, name)([{**group, "views_dim": along} for group in groups], **kwargs)

    optimizer, reference = made(ours), made(theirs)
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn(q.shape, generator=generator, dtype=q.dtype)
            if step == 2 and "nonfinite" in kwargs:
                q.grad[0] = float("nan")
            p.grad = part_of(q.grad, mesh, place)
        optimizer.step()
        reference.step()
    errors = {"collectives": float(len(optimizer.collectives()) - 3 * ("max_grad_norm" in kwargs))}
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        errors[f"{i}"] = difference(whole(p.detach()), q.detach())
        for key, value in reference.state[q].items():
            found = whole(optimizer.state[p][key])
            assert found.shape == value.shape, (i, key, found.shape, value.shape)
            found, value = (signs.to_bits(each) if each.dtype == torch.bool else each for each in (found, value))
            errors[f"{i}.{key}"] = difference(found, value)
    loaded, saved = made(theirs), optimizer.state_dict()
    saved["state"] = {i: {key: whole(value) for key, value in state.items()} for i, state in saved["state"].items()}
    loaded.load_state_dict(saved)
    for more, named in (({"nonfinite": "skip"}, "skip-step"), ({"watch": True}, "watch=False")):
        try:
            getattr(hfac, name)(ours[:1], views=8, views_dim=along, **more)
            errors["taken"] = 1.0
        except ValueError as error:
            assert "has views=8 and is sharded" in str(error) and named in str(error), error
    small = full[0][:, :4] if along == 0 else full[0][:4]
    for views, placed, told in (
        (6, Shard(along), "a rank would have part of a piece"),
        (8, Shard(1 - along), f"dimension {along}, which views=8 cuts, can be sharded"),
    ):
        try:
            param = torch.nn.Parameter(part_of(small.contiguous(), mesh, [placed]))
            getattr(hfac, name)([param], views=views, views_dim=along)
            errors["taken"] = 1.0
        except ValueError as error:
            assert told in str(error) and "views=1" in str(error), error
    return errors
