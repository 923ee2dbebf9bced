"""Step counters, and what sharded parameters need in plain torch beside the ops."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, memory
from ..backends.snapshots import SAME, Snapshot, compare, snapshot
from ..schedules import Scalar
from ..staging import to_device
from .checks import Tensors, state_dtype

_HOST = torch.device("cpu")


class Counters:
    """Steps on the host that are counted together."""

    def __init__(self, steps: Tensors) -> None:
        self._steps = list(steps)
        self._known: Snapshot | None = None
        self._native: Any = None

    def __len__(self) -> int:
        return len(self._steps)

    def read(self) -> list[float]:
        return [step.item() for step in self._steps]

    def common(self, hold: bool = False) -> float | None:
        """What all of them are; None where they differ. To be asked before `advance`: the steps may have moved.
        ``hold``: they lie where they lay when this was last asked."""
        if self._known is None or not (hold or compare(self._steps, self._known) == SAME):
            self._known, self._native = snapshot(self._steps), self._bound()
        if self._native is not None:
            return self._native.common()
        values = self.read()
        return values[0] if values and values.count(values[0]) == len(values) else None

    def advance(self) -> None:
        """Adds one to each."""
        if self._native is not None:
            self._native.advance()
        elif self._steps:
            _advance_(self._steps)

    def _bound(self) -> Any:
        """The extension's counters, where it is built and the steps lie in the host's memory."""
        native = backends.host_counters()
        if native is None or not all(step.is_cpu and memory.why_not(step) is None for step in self._steps):
            return None
        return native.counters(self._steps)


class DeviceCounters:
    """0-d tensors of one type and device, of which only the device knows what they count. Where they lie side by side
    in memory they are read and written as one tensor, else one by one.

    Args:
        may_move: whether they may be given other memory, side by side: every tensor stays the object that it is.
        one_by_one: whatever they lie like. For a graph that is being captured, which would do the looking.
    """

    def __init__(self, tensors: Tensors, may_move: bool = False, *, one_by_one: bool = False) -> None:
        self._tensors = list(tensors)
        self._together = None if one_by_one else _side_by_side(self._tensors)
        if self._together is None and may_move and all(type(tensor) is Tensor for tensor in self._tensors):
            together = torch.stack(self._tensors)
            for i, tensor in enumerate(self._tensors):
                tensor.set_(together.untyped_storage(), i, (), ())
            self._together = _side_by_side(self._tensors)
        self._known = snapshot(self._tensors)

    @property
    def together(self) -> Tensor | None:
        """[tensors], all of them in the same memory; None where they do not lie side by side."""
        return self._together

    def holds(self) -> bool:
        """They lie where they lay."""
        return compare(self._tensors, self._known) == SAME

    def values(self) -> Tensor:
        """[tensors], which is not to be written."""
        return torch.stack(self._tensors) if self._together is None else self._together

    def add_(self, amounts: Tensor | int, alpha: int = 1) -> None:
        """Adds ``alpha`` times a number, a 0-d tensor, or one amount for each."""
        if self._together is not None:
            amounts = amounts.to(self._together) if isinstance(amounts, Tensor) else amounts
            self._together.add_(amounts, alpha=alpha)
        elif not isinstance(amounts, Tensor):  # which must not become one: the device would wait for it
            torch._foreach_add_(self._tensors, alpha * amounts)
        elif amounts.ndim:
            torch._foreach_add_(self._tensors, amounts.unbind(), alpha=alpha)
        else:
            torch._foreach_add_(self._tensors, amounts.to(self._tensors[0]), alpha=alpha)


def are_down(flags: Tensor) -> bool:
    """Whether no flag is up, where the host can say so without waiting."""
    return flags.is_cpu and type(flags) is Tensor and not flags.any()


def _side_by_side(tensors: Tensors) -> Tensor | None:
    """One tensor of 0-d tensors that follow each other in one memory; None where they do not."""
    first, size = tensors[0], tensors[0].element_size()
    start, at = first.storage_offset(), [memory.address(tensor) for tensor in tensors]
    if at != list(range(at[0], at[0] + size * len(at), size)) or not all(map(_is_plain, tensors)):
        return None
    storage = first.untyped_storage()
    if (start + len(at)) * size > storage.nbytes():
        return None  # neighbours by chance
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, start, (len(at),), (1,))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.ndim == 0 and memory.why_not(tensor) is None


def _advance_(steps: Tensors) -> None:
    """Adds one to 0-d tensors on the host, one by one."""
    # A tensor of one, made once: a number would be wrapped anew for every step that lives on the host.
    one = torch.ones((), dtype=torch.float32, device=steps[0].device)
    for step in steps:
        step.add_(one)


def copier(to: Tensors, from_: Tensors, *, ours: bool = False) -> Callable[[], object]:
    """What copies each of some tensors to another of its shape and type, all of them in one operation, for as long as
    they lie where they are. ``ours``: no one else sees what it is copied to."""
    native = backends.host_counters()
    if native is not None and all(
        tensor.is_cpu and tensor.is_contiguous() and memory.why_not(tensor) is None for tensor in (*to, *from_)
    ):
        return native.copier(to, from_, ours)
    return lambda: torch._foreach_copy_(list(to), list(from_)) if to else None


def hfac_dense_squares(grad: Tensor, exp_avg_sq: Tensor, *, beta2: Scalar, eps: float) -> Tensor:
    """U^2 of every element of vectors, in plain torch with every backend: vectors are few."""
    return backends.plain.FORMULAS.function("hfac_dense_squares")(grad, exp_avg_sq, beta2=beta2, eps=eps)


def nonfinite(grads: Tensors, elements: Sequence[int] | Tensor, clip: Tensor | None = None) -> Tensor:
    """int32 [len(grads)]: 1 where a gradient, multiplied by ``clip``, must be refused by the rule of `hfac.reference`.
    Nothing of a gradient's size is made.

    Args:
        elements: of each tensor that a gradient is a shard of; of a step that must not wait, a tensor on the device.
    """
    device = grads[0].device if grads else _HOST
    flags = torch.zeros(len(grads), dtype=torch.int32, device=device)
    kinds: dict[torch.dtype, list[int]] = {}
    for i, grad in enumerate(grads):
        if grad.numel():
            kinds.setdefault(grad.dtype, []).append(i)
    sizes = elements if isinstance(elements, Tensor) else torch.tensor(elements, dtype=torch.float64, device="cpu")
    for dtype, index in kinds.items():
        largest = torch.stack(torch._foreach_norm([grads[i] for i in index], torch.inf)).to(state_dtype(dtype))
        if clip is not None:
            largest = largest * clip
        # Where all take part, as in nearly every step, nothing comes from the host.
        mine = slice(None) if len(index) == len(grads) else to_device(torch.tensor(index, device="cpu"), device)
        flags[mine] = (~(largest * largest * sizes.to(device, largest.dtype)[mine]).isfinite()).to(torch.int32)
    return flags
