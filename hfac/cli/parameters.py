"""A model as far as memory is concerned: names and shapes of its parameters, and which of them are trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from hfac.cli.errors import UsageError
from hfac.groups import _nearest, _Parameters

#: types of weights that `hfac plan --dtype` replaces; weights of any other type keep their size
_PLANNED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model.

    Attributes:
        trainable: it has a gradient and optimizer state.
        itemsize: bytes of an element if its type is not the planned one, such as a quantized one. A fraction if
            several elements share a byte or a scale.
        dense, batch_dims, views, views_dim: options of its group, as in `hfac.param_groups`.
        labels: what patterns may match besides its name: further names of tied weights, and classes of the modules
            that hold it.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    itemsize: float | None = None
    dense: bool = False
    batch_dims: int = 0
    views: int = 1
    views_dim: int = 0
    labels: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A model's name, where its parameters come from, and these parameters, shared ones once.

    Attributes:
        assumed: sentences about what the source leaves open and the plan assumes.
    """

    title: str
    source: str
    parameters: tuple[Parameter, ...]
    assumed: tuple[str, ...] = ()

    def check_trainable(self) -> None:
        """Raise `UsageError` if there is nothing to train."""
        if not any(parameter.trainable for parameter in self.parameters):
            raise UsageError(
                f"required is a model with something to train; {self.source} has no parameter that requires_grad"
            )

    def grouped(
        self,
        dense: Iterable[str],
        batch_dims: Mapping[str, int],
        views: Mapping[str, int] | None = None,
        views_dim: Mapping[str, int] | None = None,
    ) -> Model:
        """The model with these options set where patterns match, as in `hfac.param_groups`.

        Raises:
            UsageError: a pattern matches nothing that is trained, a stack does not have that many dimensions, or a
                fused weight cannot be cut into that many pieces.
        """
        parameters = list(self.parameters)
        for pattern in dense:
            for i in self._matching("--dense", pattern):
                parameters[i] = replace(parameters[i], dense=True)
        for pattern, count in batch_dims.items():
            for i in self._matching("--batch-dims", pattern):
                name, shape = parameters[i].name, parameters[i].shape
                if not 0 <= count < max(len(shape), 1):
                    raise UsageError(
                        f"--batch-dims says {count} of {name}, which has shape {shape}: a number from 0 to "
                        f"{max(len(shape), 1) - 1} is required; name the stacks alone in its patterns"
                    )
                parameters[i] = replace(parameters[i], batch_dims=count)
        for pattern, dim in (views_dim or {}).items():
            for i in self._matching("--views-dim", pattern):
                parameters[i] = replace(parameters[i], views_dim=dim)
        for pattern, pieces in (views or {}).items():
            for i in self._matching("--views", pattern):
                name, shape, cut = parameters[i].name, parameters[i].shape, parameters[i]
                along = cut.batch_dims + cut.views_dim
                if pieces < 1 or along >= len(shape) or shape[along] % pieces:
                    raise UsageError(
                        f"--views says {pieces} of {name}, which has shape {shape}: a number is required into which "
                        f"dimension {along} can be cut; name the fused weights alone in its patterns, and another "
                        "dimension with --views-dim"
                    )
                parameters[i] = replace(cut, views=pieces)
        return replace(self, parameters=tuple(parameters))

    def check_pieces(self, worlds: Iterable[int]) -> None:
        """Raise `UsageError` if FSDP2 would give some of so many ranks parts of a fused weight's pieces, which HFac
        and SMMF refuse."""
        for world in worlds:
            for each in self.parameters:
                if each.views == 1 or each.batch_dims or world == 1:
                    continue
                share, piece = -(-each.shape[0] // world), each.shape[0] // each.views
                if each.views_dim or share % piece:
                    raise UsageError(
                        f"--views {each.views} of {each.name}, of shape {each.shape}, cannot be sharded over {world} "
                        f"GPUs: FSDP2 gives each {share} of {each.shape[0]} rows, which are no whole pieces. Leave "
                        "--views out, or plan numbers of GPUs that each have whole pieces of rows"
                    )

    def _matching(self, option: str, pattern: str) -> list[int]:
        trained = [(i, parameter) for i, parameter in enumerate(self.parameters) if parameter.trainable]
        found = [i for i, p in trained if any(fnmatchcase(text, pattern) for text in (p.name, *p.labels))]
        if not found:
            names = _nearest(pattern, (parameter.name for _, parameter in trained))
            raise UsageError(f"{option}: {pattern!r} matches no parameter that is trained; there are {names}")
        return found


def of_module(module: nn.Module, title: str, source: str, assumed: Iterable[str] = ()) -> Model:
    """The parameters of a module; shared ones come once, as `named_parameters` has them.

    Raises:
        UsageError: a parameter has no shape yet, or none is trained.
    """
    held = _Parameters(module)
    found = []
    for name, param in module.named_parameters():
        if nn.parameter.is_lazy(param):
            raise UsageError(
                f"required are parameters with shapes, and {name} of {source} is lazy: it gets its shape in the first "
                "forward pass. Run one in the callable, on tensors of the meta device, or give the layer its sizes"
            )
        itemsize = None if param.dtype in _PLANNED else param.element_size()
        labels = tuple(text for text in dict.fromkeys(held._texts(id(param))) if text != name)
        found.append(Parameter(name, tuple(param.shape), param.requires_grad, itemsize, labels=labels))
    model = Model(title, source, tuple(found), tuple(assumed))
    model.check_trainable()
    return model
