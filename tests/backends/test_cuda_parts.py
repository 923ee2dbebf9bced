"""The CUDA kernels' ops on parts of parameters, compiled for the host: the tests of test_parts.py and all block
orders, one bit for all; few launches, and nothing read on the host."""

import itertools

import calls
import emulated
import pytest
import test_parts
import torch
from cases import DTYPES, codes_agree
from test_parity import ieee_square_roots, params_agree  # noqa: F401  (a fixture for every test here)
from test_parts import BLOCK_PARTS, HFAC_OPTIONS, LAYOUTS, MATRIX_PARTS, SMMF_OPTIONS, BlockParts, MatrixParts

from bench.shapes import llama3_8b
from hfac import backends, spec
from hfac.matricize import blocks, cut, square

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("emulated_backend", "all_orders"),
]

HERE = dict(backend=emulated.NAME)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", MATRIX_PARTS)
def test_hfac_int8_apply(part, dtype):
    """With codes that lie as the part does, of a matrix in the middle of a run and at its beginning."""
    for (layout, lay), options in itertools.product(LAYOUTS.items(), HFAC_OPTIONS):
        old_total = 30.0 if options == "clipped" else 0.0
        parts = MatrixParts([part], [dtype], layout=layout)
        known = parts.known() | dict(old_totals=torch.tensor([old_total], dtype=torch.float64))
        known = {name: known[name] for name in ("new_rows", "new_cols", "old_totals", "totals", "mean_squares")}
        shape, rows, cols = parts.cases[0]
        draws = torch.Generator().manual_seed(3)
        whole = torch.randint(-127, 128, shape, dtype=torch.int8, generator=draws)
        codes = lay(whole[slice(*rows), slice(*cols)])
        found = []
        for backend in (emulated.NAME, "reference"):
            param, q = (test_parts.copy_of(tensor) for tensor in (parts.params[0], codes))
            second = parts.by_row["exp_avg_sq_rows"], parts.by_col["exp_avg_sq_cols"]
            states = [[q], *([entries[0].clone()] for entries in second)]
            numbers = dict(lr=0.02, beta1=0.8, backend=backend) | HFAC_OPTIONS[options]
            calls.hfac_int8_apply_([param], parts.grads, *states, **known, **numbers)
            found.append((param, q, *(state[0] for state in states[1:])))
        ours, theirs = found
        params_agree("HFac", ours[0], theirs[0], parts.params[0], 0.02)
        assert not ours[1].numel() or codes_agree(ours[1], theirs[1])
        assert ours[1].stride() == codes.stride() and test_parts.same_bits(ours[2:], theirs[2:])


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


def test_gradients_are_clipped():
    test_parts.test_gradients_are_clipped(**HERE)


def test_found_inf_leaves_every_bit_alone():
    test_parts.test_found_inf_leaves_every_bit_alone(**HERE)


def test_the_order_of_blocks_changes_no_bit_of_a_part(monkeypatch):
    found = []
    for order in emulated.ORDERS:
        emulated.set_orders(monkeypatch, itertools.repeat(order))
        found.append(test_parts.everything(torch.float32, **HERE))
    assert all(test_parts.same_bits(found[0], other) for other in found[1:])


def test_smmf_takes_decays_of_each_part():
    """Which lie on the host, and go to the device with the table."""
    parts = BlockParts(["rows", "a few of a row", "no rows", "columns"], [torch.float32] * 4)
    decays = dict(beta1=torch.linspace(0.6, 0.9, 4, dtype=torch.float64), beta2=torch.linspace(0.5, 0.99, 4))
    options = SMMF_OPTIONS["decoupled"] | decays
    ours, theirs = (parts.step(each, **options) for each in (emulated.NAME, "reference"))
    test_parts.smmf_agrees(parts, ours, theirs, emulated.NAME)


def test_scalars_may_be_tensors():
    parts, results = MatrixParts(["rows", "odd tile"], [torch.float32] * 2), []
    known = parts.known()
    for made in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        options = HFAC_OPTIONS["clipped"] | dict(weight_decay=made(0.1), beta1=made(0.8))
        params, states = parts.apply(emulated.NAME, known, **options)
        sums = parts.sums(emulated.NAME, beta2=made(0.9))
        results.append([*params, *itertools.chain(*states.values(), *sums)])
    assert test_parts.same_bits(*results)


@pytest.mark.parametrize("clip", HFAC_OPTIONS)
def test_totals_of_any_type_and_stride(clip):
    parts, results = MatrixParts(["rows", "odd tile"], [torch.float32] * 2), []
    known = parts.known() | {name: torch.tensor([1.5, 1.5]) for name in ("totals", "mean_squares")}
    for made in (torch.Tensor.double, torch.Tensor.half, lambda numbers: torch.tensor([1.5, 9.0])[0].expand(2)):
        given = {name: made(known[name]) for name in ("totals", "mean_squares")}
        params, states = parts.apply(emulated.NAME, known | given, **HFAC_OPTIONS[clip])
        results.append([*params, *itertools.chain(*states.values())])
    assert test_parts.same_bits(*results[:2]) and test_parts.same_bits(*results[1:])


