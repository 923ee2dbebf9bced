"""One run of the benchmark: gates, then case by case the measurements, as rows."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import launches, machine, memory, record, report, shapes, timing
from bench.contestants import (
    OPTIMIZERS,
    Contestant,
    op_contestant,
    op_operands,
    ops_of,
    rival_contestant,
    step_contestant,
)
from bench.gate import why_red
from bench.problem import Problem, unhealthy
from bench.report import Row
from bench.rivals import EAGER_SMMF, RIVALS, YARDSTICK
from hfac import backends

_COPY = ("copy", "memory to memory")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        ops: names of ops to measure by themselves.
        optimizers: those of `OPTIMIZERS` whose whole step is measured.
        shapes: names as `bench.shapes.parse` takes them.
        rounds, seconds: as `bench.timing.measure` takes them.
        quick: kept with the rows.
        reference: whether the reference is measured even where it is not among the backends; not for lists so large
            that its temporaries have no room.
        rivals: those of `RIVALS` that whole steps are measured beside; None for all.
    """

    ops: tuple[str, ...]
    optimizers: tuple[str, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    backends: tuple[str, ...]
    device: torch.device
    rounds: int
    seconds: float
    quick: bool
    reference: bool = True
    rivals: tuple[tuple[str, str], ...] | None = None


@dataclass
class Session:
    """Carries out a plan.

    Attributes:
        say: takes every line for the reader.
        rows: what has been measured.
        failures: gates that were red and values that would have misled; their numbers are not among the rows.
        gates: why an op of a backend is red for a type, None where it is green; sessions may share what they found.
    """

    plan: Plan
    say: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    gates: dict[tuple[str, str, str], str | None] = field(default_factory=dict)

    def run(self) -> None:
        """Measures everything, with a table after every case."""
        self._setting = machine.describe(self.plan.device)
        self.say(f"On {report.setting(self._setting)}\n\nColumns:\n{report.legend()}\n")
        missing = self._missing()
        if missing:
            self.say(missing + "\n")
        for dtype in self.plan.dtypes:
            for name in self.plan.shapes:
                problem = Problem(shapes.parse(name), getattr(torch, dtype), self.plan.device)
                for kind, what, contestants in self._cases(problem, dtype):
                    rows = self._measure(kind, f"{name}, {what}", name, problem, dtype, contestants)
                    if rows:
                        self.rows += rows
                        self.say(f"{report.case_title(rows[0])}\n{report.text_table(rows)}\n")
                        noise = report.noise(rows)
                        if noise:
                            self.say(noise + "\n")
        if missing:
            self.say(missing)

    def _missing(self) -> str | None:
        """Why no fused kernels are measured, and what to do; None where there are some."""
        device = self.plan.device
        fused = [name for name in backends.TABLE if name != "reference"]
        if not set(fused).isdisjoint(backends.available(device)):
            return None
        reasons = [backends.TABLE[name].why_not(device) for name in (("cpu",) if device.type == "cpu" else fused)]
        return (
            "No fused kernels are here, so that every row of HFac and SMMF is the reference in plain torch, many times "
            f"slower: {' '.join(filter(None, reasons))}"
        )

    def _cases(self, problem: Problem, dtype: str) -> Iterator[tuple[str, str, list[Contestant]]]:
        """(kind, what is measured, contestants) of every case of one list."""
        for op in self.plan.ops:
            params, _ = op_operands(op, problem.params)
            green = [backend for backend in self.plan.backends if self._green(op, backend, dtype)]
            if not green or not sum(param.numel() for param in params):
                continue
            mine = [op_contestant(op, backend, problem) for backend in self._with_reference(green)]
            rivals = self._rivals([YARDSTICK], params)
            yield "op", op, [contestant for contestant in (*mine, *rivals) if contestant is not None]
        steps = [
            step_contestant(optimizer, backend, problem.params)
            for optimizer in self.plan.optimizers
            for backend in self._with_reference(self.plan.backends)
            if all([self._green(op, backend, dtype) for op in ops_of(optimizer)])
        ]
        if steps:
            wanted = [rival for rival in RIVALS if rival[0] not in OPTIMIZERS or rival[0] in self.plan.optimizers]
            if not self.plan.reference:
                wanted.remove(EAGER_SMMF)
            if self.plan.rivals is not None:
                wanted = [rival for rival in wanted if rival in self.plan.rivals]
            yield "step", "step", [*steps, *self._rivals(wanted, problem.params)]

    def _with_reference(self, names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys((*names, "reference") if self.plan.reference else names))

    def _green(self, op: str, backend: str, dtype: str) -> bool:
        """Whether the op may be timed; the reference is what it is compared to."""
        key = op, backend, dtype
        if backend != "reference" and key not in self.gates:
            self.gates[key] = why_red(op, backend, getattr(torch, dtype), self.plan.device)
            if self.gates[key] is not None:
                self._fail(
                    f"PARITY GATE RED: {op} of backend {backend!r} in {dtype} differs from the reference "
                    f"({self.gates[key]}). It gets no numbers, nor does the step() that calls it."
                )
        return self.gates.get(key) is None

    def _rivals(self, rivals: list[tuple[str, str]], params: list[torch.Tensor]) -> list[Contestant]:
        """Those that this torch can carry out on these parameters."""
        able = []
        for rival in rivals:
            try:
                contestant = rival_contestant(rival, params)
                contestant.call()
                unhealthy(contestant.tensors())  # of states that are no plain tensors this may be more than they can
            except Exception as error:  # whatever another package raises
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.say(f"{', '.join(rival)}: left out, it cannot be carried out here ({reason})")
                contestant = None  # with the states that it made before it ran out of memory
                if self.plan.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            able.append(contestant)
        return able

    def _measure(
        self, kind: str, case: str, name: str, problem: Problem, dtype: str, contestants: list[Contestant]
    ) -> list[Row]:
        device = self.plan.device
        copy, copied_bytes = timing.copy_call(device)
        calls = {_COPY: copy, **{contestant.key: contestant.call for contestant in contestants}}
        samples = timing.measure(calls, device, self.plan.rounds, self.plan.seconds)
        for contestant in contestants:
            wrong = unhealthy(contestant.tensors())
            if wrong is not None:
                self._fail(f"{case}, {dtype}: after {', '.join(contestant.key)} {wrong}; the case gets no numbers.")
                return []
        params = [tensor for tensor in contestants[0].tensors() if isinstance(tensor, torch.nn.Parameter)]
        elements = sum(param.numel() for param in params)
        copy_rate = copied_bytes / timing.quantiles(samples[_COPY]).median / 1e9
        rows = []
        for contestant in contestants:
            mine = samples[contestant.key]
            time, traffic = timing.quantiles(mine), contestant.traffic()
            least, most = (count / time.median / 1e9 for count in (traffic.least, traffic.most))
            rivals = {", ".join(YARDSTICK): YARDSTICK, "reference": (contestant.name, "reference")}
            if contestant.name == "SMMF":
                rivals[", ".join(EAGER_SMMF)] = EAGER_SMMF
            row = {
                "kind": kind,
                "name": contestant.name,
                "backend": contestant.backend,
                "case": case,
                "shapes": name,
                "dtype": dtype,
                "tensors": len(params),
                "parameters": elements,
                "rounds": len(mine),
                "ms": time.median * 1e3,
                "ms_q20": time.q20 * 1e3,
                "ms_q80": time.q80 * 1e3,
                "ms_samples": [seconds * 1e3 for seconds in mine.values()],
                "ns_per_param": time.median * 1e9 / elements,
                "bytes_per_param": traffic.least / elements,
                "bytes_per_param_reread": traffic.most / elements,
                "gb_per_s": least,
                "gb_per_s_reread": most,
                "copy_gb_per_s": copy_rate,
                "copy_gb_per_s_samples": [copied_bytes / seconds / 1e9 for seconds in samples[_COPY].values()],
                "copy_share": least / copy_rate,
                "copy_share_reread": most / copy_rate,
                "speedup": {
                    label: vars(timing.speedup(mine, samples[rival]))
                    for label, rival in rivals.items()
                    if rival in samples and rival != contestant.key
                },
                "transient_bytes_per_param": memory.peak_transient_bytes(contestant.call, device) / elements,
                "kept_bytes_per_param": contestant.kept_bytes() / elements,
                "state_bytes_per_param": contestant.state_bytes() / elements,
                "launches": launches.count(contestant.call, device),
                "quick": self.plan.quick,
                "number": len(self.rows) + len(rows),
                **self._setting,
            }
            assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
            rows.append({"key": record.row_key(row), **row})
        return rows

    def _fail(self, message: str) -> None:
        self.failures.append(message)
        self.say(message + "\n")


def covered(names: list[str], every_op: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(ops, optimizers) that the names on the command line stand for: an op; "hfac" or "smmf" for all of one
    optimizer; "step" for the whole steps of both."""
    ops: dict[str, Any] = {}
    optimizers: dict[str, Any] = {}
    for name in names:
        for optimizer in OPTIMIZERS:
            if name in (optimizer.lower(), "step"):
                optimizers[optimizer] = None
            if name == optimizer.lower():
                ops.update(dict.fromkeys(ops_of(optimizer)))
        if name in every_op:
            ops[name] = None
    return tuple(ops), tuple(optimizers)
