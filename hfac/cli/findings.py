"""Parameters whose state stays large because of their shape, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hfac.cli.footprints import ADAMW, OPTIMIZERS
from hfac.cli.memory import Load, Optimizer, Options, Rank, Shape
from hfac.cli.parameters import Model, Parameter

#: share of AdamW's float32 state above which a parameter is reported
SHARE = 0.1
#: share of the trained elements below which a group of parameters is minor
FEW = 0.01
OURS = ("hfac", "smmf")
JUDGED = ("adafactor", *OURS)


@dataclass(frozen=True)
class Finding:
    """Parameters that have the same problem with one optimizer.

    Attributes:
        kind: "vectors", "prime", "thin", "nearly prime", "small", "signs", "last dimensions", "scalars" or
            "empty ranks".
        optimizer: its name in `OPTIMIZERS`; None if all are concerned.
        parameters: the parameters concerned, the one with most state first.
        state_bytes: their state together, on one rank that holds all of it.
        adamw_bytes: AdamW's float32 state for them.
        why, advice: sentences.
        minor: they are so few that nothing needs to be done.
    """

    kind: str
    optimizer: str | None
    parameters: tuple[Parameter, ...]
    state_bytes: int
    adamw_bytes: int
    why: str
    advice: str
    minor: bool = False

    @property
    def elements(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


def find(model: Model, load: Load, worlds: Iterable[int], share: float = SHARE) -> list[Finding]:
    """All findings about a model, the largest state first."""
    trained = [parameter for parameter in model.parameters if parameter.trainable]
    found = []
    for name in JUDGED:
        optimizer = OPTIMIZERS[name]
        kinds: dict[str, list[Parameter]] = {}
        for parameter in trained:
            kind = _kind(optimizer, parameter, load, share)
            if kind is not None:
                kinds.setdefault(kind, []).append(parameter)
        for kind, mine in kinds.items():
            minor = sum(parameter.numel for parameter in mine) < FEW * load.elements()
            groups: dict[str | None, list[Parameter]] = {}
            for parameter in mine:  # where nothing needs to be done, one finding covers all of them
                better = None if minor else _better(optimizer, parameter, load)
                groups.setdefault(better, []).append(parameter)
            found += [_finding(optimizer, kind, better, minor, group, load) for better, group in groups.items()]
    found.sort(key=lambda finding: -finding.state_bytes)
    scalars = tuple(parameter for parameter in trained if not parameter.shape)
    if scalars and max(worlds) > 1:
        why = "Scalars cannot be sharded, and fully_shard refuses them; here every rank is counted with all of them."
        advice = "Give them the shape (1,), or leave them out with ignored_params."
        found.append(Finding("scalars", None, scalars, 0, 0, why, advice))
    return found + _empty_ranks(model.parameters, worlds)


def _empty_ranks(parameters: Sequence[Parameter], worlds: Iterable[int]) -> list[Finding]:
    """Stacks whose slices do not go to all ranks: fewer than ranks, or not evenly divisible."""

    def used(parameter: Parameter, world: int) -> int:
        """How many ranks have a shard of it."""
        size = parameter.shape[0]
        return -(-size // Rank(0, world).share(size))

    total = sum(parameter.numel for parameter in parameters)
    stacks = [p for p in parameters if len(p.shape) > 1 and p.numel]
    found = []
    for world in sorted(set(worlds)):
        mine = sorted((p for p in stacks if used(p, world) < world), key=lambda p: -p.numel)
        elements = sum(parameter.numel for parameter in mine)
        if elements < FEW * total or not mine:
            continue
        first = mine[0]
        busy, most = used(first, world), Rank(0, world).share(first.shape[0])
        why = (
            f"FSDP2 shards the first dimension: {world:,} ranks get up to {most:,} of {first.shape[0]:,} slices each, "
            f"so that {world - busy:,} have none and the fullest has {most / first.shape[0]:.1%}, where "
            f"{1 / world:.1%} would be even."
        )
        advice = (
            "Shard the second dimension (fully_shard's shard_placement_fn; SMMF keeps a byte per sign where shards are "
            "no multiples of 8), shard over fewer ranks and replicate, or give ranks whole experts (expert "
            "parallelism)."
        )
        found.append(Finding("empty ranks", None, tuple(mine), 0, 0, why, advice))
    return found


def _judged(parameter: Parameter, load: Load) -> Options:
    """The state that is judged: without what `--master` and `--signs` add, which the user asked for."""
    return load.options(parameter)._replace(master=None, signs="bits")


def _kind(optimizer: Optimizer, parameter: Parameter, load: Load, share: float) -> str | None:
    """The kind of problem with a shape, or None."""
    numel, options = parameter.numel, _judged(parameter, load)
    if numel < 2 or options.dense and optimizer.name in OURS:  # whole because it was asked for
        return None
    state = optimizer.state_bytes(parameter.shape, load.dtype, options=options)
    if state <= share * ADAMW.state_bytes(parameter.shape, load.dtype):
        return None
    shape = options.slices(parameter.shape)[1] if optimizer.name in OURS else parameter.shape
    numel = math.prod(shape)
    pieces = optimizer.pieces(shape, load.dtype)
    if optimizer.name == "adafactor":
        return "vectors" if "variance" in pieces else "last dimensions"
    if optimizer.name == "hfac":
        if "exp_avg_sq" in pieces:
            return "vectors"
        return "small" if min(_sides(optimizer, shape, load)) * 2 > max(_sides(optimizer, shape, load)) else "thin"
    if "exp_avg_sq" in pieces:
        return "prime"
    rows, cols = _sides(optimizer, shape, load)
    if pieces["exp_avg_sign"].bytes() > numel // 4:
        return "signs"
    return "small" if rows < 4 * cols else "nearly prime"


def _sides(optimizer: Optimizer, shape: Shape, load: Load) -> tuple[int, int]:
    """Rows and columns of the matrix that is factored."""
    pieces = optimizer.pieces(shape, load.dtype)
    return math.prod(pieces["exp_avg_sq_row"].shape), math.prod(pieces["exp_avg_sq_col"].shape)


def _finding(
    optimizer: Optimizer, kind: str, better: str | None, minor: bool, mine: list[Parameter], load: Load
) -> Finding:
    def of(parameter: Parameter, other: Optimizer = optimizer) -> int:
        return other.state_bytes(parameter.shape, load.dtype, options=_judged(parameter, load))

    mine = sorted(mine, key=lambda parameter: -of(parameter))
    why, advice = _WORDS[kind, optimizer.name]
    largest = load.options(mine[0]).slices(mine[0].shape)[1] if optimizer.name in OURS else mine[0].shape
    values: dict[str, object] = {"shape": written(largest)}
    if kind in ("thin", "nearly prime"):
        sides = _sides(optimizer, largest, load)
        values |= {"matrix": written(sides), "factor": min(sides)}
    values["better"] = "No other optimizer of hfac needs clearly less state for them."
    if better is not None:
        other = OPTIMIZERS[better]
        share = sum(of(parameter, other) for parameter in mine) / sum(map(of, mine))
        values["better"] = f"Train them with {other.title}, which takes {share:.0%} of these bytes."
    padded = _padded(largest)
    share = optimizer.state_bytes(padded, load.dtype) / ADAMW.state_bytes(padded, load.dtype)
    values |= {"padded": written(padded), "share": f"{share:.1%}"}
    if minor:
        advice = f"Nothing: they are less than {FEW:.0%} of the model."
    adamw = sum(of(parameter, ADAMW) for parameter in mine)
    return Finding(
        kind,
        optimizer.name,
        tuple(mine),
        sum(map(of, mine)),
        adamw,
        why.format(**values),
        advice.format(**values),
        minor,
    )


def _better(optimizer: Optimizer, parameter: Parameter, load: Load) -> str | None:
    """The name of another of hfac's optimizers that needs clearly less state for a parameter, or None."""

    def of(name: str) -> int:
        return OPTIMIZERS[name].state_bytes(parameter.shape, load.dtype, options=_judged(parameter, load))

    best = min((name for name in OURS if name != optimizer.name), key=of)
    return best if of(best) <= 0.75 * of(optimizer.name) else None


