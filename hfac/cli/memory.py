"""What a model takes under each optimizer: bytes of weights, gradients, state and checkpoint, on every rank of FSDP2.

H-Fac and SMMF say themselves what their state is (`_layout` of the classes, asked for parameters without memory), and
which of its dimensions follow the parameter's. What the others keep stands here; tests hold it against the real ones.

FSDP2 cuts the first dimension of every parameter as `torch.chunk` does: ranks get ceil(size / ranks) each until nothing
is left. Rank 0 therefore never has less than another one, of anything.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

import hfac
from hfac.backends import cpu
from hfac.cli.sources import Model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Shape = tuple[int, ...]


class Rank(NamedTuple):
    """One of the ranks that the first dimension of every parameter is cut for."""

    index: int
    world: int

    def share(self, size: int) -> int:
        """How much of a dimension this rank has."""
        piece = -(-size // self.world)
        return max(0, min(piece, size - self.index * piece))

    def part(self, shape: Shape) -> Shape:
        """Shape of this rank's part of a parameter. A scalar cannot be cut."""
        return (self.share(shape[0]), *shape[1:]) if shape else ()


ALONE = Rank(0, 1)


class Piece(NamedTuple):
    """A tensor of a parameter's state, of its global shape.

    Attributes:
        cut: the dimension that is cut as the parameter's first one is; None where the tensor is whole on every rank.
    """

    shape: Shape
    itemsize: int
    cut: int | None = None

    def part(self, rank: Rank) -> Shape:
        return tuple(rank.share(size) if d == self.cut else size for d, size in enumerate(self.shape))

    def bytes(self, rank: Rank = ALONE) -> int:
        return math.prod(self.part(rank)) * self.itemsize


STEP = Piece((), 4)  # a float32 number: on the host, if nothing wants it elsewhere


@dataclass(frozen=True)
class Transient:
    """What a step holds for a while beside weights, gradients and state.

    Attributes:
        bytes: None where it is not known.
        basis: "measured" (tests hold it against a real step), "counted" (of what the code will do), "estimated",
            "stated" (by others, not checked here) or "unknown".
        origin: what it is, and how it is known.
    """

    bytes: int | None
    basis: str
    origin: str


