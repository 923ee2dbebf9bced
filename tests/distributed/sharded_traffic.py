"""What a sharded step sends, and what becomes of ranks that part ways; runs on every rank."""

import copy
import os
import pickle
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import OPTIMIZERS, everything, loss_of, model, optimizer_of, train, wrap
from sharded_offload import offloaded
from sharded_steps import CASES, difference, mesh_of, part_of, run_all, whole
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import hfac
from hfac import ops


class Counted:
    """Counts all-reduces and broadcasts, with their ranks and bytes, while it is entered."""

    def __enter__(self):
        self.calls, self._real = [], {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}
        for name, real in self._real.items():

            def counted(tensor, *args, real=real, group=None, **kwargs):
                self.calls.append((dist.get_world_size(group), tensor.numel() * tensor.itemsize))
                return real(tensor, *args, group=group, **kwargs)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *exception):
        for name, real in self._real.items():
            setattr(dist, name, real)


def counted(cases):
    """For every (wrapper, optimizer): all-reduces counted in one step, and what the optimizer says of them."""
    found = {}
    for case in cases:
        kind, name, *options = case
        net = wrap(kind, model(torch.float32))
        optimizer = optimizer_of(name, net, **dict(options))
        train(net, optimizer, 1)
        loss_of(net, 1).backward()
        with Counted() as counter:
            optimizer.step()
        found[case] = counter.calls, optimizer.collectives()
    return found


def counted_on_one_mesh(case):
    """The same for parameters that all lie on one mesh of two dimensions, by optimizer."""
    found = {}
    for name, kwargs in OPTIMIZERS.items():
        mesh = mesh_of(case)
        params = [torch.nn.Parameter(part_of(torch.ones(shape), mesh, places)) for shape, places in CASES[case][1]]
        for p, (shape, places) in zip(params, CASES[case][1], strict=True):
            p.grad = part_of(torch.ones(shape), mesh, places)
        optimizer = getattr(hfac, name.split("-")[0])(params, **kwargs)
        optimizer.step()  # the first, in which ranks tell each other how gradients are placed
        with Counted() as counter:
            optimizer.step()
        found[name] = counter.calls, optimizer.collectives()
    return found


def part_ways(name, *options):
    """One rank has no gradient of one parameter. Returns (message, which parameters were left alone, whether all
    gradients were, step in which it was raised, steps that are counted of each parameter, and whether its factors are
    those of ranks that were never told of it)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def part(shape):
        local = torch.ones(shape[0] // mesh.size(), *shape[1:])
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    params = [torch.nn.Parameter(part(shape)) for shape in ((8, 6), (16, 4), (8,))]
    optimizer = getattr(hfac, name)(params, **dict(options))
    for step in range(3):
        before = [p.to_local().clone() for p in params]
        factors = [s["exp_avg_sq_row"].to_local().clone() for s in optimizer.state.values() if "exp_avg_sq_row" in s]
        for i, p in enumerate(params):
            p.grad = None if step == 1 and i == 1 and dist.get_rank() == 1 else part(tuple(p.shape))
        try:
            optimizer.step()
        except RuntimeError as error:
            untouched = [torch.equal(p.to_local(), old) for p, old in zip(params, before, strict=True)]
            kept = all(bool((p.grad.to_local() == 1).all()) for p in params if p.grad is not None)
            steps = [int(optimizer.state[p]["step"]) for p in params]
            stale = torch.equal(optimizer.state[params[1]]["exp_avg_sq_row"].to_local(), factors[1])
            return str(error), untouched, kept, step, steps, stale
    return None


def state_replaced(cases):
    """By case, differences from whole parameters after steps between which the state was read or replaced."""
    return run_all(cases, _state_replaced)


def _state_replaced(name, way):
    plain = model()
    net = wrap("fsdp", copy.deepcopy(plain))
    ours, theirs = optimizer_of(name, net), optimizer_of(name, plain, backend="reference")
    held = None
    for step in range(4):
        train(plain, theirs, 1, first=step)
        train(net, ours, 1, first=step)
        if way == "entries":  # what offloading trainers do
            for state in ours.state.values():
                for key, value in state.items():
                    state[key] = value.to("cpu", copy=True)
        elif way == "inner-dicts":
            for param, state in list(ours.state.items()):
                ours.state[param] = {key: value.clone() for key, value in state.items()}
        elif way == "moved-within":  # the same objects, their memory elsewhere
            for state in ours.state.values():
                for value in state.values():
                    part = value._local_tensor if isinstance(value, DTensor) else value
                    part.data = part.data.clone()
        elif way == "deepcopied":
            copied = {p: {k: v.clone() for k, v in state.items()} for p, state in ours.__getstate__()["state"].items()}
            ours = optimizer_of(name, net)
            ours.state.update(copied)
        elif way == "pickled":
            state = {i: dict(ours.state[p]) for i, p in enumerate(net.parameters()) if p in ours.state}
            plain_state = {i: {k: whole(v).clone() for k, v in s.items()} for i, s in state.items()}
            ours = optimizer_of(name, net)
            groups = ours.state_dict()["param_groups"]
            ours.load_state_dict({"state": pickle.loads(pickle.dumps(plain_state)), "param_groups": groups})
        elif held is not None:  # a tensor that was taken before the step is the state after it
            assert all(ours.state[p][key] is value for p, key, value in held)
        held = [(p, key, value) for p, state in ours.state.items() for key, value in state.items()]
    found, wanted = everything(net, ours), everything(plain, theirs)
    assert found.keys() == wanted.keys()
    return {key: difference(found[key], value) for key, value in wanted.items()}


def unfrozen(names):
    """The same after a parameter was unfrozen between two steps."""
    return run_all([(name,) for name in names], _unfrozen)


def _unfrozen(name):
    plain = model()
    net = wrap("fsdp", copy.deepcopy(plain))
    optimizers = optimizer_of(name, net), optimizer_of(name, plain, backend="reference")
    for step in range(4):
        for each, optimizer in zip((net, plain), optimizers, strict=True):
            if step == 2:
                each.frozen.requires_grad_(True)
            train(each, optimizer, 1, first=step)
    found, wanted = everything(net, optimizers[0]), everything(plain, optimizers[1])
    assert found.keys() == wanted.keys() and any(key.startswith("frozen.weight.") for key in found)
    return {key: difference(found[key], value) for key, value in wanted.items()}


def refusals():
    """What constructing an optimizer says of parameters that it cannot take."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))

    def made(shape, placements):
        return torch.nn.Parameter(DTensor.from_local(torch.ones(shape), mesh, placements, run_check=False))

    def step_of(param):
        param.grad = param.detach().clone()
        hfac.HFac([param]).step_param(param)

    def skip_later(param):
        optimizer = hfac.SMMF([param], capturable=True)
        optimizer.param_groups[0]["nonfinite"] = "skip"
        optimizer.step()

    def release(kind):
        net = wrap(kind, model())
        hfac.release_gradients(net, optimizer_of("HFac", net))

    cases = {
        "partial": lambda: hfac.HFac([made((4, 6), [Partial(), Replicate()])]),
        "capturable-skip": lambda: hfac.HFac(
            [made((4, 6), [Shard(0), Replicate()])], capturable=True, nonfinite="skip"
        ),
        "skip-later": lambda: skip_later(made((4, 6), [Shard(0), Replicate()])),
        "watch-slices": lambda: hfac.HFac([made((4, 6, 8), [Shard(0), Replicate()])], watch=True, batch_dims=1),
        "part-of-slices": lambda: hfac.SMMF([made((4, 6, 8), [Replicate(), Shard(1)])], batch_dims=1),
        "triton": lambda: hfac.SMMF([made((4, 6), [Shard(0), Replicate()])], backend="cuda"),
        "step-param": lambda: step_of(made((4, 6), [Shard(0), Replicate()])),
        "release-ddp": lambda: release("ddp"),
    }
    found = {}
    for case, act in cases.items():
        try:
            act()
            found[case] = None
        except (TypeError, ValueError, RuntimeError) as error:
            found[case] = f"{type(error).__name__}: {error}"
    return found


