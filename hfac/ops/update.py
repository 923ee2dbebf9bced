"""A step that has been checked, yet to be made: when the norm of all gradients is known, and how they are scaled."""

from __future__ import annotations  # `Bound` knows this, and it that

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import clipping, memory

if TYPE_CHECKING:
    from .steps import Bound


class Update:
    """A step of a `Bound` that has been checked, yet to be made: call it once, and `norms` before it or not at all.

    Backends whose kernels unscale (``UNSCALES``) multiply and divide gradients as they read them, and write none. For
    others gradients are multiplied in place, as `torch.nn.utils.clip_grad_norm_` and the scaler would do it, and what
    decides is read on the host.

    All that the step reads and that others may bind anew is kept here: another thread may step the same parameters.

    Args:
        make: the backend's bound op, None where there are no parameters.
        unscales: whether that multiplies gradients as it reads them.
        lazy: whether gradients may be views that negate, which must be copied before memory is read.
    """

    def __init__(
        self,
        bound: Bound,
        make: Callable[..., None] | None,
        unscales: bool,
        grads: list[Tensor],
        lazy: bool,
        nonfinite: Tensor | None,
        watched: Tensor | None,
        scaling: Mapping[str, Tensor | None],
        scalars: Mapping[str, Any],
    ) -> None:
        self._bound, self._make, self.unscales = bound, make, unscales
        self._grads, self._lazy, self._nonfinite, self._scalars = grads, lazy, nonfinite, scalars
        self._more = {} if watched is None else {"watched": watched}
        self._scale, self._found_inf = scaling["grad_scale"], scaling["found_inf"]
        self._unscaled = False
        self._squares: Tensor | None = None  # with the statistics, which the backend knows it by

    def norms(self) -> Tensor:
        """The gradients' norms, once they are unscaled: [len(grads)], float32 (float64 for float64 gradients).

        H-Fac's kernels take them from the statistics of the step's first read of the gradients, which the step then
        has, unless it is clipped (`squares` of a backend's bound op). Everything else is read for its norm.
        """
        if self._make is None:
            return torch.zeros(0, dtype=torch.float32, device="cpu")
        squares = getattr(self._make, "squares", None) if self._bound.op == "hfac_step_" else None
        if squares is None or not (self.unscales or self._unscale()):
            norms = torch.stack(clipping.norms(self._grads))
            return norms if self._scale is None or self._unscaled else norms / self._scale
        scaling = self._scaling(None) if self.unscales else {}
        found = squares(self._readable(), nonfinite=self._nonfinite, **scaling, **self._more, **self._scalars)
        self._squares = found
        double = any(grad.dtype == torch.float64 for grad in self._grads)
        return found.sqrt().to(torch.float64 if double else torch.float32)

    def check_capture(self) -> None:
        """Of a step in a CUDA graph that is being captured: that it can be part of it.

        Raises:
            RuntimeError: it needs memory on the host, which cannot be allocated then; nothing has been written.
        """
        check = getattr(self._make, "check_capture", None)
        if check is not None:
            check(self._grads, self._nonfinite, taken=self._squares is not None, **self._scalars)

    def __call__(self, clip: Tensor | None = None) -> None:
        """Makes the step. ``clip``: a 0-d float32 or float64 tensor that the gradients are multiplied by."""
        step = self._make
        if step is None:
            return
        known: dict[str, Tensor] = {}
        if clip is not None:
            clip = clip.to(self._bound.device)
        if self.unscales:
            if self._squares is not None and clip is not None:
                known = {"clip": clip.to(torch.float32), "squares": self._squares}
            step(self._grads, nonfinite=self._nonfinite, **self._scaling(clip), **known, **self._more, **self._scalars)
            return
        if not self._unscale():
            if self._nonfinite is not None:
                self._nonfinite.zero_()
            return
        if clip is not None:
            self._grads = clipping.scaled(self._grads, clip)
            if self._squares is not None and clip.item() == 1:
                known = {"clip": clip, "squares": self._squares}
        step(self._readable(), nonfinite=self._nonfinite, **known, **self._more, **self._scalars)

    def _readable(self) -> list[Tensor]:
        return memory.materialized(self._grads) if self._lazy else self._grads

    def _scaling(self, clip: Tensor | None) -> dict[str, Tensor]:
        """What kernels that unscale are told: they divide gradients by ``grad_scale``."""
        scale = self._scale
        if clip is not None:
            divisor = clip.reciprocal() if scale is None else scale.reshape(()) / clip
            scale = divisor.to(torch.float32)
        given = {"grad_scale": scale, "found_inf": self._found_inf}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def _unscale(self) -> bool:
        """Divides the gradients by the scale, in place, once. False where found_inf forbids the step."""
        if self._found_inf is not None and self._found_inf.item():
            return False
        if self._scale is not None and not self._unscaled:
            self._grads = memory.without_zerotensors(self._grads)
            if self._lazy:  # torch takes no lists of tensors that negate
                for grad in self._grads:
                    grad.div_(self._scale)
            else:
                torch._foreach_div_(self._grads, self._scale)
            self._unscaled = True
        return True
