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


def check_length(name: str, entries: Sequence[Any] | None, count: int) -> None:
    """Raises ValueError unless a list has one entry per parameter."""
    if entries is None or len(entries) != count:
        found = "none" if entries is None else len(entries)
        raise ValueError(f"{name} must have one entry per parameter ({count}), got {found}")


def check_grads(params: Tensors, grads: Tensors) -> None:
    check_length("grads", grads, len(params))
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check_tensor(f"grads[{i}]", grad)
        if grad.dtype not in PARAM_DTYPES:
            raise ValueError(f"grads[{i}] must be one of {names(PARAM_DTYPES)}, got {grad.dtype}")
        if grad.shape != param.shape:
            raise ValueError(
                f"grads[{i}] must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
            )
        if grad.device != param.device:
            raise RuntimeError(
                f"params[{i}] is on {param.device} and grads[{i}] on {grad.device}, expected both on {param.device}"
            )


def check_operands(operands: backends.Operands) -> None:
    """Everything that an op is bound to, but for the lengths of its lists."""
    op, params = operands.op, operands.params
    _check_params(params, "params" if op.updates else "grads", op.updates)
    given = [operand for operand in op.operands if operand.name in operands.lists]
    for i, param in enumerate(params):
        _check_lists(op, given, i, param, operands.lists)
        if op.matrix is not None or "blocks" in operands.counts:
            _check_matrix(op, i, param, operands)
    if operands.lows is not None:
        _check_lows(params, operands.lows)
    if operands.places is not None:
        _check_places(params, operands.places)


def _check_params(params: Tensors, name: str, written: bool) -> None:
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


def _check_lists(op: Op, given: Sequence[Operand], i: int, param: Tensor, lists: Mapping[str, Tensors]) -> None:
    """A parameter's entries of the lists that are given; of an op that updates none, those of its gradient."""
    wide = state_dtype(param.dtype) if op.updates else next(iter(lists.values()))[i].dtype
    if wide not in (torch.float32, torch.float64):
        raise ValueError(f"{next(iter(lists))}[{i}] must be float32 or float64, got {wide}")
    for operand in given:
        where, tensor, wanted = f"{operand.name}[{i}]", lists[operand.name][i], operand.dtype or wide
        if tensor is None:
            raise ValueError(f"{where} is None; {op.name} needs this state for every parameter")
        if tensor.dtype != wanted:
            raise ValueError(f"{where} must be {wanted} for a {param.dtype} parameter, got {tensor.dtype}")
        if tensor.device != param.device:
            raise RuntimeError(f"{where} must be on {param.device} like its parameter, got {tensor.device}")
        if not tensor.is_contiguous() and not (op.shard and operand.size == WHOLE):  # parts are turned as matrices are
            raise ValueError(f"{where} must be contiguous, got strides {tensor.stride()}")
    _check_factors(op, given, i, param, lists)
    for operand in given:
        where, shape = f"{operand.name}[{i}]", tuple(lists[operand.name][i].shape)
        if operand.size == WHOLE and shape != param.shape:
            raise ValueError(f"{where} must have its parameter's shape {tuple(param.shape)}, got {shape}")
        absent = op.shard and not param.numel()  # a rank may have nothing of a parameter
        if operand.size == SIGNS and not absent and (param.ndim == 0 or shape != sign_shape(param.shape)):
            needed = sign_shape(param.shape) if param.ndim else "none: a scalar's moments are kept whole"
            raise ValueError(
                f"{where} for a parameter of shape {tuple(param.shape)} must have shape {needed}, got {shape}"
            )


def _check_factors(op: Op, given: Sequence[Operand], i: int, param: Tensor, lists: Mapping[str, Tensors]) -> None:
    """Rows times columns are the parameter's elements, and all lists agree on them; where ``blocks`` place a shard,
    they are the whole parameter's."""
    rows, cols = ([operand.name for operand in given if operand.size == size] for size in (ROWS, COLS))
    first: tuple[int, int] | None = None
    for row, col in zip_longest(rows, cols):
        m = lists[row][i].numel()
        n = lists[col][i].numel() if col else param.numel() // max(m, 1)
        first = first or (m, n)
        if (m, n) != first and "blocks" in op.counts:
            raise ValueError(
                f"moments of params[{i}] must have {first[0]} rows and {first[1]} columns throughout, got {m} and {n} "
                f"in {row}[{i}] and {col}[{i}]"
            )
        if "blocks" not in op.counts and ((m, n) != first or m * n != param.numel()):
            raise ValueError(
                f"{row}[{i}] and {f'{col}[{i}]' if col else 'its columns'} have {m} and {n} elements, which do not "
                f"make the {param.numel()} elements of {'params' if op.updates else 'grads'}[{i}] of shape "
                f"{tuple(param.shape)} as in its other factors"
            )


def _check_matrix(op: Op, i: int, param: Tensor, operands: backends.Operands) -> None:
    """The second moment's rows and columns are those of the matrix as which the op sees a parameter."""
    name, other = (state.name for size in (ROWS, COLS) if (state := op.operand(2, size)) is not None)
    rows, cols = (operands.lists[each][i].numel() for each in (name, other))
    # Rows are the leading dimensions of the parameter; only then do they mean what they meant when they were made.
    if op.matrix == "cut" and rows not in accumulate(param.shape[:-1], mul):
        raise ValueError(
            f"{name}[{i}] has {rows} elements, which no leading dimensions of params[{i}] of shape "
            f"{tuple(param.shape)} make; hfac.matricize.cut gives their number"
        )
    if op.matrix == "square" and rows < cols:
        raise ValueError(
            f"{name}[{i}] must be the longer factor, got {rows} rows and {cols} columns; "
            "hfac.matricize.square gives (rows, columns)"
        )
    blocks: Sequence[Block] = operands.counts["blocks"][i] if "blocks" in operands.counts else ()
    placed = sum(block.rows * block.cols for block in blocks)
    inside = all(b.row + (b.rows - 1) * b.row_step < rows and b.col + b.cols <= cols for b in blocks)
    if "blocks" in operands.counts and (placed != param.numel() or not inside):
        raise ValueError(
            f"blocks[{i}] must place the {param.numel()} elements of params[{i}] in a matrix of {rows} rows and {cols} "
            "columns"
        )


def _check_lows(params: Tensors, lows: Tensors) -> None:
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


def _check_places(params: Tensors, places: Sequence[BitOffset]) -> None:
    check_length("places", places, len(params))
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
