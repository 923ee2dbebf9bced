"""Steps on parts of parameters, whose wholes lie on several ranks (`hfac.distributed`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, memory
from ..matricize import Block
from ..rounding import Place
from ..schedules import Scalar
from .checks import (
    FLOATING,
    LOWS,
    PARAM_DTYPES,
    Tensors,
    check_lows,
    check_places,
    check_signs,
    check_stores,
    check_tensor,
    check_writable,
    checked_list,
    choose,
    names,
    state_dtype,
)

#: Ops on parts of parameters, whose wholes lie on several ranks (`hfac.distributed`).
PART_OPS = {"hfac": ("hfac_sums", "hfac_apply_"), "smmf": ("smmf_sums_step_",)}
_HOST = torch.device("cpu")


def hfac_sums(
    grads: Tensors,
    old_rows: Tensors,
    row_sums: Tensors,
    new_rows: Tensors,
    col_sums: Tensors | None = None,
    col_squares: Tensors | None = None,
    col_ratios: Tensors | None = None,
    *,
    cols: Sequence[int],
    beta2: Scalar,
    eps: float,
    backend: str = "auto",
) -> None:
    """Fills the lists of sums with what one read of parts [m, n] of gradients gives; row lists are [m], column lists
    [n]."""
    rows = {"old_rows": old_rows, "row_sums": row_sums, "new_rows": new_rows}
    columns = {"col_sums": col_sums, "col_squares": col_squares, "col_ratios": col_ratios}
    if {value is None for value in columns.values()} == {False, True}:
        raise ValueError("col_sums, col_squares and col_ratios must be given together, or none of them")
    given = {name: tensors for name, tensors in columns.items() if tensors is not None}
    _check_parts(grads, {"cols": cols}, {**rows, **given}, [old.dtype for old in old_rows])
    for i, grad in enumerate(grads):
        if old_rows[i].dtype not in (torch.float32, torch.float64) or grad.dtype not in PARAM_DTYPES:
            raise ValueError(f"sums of {grad.dtype} in {old_rows[i].dtype} (old_rows[{i}]) are not to be had")
        for name, tensors in rows.items():
            if tensors[i].numel() != old_rows[i].numel():
                raise ValueError(
                    f"{name}[{i}] must have the {old_rows[i].numel()} elements of old_rows[{i}], got "
                    f"{tensors[i].numel()}"
                )
        for name, tensors in given.items():
            if tensors[i].numel() * old_rows[i].numel() != grad.numel():
                raise ValueError(
                    f"{name}[{i}] of {tensors[i].numel()} and old_rows[{i}] of {old_rows[i].numel()} elements do not "
                    f"make the {grad.numel()} of grads[{i}]"
                )
    op, grads = _part_op("hfac_sums", grads, {}, backend)
    op(grads, **rows, **columns, cols=cols, beta2=beta2, eps=eps)


def hfac_apply_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors,
    exp_avg_cols: Tensors,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    row_sums: Tensors,
    new_rows: Tensors,
    col_sums: Tensors,
    new_cols: Tensors,
    totals: Tensor,
    mean_squares: Tensor,
    *,
    rows: Sequence[int],
    cols: Sequence[int],
    lr: Scalar,
    beta1: Scalar,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """The rest of a step of H-Fac on parts [m, n] of matrices of `rows` rows and `cols` columns, whose sums are known.
    Row lists are [m], column lists [n], totals and mean_squares [len(params)]."""
    by_row = dict(exp_avg_rows=exp_avg_rows, exp_avg_sq_rows=exp_avg_sq_rows, row_sums=row_sums, new_rows=new_rows)
    by_col = dict(exp_avg_cols=exp_avg_cols, exp_avg_sq_cols=exp_avg_sq_cols, col_sums=col_sums, new_cols=new_cols)
    lists = {"rows": rows, "cols": cols, "grads": grads, "totals": totals, "mean_squares": mean_squares}
    _check_writable(params)
    _check_parts(params, lists, {**by_row, **by_col}, [state_dtype(param.dtype) for param in params])
    _check_part_grads(params, grads)
    for i, param in enumerate(params):
        sizes = {tensors[i].numel() for tensors in by_row.values()}, {tensors[i].numel() for tensors in by_col.values()}
        if max(map(len, sizes)) > 1 or sizes[0].pop() * sizes[1].pop() != param.numel():
            raise ValueError(
                f"rows and columns of the lists' entries {i} do not agree with each other and with the "
                f"{param.numel()} elements of params[{i}]"
            )
    op, grads = _part_op("hfac_apply_", grads, {"params": params}, backend)
    op(
        params,
        grads,
        **by_row,
        **by_col,
        totals=totals,
        mean_squares=mean_squares,
        rows=rows,
        cols=cols,
        lr=lr,
        beta1=beta1,
        clip_threshold=clip_threshold,
        weight_decay=weight_decay,
        maximize=maximize,
        **_stored(params, master_lows, places, seed, step, backend),
    )


def smmf_sums_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors | None,
    exp_avg_cols: Tensors | None,
    exp_avg_signs: Tensors | None,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    new_rows: Tensors | None,
    new_cols: Tensors | None,
    new_sq_rows: Tensors,
    new_sq_cols: Tensors,
    *,
    blocks: Sequence[Sequence[Block]],
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    backend: str = "auto",
) -> None:
    """One step of SMMF on parts of parameters that lie in the whole's square matrix [n, m] as `blocks` say. The whole's
    factors, [n] and [m], are read; sums over the part are added to the new ones. beta1 None: no first moment, and its
    five lists are None."""
    second = dict(
        exp_avg_sq_rows=exp_avg_sq_rows,
        exp_avg_sq_cols=exp_avg_sq_cols,
        new_sq_rows=new_sq_rows,
        new_sq_cols=new_sq_cols,
    )
    first = {
        "exp_avg_rows": exp_avg_rows,
        "exp_avg_cols": exp_avg_cols,
        "exp_avg_signs": exp_avg_signs,
        "new_rows": new_rows,
        "new_cols": new_cols,
    }
    if {tensors is None for tensors in first.values()} != {beta1 is None}:
        raise ValueError("lists of the first moment are required exactly where beta1 is not None")
    given = {name: tensors for name, tensors in first.items() if tensors is not None}
    states = {**second, **given}
    signs = states.pop("exp_avg_signs", None)
    _check_writable(params)
    _check_parts(params, {"grads": grads, "blocks": blocks}, states, [state_dtype(param.dtype) for param in params])
    _check_part_grads(params, grads)
    if signs is not None:
        _check_parts(params, {}, {"exp_avg_signs": signs}, [torch.uint8] * len(params))
        held = [i for i, param in enumerate(params) if param.numel()]
        check_signs([params[i] for i in held], [signs[i] for i in held])
    for i, param in enumerate(params):
        n, m = exp_avg_sq_rows[i].numel(), exp_avg_sq_cols[i].numel()
        if any(tensors[i].numel() != (n if "rows" in name else m) for name, tensors in states.items()):
            raise ValueError(f"moments of params[{i}] must have {n} rows and {m} columns throughout")
        if sum(block.rows * block.cols for block in blocks[i]) != param.numel() or any(
            block.row + (block.rows - 1) * block.row_step >= n or block.col + block.cols > m for block in blocks[i]
        ):
            raise ValueError(
                f"blocks[{i}] must place the {param.numel()} elements of params[{i}] in a matrix of {n} rows and {m} "
                "columns"
            )
    op, grads = _part_op("smmf_sums_step_", grads, {"params": params}, backend)
    op(
        params,
        grads,
        **second,
        **first,
        blocks=blocks,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        **_stored(params, master_lows, places, seed, step, backend),
    )


def hfac_dense_squares(grads: Tensors, exp_avg_sqs: Tensors, *, beta2: Scalar, eps: float) -> list[Tensor]:
    """Sums of U^2 over parts of vectors. In plain torch with every backend: vectors are few."""
    return backends.TABLE["reference"].load().hfac_dense_squares(grads, exp_avg_sqs, beta2=beta2, eps=eps)


def hfac_dense_apply_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, mean_squares: Tensor, **scalars: Any
) -> None:
    """`hfac_dense_step_` on parts of vectors whose means of U^2 are known, in plain torch likewise."""
    step = backends.TABLE["reference"].load().hfac_dense_step_
    step(params, grads, exp_avgs, exp_avg_sqs, mean_squares=mean_squares, **scalars)


def nonfinite(grads: Tensors, elements: Sequence[int]) -> Tensor:
    """int32 [len(grads)]: 1 where a gradient that is part of a tensor of so many elements must be refused, by the rule
    of `hfac.reference`. Nothing of a gradient's size is made."""
    flags = torch.zeros(len(grads), dtype=torch.int32, device=grads[0].device if grads else _HOST)
    for i, grad in enumerate(grads):
        if grad.numel():
            largest = torch.stack(torch.aminmax(grad)).to(state_dtype(grad.dtype))
            flags[i] = ~(largest * largest * elements[i]).isfinite().all()
    return flags


