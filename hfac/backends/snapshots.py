"""What a list of tensors is in memory, found in one call: a warm step compares it with what an earlier one validated.

The extension compares the words in which torch keeps a tensor's type, device, shape, strides and keys, and asks torch's
C interface where its elements lie, in a twentieth of the time that attributes take in Python. Where those words lie is
found at import, and it is shown that every change shows in them. Otherwise, and for tensors of other classes than
torch's own, without memory, or of more than five dimensions, attributes are read.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import memory
from . import cpu

_GRAD = attrgetter("grad")

#: How a list is, beside a snapshot: of other types, shapes, strides or devices; but for addresses the same; the same.
OTHER, ALIKE, SAME = range(3)
#: what the extension asks torch of a tensor, and the function that tells it
_FUNCTIONS = {name: f"aoti_torch_get_{name}" for name in ("layout", "data_ptr")}
#: words of a tensor's implementation and of a storage that are looked at, at most
_WORDS, _STORAGE_WORDS = 23, 6


class _Places(NamedTuple):
    """Where torch keeps what describes a tensor, in words of 8 bytes: in a Python tensor the address of its
    implementation; in that the address of its storage, the number of dimensions, which sizes follow, the strides, the
    offset in the storage, the types of elements and device, and the set of keys, by which views are told that negate,
    and zeros without memory; in the storage where it begins, and what frees it."""

    handle: int
    storage: int
    sizes: int
    strides: int
    offset: int
    types: int
    keys: int
    data: int
    deleter: int


def _extension() -> Any:
    """The extension, where it can read tensors as torch keeps them and has shown that it reads them rightly; None of
    one that was built before it could."""
    native = cpu._C
    if not hasattr(native, "read_tensors_with"):
        return None
    try:
        torch_cpu = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD)  # as torch has loaded it
        functions = {name: getattr(torch_cpu, symbol) for name, symbol in _FUNCTIONS.items()}
        strided = torch_cpu.aoti_torch_layout_strided()
        tensor = torch.empty(2, 3, 5, 7, 11, device="cpu")
        probes = tensor[1:, 1:, 1:], torch.nn.Parameter(tensor[1:, :2, 2:]), tensor[1, 2:]
        places = {_places(probe) for probe in probes}
    except (AttributeError, OSError, ValueError):
        return None
    found = places.pop()
    if found is None or places:
        return None
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in functions.items()}
    native.read_tensors_with(addresses, found, strided, [Tensor, torch.nn.Parameter])
    return native if _tells_devices(found.types) and _reads(native, probes) else None


def _places(tensor: Tensor) -> _Places | None:
    """None where a word is nowhere, or in several places."""
    python = _words(id(tensor), type(tensor).__basicsize__ // 8)
    implementation = _words(tensor._cdata, _WORDS)
    keys = implementation.index(torch._C._dispatch_keys(tensor).raw_repr())
    implementation = implementation[: keys + 1]  # behind which may lie anything
    storage = tensor.untyped_storage()
    kept = _words(storage._cdata, _STORAGE_WORDS)
    data = kept.index(storage.data_ptr())
    found = (
        _only(python, [tensor._cdata]),
        _only(implementation, [storage._cdata]),
        _only(implementation, [tensor.ndim, *map(int, tensor.shape)]),
        _only(implementation, [*map(int, tensor.stride())]),
        _only(implementation, [int(tensor.storage_offset())]),
        keys - 1,
        keys,
        data,
        # What is freed is where the data begin, and stands beside what frees it.
        data + (2 if kept[data + 1] == kept[data] else 1),
    )
    return None if None in found else _Places(*found)  # type: ignore[arg-type]


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


def _only(words: list[int], wanted: list[int]) -> int | None:
    """Where these stand among the words, one after the other; None where they do not, or twice."""
    found = [i for i in range(len(words)) if words[i : i + len(wanted)] == wanted]
    return found[0] if len(found) == 1 else None


def _tells_devices(place: int) -> bool:
    """Whether this word has where the extension looks for it what tells one GPU from another: the device's index, -1 in
    a byte of a tensor on none, and that there is one, 1 in the next."""
    cpu, meta = (_words(torch.empty(1, device=device)._cdata, _WORDS)[place] for device in ("cpu", "meta"))
    return cpu >> 24 & 0xFFFF == meta >> 24 & 0xFFFF == 0x01FF and cpu >> 16 & 0xFF != meta >> 16 & 0xFF


def _reads(native: Any, probes: Sequence[Tensor]) -> bool:
    """Whether snapshots of these tensors are what their attributes say."""
    for tensor in map(Tensor.detach, probes):
        seen = native.snapshot([tensor])
        like = torch.empty_strided(tensor.shape, tensor.stride(), device="cpu")
        beside = tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - 1)
        freed = torch.empty_like(like)
        freed.untyped_storage().resize_(0)
        sides = range(tensor.ndim)
        others = [
            *(tensor.narrow(side, 0, size - 1) for side, size in enumerate(tensor.shape)),
            *(tensor.transpose(side, other) for side in sides for other in range(side)),
            *(
                tensor.as_strided(tensor.shape, [n - (i == side) for i, n in enumerate(tensor.stride())])
                for side in sides
            ),
            tensor.flatten(-2),
            tensor[0],
            tensor.view(torch.int32),
            torch._neg_view(tensor),
            tensor.to("meta"),
            freed,
        ]
        if seen is None or seen.addresses != [tensor.data_ptr()]:
            return False
        found = [native.compare([other], seen) for other in (tensor, like, beside, *others)]
        torch._lazy_clone(like)  # which is now to be copied before it is written
        if [*found, native.compare([like], seen)] != [SAME, ALIKE, ALIKE, *(OTHER for _ in others), OTHER]:
            return False
    return True


_native = _extension()


class Attributes:
    """A snapshot by attributes, with the methods of the extension's."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = list(map(_kind, tensors))
        self.addresses = list(map(memory.address, tensors))

    def compare(self, tensors: Sequence[Any]) -> int:
        try:
            now = Attributes(tensors)
        except (AttributeError, RuntimeError):  # None; sparse
            return OTHER
        if now._kinds != self._kinds:
            return OTHER
        return SAME if now.addresses == self.addresses else ALIKE


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """Two tensors of one kind differ in addresses and elements alone."""
    where = type(tensor), tensor.device, tensor.dtype, tensor.layout, tensor.shape, tensor.stride()
    return *where, memory.why_not(tensor)


