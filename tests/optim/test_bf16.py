"""Training in pure bfloat16: where rounding to nearest stalls, stochastic rounding and master weights go on."""

import pytest
import torch

import hfac

STEPS = 150


def trained(name, dtype, **stored):
    """Mean square error of a linear map after some steps of a learning rate at which no weight of usual size would move
    by half the distance between two bfloat16."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 48, generator=generator)
    target = 0.5 * torch.randn(48, 32, generator=generator).sign()
    weight = torch.nn.Parameter(target.mul(1.1).bfloat16().to(dtype))  # all begin with the same numbers
    optimizer = getattr(hfac, name)([weight], lr=2e-4, **stored)
    losses = []
    for _ in range(STEPS):
        loss = (inputs @ weight.float() - inputs @ target).square().mean()
        weight.grad = None
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_stochastic_rounding_trains_where_rounding_to_nearest_stalls(name):
    start, wide = trained(name, torch.float32)
    _, stalled = trained(name, torch.bfloat16)
    _, stochastic = trained(name, torch.bfloat16, rounding="stochastic", seed=1)
    _, split = trained(name, torch.bfloat16, master="split")
    progress = start - wide
    assert progress > 0.5 * start
    assert start - stalled < 0.1 * progress
    for found in (stochastic, split):
        assert abs(found - wide) < 0.1 * progress
