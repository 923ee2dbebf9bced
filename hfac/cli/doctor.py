"""Lists the backends that work on this machine, with version, compiler and instruction sets or GPU architectures; for
each of the others, why it does not work and which command would fix that. With --check, compares steps of every backend
with the plain-torch reference on awkward shapes, and measures a step of one large matrix against a memory copy."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hfac
from hfac import backends
from hfac.backends import cpu
from hfac.cli import check
from hfac.cli.errors import UsageError

HELP = "list the backends that work here, and why the others do not"

#: Exit status if --check finds a difference.
DIFFERS = 1
#: The device type that a backend is made for; others run on any.
_MADE_FOR = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_NOTHING = "nothing to do here: it is for GPUs, and this machine has none with a driver"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hfac doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare steps of every backend with the reference, and measure them (about half a minute); exit status 1 "
        "if they differ. Add its output to a bug report",
    )
    parser.add_argument("--device", metavar="NAME", help="check this device only, such as cuda:1 (default: all here)")
    parser.add_argument("--backend", metavar="NAME", help="check this backend only (default: all here)")


def run(args: argparse.Namespace) -> int:
    """Print the findings. The exit status is 1 if --check finds a backend that differs from the reference, else 0."""
    plan = _plan(args)
    found = examine()
    if not args.json:
        print("\n".join(lines(found)), flush=True)
    if args.check:
        for device, names in plan:
            _check(device, names, found, quiet=args.json)
    if args.json:
        print(json.dumps(found, indent=2))
    return DIFFERS if any(row["differences"] for row in found.get("checks", ())) else 0


def _plan(args: argparse.Namespace) -> list[tuple[torch.device, list[str]]]:
    """What --check covers: for each device, its backends.

    Raises:
        UsageError: --device or --backend is given without --check, or is not here.
    """
    for name in ("device", "backend"):
        if getattr(args, name) is not None and not args.check:
            raise UsageError(f"--{name} selects what --check checks: give --check too")
    devices = [torch.device(kind["device"]) for kind in (_processor(), *_cuda_devices(), *_xpu_devices())]
    if args.device is not None:
        try:
            asked = torch.device(args.device)
        except RuntimeError:
            asked = torch.device("meta")
        matching = [device for device in devices if device.type == asked.type and asked.index in (None, device.index)]
        if not matching:
            here = ", ".join(map(str, devices))
            raise UsageError(f"--device: required is a device that is here ({here}), got {args.device!r}")
        devices = matching
    plan = [(device, [name for name in backends.available(device) if name != "reference"]) for device in devices]
    if args.backend is not None:
        if args.backend not in backends.TABLE:
            raise UsageError(f"--backend: required is one of {', '.join(backends.TABLE)}, got {args.backend!r}")
        reasons = [backends.TABLE[args.backend].why_not(device) for device in devices]
        if all(reasons):
            raise UsageError(f"--backend: {args.backend!r} is not here: {reasons[-1]}")
        plan = [(device, [args.backend]) for device, reason in zip(devices, reasons, strict=True) if reason is None]
    return plan


def _check(device: torch.device, names: list[str], found: dict[str, Any], quiet: bool) -> None:
    """Checks and measures the backends ``names`` on a device; prints each row as it comes unless ``quiet``, and adds
    all to ``found``."""

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    checks, rates = found.setdefault("checks", []), found.setdefault("rates", [])
    if not names:
        say(f"\nCheck on {device}: only the reference is here, and there is nothing to compare it with.")
        return
    if "triton" in names and device.type != "cpu":
        _first_steps(device, found, say)
    say(f"\nCheck on {device}, steps compared with the reference's:")
    differing = set()
    for row in check.check(device, names):
        checks.append(row)
        what = f"  {row['backend']}, {row['optimizer']}, {row['case']}: "
        say(what + ("DIFFERS" if row["differences"] else "ok"))
        for difference in row["differences"]:
            differing.add(row["backend"])
            say(f"    {difference}")
    # Neither wrong results nor an interpreter are worth timing.
    able = [name for name in names if name not in differing and (name != "triton" or device.type != "cpu")]
    if able:
        say(f"Rate on {device}, one bfloat16 matrix of {check.large(device)}:")
    for row in check.rates(device, able):
        rates.append(row)
        share = row["gb_per_s"] / row["copy_gb_per_s"]
        say(
            f"  {row['backend']}, {row['optimizer']}: {row['ms']:.2f} ms, {row['gb_per_s']:.4g} GB/s, {share:.0%} of a "
            f"copy's {row['copy_gb_per_s']:.4g} GB/s"
        )
    if any(row["gb_per_s"] > row["copy_gb_per_s"] for row in rates):
        say("  (more than a copy's: caches kept what is read twice)")
    if differing:
        say(
            f"{', '.join(sorted(differing))}: steps on {device} differ from the reference's. Use another backend "
            "(backend='reference' is always right), and report this output."
        )


def _first_steps(device: torch.device, found: dict[str, Any], say: Callable[[str], None]) -> None:
    """Says how many kernels a first step compiles, which later processes find in Triton's cache, and adds it to
    ``found``."""
    say(f"\nFirst step of the Triton kernels on {device}, bfloat16, nothing compiled before:")
    for row in check.first_steps(device):
        found.setdefault("first_steps", []).append({"device": str(device)} | row)
        say(f"  {row['optimizer']}: {row['kernels']} kernels compiled in {row['seconds']:.1f} s")


def examine() -> dict[str, Any]:
    """Versions, devices, and every backend of `hfac.backends.TABLE`, as plain values."""
    devices = [_processor(), *_cuda_devices(), *_xpu_devices()]
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
    """The findings of `examine` as lines of text."""
    cuda = f"for CUDA {found['torch_cuda']}" if found["torch_cuda"] else "without CUDA"
    text = [
        f"hfac {found['hfac']}, torch {found['torch']} ({cuda}), Python {found['python']}, {found['platform']}",
        *(f"device {device['device']}: {device['name']}" for device in found["devices"]),
        f"threads: {found['threads']} (torch.get_num_threads)",
        *(f"backend='auto' on {kind} takes {name!r}" for kind, name in found["auto"].items()),
        "",
        "Backends:",
    ]
    fixes: set[str] = set()
    for backend in found["backends"]:
        here = f"here, serves tensors on {', '.join(backend['serves'])}" if backend["here"] else "not here"
        text.append(f"  {backend['name']} ({backend['summary']}): {here}")
        text += [f"    {name.replace('_', ' ')}: {_shown(value)}" for name, value in backend["details"].items()]
        if not backend["here"]:
            text.append(f"    why not: {backend['why_not']}")
            fix = backend["fix"]
            if fix is not None:
                text.append(f"    fix: {'the command above, which builds both' if fix in fixes else fix}")
                fixes |= {fix} - {_NOTHING}
    return text


def _backend(backend: backends.Backend, kinds: list[str]) -> dict[str, Any]:
    """One backend. If it serves no device on this machine, the reason given is for the device type it is made for."""
    serves = [kind for kind in kinds if backend.why_not(torch.device(kind)) is None]
    asked = _MADE_FOR.get(backend.name, "cpu")
    why_not = None if serves else backend.why_not(torch.device(asked)) or f"There is no {asked} device here."
    fix = None if serves else _fix(backend.name)
    return {
        "name": backend.name,
        "summary": backend.summary,
        "here": bool(serves),
        "serves": serves,
        "why_not": why_not if why_not is None or fix is None else _reason(why_not),
        "fix": fix,
        "details": _DETAILS.get(backend.name, dict)(),
    }


def _reason(why_not: str) -> str:
    """What a backend says of itself, without its last sentence, which is what to do: `_fix` knows this machine."""
    sentences = re.split(r"(?<=\.) (?=[A-Z])", why_not)
    return " ".join(sentences[:-1] or sentences)


def _has_gpu() -> bool:
    """Whether there is a GPU with a driver, whatever this torch and the extension can do with it."""
    return any((_cuda_devices(), _xpu_devices(), _driver().get("devices"), shutil.which("nvidia-smi")))


def _driver() -> dict[str, Any]:
    """What the extension finds of CUDA."""
    return {} if cpu._C is None else cpu._C.cuda_info()


def _fix(name: str) -> str | None:
    """What to do to make the backend work here, as a command if possible; None of one that hfac does not bring."""
    if name not in _DETAILS:
        return None
    if _MADE_FOR.get(name) == "cuda" and not _has_gpu():
        return _NOTHING
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return f"{sys.executable} -m pip install triton"
        return "a GPU with a driver that Triton can find"
    if name == "cuda" and _driver().get("compiled"):
        if not _driver()["devices"]:
            return "an NVIDIA GPU and a driver for it that is no older than the CUDA runtime above"
        return _build("HFAC_CUDA=1 HFAC_CUDA_ARCHS=NN ") + "   (NN: the GPU's sm number, such as 90)"
    has_nvcc = shutil.which("nvcc") is not None or bool(os.environ.get("CUDA_HOME"))
    build = _build("HFAC_CUDA=1 " if name == "cuda" or has_nvcc and _has_gpu() else "")  # which builds both
    needs = []
    if not any(map(shutil.which, ((os.environ.get("CXX") or "g++").split()[0], "g++", "c++"))):
        needs.append("a C++17 compiler (Debian, Ubuntu: sudo apt-get install g++)")
    if name == "cuda" and not has_nvcc:
        needs.append("the CUDA toolkit, whose nvcc must be on the path or in CUDA_HOME")
    return f"install {' and '.join(needs)}, then {build}" if needs else build


def _build(environment: str) -> str:
    """The command that rebuilds the extension."""
    root = Path(hfac.__file__).parent.parent
    source = f'-e "{root}"' if (root / "setup.py").exists() else "SOURCE   (SOURCE: what hfac was installed from)"
    return f"{environment}{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir {source}"


def _reference_details() -> dict[str, Any]:
    return {"version": torch.__version__}


def _cpu_details() -> dict[str, Any]:
    if cpu._C is None:
        return _compiler_said()
    info = cpu._C.info()
    return {
        "version": info["version"],
        "compiler": info["compiler"],
        "instruction_set_in_use": info["isa"],
        "instruction_sets_compiled": info["isa_compiled"],
        "instruction_sets_of_this_processor": info["isa_usable"],
    }


def _compiler_said() -> dict[str, Any]:
    said = cpu.build_info().get("said")
    return {"the_compiler_said": said} if said else {}


def _cuda_details() -> dict[str, Any]:
    """What the extension reports about its CUDA kernels, compiled in or not."""
    info = _driver()
    if not info:
        return {}
    if not info["compiled"]:
        return {"extension": info["why_not"]} | _compiler_said()
    return {
        **({"compiled_for": info["architectures"]} if "architectures" in info else {}),
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
    driver = _driver()
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


def _xpu_devices() -> list[dict[str, str]]:
    if not hasattr(torch, "xpu") or not torch.xpu.is_available():
        return []
    return [{"device": f"xpu:{i}", "name": torch.xpu.get_device_name(i)} for i in range(torch.xpu.device_count())]


def _cuda_version(number: int) -> str:
    """12040 is 12.4; 0 is none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("\n", "\n      ")  # what a compiler said, below its name
