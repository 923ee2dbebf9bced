"""Host time of a warm step, with launches that do nothing, beside torch's fused and foreach AdamW.

`python -m bench.host` steps lists of tensors of the real shapes, of which no element is ever read or written: the
"cuda" backend launches through the emulated module (`make test-emulated` builds it) in a mode where launches are only
counted, "triton" through a driver that does nothing (bench/triton_driver.py). What runs on the host is what runs there
with a GPU, except for the CUDA runtime itself and torch's own operations, which here are those of the CPU. The "cpu"
backend and torch's AdamW compute on the host; they get tensors of 16 elements and of one, so that next to nothing is
computed.

The contestants take turns of some steps; the table has medians, and the quantiles of 1, 20 and 80 %. Where other
programs have the cores, only the fastest steps say what a step costs: those of 1 %, beside AdamW's of 1 %.
`--profile` prints where the time goes by function, `--json` the rows as JSON, `--out` writes both to a file, with
a table in Markdown beside it.
"""

import argparse
import cProfile
import json
import math
import mmap
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hfac
from hfac import backends
from hfac.backends import cpu, cuda
from hfac.cli.shapes import Shape
from hfac.distributed import layout
from hfac.optim import diagnostics

from . import shapes
from .machine import describe
from .report import plain_table

BACKENDS = ("cuda", "triton", "cpu", "torch")
#: optimizers -> options
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "HFac": ("HFac", {}),
    "HFac-int8": ("HFac", {"first_moment": "int8"}),
    "SMMF": ("SMMF", {}),
}
RIVALS = {"AdamW-fused": {"fused": True}, "AdamW-foreach": {"foreach": True}}
#: what a step does besides -> options; "released" steps the parameters one by one
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "skip": {"nonfinite": "skip"},
    "clipped": {"max_grad_norm": 1.0},
    "capturable": {"capturable": True},
    "released": {},
    "watched": {"watch": True},
}
#: On a GPU the device counts steps that may be skipped; so it does here, where "the device" is the host.
ON_DEVICE = {"skip": {"capturable": True}}
#: lists -> shapes
LISTS: dict[str, Callable[[], list[Shape]]] = {
    "gpt2": shapes.gpt2,
    "llama-3-8b": shapes.llama3_8b,
    "10000-small": lambda: 2500 * [(32, 32), (32, 32), (32, 32), (1024,)],
}
#: steps, before anything is timed, and of each turn
WARM, TURN = 3, 20


