"""The checkout's root is on the path, so that the tests also run without an installed package."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture(scope="module")
def emulated_backend():
    """Where a module of tests asks for it, the CUDA kernels on the host are a backend."""
    import emulated

    with emulated.registered():
        yield
