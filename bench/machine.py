"""Where and with what a number was measured: machine, versions, commit. No names of hosts, users or folders."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import hfac
from hfac.backends import cpu

ROOT = Path(__file__).parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, threads, versions, commit and date, as plain values."""
    cuda = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else processor(),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "hfac": hfac.__version__,
        "extension": None if cpu._C is None else {key: cpu._C.info()[key] for key in ("compiler", "isa")},
        **commit(ROOT),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit(checkout: Path) -> dict[str, Any]:
    """The checkout's commit, None where there is no git, and whether files have been changed since."""
    return {
        "commit": _git(checkout, "rev-parse", "HEAD"),
        "dirty": bool(_git(checkout, "status", "--porcelain", "--", ".", ":!bench/results")),
    }


def processor() -> str:
    """The processor's model as it calls itself, with family and model number where that names none: one name may stand
    for several generations, whose numbers are not to replace each other's."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    name = " ".join(fields.get("model name", "").split())
    if not name:
        return platform.processor() or platform.machine()
    numbers = [fields.get(field) for field in ("cpu family", "model")]
    return name if re.search(r"\d", name) or None in numbers else f"{name}, family {numbers[0]}, model {numbers[1]}"


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git answers in a checkout; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
