"""What is stepped by itself of a parameter under its group's options: its slices, the sums over ranks that they need,
and whether bytes of their sign bits would be split."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..distributed import layout


def needs_reduction(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a step needs sums over ranks: where slices are sharded. Ranks that have whole slices need none."""
    if not layout.is_sharded(param):
        return False
    batch = group["batch_dims"]
    along = batch + group["views_dim"] if group["views"] > 1 else None
    return any(mesh_dims for d, mesh_dims in enumerate(layout.sharded_by(param)) if d >= batch and d != along)


def keeps_sign_bytes(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter's signs are kept in bytes (`hfac.signs`): the group says so, or the pieces of a fused weight,
    or its placement, would split bytes of bits."""
    return group.get("signs") == "bytes" or _pieces_split_bytes(param, group) or placement_splits_bytes(param, group)


def _pieces_split_bytes(param: Tensor, group: Mapping[str, Any]) -> bool:
    if group["views"] == 1 or group["views_dim"] == 0:
        return False
    _, (_, *rest) = sliced(param, group)
    return group["views_dim"] > 1 or math.prod(rest) % 8 != 0


def placement_splits_bytes(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether bytes of sign bits that the parameter would have on one device cannot be sharded as it is."""
    if _pieces_split_bytes(param, group):
        return False
    if group["views"] == 1 or group["views_dim"] == 0:
        return needs_reduction(param, group) and layout.splits_sign_bytes(param)
    batch = group["batch_dims"]
    cut_is_sharded = layout.is_sharded(param) and any(layout.sharded_by(param)[batch + group["views_dim"]])
    return cut_is_sharded and (batch > 0 or layout.splits_sign_bytes(param))


def sliced(param: Tensor, group: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What counts the slices of a parameter, those that ``views`` makes included, and the shape of one."""
    batch, views, shape = group["batch_dims"], group["views"], tuple(param.shape)
    if views == 1:
        return shape[:batch], shape[batch:]
    along = batch + group["views_dim"]
    return (*shape[:batch], views), (*shape[batch:along], shape[along] // views, *shape[along + 1 :])


def piece_counts(params: Iterable[Tensor], group: Mapping[str, Any]) -> list[int] | None:
    """How many of the pieces that ``views`` makes of each parameter are on this rank; None where it makes none."""
    views, along = group["views"], group["batch_dims"] + group["views_dim"]
    if views == 1:
        return None
    sizes = [(layout.local(param.detach()).shape[along], param.shape[along]) for param in params]
    return [here * views // size if size else views for here, size in sizes]
