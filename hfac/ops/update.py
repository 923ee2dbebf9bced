"""A step that has been checked, yet to be made: when the norm of all gradients is known, and how they are scaled."""

from __future__ import annotations  # `Bound` knows this, and it that

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import clipping

if TYPE_CHECKING:
    from .steps import Bound


class Update:
    """A step of a `Bound` that has been checked, yet to be made: call it once, and `norms` before it or not at all.

    Backends whose kernels unscale (``UNSCALES``) multiply and divide gradients as they read them, and write none. For
    others gradients are multiplied in place, as `torch.nn.utils.clip_grad_norm_` and the scaler would do it, and what
    decides is read on the host.
    """

    def __init__(
        self,
        bound: Bound,
        grads: list[Tensor],
        nonfinite: Tensor | None,
        watched: Tensor | None,
        scaling: Mapping[str, Tensor | None],
        scalars: Mapping[str, Any],
    ) -> None:
        self._bound, self._grads, self._nonfinite, self._scalars = bound, grads, nonfinite, scalars
        self._more = {} if watched is None else {"watched": watched}
        self._scale, self._found_inf = scaling["grad_scale"], scaling["found_inf"]
        self._unscaled = self._known = False

    @property
    def unscales(self) -> bool:
        return self._bound.unscales

    def norms(self) -> Tensor:
        """The gradients' norms, once they are unscaled: [len(grads)], float32 (float64 for float64 gradients).

        H-Fac's kernels take them from the statistics of the step's first read of the gradients, which the step then
        has, unless it is clipped (`squares` of a backend's bound op). Everything else is read for its norm.
        """
        step = self._bound.step
        if step is None:
            return torch.zeros(0, dtype=torch.float32, device="cpu")
        squares = getattr(step, "squares", None) if self._bound.op == "hfac_step_" else None
        if squares is None or not (self._bound.unscales or self._unscale()):
            norms = torch.stack(clipping.norms(self._grads))
            return norms if self._scale is None or self._unscaled else norms / self._scale
        self._known = True
        scaling = self._scaling(None) if self._bound.unscales else {}
        found = squares(self._grads, nonfinite=self._nonfinite, **scaling, **self._more, **self._scalars)
        double = any(grad.dtype == torch.float64 for grad in self._grads)
        return found.sqrt().to(torch.float64 if double else torch.float32)

    def check_capture(self) -> None:
        """Of a step in a CUDA graph that is being captured: that it can be part of it.

        Raises:
            RuntimeError: it needs memory on the host, which cannot be allocated then; nothing has been written.
        """
        check = getattr(self._bound.step, "check_capture", None)
        if check is not None:
            check(self._grads, self._nonfinite, taken=self._known, **self._scalars)

    def __call__(self, clip: Tensor | None = None) -> None:
        """Makes the step. ``clip``: a 0-d float32 or float64 tensor that the gradients are multiplied by."""
        step = self._bound.step
        if step is None:
            return
        if clip is not None:
            clip = clip.to(self._bound.device)
        if self._bound.unscales:
            known = {"clip": clip.to(torch.float32)} if self._known and clip is not None else {}
            step(self._grads, nonfinite=self._nonfinite, **self._scaling(clip), **known, **self._more, **self._scalars)
            return
        if not self._unscale():
            if self._nonfinite is not None:
                self._nonfinite.zero_()
            return
        grads = self._grads if clip is None else clipping.scaled(self._grads, clip)
        known = {"clip": clip} if self._known and clip is not None and clip.item() == 1 else {}
        step(grads, nonfinite=self._nonfinite, **known, **self._more, **self._scalars)

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
            torch._foreach_div_(self._grads, self._scale)
            self._unscaled = True
        return True
