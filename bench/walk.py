"""A walk of the path that a block of a kernel executes, through its machine code and without a GPU.

Integers, addresses and predicates are computed from the kernel's arguments and from what it reads of the table of
tensors; floats are not. So loops run as often as they would, and options that are off are passed by. A branch that
depends on floats is the slow end of a root or a quotient, and is not taken: it is known by the call that it ends in.
Other branches that nothing decides are counted as `undecided`, and not taken.
"""

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .cubin import Code
from .sass import Instruction, Value
from .sass_results import Decoder, combined

LANES = 32
#: bytes that memory sends at least, a quarter of a line
SECTOR = 32
#: cycles of a load: of bytes that the warp has read just now; of a table or of partial sums, in L2; `None`: from memory
L1_CYCLES, L2_CYCLES = 36, 300
#: address of blockDim among the constants, by that of the first argument
_DIMENSIONS = {0x160: 0, 0x210: 0, 0x380: 0x360}
#: registers that nothing has been written to: compilers set bits one by one in some, and read no others
_UNWRITTEN = {f"R{k}": 0 for k in range(255)} | {f"UR{k}": 0 for k in range(63)}
_UNWRITTEN |= {f"{kind}{k}": False for kind in ("P", "UP") for k in range(7)}


@dataclass
class Memory:
    """Bytes that are known, by their address; from ``operands`` on are the tensors, which come from memory."""

    known: list[tuple[int, bytes]]
    counters: int = 0
    operands: int = 1 << 62

    def __post_init__(self) -> None:
        self.known.sort()
        self._begins = [at for at, _ in self.known]

    def read(self, at: int, size: int) -> int | None:
        k = bisect_right(self._begins, at) - 1
        if k < 0 or at + size > self._begins[k] + len(self.known[k][1]):
            return None
        begin = at - self._begins[k]
        return int.from_bytes(self.known[k][1][begin : begin + size], "little")


@dataclass
class Load:
    """Issued `issued` instructions and `cycles` after the event before."""

    issued: int
    cycles: int
    token: int
    latency: int | None  # in cycles, or None: from the GPU's memory
    bytes: int  # of the sectors that it brings: of 32 bits a lane's second 16 bytes come with its first ones


@dataclass
class Wait:
    """For a load, or with `token` below 0 for all warps of the block."""

    issued: int
    cycles: int
    token: int


@dataclass
class Warp:
    """What one warp executed, and the bytes that its threads loaded (of tensors alone) and stored."""

    instructions: int = 0
    mufu: int = 0
    shuffles: int = 0
    barriers: int = 0
    loaded: int = 0
    stored: int = 0
    wide: int = 0  # of both, bytes by accesses of 16
    local: int = 0
    in_flight: int = 0  # most bytes from the GPU's memory that were under way
    undecided: Counter[int] = field(default_factory=Counter)
    events: list[Load | Wait] = field(default_factory=list)


