"""Steps on parts of parameters whose wholes lie on several ranks, over whole lists.

Nothing is bound: what a sharded step reads and writes lies elsewhere every time. Tilings and tables of tiles are kept
by shapes and types; addresses and numbers of a call go to the device in one copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import table
from .plan import Item, Plan, make_plan, square_slice
from .step import (
    SPACES,
    STATES,
    Launcher,
    Layouts,
    Place,
    Scalar,
    Tensors,
    capturing,
    copy_tensors,
    current,
    host_memory,
    make_record,
    seed_words,
    stream_of,
    tile_tables,
)

_SPACE_FIELDS = [field.value for field in SPACES.values()]
#: Where records have the addresses of lists that only parts have.
_LISTS = {
    "hfac_sums": {
        "old_rows": table.SECOND_ROW,
        "row_sums": table.SPACE_ROWS,
        "new_rows": table.SPACE_SQUARES,
        "col_sums": table.SUM_COL,
        "col_squares": table.NEW_COL,
        "col_ratios": table.RATIO_COL,
    },
    "hfac_apply_": {
        "row_sums": table.SUM_ROW,
        "new_rows": table.NEW_ROW,
        "col_sums": table.SUM_COL,
        "new_cols": table.NEW_COL,
    },
    "smmf_sums_step_": {
        "new_rows": table.SUM_ROW,
        "new_cols": table.SUM_COL,
        "new_sq_rows": table.NEW_ROW,
        "new_sq_cols": table.NEW_COL,
    },
}

Fields = dict[int, list[int]]  # of records: values by field


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
) -> None:
    """The function of `hfac.reference`."""
    grads = _resolved(grads)
    items = []
    for i, grad in enumerate(grads):
        m = old_rows[i].numel()
        n = grad.numel() // max(m, 1)
        items.append(
            Item(m, n, old_rows[i].dtype, grad.dtype, _aligned(grad) and n % 8 == 0, all_rows=m, all_cols=cols[i])
        )
    rows = {"old_rows": old_rows, "row_sums": row_sums, "new_rows": new_rows}
    columns = {"col_sums": col_sums, "col_squares": col_squares, "col_ratios": col_ratios}
    op = "hfac_row_sums" if col_sums is None else "hfac_sums"
    _Call(
        op,
        items,
        _addresses(_LISTS["hfac_sums"], {**rows, **columns}),
        [],
        grads,
        [0.0, 0.0, eps, 0.0],
        (0.0, beta2),
        {},
        _Stored(),
    )


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
    maximize: bool,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
) -> None:
    """The function of `hfac.reference`."""
    grads = _resolved(grads)
    stored = _Stored(master_lows, places, seed, step)
    items = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        m, n = exp_avg_rows[i].numel(), exp_avg_cols[i].numel()
        whole = _aligned(param) and _aligned(grad) and stored.aligned(i) and n % 8 == 0
        items.append(Item(m, n, param.dtype, grad.dtype, whole, all_rows=rows[i], all_cols=cols[i]))
    fields = _addresses(
        STATES | _LISTS["hfac_apply_"],
        {
            "exp_avg_rows": exp_avg_rows,
            "exp_avg_cols": exp_avg_cols,
            "exp_avg_sq_rows": exp_avg_sq_rows,
            "exp_avg_sq_cols": exp_avg_sq_cols,
            "row_sums": row_sums,
            "new_rows": new_rows,
            "col_sums": col_sums,
            "new_cols": new_cols,
        },
    )
    # In the type of each parameter's arithmetic. Where that makes new tensors, they must live until the launches.
    by_type = {wide: [t.to(wide).contiguous() for t in (totals, mean_squares)] for wide in {it.wide for it in items}}
    for place, field in enumerate((table.TOTAL, table.MEAN_SQUARE)):
        fields[field.value] = [
            by_type[item.wide][place].data_ptr() + i * item.wide.itemsize for i, item in enumerate(items)
        ]
    options = {"NEGATE": maximize, "CLIPPED": clip_threshold is not None}
    scalars = [lr, weight_decay, 0.0, clip_threshold or 0.0]
    _Call("hfac_apply_", items, fields, params, grads, scalars, (beta1, 0.0), options, stored)


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
    blocks: Sequence[Sequence[Sequence[int]]],
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool,
    maximize: bool,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
) -> None:
    """The function of `hfac.reference`. A record is a block's."""
    grads = _resolved(grads)
    stored = _Stored(master_lows, places, seed, step)
    items = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        n, m = exp_avg_sq_rows[i].numel(), exp_avg_sq_cols[i].numel()
        slice = 0 if exp_avg_signs is None else square_slice(param.shape)
        aligned = _aligned(param) and _aligned(grad) and stored.aligned(i)
        aligned = aligned and (exp_avg_signs is None or _aligned(exp_avg_signs[i]))
        for start, stride, row, row_step, col, block_rows, block_cols in blocks[i]:
            if block_rows * block_cols == 0:
                continue
            item = Item(
                block_rows, block_cols, param.dtype, grad.dtype,
                slice=slice, owner=i, start=start, stride=stride, row=row, row_step=row_step, col=col,
                all_rows=n, all_cols=m,
            )  # fmt: skip
            vectors = all(length % 8 == 0 for length in (start, stride, block_cols))
            item.whole = aligned and vectors and item.signs != table.SHARED_BYTES.value
            items.append(item)
    owners = [item.owner for item in items]
    second = {"exp_avg_sq_rows": exp_avg_sq_rows, "exp_avg_sq_cols": exp_avg_sq_cols}
    second |= {"new_sq_rows": new_sq_rows, "new_sq_cols": new_sq_cols}
    first = {"exp_avg_rows": exp_avg_rows, "exp_avg_cols": exp_avg_cols, "exp_avg_signs": exp_avg_signs}
    first |= {"new_rows": new_rows, "new_cols": new_cols}
    whole = _addresses(STATES | _LISTS["smmf_sums_step_"], {**second, **first})
    fields = {field: [column[i] for i in owners] for field, column in whole.items()}
    for field, place in (
        (table.FIRST_ROW, "row"),
        (table.SECOND_ROW, "row"),
        (table.FIRST_COL, "col"),
        (table.SECOND_COL, "col"),
    ):
        if field.value in fields:
            fields[field.value] = [
                address + getattr(item, place) * item.wide.itemsize
                for address, item in zip(fields[field.value], items, strict=True)
            ]
    options = {"FIRST": beta1 is not None, "COUPLED": not decoupled_weight_decay, "NEGATE": maximize}
    decays = [_of_each(beta, owners) for beta in (0.0 if beta1 is None else beta1, beta2)]
    _Call(
        "smmf_sums_step_",
        items,
        fields,
        [params[i] for i in owners],
        [grads[i] for i in owners],
        [lr, weight_decay, eps, 0.0],
        decays,
        options,
        _Stored(
            *(None if entries is None else [entries[i] for i in owners] for entries in (master_lows, places)),
            seed,
            _of_each(step, owners),
        ),
    )