def _padded(shape: Shape) -> Shape:
    """The shape with its longest dimension rounded up to a multiple of 64, or of 8 where it is shorter."""
    longest = max(range(len(shape)), key=lambda d: shape[d])
    step = 64 if shape[longest] > 64 else 8
    return tuple(-(-size // step) * step if d == longest else size for d, size in enumerate(shape))


def written(shape: Iterable[int]) -> str:
    """512 x 3 x 3"""
    return " x ".join(map(str, shape)) or "a scalar"


#: (kind, optimizer) -> why, and what to do if it is worth doing; shapes are the largest parameter's
_WORDS = {
    ("vectors", "adafactor"): (
        "torch's Adafactor keeps the second moment of vectors whole.",
        "{better}",
    ),
    ("last dimensions", "adafactor"): (
        "torch's Adafactor factors the last two dimensions only, which saves little if they are small, as in "
        "convolutions.",
        "{better}",
    ),
    ("vectors", "hfac"): (
        "HFac keeps both moments of vectors whole (and of matrices with one row or one column), as AdamW does.",
        "{better}",
    ),
    ("thin", "hfac"): (
        "Thin matrices have many rows or columns for few elements: {matrix} keeps about 1/{factor} of AdamW's state.",
        "{better}",
    ),
    ("small", "hfac"): (
        "Matrices this small (the largest is {shape}) have many rows and columns for few elements.",
        "Combine such tensors into larger ones, if most of the model is like this.",
    ),
    ("prime", "smmf"): (
        "A prime number of elements has no rows and columns: both moments are whole, 8 bytes per element.",
        "Pad to a multiple of 8 or 64: {padded} instead of {shape} takes {share} of AdamW's state.",
    ),
    ("nearly prime", "smmf"): (
        "The number of elements has no two factors of similar size: {shape} becomes {matrix}.",
        "Pad to a multiple of 8 or 64: {padded} instead of {shape} takes {share} of AdamW's state.",
    ),
    ("signs", "smmf"): (
        "SMMF packs sign bits within each slice of the first dimension, so that they are sharded with the parameter: "
        "if a slice is one element, as in vectors, its sign takes a byte.",
        "Stack them into matrices, if most of the model is like this; the state is smaller than AdamW's in any case.",
    ),
    ("small", "smmf"): (
        "Tensors this small (the largest is {shape}) have many rows and columns for few elements.",
        "Combine such tensors into larger ones, if most of the model is like this.",
    ),
}