def on_cpus(net):
    """A model whose shards FSDP2 has offloaded, without FSDP2, whose policy wants a GPU."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in net.modules():
        for name, param in module.named_parameters(recurse=False):
            part = offloaded(part_of(param.detach(), mesh, [Shard(0)]))
            setattr(module, name, torch.nn.Parameter(part, requires_grad=param.requires_grad))
    return net


def train_by_hand(net, optimizer, steps, first=0):
    """Steps with gradients that no backward pass has made."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for step in range(first, first + steps):
        for param in filter(lambda param: param.requires_grad, net.parameters()):
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step), dtype=param.dtype)
            param.grad = offloaded(part_of(grad, mesh, [Shard(0)]))
        optimizer.step()


def lose_one(folder, name, how, mode=""):
    """Rank 2 dies, or raises, in the middle of the third step. The others write down what they got, and when."""
    rank = dist.get_rank()
    net = on_cpus(model()) if mode == "offloaded" else wrap("fsdp", model())
    optimizer = optimizer_of(name, net, backend="reference")
    if mode == "released":
        hfac.release_gradients(net, optimizer)
    if mode == "watched":
        optimizer.param_groups[0]["watch"] = True
    if mode in ("capturable", "skip-step"):
        optimizer.param_groups[0]["capturable"] = mode == "capturable"
        optimizer.param_groups[0]["nonfinite"] = "skip-step"
    if mode == "scaled":
        optimizer.param_groups[0]["amp_scaling"] = True
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # as a GradScaler sets them
    steps = train_by_hand if mode == "offloaded" else train
    steps(net, optimizer, 2)
    model_state, state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
    lost = "hfac_sums" if name == "HFac" else "smmf_sums_step_"
    apply = ops.OpCall.apply

    def broken(call, *args, **kwargs):
        if call.op.name != lost:
            return apply(call, *args, **kwargs)
        if how == "dies":
            os._exit(0)  # to the parent all is well: it must not end the others
        raise ArithmeticError("broken on purpose")

    if rank == 2:
        ops.OpCall.apply = broken
    start = time.monotonic()
    try:
        steps(net, optimizer, 1, first=2)
        outcome = "nothing"
    except Exception as error:
        outcome = type(error).__name__
    with open(f"{folder}/{rank}", "w") as file:
        file.write(f"{outcome} {time.monotonic() - start:.1f}")
    os._exit(0)
