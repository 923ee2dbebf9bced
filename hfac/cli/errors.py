"""How a command ends when it does not end well."""

FAILED = 1  # the exit status where something went wrong that is no fault of the arguments
INTERRUPTED = 130  # the exit status shells give a program stopped by Ctrl-C
PIPE_CLOSED = 141  # and one whose reader has gone


class UsageError(Exception):
    """Bad input: the message says what was required, what was given and what to do. Exit status 2."""


class DamagedCheckpoint(Exception):
    """What was loaded is not what was saved, or another version saved it; the message says where it differs."""


class OutputError(Exception):
    """A file could not be written: the message says which, and why. Exit status 1."""
