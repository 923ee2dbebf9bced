"""State dicts of other optimizers as state dicts of `hfac.HFac` and `hfac.SMMF`, and these as AdamW's: a running
training can switch.

Every source is read as moments: the average of the gradient and of its square whose weights add up to 1, whole, one
parameter at a time. Every target keeps these moments in its own way. docs/convert.md says what is exact.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import codes, matricize, reference, signs
from ..optim import SMMF, HFac
from ..optim.options import unadvised, warn
from ..optim.param_groups import EXECUTION
from ..optim.state import LOW
from ..types import AdamWOptions, HFacOptions, SMMFOptions, Unpack
from .sources import SOURCES, Entry, Moments, Source, is_factor, pieces, smmf_weight, source_of, tensor

TARGETS = {"hfac": HFac, "smmf": SMMF}
ADAMW = "adamw"
Params = ParamsT | Mapping[str, Tensor] | None
#: of AdamW's options those that HFac has in the same meaning
_SHARED = ("lr", "betas", "weight_decay", "maximize")
#: A learning rate of less than this share of the one a schedule began with is that of its end.
_ENDED = 0.02
#: What the largest code of a first moment in 8 bits stands for, in roots of the second.
_MOST = 127**2 / (127.5**2 - 127**2)


@overload
def convert(
    state_dict: Mapping[str, Any],
    params: Params = None,
    *,
    to: Literal["hfac"] = "hfac",
    **options: Unpack[HFacOptions],
) -> dict[str, Any]: ...


@overload
def convert(
    state_dict: Mapping[str, Any], params: Params = None, *, to: Literal["smmf"], **options: Unpack[SMMFOptions]
) -> dict[str, Any]: ...


@overload
def convert(
    state_dict: Mapping[str, Any], params: Params = None, *, to: Literal["adamw"], **options: Unpack[AdamWOptions]
) -> dict[str, Any]: ...


@torch.no_grad()
def convert(
    state_dict: Mapping[str, Any],
    params: Params = None,
    *,
    to: Literal["hfac", "smmf", "adamw"] = "hfac",
    **options: Any,
) -> dict[str, Any]:
    """A state dict of another optimizer as one that `hfac.HFac` or `hfac.SMMF` loads and goes on from, or that
    `torch.optim.AdamW` does.

    Sources: torch.optim.Adam, AdamW and Adafactor, torchao's Adam and AdamW in 8 and 4 bits, transformers' Adafactor,
    SMMF as its authors published it, `hfac.HFac` and `hfac.SMMF`. The step is carried over, and so are the options that
    mean the same in the target (docs/convert.md lists them). A warning says where the learning rate that is carried
    over is that of a schedule's end, or likely too low for SMMF.

    Args:
        state_dict: what ``optimizer.state_dict()`` returns, or `torch.distributed.checkpoint.state_dict` with names of
            parameters for keys, nested or flattened; of whole tensors, not of shards. It is left as it is.
        params: the parameters in the optimizer's order: tensors, (name, tensor) pairs, groups, or a dict from names to
            tensors; only their shapes and types are read. Factors of SMMF do not tell the parameter's shape and need
            it, a ``master`` that the source does not have needs the type; None (default) where the state tells both.
        to: "hfac" (default), "smmf" or "adamw". AdamW keeps both moments whole, of which factors are an approximation
            (docs/convert.md); masters of the weights do not go along.
        **options: options of the target for all groups, in place of what is carried over or the target's default.
            ``capturable``, ``backend`` and ``amp_scaling`` are the loading optimizer's own affair.

    Returns:
        A new state dict with the keys of ``state_dict``; factors and moments float32 (float64 for float64 parameters),
        on the devices of the source's tensors. ``master_low`` is the source's where both have the same ``master``, else
        zeros: what a source has of it is then left out, with a warning.

    Raises:
        TypeError, ValueError: an optimizer that is not known (the message names it where it can, and says what to do),
            shapes that do not fit or are missing, moments that are not finite or averages of squares below zero,
            options that cannot be.
    """
    if to == ADAMW:
        return _adamw(state_dict, params, options)
    if to not in TARGETS:
        raise ValueError(f"convert: to must be one of {', '.join(map(repr, (*TARGETS, ADAMW)))}, got {to!r}")
    for name in EXECUTION:
        if name in options:
            raise TypeError(
                f"convert: {name} says how a step is carried out and is not part of a state dict; give it to the "
                "optimizer that loads the result"
            )
    flat = _is_flat(state_dict)
    source = _unflattened(state_dict) if flat else _checked(state_dict)
    groups: list[Mapping[str, Any]] = list(source["param_groups"])
    keys = [key for group in groups for key in group["params"]]
    shaped = None if params is None else _by_key(params, keys)

    found = {source_of(key, entry, group) for key, entry, group in _entries(source)}
    if len(found) != 1:
        names = sorted(SOURCES[name].name for name in found)
        raise ValueError(
            f"convert: the state dict has state of {' and '.join(names)}; one optimizer's at a time can be converted"
            if names
            else "convert: the state dict has no state; an optimizer that has made no step needs no conversion"
        )
    reader = SOURCES[found.pop()]
    if any("max_exp_avg_sq" in entry for _, entry, _ in _entries(source)):
        warn(
            "convert: amsgrad's max_exp_avg_sq has no counterpart and is left out; the averages themselves are taken",
        )
    wanted = [{**reader.options(group, to), **options} for group in groups]
    if "lr" not in options:
        _warn_of_rates(groups, wanted, reader.name, to)
    # Without parameters at first: what the options say is what must be known of these.
    with unadvised():
        empty = TARGETS[to]([{"params": [], **each} for each in wanted], **options)
    placeholders = {
        key: _placeholder(key, source["state"].get(key), shaped, reader, group, new_group)
        for group, new_group in zip(groups, empty.param_groups, strict=True)
        for key in group["params"]
    }
    filled = [
        {"params": [placeholders[key] for key in group["params"]], **each}
        for group, each in zip(groups, wanted, strict=True)
    ]
    with unadvised():
        target = TARGETS[to](filled, **options)

    state: dict[Hashable, dict[str, Tensor]] = {}
    without_low: list[Hashable] = []
    saturated = 0
    for i, new_group in enumerate(target.param_groups):
        for key in groups[i]["params"]:
            entry = source["state"].get(key)
            if not entry:
                continue
            param, where = placeholders[key], f"convert: state of parameter {key!r}"
            moments = reader.read(where, entry, groups[i], tuple(param.shape))
            _check_moments(where, reader.name, moments)
            state[key], more = _written(target, param, new_group, moments)
            saturated += more
            if LOW in entry:
                low = tensor(where, entry, LOW, param.shape)
                if low.dtype == target._low_dtype(param, new_group):
                    state[key][LOW].copy_(low)
                else:
                    without_low.append(key)
            if "skipped" in entry:
                state[key]["skipped"] = torch.as_tensor(
                    entry["skipped"], device=getattr(entry["skipped"], "device", "cpu")
                ).clone()
    if without_low:
        warn(
            f"convert: {LOW} of {len(without_low)} parameter(s), the first being {without_low[0]!r}, is left out: "
            "the target has another master for them, or they are not bfloat16. It holds what the bfloat16 values lack: "
            "the source's fp32_state_dict gives the weights in full, and the target's load_fp32_state_dict takes them.",
        )

    if saturated:
        warn(
            f"convert: {saturated} elements have a first moment of more than {_MOST:.0f} times the root of the second, "
            "the most that 8 bits stand for; they are taken to be that.",
        )
    packed = target.state_dict()["param_groups"]
    new_groups = []
    for group, new in zip(groups, packed, strict=True):
        new["params"] = list(group["params"])
        if "param_names" in group:
            new["param_names"] = list(group["param_names"])
        if "initial_lr" in group and new["lr"] == group["lr"]:
            new["initial_lr"] = group["initial_lr"]  # schedulers start from it
        new_groups.append(new)
    converted = {"state": state, "param_groups": new_groups}
    target._checked_state(converted)
    return _flattened(converted) if flat else converted


def _adamw(state_dict: Mapping[str, Any], params: Any, options: dict[str, Any]) -> dict[str, Any]:
    """A state dict of AdamW: whole moments, with the weights that its averages have after so many steps from zero."""
    try:
        defaults = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(0))], **options).state_dict()["param_groups"][0]
    except (TypeError, ValueError) as error:
        raise type(error)(f"convert: options that torch.optim.AdamW refuses ({error})") from error
    flat = _is_flat(state_dict)
    source = _unflattened(state_dict) if flat else _checked(state_dict)
    shared = {name: options[name] for name in _SHARED if name in options}
    whole = HFacOptions(
        dense=True, batch_dims=0, views=1, views_dim=0, master=None, rounding="nearest", nonfinite="propagate"
    )
    found = convert(source, params, to="hfac", **whole, **shared)
    groups = []
    for old, group in zip(source["param_groups"], found["param_groups"], strict=True):
        if "beta" in old and "betas" not in options:  # SMMF's
            group["betas"] = (0.0 if old["beta"] is None else old["beta"], group["betas"][1])
        for key in group["params"]:
            entry = found["state"].get(key)
            if entry is None:
                continue
            entry.pop("skipped", None)
            t = float(entry["step"])
            entry["exp_avg_sq"].sub_(group["eps"]).clamp_(min=0)
            for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True):
                entry[name].mul_(1 - beta**t)
        more = {name: group[name] for name in ("params", "param_names", "initial_lr", *_SHARED) if name in group}
        groups.append({**defaults, **more})
    converted = {"state": found["state"], "param_groups": groups}
    return _flattened(converted) if flat else converted


def _check_moments(where: str, name: str, moments: Moments) -> None:
    """Raises where averages are none: NaN would never leave a factored state again."""
    for what, values in (("first", moments.first), ("second", moments.second)):
        if values is not None and not bool(values.isfinite().all()):
            raise ValueError(
                f"{where}: the {what} moment of {name} holds inf or NaN. Convert a checkpoint from before that, or "
                "take this parameter's state out."
            )
    if bool((moments.second < 0).any()):
        raise ValueError(
            f"{where}: the second moment of {name} holds numbers below zero, which no average of squares has. The "
            "state dict is damaged, or another optimizer's."
        )


def _warn_of_rates(
    groups: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], source: str, to: str
) -> None:
    """Says of learning rates that are carried over where they are hardly what is wanted."""
    for index, (group, new) in enumerate(zip(groups, wanted, strict=True)):
        rate, start = new.get("lr"), group.get("initial_lr")
        if rate is not None and (rate == 0 or (start is not None and rate < _ENDED * start)):
            began = "" if start is None else f" (it began at {float(start):g})"
            warn(
                f"convert: the learning rate of group {index}, {float(rate):g}, is carried over{began}: that of the "
                "end of a schedule, at which nothing more is learned. Give convert(..., lr=...) one to go on with.",
            )
            return
    theirs = source in (SOURCES["smmf"].name, SOURCES["published"].name)
    if to == "smmf" and not theirs and any("lr" in new for new in wanted):
        warn(
            f"convert: {source}'s learning rate is carried over to SMMF, whose best one is 1.2 to 2 times AdamW's on "
            "Transformers and up to 4 times on convolutional networks; at AdamW's it learns more slowly. Give "
            "convert(..., lr=...).",
        )


def _written(
    target: HFac | SMMF, param: Tensor, group: Mapping[str, Any], moments: Moments
) -> tuple[dict[str, Tensor], int]:
    """The target's state of one parameter, and how many elements of the first moment are too large for it."""
    layout = target._layout(param, group)
    batch, views, along = group["batch_dims"], group["views"], group["views_dim"]
    device, wide = moments.second.device, next(dtype for _, dtype, _ in layout.values() if dtype.is_floating_point)
    state = {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype, _) in layout.items()}
    step = torch.tensor(moments.step, dtype=torch.float32, device="cpu")
    if moments.step == 0 or param.numel() == 0:
        return {**state, "step": step}, 0
    V = moments.second.to(wide)
    M = torch.zeros_like(V) if moments.first is None else moments.first.to(wide)
    parts_of = {key: pieces(value, batch, views, along, is_factor(key)) for key, value in state.items() if key != LOW}
    saturated = 0
    moments_of = (pieces(each, batch, views, along) for each in (M, V))
    for i, (first, second) in enumerate(zip(*moments_of, strict=True)):
        parts = {key: values[i] for key, values in parts_of.items()}
        values = (_hfac_state if isinstance(target, HFac) else _smmf_state)(parts, group, first, second, moments.step)
        for key, part in parts.items():
            part.copy_(values[key].reshape(part.shape))
        saturated += int(values.get("saturated", 0))
    return {**state, "step": step}, saturated


