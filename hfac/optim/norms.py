"""The norm of all gradients of an optimizer, sharded ones included, and whether ranks make a step at all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import clipping, distributed, functional
from ..distributed import layout
from .cache import StepCache
from .report import ReportingOptimizer
from .units import Units

#: a validated step: what is bound, gradients and steps by group, and of sharded parameters options by group
Ready = tuple[StepCache, list[list[Any]], list[functional.Step | None], dict[int, distributed.Options]]


class NormOptimizer(ReportingOptimizer):
    """The base of both optimizers without their steps: the norm by which a step clips, and what forbids it."""

    _cache: StepCache | None
    #: what captured CUDA graphs read and write: replays need it, whatever later steps bind or load
    _captured: list[Any]
    #: the sharded parameters, bound; None where there are none, or they must be bound again
    _sharded: distributed.Sharded | None = None
    #: the sharded parameters that the backward pass steps
    _units: Units | None = None
    #: the norm of all gradients; None where each rank has it by itself
    _total: distributed.Total | None = None
    _norm_group: Any = None
    #: what `hfac.clip_grad_norm_` has found for the next step: the norm of all gradients, and its limit
    _given_norm: tuple[Tensor, float] | None = None

    def _validated(self) -> StepCache:
        """The cache of earlier steps if it is valid, else a new one, once all parameters are checked."""
        raise NotImplementedError

    @property
    def norm_group(self) -> Any:
        """For ``max_grad_norm``, where ranks have different parameters: experts under ``ignored_params``, stages of a
        pipeline. A dict from these parameters to the process group over which the squares of their gradients are added
        up; to several, over one after the other; of a DTensor, after those of its mesh. Process groups alone stand for
        all plain tensors. A DeviceMesh stands for its process groups. None (the default): all ranks have the same ones.
        Set it on all ranks, before the first step; state dicts do not have it.

        Raises (when set):
            TypeError: it is none of these.
            ValueError: a key is no parameter of this optimizer.
        """
        return self._norm_group

    @norm_group.setter
    def norm_group(self, group: Any) -> None:
        for each in group.values() if isinstance(group, dict) else [group]:
            distributed.process_groups(f"{type(self).__name__}: norm_group", each)
        for key in group if isinstance(group, dict) else ():
            if not isinstance(key, Tensor) or self._find(key) is None:
                given = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
                raise ValueError(
                    f"{type(self).__name__}: the keys of norm_group must be parameters of this optimizer, and {given} "
                    "is in none of its groups. Pass the parameters themselves, once they have been added."
                )
        self._norm_group = group
        self._forget()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What `torch.amp.GradScaler` looks for: it then leaves unscaling, and the decision to step, to `step`."""
        return any(group["amp_scaling"] for group in self.param_groups)

    def _is_capturing(self) -> bool:
        """Whether a step of sharded parameters is being captured in a CUDA graph."""
        return self._sharded is not None and self._sharded.capturing

    def _is_forbidden(self) -> bool:
        """Whether the host leaves out a step because a GradScaler has found, on any rank, a gradient that is not
        finite. Of sharded parameters a rank may have the part that is, and torch tells the ranks of the first
        gradient's mesh alone; all must make the step, or none. Where the device counts their steps it decides, and this
        is False; else the host waits for the sum, as it does in a GradScaler's step of other optimizers."""
        self._settle()
        cache = self._validated()
        if not any(map(layout.is_sharded, cache.dtensors)):
            return False
        given = getattr(self, "found_inf")  # noqa: B009 (a GradScaler has set it)
        if self._is_capturing():
            self._captured.append(given)
        self.found_inf = found = given.clone()
        for stage in distributed.norm.everywhere(cache.dtensors):
            stage.run(found)
        if self._device_decides():
            return False
        forbidden = bool(found.item())
        if forbidden:
            self._given_norm = None
            self._grad_norm = None if self.max_grad_norm is None else torch.full_like(found, torch.nan)
        return forbidden

    def _device_decides(self) -> bool:
        """Whether it is the device that leaves out a forbidden step of all parameters."""
        return self._units is None and (self._sharded is None or self._sharded.decides_on_device)

    def _unless_forbidden(self, norm: Tensor) -> Tensor:
        """NaN where a GradScaler forbids a step, and the device is to decide."""
        found = getattr(self, "found_inf", None)
        if found is None or self._cache is None or not self._cache.dtensors or not self._device_decides():
            return norm
        return norm.masked_fill(found.reshape(()).to(norm.device) != 0, torch.nan)

    def _decided(
        self,
        sharded: distributed.Sharded,
        shared: dict[int, distributed.Options],
        clip: Tensor | None,
        refused: Tensor | None,
    ) -> dict[int, distributed.Options]:
        """The options of a step of gradients multiplied by ``clip``, which the device leaves out where ``refused`` or a
        GradScaler's found_inf is not zero, if it is the device that counts steps."""
        verdicts = [getattr(self, "found_inf", None), refused]
        found, refused = (
            None if each is None else each.reshape(()).to(sharded.device, torch.float32) for each in verdicts
        )
        given = [each for each in (found, refused) if each is not None]
        if not given or not sharded.decides_on_device:
            return {i: replace(options, clip=clip) for i, options in shared.items()}
        forbidden = given[0] if len(given) == 1 else torch.maximum(*given)
        if refused is not None and found is not None:
            refused = forbidden - found  # what the scaler forbids is not counted
        if clip is not None:  # gradients that are multiplied in place stay as they are, too
            clip = clip.masked_fill(forbidden.to(clip.device) != 0, 1.0)
        return {i: replace(options, clip=clip, forbidden=forbidden, refused=refused) for i, options in shared.items()}

    def _norm_of(self, ready: Ready) -> Tensor | None:
        """The norm of all gradients, the same on every rank; None where there are none."""
        if self._total is not None:
            return self._total.of(self._norms(ready))
        *_, steps, shared = ready
        skips = [group["nonfinite"] == "skip" for group in self.param_groups]
        local = [[] if step is None else step.norms() for step in steps]
        own = [(norm, skip) for skip, each in zip(skips, local, strict=True) for norm in each]
        return clipping.total([*own, *((each.norms, each.skip) for each in self._shared_norms(shared))])

    def _norms(self, ready: Ready) -> list[distributed.Found]:
        """The norms of all gradients, and whose they are."""
        cache, grads, steps, shared = ready
        found = []
        for index, (group, step) in enumerate(zip(self.param_groups, steps, strict=True)):
            if step is not None:
                params = [p for p, g in zip(cache.local[index], grads[index], strict=True) if g is not None]
                for values, mine in zip(step.norms(), step.owners(), strict=True):
                    found.append(distributed.Found(values, [params[i] for i in mine], group["nonfinite"] == "skip"))
        return found + self._shared_norms(shared)

    def _shared_norms(self, shared: dict[int, distributed.Options]) -> list[distributed.Found]:
        """Those of sharded parameters, of gradients that a GradScaler has scaled once they are unscaled."""
        found = [] if self._sharded is None else self._sharded.norms(shared)
        scale = getattr(self, "grad_scale", None)
        return found if scale is None else [replace(each, norms=each.norms / scale) for each in found]

    def _bind_total(self, cache: StepCache) -> distributed.Total | None:
        everything = [p for group in self.param_groups for p in group["params"]]
        if self.norm_group is None and not any(map(layout.is_dtensor, everything)):
            return None
        total = distributed.Total(everything, [p for mine in cache.local for p in mine], self._declared())
        return None if total.is_local else total

    def _declared(self) -> list[tuple[Sequence[Any], list[Tensor]]]:
        """Process groups on whose ranks parameters are different ones, and these parameters."""
        given = self.norm_group
        if given is None or not isinstance(given, dict):
            plain = [p for group in self.param_groups for p in group["params"] if not layout.is_dtensor(p)]
            return [(groups, plain)] if (groups := distributed.process_groups("norm_group", given)) else []
        return [(distributed.process_groups("norm_group", groups), [param]) for param, groups in given.items()]