def test_nothing_is_read_on_the_host(monkeypatch):
    parts, square_parts = MatrixParts(["rows"], [torch.float32]), BlockParts(["rows"], [torch.float32])
    known = parts.known()

    def refused(tensor, *args):
        raise AssertionError("the host reads a tensor")

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refused)
    parts.sums(emulated.NAME)
    parts.apply(emulated.NAME, known, **HFAC_OPTIONS["clipped"])
    square_parts.step(emulated.NAME, **SMMF_OPTIONS["decoupled"])


def test_autograd_notices_the_write_of_a_part():
    test_parts.test_autograd_notices_the_write_of_a_part(**HERE)


@pytest.mark.parametrize("op", [op for op in spec.OPS.values() if op.shard])
def test_the_backend_has_every_op_on_parts(op):
    assert backends.resolve(emulated.NAME, torch.device("cpu"), op) is emulated.ops


def bad_calls():
    """Those that tests/backends/test_native.py has for the CPU's ops on parts, but for the scalars of the launch."""
    native = pytest.importorskip("test_native")
    scalars = ("beta1", "beta2", "lr", "eps", "clip_threshold", "weight_decay", "decoupled_weight_decay", "maximize")
    scalars += ("totals", "mean_squares", "threads")
    for op, cases in native.BAD_PARTS.items():
        if op in ("squares", "hfac_int8_apply"):  # on the CPU alone
            continue
        good = {name: value for name, value in native.PARTS[op].items() if name not in scalars}
        yield op, good, [(argument, value) for argument, value in cases if argument not in scalars]


def test_bad_calls_are_refused():
    for op, good, cases in bad_calls():
        call = getattr(emulated.native.CudaStep, op)
        call(**good)
        for argument, value in cases:
            with pytest.raises(ValueError, match=r"[a-z_]+: "):
                call(**good | {argument: value})


def launches(op, **lists):
    """The kernels of an op on parts that lie nowhere: a plan asks for sizes alone."""
    return [launch["kernel"] for launch in getattr(emulated.native.CudaStep, op)(**lists).plan()]


@pytest.mark.parametrize(("rank", "ranks"), [(0, 8), (3, 64)])
def test_a_sharded_step_of_llama_takes_few_launches(rank, ranks):
    """Rows of each matrix, as `fully_shard` cuts them, in bfloat16; all addresses are the same one."""
    shapes = [shape for shape in llama3_8b() if cut(shape) is not None]
    cuts = [(shape[0] * rank // ranks, shape[0] * (rank + 1) // ranks) for shape in shapes]
    m, n = [b - a for a, b in cuts], [shape[1] for shape in shapes]
    at, counts = [4096] * len(shapes), [a * b for a, b in zip(m, n, strict=True)]
    lists = dict.fromkeys(("row_sums", "new_rows"), at)
    by_col = dict.fromkeys(("col_sums", "col_squares", "col_ratios"), at)
    sums = dict(grads=at, numels=counts, grad_dtypes=1, state_dtypes=0, rows=m, whole_cols=n, old_rows=at)
    found = launches("hfac_sums", **sums, **lists, **by_col)
    assert set(found) == {"hfac_stats", "hfac_sums_fold"} and len(found) <= 8, found
    whole = dict(params=at, grads=at, numels=counts, param_dtypes=1, grad_dtypes=1)
    moments = [f"exp_avg_{kind}{side}" for kind in ("", "sq_") for side in ("rows", "cols")]
    moments += ["row_sums", "new_rows", "col_sums", "new_cols"]
    sizes = dict(rows=m, cols=n, whole_rows=[shape[0] for shape in shapes], whole_cols=n)
    found = launches("hfac_apply", **whole, **sizes, **dict.fromkeys(moments, at))
    assert found == ["hfac_apply_fold", "hfac_update"]

    squares = [square(a * b) for a, b in shapes]
    places = [
        blocks([(a * cols, (b - a) * cols)], side) for (a, b), cols, (_, side) in zip(cuts, n, squares, strict=True)
    ]
    signs = dict(exp_avg_signs=at, sign_bytes=[count // 8 for count in counts], sign_slices=m)
    moments = moments[:4] + ["new_rows", "new_cols", "new_sq_rows", "new_sq_cols"]
    sizes = dict(rows=[rows for rows, _ in squares], cols=[cols for _, cols in squares], blocks=places)
    found = launches("smmf_sums_step", **whole, **signs, **sizes, **dict.fromkeys(moments, at))
    assert set(found) == {"smmf_tiles", "smmf_sums_fold"} and len(found) <= 6, found
