"""Builds the sdist, and from it a wheel for each Python, into dist/; steps with each wheel where there is no compiler.

A wheel holds the kernels of all instruction sets and, where nvcc is here, of the GPUs asked for. auditwheel finds the
oldest glibc that it runs with and puts it into the wheel's name: 2.35 with GCC 12 on Debian 12. The C++ library inside
the wheel (-static-libstdc++) would demand glibc 2.36 there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: what is run with an installed wheel: one step of both optimizers with the kernels that it brings
STEP = """
import torch, hfac
from hfac.backends import cpu
assert ".venv" not in hfac.__file__ and cpu.why_not(torch.device("cpu")) is None, (hfac.__file__, cpu.build_info())
for optimizer in (hfac.HFac, hfac.SMMF):
    param = torch.nn.Parameter(torch.ones(64, 48))
    param.grad = torch.ones(64, 48)
    optimizer([param], lr=0.5, backend="cpu").step()
    assert (param < 1).all()
print("both optimizers have stepped on", torch.__version__)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make wheels ARGS=...", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the files (default: dist)")
    parser.add_argument("--archs", default="80;90;100", help="GPUs to compile for (default: 80;90;100)")
    parser.add_argument(
        "--pythons",
        type=lambda path: str(Path(path).absolute()),
        nargs="+",
        default=[sys.executable],
        help="interpreters that have torch, setuptools and pybind11 (default: this one)",
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {"HFAC_CUDA_ARCHS": args.archs, "HFAC_NATIVE": "1"} | compiled_before(args.archs)
    with tempfile.TemporaryDirectory() as folder:
        source = unpacked(sdist(args.out), Path(folder))
        for python in args.pythons:
            built = wheel(source, Path(folder) / "built", python, environment)
            shutil.copy(named_for_its_glibc(built, Path(folder)), args.out)
            said = stepped(built, python, Path(folder) / "empty")
            print(f"{built.name}: {built.stat().st_size / 1e6:.1f} MB; {said}", flush=True)
    return 0


def compiled_before(archs: str) -> dict[str, str]:
    """Compiles once what is the same for every Python, and a second run of this takes as it is; the variable that tells
    setup.py where. Nothing where no CUDA kernels are built, which are most of the time."""
    if os.environ.get("HFAC_CUDA") == "0" or not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
        return {}
    out = ROOT / "build" / "wheel-objects"
    command = [sys.executable, "-m", "bench.gpu_objects", "--arch", archs, "--no-driver", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return {"HFAC_CUDA_OBJECTS": str(out)}


def sdist(out: Path, source: Path = ROOT) -> Path:
    """The sdist of a tree, in a folder."""
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(out)]
    subprocess.run(command, cwd=source, check=True, stderr=subprocess.PIPE, text=True)
    return newest(out, "*.tar.gz")


def unpacked(archive: Path, folder: Path) -> Path:
    """The folder that an sdist holds."""
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


def wheel(source: Path, out: Path, python: str = sys.executable, environment: dict[str, str] | None = None) -> Path:
    """The wheel of a tree, built with what is installed beside ``python``'s setuptools."""
    with tempfile.TemporaryDirectory() as work:
        base, tags = Path(work), ["--bdist-dir", f"{work}/wheel", "--dist-dir", str(out)]
        command = [python, "setup.py", "-q", "build", "--build-base", str(base / "build"), "bdist_wheel", *tags]
        subprocess.run(
            command,
            cwd=source,
            env=os.environ | (environment or {}),
            check=True,
        )
    return newest(out, "*.whl")


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def named_for_its_glibc(built: Path, folder: Path) -> Path:
    """The wheel with auditwheel's tag in its name, where auditwheel is installed; else the wheel as it is."""
    if shutil.which("auditwheel") is None:
        print("auditwheel is not installed: the wheel keeps the tag of this machine alone", flush=True)
        return built
    out = folder / "tagged"
    subprocess.run(["auditwheel", "repair", "--wheel-dir", str(out), str(built)], check=True)
    return newest(out, "*.whl")


def stepped(built: Path, python: str, folder: Path) -> str:
    """What `STEP` prints in a new environment that has the wheel, and torch where this one has it; no PATH."""
    subprocess.run([python, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    place = next((folder / "lib").glob("python*")) / "site-packages"
    shutil.unpack_archive(built, place, format="zip")
    torch = subprocess.run(
        [python, "-c", "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    said = subprocess.run(
        [
            str(folder / "bin" / "python"),
            "-W",
            "error::UserWarning",
            "-W",  # where numpy is not installed, torch warns of it, and hfac does not need it
            "ignore:Failed to initialize NumPy:UserWarning",
            "-c",
            f"import sys; sys.path.append({torch!r})\n{STEP}",
        ],
        cwd=folder,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    if said.returncode:
        sys.exit(f"{built.name} does not work where it is installed:\n{said.stdout}{said.stderr}")
    return said.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
