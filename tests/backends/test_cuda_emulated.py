"""The CUDA kernels, compiled for the host: the whole parity table, block orders, and what only these kernels have."""

import copy

import calls
import emulated
import pytest
import test_parity
import torch
from cases import DTYPES, OPTIONS, ROUGH_UPDATE, SHAPES, gradient, shape_id, smmf_agrees
from suites import BF16, F16, F32, laid_out, same
from test_parity import ieee_square_roots  # noqa: F401  (a fixture for every test here)

import hfac
from hfac import backends, matricize
from hfac.signs import pack_signs

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("emulated_backend"),
]

ROWS = [(name, key) for name, rows in OPTIONS.items() for key in rows]
#: Beyond the common table: borders of tiles, rows that no register holds, and both paths of each.
LARGE = [(300, 2100), (2100, 300), (300, 2104), (2104, 304), (5, 9000), (20, 14344), (3, 17001)]
# H-Fac's statistics take rows in other ways, by their length.
LARGE += [(700, 64), (90, 512), (60, 1536), (40, 5000), (35, 16424)]
# So do the threads that share a row's columns add up their sums: two, four, eight, sixteen or sixty-four of them.
LARGE += [(600, 96), (300, 192), (90, 384), (40, 1024), (30, 2048), (20, 3072)]
# As many chunks of a fold as each block of the update adds up itself, and one more.
LARGE += [(5, 8192), (5, 8193)]


@pytest.fixture(autouse=True)
def forward():
    yield
    if emulated.native is not None:
        emulated.native.set_block_order("forward")


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize(("name", "options"), ROWS)
def test_the_parity_table(name, options, shape, dtype, monkeypatch, all_orders):
    """Every case in all three orders of blocks: the order changes from op to op."""
    monkeypatch.setattr(test_parity, "STEPS", 5)  # each from the same state: the later ones show nothing new
    test_parity.test_twenty_steps(emulated.NAME, name, options, shape, dtype)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
@pytest.mark.parametrize("name", OPTIONS)
def test_several_tiles(name, shape, dtype, monkeypatch):
    monkeypatch.setattr(test_parity, "STEPS", 2)
    test_parity.test_twenty_steps(emulated.NAME, name, "all", shape, dtype)


@pytest.mark.pairwise
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_list_with_gradients_of_another_type(name, dtype, grad_dtype):
    test_parity.test_a_list_with_gradients_of_another_type(emulated.NAME, name, dtype, grad_dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_autograd_notices_the_write(name):
    test_parity.test_autograd_notices_the_write(name, emulated.NAME)


@pytest.mark.parametrize(
    "shape", [(80, 64), (400, 96), (160, 256), (40, 768), (40, 4096), (40, 8192), (40, 9000), (40, 16384)], ids=shape_id
)
def test_a_copy_that_is_used_before_its_wait_is_seen(shape):
    """Statistics of rows of every length that reach shared memory by copies; the emulation leaves out their waits."""
    _, plain = steps("HFac", [shape], count=1)
    emulated.native.inject_fault("wait")
    try:
        _, early = steps("HFac", [shape], count=1)
    finally:
        emulated.native.inject_fault("")
    for name in ("exp_avg_sq_row", "exp_avg_sq_col"):
        assert plain[0][name].isfinite().all() and early[0][name].isnan().any(), name


def test_a_parameter_that_is_used_before_its_wait_is_seen():
    """Of a small float32 matrix a thread's first row is in shared memory until it is updated; a block has 16 of 128."""
    shape = (30, 128)
    _, plain = steps("HFac", [shape], count=1)
    emulated.native.inject_fault("wait")
    try:
        early, states = steps("HFac", [shape], count=1)
    finally:
        emulated.native.inject_fault("")
    assert early[0][:16].isnan().all() and early[0][16:].isfinite().all()
    for name, value in plain[0].items():
        assert torch.equal(torch.as_tensor(states[0][name]), torch.as_tensor(value)), name


def steps(name, shapes, *, backend=emulated.NAME, count=3, dtype=torch.float32, **kwargs):
    """Parameters and states after a few steps on fixed gradients."""
    params = [torch.nn.Parameter(gradient(shape, k, dtype)) for k, shape in enumerate(shapes)]
    optimizer = getattr(hfac, name)(params, **kwargs, backend=backend)
    for step in range(1, count + 1):
        for k, p in enumerate(params):
            p.grad = gradient(p.shape, 100 * k + step, dtype)
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "shape", [(83, 64), (43, 60), (390, 96), (21, 768), (19, 4096), (18, 8192), (17, 9000), (17, 16384)], ids=shape_id
)
def test_statistics_with_options_have_the_bits_of_plain_ones(shape, dtype):
    """Gradients that are looked at, and scaled by a power of two, in rows of every length: their kernels keep what all
    rows have in common in other places."""
    found = []
    for scale in (None, 4.0):
        param = torch.nn.Parameter(gradient(shape, 0, dtype))
        optimizer = hfac.HFac([param], backend=emulated.NAME, nonfinite="skip" if scale else "propagate")
        for step in (1, 2):
            param.grad = gradient(shape, step, dtype) * (scale or 1)
            optimizer.grad_scale = torch.tensor(scale) if scale else None
            optimizer.step()
        state = {key: value for key, value in optimizer.state[param].items() if key.startswith("exp_avg")}
        found.append(([param], [state]))
    assert_same_bits(*found)


