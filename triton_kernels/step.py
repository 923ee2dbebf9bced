"""Steps over whole lists: the tables that the kernels read, and their launches.

A step launches a handful of kernels, whatever the length of the list, waits for nothing, and allocates nothing of the
parameters' size. Numbers of a step (learning rate, decays, ...) are values in device memory: none is compiled in.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import table
from .plan import Item, Launch, Plan, bits_of, compile_options, make_plan, merged_layout, square_slice

Scalar = float | Tensor
Tensors = Sequence[Tensor]
#: Position, first, strides: `hfac.rounding.Place`.
Place = tuple[int, int, tuple[int, ...] | None]

SPACES = {
    "rows": table.SPACE_ROWS,
    "squares": table.SPACE_SQUARES,
    "cols": table.SPACE_COLS,
    "psi": table.SPACE_PSI,
    "scale": table.SPACE_SCALE,
    "totals": table.SPACE_TOTALS,
}
_DTYPE = attrgetter("dtype")
_FIRST_ROW, _FIRST_COL = table.FIRST_ROW, table.FIRST_COL
_SECOND_ROW, _SECOND_COL = table.SECOND_ROW, table.SECOND_COL
STATES = {
    "exp_avg_rows": _FIRST_ROW,
    "exp_avg_cols": _FIRST_COL,
    "exp_avg_sq_rows": _SECOND_ROW,
    "exp_avg_sq_cols": _SECOND_COL,
    "exp_avg_signs": table.SIGNS,
    "exp_avgs": _FIRST_ROW,
    "exp_avg_sqs": _SECOND_ROW,
    "master_lows": table.LOW_PIECE,
}


class Launcher:
    """Launches kernels over what lies in device memory: the records of a list (``items``), where its gradients are
    (``grad_table``), a step's numbers (``scalars``), which parameters keep their value (``flags``), and where sums of
    squares (``sums``) and what is watched of a step (``watched``) go."""

    device: torch.device
    items: Tensor
    grad_table: Tensor
    scalars: Tensor
    flags: Tensor
    sums: Tensor | None = None
    watched: Tensor | None = None

    def _arguments(self, launch: Launch, tiles: Tensor, options: dict[str, bool]) -> dict[str, Any]:
        memory = {
            "grads": self.grad_table,
            "scalars": self.scalars,
            "flags": self.flags,
            "squares": self.sums,
            "watched": self.scalars if self.watched is None else self.watched,  # a kernel that watches nothing has both
        }
        return {
            "tiles": tiles,
            "items": self.items,
            **{name: memory[name] for name in launch.arguments},
            **launch.constants,
            **{name: options[name] for name in launch.options},
        }

    def _launch(self, launch: Launch, tiles: Tensor, options: dict[str, bool]) -> None:
        maker = "hip" if torch.version.hip else self.device.type
        compiled = compile_options(launch.constants, launch.warps, maker)
        launch.kernel[(len(launch.tiles),)](**self._arguments(launch, tiles, options), **compiled)


class Bound(Launcher):
    """An op of `hfac.reference`, by its name, on these parameters and states, for as long as they lie where they lie.

    Where a parameter or gradient is not contiguous, its elements are found through its strides, in place.

    Args:
        places: of parameters that are rounded stochastically; every call then brings seed and step.
    """

    def __init__(
        self, op: str, params: Tensors, states: dict[str, list[Tensor]], places: Sequence[Place] | None = None
    ) -> None:
        self.op, self.params, self.states, self.places = op, list(params), states, places
        self.device = params[0].device
        self.first = "exp_avg_rows" in states or "exp_avgs" in states
        count = table.OWN.value + table.OWNED.value * (1 + len(params))
        self.scalars = torch.zeros(count, dtype=torch.float64, device=self.device)
        self.flags = torch.zeros(len(params), dtype=torch.int32, device=self.device)
        self.known: tuple[Any, ...] | None = None
        self.addresses: list[int] = []
        self.grad_table = torch.empty(0, device=self.device)
        self.source: Tensor | None = None  # on the host: what replays copy to grad_table, and no step has yet
        self.frozen: Tensor | None = None  # a grad_table that is in a graph
        self.spare: Tensor | None = None  # on the host, for the grad_table of the next graph
        self.resolved: Tensors = []  # copies of gradients whose statistics have been taken
        self.counted = False  # with those statistics the rows that are zero
        self.taken: Tensor | None = None  # sums that came with them
        self.lock = threading.Lock()  # several threads may step one list, whose tables and workspace there are once
        self.stream = stream_of(self.device)  # of the last step
        #: What a CUDA graph reads in every replay, and nobody may change or free. Only captures add to it; whoever
        #: keeps this replaces the list by one of its own, which then outlives it.
        self.captured: list[Any] = []

    def __call__(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        clip: Tensor | None = None,
        squares: Tensor | None = None,
        watched: Tensor | None = None,
        **scalars: Any,
    ) -> None:
        """One step; scalars are those of the op and of `_begin`.

        Args:
            clip: a 0-d float32 tensor on the device: `squares` has been called right before with the same gradients
                and scalars, but for grad_scale, which is now also divided by this. Where it is 1 the statistics of
                then are the step's, elsewhere they are taken again, and with them ``nonfinite``. It is not read here.
            squares: what that call returned. Where another thread has called it since, or made a step, this step is
                made from the beginning.
            watched: float64 [parameters, 5] on the device (`table.CHANGE` and so on), to which the step adds what it
                does to each parameter that it writes. Rows and columns are those of H-Fac's matrices.
        """
        with self.lock, current(self.device):
            if squares is not None and squares is not self.taken:
                clip = None
            self.taken = None
            options = self._begin(grads, nonfinite, clip, watched, **scalars)
            self._run(self.plan.launches, self.tiles, options)
            self._end(nonfinite, scalars.get("found_inf"))
            if watched is not None and self.watched is not watched:
                watched.add_(self.watched)
            self._keep()
            self.watched = None
            self.resolved = []

    def squares(
        self, grads: Tensors, nonfinite: Tensor | None = None, *, watched: Tensor | None = None, **scalars: Any
    ) -> Tensor | None:
        """Takes the statistics of the step that a call with these arguments would make, and gives each gradient's sum
        of squares, divided by grad_scale and 0 where there are no elements: float64 on the device. ``nonfinite`` is
        filled as by a step. ``watched`` is not written: without it, a step that is watched takes the statistics again
        in any case. None for an op that takes none."""
        if self.op != "hfac_step_":
            return None
        with self.lock, current(self.device):
            options = self._begin(grads, nonfinite, None, watched, **scalars)
            self.sums = sums = self.taken = torch.zeros(len(self.params), dtype=torch.float64, device=self.device)
            self._keep()
            count = self.plan.statistics
            self._run(self.plan.launches[:count], self.tiles[:count], options)
            self._run(self.plan.squares, self.square_tiles, options)
            self._end(nonfinite, scalars.get("found_inf"))
            self.watched = None
        return sums

    def _begin(
        self,
        grads: Tensors,
        nonfinite: Tensor | None,
        clip: Tensor | None,
        watched: Tensor | None,
        *,
        lr: Scalar,
        beta1: Scalar | None,
        beta2: Scalar,
        eps: float,
        weight_decay: Scalar,
        clip_threshold: float | None = None,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int = 0,
        step: Scalar = 0.0,
    ) -> dict[str, bool]:
        """Brings to the device what the launches read, and says what they are told. ``grad_scale`` and ``found_inf``
        are float32 tensors of one element there: gradients are divided by the one, and where the other is not zero
        every parameter keeps its value."""
        skip = nonfinite is not None or found_inf is not None
        if clip is None:
            capturing = self.capturing()
            if capturing:
                self.check_capture(grads)
            else:
                self._follow()
            self.resolved = _resolved(grads)
            self._tables(self.resolved or grads, capturing)
            numbers = [lr, weight_decay, eps, clip_threshold or 0.0]
            self._scalars(numbers, seed, [0.0 if beta1 is None else beta1, beta2, step, 0.0], capturing)
            if skip:
                self.flags.zero_()
        else:  # all but this is there
            self.scalars[table.COEFFICIENT.value].copy_(clip)
            if skip:
                self.flags.mul_(clip == 1)
        again = clip is not None and (watched is None or self.counted)
        self.counted = watched is not None
        if watched is not None:
            as_it_is = watched.is_contiguous() and watched.data_ptr() % 16 == 0
            self.watched = watched if as_it_is else torch.zeros_like(watched, memory_format=torch.contiguous_format)
        if grad_scale is not None:
            self.scalars[table.GRAD_SCALE.value].copy_(grad_scale.reshape(()))
        if found_inf is not None:
            self.flags.add_(found_inf.reshape(()) != 0)
        return {
            "FIRST": self.first,
            "COUPLED": not decoupled_weight_decay,
            "NEGATE": maximize,
            "SKIP": skip,
            "LOOK": nonfinite is not None,
            "CLIPPED": clip_threshold is not None,
            "SCALED": grad_scale is not None,
            "AGAIN": again,
            "WATCH": watched is not None,
        }

    def _run(self, launches: Sequence[Launch], tiles: Sequence[Tensor], options: dict[str, bool]) -> None:
        for launch, mine in zip(launches, tiles, strict=True):
            if not launch.when or any(options[name] for name in launch.when):
                self._launch(launch, mine, options)

    def _end(self, nonfinite: Tensor | None, found_inf: Tensor | None) -> None:
        """Says which gradients are not finite; of none where found_inf has said it of all."""
        if nonfinite is not None:
            nonfinite.copy_(self.flags if found_inf is None else self.flags * (found_inf.reshape(()) == 0))

    def capturing(self) -> bool:
        """Whether a graph is being captured, in whose replays what is launched now will run."""
        return capturing(self.device)

    def check_capture(
        self, grads: Tensors, nonfinite: Tensor | None = None, *, taken: bool = False, **scalars: Any
    ) -> None:
        """That a step with these gradients can be part of the graph that is being captured; ``taken``: `squares` has
        been.

        Raises:
            RuntimeError: it needs memory on the host; the message says what to do.
        """
        if taken:
            return
        grads = _resolved(grads) or grads
        addresses, dtypes, strides = _read(grads)
        if self.known is None:
            why = "this is the first step on these tensors"
        elif self.known != (dtypes, strides, _aligned(grads, addresses, strides)):
            why = "its gradients are not of the types and layouts that the last step found"
        elif addresses != self.addresses and self.spare is None:
            why = "its gradients are not where the last step found them"
        else:
            return
        raise RuntimeError(
            f"a step cannot be part of the CUDA graph that is being captured: {why}, and what it needs on the host "
            "cannot be allocated during a capture. Take one step outside of graphs first, with gradients of the same "
            "types for the same parameters and with the same options. It serves one graph, or any number whose "
            "gradients lie where it found them."
        )

    def _keep(self) -> None:
        """What has been launched for a graph stays."""
        if self.capturing():
            self.captured += [self.tiles, self.square_tiles, self.items, self.layouts, self.grad_table, self.source]
            self.captured += [self.workspace, self.scalars, self.flags, self.sums, self.watched, self.resolved]

    def _follow(self) -> None:
        """Goes on on the current stream: after what the last one was given, and with memory that is not handed out
        again before both are done with it."""
        stream = stream_of(self.device)
        if stream == self.stream:
            return
        stream.wait_stream(self.stream)
        mine = [self.scalars, self.flags]
        if self.known is not None:
            mine += [*self.tiles, *self.square_tiles, self.items, self.layouts, self.grad_table, self.workspace]
        for tensor in mine:
            tensor.record_stream(stream)
        self.stream = stream

    def _tables(self, grads: Tensors, capturing: bool) -> None:
        """Makes what depends on the gradients' types and layouts, where those changed; else only notes where they
        lie, and where they lie as they lay, nothing."""
        addresses, dtypes, strides = _read(grads)
        same = addresses == self.addresses and self.known is not None
        if not (same and (dtypes, strides) == self.known[:2]):
            aligned = _aligned(grads, addresses, strides)
            self.addresses = []  # until all is there, whatever may fail before
            if (dtypes, strides, aligned) != self.known:
                self.known = None
                self._plan(grads, aligned)
                self.known = dtypes, strides, aligned
            rows = [x for pair in zip(addresses, self.grad_layouts, strict=True) for x in pair]
            if capturing:  # no memory on the host can be pinned during a capture
                host, self.spare = self.spare, None
                assert host is not None
            else:
                host = host_memory(self.device, len(rows))
            host.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu"))
            # What is copied in replays of a graph is not there for other steps, and must stay as it is.
            if capturing or self.grad_table is self.frozen:
                self.grad_table = torch.empty_like(self.grad_table)
            self.addresses, self.source = addresses, host
        if self.source is not None:
            self.grad_table.copy_(self.source, non_blocking=True)
        if capturing:
            self.frozen = self.grad_table
        else:
            self.source = None
            if self.spare is None:
                self.spare = host_memory(self.device, 2 * len(grads))

    def _plan(self, grads: Tensors, aligned: list[bool]) -> None:
        items, layouts, starts = [], Layouts(), []
        second_rows = self.states.get("exp_avg_sq_rows")
        second_cols = self.states.get("exp_avg_sq_cols")
        signs = self.states.get("exp_avg_signs")
        lows = self.states.get("master_lows")

        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            rows = param.numel() if second_rows is None else second_rows[i].numel()
            cols = 1 if second_cols is None else second_cols[i].numel()
            item = Item(rows, cols, param.dtype, grad.dtype, slice=square_slice(param.shape) if signs else 0)
            item.low = 8 * lows[i].itemsize if lows else 0
            item.whole = (
                aligned[i]
                and param.is_contiguous()
                and param.data_ptr() % 16 == 0
                and (rows if second_cols is None else cols) % 8 == 0
                and (second_cols is not None or all(t[i].data_ptr() % 16 == 0 for t in self.states.values()))
                and item.signs != table.SHARED_BYTES.value
                and (not signs or signs[i].data_ptr() % 16 == 0)
                and (not lows or (lows[i].is_contiguous() and lows[i].data_ptr() % 16 == 0))
            )
            items.append(item)
            of_low = layouts.of(lows[i]) if lows else 0
            of_place = layouts.of_place(item, param.shape, self.places[i]) if self.places else 0
            starts.append((layouts.of(param), layouts.of(grad), of_low, of_place))
        self.plan: Plan = make_plan(self.op, items)

        self.workspace = torch.empty(max(self.plan.workspace, 16), dtype=torch.uint8, device=self.device)
        self.layouts = torch.tensor(layouts.numbers, dtype=torch.int64, device="cpu").to(self.device)
        base, space = self.layouts.data_ptr(), self.workspace.data_ptr()
        self.grad_layouts = [base + 8 * start for _, start, _, _ in starts]
        records = []
        for i, (param, item) in enumerate(zip(self.params, items, strict=True)):
            record = make_record(item, space)
            record[table.PARAM.value] = param.data_ptr()
            of_param, _, of_low, of_place = starts[i]
            for field, start in (
                (table.PARAM_LAYOUT, of_param),
                (table.LOW_LAYOUT, of_low),
                (table.PLACE_LAYOUT, of_place),
            ):
                record[field.value] = base + 8 * start
            if self.places:
                record[table.POSITION.value], record[table.FIRST_INDEX.value], _ = self.places[i]
            for name, tensors in self.states.items():
                record[STATES[name].value] = tensors[i].data_ptr()
            records.append(record)
        self.items = torch.tensor(records, dtype=torch.int64, device="cpu").to(self.device)
        self.tiles = tile_tables(self.plan.launches, self.device)
        self.square_tiles = tile_tables(self.plan.squares, self.device)
        self.grad_table = torch.empty(2 * len(items), dtype=torch.int64, device=self.device)
        self.spare = None

    def _scalars(self, numbers: list[Scalar], seed: int, own: list[Scalar], capturing: bool) -> None:
        """Values to device memory. A tensor's value is copied on its device and never read here."""
        each = any(isinstance(value, Tensor) and value.ndim == 1 for value in own)
        values = [*numbers, 1.0 if each else 0.0, *seed_words(seed), 1.0, 1.0, *own]
        on_host = [0.0 if isinstance(value, Tensor) else value for value in values]
        if capturing:  # a graph would copy from memory that has been given away since
            for place, value in enumerate(on_host):
                self.scalars[place].fill_(value)
        else:
            host = host_memory(self.device, len(on_host), torch.float64)
            host.copy_(torch.tensor(on_host, dtype=torch.float64, device="cpu"))
            self.scalars[: len(on_host)].copy_(host, non_blocking=True)
        for place, value in enumerate(own):
            if each and not isinstance(value, Tensor):
                own_numbers(self.scalars, place).fill_(value)
        copy_tensors(self.scalars, numbers, own, each)


