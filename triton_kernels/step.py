"""Steps on whole parameters, in rooms of device memory (`room`) that stay from step to step.

A step launches a handful of kernels, whatever the length of the list, waits for nothing, and allocates nothing of the
parameters' size. Numbers of a step (learning rate, decays, ...) are values in device memory: none is compiled in.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memory import bump_versions
from ..staging import refused
from . import platform
from .records import Operands, Tensors, aligned
from .room import Repeatable, Room, Shared

#: types of numbers on the host
_PLAIN = frozenset((float, int, bool, type(None)))
#: by device and stream
_shared: dict[tuple[torch.device, Any], Shared] = {}


class Statistics:
    """Sums of a first read of the gradients (`hfac.backends`). They own a room until a step uses them or they are
    dropped.

    Attributes:
        squares: float64 [parameters], each gradient's sum of squares, divided by grad_scale; 0 without elements.
        counted: whether zero rows have been counted.
    """

    def __init__(self, rooms: list[Room], room: Room, squares: Tensor, counted: bool) -> None:
        self._rooms, self._room = rooms, room
        self.squares, self.counted = squares, counted

    def take_room(self) -> Room | None:
        """The room, once."""
        room, self._room = self._room, None
        return room

    def give_back(self, room: Room | None) -> None:
        self._room = room

    def __del__(self) -> None:
        room = self.take_room()
        if room is not None:
            self._rooms.append(room)


class Bound:
    """An op on these parameters and lists, for as long as they lie where they lie.

    Where a parameter or gradient is not contiguous, its elements are found through its strides, in place. Several
    threads may step one list: each step, and each set of statistics, has a room of its own.

    Args:
        operands: of an op on whole parameters. Where they have places, every call brings ``seed`` and ``step``.

    Attributes:
        captured: what a CUDA graph reads in every replay, which must not be changed or freed. Only captures add to
            it; the owner may replace the list by one that lives longer.
    """

    #: The kernels divide by a GradScaler's scale and look at its found_inf themselves.
    unscales = True
    #: Where gradients have not moved their addresses are not read anew.
    compares = True

    def __init__(self, operands: Operands) -> None:
        self._operands, self._params = operands, operands.params
        self.device = self._params[0].device
        self._rooms: list[Room] = []  # those that are free
        self._lock = threading.Lock()
        self._stream = platform.stream_of(self.device)  # of the last step
        self._shared: tuple[Any, Shared] | None = None  # on that stream
        self.captured: list[Any] = []

    def __call__(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        seen: Any = None,
        statistics: Statistics | None = None,
        clip: Tensor | None = None,
        watched: Tensor | None = None,
        **numbers: Any,
    ) -> None:
        """One step.

        Args:
            seen: a snapshot of the gradients (`hfac.backends`), or None.
            nonfinite: as the op's function in `hfac.reference` fills it.
            statistics: of the same gradients and numbers, but for grad_scale, which is now also divided by ``clip``.
                Where that is 1 they are the step's, elsewhere they are taken again, and with them ``nonfinite``.
                Statistics serve one step; another with the same ones is made from the beginning.
            clip: what gradients are multiplied by, a 0-d float32 tensor on the device, which is not read here; with
                ``statistics`` only.
            watched: float64 [parameters, 5] on the device (`table.CHANGE` and so on), to which the step adds what it
                does to each parameter that it writes. Rows and columns are those of H-Fac's matrices.
            numbers: the op's by name; ``seed`` and ``step`` where there are places; and ``grad_scale`` and
                ``found_inf``, float32 tensors of one element on the device: gradients are divided by the one, and where
                the other is not zero every parameter keeps its value.
        """
        options = options_of(self._operands, numbers, nonfinite, watched)
        with self._lock, platform.current(self.device):
            room = None if statistics is None or clip is None else statistics.take_room()
            resumed = room is not None
            if room is None or statistics is None or clip is None:
                room = self._open(grads, options, numbers, seen)
            else:
                options["AGAIN"] = watched is None or statistics.counted
                self._resume(room, options, clip)
            try:
                if watched is not None:
                    contiguous = torch.contiguous_format
                    room.watched = watched if aligned(watched) else torch.zeros_like(watched, memory_format=contiguous)
                room.scale(numbers)
                room.launch("launches", options)
                self._close(room, nonfinite, numbers)
                if watched is not None and room.watched is not watched:
                    watched.add_(room.watched)
                if watched is None and (statistics is None or resumed):
                    self._keep("rest" if resumed else "step", room, seen, options, numbers, nonfinite)
            finally:
                room.watched = None
                self._rooms.append(room)
        bump_versions(self._params)

    def statistics(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        seen: Any = None,
        watched: Tensor | None = None,
        **numbers: Any,
    ) -> Statistics:
        """The statistics of the step that a call with these arguments would make. ``nonfinite`` is filled as by a step
        of an op that ``reads_twice``, of others by the step alone. ``watched`` is not written; with it, a step that is
        watched need not take the statistics again."""
        options = options_of(self._operands, numbers, nonfinite, watched)
        with self._lock, platform.current(self.device):
            room = self._open(grads, options, numbers, seen)
            if room.squares is None:  # what nothing writes there stays 0
                room.squares = torch.zeros(len(self._params), dtype=torch.float64, device=self.device)
            found = Statistics(self._rooms, room, room.squares, watched is not None)
            room.scale(numbers)
            room.launch("statistics", options)
            room.launch("squares", options)
            self._close(room, nonfinite, numbers)
            if watched is None:
                self._keep("statistics", room, seen, options, numbers, nonfinite)
        return found

    def _keep(
        self,
        which: str,
        room: Room,
        seen: Any,
        options: Mapping[str, bool],
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None,
    ) -> None:
        """Keeps what launches that may be repeated were made for."""
        if not (seen is None or numbers.get("found_inf") is not None or self.capturing()):
            kind = _kind_of(numbers, nonfinite, numbers.get("grad_scale"))
            room.last[which] = Repeatable(seen, kind, options)

    def capturing(self) -> bool:
        """Whether a graph is being captured, in whose replays what is launched now will run."""
        return platform.capturing(self.device)

    def check_capture(self, grads: Tensors, nonfinite: Tensor | None = None, clip_threshold: Any = None) -> None:
        """As `Room.check_capture`, of the room that the next step will have."""
        if not self._rooms:
            raise refused("this is the first step on these tensors")
        self._rooms[-1].check_capture(grads)

    def workspace_bytes(self) -> int:
        """Bytes of partial sums that are kept from step to step; 0 before the first."""
        return sum(room.workspace.numel() for room in self._rooms if room.workspace is not None)

    def statistics_again(
        self,
        seen: Any,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None = None,
        moved: tuple[Any, Tensors] | None = None,
    ) -> Statistics | None:
        """As `hfac.backends` describes it."""
        with self._lock, platform.current(self.device):
            room = self._rooms[-1] if self._rooms else None
            options = self._repeatable("statistics", room, seen, numbers, nonfinite, None, moved)
            if room is None or options is None or room.squares is None or not _is_shared(numbers, nonfinite):
                return None
            found = Statistics(self._rooms, self._rooms.pop(), room.squares, False)
            self._launch(("statistics", "squares"), room, options, numbers)
        return found

    def again(
        self,
        seen: Any,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None = None,
        moved: tuple[Any, Tensors] | None = None,
        grad_scale: Tensor | None = None,
        statistics: Statistics | None = None,
        clip: Tensor | None = None,
    ) -> bool:
        """As `hfac.backends` describes it."""
        shared = _is_shared(numbers, nonfinite)
        if statistics is not None and not shared:
            return False
        with self._lock, platform.current(self.device):
            if statistics is not None:
                which, room = "rest", statistics.take_room()
            else:
                which, room = "step", self._rooms[-1] if self._rooms else None
            options = self._repeatable(which, room, seen, numbers, nonfinite, grad_scale, moved)
            if room is None or options is None:
                if statistics is not None:
                    statistics.give_back(room)
                return False
            try:
                if shared:
                    self._launch(("launches",), room, options, numbers, grad_scale, clip)
                else:
                    room.set_scalars(numbers, capturing=False)
                    room.scale({"grad_scale": grad_scale})
                    if nonfinite is not None:
                        room.flags.zero_()
                    room.repeat("launches", options)
                    if nonfinite is not None:
                        nonfinite.copy_(room.flags)
            finally:
                if statistics is not None:
                    self._rooms.append(room)
        bump_versions(self._params)
        return True

    def _repeatable(
        self,
        which: str,
        room: Room | None,
        seen: Any,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None,
        grad_scale: Tensor | None,
        moved: tuple[Any, Tensors] | None,
    ) -> Mapping[str, bool] | None:
        """The options of the room's last launches of this kind, where these only repeat them, with the gradients found
        where they have moved; else None."""
        last = None if room is None else room.last.get(which)
        if room is None or last is None or last.kind != _kind_of(numbers, nonfinite, grad_scale) or self.capturing():
            return None
        if last.seen is not seen and (moved is None or last.seen is not moved[0]):
            return None
        stream = platform.stream_of(self.device)
        if stream != room.stream or stream != self._stream:
            return None
        if moved is not None and last.seen is not seen:
            before, room.last = room.last, {}  # until all is there, whatever may fail before
            room.locate(moved[1], False, seen)
            room.last = {name: replace(one, seen=seen) for name, one in before.items() if one.seen is last.seen}
        return last.options

    def _launch(
        self,
        names: Sequence[str],
        room: Room,
        options: Mapping[str, bool],
        numbers: Mapping[str, Any],
        grad_scale: Tensor | None = None,
        coefficient: Tensor | None = None,
    ) -> None:
        """Launches on numbers in the memory that all lists share on this stream."""
        if self._shared is None or self._shared[0] != self._stream:
            key = self.device, self._stream
            self._shared = self._stream, _shared.get(key) or _shared.setdefault(key, Shared(self.device))
        shared = self._shared[1]
        with shared.lock:
            shared.bring(numbers, grad_scale, coefficient)
            room.scalars = shared.scalars
            for name in names:
                room.repeat(name, options)

    def _open(self, grads: Tensors, options: Mapping[str, bool], numbers: Mapping[str, Any], seen: Any) -> Room:
        """A room with all that the launches of a step read."""
        capturing = self.capturing()
        room = self._rooms.pop() if self._rooms else Room(self._operands)
        room.last = {}
        try:
            if capturing:
                room.check_capture(grads)
            else:
                self._follow(room)
            room.locate(grads, capturing, seen)
            room.set_scalars(numbers, capturing)
            if options["SKIP"]:
                room.flags.zero_()
        except BaseException:
            self._rooms.append(room)
            raise
        return room

    def _resume(self, room: Room, options: Mapping[str, bool], clip: Tensor) -> None:
        """Only the coefficient is missing."""
        if not self.capturing():
            self._follow(room)
        room.multiply(clip)
        if options["SKIP"]:
            room.flags.mul_(clip == 1)

    def _close(self, room: Room, nonfinite: Tensor | None, numbers: Mapping[str, Any]) -> None:
        """Reports which gradients are not finite (none, where found_inf has reported it of all), and keeps what has
        been launched for a graph."""
        found_inf = numbers.get("found_inf")
        if nonfinite is not None:
            nonfinite.copy_(room.flags if found_inf is None else room.flags * (found_inf.reshape(()) == 0))
        if self.capturing():
            self.captured += [*room.memory(), room.staged.source, room.squares, room.watched]

    def _follow(self, room: Room) -> None:
        """Continues on the current stream: after the last step's stream, and with memory that the allocator does not
        reuse before both are done with it."""
        stream = platform.stream_of(self.device)
        if stream != self._stream:
            stream.wait_stream(self._stream)
            self._stream = stream
        if stream != room.stream:
            for tensor in room.memory():
                tensor.record_stream(stream)
            room.stream = stream


def options_of(
    operands: Operands, numbers: Mapping[str, Any], nonfinite: Tensor | None = None, watched: Tensor | None = None
) -> dict[str, bool]:
    """What kernels are compiled for (`element`)."""
    return {
        "FIRST": any(one.moment == 1 and one.name in operands.lists for one in operands.op.operands),
        "COUPLED": not numbers.get("decoupled_weight_decay", True),
        "NEGATE": numbers.get("maximize", False),
        "CLIPPED": numbers.get("clip_threshold") is not None,
        "SCALED": numbers.get("grad_scale") is not None,
        "SKIP": nonfinite is not None or numbers.get("found_inf") is not None,
        "LOOK": nonfinite is not None,
        "WATCH": watched is not None,
        "AGAIN": False,
    }


def _is_shared(numbers: Mapping[str, Any], nonfinite: Tensor | None) -> bool:
    """Whether lists may share these numbers in memory (`Shared`)."""
    return nonfinite is None and _told(numbers).plain


def _kind_of(numbers: Mapping[str, Any], nonfinite: Tensor | None, grad_scale: Tensor | None = None) -> tuple[Any, ...]:
    """What kernels are compiled for of what a step is told."""
    return _told(numbers).options, nonfinite is not None, grad_scale is not None


class _Told(NamedTuple):
    """What a step's numbers say of its launches."""

    numbers: Mapping[str, Any]
    plain: bool  # none is a tensor
    options: tuple[bool, ...]  # that kernels are compiled for


#: the last of which none is a tensor: parameters that are stepped one by one share their numbers, which nobody changes
_last_told: _Told | None = None


def _told(numbers: Mapping[str, Any]) -> _Told:
    global _last_told
    known = _last_told  # another thread may replace it
    if known is not None and known.numbers is numbers:
        return known
    options = numbers.get("decoupled_weight_decay", True), numbers.get("maximize", False)
    clips = numbers.get("clip_threshold") is not None
    found = _Told(numbers, _PLAIN.issuperset(map(type, numbers.values())), (*options, clips))
    if found.plain:
        _last_told = found
    return found