def assert_same_bits(ours, theirs):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            assert torch.equal(mine[key], other[key]), key


@pytest.mark.pairwise
@pytest.mark.parametrize("order", emulated.ORDERS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), ROWS)
def test_the_order_of_blocks_changes_no_bit(name, options, dtype, order):
    shapes = [(300, 2104), (127, 129), (70, 24), (9000,), (6, 4, 3, 3), (1024,), ()]
    expected = steps(name, shapes, dtype=dtype, **OPTIONS[name][options])
    emulated.native.set_block_order(order)
    assert_same_bits(steps(name, shapes, dtype=dtype, **OPTIONS[name][options]), expected)


@pytest.mark.pairwise
@pytest.mark.parametrize("order", emulated.ORDERS[1:])
@pytest.mark.parametrize("shape", [(24, 18), (127, 129), (256, 320), (4097,)], ids=shape_id)
@pytest.mark.parametrize("name", OPTIONS)
def test_parity_in_other_orders(name, shape, order, monkeypatch):
    monkeypatch.setattr(test_parity, "STEPS", 5)
    emulated.native.set_block_order(order)
    test_parity.test_twenty_steps(emulated.NAME, name, "skip", shape, torch.float32)


def whole_keys(state):
    """Of a state those entries that no sum enters."""
    return [key for key in ("exp_avg_sign", "exp_avg", "exp_avg_sq") if key in state]


@pytest.mark.skipif("cpu" not in backends.available(torch.device("cpu")), reason="hfac._C is not built")
@pytest.mark.parametrize(
    ("name", "options"),
    [*(("SMMF", key) for key in OPTIONS["SMMF"]), ("HFac", "unclipped")],
)
def test_what_depends_on_no_sum_equals_the_cpu_kernels_to_the_bit(name, options):
    """One step from the same state: SMMF's parameters and signs, and moments that are whole, with H-Fac's parameters
    where those are not clipped by their norm. Sums are added in another order: the CPU's kernels take the columns of
    128 rows and more one row after the other, a GPU's block takes a tile, thread by thread."""
    kwargs = OPTIONS[name][options]
    shapes = [shape for shape in SHAPES if shape != (0,)] + [(300, 2104)]
    params = [torch.nn.Parameter(gradient(shape, k, torch.float32)) for k, shape in enumerate(shapes)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = getattr(hfac, name)(params, **kwargs, backend=emulated.NAME)
    theirs = getattr(hfac, name)(twins, **kwargs, backend="cpu")
    for step in range(1, 5):
        for k, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = q.grad = gradient(p.shape, 100 * k + step, torch.float32)
            theirs.state[q] = copy.deepcopy(ours.state[p])
        ours.step()
        theirs.step()
        for p, q in zip(params, twins, strict=True):
            if name == "SMMF" or "exp_avg" in ours.state[p]:
                assert torch.equal(p, q)
            for key in whole_keys(ours.state[p]):
                assert torch.equal(ours.state[p][key], theirs.state[q][key]), key


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "every second", "shifted"])
@pytest.mark.parametrize("which", ["param", "grad"])
@pytest.mark.parametrize(("name", "options"), [("HFac", "all"), ("HFac", "int8"), ("SMMF", "all")])
def test_any_layout_gives_the_bits_of_a_contiguous_copy(name, options, which, layout, dtype):
    values, grads = gradient((24, 40), 1, dtype), [gradient((24, 40), 2 + k, dtype) for k in range(2)]
    results = []
    for given in (False, True):
        start = laid_out(values, layout) if given and which == "param" else values.clone()
        param = torch.nn.Parameter(start)
        optimizer = getattr(hfac, name)([param], **OPTIONS[name][options], backend=emulated.NAME)
        for grad in grads:
            grad = laid_out(grad, layout) if given and which == "grad" else grad
            test_parity.step_with(optimizer, [param], [grad])
        results.append(([param.detach().clone()], [optimizer.state[param]]))
    assert_same_bits(*results)


