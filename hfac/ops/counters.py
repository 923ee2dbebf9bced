"""Step counters, and what sharded parameters need in plain torch beside the ops."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, memory
from ..schedules import Scalar
from ..staging import to_device
from .checks import Tensors, state_dtype

_HOST = torch.device("cpu")


def counters_of(steps: Tensors) -> Any:
    """What has `read_steps` and `advance_steps_` for these: the extension, which takes many at once, where they are
    float32 on the host that lie in memory; else plain torch."""
    native = backends.host_counters()
    readable = native is not None and all(step.is_cpu and memory.why_not(step) is None for step in steps)
    return native if readable else sys.modules[__name__]


def read_steps(steps: Tensors) -> list[float]:
    """The values of 0-d tensors on the host."""
    return [step.item() for step in steps]


def advance_steps_(steps: Tensors) -> None:
    """Adds one to 0-d tensors, which all lie on the host or all on one device."""
    # A tensor of one, made once: a number would be wrapped anew for every step that lives on the host.
    one = torch.ones((), dtype=torch.float32, device=steps[0].device)
    if steps[0].is_cpu:
        for step in steps:
            step.add_(one)
    else:
        torch._foreach_add_(list(steps), one, alpha=1)


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
