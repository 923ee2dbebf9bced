"""The backend "cuda-emulated": the CUDA kernels compiled for the host, for tensors on the CPU. For tests only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from hfac import backends
from hfac.backends import cuda
from hfac.optim import options, state

try:
    native: Any = import_module("hfac._emulated")
except ImportError:
    native = None

NAME = "cuda-emulated"
WHY_NOT = "hfac._emulated is not built: make test-emulated"


class Host:
    """The host as a device: no streams, and a workspace in which every partial sum that nobody wrote is NaN."""

    def __init__(self) -> None:
        self.native = native

    def l2_bytes(self, device: torch.device) -> int:
        return 0

    def stream(self, device: torch.device) -> int:
        return 0

    def used_on_another_stream(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        pass

    def capturing(self) -> bool:
        return False

    def host_table(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def before_launch(self, workspace: Tensor) -> None:
        workspace.fill_(0xFF)  # as floats and as doubles: NaN


ops = cuda.Ops(Host())


def _why_not(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it takes tensors on the CPU only."


@contextmanager
def registered() -> Iterator[None]:
    """Makes the backend known to `hfac.backends` for a while, by name only: "auto" never takes it."""
    names, rule = backends.NAMES, state.COMMON_RULES["backend"]
    backends.TABLE[NAME] = backends.Backend(
        NAME,
        "CUDA kernels on the host",
        lambda device: None if device.type == "cpu" else "it is for the CPU.",
        lambda: ops,
    )
    backends.NAMES = (*names, NAME)
    state.COMMON_RULES["backend"] = options.choice(*backends.NAMES)
    try:
        yield
    finally:
        del backends.TABLE[NAME]
        backends.NAMES, state.COMMON_RULES["backend"] = names, rule


def provide(backend: str, request: pytest.FixtureRequest) -> None:
    """Makes a backend that a test is parametrized with known, if it is this one; skips where it is not built."""
    if backend == NAME:
        if native is None:
            pytest.skip(WHY_NOT)
        request.getfixturevalue("emulated_backend")
