"""What each CUDA kernel may cost by the model of bench/launch_plan.py, and what it is to cost.

`make cuda-check` fails where one exceeds its budget. A budget is what the kernel costs today, as long as that is more
than its target; whoever makes it cheaper lowers it here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

HEAD = """What a kernel may cost on an H200, with its target in brackets where it has not been reached: instructions per
element at most; kilobytes that a multiprocessor has under way and blocks of the smallest launch at least. An H200 has
132 multiprocessors; fewer blocks leave some of them idle. `make cuda-check` fails where a budget of bench/budgets.py is
exceeded."""


@dataclass(frozen=True)
class Budget:
    """Of one kernel in one step; `(today, target)` each, or `None` where nothing is asked of it."""

    parameters: str
    optimizer: str
    dtype: str
    kernel: str
    instructions: tuple[float, float]
    in_flight_kb: tuple[float, float] | None = None
    blocks: tuple[int, int] | None = None

    def faults(self, row: dict[str, Any]) -> Iterable[str]:
        """What exceeds it in a row of `Step.row()["kernels"]`."""
        where = f"{self.kernel} of {self.optimizer} for {self.parameters} in {self.dtype}"
        if row["instructions_per_element"] > self.instructions[0]:
            found = row["instructions_per_element"]
            yield f"{where}: {found:.2f} instructions per element, more than {self.instructions[0]}"
        if self.in_flight_kb and row["in_flight_kb"] < self.in_flight_kb[0]:
            yield f"{where}: {row['in_flight_kb']:.1f} KB in flight, less than {self.in_flight_kb[0]}"
        if self.blocks and row["blocks_least"] < self.blocks[0]:
            yield (
                f"{where}: {row['blocks_least']} blocks in the smallest launch, less than {self.blocks[0]}: "
                "multiprocessors are idle"
            )
        if self.in_flight_kb and row["local"]:
            yield f"{where}: local memory is used on the executed path"
        if row["undecided"]:
            yield f"{where}: {row['undecided']:g} branches were not decided, so that its counts are not to be trusted"


def _both(parameters: str, kernel: str, bf16: tuple[Any, ...], f32: tuple[Any, ...]) -> Iterable[Budget]:
    optimizer = "SMMF" if kernel.startswith("smmf") else "HFac-int8" if "int8" in kernel else "HFac"
    for dtype, (instructions, *rest) in (("bfloat16", bf16), ("float32", f32)):
        yield Budget(parameters, optimizer, dtype, kernel, instructions, *rest)


#: (today, target) of instructions per element, of KB in flight, of blocks
BUDGETS: Sequence[Budget] = (
    *_both("65536x64", "hfac_stats", ((12.4, 13.5), (131, 40), (128, 128)), ((12.3, 27), (98.3, 40), (128, 128))),
    *_both("4096x1024", "hfac_stats", ((13.3, 13.5), (131, 40), (128, 128)), ((13.0, 27), (98.3, 40), (128, 128))),
    *_both("4096x4096", "hfac_stats", ((11.3, 13.5), (196, 40), (128, 128)), ((11.4, 27), (98.3, 40), (128, 128))),
    *_both("4096x14336", "hfac_stats", ((10.7, 13.5), (86.0, 40), (128, 128)), ((9.2, 27), (57.3, 40), (128, 128))),
    *_both("4096x16384", "hfac_stats", ((10.7, 13.5), (98.3, 40), (128, 128)), ((9.1, 27), (65.5, 40), (128, 128))),
    *_both("4096x1024", "hfac_update", ((15.3, 15.5), (65.5, 40), (256, 264)), ((17.7, 31), (65.5, 40), (256, 264))),
    *_both("4096x4096", "hfac_update", ((12.3, 15.5), (65.5, 40), (256, 264)), ((14.6, 31), (65.5, 40), (256, 264))),
    *_both("4096x14336", "hfac_update", ((11.8, 15.5), (65.5, 40), (448, 264)), ((14.2, 31), (65.5, 40), (448, 264))),
    *_both("4096x4096", "hfac_int8_update", ((34.5, 40), (81.9, 40), (256, 264)), ((46.1, 72), (40.9, 40), (256, 264))),
    *_both("4096x4096", "smmf_tiles", ((33.0, 33), (99.7, 40), (256, 264)), ((49.1, 65), (99.2, 40), (256, 264))),
    *_both("2000x64x64", "smmf_tiles", ((37.7, 33), (73.6, 40), (250, 264)), ((52.9, 65), (74.1, 40), (250, 264))),
    *_both("2000x64x64", "hfac_small", ((46.8, 33), (70.6, 40), (2000, 264)), ((48.2, 65), (136, 40), (2000, 264))),
    *_both("2000x64x64", "hfac_int8_small", ((69.7, 42), (85, 40), (2000, 264)), ((79.4, 73), (113, 40), (2000, 264))),
    *_both("4194304x1", "hfac_dense", ((54.4, 60), (49.1, 40), (512, 264)), ((56.0, 60), (49.1, 40), (512, 264))),
    *_both("4194304x1", "dense_look", ((36.3, 60), (65.5, 40), (512, 264)), ((35.8, 60), (49.1, 40), (512, 264))),
)


def table() -> str:
    """As Markdown."""
    lines = [
        "| kernel | parameters | type | instructions per element | KB in flight | blocks |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]

    def cell(pair: tuple[float, float] | None, less: bool) -> str:
        if pair is None:
            return ""
        today, target = pair
        missed = today > target if less else today < target
        return f"{today:g} ({target:g})" if missed else f"{today:g}"

    for b in BUDGETS:
        cells = " | ".join((cell(b.instructions, True), cell(b.in_flight_kb, False), cell(b.blocks, False)))
        lines.append(f"| {b.kernel} | {b.parameters} | {b.dtype} | {cells} |")
    return "\n".join(lines)


def faults(budgets: Sequence[Budget] | None = None) -> Iterable[str]:
    """What exceeds its budget today, by the model."""
    from .launch_model import Model, by_kernel
    from .launch_plan import predicted
    from .multiprocessor import GPUS

    budgets = BUDGETS if budgets is None else budgets
    gpu = GPUS["h200"]
    model = Model(gpu)
    for parameters, optimizer, dtype in dict.fromkeys((b.parameters, b.optimizer, b.dtype) for b in budgets):
        rows = {row["kernel"]: row for row in by_kernel(predicted(parameters, optimizer, dtype, gpu, model).launched)}
        for budget in budgets:
            if (budget.parameters, budget.optimizer, budget.dtype) != (parameters, optimizer, dtype):
                continue
            if budget.kernel not in rows:
                yield f"{budget.kernel} is not launched for {parameters} in {dtype}: its budget has nothing to check"
            else:
                yield from budget.faults(rows[budget.kernel])
