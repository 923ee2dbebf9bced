"""Runs code that is not hfac's own: what it prints goes to standard error, so that `--json` stays JSON alone."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Whatever is written to standard output meanwhile, by Python or by other code of the process, goes to standard
    error."""
    _flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        kept = None
    try:
        if kept is not None:
            with suppress(OSError):  # nor, perhaps, a standard error
                os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _flush()
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
        atexit.unregister(_end_in_stderr)
        atexit.register(_end_in_stderr)  # now, so that it comes before what that code has registered


def _end_in_stderr() -> None:
    """Sends what is printed at exit to standard error; the command's own output has been written by then."""
    _flush()
    sys.stdout = sys.stderr


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()


def told(error: BaseException) -> str:
    """An exception on one line: its type, and its message if it can be formatted."""
    try:
        text = str(error).partition("Exception raised from ")[0]  # what follows are addresses in torch
        text = " ".join(text.split()).rstrip('" (')
    except Exception:  # its __str__ fails
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
