"""Device memory of steps on whole parameters: tables that stay from step to step, numbers, and launches over them."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import staging
from ..staging import Staged, refused
from . import platform, table
from .launcher import Launcher, current_stream, observed
from .plan import Plan, prepare
from .records import Operands, Records, Tensors, copy_scalars, places_of, scalar_values, scalars_of

_DTYPE = attrgetter("dtype")


class Ready(NamedTuple):
    """What launches were made for, and what repeats them."""

    key: tuple[Any, ...]
    stream: Any  # as Triton takes it
    launches: list[Callable[[], None]]
    objects: tuple[Any, ...]  # which ``key`` and ``stream`` are of


@dataclass(frozen=True)
class Repeatable:
    """What launches were made for, for such of the same gradients (``seen``) and other numbers of the same kind
    (`_kind_of`)."""

    seen: Any
    kind: tuple[Any, ...]
    options: Mapping[str, bool]


class Room(Launcher):
    """Device memory of one step at a time, with its tables, for tensors that stay where they are."""

    plan: Plan
    workspace: Tensor | None = None

    def __init__(self, operands: Operands) -> None:
        self._operands, params = operands, operands.params
        self.device = params[0].device
        count = table.OWN.value + table.OWNED.value * (1 + len(params))
        self.own_scalars = self.scalars = torch.zeros(count, dtype=torch.float64, device=self.device)
        self._places, self._once = places_of(self.scalars), self.scalars[: table.OWN.value + table.OWNED.value]
        self.coefficient = self.scalars[table.COEFFICIENT.value]
        #: the numbers that lie in ``own_scalars``, where nothing else has been written there; replays of a graph may
        self._written: tuple[list[float], list[type]] | None = None
        self._in_graphs = False
        #: the last numbers that were brought of which some lie in tensors: those tensors, and where they are copied to
        self._copied: tuple[Mapping[str, Any], list[Tensor], list[Tensor]] | None = None
        self.flags = torch.zeros(len(params), dtype=torch.int32, device=self.device)
        self.stream = platform.stream_of(self.device)  # of the last step
        self._known: tuple[Any, ...] | None = None
        self._addresses: list[int] = []
        #: of the gradients at ``_addresses``: their snapshot (`hfac.backends`), where there was one
        self._seen: Any = None
        #: of the plan's launches by name, what they were last made for, and what repeats them
        self._ready: dict[str, Ready] = {}
        #: of the last "step", the last "statistics", and the "rest" of the last step that went on from statistics:
        #: where it was told nothing but gradients, numbers, flags, and what it is clipped by
        self.last: dict[str, Repeatable] = {}
        self.staged = Staged(self.device, torch.int64, partial(platform.host_memory, self.device))  # grad_table

    def check_capture(self, grads: Tensors) -> None:
        """That a step with these gradients can be part of the graph that is being captured.

        Raises:
            RuntimeError: it needs memory on the host.
        """
        addresses, kind = _read(grads)
        if self._known is None:
            raise refused("this is the first step on these tensors")
        if self._known != kind:
            raise refused("its gradients are not of the types and layouts that the last step found")
        if addresses != self._addresses and not self.staged.can_be_captured(2 * len(grads)):
            raise refused("its gradients are not where the last step found them")

    def memory(self) -> list[Tensor]:
        """What launches read and write."""
        own = [self.own_scalars, self.flags, *([] if self.squares is None else [self.squares])]
        if self._known is None or self.workspace is None:
            return own
        return [*self.tiles, *self.square_tiles, self.items, self.layouts, self.grad_table, self.workspace, *own]

    def locate(self, grads: Tensors, capturing: bool, seen: Any = None) -> None:
        """Finds out where the gradients are, and plans anew where their types or layouts have changed. ``seen``: their
        snapshot."""
        if seen is not None and seen is self._seen:
            self.grad_table = self.staged.bring(2 * len(grads), None, capturing)
            return
        self._seen = None
        addresses, kind = _read(grads)
        write = None
        if addresses != self._addresses or kind != self._known:
            write = partial(self._write, addresses)
            self._addresses = []  # until all is there, whatever may fail before
            if kind != self._known:
                self._known = None
                self._make(grads)
                self._known = kind
        self.grad_table = self.staged.bring(2 * len(grads), write, capturing)
        self._addresses, self._seen = addresses, seen

    def _write(self, addresses: list[int], host: Tensor) -> None:
        rows = [x for pair in zip(addresses, self._grad_layouts, strict=True) for x in pair]
        host.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu"))

    def _make(self, grads: Tensors) -> None:
        records = Records(self._operands, grads)
        self.plan, blank, tiles = prepare(self._operands.op.name, records.items, self.device)
        workspace = torch.empty(max(self.plan.workspace, 16), dtype=torch.uint8, device=self.device)
        self.layouts = torch.tensor(records.numbers, dtype=torch.int64, device="cpu").to(self.device)
        base = self.layouts.data_ptr()
        self.items, self.workspace = records.filled(blank, workspace.data_ptr(), base).to(self.device), workspace
        self._grad_layouts = [base + 8 * start for _, start in records.grads]
        count = len(self.plan.launches)
        self.tiles, self.square_tiles = tiles[:count], tiles[count:]
        self._ready.clear()

    def launch(self, which: str, options: Mapping[str, bool]) -> None:
        """The plan's ``launches``, or its ``statistics`` or ``squares`` alone. Where the last ones were for the same
        options, memory and stream, they are repeated."""
        launches = self.plan.squares if which == "squares" else self.plan.launches
        launches = launches[: self.plan.statistics] if which == "statistics" else launches
        if not launches:
            return
        moving = self._moving()
        key = *options.values(), *[None if tensor is None else tensor.data_ptr() for tensor in moving]
        known = None if observed() else self._ready.get(which)
        if known is not None and (known.key, known.stream) == (key, current_stream()):
            for again in known.launches:
                again()
            return
        tiles = self.square_tiles if which == "squares" else self.tiles
        found = self.run(launches, tiles[: len(launches)], options)
        ready = [again for again in found if again is not None]
        if found and len(ready) == len(found) and not observed():
            # A graph that is being captured has a stream of its own, which `repeat` must not take for the last step's.
            mine = self.stream if platform.stream_of(self.device) == self.stream else object()
            self._ready[which] = Ready(key, current_stream(), ready, (options, mine, *moving))

    def repeat(self, which: str, options: Mapping[str, bool]) -> None:
        """`launch` on the current stream, where that is the last step's: it asks for no addresses."""
        known = self._ready.get(which)
        if (
            known is not None
            and all(map(is_, known.objects, (options, self.stream, *self._moving())))
            and not observed()
        ):
            for again in known.launches:
                again()
        else:
            self.launch(which, options)

    def _moving(self) -> tuple[Tensor | None, ...]:
        """What launches read and write that is not the plan's."""
        return self.grad_table, self.scalars, self.squares, self.watched

    def set_scalars(self, numbers: Mapping[str, Any], capturing: bool) -> None:
        """Values to device memory. A tensor's value is copied on its device and never read here. Numbers that are one
        object have the same values, or lie in the same tensors."""
        self.scalars, copied = self.own_scalars, self._copied
        if copied is not None and copied[0] is numbers and self._written is not None:
            torch._foreach_copy_(copied[2], copied[1])
            return
        self._copied = None
        given = numbers
        if self.device.type != "cpu":
            here = {name: value for name, value in numbers.items() if isinstance(value, Tensor) and value.is_cpu}
            if here:
                moved = {name: staging.to_device(value, self.device) for name, value in here.items()}
                numbers = {**numbers, **moved}
        scalars = scalars_of(numbers, on_host=False)
        values = scalar_values(scalars, numbers.get("seed") or 0, 0)
        if capturing:  # a graph would copy from memory that has been given away since
            for at, value in enumerate(values):
                self.scalars[at].fill_(value)
            self._written, self._in_graphs = None, True
        else:
            told = values, [value.__class__ for value in scalars]  # a tensor's value is none of these
            if told != self._written:
                self._written = None  # whatever may fail
                _copy(values, self._once)
                self._written = None if self._in_graphs else told
        to, from_ = copy_scalars(self._places, scalars, fill=True)
        if from_ and numbers is given:
            self._copied = given, from_, to

    def scale(self, numbers: Mapping[str, Any]) -> None:
        if numbers.get("grad_scale") is not None:
            self._written = None
        super().scale(numbers)

    def multiply(self, clip: Tensor) -> None:
        """What gradients are multiplied by to clip them."""
        self._written = None
        self.coefficient.copy_(clip)


