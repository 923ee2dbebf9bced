"""What a list of tensors is in memory, found in one call: a warm step compares it with what an earlier one validated.

The extension reads types, devices, shapes, strides and addresses through torch's C interface, which keeps from version
to version, in a tenth of the time that attributes take in Python. Without either, and for tensors of other classes than
torch's own or without memory, attributes are read.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .. import memory
from . import cpu

_IS_NEG, _GRAD = Tensor.is_neg, attrgetter("grad")

#: How a list is, beside a snapshot: of other types, shapes, strides or devices; but for addresses the same; the same.
OTHER, ALIKE, SAME = range(3)
#: what the extension asks torch of a tensor, and the function that tells it
_FUNCTIONS = {
    name: f"aoti_torch_get_{name}"
    for name in ("layout", "dtype", "device_type", "device_index", "dim", "sizes", "strides", "data_ptr")
}


def _extension() -> Any:
    """The extension, where it can read tensors through torch's C interface and has shown that it reads them rightly;
    None of one that was built before it could."""
    native = cpu._C
    if not hasattr(native, "read_tensors_with"):
        return None
    try:
        torch_cpu = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD)  # as torch has loaded it
        functions = {name: getattr(torch_cpu, symbol) for name, symbol in _FUNCTIONS.items()}
        strided = torch_cpu.aoti_torch_layout_strided()
    except (AttributeError, OSError):
        return None
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in functions.items()}
    probe = torch.empty(2, 3, device="cpu")
    probes = probe, torch.nn.Parameter(probe), probe[1:, 1:]
    offsets = {native.handle_offset(tensor, tensor._cdata) for tensor in probes}
    if len(offsets) > 1 or None in offsets:
        return None
    native.read_tensors_with(addresses, offsets.pop(), strided, [Tensor, torch.nn.Parameter])
    return native if _reads(native, probes) else None


def _reads(native: Any, probes: Sequence[Tensor]) -> bool:
    """Whether snapshots of these tensors are what their attributes say."""
    for tensor in map(Tensor.detach, probes):
        seen = native.snapshot([tensor])
        like = torch.empty_strided(tensor.shape, tensor.stride())
        others = like, tensor.t(), tensor[:0], tensor[0], tensor.view(torch.int32)
        found = [OTHER if seen is None else seen.compare([other]) for other in (tensor, *others)]
        if found != [SAME, ALIKE, OTHER, OTHER, OTHER, OTHER] or seen.addresses != [tensor.data_ptr()]:
            return False
    return True


_native = _extension()


class Attributes:
    """A snapshot by attributes, with the methods of the extension's."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = [(type(t), t.device, t.dtype, t.layout, t.shape, t.stride(), _is_zero(t)) for t in tensors]
        self.addresses = list(map(memory.address, tensors))

    def compare(self, tensors: Sequence[Any], is_other: Callable[[Tensor], bool] | None = None) -> int:
        try:
            now = Attributes(tensors)
        except (AttributeError, RuntimeError):  # None; sparse
            return OTHER
        if now._kinds != self._kinds or (is_other is not None and any(map(is_other, tensors))):
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


def compare_plain(tensors: list[Any], before: Snapshot | None) -> int:
    """As `compare`, and OTHER where one of the tensors is a view that negates, which no snapshot shows."""
    return OTHER if before is None else before.compare(tensors, _IS_NEG)


def grads_of(params: list[Tensor]) -> list[Any]:
    """The parameters' gradients; None where there is none."""
    return list(map(_GRAD, params)) if _native is None else _native.attributes(params, "grad")


def holds_none(entries: list[Any]) -> bool:
    """Whether an entry is None."""
    return any(entry is None for entry in entries) if _native is None else _native.holds_none(entries)


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
