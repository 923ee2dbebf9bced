"""What only the extension can show: bad calls are refused, bits do not depend on threads, instruction set or strides,
the workspace is small, a fork does no harm. That its results are the reference's is tests/backends/test_parity.py."""

import ctypes
import functools
import multiprocessing
import subprocess
import sys

import calls
import pytest
import torch
from cases import DTYPES, gradient, shape_id

from hfac import ops
from hfac.backends import cpu
from hfac.matricize import cut, sign_shape, square

_C = pytest.importorskip("hfac._C", reason="the extension is not built: hfac doctor says why")

#: One row, one column, no multiple of a vector or of a byte, several chunks, one-byte signs, five dimensions.
SHAPES = [(7,), (1024,), (30522,), (17, 19), (3, 4097), (4097, 6), (640, 520), (1030, 130), (2, 3, 5, 7, 2), (31, 8)]
OPS = ["hfac_step_", "hfac_dense_step_", "smmf_step_", "smmf_dense_step_", "hfac_int8_step_"]


DRAWS = torch.Generator().manual_seed(4)


class Call:
    """One op on a list of parameters of `shapes`, states filled with what a run would hold."""

    def __init__(self, op, shapes, dtype, grad_dtype=None, **options):
        self.op, wide = op, ops.state_dtype(dtype)
        if op in ("hfac_step_", "hfac_int8_step_"):
            shapes = [shape for shape in shapes if cut(shape)]
        self.params = [gradient(shape, i, dtype) for i, shape in enumerate(shapes)]
        self.grads = [gradient(shape, 100 + i, grad_dtype or dtype) for i, shape in enumerate(shapes)]
        positive = functools.partial(torch.rand, generator=torch.Generator().manual_seed(3), dtype=wide)
        if "dense" in op:
            self.states = [[positive(shape) for shape in shapes] for _ in range(2)]
        else:
            sizes = [self.sizes(shape) for shape in shapes]
            rows, cols = zip(*sizes, strict=True)
            self.states = [[positive(n) for n in side] for side in (rows, cols, rows, cols)]
        if op == "hfac_int8_step_":
            codes = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=DRAWS) for shape in shapes]
            self.states[:2] = [codes]
        if op == "smmf_step_":
            self.states.insert(2, [torch.zeros(sign_shape(shape), dtype=torch.uint8) for shape in shapes])
        clip = {} if op.startswith("smmf") else {"clip_threshold": 0.7}
        decay = {"decoupled_weight_decay": True} if op.startswith("smmf") else {}
        self.options = dict(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, maximize=False) | clip | decay
        self.options |= options

    def sizes(self, shape):
        if self.op == "smmf_step_":
            return square(torch.Size(shape).numel())
        k = cut(shape)
        return torch.Size(shape[:k]).numel(), torch.Size(shape[k:]).numel()

    def run(self, steps=2, params=None, grads=None, nonfinite=None):
        """All that a few steps leave behind."""
        params = [p.clone() for p in self.params] if params is None else params
        states = [[s.clone() for s in side] for side in self.states]
        step = calls.bind(cpu, self.op, params, dict(zip(calls.STATES[self.op], states, strict=True)))
        for _ in range(steps):
            step(self.grads if grads is None else grads, nonfinite, **self.options)
        return [p.clone() for p in params] + [s for side in states for s in side]


def same_bits(ours, theirs):
    return all(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.fixture(autouse=True)
def settings_are_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads(op, dtype):
    call, results = Call(op, SHAPES, dtype), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(call.run())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.pairwise
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_the_instruction_set(op, dtype, grad_dtype):
    call, results = Call(op, SHAPES, dtype, grad_dtype), []
    for isa in _C.info()["isa_usable"]:
        _C.set_isa(isa)
        assert _C.info()["isa"] == isa
        results.append(call.run())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [31, 64, 96, 128, 192, 257, 416])
