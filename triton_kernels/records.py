"""From the tensors and numbers of a call to what the kernels read of them: records, layouts, scalars."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import spec
from . import table
from .items import Item
from .layouts import bits_of, merged_layout, packed_layout

Tensors = Sequence[Tensor]
Scalar = float | Tensor
#: An op and its tensors, `hfac.backends.contract.Operands`, which lies above this package.
Operands = Any

#: Where a record has the addresses of a state, by its moment and size.
_STATES = {
    (1, spec.ROWS): "first_row",
    (1, spec.COLS): "first_col",
    (2, spec.ROWS): "second_row",
    (2, spec.COLS): "second_col",
    (1, spec.WHOLE): "first_row",
    (2, spec.WHOLE): "second_row",
    (1, spec.SIGNS): "signs",
    (0, spec.WHOLE): "low_bits",
}
_SPACES = [at for name, at in table.FIELD.items() if name.startswith("space_")]
_OWN = table.OWN.value


def fields_of(op: spec.Op) -> dict[str, str]:
    """Where a record has the addresses of an op's lists, by their names; sums have fields in the order of the lists.
    `hfac_stats` leaves rows' sums where they are asked for."""
    rows, cols = ("sum_row", "new_row"), ("sum_col", "new_col", "ratio_col")
    if not op.updates:
        rows = ("second_row", "space_rows", "space_squares")
    elif any(map(is_codes, op.operands)):
        rows, cols = ("new_row",), ("new_col",)
    sums: dict[str, Iterator[str]] = {spec.ROWS: iter(rows), spec.COLS: iter(cols)}
    return {
        one.name: "codes_at" if is_codes(one) else _STATES[one.moment, one.size] if one.key else next(sums[one.size])
        for one in (*op.operands, spec.MASTER_LOW)
    }


def is_codes(one: spec.Operand) -> bool:
    """Whether the list is of a first moment's codes of 8 bits."""
    return one.dtype == torch.int8


def aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def alignment(tensor: Tensor) -> int:
    """Bytes of which a gradient's address is a multiple, as kernels are compiled for it: DDP's buckets hold gradients
    one behind the other."""
    address = tensor.data_ptr()
    return 16 if address % 16 == 0 else 4 if address % 4 == 0 and tensor.itemsize < 4 else tensor.itemsize


