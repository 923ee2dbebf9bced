"""Parameters that FSDP2 has offloaded to the CPU, as its CPUOffloadPolicy leaves them: shards on the CPU, on a mesh of
another device; runs on every rank."""

from functools import partial

import torch
from sharded_models import Model, loss_of, sharded
from sharded_steps import CASES, OPTIONS, difference, mesh_of, part_of, run_all
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

import hfac
from bench.memory import peak_transient_bytes

#: by name, how the optimizer of `memory` is made
MEASURED = {
    "AdamW": torch.optim.AdamW,
    "HFac": hfac.HFac,
    "HFac-int8": partial(hfac.HFac, first_moment="int8"),
    "SMMF": hfac.SMMF,
}


def offloaded(tensor):
    """The same shards, on a mesh of GPUs."""
    mesh = DeviceMesh.from_group(tensor.device_mesh.get_group(0), "cuda")
    meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
    return DTensor(tensor.to_local(), DTensorSpec(mesh, tensor.placements, tensor_meta=meta), requires_grad=False)


def gathered(tensor, mesh):
    """The whole, by way of a mesh of CPUs."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor._local_tensor.is_cpu and tensor.device_mesh.device_type == "cuda"
    shape, stride = tensor.shape, tensor.stride()
    on_cpu = DTensor.from_local(
        tensor._local_tensor, mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )
    return on_cpu.full_tensor()


def compare(name, options, case):
    """Largest differences from steps of whole tensors, of parameters and states; state is loaded once between."""
    params, mesh = CASES[case][1], mesh_of(case)
    kwargs = OPTIONS[name][options]
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in params]
    ours = [
        torch.nn.Parameter(offloaded(part_of(p, mesh, places))) for p, (_, places) in zip(full, params, strict=True)
    ]
    theirs = [torch.nn.Parameter(p.clone()) for p in full]
    optimizer = getattr(hfac, name)(ours, **kwargs)
    reference = getattr(hfac, name)(theirs, **kwargs, backend="reference")
    for step in range(4):
        for p, q, (shape, places) in zip(ours, theirs, params, strict=True):
            q.grad = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
            p.grad = offloaded(part_of(q.grad, mesh, places))
        optimizer.step()
        reference.step()
        if step == 1:
            saved, optimizer = optimizer.state_dict(), getattr(hfac, name)(ours, **kwargs)
            optimizer.load_state_dict(saved)
    errors = {}
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        errors[f"{i}"] = difference(gathered(p.detach(), mesh), q.detach())
        for key, value in reference.state[q].items():
            errors[f"{i}.{key}"] = difference(gathered(optimizer.state[p][key], mesh), value)
    return errors


def compare_all(cases):
    return run_all(cases, compare)


def without_a_backend():
    """What construction says where the process group has a backend for GPUs alone."""

    class Alone:
        _device_types = (torch.device("cuda"),)

    param = torch.nn.Parameter(offloaded(part_of(torch.ones(8, 6), mesh_of("even"), [CASES["even"][1][0][1][0]])))
    get_group, DeviceMesh.get_group = DeviceMesh.get_group, lambda *_: Alone()
    try:
        hfac.HFac([param])
    except ValueError as error:
        return str(error)
    finally:
        DeviceMesh.get_group = get_group
    return "nothing"


def memory(blocks=12):
    """By optimizer, of a model of equal blocks that fully_shard offloads to the CPU, bytes of this rank's state, and
    the most that a step allocates beside it: both in multiples of this rank's weights."""
    found = {}
    for name, make in MEASURED.items():
        torch.manual_seed(0)
        policy = CPUOffloadPolicy(pin_memory=False)  # what pins is a GPU
        net = Model(width=256, hidden=1024, blocks=blocks)
        net = sharded(net, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), offload_policy=policy)
        params = [param for param in net.parameters() if param.requires_grad]
        optimizer = make(params, lr=1e-3)
        for step in range(2):
            loss_of(net, step).backward()
            if step == 0:
                optimizer.step()
                optimizer.zero_grad()
        transient = peak_transient_bytes(optimizer.step, torch.device("cpu"))
        weights = sum(param.to_local().nbytes for param in params)
        values = [value for state in optimizer.state.values() for value in state.values()]
        state = sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in values)
        found[name] = state / weights, transient / weights
    return found
