"""Ops on shards, the pieces of parameters that one rank has, over whole lists.

No memory is kept: what a sharded step reads and writes lies elsewhere every time. Tilings and tables of tiles are kept
by shapes and types; addresses and numbers of a call go to the device in one copy.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..memory import bump_versions
from . import platform, table
from .items import KEY, Item
from .launcher import Launcher
from .plan import Plan, prepare
from .records import Operands, Records, Tensors, copy_scalars, places_of, scalar_values, scalars_of
from .step import options_of


class ShardCall:
    """An op on shards. ``grad_scale`` and ``found_inf`` as for `triton_kernels.step.Bound`."""

    unscales = True

    def __init__(self, operands: Operands) -> None:
        self._operands, self._op = operands, operands.op

    def __call__(self, grads: Tensors, nonfinite: None = None, **numbers: Any) -> None:
        """Calls the op with these gradients, numbers and vectors, by name; ``seed`` and ``step`` where there are
        places.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        records = Records(self._operands, grads, {name: numbers.pop(name) for name in self._op.vectors})
        if not records.items:
            return
        device = grads[0].device
        if platform.capturing(device):
            self.check_capture(grads)
        rows_only = any(one.optional and one.name not in self._operands.lists for one in self._op.operands)
        name = "hfac_row_sums" if rows_only else self._op.name
        with platform.current(device):
            plan, blank, tiles = _planned(name, device, platform.stream_of(device), tuple(map(KEY, records.items)))
            if plan.launches:
                room = _Room(device, records, plan, blank, numbers)
                options = options_of(self._operands, numbers)
                room.run(plan.launches, tiles, options)
        if self._operands.written:
            bump_versions(self._operands.written)

    def check_capture(self, grads: Tensors, nonfinite: None = None, clip_threshold: Any = None) -> None:
        """Refuses to be captured."""
        raise RuntimeError(
            "Triton's ops on shards bring their tables from the host in every call, and cannot be part of the CUDA "
            "graph that is being captured. Use backend='cuda', or step sharded parameters outside of graphs."
        )


class _Room(Launcher):
    """Device memory of one call."""

    def __init__(
        self, device: torch.device, records: Records, plan: Plan, blank: Tensor, numbers: Mapping[str, Any]
    ) -> None:
        self.device = device
        self.workspace = torch.empty(max(plan.workspace, 16), dtype=torch.uint8, device=device)
        of = [item.owner for item in records.items]
        self.flags = torch.zeros(len(of), dtype=torch.int32, device=device)
        scalars = scalars_of(numbers, on_host=True)
        scalars[table.SHARED :] = [_of_records(value, of) for value in scalars[table.SHARED :]]
        values = scalar_values(scalars, numbers.get("seed") or 0, len(of))

        # Each table begins at a multiple of 16 bytes, for which Triton compiles.
        sizes = [size + size % 2 for size in (blank.numel(), 2 * len(of), len(values), len(records.numbers))]
        tables = torch.empty(sum(sizes), dtype=torch.int64, device=device)
        self.items, self.grad_table, room, layouts = tables.split(sizes)
        self.scalars = room.view(torch.float64)[: len(values)]
        base = layouts.data_ptr()
        grads = [x for address, start in records.grads for x in (address, base + 8 * start)]
        host = platform.host_memory(device, sum(sizes))
        for to, values_ in zip(
            host.split(sizes),
            (
                records.filled(blank, self.workspace.data_ptr(), base).view(-1),
                torch.tensor(grads, dtype=torch.int64, device="cpu"),
                torch.tensor(values, dtype=torch.float64, device="cpu").view(torch.int64),
                torch.tensor(records.numbers, dtype=torch.int64, device="cpu"),
            ),
            strict=True,
        ):
            to[: len(values_)] = values_
        tables.copy_(host, non_blocking=True)
        copy_scalars(places_of(self.scalars), scalars)
        self.scale(numbers)


@lru_cache(maxsize=32)
def _planned(
    op: str, device: torch.device, stream: Any, keys: tuple[tuple[Any, ...], ...]
) -> tuple[Plan, Tensor, list[Tensor]]:
    """As `plan.prepare`. Only this stream reads the tables of tiles, so they may be freed while it does."""
    return prepare(op, [Item(*key) for key in keys], device)


def _of_records(value: Any, of: Sequence[int]) -> Any:
    """A number of each parameter as one of each record."""
    if isinstance(value, list):
        return [value[i] for i in of]
    if isinstance(value, Tensor) and value.ndim == 1:
        return value[torch.tensor(of, dtype=torch.int64, device="cpu").to(value.device)]
    return value
