"""Few collectives for many parameters: jobs that need sums over process groups run in lockstep, and what they reduce
over one group at one time travels in one buffer."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    Request = tuple[dist.ProcessGroup, int] | None
#: A job asks for room, (group, number of numbers), gets a zeroed 1-d tensor, fills it, yields None, and goes on when
#: the tensor holds the sums over the group. At its end it returns what is left to do when all jobs have come so far.
Job: TypeAlias = "Generator[Request, Tensor | None, Callable[[], None]]"


@dataclass(frozen=True)
class Planned:
    """A job, and all that it will ask for, in order."""

    groups: Sequence[dist.ProcessGroup]
    dtype: torch.dtype
    device: torch.device
    job: Job


def run(planned: Sequence[Planned]) -> list[Callable[[], None]]:
    """Runs the jobs, with one all-reduce for all of them wherever they meet, and returns what they return.

    Every rank of a group must call it with jobs that ask for the same of that group.
    """
    rest: list[Callable[[], None]] = []
    waiting: dict[int, tuple[dist.ProcessGroup, int]] = {}

    def advance(i: int) -> None:
        try:
            request = next(planned[i].job)
            assert request is not None, "a job that got its sums asks for more, or ends"
            waiting[i] = request
        except StopIteration as end:
            rest.append(end.value)

    for i in range(len(planned)):
        advance(i)
    for group in merged([p.groups for p in planned]):
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, (wanted, _) in waiting.items():
            if wanted.group_name == group.group_name:
                kinds.setdefault((planned[i].dtype, planned[i].device), []).append(i)
        for (dtype, device), jobs in kinds.items():
            sizes = [waiting.pop(i)[1] for i in jobs]
            buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
            for i, room in zip(jobs, buffer.split(sizes), strict=True):
                planned[i].job.send(room)
            dist.all_reduce(buffer, group=group)
            for i in jobs:
                advance(i)
    assert not waiting, "a job asked for a group that it had not planned for"
    return rest


def reduced(
    groups: Sequence[dist.ProcessGroup], size: int, fill: Callable[[Tensor], None]
) -> Generator[Request, Tensor | None, Tensor]:
    """The part of a job that sums over several groups, one after the other."""
    sums: Tensor | None = None
    for group in groups:
        room = yield group, size
        assert room is not None
        if sums is None:
            fill(room)
        else:
            room.copy_(sums)
        sums = room
        yield None
    assert sums is not None
    return sums


def merged(sequences: Sequence[Sequence[dist.ProcessGroup]]) -> list[dist.ProcessGroup]:
    """A short sequence of groups that holds each of the given ones, in its order.

    The next group is the one that has most left to come behind it. Groups are the same where their names are; what the
    names are differs from rank to rank and decides nothing.
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
