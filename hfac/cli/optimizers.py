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


#: The learning rate that is advised for each, relative to AdamW's best: for Transformers, and for convolutional
#: networks (docs/choosing.md). Adafactor's is larger because PyTorch multiplies it by the RMS of the parameter that is
#: updated, about a tenth. The study of losses (bench/quality) begins its sweeps there.
ADVISED = {
    "adamw": (1.0, 1.0),
    "adafactor": (10.0, 10.0),
    "hfac": (0.7, 0.7),
    "smmf": (1.6, 2.5),
    "hfac-int8": (1.1, 1.1),
}
#: AdamW's best at the default size with seed 0; --sweep shows how close each optimizer's rate is to its best.
ADAMW_RATE = 4e-3


_BUILT: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": ("AdamW", torch.optim.AdamW),
    "adafactor": ("Adafactor (PyTorch)", torch.optim.Adafactor),
    "hfac": ("HFac", hfac.HFac),
    "smmf": ("SMMF", _smmf),
    "hfac-int8": ("HFac, int8 moment", _int8),
}
CHOICES = {name: Choice(*built, ADAMW_RATE * ADVISED[name][0]) for name, built in _BUILT.items()}
#: Those that are compared where none are named.
USUAL = ("adamw", "adafactor", "hfac-int8", "smmf", "hfac")


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
