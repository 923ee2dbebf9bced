"""Parameters whose state stays large because of their shape, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hfac.cli.footprints import ADAMW, OPTIMIZERS
from hfac.cli.memory import Load, Optimizer, Options, Rank, Shape
from hfac.cli.parameters import Model, Parameter

#: of AdamW's float32 state: what takes more of it than this is named
SHARE = 0.1
#: of the trained elements: a group of parameters below it is too few to bother with
FEW = 0.01
OURS = ("hfac", "smmf")
JUDGED = ("adafactor", *OURS)


@dataclass(frozen=True)
class Finding:
    """Parameters that one optimizer has the same trouble with.

    Attributes:
        kind: "vectors", "prime", "thin", "nearly prime", "small", "signs", "last dimensions", "scalars" or
            "empty ranks".
        optimizer: its name in `OPTIMIZERS`; None where it concerns all of them.
        parameters: those concerned, the one with most state first.
        state_bytes: theirs together, on one rank that has all.
        adamw_bytes: what AdamW's float32 state of them is.
        why, advice: sentences.
        minor: they are so few that nothing need be done.
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
    """What is to be said of a model, the largest state first."""
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
            for parameter in mine:  # one advice does for all of them where nothing need be done
                better = None if minor else _better(optimizer, parameter, load)
                groups.setdefault(better, []).append(parameter)
            found += [_finding(optimizer, kind, better, minor, group, load) for better, group in groups.items()]
    found.sort(key=lambda finding: -finding.state_bytes)
    scalars = tuple(parameter for parameter in trained if not parameter.shape)
    if scalars and max(worlds) > 1:
        why = "Scalars cannot be cut, and fully_shard refuses them; here every rank has them whole."
        advice = "Give them the shape (1,), or leave them out with ignored_params."
        found.append(Finding("scalars", None, scalars, 0, 0, why, advice))
    return found + _empty_ranks(model.parameters, worlds)


def _empty_ranks(parameters: Sequence[Parameter], worlds: Iterable[int]) -> list[Finding]:
    """Stacks of fewer slices than ranks, or of a number that does not go round: some ranks have none of them."""

    def used(parameter: Parameter, world: int) -> int:
        """How many ranks have something of it."""
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
            f"FSDP2 cuts the first dimension: {world:,} ranks get up to {most:,} of {first.shape[0]:,} slices each, so "
            f"that {world - busy:,} have none and the fullest has {most / first.shape[0]:.1%}, where {1 / world:.1%} "
            "would be even."
        )
        advice = (
            "Cut the second dimension (fully_shard's shard_placement_fn; SMMF takes parts of multiples of 8), shard "
            "over fewer ranks and replicate, or give ranks whole experts (expert parallelism)."
        )
        found.append(Finding("empty ranks", None, tuple(mine), 0, 0, why, advice))
    return found


def _judged(parameter: Parameter, load: Load) -> Options:
    """What is judged of a parameter: what `--master` adds to its state was asked for."""
    return load.options(parameter)._replace(master=None)


def _kind(optimizer: Optimizer, parameter: Parameter, load: Load, share: float) -> str | None:
    """What is wrong with a shape, or None."""
    numel, options = parameter.numel, _judged(parameter, load)
    if numel < 2 or options.dense and optimizer.name in OURS:  # whole because it was asked for
        return None
    state = optimizer.state_bytes(parameter.shape, load.dtype, options=options)
    if state <= share * ADAMW.state_bytes(parameter.shape, load.dtype):
        return None
    shape = parameter.shape[options.batch_dims :] if optimizer.name in OURS else parameter.shape
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
    largest = mine[0].shape[mine[0].batch_dims :] if optimizer.name in OURS else mine[0].shape
    values: dict[str, object] = {"shape": written(largest)}
    if kind in ("thin", "nearly prime"):
        sides = _sides(optimizer, largest, load)
        values |= {"matrix": written(sides), "factor": min(sides)}
    values["better"] = "No other optimizer of hfac takes clearly less of them."
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
    """Which of hfac's other optimizers takes clearly less of a parameter: its name, or None."""

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


#: (kind, optimizer) -> why, and what to do where it is worth something; shapes in it are of the largest parameter
_WORDS = {
    ("vectors", "adafactor"): (
        "torch's Adafactor keeps the second moment of vectors whole.",
        "{better}",
    ),
    ("last dimensions", "adafactor"): (
        "torch's Adafactor factors the last two dimensions alone, which saves little where they are small, as in "
        "convolutions.",
        "{better}",
    ),
    ("vectors", "hfac"): (
        "H-Fac keeps both moments of vectors whole (and of matrices with one row or one column), as AdamW does.",
        "{better}",
    ),
    ("thin", "hfac"): (
        "Thin matrices have many rows or columns for their elements: {matrix} keeps about 1/{factor} of AdamW's state.",
        "{better}",
    ),
    ("small", "hfac"): (
        "In matrices this small (the largest is {shape}), rows and columns are many for the elements.",
        "Keep such tensors as one larger one, if most of the model is like this.",
    ),
    ("prime", "smmf"): (
        "A prime number of elements makes no rows and columns: both moments are whole, 8 bytes per element.",
        "Pad to a multiple of 8 or 64: {padded} instead of {shape} takes {share} of AdamW's state.",
    ),
    ("nearly prime", "smmf"): (
        "The number of elements has no two factors of like size: {shape} becomes {matrix}.",
        "Pad to a multiple of 8 or 64: {padded} instead of {shape} takes {share} of AdamW's state.",
    ),
    ("signs", "smmf"): (
        "SMMF packs signs within each slice of the first dimension, so that they are cut as the parameter is: where a "
        "slice is one element, as in vectors, its sign takes a byte.",
        "Stack them into matrices, if most of the model is like this; it is less than AdamW's as it is.",
    ),
    ("small", "smmf"): (
        "In tensors this small (the largest is {shape}), rows and columns are many for the elements.",
        "Keep such tensors as one larger one, if most of the model is like this.",
    ),
}
