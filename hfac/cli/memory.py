"""Bytes of a model and of an optimizer's state, on every rank of FSDP2.

FSDP2 splits the first dimension of every parameter as `torch.chunk` does: ranks get ceil(size / ranks) each until
nothing is left. No rank has more of a tensor than rank 0.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hfac.cli.parameters import Model, Parameter

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Shape = tuple[int, ...]


class Rank(NamedTuple):
    """One of the ranks among which the first dimension of every parameter is split."""

    index: int  # type: ignore[assignment]  # of a tuple, a method that nobody calls here
    world: int

    def share(self, size: int) -> int:
        """How many indices of a dimension this rank has."""
        piece = -(-size // self.world)
        return max(0, min(piece, size - self.index * piece))

    def part(self, shape: Shape) -> Shape:
        """Shape of this rank's shard of a parameter. A scalar cannot be sharded."""
        return (self.share(shape[0]), *shape[1:]) if shape else ()


ALONE = Rank(0, 1)


class Piece(NamedTuple):
    """A tensor of a parameter's state, with its global shape.

    Attributes:
        cut: the dimension that is sharded as the parameter's first one is; None if every rank has the whole tensor.
    """

    shape: Shape
    itemsize: int
    cut: int | None = None

    def part(self, rank: Rank) -> Shape:
        return tuple(rank.share(size) if d == self.cut else size for d, size in enumerate(self.shape))

    def bytes(self, rank: Rank = ALONE) -> int:
        return math.prod(self.part(rank)) * self.itemsize


STEP = Piece((), 4)  # a float32 number: on the host, if nothing wants it elsewhere


class Options(NamedTuple):
    """Options of HFac and SMMF that a parameter's state depends on, as their groups have them; ``signs`` is SMMF's
    alone."""

    dense: bool = False
    batch_dims: int = 0
    rounding: str = "nearest"
    master: str | None = None
    signs: str = "bits"
    views: int = 1
    views_dim: int = 0

    def slices(self, shape: Shape) -> tuple[int, Shape]:
        """How many slices a parameter of ``shape`` has, pieces of fused weights included, and the shape of one."""
        batch, along = self.batch_dims, self.batch_dims + self.views_dim
        count = math.prod(shape[:batch]) * self.views
        if self.views == 1:
            return count, shape[batch:]
        return count, (*shape[batch:along], shape[along] // self.views, *shape[along + 1 :])


PLAIN = Options()


@dataclass(frozen=True)
class Transient:
    """What a step allocates temporarily, in addition to weights, gradients and state.

    Attributes:
        bytes: None if unknown.
        basis: "measured" (tests compare it with a real step), "counted" (from what the code does), "estimated",
            "stated" (by others, not checked here) or "unknown".
        origin: what the memory is for, and how its size is known.
    """

    bytes: int | None
    basis: str
    origin: str


class Load:
    """The parameters of a model as bytes: parameters alike in shape and everything else are counted together.

    ``rounding`` and ``master`` are options of HFac and SMMF, ``signs`` of SMMF; the other optimizers train the weights
    as they are.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        rounding: str = PLAIN.rounding,
        master: str | None = None,
        signs: str = PLAIN.signs,
    ) -> None:
        self.dtype, self.rounding, self.master, self.signs = dtype, rounding, master, signs
        self.order = [p.shape for p in model.parameters if p.trainable]
        self.trained = Counter(self.order)
        self.kinds = Counter((p.shape, self.options(p)) for p in model.parameters if p.trainable)
        self.weights = Counter((p.shape, p.itemsize or dtype.itemsize) for p in model.parameters)

    def options(self, parameter: Parameter) -> Options:
        """The options of HFac and SMMF for a parameter."""
        p = parameter
        return Options(p.dense, p.batch_dims, self.rounding, self.master, self.signs, p.views, p.views_dim)

    def weight_bytes(self, rank: Rank = ALONE) -> int:
        return sum(n * math.ceil(size * math.prod(rank.part(shape))) for (shape, size), n in self.weights.items())

    def gradient_bytes(self, rank: Rank = ALONE) -> int:
        return self.dtype.itemsize * self.elements(rank)

    def elements(self, rank: Rank = ALONE) -> int:
        """Of what is trained."""
        return sum(n * math.prod(rank.part(shape)) for shape, n in self.trained.items())


class Optimizer:
    """What an optimizer keeps for a parameter. Subclasses define `pieces`, or `state_bytes`."""

    name: str
    title: str

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether it makes sense for weights of this type."""
        return True

    def pieces(self, shape: Shape, dtype: torch.dtype, options: Options = PLAIN) -> dict[str, Piece]:
        """State of a parameter, by state key."""
        raise NotImplementedError

    def state_bytes(self, shape: Shape, dtype: torch.dtype, rank: Rank = ALONE, options: Options = PLAIN) -> int:
        """Bytes of a parameter's state, on a rank."""
        return sum(piece.bytes(rank) for piece in self.pieces(shape, dtype, options).values())

    def saved_bytes(self, shape: Shape, dtype: torch.dtype, world: int, options: Options = PLAIN) -> int:
        """Bytes of a parameter's state in a checkpoint of all ranks, which has every tensor once, sharded or not."""
        return sum(piece.bytes() for piece in self.pieces(shape, dtype, options).values())

    def shared_bytes(self, load: Load, rank: Rank) -> int:
        """Bytes that all parameters share."""
        return 0

    def transient(self, load: Load, rank: Rank) -> Transient:
        raise NotImplementedError

    def fullest(self, load: Load, world: int) -> Rank:
        """The rank with most memory in use."""
        return Rank(0, world)

    def load_bytes(self, load: Load, rank: Rank) -> int:
        """State of all parameters on a rank."""
        each = sum(n * self.state_bytes(shape, load.dtype, rank, how) for (shape, how), n in load.kinds.items())
        return each + self.shared_bytes(load, rank)

    def checkpoint_bytes(self, load: Load, world: int) -> int:
        """Bytes of weights and state, once for all ranks; a file's own overhead is not counted."""
        each = sum(n * self.saved_bytes(shape, load.dtype, world, how) for (shape, how), n in load.kinds.items())
        return load.weight_bytes() + each + self.shared_bytes(load, Rank(0, world))


def human(count: int | None) -> str:
    """Bytes with three digits and a unit of powers of 1000; "?" if they are unknown."""
    if count is None:
        return "?"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            value = count / size
            return f"{value:.{max(0, 2 - int(math.log10(max(value, 1) * 1.0005)))}f} {unit}"
    return f"{count} B"
