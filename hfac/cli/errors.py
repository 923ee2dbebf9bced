"""Errors of the commands, and their exit statuses."""

FAILED = 1  # the exit status of failures that are not the arguments' fault
INTERRUPTED = 130  # the exit status shells give a program stopped by Ctrl-C
PIPE_CLOSED = 141  # and a program whose reader has closed the pipe


class UsageError(Exception):
    """Bad input: the message says what was required, what was given and what to do. Exit status 2."""


class DamagedCheckpoint(Exception):
    """A checkpoint that differs from what was saved, or that another version saved; the message says where."""


class OutputError(Exception):
    """A file could not be written: the message says which, and why. Exit status 1."""
