"""Where `hfac plan` takes a model's shapes from: a list by name, a Hugging Face config, or a callable in Python.
Nothing is downloaded, and no memory is allocated for weights."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfac.cli import configs, shapes
from hfac.cli.errors import UsageError
from hfac.cli.foreign import output_to_stderr, told
from hfac.cli.parameters import Model, Parameter, of_module

FORMS = (
    f"a known model ({', '.join(shapes.NAMED)}), a Hugging Face config.json or its folder, or MODULE:CALLABLE that "
    "returns a torch.nn.Module"
)
#: owner/name, and addresses of the hub
_HUB_ID = re.compile(r"(https?://)?((www\.)?(huggingface\.co|hf\.co)/)?[\w.-]+/[\w.-]+(/(tree|blob|resolve)/.*)?/?")


def read(target: str) -> Model:
    """The model that ``target`` names.

    Raises:
        UsageError: it is none of `FORMS`, or cannot be built.
    """
    name = shapes.ALIASES.get(target, target)
    if name in shapes.NAMED:
        title, make = shapes.NAMED[name]
        return Model(title, f"named list {name}", tuple(Parameter(name, shape) for name, shape in make().items()))
    if os.path.exists(target):
        with output_to_stderr():
            return configs.read(Path(target))
    module, colon, name = target.partition(":")
    if colon and module and name and not set("/\\") & set(target):
        with output_to_stderr(), _importing_from_here():
            return _of_callable(module, name)
    hub = ""
    if _HUB_ID.fullmatch(target) and not target.startswith((".", "/")):
        hub = (
            ". If that is a model of the Hugging Face hub: nothing is downloaded here. Download its config.json "
            "(hf download ID config.json) and give that file, or MODULE:CALLABLE that builds the model"
        )
    if not hub and (near := difflib.get_close_matches(target, [*shapes.NAMED, *shapes.ALIASES], n=1)):
        hub = f" (did you mean {near[0]}?)"
    raise UsageError(f"unknown model {target!r}: no list, file or folder has this name{hub}. Required is {FORMS}")


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """Makes modules in the current folder importable, as `python -m` does."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def _of_callable(module_name: str, name: str) -> Model:
    """The module that the callable builds on the meta device. The user's code may raise anything, even SystemExit; all
    of it becomes a `UsageError`, except Ctrl-C."""
    source = f"{module_name}:{name}"
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        absent = isinstance(error, (ModuleNotFoundError, AttributeError))
        advice = "check both names, or set PYTHONPATH" if absent else "the module itself fails: mend or replace it"
        raise UsageError(
            f"required is MODULE:CALLABLE that can be imported from here, got {source!r} ({told(error)}); {advice}"
        ) from error
    if not callable(found):
        raise UsageError(f"required is a callable without arguments, and {source} is of type {type(found).__name__}")
    try:
        with torch.device("meta"):
            built = found()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(
            f"{source}() failed on the meta device, where tensors have shapes and no values: {told(error)}. Required "
            "is a callable without arguments that builds the model and reads no value of it"
        ) from error
    if not isinstance(built, nn.Module):
        raise UsageError(f"required is a callable that returns a torch.nn.Module; {source}() is {_kind(built)}")
    try:
        return of_module(built, type(built).__name__, source)
    except (KeyboardInterrupt, UsageError):
        raise
    except BaseException as error:
        raise UsageError(
            f"the parameters of what {source}() returns cannot be listed ({told(error)}); required is a "
            "torch.nn.Module whose named_parameters() have shapes"
        ) from error


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}" + (", not called yet" if callable(value) else "")
