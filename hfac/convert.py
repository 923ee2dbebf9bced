"""State dicts of other optimizers as state dicts of `hfac.HFac` and `hfac.SMMF`: a running training can switch.

Every source is read as moments: the average of the gradient and of its square whose weights add up to 1, whole, one
parameter at a time. Every target keeps these moments in its own way. docs/convert.md says what is exact.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import matricize, reference
from .optim import SMMF, HFac
from .optim.state import EXECUTION, LOW

TARGETS = {"hfac": HFac, "smmf": SMMF}

Entry = Mapping[str, Any]


class Moments(NamedTuple):
    """What an optimizer has averaged in ``step`` steps; both averages of the parameter's shape, weights adding up to 1.

    ``first`` is None where the source has no first moment.
    """

    first: Tensor | None
    second: Tensor
    step: float


@torch.no_grad()
def convert(state_dict: Mapping[str, Any], params: Any = None, *, to: str = "hfac", **options: Any) -> dict[str, Any]:
    """A state dict of another optimizer as one that `hfac.HFac` or `hfac.SMMF` loads and goes on from.

    Sources: torch.optim.Adam, AdamW and Adafactor, SMMF as its authors published it, `hfac.HFac` and `hfac.SMMF`. The
    step is carried over, and so are the options that mean the same in the target (docs/convert.md lists them).

    Args:
        state_dict: what ``optimizer.state_dict()`` returns, or `torch.distributed.checkpoint.state_dict` with names of
            parameters for keys, nested or flattened; of whole tensors, not of shards. It is left as it is.
        params: the parameters in the optimizer's order: tensors, (name, tensor) pairs, groups, or a dict from names to
            tensors; only their shapes and types are read. Factors of SMMF do not tell the parameter's shape and need
            it, a ``master`` that the source does not have needs the type; None (default) where the state tells both.
        to: "hfac" (default) or "smmf".
        **options: options of the target for all groups, in place of what is carried over or the target's default.
            ``capturable``, ``backend`` and ``amp_scaling`` are the loading optimizer's own affair.

    Returns:
        A new state dict with the keys of ``state_dict``; factors and moments float32 (float64 for float64 parameters),
        on the devices of the source's tensors. ``master_low`` is the source's where both have the same ``master``, else
        zeros: what a source has of it is then left out, with a warning.

    Raises:
        TypeError, ValueError: an optimizer that is not known (the message has its keys), shapes that do not fit or are
            missing, options that cannot be.
    """
    if to not in TARGETS:
        raise ValueError(f"convert: to must be one of {', '.join(map(repr, TARGETS))}, got {to!r}")
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

    found = {_source(key, entry, group) for key, entry, group in _entries(source)}
    if len(found) != 1:
        names = sorted(_SOURCES[name].name for name in found)
        raise ValueError(
            f"convert: the state dict has state of {' and '.join(names)}; one optimizer's at a time can be converted"
            if names
            else "convert: the state dict has no state; an optimizer that has made no step needs no conversion"
        )
    reader = _SOURCES[found.pop()]
    if any("max_exp_avg_sq" in entry for _, entry, _ in _entries(source)):
        warnings.warn(
            "convert: amsgrad's max_exp_avg_sq has no counterpart and is left out; the averages themselves are taken",
            stacklevel=3,  # above no_grad
        )
    wanted = [{**reader.options(group, to), **options} for group in groups]
    # Without parameters at first: what the options say is what must be known of these.
    empty = TARGETS[to]([{"params": [], **each} for each in wanted], **options)
    placeholders = {
        key: _placeholder(key, source["state"].get(key), shaped, reader, group, new_group)
        for group, new_group in zip(groups, empty.param_groups, strict=True)
        for key in group["params"]
    }
    target = TARGETS[to](
        [
            {"params": [placeholders[key] for key in group["params"]], **each}
            for group, each in zip(groups, wanted, strict=True)
        ],
        **options,
    )

    state: dict[Hashable, dict[str, Tensor]] = {}
    without_low: list[Hashable] = []
    for i, new_group in enumerate(target.param_groups):
        for key in groups[i]["params"]:
            entry = source["state"].get(key)
            if not entry:
                continue
            param, where = placeholders[key], f"convert: state of parameter {key!r}"
            moments = reader.read(where, entry, groups[i], tuple(param.shape))
            state[key] = _written(target, param, new_group, moments)
            if LOW in entry:
                low = _tensor(where, entry, LOW, param.shape)
                if low.dtype == target._low_dtype(param, new_group):
                    state[key][LOW].copy_(low)
                else:
                    without_low.append(key)
            if "skipped" in entry:
                state[key]["skipped"] = torch.as_tensor(
                    entry["skipped"], device=getattr(entry["skipped"], "device", "cpu")
                ).clone()
    if without_low:
        warnings.warn(
            f"convert: {LOW} of {len(without_low)} parameter(s), the first being {without_low[0]!r}, is left out: "
            "the target has another master for them, or they are not bfloat16. It holds what the bfloat16 values lack: "
            "the source's fp32_state_dict gives the weights in full, and the target's load_fp32_state_dict takes them.",
            stacklevel=3,  # above no_grad
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
        averages.append(_over(_tensor(where, entry, name, shape), 1 - float(beta) ** t))
    return Moments(averages[0], averages[1], t)


def _adafactor(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """Means of squares over the last and the last but one dimension; the first decay is 0, so the weights add up to
    1."""
    t = float(entry["step"])
    if "variance" in entry:
        return Moments(None, _tensor(where, entry, "variance", shape), t)
    row = _tensor(where, entry, "row_var", (*shape[:-1], 1))
    col = _tensor(where, entry, "col_var", (*shape[:-2], 1, *shape[-1:]))
    mean = row.mean(-2, keepdim=True)
    return Moments(None, row / torch.where(mean == 0, 1, mean) * col, t)


def _published(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """The authors' SMMF: factors in tuples, one bool per sign, and a step that counts the one to come."""
    t = max(float(entry["step"]) - 1, 0.0)
    first, second = entry.get("momentum_m"), entry["momentum_v"]
    if isinstance(second, Tensor):
        M = None if first is None else _tensor(where, entry, "momentum_m", shape)
        V = _tensor(where, entry, "momentum_v", shape)
    else:
        V = _outer(where, "momentum_v", second, shape)
        M = None
        if first is not None:
            positive = _tensor(where, entry, "sign", V.shape).bool()  # torch's loading casts it to the parameter's type
            M = _outer(where, "momentum_m", first, shape)
            M = torch.where(positive, M, -M).reshape(shape)
        V = V.reshape(shape)
    return Moments(None if M is None else _over(M, _smmf_weight(group, t)), V, t)


