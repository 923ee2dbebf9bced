"""SMMF as a torch optimizer."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch.optim.optimizer import ParamsT

from .. import matricize
from ..schedules import Scalar
from . import options
from .base import FactoredOptimizer
from .state import Side

WEIGHT_DECAY_MODES = ("adamw", "adam")


class SMMF(FactoredOptimizer):
    r"""SMMF: both moments of a parameter of any shape as rank-1 factors of its most nearly square matrix, and one sign
    bit per element.

    Park, Lee, *SMMF: Square-Matricized Momentum Factorization for Memory-Efficient Optimization*, AAAI 2025,
    arXiv 2412.08894, Algorithm 1. Argument names and defaults are the authors'.

    Args:
        params: tensors, (name, tensor) pairs, or groups (dicts with "params" and any option below). float16, bfloat16,
            float32 or float64; gradients may have another of these types. Arithmetic and state are float32 (float64 for
            float64 parameters).
        lr: learning rate >= 0, a number or a 0-d tensor (default 1e-3).
        beta: decay of the first moment in [0, 1), or None for no first moment (default 0.9). Groups also have it as
            "momentum", where torch's `OneCycleLR` and `CyclicLR` read and write it.
        eps: added to the root of the second moment, >= 0 (default 1e-8).
        weight_decay: >= 0, a number or a 0-d tensor (default 0).
        decay_rate: the second moment decays by 1 - t^decay_rate, in [-1, 0]. The authors recommend -0.5 for CNNs and
            -0.8 for Transformers (default -0.5).
        growth_rate: beta is multiplied by growth_rate^(t-1); in [0, 1] (default 0.999).
        vector_reshape: False keeps both moments whole where exactly one dimension is larger than 1 (default True).
            Cannot change once state exists, nor can whether beta is None.
        weight_decay_mode: "adamw" multiplies W by 1 - lr * weight_decay, "adam" adds weight_decay * W to the gradient
            (default "adamw"). The authors' code computes the latter and then ignores it; here it is used.
        dense, batch_dims, maximize, capturable, backend, nonfinite, amp_scaling, rounding, seed, master, max_grad_norm,
        watch:
            as for `hfac.HFac`; each slice of ``batch_dims`` has a square matrix of its own. The norm for
            ``max_grad_norm`` takes one more read of the gradients, and across ranks an all-reduce of two numbers per
            parameter for each mesh.

    State of a parameter (n, m = `hfac.matricize.square` of its number of elements): ``exp_avg_row``,
    ``exp_avg_sq_row`` of shape (n,), ``exp_avg_col``, ``exp_avg_sq_col`` of shape (m,), ``exp_avg_sign`` uint8 of
    `hfac.matricize.sign_shape`; where m = 1 (a prime number of elements) ``exp_avg`` and ``exp_avg_sq`` of p.shape;
    and ``step``. With ``batch_dims``, factors and moments are those of one slice with p.shape[:batch_dims] in front.

    Raises:
        TypeError, ValueError: an invalid option or parameter; the message says what is required.
        RuntimeError: a sparse or complex tensor; an unavailable backend.
    """

    _algorithm = "smmf"
    _own_option = "vector_reshape"
    _rules = {
        "beta": options.number(0.0, 1.0, open_high=True, none="no first moment"),
        "eps": options.number(0.0),
        "decay_rate": options.number(-1.0, 0.0),
        "growth_rate": options.number(0.0, 1.0),
        "vector_reshape": options.flag,
        "weight_decay_mode": options.choice(*WEIGHT_DECAY_MODES),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        beta: float | None = 0.9,
        eps: float = 1e-8,
        weight_decay: Scalar = 0.0,
        decay_rate: float = -0.5,
        growth_rate: float = 0.999,
        vector_reshape: bool = True,
        weight_decay_mode: Literal["adamw", "adam"] = "adamw",
        *,
        dense: bool = False,
        batch_dims: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        nonfinite: Literal["propagate", "skip"] = "propagate",
        amp_scaling: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
        master: Literal["split", "split8"] | None = None,
        max_grad_norm: float | None = None,
        watch: bool = False,
    ) -> None:
        super().__init__(params, locals())
        self.defaults["momentum"] = self.defaults["beta"]  # which torch's schedulers look for

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["momentum"] = group["beta"]

    def _check_changes(self, index: int) -> None:
        # Schedulers that cycle momentum write "momentum", which is no option here. Who writes both means beta.
        group = self.param_groups[index]
        if group.get("momentum", group["beta"]) is not group["beta"] and "beta" not in self._known.changed(
            index, group
        ):
            group["beta"] = group["momentum"]
        super()._check_changes(index)
        group["momentum"] = group["beta"]

    def _sides(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> tuple[Side, Side] | None:
        n, m = matricize.square(math.prod(shape))
        vector = sum(side > 1 for side in shape) == 1
        return None if m == 1 or (vector and not group["vector_reshape"]) else (((n,), (None,)), ((m,), (None,)))
