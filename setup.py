"""Packages and their folders, and the extension hfac._C; everything else about the project stands in pyproject.toml.

`triton_kernels/` is installed as `hfac.triton_kernels` and never under its own name, which belongs to another project.

The extension links neither torch nor a CUDA driver. Where it cannot be built the install goes on without it and
hfac/_build_info.json says why (`hfac doctor` shows it). Switches, all environment variables:

    HFAC_NATIVE=0           do not build the extension
    HFAC_CUDA=0 | 1         leave the CUDA part out | fail where it cannot be built (default: built where nvcc is found)
    HFAC_CUDA_ARCHS=80;90   compute capabilities to compile for
    HFAC_EMULATION=1        build_ext makes hfac._emulated instead: the CUDA kernels for the host (make test-emulated)
    HFAC_DEBUG=1            -O1 -g and assertions
    HFAC_SANITIZE=address,undefined   with these sanitizers
    MAX_JOBS=2              compilers at a time (default: one per core)
    CXX, CXXFLAGS, LDFLAGS  as everywhere
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

#: csrc/cpu/kernels.cpp is compiled once per instruction set, each into the namespace of that name.
LEVELS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mf16c"]
    LEVELS["avx512"] = [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mf16c", "-mprefer-vector-width=512"]

#: All that knows pybind11.
BINDINGS = [CSRC / "bindings.cpp", *sorted((CSRC / "bindings").glob("*.cpp"))]

#: Results equal the reference's to the bit: no contraction to fused multiply-adds, no fast math. errno and traps are
#: nobody's business here, and without them loops with square roots become vectors.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def switch(name: str) -> str:
    return os.environ.get(name, "").strip()


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


EMULATION = switch("HFAC_EMULATION") == "1"
if switch("HFAC_CUDA") == "1" and find_nvcc() is None:
    sys.exit("HFAC_CUDA=1, but no nvcc was found: install the CUDA toolkit, set CUDA_HOME, or set HFAC_CUDA=0")


class BuildNative(build_ext):
    """Compiles through ninja where there is one; a failure is recorded, not raised."""

    def run(self) -> None:
        self.in_source = self.inplace or self.editable_mode  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        info = {"native": False, "why_not": None, "cuda": False, "cuda_why_not": None}
        target = Path(self.get_ext_fullpath(ext.name))
        stale = [target, ROOT / "hfac" / target.name] if self.in_source else [target]
        for old in stale:  # must not outlive a failure
            old.unlink(missing_ok=True)
        try:
            if switch("HFAC_NATIVE") == "0":
                info["why_not"] = "built with HFAC_NATIVE=0"
            else:
                info |= self.compile(target)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            info["why_not"] = explain(error)
            print(f"hfac: the extension was not built: {info['why_not']}", file=sys.stderr)
            if switch("HFAC_CUDA") == "1":
                raise
        folder = ROOT / "hfac" if self.in_source else Path(self.build_lib) / "hfac"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def compile(self, target: Path) -> dict:
        compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++")
        version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
        nvcc = find_nvcc() if switch("HFAC_CUDA") != "0" else None
        why_not = None if nvcc else "HFAC_CUDA=0" if switch("HFAC_CUDA") == "0" else "no nvcc was found"
        target.parent.mkdir(parents=True, exist_ok=True)
        if nvcc:
            try:
                self.make(compiler, nvcc, target)
            except subprocess.CalledProcessError as error:
                if switch("HFAC_CUDA") == "1":
                    raise
                nvcc, why_not = None, explain(error)
                print(f"hfac: going on without CUDA: {why_not}", file=sys.stderr)
        if not nvcc:
            self.make(compiler, None, target)
        return {"native": True, "cuda": bool(nvcc), "cuda_why_not": why_not, "compiler": version.splitlines()[0]}

    def make(self, compiler: list[str], nvcc: str | None, target: Path) -> None:
        import pybind11

        debug, sanitize = switch("HFAC_DEBUG") == "1", switch("HFAC_SANITIZE")
        sanitizers = (
            [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if sanitize else []
        )
        optimize = ["-O1", "-g", "-D_GLIBCXX_ASSERTIONS"] if debug or sanitize else ["-O3", "-DNDEBUG"]
        common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", *optimize, *EXACT, *sanitizers]
        if sanitize:
            common += [f'-DHFAC_SANITIZE="{sanitize}"', "-Wno-psabi"]
        common += shlex.split(os.environ.get("CXXFLAGS", ""))
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        binding = [*includes, f'-DHFAC_VERSION="{self.distribution.get_version()}"', "-DHFAC_WITH_CUDA" if nvcc else ""]

        # (object, source, command) of everything to compile
        kernels = CSRC / "cpu" / "kernels.cpp"
        jobs = []
        for level, flags in LEVELS.items():
            jobs.append((f"kernels_{level}", kernels, [*common, *flags, f"-DHFAC_LEVEL={level}"]))
        jobs += [(f.stem, f, common) for f in sorted((CSRC / "cpu").glob("*.cpp")) if f != kernels]
        plan = CSRC / "cuda" / "plan.cpp"  # needs no CUDA
        jobs += [("cuda_plan", plan, common)]
        jobs += [
            ("_".join(f.relative_to(CSRC).with_suffix("").parts), f, [*common, *filter(None, binding)])
            for f in BINDINGS
        ]
        jobs = [(name, source, [*compiler, *flags]) for name, source, flags in jobs]
        if nvcc:
            command = [nvcc, "-ccbin", compiler[0], *cuda_flags(nvcc, common)]
            jobs += [(f"cuda_{f.stem}", f, command) for f in sorted((CSRC / "cuda").glob("*.cu"))]
            jobs += [("cuda_step", CSRC / "cuda" / "step.cpp", [*compiler, *common])]

        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        steps = []
        for name, source, command in jobs:
            out = temp / f"{name}.o"
            files = ["-MD", "-MF", str(out.with_suffix(".d")), "-c", str(source), "-o", str(out)]
            steps.append(([*command, *files], source, out))
        objects = [str(out) for _, _, out in steps]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        ldflags = [*sanitizers, *shlex.split(os.environ.get("LDFLAGS", ""))]
        if nvcc:  # links the CUDA runtime statically: the import needs no driver
            ldflags = [f"-Xcompiler={flag}" for flag in ["-pthread", *ldflags]]
            link = [nvcc, "-ccbin", compiler[0], "-shared", "-cudart", "static", *objects, *ldflags]
        else:
            link = [*compiler, *shared, "-pthread", *objects, *ldflags]
        run(steps, [*link, "-o", str(target.resolve())], target.resolve(), temp)


class BuildEmulated(build_ext):
    """hfac._emulated alone, into hfac/: csrc/cuda as plain C++ with csrc/emulation in CUDA's place."""

    def run(self) -> None:
        self.inplace = False
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or "c++")
        flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", *EXACT]
        flags += ["-Wno-unknown-pragmas"]  # unroll
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-DHFAC_EMULATED"]
        temp = Path(self.build_temp).resolve() / "emulated"
        temp.mkdir(parents=True, exist_ok=True)
        steps = []
        for source in emulated_sources():
            out = temp / f"{source.stem}{source.suffix[1:]}.o"
            files = ["-MD", "-MF", str(out.with_suffix(".d")), "-x", "c++", "-c", str(source), "-o", str(out)]
            own = includes if source in BINDINGS else []
            steps.append(([*compiler, *flags, *own, *files], source, out))
        target = ROOT / "hfac" / Path(self.get_ext_fullpath(ext.name)).name
        objects = [str(out) for _, _, out in steps]
        run(steps, [*compiler, "-shared", "-pthread", *objects, "-o", str(target)], target, temp)


