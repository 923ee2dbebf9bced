"""What the extension is told of tensors, by its arguments' names: addresses, sizes, strides and codes of types."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..spec import COLS, ROWS, SIGNS, WHOLE
from .contract import Operands

Tensors = Sequence[Tensor]

#: The codes of csrc/common/math/storage.h.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_DTYPE = attrgetter("dtype")


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def numels(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.numel, tensors))


def codes(tensors: Tensors) -> int | list[int]:
    """One code where all tensors have one type, else one code each."""
    dtypes = list(map(_DTYPE, tensors))
    if dtypes and dtypes.count(dtypes[0]) == len(dtypes):
        return CODES[dtypes[0]]
    return [CODES[dtype] for dtype in dtypes]


def strides(tensors: Iterable[Tensor]) -> list[tuple[int, ...] | None]:
    return [None if tensor.is_contiguous() else tensor.stride() for tensor in tensors]


def shapes(tensors: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """What strides need with them."""
    return [tuple(tensor.shape) for tensor in tensors]


def of_grads(grads: Tensors) -> dict[str, Any]:
    found: dict[str, Any] = {"grads": addresses(grads), "grad_dtypes": codes(grads)}
    if not all(map(Tensor.is_contiguous, grads)):
        found.update(grad_strides=strides(grads), shapes=shapes(grads))
    return found


def of_operands(operands: Operands) -> dict[str, Any]:
    """Parameters and how they are stored, an op's lists, None for those that it goes without, the sizes of its
    matrices, and how sign bits and codes lie."""
    op, lists, params = operands.op, operands.lists, operands.params
    found: dict[str, Any] = {
        operand.name: addresses(lists[operand.name]) if operand.name in lists else None for operand in op.operands
    }
    found["numels"] = numels(params)
    if op.updates:
        found |= {"params": addresses(params), "param_dtypes": codes(params)} | of_storage(operands)
        if not all(map(Tensor.is_contiguous, params)):
            found["param_strides"] = strides(params)
    else:
        found["state_dtypes"] = codes(next(iter(lists.values())))
    for size in (ROWS, COLS) if op.updates else (ROWS,):
        one = next((operand.name for operand in op.operands if operand.size == size and operand.name in lists), None)
        if one is not None:
            found[size] = numels(lists[one])
    for operand in op.operands:
        if operand.size == SIGNS:
            signs = lists.get(operand.name)
            found["sign_bytes"] = None if signs is None else numels(signs)
            found["sign_slices"] = None if signs is None else [sign.shape[0] for sign in signs]
        elif operand.size == WHOLE and op.shard and not all(map(Tensor.is_contiguous, lists.get(operand.name, ()))):
            found["code_strides"] = strides(lists[operand.name])
    for name, entries in operands.counts.items():
        found[f"whole_{name}" if name in (ROWS, COLS) else name] = entries
    if not found.keys().isdisjoint(("param_strides", "low_strides", "code_strides", "places")):
        found["shapes"] = shapes(params)
    return found


def of_storage(operands: Operands) -> dict[str, Any]:
    """Lower pieces of master weights, and where random bits come from."""
    found: dict[str, Any] = {}
    lows = operands.lows
    if lows is not None:
        found.update(master_lows=addresses(lows), low_bytes=lows[0].element_size())
        if not all(map(Tensor.is_contiguous, lows)):
            found["low_strides"] = strides(lows)
    if operands.places is not None:
        found["places"] = list(operands.places)
    return found
