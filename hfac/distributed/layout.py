"""How a DTensor is laid out on its mesh: where its state is, and which ranks share its rows and columns.

Whatever the placements, a rank's shard of a parameter is a product of index sets, one per dimension. Rows and columns
of its matrix are groups of dimensions, so a shard is the intersection of some rows and some columns: sums over a row
are complete once added up over the mesh dimensions that shard the columns' dimensions, and vice versa. Everything here
follows from global shapes and placements, so all ranks agree on it.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import matricize
from ..rounding import BitOffset

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

#: for each dimension of a state, the parameter's dimension that it is sharded with; None: whole on every rank
Follows = tuple[int | None, ...]


def is_dtensor(tensor: Any) -> bool:
    """Tells without importing what only sharded training needs."""
    return hasattr(tensor, "placements") and hasattr(tensor, "_local_tensor")


def flat_refusal(param: Tensor) -> str | None:
    """Why a parameter that another library has flattened cannot be optimized; None for all others.

    FSDP1 makes flat parameters of its own or, with use_orig_params, of a parameter this rank's piece; those that it
    does not shard (NO_SHARD, one rank) keep their shape. DeepSpeed's ZeRO 3 gives ``ds_id`` to the parameters that it
    has partitioned, and to the flat ones that it puts in their place.
    """
    piece = getattr(param, "_fsdp_flattened", False) and param.ndim == 1
    if getattr(param, "_is_flat_param", False) or (piece and dist.is_initialized() and dist.get_world_size() > 1):
        return (
            "is a flat parameter of FSDP1, or a piece of one (use_orig_params=True), which has no rows and columns to "
            "factor. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead."
        )
    if hasattr(param, "ds_id"):
        return (
            "is partitioned by DeepSpeed's ZeRO stage 3, which leaves no rows and columns to factor. Use ZeRO stage 0, "
            "or shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead."
        )
    return None


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself. Call it under no_grad."""
    if not is_dtensor(tensor):
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard.wait() if hasattr(shard, "wait") else shard  # a pending collective


def gradient(param: Tensor, label: str) -> Tensor | None:
    """This rank's shard of a parameter's gradient, redistributed as the parameter is; None without a gradient."""
    grad = param.grad
    return grad if grad is None or not is_dtensor(param) else gradient_shard(param, grad, label)


def gradient_shard(param: Tensor, grad: Tensor, label: str) -> Tensor:
    """`gradient` of a DTensor that has one."""
    if not hasattr(grad, "_local_tensor"):
        raise RuntimeError(
            f"the gradient of {label} must be a DTensor like its parameter, got a plain tensor of shape "
            f"{tuple(grad.shape)}"
        )
    placements = param.placements  # type: ignore[attr-defined]
    if grad.placements != placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=placements)  # type: ignore[attr-defined]
    shard: Tensor = grad._local_tensor
    return shard.wait() if hasattr(shard, "wait") else shard


def sharded_by(tensor: Tensor) -> list[list[int]]:
    """For each dimension of the tensor the mesh dimensions that shard it, in the mesh's order. Empty for a plain
    tensor; a mesh dimension of one rank does not count."""
    found: list[list[int]] = [[] for _ in range(tensor.ndim)]
    if is_dtensor(tensor):
        for mesh_dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if _is_shard(placement) and tensor.device_mesh.size(mesh_dim) > 1:  # type: ignore[attr-defined]
                found[placement.dim].append(mesh_dim)
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether some rank lacks some of it. An empty tensor is whole everywhere."""
    return any(sharded_by(tensor)) and tensor.numel() > 0


def has_whole_pieces(param: Tensor, dim: int, rows: int) -> bool:
    """Whether every rank has whole pieces of so many indices of this dimension."""
    by_dim = sharded_by(param)
    ranks = torch.Size(param.device_mesh.size(d) for d in by_dim[dim]).numel() if by_dim[dim] else 1  # type: ignore[attr-defined]
    size = param.shape[dim]
    return size % (ranks * rows) == 0 or (len(by_dim[dim]) == 1 and -(-size // ranks) % rows == 0)


def refusal(param: Tensor) -> str | None:
    """Why a DTensor cannot be optimized, or None."""
    if any(placement.is_partial() for placement in param.placements):  # type: ignore[attr-defined]
        return (
            "is a DTensor with a Partial placement, whose values exist on no rank. Give the optimizer parameters that "
            "are Shard or Replicate (param.redistribute(...))."
        )
    expected = [len(mine) for mine in _own_indices(param, param.shape, tuple(range(param.ndim)))]
    found = list(local(param.detach()).shape)
    if found != expected:
        return (
            f"has shape {tuple(param.shape)} and placements {tuple(param.placements)}, "  # type: ignore[attr-defined]
            f"of which torch gives this rank a shard of shape {tuple(expected)}, but it has one of {tuple(found)}: it "
            "was cut otherwise, perhaps by Megatron-FSDP, which splits elements evenly and not rows. Shard the model "
            "with torch.distributed.fsdp.fully_shard (FSDP2) instead."
        )
    return None


def group_refusal(param: Tensor) -> str | None:
    """Why the process groups of a DTensor's mesh cannot add up numbers that lie where its shards do, or None."""
    mesh, device = param.device_mesh, local(param.detach()).device  # type: ignore[attr-defined]
    for d in range(mesh.ndim) if device.type != "meta" else ():
        known = getattr(mesh.get_group(d), "_device_types", None)
        if mesh.size(d) > 1 and known and device.type not in {each.type for each in known}:
            here = ", ".join(each.type for each in known)
            return (
                f"has its shards on {device.type}, where a step adds up numbers over ranks, but the process group of "
                f"its mesh has backends for {here} only. Initialize both, for example with "
                'torch.distributed.init_process_group("cpu:gloo,cuda:nccl").'
            )
    return None


