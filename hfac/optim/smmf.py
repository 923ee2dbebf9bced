"""SMMF as a torch optimizer."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from torch.optim.optimizer import ParamsT

from .. import matricize
from ..types import Backend, Master, Nonfinite, Rounding, Scalar, Signs, WeightDecayMode
from . import options
from .base import FactoredOptimizer
from .slices import placement_splits_bytes
from .state import Side

SIGNS = get_args(Signs)


class SMMF(FactoredOptimizer):
    r"""SMMF: both moments of a parameter of any shape as rank-1 factors of its most nearly square matrix, and one sign
    bit per element.

    Park, Lee, *SMMF: Square-Matricized Momentum Factorization for Memory-Efficient Optimization*, AAAI 2025,
    arXiv 2412.08894, Algorithm 1. Argument names and defaults are the authors'. docs/optimizers.md has each option at
    length; any of them may be a group's own.

    What it optimizes, and by which step:
        params: tensors, (name, tensor) pairs, or groups (dicts with "params"); float16, bfloat16, float32 or float64.
        lr: learning rate >= 0, a number or a 0-d tensor (default 1e-3).
        beta: decay of the first moment in [0, 1), or None for no first moment; whether it is None cannot change once
            state exists (default 0.9). Schedulers that cycle "momentum" move it.
        eps: added to the root of the second moment, >= 0 (default 1e-8).
        weight_decay: >= 0, a number or a 0-d tensor (default 0).
        decay_rate: the second moment decays by 1 - t^decay_rate, in [-1, 0]; -0.8 for Transformers (default -0.5).
        growth_rate: in step t beta is multiplied by growth_rate^(t-1); in [0, 1] (default 0.999).
        weight_decay_mode: "adamw" multiplies W by 1 - lr * weight_decay, "adam" adds weight_decay * W to the gradient
            (default "adamw").
        max_grad_norm: clips by the norm of all gradients, > 0, or None (default None; docs/release.md).
        maximize: ascend (default False).
        nonfinite: "propagate" lets inf and NaN in gradients through; "skip" leaves such a parameter and its state
            unchanged, "skip-step" all of them, and counts it in ``state[p]["skipped"]`` (default "propagate").
        amp_scaling: the step does what a `torch.amp.GradScaler` would do before it (default False).

    How it is stored (the first five cannot change once state exists):
        vector_reshape: False keeps both moments whole where exactly one dimension is larger than 1 (default True).
        dense: both moments whole, for any shape (default False).
        batch_dims: leading dimensions that index slices, each with a square matrix of its own; experts of shape
            E x a x b: 1 (default 0; docs/parameter-policy.md).
        views: equal pieces of a fused weight, each likewise; (3, heads) of a fused QKV weight (default 1).
        views_dim: the dimension after ``batch_dims`` that ``views`` cuts; 1 of weights that are in x out, as
            transformers' Conv1D has them (default 0).
        signs: of the first moment, "bits", or "bytes": bool of p.shape, which any placement can shard as the parameter.
            Parameters whose placement would split bytes of bits keep bytes in any case; loading converts either way
            (default "bits"; docs/distributed.md).
        rounding: "nearest", or "stochastic" for bfloat16 and float16 parameters (default "nearest"; docs/bf16.md).
        seed: of the random bits of rounding, in [0, 2^64) (default 0).
        master: of bfloat16 parameters, None, "split" or "split8": the bits that a float32 has beyond them, in 2 or 1
            bytes per element (default None; docs/bf16.md).

    Where it runs:
        backend: "auto", "reference", "cpu", "triton" or "cuda" (default "auto"; docs/backends.md).
        capturable: for CUDA graphs; ``step`` stays on the device (default False; docs/compile-and-graphs.md).
        watch: the step records what `diagnostics` reports (default False; docs/diagnostics.md).

    State of a parameter, float32 (float64 of float64 parameters); n, m = `hfac.matricize.square` of its elements:
        ``exp_avg_row``, ``exp_avg_sq_row`` of shape (n,), ``exp_avg_col``, ``exp_avg_sq_col`` of shape (m,),
        ``exp_avg_sign``, uint8 of `hfac.matricize.sign_shape`, or bool of p.shape; where moments are whole, as with
        m = 1 (a prime number of elements), ``exp_avg``, ``exp_avg_sq`` of p.shape. And ``step``; with ``master``,
        ``master_low``, int16 or int8 of p.shape. With ``batch_dims``, factors are those of one slice with
        p.shape[:batch_dims] in front, then with ``views`` the number of pieces.

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
        "weight_decay_mode": options.choice(*get_args(WeightDecayMode)),
        "signs": options.choice(*SIGNS),
    }
    _state_options = {"signs": "bits"}
    _converted_options = frozenset({"signs"})

    _elsewhere = {
        "betas": "pass beta=betas[0]; decay_rate has the place of the second",
        "clip_threshold": "leave it out: SMMF does not clip its updates; max_grad_norm clips gradients",
        "matricize": "leave it out: every shape is viewed as its most nearly square matrix",
        "first_moment": "leave it out: the first moment is factored, or whole with dense=True",
    }

    @options.by_name(_elsewhere)
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
        weight_decay_mode: WeightDecayMode = "adamw",
        *,
        signs: Signs = "bits",
        dense: bool = False,
        batch_dims: int = 0,
        views: int | tuple[int, ...] = 1,
        views_dim: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        backend: Backend = "auto",
        nonfinite: Nonfinite = "propagate",
        amp_scaling: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        master: Master | None = None,
        max_grad_norm: float | None = None,
        watch: bool = False,
    ) -> None:
        super().__init__(params, locals())
        self.defaults["momentum"] = self.defaults["beta"]  # which torch's schedulers look for

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["momentum"] = group["beta"]

    def _advice(self) -> Iterator[str]:
        yield from super()._advice()
        own = [
            param
            for group in self.param_groups
            for param in group["params"]
            if group["signs"] == "bits"
            and "exp_avg_sign" in self.state.get(param, ())
            and placement_splits_bytes(param, group)
        ]
        if own:
            yield (
                f"{len(own)} parameter(s), the first being {self._label(own[0])} (shape {tuple(own[0].shape)}), keep a "
                f"byte per sign, because {tuple(own[0].placements)} would split bytes of sign bits. "
                "torch.distributed.checkpoint does not convert them for a layout on which they have bits: give their "
                "group signs='bytes' on every layout that shares checkpoints."
            )

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
