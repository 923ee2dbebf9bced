"""What a step on the GPU consists of and how long it would take: a model, which needs no GPU.

`python -m bench.launch_plan` prints, for each list of parameters, optimizer and type, its launches, bytes and predicted
time, and a line for each kernel; `--triton` the same of the Triton kernels (bench/triton_plan.py) beside it, `--json`
gives it as JSON, `--write` writes docs/launch-plan.md, and `--check` ends with status 1 where a kernel exceeds its
budget (bench/budgets.py). Launches come from the plan that the launcher follows, instructions from the machine code
that nvcc makes of this checkout (bench/launch_model.py).
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hfac.matricize import cut, square

from .launch_model import Model, Predicted, by_instance, by_kernel
from .multiprocessor import GPUS, LAUNCH_GAP, Gpu
from .shapes import Shape, gpt2, llama3_8b, resnet50

#: bytes per second of a device copy
COPY_RATES = {gpu.name: gpu.copy for gpu in GPUS.values()}
LISTS: dict[str, Callable[[], list[Shape]]] = {
    "llama-3-8b": llama3_8b,
    "gpt2": gpt2,
    "resnet50": resnet50,
    "2000x64x64": lambda: [(64, 64)] * 2000,
}
#: by name, the step of matrices
OPTIMIZERS = {"HFac": "hfac", "HFac-int8": "hfac_int8", "SMMF": "smmf"}
DTYPES = ("bfloat16", "float32")
CODES = {"float32": 0, "bfloat16": 1}
#: of a kernel in `--json`
_COLUMNS = (
    *("kernel", "launches", "blocks_least", "blocks_median", "registers", "resident", "in_flight_kb"),
    *("instructions_per_element", "bound", "ms"),
)
#: what a launch's bytes are made of; of these the first reaches the kernel from the L2 cache
PARTS = ("grad_from_cache", "grad", "param_read", "param_written", "signs", "partial", "states")


def native() -> Any:
    for name in ("hfac._C", "hfac._emulated"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise SystemExit("required is hfac._C (make install) or hfac._emulated (make test-emulated); neither is built")


def factored(algorithm: str, shapes: Sequence[Shape]) -> tuple[list[tuple[int, int, int]], list[int]]:
    """What an optimizer makes of parameters: rows, columns and elements of a slice of those whose moments it factors;
    elements of the others, but for those without any."""
    matrices, vectors = [], []
    for shape in shapes:
        numel = math.prod(shape)
        if algorithm == "smmf":
            rows, cols = square(numel)
        else:
            k = cut(shape)
            rows, cols = (numel, 1) if k is None else (math.prod(shape[:k]), math.prod(shape[k:]))
        if cols > 1:
            matrices.append((rows, cols, math.prod(shape[1:]) if algorithm == "smmf" else 0))
        elif numel:
            vectors.append(numel)
    return matrices, vectors


def plans(
    algorithm: str, shapes: Sequence[Shape], dtype: str, **options: Any
) -> list[tuple[dict[str, Any], list[tuple[int, int]]]]:
    """The plans of one step, matrices' and vectors', with the rows and columns of their tensors, those without elements
    left out; ``options`` as `hfac._C.cuda_plan` takes them."""
    family = algorithm.removesuffix("_int8")  # whose vectors are those of the same optimizer
    matrices, vectors = factored(algorithm, shapes)
    code = CODES[dtype]
    types = dict(param_dtypes=code, grad_dtypes=code)
    extension, found = native(), []
    if matrices:
        sizes = dict(zip(("rows", "cols", "slices"), map(list, zip(*matrices, strict=True)), strict=True))
        if algorithm != "smmf":
            del sizes["slices"]  # of signs
        of_matrices = extension.cuda_plan(op=f"{algorithm}_step", **sizes, **types, **options)
        found.append((of_matrices, [(m, n) for m, n, _ in matrices if m * n]))
    if vectors:
        sizes = dict(rows=vectors, cols=[1] * len(vectors))
        of_vectors = extension.cuda_plan(op=f"{family}_dense_step", **sizes, **types, **options)
        found.append((of_vectors, [(n, 1) for n in vectors]))
    return found


def plan(algorithm: str, shapes: Sequence[Shape], dtype: str, **options: Any) -> list[dict[str, Any]]:
    """The launches of one step, in order; ``options`` as `hfac._C.cuda_plan` takes them."""
    return [launch for found, _ in plans(algorithm, shapes, dtype, **options) for launch in found["launches"]]


def summary(launches: Sequence[dict[str, Any]], shapes: Sequence[Shape]) -> dict[str, float]:
    """Launches, bytes per parameter, and seconds at each copy rate."""
    total = sum(launch["bytes"] for launch in launches)
    elements = sum(map(math.prod, shapes))
    seconds = {name: total / rate for name, rate in COPY_RATES.items()}
    return {"launches": len(launches), "bytes": total / elements, **seconds}


def shapes_of(name: str) -> list[Shape]:
    """The list of that name, or the matrix ``ROWSxCOLUMNS``.

    Raises:
        ValueError: it is neither.
    """
    if name in LISTS:
        return LISTS[name]()
    matrix = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if matrix is None:
        raise ValueError(f"required is one of {', '.join(LISTS)}, or ROWSxCOLUMNS such as 4096x4096; got {name!r}")
    return [(int(matrix[1]), int(matrix[2]))]


@dataclass(frozen=True)
class Step:
    """One step, predicted."""

    parameters: str
    optimizer: str
    dtype: str
    gpu: Gpu
    bytes_per_param: float
    launched: list[Predicted]

    @property
    def launches(self) -> int:
        return sum(launch.launches for launch in self.launched)

    @property
    def milliseconds(self) -> float:
        return 1e3 * (sum(launch.seconds * launch.launches for launch in self.launched) + self.launches * LAUNCH_GAP)

    @property
    def of_bytes(self) -> float:
        """Milliseconds that the bytes take at the rate of a copy."""
        return 1e3 * sum(launch.times["bytes"] * launch.launches for launch in self.launched)

    def row(self) -> dict[str, Any]:
        """As `--json` has it."""
        return {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "dtype": self.dtype,
            "gpu": self.gpu.name.lower(),
            "launches": self.launches,
            "bytes_per_param": self.bytes_per_param,
            "ms": self.milliseconds,
            "kernels": [{name: row[name] for name in _COLUMNS} for row in by_kernel(self.launched)],
        }


def predicted(parameters: str, optimizer: str, dtype: str, gpu: Gpu, model: Model | None = None) -> Step:
    """One step of ``optimizer`` over the list or matrix ``parameters`` on ``gpu``."""
    model = model or Model(gpu)
    shapes = shapes_of(parameters)
    found, launched = plans(OPTIMIZERS[optimizer], shapes, dtype, image=True, l2_bytes=gpu.l2_bytes), []
    for one, matrices in found:
        launched += list(model.launches(one, matrices))
    total = sum(launch["bytes"] for one, _ in found for launch in one["launches"])
    return Step(parameters, optimizer, dtype, gpu, total / sum(map(math.prod, shapes)), launched)


def steps(
    parameters: Sequence[str],
    gpus: Sequence[Gpu],
    optimizers: Sequence[str] = tuple(OPTIMIZERS),
    dtypes: Sequence[str] = DTYPES,
) -> list[Step]:
    """All of them, by GPU, list, optimizer and type."""
    out = []
    for gpu in gpus:
        model = Model(gpu)
        for name in parameters:
            out += [predicted(name, optimizer, dtype, gpu, model) for optimizer in optimizers for dtype in dtypes]
    return out


def table(found: Sequence[Step]) -> str:
    """Steps, as Markdown."""
    lines = [
        "| parameters | optimizer | type | GPU | launches | bytes per parameter | bytes alone | predicted "
        "| share of copy rate |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step in found:
        lines.append(
            f"| {step.parameters} | {step.optimizer} | {step.dtype} | {step.gpu.name} | {step.launches} "
            f"| {step.bytes_per_param:.2f} | {step.of_bytes:.3g} ms | {step.milliseconds:.3g} ms "
            f"| {step.of_bytes / step.milliseconds:.0%} |"
        )
    return "\n".join(lines)


def instances(found: Sequence[Step]) -> str:
    """Every kernel of steps, as Markdown, by types and row lengths."""
    lines = [
        "| parameters | type | kernel | launches | blocks | waves | registers, blocks | KB in flight | instructions "
        "| MUFU | shuffles | barriers | bytes | bytes / issue / latency / waves, ms | binds | ms |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for step in found:
        for row in by_instance(step.launched):
            times = " / ".join(f"{ms:.3g}" for ms in row["times_ms"].values())
            lines.append(
                f"| {step.parameters} | {step.dtype} | {row['kernel']} | {row['launches']} "
                f"| {row['blocks_least']}, {row['blocks_median']} | {row['waves']:.2f} "
                f"| {row['registers']}, {row['resident']} | {row['in_flight_kb']:.1f} "
                f"| {row['instructions_per_element']:.1f} | {row['mufu_per_element']:.2f} "
                f"| {row['shuffles_per_element']:.2f} | {row['barriers_per_element']:.3f} "
                f"| {row['bytes_per_element']:.2f} | {times} | {row['bound']} | {row['ms']:.3g} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launch_plan", description=__doc__.splitlines()[0])
    parser.add_argument("parameters", nargs="*", help=f"of {', '.join(LISTS)} or ROWSxCOLUMNS (default: the lists)")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h200"])
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="rows as JSON, to stdout or a file")
    parser.add_argument("--launches", choices=LISTS, help="every launch of one list's plan, in bfloat16")
    parser.add_argument("--write", action="store_true", help="write docs/launch-plan.md instead")
    parser.add_argument("--triton", action="store_true", help="the same steps by the Triton kernels, too (on an H200)")
    parser.add_argument("--check", action="store_true", help="status 1 where a kernel exceeds its budget")
    args = parser.parse_args()
    if args.launches is not None:
        for algorithm in OPTIMIZERS.values():
            for launch in plan(algorithm, LISTS[args.launches](), "bfloat16"):
                parts = " ".join(f"{part}={launch[part]}" for part in PARTS if launch[part])
                print(
                    f"{launch['kernel']:12} {launch['access']:17} {launch['blocks']:7} x {launch['threads']}  {parts}"
                )
        return
    if args.check:
        from . import budgets

        faults = list(budgets.faults())
        print(f"{len(budgets.BUDGETS)} budgets, {len(faults)} exceeded", *faults, sep="\n")
        sys.exit(1 if faults else 0)
    if args.write:
        gpus = list(GPUS.values())
        from . import launch_document

        launch_document.write(steps([*LISTS, "4096x4096"], gpus))
        return
    try:
        for name in args.parameters:
            shapes_of(name)
    except ValueError as error:
        parser.error(str(error))
    found = steps(args.parameters or list(LISTS), [GPUS[name] for name in args.gpu], args.optimizer, args.dtype)
    if args.json is None:
        print(table(found), instances(found), sep="\n\n")
        if args.triton:
            from . import triton_plan

            names = args.parameters or list(LISTS)
            print("\n" + triton_plan.section(names, args.optimizer, args.dtype, found))
        return
    rows = json.dumps([step.row() for step in found], indent=2)
    if args.json == "-":
        print(rows)
    else:
        Path(args.json).write_text(rows + "\n")


if __name__ == "__main__":
    main()
