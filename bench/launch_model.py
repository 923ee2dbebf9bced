"""Predicted times of a plan's launches, whose kernels are walked through their machine code.

A launch takes the largest of four times (see `TIMES`). The plan says which kernels run over which tiles; the walk
(bench/walk.py) what a block of them executes and waits for; bench/multiprocessor.py how long a multiprocessor takes for
the blocks that it holds.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from .cubin import CACHE, Code, compiled
from .cuda_check import ROOT, SOURCES, describe
from .multiprocessor import ISSUE_SHARE, MEMORY_LATENCY, SCHEDULERS, Gpu, cycles, makespan
from .walk import LANES, Memory, Walker

#: what a launch's time may be, in the order in which the first that is as good as the largest is said to bind
TIMES = ("bytes", "issue", "latency", "waves")
#: kernels of which a block takes a tile of rows and columns -> where its item says how it is cut
_CUT = {"hfac_stats": "tiling", "smmf_tiles": "tiling", "hfac_update": "update", "hfac_int8_update": "update"}
#: kernels of which a block takes a number of rows and of columns -> how many of each
_CHUNKS = {"hfac_fold": (256, 128), "hfac_int8_fold": (256, 128), "smmf_fold": (64, 64)}
#: kernels of which the last block to be done for a tensor goes on alone
_LAST = ("hfac_fold", "hfac_int8_fold", "dense_look")
_COUNTS = ("instructions", "mufu", "shuffles", "barriers", "loaded", "stored", "wide", "local", "in_flight")
_VECTOR = 8  # elements of a row that a thread has
_WARPS = 8  # of a block that has a tile for each of them
_OPERANDS = {"any": "any, float32", "float64": "any, float64"}


@dataclass(frozen=True)
class Walked:
    """What a block executes, all its warps together, and the cycles that a multiprocessor with one or more takes."""

    instructions: float
    mufu: float
    shuffles: float
    barriers: float
    loaded: float
    stored: float
    wide: float
    local: float
    in_flight: float
    undecided: float
    cycles: dict[int, float]

    def between(self, other: "Walked", at: float) -> "Walked":
        """On the line through this at 0 and another at 1."""
        names = (*_COUNTS, "undecided")
        numbers = {name: getattr(self, name) + at * (getattr(other, name) - getattr(self, name)) for name in names}
        numbers["in_flight"] = max(self.in_flight, other.in_flight)
        return Walked(**numbers, cycles={r: c + at * (other.cycles[r] - c) for r, c in self.cycles.items()})


@cache
def kernels_of(arch: str) -> dict[tuple[str, str], Code]:
    """The kernels of a plain step by name and operands, as `bench.cuda_check.describe` has them."""
    out = {}
    for source in SOURCES:
        for code in compiled(ROOT / "csrc" / "cuda" / f"{source}.cu", arch, ["-DHFAC_PLAIN_STEP"]):
            out[describe(code.symbol)] = code
    return out


def code_of(launch: dict[str, Any], arch: str) -> Code:
    """The kernel that a plan's launch runs."""
    name = {"hfac_update": "hfac_update_tiles", "hfac_int8_update": "hfac_int8_tiles"}.get(
        launch["kernel"], launch["kernel"]
    )
    access, width = launch["access"], launch["width"]
    operands = _OPERANDS.get(access) or f"bulk, {access} with {access} gradients"
    if width in ("four", "long", "wide"):
        name += f"_{width}"
    if launch["small_blocks"] and access not in _OPERANDS:
        operands += ", and small matrices"
    code = kernels_of(arch).get((name, operands))
    if code is not None:
        return code
    raise LookupError(f"no kernel {name} for {operands} {width} was compiled for sm_{arch}")


def _tile_of(launch: dict[str, Any], block: int) -> int:
    """The first tile of a block among all launches': the first blocks have one for each warp, the others one."""
    return launch["first_tile"] + block + (_WARPS - 1) * min(block, launch["small_blocks"])


