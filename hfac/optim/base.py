"""What both optimizers do alike: the walk over groups in a step, and what they tell of it."""

from collections.abc import Callable, Mapping
from itertools import repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .. import clipping, distributed, functional, ops, rounding, schedules
from ..distributed import layout
from ..rounding import Place
from .bound import Alone, Seen
from .observed import ObservedOptimizer
from .state import LOW, State, is_trained, needs_others


class FactoredOptimizer(ObservedOptimizer):
    """Base of `hfac.HFac` and `hfac.SMMF`; not for use by itself.

    State is made when parameters are added (of frozen ones, and those of lazy modules: when they are first trained), as
    plain tensors: factors or moments in float32 (float64 for float64 parameters), ``step`` as a 0-d float32 tensor on
    the host, and with nonfinite="skip" the count ``skipped``. What others keep there beside it is left alone. With
    ``capturable``, "skip" or ``amp_scaling`` the step lives beside the parameter, because only the device knows it
    then. State of a DTensor is DTensors, whose global shapes do not depend on how it is sharded; its steps are on the
    host, because what ranks add up says there who made one.
    """

    #: what the last step found in order
    _seen: "Seen | None"
    #: by group: which of its parameters had a gradient, and those, bound
    _bound: dict[int, tuple[list[bool], functional.Group]]
    #: parameters that `step_param` has stepped, each bound by itself
    _alone: "dict[Tensor, Alone]"
    #: the sharded parameters, bound; None where there are none, or they are to be looked at again
    _sharded: distributed.Sharded | None = None
    #: what CUDA graphs read and write that captured a step: replays need it, whatever later steps find or load
    _captured: list[Any]

    def _scalars(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The subclass's own arguments of its functional form."""
        raise NotImplementedError

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._captured = []
        self._forget()
        super().__init__(params, self._checked(defaults))
        _keep_uncompiled(type(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_captured", [])  # not there in a copy, and kept by an optimizer that loads
        super().__setstate__(state)
        _keep_uncompiled(type(self))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What `torch.amp.GradScaler` looks for: it then leaves unscaling, and the decision to step, to `step`."""
        return any(group["amp_scaling"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step on every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            TypeError, ValueError, RuntimeError: a gradient is sparse or complex, or options, states and parameters do
                not fit; nothing has been updated then.
        """
        self._check_graph_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seen = self._found()  # a name of its own: other threads may step, too, and look again
        limit = self.max_grad_norm
        grads = [seen.gradients(index) for index in range(len(self.param_groups))]
        work = [self._prepare(index, group, grads[index], seen) for index, group in enumerate(self.param_groups)]
        shared = {}
        if self._sharded is not None:
            shared = {i: self._shared(group) for i, group in enumerate(self.param_groups)}
        clip, statistics = None, [None] * len(work)
        if limit is None:
            self._grad_norm = None
        else:
            statistics = [None if step is None else step.statistics() for step in work]
            clip = self._clip(statistics, shared, limit)
        begin = None if self._sharded is None else self._sharded.prepare(shared, clip)
        for step, found in zip(work, statistics, strict=True):
            if step is not None:
                step.check_capture(found)
        self._read_times = None
        finish = None if begin is None else begin()
        try:
            for index, step in enumerate(work):
                if step is not None:
                    step.apply(clip, statistics[index])
                    self._note(step, self.param_groups[index], seen.whole[index], grads[index])
                    if step.unscales:
                        self._read_times = clip
        finally:
            if finish is not None:  # whatever happened, other ranks count on what is under way
                finish()
        return loss

    def _clip(
        self, statistics: "list[list[ops.Statistics] | None]", shared: dict[int, distributed.Options], limit: float
    ) -> Tensor | None:
        """What the gradients are to be multiplied by, of all groups' steps; None where there are none."""
        # A parameter whose gradient is not finite stays as it is where "skip" says so, and has no part in the norm.
        norms: dict[bool, list[Tensor]] = {False: [], True: []}
        skip = [group["nonfinite"] == "skip" for group in self.param_groups]
        for skips, mine in zip(skip, statistics, strict=True):
            norms[skips] += [found.norms for found in mine or ()]
        if self._sharded is not None:
            for group_index, norm in self._sharded.norms(shared):
                norms[skip[group_index]].append(norm)
        if not norms[False] and not norms[True]:
            return None
        self._grad_norm = clipping.total(norms[False], norms[True])
        return clipping.coefficient(self._grad_norm, limit)

    @torch.no_grad()
    def step_param(
        self, param: Tensor, group: dict[str, Any] | None = None, *, clip: Tensor | None = None, lr_scale: float = 1.0
    ) -> None:
        """One step of one parameter, the same numbers to the bit as `step` makes of it; nothing where it has no
        gradient. For hooks that step in the backward pass (`hfac.release_gradients` makes them). The gradient stays.

        Hooks around a step (``register_step_pre_hook``, ``register_step_post_hook``) are not run, nor does a learning
        rate scheduler take notice: that is for the `step` that ends the backward pass, which then finds no gradients.

        Args:
            param: a parameter of this optimizer.
            group: its entry of ``param_groups``, where the caller knows it; None: it is looked up.
            clip: a 0-d tensor that the gradient is multiplied by. Required with ``max_grad_norm``, which says nothing
                here: the norm of all gradients is known to nobody yet.
            lr_scale: the step's learning rate is that of the group times this number.

        Raises:
            ValueError: the parameter is not the optimizer's, or in another group.
            RuntimeError: the parameter is sharded: ranks would have to meet once for every parameter; ``max_grad_norm``
                without ``clip``.
            TypeError, ValueError, RuntimeError: as `step`; nothing has been updated then.
        """
        self._check_graph_capture()
        alone = self._alone.get(param) if isinstance(param, Tensor) else None
        if alone is None or not alone.holds(self):
            alone = self._alone_of(param)
        if group is not None and group is not alone.group:
            raise ValueError(
                f"{type(self).__name__}.step_param: {alone.where} was given with another group. Pass its own entry of "
                "param_groups, or None to have it looked up."
            )
        if clip is None and self._limit_of(alone.group) is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step_param: max_grad_norm clips by the norm of all gradients, and a step of "
                "one parameter knows one. Use hfac.release_gradients, which clips by the norm of the backward pass "
                "before, pass clip=, or leave max_grad_norm=None."
            )
        grad = layout.gradient(param, alone.where)
        if grad is None:
            return
        options = self._options(alone.group)
        if lr_scale != 1.0:
            options["lr"] = schedules.as_scalar("lr", options["lr"]) * lr_scale
        options.update(grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None))
        try:
            step = None if alone.bound is None else alone.bound.prepare([grad], **options)
            if step is None:
                alone.bind(self, grad)
                assert alone.bound is not None
                step = alone.bound.prepare([grad], **options)
        except RuntimeError:
            ops.check_tensor(f"the gradient of {alone.where}", param.grad)  # the same complaint, with the place
            raise
        assert step is not None  # it takes two to come apart
        step.apply(clip)
        self._note(step, alone.group, [param], [grad])

    def _alone_of(self, param: Tensor) -> "Alone":
        """Where the parameter is among the groups, for `step_param`."""
        name = f"{type(self).__name__}.step_param"
        if not isinstance(param, Tensor):
            raise TypeError(f"{name} takes a parameter of this optimizer, got {type(param).__name__}")
        found = self._find(param)
        if found is None:
            raise ValueError(
                f"{name}: the parameter of shape {tuple(param.shape)} is in none of the optimizer's groups. Pass one of"
                " param_groups' parameters itself, not a copy or a view, or add it with add_param_group."
            )
        group_index, i = found
        where = f"parameter {i} of group {group_index}"
        if layout.is_sharded(param):
            raise RuntimeError(
                f"{name}: {where} (shape {tuple(param.shape)}) is sharded, and a step of it a collective: one for every"
                " parameter by itself. Call step(), which makes one for all."
            )
        alone = self._alone[param] = Alone(self.param_groups[group_index], group_index, i, param, where)
        return alone

    def _prepare(
        self, group_index: int, group: dict[str, Any], grads: list[Any], seen: Seen
    ) -> "functional.Step | None":
        """Checks a step of one group, on the parameters that have a gradient, and returns it, yet to be made."""
        params = seen.whole[group_index]
        present = list(map(is_not, grads, repeat(None)))
        if not all(present):
            params = [param for param, here in zip(params, present, strict=True) if here]
            grads = [grad for grad in grads if grad is not None]
        if not grads:
            return None
        options = self._options(group)
        # Set for the time of one call by a GradScaler that leaves unscaling to the step.
        options.update(grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None))
        try:
            bound = self._bound.get(group_index)
            if bound is not None and bound[0] == present:
                step = bound[1].prepare(grads, **options)
                if step is not None:
                    return step
            for i, param in enumerate(group["params"]):
                if param.grad is not None:  # what moved may have left its state behind, and what was frozen has none
                    self._check_stepped(f"{type(self).__name__}: parameter {i} of group {group_index}", param, group)
                    self._sync_param(param, group)
            states = [self._local_state(param, group) for param in params]
            places = [self._place(param, group, seen.positions[param]) for param in params]
            step = None
            while step is None:  # unless another thread has counted a step in between
                functional_group = self._bind(group, list(map(layout.local, params)), grads, states, places)
                self._bound[group_index] = present, functional_group
                step = functional_group.prepare(grads, **options)
            return step
        except RuntimeError:
            for index, param in enumerate(group["params"]):
                if param.grad is not None:  # the same complaint, with the place that the user knows
                    ops.check_tensor(f"the gradient of parameter {index} of group {group_index}", param.grad)
            raise

    def _local_state(self, param: Tensor, group: Mapping[str, Any]) -> State:
        """This rank's part of a parameter's state."""
        return {key: layout.local(value) for key, value in self._needed_state(param, group).items()}

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        """What a step is told anew every time."""
        return {**{name: group[name] for name in ("lr", "weight_decay", "maximize", "seed")}, **self._scalars(group)}

    def _place(self, param: Tensor, group: Mapping[str, Any], position: int) -> Place | None:
        """Where a parameter's random bits come from, if it is rounded stochastically; ``position`` is its place among
        all of the optimizer's."""
        exact = self._low_dtype(param, group) == torch.int16
        if group["rounding"] == "nearest" or param.dtype not in rounding.DTYPES or exact:
            return None
        return layout.place(param, position)

    def _bind(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        places: list[Place | None] | None = None,
    ) -> functional.Group:
        return functional.Group(
            self._algorithm,
            params,
            grads,
            {f"{key}s": [state.get(key) for state in states] for key in (*self._state_keys, LOW)},
            [state["step"] for state in states],
            [state["skipped"] for state in states] if group["nonfinite"] == "skip" else None,
            group.get("beta", 0.0) is not None,
            group["capturable"] or group["amp_scaling"],
            group["backend"],
            places,
            group["batch_dims"],
            group["watch"],
            self._captured,
        )

    def _shared(self, group: dict[str, Any]) -> distributed.Options:
        """What a step is told anew of sharded parameters."""
        options = self._options(group)
        options.update({name: schedules.as_scalar(name, options[name]) for name in ("lr", "weight_decay")})
        return distributed.Options(options, group["nonfinite"] == "skip", group["backend"])

    def _bind_sharded(self, seen: Seen) -> distributed.Sharded | None:
        """Sharded parameters of all groups; nobody else's gradients decide which, so that all ranks agree on them."""
        positions = seen.positions
        entries = [
            distributed.Entry(
                f"parameter {i} of group {index}",
                index,
                param,
                self._needed_state(param, group),
                self._place(param, group, positions[param]),
            )
            for index, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
            if needs_others(param, group) and "step" in self.state.get(param, ())
        ]
        if entries and self._step_supports_amp_scaling:
            raise ValueError(
                f"{type(self).__name__}: a group has amp_scaling=True, for which a GradScaler leaves the gradients of "
                f"all groups scaled, and {entries[0].label} is sharded, whose gradients a step does not unscale. Leave "
                "amp_scaling=False in all groups, or put sharded parameters into an optimizer of their own."
            )
        return distributed.Sharded(self._algorithm, entries) if entries else None

    def _forget(self) -> None:
        """What earlier steps found in order is to be looked at again."""
        self._sharded = None
        self._seen = None
        self._bound = {}
        self._alone = {}
        self._index = {}

    def _check_graph_capture(self) -> None:
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            return
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: a CUDA graph captures the step's scalars, so step and learning rate would "
                "stand still in every replay. Construct the optimizer with capturable=True (and lr as a tensor, to "
                "change it)."
            )

    def workspace_bytes(self) -> int:
        """Bytes on the device that fused kernels keep from step to step beside the state; 0 before the first step."""
        groups = [group for _, group in self._bound.values()]
        groups += [alone.bound for alone in self._alone.values() if alone.bound is not None]
        return sum(group.workspace_bytes() for group in groups)

    def collectives(self) -> list[tuple[int, int]]:
        """What a step adds up over ranks for sharded parameters: (ranks, bytes) of every all-reduce, in order."""
        self._found()
        if self._sharded is None:
            return []
        skip = {i: group["nonfinite"] == "skip" for i, group in enumerate(self.param_groups)}
        return self._sharded.collectives(skip, self.max_grad_norm is not None)

    def _check_stepped(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        """What a step requires of a parameter, which may have been unfrozen, sharded or swapped since construction."""
        if is_lazy(param) or not is_trained(param):
            return
        if param.grad is not None and param.is_inference():
            raise RuntimeError(
                f"{where} (shape {tuple(param.shape)}) is an inference tensor, which autograd cannot follow: it was "
                "made inside torch.inference_mode(). Make the model outside, or clone the parameter there."
            )
        if "step" in self.state.get(param, ()):
            self._check_layout(where, param, group)
        else:
            self._check_param(where, param, group)

    def _found(self) -> Seen:
        """What earlier steps found in order, if it still is; else all is looked at again."""
        seen, sharded = self._seen, self._sharded
        if seen is not None and seen.holds(self) and (sharded is None or sharded.holds()):
            return seen
        return self._look_again()

    def _look_again(self) -> Seen:
        self._forget()
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):  # trainers swap parameters for sharded ones
                self._check_stepped(f"{type(self).__name__}: parameter {i} of group {index}", param, group)
        self._sync_state()
        self._seen = seen = Seen(self)
        self._watched = {param: told for param, told in self._watched.items() if param in seen.positions}
        self._sharded = self._bind_sharded(seen)
        return seen


def _keep_uncompiled(cls: type[Optimizer]) -> None:
    """Makes `torch.compile` of a training step break its graph at the optimizer's, hooks and all: the kernels are
    compiled, and what is looked at around them (addresses, steps, learning rates) would be compiled anew whenever it
    changed. Done when there is an optimizer, because asking torch for it imports its compiler, as constructing any
    optimizer does."""
    for name in ("step", "step_param"):
        method = getattr(cls, name)
        if not getattr(method, "uncompiled", False):
            method = torch.compiler.disable(method)
            method.uncompiled = True  # type: ignore[attr-defined]
            setattr(cls, name, method)
