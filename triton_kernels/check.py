"""`make triton-check`: compiles the kernels for GPUs that are not there, and looks at what came out.

For every kernel and target: 128-bit accesses and none of 8 or 16 bits of parameters and gradients on the aligned bulk,
nothing spilled, shared memory within the target's, no fused multiply-adds in the arithmetic, correctly rounded roots
and quotients. Needs no GPU; the result goes to docs/triton-check.md.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import dense, hfac, smmf
from .plan import BROAD, HFAC_TILES, REGISTERS, SMMF_TILES, STATS, compile_options, dense_warps
from .table import BYTE_PER_ELEMENT, EACH, EIGHT, EIGHT_APART, NEAREST, NO_SIGNS, RUN, SHARED_BYTES, WHOLE_BYTES

#: name -> (target, bytes of shared memory that a program may have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
#: Where instructions are counted.
COUNTED = "sm_90"
#: Bytes that a lane may park in memory where SMMF's tile has a lower piece: it takes all registers without one, and
#: with it has an address more; where H-Fac's statistics, which take all registers too, divide; and where a step is
#: watched.
SPARE = 32
F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16
#: How most weights are stored, and what that is called where they are not.
_PLAIN = {"STOCHASTIC": NEAREST.value, "LOW": 0}
_BITS = {EIGHT.value: "stochastic", EIGHT_APART.value: "stochastic apart", EACH.value: "stochastic each"}
#: What a step has to be asked for.
_OFF = {"SCALED": False, "AGAIN": False, "WATCH": False}
_POINTERS = {
    "tiles": "*i32",
    "items": "*i64",
    "grads": "*i64",
    "scalars": "*fp64",
    "flags": "*i32",
    "squares": "*fp64",
    "watched": "*fp64",
}


@dataclass
class Variant:
    kernel: Any
    constants: dict[str, Any]
    warps: int

    @property
    def label(self) -> str:
        c = self.constants
        types = "/".join(dict.fromkeys(str(c[name]) for name in ("W", "G", "T") if name in c))
        parts = [types] if types else []
        if "R" in c:
            parts.append(f"{c['R']}x{c['C']}")
        if "WHOLE" in c:
            parts.append("bulk" if c["WHOLE"] else "any")
        if "LAYOUT" in c:
            parts.append(("no signs", "whole bytes", "byte per element", "shared bytes")[c["LAYOUT"]])
        if c.get("LOW"):
            parts.append(f"low {c['LOW']}")
        if c.get("STOCHASTIC"):
            parts.append(_BITS[c["STOCHASTIC"]])
        if not c.get("COLUMNS", True):
            parts.append("rows only")
        on = ("PART", "WIDE", "FIRST", "COUPLED", "CLIPPED", "NEGATE", "SKIP", "LOOK", "SCALED", "AGAIN", "WATCH")
        return " ".join([*parts, *(name.lower() for name in on if c.get(name))])


def variants() -> Iterator[Variant]:
    """Every kernel in every shape on the bulk, by type; and the path for any layout, with every option on."""
    on, off = dict(NEGATE=True, SKIP=True), dict(NEGATE=False, SKIP=False)
    for t in (F32, BF16, F16):
        types = dict(W=t, G=t, T=F32)
        for (r, c, warps), signs in zip(SMMF_TILES, (BYTE_PER_ELEMENT, WHOLE_BYTES), strict=True):
            shape = dict(R=r, C=c, WHOLE=True, LAYOUT=signs.value, COUPLED=False)
            for part in (False, True):
                yield Variant(smmf.smmf_tiles, types | shape | off | dict(PART=part), warps)
        for r, c, warps in HFAC_TILES:
            yield Variant(hfac.hfac_update, types | dict(R=r, C=c, WHOLE=True) | off, warps)
        yield Variant(dense.smmf_dense, types | dict(WHOLE=True, FIRST=True, COUPLED=False) | off, 8)
        yield Variant(dense.hfac_dense, types | dict(WHOLE=True, CLIPPED=True) | off, 8)
    for t in (F32, BF16):
        types = dict(G=t, T=F32)
        for (r, c, warps), wide in (*zip(STATS, itertools.repeat(False)), (BROAD, True)):
            bulk = dict(R=r, C=c, WHOLE=True, WIDE=wide, LOOK=False)
            for columns in (True, False):
                yield Variant(hfac.hfac_stats, types | bulk | dict(COLUMNS=columns), warps)
        yield Variant(dense.look, types | dict(WHOLE=True), 8)
        yield Variant(dense.hfac_dense_look, types | dict(WHOLE=True, LOOK=False), 8)
    for kernel, options in (
        (smmf.smmf_fold, dict(FIRST=True) | on),
        (smmf.smmf_normalize, dict(FIRST=True) | on),
        (hfac.hfac_fold, on),
        (hfac.hfac_fold, on | dict(WATCH=True)),
        (hfac.hfac_scale, dict(CLIPPED=True) | on),
        (hfac.hfac_scale, dict(CLIPPED=True, WATCH=True) | on),
        (smmf.smmf_part_fold, dict(FIRST=True)),
        (hfac.hfac_part_cols, {}),
        (hfac.hfac_part_fold, dict(CLIPPED=True, NEGATE=True)),
        (hfac.hfac_squares, {}),
    ):
        yield Variant(kernel, dict(T=F32) | options, 4)
    yield Variant(hfac.hfac_add_squares, {}, 4)
    mixed = dict(W=BF16, G=F32, T=F32, WHOLE=False, SCALED=True) | on
    (r, c, warps), (_, big, _) = SMMF_TILES[1], HFAC_TILES[1]
    assert c == big
    r //= 2
    for signs in (NO_SIGNS, SHARED_BYTES):
        for part in (False, True):
            layout = dict(R=r, C=c, LAYOUT=signs.value, COUPLED=True, PART=part)
            yield Variant(smmf.smmf_tiles, mixed | layout, warps)
    yield Variant(hfac.hfac_update, mixed | dict(R=BROAD[0] // 2, C=BROAD[1]), BROAD[2])
    yield Variant(dense.smmf_dense, mixed | dict(FIRST=True, COUPLED=True), 8)
    yield Variant(dense.hfac_dense, mixed | dict(CLIPPED=True), 8)
    stats = dict(G=F32, T=F32, WHOLE=False, LOOK=True, COLUMNS=True, R=BROAD[0] // 4, C=BROAD[1])
    stats |= dict(SCALED=True, AGAIN=True)
    yield Variant(hfac.hfac_stats, stats | dict(WIDE=True), BROAD[2])
    yield Variant(hfac.hfac_stats, stats | dict(WIDE=False), BROAD[2])
    wide = dict(W=tl.float64, G=tl.float64, T=tl.float64, R=r, C=c, WHOLE=False, LAYOUT=WHOLE_BYTES.value)
    for part in (False, True):
        yield Variant(smmf.smmf_tiles, wide | dict(COUPLED=False, PART=part) | off, warps)


def asked_variants() -> Iterator[Variant]:
    """What reads gradients, on the bulk, where a step divides them; the same and all ways to store where it is watched;
    and watched steps for any layout."""
    off, watch = dict(NEGATE=False, SKIP=False), dict(WATCH=True)
    for t, what in itertools.product((F32, BF16), (dict(SCALED=True), watch)):
        asked = dict(W=t, G=t, T=F32, WHOLE=True) | off | what
        for (r, c, warps), signs in zip(SMMF_TILES, (BYTE_PER_ELEMENT, WHOLE_BYTES), strict=True):
            shape = dict(R=r, C=c, LAYOUT=signs.value, COUPLED=False, PART=False)
            yield Variant(smmf.smmf_tiles, asked | shape, warps)
        for r, c, warps in HFAC_TILES:
            yield Variant(hfac.hfac_update, asked | dict(R=r, C=c), warps)
        yield Variant(dense.smmf_dense, asked | dict(FIRST=True, COUPLED=False), 8)
        yield Variant(dense.hfac_dense, asked | dict(CLIPPED=True), 8)
        asked = dict(G=t, T=F32, WHOLE=True) | what
        for (r, c, warps), wide in (*zip(STATS, itertools.repeat(False)), (BROAD, True)):
            shape = dict(R=r, C=c, WIDE=wide, LOOK=False, COLUMNS=True, AGAIN=what is not watch)
            yield Variant(hfac.hfac_stats, asked | shape, warps)
        if what is not watch:
            yield Variant(dense.look, asked, 8)
            yield Variant(dense.hfac_dense_look, asked | dict(LOOK=False), 8)
    (r, c, warps), signs = SMMF_TILES[1], WHOLE_BYTES.value
    for stochastic, low in ((EIGHT, 0), (NEAREST, 16), (EIGHT, 8)):
        asked = dict(W=BF16, G=BF16, T=F32, WHOLE=True, STOCHASTIC=stochastic.value, LOW=low) | off | watch
        yield Variant(smmf.smmf_tiles, asked | dict(R=r, C=c, LAYOUT=signs, COUPLED=False, PART=False), warps)
        for rows, cols, of_hfac in HFAC_TILES:
            yield Variant(hfac.hfac_update, asked | dict(R=rows, C=cols), of_hfac)
        yield Variant(dense.smmf_dense, asked | dict(FIRST=True, COUPLED=False), 8)
        yield Variant(dense.hfac_dense, asked | dict(CLIPPED=True), 8)
    everything = dict(W=BF16, G=F32, T=F32, WHOLE=False, NEGATE=True, SKIP=True, SCALED=True) | watch
    shape = dict(R=r // 2, C=c, LAYOUT=SHARED_BYTES.value, COUPLED=True, PART=False)
    yield Variant(smmf.smmf_tiles, everything | shape, warps)
    yield Variant(hfac.hfac_update, everything | dict(R=BROAD[0] // 2, C=BROAD[1]), BROAD[2])
    yield Variant(dense.smmf_dense, everything | dict(FIRST=True, COUPLED=True), 8)
    yield Variant(dense.hfac_dense, everything | dict(CLIPPED=True), 8)
    for wide in (False, True):
        shape = dict(R=BROAD[0] // 4, C=BROAD[1], WIDE=wide, LOOK=True, COLUMNS=True, AGAIN=True)
        yield Variant(hfac.hfac_stats, dict(G=F32, T=F32, WHOLE=False, SCALED=True) | watch | shape, BROAD[2])


def stored_variants() -> Iterator[Variant]:
    """What writes weights, in every way to store them but plainly: on the bulk, then for any layout."""
    off = dict(NEGATE=False, SKIP=False)
    for t, stochastic, low in (
        (BF16, EIGHT, 0),
        (F16, EIGHT, 0),
        (BF16, EIGHT_APART, 0),
        (BF16, NEAREST, 16),
        (BF16, NEAREST, 8),
        (BF16, EIGHT, 8),
    ):
        how = dict(W=t, G=t, T=F32, WHOLE=True, STOCHASTIC=stochastic.value, LOW=low) | off
        parts = (True,) if stochastic is EIGHT_APART else (False, True)
        for (r, c, warps), signs in zip(SMMF_TILES, (BYTE_PER_ELEMENT, WHOLE_BYTES), strict=True):
            for part in parts:
                shape = dict(R=r, C=c, LAYOUT=signs.value, COUPLED=False, PART=part)
                yield Variant(smmf.smmf_tiles, how | shape, warps)
        for r, c, warps in HFAC_TILES:
            yield Variant(hfac.hfac_update, how | dict(R=r, C=c), warps)
        if stochastic is not EIGHT_APART:
            yield Variant(dense.smmf_dense, how | dict(FIRST=True, COUPLED=False), 8)
            yield Variant(dense.hfac_dense, how | dict(CLIPPED=True), 8)
    on = dict(NEGATE=True, SKIP=True)
    (r, c, warps), (rows, cols, _) = SMMF_TILES[1], BROAD
    for t, stochastic, low in ((BF16, EACH, 0), (F16, EACH, 0), (BF16, NEAREST, 16), (BF16, EACH, 8)):
        how = dict(W=t, G=F32, T=F32, WHOLE=False, STOCHASTIC=stochastic.value, LOW=low) | on
        fewer = 4 if stochastic is EACH else 2
        for signs in (NO_SIGNS, SHARED_BYTES):
            layout = dict(R=r // fewer, C=c, LAYOUT=signs.value, COUPLED=True, PART=True)
            yield Variant(smmf.smmf_tiles, how | layout, warps)
        yield Variant(hfac.hfac_update, how | dict(R=rows // fewer, C=cols), warps)
        for kernel, options in (
            (dense.smmf_dense, dict(FIRST=True, COUPLED=True)),
            (dense.hfac_dense, dict(CLIPPED=True)),
        ):
            yield Variant(kernel, how | options, dense_warps(kernel, False, stochastic.value, low))


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: _POINTERS.get(name, "constexpr") for name in names},
        constexprs={name: (_PLAIN | _OFF | variant.constants)[name] for name in names if name not in _POINTERS},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in _POINTERS},
    )
    options = compile_options(variant.constants, variant.warps, target.backend)
    return triton.compile(source, target=target, options=options)


@dataclass
class Report:
    registers: int
    spills: int
    shared: int
    wide: int  # accesses of 128 bits and more
    narrow: int  # of 8 or 16 bits
    fused: int  # multiply-adds of the source's arithmetic
    rough: int  # roots and quotients that are not correctly rounded
    sums: list[str]  # which lane holds which element of what is summed


def examine(compiled: Any, target: GPUTarget) -> Report:
    if target.backend == "cuda":
        asm = compiled.asm["ptx"]
        registers, spills = _usage(compiled.asm["cubin"])
        wide = r"\b(?:ld|st)\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32)"
        narrow = r"\b(?:ld|st)\.global\S*\.[bsu](?:8|16)\b"
        fused = r"\bfma\.rn\.f32|\bfma\.rn\.f64"
        rough = r"\b(?:sqrt|div|rcp)\.(?:approx|full)\S*|\b(?:sqrt|div)\.rn\.ftz\S*"
    else:
        asm = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm)[1])
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm)))
        wide = r"\b(?:global|buffer|flat)_(?:load|store)_dwordx4"
        narrow = r"\b(?:global|buffer|flat)_(?:load|store)_(?:[us]?byte|[us]?short)\w*"
        fused, rough = r"\bv_(?:pk_)?(?:fma|mad)\w*_f(?:32|64)", r"(?!)"
    counts = [len(re.findall(pattern, asm)) for pattern in (wide, narrow, fused, rough)]
    return Report(registers, spills, compiled.metadata.shared, *counts, _sums(compiled.asm["ttgir"]))


def _sums(text: str) -> list[str]:
    """Layouts of what reductions of floating-point numbers take."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<(\w+xf(?:32|64)), (#\w+)>\)', text, re.DOTALL)
    return [f"{shape} {named[name]}" for shape, name in found]