class Idle(cuda.Cuda):
    """The host as a GPU on which nothing runs."""

    native: Any = None

    def l2_bytes(self, device: torch.device) -> int:
        return 0

    def stream(self, device: torch.device) -> int:
        return 0

    def is_current(self, stream: int, index: int) -> bool:
        return True

    def capturing(self) -> bool:
        return False

    def host_table(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


@contextmanager
def idle_cuda() -> Iterator[None]:
    """The backend "cuda" for tensors of the host. Raises RuntimeError where the emulated module is not built."""
    try:
        Idle.native = import_module("hfac._emulated")
    except ImportError:
        raise RuntimeError(
            "bench.host launches the CUDA kernels through hfac._emulated, which is not built: make test-emulated."
        ) from None
    kernels = cuda.Kernels(Idle())
    Idle.native.set_threading("none")
    try:
        with mock.patch.dict(backends.TABLE):
            backends.register(backends.Backend("cuda", "idle", lambda device: None, lambda: kernels, automatic=False))
            yield
    finally:
        Idle.native.set_threading("fibers")


@contextmanager
def idle_triton() -> Iterator[None]:
    """The backend "triton" for tensors of the host."""
    from triton.backends.compiler import GPUTarget

    from hfac.backends import triton

    from .triton_driver import active

    with mock.patch.dict(backends.TABLE), active(GPUTarget("cuda", 90, 32)):
        backends.register(backends.Backend("triton", "idle", lambda device: None, lambda: triton))
        yield


PLATFORMS = {"cuda": idle_cuda, "triton": idle_triton}


class Device:
    """Memory apart from what the host keeps of tensors, as a GPU's is: small ones of malloc would lie between the
    objects that a step reads, and spread them over pages of their own."""

    CHUNK = 1 << 26

    def __init__(self) -> None:
        self._chunk: Any = b""
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with a storage of its own."""
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // 64) * 64
        if not 0 < size <= self.CHUNK // 64:
            return torch.empty(shape, dtype=dtype)
        if self._used + size > len(self._chunk):
            self._chunk, self._used = mmap.mmap(-1, self.CHUNK), 0
        found = torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=self._used).view(shape)
        self._used += size
        return found


DEVICE = Device()


@contextmanager
def unread() -> Iterator[None]:
    """Memory is neither cleared nor read by torch: pages that nobody touches take no memory, and what a GPU would
    compute takes no time of the host."""
    norms, one, count_zeros = torch._foreach_norm, torch.zeros(1), diagnostics.zeros

    def zeros(param: Tensor, shape: Any, follows: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return DEVICE.empty(shape, dtype)

    def foreach_norm(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        return norms([one] * len(tensors), *args, **kwargs)

    def of_one(grad: Tensor, group: Any) -> Tensor:
        return count_zeros(grad.new_zeros((1,) * grad.ndim), group)

    with ExitStack() as stack:
        for where, name, function in (
            (layout, "zeros", zeros),
            (torch, "_foreach_norm", foreach_norm),
            (diagnostics, "zeros", of_one),
        ):
            stack.enter_context(mock.patch.object(where, name, function))
        yield


@dataclass
class Contestant:
    """What is timed: ``step`` is one step; ``row`` says of what, ``seconds`` are the times."""

    row: dict[str, Any]
    params: list[Tensor]
    step: Callable[[], object]
    seconds: list[float]

    def __post_init__(self) -> None:
        self._grads = [DEVICE.empty(param.shape, param.dtype) for param in self.params]

    def receive_grads(self) -> None:
        """New gradients where the earlier ones were, as a GPU's caching allocator hands memory out."""
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad.detach()

    def time(self) -> None:
        """A turn: some steps, of which the first finds the processor's caches full of the others'."""
        for k in range(TURN):
            self.receive_grads()
            start = time.perf_counter()
            self.step()
            if k:
                self.seconds.append(time.perf_counter() - start)

    def result(self) -> dict[str, Any]:
        us = 1e6 * statistics.median(self.seconds)
        shares = {f"us_{share}": 1e6 * sorted(self.seconds)[share * len(self.seconds) // 100] for share in (1, 20, 80)}
        return self.row | {"us": us, "us_per_tensor": us / len(self.params)} | shares


def smaller(shape: Shape, elements: int) -> Shape:
    """A shape of as many dimensions, with at most so many elements."""
    side = elements if len(shape) == 1 else int(elements**0.5)
    return (*(1 for _ in shape[2:]), *(side for _ in shape[:2]))


def contestant(backend: str, optimizer: str, name: str, mode: str, sizes: Sequence[Shape]) -> Contestant:
    """Within `PLATFORMS` of its backend. Raises RuntimeError where the backend lacks the step."""
    if backend in ("cpu", "torch"):
        sizes = [smaller(shape, 16 if backend == "cpu" else 1) for shape in sizes]
    params: list[Any] = [torch.nn.Parameter(DEVICE.empty(shape)) for shape in sizes]
    row = {"backend": backend, "optimizer": optimizer, "list": name, "mode": mode}
    if backend == "torch":
        rival = torch.optim.AdamW(params, **RIVALS[optimizer])

        def clipped() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            rival.step()

        return Contestant(row, params, clipped if mode == "clipped" else rival.step, [])
    cls, options = OPTIMIZERS[optimizer]
    more = MODES[mode] | (ON_DEVICE.get(mode, {}) if backend in PLATFORMS else {})
    built = getattr(hfac, cls)(params, backend=backend, **options, **more)

    def released() -> None:
        for param in params:
            built.step_param(param)

    return Contestant(row, params, released if mode == "released" else built.step, [])


def contestants(name: str, chosen: Sequence[str], optimizers: Sequence[str], modes: Sequence[str]) -> list[Contestant]:
    sizes, found = LISTS[name](), []
    for backend in chosen:
        for optimizer in (name for name in (RIVALS if backend == "torch" else OPTIMIZERS) if name in optimizers):
            for mode in modes:
                if backend != "torch" or mode in ("plain", "clipped"):
                    try:
                        found.append(contestant(backend, optimizer, name, mode, sizes))
                    except RuntimeError as error:
                        if "cannot make" not in str(error):
                            raise
    return found


def timed(found: Sequence[Contestant], seconds: float) -> list[dict[str, Any]]:
    """Steps all in turns, for about so many seconds each."""
    slowest = 0.0
    for one in found:
        one.time()
        one.time()
        slowest = max(slowest, one.seconds[-1])
        one.seconds.clear()
    for _ in range(max(2, min(30, int(seconds / TURN / slowest)))):
        for one in found:
            one.time()
    return [one.result() for one in found]


def profiled(one: Contestant, rounds: int, lines: int) -> list[dict[str, Any]]:
    """The functions in which the time of steps goes, by the profiler, which adds time of its own to each call."""
    profile = cProfile.Profile(time.perf_counter)
    for _ in range(WARM):
        one.receive_grads()
        one.step()
    for _ in range(rounds):
        one.receive_grads()
        profile.enable()
        one.step()
        profile.disable()
    rows = []
    for (file, _, function), (_, calls, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = "" if file == "~" else f"{Path(file).parent.name}/{Path(file).name}: "
        rows.append({"function": where + function, "calls": calls / rounds, "us": 1e6 * own / rounds})
    return sorted(rows, key=lambda row: -row["us"])[:lines]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--optimizers", nargs="+", choices=[*OPTIMIZERS, *RIVALS], default=[*OPTIMIZERS, *RIVALS])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=0.3, help="of steps, at most, of each (default: 0.3)")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by function")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and nothing else")
    parser.add_argument("--out", type=Path, help="a JSON file to write, with a table beside it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    profiles: list[tuple[str, list[dict[str, Any]]]] = []
    with ExitStack() as stack:
        for backend in args.backends:
            if backend in PLATFORMS:
                stack.enter_context(PLATFORMS[backend]())
        stack.enter_context(unread())
        for name in args.lists:
            rows += timed(contestants(name, args.backends, args.optimizers, args.modes), args.seconds)
            for one in contestants(name, args.backends, args.optimizers, args.modes) if args.profile else ():
                profiles.append((", ".join(one.row.values()), profiled(one, 20, 15)))
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(plain_table(with_ratios(rows)))
        for title, lines in profiles:
            print(f"\n{title}, microseconds per step\n\n{plain_table(lines)}")
    if args.out:
        found = describe(torch.device("cpu")) | {"cpu built": cpu._C is not None, "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        text = [f"# {__doc__.splitlines()[0]}", plain_table(with_ratios(rows))]
        text += [f"## {title}, microseconds per step\n\n{plain_table(lines)}" for title, lines in profiles]
        args.out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    return 0


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with medians and the times of the fastest steps as multiples of fused AdamW's on the same list."""
    fused = {r["list"]: r for r in rows if (r["optimizer"], r["mode"]) == ("AdamW-fused", "plain")}
    names = {"us": "of AdamW", "us_1": "of AdamW, 1 %"}
    return [
        row | {name: row[us] / fused[row["list"]][us] for us, name in names.items() if row["list"] in fused}
        for row in rows
    ]


if __name__ == "__main__":
    raise SystemExit(main())