def seed_words(seed: int) -> list[float]:
    """The low and the high 32 bits, which float64 has room for."""
    return [float(seed & 0xFFFFFFFF), float(seed >> 32)]


def own_numbers(scalars: Tensor, place: int) -> Tensor:
    """Where every parameter has its own of the numbers that it may have for itself."""
    return scalars[table.OWN.value + table.OWNED.value + place :: table.OWNED.value]


def copy_tensors(scalars: Tensor, numbers: Sequence[Any], own: Sequence[Any], each: bool) -> None:
    """Puts the values of those that are tensors in their places. With ``each`` every parameter has its ``own``."""
    for place, value in enumerate(numbers):
        if isinstance(value, Tensor):
            scalars[place].copy_(value.reshape(()))
    for place, value in enumerate(own):
        if isinstance(value, Tensor):
            to = own_numbers(scalars, place) if each else scalars[table.OWN.value + place]
            to.copy_(value if each else value.reshape(()))


class Layouts:
    """Layouts of tensors, one behind the other; the first is that of everything contiguous."""

    def __init__(self) -> None:
        self.numbers = [0]

    def of(self, tensor: Tensor) -> int:
        """Where the tensor's begins."""
        return 0 if tensor.is_contiguous() else self._add(merged_layout(tensor.shape, tensor.stride()))

    def of_place(self, item: Item, shape: Sequence[int], place: Place) -> int:
        """Where that of the indices of a tensor begins; also says how the item's random bits are made."""
        _, first, strides = place
        layout = [0] if strides is None else merged_layout(shape, strides)
        # Sixteen bits of a lower piece are the whole float32, of which nothing is rounded.
        item.stochastic = table.NEAREST.value if item.low == 16 else bits_of(layout, first, item.whole)
        return 0 if strides is None else self._add(layout)

    def _add(self, layout: list[int]) -> int:
        self.numbers.extend(layout)
        return len(self.numbers) - len(layout)