class Load:
    """The parameters of a model as bytes: those of one shape, alike in everything, are counted together."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.order = [p.shape for p in model.parameters if p.trainable]
        self.trained = Counter(self.order)
        self.weights = Counter((p.shape, p.itemsize or dtype.itemsize) for p in model.parameters)

    def weight_bytes(self, rank: Rank = ALONE) -> int:
        return sum(n * size * math.prod(rank.part(shape)) for (shape, size), n in self.weights.items())

    def gradient_bytes(self, rank: Rank = ALONE) -> int:
        return self.dtype.itemsize * self.elements(rank)

    def elements(self, rank: Rank = ALONE) -> int:
        """Of what is trained."""
        return sum(n * math.prod(rank.part(shape)) for shape, n in self.trained.items())


class Optimizer:
    """What an optimizer keeps of a parameter. Subclasses say it in `pieces`, or in `state_bytes`."""

    name: str
    title: str

    def pieces(self, shape: Shape, dtype: torch.dtype) -> dict[str, Piece]:
        """State of a parameter, by key."""
        raise NotImplementedError

    def state_bytes(self, shape: Shape, dtype: torch.dtype, rank: Rank = ALONE) -> int:
        """Of a parameter, on a rank."""
        return sum(piece.bytes(rank) for piece in self.pieces(shape, dtype).values())

    def saved_bytes(self, shape: Shape, dtype: torch.dtype, world: int) -> int:
        """Of a parameter in a checkpoint of all ranks: a cut tensor is in it once, piece by piece, and so is a whole
        one."""
        return sum(piece.bytes() for piece in self.pieces(shape, dtype).values())

    def shared_bytes(self, load: Load, rank: Rank) -> int:
        """What all parameters share."""
        return 0

    def transient(self, load: Load, rank: Rank) -> Transient:
        raise NotImplementedError

    def load_bytes(self, load: Load, rank: Rank) -> int:
        """State of all parameters on a rank."""
        each = sum(n * self.state_bytes(shape, load.dtype, rank) for shape, n in load.trained.items())
        return each + self.shared_bytes(load, rank)

    def checkpoint_bytes(self, load: Load, world: int) -> int:
        """Tensors of weights and state, once for all ranks together; what a file has beside them is not counted."""
        each = sum(n * self.saved_bytes(shape, load.dtype, world) for shape, n in load.trained.items())
        return load.weight_bytes() + each + self.shared_bytes(load, Rank(0, world))


class AdamW(Optimizer):
    """torch.optim.AdamW, which keeps both moments in the type of the weights, or one that keeps them in another."""

    def __init__(self, name: str, title: str, state: torch.dtype) -> None:
        self.name, self.title, self.state = name, title, state

    def pieces(self, shape: Shape, dtype: torch.dtype) -> dict[str, Piece]:
        moment = Piece(shape, self.state.itemsize, 0)
        return {"step": STEP, "exp_avg": moment, "exp_avg_sq": moment}

    def transient(self, load: Load, rank: Rank) -> Transient:
        size = self.state.itemsize
        return Transient(
            size * load.elements(rank),
            "measured",
            f"torch's foreach form, its default on GPUs, holds one more moment, {size} bytes per parameter (fused: 0)",
        )


class Adam8bit(Optimizer):
    """bitsandbytes' AdamW8bit (0.50): a byte per element and moment, and a float32 scale for each block of 256; of what
    a rank has fewer than 4096 elements of, both moments in float32. Steps are Python numbers."""

    name, title = "adam-8bit", "8-bit Adam"
    BLOCK, LEAST = 256, 4096
    TABLES = 2 * 256 * 4  # what the bytes stand for, once for all

    def state_bytes(self, shape: Shape, dtype: torch.dtype, rank: Rank = ALONE) -> int:
        numel = math.prod(rank.part(shape))
        return 2 * (4 * numel if numel < self.LEAST else numel + 4 * -(-numel // self.BLOCK))

    def saved_bytes(self, shape: Shape, dtype: torch.dtype, world: int) -> int:
        if not shape:
            return self.state_bytes(shape, dtype)
        piece = Rank(0, world).share(shape[0])
        full = shape[0] // piece if piece else 0
        alike = full * self.state_bytes(shape, dtype, Rank(0, world)) if full else 0
        return alike + (self.state_bytes(shape, dtype, Rank(full, world)) if full < world else 0)

    def shared_bytes(self, load: Load, rank: Rank) -> int:
        return self.TABLES if any(math.prod(rank.part(shape)) >= self.LEAST for shape in load.trained) else 0

    def transient(self, load: Load, rank: Rank) -> Transient:
        return Transient(0, "stated", "bitsandbytes' kernels update in place on a GPU; not measured here")


class Adafactor(Optimizer):
    """torch.optim.Adafactor: no first moment, the second as row and column factors of the last two dimensions, in the
    gradient's type. Of a DTensor it makes a factor whole on every rank, unless it has the parameter's own shape."""

    name, title = "adafactor", "Adafactor (torch)"

    def pieces(self, shape: Shape, dtype: torch.dtype) -> dict[str, Piece]:
        if len(shape) < 2:
            return {"step": STEP, "variance": Piece(shape, dtype.itemsize, 0)}
        factors = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
        return {"step": STEP} | {
            key: Piece(factor, dtype.itemsize, 0 if factor == shape else None) for key, factor in factors.items()
        }

    def transient(self, load: Load, rank: Rank) -> Transient:
        if rank.world > 1:
            return Transient(None, "unknown", "torch 2.13's step refuses matrices that are DTensors")
        return Transient(
            self._most_held(load) * load.dtype.itemsize,
            "measured" if load.dtype == torch.float32 else "counted",
            "torch's for-loop form, its default, holds a tensor's update, and until it is made that of the one before",
        )

    @staticmethod
    def _most_held(load: Load) -> int:
        """Elements held at once, at most: the loop's variables live on until the next tensor's replace them."""
        update = squares = means = most = 0
        for shape in load.order:
            numel = math.prod(shape)
            if len(shape) < 2:
                most = max(most, means + update + squares + numel, means + update + 2 * numel)
                squares = numel
            elif numel:
                means = numel // shape[-1] + numel // shape[-2]
                most = max(most, means + update + squares + numel + means // (shape[-1] + shape[-2]))
            update = numel
        return most


class Factored(Optimizer):
    """`hfac.HFac` or `hfac.SMMF`: whatever the class says."""

    def __init__(self, name: str, title: str, cls: type[torch.optim.Optimizer]) -> None:
        self.name, self.title, self.cls = name, title, cls

    def pieces(self, shape: Shape, dtype: torch.dtype) -> dict[str, Piece]:
        return _asked(self.cls, shape, dtype)

    def sent_bytes(self, load: Load, rank: Rank) -> int:
        """The buffer that ranks add up: 3 numbers for every column under H-Fac, all factors under SMMF, and a few for
        every tensor."""
        if rank.world == 1:
            return 0
        total = 0
        for shape, n in load.trained.items():
            pieces = self.pieces(shape, load.dtype)
            if not math.prod(shape) or not shape:
                continue
            if self.cls is hfac.HFac:
                numbers = 3 + 3 * math.prod(pieces["exp_avg_col"].shape) if "exp_avg_col" in pieces else 3
            else:
                factors = [piece for key, piece in pieces.items() if key.endswith(("_row", "_col"))]
                numbers = 1 + sum(math.prod(piece.shape) for piece in factors)
            total += 4 * n * numbers
        return total

    def transient(self, load: Load, rank: Rank) -> Transient:
        if cpu._C is None:
            return Transient(None, "unknown", "hfac._C, which plans the kernels, is not built: see hfac doctor")
        sums = self._partial_sums(load, rank)
        if rank.world == 1:
            return Transient(sums, "counted", "the CUDA kernels' partial sums, as their launch plan has them")
        return Transient(
            sums + self.sent_bytes(load, rank),
            "estimated",
            "the buffer that ranks add up, counted, and partial sums as of whole matrices of the parts' size",
        )

    def _partial_sums(self, load: Load, rank: Rank) -> int:
        """Workspace of the CUDA kernels on a list of a rank's parts."""
        factored: list[tuple[int, int, int]] = []
        whole: list[int] = []
        for shape, n in load.trained.items():
            pieces = self.pieces(shape, load.dtype)
            numel = math.prod(rank.part(shape))
            if not numel:
                continue
            if "exp_avg_sq_col" in pieces:
                cols = math.prod(pieces["exp_avg_sq_col"].shape)
                factored += n * [(-(-numel // cols), cols, math.prod(shape[1:]))]
            else:
                whole += n * [numel]
        code = cpu._CODES[load.dtype]
        plan = cpu._C.cuda_plan
        types = dict(param_dtypes=code, grad_dtypes=code)
        algorithm = self.cls._algorithm  # type: ignore[attr-defined]
        total = 0
        if factored:
            rows, cols, slices = (list(column) for column in zip(*factored, strict=True))
            signs = {"slices": slices} if algorithm == "smmf" else {}
            total += plan(op=f"{algorithm}_step", rows=rows, cols=cols, **types, **signs)["workspace_bytes"]
        if whole:
            dense = plan(op=f"{algorithm}_dense_step", rows=whole, cols=[1] * len(whole), **types)
            total += dense["workspace_bytes"]
        return total


@lru_cache(maxsize=4096)
def _asked(cls: Any, shape: Shape, dtype: torch.dtype) -> dict[str, Piece]:
    """The state that an optimizer of hfac makes for a parameter on the meta device."""
    param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    optimizer = cls([param])
    layout = optimizer._layout(param, optimizer.param_groups[0])
    found = {}
    for key, value in optimizer.state[param].items():
        _, _, follows = layout.get(key, (None, None, ()))
        found[key] = Piece(tuple(value.shape), value.element_size(), follows.index(0) if 0 in follows else None)
    return found


ADAMW = AdamW("adamw-fp32", "AdamW, fp32 state", torch.float32)
#: in the order of the tables
OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        ADAMW,
        AdamW("adamw-bf16", "AdamW, bf16 state", torch.bfloat16),
        Adam8bit(),
        Adafactor(),
        Factored("hfac", "H-Fac", hfac.HFac),
        Factored("smmf", "SMMF", hfac.SMMF),
    )
}


@dataclass(frozen=True)
class Row:
    """One optimizer on the largest rank of one number of ranks, in bytes."""

    optimizer: Optimizer
    weights: int
    gradients: int
    state: int
    transient: Transient
    checkpoint: int

    @cached_property
    def total(self) -> int:
        """On a rank; without the transient bytes where these are not known."""
        return self.weights + self.gradients + self.state + (self.transient.bytes or 0)


def rows(load: Load, world: int) -> list[Row]:
    """Every optimizer, on the largest of ``world`` ranks."""
    rank = Rank(0, world)
    weights, gradients = load.weight_bytes(rank), load.gradient_bytes(rank)
    return [
        Row(
            optimizer,
            weights,
            gradients,
            optimizer.load_bytes(load, rank),
            optimizer.transient(load, rank),
            optimizer.checkpoint_bytes(load, world),
        )
        for optimizer in OPTIMIZERS.values()
    ]


def human(count: int | None) -> str:
    """Bytes with three digits and a unit of powers of 1000; "?" where they are not known."""
    if count is None:
        return "?"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            value = count / size
            return f"{value:.{max(0, 2 - int(math.log10(max(value, 1) * 1.0005)))}f} {unit}"
    return f"{count} B"
