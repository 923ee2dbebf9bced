"""What a step on the GPU consists of, counted from the plan that the launcher follows; needs no GPU.

`python -m bench.launch_plan` prints, for each list of parameters, optimizer and type: launches, bytes per parameter
that go through the GPU's memory, and the time that takes at the rate of a copy. `make cuda-check` writes the same to
docs/launch-plan.md.
"""

import argparse
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hfac.matricize import cut, square

from .shapes import Shape, gpt2, llama3_8b, resnet50

#: bytes per second of a device copy
COPY_RATES = {"H200": 4.3e12, "A100": 1.9e12}
LISTS = {
    "Llama-3-8B": llama3_8b,
    "GPT-2 124M": gpt2,
    "ResNet-50": resnet50,
    "2,000 of 64x64": lambda: [(64, 64)] * 2000,
}
DOCUMENT = Path(__file__).parent.parent / "docs" / "launch-plan.md"
HEAD = """# What a step on a GPU consists of

Written by `python -m bench.launch_plan --write` from the plan that the launcher follows, for an L2 cache of 50 MB.
Bytes are per parameter (element) and go through the GPU's memory; a gradient that is read again from the L2 cache
(`grad_from_cache`) is not among them. The times are arithmetic, those bytes at the rate of a copy (4.3 and 1.9 TB/s):
nothing here has been measured.
"""
NORM = """## H-Fac with `max_grad_norm`

The norm of all gradients is made of the statistics that a step takes anyway, all of them before the first update. Bytes
per parameter below, with the norm read apart and an ordinary step after it; where the norm is within the limit; and
where it is not, so that each group takes its statistics again (there the second read of a gradient is counted as one
from memory unless all fit the cache, though it has some of each group). Gradients of vectors are read for their norm in
any case. The workspace holds 2 numbers per row and 5 per column of every matrix, and the tiles' sums of as many as fit
the cache.
"""
_CODES = {"float32": 0, "bfloat16": 1}
#: what a launch's bytes are made of; of these the first reaches the kernel from the L2 cache
PARTS = ("grad_from_cache", "grad", "param_read", "param_written", "signs", "partial", "states")


