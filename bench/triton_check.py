"""What the installed Triton makes of the kernels, for GPUs that are not there: the code that it compiles is checked.

For every kernel and target: 128-bit accesses and none of 8 or 16 bits of parameters and gradients on the aligned bulk,
nothing spilled, shared memory within the target's, no fused multiply-adds in the arithmetic, correctly rounded roots
and quotients; and on one target, what programs execute (bench/triton_cost.py) is within budget. Needs no GPU.
`make triton-check` does this with several versions of Triton (bench/triton_versions.py). With ``--costs`` only the
budgets are checked; with ``--json FILE`` all that was found is written there, too.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from hfac.triton_kernels import hfac, smmf
from hfac.triton_kernels.items import FINE, STATS, Item
from hfac.triton_kernels.plan import MAKERS, REGISTERS, Launch, compile_options, make_plan
from hfac.triton_kernels.table import EACH, EIGHT, EIGHT_APART, MEMORY, NEAREST, NO_SIGNS, RUN
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_cost

#: name -> (target, bytes of shared memory that a program may have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
#: Where instructions are counted.
COUNTED = triton_cost.TARGET
#: Bytes that a lane may spill in kernels that take all registers as it is: SMMF's tiles, where low bits add an address;
#: where gradients are divided; where elements are read one by one; and in watched steps.
SPARE = 48
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
#: How most weights are stored, and names of the ways to draw random bits.
_PLAIN = {"STOCHASTIC": NEAREST.value, "LOW": 0}
_BITS = {EIGHT.value: "stochastic", EIGHT_APART.value: "stochastic apart", EACH.value: "stochastic each"}
#: Of SMMF, tiles and signs that meet less often: a narrow matrix, and a long vector.
_CROSSED = [(64, 64, 8), (256, 256, 1)]
_STEPS = "smmf_step_", "hfac_step_", "hfac_int8_step_", "smmf_dense_step_", "hfac_dense_step_"
_SHARDS = "smmf_sums_step_", "hfac_apply_", "hfac_int8_apply_"
#: Ways to store weights on the bulk: type, random bits, low bits.
_STORED = (
    (BF16, EIGHT, 0),
    (F16, EIGHT, 0),
    (BF16, EIGHT_APART, 0),
    (BF16, NEAREST, 16),
    (BF16, NEAREST, 8),
    (BF16, EIGHT, 8),
)


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
        if c.get("ALIGNED", 16) != 16:
            parts.append(f"aligned to {c['ALIGNED']}")
        if c.get("LOW"):
            parts.append(f"low {c['LOW']}")
        if c.get("STOCHASTIC"):
            parts.append(_BITS[c["STOCHASTIC"]])
        if not c.get("COLUMNS", True):
            parts.append("rows only")
        on = ("CODES", "SHARD", "WIDE", "FIRST", "COUPLED", "CLIPPED", "NEGATE", "SKIP", "LOOK", "SCALED", "AGAIN")
        return " ".join([*parts, *(name.lower() for name in (*on, "WATCH") if c.get(name))])


def variants() -> list[Variant]:
    """What `plan` launches for every op: on the bulk for all types, shapes of tiles and ways to store weights; and for
    any layout with every option on."""
    on = dict.fromkeys(("NEGATE", "SKIP", "LOOK", "SCALED", "AGAIN", "COUPLED"), True)
    watch = dict(WATCH=True)
    found: list[Variant] = []
    for t in (F32, BF16, F16):
        found += _launched(MAKERS, t)
    for t in (F32, BF16):
        found += _launched(_STEPS, t, SCALED=True, AGAIN=True)
        found += _launched(_STEPS, t, **watch)
    for t, stochastic, low in _STORED:
        ops = _SHARDS if stochastic is EIGHT_APART else (*_SHARDS, *_STEPS)
        found += _launched(ops, t, stochastic=stochastic.value, low=low)
    for t, stochastic, low in ((BF16, EIGHT, 0), (BF16, NEAREST, 16), (BF16, EIGHT, 8)):
        found += _launched(_STEPS, t, stochastic=stochastic.value, low=low, **watch)
    for t, aligned in ((BF16, 4), (BF16, 2), (F32, 4)):
        found += _launched(_STEPS, t, aligned=aligned)
    found += _launched(MAKERS, BF16, F32, **on)
    found += _launched(_STEPS, BF16, F32, **on, **watch)
    found += _launched(("smmf_step_", "smmf_sums_step_"), F64, F64)
    for t, stochastic, low in ((BF16, EACH, 0), (F16, EACH, 0), (BF16, NEAREST, 16), (BF16, EACH, 8)):
        ops = *_SHARDS, "smmf_dense_step_", "hfac_dense_step_"
        found += _launched(ops, t, F32, stochastic=stochastic.value, low=low, NEGATE=True, SKIP=True, COUPLED=True)
    return list({(one.kernel, one.label): one for one in found}.values())


def _launched(
    ops: Iterable[str],
    dtype: torch.dtype,
    any_layout: torch.dtype | None = None,
    low: int = 0,
    aligned: int = 16,
    **options: Any,
) -> Iterator[Variant]:
    """Launches of ops on parameters of a type; ``any_layout``: the type of gradients that are not on the bulk."""
    stochastic = options.pop("stochastic", NEAREST.value)
    whole = any_layout is None
    pairs = not (low or stochastic or options) and aligned == 16
    for op in ops:
        items = [
            Item(
                rows, cols, dtype, any_layout or dtype, whole, slice,
                stochastic=stochastic, low=low, codes="int8" in op, aligned=aligned,
            )
            for rows, cols, slice in _matrices(op, whole, dtype, pairs)
        ]  # fmt: skip
        plan = make_plan(op, items)
        for launch in (*plan.launches, *plan.squares):
            yield plain(launch, **options)


def plain(launch: Launch, **options: Any) -> Variant:
    """A launch's kernel in a step with a first moment and clipping, and with these options; all others are off."""
    on = dict(FIRST=True, CLIPPED=True) | options
    return Variant(
        launch.kernel, launch.constants | {name: on.get(name, False) for name in launch.options}, launch.warps
    )


