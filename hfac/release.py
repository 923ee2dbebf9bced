"""Steps parameters and frees their gradients during the backward pass, so that all gradients never exist at once."""

import functools
import threading
import weakref
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import clip_grad

from . import clipping, distributed
from .distributed import layout
from .optim import options
from .optim.base import FactoredOptimizer
from .optim.units import Unit, Units

_released: "weakref.WeakSet[FactoredOptimizer]" = weakref.WeakSet()


class _Clipping:
    """Notices `torch.nn.utils.clip_grad_norm_` of parameters that handles release, which finds no gradient left.

    While there is a handle, the function of torch that it calls to multiply gradients looks at the parameters first:
    nothing else tells that they were looked for, the public functions stay what they are, also where a script has
    imported them by name, and when the last handle is removed torch is as it was. Where a version of torch has
    no such function, nothing is said.
    """

    NAME = "_clip_grads_with_norm_"

    def __init__(self) -> None:
        self.handles: weakref.WeakSet[ReleasedGradients] = weakref.WeakSet()
        self._torch: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None

    def begin(self, handle: "ReleasedGradients") -> None:
        self.handles.add(handle)
        self._torch = getattr(clip_grad, self.NAME, None) if self._ours is None else self._torch
        if self._ours is None and self._torch is not None:
            self._ours = self._around(self._torch)
            setattr(clip_grad, self.NAME, self._ours)

    def end(self, handle: "ReleasedGradients") -> None:
        self.handles.discard(handle)
        if not list(self.handles) and getattr(clip_grad, self.NAME, None) is self._ours is not None:
            setattr(clip_grad, self.NAME, self._torch)
            self._ours = None

    def _around(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def look_and_clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
                for handle in self.handles:
                    handle._look(parameters)
            return inner(parameters, *args, **kwargs)

        return look_and_clip


_clipping = _Clipping()


def release_gradients(
    model: nn.Module, optimizer: FactoredOptimizer, accumulate: int = 1, *, exact: bool = True
) -> "ReleasedGradients":
    """Steps every parameter of ``model`` during the backward pass, as soon as its gradient is complete, and frees the
    gradient: with ``accumulate=1`` about one layer's gradients exist at a time instead of the whole model's.

        handle = hfac.release_gradients(model, optimizer)
        loss.backward()    # steps
        optimizer.step()   # finds nothing left to do; schedulers and hooks run as usual

    With ``accumulate=1`` the numbers are those of an ordinary step, bit for bit on the CPU; on a GPU sums of a matrix
    that is stepped alone may be added up in another order (docs/release.md). With ``accumulate=k`` the backward
    passes of k micro-batches make one step, and `optimizer.step()` is called after the last of them, as usual:

    * ``exact=True`` keeps gradients until the k-th backward pass, in which each is stepped and freed once complete. The
      numbers are those of an ordinary loop, bit for bit. So is the peak memory: all gradients exist before the last
      pass, which then frees them one by one.
    * ``exact=False`` steps and frees in every backward pass, with lr / k. Memory stays low, but nothing is accumulated
      and the numbers differ: k small steps along k gradients, each with its micro-batch's noise, and moments that decay
      k times as fast.

    `optimizer.step()` marks the end of a step. It steps and frees what still has a gradient: parameters that got none
    in the last pass, and those that were frozen, or lazy and without a shape, until now; hooks are added to these. A
    loop that never calls it works if every parameter has a gradient in every backward pass.

    With the optimizer's ``max_grad_norm``, the norm of all gradients is known only when the first are gone. So each
    step is clipped by the norm of the step before, the first not at all, and the numbers differ from an ordinary
    loop's. Norms are collected as gradients pass, and are complete at `optimizer.step()`, or when a parameter passes
    again; `optimizer.grad_norm` is the last complete one. It is in the handle's `state_dict()`: a run resumed without
    that makes its first step unclipped.

    **Sharded parameters.** Those of FSDP2 (`fully_shard`) are stepped module by module, as their gradients arrive, with
    one all-reduce for each module that FSDP has made its own; the backward pass goes on while the sums are under way.
    The numbers are those of `optimizer.step()` up to the order in which sums are formed. Call `optimizer.step()` after
    every step: with ``max_grad_norm`` it adds up the norm, and DTensors that FSDP does not manage (tensor parallelism
    alone) keep their gradients until then and are stepped together. Under ``set_requires_gradient_sync(False)``, which
    has FSDP bring what it has added up once, leave accumulate=1. All ranks call `reset` and `remove` together.

    `torch.nn.utils.clip_grad_norm_` of released parameters finds no gradients; a warning says so, once for a handle.

    A tied parameter is stepped once, with its whole gradient. *Reentrant* checkpointing (``use_reentrant=True``) has
    autograd deliver it in pieces, each of which would be a step: use ``use_reentrant=False``. After a backward pass
    that raised, some parameters have been stepped and some not: call `handle.reset()` before going on. A function under
    ``torch.compile`` delivers all its gradients at once: to release them one by one, compile layer by layer.

    Args:
        model: holds the parameters; those that are not the optimizer's are ignored.
        optimizer: `hfac.HFac` or `hfac.SMMF`. Its parameters that are not the model's are left to `optimizer.step()`;
            with ``max_grad_norm`` there may be none.
        accumulate: micro-batches per step, >= 1.
        exact: see above.

    Raises:
        TypeError: not a module, or not an optimizer of this package (a trainer may wrap it: pass the one inside).
        ValueError: ``accumulate`` is not a whole number >= 1; the model has none of the optimizer's parameters, or,
            with ``max_grad_norm``, not all.
        RuntimeError: the optimizer releases gradients already; DistributedDataParallel, which averages gradients over
            ranks after these hooks have run; amp_scaling=True, because a `torch.amp.GradScaler` unscales gradients
            after the backward pass.
    """
    return ReleasedGradients(model, optimizer, accumulate, exact)


class ReleasedGradients:
    """Handle returned by `release_gradients`. As a context manager, it calls `remove` at the end of the block."""

    def __init__(self, model: nn.Module, optimizer: FactoredOptimizer, accumulate: int, exact: bool) -> None:
        _check(model, optimizer, accumulate)
        self._optimizer, self._model = optimizer, model
        self._accumulate, self._exact = accumulate, exact
        self._lock = threading.RLock()  # autograd has a thread per device
        self._hook = torch.compiler.disable(self._arrived)  # the backward pass may be a compiled function's
        self._hooks: dict[Tensor, Any] = {}
        self._counts: dict[Tensor, int] = {}
        #: by parameter, the norm of each gradient stepped since the last complete norm
        self._passed: dict[Tensor, Tensor] = {}
        #: sharded parameters whose gradients are arriving, and those that have, in this backward pass
        self._arriving: tuple[Unit, set[Tensor]] | None = None
        #: those whose sums over ranks are under way, and the rest of their step
        self._pending: tuple[Unit, Generator[Any, None, None]] | None = None
        self._sorted: list[Tensor] = []  # the sharded parameters that are known
        self._ends = False  # whether the end of this backward pass calls back
        self._norm: Tensor | None = None
        self._clip: tuple[float, clipping.Clip] | None = None
        for param in self._shared():
            if param.requires_grad and not is_lazy(param):
                self._hooks[param] = param.register_post_accumulate_grad_hook(self._hook)
        self._sort()
        self._ending = optimizer.register_step_pre_hook(self._end)
        self._said = False
        _released.add(optimizer)
        _clipping.begin(self)

    def remove(self) -> None:
        """Removes the hooks: gradients accumulate again and `optimizer.step()` steps. Gradients that were kept for
        further micro-batches stay in ``.grad``."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._ending.remove()
        self._counts.clear()
        self._passed.clear()
        self._arriving = None
        self._finish()
        _released.discard(self._optimizer)
        self._optimizer._units = None
        self._optimizer._forget()
        _clipping.end(self)

    def reset(self) -> None:
        """Drops all gradients and restarts the count of micro-batches, to go on after a backward pass that raised. Of
        sharded parameters, call it on every rank."""
        self._counts.clear()
        self._passed.clear()
        self._arriving, self._ends = None, False
        self._finish()  # what is under way, other ranks have begun as well
        for param in self._hooks:
            param.grad = None

    def state_dict(self) -> dict[str, Any]:
        """To be saved beside the optimizer's: {"grad_norm": the norm that clips the next step, a 0-d tensor, or None}.
        Call it after `optimizer.step()`, or, in a loop that never calls that, after a backward pass: gradients kept for
        further micro-batches are not saved. In such a loop every rank must call it, if parameters are sharded: their
        norm is then added up over ranks."""
        return {"grad_norm": self._norm_of_passed() if self._passed else self._norm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes bit for bit from what `state_dict` returned.

        Raises:
            TypeError, ValueError: it is something else; nothing has changed.
        """
        if not isinstance(state_dict, dict) or state_dict.keys() != {"grad_norm"}:
            given = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise TypeError(f"release_gradients: the handle's state dict must have the key 'grad_norm', got {given}")
        norm = state_dict["grad_norm"]
        if norm is not None and (not isinstance(norm, Tensor) or norm.ndim or not norm.is_floating_point()):
            raise ValueError(
                f"release_gradients: 'grad_norm' must be a 0-d floating-point tensor or None, got {norm!r}"
            )
        self._passed.clear()
        self._keep(None if norm is None else norm.detach().clone().to(self._shared()[0].device))

    def __enter__(self) -> "ReleasedGradients":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _look(self, parameters: list[Tensor]) -> None:
        """Says once that these are clipped in vain: some are released here, and no gradient is left of any."""
        if not self._said and any(p in self._hooks for p in parameters) and all(p.grad is None for p in parameters):
            self._said = True
            options.warn(
                "clip_grad_norm_ finds no gradients and clips nothing: hfac.release_gradients has stepped and freed "
                "them in the backward pass. Leave the call out; max_grad_norm in the optimizer clips released "
                "gradients, by the norm of the step before."
            )

    def _shared(self) -> list[Tensor]:
        mine = {id(param) for param in self._model.parameters()}
        return [param for group in self._optimizer.param_groups for param in group["params"] if id(param) in mine]

    def _arrived(self, param: Tensor) -> None:
        """The hook, called when ``param.grad`` holds the gradient of a backward pass."""
        with self._lock:
            unit, units = self._unit_of(param), self._optimizer._units
            if unit is not None and units is not None and unit is units.rest:
                return  # on other ranks it may come at another time, or not at all: `step` ends their wait
            if unit is not None:
                self._finish()
                if self._arriving is not None and self._arriving[0] is not unit:
                    self._close()
            if self._passed and param in self._passed:  # another backward pass without step() in between
                self._complete()
            if unit is not None:
                self._arrive(unit, param)
                return
            if self._exact and self._accumulate > 1:
                count = self._counts.get(param, 0) + 1
                if count < self._accumulate:
                    self._counts[param] = count
                    return
                del self._counts[param]
            self._step(param, 1.0 if self._exact else 1.0 / self._accumulate)

    def _unit_of(self, param: Tensor) -> Unit | None:
        """The sharded parameters that this one is stepped with."""
        units = self._optimizer._units
        return None if units is None else units.of.get(param)

    def _arrive(self, unit: Unit, param: Tensor) -> None:
        """A sharded parameter's gradient is there. FSDP brings those of a unit one after the other, on every rank in
        the same order, but what has none is left out: then the next unit's shows that all have come, or the end of the
        backward pass."""
        if not self._ends:
            torch.autograd.Variable._execution_engine.queue_callback(self._passed_by)
            self._ends = True
        if self._arriving is None:
            self._arriving = unit, set()
        self._counts[param] = self._counts.get(param, 0) + 1
        here = self._arriving[1]
        here.add(param)
        if all(other in here for other in unit.params if other.requires_grad):
            self._close()

    def _close(self) -> None:
        """All gradients of a unit that come in this backward pass have come: begins its step, where that is due."""
        if self._arriving is None:
            return
        (unit, _), self._arriving = self._arriving, None
        least = self._accumulate if self._exact else 1
        if max(self._counts.get(param, 0) for param in unit.params) >= least:
            self._begin(unit, 1.0 if self._exact else 1.0 / self._accumulate)

    def _begin(self, unit: Unit, lr_scale: float = 1.0) -> None:
        clip, limit = None, self._optimizer.max_grad_norm
        if limit is not None:
            here = [param for param in unit.params if param.grad is not None]
            grads = [grad for param in here if (grad := layout.gradient(param, "a parameter")) is not None]
            norms = clipping.norms(grads)  # before they are clipped
            clip = self._coefficient(limit, layout.local(unit.params[0].detach()).device).coefficient
            self._passed.update(zip(here, norms, strict=True))
        for param in unit.params:
            self._counts.pop(param, None)
        step = unit.step(clip, lr_scale)
        # On a GPU nothing here waits, and FSDP calls hooks on the stream of its reduce-scatter, beside the backward
        # pass. On the host the pass goes on while the sums are under way.
        work = next(step, None)
        self._pending = unit, _after(work, step)
        if not unit.on_host:
            self._finish()

    def _finish(self) -> None:
        """Completes the step that is under way, and frees its gradients."""
        if self._pending is not None:
            (unit, step), self._pending = self._pending, None
            distributed.schedule.finished(step)
            for param in unit.params:
                param.grad = None

    def _passed_by(self) -> None:
        """Called at the end of a backward pass."""
        with self._lock:
            self._ends = False
            self._close()
            self._finish()

    def _sort(self) -> None:
        """Finds the sharded parameters, which are stepped together."""
        params = [param for param in self._shared() if layout.is_sharded(param)]
        if list(map(id, params)) != list(map(id, self._sorted)):
            units = Units(self._optimizer, self._model, params)
            self._optimizer._units = units if units.of else None
            self._optimizer._forget()
            self._sorted = params

    def _step(self, param: Tensor, lr_scale: float = 1.0) -> None:
        found = self._optimizer._find(param)  # checking all groups for each parameter would cost too much
        group = {} if found is None else self._optimizer.param_groups[found[0]]
        if group.get("max_grad_norm") is None:
            self._optimizer.step_param(param, lr_scale=lr_scale)
        else:
            limit, grad = self._optimizer._common_limit([group]), layout.gradient(param, "a parameter")
            assert limit is not None and grad is not None
            (norm,) = clipping.norms([grad])
            shared: Any = self._coefficient(limit, grad.device)  # taken like its tensor, and formed once for all
            self._optimizer.step_param(param, clip=shared, lr_scale=lr_scale)
            self._passed[param] = norm
        param.grad = None

    def _coefficient(self, limit: float, device: torch.device) -> clipping.Clip:
        """What gradients are multiplied by, from the last complete norm."""
        if self._clip is None or self._clip[0] != limit:
            one = torch.ones((), dtype=torch.float32, device=device)
            self._clip = limit, clipping.Clip(one if self._norm is None else clipping.coefficient(self._norm, limit))
        return self._clip[1]

    def _complete(self) -> None:
        """Called when all gradients of a step have passed."""
        if self._passed or (self._optimizer._units is not None and self._optimizer.max_grad_norm is not None):
            norm = self._norm_of_passed()
            self._passed.clear()
            if norm is not None and self._norm is not None:
                norm = torch.where(norm == 0, self._norm, norm)  # a step without any gradient, which other ranks know
            self._keep(norm)

    def _norm_of_passed(self) -> Tensor | None:
        if self._optimizer._units is not None:
            return self._optimizer._units.norm(self._passed)
        skips = {p: group["nonfinite"] == "skip" for group in self._optimizer.param_groups for p in group["params"]}
        return clipping.total([(norm, skips.get(param, False)) for param, norm in self._passed.items()])

    def _keep(self, norm: Tensor | None) -> None:
        self._norm = self._optimizer._grad_norm = norm
        self._clip = None

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called before `optimizer.step()`: steps what no hook has stepped."""
        with self._lock:
            self._passed_by()
            self._counts.clear()
            self._sort()
            for param in self._shared():
                if param.requires_grad and param not in self._hooks and not is_lazy(param):
                    self._hooks[param] = param.register_post_accumulate_grad_hook(self._hook)
                if param.grad is not None and self._unit_of(param) is None:
                    self._step(param)
            units = self._optimizer._units
            for unit in () if units is None else units.fsdp:
                if unit.has_gradient():
                    self._begin(unit)
                    self._finish()
            if units is not None and units.rest is not None:
                units.rest.agree()
                self._begin(units.rest)
                self._finish()
            self._complete()


def _check(model: Any, optimizer: Any, accumulate: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"release_gradients: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, FactoredOptimizer):
        raise TypeError(
            f"release_gradients: optimizer must be hfac.HFac or hfac.SMMF, got {type(optimizer).__name__}. Where a "
            "trainer has wrapped it, pass the one inside (accelerate: optimizer.optimizer)."
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"release_gradients: accumulate must be a whole number >= 1, got {accumulate!r}")
    if optimizer in _released:
        raise RuntimeError(
            "release_gradients: this optimizer releases gradients already. Call remove() on the earlier handle first."
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(
            "release_gradients: DistributedDataParallel averages gradients over ranks after these hooks have run, so a "
            "step here would use this rank's gradient alone. Shard with torch.distributed.fsdp.fully_shard instead, "
            "and call optimizer.step()."
        )
    if optimizer._step_supports_amp_scaling:
        raise RuntimeError(
            "release_gradients: amp_scaling=True is for a torch.amp.GradScaler, which unscales gradients after the "
            "backward pass. Train in bfloat16, which needs no scaling, and leave amp_scaling=False."
        )
    if any(group["nonfinite"] == "skip-step" for group in optimizer.param_groups):
        raise RuntimeError(
            "release_gradients: nonfinite='skip-step' looks at all gradients before the first parameter is stepped, "
            "and here gradients are stepped as they arrive. Use nonfinite='skip', which leaves out single parameters."
        )
    mine = {id(param) for param in model.parameters()}
    shared = [p for group in optimizer.param_groups for p in group["params"] if id(p) in mine]
    if not shared:
        raise ValueError(
            "release_gradients: the model has none of the optimizer's parameters. Pass the model that the optimizer "
            "was made for (after wrapping or moving it, if that creates new parameters)."
        )
    everything = sum(len(group["params"]) for group in optimizer.param_groups)
    if optimizer.max_grad_norm is not None and len(shared) < everything:
        raise ValueError(
            f"release_gradients: the model has {len(shared)} of the optimizer's {everything} parameters, and "
            "max_grad_norm clips by the norm of all of them. Pass a module that holds them all (torch.nn.ModuleList), "
            "or leave max_grad_norm=None."
        )
    if optimizer.max_grad_norm is not None and optimizer.norm_group is not None:
        raise RuntimeError(
            "release_gradients: the optimizer has a norm_group, over which the norm of all gradients is added up, and "
            "steps during the backward pass clip by what this rank has. Leave norm_group=None or max_grad_norm=None."
        )


def _after(work: Any, step: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """A step that has been begun, and what is under way of it."""
    yield work
    yield from step
