"""SMMF's signs: a bit per element, as every op takes them, or a byte per element, as some parameters keep them.

Bits are uint8 and packed by slices of the first dimension (`hfac.matricize.sign_shape`), so a shard of the parameter
has whole bytes of them only if it has whole slices, or pieces of these whose elements are multiples of 8. Bytes are
bool, True where the sign is positive, and have the parameter's shape, so they can be sharded as the parameter is.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .matricize import sign_shape
from .slicing import slices

#: the type of a sign that is kept in a byte
BYTES = torch.bool
#: elements that are packed or unpacked at once, in temporaries of up to 2 bytes for each; at least one slice of the
#: first dimension
TOGETHER = 1 << 20


def pack_signs(positive: Tensor) -> Tensor:
    """bool [d0, ...] -> uint8 [d0, ceil(prod(...) / 8)]: element 8b + k of a slice is bit k of its byte b, 1 =
    positive."""
    rows = positive.reshape(positive.shape[0], -1)
    bits = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).view(rows.shape[0], -1, 8)
    return (bits * _bit_values(positive.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_signs`: uint8 [d0, bytes] -> bool of ``shape``, whose first dimension is d0."""
    bits = (packed[:, :, None] & _bit_values(packed.device)) != 0
    return bits.view(shape[0], -1)[:, : torch.Size(shape[1:]).numel()].reshape(shape)


def _bit_values(device: torch.device) -> Tensor:
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


def to_bits(kept: Tensor, batch_dims: int = 0) -> Tensor:
    """New bits for signs in bytes; with ``batch_dims`` those of each slice, after the dimensions that count these."""
    bits = torch.zeros(bits_shape(kept.shape, batch_dims), dtype=torch.uint8, device=kept.device)
    pack_into(bits, kept.contiguous(), batch_dims)
    return bits


def to_bytes(bits: Tensor, shape: Sequence[int], batch_dims: int = 0) -> Tensor:
    """New bytes of a parameter of ``shape`` for its signs in bits."""
    kept = torch.zeros(tuple(shape), dtype=BYTES, device=bits.device)
    unpack_into(kept, bits.contiguous(), batch_dims)
    return kept


def pack_into(bits: Tensor, kept: Tensor, batch_dims: int = 0) -> None:
    """Makes bits what the bytes are, some slices of the first dimension at a time. Both may have any strides."""
    for rows, packed in _pieces(kept, bits, batch_dims):
        packed.copy_(pack_signs(rows))


def unpack_into(kept: Tensor, bits: Tensor, batch_dims: int = 0) -> None:
    """The other way round."""
    for rows, packed in _pieces(kept, bits, batch_dims):
        rows.copy_(unpack_signs(packed, rows.shape))


def bits_shape(shape: Sequence[int], batch_dims: int = 0) -> tuple[int, ...]:
    """Shape of the bits of a parameter of ``shape``: of each of its slices `hfac.matricize.sign_shape`."""
    return (*shape[:batch_dims], *sign_shape(shape[batch_dims:]))


def _pieces(kept: Tensor, bits: Tensor, batch_dims: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Views of some bytes, some slices of the first dimension, and of their bits. Without elements there are none."""
    if not kept.numel():
        return
    if kept.is_contiguous():  # all slices of a stack at once
        kept, bits, batch_dims = kept.flatten(0, batch_dims), bits.flatten(0, batch_dims), 0
    for mine, packed in zip(slices([kept], batch_dims), slices([bits], batch_dims), strict=True):
        some = max(1, TOGETHER * len(mine) // mine.numel())
        yield from zip(mine.split(some), packed.split(some), strict=True)