@dataclass
class _Stored:
    """How parameters are stored, as `hfac.reference` says."""

    lows: Tensors | None = None
    places: Sequence[Place] | None = None
    seed: int = 0
    step: Scalar = 0.0

    def aligned(self, i: int) -> bool:
        return self.lows is None or _aligned(self.lows[i])

    def fields(self, items: Sequence[Item], params: Tensors, layouts: Layouts) -> tuple[Fields, Fields]:
        """For the records, by field: values, and where in ``layouts`` there is more. The items are told, too."""
        values: Fields = {}
        starts: Fields = {}
        if self.lows is not None:
            values[table.LOW_PIECE.value] = list(map(Tensor.data_ptr, self.lows))
            starts[table.LOW_LAYOUT.value] = list(map(layouts.of, self.lows))
            for item, low in zip(items, self.lows, strict=True):
                item.low = 8 * low.itemsize
        if self.places is not None:
            values[table.POSITION.value], values[table.FIRST_INDEX.value] = (
                [place[k] for place in self.places] for k in range(2)
            )
            starts[table.PLACE_LAYOUT.value] = [
                layouts.of_place(item, param.shape, place)
                for item, param, place in zip(items, params, self.places, strict=True)
            ]
        return values, starts


class _Call(Launcher):
    """An op on these items, at once.

    Args:
        fields: addresses for the records, by field.
        params, grads: of each item; no parameters where only gradients are read.
        numbers: what stands first among a step's (`table`).
    """

    def __init__(
        self,
        op: str,
        items: Sequence[Item],
        fields: Fields,
        params: Tensors,
        grads: Tensors,
        numbers: Sequence[Scalar],
        decays: Sequence[Scalar],
        options: dict[str, bool],
        stored: _Stored,
    ) -> None:
        if not items:
            return
        self.device = grads[0].device
        if capturing(self.device):
            raise RuntimeError(
                "an op on parts of parameters brings its tables from the host in every call, and cannot be part of the "
                "CUDA graph that is being captured. Step sharded parameters outside of graphs."
            )
        layouts = Layouts()
        values, starts = stored.fields(items, params, layouts)
        fields = {**fields, **values}
        if params:
            fields[table.PARAM.value] = list(map(Tensor.data_ptr, params))
            starts[table.PARAM_LAYOUT.value] = list(map(layouts.of, params))
        own = [*decays, stored.step, 0.0]
        with current(self.device):
            plan, records, tiles = _planned(op, self.device, stream_of(self.device), tuple(map(_key, items)))
            if not plan.launches:
                return
            workspace = torch.empty(max(plan.workspace, 16), dtype=torch.uint8, device=self.device)
            self.flags = torch.empty(1, dtype=torch.int32, device=self.device)  # of steps that skip nothing, unread
            records = records.clone()
            records[:, _SPACE_FIELDS] += workspace.data_ptr()
            self._to_device(records, fields, starts, layouts, grads, numbers, stored.seed, own)
            options = dict.fromkeys(("SKIP", "LOOK", "SCALED", "AGAIN", "WATCH"), False) | options
            for launch, mine in zip(plan.launches, tiles, strict=True):
                self._launch(launch, mine, options)

    def _to_device(
        self,
        records: Tensor,
        fields: Fields,
        starts: Fields,
        layouts: Layouts,
        grads: Tensors,
        numbers: Sequence[Scalar],
        seed: int,
        own: Sequence[Scalar],
    ) -> None:
        grad_layouts = list(map(layouts.of, grads))
        numbers, own = list(map(_on_host, numbers)), list(map(_on_host, own))
        each = any(isinstance(value, list) or (isinstance(value, Tensor) and value.ndim == 1) for value in own)
        values = [0.0 if isinstance(value, Tensor) else value for value in numbers]
        shared, of_each = [], []
        for value in own:
            shared.append(0.0 if isinstance(value, (list, Tensor)) else value)
            of_each.append(value if isinstance(value, list) else [shared[-1]] * (len(grads) if each else 0))
        values += [float(each), *seed_words(seed), 1.0, 1.0, *shared]
        values += [value for mine in zip(*of_each, strict=True) for value in mine]

        # Each table begins at a multiple of 16 bytes, for which Triton compiles.
        sizes = [size + size % 2 for size in (records.numel(), 2 * len(grads), len(values), len(layouts.numbers))]
        device = torch.empty(sum(sizes), dtype=torch.int64, device=self.device)
        self.items, self.grad_table, scalars, layout_table = device.split(sizes)
        self.scalars = scalars.view(torch.float64)[: len(values)]

        base = layout_table.data_ptr()
        fields = fields | {field: [base + 8 * start for start in mine] for field, mine in starts.items()}
        records[:, list(fields)] = torch.tensor(list(fields.values()), dtype=torch.int64, device="cpu").T
        places = [
            x for grad, start in zip(grads, grad_layouts, strict=True) for x in (grad.data_ptr(), base + 8 * start)
        ]
        host = host_memory(self.device, sum(sizes))
        for to, table_ in zip(
            host.split(sizes),
            (
                records.view(-1),
                torch.tensor(places, dtype=torch.int64, device="cpu"),
                torch.tensor(values, dtype=torch.float64, device="cpu").view(torch.int64),
                torch.tensor(layouts.numbers, dtype=torch.int64, device="cpu"),
            ),
            strict=True,
        ):
            to[: len(table_)] = table_
        device.copy_(host, non_blocking=True)
        copy_tensors(self.scalars, numbers, own, each)