def _dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


def added(variant: Variant) -> float:
    """Instructions per element that storing otherwise than plainly adds, on COUNTED, those of a program's beginning
    among them."""
    target, _ = TARGETS[COUNTED]
    counts = []
    for one in (variant, Variant(variant.kernel, variant.constants | _PLAIN, variant.warps)):
        text = _dump(compile_variant(one, target).asm["cubin"], "-sass")
        counts.append(len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP|BRA `)", text, re.MULTILINE)))
    c = variant.constants
    elements = c["R"] * c["C"] if "R" in c else RUN.value
    return (counts[0] - counts[1]) / (elements // (32 * variant.warps))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory per lane."""
    text = _dump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def complaints(variant: Variant, report: Report, target: GPUTarget, shared: int) -> list[str]:
    found = []
    bulk = variant.constants.get("WHOLE", False)
    low = variant.constants.get("LOW", 0)
    tile = low and variant.kernel is smmf.smmf_tiles
    exact = low == 16 and tile
    watched = variant.constants.get("WATCH", False)
    divided = variant.kernel is hfac.hfac_stats and variant.constants.get("SCALED", False)
    spare = (tile or divided or watched) and bulk and target.backend == "cuda"
    if report.spills > (SPARE if spare else 0):
        found.append(f"{report.spills} spilled")
    if report.shared > shared:
        found.append(f"{report.shared} bytes of shared memory of {shared}")
    # AMD's roots and quotients, of integers too, are refined with fused steps of their own; this kernel has none but
    # those of indices and of divided gradients.
    none = variant.kernel is hfac.hfac_update and variant.constants.get("STOCHASTIC") != EIGHT_APART.value
    none = none and not variant.constants.get("SCALED", False)
    if (target.backend == "cuda" or (bulk and none)) and (report.fused or report.rough):
        found.append(f"{report.fused} fused multiply-adds, {report.rough} rough roots or quotients")
    if exact:
        twin = Variant(variant.kernel, variant.constants | dict(W=F32, G=F32, LOW=0), variant.warps)
        if report.sums != examine(compile_variant(twin, target), target).sums:
            found.append("sums in another order than a float32's")
    if bulk and not report.wide and not exact:
        found.append("no 128-bit access")
    # SMMF's sign bytes are the only thing on the bulk that is narrower than a word.
    signs = variant.constants.get("LAYOUT", NO_SIGNS.value) != NO_SIGNS.value
    if bulk and report.narrow and not signs:
        found.append(f"{report.narrow} narrow accesses")
    if bulk and target.backend == "cuda" and variant.constants["T"] == F32 and report.registers > REGISTERS:
        found.append(f"{report.registers} registers, more than {REGISTERS}")
    return found


def main(names: list[str]) -> int:
    names = names or list(TARGETS)
    todo = [*variants(), *asked_variants(), *stored_variants()]
    rows, failed = [], 0
    for variant in todo:
        cells = []
        for name in names:
            target, shared = TARGETS[name]
            report = examine(compile_variant(variant, target), target)
            wrong = complaints(variant, report, target, shared)
            failed += bool(wrong)
            cells.append(
                f"{report.registers} / {report.shared} / {report.wide}" + "".join(f" **{text}**" for text in wrong)
            )
        rows.append(f"| {variant.kernel.fn.__name__} | {variant.label} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    print(f"{len(todo)} variants for {', '.join(names)}: {failed} complaints")
    if names == list(TARGETS):
        bulk = [variant for variant in stored_variants() if variant.constants["WHOLE"]]
        costs = [
            f"| {x.kernel.fn.__name__} | {x.label} | {added(x):.1f} |" for x in bulk if not x.constants.get("PART")
        ]
        _write(rows, len(todo), failed, costs)
    return 1 if failed else 0


def _write(rows: list[str], count: int, failed: int, costs: list[str]) -> None:
    head = [
        "# What the Triton kernels compile to",
        "",
        f"Written by `make triton-check` with Triton {triton.__version__}; no GPU was used and nothing here was timed. "
        f"{count} variants, {failed} complaints. Per target: registers / bytes of shared memory / 128-bit accesses.",
        "",
        "Asserted: on the bulk (contiguous, 16-byte aligned, rows of whole vectors of 8) 128-bit global accesses and, "
        "but for SMMF's sign bytes, none of 8 or 16 bits; at most 128 registers on NVIDIA GPUs; nothing spilled; "
        "shared memory within the target's; no fused multiply-adds and no approximate roots or quotients in PTX, "
        "and none in hfac_update on AMD's bulk, whose other kernels refine roots and quotients with them. Of "
        f"smmf_tiles with a lower piece, of hfac_stats that divide, and of what watches a lane may park {SPARE} bytes; "
        "with a lower piece of 16 bits what is summed lies as a float32's, for which accesses are of 64 bits.",
        "",
        "| kernel | variant | " + " | ".join(TARGETS) + " |",
        "| --- | --- |" + " --- |" * len(TARGETS),
    ]
    path = Path(__file__).parents[1] / "docs" / "triton-check.md"
    tail = [
        "",
        "## What storing otherwise adds",
        "",
        f"Instructions per element on {COUNTED} beyond those of the same kernel with a plain store, on the bulk; "
        "those of a program's beginning are counted too.",
        "",
        "| kernel | variant | instructions |",
        "| --- | --- | --- |",
    ]
    path.write_text("\n".join([*head, *rows, *tail, *costs]) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