def test_codes_of_rows_in_pieces(width, dtype):
    """Kernels of some instruction sets cut rows into pieces, and make codes of 64 at a time; half of the rows get no
    gradient, so that codes go towards zero."""
    call, results = Call("hfac_int8_step_", [(6, width)], dtype), []
    call.grads[0][::2] = 0
    for isa in _C.info()["isa_usable"]:
        _C.set_isa(isa)
        results.append(call.run(steps=3))
    assert all(same_bits(results[0], other) for other in results[1:])


STRIDED = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "permuted": lambda t: t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))),
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("layout", "which"),
    [
        ("transposed", "both"),
        ("every other", "params"),
        ("permuted", "grads"),
        ("permuted", "both"),
        ("offset", "both"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_change_bits(op, dtype, layout, which):
    call = Call(op, SHAPES, dtype)
    lists = {name: [STRIDED[layout](t.clone()) for t in getattr(call, name)] for name in ("params", "grads")}
    mine = {name: tensors for name, tensors in lists.items() if which in (name, "both")}
    assert same_bits(call.run(), call.run(**mine))


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradients(op):
    call = Call(op, [(24, 18), (300, 64)], torch.float32)
    call.grads = [g[:1].expand(g.shape) for g in call.grads]
    assert same_bits(call.run(), call.run(grads=[g.contiguous() for g in call.grads]))


@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_keeps_every_bit(op):
    call = Call(op, SHAPES, torch.float32)
    flags = torch.full((2 * len(call.params),), 7, dtype=torch.int32)[::2]  # not contiguous either
    before = call.run(steps=0)
    for grad, value in zip(call.grads[::3], (float("inf"), float("nan"), 3e19, -float("inf")), strict=False):
        grad.view(-1)[-1] = value
    after = call.run(steps=1, nonfinite=flags)
    assert flags.tolist() == [int(i % 3 == 0) for i in range(len(call.params))]
    per_parameter = len(call.params)
    for k, (old, new) in enumerate(zip(before, after, strict=True)):
        assert same_bits([old], [new]) == (k % per_parameter % 3 == 0), k


@pytest.mark.parametrize("op", OPS)
def test_nonfinite_is_a_matter_of_single_elements(op):
    """An element whose square times the number of elements overflows, and nothing less; no sum has a say in it."""
    call = Call(op, [(8, 64)], torch.float32)
    limit = (torch.finfo(torch.float32).max / 512) ** 0.5
    flags = torch.ones(1, dtype=torch.int32)
    call.grads[0].fill_(0.999 * limit)
    call.run(steps=1, nonfinite=flags)
    assert flags.item() == 0
    call.grads[0][5, 7] = 1.001 * limit
    call.run(steps=1, nonfinite=flags)
    assert flags.item() == 1


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 1024), (1024, 4096), (2048, 2048)], ids=shape_id)
@pytest.mark.parametrize("op", ["hfac_step_", "smmf_step_", "hfac_int8_step_"])
def test_workspace_is_at_most_two_percent(op, shape, dtype, monkeypatch):
    held = []
    native = getattr(_C, op.rstrip("_"))

    class Spy:
        def __getattr__(self, name):
            return lambda **arguments: held.append(native(**arguments))

    monkeypatch.setattr(cpu, "_C", Spy())
    call = Call(op, [shape], dtype)
    call.run(steps=1)
    assert 0 < held[0] <= 0.02 * call.params[0].numel() * call.params[0].element_size()


def test_a_fork_gets_threads_of_its_own():
    """The child calls no op of torch: OpenMP's threads, unlike ours, do not come back after a fork."""
    torch.set_num_threads(2)
    call = Call("smmf_step_", [(640, 520)] * 3, torch.float32)
    expected = [p.numpy().tobytes() for p in call.run(steps=1)[:3]]

    def step(queue):
        states = dict(zip(calls.STATES[call.op], call.states, strict=True))
        calls.bind(cpu, call.op, call.params, states)(call.grads, **call.options)
        queue.put([p.numpy().tobytes() for p in call.params] == expected)

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=step, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=900)
    finally:
        child.join(900)
        child.kill()
    assert child.exitcode == 0