class Records:
    """What kernels read of the tensors of a call: a record for each parameter or, of SMMF's shards, for each block that
    has elements.

    Args:
        vectors: the op's vectors by name.

    Attributes:
        items: one per record.
        numbers: layouts, one behind the other; the first is that of everything contiguous.
        grads: per record, the gradient's address and where its layout begins in ``numbers``.
    """

    def __init__(self, operands: Operands, grads: Tensors, vectors: Mapping[str, Tensor] | None = None) -> None:
        lists, offsets = operands.lists, operands.places
        self.items = _items(operands, grads)
        self.numbers = [0]
        self._starts: dict[tuple[int, ...], int] = {}
        of = [item.owner for item in self.items]
        fields = fields_of(operands.op)
        addresses = {fields[name]: list(map(Tensor.data_ptr, tensors)) for name, tensors in lists.items()}
        layouts: dict[str, list[int]] = {}
        if operands.written:
            addresses["param"] = list(map(Tensor.data_ptr, operands.written))
            layouts["param_layout"] = self._layouts(operands.written)
        if spec.MASTER_LOW.name in lists:
            layouts["low_layout"] = self._layouts(lists[spec.MASTER_LOW.name])
        for one in filter(is_codes, operands.op.operands):
            layouts["codes_layout"] = self._layouts(lists[one.name])
        if offsets is not None:
            addresses["position"], addresses["first_index"] = ([offset[k] for offset in offsets] for k in range(2))
            layouts["index_layout"] = self._index_layouts(grads, offsets)
        self._values = {field: [values[i] for i in of] for field, values in addresses.items()}
        self._layouts_at = {field: [starts[i] for i in of] for field, starts in layouts.items()}
        starts = self._layouts(grads)
        self.grads = [(grads[i].data_ptr(), starts[i]) for i in of]
        self._vectors = self._add_vectors(vectors or {})
        if "blocks" in operands.counts:
            self._move_to_blocks()

    def _layouts(self, tensors: Tensors) -> list[int]:
        """Where each tensor's layout begins."""
        return [
            0 if tensor.is_contiguous() else self._add(merged_layout(tensor.shape, tensor.stride()))
            for tensor in tensors
        ]

    def _index_layouts(self, grads: Tensors, offsets: Sequence[Any]) -> list[int]:
        """Where the layouts of the elements' indices begin; also says how the items' random bits are drawn."""
        layouts = [
            [0] if strides is None else merged_layout(grad.shape, strides)
            for grad, (_, _, strides) in zip(grads, offsets, strict=True)
        ]
        for item in self.items:
            # Sixteen low bits complete the float32, of which nothing is rounded.
            if item.low != 16:
                item.stochastic = bits_of(layouts[item.owner], offsets[item.owner][1], item.whole)
        return [0 if layout == [0] else self._add(layout) for layout in layouts]

    def _add(self, layout: list[int]) -> int:
        """Where a layout lies in ``numbers``: once however many tensors have it, by which kernels see that they do."""
        packed = packed_layout(layout)
        start = self._starts.setdefault(tuple(packed), len(self.numbers))
        if start == len(self.numbers):
            self.numbers.extend(packed)
        return start

    def _add_vectors(self, vectors: Mapping[str, Tensor]) -> list[Tensor]:
        """Addresses of numbers that are one per parameter, in the type of its arithmetic. Where that makes new tensors,
        they are kept until the launches."""
        kept = []
        for name, vector in vectors.items():
            of = {wide: vector.to(wide).contiguous() for wide in {item.wide for item in self.items}}
            self._values[name.removesuffix("s")] = [
                of[item.wide].data_ptr() + item.owner * item.wide.itemsize for item in self.items
            ]
            kept += of.values()
        return kept

    def _move_to_blocks(self) -> None:
        """Factors begin with a block's first row or column."""
        for field in ("first_row", "second_row", "first_col", "second_col"):
            side = field[-3:]
            self._values[field] = [
                address + getattr(item, side) * item.wide.itemsize
                for address, item in zip(self._values.get(field, ()), self.items, strict=False)
            ]

    def filled(self, records: Tensor, workspace: int, layouts: int) -> Tensor:
        """Records of these items, whose workspace is at 0, with the addresses of all memory; on the host."""
        records = records.clone()
        records[:, _SPACES] += workspace
        at = {field: [layouts + 8 * start for start in starts] for field, starts in self._layouts_at.items()}
        values = {field: column for field, column in (self._values | at).items() if column}
        columns = torch.tensor(list(values.values()), dtype=torch.int64, device="cpu")
        records[:, [table.FIELD[field] for field in values]] = columns.T
        return records


