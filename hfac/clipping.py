"""Clipping by the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` does, but with norms in float32
for any type of gradient, and without temporaries of a gradient's size. Norm and coefficient stay on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, memory, staging

#: elements of a gradient that are converted to float32 at a time, or an eighth of it where that is more
_PIECE = 2**18


def norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of every tensor: 0-d, on its device, float32 (float64 for float64)."""
    found: list[Any] = [None] * len(grads)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        kinds.setdefault((grad.device, grad.dtype), []).append(i)
    for (device, dtype), index in kinds.items():
        mine = [grads[i].detach() if grads[i].requires_grad else grads[i] for i in index]
        if dtype in (torch.float32, torch.float64):
            values: Sequence[Tensor] = torch._foreach_norm(mine)
        elif device.type == "cpu":
            values = _widened(mine)
        else:
            values = torch._foreach_norm(mine, dtype=torch.float32)
        for i, value in zip(index, values, strict=True):
            found[i] = value
    return found


def stacked(norms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`norms` in one tensor of this type."""
    same = all(norm.dtype == norms[0].dtype for norm in norms)
    return torch.stack(list(norms)).to(dtype) if same else torch.stack([norm.to(dtype) for norm in norms])


def _widened(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Norms of 16-bit tensors on the CPU, of which torch would make float32 copies. The extension makes none, and
    synchronizes its threads once for the whole list."""
    native = backends.host_counters()
    if native is None or memory.reason({"grads": grads}, negated=True) is not None:
        return list(map(_in_pieces, grads))
    squares = native.squares(memory.materialized(grads))
    # What overflows float32 counts as not finite, as for a step that skips such gradients.
    squares.masked_fill_(squares > torch.finfo(torch.float32).max, torch.inf)
    return roots(squares, torch.float32).unbind()


def roots(squares: Tensor, dtype: torch.dtype) -> Tensor:
    """The square roots of sums of squares, float64, as norms of this type.

    On the CPU torch's square root of a hundred numbers is the Math Kernel Library's, which divides it among OpenMP's
    threads. They then wait busily for milliseconds, on the cores that the step's kernels run on next; those of 1 / sqrt
    do not.
    """
    found = squares.rsqrt().reciprocal_() if squares.is_cpu else squares.sqrt()
    return found.to(dtype)


def _in_pieces(grad: Tensor) -> Tensor:
    piece = max(_PIECE, grad.numel() // 8)
    if grad.numel() <= piece:
        return torch.linalg.vector_norm(grad, dtype=torch.float32)
    dim = max(range(grad.ndim), key=lambda d: grad.shape[d])
    pieces = grad.split(max(1, piece * grad.shape[dim] // grad.numel()), dim)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32) for p in pieces]))


def total(norms: Sequence[tuple[Tensor, bool]]) -> Tensor | None:
    """The norm of all tensors together, from the norms of each, 0-d or many in one tensor; None without any. Each comes
    with whether it is left out where it is not finite (nonfinite="skip")."""
    if not norms:
        return None
    device = next((norm.device for norm, _ in norms if not norm.is_cpu), norms[0][0].device)
    flat = {skip: [_flat(norm, device) for norm, mine in norms if mine == skip] for skip in (False, True)}
    stacks = [_in_one(mine) for mine in flat.values() if mine]
    if flat[True]:
        stacks[-1] = torch.nan_to_num(stacks[-1], nan=0.0, posinf=0.0)
    return torch.linalg.vector_norm(_in_one(stacks))


def _flat(norm: Tensor, device: torch.device) -> Tensor:
    """1-d on the device, by no operation where it is."""
    norm = norm if norm.device == device else norm.to(device)
    return norm if norm.ndim == 1 else norm.reshape(-1)


def _in_one(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def coefficient(norm: Tensor, limit: float | None) -> Tensor:
    """What gradients of this norm are multiplied by: at most 1, and NaN for NaN; without a limit 1. On the norm's
    device, not read."""
    if limit is None:
        return torch.ones_like(norm)
    return (norm + 1e-6).reciprocal_().mul_(limit).clamp_max_(1.0)


def refused(norm: Tensor) -> Tensor:
    """Whether nonfinite="skip-step" leaves out the step of gradients of this norm: a 0-d float32 tensor, 1 where the
    square of the norm is not finite, else 0. On the norm's device, not read."""
    return (~(norm * norm).isfinite()).to(torch.float32)


def scaled(grads: list[Tensor], factor: Tensor) -> list[Tensor]:
    """The gradients times a 0-d tensor, in place; the same list, unchanged, where the factor is 1 and reading it takes
    no device synchronisation."""
    if type(factor) is Tensor and factor.is_cpu and staging.on_host(factor) == [1.0]:
        return grads
    out = memory.writable(grads)
    if any(map(Tensor.is_neg, out)):  # torch takes no lists of tensors that negate
        for grad in out:
            grad.mul_(factor.to(grad.device))
    elif out:
        torch._foreach_mul_(out, factor.to(out[0].device))
    return out


class Clip:
    """What gradients are multiplied by to clip them, and what the calls of a step are told of it, which is formed once
    for a device and not for each."""

    def __init__(self, coefficient: Tensor) -> None:
        self.coefficient = coefficient.detach() if coefficient.requires_grad else coefficient
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficient there; in float32; and in float32 what kernels divide by that multiply by no more."""
        found = self._on.get(device)
        if found is None:
            here = self.coefficient if self.coefficient.device == device else self.coefficient.to(device)
            single, divisor = here, here.reciprocal()
            if here.dtype != torch.float32:
                single, divisor = here.to(torch.float32), divisor.to(torch.float32)
            self._on[device] = found = here, single, divisor
        return found


def as_clip(clip: Tensor | Clip | None) -> Clip | None:
    return clip if clip is None or clip.__class__ is Clip else Clip(clip)  # type: ignore[arg-type]
