"""Compiled CUDA code as it lies in a cubin: kernels with their registers, shared memory, arguments and instructions."""

import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .cuda_check import ROOT, find_cuobjdump

#: where compiled code and what was found out about it is kept, so that a second run takes seconds
CACHE = ROOT / "build" / "launch-plan"
#: of a listing: names of kernels and instructions, without their encoding
_KEPT = re.compile(r"Function : \S+|/\*[0-9a-f]{4,}\*/\s+[^;\n]*;")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


@dataclass(frozen=True)
class Code:
    """One kernel of a cubin.

    Attributes:
        symbol: its mangled name.
        registers: of one thread.
        shared: bytes of static shared memory of a block.
        constants: bytes of constant bank 0, whose end are the kernel's arguments; 0 where that is not known.
        text: its instructions as ``cuobjdump -sass`` writes them.
    """

    symbol: str
    registers: int
    shared: int
    constants: int
    text: str

    @property
    def lines(self) -> list[tuple[int, str]]:
        """Address and text of each instruction."""
        return [(int(at, 16), text) for at, text in _LINE.findall(self.text)]


def sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file by their names; of those that hold nothing as many zeros."""
    (at,) = struct.unpack_from("<Q", elf, 40)
    each, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, at + k * each) for k in range(count)]
    strings = headers[names][4]
    out = {}
    for name, kind, _, _, offset, size, *_ in headers:
        begin = strings + name
        empty = kind == 8  # SHT_NOBITS: shared memory, for one
        out[elf[begin : elf.index(b"\0", begin)].decode()] = bytes(size) if empty else elf[offset : offset + size]
    return out


def register_counts(of: dict[str, bytes]) -> dict[str, int]:
    """Registers of a thread of each kernel, by its symbol, from a cubin's sections."""
    info, symbols, strings, out, at = of[".nv.info"], of[".symtab"], of[".strtab"], {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if form == 4 and attribute == 0x2F:  # EIFMT_SVAL, EIATTR_REGCOUNT
            symbol, registers = struct.unpack_from("<II", info, at + 4)
            (name,) = struct.unpack_from("<I", symbols, symbol * 24)
            out[strings[name : strings.index(b"\0", name)].decode()] = registers
        at += 4 + (size if form == 4 else 0)
    return out


def codes(elf: bytes, listing: str) -> list[Code]:
    """The kernels of a cubin and of its listing by ``cuobjdump -sass``."""
    found = sections(elf)
    registers = register_counts(found)
    out = []
    for part in listing.split("Function : ")[1:]:
        symbol = part.split(None, 1)[0]
        shared, constants = (len(found.get(f".nv.{what}.{symbol}", b"")) for what in ("shared", "constant0"))
        out.append(Code(symbol, registers[symbol], shared, constants, part))
    return out


def tools() -> tuple[str, str]:
    """nvcc and cuobjdump.

    Raises:
        SystemExit: one of them is missing.
    """
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None:
        raise SystemExit("required is nvcc, to compile csrc/cuda; install the CUDA toolkit (no GPU is needed)")
    if cuobjdump is None:
        raise SystemExit("required is cuobjdump; install the CUDA toolkit's, or triton, whose wheel has it")
    return nvcc, cuobjdump


@cache
def _digest_of_sources(source: Path) -> str:
    """Of a source and of all that stands beside the sources of kernels, which it may include."""
    found = hashlib.sha256(source.read_bytes())
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        if path.suffix in (".h", ".cuh"):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()


def compiled(source: Path, arch: str, flags: Sequence[str] = ()) -> list[Code]:
    """The kernels of a source, compiled for ``sm_<arch>``, from the cache where it has been compiled before."""
    nvcc, cuobjdump = tools()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    of = "\n".join([_digest_of_sources(source), arch, version, *flags])
    target = CACHE / f"{source.stem}-{arch}-{hashlib.sha256(of.encode()).hexdigest()[:16]}.cubin"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{source.stem}-{arch}-*"):
            old.unlink()
        partial = target.with_suffix(".partial")
        command = [nvcc, "-std=c++17", "-O3", "--fmad=false", f"-gencode=arch=compute_{arch},code=sm_{arch}", *flags]
        command += ["-diag-suppress", "177", "-cubin", "-o", str(partial), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"nvcc failed on {source.name} for sm_{arch}: {done.stderr.strip().splitlines()[-1]}")
        dump = subprocess.run([cuobjdump, "-sass", str(partial)], capture_output=True, text=True, check=True)
        target.with_suffix(".sass").write_text("\n".join(_KEPT.findall(dump.stdout)))
        partial.rename(target)
    return codes(target.read_bytes(), target.with_suffix(".sass").read_text())
