"""The optimizers as `torch.optim.Optimizer` classes."""

from .hfac import HFac
from .smmf import SMMF

__all__ = ["HFac", "SMMF"]