def bound(op, shape=(40, 24), dtype=torch.float32):
    """A bound op on one parameter, its parameter and states, and its scalars."""
    param = gradient(shape, 0, dtype)
    rows, cols = shape
    if "dense" in op:
        states = {name: [torch.zeros(shape)] for name in ("exp_avgs", "exp_avg_sqs")}
    else:
        first = () if op == "hfac_int8_step" else ("",)
        states = {f"exp_avg_{kind}rows": [torch.zeros(rows)] for kind in (*first, "sq_")}
        states |= {f"exp_avg_{kind}cols": [torch.zeros(cols)] for kind in (*first, "sq_")}
        if not first:
            states["exp_avg_qs"] = [torch.zeros(shape, dtype=torch.int8)]
    scalars = dict(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, maximize=False)
    if op.startswith("hfac"):
        scalars["clip_threshold"] = 0.7
    else:
        scalars["decoupled_weight_decay"] = True
        if op == "smmf_step":
            states["exp_avg_signs"] = [torch.zeros(rows, cols // 8, dtype=torch.uint8)]
    return calls.bind(emulated.ops, op, [param], states), param, states, scalars


OPS = ["hfac_step", "hfac_int8_step", "hfac_dense_step", "smmf_step", "smmf_dense_step"]


def everything(param, states):
    return [param.clone(), *(tensor.clone() for tensors in states.values() for tensor in tensors)]


@pytest.mark.pairwise
@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS["HFac"])
def test_a_matrix_that_a_block_holds_steps_to_the_bits_of_others(options, dtype, order):
    """Where the norm of all gradients is wanted, and is far below its limit, it takes the launches of a larger one."""
    emulated.native.set_block_order(order)
    shapes = [(64, 64), (16, 256), (32, 104), (17, 16), (3, 8)]
    given = OPTIONS["HFac"][options]
    assert_same_bits(
        steps("HFac", shapes, dtype=dtype, **given), steps("HFac", shapes, dtype=dtype, max_grad_norm=1e30, **given)
    )


#: Matrices of SMMF's that a warp takes: of one row at a time and of 32, of 128 rows, with lanes that have no column.
SMALL = [(64, 64), (16, 256), (127, 8), (48, 40), (62, 32), (24, 24), (8, 8), (1, 64), (128, 24)]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
@pytest.mark.parametrize("options", OPTIONS["SMMF"])
def test_a_matrix_that_a_warp_holds(options, shape, dtype, monkeypatch, all_orders):
    monkeypatch.setattr(test_parity, "STEPS", 5)
    test_parity.test_twenty_steps(emulated.NAME, "SMMF", options, shape, dtype)


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS["SMMF"])
def test_warps_of_a_block_step_their_matrices_to_the_bits_of_one_alone(options, dtype, order):
    """Two blocks of them, of which the second is not full, beside matrices that take blocks; and in another layout."""
    emulated.native.set_block_order(order)
    shapes = [*SMALL, (96, 64), (70, 23), (300, 40)]
    params, states = steps("SMMF", shapes, dtype=dtype, count=2, **OPTIONS["SMMF"][options])
    for k, shape in enumerate(shapes):
        param = torch.nn.Parameter(laid_out(gradient(shape, k, dtype), "transposed"))
        alone = hfac.SMMF([param], **OPTIONS["SMMF"][options], backend=emulated.NAME)
        for step in (1, 2):
            param.grad = laid_out(gradient(shape, 100 * k + step, dtype), "transposed")
            alone.step()
        assert_same_bits(([params[k]], [states[k]]), ([param], [alone.state[param]]))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("op", ["hfac_step", "hfac_int8_step"])
