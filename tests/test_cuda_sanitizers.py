"""The CUDA kernels under sanitizers: clean as they are, and each of three injected faults is found.

csrc/emulation/driver.cpp makes a few steps of every op, with one std::thread per CUDA thread.
"""

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which("g++")
SOURCES = [
    *(f"cuda/{name}" for name in ("plan.cpp", "step.cpp", "launchers.cu", "hfac.cu", "dense.cu", "smmf.cu")),
    "emulation/emulation.cpp",
    "emulation/driver.cpp",
]
#: sanitizer -> (flags, exit status that says it found something, what it then prints)
SANITIZERS = {
    "thread": (["-fsanitize=thread"], 66, "data race"),
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], 1, "heap-buffer-overflow"),
    "none": ([], 3, "not finite"),
}

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.skipif(COMPILER is None, reason="no g++ here"),
]


class Drivers:
    """Drivers by sanitizer and fault. A fault is in the kernels of SMMF alone: only those are compiled again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def object(self, source: str, sanitizer: str, fault: str | None) -> Path:
        out = self.folder / f"{Path(source).stem}-{sanitizer}-{fault}.o"
        if not out.exists():
            flags = ["-std=c++20", "-O1", "-g", "-pthread", "-ffp-contract=off", "-Wno-unknown-pragmas"]
            flags.append("-DHFAC_FLOAT_OPERANDS")  # gradients are float here, and half as many kernels compile sooner
            flags += [*SANITIZERS[sanitizer][0], *([f"-DHFAC_FAULT_{fault}"] if fault else [])]
            command = [COMPILER, *flags, "-x", "c++", "-c", str(CSRC / source), "-o", str(out)]
            subprocess.run(command, check=True)
        return out

    def run(self, sanitizer: str, fault: str | None) -> subprocess.CompletedProcess:
        parts = [self.object(s, sanitizer, fault if s == "cuda/smmf.cu" else None) for s in SOURCES]
        program = self.folder / f"driver-{sanitizer}-{fault}"
        subprocess.run(
            [COMPILER, "-pthread", *SANITIZERS[sanitizer][0], *map(str, parts), "-o", str(program)], check=True
        )
        environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run([str(program)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    return Drivers(tmp_path_factory.mktemp("drivers"))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernels_are_clean(drivers, sanitizer):
    done = drivers.run(sanitizer, None)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.parametrize(
    ("fault", "sanitizer"), [("NO_BARRIER", "thread"), ("WORKSPACE", "address"), ("UNINITIALISED", "none")]
)
def test_a_fault_is_found(drivers, fault, sanitizer):
    done = drivers.run(sanitizer, fault)
    _, status, said = SANITIZERS[sanitizer]
    assert done.returncode == status, (done.returncode, done.stderr[:4000])
    assert said in done.stderr
