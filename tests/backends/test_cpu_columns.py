"""Rows of a multiple of 2048 or 4096 bytes: while the CPU's kernels work on them, sums and scales of columns lie in a
thread's own memory (`Columns` in csrc/cpu/driver.h), from where they must come back whole."""

import pytest
import torch

import hfac

#: columns of which rows of float32 and of float64 are such a multiple, and some of which none are
WIDTHS = [512, 1024, 1000]
OPTIMIZERS = {"hfac": (hfac.HFac, {}), "int8": (hfac.HFac, {"first_moment": "int8"}), "smmf": (hfac.SMMF, {})}


def numbers(name, width, dtype, backend):
    """A parameter and its state after three steps, as one list of numbers. 1100 rows are several chunks, of which all
    are long enough to have columns beside them; SMMF makes a square of its matrix."""
    kind, options = OPTIMIZERS[name]
    random = torch.Generator().manual_seed(width)
    shape = (width if name == "smmf" else 1100, width)
    param = torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype))
    optimizer = kind([param], lr=1e-2, backend=backend, **options)
    for _ in range(3):
        param.grad = torch.randn(shape, generator=random).to(dtype)
        optimizer.step()
    state = {key: value for key, value in optimizer.state[param].items() if torch.is_tensor(value)}
    floating = [state[key] for key in sorted(state) if state[key].is_floating_point()]
    return [param.detach().double(), *(value.double() for value in floating)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_agree_with_the_reference(name, width, dtype):
    ours, expected = (numbers(name, width, dtype, backend) for backend in ("cpu", "reference"))
    relative = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float64: 1e-12}[dtype]  # sums have another order
    apart = 1e-4 if name == "int8" else 0.0  # of the elements: those whose code is its neighbour (docs/kernels.md)
    for one, other in zip(ours, expected, strict=True):
        wrong = (one - other).abs() > relative * (other.abs() + other.abs().mean())
        assert wrong.double().mean() <= apart


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nor_do_threads_change_bits(name, width):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(numbers(name, width, torch.float32, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
