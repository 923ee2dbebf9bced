"""Builds tests/backends/device_driver.cpp, a program without torch that makes a few steps of every op on a GPU.

`python -m bench.device_driver --out driver` compiles the CUDA kernels and the program with nvcc for one architecture,
links the CUDA runtime statically, and so makes a file that runs wherever there is a driver. `--host` compiles the same
with g++, the kernels emulated. `--float` leaves out the kernels for 16-bit gradients: half the time to compile.

The program prints a line per op: its name, a checksum of the parameters and states, and "ok" or what is wrong. The
checksums of a GPU and of the host are the same. `--quick` takes fewer ops, `--once` does not run each a second time.
Exit status: 0; 1 an error of CUDA, 2 no GPU, 3 numbers that are not finite or other bits the second time.

Under compute-sanitizer, each as `compute-sanitizer --tool TOOL --error-exitcode 9 ./driver OPTIONS`:

    memcheck    --once           accesses outside of a buffer (each is an allocation of its own) and misaligned ones;
                                 with --leak-check full also what the program does not free
    racecheck   --quick --once   accesses to shared memory with no barrier between them
    synccheck   --quick --once   barriers that not every thread reaches
    initcheck   --quick --once   reads of memory that nobody wrote: also said by the driver itself, which fills the
                                 workspace with NaN, so that initcheck has nothing to say

They report only what this program does: it has no allocator but cudaMalloc.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The program, and what it includes beside csrc; then the sources of both builds, and of the host's.
DRIVER = tuple(ROOT / "tests" / "backends" / name for name in ("device_driver.cpp", "device_memory.h"))
KERNELS = ("smmf.cu", "hfac.cu", "hfac_int8.cu", "hfac_small.cu", "hfac_stats.cu", "dense.cu", "launchers.cu")
SOURCES = (
    *(ROOT / "csrc" / "cuda" / name for name in (*KERNELS, "step.cpp", "plan.cpp", "footprint.cpp", "tiling.cpp")),
    DRIVER[0],
)
HOST_SOURCES = (*SOURCES, ROOT / "csrc" / "emulation" / "emulation.cpp")
FLOAT = "-DHFAC_FLOAT_OPERANDS"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else from the path."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def host_command(flags: Sequence[str] = ()) -> list[str]:
    """What compiles a source for the host, and links."""
    return ["g++", "-std=c++20", "-O1", "-g1", "-pthread", "-ffp-contract=off", "-Wno-unknown-pragmas", *flags]


def device_command(nvcc: str, arch: str, flags: Sequence[str] = ()) -> list[str]:
    """What compiles a source for a GPU, with the flags of setup.py for what is computed, and links."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    exact = ["--fmad=false", "-Xcompiler=-ffp-contract=off"]
    return [nvcc, "-std=c++17", "-O3", "-lineinfo", *exact, target, "-cudart", "static", *flags]


def build(out: Path, command: Sequence[str], sources: Sequence[Path], language: str, jobs: int = 2) -> None:
    """Compiles ``sources`` as ``language`` and links them into ``out``. Raises CalledProcessError where that fails."""
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: Path) -> str:
            # the plan and the step have nothing for the device
            kind = language if source.suffix == ".cu" or source == DRIVER[0] else "c++"
            target = str(Path(folder) / f"{source.stem}.o")
            subprocess.run([*command, "-x", kind, "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compiled, sources))
        linked = out.with_name(f"{out.name}.{os.getpid()}")  # another process may be building the same
        subprocess.run([*command, *objects, "-o", str(linked)], check=True)
        linked.replace(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the program and returns the exit status: 2 where a compiler is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.device_driver", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the program")
    parser.add_argument("--arch", default="90", help="compute capability of the GPU (default: 90)")
    parser.add_argument("--host", action="store_true", help="the emulated kernels, for this machine's processor")
    parser.add_argument("--float", action="store_true", help="without the kernels for 16-bit gradients")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    args = parser.parse_args(argv)
    compiler = "g++" if args.host else find_nvcc()
    if compiler is None or shutil.which(compiler) is None:
        print(f"no {'g++' if args.host else 'nvcc'} was found: install it, or set CUDA_HOME", file=sys.stderr)
        return 2
    flags = [FLOAT] if args.float else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.host:
        build(args.out, host_command(flags), HOST_SOURCES, "c++", args.jobs)
    else:
        build(args.out, device_command(compiler, args.arch, flags), SOURCES, "cu", args.jobs)
    print(f"Written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