def test_import_needs_no_torch():
    """The module links neither torch nor Python code of ours: loaded alone it tells its version."""
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('hfac._C', {_C.__file__!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m); import sys; assert 'torch' not in sys.modules\n"
        "print(m.info()['version'], m.cuda_info()['why_not'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BUFFER = (ctypes.c_char * 4096)()
HERE = ctypes.addressof(BUFFER)

GOOD = {
    "operands": dict(params=[HERE], grads=[HERE], numels=[6], param_dtypes=0, grad_dtypes=[0]),
    "scalars": dict(beta1=0.9, beta2=[0.99], lr=0.1, eps=1e-8, weight_decay=0.0, maximize=False),
    "matrix": dict(
        rows=[3], cols=[2], exp_avg_rows=[HERE], exp_avg_cols=[HERE], exp_avg_sq_rows=[HERE], exp_avg_sq_cols=[HERE]
    ),
    "whole": dict(exp_avgs=[HERE], exp_avg_sqs=[HERE]),
    "codes": dict(rows=[3], cols=[2], exp_avg_qs=[HERE], exp_avg_sq_rows=[HERE], exp_avg_sq_cols=[HERE]),
    "signs": dict(exp_avg_signs=[HERE], sign_bytes=[6], sign_slices=None),
}
NATIVE = {
    "hfac_step": ("operands scalars matrix", dict(clip_threshold=1.0, stage="statistics", kept=HERE, squares=HERE)),
    "hfac_int8_step": ("operands scalars codes", dict(clip_threshold=1.0, stage="statistics", kept=HERE, squares=HERE)),
    "hfac_dense_step": ("operands scalars whole", dict(clip_threshold=None)),
    "smmf_step": ("operands scalars matrix signs", dict(decoupled_weight_decay=True)),
    "smmf_dense_step": ("operands scalars whole", dict(decoupled_weight_decay=True)),
}
#: (argument, bad value): the error names the argument
BAD = [
    ("params", [0]),
    ("params", ["x"]),
    ("params", 5),
    ("params", [-1 << 70]),
    ("grads", [0]),
    ("grads", []),
    ("grads", [HERE, HERE]),
    ("numels", [-1]),
    ("numels", [1.5]),
    ("param_dtypes", 4),
    ("param_dtypes", [-1]),
    ("grad_dtypes", [0, 0, 0]),
    ("grad_dtypes", 99),
    ("rows", [-3]),
    ("rows", [4]),
    ("rows", [1 << 62]),
    ("cols", []),
    ("exp_avg_rows", [0]),
    ("exp_avg_sq_cols", []),
    ("exp_avgs", [0]),
    ("exp_avg_sqs", [0]),
    ("exp_avg_signs", [0]),
    ("exp_avg_qs", [0]),
    ("exp_avg_qs", []),
    ("sign_bytes", [2]),
    ("beta1", [0.1, 0.2]),
    ("beta2", ["x"]),
    ("threads", 0),
    ("stage", "half"),
    ("kept", 0),
    ("squares", 0),
]


def arguments_of(op):
    names, more = NATIVE[op]
    return {k: v for name in names.split() for k, v in GOOD[name].items()} | more | {"threads": 1}


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    [
        # the ids hold no address: runs in several processes must find the same tests
        pytest.param(op, argument, value, id=f"{op}-{argument}-{i}")
        for op in NATIVE
        for i, (argument, value) in enumerate(BAD)
        if argument in arguments_of(op)
    ],
)
def test_bad_calls_are_refused(op, argument, value):
    arguments = arguments_of(op)
    with pytest.raises(ValueError, match=f"^{argument}"):
        getattr(_C, op)(**(arguments | {argument: value}))


