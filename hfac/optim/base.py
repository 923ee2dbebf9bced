"""The step of both optimizers: statistics of gradients, sums over ranks, the norm of all gradients, the update."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from .. import clipping, distributed, functional, ops, rounding, schedules
from ..distributed import layout
from . import options
from .binding import BindingOptimizer, Given
from .cache import SingleParamCache, StepCache
from .norms import Ready
from .param_groups import KnownOptions
from .slices import needs_reduction
from .wrapping import keep_uncompiled, without_grad

Loss = TypeVar("Loss")


class FactoredOptimizer(BindingOptimizer):
    """Base of `hfac.HFac` and `hfac.SMMF`; not for use by itself.

    State is created when parameters are added; of frozen parameters, and those of lazy modules, when they are first
    trained. It is plain tensors: factors or moments in float32 (float64 for float64 parameters), ``step`` as a 0-d
    float32 tensor on the host, and with nonfinite="skip" or "skip-step" the count ``skipped``. Entries that wrappers
    add are left alone. With ``capturable``, ``nonfinite`` or ``amp_scaling`` only the device knows whether a step is
    made, so ``step`` is on the parameter's device. State of a DTensor is DTensors, whose global shapes do not depend on
    how it is sharded; with nonfinite="skip" their ``step`` stays on the host, which the sums over ranks tell what is
    stepped.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._captured, self._in_graphs = [], []
        self._gradients = distributed.Gradients()
        self._known = KnownOptions(self._all_rules())
        self._forget()
        super().__init__(params, self._checked(defaults))
        keep_uncompiled(type(self))
        for advice in self._advice():
            options.advise(f"{type(self).__name__}: {advice}")

    def _advice(self) -> Iterator[str]:
        """What is allowed and yet hardly meant."""
        for name, usual, dtypes in (("rounding", "nearest", rounding.DTYPES), ("master", None, (torch.bfloat16,))):
            groups = [group for group in self.param_groups if group[name] != usual]
            params = [param for group in groups for param in group["params"]]
            if params and not any(param.dtype in dtypes for param in params):
                given = ", ".join(sorted({repr(group[name]) for group in groups}))
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                yield (
                    f"{name}={given} does nothing here: it is for {kinds} parameters, and none is. Leave it out, or "
                    "convert the model first."
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has none; an optimizer that loads state keeps its own.
        for name in ("_captured", "_in_graphs"):
            self.__dict__.setdefault(name, [])
        self.__dict__.setdefault("_gradients", distributed.Gradients())
        super().__setstate__(state)
        keep_uncompiled(type(self))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @without_grad
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step on every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            TypeError, ValueError, RuntimeError: a gradient is sparse or complex, or options, states and parameters do
                not fit together; nothing has been updated.
        """
        self._check_graph_capture()
        for index in range(len(self.param_groups)):
            self._check_changes(index)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "found_inf", None) is not None and self._is_forbidden():
            return loss
        repeated = self._repeated()
        if repeated is not None:
            again, by = repeated
            for each in again:
                each.apply(by)
            return loss
        ready = self._ready()
        cache, grads, steps, shared = ready
        sharded, given = self._sharded, self._given_norm
        limit, skips = self.max_grad_norm, self._skips_steps(self.param_groups)
        scale = getattr(self, "grad_scale", None)
        norm: Tensor | None
        norm_coefficient = refused = None
        if given is not None:
            norm, limit = given
        else:
            self._grad_norm = None if limit is None and not skips else self._grad_norm
            # with units all gradients are gone, clipped by the norm before
            finds = (limit is not None or skips) and self._units is None
            norm = self._norm_of(ready) if finds else None
        if norm is not None:
            norm = self._unless_forbidden(norm)
            self._grad_norm, norm_coefficient = norm, clipping.coefficient(norm, limit)
            refused = clipping.refused(norm) if skips else None
        clip = norm_coefficient if scale is None else (1.0 if norm_coefficient is None else norm_coefficient) / scale
        if sharded is not None:
            shared = self._decided(sharded, shared, clip, refused)
        for step in steps:
            if step is not None and refused is not None:
                step.refuse(refused)
        begin = None
        if sharded is not None and (refused is None or sharded.decides_on_device or not sharded.skip(refused)):
            begin = sharded.prepare(shared)
            if self._is_capturing():
                self._keep_captured(sharded)
        for step in steps:
            if step is not None:
                step.check_capture(norm_coefficient)
        self._norm_coefficient = self._given_norm = None
        complete = None if begin is None else begin()
        try:
            for index, step in enumerate(steps):
                if step is not None:
                    step.apply(norm_coefficient)
                    if self.param_groups[index]["watch"]:
                        self._keep_sums(step, self.param_groups[index], cache.local[index], grads[index])
                    if norm_coefficient is not None and step.unscales:
                        self._norm_coefficient = norm_coefficient
        finally:
            if complete is not None:  # other ranks rely on the collectives under way, even if this one has failed
                complete()
        if sharded is not None:
            self._watched |= sharded.watched
        return loss

    def _repeated(self) -> tuple[list[functional.Repeated], clipping.Clip | None] | None:
        """The groups' steps and what they are clipped by, where each is like its last one, of all its parameters,
        without scaling or sums over ranks, and clipped by no other norm than that of these gradients; None where `step`
        must look at more."""
        cache, mine = self._cache, self.__dict__
        if cache is None or cache.dtensors or self._sharded is not None or self._units is not None or self._in_graphs:
            return None
        if self._given_norm is not None or "grad_scale" in mine or "found_inf" in mine:  # set by a GradScaler
            return None
        steps: list[functional.Repeated] = []
        limits: list[float | None] = []
        for index in range(len(self.param_groups)):
            present, bound = self._bound.get(index, (None, None))
            _, options, limit, numbers = self._given_of(index)
            if bound is None or present is not None or not bound.repeats:
                return None
            if not steps and not cache.is_valid(self.param_groups, self.state):
                return None
            step = bound.repeated(cache.gradients(index, self._gradients), options, numbers)
            if step is None:
                return None
            steps.append(step)
            limits.append(limit)
        if not steps or limits.count(limits[0]) != len(limits):
            return None
        norm = coefficient = None
        if limits[0] is not None:
            if self._total is not None:
                return None
            norms = []
            for group, step in zip(self.param_groups, steps, strict=True):
                statistics = step.take_statistics()
                if statistics is None:
                    return None
                norms += [(each, group["nonfinite"] == "skip") for each in functional.norms_of(statistics)]
            norm = clipping.total(norms)
            assert norm is not None
            coefficient = clipping.coefficient(norm, limits[0])
        self._grad_norm, self._norm_coefficient = norm, coefficient
        return steps, None if coefficient is None else clipping.Clip(coefficient)

    def _ready(self) -> Ready:
        """Validates a step of all that has a gradient."""
        self._settle()
        cache = self._validated()  # kept in a local: another thread's step may replace it
        if cache.dtensors:
            self._gradients.agree(cache.dtensors, self._label)
        grads = [cache.gradients(index, self._gradients) for index in range(len(self.param_groups))]
        steps = [self._prepare(index, group, grads[index], cache) for index, group in enumerate(self.param_groups)]
        groups = enumerate(self.param_groups) if self._sharded is not None else ()
        return cache, grads, steps, {i: self._shared(group) for i, group in groups}

    def step_param(
        self, param: Tensor, group: dict[str, Any] | None = None, *, clip: Tensor | None = None, lr_scale: float = 1.0
    ) -> None:
        """Steps one parameter, with the same bits as `step`; does nothing where it has no gradient. For hooks that step
        during the backward pass, as `hfac.release_gradients` makes them. The gradient stays.

        Hooks around steps (``register_step_pre_hook``, ``register_step_post_hook``) do not run, and learning rate
        schedulers do not count it: both belong to the `step` that ends the backward pass and then finds no gradients.

        Args:
            param: a parameter of this optimizer.
            group: its entry of ``param_groups``; None looks it up.
            clip: a 0-d tensor that the gradient is multiplied by. Required with ``max_grad_norm``, which has no effect
                here: the norm of all gradients is not known yet.
            lr_scale: multiplies the group's learning rate in this step.

        Raises:
            ValueError: the parameter is not this optimizer's, or not of this group.
            RuntimeError: the parameter's step needs sums over ranks, which would be a collective for every parameter;
                or ``max_grad_norm`` without ``clip``.
            TypeError, ValueError, RuntimeError: as `step`; nothing has been updated.
        """
        if torch.cuda.is_initialized():  # else there is no graph: a call that every parameter would pay
            self._check_graph_capture()
        single = self._single.get(id(param))
        if single is None or single.param is not param or not single.is_in(self.param_groups):
            single = self._single_of(param)
        index = single.group_index
        checked = self._known.unchanged(index, single.group)
        if checked is None:
            self._check_changes(index)
            checked = self._known.values(index)
        given = self._given.get(index)
        _, options, limit, numbers = self._given_of(index) if given is None or given[0] is not checked else given
        if single.bound is not None and not single.holds(self.param_groups, self.state, checked):
            single.bound = None
        if group is not None and group is not single.group:
            raise ValueError(
                f"{type(self).__name__}.step_param: {single.label} was given with another group. Pass its own entry of "
                "param_groups, or None to have it looked up."
            )
        if clip is None and limit is not None:  # checking all groups would cost too much
            raise RuntimeError(
                f"{type(self).__name__}.step_param: max_grad_norm clips by the norm of all gradients, and a step of "
                "one parameter knows one. Use hfac.release_gradients, which clips by the norm of the backward pass "
                "before, pass clip=, or leave max_grad_norm=None."
            )
        if single.group["nonfinite"] == "skip-step":
            raise RuntimeError(
                f"{type(self).__name__}.step_param: nonfinite='skip-step' looks at all gradients before the first "
                "parameter is stepped, and a step of one parameter knows one. Use nonfinite='skip', which leaves out "
                "single parameters, or call step()."
            )
        grad = param.grad if param.__class__ is torch.nn.Parameter else layout.gradient(param, single.label)
        if grad is None:
            return
        if lr_scale != 1.0:
            options = {**options, "lr": schedules.as_scalar("lr", options["lr"]) * lr_scale}

        factor = None if clip is None else clipping.as_clip(clip)
        scaled = "grad_scale" in self.__dict__ or "found_inf" in self.__dict__
        step = None if scaled or single.bound is None else single.bound.repeated([grad], options, numbers)
        if step is None:
            self._step_single(single, grad, options, factor)
        else:
            step.apply(factor)

    @without_grad
    def _step_single(
        self, single: SingleParamCache, grad: Tensor, options: Mapping[str, Any], clip: clipping.Clip | None
    ) -> None:
        """`step_param` of what does not repeat its last step."""
        params = [single.param]

        def bind() -> functional.Group:
            single.bound = None
            bound = self._bind(single.group, params, [grad], [single.position(self.param_groups)], ".step_param")
            single.keep(bound, self.param_groups, self.state)
            return bound

        step = self._prepared(single.bound, bind, params, [grad], options)
        step.check_capture(clip)
        step.apply(clip)
        if single.group["watch"]:
            self._keep_sums(step, single.group, params, [grad])

    def _single_of(self, param: Tensor) -> SingleParamCache:
        """Looks up a parameter for `step_param`."""
        name = f"{type(self).__name__}.step_param"
        if not isinstance(param, Tensor):
            raise TypeError(f"{name} takes a parameter of this optimizer, got {type(param).__name__}")
        found = self._find(param)
        if found is None:
            raise ValueError(
                f"{name}: the parameter of shape {tuple(param.shape)} is in none of the optimizer's groups. Pass one of"
                " param_groups' parameters itself, not a copy or a view, or add it with add_param_group."
            )
        single = SingleParamCache(self.param_groups, *found, self._spec)
        if needs_reduction(param, single.group):
            raise RuntimeError(
                f"{name}: {single.label} (shape {tuple(param.shape)}) is sharded, and stepping it alone would take a "
                "collective of its own. Call step(), which takes one for all parameters, or use "
                "hfac.release_gradients, which takes one for every module that FSDP2 shards."
            )
        self._single[id(param)] = single
        return single

    def _prepare(
        self, group_index: int, group: dict[str, Any], grads: list[Any], cache: StepCache
    ) -> functional.Step | None:
        """Validates a step of one group's unsharded parameters and returns it; None where none has a gradient."""
        params = cache.local[group_index]
        present = None
        if ops.holds_none(grads):
            present = [grad is not None for grad in grads]
            params = [param for param, here in zip(params, present, strict=True) if here]
            grads = [grad for grad in grads if grad is not None]
        if not grads:
            return None

        def bind() -> functional.Group:
            bound = self._bind(group, params, grads, [cache.positions[param] for param in params])
            self._bound[group_index] = present, bound
            return bound

        held = self._bound.get(group_index)
        known = held[1] if held is not None and held[0] == present else None
        return self._prepared(known, bind, params, grads, self._given_of(group_index)[1])

    def _prepared(
        self,
        bound: functional.Group | None,
        bind: Callable[[], functional.Group],
        params: list[Tensor],
        grads: list[Any],
        options: Mapping[str, Any],
    ) -> functional.Step:
        """A validated step of parameters of one group that all have a gradient, which are bound anew unless ``bound``
        still holds."""
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}  # set by a GradScaler
        try:
            step = None if bound is None else bound.prepare(grads, **options, **scaling)
            while step is None:  # until no other thread advances a step between binding and reading it
                step = bind().prepare(grads, **options, **scaling)
            return step
        except RuntimeError:
            for param in params:
                assert param.grad is not None
                ops.check_tensor(f"the gradient of {self._label(param)}", param.grad)  # the same, naming the parameter
            raise

    def _given_of(self, index: int) -> Given:
        """What a group's options give to steps, as they were last checked."""
        checked, known = self._known.values(index), self._given.get(index)
        if known is None or known[0] is not checked:
            group = self.param_groups[index]
            given = checked, self._options(group), self._common_limit([group]), functional.Numbers()
            self._given[index] = known = given
        return known

    def _check_graph_capture(self) -> None:
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: a CUDA graph records the step's scalars, so every replay would repeat one "
                "step count and learning rate. Construct the optimizer with capturable=True (and lr as a tensor, to "
                "change it)."
            )
