"""How a command ends when it does not end well."""

INTERRUPTED = 130  # the exit status shells give a program stopped by Ctrl-C
PIPE_CLOSED = 141  # and one whose reader has gone


class UsageError(Exception):
    """Bad input: the message says what was required, what was given and what to do. Exit status 2."""


class DamagedCheckpoint(Exception):
    """What was loaded is not what was saved, or another version saved it; the message says where it differs."""
