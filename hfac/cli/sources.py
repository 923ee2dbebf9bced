"""Where `hfac plan` takes a model's shapes from: a list by name, a Hugging Face config, or a callable in Python.
Nothing is downloaded, and no weight gets memory."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfac.cli import shapes
from hfac.cli.errors import UsageError

FORMS = (
    f"a known model ({', '.join(shapes.NAMED)}), a Hugging Face config.json or its folder, or MODULE:CALLABLE that "
    "returns a torch.nn.Module"
)
#: tried in order for a config that names no architecture
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model.

    Attributes:
        trainable: it has a gradient and optimizer state.
        itemsize: bytes of an element where its type is not the one that is planned for: quantized, say.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    itemsize: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A model as far as memory goes: what it is called, where that comes from, and its parameters, shared ones once."""

    title: str
    source: str
    parameters: tuple[Parameter, ...]


def read(target: str) -> Model:
    """The model that ``target`` stands for.

    Raises:
        UsageError: it is none of `FORMS`, or cannot be built.
    """
    if target in shapes.NAMED:
        title, make = shapes.NAMED[target]
        return Model(title, f"named list {target}", tuple(Parameter(name, shape) for name, shape in make().items()))
    if os.path.exists(target):
        return _of_config(Path(target))
    module, colon, name = target.partition(":")
    if colon and module and name and not set("/\\") & set(target):
        return _of_callable(module, name)
    raise UsageError(f"required is {FORMS}; there is no file, folder or name {target!r}")


def _of_module(module: nn.Module, title: str, source: str) -> Model:
    """Shared parameters come once, as `named_parameters` has them."""
    found = []
    for name, param in module.named_parameters():
        itemsize = None if param.is_floating_point() else param.element_size()
        found.append(Parameter(name, tuple(param.shape), param.requires_grad, itemsize))
    if not any(parameter.trainable for parameter in found):
        raise UsageError(f"required is a model with something to train; {source} has no parameter that requires_grad")
    return Model(title, source, tuple(found))


def _of_callable(module_name: str, name: str) -> Model:
    with _importing_from_here():
        return _of_module(*_called(module_name, name))


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """As under `python -m`: what lies in the current folder is found."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def _called(module_name: str, name: str) -> tuple[nn.Module, str, str]:
    """What the callable builds on the meta device, its title and its source."""
    source = f"{module_name}:{name}"
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"required is MODULE:CALLABLE that can be imported from here, got {source!r} ({error}); check both names, "
            "or set PYTHONPATH"
        ) from error
    if not callable(found):
        raise UsageError(f"required is a callable without arguments, and {source} is of type {type(found).__name__}")
    try:
        with torch.device("meta"):
            built = found()
    except Exception as error:
        raise UsageError(
            f"{source}() failed on the meta device, where tensors have shapes and no values: {type(error).__name__}: "
            f"{error}. Required is a callable without arguments that builds the model and reads no value of it"
        ) from error
    if not isinstance(built, nn.Module):
        raise UsageError(f"required is a callable that returns a torch.nn.Module; {source}() is {_kind(built)}")
    return built, type(built).__name__, source


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}" + (", not called yet" if callable(value) else "")


def _of_config(path: Path) -> Model:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"required is a folder with a config.json in it, and {path} has none") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"required is a Hugging Face config.json; {file} cannot be read as JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UsageError(f"required is a Hugging Face config.json, which says its 'model_type'; {file} has none")
    try:
        import transformers
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"a config.json is built by transformers, which cannot be imported ({missing}); install it with: "
            f"{sys.executable} -m pip install transformers"
        ) from missing
    kind = values["model_type"]
    try:
        config_class = transformers.CONFIG_MAPPING[kind]
    except KeyError:
        custom = " The code that comes with such a model is not run here." if "auto_map" in values else ""
        raise UsageError(
            f"transformers {transformers.__version__} does not know the model_type {kind!r} of {file}.{custom} Use "
            "another version of it, or a Python callable that builds the model: MODULE:CALLABLE"
        ) from None
    try:
        config = config_class.from_dict(values)
        with torch.device("meta"):
            built = _built(transformers, config)
    except Exception as error:
        raise UsageError(
            f"transformers {transformers.__version__} cannot build {file}: {type(error).__name__}: {error}"
        ) from error
    if built is None:
        raise UsageError(
            f"transformers {transformers.__version__} has none of {', '.join(AUTO_CLASSES)} for the model_type "
            f"{kind!r} of {file}; give a Python callable that builds the model: MODULE:CALLABLE"
        )
    return _of_module(built, type(built).__name__, str(file))


def _built(transformers: Any, config: Any) -> nn.Module | None:
    """The model of a config: of the class that it names, or else of the first auto class that takes it."""
    for name in _architectures(config):
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, nn.Module):
            return named(config)
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        try:
            return auto.from_config(config)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    return None


def _architectures(config: Any) -> Iterable[str]:
    return getattr(config, "architectures", None) or ()
