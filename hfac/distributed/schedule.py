"""Few collectives for many parameters: jobs that need sums over process groups run in lockstep, and what they send over
one group at one time shares a buffer."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
#: A job needs sums over ranks of what it puts into its part of a collective's buffer: a 1-d tensor ("room"), the same
#: one in every step, which is zero when the job is to fill it. The job yields until then, fills it, yields, and goes on
#: when the room has passed the stage. It returns what is left to do once all jobs have come this far.
Job = Generator[None, None, Callable[[], None]]


class Stage(NamedTuple):
    """One collective of the few that add up numbers over a mesh: it adds them up over a process group, or gives all its
    ranks those of the first."""

    group: dist.ProcessGroup
    copies: bool = False

    @property
    def name(self) -> tuple[str, bool]:
        """The same on this rank for the same stage; it differs between ranks, and decides nothing."""
        return self.group.group_name, self.copies

    def run(self, numbers: Tensor, async_op: bool = False) -> dist.Work | None:
        if self.copies:
            return dist.broadcast(numbers, dist.get_global_rank(self.group, 0), group=self.group, async_op=async_op)
        return dist.all_reduce(numbers, group=self.group, async_op=async_op)


class Sent(NamedTuple):
    """What passes a stage in a step."""

    stage: Stage
    bytes: int
    dtype: torch.dtype


def process_groups(name: str, given: Any) -> tuple[dist.ProcessGroup, ...]:
    """The process groups that are given: one, a DeviceMesh for those of its dimensions, several of these, or None.

    Raises:
        TypeError: it is something else; the message begins with ``name``.
    """
    if given is None:
        return ()
    if hasattr(given, "get_group") and hasattr(given, "ndim"):
        return tuple(given.get_group(d) for d in range(given.ndim))
    if hasattr(given, "size") and hasattr(given, "group_name"):
        return (given,)
    if isinstance(given, list | tuple) and given:
        return tuple(group for each in given for group in process_groups(name, each))
    raise TypeError(
        f"{name} must be a torch.distributed process group, a DeviceMesh, a list of these, a dict from parameters to "
        f"these, or None, got {given!r}"
    )


def stages(mesh: DeviceMesh, summed: Iterable[int], same: Iterable[int]) -> list[Stage]:
    """How to add up numbers over the mesh dimensions in ``summed``, the innermost first, so that all ranks that differ
    in these dimensions and those in ``same`` get the same bits.

    Two groups may add up in different orders, so the ranks of one group end with the same bits, but other groups that
    add up the same numbers perhaps with others. The first rank's are then copied to the ranks along every dimension
    but the last that was summed over. Process groups are those that the mesh has; none is made.
    """
    dims = sorted(summed, reverse=True)
    if not dims:
        return []
    others = sorted({*dims, *(d for d in same if mesh.size(d) > 1)} - {dims[-1]}, reverse=True)
    return [Stage(mesh.get_group(d)) for d in dims] + [Stage(mesh.get_group(d), copies=True) for d in others]


@dataclass(frozen=True)
class Needs:
    """What a job will ask for, in order: stages, and how many numbers."""

    requests: Sequence[tuple[Stage, int]]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Collective:
    """A stage, and which jobs have how much room in it."""

    stage: Stage
    dtype: torch.dtype
    device: torch.device
    jobs: list[int]
    sizes: list[int]

    def sent(self, stage: Stage | None = None) -> Sent:
        """What passes this stage, or another that the buffer passes after it."""
        return Sent(stage or self.stage, sum(self.sizes) * self.dtype.itemsize, self.dtype)

    @cached_property
    def buffer(self) -> Tensor:
        """What is sent, kept from step to step."""
        return torch.zeros(sum(self.sizes), dtype=self.dtype, device=self.device)

    def rooms(self) -> list[Tensor]:
        """Each job's room in the buffer."""
        return list(self.buffer.split(self.sizes))


def collectives(needs: Sequence[Needs]) -> list[Collective]:
    """The collectives of jobs with these needs, in order; jobs that are at the same stage share one."""
    left = [list(mine.requests) for mine in needs]
    found: list[Collective] = []
    for stage in merged([[stage for stage, _ in requests] for requests in left]):
        kinds: dict[tuple[torch.dtype, torch.device], Collective] = {}
        for i, requests in enumerate(left):
            if requests and requests[0][0].name == stage.name:
                kind = needs[i].dtype, needs[i].device
                collective = kinds.setdefault(kind, Collective(stage, *kind, [], []))
                collective.jobs.append(i)
                collective.sizes.append(requests.pop(0)[1])
        found += kinds.values()
    return found


def running(
    jobs: Sequence[Job], planned: Sequence[Collective], async_op: bool = False
) -> Generator[dist.Work, None, list[Callable[[], None]]]:
    """Runs jobs with the `collectives` of their needs, and returns what they return. With ``async_op`` it yields each
    collective that is under way, to be waited for before it goes on.

    Every rank of a group must run jobs that ask the group for the same sums.
    """
    rest: dict[int, Callable[[], None]] = {}

    def advance(i: int) -> None:
        try:
            next(jobs[i])
        except StopIteration as end:
            rest[i] = end.value

    for i in range(len(jobs)):
        advance(i)
    for collective in planned:
        collective.buffer.zero_()
        for i in collective.jobs:
            next(jobs[i])
        work = collective.stage.run(collective.buffer, async_op=async_op)
        if work is not None:
            yield work
        for i in collective.jobs:
            advance(i)
    assert len(rest) == len(jobs), "a job asks for more sums than it planned"
    return [rest[i] for i in range(len(jobs))]


def finished(step: Generator[dist.Work | None, None, T]) -> T:
    """What a generator returns that yields collectives, once it has come to its end; each is waited for."""
    while True:
        try:
            work = next(step)
        except StopIteration as end:
            return cast(T, end.value)
        if work is not None:
            work.wait()


def rooms_of(planned: Sequence[Collective], jobs: int) -> list[list[Tensor]]:
    """By job, the rooms that it fills, in order."""
    found: list[list[Tensor]] = [[] for _ in range(jobs)]
    for collective in planned:
        for i, room in zip(collective.jobs, collective.rooms(), strict=True):
            found[i].append(room)
    return found


def reduced(rooms: Sequence[Tensor], fill: Callable[[], object]) -> Generator[None, None, None]:
    """The steps of a job whose numbers pass several stages, one after the other: ``fill`` puts them into the first
    room, and the last one has the result."""
    for k, room in enumerate(rooms):
        yield
        if k == 0:
            fill()
        else:
            room.copy_(rooms[k - 1])
        yield


def merged(sequences: Sequence[Sequence[Stage]]) -> list[Stage]:
    """A short sequence of stages that contains each of the given sequences in its order.

    The next stage is the one that most stages must still follow.
    """
    left = [list(sequence) for sequence in sequences if sequence]
    order = []
    while left:
        longest = max(map(len, left))
        stage = next(sequence[0] for sequence in left if len(sequence) == longest)
        order.append(stage)
        left = [rest for sequence in left if (rest := _after(stage, sequence))]
    return order


def _after(stage: Stage, sequence: list[Stage]) -> list[Stage]:
    return sequence[1:] if sequence[0].name == stage.name else sequence
