"""A small transformer-like model under the wrappers that people train with, beside the same model unwrapped."""

import copy

import torch
import torch.distributed as dist
from sharded_steps import difference, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hfac

OPTIMIZERS = {
    "HFac": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "SMMF": dict(lr=0.01, weight_decay=0.1, decay_rate=-0.8),
    "HFac-int8": dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, first_moment="int8"),
}


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width=16, hidden=32, vocabulary=24, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.frozen(x))


def model(dtype=torch.float64, uneven=False, tied=False):
    torch.manual_seed(0)
    made = Model(width=11, hidden=21, vocabulary=13) if uneven else Model()
    if tied:
        made.head.weight = made.embed.weight
    return made.to(dtype)


def sharded(net, mesh, **options):
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def tensor_parallel(net, mesh):
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def wrap(kind, net):
    """The model as the kind of training wraps it, on all ranks there are; "plain" as it is."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "plain":
        return net
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind in ("fsdp", "fsdp-kept"):
        options = {} if kind == "fsdp" else {"reshard_after_forward": False}
        return sharded(net, init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)), **options)
    if kind == "hsdp-tp":
        mesh = init_device_mesh("cpu", (2, world // 4, 2), mesh_dim_names=("copies", "outer", "inner"))
        return sharded(tensor_parallel(net, mesh["inner"]), mesh["copies", "outer"])
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    if kind == "hsdp":
        return sharded(net, mesh)
    assert kind == "fsdp-tp"
    return sharded(tensor_parallel(net, mesh["inner"]), mesh["outer"])


def optimizer_of(name, net, **kwargs):
    return getattr(hfac, name.split("-")[0])(net.parameters(), **OPTIMIZERS[name], **kwargs)


def loss_of(net, step):
    """Of a batch that is the same on every rank, so that the mean of gradients over ranks is the gradient of one.

    No cross-entropy: its gradients add up to zero over the classes, and a mean that is nothing but rounding cannot be
    compared.
    """
    generator = torch.Generator().manual_seed(step)
    vocabulary = 13 if any(p.shape[:1] == (13,) for p in net.parameters()) else 24
    out = net(torch.randint(vocabulary, (4, 6), generator=generator))
    return nn.functional.mse_loss(out, torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))


def train(net, optimizer, steps, first=0, clip=None, accumulate=False):
    """``accumulate``: of a second batch, whose gradients the ranks do not add up before those of the first."""
    losses = []
    for step in range(first, first + steps):
        if accumulate:
            if hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(False)
            loss_of(net, 1000 + step).backward()
            if hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(True)
        loss = loss_of(net, step)
        loss.backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
            whole(norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(net, optimizer):
    """Whole parameters and states by name, on every rank."""
    found = {}
    for name, param in net.named_parameters():
        name = name.removeprefix("module.")
        found[name] = whole(param.detach()).clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}.{key}"] = whole(value).clone()
    return found


def compare(kind, name, dtype=torch.float64, steps=4, uneven=False, clip=None, own_clip=None, tied=False, accumulate=0):
    """Largest differences from the unwrapped model after training; with ``own_clip`` the optimizer clips the former and
    torch the latter."""
    plain = model(dtype, uneven, tied)
    wrapped = wrap(kind, copy.deepcopy(plain))
    ours = optimizer_of(name, wrapped, **({} if own_clip is None else {"max_grad_norm": own_clip}))
    theirs = optimizer_of(name, plain, backend="reference")
    train(wrapped, ours, steps, clip=clip, accumulate=accumulate)
    train(plain, theirs, steps, clip=own_clip if clip is None else clip, accumulate=accumulate)
    found, wanted = everything(wrapped, ours), everything(plain, theirs)
    assert found.keys() == wanted.keys()
    return {key: difference(found[key], value) for key, value in wanted.items()}


def compare_all(cases):
    return {str(case): compare(*case[:2], **dict(case[2:])) for case in cases}


def replicas(kind, name, steps=200):
    """Whether replicas are equal to the bit after many steps; HSDP's of the two outer ranks, DDP's of all."""
    net = wrap(kind, model(torch.float32))
    optimizer = optimizer_of(name, net)
    train(net, optimizer, steps)
    tensors = [p.detach() for p in net.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    mine = [(t.to_local() if hasattr(t, "to_local") else t).contiguous().flatten() for t in tensors]
    flat = torch.cat([t.view(torch.uint8) for t in mine])
    group = None
    if kind == "hsdp":
        group = next(net.parameters()).device_mesh.get_group(0)
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, flat, group=group)
    same = torch.tensor(float(all(torch.equal(gathered[0], other) for other in gathered)))
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    return bool(same), len(gathered)


def replicas_all(cases):
    return {case: replicas(*case) for case in cases}