def _matrices(op: str, whole: bool, dtype: torch.dtype, pairs: bool) -> list[tuple[int, int, int]]:
    """Rows, columns and slices of parameters for which all shapes of tiles and ways to pack signs are launched;
    ``pairs``: every one of these with every other."""
    if "dense" in op:
        return [(RUN.value, 1, 0)]
    if "smmf" in op:
        if dtype == F64:
            return [(256, 256, 8)]
        return [(64, 64, 1), (256, 256, 8), *_CROSSED * pairs] if whole else [(256, 256, 0), (256, 256, 9)]
    widest = STATS[-1][1]
    if not whole:
        return [(256, cols, 0) for cols in (256, 2 * widest)]
    return [(max(256, FINE // cols), cols, 0) for cols in (*(cols for _, cols, _ in STATS), 2 * widest)]


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: MEMORY.get(name, "constexpr") for name in names},
        constexprs={name: variant.constants[name] for name in names if name not in MEMORY},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in MEMORY},
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
        rough = r"\b(?:sqrt|div|rcp)\.(?:approx|full)\S*"
        # Triton 3.3 takes subnormal numbers for 0 there, and cannot be told otherwise (docs/kernels.md).
        rough += "" if triton.__version__.startswith("3.3.") else r"|\b(?:sqrt|div)\.rn\.ftz\S*"
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


def added(variant: Variant) -> float:
    """Instructions per element that storing otherwise than plainly adds, on COUNTED, those of a program's beginning
    among them."""
    target, _ = TARGETS[COUNTED]
    counts = []
    for one in (variant, Variant(variant.kernel, variant.constants | _PLAIN, variant.warps)):
        text = triton_cost.dump(compile_variant(one, target).asm["cubin"], "-sass")
        counts.append(len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP|BRA `)", text, re.MULTILINE)))
    c = variant.constants
    elements = c["R"] * c["C"] if "R" in c else RUN.value
    return (counts[0] - counts[1]) / (elements // (32 * variant.warps))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory per lane."""
    text = triton_cost.dump(cubin, "-res-usage")
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
    divided = variant.constants.get("SCALED", False)
    spare = (tile or divided or watched or not bulk) and target.backend == "cuda"
    if report.spills > (SPARE if spare else 0):
        found.append(f"{report.spills} spilled")
    if report.shared > shared:
        found.append(f"{report.shared} bytes of shared memory of {shared}")
    # AMD's roots and quotients, of integers too, are refined with fused steps of their own; this kernel has none but
    # those of indices, of divided gradients and of codes.
    update, codes = variant.kernel is hfac.hfac_update, variant.constants.get("CODES", False)
    none = update and not codes and variant.constants.get("STOCHASTIC") != EIGHT_APART.value
    none = none and not variant.constants.get("SCALED", False)
    rough = variant.constants.get("ROUGH", False) and (codes or not update)
    if (target.backend == "cuda" or (bulk and none)) and not rough and (report.fused or report.rough):
        found.append(f"{report.fused} fused multiply-adds, {report.rough} rough roots or quotients")
    if exact:
        twin = Variant(variant.kernel, variant.constants | dict(W=tl.float32, G=tl.float32, LOW=0), variant.warps)
        if report.sums != examine(compile_variant(twin, target), target).sums:
            found.append("sums in another order than a float32's")
    aligned = variant.constants.get("ALIGNED", 16) == 16
    if bulk and aligned and not report.wide and not exact:
        found.append("no 128-bit access")
    # SMMF's sign bytes are the only thing on the bulk that is narrower than a word.
    signs = variant.constants.get("LAYOUT", NO_SIGNS.value) != NO_SIGNS.value
    if bulk and aligned and report.narrow and not signs:
        found.append(f"{report.narrow} narrow accesses")
    most = compile_options(variant.constants, variant.warps, target.backend).get("maxnreg", REGISTERS)
    if bulk and target.backend == "cuda" and report.registers > most:
        found.append(f"{report.registers} registers, more than {most}")
    return found


def costs() -> list[triton_cost.Cost]:
    """What has a budget, printed as it is found."""
    found = []
    for budget in triton_cost.BUDGETS:
        found.append(triton_cost.cost(budget, lambda launch: compile_variant(plain(launch), TARGETS[COUNTED][0])))
        print(found[-1].row(), flush=True)
    return found


def plainly_stored(variant: Variant) -> bool:
    """Whether its step is a plain one: weights rounded to nearest, gradients that are not divided, nothing watched."""
    on = ("LOW", "STOCHASTIC", "SCALED", "WATCH", "NEGATE")
    return not any(variant.constants.get(name) for name in on)


def checked(names: Sequence[str]) -> dict[str, Any]:
    """Every variant for these targets, of those that are not COUNTED only plain steps, as plain values; each row is
    printed as it comes.

    Returns:
        ``variants``: kernel, label and by target the numbers of a `Report` and ``complaints``; ``added``: what
        storing otherwise adds, where COUNTED is among the targets.
    """
    rows, more = [], []
    for variant in variants():
        row: dict[str, Any] = {"kernel": variant.kernel.fn.__name__, "label": variant.label, "targets": {}}
        for name in names:
            if name != COUNTED and not plainly_stored(variant):
                continue
            target, shared = TARGETS[name]
            report = examine(compile_variant(variant, target), target)
            wrong = complaints(variant, report, target, shared)
            row["targets"][name] = asdict(report) | {"complaints": wrong}
            said = "".join(f" **{text}**" for text in wrong)
            what = f"{report.registers} / {report.shared} / {report.wide}{said}"
            print(f"| {row['kernel']} | {row['label']} | {name} | {what} |", flush=True)
        rows.append(row)
        c = variant.constants
        stored = any(c.get(name) for name in _PLAIN) and c["WHOLE"] and not (c.get("SHARD") or c["WATCH"])
        if COUNTED in names and stored:
            more.append({"kernel": row["kernel"], "label": row["label"], "instructions": added(variant)})
    return {"variants": rows, "added": more}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_check", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--costs", action="store_true", help="check only what programs execute")
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.targets if name not in TARGETS]:
        parser.error(f"required are targets of {', '.join(TARGETS)}; got {', '.join(unknown)}")
    names = args.targets or list(TARGETS)
    counted = costs() if COUNTED in names else []
    exceeded = [f"{one.budget.kernel}: {text}" for one in counted for text in one.faults()]
    print(f"{len(counted)} budgets with triton {triton.__version__}: {len(exceeded)} exceeded", flush=True)
    found: dict[str, Any] = {
        "triton": triton.__version__,
        "costs": [one.row() for one in counted],
        "exceeded": exceeded,
    }
    failed = len(exceeded)
    if not args.costs:
        found |= checked(names)
        count = sum(len(of["complaints"]) for row in found["variants"] for of in row["targets"].values())
        print(f"{len(found['variants'])} variants for {', '.join(names)}: {count} complaints")
        failed += count
    if args.json is not None:
        args.json.write_text(json.dumps(found))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
