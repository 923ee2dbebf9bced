"""The checkpoint of `hfac compare`: one file, whole at every moment, read without running code from it."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import torch

from hfac.cli.errors import OutputError, UsageError
from hfac.cli.foreign import told

FILE_NAME = "compare.pt"
FORMAT = 1


def save_checkpoint(directory: Path, content: dict) -> None:
    """Write `content` to a temporary name, flush it to disk, then rename it over the last checkpoint.

    Interrupted at any point, the directory holds either the last checkpoint or this one, each complete.

    Raises:
        OutputError: it cannot be written; the last checkpoint is still there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=FILE_NAME + ".", suffix=".tmp", dir=directory)
    except OSError as error:
        raise _unwritten(directory, error) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save({"format": FORMAT} | content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, directory / FILE_NAME)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch's writer says RuntimeError of a full disk
            raise _unwritten(directory, error) from error
        raise


def _unwritten(directory: Path, error: Exception) -> OutputError:
    return OutputError(f"the checkpoint {directory / FILE_NAME} could not be written ({told(error)})")


def load_checkpoint(directory: Path) -> dict:
    """Read the checkpoint in `directory` onto the CPU; raise `UsageError` if there is none to read."""
    path = directory / FILE_NAME
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(
            f"--resume requires a directory written by --save, and {path} does not exist; give that directory, or"
            " start anew with --save"
        ) from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # PyTorch's own message would send the user to weights_only=False.
        reason = getattr(error, "strerror", None) or "it is damaged, or no checkpoint of hfac compare"
        raise UsageError(
            f"--resume cannot read {path}: {reason}; restore the file or start anew with --save"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UsageError(
            f"--resume requires a checkpoint of format {FORMAT} and {path} has {found}; it was written by another"
            " program or version: start anew with --save"
        )
    return content
