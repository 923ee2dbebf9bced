"""What the processes of `bench.gpu_report` have in common: rows that outlive them, and a device that may be lost."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def add(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds a line of JSON per row to the file, if there is one; it is on the disk when this returns."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def usable(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access every later call of the process fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(2, device=device).sum() == 2)
    except RuntimeError:
        return False


def start_anew(*more: str) -> None:
    """Starts this program again in the same process, with a new context on the device; ``more`` follows its options."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *more])
