"""What every contestant of a case works on: the same parameters and the same gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

#: So small that no parameter changes its sign or its magnitude in the few thousand steps of a measurement.
LR = 1e-5
WEIGHT_DECAY = 0.01


class Problem:
    """Parameters with their gradients in ``.grad``, of one type, on one device.

    All contestants update the same parameters, so that long lists fit the memory. Magnitudes lie in [0.5, 1]:
    nothing is zero, and even a second moment in float16 stays above the subnormal numbers, whose arithmetic is slow on
    some processors and would be measured instead of the kernels.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def values(shape: tuple[int, ...]) -> Tensor:
            drawn = torch.rand(shape, generator=generator, device=device)
            return torch.where(drawn < 0.5, drawn + 0.5, -drawn).to(dtype)

        self.device = device
        self.dtype = dtype
        self.params = [Parameter(values(shape)) for shape in shapes]
        for param in self.params:
            param.grad = values(tuple(param.shape))

    @property
    def elements(self) -> int:
        """Number of parameters (elements, not tensors)."""
        return sum(param.numel() for param in self.params)


def unhealthy(tensors: Iterable[Tensor]) -> str | None:
    """None, or why times taken with these values would mislead: NaN, infinite or subnormal elements."""
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        magnitude = tensor.detach().abs()
        if not magnitude.isfinite().all():
            return f"a tensor of shape {tuple(tensor.shape)} holds values that are not finite"
        if ((magnitude > 0) & (magnitude < torch.finfo(tensor.dtype).tiny)).any():
            return f"a tensor of shape {tuple(tensor.shape)} holds subnormal values"
    return None
