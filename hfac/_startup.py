"""Ctrl-C while the command `hfac` still imports torch: it ends at once, as it does later, and not with a traceback out
of other people's modules. Importing hfac from anywhere else installs nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(130)


def guard() -> None:
    """Let Ctrl-C end the process until `release`, if the process is the command `hfac` or `python -m hfac`."""
    if _is_command() and _is_ours(signal.default_int_handler):
        signal.signal(signal.SIGINT, _end)


def release() -> None:
    """Python's own reaction to Ctrl-C again."""
    if _is_ours(_end):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_ours(handler: object) -> bool:
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is handler


def _is_command() -> bool:
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # what python -m says until it knows the file
        words = list(sys.orig_argv)
        return "-mhfac" in words or any(pair == ("-m", "hfac") for pair in zip(words, words[1:], strict=False))
    return os.path.splitext(os.path.basename(started))[0] == "hfac"


guard()