class Walker:
    """Follows one kernel.

    Args:
        code: the kernel.
        memory: what it reads that decides something.
        cached: bytes of L1 that a warp may count on.
    """

    def __init__(self, code: Code, memory: Memory, cached: int = 16 << 10) -> None:
        self.code, self.memory, self.cached = code, memory, cached
        self.registers: dict[str, Value] = {}
        self._decoder = Decoder(self.registers, b"")
        lines = code.lines
        self._numbers = {at: k for k, (at, _) in enumerate(lines)}
        self._program = [self._decoder.decode(*line) for line in lines]
        for ins in self._program:
            if ins.predicate:
                ins.reads.append(ins.predicate[0])

    def block(
        self,
        arguments: bytes,
        threads: int,
        blocks: int,
        index: int = 0,
        last: int = 0,
        alike: Sequence[object] = (),
        limit: int = 3_000_000,
    ) -> list[Warp]:
        """The warps of block ``index`` of a grid.

        ``last``: so many blocks count up to there, and it is the last. ``alike``: a key for each warp; of those with
        the same key only the first is walked, and stands for the others.
        """
        base = self.code.constants - len(arguments) if self.code.constants else 0x210
        constants = bytearray(base + len(arguments))
        constants[base:] = arguments
        dims = np.array([threads, 1, 1, blocks, 1, 1], np.uint32).tobytes()
        at = _DIMENSIONS.get(base, 0)
        constants[at : at + len(dims)] = dims
        self._decoder.constants = bytes(constants)
        self._shared: dict[int, Value] = {}
        self._atom = last - 1 if last else 0
        self._limit = limit
        walked: dict[object, Warp] = {}
        keys = alike or range((threads + LANES - 1) // LANES)
        for number, key in enumerate(keys):
            if key not in walked:
                walked[key] = self._warp(number, index)
        return [walked[key] for key in keys]

    def _warp(self, number: int, index: int) -> Warp:
        registers = self.registers
        registers.clear()
        registers |= _UNWRITTEN
        registers |= {"SR_TID.X": np.arange(LANES) + number * LANES, "SR_CTAID.X": index, "SR_LANEID": np.arange(LANES)}
        registers["SR_LTMASK"] = (1 << np.arange(LANES)) - 1
        warp, program = Warp(), self._program
        ready: dict[str, int] = {}  # cycle from which a register may be used
        pending: dict[str, int] = {}  # the load that it waits for
        under_way: dict[int, int] = {}
        lines: OrderedDict[int, None] = OrderedDict()
        self._seen: set[int] = set()
        clock = since = issued = token = flying = 0
        copies: list[list[int]] = [[]]  # asynchronous ones, by the groups that are waited for; the last is still open
        everyone = np.ones(LANES, bool)
        pc, mask = 0, everyone
        others: list[list] = []  # other groups of lanes: where they are, which, and the barrier that they wait at
        barriers: dict[str, np.ndarray] = {}
        alive = everyone
        holes: dict[str, np.ndarray] = {}  # lanes in which a register that is known is not
        while True:
            if others:
                pc, here, others = _next_group(pc, mask, others, barriers, alive)
                if here is None:
                    break
                mask = here
            ins = program[pc]
            issued += 1
            warp.instructions += 1
            if warp.instructions > self._limit:
                raise RuntimeError(f"{self.code.symbol}: more than {self._limit} instructions in a warp; at {ins.text}")
            start = clock
            for name in ins.reads:
                at = ready.get(name)
                if at is not None and at > start:
                    start = at
                waits = pending.get(name)
                if waits is not None:
                    warp.events.append(Wait(issued - 1, start - since, waits))
                    issued, since = 1, start
                    flying -= under_way.pop(waits, 0)
                    pending = {n: t for n, t in pending.items() if t != waits}
            clock = start + 1
            # What its predicate says of the lanes that are here: True, False, None (not known), or some of them.
            does: Value = True
            if ins.predicate is not None:
                name, negated = ins.predicate
                does = True if name in ("PT", "UPT") else registers.get(name)
                if holes and name in holes and (holes[name] & mask).any():
                    does = None
                if isinstance(does, np.ndarray):
                    does = does ^ negated
                    here = does[mask]
                    does = True if here.all() else False if not here.any() else does
                elif does is not None:
                    does = bool(does) ^ negated
            base = ins.base
            pc += 1
            # a jump, or a call with a predicate, which sm_80 has in its place
            if base == "BRA" or (base == "CALL" and ins.predicate is not None and does is not None):
                if ins.has("DIV") or does is False:
                    continue
                if base == "BRA" and len(ins.operands) > 1:
                    does = combined("AND", does, self._decoder.predicate(ins.operands[0])())
                    if does is False:
                        continue
                target = self._numbers[ins.target]
                if does is None:
                    if self._takes(pc, target, warp, ins):
                        pc = target
                    continue
                if isinstance(does, np.ndarray):
                    others.append([target, mask & does, None])
                    mask = mask & ~does
                else:
                    pc = target
                continue
            if does is False:
                continue
            if base == "EXIT":
                if does is None:
                    continue
                gone = mask if does is True else mask & does
                alive = alive & ~gone
                mask = mask & ~gone
                if not mask.any():
                    if not others:
                        break
                    pc = -1
                continue
            if base == "BSSY":
                barriers[ins.operands[0]] = mask
                continue
            if base == "BSYNC":
                if others and (barriers.get(ins.operands[0], mask) & alive & ~mask).any():
                    others.append([pc, mask, ins.operands[0]])
                    pc = -1
                continue
            if base == "BAR":
                warp.barriers += 1
                warp.events.append(Wait(issued, clock - since, -1))
                issued, since = 0, clock
                continue
            if base == "CALL":
                warp.undecided[ins.at] += 1
                continue
            if base == "LDGDEPBAR":
                copies.append([])
                continue
            if base == "DEPBAR":
                left = int(ins.operands[1], 16)
                while len(copies) - 1 > left:
                    for waits in copies.pop(0):
                        warp.events.append(Wait(issued, clock - since, waits))
                        issued, since = 0, clock
                        flying -= under_way.pop(waits, 0)
                continue
            partial = bool(others) or isinstance(does, np.ndarray)
            by = mask if does is True or does is None else mask & does
            if base in ("MUFU", "FCHK"):
                warp.mufu += 1
            elif base == "SHFL":
                warp.shuffles += 1
            elif base in ("VOTE", "VOTEU"):
                registers["lanes"] = int((1 << np.flatnonzero(by)).sum())
            values = ins.write() if ins.write is not None and does is not None else ()
            unknown = None
            if holes:
                for name in ins.reads:
                    if name in holes:
                        unknown = holes[name] if unknown is None else unknown | holes[name]
            if ins.address is not None:
                at = None if unknown is not None and (unknown & by).any() else ins.address()
                if base == "LDGSTS" and ins.does is not None:  # lanes that write zeros read nothing
                    reads = ins.does()
                    by = by & reads if reads is not None else by
                values, load = self._access(ins, by, at, lines, warp)
                if base == "LDGSTS":
                    load = load if by.any() else None
                    copies[-1] += [token + 1] if load else []
                if load is not None:
                    token += 1
                    load.token, load.issued, load.cycles = token, issued, clock - since
                    issued, since = 0, clock
                    warp.events.append(load)
                    if load.latency is None:
                        under_way[token] = load.bytes
                        flying += load.bytes
                        warp.in_flight = max(warp.in_flight, flying)
                    for name in ins.results:
                        pending[name] = token
            done = clock + ins.latency - 1
            for k, name in enumerate(ins.results):
                if name in ("PT", "UPT", "RZ", "URZ"):
                    continue
                value = values[k] if k < len(values) else None
                hole = unknown if value is not None else None
                if partial and name[0] != "U" and not (by == alive).all():  # the other lanes keep what they have
                    old = registers.get(name)
                    others_hole = holes.get(name)
                    if value is None and old is not None:
                        value, hole = old, by if others_hole is None else by | others_hole
                    elif value is not None:
                        rest = ~by if old is None else others_hole & ~by if others_hole is not None else None
                        hole = rest if hole is None else hole & by if rest is None else hole & by | rest
                        value = value if old is None else np.where(by, value, old)
                if hole is not None and hole.any():
                    holes[name] = hole
                elif holes:
                    holes.pop(name, None)
                registers[name] = value
                ready[name] = done
                if ins.address is None and name in pending:
                    del pending[name]
        warp.events.append(Wait(issued, clock - since, -2))
        return warp

    def _access(
        self, ins: Instruction, by: np.ndarray, at: Value, lines: OrderedDict[int, None], warp: Warp
    ) -> tuple[Sequence[Value], Load | None]:
        """What an access to memory gives, and its load."""
        base, size = ins.base, ins.width * int(by.sum())
        if base in ("LDL", "STL"):
            warp.local += 1
            return (), None
        if base == "LDS":
            if isinstance(at, int) and self._shared:
                return [self._shared.get(at + 4 * k) for k in range(max(1, ins.width // 4))], None
            return (), None
        if base in ("STS", "ATOMS"):
            self._store_shared(ins, at, by)
            return (), None
        first = None if at is None else int(at) if isinstance(at, int) else int(at[by][0]) if by.any() else None
        if base in ("STG", "ST", "RED", "REDG"):
            warp.stored += size
            warp.wide += size if ins.width == 16 else 0
            return (), None
        operand = first is None or first >= self.memory.operands
        warp.loaded += size if operand else 0
        warp.wide += size if operand and ins.width == 16 else 0
        if base in ("ATOMG", "ATOM"):
            counter = first is not None and self.memory.counters <= first < self.memory.operands
            known = self._atom if counter and ins.has("ADD") else None
            return [None if name.endswith("PT") else known for name in ins.results], Load(0, 0, 0, L2_CYCLES, 0)
        found: Sequence[Value] = ()
        if first is not None and not operand and (isinstance(at, int) or (at[by] == first).all()):
            piece = min(ins.width, 4)
            found = [self.memory.read(first + 4 * k, piece) for k in range(max(1, ins.width // 4))]
        latency: int | None = None if operand else L2_CYCLES
        addresses = np.empty(0, np.int64) if at is None else np.array([at]) if isinstance(at, int) else at[by]
        touched, sectors = (set((addresses // length).tolist()) for length in (128, SECTOR))
        if touched and not ins.has("STRONG"):
            if all(line in lines for line in touched):
                latency = L1_CYCLES
            elif all(line in self._seen for line in touched):
                latency = L2_CYCLES
            self._seen |= touched
            for line in touched:
                lines[line] = None
                lines.move_to_end(line)
            while len(lines) * 128 > self.cached:
                lines.popitem(last=False)
        return found, Load(0, 0, 0, latency, len(sectors) * SECTOR or size)

    def _store_shared(self, ins: Instruction, at: Value, by: np.ndarray) -> None:
        if at is None:  # one of many sums: what decides something lies at an address that is known
            return
        source = ins.operands[-1]
        value = self.registers.get(source, 0 if source == "RZ" else None)
        if value is None and not self._shared:
            return
        for lane in np.flatnonzero(by):
            where = at if isinstance(at, int) else int(at[lane])
            self._shared[where] = None if value is None else int(value if isinstance(value, int) else value[lane])

    def _takes(self, following: int, target: int, warp: Warp, ins: Instruction) -> bool:
        """Whether a branch is taken whose predicate nothing decides."""
        if target > following and self._calls(following, target):
            return True
        if not self._calls(target, target + 12):
            warp.undecided[ins.at] += 1
        return False

    def _calls(self, begin: int, end: int) -> bool:
        """Is there a call on the straight way from ``begin``?"""
        for k in range(begin, min(end, begin + 40, len(self._program))):
            ins = self._program[k]
            if ins.base == "CALL":
                return True
            if ins.base in ("EXIT", "RET") or (ins.base == "BRA" and ins.predicate is None):
                return False
        return False


def _next_group(
    pc: int, mask: np.ndarray, others: list[list], barriers: dict[str, np.ndarray], alive: np.ndarray
) -> tuple[int, np.ndarray | None, list[list]]:
    """The lanes that are furthest behind, with all others that are there too."""
    if pc >= 0 and mask.any():
        others.append([pc, mask, None])
    for barrier in {group[2] for group in others} - {None}:
        there = [group for group in others if group[2] == barrier]
        here = np.logical_or.reduce([group[1] for group in there])
        if not (barriers.get(barrier, here) & alive & ~here).any():
            for group in there:
                group[2] = None
    runnable = [group for group in others if group[2] is None and (group[1] & alive).any()]
    if not runnable:
        waiting = [group for group in others if (group[1] & alive).any()]
        if not waiting:
            return 0, None, []
        runnable = [min(waiting, key=lambda group: group[0])]
        runnable[0][2] = None
    pc = min(group[0] for group in runnable)
    mask = np.zeros(LANES, bool)
    rest = []
    for group in others:
        if group[2] is None and group[0] == pc:
            mask = mask | group[1]
        else:
            rest.append(group)
    return pc, mask, rest
