"""Where tests find their helpers, which tests begin first, and fixtures that several modules share."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FOLDERS = ("helpers", "optim", "backends", "distributed", "tools")
# Modules of tests import helpers, and some import each other, by their bare names, which are unique.
sys.path[:0] = [str(TESTS / folder) for folder in FOLDERS]
# bench/, and hfac itself in a checkout that is not installed; last, because an installed hfac is the one to test.
sys.path.append(str(TESTS.parent))

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
