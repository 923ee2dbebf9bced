"""SMMF's signs: a bit per element, as every op takes them, or a byte per element, as some parameters keep them.

Bits are uint8 and packed by slices of the first dimension (`hfac.matricize.sign_shape`), so a shard of the parameter
has whole bytes of them only if it has whole slices, or pieces of these whose elements are multiples of 8. Bytes are
bool, True where the sign is positive, and have the parameter's shape, so they can be sharded as the parameter is.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .matricize import sign_shape

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
    for rows, packed in _pieces(kept.contiguous(), bits, batch_dims):
        packed.copy_(pack_signs(rows))
    return bits


def to_bytes(bits: Tensor, shape: Sequence[int], batch_dims: int = 0) -> Tensor:
    """New bytes of a parameter of ``shape`` for its signs in bits."""
    kept = torch.zeros(tuple(shape), dtype=BYTES, device=bits.device)
    for rows, packed in _pieces(kept, bits.contiguous(), batch_dims):
        rows.copy_(unpack_signs(packed, rows.shape))
    return kept


def bits_shape(shape: Sequence[int], batch_dims: int = 0) -> tuple[int, ...]:
    """Shape of the bits of a parameter of ``shape``: of each of its slices `hfac.matricize.sign_shape`."""
    return (*shape[:batch_dims], *sign_shape(shape[batch_dims:]))


class SignBytes:
    """Signs that are kept in bytes, for ops that take bits: `pack` before the op, `unpack` after it. Of each the bits
    stay from step to step, an eighth of the bytes' memory.

    Args:
        name: of the list, in errors.
        kept: one entry per parameter: signs in bytes; or in bits, or None, which are left alone.
        params: the parameters, in the bytes' shapes.
        batch_dims: as `to_bits` takes them.

    Attributes:
        bits: the list for the op: entries that were given as bits or None, and new bits for those in bytes.

    Raises:
        ValueError, RuntimeError: bytes that are not contiguous, or have another shape or device than the parameter.
    """

    def __init__(self, name: str, kept: Sequence[Tensor | None], params: Sequence[Tensor], batch_dims: int = 0) -> None:
        self.name, self._batch_dims = name, batch_dims
        self.bits: list[Tensor | None] = list(kept)
        #: bytes, by position in the list
        self._kept: dict[int, Tensor] = {}
        for i, (tensor, param) in enumerate(zip(kept, params, strict=True)):
            if tensor is None or tensor.dtype != BYTES:
                continue
            if tensor.shape != param.shape or param.ndim <= batch_dims:
                raise ValueError(
                    f"{name}[{i}], signs in bytes, must have its parameter's shape {tuple(param.shape)}, of more than "
                    f"{batch_dims} dimension(s), got {tuple(tensor.shape)}"
                )
            if tensor.device != param.device:
                raise RuntimeError(f"{name}[{i}] must be on {param.device} like its parameter, got {tensor.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous, got strides {tensor.stride()}")
            self._kept[i] = tensor
            with torch.inference_mode(False):  # the bits outlive the mode in which they are created
                self.bits[i] = torch.zeros(bits_shape(param.shape, batch_dims), dtype=torch.uint8, device=param.device)

    def __bool__(self) -> bool:
        return bool(self._kept)

    def tensors(self) -> list[Tensor]:
        """Bytes and their bits."""
        return [*self._kept.values(), *(bits for i in self._kept if (bits := self.bits[i]) is not None)]

    def scratch_bytes(self) -> int:
        """Memory of the bits that are kept beside the bytes."""
        return sum(bits.numel() for i in self._kept if (bits := self.bits[i]) is not None)

    def pack(self, index: Iterable[int] | None = None) -> None:
        """Makes the bits what the bytes are, at these positions of the list; None: at all."""
        for rows, packed in self._of(index):
            packed.copy_(pack_signs(rows))

    def unpack(self, index: Iterable[int] | None = None) -> None:
        """The other way round."""
        for rows, packed in self._of(index):
            rows.copy_(unpack_signs(packed, rows.shape))

    def _of(self, index: Iterable[int] | None) -> Iterable[tuple[Tensor, Tensor]]:
        for i in self._kept if index is None else index:
            bits = self.bits[i]
            if i in self._kept and bits is not None:
                yield from _pieces(self._kept[i], bits, self._batch_dims)


def _pieces(kept: Tensor, bits: Tensor, batch_dims: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Views of some bytes, [slices, elements], and of their bits, [slices, bytes]. Without elements there are none."""
    if not kept.numel():
        return ()
    count = kept.shape[: batch_dims + 1].numel()
    rows, packed = kept.view(count, -1), bits.view(count, -1)
    some = max(1, TOGETHER // rows.shape[1])
    return zip(rows.split(some), packed.split(some), strict=True)
