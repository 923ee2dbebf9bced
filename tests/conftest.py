"""The checkout's root is on the path, so that the tests also run without an installed package."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

pytest.register_assert_rewrite("gpu_steps", "gpu_graphs")


#: Tests that take a minute: begun last, one of them would keep one process busy while the others have nothing left.
LONG = ("test_parity_in_the_interpreter", "test_cuda_sanitizers", "test_sharded", "test_fsdp2_example", "test_dry_run")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


@pytest.fixture(scope="module")
def emulated_backend():
    """Where a module of tests asks for it, the CUDA kernels on the host are a backend."""
    import emulated

    with emulated.registered():
        yield
