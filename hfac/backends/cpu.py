"""The C++ kernels of `hfac._C` for tensors on the CPU: tensors become addresses, types and strides.

Same results as `hfac.reference`; `hfac.ops` has checked the arguments. Nothing here loops over parameters in Python
except the list comprehensions that read what the extension is told.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..memory import bump_versions
from ..spec import Op
from . import addresses
from .contract import Moved, Operands, Statistics

Snapshot = Any  # of `hfac.backends.snapshots`, which reads through the extension that is loaded here
Tensors = Sequence[Tensor]

try:
    _C: Any = import_module("hfac._C")
except ImportError as error:  # not built, or built for another Python: `why_not` tells
    _C, _IMPORT_ERROR = None, str(error)

_HERE = Path(__file__).parents[1]
_BUILD_INFO = _HERE / "_build_info.json"


def why_not(device: torch.device) -> str | None:
    """None where these kernels serve ``device``, else the reason and what to do."""
    if _C is None:
        built = _hidden()
        if built is not None:
            return (
                f"Python has imported hfac from {_HERE}, where the extension hfac._C is not built, in place of the "
                f"installed {built}, which has it. Start Python in another folder than the checkout, or run: "
                "python -m pip install -e . there."
            )
        return (
            f"the extension hfac._C is not built ({_build_failure()}). Build it with: python -m pip install -e . in a "
            "checkout of hfac, on a machine with a C++17 compiler."
        )
    if device.type != "cpu":
        return f"the C++ kernels serve tensors on the CPU, not on {device}. Use backend='auto'."
    return None


def _hidden() -> Path | None:
    """The folder of an installed hfac that has the extension, where a checkout comes before it on the path."""
    for found in metadata.distributions(name="hfac"):
        folder = Path(str(found.locate_file("hfac")))
        if folder.resolve() != _HERE.resolve() and any(folder.glob("_C*")):
            return folder
    return None


def _build_failure() -> str:
    return build_info().get("why_not") or _IMPORT_ERROR


def build_info() -> dict[str, Any]:
    """What the build wrote down of itself; empty where none did. ``said``: a compiler's last lines, where it failed."""
    try:
        return json.loads(_BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}


def has(op: Op) -> bool:
    return hasattr(_C, op.name.removesuffix("_"))


class CpuCall:
    """An op bound to its operands; see `hfac.backends`."""

    #: Where gradients have not moved their addresses are not read anew.
    compares = True

    def __init__(self, operands: Operands) -> None:
        self._name, self._written = operands.op.name.removesuffix("_"), operands.written
        self._operands = addresses.of_operands(operands)
        #: of the last step, where it had one: a snapshot of its gradients, and what the extension was told of them
        self._told: tuple[Snapshot, dict[str, Any]] | None = None
        #: of the last step, where it was told nothing but gradients, numbers and flags: their snapshot, and all of it
        self._last: tuple[Snapshot, dict[str, Any]] | None = None

    def __call__(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        seen: Snapshot | None = None,
        statistics: Statistics | None = None,
        watched: Tensor | None = None,
        **numbers: Any,
    ) -> None:
        """The op, as the function of `hfac.reference` computes it; with ``statistics`` of these gradients and numbers
        (`CpuTwice`), the rest of it."""
        alone = statistics is None and watched is None and (nonfinite is None or nonfinite.is_contiguous())
        if statistics is not None:
            numbers.update(stage="rest", kept=statistics.memory)
        if watched is not None:
            numbers.update(watched=watched.data_ptr())
        if self._written:
            bump_versions(self._written)
        self._last = None
        told = self._run(grads, nonfinite, numbers, seen)
        if alone and seen is not None:
            self._last = seen, told

    def again(
        self,
        seen: Snapshot,
        numbers: Mapping[str, Any],
        nonfinite: Tensor | None = None,
        moved: Moved | None = None,
    ) -> bool:
        last = self._last  # another thread may replace it
        if last is None or ("nonfinite" in last[1]) != (nonfinite is not None):
            return False
        if last[0] is not seen:
            if moved is None or last[0] is not moved[0]:
                return False
            self._last = last = seen, {**last[1], "grads": addresses.addresses(moved[1])}
        if self._written:
            bump_versions(self._written)
        told = {**last[1], **_on_host(numbers), "threads": torch.get_num_threads()}
        if nonfinite is not None:
            told["nonfinite"] = nonfinite.data_ptr()
        getattr(_C, self._name)(**told)
        return True

    def _run(
        self, grads: Tensors, nonfinite: Tensor | None, numbers: dict[str, Any], seen: Snapshot | None
    ) -> dict[str, Any]:
        """What the extension was told."""
        before = self._told  # another thread may replace it
        if before is not None and before[0] is seen:
            given = dict(before[1])
        else:
            given = addresses.of_grads(grads)
            if 0 in given["grads"]:  # empty, or zeros without memory
                grads = memory.without_zerotensors(grads)
                given["grads"] = addresses.addresses(grads)
            elif seen is not None:
                self._told = seen, dict(given)
        flags = None
        if nonfinite is not None:
            flags = nonfinite.contiguous()
            given["nonfinite"] = flags.data_ptr()
        given |= _on_host(numbers)
        told = self._operands | given | {"threads": torch.get_num_threads()}
        getattr(_C, self._name)(**told)
        if flags is not nonfinite and nonfinite is not None and flags is not None:
            nonfinite.copy_(flags)
        return told