def splits_sign_bytes(param: Tensor) -> bool:
    """Whether packed sign bits cannot be sharded as this parameter is.

    They are [d0, bytes of one slice]: sharding the first dimension never splits a byte, sharding the second must not on
    any rank, and further dimensions cannot be sharded.
    """
    by_dim = sharded_by(param)
    if not any(by_dim[1:]):
        return False
    if any(by_dim[2:]):
        return True
    ranks = torch.Size(param.device_mesh.size(d) for d in by_dim[1]).numel()  # type: ignore[attr-defined]
    (_, d1), rest = param.shape[:2], param.shape[2:].numel()
    size = matricize.sign_shape(param.shape)[1]
    even = d1 % ranks == 0 and size % ranks == 0
    whole_bytes = -(-size // ranks) * 8 == -(-d1 // ranks) * rest
    return not (whole_bytes and (even or len(by_dim[1]) == 1))


def zeros(param: Tensor, shape: Sequence[int], follows: Follows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A state of global ``shape``, sharded as its parameter is: a DTensor on the parameter's mesh, or a plain tensor
    for a plain parameter."""
    if not is_dtensor(param):
        return torch.zeros(shape, dtype=dtype, device=device)
    sizes = [len(mine) for mine in _own_indices(param, shape, follows)]
    return as_dtensor(param, shape, follows, torch.zeros(sizes, dtype=dtype, device=device))


def placed(param: Tensor, value: Tensor, follows: Follows) -> Tensor:
    """A state of the right global shape, saved under any layout, laid out as it must be here.

    Raises:
        ValueError: that takes a collective, which loading must not start; the message says what to do.
    """
    if not is_dtensor(value):
        if not is_dtensor(param):
            return value
        shard = value
        for d, mine in enumerate(_own_indices(param, value.shape, follows)):
            shard = shard.index_select(d, mine.to(shard.device))
        return as_dtensor(param, value.shape, follows, shard)
    if not is_sharded(value) and not is_dtensor(param):
        return local(value)
    if is_dtensor(param) and value.device_mesh == param.device_mesh:  # type: ignore[attr-defined]
        placements = state_placements(param, follows)
        if list(value.placements) == placements:  # type: ignore[attr-defined]
            return value
        if not is_sharded(value):
            return placed(param, local(value), follows)
    raise ValueError(
        "is not sharded as its parameter is. Load it with torch.distributed.checkpoint and "
        "set_optimizer_state_dict, which move it, or gather it with .full_tensor() on every rank first."
    )


def _own_indices(param: Tensor, shape: Sequence[int], follows: Follows) -> list[Tensor]:
    """For each dimension of a state, the indices on this rank, in its shard's order."""
    mesh: DeviceMesh = param.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the parameter's mesh"
    found = [torch.arange(size, device="cpu") for size in shape]
    for mesh_dim, placement in enumerate(state_placements(param, follows)):
        if _is_shard(placement):  # mesh dimensions that shard the same dimension do so one after the other
            whole, count = found[placement.dim], mesh.size(mesh_dim)
            found[placement.dim] = _piece(whole, placement, count, coordinate[mesh_dim])
    return found


def _piece(whole: Tensor, placement: Any, count: int, index: int) -> Tensor:
    """One of the ``count`` pieces into which a placement splits indices. torch's own ``_split_tensor`` makes all of
    them: on 16,384 ranks that is 20 ms for each tensor of the state."""
    strides, size = getattr(placement, "split_factor", 1), len(whole)
    if strides == 1 or not size:
        return _chunk(whole, count, index)
    at, outer = torch.arange(size, device="cpu"), -(-size // strides)  # chunks, each of which is cut in turn
    inner = ((size - at // outer * outer).clamp(max=outer) + count - 1) // count
    return whole[at % outer // inner == index]


def _chunk(whole: Tensor, count: int, index: int) -> Tensor:
    """``torch.chunk(whole, count)[index]``, empty where there are fewer chunks."""
    size = -(-len(whole) // count)
    return whole[index * size : (index + 1) * size]


def as_dtensor(param: Tensor, shape: Sequence[int], follows: Follows, shard: Tensor) -> Tensor:
    """A state of global ``shape`` of a DTensor, sharded as its parameter is, from this rank's shard."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    placements = state_placements(param, follows)
    mesh: DeviceMesh = param.device_mesh  # type: ignore[attr-defined]
    if shard.device.type != mesh.device_type and not shard.is_meta:
        # Of a parameter that FSDP2 has offloaded to the CPU: from_local would move it to the mesh's device.
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        meta = TensorMeta(torch.Size(shape), stride, shard.dtype)
        return DTensor(shard, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def state_placements(param: Tensor, follows: Follows) -> list[Any]:
    """Placements of a state of a DTensor."""
    from torch.distributed.tensor import Replicate

    return [
        _moved(placement, follows.index(placement.dim))
        if _is_shard(placement) and placement.dim in follows
        else Replicate()
        for placement in param.placements  # type: ignore[attr-defined]
    ]


def like(param: Tensor, shard: Tensor) -> Tensor:
    """A DTensor with the shape and placements of ``param`` and this shard; the tensor itself for a plain parameter."""
    return as_dtensor(param, param.shape, tuple(range(param.ndim)), shard) if is_dtensor(param) else shard


def bit_offset(param: Tensor, position: int) -> BitOffset:
    """Which random bits this rank's shard takes of those of the parameter at ``position``.

    Raises:
        ValueError: the shard's indices are not contiguous in some dimension, so strides cannot describe them.
    """
    if not is_sharded(param):
        return BitOffset(position)
    first, strides = 0, []
    own = _own_indices(param, param.shape, tuple(range(param.ndim)))
    for d, mine in enumerate(own):
        stride = param.shape[d + 1 :].numel()
        runs = _intervals(mine)
        if len(runs) > 1:
            raise ValueError(
                "rounding='stochastic' needs shards whose indices are contiguous in each dimension, but those of "
                f"dimension {d} of a parameter of shape {tuple(param.shape)} with placements "
                f"{tuple(param.placements)} are not. Use master='split'."  # type: ignore[attr-defined]
            )
        first += stride * (runs[0][0] if runs else 0)
        strides.append(stride)
    if all(len(mine) == size for mine, size in zip(own[1:], param.shape[1:], strict=True)):
        return BitOffset(position, first)  # whole slices, one after the other
    return BitOffset(position, first, tuple(strides))


def blocks(param: DTensor) -> list[matricize.Block]:
    """Where the elements of this rank's shard are in SMMF's square matrix of the whole parameter."""
    shape = param.shape
    own = _own_indices(param, shape, tuple(range(len(shape))))
    cut = [d for d, mine in enumerate(own) if len(mine) < shape[d]]
    last = cut[-1] if cut else 0  # the dimensions after it are whole, so adjacent indices of this one are one run
    starts = torch.zeros(1, dtype=torch.int64, device="cpu")
    for d in range(last):
        starts = (starts[:, None] + own[d] * shape[d + 1 :].numel()).flatten()
    rest = shape[last + 1 :].numel()
    inner = [(first * rest, count * rest) for first, count in _intervals(own[last])]
    runs = [(start + first, count) for start in starts.tolist() for first, count in inner]
    return matricize.blocks(runs, matricize.square(param.numel())[1])


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim")  # Shard, and _StridedShard, which is not its subclass in every torch


def _moved(placement: Any, dim: int) -> Any:
    """The same placement on another dimension."""
    if placement.dim == dim:
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(dim, split_factor=placement.split_factor)
    return type(placement)(dim)


def _intervals(indices: Tensor) -> list[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers."""
    if not len(indices):
        return []
    breaks = (indices[1:] != indices[:-1] + 1).nonzero().flatten() + 1
    return [(int(run[0]), len(run)) for run in indices.tensor_split(breaks)]
