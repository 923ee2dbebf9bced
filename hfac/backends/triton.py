"""The Triton kernels of `hfac.triton_kernels`: for GPUs of any maker, without nvcc; Triton wants a C compiler.

Nothing of Triton is imported before a step asks for it.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # tells autograd of writes that it cannot see

from ..rounding import Place

DEVICES = ("cuda", "xpu")
#: The kernels divide by a GradScaler's scale and look at its found_inf themselves.
UNSCALES = True
#: Knows `master_lows` and `places` (`hfac.reference`).
STORES = True


def why_not(device: torch.device) -> str | None:
    """None where these kernels serve ``device``, else the reason and what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. Install it with: python -m pip install triton."
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cpu":
        if not interpreted:
            return (
                "the Triton kernels serve tensors on a GPU; on the CPU they run only in Triton's interpreter, which is "
                "slow and meant for tests. Use backend='auto', or set TRITON_INTERPRET=1 before Python starts."
            )
        return None
    if device.type not in DEVICES:
        return f"the Triton kernels serve tensors on {' and '.join(DEVICES)}, not on {device}. Use backend='auto'."
    if interpreted:
        return (
            "TRITON_INTERPRET=1 runs the Triton kernels on the host, where they cannot follow the addresses of tensors "
            f"on {device}. Unset it, or move the tensors to the CPU."
        )
    reason = _driver()
    return reason and f"Triton has no driver for a GPU here ({reason}). Check the GPU's driver, or use backend='auto'."


_found: list[str | None] = []


def _driver() -> str | None:
    """Why Triton finds no GPU; None where it finds one. Asked once."""
    if not _found:
        try:
            import triton

            triton.runtime.driver.active.get_current_target()
            _found.append(None)
        except Exception as error:  # whatever a broken installation may raise: importing hfac never fails
            _found.append(f"{type(error).__name__}: {error}")
    return _found[0]


def bind(
    op: str, params: Sequence[Tensor], states: dict[str, list[Tensor]], places: Sequence[Place] | None = None
) -> Callable[..., None]:
    from .. import spec
    from ..triton_kernels.step import Bound

    class Step(Bound):
        _taken = None

        def __call__(self, grads, nonfinite=None, squares=None, **scalars) -> None:
            taken = self._taken if squares is not None and squares is getattr(self._taken, "squares", None) else None
            self._taken = None
            super().__call__(grads, nonfinite, statistics=taken, **scalars)
            increment_version(params)

        def check_capture(self, grads, nonfinite=None, *, taken=False, **scalars) -> None:
            if not taken:
                super().check_capture(grads)

        def squares(self, grads, nonfinite=None, **scalars):
            if op != "hfac_step_":
                return None
            self._taken = self.statistics(grads, nonfinite, **scalars)
            return self._taken.squares

    return Step(spec.OPS[op], params, states, places)


def _shards(name, params, lists, **arguments):
    from .. import spec
    from ..triton_kernels.shards import ShardCall

    op = spec.OPS[name]
    grads, *rest = lists if op.updates else (params, *lists)
    named = dict(zip([*(one.name for one in op.operands), *op.vectors], rest)) | arguments
    lists = {one.name: named.pop(one.name, None) for one in (*op.operands, spec.MASTER_LOW)}
    counts = {one: named.pop(one) for one in op.counts}
    places = named.pop("places", None)
    lists = {n: v for n, v in lists.items() if v is not None}
    ShardCall(op, params if op.updates else [], lists, counts, places)(grads, **named)
    if op.updates:
        increment_version(params)


def hfac_sums(grads: Sequence[Tensor], *lists: Any, **arguments: Any) -> None:
    _shards("hfac_sums", grads, lists, **arguments)


def hfac_apply_(params: Sequence[Tensor], *lists: Any, **arguments: Any) -> None:
    _shards("hfac_apply_", params, lists, **arguments)


def smmf_sums_step_(params: Sequence[Tensor], *lists: Any, **arguments: Any) -> None:
    _shards("smmf_sums_step_", params, lists, **arguments)