Snapshot = Any  # one of `Attributes`, or of the extension's class


def snapshot(tensors: list[Any]) -> Snapshot | None:
    """Of every tensor its type, device, dtype, shape and strides, whether it negates what it is a view of, and where it
    lies; of one without memory, which it is. None where one has no strides, or is no tensor."""
    found = None if _native is None else _native.snapshot(tensors)
    if found is not None:
        return found
    try:
        return Attributes(tensors)
    except (AttributeError, RuntimeError):  # None; sparse
        return None


def _compare(tensors: list[Any], before: Snapshot | None) -> int:
    return OTHER if before is None else before.compare(tensors)


def grads_of(params: list[Tensor]) -> list[Any]:
    """The parameters' gradients; None where there is none."""
    return list(map(_GRAD, params)) if _native is None else _native.attributes(params, "grad")


def holds_none(entries: list[Any]) -> bool:
    """Whether an entry is None."""
    return any(entry is None for entry in entries) if _native is None else _native.holds_none(entries)


def _identical(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _values_are(dicts: list[Any], objects: list[Any]) -> bool:
    if not all(isinstance(one, dict) for one in dicts):
        return False
    return _identical(list(chain.from_iterable(map(dict.values, dicts))), objects)


#: (tensors, snapshot) -> how the tensors are beside those of a snapshot, or of None: OTHER, ALIKE or SAME. Nothing is
#: made.
compare: Callable[[list[Any], Snapshot | None], int] = getattr(cpu._C, "compare", _compare)
#: (now, before) -> whether two lists have the same objects
identical: Callable[[list[Any], list[Any]], bool] = getattr(cpu._C, "identical", _identical)
#: (dicts, objects) -> whether these are the values of the dicts, one after the other
values_are: Callable[[list[Any], list[Any]], bool] = getattr(cpu._C, "values_are", _values_are)
