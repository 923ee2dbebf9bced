"""Packages and their folders, and the extension hfac._C; everything else about the project stands in pyproject.toml.

`triton_kernels/` is installed as `hfac.triton_kernels` and never under its own name, which belongs to another project.

The extension links neither torch nor a CUDA driver. Where it cannot be built the install goes on without it,
hfac/_build_info.json says why (`hfac doctor` shows it), and a wheel has the tag of pure Python. Switches, all
environment variables:

    HFAC_NATIVE=0 | 1       do not build the extension | fail where it cannot be built
    HFAC_CUDA=0 | 1         leave the CUDA part out | fail where it cannot be built (default: built where nvcc is found)
    HFAC_CUDA_ARCHS=80;90   compute capabilities to compile for (default: this machine's GPU; without one 90)
    HFAC_CUDA_OBJECTS=DIR   link what `python -m bench.gpu_objects` compiled into DIR, if sources and flags are the same
    HFAC_EMULATION=1        build_ext makes hfac._emulated instead: the CUDA kernels for the host (make test-emulated)
    HFAC_DEBUG=1            -O1 -g and assertions
    HFAC_SANITIZE=address,undefined   with these sanitizers
    MAX_JOBS=2              compilers at a time (default: one per core)
    CXX, CXXFLAGS, LDFLAGS  as everywhere
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # an older setuptools, which can build the extension in place and nothing else
    bdist_wheel = None

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


#: The first setuptools that reads the license of pyproject.toml; older ones end with an error there.
NEEDED_SETUPTOOLS = 77


class Distribution(setuptools.Distribution):
    """Reads pyproject.toml only where setuptools understands it: build_ext needs nothing of it, an install does."""

    def __init__(self, attrs=None) -> None:
        super().__init__(attrs)
        self.verbose = 0  # not a line for each file that is copied: what compiles would be lost among them

    def parse_config_files(self, filenames=None, **options) -> None:
        if int(setuptools.__version__.split(".")[0]) < NEEDED_SETUPTOOLS:
            filenames = []
            if "build_ext" not in self.script_args:
                sys.exit(
                    f"hfac needs setuptools {NEEDED_SETUPTOOLS} or later to be installed or packaged, this is "
                    f"{setuptools.__version__}: run python -m pip install -U setuptools. With an older one "
                    "`python setup.py build_ext --inplace` builds the extension in a checkout."
                )
        super().parse_config_files(filenames, **options)


if not CSRC.is_dir():
    sys.exit(f"{ROOT} has no folder csrc/, which the extension is built from: take a whole checkout or sdist of hfac")
EMULATION = switch("HFAC_EMULATION") == "1"
if switch("HFAC_CUDA") == "1" and find_nvcc() is None:
    sys.exit("HFAC_CUDA=1, but no nvcc was found: install the CUDA toolkit, set CUDA_HOME, or set HFAC_CUDA=0")


class BuildNative(build_ext):
    """Compiles through ninja where there is one; a failure is recorded, and raised only where a switch says so."""

    def run(self) -> None:
        self.in_source = self.inplace or self.editable_mode  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        info = {"native": False, "why_not": None, "cuda": False, "cuda_why_not": None, "said": None}
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
            info |= {"why_not": explain(error), "said": said_by(error)}
            print(f"hfac: the extension was not built: {info['why_not']}\n{info['said']}", file=sys.stderr)
            if switch("HFAC_CUDA") == "1" or switch("HFAC_NATIVE") == "1":
                raise
        self.distribution.is_native = info["native"]
        folder = ROOT / "hfac" if self.in_source else Path(self.build_lib) / "hfac"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def compile(self, target: Path) -> dict:
        compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++")
        version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
        nvcc = find_nvcc() if switch("HFAC_CUDA") != "0" else None
        why_not = None if nvcc else "HFAC_CUDA=0" if switch("HFAC_CUDA") == "0" else "no nvcc was found"
        said = None
        target.parent.mkdir(parents=True, exist_ok=True)
        if nvcc:
            try:
                self.make(compiler, nvcc, target)
            except subprocess.CalledProcessError as error:
                if switch("HFAC_CUDA") == "1":
                    raise
                nvcc, why_not, said = None, explain(error), said_by(error)
                print(f"hfac: going on without CUDA: {why_not}\n{said}", file=sys.stderr)
        if not nvcc:
            self.make(compiler, None, target)
        built = {"native": True, "cuda": bool(nvcc), "cuda_why_not": why_not, "said": said}
        return built | {"compiler": version.splitlines()[0]}

    def make(self, compiler: list[str], nvcc: str | None, target: Path) -> None:
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        ready = ready_objects(switch("HFAC_CUDA_OBJECTS"))
        steps, objects = [], []
        for job in jobs(compiler, nvcc):
            known, path = ready.get(job[0], (None, None))
            if known is not None and known == digest(job, nvcc):
                objects.append(str(path))
            else:
                steps.append(compile_step(job, temp))
                objects.append(str(steps[-1][-1]))
        if ready:
            print(f"hfac: {len(objects) - len(steps)} of {len(objects)} objects were compiled before", flush=True)
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        ldflags = [*sanitizers(), *shlex.split(os.environ.get("LDFLAGS", ""))]
        if nvcc:  # links the CUDA runtime statically: the import needs no driver
            ldflags = [f"-Xcompiler={flag}" for flag in ["-pthread", *ldflags]]
            link = [nvcc, "-ccbin", compiler[0], "-shared", "-cudart", "static", *objects, *ldflags]
        else:
            link = [*compiler, *shared, "-pthread", *objects, *ldflags]
        run(steps, [*link, "-o", str(target.resolve())], objects, target.resolve(), temp)


class Wheel(bdist_wheel or setuptools.Command):
    """Says by its tag whether it has the extension: without it, it serves every Python and platform."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True
        if not getattr(self.distribution, "is_native", True):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


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
        try:
            run(steps, [*compiler, "-shared", "-pthread", *objects, "-o", str(target)], objects, target, temp)
        except subprocess.CalledProcessError as error:
            print(said_by(error), file=sys.stderr)
            raise