def _part_op(op: str, grads: Tensors, written: dict[str, Tensors], backend: str) -> tuple[Callable[..., None], Tensors]:
    """The backend's op, and gradients that it may read."""
    lists = {"grads": grads, **written}
    reason = None
    zeros = any(map(Tensor._is_zerotensor, grads))
    if zeros or memory.bypassed() or not all(map(memory.plain, lists.values())):
        grads = lists["grads"] = memory.materialized(grads)
        reason = memory.reason(lists)
    return getattr(choose(backend, grads[0].device if grads else _HOST, reason, op), op), grads


def _stored(
    params: Tensors,
    master_lows: Tensors | None,
    places: Sequence[Place] | None,
    seed: int,
    step: Scalar,
    backend: str,
) -> dict[str, Any]:
    """What a backend's op on parts is told of how parameters are stored, checked."""
    found: dict[str, Any] = {}
    if master_lows is not None:
        found[LOWS] = master_lows
        check_lows(params, checked_list(LOWS, master_lows, "a part op", len(params)))
    if places is not None:
        found.update(places=places, seed=seed, step=step)
        check_places(params, places, master_lows)
    if found and params:
        check_stores(backend, params[0].device)
    return found


def _check_parts(
    tensors: Tensors,
    lists: Mapping[str, Sequence[Any] | Tensor],
    states: Mapping[str, Tensors],
    dtypes: Sequence[torch.dtype],
) -> None:
    for name, entries in {**lists, **states}.items():
        if len(entries) != len(tensors):
            raise ValueError(f"{name} must have one entry per parameter ({len(tensors)}), got {len(entries)}")
    for i, tensor in enumerate(tensors):
        check_tensor(f"part {i}", tensor)
        for name, entries in states.items():
            if not entries[i].is_contiguous() or entries[i].device != tensor.device:
                raise ValueError(f"{name}[{i}] must be contiguous and on {tensor.device}")
            if entries[i].dtype != dtypes[i]:
                raise ValueError(f"{name}[{i}] must be {dtypes[i]}, got {entries[i].dtype}")


def _check_writable(params: Tensors) -> None:
    for i, param in enumerate(params):
        check_writable(f"params[{i}]", param)


def _check_part_grads(params: Tensors, grads: Tensors) -> None:
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check_tensor(f"grads[{i}]", grad)
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"grads[{i}] must have its parameter's shape {tuple(param.shape)} and device {param.device}, got "
                f"{tuple(grad.shape)} on {grad.device}"
            )
        if {param.dtype, grad.dtype} - FLOATING:
            raise ValueError(f"params[{i}] and grads[{i}] must be of {names(PARAM_DTYPES)}")