def _items(operands: Operands, grads: Tensors) -> list[Item]:
    op, lists, counts = operands.op, operands.lists, operands.counts
    sizes = {one.name: one.size for one in (*op.operands, spec.MASTER_LOW)}
    rows, cols = (
        next((tensors for name, tensors in lists.items() if sizes[name] == size), None)
        for size in (spec.ROWS, spec.COLS)
    )
    in_vectors = [tensors for name, tensors in lists.items() if sizes[name] in (spec.WHOLE, spec.SIGNS)]
    in_vectors += [operands.params] * op.updates  # of others these are the gradients
    signed = spec.SIGNS in map(sizes.get, lists)
    lows = lists.get(spec.MASTER_LOW.name)
    found = []
    for i, grad in enumerate(grads):
        m = grad.numel() if rows is None else rows[i].numel()
        n = 1 if rows is None else grad.numel() // max(m, 1) if cols is None else cols[i].numel()
        dtype = operands.params[i].dtype if op.updates or rows is None else rows[i].dtype
        more = {"slice": math.prod(grad.shape[1:]) if signed else 0, "owner": i}
        more["low"] = 8 * lows[i].itemsize if lows else 0
        more["codes"] = any(map(is_codes, op.operands))
        if "blocks" in counts:
            items = [
                Item(
                    block_rows, block_cols, dtype, grad.dtype,
                    start=start, stride=stride, row=row, row_step=row_step, col=col, all_rows=m, all_cols=n, **more,
                )
                for start, stride, row, row_step, col, block_rows, block_cols in counts["blocks"][i]
                if block_rows * block_cols
            ]  # fmt: skip
        else:
            whole = {f"all_{side}": counts[side][i] for side in ("rows", "cols") if side in counts}
            items = [Item(m, n, dtype, grad.dtype, **whole, **more)]
        whole = grad.is_contiguous() and all([aligned(tensors[i]) for tensors in in_vectors])
        for item in items:
            item.aligned = alignment(grad)
            lengths = (item.start, item.stride, item.rows if rows is None else item.cols)
            item.whole = whole and all(length % 8 == 0 for length in lengths) and item.signs != table.SHARED_BYTES.value
        found += items
    return found


def scalars_of(numbers: Mapping[str, Any], on_host: bool) -> list[Any]:
    """Numbers of a step in the order of `table.SCALARS`; 0 where the op has none. ``on_host``: CPU tensors are read."""
    found = map(numbers.get, table.SCALARS)
    return [0.0 if x is None else x if x.__class__ is float else _plain(x, on_host) for x in found]


def _plain(value: Any, on_host: bool) -> Any:
    return value.tolist() if on_host and isinstance(value, Tensor) and value.is_cpu else value


def _is_each(value: Any) -> bool:
    """Whether a scalar is one for each parameter."""
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim == 1)


def scalar_values(scalars: Sequence[Any], seed: int, count: int) -> list[float]:
    """Scalars of a step (`scalars_of`) as they lie in device memory; 0 where a tensor on the device has them.
    ``count``: records."""
    shared = [0.0 if isinstance(value, (list, Tensor)) else value for value in scalars]
    own = scalars[table.SHARED :]
    each = any([_is_each(value) for value in own if value.__class__ is not float])
    values = [*shared[: table.SHARED], float(each), float(seed & 0xFFFFFFFF), float(seed >> 32), 1.0, 1.0]
    values += [*shared[table.SHARED :], 0.0]
    if each:
        columns = [
            value if isinstance(value, list) else [at] * count for value, at in zip(own, values[_OWN:], strict=False)
        ]
        values += [x for mine in zip(*columns, strict=True) for x in (*mine, 0.0)]
    return values


def places_of(scalars: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Where each of `table.SCALARS` lies: what is once for all parameters, and what each has for itself."""
    shared, own = scalars[: table.SHARED].split(1), scalars[_OWN:].view(-1, table.OWNED.value)
    return [*shared, *own[0].split(1)], [*shared, *own[1:].unbind(1)]


def copy_scalars(
    places: tuple[list[Tensor], list[Tensor]], scalars: Sequence[Any], fill: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Copies the values of tensors on the device to their `places_of`, without reading them here. ``fill``: of numbers,
    too, where each parameter has its own and other places than 0 are wanted. Returns these places and tensors."""
    each = any([_is_each(value) for value in scalars[table.SHARED :] if value.__class__ is not float])
    pairs = [pair for pair in zip(places[each], scalars, strict=False) if isinstance(pair[1], Tensor)]
    to, from_ = [place for place, _ in pairs], [tensor for _, tensor in pairs]
    if pairs:
        torch._foreach_copy_(to, from_)
    if each and fill:
        for place, value in zip(places[1][table.SHARED :], scalars[table.SHARED :], strict=False):
            if value.__class__ is float and value:
                place.fill_(value)
    return to, from_
