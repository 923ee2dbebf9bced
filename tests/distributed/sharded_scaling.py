"""Sharded parameters under a GradScaler; runs on every rank."""

import copy

import torch
import torch.distributed as dist
from sharded_models import everything, loss_of, model, optimizer_of, wrap
from sharded_steps import difference, run_all
from sharded_traffic import Counted

NAN = float("nan")


def compare(kind, name, unscales, *options):
    """Largest differences from the bare model under a scaler of its own. In the second step one rank's part of one
    gradient is not finite, in the fourth one of another parameter; neither step is made, and the scale falls."""
    plain = model()
    wrapped = wrap(kind, copy.deepcopy(plain))
    nets = wrapped, plain
    given = dict(options)
    optimizers = (
        optimizer_of(name, wrapped, amp_scaling=True, **given),
        optimizer_of(name, plain, amp_scaling=True, backend="reference", **given),
    )
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in nets]
    for step in range(6):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            scaler.scale(loss_of(net, step)).backward()
            grad = {1: net.embed.weight, 3: net.blocks[1].down.weight}.get(step)
            if grad is not None:
                grad = grad.grad
                if net is plain:
                    grad.view(-1)[-1] = NAN
                elif grad.device_mesh.get_local_rank(-1) == grad.device_mesh.size(-1) - 1:  # on all replicas
                    grad.to_local().view(-1)[-1] = NAN
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if step in (1, 3):
            assert all(bool(torch.isnan(o.grad_norm)) for o in optimizers if o.max_grad_norm is not None)
    found, wanted = everything(wrapped, optimizers[0]), everything(plain, optimizers[1])
    assert found.keys() == wanted.keys()
    steps = {int(value) for key, value in found.items() if key.endswith(".step")}
    errors = {key: difference(found[key], value) for key, value in wanted.items()}
    return errors | {"scale": abs(scalers[0].get_scale() - scalers[1].get_scale()), "steps": float(steps != {4})}


def compare_all(cases):
    return run_all(cases, compare)


def alone(name):
    """What all ranks do where one has been told that a gradient is not finite, as torch does it where gradients lie on
    several meshes: whether any parameter has changed; and what is sent for that."""
    net = wrap("fsdp-tp", model(torch.float32))
    optimizer = optimizer_of(name, net, amp_scaling=True)
    changed = []
    for step in range(2):
        before = [param.to_local().detach().clone() for param in net.parameters()]
        (loss_of(net, step) * 4).backward()
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.found_inf = torch.tensor(float(step == 1 and dist.get_rank() == 1))
        with Counted() as counter:
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        optimizer.zero_grad()
        changed.append([not torch.equal(old, p.to_local()) for old, p in zip(before, net.parameters(), strict=True)])
    every = torch.tensor([sum(map(sum, changed[1:]))])
    dist.all_reduce(every)
    return any(changed[0]), int(every), counter.calls, optimizer.collectives()
