"""Python processes for tests, forked from one that has imported torch and hfac and run nothing: the import takes each
process longer than most tests do."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: of those that fork; asked for before the first of them is started, so this module is imported by conftest.py
multiprocessing.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.checkpoint",
        "hfac",
    ]
)


class Forked:
    """A process that runs ``code`` as a program would, told ``arguments`` and what ``environment`` has beside this
    process's variables (None: without that one)."""

    def __init__(self, code: str, arguments: Sequence[Any] = (), environment: Mapping[str, str | None] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        given = (code, [*map(str, arguments)], dict(environment or {}), self._folder.name)
        self._process = multiprocessing.get_context("forkserver").Process(target=_run, args=given)
        self._process.start()

    def ended(self, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Waits for its end. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a forked process", timeout)
        out, err = (Path(self._folder.name, name).read_text() for name in ("out", "err"))
        self._folder.cleanup()
        return subprocess.CompletedProcess([], self._process.exitcode, out, err)


def _run(code: str, arguments: list[str], environment: dict[str, str | None], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
