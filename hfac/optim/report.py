"""Reports on steps: the norm of all gradients, and what a step did to each parameter."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import clipping, functional, rounding, slicing
from ..distributed import layout
from . import diagnostics, options
from .checkpoint import CheckpointedOptimizer
from .slices import piece_counts, sliced
from .state import has_state
from .table import Diagnostics


class ReportingOptimizer(CheckpointedOptimizer):
    """The base of `hfac.optim.base.FactoredOptimizer`, which makes the steps."""

    _grad_norm: Tensor | None = None
    #: by parameter, the sums [*p.shape[:batch_dims], 5] of its last watched step (``watched`` of `hfac.reference`)
    _watched: dict[Tensor, Tensor]
    #: what the last step multiplied gradients by as it read them, without writing them
    _norm_coefficient: Tensor | None = None
    _said_what_is_lost = False

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._watched = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watched = {}

    @property
    def grad_norm(self) -> Tensor | None:
        """With ``max_grad_norm`` or nonfinite="skip-step", the norm of all gradients in the last step that had any,
        before clipping: a 0-d tensor on their device, float32 (float64 where there are float64 gradients). Getting it
        does not wait for the device; reading its value does. None without these, and before the first step."""
        return self._grad_norm

    def _keep_sums(
        self, step: functional.Step, group: Mapping[str, Any], params: list[Tensor], grads: list[Any]
    ) -> None:
        """Keeps the sums of a watched step; ``grads`` are the parameters', None where there was none."""
        stepped = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
        for indices, sums in step.watched():
            mine = stepped if indices is None else [stepped[i] for i in indices]
            rows = sums.split([math.prod(sliced(param, group)[0]) for param, _ in mine])
            for (param, grad), row in zip(mine, rows, strict=True):
                if param.numel() == 0:
                    continue
                if not self._spec.op_of(list(self.state[param])).reads_twice:  # H-Fac's matrices: they count zeros
                    row[:, 3:] += diagnostics.zeros(grad, group)
                self._watched[param] = row.view(*sliced(param, group)[0], -1)

    @torch.no_grad()
    def diagnostics(self, *, ahead: bool = False) -> Diagnostics:
        """What the last step did to every parameter; empty parameters are left out.

        With ``watch=True`` the step's own kernels have summed it up, for every parameter they stepped: it is exact,
        gradients may be gone, and nothing is computed here.

        Without, it is computed here, for parameters that have a gradient, in some reads of parameter and gradient
        (`hfac.optim.diagnostics`): call it after `step` and before `zero_grad`. The gradient must be the one that the
        step saw (with ``amp_scaling``, call `GradScaler.unscale_` before the step).

        Deprecated: after a step without ``watch=True``, SMMF's direction and what follows from it are estimates where
        its first moment is factored, off by a tenth or so, and give a FutureWarning. Set ``watch=True``, or ask before
        the step with ``ahead=True``; both are exact.

        HFac's ``update_rms`` and ``unmoved`` under first_moment="int8", asked for in the same way, are those of the
        momentum's codes, within 1 %.

        Args:
            ahead: describe the step that `step` would make now: call it after the backward pass, before `step`. Exact
                for both optimizers (default False).

        Returns:
            By name, where parameters were given with names, else by position, a dict of metrics: 0-d tensors on the
            parameter's device; of a stack, tensors of shape p.shape[:batch_dims] with one entry per slice. Printed it
            is a table, in a notebook one with bars, and it has ``plot()`` (`hfac.optim.table.Diagnostics`).

            ``update_rms``: RMS of W's change, learning rate and decoupled weight decay included.
            ``direction_rms``: RMS of G / sqrt(V) before clipping (SMMF: of M / (sqrt(V) + eps)).
            ``clip_factor`` (HFac): max(1, direction_rms / clip_threshold), which G / sqrt(V) was divided by; of dense
            moments, which the whole direction was divided by, momentum included.
            ``unmoved``: the fraction of weights that the update leaves unchanged, rounded to nearest in their type
            (master weights: in what is stored, float32 for "split", 24 bits for "split8"). With rounding="stochastic"
            such weights move now and then.
            ``zero_rows``, ``zero_cols``: rows and columns of the gradient that are all zero, in the matrix of
            `hfac.matricize.cut`, also with ``dense``; elements of a vector are rows.
            ``skipped``: steps skipped so far; of a stack those in which any slice was, the same number for each.

            All but the last three are NaN where no step was made, or ``nonfinite`` skipped it; of a watched step,
            ``zero_rows`` and ``zero_cols`` are NaN then, too.

        Warns once where a step moved no weight of a bfloat16 or float16 parameter, because its update is lost in
        rounding to nearest; to know it, the host reads their ``unmoved`` and waits for the device.

        Of sharded parameters a watched step has added the numbers up over the ranks, so that any rank may ask, and gets
        those of the whole parameter; ``zero_rows`` and ``zero_cols`` are NaN.

        Raises:
            RuntimeError: a parameter is sharded, and its last step was not watched, or ``ahead`` is asked for.
        """
        self._sync_state()
        coefficient, refused = self._told(ahead)
        found = Diagnostics()
        rounded: list[dict[str, Tensor]] = []
        estimated = False
        position = 0
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                metrics, is_estimate = self._metrics(param, group, ahead, coefficient, refused)
                estimated |= is_estimate
                if metrics is not None:
                    found[group["param_names"][i] if "param_names" in group else position] = metrics
                    if param.dtype in rounding.DTYPES and group["rounding"] == "nearest" and group["master"] is None:
                        rounded.append(metrics)
                position += 1
        if estimated:
            _warn_of_estimate()
        if rounded and not self._said_what_is_lost:
            self._say_what_is_lost(rounded)
        return found

    def _say_what_is_lost(self, rounded: list[dict[str, Tensor]]) -> None:
        """Warns once where 16-bit weights did not move at all, because rounding to nearest lost the whole update."""
        lost = [((each["unmoved"] == 1) & (each["direction_rms"] > 0)).any() for each in rounded]
        count = int(torch.stack([each.cpu() for each in lost]).sum())
        if count:
            self._said_what_is_lost = True
            options.warn(
                f"{type(self).__name__}: the step moved no weight of {count} of {len(rounded)} 16-bit parameters: "
                "their updates are smaller than half the distance between two values of the type, and rounding to "
                "nearest loses them. rounding='stochastic' keeps them on average, master='split' exactly "
                "(docs/bf16.md)."
            )

    def _metrics(
        self,
        param: Tensor,
        group: Mapping[str, Any],
        ahead: bool,
        norm_coefficient: Tensor | None,
        refused: Tensor | None,
    ) -> tuple[dict[str, Tensor] | None, bool]:
        """A parameter's metrics, None where there are none, and whether they are estimates."""
        if not has_state(self.state, param) or param.numel() == 0:
            return None, False
        state = self._needed_state(param, group)
        if not ahead and group["watch"] and param in self._watched:
            return diagnostics.watched(param, group, state, self._watched[param]), False
        if param.grad is None:
            return None, False
        metrics = diagnostics.computed(self._algorithm, param, group, state, ahead, norm_coefficient, refused)
        return metrics, not ahead and diagnostics.is_estimated(self._algorithm, group, state)

    def _told(self, ahead: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the last step multiplied the gradients by, where they have not been, or one made now would; and whether
        it is skipped by nonfinite="skip-step"."""
        skips = self.param_groups[0]["nonfinite"] == "skip-step"  # the same in all groups; one parameter asks at a time
        limit = self.max_grad_norm if ahead else None
        norm = self._norm_ahead() if ahead and (limit is not None or skips) else self._grad_norm
        refused = clipping.refused(norm) if skips and norm is not None else None
        if not ahead:
            return self._norm_coefficient, refused
        return None if norm is None or limit is None else clipping.coefficient(norm, limit), refused

    def _norm_ahead(self) -> Tensor | None:
        """The norm of the present gradients."""
        norms: list[tuple[Tensor, bool]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and not layout.is_sharded(p)]
            grads = [layout.local(p.grad) for p in params if p.grad is not None]
            slices = slicing.slices(grads, group["batch_dims"], piece_counts(params, group), group["views_dim"])
            norms += [(norm, group["nonfinite"] == "skip") for norm in clipping.norms(slices)]
        return clipping.total(norms)

    @torch.no_grad()
    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adds `diagnostics` of a parameter as "<metric>/<name>", those of a stack with the slice's index appended
        ("<metric>/<name>.3", with two batch dimensions ".0.3"). Composer's OptimizerMonitor calls it after a step.

        Its `pre_reduce_metrics` and `dist_reduce_metrics` combine shards of FSDP, which are refused here.
        """
        found = self._find(param)
        if found is not None:
            group = self.param_groups[found[0]]
            metrics, estimated = self._metrics(param, group, False, *self._told(ahead=False))
            optimizer_metrics.update(diagnostics.by_name(name, metrics or {}))
            if estimated:
                _warn_of_estimate()
        return optimizer_metrics


def _warn_of_estimate() -> None:
    # A FutureWarning, as torch's own deprecations are: Python hides a DeprecationWarning from everybody but the code in
    # __main__, and here a trainer's callback is the usual caller.
    options.warn(
        "hfac.SMMF.diagnostics() after a step estimates the update where the first moment is factored, and is off by a "
        "tenth or so. The estimate is deprecated: construct the optimizer with watch=True, whose steps sum up exact "
        "metrics, or call diagnostics(ahead=True) before the step.",
        FutureWarning,
    )