class Walks:
    """Walks of blocks, kept in a file of this name."""

    def __init__(self, name: str = "walks") -> None:
        self.path = CACHE / f"{name}.json"
        self.found: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.fresh = 0
        sources = (ROOT / "bench" / f"{name}.py" for name in ("sass", "sass_results", "walk", "multiprocessor"))
        self.model = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]

    def save(self) -> None:
        if self.fresh:
            CACHE.mkdir(parents=True, exist_ok=True)
            mine = {key: value for key, value in self.found.items() if key.startswith(self.model)}
            self.path.write_text(json.dumps(mine))
            self.fresh = 0

    def walk(self, gpu: Gpu, code: Code, of: Sequence[Any], make: Any, residents: Sequence[int]) -> Walked:
        """The walk of a block that is told apart by ``of``; ``make`` does it."""
        digest = hashlib.sha256(code.text.encode()).hexdigest()[:16]
        key = "/".join(map(str, (self.model, digest, gpu.clock, *of)))
        stored = self.found.get(key)
        if stored is None or any(str(r) not in stored["cycles"] for r in residents):
            warps = make()
            stored = {name: sum(getattr(warp, name) for warp in warps) for name in _COUNTS}
            stored["undecided"] = sum(warp.undecided.total() for warp in warps)
            memory = MEMORY_LATENCY * gpu.clock
            old = self.found.get(key, {"cycles": {}})["cycles"]
            stored["cycles"] = old | {str(r): cycles([warps] * r, memory) for r in residents if str(r) not in old}
            self.found[key] = stored
            self.fresh += 1
            if self.fresh >= 40:
                self.save()
                self.fresh = 0
        numbers = {int(r): c for r, c in stored["cycles"].items()}
        return Walked(**(stored | {"cycles": numbers}))


@dataclass
class Predicted:
    """One launch."""

    kernel: str
    instance: str
    launches: int
    blocks: int
    waves: float
    registers: int
    resident: int
    in_flight: float
    elements: int
    instructions: float
    mufu: float
    shuffles: float
    barriers: float
    wide: float
    local: float
    moved: float
    bytes: int
    undecided: float
    threads: int
    times: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return max(self.times.values())

    @property
    def bound(self) -> str:
        return next(name for name in TIMES if self.times[name] >= 0.97 * self.seconds)


