"""The optimizers `hfac compare` knows, their learning rates, and the bytes of state they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

import hfac


@dataclass(frozen=True)
class Choice:
    """One optimizer, with its class's defaults except for the learning rate and what `build` sets."""

    title: str
    build: Callable[..., torch.optim.Optimizer]
    learning_rate: float


def _int8(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    return hfac.HFac(groups, lr=lr, first_moment="int8")


def _smmf(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    return hfac.SMMF(groups, lr=lr, decay_rate=-0.8)  # SMMF's authors advise -0.8 for Transformers, -0.5 for CNNs


# The learning rates come from sweeps at the default size with seed 0; --sweep shows how close each is to its best.
# Adafactor's is larger because it is relative: PyTorch multiplies it by the RMS of the parameter being updated.
CHOICES = {
    "adamw": Choice("AdamW", torch.optim.AdamW, 4e-3),
    "adafactor": Choice("Adafactor (PyTorch)", torch.optim.Adafactor, 4e-2),
    "hfac": Choice("HFac", hfac.HFac, 2.5e-3),
    "smmf": Choice("SMMF", _smmf, 4e-3),
    "hfac-int8": Choice("HFac, int8 moment", _int8, 3.5e-3),
}
#: Those that are compared where none are named.
USUAL = ("adamw", "adafactor", "hfac", "smmf")


#: Those that can round bfloat16 weights stochastically or keep master weights.
STORING = ("hfac", "smmf", "hfac-int8")


def build_optimizer(
    name: str, model: torch.nn.Module, lr: float, weight_decay: float, **stored: str | None
) -> torch.optim.Optimizer:
    """The named optimizer over `model`, with weight decay on its matrices and none on its vectors. `stored` are its
    options `rounding` and `master`, which those in `STORING` have."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name in STORING:
        groups = [{**group, **stored} for group in groups]
    return CHOICES[name].build(groups, lr=lr)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in `optimizer.state`, step counters and all."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(optimizer.state.values()))


def _tensors(values: Iterable) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
