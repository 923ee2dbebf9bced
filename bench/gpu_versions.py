"""What is here: the GPU, its driver, and the version of everything that takes part: `python -m bench.gpu_versions`.

Exit status 2: there is no GPU that torch can use.
"""

import argparse
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_child

NO_GPU = 2
PACKAGES = ("triton", "numpy", "setuptools", "pytest", "pytest-xdist", "hypothesis", "pybind11", "ninja")
TOOLS = {"nvcc": "--version", "ncu": "--version", "compute-sanitizer": "--version", "g++": "--version"}


def rows() -> Iterator[dict[str, Any]]:
    """{"what", "version"} of each, the GPU first."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        yield {"what": "GPU", "version": torch.cuda.get_device_name(0)}
        yield {"what": "capability", "version": "".join(map(str, torch.cuda.get_device_capability(0)))}
        yield {"what": "memory", "version": f"{properties.total_memory / 2**30:.1f} GiB"}
        yield {"what": "multiprocessors", "version": str(properties.multi_processor_count)}
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    yield {
        "what": "driver, clocks of SMs and memory, their limits, power",
        "version": _said(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]),
    }
    yield {"what": "Python", "version": platform.python_version()}
    yield {"what": "torch", "version": f"{torch.__version__}, CUDA {torch.version.cuda}"}
    for package in PACKAGES:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        yield {"what": package, "version": found}
    for tool, option in TOOLS.items():
        said = _said([tool, option])
        version = re.search(r"release \S+|\d+\.\d+\.\d\S*", said)
        yield {"what": tool, "version": version[0].rstrip(",).") if version else said}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints them."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_versions", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, help="file to which a line of JSON is added for each")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"there is no GPU that torch {torch.__version__} can use here")
        return NO_GPU
    found = list(rows())
    gpu_child.add(args.rows, found)
    for row in found:
        print(f"{row['what']}: {row['version']}")
    print("; ".join(row["version"] for row in found if row["what"] in ("GPU", "memory", "torch")))
    return 0


def _said(command: list[str]) -> str:
    """The output of a tool in one line, or why there is none."""
    if shutil.which(command[0]) is None:
        return "not on the path"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return " ".join((done.stdout or done.stderr).split())


if __name__ == "__main__":
    sys.exit(main())