class Model:
    """Predicts launches for one GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.walks = gpu, Walks()
        self._walkers: dict[str, Walker] = {}

    def launches(self, plan: dict[str, Any], shapes: Sequence[tuple[int, int]]) -> Iterator[Predicted]:
        """Those of a plan with its image, for the matrices that are not empty. Launches that are alike are one, with
        their number."""
        tiles = np.frombuffer(plan["image"]["tiles"], np.int32).reshape(-1, 2)
        known: dict[Any, Predicted] = {}
        for k, launch in enumerate(plan["launches"]):
            mine = tiles[launch["first_tile"] : _tile_of(launch, launch["blocks"])]
            items, counts = np.unique(mine[mine[:, 0] >= 0, 0], return_counts=True)
            of = tuple((*shapes[i], int(n)) for i, n in zip(items, counts, strict=True))
            alike = (launch["kernel"], launch["access"], launch["width"], launch["bytes"], of)
            if alike not in known:
                known[alike] = self._launch(plan, k, mine, shapes)
            else:
                known[alike].launches += 1
        self.walks.save()
        yield from known.values()

    def _launch(self, plan: dict[str, Any], k: int, tiles: np.ndarray, shapes: Sequence[tuple[int, int]]) -> Predicted:
        gpu, launch, image = self.gpu, plan["launches"][k], plan["image"]
        code = code_of(launch, gpu.arch)
        threads, blocks = launch["threads"], launch["blocks"]
        reserved = 0 if gpu.arch >= "90" else 1024  # bytes of a block that the listing counts from sm_90 on
        resident = gpu.resident(threads, code.registers, code.shared + launch["shared"] + reserved)
        few = min(resident, math.ceil(blocks / gpu.multiprocessors))
        found = Predicted(
            launch["kernel"], f"{launch['access']} {launch['width']}".strip(), 1, blocks,
            blocks / (gpu.multiprocessors * resident), code.registers, resident, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            launch["bytes"], 0, threads,
        )  # fmt: skip
        order: list[tuple[int, float]] = []
        latency = tail = 0.0

        def add(count: int, one: Walked) -> float:
            """So many such blocks; the seconds of one."""
            nonlocal latency
            found.in_flight = max(found.in_flight, one.in_flight * resident)
            for name in ("instructions", "mufu", "shuffles", "barriers", "wide", "local", "undecided"):
                setattr(found, name, getattr(found, name) + count * getattr(one, name))
            found.moved += count * (one.loaded + one.stored)
            order.append((count, one.cycles[few] / gpu.clock))
            latency += count * one.cycles[resident] / gpu.clock
            return one.cycles[few] / gpu.clock

        small = launch["small_blocks"]
        for block in range(small):
            items = [int(i) for i in tiles[_WARPS * block : _WARPS * (block + 1), 0] if i >= 0]
            found.elements += sum(math.prod(shapes[i]) for i in items)
            add(1, self._small(code, image, k, launch, items, [shapes[i] for i in items], block, {few, resident}))
        starts = np.flatnonzero(np.diff(tiles[_WARPS * small :, 0], prepend=-1)) + _WARPS * small
        for start, stop in pairwise([*starts, len(tiles)]):
            item = int(tiles[start, 0])
            classes = self._classes(launch, image, item, shapes[item], int(stop - start))
            found.elements += math.prod(shapes[item])
            first = 0.0  # seconds of the item's first block, of which the last one to be done is walked as well
            for count, index, rows, last in classes:
                block = int(start) + index - (_WARPS - 1) * small
                one = self._block(code, image, k, launch, item, shapes[item], block, rows, last, {few, resident})
                if last:
                    tail = max(tail, one.cycles[few] / gpu.clock - first)
                    continue
                seconds = add(count, one)
                first = first or seconds
        if launch["backward"]:
            order.reverse()
        slots = gpu.multiprocessors * few
        found.times = {
            "bytes": launch["bytes"] / gpu.copy,
            "issue": found.instructions / (gpu.multiprocessors * SCHEDULERS * ISSUE_SHARE * gpu.clock),
            "latency": latency / (gpu.multiprocessors * resident),
            "waves": makespan(order, slots) + tail,
        }
        return found

    def _classes(
        self, launch: dict, image: dict, item: int, shape: tuple[int, int], n: int
    ) -> Iterable[tuple[int, int, float | None, bool]]:
        """(blocks, which of the item's tiles stands for them, rows of one, does it go on alone)."""
        kernel = launch["kernel"]
        if kernel in _CUT:
            yield n, 0, shape[0] / self._tiling(image, _CUT[kernel], item)[2], False
            return
        if kernel in _CHUNKS:
            both = min(n, *(math.ceil(length / own) for length, own in zip(shape, _CHUNKS[kernel], strict=True)))
            yield both, 0, None, False
            if n > both:
                yield n - both, n - 1, None, False
        elif n == 1:
            yield 1, 0, None, False
        else:
            yield n - 1, 0, None, False
            yield 1, n - 1, None, False
        if kernel in _LAST and n > 1:
            yield 1, 0, None, True

    @staticmethod
    def _at(image: dict, field_: str, item: int) -> int:
        return item * (len(image["items"]) // image["count"]) + image[field_]

    def _tiling(self, image: dict, field_: str, item: int) -> tuple[int, ...]:
        """rows, cols, row_tiles, col_tiles, lanes."""
        at = self._at(image, field_, item)
        return tuple(int(x) for x in np.frombuffer(image["items"][at : at + 20], np.int32))

    def _block(
        self, code: Code, image: dict, k: int, launch: dict, item: int, shape: tuple[int, int], position: int,
        rows: float | None, last: bool, residents: set[int],
    ) -> Walked:  # fmt: skip
        """A block of a launch. One of many rows is walked with few and with twice as many, and the rest is a line."""
        cut = _CUT.get(launch["kernel"])
        if rows is None or cut is None:
            return self._walk(code, image, k, launch, item, shape, position, None, last, residents)
        tiling = self._tiling(image, cut, item)
        few = max(16, 8 * (launch["threads"] // tiling[4]))  # loops take 4 or 16 rows of a thread at a time
        if rows <= 2.5 * few:
            return self._walk(code, image, k, launch, item, shape, position, round(rows), last, residents)
        one, two = (
            self._walk(code, image, k, launch, item, shape, position, r, last, residents) for r in (few, 2 * few)
        )
        return one.between(two, (rows - few) / few)

    def _alike(
        self, image: dict, cut: str, item: int, threads: int, shape: tuple[int, int], rows: int | None
    ) -> list[object]:
        """Which warps of a block with rows of several warps do the same: those that have columns for all threads. The
        first two finish rows and are walked in any case, and so are those that are left over and have no row."""
        _, columns, _, _, lanes = self._tiling(image, cut, item)
        warps, of_row, ys = threads // LANES, lanes // LANES, max(1, threads // lanes)
        if of_row < 4 or (rows or 0) % (4 * ys):
            return list(range(warps))
        full = min(columns, shape[1]) // (LANES * _VECTOR)
        return [w if w < 2 or w >= ys * of_row or w % of_row >= full else -1 for w in range(warps)]

    def _walk(
        self, code: Code, image: dict, k: int, launch: dict, item: int, shape: tuple[int, int], position: int,
        rows: int | None, last: bool, residents: set[int],
    ) -> Walked:  # fmt: skip
        cut = _CUT.get(launch["kernel"])
        tiles = np.frombuffer(image["tiles"], np.int32).reshape(-1, 2)
        index = int(tiles[_tile_of(launch, position), 1])
        tilings = [t for name in ("tiling", "update") for t in self._tiling(image, name, item)]
        of = (*shape, *tilings, index, rows, last, launch["threads"])

        def make() -> list:
            items = bytearray(image["items"])
            if rows is not None and cut is not None:
                at = self._at(image, cut, item)
                items[at : at + 4] = int(rows).to_bytes(4, "little")
            walker = self._walker(code, image, launch, bytes(items), max(residents))
            block = launch["blocks"] - 1 - position if launch["backward"] else position
            blocks = int((tiles[launch["first_tile"] : _tile_of(launch, launch["blocks"]), 0] == item).sum())
            alike = self._alike(image, cut, item, launch["threads"], shape, rows) if cut else ()
            counted = blocks if last else 0
            return walker.block(image["arguments"][k], launch["threads"], launch["blocks"], block, counted, alike)

        return self.walks.walk(self.gpu, code, of, make, sorted(residents))

    def _walker(self, code: Code, image: dict, launch: dict, items: bytes, resident: int) -> Walker:
        share = 160 << 10  # of shared memory and L1, for lines that are read again
        walker = self._walkers.get(code.symbol) or Walker(code, Memory([]))
        self._walkers[code.symbol] = walker
        known = [(image["items_at"], items), (image["tiles_at"], image["tiles"])]
        walker.memory = Memory(known, image["counters_at"], image["operands_at"])
        walker.cached = share * LANES // (launch["threads"] * resident)
        return walker

    def _small(
        self, code: Code, image: dict, k: int, launch: dict, items: Sequence[int], shapes: Sequence[tuple[int, int]],
        block: int, residents: set[int],
    ) -> Walked:  # fmt: skip
        """A block each of whose warps has an item of its own."""
        of = (*((*shape, *self._tiling(image, "tiling", i)) for i, shape in zip(items, shapes, strict=True)),)

        def make() -> list:
            walker = self._walker(code, image, launch, image["items"], max(residents))
            return walker.block(image["arguments"][k], launch["threads"], launch["blocks"], block)

        return self.walks.walk(self.gpu, code, (*of, launch["threads"]), make, sorted(residents))


def by_kernel(launches: Sequence[Predicted]) -> list[dict[str, Any]]:
    """A row for each kernel. Registers, resident blocks, bytes in flight and what binds are those of the instance and
    launches that take the most time."""
    rows = []
    for kernel in dict.fromkeys(launch.kernel for launch in launches):
        mine = [launch for launch in launches if launch.kernel == kernel]
        rows.append(summed(kernel, mine))
    return rows


def by_instance(launches: Sequence[Predicted]) -> list[dict[str, Any]]:
    """As `by_kernel`, for each kernel's types and row lengths."""
    rows = []
    for kernel, instance in dict.fromkeys((launch.kernel, launch.instance) for launch in launches):
        mine = [launch for launch in launches if (launch.kernel, launch.instance) == (kernel, instance)]
        rows.append(summed(f"{kernel}, {instance}", mine))
    return rows


def summed(name: str, mine: Sequence[Predicted]) -> dict[str, Any]:
    most = max(mine, key=lambda launch: launch.seconds * launch.launches)
    blocks = [launch.blocks for launch in mine for _ in range(launch.launches)]
    elements = sum(launch.elements * launch.launches for launch in mine)

    def per_element(what: str) -> float:
        return LANES * sum(getattr(launch, what) * launch.launches for launch in mine) / max(elements, 1)

    bounds: dict[str, float] = {}
    for launch in mine:
        bounds[launch.bound] = bounds.get(launch.bound, 0) + launch.seconds * launch.launches
    return {
        "kernel": name,
        "launches": len(blocks),
        "blocks_least": min(blocks),
        "blocks_median": int(statistics.median(blocks)),
        "waves": most.waves,
        "registers": most.registers,
        "resident": most.resident,
        "in_flight_kb": most.in_flight / 1e3,
        "instructions_per_element": per_element("instructions"),
        "mufu_per_element": per_element("mufu"),
        "shuffles_per_element": per_element("shuffles"),
        "barriers_per_element": per_element("barriers"),
        "bytes_per_element": sum(launch.bytes * launch.launches for launch in mine) / max(elements, 1),
        "wide": sum(x.wide * x.launches for x in mine) / max(1, sum(x.moved * x.launches for x in mine)),
        "local": sum(launch.local * launch.launches for launch in mine),
        "undecided": sum(launch.undecided * launch.launches for launch in mine),
        "times_ms": {t: sum(x.times[t] * x.launches for x in mine) * 1e3 for t in TIMES},
        "bound": max(bounds, key=lambda name: bounds[name]),
        "ms": sum(launch.seconds * launch.launches for launch in mine) * 1e3,
    }