def emulated_sources() -> list[Path]:
    cuda = [f for f in sorted((CSRC / "cuda").glob("*.c*")) if f.suffix in (".cpp", ".cu") and f.stem != "device"]
    return [*(f for f in BINDINGS if f.stem != "cpu"), *cuda, CSRC / "emulation" / "emulation.cpp"]


def cuda_flags(nvcc: str, common: list[str]) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    asked = switch("HFAC_CUDA_ARCHS").replace(",", ";").replace(".", "").split(";")
    archs = [a.strip() for a in asked if a.strip()]
    archs = archs or [a for a in ("80", "90", "100") if f"sm_{a}" in known]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # for what comes after
    names = ",".join([*(f"sm_{a}" for a in archs), f"compute_{archs[-1]}"])
    codes += [f'-DHFAC_ARCHITECTURES="{names}"']  # so that a GPU which none of them serves is known as such
    host = [flag for flag in common if not flag.startswith(("-std", "-O"))]
    return ["-std=c++17", "-O3", "--fmad=false", *codes, *(f"-Xcompiler={flag}" for flag in host)]


def run(steps: list, link: list[str], target: Path, temp: Path) -> None:
    """Every step, then the link; through ninja, which skips what is up to date, or one after the other."""
    ninja = shutil.which("ninja")
    if ninja is None:
        try:
            import ninja as package

            ninja = str(Path(package.BIN_DIR) / "ninja")
        except ImportError:
            for command, _, _ in steps:
                subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
            subprocess.run(link, check=True, stderr=subprocess.PIPE, text=True)
            return

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule run", "  command = $cmd", "  depfile = $dep", "  deps = gcc", "rule link", "  command = $cmd"]
    for command, source, out in steps:
        lines += [f"build {path(out)}: run {path(source)}", f"  dep = {out.with_suffix('.d')}"]
        lines += ["  cmd = " + shlex.join(command).replace("$", "$$")]
    lines += [f"build {path(target)}: link {' '.join(path(out) for _, _, out in steps)}"]
    lines += ["  cmd = " + shlex.join(link).replace("$", "$$")]
    (temp / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = switch("MAX_JOBS") or str(os.cpu_count() or 1)
    subprocess.run([ninja, "-j", jobs, "-C", str(temp)], check=True, stdout=subprocess.PIPE, text=True)


def explain(error: Exception) -> str:
    """One line, and of a compiler's output what it calls an error."""
    if isinstance(error, subprocess.CalledProcessError):
        output = ((error.stdout or "") + (error.stderr or "")).splitlines()
        found = [line for line in output if "error" in line.lower()] or output[-1:]
        return f"{Path(error.cmd[0]).name} failed: {' '.join(found[:1]).strip()}"
    if isinstance(error, FileNotFoundError):
        return f"no C++ compiler: {error.filename} was not found"
    return str(error)


setup(
    packages=[
        "hfac",
        "hfac.backends",
        "hfac.cli",
        "hfac.convert",
        "hfac.distributed",
        "hfac.ops",
        "hfac.optim",
        "hfac.triton_kernels",
    ],
    package_dir={"hfac": "hfac", "hfac.triton_kernels": "triton_kernels"},
    package_data={"hfac": ["py.typed"]},
    ext_modules=[Extension("hfac._emulated" if EMULATION else "hfac._C", sources=[], optional=not EMULATION)],
    cmdclass={"build_ext": BuildEmulated if EMULATION else BuildNative},
)
