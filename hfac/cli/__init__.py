"""The `hfac` command line: a table of sub-commands, each a module that defines HELP, add_arguments and run."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hfac import __version__, _startup
from hfac.cli import compare, doctor, plan
from hfac.cli.errors import FAILED, INTERRUPTED, PIPE_CLOSED, OutputError, UsageError
from hfac.cli.foreign import told

# Each module offers HELP (one line), add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "compare": compare,
    "doctor": doctor,
    "plan": plan,
}


class _Parser(argparse.ArgumentParser):
    """A parser that reports when help could not be written to standard output, instead of ignoring the error."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, with one sub-parser per entry of `COMMANDS`."""
    parser = _Parser(prog="hfac", description="Tools for the HFac and SMMF factored optimizers.")
    parser.add_argument("--version", action="version", version=f"hfac {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Every error is one line on standard error, without a traceback;
    HFAC_TRACEBACK=1 adds the traceback. Bad input exits with status 2, as argparse does.
    """
    _startup.release()
    command = "hfac"
    try:
        _prepare_output()
        try:
            args = build_parser().parse_args(argv)
            command = f"hfac {args.command}"
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, so that a write error is still reported
    except Exception as error:
        if os.environ.get("HFAC_TRACEBACK"):
            traceback.print_exc()
        if isinstance(error, OSError):
            _discard_output()
        if _was_interrupted(error):  # some modules turn a KeyboardInterrupt into an ImportError
            return INTERRUPTED
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as `head` does
            return PIPE_CLOSED
        if isinstance(error, UsageError):
            _say(f"{command}: error: {_one_line(error)}")
            raise SystemExit(2) from error
        _say(f"{command}: error: {_described(error)}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _prepare_output() -> None:
    """Writes characters that the terminal cannot show as escapes, as Python does on standard error."""
    if sys.stdout is None:
        raise OutputError("standard output is closed, so nothing can be printed")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _described(error: Exception) -> str:
    if isinstance(error, OutputError):
        return _one_line(error)
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return f"the output cannot be written ({error.strerror})"
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory for this ({told(error)}); ask for less"
    return f"{told(error)} (HFAC_TRACEBACK=1 shows where)"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _say(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # standard error may be closed as well
        print(line, file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Drops what is still buffered, so that the interpreter does not complain about it when it exits."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
