"""What each optimizer keeps: its state per parameter, and the transient memory of a step.

The state of HFac and SMMF, and which of its dimensions are sharded with the parameter, comes from the classes
themselves (`_layout`, called with parameters on the meta device). The rules for the others are here; tests compare them
with the real optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import hfac
from hfac import signs, spec
from hfac.backends import addresses, cpu
from hfac.cli.memory import ALONE, PLAIN, STEP, Load, Optimizer, Options, Piece, Rank, Shape, Transient


class AdamW(Optimizer):
    """torch.optim.AdamW, with both moments in the type ``state``; with ``masters`` on float32 copies of the weights, as
    mixed-precision trainers keep them."""

    def __init__(self, name: str, title: str, state: torch.dtype, masters: bool = False) -> None:
        self.name, self.title, self.state, self.masters = name, title, state, masters

    def serves(self, dtype: torch.dtype) -> bool:
        return not self.masters or dtype != torch.float32

    def pieces(self, shape: Shape, dtype: torch.dtype, options: Options = PLAIN) -> dict[str, Piece]:
        moment = Piece(shape, self.state.itemsize, 0)
        found = {"step": STEP, "exp_avg": moment, "exp_avg_sq": moment}
        return found | {"master": Piece(shape, 4, 0)} if self.masters else found

    def transient(self, load: Load, rank: Rank) -> Transient:
        size = self.state.itemsize
        if self.masters:
            return Transient(
                (4 + size) * load.elements(rank),
                "counted",
                f"gradients in float32, 4 bytes per parameter, and one more moment of torch's foreach form, {size} "
                "(fused: 0)",
            )
        return Transient(
            size * load.elements(rank),
            "measured" if self.state == load.dtype else "counted",
            f"torch's foreach form, its default on GPUs, holds one more moment, {size} bytes per parameter (fused: 0)",
        )


class Adam8bit(Optimizer):
    """bitsandbytes' AdamW8bit (0.50): a byte per element and moment, and a float32 scale for each block of 256; both
    moments in float32 if a rank has fewer than 4096 elements of a parameter. Steps are Python numbers."""

    name, title = "adam-8bit", "8-bit Adam"
    BLOCK, LEAST = 256, 4096
    TABLES = 2 * 256 * 4  # the values that the bytes stand for, one table for the model

    def state_bytes(self, shape: Shape, dtype: torch.dtype, rank: Rank = ALONE, options: Options = PLAIN) -> int:
        numel = math.prod(rank.part(shape))
        return 2 * (4 * numel if numel < self.LEAST else numel + 4 * -(-numel // self.BLOCK))

    def saved_bytes(self, shape: Shape, dtype: torch.dtype, world: int, options: Options = PLAIN) -> int:
        if not shape:
            return self.state_bytes(shape, dtype)
        piece = Rank(0, world).share(shape[0])
        full = shape[0] // piece if piece else 0
        alike = full * self.state_bytes(shape, dtype, Rank(0, world)) if full else 0
        return alike + (self.state_bytes(shape, dtype, Rank(full, world)) if full < world else 0)

    def fullest(self, load: Load, world: int) -> Rank:
        """Not always rank 0: a slightly smaller shard may be too small for 8-bit state. Sizes change only where
        whole pieces of a dimension end."""
        ends = {0}
        for shape in load.trained:
            piece = Rank(0, world).share(shape[0]) if shape else 0
            if piece:
                ends |= {shape[0] // piece, shape[0] // piece + 1}
        ranks = [Rank(index, world) for index in sorted(ends) if index < world]
        return max(ranks, key=lambda r: load.weight_bytes(r) + load.gradient_bytes(r) + self.load_bytes(load, r))

    def shared_bytes(self, load: Load, rank: Rank) -> int:
        return self.TABLES if any(math.prod(rank.part(shape)) >= self.LEAST for shape in load.trained) else 0

    def transient(self, load: Load, rank: Rank) -> Transient:
        return Transient(0, "stated", "bitsandbytes' kernels update in place on a GPU; not measured here")


class Adafactor(Optimizer):
    """torch.optim.Adafactor: no first moment, the second as row and column factors of the last two dimensions, in the
    gradient's type. Of a DTensor it makes a factor whole on every rank, unless it has the parameter's own shape."""

    name, title = "adafactor", "Adafactor (torch)"

    def pieces(self, shape: Shape, dtype: torch.dtype, options: Options = PLAIN) -> dict[str, Piece]:
        if len(shape) < 2:
            return {"step": STEP, "variance": Piece(shape, dtype.itemsize, 0)}
        factors = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}
        return {"step": STEP} | {
            key: Piece(factor, dtype.itemsize, 0 if factor == shape else None) for key, factor in factors.items()
        }

    def transient(self, load: Load, rank: Rank) -> Transient:
        held = self._most_held(load, rank) * load.dtype.itemsize
        loop = (
            "torch's for-loop form, its default, holds a tensor's update, and the previous tensor's until it is formed"
        )
        if rank.world > 1:
            refused = "for the shards, since torch 2.13's step refuses matrices that are DTensors"
            return Transient(held, "estimated", f"{loop}; {refused}")
        return Transient(held, "measured" if load.dtype == torch.float32 else "counted", loop)

    @staticmethod
    def _most_held(load: Load, rank: Rank) -> int:
        """The most elements held at once: a loop's variables stay alive until the next tensor's replace them."""
        update = squares = means = most = 0
        for shape in map(rank.part, load.order):
            numel = math.prod(shape)
            if len(shape) < 2:
                most = max(most, means + update + squares + numel, means + update + 2 * numel)
                squares = numel
            elif numel:
                means = numel // shape[-1] + numel // shape[-2]
                most = max(most, means + update + squares + numel + numel // (shape[-1] * shape[-2]))
            update = numel
        return most


class Factored(Optimizer):
    """`hfac.HFac` or `hfac.SMMF`: as the class itself reports."""

    MOST = 1 << 42  # the launch plan has an entry for each tile

    def __init__(self, name: str, title: str, cls: type[hfac.HFac] | type[hfac.SMMF], **more: str) -> None:
        self.name, self.title, self.more = name, title, tuple(more.items())
        self.cls: Any = cls
        #: the step of matrices
        self.op = spec.ALGORITHMS[cls._algorithm].op_for(True, {"first_moment": "factored", **more})

    def pieces(self, shape: Shape, dtype: torch.dtype, options: Options = PLAIN) -> dict[str, Piece]:
        return _asked(self.cls, shape, dtype, options, self.more)

    def sent_bytes(self, load: Load, rank: Rank) -> int:
        """The all-reduced buffer: 3 numbers for every column under HFac, 2 where its first moment is whole, all
        factors under SMMF, and a few for every tensor."""
        if rank.world == 1:
            return 0
        total = 0
        for (shape, options), n in load.kinds.items():
            # A rank has all of its slices, and whole pieces of fused weights.
            if not math.prod(shape) or not shape or options.batch_dims or options.views > 1:
                continue
            pieces = self.pieces(shape, load.dtype, options)
            if self.cls is hfac.HFac:
                whole_first = "exp_avg_q" in pieces  # no sums of gradients, but that of the old r
                cols = math.prod(pieces["exp_avg_sq_col"].shape) if "exp_avg_sq_col" in pieces else 0
                numbers = (4 + 2 * cols) if whole_first else (3 + 3 * cols)
            else:
                factors = [piece for key, piece in pieces.items() if key.endswith(("_row", "_col"))]
                numbers = 1 + sum(math.prod(piece.shape) for piece in factors)
            total += 4 * n * numbers
        return total

    def transient(self, load: Load, rank: Rank) -> Transient:
        if cpu._C is None:
            return Transient(None, "unknown", "hfac._C, which plans the kernels, is not built: see hfac doctor")
        if load.elements(rank) > self.MOST:
            return Transient(None, "unknown", f"launches are not planned for more than {self.MOST:,} elements")
        scratch = self._packed_bytes(load, rank)
        packed = ", and bits of the signs that are kept in bytes, with what packing them takes" if scratch else ""
        sums = self._partial_sums(load, rank) + scratch
        if rank.world == 1:
            return Transient(sums, "counted", f"the CUDA kernels' partial sums, from their launch plan{packed}")
        return Transient(
            sums + self.sent_bytes(load, rank),
            "estimated",
            "the all-reduced buffer, counted, and partial sums planned as for whole matrices of the shards' size"
            f"{packed}",
        )

    def _packed_bytes(self, load: Load, rank: Rank) -> int:
        """What stays from step to step for states that ops cannot take as they are kept: bits of signs in bytes, and
        states of pieces of columns; and the temporaries of packing signs, of one parameter at a time."""
        kept = most = 0
        for (shape, options), n in load.kinds.items():
            part, batch = rank.part(shape), options.batch_dims
            pieces = self.pieces(shape, load.dtype, options)
            if 0 in part:
                continue
            columns = options.views > 1 and options.views_dim > 0
            for key, piece in pieces.items():
                if key == "exp_avg_sign" and self.is_in_bytes(shape, load, options):
                    count, one = options.slices(part)
                    kept += n * count * math.prod(signs.bits_shape(one))
                    most = max(most, min(math.prod(part), max(signs.TOGETHER, math.prod(part[batch + 1 :]))))
                elif columns and key in ("exp_avg_sign", "exp_avg_q", "exp_avg", "exp_avg_sq"):
                    kept += n * piece.bytes(rank)
        return kept + 2 * most

    def is_in_bytes(self, shape: Shape, load: Load, options: Options) -> bool:
        """Whether signs are kept in bytes."""
        layout = _layout_of(self.cls, shape, load.dtype, options, self.more)
        return layout["exp_avg_sign"][1] == signs.BYTES

    def _partial_sums(self, load: Load, rank: Rank) -> int:
        """Workspace of the CUDA kernels on a rank's shards: a call for each group of options."""
        groups: dict[Options, list[tuple[Shape, int]]] = {}
        for (shape, options), n in load.kinds.items():
            groups.setdefault(options, []).append((shape, n))
        return sum(self._of_group(options, shapes, load, rank) for options, shapes in groups.items())

    def _of_group(self, options: Options, shapes: list[tuple[Shape, int]], load: Load, rank: Rank) -> int:
        factored: list[tuple[int, int, int]] = []
        whole: list[int] = []
        batch = options.batch_dims
        for shape, n in shapes:
            part, one = rank.part(shape), options.slices(shape)[1]
            if not math.prod(part):
                continue
            if batch or options.views > 1:  # matrices of their own
                n, part = n * math.prod(part) // math.prod(one), one
            pieces = self.pieces(one, load.dtype, options._replace(batch_dims=0, views=1))
            numel = math.prod(part)
            if "exp_avg_sq_col" in pieces:
                cols = math.prod(pieces["exp_avg_sq_col"].shape)
                factored += n * [(-(-numel // cols), cols, math.prod(one[1:]))]
            else:
                whole += n * [numel]
        code = addresses.CODES[load.dtype]
        plan = cpu._C.cuda_plan
        types = dict(param_dtypes=code, grad_dtypes=code)
        algorithm = self.cls._algorithm
        total = 0
        if factored:
            heights, widths, slices = (list(column) for column in zip(*factored, strict=True))
            packed = {"slices": slices} if algorithm == "smmf" else {}
            total += plan(op=self.op.name.removesuffix("_"), rows=heights, cols=widths, **types, **packed)[
                "workspace_bytes"
            ]
        if whole:
            dense = plan(op=f"{algorithm}_dense_step", rows=whole, cols=[1] * len(whole), **types)
            total += dense["workspace_bytes"]
        return total


@lru_cache(maxsize=4096)
def _asked(
    cls: Any, shape: Shape, dtype: torch.dtype, options: Options, more: tuple[tuple[str, str], ...]
) -> dict[str, Piece]:
    """The state that an optimizer of hfac creates for a parameter on the meta device."""
    param, optimizer = _made(cls, shape, dtype, options, more)
    layout = optimizer._layout(param, optimizer.param_groups[0])
    found = {}
    for key, value in optimizer.state[param].items():
        _, _, follows = layout.get(key, (None, None, ()))
        found[key] = Piece(tuple(value.shape), value.element_size(), follows.index(0) if 0 in follows else None)
    return found


@lru_cache(maxsize=4096)
def _layout_of(
    cls: Any, shape: Shape, dtype: torch.dtype, options: Options, more: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    param, optimizer = _made(cls, shape, dtype, options, more)
    return optimizer._layout(param, optimizer.param_groups[0])


def _made(
    cls: Any, shape: Shape, dtype: torch.dtype, options: Options, more: tuple[tuple[str, str], ...]
) -> tuple[torch.nn.Parameter, Any]:
    param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    own = {name: value for name, value in options._asdict().items() if name in cls._all_rules()}
    return param, cls([{"params": [param], **own}], **dict(more))


ADAMW = AdamW("adamw-fp32", "AdamW, fp32 state", torch.float32)
MASTERS = AdamW("adamw-masters", "AdamW, fp32 masters", torch.float32, masters=True)
#: in the order of the tables
OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        MASTERS,
        ADAMW,
        AdamW("adamw-bf16", "AdamW, bf16 state", torch.bfloat16),
        Adam8bit(),
        Adafactor(),
        Factored("hfac-int8", "HFac, int8 moment", hfac.HFac, first_moment="int8"),
        Factored("hfac", "HFac", hfac.HFac),
        Factored("smmf", "SMMF", hfac.SMMF),
    )
}


@dataclass(frozen=True)
class Row:
    """One optimizer on the fullest rank of one number of ranks, in bytes."""

    optimizer: Optimizer
    rank: Rank
    weights: int
    gradients: int
    state: int
    transient: Transient
    checkpoint: int

    @property
    def total(self) -> int:
        """On a rank; without the transient bytes where these are not known."""
        return self.weights + self.gradients + self.state + (self.transient.bytes or 0)


def rows(load: Load, world: int) -> list[Row]:
    """Every optimizer, on the fullest of ``world`` ranks."""
    found = []
    for optimizer in OPTIMIZERS.values():
        if not optimizer.serves(load.dtype):
            continue
        rank = optimizer.fullest(load, world)
        sizes = load.weight_bytes(rank), load.gradient_bytes(rank), optimizer.load_bytes(load, rank)
        transient, checkpoint = optimizer.transient(load, rank), optimizer.checkpoint_bytes(load, world)
        found.append(Row(optimizer, rank, *sizes, transient, checkpoint))
    return found
