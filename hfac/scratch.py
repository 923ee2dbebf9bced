"""Memory of which ops make the step where states are not kept as ops take them: signs in bytes, and pieces of a fused
weight that are cut along another dimension than its first, whose states are not contiguous."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import signs


class Scratch:
    """One list of states and, of those that an op cannot take, others that it can: `fill` these before the op, `empty`
    them after it. They stay from step to step: of signs in bytes bits, an eighth of the bytes' memory; of states that
    are not contiguous as much again.

    Args:
        name: of the list, in errors.
        kept: one entry per parameter, or None.
        params: the parameters.
        batch_dims: so many leading dimensions of parameters and states count slices.
        strided: entries may have other strides than a contiguous tensor; else these are left for the op to refuse.

    Attributes:
        taken: the list for the op.

    Raises:
        ValueError, RuntimeError: signs in bytes that are not contiguous unless ``strided``, or have another shape or
            device than the parameter.
    """

    def __init__(
        self,
        name: str,
        kept: Sequence[Tensor | None],
        params: Sequence[Tensor],
        batch_dims: int = 0,
        strided: bool = False,
    ) -> None:
        self.name, self._batch_dims = name, batch_dims
        self.taken: list[Tensor | None] = list(kept)
        #: by position in the list, what is kept, and what the op takes for it
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for i, (tensor, param) in enumerate(zip(kept, params, strict=True)):
            if tensor is None or not (tensor.dtype == signs.BYTES or (strided and not tensor.is_contiguous())):
                continue
            shape, dtype = tuple(tensor.shape), tensor.dtype
            if dtype == signs.BYTES:
                self._check_bytes(f"{name}[{i}]", tensor, param, strided)
                shape, dtype = signs.bits_shape(shape, batch_dims), torch.uint8
            with torch.inference_mode(False):  # it outlives the mode in which it is made
                self._pairs[i] = tensor, torch.zeros(shape, dtype=dtype, device=tensor.device)
            self.taken[i] = self._pairs[i][1]

    def _check_bytes(self, where: str, tensor: Tensor, param: Tensor, strided: bool) -> None:
        if tensor.shape != param.shape or param.ndim <= self._batch_dims:
            raise ValueError(
                f"{where}, signs in bytes, must have its parameter's shape {tuple(param.shape)}, of more than "
                f"{self._batch_dims} dimension(s), got {tuple(tensor.shape)}"
            )
        if tensor.device != param.device:
            raise RuntimeError(f"{where} must be on {param.device} like its parameter, got {tensor.device}")
        if not strided and not tensor.is_contiguous():
            raise ValueError(f"{where} must be contiguous, got strides {tensor.stride()}")

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def tensors(self) -> list[Tensor]:
        """All that `fill` and `empty` read and write."""
        return [tensor for pair in self._pairs.values() for tensor in pair]

    def nbytes(self) -> int:
        """Memory beside the states."""
        return sum(taken.nbytes for _, taken in self._pairs.values())

    def fill(self, index: Iterable[int] | None = None) -> None:
        """Takes what is kept, at these positions of the list; None: at all."""
        for kept, taken in self._of(index):
            if kept.dtype == signs.BYTES:
                signs.pack_into(taken, kept, self._batch_dims)
            else:
                taken.copy_(kept)

    def empty(self, index: Iterable[int] | None = None) -> None:
        """The other way round."""
        for kept, taken in self._of(index):
            if kept.dtype == signs.BYTES:
                signs.unpack_into(kept, taken, self._batch_dims)
            else:
                kept.copy_(taken)

    def _of(self, index: Iterable[int] | None) -> list[tuple[Tensor, Tensor]]:
        return [self._pairs[i] for i in (self._pairs if index is None else index) if i in self._pairs]
