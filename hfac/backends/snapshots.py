"""What a list of tensors is in memory, found in one call: a warm step compares it with what an earlier one validated.

The extension reads types, devices, shapes, strides and addresses through DLPack's exchange API, which torch has since
2.10, at a tenth of what attributes cost in Python. Without either, and for tensors that have no memory, attributes are
read.
"""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .. import memory
from . import cpu

_CAPSULE = getattr(Tensor, "__dlpack_c_exchange_api__", None)


def _extension() -> Any:
    """The extension, where it can take snapshots; None of one that was built before it could."""
    take = getattr(cpu._C, "set_exchange_api", None)
    return cpu._C if take is not None and _CAPSULE is not None and take(_CAPSULE) else None


_native = _extension()


class Attributes:
    """A snapshot by attributes, with the methods of the extension's."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = [(type(t), t.device, t.dtype, t.layout, t.shape, t.stride(), _is_zero(t)) for t in tensors]
        self.addresses = list(map(memory.address, tensors))

    def alike(self, other: "Attributes") -> bool:
        return self._kinds == other._kinds

    def same(self, other: "Attributes") -> bool:
        return self.addresses == other.addresses and self._kinds == other._kinds


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


def alike(now: Any, before: Any) -> bool:
    """Whether two lists agree in all but addresses."""
    return now is not None and type(now) is type(before) and now.alike(before)


def same(now: Any, before: Any) -> bool:
    """Whether two lists agree in everything."""
    return now is not None and type(now) is type(before) and now.same(before)


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
