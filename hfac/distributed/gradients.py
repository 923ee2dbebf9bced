"""Gradients that are placed otherwise than their parameters, which takes collectives to mend: all ranks must make them,
also those that have no gradient."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..buckets import pick
from ..staging import capturing, refused
from . import layout
from .bucket import Entry

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: What ranks send of a parameter without a gradient, and of a gradient that the codes below cannot describe.
_NONE, _OTHER = 0, 1


class Gradients:
    """This rank's shards of an optimizer's gradients, redistributed as their parameters are.

    Before that, ranks find out together whether all of them have what they must redistribute: in the first step they
    tell each other how all gradients are placed, then in every step whether those are there that were placed otherwise
    than their parameters. Only then the host waits for the other ranks.
    """

    def __init__(self) -> None:
        self._count = 0
        #: whose gradients have been placed otherwise
        self._moved: set[Tensor] = set()

    def agree(self, params: Sequence[Tensor], label: Callable[[Tensor], str]) -> None:
        """Asks the other ranks.

        Args:
            params: all DTensors of the optimizer, in an order that is the same on every rank.

        Raises:
            RuntimeError: a gradient is placed otherwise on one rank than on another, or is missing on some of those
                that must redistribute it; every rank raises it. Or the host would wait for an answer, and a CUDA graph
                is being captured.
        """
        if len(params) == self._count:
            params = [param for param in params if param in self._moved] if self._moved else []
            if params and capturing(layout.local(params[0]).device):
                raise RuntimeError(
                    f"the gradient of {label(params[0])} has been placed otherwise than its parameter. To redistribute "
                    "it, ranks tell each other in every step whether they have it, which cannot be part of the CUDA "
                    "graph that is being captured. Redistribute it before the step, in the graph or outside of it: "
                    "param.grad = param.grad.redistribute(placements=param.placements); and construct the optimizer "
                    "anew, or capture no graph."
                )
        elif capturing(layout.local(params[0]).device):
            raise refused("this is the first step on these tensors")
        else:
            self._count = len(params)
        meshes: dict[DeviceMesh, list[Tensor]] = {}
        for param in params:
            if not layout.local(param).is_meta and layout.group_refusal(param) is None:
                meshes.setdefault(param.device_mesh, []).append(param)  # type: ignore[attr-defined]
        for mesh, mine in meshes.items():
            for param, (largest, least, missing) in zip(mine, _of_all_ranks(mesh, mine), strict=True):
                if largest == _NONE or least == _OTHER:
                    continue
                what = f"the gradient of {label(param)} (shape {tuple(param.shape)})"
                if largest != least:
                    raise RuntimeError(
                        f"{what} is {_described(largest)} on one rank and {_described(least)} on another. Place it "
                        "alike on all ranks (param.grad.redistribute(...)). Nothing was updated."
                    )
                placements = list(param.placements)  # type: ignore[attr-defined]
                if _meant(largest)[0] == placements:
                    continue
                self._moved.add(param)
                if missing:
                    raise RuntimeError(
                        f"{what} is {_described(largest)}, and must be redistributed as {placements}, but some of the "
                        f"{mesh.size()} ranks that must do it together have none. All need one or none: let every rank "
                        "use the parameter in its loss (a zero times its output will do), or set requires_grad to "
                        "False on all. Nothing was updated."
                    )

    def of(self, param: Tensor, label: str) -> Tensor | None:
        """This rank's shard; None without a gradient. All ranks must ask for the same parameters in the same order."""
        grad = param.grad
        if grad is None or not layout.is_dtensor(param):
            return grad
        if hasattr(grad, "placements") and grad.placements != param.placements:  # type: ignore[attr-defined]
            self._moved.add(param)
        return layout.gradient_shard(param, grad, label)

    def of_all(self, entries: Sequence[Entry]) -> list[Tensor | None]:
        """`of` the parameters of entries."""
        grads: list[Tensor | None] = [entry.param.grad for entry in entries]
        index = [i for i, grad in enumerate(grads) if grad is not None]
        mine, here = pick(entries, index), pick(grads, index)
        try:
            shards = list(map(_SHARD, here))
            # as nearly every one is, it is placed as its parameter, and there
            as_is = {Tensor}.issuperset(map(type, shards)) and list(map(_PLACED, here)) == list(map(_PLACES, mine))
        except AttributeError:  # a plain tensor
            as_is = False
        if not as_is:
            shards = [self.of(entry.param, entry.label) for entry in mine]
        for i, shard in zip(index, shards, strict=True):
            grads[i] = shard
        return grads


_SHARD, _PLACED, _PLACES = map(attrgetter, ("_local_tensor", "_spec.placements", "placements"))


def _of_all_ranks(mesh: DeviceMesh, params: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """Of each parameter the largest code of its gradients, the least of those that are there, and whether some are
    not."""
    codes = torch.tensor([_code(param.grad) for param in params], dtype=torch.int64, device="cpu")
    none = codes == _NONE
    numbers = torch.stack([codes, torch.where(none, -(2**62), -codes), none.long()])
    numbers = numbers.to(layout.local(params[0]).device)
    for d in range(mesh.ndim):
        if mesh.size(d) > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=mesh.get_group(d))
    return [(largest, -negative, missing) for largest, negative, missing in numbers.T.tolist()]


@cache
def _known() -> list[Any]:
    """The placements that a code can name, by their digit."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [Replicate(), Partial("sum"), Partial("avg"), *map(Shard, range(12))]


def _code(grad: Any) -> int:
    """A gradient's placements and type as a number: the type, and a hexadecimal digit for each mesh dimension."""
    if grad is None:
        return _NONE
    places = getattr(grad, "placements", None)
    if places is None or len(places) > 14 or grad.dtype not in _DTYPES or any(p not in _known() for p in places):
        return _OTHER
    code = 1  # before the first digit, so that none is lost
    for digit in (*map(_known().index, places), _DTYPES.index(grad.dtype)):
        code = 16 * code + digit
    return code


def _meant(code: int) -> tuple[list[Any], torch.dtype]:
    *digits, dtype = (int(digit, 16) for digit in f"{code:x}"[1:])
    return [_known()[digit] for digit in digits], _DTYPES[dtype]


def _described(code: int) -> str:
    if code == _OTHER:
        return "a plain tensor or placed in a way of its own"
    placements, dtype = _meant(code)
    return f"{str(dtype).removeprefix('torch.')} placed as {placements}"
