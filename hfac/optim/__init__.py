"""The optimizers as `torch.optim.Optimizer` classes."""

from .hfac import HFac
from .shared_norm import clip_grad_norm_
from .smmf import SMMF

__all__ = ["HFac", "SMMF", "clip_grad_norm_"]