def _copy(values: list[float], to: Tensor) -> None:
    host = platform.host_memory(to.device, len(values), torch.float64)
    staging.write(host, values)
    to.copy_(host, non_blocking=True)


class Shared:
    """Numbers of a step in device memory, for all lists that repeat a step with them on one stream: gradient release
    copies them once, and not for each parameter."""

    def __init__(self, device: torch.device) -> None:
        self.scalars = torch.zeros(table.OWN.value + table.OWNED.value, dtype=torch.float64, device=device)
        self.lock = threading.Lock()  # from `bring` to the launches
        self._scaling = [self.scalars[at.value] for at in (table.GRAD_SCALE, table.COEFFICIENT)]
        self._known: tuple[Any, ...] = (None, None, None)

    def bring(self, numbers: Mapping[str, Any], grad_scale: Tensor | None, coefficient: Tensor | None = None) -> None:
        """All are told by their identity. ``numbers``: none of them a tensor; the others: 0-d."""
        told, known = (numbers, grad_scale, coefficient), self._known
        if all(map(is_, told, known)):
            return
        self._known = None, None, None  # whatever may fail
        if known[0] is not numbers or known[1] is not None or known[2] is not None:
            _copy(scalar_values(scalars_of(numbers, on_host=False), numbers.get("seed") or 0, 0), self.scalars)
        pairs = [
            (place, one.reshape(())) for place, one in zip(self._scaling, told[1:], strict=True) if one is not None
        ]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        self._known = told


def _read(grads: Tensors) -> tuple[list[int], tuple[Any, ...]]:
    """Where gradients lie, and how: types, strides where one of them is not contiguous, and where within 16 bytes."""
    strides = None if all(map(Tensor.is_contiguous, grads)) else list(map(Tensor.stride, grads))
    addresses = list(map(Tensor.data_ptr, grads))
    return addresses, (list(map(_DTYPE, grads)), strides, [address % 16 for address in addresses])
