"""Lists of which one operation of torch serves all entries: pieces of a flat tensor, and entries that take part."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops, schedules
from ..buckets import pick
from ..staging import to_device


class Pieces:
    """Consecutive pieces of a 1-d tensor, of these sizes."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.total, self.device = list(sizes), sum(sizes), device
        self._on_device = torch.tensor(self.sizes, dtype=torch.int64, device="cpu").to(device)
        self._filled = Members([i for i, size in enumerate(sizes) if size], len(sizes), torch.float32, device)
        self._owner = torch.arange(len(self.sizes), device="cpu").repeat_interleave(
            torch.tensor(self.sizes, device="cpu")
        )

    def sums(self, flat: Tensor) -> Tensor:
        """The sum of every piece of a tensor without negative elements: [pieces], added up in double."""
        found = torch.zeros(len(self.sizes), dtype=schedules.step_dtype(self.device), device=self.device)
        if self.device.type == "cpu":
            return found.index_add_(0, self._owner, flat.to(found.dtype))
        # On a GPU its order is not always the same. Of the operations that reduce every tensor of a list in one launch,
        # torch has norms alone: here the 1-norm.
        pieces = pick(flat.split(self.sizes), self._filled.index)
        if pieces:
            self._filled.put(found, torch.stack(torch._foreach_norm(pieces, 1, dtype=found.dtype)))
        return found

    def spread(self, numbers: Tensor) -> Tensor:
        """Of one number for each piece, each as often as its piece has elements."""
        return numbers.repeat_interleave(self._on_device, output_size=self.total)


class Members:
    """Some entries of a list, and what is bound to them.

    Attributes:
        index: which, in order.
        flags: 1 at these entries, 0 elsewhere, on the device.
        bound: by name, what is made for these entries once.
    """

    def __init__(self, index: Sequence[int], count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.index, self.count = list(index), count
        self.all = len(self.index) == count
        self._on_device = torch.tensor(self.index, dtype=torch.int64, device="cpu").to(device)
        self.flags = torch.zeros(count, dtype=dtype, device=device).index_fill_(0, self._on_device, 1)
        self.bound: dict[str, Any] = {}

    def listed(self) -> list[float]:
        """The flags, on the host."""
        mine = set(self.index)
        return [float(i in mine) for i in range(self.count)]

    def of(self, entries: Sequence[Any]) -> Sequence[Any]:
        return entries if self.all else pick(entries, self.index)

    def part(self, entries: Sequence[Any], others: "Members") -> list[Any]:
        """Of one entry for each of these members, those of others, who are among them."""
        if others is self:
            return list(entries)
        known = dict(zip(self.index, entries, strict=True))
        return [known[i] for i in others.index]

    def numbers(self, numbers: Tensor) -> Tensor:
        """Theirs of a tensor with one for each entry of the list."""
        return numbers if self.all else numbers.index_select(0, self._on_device)

    def put(self, to: Tensor, numbers: Tensor) -> None:
        """The other way round: numbers of the members go to a tensor of all entries, the rest of which stays."""
        if self.all:
            to.copy_(numbers)
        else:
            to.index_copy_(0, self._on_device, numbers.to(to.dtype))

    def filled(self, numbers: Tensor, fill: float, device: torch.device) -> Tensor:
        """Numbers of the members, which may lie on the host, as one for each entry on the device."""
        every = torch.full((self.count,), fill, dtype=numbers.dtype, device=numbers.device)
        if numbers.is_cpu:
            every[self.index] = numbers
            return to_device(every, device)
        self.put(every, numbers)
        return every


class Flat:
    """Some tensors of one type and one 1-d tensor ``flat``, which holds them one after the other once they are `read`;
    `write` brings it back to where they are. Each is one operation, for as long as all lie where they are.

    Args:
        room: memory for ``flat``, of at least as many elements.
    """

    def __init__(self, tensors: Sequence[Tensor], room: Tensor) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        self.flat = room[: sum(sizes)]
        pieces = zip(self.flat.split(sizes), tensors, strict=True)
        self._tensors, self._pieces = list(tensors), [piece.view(tensor.shape) for piece, tensor in pieces]
        self._read = ops.copier(self._pieces, self._tensors, ours=True)

    def read(self) -> Tensor:
        self._read()
        return self.flat

    @cached_property
    def write(self) -> Callable[[], object]:
        return ops.copier(self._tensors, self._pieces)


class Joined:
    """Some tensors, one after the other, that torch's operations take as one; the same places of several lists.

    Args:
        members: which of the lists' entries they are.
        lists: whole lists.
        rooms: for each list memory for what is joined of it.
    """

    def __init__(
        self, members: slice, lists: Sequence[Sequence[Tensor]], rooms: Sequence[Tensor], device: torch.device
    ) -> None:
        self.members = members
        self._alone = members.stop == members.start + 1
        self._lists = [tensors[members] for tensors in lists]
        self._flats = [] if self._alone else list(map(Flat, self._lists, rooms))
        self.pieces = Pieces([tensor.numel() for tensor in self._lists[0]], device)

    def one(self, tensors: Sequence[Tensor]) -> Tensor:
        """Other tensors of these sizes as one: the tensor itself, or a copy of all, 1-d."""
        if self._alone:
            return tensors[0]
        return torch.cat([tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors])

    def read(self, k: int) -> Tensor:
        """A list's tensors as one, as they are now."""
        return self._lists[k][0] if self._alone else self._flats[k].read()

    def write(self) -> None:
        """What became of the lists' tensors, each list as one, back to where they are."""
        for flat in self._flats:
            flat.write()

    def spread(self, numbers: Any, row: bool = False) -> Any:
        """Of a number for each of the lists' entries, those of these tensors' elements, 1-d; where they are one tensor,
        its own. ``row``: in a row of a matrix, as those of an op's first tensor. What is no 1-d tensor stays."""
        if not isinstance(numbers, Tensor) or numbers.ndim != 1:
            return numbers
        if self._alone:
            return numbers[self.members]
        found = self.pieces.spread(to_device(numbers[self.members], self.pieces.device))
        return found[None] if row else found


def joined(lists: Sequence[Sequence[Tensor]], rooms: Sequence[Tensor], device: torch.device) -> list[Joined]:
    """Lists in pieces for which there is room, or of one tensor, as those are that are not contiguous, and all of them
    without rooms."""
    starts: list[int] = []
    limit = left = min(map(len, rooms), default=-1)
    for i, tensors in enumerate(zip(*lists, strict=True)):
        contiguous, count = all(tensor.is_contiguous() for tensor in tensors), tensors[0].numel()
        if not starts or not contiguous or count > left:
            starts.append(i)
            left = limit if contiguous else -1
        left -= count
    ends = [*starts[1:], len(lists[0])] if starts else []
    return [Joined(slice(start, end), lists, rooms, device) for start, end in zip(starts, ends, strict=True)]
