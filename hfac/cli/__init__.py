"""The `hfac` command line: a table of sub-commands, each one a module with the same three names."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hfac.cli import compare, doctor, plan
from hfac.cli.errors import INTERRUPTED, PIPE_CLOSED, UsageError

# Each module offers HELP (one line), add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "compare": compare,
    "doctor": doctor,
    "plan": plan,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, with one sub-parser per entry of `COMMANDS`."""
    parser = argparse.ArgumentParser(prog="hfac", description="Tools for the HFac and SMMF factored optimizers.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command_parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; bad input exits with status 2 as argparse does."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        args.command_parser.error(str(error))  # exits
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere, without complaint
        return PIPE_CLOSED
