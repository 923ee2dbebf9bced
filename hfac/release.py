"""Gradients that are stepped and freed while the backward pass goes on, so that they are never all there at once."""

import threading
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import layout
from .optim.base import FactoredOptimizer

_released: "weakref.WeakSet[FactoredOptimizer]" = weakref.WeakSet()


def release_gradients(
    model: nn.Module, optimizer: FactoredOptimizer, accumulate: int = 1, *, exact: bool = True
) -> "ReleasedGradients":
    """Steps every parameter of ``model`` in the backward pass, as soon as its gradient is complete, and frees the
    gradient: with ``accumulate=1`` about one layer's gradients are there at a time instead of the model's.

        handle = hfac.release_gradients(model, optimizer)
        loss.backward()    # steps
        optimizer.step()   # finds nothing left to do; schedulers and hooks see it as ever

    With ``accumulate=1`` the numbers are those of an ordinary step, to the bit. With ``accumulate=k`` the backward
    passes of k micro-batches make a step, and `optimizer.step()` is called after the last of them, as ever; then

    * ``exact=True``: gradients are kept until the k-th backward pass, in which each is stepped and freed as it is
      complete. The numbers are those of an ordinary loop, to the bit. The memory is not: before the last pass all
      gradients are there, and during it they go one by one.
    * ``exact=False``: every backward pass steps with lr / k, and frees. The memory stays low and nothing is
      accumulated; the numbers are others: k small steps along k gradients, each with the noise of its micro-batch, and
      the decays of the moments move k times as fast.

    `optimizer.step()` marks the end of a step. What still has a gradient then is stepped and freed by it: parameters
    without one in the last pass, and those that were frozen until now, which are hooked from then on. A loop that
    never calls it works where every parameter has a gradient in every backward pass.

    A tied parameter is stepped once, with all of its gradient. With *reentrant* checkpointing (``use_reentrant=True``)
    autograd hands it over in several parts and each would be a step: use ``use_reentrant=False``. Where a backward
    pass raises, some parameters have been stepped and some not; call `handle.reset()` before going on. The parts of a
    model under ``torch.compile`` have all their gradients at once: compile layer by layer to release them so.

    Args:
        model: holds the parameters; those that are not the optimizer's are left alone.
        optimizer: `hfac.HFac` or `hfac.SMMF`. Its parameters that are not the model's are left to `optimizer.step()`.
        accumulate: micro-batches in a step, >= 1.
        exact: see above.

    Raises:
        TypeError: not a module, or not an optimizer of this package (the one inside it, where a trainer wraps it).
        ValueError: ``accumulate`` is no number >= 1; the model has none of the optimizer's parameters.
        RuntimeError: the optimizer releases gradients already; DistributedDataParallel, whose gradients are averaged
            over ranks after such hooks have run; sharded parameters; amp_scaling=True: a `torch.amp.GradScaler`
            unscales gradients when the backward pass is over.
    """
    return ReleasedGradients(model, optimizer, accumulate, exact)


class ReleasedGradients:
    """What `release_gradients` returns; ``with`` it, gradients are released inside the block."""

    def __init__(self, model: nn.Module, optimizer: FactoredOptimizer, accumulate: int, exact: bool) -> None:
        _check(model, optimizer, accumulate)
        self._optimizer, self._model = optimizer, model
        self._accumulate, self._exact = accumulate, exact
        self._lock = threading.RLock()  # autograd has a thread for every device
        self._hooks: dict[Tensor, Any] = {}
        self._counts: dict[Tensor, int] = {}
        for param in self._shared():
            if param.requires_grad:
                self._hooks[param] = param.register_post_accumulate_grad_hook(self._arrived)
        self._ending = optimizer.register_step_pre_hook(self._end)
        _released.add(optimizer)

    def remove(self) -> None:
        """Makes everything as it was: gradients stay where backward passes leave them, and `optimizer.step()` steps.
        Those that are held for micro-batches to come are left in ``.grad``."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._ending.remove()
        self._counts.clear()
        _released.discard(self._optimizer)

    def reset(self) -> None:
        """Drops the gradients that are held, and counts micro-batches from none: for going on after a backward pass
        that raised."""
        self._counts.clear()
        for param in self._hooks:
            param.grad = None

    def __enter__(self) -> "ReleasedGradients":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _shared(self) -> list[Tensor]:
        mine = {id(param) for param in self._model.parameters()}
        return [param for group in self._optimizer.param_groups for param in group["params"] if id(param) in mine]

    def _arrived(self, param: Tensor) -> None:
        """The hook: the gradient of one backward pass is in ``param.grad``."""
        with self._lock:
            if self._exact and self._accumulate > 1:
                count = self._counts.get(param, 0) + 1
                if count < self._accumulate:
                    self._counts[param] = count
                    return
                del self._counts[param]
            self._step(param, 1.0 if self._exact else 1.0 / self._accumulate)

    def _step(self, param: Tensor, lr_scale: float = 1.0) -> None:
        self._optimizer.step_param(param, lr_scale=lr_scale)
        param.grad = None

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before `optimizer.step()`: steps what no hook has stepped."""
        with self._lock:
            self._counts.clear()
            for param in self._shared():
                if param.requires_grad and param not in self._hooks:
                    self._hooks[param] = param.register_post_accumulate_grad_hook(self._arrived)
                if param.grad is not None:
                    self._step(param)


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
            "release_gradients: this optimizer releases gradients already. Call remove() of the earlier handle first."
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(
            "release_gradients: DistributedDataParallel averages gradients over ranks after they have arrived, and a "
            "step here would take this rank's alone. Shard with torch.distributed.fsdp.fully_shard instead, and call "
            "optimizer.step()."
        )
    if optimizer._step_supports_amp_scaling:
        raise RuntimeError(
            "release_gradients: amp_scaling=True is for a torch.amp.GradScaler, which unscales gradients when the "
            "backward pass is over. Train in bfloat16, which needs none, and leave amp_scaling=False."
        )
    mine = {id(param) for param in model.parameters()}
    shared = [p for group in optimizer.param_groups for p in group["params"] if id(p) in mine]
    if not shared:
        raise ValueError(
            "release_gradients: the model has none of the optimizer's parameters. Pass the model that the optimizer "
            "was made for (after wrapping or moving it, if that makes new parameters)."
        )
    for param in shared:
        if layout.is_sharded(param):
            raise RuntimeError(
                f"release_gradients: a parameter of shape {tuple(param.shape)} is sharded, and a step of it a "
                "collective: one for every parameter by itself. Call optimizer.step(), which makes one for all; its "
                "gradients are sharded, too."
            )