def _key(item: Item) -> tuple[Any, ...]:
    """What a plan depends on."""
    return (
        item.rows, item.cols, item.param, item.grad, item.whole, item.slice, item.owner,
        item.start, item.stride, item.row, item.row_step, item.col, item.all_rows, item.all_cols,
        item.stochastic, item.low,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _planned(
    op: str, device: torch.device, stream: Any, keys: tuple[tuple[Any, ...], ...]
) -> tuple[Plan, Tensor, list[Tensor]]:
    """The plan, records without addresses, whose workspace is at 0, on the host, and the tables of tiles, which only
    this stream reads: they may be freed while it does."""
    items = [Item(*key) for key in keys]
    plan = make_plan(op, items)
    return (
        plan,
        torch.tensor([make_record(item, 0) for item in items], dtype=torch.int64, device="cpu"),
        tile_tables(plan.launches, device),
    )


def _addresses(places: Mapping[str, Any], lists: Mapping[str, Tensors | None]) -> Fields:
    return {
        places[name].value: list(map(Tensor.data_ptr, tensors))
        for name, tensors in lists.items()
        if tensors is not None
    }


def _resolved(grads: Tensors) -> list[Tensor]:
    return [grad.resolve_neg() for grad in grads]


def _aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _on_host(value: Scalar) -> Any:
    """A number, or numbers, where they are to be had without waiting for a device."""
    return value.tolist() if isinstance(value, Tensor) and value.is_cpu else value


def _of_each(beta: Scalar, owners: Sequence[int]) -> Scalar:
    """Decays of parameters as those of their blocks."""
    if isinstance(beta, Tensor) and beta.ndim == 1:
        return beta[torch.tensor(owners, dtype=torch.int64, device="cpu").to(beta.device)]
    return beta
