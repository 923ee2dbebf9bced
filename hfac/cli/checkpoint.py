"""The checkpoint of `hfac compare`: one file that is complete at every moment, and is loaded without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import torch

from hfac import __version__
from hfac.cli.errors import OutputError, UsageError
from hfac.cli.foreign import told

FILE_NAME = "compare.pt"
FORMAT = 1
#: the entries of a checkpoint, and their types
CONTENT: dict[str, type | tuple[type, ...]] = {
    "settings": dict,
    "text_sha256": str,
    "environment": dict,
    "plan": (list, tuple),
    "finished": (list, tuple),
    "run": (dict, type(None)),
}


def save_checkpoint(directory: Path, content: dict) -> None:
    """Write `content` to a temporary name, flush it to disk, then rename it over the last checkpoint.

    Interrupted at any point, the directory holds either the last checkpoint or this one, each complete.

    Raises:
        OutputError: it cannot be written; the last checkpoint is still there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
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


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files of saves that were killed before they could rename them."""
    for leftover in directory.glob(f"{FILE_NAME}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _unwritten(directory: Path, error: Exception) -> OutputError:
    return OutputError(f"the checkpoint {directory / FILE_NAME} could not be written ({told(error)})")


def load_checkpoint(directory: Path) -> dict:
    """Read the checkpoint in `directory` onto the CPU; raise `UsageError` if it cannot be read."""
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
    wrong = [name for name, kind in CONTENT.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise cannot_continue(directory, content, f"it has no {' and no '.join(wrong)} as hfac compare saves it")
    return content


def cannot_continue(directory: Path, content: dict, what: object) -> UsageError:
    """The error for a checkpoint that was read and cannot be continued; `what` says why, as half a sentence."""
    environment = content.get("environment")
    version = environment.get("hfac") if isinstance(environment, dict) else None
    by = "" if version in (None, __version__) else f" It was saved by hfac {version}, and this is {__version__}."
    return UsageError(
        f"--resume cannot continue {directory / FILE_NAME}: {what}.{by} Use the version that saved it, restore the"
        " file, or start anew with --save"
    )
