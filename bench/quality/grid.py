"""The grid of learning rates that all optimizers share, and which runs a study needs next."""

import math
from collections.abc import Collection, Mapping

#: between neighbouring learning rates
RATIO = 1.25
#: the grid's ends: 1e-3 * RATIO ** these, 1.3e-7 and 2
LEAST, MOST = -40, 34
#: the seed with which rates are swept
SWEEP_SEED = 0

#: (place on the grid, seed) -> final loss, infinite for a run that diverged
Losses = Mapping[tuple[int, int], float]


def rate(place: int) -> float:
    """The learning rate at a place, in four digits."""
    return float(f"{1e-3 * RATIO**place:.4g}")


def nearest(lr: float) -> int:
    """The place of the grid nearest to a learning rate."""
    return min(MOST, max(LEAST, round(math.log(lr / 1e-3, RATIO))))


def best(losses: Losses) -> int | None:
    """The place with the lowest loss of the swept seed; where all have diverged the lowest rate, below which one may
    not; None before the sweep."""
    swept = [(loss, place) for (place, seed), loss in losses.items() if seed == SWEEP_SEED]
    return min(swept)[1] if swept else None


def settled(losses: Losses) -> bool:
    """Whether the best rate lies inside the rates that were tried: both its neighbours did no better."""
    place = best(losses)
    return place is not None and not _neighbours(losses, place)


def wanted(losses: Losses, start: int, first: int, seeds: int, extend: bool = True) -> list[tuple[int, int]]:
    """What to train next, given what is known: places of the grid with seeds.

    ``first`` rates around ``start`` come first; then neighbours of the best until both have been tried, which extends
    a sweep whose best is at its edge (unless ``extend`` is false); then the best with all ``seeds``. Empty when nothing
    is left.
    """
    low = start - (first - 1) // 2
    sweep = [(place, SWEEP_SEED) for place in range(max(LEAST, low), min(MOST, low + first - 1) + 1)]
    missing = [run for run in sweep if run not in losses]
    if missing:
        return missing
    place = best(losses)
    assert place is not None
    if extend and (neighbours := _neighbours(losses, place)):
        return neighbours
    if math.isinf(losses[place, SWEEP_SEED]):
        return []  # it diverges at every rate of the grid
    return [(place, seed) for seed in range(seeds) if (place, seed) not in losses]


def _neighbours(losses: Collection[tuple[int, int]], place: int) -> list[tuple[int, int]]:
    near = [place - 1, place + 1]
    return [(near, SWEEP_SEED) for near in near if LEAST <= near <= MOST and (near, SWEEP_SEED) not in losses]