def make_record(item: Item, space: int) -> list[int]:
    """What the kernels read of an item that has been planned, but for the addresses of its tensors; its workspace is at
    ``space``."""
    record = [0] * table.FIELDS.value
    record[table.ROWS.value] = item.rows
    record[table.COLS.value] = item.cols
    record[table.SLICE.value] = item.slice
    record[table.SLICE_BYTES.value] = -(-item.slice // 8)
    record[table.TILE_ROWS.value] = item.tile_rows
    record[table.ROW_TILES.value] = item.row_tiles
    record[table.COL_TILES.value] = item.col_tiles
    record[table.ALL_ROWS.value] = item.all_rows or item.rows
    record[table.ALL_COLS.value] = item.all_cols or item.cols
    record[table.START.value] = item.start
    record[table.STRIDE.value] = item.stride
    record[table.ROW.value] = item.row
    record[table.ROW_STEP.value] = item.row_step
    record[table.COL.value] = item.col
    record[table.BLOCKS.value] = item.blocks
    for name, start in item.spaces.items():
        record[SPACES[name].value] = space + start
    return record


def tile_tables(launches: Sequence[Launch], device: torch.device) -> list[Tensor]:
    """A tensor of its own for each launch: alike aligned, so that no launch compiles its kernel anew."""
    return [torch.tensor(launch.tiles, dtype=torch.int32, device="cpu").to(device) for launch in launches]


def host_memory(device: torch.device, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Memory that a copy to the device need not wait for. torch's allocator of pinned memory does not hand a buffer
    out again before the copies from it are done."""
    return torch.empty(count, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured, in whose replays what is launched now will run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> Any:
    """The device's current stream; None where it has none."""
    return None if device.type == "cpu" else getattr(torch, device.type).current_stream(device)


def _resolved(grads: Tensors) -> list[Tensor]:
    """The gradients, where one of them is a view that negates; else nothing."""
    return [grad.resolve_neg() for grad in grads] if any(map(Tensor.is_neg, grads)) else []


def _read(grads: Tensors) -> tuple[list[int], list[torch.dtype], list[tuple[int, ...]] | None]:
    """Where gradients lie and how: addresses, types, and strides where one of them is not contiguous."""
    strides = None if all(map(Tensor.is_contiguous, grads)) else list(map(Tensor.stride, grads))
    return list(map(Tensor.data_ptr, grads)), list(map(_DTYPE, grads)), strides


def _aligned(grads: Tensors, addresses: Sequence[int], strides: Any) -> list[bool]:
    return [
        address % 16 == 0 and (strides is None or grad.is_contiguous())
        for address, grad in zip(addresses, grads, strict=True)
    ]


def current(device: torch.device) -> AbstractContextManager[Any]:
    """The device made current, and with it the stream that torch uses there."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()
