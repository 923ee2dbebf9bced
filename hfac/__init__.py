"""hfac: optimizers whose state is rank-1 factors.

`HFac` (Nguyen et al., AISTATS 2025) and `SMMF` (Park, Lee, AAAI 2025) are `torch.optim.Optimizer`s;
`hfac.functional` has them over lists of tensors, `hfac.reference` defines every op in plain torch.
"""

from pathlib import Path

from . import _startup  # noqa: F401  first: what follows imports torch, which takes a second
from ._version import __version__

# An uninstalled checkout keeps hfac.triton_kernels beside this folder; installed, it lies inside it.
if not (Path(__file__).parent / "triton_kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from . import functional
from .convert import convert
from .groups import param_groups
from .optim import SMMF, HFac, clip_grad_norm_
from .release import release_gradients

__all__ = [
    "SMMF",
    "HFac",
    "__version__",
    "clip_grad_norm_",
    "convert",
    "functional",
    "param_groups",
    "release_gradients",
]
