"""Compiles beforehand what a GPU machine would have to: `python -m bench.gpu_objects`, on any machine with nvcc.

All objects of `hfac._C` but the bindings, which belong to one version of Python, and the program of
`bench.device_driver` go into build/gpu-objects/, with a record of the sources and flags that each was made of. Take the
folder along to a machine with the same release of nvcc: `make gpu-report` finds it there, `setup.py` through
HFAC_CUDA_OBJECTS, and both compile anew whatever is not of the sources that they find.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench import device_driver

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "gpu-objects"
RECORD = "objects.json"
DRIVER = "driver"


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles; the exit status is 0, or 2 where there is no nvcc."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_objects", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="90", help="compute capability (default: 90, an H100 or H200)")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default: build/gpu-objects")
    parser.add_argument("--no-driver", action="store_true", help="without the program of bench.device_driver")
    args = parser.parse_args(argv)
    build = _setup()
    compiler, nvcc = _compilers(build)
    if nvcc is None:
        print("gpu-objects: no nvcc was found: install the CUDA toolkit, or set CUDA_HOME", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = {
        job[0]: (job, digest) for job in build.jobs(compiler, nvcc, args.arch) if (digest := build.digest(job, nvcc))
    }
    out = args.out.resolve()
    build.run([build.compile_step(job, out) for job, _ in jobs.values()], [], [], out, out)
    record = {"objects": {name: digest for name, (_, digest) in jobs.items()}, "commit": _commit()}
    if not args.no_driver:
        command = [sys.executable, "-m", "bench.device_driver", "--out", str(out / DRIVER), "--arch", args.arch]
        subprocess.run(command, cwd=ROOT, check=True)
        record[DRIVER] = _driver_digest(build, nvcc, args.arch)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{len(jobs)} objects for sm_{args.arch}{'' if args.no_driver else ' and the driver'}, {size:.1f} MB: {out}")
    return 0


def ready(folder: Path, arch: str) -> tuple[int, int, Path | None]:
    """(objects in the folder that are of these sources, objects that there could be, the driver if it is)."""
    build = _setup()
    compiler, nvcc = _compilers(build)
    if nvcc is None:
        return 0, 0, None
    digests = {job[0]: digest for job in build.jobs(compiler, nvcc, arch) if (digest := build.digest(job, nvcc))}
    found = build.ready_objects(str(folder))
    fresh = [name for name, digest in digests.items() if name in found and found[name][0] == digest]
    record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).exists() else {}
    driver = folder / DRIVER
    same = driver.exists() and record.get(DRIVER) == _driver_digest(build, nvcc, arch)
    return len(fresh), len(digests), driver if same else None


def _setup() -> ModuleType:
    """setup.py, which knows what the extension is made of."""
    spec = importlib.util.spec_from_file_location("hfac_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compilers(build: ModuleType) -> tuple[list[str], str | None]:
    return [shutil.which("g++") or shutil.which("c++") or "c++"], build.find_nvcc()


def host_driver() -> Path:
    """Where the driver with the emulated kernels belongs that is of these sources."""
    return FOLDER.parent / "gpu-dry-run" / f"driver-{_driver_digest(_setup(), None, 'host')[:16]}"


def _driver_digest(build: ModuleType, nvcc: str | None, arch: str) -> str:
    """Of the driver's sources, which lie beside the extension's, and of what compiles it."""
    emulation = sorted((ROOT / "csrc" / "emulation").iterdir())
    sources = [*emulation, *device_driver.DRIVER, ROOT / "bench" / "device_driver.py"]
    kind = "launchers.cu" if nvcc else "plan.cpp"
    return build.digest(("driver", ROOT / "csrc" / "cuda" / kind, [f"-arch={arch}"]), nvcc, sources)


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
