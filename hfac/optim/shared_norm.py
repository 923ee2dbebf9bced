"""One norm of the gradients of several optimizers, and of stages of a pipeline."""

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from .base import FactoredOptimizer

#: by the first of some optimizers: what the norm was last bound to, and how it is added up
_bound: "weakref.WeakKeyDictionary[FactoredOptimizer, tuple[list[Any], distributed.Total]]" = (
    weakref.WeakKeyDictionary()
)


@torch.no_grad()
def clip_grad_norm_(
    optimizers: FactoredOptimizer | Iterable[FactoredOptimizer], max_norm: float, norm_group: Any = None
) -> Tensor:
    """Has the next ``step()`` of each optimizer clip by the norm of all their gradients together, as
    `torch.nn.utils.clip_grad_norm_` of all their parameters would before it.

        norm = hfac.clip_grad_norm_(optimizers, 1.0, pp_mesh)    # one optimizer for each part of the model
        for optimizer in optimizers:
            optimizer.step()

    It reads gradients and writes none: each step multiplies its own. The norm is the same number on every rank of the
    parameters' meshes and of ``norm_group``, and stays on the device. With nonfinite="skip-step" it decides for all of
    the optimizers alike. Gradients must not change between the call and the steps.

    Args:
        optimizers: `hfac.HFac` and `hfac.SMMF`, one or several, without ``max_grad_norm``.
        max_norm: > 0.
        norm_group: where ranks have different parameters, over what squares are added up: a process group, a DeviceMesh
            for those of its dimensions, or a list of these; for the stages of a pipeline, the pipeline's. It comes
            after each optimizer's own ``norm_group``. Every rank must pass its own (default None).

    Returns:
        The norm before clipping: 0-d, float32 (float64 where there are float64 gradients); 0 without gradients. Each
        optimizer's ``grad_norm`` is the same from the next step on.

    Raises:
        TypeError, ValueError: an argument is none of these; optimizers that have ``max_grad_norm``, or differ in
            whether nonfinite="skip-step".
        RuntimeError: as ``step()``; the optimizers are unchanged.
    """
    given = [optimizers] if isinstance(optimizers, FactoredOptimizer) else list(optimizers)
    _check(given, max_norm)
    groups = distributed.process_groups("clip_grad_norm_: norm_group", norm_group)
    ready = [optimizer._ready() for optimizer in given]
    found = [each for optimizer, mine in zip(given, ready, strict=True) for each in optimizer._norms(mine)]
    total = _total(given, groups, [cache for cache, *_ in ready])
    given[0]._captured += [total] if any(each._is_capturing() for each in given) else []
    norm = total.of(found)
    if norm is None:
        norm = torch.zeros((), dtype=torch.float32, device="cpu")
    for optimizer in given:
        optimizer._given_norm = norm, float(max_norm)
    return norm.clone()


def _check(optimizers: list[Any], max_norm: Any) -> None:
    for each in optimizers:
        if not isinstance(each, FactoredOptimizer):
            raise TypeError(
                f"clip_grad_norm_: optimizers must be hfac.HFac and hfac.SMMF, got {type(each).__name__}. For "
                "parameters and gradients use torch.nn.utils.clip_grad_norm_."
            )
        if each.max_grad_norm is not None:
            raise ValueError(
                f"clip_grad_norm_: an optimizer has max_grad_norm={each.max_grad_norm}, by which its step would clip "
                "once more. Leave max_grad_norm=None, or leave this call out."
            )
    if not optimizers or len({id(each) for each in optimizers}) != len(optimizers):
        raise ValueError(f"clip_grad_norm_: one or more different optimizers are required, got {len(optimizers)}")
    if len({each._skips_steps(each.param_groups) for each in optimizers}) != 1:
        raise ValueError(
            "clip_grad_norm_: nonfinite='skip-step' must be the same in all optimizers, because the norm decides for "
            "all of them together. Set it in all, or in none."
        )
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not 0 < max_norm < math.inf:
        raise ValueError(f"clip_grad_norm_: max_norm must be a number in (0, inf), got {max_norm!r}")


def _total(optimizers: list[FactoredOptimizer], groups: Any, caches: list[Any]) -> distributed.Total:
    """How the norm of these is added up, made once for as long as nothing changes."""
    key = [*optimizers[1:], *groups, *caches]
    known = _bound.get(optimizers[0])
    if known is not None and len(known[0]) == len(key) and all(map(_is, known[0], key)):
        return known[1]
    params = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    own = [mine for each in optimizers for mine in each._declared()]
    declared = [((*mine, *groups), some) for mine, some in own]
    rest = set(params).difference(*(some for _, some in own))
    declared.append((groups, [param for param in params if param in rest]))
    alone = [p for cache in caches for mine in cache.local for p in mine]
    total = distributed.Total(params, alone, declared)
    _bound[optimizers[0]] = key, total
    return total


def _is(one: Any, other: Any) -> bool:
    return one is other
