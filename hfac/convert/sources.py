"""Reads the states of the optimizers that `hfac.convert` knows: each as moments, one parameter at a time."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import codes, matricize, signs
from ..optim.options import warn
from ..optim.state import LOW
from ..slicing import joined, slices
from .strangers import refusal

Entry = Mapping[str, Any]


class Moments(NamedTuple):
    """What an optimizer has averaged in ``step`` steps; both averages of the parameter's shape, weights adding up to 1.

    ``first`` is None where the source has no first moment.
    """

    first: Tensor | None
    second: Tensor
    step: float


#: message's beginning, state, group, shape -> moments
Read = Callable[[str, Entry, Mapping[str, Any], tuple[int, ...]], Moments]
#: state, group -> the shape of the parameter where these tell it
Shape = Callable[[Entry, Mapping[str, Any]], tuple[int, ...] | None]


class Source(NamedTuple):
    """How to read an optimizer's state of one parameter."""

    name: str
    read: Read
    shape: Shape
    #: options of the target from those of a source's group, where they mean the same; by target
    options: Callable[[Mapping[str, Any], str], dict[str, Any]]


def _adam(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """Adam's averages start from zero: after t steps their weights add up to 1 - beta^t, by which its step divides."""
    t = float(entry["step"])
    averages = []
    for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True):
        averages.append(_over(tensor(where, entry, name, shape), 1 - float(beta) ** t))
    return Moments(averages[0], averages[1], t)


