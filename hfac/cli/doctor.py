"""Says which backends are here, each with its version, compiler and instruction sets or architectures, or why it is
not here and which command would change that."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import hfac
from hfac import backends
from hfac.backends import cpu

HELP = "show which backends are here, and why the others are not"

#: Devices a backend is made for, where not all.
_MADE_FOR = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hfac doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; the exit status is 0 whatever they are."""
    found = examine()
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
    return 0


def examine() -> dict[str, Any]:
    """Versions, devices, and every backend of `hfac.backends.TABLE`, as plain values."""
    devices = [_processor(), *_cuda_devices()]
    kinds = dict.fromkeys(device["device"].split(":")[0] for device in devices)
    return {
        "hfac": hfac.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "devices": devices,
        "auto": {kind: backends.available(torch.device(kind))[0] for kind in kinds},
        "backends": [_backend(backend, list(kinds)) for backend in backends.TABLE.values()],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What `examine` found, for people."""
    cuda = f"for CUDA {found['torch_cuda']}" if found["torch_cuda"] else "without CUDA"
    text = [
        f"hfac {found['hfac']}, torch {found['torch']} ({cuda}), Python {found['python']}, {found['platform']}",
        *(f"device {device['device']}: {device['name']}" for device in found["devices"]),
        f"threads: {found['threads']} (torch.get_num_threads)",
        *(f"backend='auto' on {kind} takes {name!r}" for kind, name in found["auto"].items()),
        "",
        "Backends:",
    ]
    for backend in found["backends"]:
        here = f"here, serves tensors on {', '.join(backend['serves'])}" if backend["here"] else "not here"
        text.append(f"  {backend['name']} ({backend['summary']}): {here}")
        text += [f"    {name.replace('_', ' ')}: {_shown(value)}" for name, value in backend["details"].items()]
        if not backend["here"]:
            text.append(f"    why not: {backend['why_not']}")
            text.append(f"    fix: {backend['fix'] or 'none in this version'}")
    return text


def _backend(backend: backends.Backend, kinds: list[str]) -> dict[str, Any]:
    """One row of the table. Where it serves no device that is here, it is asked about the one it is made for."""
    serves = [kind for kind in kinds if backend.why_not(torch.device(kind)) is None]
    asked = _MADE_FOR.get(backend.name, "cpu")
    why_not = None if serves else backend.why_not(torch.device(asked)) or f"There is no {asked} device here."
    return {
        "name": backend.name,
        "summary": backend.summary,
        "here": bool(serves),
        "serves": serves,
        "why_not": why_not,
        "fix": None if serves else _fix(backend.name),
        "details": _DETAILS[backend.name](),
    }


def _fix(name: str) -> str | None:
    """What to do, if possible a command, to have the backend here; None where this version of hfac cannot have it."""
    if name == "triton":
        installed = importlib.util.find_spec("triton") is not None
        return (
            "a GPU and its driver, which Triton looks for" if installed else f"{sys.executable} -m pip install triton"
        )
    if name != "cpu":
        return None
    root = Path(hfac.__file__).parent.parent
    source = f'-e "{root}"' if (root / "setup.py").exists() else "SOURCE   (SOURCE: what hfac was installed from)"
    build = f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir {source}"
    if any(map(shutil.which, ((os.environ.get("CXX") or "g++").split()[0], "g++", "c++"))):
        return build
    return f"install a C++17 compiler (Debian, Ubuntu: sudo apt-get install g++), then {build}"


def _reference_details() -> dict[str, Any]:
    return {"version": torch.__version__}


def _cpu_details() -> dict[str, Any]:
    if cpu._C is None:
        return {}
    info = cpu._C.info()
    return {
        "version": info["version"],
        "compiler": info["compiler"],
        "instruction_set_in_use": info["isa"],
        "instruction_sets_compiled": info["isa_compiled"],
        "instruction_sets_of_this_processor": info["isa_usable"],
    }


def _cuda_details() -> dict[str, Any]:
    """What the extension says of its CUDA part, whether or not this version has kernels in it."""
    if cpu._C is None:
        return {}
    info = cpu._C.cuda_info()
    if not info["compiled"]:
        return {"extension": info["why_not"]}
    return {
        "runtime": _cuda_version(info["runtime_version"]),
        "driver": _cuda_version(info["driver_version"]),
        "devices": [f"{device['name']} (sm_{''.join(map(str, device['capability']))})" for device in info["devices"]],
        **({"extension": info["why_not"]} if info["why_not"] else {}),
    }


def _triton_details() -> dict[str, Any]:
    try:
        details = {"version": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        details = {"version": "the package triton is not installed"}
    driver = {} if cpu._C is None else cpu._C.cuda_info()
    return details | ({"driver": _cuda_version(driver["driver_version"])} if driver.get("compiled") else {})


_DETAILS = {"cuda": _cuda_details, "triton": _triton_details, "cpu": _cpu_details, "reference": _reference_details}


def _processor() -> dict[str, str]:
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        models = []
    name = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    return {"device": "cpu", "name": name}


def _cuda_devices() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append({"device": f"cuda:{index}", "name": f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"})
    return found


def _cuda_version(number: int) -> str:
    """12040 is 12.4; 0 is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