def _smmf(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    t = float(entry["step"])
    if "exp_avg_sq" in entry:
        M = _tensor(where, entry, "exp_avg", shape) if "exp_avg" in entry else None
        V = _tensor(where, entry, "exp_avg_sq", shape)
    else:
        V = _outer(where, "exp_avg_sq", (entry["exp_avg_sq_row"], entry["exp_avg_sq_col"]), shape).reshape(shape)
        M = None
        if "exp_avg_row" in entry:
            sign = _tensor(where, entry, "exp_avg_sign", matricize.sign_shape(shape))
            M = _outer(where, "exp_avg", (entry["exp_avg_row"], entry["exp_avg_col"]), shape).reshape(shape)
            M = torch.where(reference.unpack_signs(sign, shape), M, -M)
    return Moments(None if M is None else _over(M, _smmf_weight(group, t)), V, t)


def _hfac(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
    """The matrices that have these row and column means, and these row and column sums, and nothing else."""
    t = float(entry["step"])
    if "exp_avg" in entry:
        M, V = _tensor(where, entry, "exp_avg", shape), _tensor(where, entry, "exp_avg_sq", shape)
    else:
        k = matricize.cut(shape, group["matricize"]) or 0
        u, r = (_tensor(where, entry, f"{name}_row", shape[:k]).reshape(-1, 1) for name in ("exp_avg", "exp_avg_sq"))
        v, s = (_tensor(where, entry, f"{name}_col", shape[k:]).reshape(1, -1) for name in ("exp_avg", "exp_avg_sq"))
        total = r.sum()
        M = (u + v - v.mean()).reshape(shape)
        V = (r / torch.where(total == 0, 1, total) * s).reshape(shape)
    return Moments(M, (V - group["eps"]).clamp(min=0), t)


def _by_slice(read: Read) -> Read:
    """For our own two: the state of a stack is read slice by slice, and the moments are put together."""

    def stack(where: str, entry: Entry, group: Mapping[str, Any], shape: tuple[int, ...]) -> Moments:
        batch = group.get("batch_dims", 0)
        if not batch:
            return read(where, entry, group, shape)
        whole = {}
        for name in (name for name in entry if name not in ("step", "skipped", LOW)):
            sides = entry[name].shape[batch:] if isinstance(entry[name], Tensor) else ()
            whole[name] = _tensor(where, entry, name, (*shape[:batch], *sides))
        parts = {name: _slices(value, batch) for name, value in whole.items()}
        found = [
            read(
                f"{where}, slice {i}",
                {"step": entry["step"], **{name: values[i] for name, values in parts.items()}},
                group,
                shape[batch:],
            )
            for i in range(math.prod(shape[:batch]))
        ]
        if not found:  # nor is there an element
            return Moments(None, next(iter(whole.values())).new_zeros(shape), float(entry["step"]))
        firsts = [moments.first for moments in found if moments.first is not None]
        return Moments(
            torch.stack(firsts).reshape(shape) if firsts else None,
            torch.stack([moments.second for moments in found]).reshape(shape),
            found[0].step,
        )

    return stack


def _slices(tensor: Tensor, batch_dims: int) -> list[Tensor]:
    """What the first dimensions count, row-major; views where the tensor is contiguous."""
    return list(tensor.flatten(0, batch_dims - 1)) if batch_dims else [tensor]


def _smmf_weight(group: Mapping[str, Any], t: float) -> float:
    """What the weights of SMMF's first moment add up to after t steps from zero: 1 - prod_i beta growth^(i-1)."""
    if group["beta"] is None:
        return 1.0
    return 1 - float(group["beta"]) ** t * float(group["growth_rate"]) ** (t * (t - 1) / 2)


_COMMON = ("lr", "weight_decay", "maximize")
#: options that `hfac.param_groups` writes; torch's optimizers keep what they do not know
_SHAPING = ("dense", "batch_dims")
#: of our own two, beyond these
_OURS = (*_COMMON, "nonfinite", "dense", "batch_dims", "rounding", "seed", "master")


def _adam_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    found = _pick(group, (*_COMMON, *_SHAPING))
    # Where the key is missing AdamW was a class of its own; which of the two it was, the state dict does not tell.
    coupled = not group.get("decoupled_weight_decay", True)
    if to == "hfac":
        return {**_decoupled(found, coupled), "betas": group["betas"]}
    return {**found, "beta": group["betas"][0], "weight_decay_mode": "adam" if coupled else "adamw"}


def _adafactor_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    # Adafactor's lr is relative to the parameter's size and to 1 / sqrt(t).
    found = _pick(group, ("weight_decay", "maximize", *_SHAPING))
    return {**found, "clip_threshold": group["d"]} if to == "hfac" else {**found, "decay_rate": group["beta2_decay"]}


def _smmf_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    found = _pick(group, _OURS)
    if to == "hfac":
        return _decoupled(found, group.get("weight_decay_mode") == "adam")
    own = ("beta", "eps", "decay_rate", "growth_rate", "vector_reshape", "weight_decay_mode")
    return {**found, **_pick(group, own)}


def _hfac_options(group: Mapping[str, Any], to: str) -> dict[str, Any]:
    found = _pick(group, _OURS)
    if to == "smmf":
        return {**found, "beta": group["betas"][0]}
    return {**found, **_pick(group, ("betas", "eps", "clip_threshold", "matricize"))}


def _decoupled(found: dict[str, Any], coupled: bool) -> dict[str, Any]:
    if coupled and found.get("weight_decay"):
        warnings.warn(
            f"convert: the source adds weight_decay={found['weight_decay']} times W to the gradient, HFac takes it off "
            "W as AdamW does; it is left at 0. Give convert(..., weight_decay=...) to choose one.",
            stacklevel=4,
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


_SOURCES = {
    "adam": Source("Adam", _adam, _whole("exp_avg"), _adam_options),
    "adafactor": Source(
        "Adafactor", _adafactor, _sides("variance", "row_var", "col_var", keepdim=True), _adafactor_options
    ),
    "published": Source("the authors' SMMF", _published, _whole("momentum_v"), _smmf_options),
    "hfac": Source(
        "HFac", _by_slice(_hfac), _sides("exp_avg", "exp_avg_row", "exp_avg_col", keepdim=False), _hfac_options
    ),
    "smmf": Source("SMMF", _by_slice(_smmf), _whole("exp_avg_sq"), _smmf_options),
}


def _source(key: Hashable, entry: Entry, group: Mapping[str, Any]) -> str:
    """Whose state this is, told by its keys and its group's."""
    names = entry.keys()
    ours = "step" in names and bool(names & {"exp_avg_sq", "exp_avg_sq_row"})
    if "momentum_v" in names and {"beta", "growth_rate"} <= group.keys():
        return "published"
    if ({"row_var", "col_var"} <= names or "variance" in names) and {"beta2_decay", "d"} <= group.keys():
        return "adafactor"
    if ours and HFac._own_option in group and "amsgrad" not in group:
        return "hfac"
    if ours and SMMF._own_option in group:
        return "smmf"
    if {*_ADAM} <= names <= {*_ADAM, "max_exp_avg_sq"} and "betas" in group:
        return "adam"
    raise ValueError(
        f"convert: the state of parameter {key!r} has the keys {sorted(map(str, names))} and its group "
        f"{sorted(map(str, group))}, which is none of the optimizers that are known: "
        f"{', '.join(source.name for source in _SOURCES.values())}"
    )


_ADAM = ("exp_avg", "exp_avg_sq", "step")


def _tensor(where: str, entry: Entry, name: str, shape: Sequence[int]) -> Tensor:
    """One tensor of a source's state; floating-point ones as float32, or float64 where they are that."""
    value = entry.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} has no tensor {name!r}, only {sorted(map(str, entry))}")
    if hasattr(value, "placements"):
        raise ValueError(
            f"{where}: {name!r} is a shard (a DTensor). Convert whole tensors: get_optimizer_state_dict(..., "
            "options=StateDictOptions(full_state_dict=True)), and set them with the same option."
        )
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{where}: {name!r} must have shape {tuple(shape)} for this parameter, got {tuple(value.shape)}"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


def _outer(where: str, name: str, factors: Any, shape: tuple[int, ...]) -> Tensor:
    """[n, m] of a pair of factors of the square matrix of a parameter of ``shape``."""
    if not isinstance(factors, Sequence) or len(factors) != 2:
        raise ValueError(f"{where}: {name!r} must be a pair of factors or a tensor, got {type(factors).__name__}")
    named = {"row": factors[0], "col": factors[1]}
    n, m = matricize.square(math.prod(shape))
    return torch.outer(_tensor(f"{where}, {name}", named, "row", (n,)), _tensor(f"{where}, {name}", named, "col", (m,)))


def _over(average: Tensor, weight: float) -> Tensor:
    """No weight means that nothing was averaged (no step, or a decay of 1): zero."""
    return average / weight if weight > 0 else torch.zeros_like(average)


def _written(target: HFac | SMMF, param: Tensor, group: Mapping[str, Any], moments: Moments) -> dict[str, Tensor]:
    """The target's state of one parameter."""
    layout, batch = target._full_layout(param, group), group["batch_dims"]
    device, wide = moments.second.device, next(dtype for _, dtype, _ in layout.values() if dtype.is_floating_point)
    state = {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype, _) in layout.items()}
    step = torch.tensor(moments.step, dtype=torch.float32, device="cpu")
    if moments.step == 0 or param.numel() == 0:
        return {**state, "step": step}
    V = moments.second.to(wide)
    M = torch.zeros_like(V) if moments.first is None else moments.first.to(wide)
    slices = {key: _slices(value, batch) for key, value in state.items() if key != LOW}
    for i, (first, second) in enumerate(zip(_slices(M, batch), _slices(V, batch), strict=True)):
        parts = {key: values[i] for key, values in slices.items()}
        values = (_hfac_state if isinstance(target, HFac) else _smmf_state)(parts, group, first, second, moments.step)
        for key, part in parts.items():
            part.copy_(values[key].reshape(part.shape))
    return {**state, "step": step}


def _hfac_state(kept: Entry, group: Mapping[str, Any], M: Tensor, V: Tensor, step: float) -> dict[str, Tensor]:
    """Of one slice, at the keys of ``kept``, whose values are of the right shapes."""
    V = V + group["eps"]
    if "exp_avg_row" not in kept:
        return {"exp_avg": M, "exp_avg_sq": V}
    rows = kept["exp_avg_row"].numel()
    M, V = M.reshape(rows, -1), V.reshape(rows, -1)
    return {"exp_avg_row": M.mean(1), "exp_avg_col": M.mean(0), "exp_avg_sq_row": V.sum(1), "exp_avg_sq_col": V.sum(0)}


def _smmf_state(kept: Entry, group: Mapping[str, Any], M: Tensor, V: Tensor, step: float) -> dict[str, Tensor]:
    """Likewise; there may be no first moment among ``kept``."""
    M = M * _smmf_weight(group, step)
    if "exp_avg_sq_row" not in kept:
        return {"exp_avg": M, "exp_avg_sq": V}
    n, m = matricize.square(M.numel())
    row, col = reference.nnmf(M.abs().reshape(n, m))
    values = {"exp_avg_row": row, "exp_avg_col": col, "exp_avg_sign": reference.pack_signs(M > 0)}
    values["exp_avg_sq_row"], values["exp_avg_sq_col"] = reference.nnmf(V.reshape(n, m))
    return values


def _checked(state_dict: Any) -> Mapping[str, Any]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        given = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise TypeError(
            f"convert: a state dict has the keys 'state' and 'param_groups', as optimizer.state_dict() returns; got "
            f"{given}"
        )
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
