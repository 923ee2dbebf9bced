"""Sharded parameters that step together, and what both algorithms do with them alike."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, spec
from ..rounding import Place
from . import layout
from .schedule import Job, Planned


@dataclass(frozen=True)
class Entry:
    """A sharded parameter of an optimizer.

    Attributes:
        label: how messages call it.
        group: the position of its group.
        param: the DTensor.
        state: its state by key, DTensors and the plain ``step`` (and ``skipped``).
        place: where this rank's part stands, if it is rounded stochastically.
    """

    label: str
    group: int
    param: Tensor
    state: Mapping[str, Tensor]
    place: Place | None = None

    @property
    def storage(self) -> tuple[torch.dtype | None, bool]:
        """How the parameter is stored; those that share a call agree in it."""
        low = self.state.get("master_low")
        return None if low is None else low.dtype, self.place is not None

    def local_state(self, key: str) -> Tensor:
        return layout.local(self.state[key])


@dataclass(frozen=True)
class Options:
    """What a step is told of one group anew every time; ``norm``: of H-Fac, whether the gradients' norms are asked
    for."""

    scalars: Mapping[str, Any]
    skip: bool
    backend: str
    norm: bool = False


class Bucket:
    """Entries of one group that agree in type and in who shares them. Subclasses give the numbers."""

    algorithm: str
    #: by entry, sums of squares of the gradients over all ranks, where a job was to find them (`Options.norm`)
    squares_found: Tensor

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self.group = entries[0].group
        self.params = [layout.local(entry.param) for entry in entries]
        self.elements = [entry.param.numel() for entry in entries]
        self.ranks = [ranks_that_share(entry.param) for entry in entries]
        self.dtype = ops.state_dtype(entries[0].param.dtype)
        self.device = self.params[0].device
        low, stochastic = entries[0].storage
        self.lows = None if low is None else [entry.local_state("master_low") for entry in entries]
        self.places = [entry.place for entry in entries] if stochastic else None

    def requests(self, skip: bool, norm: bool) -> list[tuple[dist.ProcessGroup, int]]:
        """The groups that the numbers of a step go over, in order, and how many they are."""
        raise NotImplementedError

    def job(self, grads: list[Tensor | None], options: Options) -> Job:
        """A step with these gradients, yet to be made."""
        raise NotImplementedError

    def plan(self, options: Options) -> Planned:
        """A step with the gradients that the parameters have now."""
        requests = self.requests(options.skip, options.norm)
        return Planned(requests, self.dtype, self.device, self.job(self.gradients(), options))

    def gradients(self) -> list[Tensor | None]:
        """This rank's parts of the gradients, placed as their parameters are."""
        return [layout.gradient(entry.param, entry.label) for entry in self.entries]

    def decays(self, options: Options) -> tuple[Tensor | None, Tensor]:
        """beta1 and beta2, one entry per parameter, of the step to be made."""
        steps = _steps(self.entries)
        found = spec.ALGORITHMS[self.algorithm].decays(steps + 1, dict(options.scalars))
        return found["beta1"], found["beta2"]

    def stored(self, going: Sequence[int], options: Options) -> dict[str, Any]:
        """What an op is told of how the parameters in ``going`` are stored."""
        found: dict[str, Any] = {}
        if self.lows is not None:
            found[spec.MASTER_LOW.name] = pick(self.lows, going)
        if self.places is not None:
            steps = _steps(pick(self.entries, going))
            found.update(places=pick(self.places, going), seed=options.scalars["seed"], step=steps + 1)
        return found

    def flags(self, here: Sequence[int], grads: Sequence[Tensor | None], options: Options) -> Tensor:
        """1 at the parameters in ``here`` whose gradient, in this part, must be refused; zeros unless it is asked
        for."""
        flags = torch.zeros(len(self.entries), dtype=self.dtype, device=self.device)
        if options.skip and here:
            found = ops.nonfinite([g for g in grads if g is not None], [self.elements[i] for i in here])
            flags[list(here)] = found.to(self.dtype)
        return flags

    def at(self, here: Sequence[int]) -> Tensor:
        """1 at the places in ``here``, 0 elsewhere."""
        ones = torch.zeros(len(self.entries), dtype=self.dtype, device=self.device)
        ones[list(here)] = 1
        return ones

    def count_skipped(self, refused: Sequence[int]) -> None:
        for i in refused:
            self.entries[i].state["skipped"].add_(1)

    def advance(self, going: Sequence[int]) -> None:
        if going:
            ops.advance_steps_([self.entries[i].state["step"] for i in going])

    def who_goes(self, present: Tensor, refused: Tensor) -> tuple[list[int], list[int]]:
        """The parameters that make the step, and those whose gradient is refused, of the sums over all ranks."""
        with_gradient = who(self.entries, present.tolist(), self.ranks)
        flags = refused.tolist()
        return [i for i in with_gradient if not flags[i]], [i for i in with_gradient if flags[i]]


def who(
    entries: Sequence[Entry], counts: Sequence[float], expected: Sequence[int], outcome: str = "Nothing was updated."
) -> list[int]:
    """The parameters that have a gradient, as far as every rank that shares them says so.

    Args:
        counts: by entry, on how many ranks there is a gradient.
        expected: on how many it must be if it is on any.
        outcome: what the message says of the step.

    Raises:
        RuntimeError: some ranks have a gradient of a parameter and some do not.
    """
    for entry, count, all_of_them in zip(entries, counts, expected, strict=True):
        if count not in (0, all_of_them):
            raise RuntimeError(
                f"{entry.label} (shape {tuple(entry.param.shape)}) has a gradient on {int(count)} of the {all_of_them} "
                "ranks that share it. A sharded parameter needs one on all of them or on none: let every rank use the "
                "parameter in its loss (a zero times its output will do), or set requires_grad to False on all. "
                f"{outcome}"
            )
    return [i for i, count in enumerate(counts) if count]


def _steps(entries: Sequence[Entry]) -> Tensor:
    """The steps made so far, on the host in double."""
    return torch.tensor(ops.read_steps([entry.state["step"] for entry in entries]), dtype=torch.float64, device="cpu")


def ranks_that_share(param: Tensor) -> int:
    """How many parts the parameter has."""
    return torch.Size(param.device_mesh.size(d) for cut in layout.cuts(param) for d in cut).numel()  # type: ignore[attr-defined]


def pick(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[i] for i in places]
