"""What the compiler made of the CUDA kernels, without a GPU: registers, spills, and the width of memory accesses.

`python -m bench.cuda_check` compiles csrc/cuda for each architecture (`--arch`), reads ptxas' report, the machine code
(cuobjdump, from the CUDA toolkit or from triton's wheel) and the PTX, and writes a table to docs/cuda-check.md. Exit
status 1: a bulk kernel spills, uses local memory, has no 16-byte accesses, or more registers than its bound; or a
kernel adds floats atomically, other than for what a watched step tells (H-Fac's folds: counts, exact in any order). 2:
a tool is missing.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("smmf", "hfac", "hfac_int8", "hfac_small", "hfac_stats", "dense", "step_counts")
ARCHS = ("80", "90", "100")
#: kernel -> the registers that its number of threads leaves; kernels with no entry are bound by the architecture's 255,
#: among them the statistics of long rows, of which a multiprocessor holds one block of 256 threads
BOUNDS = {
    "smmf_tiles": 128,
    "hfac_update_tiles": 128,
    "hfac_int8_tiles": 128,
    "hfac_small": 80,
    "hfac_int8_small": 80,
    "hfac_stats": 128,
    "hfac_stats_four": 128,
    "hfac_stats_wide": 128,
}
_TYPES = {"f": "float32", "d": "float64", "BFloat16": "bfloat16", "Float16": "float16"}
#: accesses of csrc/cuda/stored.cuh -> what they make of a parameter
_STORED = {"Drawn": "bfloat16 stochastically", "Split": "bfloat16 and int16", "Split8": "bfloat16 and int8"}
#: elements that a thread of a tile kernel has in one pass of its loop: kVector * kRowsInFlight
_LOOP_ELEMENTS = 32
#: folds that add doubles atomically for what a watched step tells
_COUNTING = ("hfac_fold", "hfac_int8_fold")


@dataclass
class Kernel:
    """One kernel on one architecture; loads and stores are those of 16 bytes in the machine code, local its accesses to
    local memory, loop the instructions of the loop that has all stores of 16 bytes, or 0."""

    name: str
    operands: str
    arch: str
    registers: int
    spilled: int
    stack: int
    shared: int
    loads: int
    stores: int
    local: int
    float_atomics: int
    loop: int

    @property
    def bulk(self) -> bool:
        return self.operands.startswith("bulk")

    @property
    def loop_elements(self) -> int:
        """Elements that a thread has in one pass of the loop; with codes of 8 bits two rows where an element's loads
        take 4 bytes and more, else four."""
        wide = "float32" in self.operands or "and int" in self.operands
        return _LOOP_ELEMENTS // 2 if self.name == "hfac_int8_tiles" and wide else _LOOP_ELEMENTS

    @property
    def watched(self) -> bool:
        return self.operands.endswith(", watched")

    def faults(self) -> Iterable[str]:
        """What is wrong with it, as clauses."""
        if self.float_atomics and not self.watched and self.name not in _COUNTING:
            yield f"{self.float_atomics} atomic additions of floats"
        if not self.bulk:
            return
        if self.spilled or self.stack or self.local:
            yield (
                f"{self.spilled} bytes spilled, a stack of {self.stack} bytes, {self.local} accesses to local memory"
            )
        bound = BOUNDS.get(f"{self.name}, {self.operands.split(', ')[-1]}", BOUNDS.get(self.name, 255))
        if self.watched or (self.name == "hfac_stats_four" and self.operands.endswith(", options")):
            bound = 255  # one block of 256 threads at a time
        if self.registers > bound:
            yield f"{self.registers} registers, more than {bound}"
        if not self.loads:
            yield "no 16-byte loads"
        if self.name.endswith("_tiles") and not self.stores:
            yield "no 16-byte stores"


def describe(symbol: str) -> tuple[str, str]:
    """(kernel, operands) of a mangled name."""
    name = re.search(
        r"\d(smmf_tiles|smmf_fold|smmf_sums_fold|hfac_small|hfac_int8_small|hfac_stats_wide|hfac_stats_long|hfac_stats_four|hfac_stats|hfac_collect|hfac_unflag|hfac_fold|"
        r"hfac_int8_fold|hfac_sums_fold|hfac_apply_fold|hfac_int8_apply_fold|hfac_update_tiles|hfac_int8_tiles|look|squares|"
        r"dense_look|hfac_dense|smmf_dense|next_decays|count_steps)[IE]",
        symbol,
    )
    if name is None:
        raise ValueError(f"a kernel of csrc/cuda is needed, got {symbol}; add it to bench/cuda_check.py")
    rest = symbol[name.end() :]
    # Of SMMF's tiles: is it one on blocks of shards, has it small matrices, too; is it watched
    flags = re.findall(r"Lb([01])E", rest)
    suffix = ", watched" if flags[-1:] == ["1"] else ""
    if name[1].startswith("hfac_stats"):  # of gradients that are scaled or looked at, or plain
        suffix = suffix.replace("watched", "options")
    if flags == ["1", "0", "0"]:
        suffix = ", blocks of shards"
    elif flags == ["0", "1", "0"] and "AnyAccess" not in rest and "StoredAccess" not in rest:
        suffix = ", and small matrices"
    if rest.startswith("NS_12StoredAccess"):
        return name[1], f"any, float32, stochastically or with a lower piece{suffix}"
    stored = re.match(r"NS_\d+(Drawn|Split8?)AccessI(f|NS_8BFloat16E)E", rest)
    if stored is not None:
        gradients = "float32" if stored[2] == "f" else "bfloat16"
        return name[1], f"bulk, {_STORED[stored[1]]} with {gradients} gradients{suffix}"
    types = re.match(r"NS_\d+BulkAccessIf(.*?)EE", rest)
    if types is None:
        return name[1], f"any, {'float64' if re.match(r'(NS_9AnyAccessI)?d', rest) else 'float32'}{suffix}"
    found = re.findall(r"BFloat16|Float16|f|S\d_", types[1])
    pair = [_TYPES.get(found[0], "?"), _TYPES.get(found[-1], "?")]
    if len(found) > 1 and found[-1].startswith("S"):
        pair[1] = pair[0]
    return name[1], f"bulk, {pair[0]} with {pair[1]} gradients{suffix}"


def loop_length(code: str) -> int:
    """Instructions of the shortest loop that has all stores of 16 bytes, whatever jumps out of it and back."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    stores = [at for at, text in lines if re.search(r"\bSTG\.\S*\b128\b", text)]
    lengths = []
    for end, text in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        begin = int(target[1], 16) if target else end
        if begin < end and stores and begin <= stores[0] and stores[-1] <= end:
            lengths.append(sum(begin <= at <= end for at, _ in lines))
    return min(lengths, default=0)