def _hfac_state(kept: Entry, group: Mapping[str, Any], M: Tensor, V: Tensor, step: float) -> dict[str, Tensor]:
    """Of one slice, at the keys of ``kept``, whose values are of the right shapes."""
    V = V + group["eps"]
    if "exp_avg_sq_row" not in kept:
        return {"exp_avg": M, "exp_avg_sq": V}
    rows = kept["exp_avg_sq_row"].numel()
    M, V = M.reshape(rows, -1), V.reshape(rows, -1)
    r, s = V.sum(1), V.sum(0)
    found = {"exp_avg_row": M.mean(1), "exp_avg_col": M.mean(0), "exp_avg_sq_row": r, "exp_avg_sq_col": s}
    if "exp_avg_q" in kept:
        X = M / s.sqrt() * (r.sum().sqrt() / r.sqrt())[:, None]
        found.update(exp_avg_q=codes.encode(X), saturated=(X.abs() > _MOST).sum())
    return found


def _smmf_state(kept: Entry, group: Mapping[str, Any], M: Tensor, V: Tensor, step: float) -> dict[str, Tensor]:
    """Likewise; there may be no first moment among ``kept``."""
    M = M * smmf_weight(group, step)
    if "exp_avg_sq_row" not in kept:
        return {"exp_avg": M, "exp_avg_sq": V}
    n, m = matricize.square(M.numel())
    row, col = reference.nnmf(M.abs().reshape(n, m))
    positive = M > 0
    if "exp_avg_sign" in kept and kept["exp_avg_sign"].dtype != signs.BYTES:
        positive = signs.pack_signs(positive)
    values = {"exp_avg_row": row, "exp_avg_col": col, "exp_avg_sign": positive}
    values["exp_avg_sq_row"], values["exp_avg_sq_col"] = reference.nnmf(V.reshape(n, m))
    return values


