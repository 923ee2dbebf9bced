"""What is wrapped around a step: no autograd, no `torch.compile`, and hooks and profilers where there are any."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer, optimizer

Method = TypeVar("Method", bound=Callable[..., Any])


def without_grad(method: Method) -> Method:
    """`torch.no_grad` as a decorator, at a tenth of its time, which gradient release would spend on every parameter."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return method(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return wrapped  # type: ignore[return-value]


def keep_uncompiled(cls: type[Optimizer]) -> None:
    """Excludes the optimizer from `torch.compile` of a training step: its kernels are compiled already, and what it
    looks at around them (addresses, step counts, learning rates) would trigger recompilation whenever it changed.

    Done at construction, not at import, because asking torch for it imports torch's compiler, as constructing any
    optimizer does.
    """
    for name in ("step", "step_param"):
        method = getattr(cls, name)
        if not getattr(method, "uncompiled", False):
            method = _apart_from_compiler(_unobserved(method))
            method.uncompiled = True
            setattr(cls, name, method)


#: Before this version torch told of the callback below without counting the reference.
_OLDEST = (2, 11)


def _apart_from_compiler(method: Any) -> Any:
    """`torch.compiler.disable`, whose wrapper takes a fifth of `step_param`: it is passed by where torch compiles
    nothing at the moment."""
    disabled: Any = torch.compiler.disable(method)
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST:
        return disabled
    try:
        from torch._C._dynamo.eval_frame import get_eval_frame_callback
        from torch._dynamo.decorators import skip
    except ImportError:  # a later torch
        return disabled

    @wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (method if get_eval_frame_callback() is None else disabled)(self, *args, **kwargs)

    skip(step)  # this frame alone
    step.__dict__.update(vars(disabled))  # by which the compiler knows what it is not to trace
    return step


def _unobserved(method: Callable[..., Any]) -> Callable[..., Any]:
    """A step around which torch (`Optimizer.profile_hook_step`) calls hooks and tells profilers, without either where
    nobody listens: they take a tenth of a small model's step."""
    if not getattr(method, "hooked", False):
        return method
    inner = getattr(method, "__wrapped__")  # noqa: B009 (functools.wraps sets it)
    shared = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks

    @wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = *shared, self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
        observed = any(hooks) or torch.autograd._profiler_enabled()
        return (method if observed else inner)(self, *args, **kwargs)

    return step