@pytest.mark.parametrize(
    ("argument", "more"),
    [
        ("shapes", dict(param_strides=[(2, 1)])),
        ("shapes", dict(param_strides=[(2, 1)], shapes=[(3, 3)])),
        ("shapes", dict(param_strides=[(2, 1)], shapes=[(1 << 40, 1 << 40)])),
        ("param_strides", dict(param_strides=[(2, 1, 1)], shapes=[(3, 2)])),
        ("grad_strides", dict(grad_strides=[(2, -1)], shapes=[(3, 2)])),
        ("grad_strides", dict(grad_strides=[], shapes=[(3, 2)])),
    ],
)
def test_bad_strides_are_refused(argument, more):
    arguments = GOOD["operands"] | GOOD["scalars"] | GOOD["whole"] | NATIVE["hfac_dense_step"][1] | more
    with pytest.raises(ValueError, match=f"^{argument}"):
        _C.hfac_dense_step(**arguments)


#: Ops on parts: a part of 3 x 2 elements of a matrix of 6 x 4.
ROW, COL = (
    dict.fromkeys(("exp_avg_rows", "exp_avg_sq_rows"), [HERE]),
    dict.fromkeys(("exp_avg_cols", "exp_avg_sq_cols"), [HERE]),
)
PARTS = {
    "hfac_sums": dict(
        grads=[HERE], numels=[6], grad_dtypes=0, state_dtypes=0, rows=[3], whole_cols=[4], beta2=0.9, eps=0.0
    )
    | dict.fromkeys(("old_rows", "row_sums", "new_rows", "col_sums", "col_squares", "col_ratios"), [HERE]),
    "hfac_apply": GOOD["operands"]
    | GOOD["matrix"]
    | dict(whole_rows=[6], whole_cols=[4], totals=[1.0], mean_squares=[1.0], beta1=0.9, lr=0.1)
    | dict(clip_threshold=1.0, weight_decay=0.0, maximize=False)
    | dict.fromkeys(("row_sums", "new_rows", "col_sums", "new_cols"), [HERE]),
    "hfac_int8_apply": GOOD["operands"]
    | GOOD["codes"]
    | dict(old_totals=[1.0], totals=[1.0], mean_squares=[1.0], beta1=0.9, lr=0.1)
    | dict(clip_threshold=1.0, weight_decay=0.0, maximize=False)
    | dict.fromkeys(("new_rows", "new_cols"), [HERE]),
    "squares": dict(grads=[HERE], numels=[6], grad_dtypes=0, sums=HERE),
    "smmf_sums_step": GOOD["operands"]
    | GOOD["scalars"]
    | GOOD["matrix"]
    | GOOD["signs"]
    | dict(rows=[6], cols=[4], blocks=[[(0, 2, 1, 2, 2, 3, 2)]], decoupled_weight_decay=True)
    | dict.fromkeys(("new_rows", "new_cols", "new_sq_rows", "new_sq_cols"), [HERE]),
}
HUGE = (1 << 63) - 1
BAD_PARTS = {
    "hfac_sums": [
        ("grads", [0]),
        ("grads", []),
        ("numels", [-1]),
        ("grad_dtypes", 4),
        ("state_dtypes", 1),
        ("state_dtypes", [0, 0]),
        ("rows", [4]),
        ("rows", [0]),
        ("rows", [-3]),
        ("rows", [HUGE]),
        ("rows", []),
        ("whole_cols", [-1]),
        ("whole_cols", []),
        ("old_rows", [0]),
        ("row_sums", []),
        ("new_rows", [0]),
        ("col_sums", [0]),
        ("col_squares", None),
        ("col_ratios", None),
        ("col_ratios", [HERE, HERE]),
        ("beta2", [0.1, 0.2]),
        ("threads", 0),
    ],
    "hfac_apply": [
        ("params", [0]),
        ("grads", []),
        ("numels", [5]),
        ("rows", [2]),
        ("rows", [-3]),
        ("cols", [HUGE]),
        ("whole_rows", [-6]),
        ("whole_cols", []),
        ("exp_avg_rows", [0]),
        ("exp_avg_cols", []),
        ("exp_avg_sq_rows", [0]),
        ("exp_avg_sq_cols", [0]),
        ("row_sums", [0]),
        ("new_rows", []),
        ("col_sums", [0]),
        ("new_cols", [0]),
        ("totals", []),
        ("totals", ["x"]),
        ("mean_squares", [1.0, 1.0]),
        ("beta1", []),
        ("threads", -1),
    ],
    "hfac_int8_apply": [
        ("numels", [5]),
        ("rows", [2]),
        ("exp_avg_qs", [0]),
        ("exp_avg_sq_rows", []),
        ("exp_avg_sq_cols", [0]),
        ("new_rows", [0]),
        ("new_cols", []),
        ("code_strides", []),
        ("code_strides", [(1, 3)]),
        ("old_totals", ["x"]),
        ("old_totals", []),
        ("totals", []),
        ("mean_squares", [1.0, 1.0]),
        ("beta1", []),
        ("threads", 0),
    ],
    "squares": [
        ("grads", [0]),
        ("grads", [HERE, HERE]),
        ("numels", [-1]),
        ("grad_dtypes", 4),
        ("grad_dtypes", [0, 0]),
        ("sums", 0),
        ("threads", 0),
    ],
    "smmf_sums_step": [
        ("params", [0]),
        ("grads", [0]),
        ("numels", [7]),
        ("numels", [5]),
        ("rows", [5]),
        ("rows", [-1]),
        ("rows", []),
        ("cols", [3]),
        ("exp_avg_rows", [0]),
        ("exp_avg_cols", None),
        ("exp_avg_signs", [0]),
        ("sign_bytes", [2]),
        ("sign_bytes", []),
        ("exp_avg_sq_rows", [0]),
        ("exp_avg_sq_cols", []),
        ("new_rows", None),
        ("new_rows", [0]),
        ("new_cols", None),
        ("new_cols", []),
        ("new_sq_rows", [0]),
        ("new_sq_cols", []),
        ("blocks", None),
        ("blocks", []),
        ("blocks", [[]]),
        ("blocks", [5]),
        ("blocks", [[5]]),
        ("blocks", [[(0, 2, 1, 2, 2, 3)]]),
        ("blocks", [[(0.5, 2, 1, 2, 2, 3, 2)]]),
        ("blocks", [[(0, 2, 1, 2, 2, 3, 1)]]),  # not all elements
        ("blocks", [[(0, 2, 1, 2, 2, 3, 2)] * 2]),  # more than there are
        ("beta2", ["x"]),
        ("threads", 0),
    ],
}
#: what replaces a number of the block (0, 2, 1, 2, 2, 3, 2)
BAD_BLOCKS = [
    *((k, value) for k in range(7) for value in (-1, HUGE, "x", None)),
    (0, 1),
    (0, 7),
    (1, 1),  # rows that overlap
    (1, 3),
    (2, 2),
    (2, 6),
    (3, 0),
    (3, 3),
    (4, 3),
    (4, 4),
    (5, 0),
    (5, 4),
    (6, 0),
    (6, 3),
]
#: Whose bad value another argument's check names.
NAMED = {
    ("hfac_apply", "numels"): "rows",
    ("hfac_apply", "cols"): "rows",
    ("hfac_int8_apply", "numels"): "rows",
    ("hfac_int8_apply", "code_strides"): "code_strides|shapes",  # which are needed with strides
    ("smmf_sums_step", "numels"): "blocks|sign_bytes",
    ("smmf_sums_step", "rows"): "rows|blocks",
    ("smmf_sums_step", "cols"): "blocks",
}


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    [
        pytest.param(op, argument, value, id=f"{op}-{argument}-{i}")
        for op, rows in BAD_PARTS.items()
        for i, (argument, value) in enumerate(rows)
    ],
)
def test_bad_calls_on_parts_are_refused(op, argument, value):
    with pytest.raises(ValueError, match=f"^({NAMED.get((op, argument), argument)})"):
        getattr(_C, op)(**(PARTS[op] | {argument: value}))