def emulated_sources() -> list[Path]:
    cuda = [f for f in sorted((CSRC / "cuda").glob("*.c*")) if f.suffix in (".cpp", ".cu") and f.stem != "device"]
    return [*(f for f in BINDINGS if f.stem != "cpu"), *cuda, CSRC / "emulation" / "emulation.cpp"]


def sanitizers() -> list[str]:
    asked = switch("HFAC_SANITIZE")
    return [f"-fsanitize={asked}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if asked else []


def jobs(compiler: list[str], nvcc: str | None, archs: str | None = None) -> list[tuple[str, Path, list[str]]]:
    """(object, source, command) of everything that hfac._C consists of; ``archs`` in place of HFAC_CUDA_ARCHS."""
    import pybind11

    sanitize = switch("HFAC_SANITIZE")
    debug = switch("HFAC_DEBUG") == "1" or sanitize
    optimize = ["-O1", "-g", "-D_GLIBCXX_ASSERTIONS"] if debug else ["-O3", "-DNDEBUG"]
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", *optimize, *EXACT, *sanitizers()]
    if sanitize:
        common += [f'-DHFAC_SANITIZE="{sanitize}"', "-Wno-psabi"]
    common += shlex.split(os.environ.get("CXXFLAGS", ""))
    version = re.search(r'"(.+)"', (ROOT / "hfac" / "_version.py").read_text())[1]
    binding = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", f'-DHFAC_VERSION="{version}"']
    binding += ["-DHFAC_WITH_CUDA"] if nvcc else []

    kernels = CSRC / "cpu" / "kernels.cpp"
    found = []
    for level, flags in LEVELS.items():
        found.append((f"kernels_{level}", kernels, [*common, *flags, f"-DHFAC_LEVEL={level}"]))
    found += [(f.stem, f, common) for f in sorted((CSRC / "cpu").glob("*.cpp")) if f != kernels]
    planning = ("footprint", "plan", "tiling")  # need no CUDA
    found += [(f"cuda_{name}", CSRC / "cuda" / f"{name}.cpp", common) for name in planning]
    found += [("_".join(f.relative_to(CSRC).with_suffix("").parts), f, [*common, *binding]) for f in BINDINGS]
    found = [(name, source, [*compiler, *flags]) for name, source, flags in found]
    if nvcc:
        command = [nvcc, "-ccbin", compiler[0], *cuda_flags(nvcc, common, archs)]
        found += [(f"cuda_{f.stem}", f, command) for f in sorted((CSRC / "cuda").glob("*.cu"))]
        found += [("cuda_step", CSRC / "cuda" / "step.cpp", [*compiler, *common])]
    return found


def compile_step(job: tuple[str, Path, list[str]], folder: Path) -> tuple[list[str], Path, Path]:
    """(whole command, source, object file) of a job whose object goes into the folder."""
    name, source, command = job
    out = folder / f"{name}.o"
    files = ["-MD", "-MF", str(out.with_suffix(".d")), "-c", str(source), "-o", str(out)]
    return [*command, *files], source, out


def digest(job: tuple[str, Path, list[str]], nvcc: str | None, more: Iterable[Path] = ()) -> str | None:
    """Of all that decides what an object holds: everything in csrc that may be included, ``more`` files, flags, nvcc's
    release; not where compilers and checkout lie. None where the object is of one Python: it is compiled where it is
    used."""
    _, source, command = job
    if source in BINDINGS:
        return None
    files = sorted(f for part in ("ops.h", "common/**/*", "cpu/*", "cuda/*") for f in CSRC.glob(part) if f.is_file())
    parts = [source.relative_to(CSRC).as_posix(), *(flag for flag in command if flag.startswith("-"))]
    if source.suffix == ".cu":
        said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        parts += re.findall(r"release (\S+)", said)
    whole = hashlib.sha256("\0".join(parts).encode())
    for file in (*files, *more):
        whole.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()


def ready_objects(folder: str) -> dict[str, tuple[str, Path]]:
    """Object -> (its digest, its file) of those in a folder; nothing where there is no folder or no record in it."""
    try:
        record = json.loads((Path(folder) / "objects.json").read_text()) if folder else {}
    except FileNotFoundError:
        record = {}
    return {
        name: (found, Path(folder).resolve() / f"{name}.o")
        for name, found in record.get("objects", {}).items()
        if (Path(folder) / f"{name}.o").exists()
    }


def cuda_flags(nvcc: str, common: list[str], wanted: str | None = None) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    asked = (wanted or switch("HFAC_CUDA_ARCHS")).replace(",", ";").replace(".", "").split(";")
    archs = [a.strip() for a in asked if a.strip()]
    archs = archs or [a for a in gpus_here() if f"sm_{a}" in known] or ["90"]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # for what comes after
    names = ",".join([*(f"sm_{a}" for a in archs), f"compute_{archs[-1]}"])
    codes += [f'-DHFAC_ARCHITECTURES="{names}"']  # so that a GPU which none of them serves is known as such
    host = [flag for flag in common if not flag.startswith(("-std", "-O"))]
    return ["-std=c++17", "-O3", "--fmad=false", *codes, *(f"-Xcompiler={flag}" for flag in host)]


def gpus_here() -> list[str]:
    """Compute capabilities of this machine's GPUs, ascending; none where there is no driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = {line.strip().replace(".", "") for line in said.splitlines()}
    return sorted((capability for capability in found if capability.isdecimal()), key=int)


def run(steps: list, link: list[str], objects: list[str], target: Path, temp: Path) -> None:
    """Every step, then the link, where there is one; through ninja, which skips what is up to date, or in order."""
    ninja = shutil.which("ninja")
    if ninja is None:
        try:
            import ninja as package

            ninja = str(Path(package.BIN_DIR) / "ninja")
        except ImportError:
            for done, (command, source, _) in enumerate(steps):
                print(f"hfac: [{done + 1}/{len(steps)}] {source.name}", flush=True)
                subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
            if link:
                subprocess.run(link, check=True, stderr=subprocess.PIPE, text=True)
            return

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule run", "  command = $cmd", "  depfile = $dep", "  deps = gcc"]
    lines += ["  description = $what", "rule link", "  command = $cmd", "  description = $what"]
    for command, source, out in steps:
        lines += [f"build {path(out)}: run {path(source)}", f"  dep = {out.with_suffix('.d')}"]
        lines += [f"  what = {out.stem}"]
        lines += ["  cmd = " + shlex.join(command).replace("$", "$$")]
    if link:
        lines += [f"build {path(target)}: link {' '.join(path(Path(each)) for each in objects)}"]
        lines += [f"  what = {target.name}", "  cmd = " + shlex.join(link).replace("$", "$$")]
    (temp / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = switch("MAX_JOBS") or str(os.cpu_count() or 1)
    told([ninja, "-j", jobs, "-C", str(temp)])


def told(command: list[str]) -> None:
    """Runs a command and passes on each line of its output at once; a failure holds them all."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("["):  # ninja's [done/all]; what compilers say follows a failure
                print(f"hfac: {line}", end="", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, "".join(lines))


def explain(error: Exception) -> str:
    """One line, and of a compiler's output what it calls an error."""
    if isinstance(error, subprocess.CalledProcessError):
        output = ((error.stdout or "") + (error.stderr or "")).splitlines()
        found = [line for line in output if "error" in line.lower()] or output[-1:]
        return f"{Path(error.cmd[0]).name} failed: {' '.join(found[:1]).strip()}"
    if isinstance(error, FileNotFoundError):
        return f"no C++ compiler: {error.filename} was not found"
    return str(error)


def said_by(error: Exception) -> str | None:
    """The last lines that a compiler printed."""
    if not isinstance(error, subprocess.CalledProcessError):
        return None
    return "\n".join(((error.stdout or "") + (error.stderr or "")).splitlines()[-40:])


if __name__ == "__main__":  # bench/gpu_objects.py imports this file
    setup(
        packages=[
            "hfac",
            "hfac.backends",
            "hfac.cli",
            "hfac.convert",
            "hfac.distributed",
            "hfac.ops",
            "hfac.optim",
            "hfac.reference",
            "hfac.triton_kernels",
        ],
        package_dir={"hfac": "hfac", "hfac.triton_kernels": "triton_kernels"},
        package_data={"hfac": ["py.typed"]},
        ext_modules=[Extension("hfac._emulated" if EMULATION else "hfac._C", sources=[], optional=not EMULATION)],
        distclass=Distribution,
        cmdclass={"build_ext": BuildEmulated if EMULATION else BuildNative, "bdist_wheel": Wheel},
    )
