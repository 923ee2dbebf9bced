"""What both optimizers tell of a step: the norm of its gradients, and what it did to each parameter."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import clipping, functional
from ..distributed import layout
from . import diagnostics
from .state import COMMON_RULES, StatefulOptimizer


class ObservedOptimizer(StatefulOptimizer):
    """The base of `hfac.optim.base.FactoredOptimizer`, which makes the steps."""

    _grad_norm: Tensor | None = None
    #: what a watched step told of each parameter: numbers [*p.shape[:batch_dims], 5] (`hfac.reference`)
    _watched: dict[Tensor, Tensor]
    #: what the last step multiplied gradients by as it read them, and left them as they were
    _read_times: Tensor | None = None
    #: where each parameter was when one was last looked for: the number of its group, and its place there
    _index: dict[Tensor, tuple[int, int]]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._watched = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watched = {}

    @property
    def grad_norm(self) -> Tensor | None:
        """With ``max_grad_norm``, the norm of all gradients in the last step that had any, before clipping: a 0-d
        tensor on their device, float32 (float64 where there are float64 gradients). Asking for it does not wait for
        the device; reading its value does. None without ``max_grad_norm`` and before the first step."""
        return self._grad_norm

    @property
    def max_grad_norm(self) -> float | None:
        """The option, which is the same in every group.

        Raises:
            ValueError: it is not.
        """
        return self._common_limit(self.param_groups)

    def _common_limit(self, groups: Iterable[Mapping[str, Any]]) -> float | None:
        """The one ``max_grad_norm`` of all groups; those pickled by an older version have none."""
        name = f"{type(self).__name__}: max_grad_norm"
        limits = [group.get("max_grad_norm") for group in groups] or [None]
        if limits.count(limits[0]) != len(limits):
            raise ValueError(
                f"{name} must be the same in every group, because the norm is that of all gradients together, got "
                f"{limits}. Set it once, for the optimizer."
            )
        return COMMON_RULES["max_grad_norm"](name, limits[0])

    def _limit_of(self, group: Mapping[str, Any]) -> float | None:
        """``max_grad_norm`` of one group, where looking at all would cost too much."""
        return self._common_limit([group])

    def _find(self, param: Tensor) -> tuple[int, int] | None:
        """The number of a parameter's group, and its place there; None where it is in none. Looking for each of many
        parameters walks over the groups once."""
        for again in (False, True):
            if again:
                self._index = {}
                for index, group in enumerate(self.param_groups):
                    for i, mine in enumerate(group["params"]):
                        self._index.setdefault(mine, (index, i))
            found = self._index.get(param)
            if found is not None:
                index, i = found
                params = self.param_groups[index]["params"] if index < len(self.param_groups) else []
                if i < len(params) and params[i] is param:
                    return found
        return None

    def _note(self, step: "functional.Step", group: Mapping[str, Any], params: list[Tensor], grads: list[Any]) -> None:
        """Keeps what a watched step has told; ``grads`` as the parameters', None where there was none."""
        if not group["watch"]:
            return
        batch = group["batch_dims"]
        there = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
        for places, numbers in step.watched():
            mine = there if places is None else [there[place] for place in places]
            rows = numbers.split([param.shape[:batch].numel() for param, _ in mine])
            for (param, grad), row in zip(mine, rows, strict=True):
                if param.numel() == 0:
                    continue
                if self._algorithm != "hfac" or "exp_avg_sq_row" not in self.state[param]:
                    row[:, 3:] += diagnostics.zeros(grad, group)
                self._watched[param] = row.view(*param.shape[:batch], -1)

    @torch.no_grad()
    def diagnostics(self, *, ahead: bool = False) -> dict[int | str, dict[str, Tensor]]:
        """What the last step did to every parameter. Empty parameters are left out.

        With ``watch=True`` the step itself has told it, of every parameter that it has stepped: exactly, gradients may
        be gone, and nothing is computed here.

        Without, it is computed here, for parameters that have a gradient: call it after `step`, before `zero_grad`. The
        gradient must be the one that the step saw (with ``amp_scaling``: call `GradScaler.unscale_` before the step).
        It costs some reads of parameter and gradient, in pieces (`hfac.optim.diagnostics`), and the step nothing.

        Args:
            ahead: of the step that `step` would make now instead: call it after the backward pass, before `step`.
                Exact for both optimizers; of a step made and not watched, SMMF's direction and what follows from it are
                estimates where its first moment is factored, and off by a tenth or so (default False).

        Returns:
            By name, where parameters were given with names, else by position: 0-d tensors on the parameter's device,
            by metric; of a stack, tensors of shape p.shape[:batch_dims], an entry for each slice. ``update_rms``: of
            W's change, learning rate and decoupled weight decay included. ``direction_rms``: of G / sqrt(V) before
            clipping (SMMF: M / (sqrt(V) + eps)). ``clip_factor`` (HFac): max(1, direction_rms / clip_threshold), what
            that was divided by; with whole moments, what the whole direction was, momentum included. ``unmoved``: the
            fraction of the weights that the update leaves as they are, rounded to
            nearest in their type, master weights as they are stored ("split": float32, "split8": 24 bits); with
            rounding="stochastic" such weights move now and then. These are NaN where no step was made, or
            nonfinite="skip" skipped it; of a watched step so are the next two then. ``zero_rows``, ``zero_cols``: rows
            and columns of the gradient (`hfac.matricize.cut`, also with ``dense``; elements of a vector are rows) that
            are all zero; ``skipped``: steps skipped so far, of a stack those in which any slice was, the same number
            for each.

        Raises:
            RuntimeError: a parameter is sharded.
        """
        self._sync_state()
        times = self._coefficient_ahead() if ahead else self._read_times
        found: dict[int | str, dict[str, Tensor]] = {}
        position = 0
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                metrics = self._metrics(param, group, ahead, times)
                if metrics is not None:
                    found[group["param_names"][i] if "param_names" in group else position] = metrics
                position += 1
        return found

    def _metrics(
        self, param: Tensor, group: Mapping[str, Any], ahead: bool, times: Tensor | None
    ) -> dict[str, Tensor] | None:
        """None where there is nothing to tell. ``times``: what the gradient has yet to be multiplied by."""
        state = self.state.get(param)
        if state is None or "step" not in state or param.numel() == 0:
            return None
        state = self._needed_state(param, group)
        if not ahead and group["watch"] and param in self._watched:
            return diagnostics.told(self._algorithm, param, group, state, self._watched[param])
        if param.grad is None:
            return None
        return diagnostics.measure(self._algorithm, param, group, state, ahead, times)

    def _coefficient_ahead(self) -> Tensor | None:
        """What ``max_grad_norm`` would multiply the gradients by that are there now."""
        limit = self.max_grad_norm
        if limit is None:
            return None
        norms: dict[bool, list[Tensor]] = {False: [], True: []}
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None and not layout.is_sharded(p)]
            slices = [part for grad in grads for part in diagnostics.slices(layout.local(grad), group["batch_dims"])]
            norms[group["nonfinite"] == "skip"] += clipping.norms(slices)
        if not norms[False] and not norms[True]:
            return None
        return clipping.coefficient(clipping.total(norms[False], norms[True]), limit)

    @torch.no_grad()
    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adds `diagnostics` of a parameter as "<metric>/<name>", those of a stack with the slice's index appended
        ("<metric>/<name>.3", with two batch dimensions ".0.3"); Composer's OptimizerMonitor calls it after a step.

        Its `pre_reduce_metrics` and `dist_reduce_metrics` combine shards of FSDP, which are refused here.
        """
        found = self._find(param)
        if found is not None:
            metrics = self._metrics(param, self.param_groups[found[0]], False, self._read_times)
            optimizer_metrics.update(diagnostics.by_name(name, metrics or {}))
        return optimizer_metrics