def _on_host(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as the extension takes them."""
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in numbers.items()}


class CpuTwice(CpuCall):
    """Of H-Fac's matrices, whose statistics may be taken first."""

    def statistics(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        seen: Snapshot | None = None,
        watched: Tensor | None = None,
        **numbers: Any,
    ) -> Statistics:
        """2 numbers a row and 3 a column lie behind the sums of squares, in their memory. ``watched`` is the step's to
        write."""
        sizes = {name: self._operands[name] for name in ("rows", "cols", "param_dtypes")}
        count = len(grads)
        start = -(-8 * max(count, 1) // 64) * 64  # on a line of the cache
        room = torch.empty(start + _C.hfac_kept(**sizes), dtype=torch.uint8, device="cpu")
        found = Statistics(room[: 8 * count].view(torch.float64).zero_(), room.data_ptr() + start)
        numbers |= {"stage": "statistics", "kept": found.memory, "squares": room.data_ptr()}
        self._run(grads, nonfinite, numbers, seen)
        return found


def bind(operands: Operands) -> CpuCall:
    return (CpuTwice if operands.op.reads_twice else CpuCall)(operands)


def squares(grads: Tensors) -> Tensor:
    """The sum of squares of every tensor, [len(grads)] in float64: its bits do not depend on the number of threads."""
    found = torch.zeros(len(grads), dtype=torch.float64, device="cpu")
    _C.squares(
        **addresses.of_grads(grads),
        numels=addresses.numels(grads),
        sums=found.data_ptr() if len(grads) else 0,
        threads=torch.get_num_threads(),
    )
    return found


def counters(steps: Sequence[Tensor]) -> Any:
    """What reads and advances 0-d float32 tensors together, for as long as they lie where they are. Autograd is not
    told: nothing is differentiated by the number of a step. None with an extension from before it had them."""
    return _C.Counters(addresses.addresses(steps)) if hasattr(_C, "Counters") else None


def copier(to: Sequence[Tensor], from_: Sequence[Tensor], ours: bool) -> Callable[[], None]:
    """What copies each of some contiguous tensors to another of its size and type, for as long as they lie where they
    are. ``ours``: no one else sees what it is copied to, so autograd need not be told."""
    bytes_ = [tensor.numel() * tensor.element_size() for tensor in to]
    targets, sources = addresses.addresses(to), addresses.addresses(from_)

    def copy() -> None:
        if not ours:
            bump_versions(to)
        _C.copy_memory(targets, sources, bytes_)

    return copy
