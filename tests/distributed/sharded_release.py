"""Sharded parameters that are stepped in the backward pass; runs on every rank."""

import copy

import torch
import torch.distributed as dist
from sharded_models import OPTIMIZERS, Model, everything, loss_of, model, optimizer_of, wrap
from sharded_steps import difference, run_all
from sharded_traffic import Counted
from torch.multiprocessing.reductions import StorageWeakRef

import hfac


def made(name, net, backend="auto", accumulate=1, exact=True, **options):
    optimizer = getattr(hfac, name.split("-")[0])(net.parameters(), **OPTIMIZERS[name], backend=backend, **options)
    return optimizer, hfac.release_gradients(net, optimizer, accumulate, exact=exact)


def train(net, optimizer, first, steps, accumulate=1, sync=True, calls_step=True):
    for step in range(first, first + steps):
        for micro in range(accumulate):
            if not sync and hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(micro == accumulate - 1)
            (loss_of(net, 10 * step + micro) / accumulate).backward()
        if calls_step:
            optimizer.step()


def compare(kind, name, *options):
    """Largest differences from the bare model, whose parameters are stepped in the backward pass one by one."""
    given = dict(options)
    loop = {key: given.pop(key) for key in ("sync", "calls_step") if key in given}
    loop["accumulate"] = given.get("accumulate", 1)
    unfreezes, resumes = given.pop("unfreezes", False), given.pop("resumes", False)
    plain = model(tied=given.pop("tied", False), uneven=given.pop("uneven", False))
    wrapped = wrap(kind, copy.deepcopy(plain))
    if not loop.get("sync", True):
        theirs, handle = made(name, plain, "reference", **given)
        given["accumulate"] = 1  # FSDP brings what it has added up once
    else:
        theirs, handle = made(name, plain, "reference", **given)
    ours, released = made(name, wrapped, **given)
    for part in range(2):
        train(wrapped, ours, 3 * part, 3, **loop)
        assert all(param.grad is None for param in wrapped.parameters())
        train(plain, theirs, 3 * part, 3, **loop)
        if unfreezes:
            for net in (wrapped, plain):
                net.frozen.requires_grad_(True)
        if resumes and part == 0:
            saved = ours.state_dict(), released.state_dict()
            released.remove()
            ours, released = made(name, wrapped, **given)
            ours.load_state_dict(saved[0])
            released.load_state_dict(saved[1])
    errors = {}
    if ours.max_grad_norm is not None:
        errors["norm"] = difference(ours.grad_norm, theirs.grad_norm)
    found, wanted = everything(wrapped, ours), everything(plain, theirs)
    assert found.keys() == wanted.keys() and (not unfreezes or any(key.startswith("frozen.weight.") for key in found))
    handle.remove()
    return errors | {key: difference(found[key], value) for key, value in wanted.items()}


def compare_all(cases):
    return run_all(cases, compare)


def counted(cases):
    """By case, all-reduces and broadcasts of a backward pass and a step, what the optimizer says of them, and what it
    says of a step without release."""
    found = {}
    for case in cases:
        kind, name, *options = case
        net = wrap(kind, model())
        optimizer, handle = made(name, net, **dict(options))
        train(net, optimizer, 0, 2)
        loss = loss_of(net, 20)
        with Counted() as counter:
            loss.backward()
            optimizer.step()
        said = optimizer.collectives()
        handle.remove()
        found[case] = counter.calls, said, optimizer.collectives()
    return found


class Watch:
    """Bytes of gradients that are there: whole ones, of which FSDP makes this rank's shards, and these."""

    def __init__(self, net):
        self.peak, self._there, self._known = 0, {}, set()
        for module in net.modules():
            module.register_forward_pre_hook(self._forward)
        for param in net.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda param: self._made(param.grad.to_local()))

    def _forward(self, module, _):
        for param in module.parameters(recurse=False):  # whole in the forward pass, and the same tensor in each
            if param.requires_grad and param not in self._known:
                self._known.add(param)
                param.register_hook(self._made)

    def _made(self, grad):
        storage = grad.untyped_storage()
        self._there[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._there = {key: entry for key, entry in self._there.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._there.values()))


def peaks(names, blocks=12):
    """By optimizer, and whether its parameters are stepped in the backward pass, the most bytes of gradients at once,
    in multiples of a block's; AdamW's step is that of torch's tutorial, in a hook of each parameter."""
    found = {}
    for name in ("AdamW", *names):
        for released in (False, True):
            torch.manual_seed(0)
            net = Model(width=64, hidden=128, blocks=blocks)
            block = sum(param.nbytes for param in net.blocks[0].parameters())
            for part in (net.embed, net.head):
                part.requires_grad_(False)
            net = wrap("fsdp", net)
            watch = Watch(net)
            params = [param for param in net.parameters() if param.requires_grad]
            if name != "AdamW":
                optimizer = optimizer_of(name, net)
                if released:
                    hfac.release_gradients(net, optimizer)
            elif released:
                optimizers = {param: torch.optim.AdamW([param]) for param in params}

                def step(param, optimizers=optimizers):
                    optimizers[param].step()
                    optimizers[param].zero_grad()

                for param in params:
                    param.register_post_accumulate_grad_hook(step)
            else:
                optimizer = torch.optim.AdamW(params)
            for seed in range(3):
                loss_of(net, seed).backward()
                if name != "AdamW" or not released:
                    optimizer.step()
                    optimizer.zero_grad()
            found[name, released] = watch.peak / block
    return found


def overlap(name):
    """What has been sent, and which blocks' gradients are there, when the backward pass of each block begins."""
    net = wrap("fsdp", model())
    optimizer, _ = made(name, net)
    train(net, optimizer, 0, 1)
    seen = []

    def note(k):
        there = [i for i, block in enumerate(net.blocks) if block.shards[0].grad is not None]
        seen.append((k, len(counter.calls), there))

    for k, block in enumerate(net.blocks):
        block.shards = list(block.parameters())
        block.register_full_backward_pre_hook(lambda *_, k=k: note(k))
    with Counted() as counter:
        loss_of(net, 1).backward()
    return seen, len(counter.calls)


def part_ways(name):
    """What a backward pass says where one rank has lost a gradient before the module is stepped, and whether any
    parameter of that module has changed."""
    net = wrap("fsdp", model())
    bias, block = net.blocks[1].down.bias, net.blocks[1]

    def lose(param):
        if dist.get_rank() == 1:
            param.grad = None

    bias.register_post_accumulate_grad_hook(lose)
    params = list(block.parameters())
    optimizer, _ = made(name, net)
    before = [param.to_local().detach().clone() for param in params]
    try:
        loss_of(net, 0).backward()
        optimizer.step()
    except RuntimeError as error:
        changed = any(not torch.equal(old, p.to_local()) for old, p in zip(before, params, strict=True))
        return str(error), changed
    return "nothing", False