@pytest.mark.parametrize(("place", "value"), BAD_BLOCKS)
def test_bad_blocks_are_refused(place, value):
    block = [0, 2, 1, 2, 2, 3, 2]
    block[place] = value
    with pytest.raises(ValueError, match="^blocks"):
        _C.smmf_sums_step(**(PARTS["smmf_sums_step"] | {"blocks": [[block]]}))


def test_strides_of_parts_need_shapes():
    for op in PARTS:
        with pytest.raises(ValueError, match="^shapes"):
            getattr(_C, op)(**PARTS[op], grad_strides=[(1, 3)])


def test_a_good_call_is_not_refused():
    for op, (names, more) in NATIVE.items():
        getattr(_C, op)(**{k: v for name in names.split() for k, v in GOOD[name].items()}, **more)
    for op, arguments in PARTS.items():
        getattr(_C, op)(**arguments)
        getattr(_C, op)(**arguments, grad_strides=[(1, 3)], shapes=[(3, 2)])


def test_an_empty_part_needs_no_addresses():
    """But for the moments that exist."""
    for rows, cols in ((0, 0), (3, 0), (0, 2)):
        none = {name: [0] for name in PARTS["hfac_apply"] if name.endswith(("rows", "row_sums")) and not rows}
        none |= {name: [0] for name in PARTS["hfac_apply"] if name.endswith(("cols", "col_sums")) and not cols}
        empty = none | dict(params=[0], grads=[0], numels=[0], rows=[rows], cols=[cols], whole_rows=[6], whole_cols=[4])
        _C.hfac_apply(**(PARTS["hfac_apply"] | empty))
    _C.hfac_sums(**(PARTS["hfac_sums"] | dict(grads=[0], numels=[0], rows=[0], old_rows=[0], row_sums=[0])))
    _C.smmf_sums_step(**(PARTS["smmf_sums_step"] | dict(params=[0], grads=[0], numels=[0], blocks=[[]])))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("ours", [False, True])
