"""Binds parameters and their states to what makes their steps, and notices when they must be bound anew."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import distributed, functional, rounding, schedules, spec
from ..distributed import layout
from ..rounding import BitOffset
from .cache import SingleParamCache, StepCache
from .norms import NormOptimizer
from .slices import needs_reduction, piece_counts
from .state import has_state, is_trained

#: a group's options, one object until one of them changes; those that are passed at every step; its ``max_grad_norm``;
#: and the numbers that parameters share which are stepped one by one
Given = tuple[tuple[Any, ...], dict[str, Any], float | None, functional.Numbers]


class BindingOptimizer(NormOptimizer):
    """The base of both optimizers without their steps: parameters and states, validated and bound."""

    #: by group: which of its parameters had a gradient, None where all had, and those parameters, bound
    _bound: dict[int, tuple[list[bool] | None, functional.Group]]
    #: by group, what `FactoredOptimizer._given_of` has found
    _given: dict[int, Given]
    #: parameters that `step_param` has stepped, by their identity
    _single: dict[int, SingleParamCache]
    #: how gradients are placed on the ranks
    _gradients: distributed.Gradients
    #: sharded parameters of captured steps
    _in_graphs: list[distributed.Sharded]

    def _forget(self) -> None:
        self._sharded = None
        self._total = None
        self._cache = None
        self._bound = {}
        self._single = {}
        self._given = {}
        self._index = {}

    def _validated(self) -> StepCache:
        """The cache of earlier steps if it is valid, else a new one, once all parameters are checked."""
        cache, sharded = self._cache, self._sharded
        if (
            cache is not None
            and cache.is_valid(self.param_groups, self.state)
            and (sharded is None or sharded.is_valid())
        ):
            return cache
        return self._validate()

    def _validate(self) -> StepCache:
        self._forget()
        for group in self.param_groups:
            for param in group["params"]:
                self._check_stepped(param, group)
        self._sync_state()
        cache = StepCache(self.param_groups, self.state, self._spec)
        self._watched = {param: sums for param, sums in self._watched.items() if param in cache.positions}
        self._sharded = self._bind_sharded(cache)
        self._total = self._bind_total(cache)
        self._cache = cache  # last: nothing is taken for bound where binding has failed
        return cache

    def _check_stepped(self, param: Tensor, group: Mapping[str, Any], method: str = "") -> None:
        """Checks a parameter before a step: it may have been unfrozen, sharded or replaced since construction."""
        if is_lazy(param) or not is_trained(param):
            return
        where = f"{type(self).__name__}{method}: {self._label(param)}"
        if param.grad is not None and param.is_inference():
            raise RuntimeError(
                f"{where} (shape {tuple(param.shape)}) is an inference tensor, which autograd cannot follow: it was "
                "made inside torch.inference_mode(). Make the model outside, or clone the parameter there."
            )
        if has_state(self.state, param):
            self._check_layout(where, param, group)
        else:
            self._check_param(where, param, group)

    def _scalars(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The algorithm's own arguments of its functional form."""
        return {name: group[name] for name in self._spec.options}

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of a group that are passed at every step."""
        return {**{name: group[name] for name in ("lr", "weight_decay", "maximize", "seed")}, **self._scalars(group)}

    def _shared(self, group: dict[str, Any]) -> distributed.Options:
        """`_options` for sharded parameters."""
        options = self._options(group)
        options.update({name: schedules.as_scalar(name, options[name]) for name in ("lr", "weight_decay")})
        return distributed.Options(options, group["nonfinite"] == "skip", group["backend"], watch=group["watch"])

    def _bit_offset(self, param: Tensor, group: Mapping[str, Any], position: int) -> BitOffset | None:
        """Where a parameter's random bits come from, if it is rounded stochastically; ``position`` is that among all of
        the optimizer's."""
        exact = self._low_dtype(param, group) == torch.int16
        if group["rounding"] == "nearest" or param.dtype not in rounding.DTYPES or exact:
            return None
        return layout.bit_offset(param, position)

    def _bind(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Any], positions: Sequence[int], method: str = ""
    ) -> functional.Group:
        """Binds parameters of a group, which may have moved away from their states, or have been frozen until now, at
        these positions among all of the optimizer's. ``method`` is named in errors."""
        for param in params:
            self._check_stepped(param, group, method)
            self._sync_param(param, group)
        states = [self._needed_state(param, group) for param in params]

        def entries(key: str | None) -> list[Any]:
            return [layout.local(state[key]) if key in state else None for state in states]

        return functional.Group(
            self._algorithm,
            list(map(layout.local, params)),
            grads,
            {operand.name: entries(operand.key) for operand in (*self._spec.states, spec.MASTER_LOW)},
            entries("step"),
            entries("skipped") if group["nonfinite"] != "propagate" else None,
            self._spec.has_first(group),
            group["capturable"] or group["amp_scaling"],
            group["backend"],
            [self._bit_offset(param, group, position) for param, position in zip(params, positions, strict=True)],
            group["batch_dims"],
            group["watch"],
            self._captured,
            group["nonfinite"] == "skip-step",
            piece_counts(params, group),
            group["views_dim"],
        )

    def _entry(self, param: Tensor, index: int, position: int) -> distributed.Entry:
        """A sharded parameter of the group of this index; ``position`` is that among all of the optimizer's."""
        group = self.param_groups[index]
        state, offset = self._needed_state(param, group), self._bit_offset(param, group, position)
        return distributed.Entry(self._label(param), index, param, state, offset, group["capturable"])

    def _bind_sharded(self, cache: StepCache) -> distributed.Sharded | None:
        """Binds the sharded parameters of all groups, whether or not they have gradients, so that all ranks agree."""
        released = () if self._units is None else self._units.of
        entries = [
            self._entry(param, index, cache.positions[param])
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
            if needs_reduction(param, group) and has_state(self.state, param) and param not in released
        ]
        may_move = not self._captured  # else a graph reads counts where they are
        return distributed.Sharded(self._algorithm, entries, self._gradients, may_move) if entries else None

    def _keep_captured(self, sharded: distributed.Sharded) -> None:
        """Keeps what a graph reads and writes of sharded parameters in every replay."""
        if not any(known is sharded for known in self._in_graphs):
            self._in_graphs.append(sharded)
        given = [*(value for group in self.param_groups for value in group.values()), self._given_norm]
        given += [getattr(self, name, None) for name in ("grad_scale", "found_inf")]
        self._captured += [self._total, *(value for value in given if isinstance(value, Tensor | tuple))]

    def _settle(self) -> None:
        for each in (*self._in_graphs, self._sharded, self._units):
            if each is not None:
                each.settle()

    def workspace_bytes(self) -> int:
        """Bytes on the device that fused kernels keep between steps, beside the state; 0 before the first step."""
        groups = [group for _, group in self._bound.values()]
        groups += [single.bound for single in self._single.values() if single.bound is not None]
        of_shards = 0 if self._sharded is None else self._sharded.workspace_bytes()
        return of_shards + sum(group.workspace_bytes() for group in groups)

    def collectives(self) -> list[tuple[int, int]]:
        """The all-reduces and broadcasts of a step, in order: (ranks, bytes) of each; with `hfac.release_gradients`
        those of the backward pass, too."""
        return [(sent.stage.group.size(), sent.bytes) for sent in self._collectives()]

    def _collectives(self) -> list[distributed.Sent]:
        self._validated()
        clips = self.max_grad_norm is not None or self._skips_steps(self.param_groups)
        skip = {i: group["nonfinite"] == "skip" for i, group in enumerate(self.param_groups)}
        watched = [i for i, group in enumerate(self.param_groups) if group["watch"]]
        norm, step = ([], []) if self._sharded is None else self._sharded.collectives(skip, clips, watched)
        norm = norm if self._units is None else self._units.collectives(clips) + norm
        dtensors = [] if self._cache is None else self._cache.dtensors
        if self._step_supports_amp_scaling and any(map(layout.is_sharded, dtensors)):
            stages = distributed.norm.everywhere(dtensors)
            norm = [distributed.Sent(stage, torch.float32.itemsize, torch.float32) for stage in stages] + norm
        return norm + (self._total.collectives() if clips and self._total is not None else []) + step
