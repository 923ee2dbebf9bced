"""What is checked of an op's tensors before anything is written, read off `hfac.spec`. `hfac.functional` checks that
its own lists fit each other."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest
from operator import mul
from typing import Any

import torch
from torch import Tensor

from .. import backends, memory, rounding
from ..matricize import Block, sign_shape
from ..rounding import BitOffset
from ..spec import COLS, MASTER_LOW, ROWS, SIGNS, WHOLE, Op, Operand

PARAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOATING = frozenset(PARAM_DTYPES)
Tensors = Sequence[Tensor]


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Type of the arithmetic and of the states: float64 for float64 parameters, else float32."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises RuntimeError for a sparse or complex tensor, saying which (``name``) and what to do."""
    if tensor.layout != torch.strided:
        raise RuntimeError(
            f"{name} has layout {tensor.layout}; row and column sums need a dense tensor. Use sparse=False in the "
            "layer that makes it (nn.Embedding), call .to_dense() on it, or give that parameter to "
            "torch.optim.SparseAdam."
        )
    if tensor.is_complex():
        raise RuntimeError(
            f"{name} is complex ({tensor.dtype}); only real tensors are supported. Optimize "
            "torch.view_as_real(parameter) instead."
        )


def check_params(params: Tensors, name: str = "params", written: bool = True) -> None:
    for i, param in enumerate(params):
        check_tensor(f"{name}[{i}]", param)
        if param.dtype not in PARAM_DTYPES:
            raise ValueError(f"{name}[{i}] must be one of {names(PARAM_DTYPES)}, got {param.dtype}")
        if param.device != params[0].device:
            raise RuntimeError(f"{name}[{i}] is on {param.device}, but {name}[0] is on {params[0].device}")
        if written:
            check_writable(f"{name}[{i}]", param)


def check_writable(name: str, param: Tensor) -> None:
    """Raises RuntimeError for a parameter that torch's own operations would not write, before any of them finds out."""
    if param.is_inference():
        raise RuntimeError(
            f"{name} is an inference tensor, which nothing but inference mode may write. Make it outside of "
            "torch.inference_mode(), or train a clone of it that is made outside."
        )
    if param._is_zerotensor():
        raise RuntimeError(f"{name} is a ZeroTensor, which has no elements to be written. Train a clone of it.")
    if type(param) in memory.PLAIN and memory.overlaps_itself(param):
        raise RuntimeError(
            f"{name} of shape {tuple(param.shape)} and strides {param.stride()} has elements that share memory, as "
            "an expanded tensor has, so they cannot be updated one by one. Train the tensor that was expanded, or "
            "a clone."
        )


def check_lists(op: Op, params: Tensors, lists: Mapping[str, Tensors], counts: Mapping[str, Sequence[Any]]) -> None:
    """An op's lists, those given, read off its description. ``params`` are its gradients where it updates none."""
    for i, param in enumerate(params):
        wide = state_dtype(param.dtype) if op.updates else next(iter(lists.values()))[i].dtype
        if wide not in (torch.float32, torch.float64):
            raise ValueError(f"{next(iter(lists))}[{i}] must be float32 or float64, got {wide}")
        for operand in op.operands:
            if operand.name in lists:
                _check_entry(op, operand, i, param, lists[operand.name][i], wide)
    _check_factors(op, params, lists)
    for operand in op.operands:
        tensors = lists.get(operand.name)
        if tensors is not None and operand.size == WHOLE:
            _check_whole(operand.name, params, tensors)
        elif tensors is not None and operand.size == SIGNS:
            check_signs(operand.name, params, tensors, op.shard)
    if op.matrix is not None:
        {"cut": _check_cut, "square": _check_square}[op.matrix](params, *_factors_of(op, lists))
    if "blocks" in counts:
        _check_blocks(params, counts["blocks"], *_factors_of(op, lists))


def _check_entry(op: Op, operand: Operand, i: int, param: Tensor, tensor: Any, wide: torch.dtype) -> None:
    where, wanted = f"{operand.name}[{i}]", operand.dtype or wide
    if tensor is None:
        raise ValueError(f"{where} is None; {op.name} needs this state for every parameter")
    if tensor.dtype != wanted:
        raise ValueError(f"{where} must be {wanted} for a {param.dtype} parameter, got {tensor.dtype}")
    if tensor.device != param.device:
        raise RuntimeError(f"{where} must be on {param.device} like its parameter, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{where} must be contiguous, got strides {tensor.stride()}")


def _factors_of(op: Op, lists: Mapping[str, Tensors]) -> tuple[str, Tensors, Tensors]:
    """Of the second moment: the rows' name, rows and columns."""
    rows, cols = (next(s.name for s in op.states if (s.moment, s.size) == (2, size)) for size in (ROWS, COLS))
    return rows, lists[rows], lists[cols]