def _adafactor(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """Means of squares over the last and the last but one dimension; the first decay is 0, so the weights add up to
    1."""
    t = float(entry["step"])
    if "variance" in entry:
        return Moments(None, tensor(where, entry, "variance", shape), t)
    row = tensor(where, entry, "row_var", (*shape[:-1], 1))
    col = tensor(where, entry, "col_var", (*shape[:-2], 1, *shape[-1:]))
    mean = row.mean(-2, keepdim=True)
    return Moments(None, row / torch.where(mean == 0, 1, mean) * col, t)


def _transformers_adafactor(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """Means of squares without the dimension that they were taken over. Its first moment, where there is one, averages
    updates that the learning rate is in, and is left out."""
    t = float(entry["step"])
    if "exp_avg_sq" in entry:
        V = tensor(where, entry, "exp_avg_sq", shape)
    else:
        row = tensor(where, entry, "exp_avg_sq_row", shape[:-1])
        col = tensor(where, entry, "exp_avg_sq_col", (*shape[:-2], *shape[-1:]))
        mean = row.mean(-1, keepdim=True)
        V = (row / torch.where(mean == 0, 1, mean)).unsqueeze(-1) * col.unsqueeze(-2)
    return Moments(None, (V - group["eps"][0]).clamp(min=0), t)


def _published(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """The authors' SMMF: factors in tuples, one bool per sign, and a step that counts the one to come."""
    t = max(float(entry["step"]) - 1, 0.0)
    first, second = entry.get("momentum_m"), entry["momentum_v"]
    if isinstance(second, Tensor):
        M = None if first is None else tensor(where, entry, "momentum_m", shape)
        V = tensor(where, entry, "momentum_v", shape)
    else:
        V = _outer(where, "momentum_v", second, shape)
        M = None
        if first is not None:
            positive = tensor(where, entry, "sign", V.shape).bool()  # torch's loading casts it to the parameter's type
            M = _outer(where, "momentum_m", first, shape)
            M = torch.where(positive, M, -M).reshape(shape)
        V = V.reshape(shape)
    return Moments(None if M is None else _over(M, smmf_weight(group, t)), V, t)


def _smmf(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    t = float(entry["step"])
    if "exp_avg_sq" in entry:
        M = tensor(where, entry, "exp_avg", shape) if "exp_avg" in entry else None
        V = tensor(where, entry, "exp_avg_sq", shape)
    else:
        V = _outer(where, "exp_avg_sq", (entry["exp_avg_sq_row"], entry["exp_avg_sq_col"]), shape).reshape(shape)
        M = None
        if "exp_avg_row" in entry:
            in_bytes = getattr(entry.get("exp_avg_sign"), "dtype", None) == signs.BYTES
            sign = tensor(where, entry, "exp_avg_sign", shape if in_bytes else signs.bits_shape(shape))
            M = _outer(where, "exp_avg", (entry["exp_avg_row"], entry["exp_avg_col"]), shape).reshape(shape)
            M = torch.where(sign if in_bytes else signs.unpack_signs(sign, shape), M, -M)
    return Moments(None if M is None else _over(M, smmf_weight(group, t)), V, t)


def _hfac(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """The matrices that have these row and column means, and these row and column sums, and nothing else. Codes stand
    for the first in units of the root of the second."""
    t = float(entry["step"])
    if "exp_avg" in entry:
        M, V = tensor(where, entry, "exp_avg", shape), tensor(where, entry, "exp_avg_sq", shape)
    else:
        k = matricize.cut(shape, group["matricize"]) or 0
        kept = ("exp_avg_sq",) if "exp_avg_q" in entry else ("exp_avg", "exp_avg_sq")
        *u, r = (tensor(where, entry, f"{name}_row", shape[:k]).reshape(-1, 1) for name in kept)
        *v, s = (tensor(where, entry, f"{name}_col", shape[k:]).reshape(1, -1) for name in kept)
        total = r.sum()
        V = (r / torch.where(total == 0, 1, total) * s).reshape(shape)
        if "exp_avg_q" in entry:
            M = codes.decode(_codes(where, entry, shape), V.dtype) * V.sqrt()
        else:
            M = (u[0] + v[0] - v[0].mean()).reshape(shape)
    return Moments(M, (V - group["eps"]).clamp(min=0), t)


def _codes(where: str, entry: Entry, shape: tuple[int, ...]) -> Tensor:
    q = tensor(where, entry, "exp_avg_q", shape)
    if q.dtype != torch.int8 or bool((q == -128).any()):
        what = "holds -128, which stands for nothing" if q.dtype == torch.int8 else f"has dtype {q.dtype}"
        raise ValueError(f"{where}: 'exp_avg_q' must be int8 codes from -127 to 127, and {what}. It is damaged.")
    return q


def _by_slice(read: Read) -> Read:
    """For our own two: the state of a stack is read slice by slice, and the moments are put together."""

    def stack(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
        batch, views, along = group.get("batch_dims", 0), group.get("views", 1), group.get("views_dim", 0)
        if not batch and views == 1:
            return read(where, entry, group, shape)
        counts = (*shape[:batch], views) if views > 1 else shape[:batch]
        whole = {}
        for name in (name for name in entry if name not in ("step", "skipped", LOW)):
            dims = len(counts) if is_factor(name) else batch
            sides = entry[name].shape[dims:] if isinstance(entry[name], Tensor) else ()
            whole[name] = tensor(where, entry, name, (*counts[:dims], *sides))
        parts = {name: pieces(value, batch, views, along, is_factor(name)) for name, value in whole.items()}
        cut = batch + along
        side = shape[batch:] if views == 1 else (*shape[batch:cut], shape[cut] // views, *shape[cut + 1 :])
        found = [
            read(
                f"{where}, slice {i}",
                {"step": entry["step"], **{name: values[i] for name, values in parts.items()}},
                group,
                side,
            )
            for i in range(math.prod(counts))
        ]
        if not found:  # nor is there an element
            return Moments(None, next(iter(whole.values())).new_zeros(shape), float(entry["step"]))

        def together(each: list[Tensor]) -> Tensor:
            stacked = torch.stack(each).view(*counts, *side)
            return (joined(stacked, batch, along) if views > 1 else stacked).reshape(shape)

        firsts = [moments.first for moments in found if moments.first is not None]
        return Moments(
            together(firsts) if firsts else None, together([moments.second for moments in found]), found[0].step
        )

    return stack


def is_factor(key: str) -> bool:
    """Whether a state has rows or columns, and not elements."""
    return key.endswith(("_row", "_col"))


def pieces(tensor: Tensor, batch_dims: int, views: int, views_dim: int, factor: bool = False) -> Sequence[Tensor]:
    """Views of what the first dimensions count, and of the pieces that ``views`` makes, which a factor has as a
    dimension of their own; row-major."""
    if factor:
        return slices([tensor], batch_dims + (views > 1))
    return slices([tensor], batch_dims, [views] if views > 1 else None, views_dim)


def smmf_weight(group: Mapping[str, Any], t: float) -> float:
    """What the weights of SMMF's first moment add up to after t steps from zero: 1 - prod_i beta growth^(i-1)."""
    if group["beta"] is None:
        return 1.0
    return 1 - float(group["beta"]) ** t * float(group["growth_rate"]) ** (t * (t - 1) / 2)


_COMMON = ("lr", "weight_decay", "maximize")
#: options that `hfac.param_groups` writes; torch's optimizers keep what they do not know
_SHAPING = ("dense", "batch_dims", "views", "views_dim")
#: of our own two, beyond these
_OURS = (*_COMMON, "nonfinite", *_SHAPING, "rounding", "seed", "master")


def _adam_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    found = _pick(group, (*_COMMON, *_SHAPING))
    # Where the key is missing AdamW was a class of its own; which of the two it was, the state dict does not tell.
    coupled = not group.get("decoupled_weight_decay", True)
    if to == "hfac":
        return {**_decoupled(found, coupled), "betas": tuple(map(float, group["betas"]))}
    return {**found, "beta": float(group["betas"][0]), "weight_decay_mode": "adam" if coupled else "adamw"}


def _adafactor_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    # Adafactor's lr is relative to the parameter's size and to 1 / sqrt(t).
    found = _pick(group, ("weight_decay", "maximize", *_SHAPING))
    return {**found, "clip_threshold": group["d"]} if to == "hfac" else {**found, "decay_rate": group["beta2_decay"]}


def _transformers_adafactor_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    # The learning rate is one as Adam has it only where it is neither relative to the step nor to the weights.
    absolute = group["lr"] is not None and not group["relative_step"] and not group["scale_parameter"]
    found = _pick(group, ("weight_decay", *_SHAPING, *(("lr",) if absolute else ())))
    if to == "hfac":
        return {**found, "clip_threshold": group["clip_threshold"]}
    return {**found, "decay_rate": group["decay_rate"]}


def _smmf_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    found = _pick(group, _OURS)
    if to == "hfac":
        return _decoupled(found, group.get("weight_decay_mode") == "adam")
    own = ("beta", "eps", "decay_rate", "growth_rate", "vector_reshape", "weight_decay_mode", "signs")
    return {**found, **_pick(group, own)}


def _hfac_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    found = _pick(group, _OURS)
    if to == "smmf":
        return {**found, "beta": group["betas"][0]}
    return {**found, **_pick(group, ("betas", "eps", "clip_threshold", "matricize", "first_moment"))}


def _decoupled(found: dict[str, Any], coupled: bool) -> dict[str, Any]:
    if coupled and found.get("weight_decay"):
        warn(
            f"convert: the source adds weight_decay={found['weight_decay']} times W to the gradient, HFac takes it off "
            "W as AdamW does; it is left at 0. Give convert(..., weight_decay=...) to choose one.",
        )
    return {name: value for name, value in found.items() if not (coupled and name == "weight_decay")}


def _pick(group: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: group[name] for name in names if name in group}


def _whole(name: str) -> Shape:
    """The shape of a moment, unless it is factors."""
    return lambda entry, group: tuple(entry[name].shape) if isinstance(entry.get(name), Tensor) else None


def _sides(whole: str, row: str, col: str, keepdim: bool) -> Shape:
    """Likewise, or of a row and a column state together; ``keepdim`` where each has the other's dimension at size 1,
    else both begin with the batch dimensions."""

    def shape(entry: Entry, group: Mapping[str, Any]) -> tuple[int, ...] | None:
        if isinstance(entry.get(whole), Tensor):
            return tuple(entry[whole].shape)
        if not all(isinstance(entry.get(name), Tensor) for name in (row, col)):
            return None
        rows, cols = entry[row].shape, entry[col].shape
        return (*rows[:-1], *cols[-1:]) if keepdim else (*rows, *cols[group.get("batch_dims", 0) :])

    return shape


def _hfac_shape(entry: Entry, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    sides = _sides("exp_avg", "exp_avg_row", "exp_avg_col", keepdim=False)
    return _whole("exp_avg_q")(entry, group) or sides(entry, group)


def _smmf_shape(entry: Entry, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    in_bytes = getattr(entry.get("exp_avg_sign"), "dtype", None) == signs.BYTES
    return _whole("exp_avg_sign" if in_bytes else "exp_avg_sq")(entry, group)


def _without_last(entry: Entry, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a moment, or of means over the last and over the last but one dimension."""
    if isinstance(entry.get("exp_avg_sq"), Tensor):
        return tuple(entry["exp_avg_sq"].shape)
    rows, cols = entry.get("exp_avg_sq_row"), entry.get("exp_avg_sq_col")
    return (*rows.shape, *cols.shape[-1:]) if isinstance(rows, Tensor) and isinstance(cols, Tensor) else None


SOURCES = {
    "adam": Source("Adam", _adam, _whole("exp_avg"), _adam_options),
    "adafactor": Source(
        "Adafactor", _adafactor, _sides("variance", "row_var", "col_var", keepdim=True), _adafactor_options
    ),
    "transformers": Source(
        "transformers' Adafactor", _transformers_adafactor, _without_last, _transformers_adafactor_options
    ),
    "published": Source("the authors' SMMF", _published, _whole("momentum_v"), _smmf_options),
    "hfac": Source("HFac", _by_slice(_hfac), _hfac_shape, _hfac_options),
    "smmf": Source("SMMF", _by_slice(_smmf), _smmf_shape, _smmf_options),
}


def source_of(key: Hashable, entry: Entry, group: Mapping[str, Any]) -> str:
    """Whose state this is, one of `SOURCES`: told by what it has, by what its group has, and by what neither has.

    Raises:
        ValueError: none of theirs; the message names the optimizer where it is known by its keys.
    """
    names, options = set(map(str, entry)), set(map(str, group))
    matrix = {"exp_avg_sq_row", "exp_avg_sq_col", "step"}
    ours = names <= _OUR_STATE and (matrix <= names or {"exp_avg_sq", "step"} <= names)
    if {"momentum_v", "step"} <= names <= _PUBLISHED and {"beta", "growth_rate"} <= options:
        return "published"
    if ({"row_var", "col_var"} <= names or "variance" in names) and {"beta2_decay", "d"} <= options:
        return "adafactor"
    if {"RMS", "step"} <= names and {"scale_parameter", "relative_step", "clip_threshold", "decay_rate"} <= options:
        return "transformers"
    if ours and {"betas", "matricize", "clip_threshold"} <= options and "amsgrad" not in options:
        return "hfac"
    if ours and {"beta", "growth_rate", "decay_rate", "vector_reshape"} <= options:
        return "smmf"
    if {*_ADAM} <= names <= {*_ADAM, "max_exp_avg_sq", "mu_product"} and "betas" in options and not options & _NOT_ADAM:
        return "adam"
    known = ", ".join(source.name for source in SOURCES.values())
    raise ValueError(f"convert: {refusal(key, names, options)} Sources are: {known}.")


_ADAM = ("exp_avg", "exp_avg_sq", "step")
#: options of optimizers whose state has Adam's keys and another meaning
_NOT_ADAM = {"growth_rate", "d", "d0", "d_coef", "k", "clip_exp", "clip_lambda", "initial_accumulator"}
_OUR_STATE = {
    *("step", "skipped", LOW, "exp_avg", "exp_avg_sq", "exp_avg_row", "exp_avg_col", "exp_avg_sign"),
    *("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_q"),
}
_PUBLISHED = {"step", "sign", "momentum_m", "momentum_v", "effective_shape"}


def tensor(where: str, entry: Entry, name: str, shape: Sequence[int]) -> Tensor:
    """One tensor of a source's state; floating-point ones as float32, or float64 where they are that."""
    value = entry.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} has no tensor {name!r}, only {sorted(map(str, entry))}")
    if hasattr(value, "placements"):
        raise ValueError(
            f"{where}: {name!r} is a shard (a DTensor). Convert whole tensors: get_optimizer_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True)), and set them with the same option."
        )
    if hasattr(value, "dequantize") and type(value) is not Tensor and is_traceable_wrapper_subclass(value):
        value = value.dequantize()  # torchao's states in 8 and 4 bits
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{where}: {name!r} must have shape {tuple(shape)} for this parameter, got {tuple(value.shape)}"
        )
    if value.layout != torch.strided or value.is_meta or value.is_complex():
        what = "complex" if value.is_complex() else "without values (meta)" if value.is_meta else str(value.layout)
        raise ValueError(f"{where}: {name!r} must be a dense tensor of real numbers, and is {what}. Give one that is.")
    if not value.is_floating_point():
        if "sign" not in name and name not in (LOW, "exp_avg_q"):  # bits, bools, pieces of master weights, our codes
            raise ValueError(
                f"{where}: {name!r} has dtype {value.dtype}, codes without the table that says what they stand for. "
                "Give the moments as floating-point tensors."
            )
        return value
    return value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)


def _outer(where: str, name: str, factors: Any, shape: tuple[int, ...]) -> Tensor:
    """[n, m] of a pair of factors of the square matrix of a parameter of ``shape``."""
    if not isinstance(factors, Sequence) or len(factors) != 2:
        raise ValueError(f"{where}: {name!r} must be a pair of factors or a tensor, got {type(factors).__name__}")
    named = {"row": factors[0], "col": factors[1]}
    n, m = matricize.square(math.prod(shape))
    return torch.outer(tensor(f"{where}, {name}", named, "row", (n,)), tensor(f"{where}, {name}", named, "col", (m,)))


def _over(average: Tensor, weight: float) -> Tensor:
    """No weight means that nothing was averaged (no step, or a decay of 1): zero."""
    return average / weight if weight > 0 else torch.zeros_like(average)
