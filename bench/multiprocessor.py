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

    Warps are shared out among the schedulers. What a warp does between two events takes its turn, and takes as long as
    its instructions depend on each other.
    """
    free = [0.0] * SCHEDULERS
    queue: list[tuple[float, int]] = []
    warps: list[tuple[int, Sequence]] = []
    for block, members in enumerate(blocks):
        for member in members:
            queue.append((0.0, len(warps)))
            warps.append((block, member.events))
    heapq.heapify(queue)
    left = [len(members) for members in blocks]
    waiting: list[list[tuple[float, int]]] = [[] for _ in blocks]
    position, done = [0] * len(warps), [0] * len(warps)
    arrived: list[dict[int, float]] = [{} for _ in warps]
    end = 0.0
    while queue:
        now, warp = heapq.heappop(queue)
        block, events = warps[warp]
        event = events[position[warp]]
        turn = min(_TURN, event.issued - done[warp])
        scheduler = warp % SCHEDULERS
        begin = max(now, free[scheduler])
        busy = turn / ISSUE_SHARE
        free[scheduler] = begin + busy
        at = begin + max(busy, event.cycles * turn / event.issued if event.issued else event.cycles)
        done[warp] += turn
        if done[warp] < event.issued:
            heapq.heappush(queue, (at, warp))
            continue
        position[warp] += 1
        done[warp] = 0
        if isinstance(event, Load):
            arrived[warp][event.token] = at + (memory_cycles if event.latency is None else event.latency)
        elif event.token >= 0:
            at = max(at, arrived[warp].pop(event.token, 0.0))
        else:
            if event.token == -1:
                waiting[block].append((at, warp))
            else:
                left[block] -= 1
                end = max(end, at)
            if waiting[block] and len(waiting[block]) >= left[block]:
                together = max(when for when, _ in waiting[block])
                for _, other in waiting[block]:
                    heapq.heappush(queue, (together, other))
                waiting[block] = []
            continue
        heapq.heappush(queue, (at, warp))
    return end


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
