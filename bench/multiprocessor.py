"""A GPU's multiprocessors: what they hold, and how long one takes for blocks whose warps' loads and waits are known."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .walk import Load, Warp

#: of the instructions that a scheduler could issue, the share that it does
ISSUE_SHARE = 0.75
#: seconds until a load from the GPU's memory is there, while many others are under way
MEMORY_LATENCY = 0.8e-6
#: seconds between the end of a launch and the beginning of one that waits for it
LAUNCH_GAP = 3e-6
SCHEDULERS = 4
#: instructions of a warp before others have their turn
_TURN = 32


@dataclass(frozen=True)
class Gpu:
    """A GPU; ``copy`` is the rate of a device copy in bytes per second, ``shared`` bytes of a multiprocessor."""

    name: str
    arch: str
    multiprocessors: int
    clock: float
    copy: float
    l2_bytes: int
    shared: int
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536

    @property
    def needed_in_flight(self) -> float:
        """Bytes that a multiprocessor must have under way for the copy rate."""
        return self.copy * MEMORY_LATENCY / self.multiprocessors

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks of a kernel that a multiprocessor holds at a time."""
        warps = math.ceil(threads / 32)
        of_warp = math.ceil(registers * 32 / 256) * 256
        # Registers are a scheduler's own, and so are warps.
        by_registers = SCHEDULERS * (self.registers // SCHEDULERS // of_warp) // warps
        by_shared = self.shared // shared if shared else self.blocks
        return min(self.blocks, self.threads // (warps * 32), by_registers, by_shared)


#: one for each GPU that figures are printed for, by its name on the command line
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("H200", "90", 132, 1.75e9, 4.3e12, 50 << 20, 228 << 10),
        Gpu("H100", "90", 132, 1.75e9, 3.0e12, 50 << 20, 228 << 10),
        Gpu("A100", "80", 108, 1.41e9, 1.9e12, 40 << 20, 164 << 10),
    )
}


def cycles(blocks: Sequence[Sequence[Warp]], memory_cycles: float) -> float:
    """Cycles that one multiprocessor takes for blocks that begin together, if memory had no limit but its latency.

    Warps are shared out among the schedulers. Whether these let the oldest warp that is ready issue, or all in turn, is
    not known: it is the better of both. Between two events a warp takes as long as its instructions depend on each
    other.
    """
    return min(_cycles(blocks, memory_cycles, oldest) for oldest in (True, False))


def _cycles(blocks: Sequence[Sequence[Warp]], memory_cycles: float, oldest: bool) -> float:
    warps = [(block, member.events) for block, members in enumerate(blocks) for member in members]
    mine = [range(scheduler, len(warps), SCHEDULERS) for scheduler in range(SCHEDULERS)]
    ready, free = [0.0] * len(warps), [0.0] * SCHEDULERS
    position, done = [0] * len(warps), [0] * len(warps)
    arrived: list[dict[int, float]] = [{} for _ in warps]
    left = [len(members) for members in blocks]
    waiting: list[list[tuple[float, int]]] = [[] for _ in blocks]
    never, end = math.inf, 0.0
    while True:
        starts = [max(free[s], min((ready[w] for w in mine[s]), default=never)) for s in range(SCHEDULERS)]
        begin = min(starts)
        if begin == never:
            return end
        scheduler = starts.index(begin)
        able = [w for w in mine[scheduler] if ready[w] <= begin]
        warp = able[0] if oldest else min(able, key=ready.__getitem__)
        block, events = warps[warp]
        event = events[position[warp]]
        turn = min(_TURN, event.issued - done[warp])
        busy = turn / ISSUE_SHARE
        free[scheduler] = begin + busy
        at = begin + max(busy, event.cycles * turn / event.issued if event.issued else event.cycles)
        done[warp] += turn
        ready[warp] = at
        if done[warp] < event.issued:
            continue
        position[warp] += 1
        done[warp] = 0
        if isinstance(event, Load):
            arrived[warp][event.token] = at + (memory_cycles if event.latency is None else event.latency)
            continue
        if event.token >= 0:
            ready[warp] = max(at, arrived[warp].pop(event.token, 0.0))
            continue
        ready[warp] = never
        if event.token == -1:
            waiting[block].append((at, warp))
        else:
            left[block] -= 1
            end = max(end, at)
        if waiting[block] and len(waiting[block]) >= left[block]:
            together = max(at, *(when for when, _ in waiting[block]))
            for _, other in waiting[block]:
                ready[other] = together
            waiting[block] = []


def makespan(durations: Sequence[tuple[int, float]], slots: int) -> float:
    """The time that ``slots`` take for blocks in their order: (how many, how long each)."""
    free = [0.0] * slots
    for count, each in durations:
        whole, rest = divmod(count, slots)
        if whole > 4 and max(free) - min(free) <= each:  # as good as level
            free = [at + (whole - 2) * each for at in free]
            rest += 2 * slots
        else:
            rest = count
        for _ in range(rest):
            heapq.heapreplace(free, free[0] + each)
    return max(free)
