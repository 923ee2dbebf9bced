"""Step counters, and what sharded parameters need in plain torch beside the ops."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, memory
from ..schedules import Scalar
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


def hfac_dense_squares(grads: Tensors, exp_avg_sqs: Tensors, *, beta2: Scalar, eps: float) -> list[Tensor]:
    """Sums of U^2 over shards of vectors. In plain torch with every backend: vectors are few."""
    squares = backends.plain.FORMULAS.function("hfac_dense_squares")
    return squares(grads, exp_avg_sqs, beta2=beta2, eps=eps)


def nonfinite(grads: Tensors, elements: Sequence[int]) -> Tensor:
    """int32 [len(grads)]: 1 where a gradient that is a shard of a tensor of so many elements must be refused, by the
    rule of `hfac.reference`. Nothing of a gradient's size is made."""
    flags = torch.zeros(len(grads), dtype=torch.int32, device=grads[0].device if grads else _HOST)
    for i, grad in enumerate(grads):
        if grad.numel():
            largest = torch.stack(torch.aminmax(grad)).to(state_dtype(grad.dtype))
            flags[i] = ~(largest * largest * elements[i]).isfinite().all()
    return flags
