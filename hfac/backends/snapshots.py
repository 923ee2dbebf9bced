"""What a list of tensors is in memory, found in one call: a warm step compares it with what an earlier one validated.

The extension reads types, devices, shapes, strides and addresses through DLPack's exchange API, which torch has since
2.10, at a tenth of what attributes cost in Python. Without either, and for tensors that have no memory, attributes are
read.
"""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .. import memory
from . import cpu

_CAPSULE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_IS_NEG, _GRAD = Tensor.is_neg, attrgetter("grad")

#: How a list is, beside a snapshot: of other types, shapes, strides or devices; but for addresses the same; the same.
OTHER, ALIKE, SAME = range(3)


def _extension() -> Any:
    """The extension, where it can compare snapshots with lists; None of one that was built before it could."""
    take = getattr(cpu._C, "set_exchange_api", None) if hasattr(cpu._C, "holds_none") else None
    return cpu._C if take is not None and _CAPSULE is not None and take(_CAPSULE) else None


_native = _extension()


class Attributes:
    """A snapshot by attributes, with the methods of the extension's."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = [(type(t), t.device, t.dtype, t.layout, t.shape, t.stride(), _is_zero(t)) for t in tensors]
        self.addresses = list(map(memory.address, tensors))

    def compare(self, tensors: Sequence[Any]) -> int:
        try:
            now = Attributes(tensors)
        except (AttributeError, RuntimeError):  # None; sparse
            return OTHER
        if now._kinds != self._kinds:
            return OTHER
        return SAME if now.addresses == self.addresses else ALIKE


Snapshot = Any  # one of `Attributes`, or of the extension's class


def snapshot(tensors: list[Any]) -> Snapshot | None:
    """Of every tensor its type, device, dtype, shape and strides, and where it lies; of one without memory, which it
    is. None where one has no strides, or is no tensor."""
    found = None if _native is None else _native.snapshot(tensors)
    if found is not None:
        return found
    try:
        return Attributes(tensors)
    except (AttributeError, RuntimeError):  # None; sparse
        return None


def compare(tensors: list[Any], before: Snapshot | None) -> int:
    """How the tensors are beside those of a snapshot: OTHER, ALIKE or SAME. Nothing is made."""
    return OTHER if before is None else before.compare(tensors)


def grads_of(params: list[Tensor]) -> list[Any]:
    """The parameters' gradients; None where there is none."""
    return list(map(_GRAD, params)) if _native is None else _native.attributes(params, "grad")


def holds_none(entries: list[Any]) -> bool:
    """Whether an entry is None."""
    return any(entry is None for entry in entries) if _native is None else _native.holds_none(entries)


def any_negated(tensors: list[Tensor]) -> bool:
    """Whether one of the tensors is a view that negates, which no snapshot shows."""
    return any(map(_IS_NEG, tensors)) if _native is None else _native.any_is(tensors, _IS_NEG)


def identical(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists have the same objects."""
    if _native is not None:
        return _native.identical(now, before)
    return len(now) == len(before) and all(map(is_, now, before))


def values_are(dicts: list[Any], objects: list[Any]) -> bool:
    """Whether ``objects`` are the values of the dicts, one after the other."""
    if _native is not None:
        return _native.values_are(dicts, objects)
    if not all(isinstance(one, dict) for one in dicts):
        return False
    return identical(list(chain.from_iterable(map(dict.values, dicts))), objects)


def _is_zero(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor._is_zerotensor()
