"""The Triton kernels of `hfac.triton_kernels`: for GPUs of any maker, without nvcc; Triton wants a C compiler.

Nothing of Triton is imported before a step asks for it.
"""

import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable

import torch

from ..spec import (
    HFAC_APPLY,
    HFAC_DENSE_STEP,
    HFAC_INT8_APPLY,
    HFAC_INT8_STEP,
    HFAC_STEP,
    HFAC_SUMS,
    SMMF_DENSE_STEP,
    SMMF_STEP,
    SMMF_SUMS_STEP,
    Op,
)
from .contract import Operands

DEVICES = ("cuda", "xpu")
#: The first version of Triton that the kernels are compiled and launched with: launches of 3.2 take other arguments.
OLDEST = (3, 3)
OPS = {
    HFAC_STEP,
    HFAC_INT8_STEP,
    HFAC_DENSE_STEP,
    HFAC_SUMS,
    HFAC_APPLY,
    HFAC_INT8_APPLY,
    SMMF_STEP,
    SMMF_DENSE_STEP,
    SMMF_SUMS_STEP,
}


def has(op: Op) -> bool:
    return op in OPS


def why_not(device: torch.device) -> str | None:
    """None where these kernels serve ``device``, else the reason and what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. Install it with: python -m pip install triton."
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cpu":
        if not interpreted:
            return (
                "the Triton kernels serve tensors on a GPU; on the CPU they run only in Triton's interpreter, which is "
                "slow and meant for tests. Use backend='auto', or set TRITON_INTERPRET=1 before Python starts."
            )
        return None
    if device.type not in DEVICES:
        return f"the Triton kernels serve tensors on {' and '.join(DEVICES)}, not on {device}. Use backend='auto'."
    if interpreted:
        return (
            "TRITON_INTERPRET=1 runs the Triton kernels on the host, where they cannot follow the addresses of tensors "
            f"on {device}. Unset it, or move the tensors to the CPU."
        )
    reason = _driver()
    if reason is not None:
        return f"Triton has no driver for a GPU here ({reason}). Check the GPU's driver, or use backend='auto'."
    if tuple(map(int, _version().split(".")[:2])) < OLDEST:
        return (
            f"Triton {_version()} is installed, and the kernels need {'.'.join(map(str, OLDEST))} or later, which "
            "comes with torch 2.7 and later. Install it with: python -m pip install --upgrade torch."
        )
    return None


def _version() -> str:
    import triton

    return triton.__version__


@functools.cache
def _driver() -> str | None:
    """Why Triton finds no GPU; None where it finds one."""
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a broken installation may raise: importing hfac never fails
        return f"{type(error).__name__}: {error}"
    return None


def bind(operands: Operands) -> Callable[..., None]:
    """The op bound to its operands; see `hfac.backends`."""
    from ..triton_kernels.shards import ShardCall
    from ..triton_kernels.step import Bound

    return ShardCall(operands) if operands.op.shard else Bound(operands)


def cold(step: Callable[[], object]) -> list[tuple[str, float]]:
    """Makes a step with nothing in Triton's cache on disk, and returns the kernels that it compiles, with the seconds
    of each. What this process has compiled before is not compiled again."""
    from ..triton_kernels import launcher

    kept = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="hfac-triton-") as folder, launcher.timed() as found:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            step()
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if kept is not None:
                os.environ["TRITON_CACHE_DIR"] = kept
    return found