def test_copies_of_many_tensors(strided, ours):
    """One copy of all; what lies in memory in another order is left to torch."""
    shapes = [(3, 4), (0,), (7,), ()]
    to, from_ = ([torch.randn(shape, dtype=dtype) for shape in shapes for dtype in DTYPES] for _ in range(2))
    if strided:
        to[0] = to[0].t().contiguous().t()
    versions = [tensor._version for tensor in to]
    copy = ops.copier(to, from_, ours=ours)
    from_[0].add_(1)  # as it is when it is copied
    copy()
    assert all(map(torch.equal, to, from_))
    told = [tensor._version > version for tensor, version in zip(to, versions, strict=True)]
    assert all(told) or ours


@pytest.mark.parametrize(
    ("place", "value"),
    [("to", [0, 0]), ("from", [0, 0]), ("bytes", [8, -1]), ("to", [1]), ("bytes", [8]), ("from", 1), ("bytes", ["8"])],
)
def test_bad_copies_are_refused(place, value):
    to, from_ = torch.zeros(2), torch.ones(2)
    first, second = to.data_ptr(), from_.data_ptr()
    given = {"to": [first, first + 4], "from": [second, second + 4], "bytes": [4, 4]}
    if value == [0, 0]:
        value = [given[place][0], 0]  # the first is good, and must not be copied either
    with pytest.raises(ValueError, match=place):
        _C.copy_memory(**(given | {place: value}))
    assert to.tolist() == [0, 0]
    _C.copy_memory(**given)
    assert to.tolist() == [1, 1]


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa.*available: plain"):
        _C.set_isa("avx9")


def test_why_not_names_the_reason():
    assert cpu.why_not(torch.device("cpu")) is None
    assert "not on cuda" in cpu.why_not(torch.device("cuda"))


def test_why_not_without_the_extension(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", "no module", raising=False)
    monkeypatch.setattr(cpu, "_BUILD_INFO", tmp_path / "none")
    assert "no module" in cpu.why_not(torch.device("cpu"))
    (tmp_path / "info").write_text('{"why_not": "no compiler"}')
    monkeypatch.setattr(cpu, "_BUILD_INFO", tmp_path / "info")
    assert "no compiler" in cpu.why_not(torch.device("cpu"))
