"""Watched steps of sharded parameters; runs on every rank."""

import copy

import torch
from sharded_models import loss_of, model, optimizer_of, wrap
from sharded_steps import CASES, OPTIONS, difference, mesh_of, part_of, run_all, whole
from sharded_traffic import Counted

import hfac

METRICS = ("update_rms", "direction_rms", "clip_factor", "unmoved", "skipped")


def compare(name, options, case, dtype, backend):
    """Largest differences of metrics from those of watched steps of whole tensors; and whether the steps have the bits
    of unwatched ones."""
    params, mesh = CASES[case][1], mesh_of(case)
    kwargs = OPTIONS[name][options]
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator).to(dtype) for shape, _ in params]
    ours, unwatched = (
        [torch.nn.Parameter(part_of(p, mesh, places)) for p, (_, places) in zip(full, params, strict=True)]
        for _ in range(2)
    )
    theirs = [torch.nn.Parameter(p.clone()) for p in full]
    made = getattr(hfac, name)
    optimizer = made(ours, **kwargs, backend=backend, watch=True)
    plain = made(unwatched, **kwargs, backend=backend)
    reference = made(theirs, **kwargs, backend="reference", watch=True)
    errors = {}
    for step in range(3):
        for i, (p, u, q, (shape, places)) in enumerate(zip(ours, unwatched, theirs, params, strict=True)):
            grad = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
            if "nonfinite" in kwargs and step == 1 and i == 0:
                grad.view(-1)[-1] = float("nan")
            q.grad, p.grad, u.grad = grad, part_of(grad, mesh, places), part_of(grad, mesh, places)
        for each in (optimizer, plain, reference):
            each.step()
            each.zero_grad()
        found, wanted = optimizer.diagnostics(), reference.diagnostics()
        assert found.keys() == wanted.keys()
        for i, metrics in wanted.items():
            for key in METRICS:
                if key in metrics:
                    mine, other = found[i][key].nan_to_num(nan=-1.0), metrics[key].nan_to_num(nan=-1.0)
                    errors[f"{step}.{i}.{key}"] = difference(mine, other)
    same = all(torch.equal(whole(p.detach()), whole(u.detach())) for p, u in zip(ours, unwatched, strict=True))
    return errors | {"bits": float(not same)}


def compare_all(cases):
    return run_all(cases, compare)


def sent(kind, name):
    """What a watched step sends, what the optimizer says of it, and what it says without; and whether a step in the
    backward pass tells the same."""
    bare = model()
    nets = [wrap(kind, copy.deepcopy(bare)) for _ in range(2)]
    optimizer, released = (optimizer_of(name, net, watch=True) for net in nets)
    hfac.release_gradients(nets[1], released)
    for step in range(2):
        for net in nets:
            loss_of(net, step).backward()
        with Counted() as counter:
            optimizer.step()
        released.step()
        optimizer.zero_grad()
    found, others = optimizer.diagnostics(), released.diagnostics()
    same = found.keys() == others.keys() and all(
        difference(found[i][key], others[i][key]) < 1e-6 for i in found for key in METRICS if key in found[i]
    )
    said = optimizer.collectives()
    optimizer.param_groups[0]["watch"] = False
    return counter.calls, said, optimizer.collectives(), same and len(found) > 5
