"""Slices of parameters that are stepped as parameters of their own: those that a stack's leading dimensions count
(``batch_dims``), and the equal pieces of a fused weight along one of its other dimensions (``views``)."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def cut(tensors: Iterable[Tensor], batch_dims: int, views: Iterable[int], dim: int = 0) -> list[Tensor]:
    """Views in which a dimension after the batch dimensions counts pieces.

    Args:
        views: of each tensor, how many equal pieces of dimension batch_dims + ``dim`` it has; 0 of an empty one.
    """
    d = batch_dims + dim
    found = [t.unflatten(d, (count, t.shape[d] // max(count, 1))) for t, count in zip(tensors, views, strict=True)]
    return [t.movedim(d, batch_dims) for t in found] if dim else found


def joined(pieces: Tensor, batch_dims: int, dim: int = 0) -> Tensor:
    """The inverse of `cut` of one tensor; a copy unless it can be a view."""
    d = batch_dims + dim
    return pieces.movedim(batch_dims, d).flatten(d, d + 1)


def slices(
    tensors: Sequence[Tensor], batch_dims: int, views: Sequence[int] | None = None, dim: int = 0
) -> Sequence[Tensor]:
    """Views of the slices that the batch dimensions of each tensor index, in row-major order; with ``views``, of their
    pieces (`cut`)."""
    if views is not None:
        tensors, batch_dims = cut(tensors, batch_dims, views, dim), batch_dims + 1
    for _ in range(batch_dims):
        tensors = [part for tensor in tensors for part in tensor.unbind()]
    return tensors
