"""Which parameters decay, which keep their moments whole, and which are stacks: a model's groups for an optimizer."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: classes, and bases of classes: nn.LayerNorm, nn.BatchNorm1d, LlamaRMSNorm; nn.EmbeddingBag, ViTEmbeddings
_CLASS = re.compile(r".*(Norm([123]d)?|Embedding(s|Bag)?)")
#: a parameter's own name: bias, in_proj_bias, bias_k; pos_embed, position_embeddings; q_norm
_NAME = re.compile(r"(.*_)?bias(_.*)?|(.*_)?(embed|embeddings?)|.*norm")


def param_groups(
    model: nn.Module,
    weight_decay: float | Tensor = 0.1,
    dense: Iterable[str] = (),
    no_decay: Iterable[str] | None = None,
    batch_dims: Mapping[str, int] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """The usual groups of a model's parameters, for `hfac.HFac` and `hfac.SMMF`.

    Without weight decay are

    * norms and embeddings, by the class of the module that holds the parameter: its name or that of one of its bases
      ends in Norm (BatchNorm2d as well), Embedding, Embeddings or EmbeddingBag; modules that are not torch's own also
      by the name under which the model has them, where it ends in "norm";
    * everything with at most one dimension (behind ``batch_dims``);
    * what is called a bias, a norm or an embedding: "bias" is a word of the parameter's own name, as in
      ``in_proj_bias``, or it ends in "norm", or its last word is "embed", "embedding" or "embeddings".

    All else decays.

    A pattern is matched as a file name is (`fnmatch`, case counts, ``*`` takes dots as well) against the parameter's
    name (``"layers.*.experts.*"``) and against the name of the class of the module that holds it and of that class's
    bases (``"Embedding"``). A tied parameter is one parameter that has all of its names and modules.

    Args:
        model: frozen parameters (requires_grad False) are left out.
        weight_decay: of those that decay (default 0.1).
        dense: patterns of parameters whose moments are to stay whole (group option ``dense``; default none).
        no_decay: patterns of parameters without weight decay, besides the above (default none).
        batch_dims: patterns of stacks, and how many of their leading dimensions count slices (group option
            ``batch_dims``); the last pattern that matches counts (default none).
        more: options of every group, as the optimizer takes them (``lr=3e-4``).

    Returns:
        Dicts with "params", (name, parameter) pairs in the model's order, "weight_decay", "dense", "batch_dims" and
        ``more``. Each parameter is in one of them and none is empty. Which groups there are, and their order, do not
        depend on ``weight_decay``: plain ones before dense ones before stacks, in each those that decay first.

    Raises:
        ValueError: a pattern matches no parameter of the model, a stack has not so many dimensions, nothing is to be
            trained, or a lazy module has not been initialized.
        TypeError: ``model`` is no module, ``batch_dims`` no mapping, or ``more`` has "params".
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs the model, whose modules say what decays, got {type(model).__name__}")
    if "params" in more:
        raise TypeError("param_groups finds 'params' in the model; options of every group can be given, not these")
    if batch_dims is not None and not isinstance(batch_dims, Mapping):
        raise TypeError(
            "batch_dims must be a mapping from patterns of parameters to numbers of dimensions, such as "
            f"{{'*.experts.*': 1}}, got {batch_dims!r}"
        )
    found = _Parameters(model)
    kept_whole, named = found.matching("dense", dense), found.matching("no_decay", no_decay or ())
    stacks: dict[int, int] = {}
    for pattern, count in (batch_dims or {}).items():
        stacks.update(dict.fromkeys(found.matching("batch_dims", [pattern]), count))

    groups: dict[tuple[int, bool, bool], list[tuple[str, Tensor]]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if is_lazy(param):
            raise ValueError(
                f"{name!r} has no shape yet, which decides what decays. Run a forward pass first: it initializes the "
                "parameters of lazy modules."
            )
        key, batch = id(param), stacks.get(id(param), 0)
        if not 0 <= batch < max(param.ndim, 1):
            raise ValueError(
                f"batch_dims says {batch} of {name}, which has shape {tuple(param.shape)}: a number from 0 to "
                f"{max(param.ndim, 1) - 1} is required. Name the stacks alone in its patterns."
            )
        undecayed = key in named or param.ndim - batch <= 1 or found.is_usually_undecayed(key)
        groups.setdefault((batch, key in kept_whole, undecayed), []).append((name, param))
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to optimize")
    found_groups = []
    for (batch, is_dense, undecayed), params in sorted(groups.items(), key=lambda item: item[0]):
        decay = 0.0 if undecayed else weight_decay
        found_groups.append({"params": params, "weight_decay": decay, "dense": is_dense, "batch_dims": batch, **more})
    return found_groups


class _Parameters:
    """Every parameter of a model, by identity, with all names that it has and all modules that hold it."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        self._holders: dict[int, list[tuple[str, type]]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, param in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                self._names.setdefault(id(param), []).append(name)
                self._holders.setdefault(id(param), []).append((_last(prefix), type(module)))

    def matching(self, argument: str, patterns: Iterable[str]) -> set[int]:
        """The parameters that match one of the patterns; there is no pattern without one."""
        found: set[int] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = {key for key in self._names if any(fnmatchcase(text, pattern) for text in self._texts(key))}
            if not matched:
                names = (name for names in self._names.values() for name in names)
                classes = (cls.__name__ for holders in self._holders.values() for _, cls in holders)
                raise ValueError(
                    f"{argument}: {pattern!r} matches no parameter, nor the class of a module that holds one. There "
                    f"are {_nearest(pattern, names)}, held by {_nearest(pattern, classes)}."
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
        """Names of the classes that hold a parameter and of their bases, without what all modules have."""
        bases = (cls for _, holder in self._holders[key] for cls in holder.__mro__)
        return [cls.__name__ for cls in bases if issubclass(cls, nn.Module) and cls is not nn.Module]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _nearest(pattern: str, names: Iterable[str], most: int = 6) -> str:
    """Some of the names, the most alike first."""
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(get_close_matches(pattern, distinct, most, 0.0)) + more