def test_short_rows_of_no_whole_vectors_have_the_bits_of_any_layout(op, dtype):
    """Contiguous they share the launches of whole vectors; where strides are in the way they have launches of their
    own. A step may follow one of the other kind."""
    shapes, odd = [(64, 147), (300, 24), (129, 127), (90, 5)], [0, 2, 3]
    results = []
    for strided in ((), (0, 1), (1,)):
        _, params, states, scalars = zip(*(bound(op, shape, dtype) for shape in shapes), strict=True)
        joined = {name: [state[name][0] for state in states] for name in states[0]}
        step = calls.bind(emulated.ops, op, list(params), joined)
        for k in range(2):
            grads = [gradient(shape, 1 + k + 10 * i, dtype) for i, shape in enumerate(shapes)]
            for i in odd if k in strided else ():
                grads[i] = laid_out(grads[i], "transposed")
            step(grads, **scalars[0])
            found = {launch["access"] for launch in step._plain.step.plan() if launch["kernel"] == "hfac_stats"}
            assert found == {str(dtype).removeprefix("torch.")} | ({"any"} if k in strided else set())
        results.append([t for param, state in zip(params, states, strict=True) for t in everything(param, state)])
    assert all(torch.equal(mine, other) for rest in results[1:] for mine, other in zip(results[0], rest, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_scalars_in_device_memory_give_the_same_bits(op):
    results = []
    for on_device in (False, True):
        step, param, states, scalars = bound(op)
        for k in range(3):
            now = scalars | dict(lr=0.02 / (k + 1), beta1=0.8 * 0.9**k, beta2=1 - (k + 1) ** -0.8)
            if on_device:
                now = {
                    name: torch.tensor([value] if name.startswith("beta") else value, dtype=torch.float64)
                    if name in ("lr", "beta1", "beta2", "weight_decay")
                    else value
                    for name, value in now.items()
                }
            step([gradient((40, 24), k + 1, torch.float32)], **now)
        results.append(everything(param, states))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("op", OPS)
def test_the_table_follows_the_gradient(op):
    """Another address, another type, other strides, from one step to the next; nothing is copied where all is equal."""
    step, param, states, scalars = bound(op)
    grad = gradient((40, 24), 1, torch.float32)
    step([grad], **scalars)
    table = step._plain.table.clone()
    step([grad], **scalars)
    assert torch.equal(step._plain.table, table)
    other, twin, twin_states, _ = bound(op)
    for _ in range(2):
        other([grad], **scalars)
    for fresh in (grad.clone(), grad.t().contiguous().t(), grad.double()):
        step([fresh], **scalars)
        other([grad], **scalars)
        assert all(map(torch.equal, everything(param, states), everything(twin, twin_states)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 64), (15, 63)], ids=shape_id)
def test_where_no_sum_is_rounded_a_step_with_codes_is_the_reference_to_the_bit(shape, dtype):
    """All but the codes of a parameter of 16 bits, of which some may be neighbours: their root is approximate."""
    wide, draws = torch.float64 if dtype == torch.float64 else torch.float32, torch.Generator().manual_seed(1)

    def powers(*sizes):
        return 2.0 ** torch.randint(-2, 3, sizes, generator=draws).to(wide)

    off = 0
    for _ in range(20):
        rows, cols = powers(shape[0]), powers(shape[1])
        grad = (torch.outer(rows, cols) * gradient(shape, 1, torch.float32).sign()).to(dtype)
        param, q = gradient(shape, 2, dtype), torch.randint(-127, 128, shape, dtype=torch.int8, generator=draws)
        second, found = (powers(shape[0]), powers(shape[1])), []
        numbers = dict(lr=0.5, beta1=0.5, beta2=0.5, eps=0.0, clip_threshold=None, weight_decay=0.0, maximize=False)
        for backend in (emulated.NAME, "reference"):
            mine = [[tensor.clone()] for tensor in (param, q, *second)]
            calls.hfac_int8_step_(mine[0], [grad], *mine[1:], **numbers, backend=backend)
            found.append([tensor for (tensor,) in mine])
        (ours, our_codes, *our_sums), (theirs, their_codes, *their_sums) = found
        assert torch.equal(ours, theirs) and all(map(torch.equal, our_sums, their_sums))
        apart = (our_codes.int() - their_codes.int()).abs()
        assert apart.max() <= 1
        off += int(apart.sum())
    assert off <= 20 * q.numel() / 1000 if dtype.itemsize == 2 else off == 0


def smmf_step(param, grad, backend, seed=None, **numbers):
    """A step from zeros, or in the middle of a run. Returns parameter and states."""
    rows, cols = param.shape
    sizes = (rows, cols, rows, cols)
    drawn = [gradient((n,), (seed or 0) + k, F32).abs() + 1e-3 for k, n in enumerate(sizes)]
    row, col, sq_row, sq_col = drawn if seed else map(torch.zeros, sizes)
    signs, param = torch.zeros(matricize.sign_shape(param.shape), dtype=torch.uint8), param.clone()
    numbers = dict(lr=1.0, beta1=0.5, beta2=0.5, eps=1e-8, weight_decay=0.0, decoupled_weight_decay=True) | numbers
    calls.smmf_step_([param], [grad], [row], [col], [signs], [sq_row], [sq_col], **numbers, backend=backend)
    return param, [row, col, signs, sq_row, sq_col]


def test_how_far_updates_of_16_bits_are_off():
    """The parameter is the nearest to the update, so that what is left of it shows the update's last bits: at most the
    bound, and not nothing, or roots and reciprocals have not been approximate. Sums and signs keep their bits."""
    grad, zeros = gradient((128, 64), 1, F16), torch.zeros(128, 64)
    update = -smmf_step(zeros, grad.float(), "reference", seed=3)[0]
    left, states = smmf_step(update.to(F16), grad, emulated.NAME, seed=3)
    off = (left.double() - (update.to(F16).double() - update.double())).abs()
    large = (update.abs() > 0.1) & (update.abs() < 1e4)  # less of it would be lost in float16's smallest numbers
    share = (off / update.abs())[large]
    assert large.sum() > 1000 and 2.0**-22 < share.max() <= ROUGH_UPDATE
    exact = smmf_step(update.to(F16).float(), grad.float(), emulated.NAME, seed=3)
    assert all(map(torch.equal, states, exact[1]))
    assert torch.equal(exact[0], smmf_step(update.to(F16).float(), grad.float(), "reference", seed=3)[0])


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1.13e-13, 2.0**-43, 1e-8])
def test_small_second_moments_of_16_bits(eps, layout):
    """Nothing, subnormal squares, and what is no number: an approximate root takes a subnormal number for 0, so where
    eps is not far above such roots the step is exact."""
    values = [0.0, 1e-19, -1e-20, 3e-21, 1e-22, -2e-23, 1e-25, 1.0, float("inf"), -float("inf"), float("nan"), -3e-20]
    grad = torch.tensor(values, dtype=BF16).repeat(16).view(24, 8)
    param = torch.zeros(24, 8, dtype=BF16)
    ours, theirs = (smmf_step(laid_out(param, layout), grad, each, eps=eps) for each in (emulated.NAME, "reference"))
    assert ours[0][0, 0].isfinite() or eps == 0
    assert smmf_agrees(ours[0], theirs[0], param, 1.0, emulated.NAME)
    if eps < 2.0**-43:
        assert same(ours[0], theirs[0])
    assert torch.equal(ours[1][2], theirs[1][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (80, 24)], ids=shape_id)