def _checked(state_dict: Any) -> Mapping[str, Any]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        given = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise TypeError(
            f"convert: a state dict has the keys 'state' and 'param_groups', as optimizer.state_dict() returns; got "
            f"{given}"
        )
    if not all(isinstance(group, Mapping) and "params" in group for group in state_dict["param_groups"]):
        raise TypeError("convert: every group of a state dict's 'param_groups' is a dict with 'params'; one is not")
    keys = {key for group in state_dict["param_groups"] for key in group["params"]}
    for key in state_dict["state"]:
        if key not in keys:
            raise ValueError(f"convert: the state dict has state for parameter {key!r}, which is in none of its groups")
    return state_dict


def _entries(source: Mapping[str, Any]) -> list[tuple[Hashable, Entry, Mapping[str, Any]]]:
    """(key, state, group) of every parameter that has state."""
    states = source["state"]
    return [(key, states[key], group) for group in source["param_groups"] for key in group["params"] if states.get(key)]


def _by_key(params: Any, keys: Sequence[Hashable]) -> dict[Hashable, Tensor]:
    """The parameters by the keys of the state dict: by name where both have names, else in order."""
    named: list[tuple[str | None, Any]] = []

    def take(items: Any) -> None:
        if isinstance(items, Tensor):
            items = [items]
        elif isinstance(items, Mapping):
            items = items.items() if "params" not in items else [items]
        for item in items:
            if isinstance(item, Mapping):
                take(item["params"])
            else:
                named.append(item if isinstance(item, tuple) and len(item) == 2 else (None, item))

    take(params)
    for _, param in named:
        if not isinstance(param, Tensor):
            raise TypeError(f"convert: params must be tensors or groups of them, got {type(param).__name__}")
    by_name = {name: param for name, param in named if name is not None}
    if by_name and any(isinstance(key, str) for key in keys):
        missing = [key for key in keys if key not in by_name]
        if missing:
            raise ValueError(f"convert: params has no {missing[0]!r}, which the state dict has; it has {list(by_name)}")
        return {key: by_name[key] for key in keys}  # type: ignore[index]
    if len(named) != len(keys):
        raise ValueError(
            f"convert: the state dict's groups have {len(keys)} parameters, params has {len(named)}; give those of the "
            "optimizer, in its order"
        )
    return dict(zip(keys, (param for _, param in named), strict=True))


