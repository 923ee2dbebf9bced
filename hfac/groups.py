"""Parameter groups of a model: which parameters decay, which keep dense moments, which are stacks."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .optim import SMMF, HFac, options
from .types import GroupOptions, Unpack

#: names of classes and their bases: nn.LayerNorm, nn.BatchNorm1d, LlamaRMSNorm; nn.EmbeddingBag, ViTEmbeddings
_CLASS = re.compile(r".*(Norm([123]d)?|Embedding(s|Bag)?)")
#: a parameter's own name: bias, in_proj_bias, bias_k; pos_embed, position_embeddings; q_norm
_NAME = re.compile(r"(.*_)?bias(_.*)?|(.*_)?(embed|embeddings?)|.*norm")


def param_groups(
    model: nn.Module,
    weight_decay: float | Tensor = 0.1,
    dense: Iterable[str] = (),
    no_decay: Iterable[str] | None = None,
    batch_dims: Mapping[str, int] | None = None,
    views: Mapping[str, int | tuple[int, ...]] | None = None,
    views_dim: Mapping[str, int] | None = None,
    **more: Unpack[GroupOptions],
) -> list[dict[str, Any]]:
    """The usual groups of a model's parameters, for `hfac.HFac` and `hfac.SMMF`.

    Weight decay does not apply to

    * norms and embeddings, by the class of the module that holds the parameter: its name or that of one of its bases
      ends in Norm (or BatchNorm2d and the like), Embedding, Embeddings or EmbeddingBag. For modules that are not
      torch's own, the name that the model gives them also counts, where it ends in "norm";
    * parameters with at most one dimension, after ``batch_dims``;
    * parameters named as a bias, a norm or an embedding: "bias" is a word of the parameter's own name, as in
      ``in_proj_bias``, or the name ends in "norm", or its last word is "embed", "embedding" or "embeddings".

    All others decay.

    Patterns match like file names (`fnmatch`, case-sensitive, ``*`` matches dots as well), against the parameter's name
    (``"layers.*.experts.*"``) and against the class name of the module that holds it and of that class's bases
    (``"Embedding"``). A tied parameter is one parameter with all its names and modules.

    Args:
        model: frozen parameters (requires_grad False) are left out.
        weight_decay: of the parameters that decay (default 0.1). The groups carry it, so one that is given to the
            optimizer's constructor does not reach them.
        dense: patterns of parameters with dense moments (group option ``dense``; default none).
        no_decay: patterns of further parameters without weight decay (default none).
        batch_dims: patterns of stacks, each with the number of leading dimensions that index slices (group option
            ``batch_dims``); the last pattern that matches wins (default none).
        views: patterns of fused weights, each with the number of equal pieces of its first dimension (of a stack, of
            the one after ``batch_dims``), or several numbers to be multiplied: ``{"*.qkv.weight": (3, heads)}`` (group
            option ``views``); the last pattern that matches wins (default none).
        views_dim: patterns of fused weights that are cut along another dimension, each with that dimension, counted
            after ``batch_dims``: ``{"*.c_attn.weight": 1}`` for the Conv1D of transformers' GPT-2, whose weights are
            in x out (group option ``views_dim``); the last pattern that matches wins (default none).
        more: options for every group, as the optimizer takes them (``lr=3e-4``).

    Returns:
        Dicts with "params", (name, parameter) pairs in the model's order, "weight_decay", "dense", "batch_dims",
        "views" and "views_dim" where these are given, and ``more``. Each parameter is in exactly one group, and none is
        empty. The groups and their order do not depend on ``weight_decay``: plain before dense before stacks, and among
        each those that decay first.

    Raises:
        ValueError: a pattern matches no parameter of the model, a stack has too few dimensions, no parameter requires a
            gradient, or a lazy module has not been initialized.
        TypeError: ``model`` is not a module, ``batch_dims`` not a mapping, or ``more`` has "params" or what is
            no option of either optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs the model, whose modules say what decays, got {type(model).__name__}")
    if "params" in more:
        raise TypeError("param_groups takes 'params' from the model; pass only options that apply to every group")
    _check_options(more)
    for argument, given, example in (
        ("batch_dims", batch_dims, "numbers of dimensions, as in {'*.experts.*': 1}"),
        ("views", views, "numbers of pieces, as in {'*.qkv.weight': (3, 16)}"),
        ("views_dim", views_dim, "dimensions that are cut, as in {'*.c_attn.weight': 1}"),
    ):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{argument} must be a mapping from patterns of parameters to {example}, got {given!r}")
    found = _Parameters(model)
    kept_whole, named = found.matching("dense", dense), found.matching("no_decay", no_decay or ())
    stacks: dict[int, int] = {}
    for pattern, count in (batch_dims or {}).items():
        stacks.update(dict.fromkeys(found.matching("batch_dims", [pattern]), count))
    fused: dict[int, int] = {}
    for pattern, pieces in (views or {}).items():
        fused.update(dict.fromkeys(found.matching("views", [pattern]), options.count(f"views of {pattern!r}", pieces)))
    cut: dict[int, int] = {}
    for pattern, dim in (views_dim or {}).items():
        checked: int = options.whole()(f"views_dim of {pattern!r}", dim)
        cut.update({key: checked for key in found.matching("views_dim", [pattern])})

    groups: dict[tuple[int, int, int, bool, bool], list[tuple[str, Tensor]]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if is_lazy(param):
            raise ValueError(
                f"{name!r} has no shape yet, and shapes decide what decays. Run a forward pass first: it initializes "
                "the parameters of lazy modules."
            )
        key, batch = id(param), stacks.get(id(param), 0)
        if not 0 <= batch < max(param.ndim, 1):
            raise ValueError(
                f"batch_dims is {batch} for {name}, whose shape is {tuple(param.shape)}: a number from 0 to "
                f"{max(param.ndim, 1) - 1} is required. Use patterns that match only the stacks."
            )
        pieces = fused.get(key, 1)
        along = cut.get(key, 0) if pieces > 1 else 0
        if pieces > 1 and (param.ndim <= batch + along or param.shape[batch + along] % pieces):
            raise ValueError(
                f"views is {pieces} for {name}, whose shape is {tuple(param.shape)}: dimension {batch + along} cannot "
                "be cut into so many equal pieces. Use patterns that match only fused weights."
            )
        undecayed = key in named or param.ndim - batch <= 1 or found.is_usually_undecayed(key)
        groups.setdefault((batch, pieces, along, key in kept_whole, undecayed), []).append((name, param))
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to optimize")
    found_groups = []
    for (batch, pieces, along, is_dense, undecayed), params in sorted(groups.items(), key=lambda item: item[0]):
        decay = 0.0 if undecayed else weight_decay
        given = {} if views is None else {"views": pieces}
        given |= {} if views_dim is None else {"views_dim": along}
        shaping = {"dense": is_dense, "batch_dims": batch, **given}
        found_groups.append({"params": params, "weight_decay": decay, **shaping, **more})
    return found_groups


def _check_options(given: Mapping[str, Any]) -> None:
    """Optimizers leave keys of groups alone that they do not know, as schedulers and trainers add some. Here they are
    mistakes."""
    known = {name: None for cls in (HFac, SMMF) for name in cls._all_rules()}
    for name in given:
        if name not in known:
            raise TypeError(
                f"param_groups takes options of hfac.HFac and hfac.SMMF, got {name!r}; the nearest of them: "
                f"{options.nearest(name, known)}"
            )


class _Parameters:
    """Every parameter of a model by identity, with all its names and all modules that hold it."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        self._holders: dict[int, list[tuple[str, type]]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, param in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                self._names.setdefault(id(param), []).append(name)
                self._holders.setdefault(id(param), []).append((_last(prefix), type(module)))

    def matching(self, argument: str, patterns: Iterable[str]) -> set[int]:
        """The parameters that match any of the patterns. Every pattern must match one."""
        found: set[int] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = {key for key in self._names if any(fnmatchcase(text, pattern) for text in self._texts(key))}
            if not matched:
                names = (name for names in self._names.values() for name in names)
                classes = (cls.__name__ for holders in self._holders.values() for _, cls in holders)
                raise ValueError(
                    f"{argument}: {pattern!r} matches no parameter and no class of a module that holds one. The nearest"
                    f" names are {_nearest(pattern, names)}; the nearest classes, {_nearest(pattern, classes)}."
                )
            found |= matched
        return found

    def is_usually_undecayed(self, key: int) -> bool:
        return (
            any(_NAME.fullmatch(_last(name)) for name in self._names[key])
            or any(_CLASS.fullmatch(name) for name in self._classes(key))
            or any(
                name.lower().endswith("norm") and not cls.__module__.startswith("torch.nn.")
                for name, cls in self._holders[key]
            )
        )

    def _texts(self, key: int) -> list[str]:
        return self._names[key] + self._classes(key)

    def _classes(self, key: int) -> list[str]:
        """Names of the classes that hold a parameter and of their bases, up to nn.Module."""
        bases = (cls for _, holder in self._holders[key] for cls in holder.__mro__)
        return [cls.__name__ for cls in bases if issubclass(cls, nn.Module) and cls is not nn.Module]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _nearest(pattern: str, names: Iterable[str], most: int = 6) -> str:
    """Some of the names, the most similar first."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(get_close_matches(pattern, distinct, most, 0.0)) + more
