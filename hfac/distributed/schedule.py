"""Few collectives for many parameters: jobs that need sums over process groups run in lockstep, and what they sum over
one group at one time shares a buffer."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

#: A job yields where it needs sums over ranks, is sent a zeroed 1-d tensor ("room") of the size that it planned, fills
#: it, yields, and resumes when the tensor holds the sums over the group. It returns what is left to do once all jobs
#: have come this far.
Job = Generator[None, Tensor | None, Callable[[], None]]


@dataclass(frozen=True)
class Needs:
    """The sums that a job will ask for, in order: process group, and how many numbers."""

    requests: Sequence[tuple[dist.ProcessGroup, int]]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Collective:
    """One all-reduce: its group, and which jobs have how much room in it."""

    group: dist.ProcessGroup
    dtype: torch.dtype
    device: torch.device
    jobs: list[int]
    sizes: list[int]

    @property
    def bytes(self) -> int:
        return sum(self.sizes) * self.dtype.itemsize

    def rooms(self) -> tuple[Tensor, list[Tensor]]:
        """A zeroed buffer, and each job's room in it."""
        buffer = torch.zeros(sum(self.sizes), dtype=self.dtype, device=self.device)
        return buffer, list(buffer.split(self.sizes))


def collectives(needs: Sequence[Needs]) -> list[Collective]:
    """The all-reduces of jobs with these needs, in order; jobs that are at the same group share one."""
    left = [list(mine.requests) for mine in needs]
    found: list[Collective] = []
    for group in merged([[group for group, _ in requests] for requests in left]):
        kinds: dict[tuple[torch.dtype, torch.device], Collective] = {}
        for i, requests in enumerate(left):
            if requests and requests[0][0].group_name == group.group_name:
                kind = needs[i].dtype, needs[i].device
                collective = kinds.setdefault(kind, Collective(group, *kind, [], []))
                collective.jobs.append(i)
                collective.sizes.append(requests.pop(0)[1])
        found += kinds.values()
    return found


def run(jobs: Sequence[Job], needs: Sequence[Needs]) -> list[Callable[[], None]]:
    """Runs the jobs, each with its needs, and returns what they return.

    Every rank of a group must call it with jobs that ask the group for the same sums.
    """
    rest: list[Callable[[], None]] = []

    def advance(i: int) -> None:
        try:
            next(jobs[i])
        except StopIteration as end:
            rest.append(end.value)

    for i in range(len(jobs)):
        advance(i)
    for collective in collectives(needs):
        buffer, rooms = collective.rooms()
        for i, room in zip(collective.jobs, rooms, strict=True):
            jobs[i].send(room)
        dist.all_reduce(buffer, group=collective.group)
        for i in collective.jobs:
            advance(i)
    assert len(rest) == len(jobs), "a job asks for more sums than it planned"
    return rest


def reduced(times: int, fill: Callable[[Tensor], object]) -> Generator[None, Tensor | None, Tensor]:
    """The steps of a job that sum over several groups, one after the other."""
    sums: Tensor | None = None
    for _ in range(times):
        room = yield
        assert room is not None
        if sums is None:
            fill(room)
        else:
            room.copy_(sums)
        sums = room
        yield
    assert sums is not None
    return sums


def merged(sequences: Sequence[Sequence[dist.ProcessGroup]]) -> list[dist.ProcessGroup]:
    """A short sequence of groups that contains each of the given sequences in its order.

    The next group is the one that most groups must still follow. Groups with the same name are the same; the names
    themselves differ between ranks and decide nothing.
    """
    left = [list(sequence) for sequence in sequences if sequence]
    order = []
    while left:
        longest = max(map(len, left))
        group = next(sequence[0] for sequence in left if len(sequence) == longest)
        order.append(group)
        left = [rest for sequence in left if (rest := _after(group, sequence))]
    return order


def _after(group: dist.ProcessGroup, sequence: list[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    return sequence[1:] if sequence[0].group_name == group.group_name else sequence
