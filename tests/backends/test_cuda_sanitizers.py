"""The program of `bench.device_driver`: clean under sanitizers with the kernels emulated, and compiled for a GPU.

device_driver.cpp makes a few steps of every op: for ThreadSanitizer with one std::thread per CUDA thread, else
with fibers. What it must find is injected on purpose by the emulation or the driver, never by the kernels.
"""

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

from bench import device_driver, gpu_objects

#: sanitizer -> (flags, options, exit status that says it found something, what it then prints)
SANITIZERS = {
    # A thread for each of CUDA's takes minutes: one of the steps that differ in types and options alone.
    "thread": (["-fsanitize=thread"], ["--quick", "--once"], 66, "data race"),
    # Optimized, what these check at every access takes four times as long to compile, and runs in seconds either way.
    "address": (
        ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["--fibers"],
        1,
        "heap-buffer-overflow",
    ),
    "none": ([], ["--fibers"], 3, "not finite"),
}
#: Seconds after which a driver hangs: a loaded machine takes minutes for a program with hundreds of threads.
HANGS = 3600

NVCC = device_driver.find_nvcc()
on_the_host = pytest.mark.skipif(
    emulated.native is None or shutil.which("g++") is None,
    reason=emulated.WHY_NOT if emulated.native is None else "no g++ here",
)


class Drivers:
    """One driver per sanitizer, built when it is first asked for, by whichever process of pytest-xdist that is. That
    without a sanitizer is the one that dry runs of `bench.gpu_report` keep in build/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, sanitizer: str, *options: str) -> subprocess.CompletedProcess:
        import fcntl

        program = gpu_objects.host_driver() if sanitizer == "none" else self.folder / f"driver-{sanitizer}"
        with open(self.folder / f"{sanitizer}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not program.exists():
                program.parent.mkdir(parents=True, exist_ok=True)
                # Gradients are float here, and half as many kernels compile sooner.
                flags = [device_driver.FLOAT, *SANITIZERS[sanitizer][0]]
                device_driver.build(program, device_driver.host_command(flags), device_driver.HOST_SOURCES, "c++")
        environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
        command = [str(program), *SANITIZERS[sanitizer][1], *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, env=environment)


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "drivers"
    folder.mkdir(exist_ok=True)
    return Drivers(folder)


@on_the_host
@pytest.mark.parametrize(
    "sanitizer",
    [
        pytest.param("none", marks=pytest.mark.slow),
        "address",  # a minute, most of it compiling
        "thread",  # a thread for each of CUDA's: two
    ],
)
def test_the_kernels_are_clean(drivers, sanitizer):
    done = drivers.run(sanitizer)
    assert done.returncode == 0, done.stderr[:4000] + done.stdout
    assert all(line.endswith(" ok") for line in done.stdout.splitlines()), done.stdout
    assert len(done.stdout.splitlines()) >= (13 if "--quick" in SANITIZERS[sanitizer][1] else 22)


@pytest.mark.slow
@on_the_host
def test_a_quick_run_makes_a_part_of_the_same_steps(drivers):
    whole, quick = (drivers.run("none", *options).stdout.splitlines() for options in ([], ["--quick", "--once"]))
    assert 0 < len(quick) < len(whole) and set(quick) < set(whole)


@on_the_host
@pytest.mark.parametrize(
    ("fault", "sanitizer"),
    [
        ("barrier", "thread"),
        ("workspace", "address"),
        ("signs", "address"),
        pytest.param("block", "none", marks=pytest.mark.slow),
        pytest.param("wait", "none", marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_found(drivers, fault, sanitizer):
    """A block's first barrier left out; a workspace 4 bytes too small; the 4-byte word around the last byte of signs,
    where it is not all theirs; a block that never runs, so that nobody writes its partial sums; waits for asynchronous
    copies."""
    done = drivers.run(sanitizer, "--fault", fault)
    _, _, status, said = SANITIZERS[sanitizer]
    assert done.returncode == status, (done.returncode, done.stderr[:4000])
    assert said in done.stderr + done.stdout


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("source", [pytest.param("device_driver.cpp", marks=pytest.mark.slow), "launchers.cu"])
def test_it_compiles_for_a_gpu(source, tmp_path):
    """What differs from the host's build: the driver with its memory, and the launches."""
    target = tmp_path / "out.o"
    command = device_driver.device_command(NVCC, "90", [device_driver.FLOAT, "-Werror=all-warnings"])
    path = next(str(path) for path in device_driver.SOURCES if path.name == source)
    done = subprocess.run([*command, "-x", "cu", "-c", path, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    assert b"cuda" in target.read_bytes()


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("source", [name for name in device_driver.KERNELS if name != "launchers.cu"])
def test_nvcc_takes_the_kernels(source, tmp_path):
    """Not optimized, in seconds, and no machine code: `make cuda-check` makes that, in minutes."""
    target = tmp_path / "out.ptx"
    command = [NVCC, "-std=c++17", "-G", "--fmad=false", "-arch=compute_90", "-ptx"]
    path = device_driver.ROOT / "csrc" / "cuda" / source
    done = subprocess.run([*command, str(path), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    assert ".entry" in target.read_text()
