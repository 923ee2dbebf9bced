"""The parity gate of whole steps with their options."""

from typing import Any

import torch
from torch import nn

import hfac
from bench.problem import Problem


def why_red(name: str, options: dict[str, Any], backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None if three steps of the backend leave the weights that the reference leaves, but for one element in a
    thousand, which the order of sums may have rounded otherwise."""
    found = []
    for chosen in (backend, "reference"):
        problem = Problem([(520, 1030), (97,)], dtype, device)
        optimizer = getattr(hfac, name)(problem.params, lr=1e-3, backend=chosen, **options)
        grads = [param.grad.clone() for param in problem.params]
        for _ in range(3):
            for param, grad in zip(problem.params, grads, strict=True):
                param.grad.copy_(grad)  # some backends clip them in place, and a second time by a little
            optimizer.step()
        weights = optimizer.fp32_state_dict(nn.ParameterList(problem.params)).values()
        found.append([weight.float() for weight in weights])
    # Gradients that a kernel multiplies as it reads them are not rounded to their type, as those multiplied in place.
    scale = 1e-2 if "max_grad_norm" in options and dtype != torch.float32 else 1e-6
    apart = [int(((a - b).abs() > scale * b.abs()).sum()) for a, b in zip(*found, strict=True)]
    return f"{sum(apart)} weights are others" if sum(apart) > 500 else None
