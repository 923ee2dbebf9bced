"""Output files and folders: the types of the options that name them, and checks before the work begins."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfac.cli.errors import UsageError
from hfac.cli.foreign import told


def folder(text: str) -> Path:
    """A folder to write to; an empty name would be the current one."""
    if not text:
        raise argparse.ArgumentTypeError("required is the name of a folder, got ''; the current folder is .")
    return Path(text)


def picture(text: str) -> Path:
    """A picture file, whose name says its format."""
    if not text or text.endswith(tuple(filter(None, (os.sep, os.altsep)))):
        raise argparse.ArgumentTypeError(f"required is the name of a file such as plan.png, got {text!r}")
    if not Path(text).suffix.strip("."):
        raise argparse.ArgumentTypeError(
            f"required is the name of a PNG, PDF or SVG file, got {text!r}; end it in .png, .pdf or .svg"
        )
    return Path(text)


def check_picture(option: str, path: Path) -> None:
    """Raise `UsageError` if matplotlib is missing or cannot write this format, or no file can be written there."""
    try:
        from matplotlib.figure import Figure

        supported = Figure().canvas.get_supported_filetypes()
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"{option} requires matplotlib ({missing}); install it with: {sys.executable} -m pip install matplotlib"
        ) from missing
    except Exception as error:
        raise UsageError(
            f"{option} requires matplotlib, which fails when it is imported ({told(error)}); install it anew with: "
            f"{sys.executable} -m pip install --force-reinstall matplotlib"
        ) from error
    required = f"{option} requires a PNG, PDF or SVG file that can be written, got {path}"
    if path.suffix[1:].lower() not in supported:
        raise UsageError(f"{required}; matplotlib writes {', '.join(sorted(supported))}")
    reason = _why_not_file(path)
    if reason is not None:
        raise UsageError(f"{required} ({reason}); give another")


def check_folder(option: str, path: Path, files: Iterable[str] = ()) -> None:
    """Make the folder, and raise `UsageError` if it or one of its ``files`` cannot be written."""
    required = f"{option} requires a directory that can be written, got {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"{required} ({error.strerror or error}); give another") from error
    for name in files:
        reason = _why_not_file(path / name)
        if reason is not None:
            raise UsageError(f"{required} ({name}: {reason}); give another")


def _why_not_file(path: Path) -> str | None:
    """Why a file cannot be written, or None; leaves no file behind."""
    if path.is_dir():
        return "it is a directory"
    there = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        return error.strerror or str(error)
    if not there:
        path.unlink(missing_ok=True)
    return None


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture, completely or not at all."""
    try:
        figure.savefig(path, dpi=150)
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
