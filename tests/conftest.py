"""Where tests find their helpers, which tests `make test` leaves out, which begin first, and fixtures that several
modules share."""

import gc
import heapq
import itertools
import os
import sys
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import pytest

# The workers of pytest-xdist fill the cores: with threads of its own, each would wait for the others. Tests of threads
# set a number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
FOLDERS = ("helpers", "optim", "backends", "distributed", "tools")
# Modules of tests import helpers, and some import each other, by their bare names, which are unique.
sys.path[:0] = [str(TESTS / folder) for folder in FOLDERS]
# bench/, and hfac itself in a checkout that is not installed; last, because an installed hfac is the one to test.
sys.path.append(str(TESTS.parent))

pytest.register_assert_rewrite("gpu_steps", "gpu_graphs", "suites")

import emulated  # noqa: E402
import interpreter  # noqa: E402
import processes  # noqa: E402, F401 (what forked processes have imported)
import suites  # noqa: E402

#: Tests that take a minute: begun last, one of them would keep one process busy while the others have nothing left.
LONG = ("test_parity_in_the_interpreter", "test_cuda_sanitizers", "test_sharded", "test_fsdp2_example", "test_dry_run")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        leave_out_partial(config, items)
    tables = {}
    for item in items:
        if item.get_closest_marker("pairwise"):
            tables.setdefault((item.path, item.originalname), []).append(item)
    for table in tables.values():
        for item in left_out(table, list(map(values, table))):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def leave_out_partial(config, items):
    """Cases of a test that a slow one of its cases repeats."""
    whole = {(item.path, item.originalname) for item in items if item.get_closest_marker("slow")}
    repeated = [
        item for item in items if item.get_closest_marker("partial") and (item.path, item.originalname) in whole
    ]
    if repeated:
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if item not in repeated]


def pytest_collection_finish():
    """What is there now stays: Python's garbage collector, which some tests call often, need not look at it again."""
    gc.collect()
    gc.freeze()


def values(item):
    """Of a parametrized test, what tells values of a parameter apart; parameters that are given together are one."""
    params = dict(item.callspec.params)
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    together = [tuple(name.replace(",", " ").split() if isinstance(name, str) else name) for name in names]
    found = {some: tuple(id(params.pop(name)) for name in some) for some in together}
    return found | {(name,): (id(value),) for name, value in params.items()}


def left_out(items, values):
    """Those of the items that can be left out while every two values of two parameters still meet in one: greedily, the
    item with most pairs that are new is the next to stay. ``values``: of each item, its values by parameter."""
    pairs = [set(combinations(sorted(mine.items()), 2)) for mine in values]
    queue, seen, rest = [(-len(new), i) for i, new in enumerate(pairs)], set(), []
    heapq.heapify(queue)
    while queue:
        known, i = heapq.heappop(queue)
        new = len(pairs[i] - seen)
        if new == -known:
            seen |= pairs[i]
        elif new:
            heapq.heappush(queue, (-new, i))
        else:
            rest.append(items[i])
    return rest


@pytest.fixture(scope="module")
def emulated_backend():
    """Where a module of tests asks for it, the CUDA kernels on the host are a backend."""
    with emulated.registered():
        yield


@pytest.fixture(params=suites.BACKENDS)
def backend(request):
    """The name of a backend of tensors on the CPU: each in turn, unless a test is parametrized with some (indirect)."""
    if request.param == emulated.NAME:
        if emulated.native is None:
            pytest.skip(emulated.WHY_NOT)
        request.getfixturevalue("emulated_backend")
    return request.param


@pytest.fixture
def all_orders(monkeypatch):
    """The order of blocks of the CUDA kernels on the host changes from launch to launch."""
    if emulated.native is None:
        yield
        return
    emulated.set_orders(monkeypatch, itertools.cycle(emulated.ORDERS))
    yield
    emulated.native.set_block_order("forward")


@pytest.fixture(scope="session", autouse=True)
def faster_interpreter():
    """Where Triton's kernels are interpreted."""
    with interpreter.faster() if "triton" in suites.BACKENDS else nullcontext():
        yield
