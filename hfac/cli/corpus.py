"""The text `hfac compare` trains on: the standard library's own source, or files the user names."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hfac.cli.errors import UsageError

VALIDATION_SHARE = 10  # one byte in so many is held out
# Tests are full of generated tables and odd bytes, and installed packages would differ from machine to machine.
SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes (uint8, 1-D, on the CPU) and where they came from."""

    train: torch.Tensor
    validation: torch.Tensor
    source: str
    files: int
    sha256: str


def load_corpus(paths: Sequence[str], max_bytes: int, context: int) -> Corpus:
    """Read the text, at most `max_bytes` of it, and hold out its last tenth for validation.

    `paths` are files or directories; when empty, the source of Python's standard library is read.
    Both parts are required to hold at least one window of `context` + 1 bytes.
    """
    if paths:
        source, files = ", ".join(paths), _named_files(paths)
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        source, files = f"Python standard library ({root})", _standard_library(root)
    text = bytearray()
    count = 0
    for file in files:
        try:
            with file.open("rb") as stream:
                text += stream.read(max_bytes - len(text))
        except OSError as error:
            raise UsageError(
                f"--text requires files that can be read, got {file} ({error.strerror}); make it readable"
            ) from error
        count += 1
        if len(text) >= max_bytes:
            break
    if not text:
        raise UsageError(
            f"no text to train on: {source} has no file with text in it (of directories, hidden files and those with "
            "NUL bytes are left out); give files or other directories with --text PATH"
        )
    held_out = len(text) // VALIDATION_SHARE
    if held_out < context + 1:
        required = (context + 1) * VALIDATION_SHARE
        raise UsageError(
            f"text too short: --context {context} requires at least {required:,} bytes of text (a tenth of it is held"
            f" out), got {len(text):,} from {source}; give more --text, a larger --max-bytes or a smaller --context"
        )
    data = torch.frombuffer(text, dtype=torch.uint8)
    split = len(text) - held_out
    return Corpus(data[:split], data[split:], source, count, hashlib.sha256(text).hexdigest())


def training_batch(
    data: torch.Tensor, batch_size: int, context: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of `data` as inputs and next-byte targets, both int64 `[batch_size, context]`.

    `generator` lives on the CPU whatever the device of `data`, so every device sees the same batches.
    """
    starts = torch.randint(len(data) - context, (batch_size,), generator=generator)
    return _windows(data, starts, context)


def validation_batches(
    data: torch.Tensor, batch_size: int, context: int, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same up to `count` batches on every call: windows spread evenly over `data`, none overlapping."""
    windows = min(count * batch_size, (len(data) - 1) // context)
    spacing = (len(data) - 1) // windows
    for starts in (torch.arange(windows) * spacing).split(batch_size):
        yield _windows(data, starts, context)


def _windows(data: torch.Tensor, starts: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = starts[:, None] + torch.arange(context + 1)
    windows = data[index.to(data.device)].long()
    return windows[:, :-1], windows[:, 1:]


def _standard_library(root: Path) -> Iterator[Path]:
    for directory, inside, files in os.walk(root):
        inside[:] = sorted(set(inside) - SKIPPED_DIRECTORIES)  # os.walk visits these, in this order
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(directory, name)


def _named_files(paths: Sequence[str]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"--text requires files or directories that exist, got {path}, which does not")
        if path.is_dir():
            inside = (file.relative_to(path) for file in path.rglob("*"))
            visible = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
            for file in sorted(visible, key=Path.as_posix):
                if (path / file).is_file() and not _is_binary(path / file):
                    yield path / file
        else:
            yield path


def _is_binary(file: Path) -> bool:
    """Whether a file is binary, by git's rule: a NUL byte near its start."""
    try:
        with file.open("rb") as stream:
            return b"\0" in stream.read(8000)
    except OSError:
        return False  # load_corpus will raise the same error and report it
