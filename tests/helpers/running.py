"""Small training runs for the tests of the classes: parameters, gradients, steps, and every bit of what they leave."""

from contextlib import contextmanager

import pytest
import torch
from cases import OPTIONS
from torch.nn import Parameter

import hfac
from hfac import HFac

#: (class, options), every row of `cases.OPTIONS`
VARIANTS = [
    pytest.param(getattr(hfac, name), row, id=f"{name.lower()}-{label}")
    for name, rows in OPTIONS.items()
    for label, row in rows.items()
]


class Int8(HFac):
    """With a whole first moment in 8 bits, for suites over classes."""

    def __init__(self, params, *args, **options):
        super().__init__(params, *args, **{"first_moment": "int8", **options})


SHAPES = [(4, 6), (5,), (3, 2, 4), (), (1, 3), (7,), (17, 19), (12,)]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params, seed, scale=1.0):
    """Gradients that depend on the seed alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def train(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        gradients(params, step)
        optimizer.step()


def bits(value):
    """A value in which tensors are replaced by what tells them apart to the last bit."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).tolist() if value.device.type == "cpu" else None
        return (value.dtype, value.shape, str(value.device), data)
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(bits(entry) for entry in value)
    return value


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


#: what may be torch's default around a call that makes tensors, or steps
AMBIENT = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "float16": lambda: _default_dtype(torch.float16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}
