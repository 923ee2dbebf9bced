"""`hfac doctor --check`: compares steps of every backend with the reference on a list of awkward shapes, and measures a
step of one large matrix against a memory copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import Parameter

from hfac import SMMF, HFac, parity
from hfac.backends import triton

#: Scalars, vectors, a single row, primes, odd numbers of sign bytes, more columns than a block has, five dimensions, an
#: empty tensor, and a matrix large enough for several threads and tiles.
SHAPES: tuple[parity.Shape, ...] = (
    (),
    (7,),
    (1024,),
    (1, 64),
    (24, 18),
    (17, 19),
    (127, 129),
    (3, 4097),
    (4097, 3),
    (6, 4, 3, 3),
    (2, 3, 5, 7, 2),
    (0, 5),
    (260, 1030),
)
#: For Triton's interpreter, which takes as long for a thousand elements as kernels do for a million.
INTERPRETED: tuple[parity.Shape, ...] = ((), (7,), (1, 64), (17, 19), (24, 18), (6, 4, 3, 3), (0, 5))
#: As a language model's: matrices of every width that kernels are compiled for, and vectors.
FIRST_SHAPES: tuple[parity.Shape, ...] = ((64, 64), (256, 256), (256, 1024), (256, 4096), (256, 8192), (1024,))
OPTIMIZERS = (HFac, SMMF)
COMMON: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
#: What is checked for each optimizer: the name of the case, the parameters' type, options.
CASES: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("float32", torch.float32, {}),
    ("float32, nonfinite='skip'", torch.float32, {"nonfinite": "skip"}),
    ("float32, max_grad_norm", torch.float32, {"max_grad_norm": 1.0, "slack": 20.0}),  # norms differ by 1e-5
    ("float64", torch.float64, {}),
    ("float16", torch.float16, {}),
    ("bfloat16", torch.bfloat16, {}),
    ("bfloat16, rounding='stochastic'", torch.bfloat16, {"rounding": "stochastic"}),
    ("bfloat16, master='split'", torch.bfloat16, {"master": "split"}),
    ("bfloat16, first_moment='int8'", torch.bfloat16, {"first_moment": "int8"}),
    ("bfloat16, capturable=True, nonfinite='skip'", torch.bfloat16, {"nonfinite": "skip", "capturable": True}),
)
STEPS = 2
#: Rounds that are measured, and rounds before them that are not, in which kernels are compiled and caches filled.
ROUNDS, SETTLING = 9, 2
#: Rows and columns of the large matrix, by type of device.
LARGE = {"cpu": (4096, 4096)}
LARGE_ON_GPU = (16384, 8192)


def check(device: torch.device, names: list[str]) -> Iterator[dict[str, Any]]:
    """Checks backends on a device, and yields a row for each case as soon as it is known.

    A row has "device", "backend", "optimizer", "case" and "differences", a list of sentences that is empty if the
    steps agree. After an error that leaves a GPU unusable, a last row says so and the check ends.
    """
    for name in names:
        interpreted = name == "triton" and device.type == "cpu"
        for optimizer in OPTIMIZERS:
            row = {"device": str(device), "backend": name, "optimizer": optimizer.__name__}
            for case, dtype, options in CASES:
                if not takes(optimizer, options):
                    continue
                shapes = INTERPRETED if interpreted else SHAPES
                found = parity.differences(
                    optimizer, shapes, dtype, device, name, **{**COMMON, **options, "steps": STEPS}
                )
                yield {**row, "case": case, "differences": list(map(str, found))}
                if found and not _alive(device):
                    rest = f"not checked: the error before has left {device} unusable until Python is restarted"
                    yield {**row, "case": "all further cases", "differences": [rest]}
                    return


def first_steps(device: torch.device) -> Iterator[dict[str, Any]]:
    """What each optimizer's first step by the Triton kernels compiles on a device, for bfloat16 parameters of many
    shapes. Ask before anything else has compiled them in this process.

    Yields:
        ``optimizer``; ``kernels``, how many were compiled; ``seconds``, of all of them.
    """
    for optimizer in OPTIMIZERS:
        params = [Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device)) for shape in FIRST_SHAPES]
        for param in params:
            param.grad = torch.zeros_like(param)
        found = triton.cold(optimizer(params, backend="triton").step)
        yield {"optimizer": optimizer.__name__, "kernels": len(found), "seconds": sum(s for _, s in found)}


def takes(optimizer: type[HFac] | type[SMMF], options: dict[str, Any]) -> bool:
    """Whether an optimizer has these options."""
    return optimizer is HFac or "first_moment" not in options


def rates(device: torch.device, names: list[str]) -> Iterator[dict[str, Any]]:
    """Times steps of one bfloat16 matrix and copies of memory, in turns, and yields a row for each backend and
    optimizer: "device", "backend", "optimizer", "ms" (median of a step), "gb_per_s" and "copy_gb_per_s".

    A step's bytes are the least it must move: the gradient read once (HFac: twice), parameter and state read and
    written.
    """
    for name in names:
        for optimizer in OPTIMIZERS:
            yield {
                "device": str(device),
                "backend": name,
                "optimizer": optimizer.__name__,
                **_rate(optimizer, device, name),
            }


def large(device: torch.device) -> str:
    """Rows and columns of the matrix that is timed."""
    return "x".join(map(str, LARGE.get(device.type, LARGE_ON_GPU)))


def _alive(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access every later call of the process fails."""
    try:
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def _rate(optimizer: type[torch.optim.Optimizer], device: torch.device, backend: str) -> dict[str, float]:
    generator = torch.Generator(device=device).manual_seed(0)
    shape = LARGE.get(device.type, LARGE_ON_GPU)
    source = torch.rand(shape, generator=generator, dtype=torch.float32, device=device).add_(0.5)
    target = torch.empty_like(source)
    param = Parameter(source.to(torch.bfloat16))
    param.grad = param.detach().flip(0).contiguous()
    built = optimizer([param], lr=1e-5, backend=backend)  # type: ignore[call-arg]
    state = sum(value.nbytes for value in built.state[param].values())
    moved = 2 * param.nbytes + (2 if optimizer is HFac else 1) * param.grad.nbytes + 2 * state
    calls: dict[str, Callable[[], object]] = {"step": built.step, "copy": lambda: target.copy_(source)}
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for turn in range(SETTLING + ROUNDS):
        for key, call in calls.items():
            found = _seconds(call, device)
            if turn >= SETTLING:
                seconds[key].append(found)
    step, copy = (statistics.median(seconds[key]) for key in calls)
    return {"ms": step * 1e3, "gb_per_s": moved / step / 1e9, "copy_gb_per_s": 2 * source.nbytes / copy / 1e9}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