def find_cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    wheels = [
        Path(folder) / "backends" / "nvidia" / "bin" for folder in (spec and spec.submodule_search_locations) or ()
    ]
    return shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=f) for f in wheels)), None)


def compile_one(nvcc: str, cuobjdump: str, source: str, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [nvcc, "-std=c++17", "-O3", "--fmad=false", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
            + ["--keep", "--keep-dir", folder, "-c", str(ROOT / "csrc" / "cuda" / f"{source}.cu")]
            + ["-o", str(Path(folder) / "out.o")],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"nvcc failed on {source}.cu for sm_{arch}: {done.stderr.strip().splitlines()[-1]}")
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
        dump = [cuobjdump, "-sass", str(Path(folder) / "out.o")]
        sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    code = {part.split(None, 1)[0]: part for part in sass.split("Function : ")[1:]}
    bodies = {m[1]: m[2] for m in re.finditer(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.S)}
    kernels = []
    for part in done.stderr.split("Compiling entry function '")[1:]:
        symbol = part[: part.index("'")]
        stack, stored = (int(re.search(rf"(\d+) bytes {what}", part)[1]) for what in ("stack frame", "spill stores"))
        shared = re.search(r"(\d+) bytes smem", part)
        body = bodies[symbol]
        name, operands = describe(symbol)
        kernels.append(
            Kernel(
                name=name,
                operands=operands,
                arch=arch,
                registers=int(re.search(r"Used (\d+) registers", part)[1]),
                spilled=stored,
                stack=stack,
                shared=int(shared[1]) if shared else 0,
                loads=len(re.findall(r"\bLDG(?:STS)?\.\S*\b128\b", code[symbol])),
                stores=len(re.findall(r"\bSTG\.\S*\b128\b", code[symbol])),
                local=len(re.findall(r"\b(?:LDL|STL)\b", code[symbol])),
                float_atomics=len(re.findall(r"(?:atom|red)\S*\.add\S*\.f(?:16|32|64)", body)),
                loop=loop_length(code[symbol]),
            )
        )
    return kernels


def differences(kernels: Iterable[Kernel]) -> Iterable[str]:
    """Rows that say what a stored parameter costs beside a plain one."""
    loops = {(k.name, k.operands, k.arch): k.loop / k.loop_elements for k in kernels}
    for arch in sorted({k.arch for k in kernels}, key=int):
        for name in ("smmf_tiles", "hfac_update_tiles", "hfac_int8_tiles"):
            plain = loops.get((name, "bulk, bfloat16 with bfloat16 gradients", arch))
            if plain:
                each = [loops[name, f"bulk, {what} with bfloat16 gradients", arch] for what in _STORED.values()]
                yield f"| {name} | {arch} | {' | '.join(f'{n - plain:.1f}' for n in each)} |"


def faults_of(kernels: Iterable[Kernel]) -> list[str]:
    return [f"{k.name} ({k.operands}, sm_{k.arch}): {fault}" for k in kernels for fault in k.faults()]


def table(kernels: list[Kernel]) -> str:
    kernels = sorted(kernels, key=lambda k: (not k.bulk, k.name, k.operands, int(k.arch)))
    faults = [f"* {fault}" for fault in faults_of(kernels)]
    lines = [
        "# The CUDA kernels as compiled",
        "",
        "Written by `make cuda-check`; registers, stack and spills from ptxas, accesses of 16 bytes and to local",
        "memory from the machine code (how often they stand there, not how often they are executed). Bulk kernels",
        "are those for aligned, contiguous tensors; they must not spill, and the check fails for those that do. The",
        "others take any layout, and are there to be right. No kernel adds floats atomically, but for what a watched",
        "step tells, which has kernels of its own.",
        "",
        f"Complaints: {len(faults) or 'none'}",
        "",
        *faults,
        "",
        "Instructions per element are those of the loop over rows that writes parameters, for each of the elements",
        "that a thread has in it, 32 or, with codes of 8 bits, 16 of some operands. They count what is seldom or never",
        "run too (options, unscaling, NaN, the slow ends of roots and quotients), so the differences between rows say",
        "more than the rows: kernels.md has the executed path of hfac_int8_tiles. What a bfloat16",
        "parameter takes more when it is stored in another way (of int8 both roundings stand there, and one is run);",
        "Philox is 5 of it, two wide multiplications and two xors a round for eight elements, with its keys among",
        "the launch's constants:",
        "",
        "| kernel | sm | stochastically | and int16 | and int8 |",
        "| --- | --- | --- | --- | --- |",
        *differences(kernels),
        "",
        "| kernel | operands | sm | registers | stack | spilled | shared | 16-byte loads | stores | local | element |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for k in kernels:
        lines.append(
            f"| {k.name} | {k.operands} | {k.arch} | {k.registers} | {k.stack} | {k.spilled} | {k.shared} "
            f"| {k.loads} | {k.stores} | {k.local} | {f'{k.loop / k.loop_elements:.1f}' if k.loop else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="compute capabilities, such as 90")
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--keep", type=Path, help="JSON of earlier results, which these join (to check in parts)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "cuda-check.md")
    args = parser.parse_args()
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None:
        print("no nvcc was found: install the CUDA toolkit", file=sys.stderr)
        sys.exit(2)
    if cuobjdump is None:
        print("no cuobjdump was found: install the CUDA toolkit's, or triton, whose wheel has it", file=sys.stderr)
        sys.exit(2)
    kernels = [k for arch in args.arch for source in args.source for k in compile_one(nvcc, cuobjdump, source, arch)]
    if args.keep is not None:
        fresh = {(k.name, k.operands, k.arch) for k in kernels}
        old = [Kernel(**k) for k in loads(args.keep.read_text())] if args.keep.exists() else []
        kernels += [k for k in old if (k.name, k.operands, k.arch) not in fresh]
        args.keep.write_text(dumps([asdict(k) for k in kernels]))
    args.out.write_text(table(kernels))
    faults = faults_of(kernels)
    print(f"{len(kernels)} kernels, written to {args.out}", *faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
