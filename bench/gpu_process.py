"""One process of `bench.gpu_report`, in a group of its own, ended with all its children when its time is over."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Every process that a process of the report starts inherits this variable with the same value, whatever group or
#: session it moves to: profilers and sanitizers start the program they look at in ways of their own.
MARK = "HFAC_GPU_REPORT_PROCESS"
#: Seconds between an interrupt, after which pytest still writes what it has found, and the end.
GRACE = 3.0
_TICK = 0.25
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, None where it did not end by itself; why, where it did not; its seconds."""

    status: int | None
    why: str
    seconds: float


def run(
    command: Sequence[str],
    log: Path,
    seconds: float,
    watch: Callable[[], None] = lambda: None,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Runs a command from the checkout's root for at most ``seconds``, its output going to ``log``; calls ``watch`` a
    few times a second. Afterwards nothing that it started is left, however it ended."""
    mark = uuid.uuid4().hex
    begin = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {}), MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_own_group,
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            return Ended(None, "could not be started", 0.0)
        try:
            _wait(process, begin + max(seconds - GRACE, seconds / 2), watch)
            status = process.returncode
            if status is None:
                process.send_signal(signal.SIGINT)
                _wait(process, begin + seconds, watch)
        finally:
            _end(process, mark)
    return Ended(status, f"cut off after {seconds:.0f} s" if status is None else "", time.monotonic() - begin)


def _own_group() -> None:
    os.setpgid(0, 0)
    if _LIBC is not None:  # a report that is killed leaves nothing on the GPU
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: subprocess.Popen, until: float, watch: Callable[[], None]) -> None:
    while process.poll() is None and (left := until - time.monotonic()) > 0:
        try:
            process.wait(min(left, _TICK))
        except subprocess.TimeoutExpired:
            watch()


def _end(process: subprocess.Popen, mark: str) -> None:
    """Kills the group, and what has left it."""
    for _ in range(50):
        left = [process.pid] if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in _marked(mark):
            left.append(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(0.1)


def _marked(mark: str) -> Iterator[int]:
    wanted = f"{MARK}={mark}".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in environment.read_bytes().split(b"\0"):
                yield int(environment.parent.name)
        except OSError:  # ended, or another user's
            continue