def test_codes_at_any_address(shape, dtype):
    """Aligned vectors of eight are read and written at once, others byte by byte: nothing beside them is written. Of a
    matrix that a block holds all have the same bits."""
    results, known = [], str(dtype).removeprefix("torch.")
    for offset in (0, 1, 4):
        step, param, states, scalars = bound("hfac_int8_step", shape, dtype)
        around = torch.full((offset + param.numel() + 3,), 77, dtype=torch.int8)
        states["exp_avg_qs"] = [around[offset : offset + param.numel()].view(param.shape).zero_()]
        step = calls.bind(emulated.ops, "hfac_int8_step", [param], states)
        for k in range(3):
            step([gradient(param.shape, k + 1, dtype)], **scalars)
        last = step._plain.step.plan()[-1]
        kernel = "hfac_int8_small" if shape == (40, 24) and offset == 0 else "hfac_int8_update"
        assert (last["kernel"], last["access"]) == (kernel, known)
        assert (torch.cat((around[:offset], around[offset + param.numel() :])) == 77).all()
        results.append(everything(param, states))
    assert states["exp_avg_qs"][0].any()
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


def placed(values, offset):
    """A copy that begins ``offset`` elements behind an aligned address, and all the memory around it."""
    around = torch.full((offset + values.numel() + 9,), 77, dtype=values.dtype)
    around[offset : offset + values.numel()] = values
    return around[offset : offset + values.numel()], around


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [5, 64, 776, 2040, 8192, 8197, 20001])
@pytest.mark.parametrize("clip", [0.7, None])
@pytest.mark.parametrize("op", ["hfac_dense_step", "smmf_dense_step"])
def test_whole_moments_at_any_address(op, clip, numel, dtype):
    """Aligned tensors are read and written in vectors of eight, whose threads exchange what they store, and the rest of
    them one by one; others are all read one by one. Both give the same bits, and write nothing else."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scalars = dict(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1, maximize=False)
    scalars |= dict(clip_threshold=clip) if op[0] == "h" else dict(decoupled_weight_decay=clip is None)
    results = []
    for shifted in (None, "param", "grad", "exp_avgs", "exp_avg_sqs"):
        param, *rest = placed(gradient((numel,), 1, dtype), shifted == "param")
        states = {}
        for name in ("exp_avgs", "exp_avg_sqs"):
            states[name], around = placed(torch.zeros(numel, dtype=wide), shifted == name)
            rest.append(around)
        step = calls.bind(emulated.ops, op, [param], {name: [state] for name, state in states.items()})
        for k in range(2):
            grad, around = placed(gradient((numel,), 2 + k, dtype), shifted == "grad")
            step([grad], **scalars)
        access = {launch["access"] for launch in step._plain.step.plan() if launch["kernel"] == op[:-5]}
        name = str(dtype).removeprefix("torch.")
        assert access == {name if shifted is None or dtype == torch.float64 else "any"}
        mine = [param, *states.values()]
        assert all((around[-9:] == 77).all() and (around[: len(around) - 9 - numel] == 77).all() for around in rest)
        results.append([tensor.clone() for tensor in mine])
    assert results[0][1].any()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("shape", [(3, 7), (5, 3), (1, 50), (4, 13), (9, 5), (6, 4, 3), (7, 9)], ids=shape_id)
def test_signs_of_any_size_at_any_address(shape, offset):
    """Threads share bytes, and a GPU flips bits by words of 4 bytes: at neither end may those reach what is not the
    tensor's, wherever it begins and however long it is."""
    values = gradient(shape, 1, torch.float32).sign()  # of one size, so that two factors say all of the moment
    rows, cols = matricize.square(values.numel())
    packed = pack_signs(values > 0)
    around = torch.full((offset + packed.numel() + 3,), 0xA5, dtype=torch.uint8)
    signs = around[offset : offset + packed.numel()].view_as(packed)
    signs.zero_()
    states = {f"exp_avg_{kind}rows": [torch.zeros(rows)] for kind in ("", "sq_")}
    states |= {f"exp_avg_{kind}cols": [torch.zeros(cols)] for kind in ("", "sq_")}
    states["exp_avg_signs"] = [signs]
    step = calls.bind(emulated.ops, "smmf_step", [torch.zeros(shape)], states)
    scalars = dict(lr=0.1, beta1=0.5, beta2=0.5, eps=1e-8, weight_decay=0.0, decoupled_weight_decay=True)
    for grad, expected in ((values, packed), (-9 * values, pack_signs(values < 0))):
        step([grad], **scalars, maximize=False)
        assert torch.equal(signs, expected)
        assert (torch.cat((around[:offset], around[offset + packed.numel() :])) == 0xA5).all()
