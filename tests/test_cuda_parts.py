"""The CUDA kernels' ops on parts of parameters, compiled for the host: the tests of tests/test_parts.py and all block
orders, one bit for all; few launches, and nothing read on the host."""

import itertools

import emulated
import pytest
import test_parts
import torch
from cases import DTYPES
from test_parity import ieee_square_roots  # noqa: F401  (a fixture for every test here)
from test_parts import BLOCK_PARTS, HFAC_OPTIONS, LAYOUTS, MATRIX_PARTS, SMMF_OPTIONS

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("emulated_backend", "all_orders"),
]

ORDERS = ["forward", "reverse", "shuffled"]
HERE = dict(backend=emulated.NAME)


@pytest.fixture
def all_orders(monkeypatch):
    """The order of blocks changes from op to op."""
    orders, fill = itertools.cycle(ORDERS), emulated.Host.before_launch

    def before_launch(host, workspace):
        emulated.native.set_block_order(next(orders))
        fill(host, workspace)

    monkeypatch.setattr(emulated.Host, "before_launch", before_launch)
    yield
    emulated.native.set_block_order("forward")


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("part", MATRIX_PARTS)
def test_hfac_sums(part, wide):
    for grad_dtype in DTYPES:
        test_parts.test_hfac_sums(part, wide, grad_dtype, "contiguous", **HERE)
    for layout in LAYOUTS:
        test_parts.test_hfac_sums(part, wide, torch.bfloat16, layout, **HERE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", MATRIX_PARTS)
def test_hfac_apply(part, dtype):
    for layout, options in itertools.product(LAYOUTS, HFAC_OPTIONS):
        test_parts.test_hfac_apply(part, dtype, layout, options, **HERE)


def test_hfac_takes_a_list_of_both_arithmetics():
    test_parts.test_hfac_takes_a_list_of_both_arithmetics(**HERE)


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (2, 3)], ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hfac_parts_make_the_whole(dtype, grid):
    for options in HFAC_OPTIONS:
        test_parts.test_hfac_parts_make_the_whole(dtype, grid, options, **HERE)


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("part", BLOCK_PARTS)
def test_smmf_sums(part, transposed):
    for options, dtype in zip(SMMF_OPTIONS, DTYPES, strict=True):
        test_parts.test_smmf_sums(part, dtype, transposed, options, **HERE)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_smmf_takes_a_list_of_both_arithmetics(grad_dtype):
    for options in ("coupled", "no first moment"):
        test_parts.test_smmf_takes_a_list_of_both_arithmetics(options, grad_dtype, **HERE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", SMMF_OPTIONS)
def test_smmf_parts_make_the_whole(options, dtype):
    test_parts.test_smmf_parts_make_the_whole(3, dtype, options, **HERE)
