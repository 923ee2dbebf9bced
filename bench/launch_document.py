"""docs/launch-plan.md, written from the model of bench/launch_plan.py."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfac.matricize import cut

from . import budgets, triton_plan
from .launch_plan import CODES, DTYPES, LISTS, OPTIMIZERS, PARTS, Step, instances, native, plan, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "launch-plan.md"
HEAD = """# What a step on a GPU consists of

**This is a model. Nothing here has been measured on a GPU.** It is written by `python -m bench.launch_plan --write`.
Launches come from the plan that the launcher follows. Instructions come from a walk of the path that a block executes
through the machine code of this checkout, in a step of aligned tensors without `max_grad_norm` and without a gradient
scale. A launch is taken to last as long as the largest of four times:

* bytes: what goes through the GPU's memory, at the rate of a copy: 4.3 TB/s (H200), 3.0 (H100), 1.9 (A100);
* issue: the instructions of all warps, where a multiprocessor issues 75 % of four in a cycle;
* latency: what multiprocessors take that hold as many blocks as they can, when a load from memory takes 0.8
  microseconds and one from L2 300 cycles, instructions wait for results that they need, and warps wait for each other
  at barriers. Warps take turns in the better of two orders. This is never below the issue time; where it is at most
  3 % above, the launch is said to be bound by issue;
* waves: the same for the blocks that there are: a multiprocessor takes whole blocks, and a fold's last block finishes a
  tensor alone.

A step adds 3 microseconds for each launch, because it waits for the one before.

The model leaves out:

* what slows launches down together: the four times are compared, not added, and launches never overlap;
* conflicts of shared memory's banks, the rates of L1 and L2, and sectors of memory that are used in part, so that
  scalar loads look better than they are;
* that memory answers sooner than in 0.8 microseconds when few multiprocessors ask it, so that launches of few blocks
  look worse than they are;
* clocks that fall under load (1.75 GHz is taken for H100 and H200, 1.41 for A100), and the host's time;
* slow ends of roots and quotients (denormal numbers, infinities, NaN), and options that are off.

Blocks at the edges of a tensor count by their rows. Long tiles are walked for two numbers of rows, and what they take
is a line through both. A gradient that is read again does not count among the bytes from memory where the plan expects
it in an L2 cache (50 MB; A100: 40), but its loads are taken to last as long as others."""
NORM = """## H-Fac with `max_grad_norm`

The norm of all gradients is made of the statistics that a step takes anyway, all of them before the first update. Bytes
per parameter below, with the norm read apart and an ordinary step after it; where the norm is within the limit; and
where it is not, so that each group takes its statistics again (there the second read of a gradient is counted as one
from memory unless all fit the cache, though it has some of each group). Gradients of vectors are read for their norm in
any case. The workspace holds 2 numbers per row and 5 per column of every matrix, and the tiles' sums of as many as fit
the cache.
"""


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
            types = dict(param_dtypes=CODES[dtype], grad_dtypes=CODES[dtype])
            kept = [
                native().cuda_plan(op="hfac_step", rows=rows, cols=cols, **types, norm=norm)["workspace_bytes"]
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


_KERNELS = """## Kernel by kernel on an H200

Instructions, MUFU (roots, reciprocals and checks of quotients), shuffles and barriers are those of one thread, per
element of the tensors that a launch takes; bytes per element are those through memory. Blocks: of the smallest launch,
and the median. Waves, registers, blocks that a multiprocessor holds, and the bytes from memory that these have under
way at most (in units of 1000) are those of the launch that takes the most time in all."""
_BYTES = """## Bytes, in bfloat16

Per parameter, of each kernel's launches together. `grad_from_cache` is not among those that go through memory."""


def write(found: Sequence[Step]) -> None:
    first = [step for step in found if step.gpu.name == "H200"]
    parts = [HEAD, table(found)]
    parts.append(_KERNELS)
    for optimizer in dict.fromkeys(step.optimizer for step in first):
        parts += [f"### {optimizer}", instances([step for step in first if step.optimizer == optimizer])]
    parts += ["## The Triton kernels", triton_plan.section([*LISTS, "4096x4096"], list(OPTIMIZERS), DTYPES, found)]
    parts += ["## Budgets", budgets.HEAD, budgets.table(), _BYTES, kernels(), NORM, clipped()]
    DOCUMENT.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(f"written to {DOCUMENT}")