def _native() -> Any:
    for name in ("hfac._C", "hfac._emulated"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise SystemExit("required is hfac._C (make install) or hfac._emulated (make test-emulated); neither is built")


def plan(algorithm: str, shapes: Sequence[Shape], dtype: str, **options: Any) -> list[dict[str, Any]]:
    """The launches of one step, in order; ``options`` as `hfac._C.cuda_plan` takes them."""
    factored: list[tuple[int, int, int]] = []
    whole: list[int] = []
    for shape in shapes:
        numel = math.prod(shape)
        if algorithm == "hfac":
            k = cut(shape)
            rows, cols = (numel, 1) if k is None else (math.prod(shape[:k]), math.prod(shape[k:]))
        else:
            rows, cols = square(numel)
        if cols > 1:
            factored.append((rows, cols, math.prod(shape[1:])))
        else:
            whole.append(numel)
    code = _CODES[dtype]
    types = dict(param_dtypes=code, grad_dtypes=code)
    launches = []
    native = _native()
    if factored:
        rows, cols, slices = (list(column) for column in zip(*factored, strict=True))
        signs = dict(slices=slices) if algorithm == "smmf" else {}
        launches += native.cuda_plan(op=f"{algorithm}_step", rows=rows, cols=cols, **types, **signs, **options)[
            "launches"
        ]
    if whole:
        ones = [1] * len(whole)
        launches += native.cuda_plan(op=f"{algorithm}_dense_step", rows=whole, cols=ones, **types, **options)[
            "launches"
        ]
    return launches


def summary(launches: Sequence[dict[str, Any]], shapes: Sequence[Shape]) -> dict[str, float]:
    """Launches, bytes per parameter, and seconds at each copy rate."""
    total = sum(launch["bytes"] for launch in launches)
    elements = sum(map(math.prod, shapes))
    seconds = {name: total / rate for name, rate in COPY_RATES.items()}
    return {"launches": len(launches), "bytes": total / elements, **seconds}


def table() -> str:
    """All lists, as Markdown."""
    lines = [
        f"| parameters | optimizer | type | launches | bytes per parameter | {' | '.join(COPY_RATES)} |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(COPY_RATES),
    ]
    for name, make in LISTS.items():
        shapes = make()
        for algorithm, title in (("hfac", "HFac"), ("smmf", "SMMF")):
            for dtype in ("bfloat16", "float32"):
                found = summary(plan(algorithm, shapes, dtype), shapes)
                times = " | ".join(f"{found[gpu] * 1e3:.3g} ms" for gpu in COPY_RATES)
                lines.append(f"| {name} | {title} | {dtype} | {found['launches']} | {found['bytes']:.2f} | {times} |")
    return "\n".join(lines)


def kernels() -> str:
    """Bytes per parameter of each kernel, all its launches together, as Markdown."""
    lines = [
        f"| parameters | kernel | launches | {' | '.join(PARTS)} |",
        "| --- | --- | ---: |" + " ---: |" * len(PARTS),
    ]
    for name, make in LISTS.items():
        shapes = make()
        elements = sum(map(math.prod, shapes))
        for algorithm in ("hfac", "smmf"):
            by_kernel: dict[str, list[dict[str, Any]]] = {}
            for launch in plan(algorithm, shapes, "bfloat16"):
                by_kernel.setdefault(launch["kernel"], []).append(launch)
            for kernel, found in by_kernel.items():
                parts = [sum(launch[part] for launch in found) / elements for part in PARTS]
                cells = " | ".join(f"{part:.3f}" if part else "" for part in parts)
                lines.append(f"| {name} | {kernel} | {len(found)} | {cells} |")
    return "\n".join(lines)


def clipped() -> str:
    """Launches, bytes per parameter and MiB of workspace with the norm from statistics and without, as Markdown."""
    lines = [
        "| parameters | type | read apart | within the limit | beyond it | launches | workspace | without the norm |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, make in LISTS.items():
        shapes = make()
        elements = sum(map(math.prod, shapes))
        matrices = [(math.prod(shape[:k]), math.prod(shape[k:])) for shape in shapes if (k := cut(shape)) is not None]
        rows, cols = (list(sizes) for sizes in zip(*(sizes for sizes in matrices if sizes[1] > 1), strict=True))
        vectors = elements - sum(map(math.prod, zip(rows, cols, strict=True)))
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            types = dict(param_dtypes=_CODES[dtype], grad_dtypes=_CODES[dtype])
            kept = [
                _native().cuda_plan(op="hfac_step", rows=rows, cols=cols, **types, norm=norm)["workspace_bytes"]
                for norm in (True, False)
            ]
            plain, norm = (plan("hfac", shapes, dtype, norm=norm) for norm in (False, True))
            bytes_ = [
                sum(launch["bytes"] for launch in plain) + size * elements,
                sum(launch["bytes"] for launch in norm if not launch["conditional"]) + size * vectors,
                sum(launch["bytes"] for launch in norm) + size * vectors,
            ]
            cells = " | ".join(f"{count / elements:.2f}" for count in bytes_)
            spaces = " | ".join(f"{count / 2**20:.1f} MiB" for count in kept)
            lines.append(f"| {name} | {dtype} | {cells} | {len(norm)} | {spaces} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launch_plan", description=__doc__.splitlines()[0])
    parser.add_argument("--launches", choices=LISTS, help="every launch of one list, in bfloat16")
    parser.add_argument("--write", action="store_true", help="write docs/launch-plan.md instead")
    args = parser.parse_args()
    if args.write:
        by_kernel = f"## Kernel by kernel, in bfloat16\n\n{kernels()}"
        DOCUMENT.write_text(f"{HEAD}\n{table()}\n\n{by_kernel}\n\n{NORM}\n{clipped()}\n")
        print(f"written to {DOCUMENT}")
        return
    if args.launches is None:
        print(table())
        return
    for algorithm in ("hfac", "smmf"):
        for launch in plan(algorithm, LISTS[args.launches](), "bfloat16"):
            parts = " ".join(f"{part}={launch[part]}" for part in PARTS if launch[part])
            print(f"{launch['kernel']:12} {launch['access']:17} {launch['blocks']:7} x {launch['threads']}  {parts}")


if __name__ == "__main__":
    main()
