"""Interleaved timing: every contestant once per round, so that a slow moment of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key")
#: A sample repeats its call until it lasts this long, in seconds: clocks and loops must not count.
SAMPLE_SECONDS = 0.004
_LEAST_ROUNDS = 3
_SETTLING_SECONDS = 0.1
_COPY_BYTES = {"cpu": 2**26, "cuda": 2**29}  # far more than the caches hold


@dataclass(frozen=True)
class Quantiles:
    """Median and the quantiles of 20 and 80 %, in the unit of what was measured."""

    median: float
    q20: float
    q80: float


def measure(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[Key, dict[int, float]]:
    """Times every call in rounds A B C, A B C, ...

    A call that takes less than a tenth of a second is made once before it is timed: else it would pay for writing back
    what the one before it left in the caches, which for a copy, or for temporaries, is a fifth of its own traffic.

    Args:
        rounds: number of rounds.
        seconds: time that one call may take over all rounds. A slower one takes part in every second, fourth, ...
            round only, in three of them at the least (or in all, if there are fewer).

    Returns:
        per call: round -> seconds of one call.
    """
    repeats, strides, settled = {}, {}, {}
    for key, call in calls.items():
        cost = _warm_up(call, device)
        repeats[key] = max(1, round(SAMPLE_SECONDS / cost))
        strides[key] = 1
        settled[key] = cost > _SETTLING_SECONDS  # long enough not to notice
        # Powers of two: where two contestants both skip rounds, the rounds of the one contain those of the other.
        while cost * repeats[key] * rounds / strides[key] > seconds and rounds > 2 * strides[key] * (_LEAST_ROUNDS - 1):
            strides[key] *= 2
    samples: dict[Key, dict[int, float]] = {key: {} for key in calls}
    for turn in range(rounds):
        for key, call in calls.items():
            if turn % strides[key] == 0:
                if not settled[key]:
                    call()
                samples[key][turn] = _seconds(call, repeats[key], device)
    return samples


def copy_call(device: torch.device) -> tuple[Callable[[], object], int]:
    """A plain copy from memory to memory, and the bytes that it reads and writes."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * _COPY_BYTES[device.type]


def quantiles(samples: Mapping[int, float]) -> Quantiles:
    """Of one contestant's seconds."""
    values = sorted(samples.values())
    return Quantiles(*(_quantile(values, share) for share in (0.5, 0.2, 0.8)))


def speedup(ours: Mapping[int, float], rival: Mapping[int, float]) -> Quantiles:
    """How many times as fast as the rival: the ratio of the medians, and the quantiles of the ratios of the rounds in
    which both took part."""
    ratios = sorted(rival[turn] / ours[turn] for turn in ours.keys() & rival.keys())
    median = quantiles(rival).median / quantiles(ours).median
    return Quantiles(median, _quantile(ratios, 0.2), _quantile(ratios, 0.8))


def _warm_up(call: Callable[[], object], device: torch.device) -> float:
    """Makes five calls, fewer if they are slow, and returns the seconds of the last."""
    for count in range(5):
        cost = _seconds(call, 1, device)
        if cost > 1 or (count > 0 and cost > 0.1):
            break
    return cost


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _quantile(ordered: list[float], share: float) -> float:
    """By linear interpolation between the two neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