def _check_factors(op: Op, params: Tensors, lists: Mapping[str, Tensors]) -> None:
    """Rows times columns are the parameter's elements, and all lists agree on them; where ``blocks`` place a shard,
    they are the whole parameter's."""
    rows, cols = ([o.name for o in op.operands if o.size == size and o.name in lists] for size in (ROWS, COLS))
    what = "params" if op.updates else "grads"
    for i, param in enumerate(params):
        first: tuple[int, int] | None = None
        for row, col in zip_longest(rows, cols):
            m = lists[row][i].numel()
            n = lists[col][i].numel() if col else param.numel() // max(m, 1)
            first = first or (m, n)
            if (m, n) != first and "blocks" in op.counts:
                raise ValueError(
                    f"moments of params[{i}] must have {first[0]} rows and {first[1]} columns throughout, got {m} and "
                    f"{n} in {row}[{i}] and {col}[{i}]"
                )
            if "blocks" not in op.counts and ((m, n) != first or m * n != param.numel()):
                raise ValueError(
                    f"{row}[{i}] and {f'{col}[{i}]' if col else 'its columns'} have {m} and {n} elements, which do not "
                    f"make the {param.numel()} elements of {what}[{i}] of shape {tuple(param.shape)} as in its other "
                    "factors"
                )


def _check_cut(params: Tensors, name: str, rows: Tensors, cols: Tensors) -> None:
    """Rows are the leading dimensions of the parameter; only then do they mean what they meant when they were made."""
    for i, param in enumerate(params):
        m = rows[i].numel()
        if m not in accumulate(param.shape[:-1], mul):
            raise ValueError(
                f"{name}[{i}] has {m} elements, which no leading dimensions of params[{i}] of shape "
                f"{tuple(param.shape)} make; hfac.matricize.cut gives their number"
            )


def _check_square(params: Tensors, name: str, rows: Tensors, cols: Tensors) -> None:
    for i in range(len(params)):
        n, m = rows[i].numel(), cols[i].numel()
        if n < m:
            raise ValueError(
                f"{name}[{i}] must be the longer factor, got {n} rows and {m} columns; "
                "hfac.matricize.square gives (rows, columns)"
            )


def _check_blocks(params: Tensors, blocks: Sequence[Sequence[Block]], name: str, rows: Tensors, cols: Tensors) -> None:
    for i, (param, mine) in enumerate(zip(params, blocks, strict=True)):
        n, m = rows[i].numel(), cols[i].numel()
        if sum(block.rows * block.cols for block in mine) != param.numel() or any(
            block.row + (block.rows - 1) * block.row_step >= n or block.col + block.cols > m for block in mine
        ):
            raise ValueError(
                f"blocks[{i}] must place the {param.numel()} elements of params[{i}] in a matrix of {n} rows and {m} "
                "columns"
            )


def _check_whole(name: str, params: Tensors, tensors: Tensors) -> None:
    for i, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
        if tensor.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] must have its parameter's shape {tuple(param.shape)}, got {tuple(tensor.shape)}"
            )


def check_signs(name: str, params: Tensors, signs: Tensors, shard: bool) -> None:
    for i, (param, sign) in enumerate(zip(params, signs, strict=True)):
        if shard and not param.numel():  # a rank may have nothing of a parameter
            continue
        if param.ndim == 0 or tuple(sign.shape) != sign_shape(param.shape):
            wanted = sign_shape(param.shape) if param.ndim else "none: a scalar's moments are kept whole"
            raise ValueError(
                f"{name}[{i}] for a parameter of shape {tuple(param.shape)} must have shape {wanted}, "
                f"got {tuple(sign.shape)}"
            )


def check_lows(params: Tensors, lows: Tensors) -> None:
    dtypes = tuple(rounding.LOW_DTYPES.values())
    for i, (param, low) in enumerate(zip(params, lows, strict=True)):
        if param.dtype != torch.bfloat16 or low.dtype not in dtypes or low.shape != param.shape:
            raise ValueError(
                f"{MASTER_LOW.name}[{i}] must be {names(dtypes)} of the shape of a bfloat16 parameter, got {low.dtype} "
                f"{tuple(low.shape)} for {param.dtype} {tuple(param.shape)}"
            )
        if low.device != param.device:
            raise RuntimeError(f"{MASTER_LOW.name}[{i}] must be on {param.device} like its parameter, got {low.device}")
    if len({low.dtype for low in lows}) > 1:
        found = names(sorted({low.dtype for low in lows}, key=str))
        raise ValueError(f"{MASTER_LOW.name} must be of one type, got {found}")


def check_places(params: Tensors, places: Sequence[BitOffset]) -> None:
    if len(places) != len(params):
        raise ValueError(f"places must have one entry per parameter ({len(params)}), got {len(places)}")
    for i, (param, place) in enumerate(zip(params, places, strict=True)):
        if param.dtype not in rounding.DTYPES:
            raise ValueError(f"params[{i}] must be {names(rounding.DTYPES)} to be rounded, got {param.dtype}")
        if not 0 <= place.position < 2**32 or place.first < 0:
            raise ValueError(f"places[{i}] must have an unsigned 32-bit position and a first >= 0, got {place}")
        if place.strides is not None and (len(place.strides) != param.ndim or min(place.strides, default=0) < 0):
            raise ValueError(f"places[{i}] must have a stride >= 0 for each of {param.ndim} dimensions, got {place}")


def choose(backend: str, device: torch.device, reason: str | None, op: Op) -> Any:
    """The backend, `backends.resolve`; with a ``reason`` why memory cannot be read and written, the reference, which
    leaves that to torch's operations."""
    if reason is None or backend == "reference":
        return backends.found(backend, device, op)
    if backend == "auto":
        return backends.found("reference", device, op)
    backends.found(backend, device, op)
    raise RuntimeError(
        f"backend={backend!r} was asked for, whose kernels read and write memory, but {reason}. Use backend='auto' or "
        "'reference', which step such tensors through torch's operations."
    )


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
