"""How a command ends when it does not end well."""

INTERRUPTED = 130  # the exit status shells give a program stopped by Ctrl-C


class UsageError(Exception):
    """Bad input: the message says what was required, what was given and what to do. Exit status 2."""