def _placeholder(
    key: Hashable,
    entry: Entry | None,
    shaped: Mapping[Hashable, Tensor] | None,
    source: Source,
    group: Mapping[str, Any],
    new_group: Mapping[str, Any],
) -> torch.nn.Parameter:
    """A parameter of the right shape and type that holds no memory."""
    if shaped is not None:
        shape, dtype = tuple(shaped[key].shape), shaped[key].dtype
    elif not entry:
        shape, dtype = (0,) * (1 + new_group["batch_dims"]), torch.float32  # without state nobody asks
    else:
        told = source.shape(entry, group)
        if told is None:
            raise ValueError(
                f"convert: {source.name}'s state of parameter {key!r}, with the keys {sorted(map(str, entry))}, does "
                "not tell the parameter's shape. Give convert(state_dict, params) the parameters in the optimizer's "
                "order."
            )
        shape = told
        wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in entry.values())
        dtype = torch.float64 if wide else torch.bfloat16 if LOW in entry else torch.float32
        if new_group["master"] is not None and dtype == torch.float32 and group.get("master") is None:
            raise ValueError(
                f"convert: master={new_group['master']!r} is for bfloat16 parameters, and {source.name}'s state of "
                f"parameter {key!r} does not tell whether it is one. Give convert(state_dict, params) the parameters "
                "in the optimizer's order."
            )
    # What has no state may be frozen, and of any kind.
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=bool(entry))


def _is_flat(state_dict: Any) -> bool:
    return isinstance(state_dict, Mapping) and any(
        isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in state_dict
    )


def _unflattened(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`torch.distributed.checkpoint`'s flattened form nested again: every parameter is a group of its own there."""
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        kind, _, rest = key.partition(".")
        name, _, last = rest.rpartition(".")
        if kind == "param_groups":
            groups.setdefault(name, {"params": [name]})[last] = value
        else:
            state.setdefault(name, {})[last] = value
    for name in state:
        if name not in groups:
            raise ValueError(f"convert: the state dict has state of {name!r}, and no param_groups.{name}.*")
    return {"state": state, "param_groups": list(groups.values())}


def _flattened(converted: Mapping[str, Any]) -> dict[str, Any]:
    flat = {f"state.{name}.{key}": value for name, entry in converted["state"].items() for key, value in entry.items()}
    for group in converted["param_groups"]:
        (name,) = group["params"]
        flat.update({f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"})
    return flat
