"""The CUDA kernels, compiled for the host: the whole parity table, block orders, and injected faults that must show."""

import emulated
import pytest
import test_parity
import torch
from cases import DTYPES, OPTIONS, SHAPES, shape_id
from test_parity import ieee_square_roots  # noqa: F401  (a fixture for every test here)

pytestmark = pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)
if emulated.native is not None:
    emulated.register()

ROWS = [(name, key) for name, rows in OPTIONS.items() for key in rows]


@pytest.fixture(autouse=True)
def forward():
    yield
    if emulated.native is not None:
        emulated.native.set_block_order("forward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize(("name", "options"), ROWS)
def test_twenty_steps(name, options, shape, dtype):
    test_parity.test_twenty_steps(emulated.NAME, name, options, shape, dtype)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_list_with_gradients_of_another_type(name, dtype, grad_dtype):
    test_parity.test_a_list_with_gradients_of_another_type(emulated.NAME, name, dtype, grad_dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_autograd_notices_the_write(name):
    test_parity.test_autograd_notices_the_write(name, emulated.NAME)
