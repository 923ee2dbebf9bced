"""What of tensors kernels may read and write as it lies in memory, and which tensors share some."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

#: (tensors) advances the counters by which autograd notices that a tensor it has saved was written. For kernels, whose
#: writes it cannot see; before they are made where that can be, because it refuses some tensors. torch's own public
#: function for it, `torch.autograd.graph.increment_version`, takes twice as long.
bump_versions: Callable[[Sequence[Tensor]], None] = getattr(torch._C, "_increment_version", increment_version)
#: Types whose elements lie in memory as strides and type say, unless lazy bits say otherwise.
PLAIN = frozenset((Tensor, torch.nn.Parameter))
#: What runs instead of operations, of which memory knows nothing: FakeTensorMode, and the tracers of torch.compile.
_MODES = [
    getattr(torch._C._TorchDispatchModeKey, name)
    for name in ("FAKE", "PROXY", "FUNCTIONAL")
    if hasattr(torch._C._TorchDispatchModeKey, name)
]


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether memory can be read as it lies, of tensors that have some: all but zeros that have none. To be asked in
    every step."""
    return PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


def why_not(tensor: Tensor, negated: bool = False) -> str | None:
    """None where the elements lie in memory as strides and type say, or, where that is allowed, ``negated``; else what
    the tensor is ("is a ...")."""
    kind = type(tensor)
    if kind not in PLAIN and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {kind.__module__}.{kind.__qualname__}, which has no elements in memory but operations of its own"
    if tensor.is_neg() and not negated:
        return "is a view that negates what it is a view of (.resolve_neg() makes a copy)"
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # inside torch.func.vmap, for one
        address = 0
    return "has no elements in memory" if address == 0 and tensor.numel() and tensor.device.type != "meta" else None


def address(tensor: Tensor) -> int:
    """Where a tensor lies; of one without memory of its own, which tensor it is."""
    return tensor.data_ptr() if why_not(tensor, negated=True) is None else id(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor is a FakeTensor, which has no value that could be read."""
    kind = type(tensor)
    return kind not in PLAIN and kind.__name__ == "FakeTensor"


def bypassed() -> bool:
    """Whether a mode runs in which operations do not write memory."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in _MODES
    )


def materialized(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, with copies of those that are views which negate, and of zeros that have no memory."""
    return [tensor.resolve_neg() for tensor in without_zerotensors(tensors)]


def without_zerotensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same of zeros alone, which torch lets nobody write."""
    return [_zeros(tensor) if tensor._is_zerotensor() else tensor for tensor in tensors]


def writable(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, with copies of those that cannot be written element by element: zeros that have no memory, elements
    that share some, and what was made in inference mode."""
    return [
        tensor.clone() if tensor.is_inference() or overlaps_itself(tensor) else tensor
        for tensor in without_zerotensors(tensors)
    ]


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements lie in one place: torch writes no such tensor. Of strides alone; nothing is read."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    sides = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    if sides[0][0] == 0:
        return True
    reach, apart = 0, True
    for stride, size in sides:
        apart = apart and stride > reach
        reach += (size - 1) * stride
    if apart:
        return False
    places = torch.zeros(1, dtype=torch.int64, device="cpu")  # rows that interleave need not meet
    for stride, size in sides:
        places = (places[:, None] + stride * torch.arange(size, device="cpu")).view(-1)
    return len(places.unique()) < len(places)


class _Span(NamedTuple):
    start: int
    end: int
    owner: int


def sharing(owned: Sequence[Iterable[Tensor | None]]) -> tuple[set[int], set[int]]:
    """Which owners of tensors share memory with other owners, and which have it twice. By the range that a tensor
    reaches over: those that interleave count as shared."""
    spans = []
    for owner, tensors in enumerate(owned):
        for tensor in tensors:
            if tensor is None or tensor.is_meta or not tensor.numel() or why_not(tensor, negated=True) is not None:
                continue
            start, elements = tensor.data_ptr(), tensor.numel()
            if not tensor.is_contiguous():
                elements = 1 + sum(map(mul, (size - 1 for size in tensor.shape), tensor.stride()))
            spans.append(_Span(start, start + elements * tensor.element_size(), owner))
    spans.sort()
    others: set[int] = set()
    twice: set[int] = set()
    open: list[_Span] = []
    for span in spans:
        open = [earlier for earlier in open if earlier.end > span.start]
        for earlier in open:
            if earlier.owner == span.owner:
                twice.add(span.owner)
            else:
                others.update((earlier.owner, span.owner))
        open.append(span)
    return others, twice


def reason(lists: Mapping[str, Sequence[Tensor]], negated: bool = False) -> str | None:
    """Why no kernel may be handed these, as a clause; None where one may. ``negated`` as for `why_not`."""
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            why = why_not(tensor, negated)
            if why is not None:
                return f"{name}[{i}] {why}"
    return "a mode such as FakeTensorMode runs, in which nothing is written" if bypassed() else None
