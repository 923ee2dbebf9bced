"""The CPU kernels on parts of parameters against the reference: rows, columns and tiles of H-Fac's matrices, blocks of
SMMF's; parts put together are the step on the whole. test_cuda_parts.py has the CUDA kernels take the same tests.
"""

from dataclasses import replace

import calls
import pytest
import torch
from cases import DTYPES, codes_agree, gradient
from cases import smmf_agrees as weights_agree
from test_parity import SUMS, ieee_square_roots, params_agree  # noqa: F401

from hfac import ops, spec
from hfac.backends import cpu
from hfac.matricize import Block, blocks, sign_shape, square
from hfac.signs import pack_signs

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the extension is not built: hfac doctor says why")

#: (rows, columns) of the whole, and those of the part
MATRIX_PARTS = {
    "whole": ((127, 129), (0, 127), (0, 129)),
    "rows": ((130, 96), (40, 91), (0, 96)),
    "rows in chunks": ((1500, 70), (100, 1400), (0, 70)),
    "columns": ((130, 96), (0, 130), (17, 64)),
    "tile": ((256, 320), (64, 200), (96, 256)),
    "odd tile": ((17, 19), (3, 10), (5, 18)),
    "one row": ((64, 48), (9, 10), (0, 48)),
    "one column": ((64, 48), (0, 64), (7, 8)),
    "long rows": ((6, 9001), (1, 6), (3, 8999)),
    "no rows": ((24, 18), (5, 5), (0, 18)),
    "no columns": ((24, 18), (0, 24), (18, 18)),
    "nothing": ((24, 18), (5, 5), (18, 18)),
}
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "cut out": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
}
HFAC_OPTIONS = {
    "clipped": dict(clip_threshold=0.7, weight_decay=0.1, maximize=False),
    "unclipped": dict(clip_threshold=None, weight_decay=0.0, maximize=True),
}
SMMF_OPTIONS = {
    "decoupled": dict(beta1=0.8, decoupled_weight_decay=True, maximize=False),
    "coupled": dict(beta1=0.7, decoupled_weight_decay=False, maximize=True),
    "no first moment": dict(beta1=None, decoupled_weight_decay=True, maximize=True),
    "no first moment, coupled": dict(beta1=None, decoupled_weight_decay=False, maximize=False),
}


@pytest.fixture(autouse=True)
def settings_are_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cpu._C.set_isa("")


def positive(count, dtype, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def copy_of(tensor):
    """With the same strides, gaps included."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def close(ours, theirs, scale=None):
    """Sums agree relative to the largest of them, or to ``scale`` where terms cancel."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.numel():
        scale = theirs.abs().max() if scale is None else scale
        error = (ours - theirs).abs().max()
        assert error <= SUMS[ours.dtype] * scale, f"off by {error / scale:.3g} of {scale:.3g}"


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class MatrixParts:
    """H-Fac's parts of a list, of one type each, with what a rank would hold."""

    def __init__(self, names, dtypes, grad_dtype=None, layout="contiguous"):
        self.cases = [MATRIX_PARTS[name] for name in names]
        self.params, self.grads, self.codes, self.rows, self.cols = [], [], [], [], []
        self.by_row = {name: [] for name in ("exp_avg_rows", "exp_avg_sq_rows")}
        self.by_col = {name: [] for name in ("exp_avg_cols", "exp_avg_sq_cols")}
        for i, ((shape, rows, cols), dtype) in enumerate(zip(self.cases, dtypes, strict=True)):
            wide, part = ops.state_dtype(dtype), (slice(*rows), slice(*cols))
            self.params.append(LAYOUTS[layout](gradient(shape, i, dtype)[part]))
            self.grads.append(LAYOUTS[layout](gradient(shape, 100 + i, grad_dtype or dtype)[part]))
            draws = torch.Generator().manual_seed(200 + i)
            codes = torch.randint(-127, 128, shape, generator=draws).to(torch.int8)
            self.codes.append(LAYOUTS[layout](codes[part]))
            m, n = self.params[-1].shape
            for k, (lists, count) in enumerate(((self.by_row, m), (self.by_col, n))):
                for name, entries in lists.items():
                    entries.append(positive(count, wide, 10 * i + 2 * k + ("sq" in name)))
            self.rows.append(shape[0])
            self.cols.append(shape[1])

    def sums(self, backend, columns=True, beta2=0.9, **more):
        old = self.by_row["exp_avg_sq_rows"]
        fresh = [[torch.zeros_like(s) for s in old] for _ in range(2)]
        if columns:
            fresh += [[torch.zeros_like(s) for s in self.by_col["exp_avg_sq_cols"]] for _ in range(3)]
        calls.hfac_sums(self.grads, old, *fresh, cols=self.cols, beta2=beta2, eps=1e-6, backend=backend, **more)
        return fresh

    def known(self):
        """What a rank knows before it applies, of the reference and of no step in particular."""
        row_sums, new_rows, col_sums, squares, _ = self.sums("reference")
        pairs = zip(squares, self.by_col["exp_avg_sq_cols"], strict=True)
        new_cols = [0.9 * old + 0.1 * (square + 1e-6) for square, old in pairs]
        totals = torch.tensor([1.5 + 40.0 * k for k in range(len(self.params))], dtype=torch.float64)
        mean_squares = torch.tensor([(2.0, 0.01, 9.0)[k % 3] for k in range(len(self.params))], dtype=torch.float64)
        return dict(
            row_sums=row_sums,
            new_rows=[r + 1e-3 for r in new_rows],
            col_sums=col_sums,
            new_cols=[s + 1e-3 for s in new_cols],
            totals=totals,
            mean_squares=mean_squares,
        )

    def apply(self, backend, known, beta1=0.8, **options):
        """Parameters and moments after the step; the lists here keep theirs."""
        params = [copy_of(p) for p in self.params]
        states = {name: [s.clone() for s in entries] for name, entries in {**self.by_row, **self.by_col}.items()}
        whole = dict(rows=self.rows, cols=self.cols)
        calls.hfac_apply_(
            params, self.grads, **states, **known, **whole, lr=0.02, beta1=beta1, backend=backend, **options
        )
        return params, states

    def apply_codes(self, backend, known, beta1=0.8, **options):
        """As `apply`, where the first moment is in 8 bits: codes are one of the states."""
        params = [copy_of(p) for p in self.params]
        states = {"exp_avg_qs": [copy_of(q) for q in self.codes]}
        states["exp_avg_sq_rows"] = [s.clone() for s in self.by_row["exp_avg_sq_rows"]]
        states["exp_avg_sq_cols"] = [s.clone() for s in self.by_col["exp_avg_sq_cols"]]
        known = {name: known[name] for name in ("new_rows", "new_cols", "totals", "mean_squares")}
        known["old_totals"] = known["totals"] * torch.linspace(0.5, 1.5, len(params), dtype=torch.float64)
        calls.hfac_int8_apply_(params, self.grads, **states, **known, lr=0.02, beta1=beta1, backend=backend, **options)
        return params, states


@pytest.mark.pairwise
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("part", MATRIX_PARTS)
def test_hfac_sums(part, wide, grad_dtype, layout, backend="cpu"):
    parts = MatrixParts([part], [wide], grad_dtype, layout)
    grad = parts.grads[0].to(wide)
    ours, theirs = parts.sums(backend), parts.sums("reference")
    scales = [grad.abs().sum(1), None, grad.abs().sum(0), None, None]
    for (mine,), (other,), scale in zip(ours, theirs, scales, strict=True):
        close(mine, other, scale.max() if scale is not None and scale.numel() else None)
    assert same_bits(sum(parts.sums(backend, columns=False), []), ours[0] + ours[1])


@pytest.mark.pairwise
@pytest.mark.parametrize("options", HFAC_OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", MATRIX_PARTS)
def test_hfac_apply(part, dtype, layout, options, backend="cpu"):
    grad_dtype = torch.bfloat16 if dtype == torch.float32 and layout == "cut out" else dtype
    parts = MatrixParts([part], [dtype], grad_dtype, layout)
    known = parts.known()
    (param,), states = parts.apply(backend, known, **HFAC_OPTIONS[options])
    (twin,), others = parts.apply("reference", known, **HFAC_OPTIONS[options])
    assert param.stride() == parts.params[0].stride()
    params_agree("HFac", param, twin, parts.params[0], 0.02)
    for name, (mine,) in states.items():
        scale = torch.cat([known["row_sums"][0].abs(), known["col_sums"][0].abs(), mine.new_ones(1)]).max()
        close(mine, others[name][0], scale)


@pytest.mark.pairwise
@pytest.mark.parametrize("options", HFAC_OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", MATRIX_PARTS)
def test_hfac_int8_apply(part, dtype, layout, options, backend="cpu"):
    grad_dtype = torch.bfloat16 if dtype == torch.float32 and layout == "cut out" else dtype
    parts = MatrixParts([part], [dtype], grad_dtype, layout)
    known, options = parts.known(), HFAC_OPTIONS[options]
    (param,), states = parts.apply_codes(backend, known, **options)
    (twin,), others = parts.apply_codes("reference", known, **options)
    (codes,), (wanted,) = states.pop("exp_avg_qs"), others.pop("exp_avg_qs")
    assert param.stride() == parts.params[0].stride() and codes.stride() == parts.codes[0].stride()
    params_agree("HFac", param, twin, parts.params[0], 0.02)
    assert not codes.numel() or codes_agree(codes, wanted)
    for name, (mine,) in states.items():
        assert torch.equal(mine, others[name][0])


@pytest.mark.pairwise
@pytest.mark.parametrize("options", HFAC_OPTIONS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (1, 2), (2, 3)], ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hfac_parts_with_codes_make_the_whole(dtype, grid, options, backend="cpu"):
    (m, n), wide, eps, beta2, options = (130, 96), ops.state_dtype(dtype), 1e-6, 0.95, HFAC_OPTIONS[options]
    param, grad = gradient((m, n), 0, dtype), gradient((m, n), 1, dtype)
    codes = torch.randint(-127, 128, (m, n), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    r, s = (positive(count, wide, seed) for seed, count in enumerate((m, n)))
    squares = grad.to(wide) ** 2 + eps
    new_r, new_s = (beta2 * old + (1 - beta2) * squares.sum(dim) for old, dim in ((r, 1), (s, 0)))
    mean_square = new_r.sum() * (grad.to(wide) ** 2 / new_r[:, None] / new_s).sum() / (m * n)
    rows, cols = ([k * size // parts for k in range(parts + 1)] for size, parts in zip((m, n), grid, strict=True))
    at = [(slice(*rows[a : a + 2]), slice(*cols[b : b + 2])) for a in range(grid[0]) for b in range(grid[1])]
    params, mine = [param[part].clone() for part in at], [codes[part].clone() for part in at]
    numbers = dict(lr=0.02, beta1=0.8, backend=backend, **options)
    calls.hfac_int8_apply_(
        params,
        [grad[part] for part in at],
        mine,
        [r[a].clone() for a, _ in at],
        [s[b].clone() for _, b in at],
        [new_r[a].clone() for a, _ in at],
        [new_s[b].clone() for _, b in at],
        *(total.double().expand(len(at)) for total in (r.sum(), new_r.sum(), mean_square)),
        **numbers,
    )
    before = param.clone()
    calls.hfac_int8_step_([param], [grad], [codes], [r], [s], beta2=beta2, eps=eps, **numbers)
    joined = torch.empty_like(codes)
    for part, ours, q in zip(at, params, mine, strict=True):
        params_agree("HFac", ours, param[part], before[part], 0.02)
        joined[part] = q
    assert codes_agree(joined, codes)


def test_hfac_takes_a_list_of_both_arithmetics(backend="cpu"):
    names = list(MATRIX_PARTS)
    dtypes = [DTYPES[k % len(DTYPES)] for k in range(len(names))]
    parts, beta = MatrixParts(names, dtypes), torch.linspace(0.5, 0.95, len(names), dtype=torch.float64)
    alone = [MatrixParts([name], [dtype]) for name, dtype in zip(names, dtypes, strict=True)]
    ours, known = parts.sums(backend, beta2=beta), parts.known()
    params, states = parts.apply(backend, known, beta1=beta, **HFAC_OPTIONS["clipped"])
    for k, one in enumerate(alone):
        one.params, one.grads = [parts.params[k]], [parts.grads[k]]
        one.by_row = {name: [entries[k]] for name, entries in parts.by_row.items()}
        one.by_col = {name: [entries[k]] for name, entries in parts.by_col.items()}
        assert same_bits([sums[k] for sums in ours], [sums[0] for sums in one.sums(backend, beta2=beta[k].item())])
        mine = {name: entries[k : k + 1] for name, entries in known.items()}
        again, kept = one.apply(backend, mine, beta1=beta[k].item(), **HFAC_OPTIONS["clipped"])
        assert same_bits([params[k]] + [s[k] for s in states.values()], again + [s[0] for s in kept.values()])


def test_hfac_int8_takes_a_list_of_both_arithmetics(backend="cpu"):
    names = list(MATRIX_PARTS)
    parts = MatrixParts(names, [DTYPES[k % len(DTYPES)] for k in range(len(names))])
    known, beta = parts.known(), torch.linspace(0.5, 0.95, len(names), dtype=torch.float64)
    ours, theirs = (
        parts.apply_codes(each, known, beta1=beta, **HFAC_OPTIONS["clipped"]) for each in (backend, "reference")
    )
    for k, name in enumerate(names):
        params_agree("HFac", ours[0][k], theirs[0][k], parts.params[k], 0.02)
        mine, wanted = (found[1]["exp_avg_qs"][k] for found in (ours, theirs))
        assert not mine.numel() or codes_agree(mine, wanted), name


@pytest.mark.pairwise
@pytest.mark.parametrize("options", HFAC_OPTIONS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (1, 2), (2, 3)], ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hfac_parts_make_the_whole(dtype, grid, options, backend="cpu"):
    (m, n), wide, eps, beta2, options = (130, 96), ops.state_dtype(dtype), 1e-6, 0.95, HFAC_OPTIONS[options]
    param, grad = gradient((m, n), 0, dtype), gradient((m, n), 1, dtype)
    u, v, r, s = (positive(count, wide, seed) for seed, count in enumerate((m, n, m, n)))
    rows, cols = ([k * size // parts for k in range(parts + 1)] for size, parts in zip((m, n), grid, strict=True))
    at = [
        (slice(*rows[a : a + 2]), slice(*cols[b : b + 2]))
        for a in range(grid[0])
        for b in range(grid[1])
    ]  # fmt: skip
    grads = [grad[part] for part in at]
    count = [n] * len(at)

    row_sums, squares = [[torch.zeros_like(r[a]) for a, _ in at] for _ in range(2)]
    calls.hfac_sums(
        grads, [r[a] * 0 for a, _ in at], row_sums, squares, cols=count, beta2=0.0, eps=0.0, backend=backend
    )
    total_rows, new_r = torch.zeros_like(r), torch.zeros_like(r)
    for (a, _), sums, square_sums in zip(at, row_sums, squares, strict=True):
        total_rows[a] += sums
        new_r[a] += square_sums
    new_r = beta2 * r + (1 - beta2) * (new_r + n * eps)
    scratch = [[torch.zeros_like(r[a]) for a, _ in at] for _ in range(2)]
    by_col = [[torch.zeros_like(s[b]) for _, b in at] for _ in range(3)]
    calls.hfac_sums(
        grads, [new_r[a] for a, _ in at], *scratch, *by_col, cols=count, beta2=1.0, eps=eps, backend=backend
    )
    whole = torch.zeros(3, n, dtype=wide)
    for k, sums in enumerate(by_col):
        for (_, b), part in zip(at, sums, strict=True):
            whole[k, b] += part
    new_s = beta2 * s + (1 - beta2) * (whole[1] + m * eps)
    mean_square = new_r.double().sum() * (whole[2].double() / new_s.double()).sum() / (m * n)

    params = [param[part].clone() for part in at]
    states = [[x[a].clone() for a, _ in at] for x in (u, r)], [[x[b].clone() for _, b in at] for x in (v, s)]
    calls.hfac_apply_(
        params,
        grads,
        states[0][0],
        states[1][0],
        states[0][1],
        states[1][1],
        [total_rows[a].clone() for a, _ in at],
        [new_r[a].clone() for a, _ in at],
        [whole[0, b].clone() for _, b in at],
        [new_s[b].clone() for _, b in at],
        new_r.double().sum().expand(len(at)),
        mean_square.expand(len(at)),
        rows=[m] * len(at),
        cols=count,
        lr=0.02,
        beta1=0.8,
        backend=backend,
        **options,
    )
    before, theirs = param.clone(), [x.clone() for x in (u, v, r, s)]
    calls.hfac_step_(
        [param], [grad], *([x] for x in theirs), lr=0.02, beta1=0.8, beta2=beta2, eps=eps, backend=backend, **options
    )
    for part, mine in zip(at, params, strict=True):
        params_agree("HFac", mine, param[part], before[part], 0.02)
    for k, (a, b) in enumerate(at):
        for mine, other in zip(
            (*states[0], *states[1]), (theirs[0][a], theirs[2][a], theirs[1][b], theirs[3][b]), strict=True
        ):
            close(mine[k], other, max(other.abs().max(), grad.abs().max().to(wide)))


def row_range(shape, first, last, step=1):
    """Runs of the rows [first, last), every ``step``-th."""
    slice_ = torch.Size(shape[1:]).numel()
    if step == 1:
        return (last - first, *shape[1:]), [(first * slice_, (last - first) * slice_)]
    picked = range(first, last, step)
    return (len(picked), *shape[1:]), [(row * slice_, slice_) for row in picked]


def col_range(shape, first, last):
    """Runs of the columns [first, last) of every row."""
    slice_, inner = torch.Size(shape[1:]).numel(), torch.Size(shape[2:]).numel()
    width = (last - first) * inner
    return (shape[0], last - first, *shape[2:]), [(row * slice_ + first * inner, width) for row in range(shape[0])]


def last_range(shape, first, last):
    """Runs of the indices [first, last) of the last dimension."""
    count = torch.Size(shape[:-1]).numel()
    return (*shape[:-1], last - first), [(i * shape[-1] + first, last - first) for i in range(count)]


#: shape of the whole, (shape of the part, its runs)
BLOCK_PARTS = {
    "whole": ((256, 320), row_range((256, 320), 0, 256)),
    "rows": ((256, 320), row_range((256, 320), 64, 128)),
    "rows with a head and a tail": ((127, 129), row_range((127, 129), 30, 101)),
    "rows in chunks": ((1030, 130), row_range((1030, 130), 7, 1017)),
    "rows of whole bytes": ((640, 520), row_range((640, 520), 8, 601)),
    "a few of a row": ((6, 4, 3, 3), row_range((6, 4, 3, 3), 1, 2)),
    "of a vector": ((30522,), row_range((30522,), 11, 20003)),
    "columns": ((64, 64), col_range((64, 64), 16, 48)),
    "columns that stride": ((64, 96), col_range((64, 96), 0, 48)),
    "odd columns": ((64, 96), col_range((64, 96), 3, 50)),
    "columns of a convolution": ((32, 12, 3, 3), col_range((32, 12, 3, 3), 4, 9)),
    "a block for each row": ((1201, 30), col_range((1201, 30), 2, 9)),
    "runs from within a byte": ((64, 64), ((2, 104), [(60, 104), (16 * 64 + 60, 104)])),
    "every third row": ((90, 64), row_range((90, 64), 1, 90, 3)),
    "every other odd row": ((127, 129), row_range((127, 129), 0, 127, 2)),
    "no rows": ((24, 18), row_range((24, 18), 5, 5)),
    "no columns": ((24, 18), col_range((24, 18), 18, 18)),
    "of a third dimension": ((9, 6, 10), last_range((9, 6, 10), 3, 6)),
    "of a fourth dimension": ((16, 8, 3, 3), last_range((16, 8, 3, 3), 2, 3)),
}


def rows_of(block):
    """A block's rows as blocks of their own."""
    first, stride, row, row_step, col, rows, cols = block
    return [Block(first + a * stride, cols, row + a * row_step, 1, col, 1, cols) for a in range(rows)]


class BlockParts:
    """SMMF's parts of a list."""

    FIRST = ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "new_rows", "new_cols")

    def __init__(self, names, dtypes, grad_dtype=None, transposed=False):
        self.params, self.grads, self.blocks = [], [], []
        lists = ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols")
        lists += ("new_rows", "new_cols", "new_sq_rows", "new_sq_cols", "exp_avg_signs")
        self.states = {name: [] for name in lists}
        for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True)):
            whole, (shape, runs) = BLOCK_PARTS[name]
            n, m = square(torch.Size(whole).numel())
            self.blocks.append(blocks(runs, m))
            if name == "a block for each row":
                self.blocks[-1] = [single for block in self.blocks[-1] for single in rows_of(block)]
            for tensors, seed, kind in ((self.params, i, dtype), (self.grads, 100 + i, grad_dtype or dtype)):
                values = gradient(shape, seed, kind)
                strided = transposed and values.ndim > 1
                tensors.append(values.transpose(0, -1).contiguous().transpose(0, -1) if strided else values)
            for k, state in enumerate(lists[:-1]):
                count = n if "rows" in state else m
                self.states[state].append(positive(count, ops.state_dtype(dtype), 10 * i + k))
            pattern = gradient(shape, 7 + i) > 0 if shape[0] else torch.zeros(shape, dtype=torch.bool)
            signs = pack_signs(pattern) if pattern.numel() else torch.zeros(sign_shape(shape)).byte()
            self.states["exp_avg_signs"].append(signs)

    def step(self, backend, **options):
        """Parameters and states after the step; the lists here keep theirs."""
        params = [copy_of(p) for p in self.params]
        states = {name: [s.clone() for s in entries] for name, entries in self.states.items()}
        absent = self.FIRST if options["beta1"] is None else ()
        given = {name: None if name in absent else entries for name, entries in states.items()}
        scalars = dict(lr=0.02, eps=1e-6, weight_decay=0.1, beta2=0.95) | options
        calls.smmf_sums_step_(params, self.grads, **given, blocks=self.blocks, backend=backend, **scalars)
        return params, states


def smmf_agrees(parts, ours, theirs, backend, which=slice(None)):
    """To the bit, but for the sums, and as `weights_agree` has it of the kernels of ``backend``."""
    (params, states), (twins, others) = ours, theirs
    for mine, other, old in zip(params[which], twins[which], parts.params[which], strict=True):
        assert weights_agree(mine, other, old, 0.02, backend)
    for name, entries in states.items():
        for mine, other, old in zip(entries[which], others[name][which], parts.states[name][which], strict=True):
            if name.startswith("new"):
                close(mine, other)
            else:
                assert torch.equal(mine, other), name
                assert name == "exp_avg_signs" or torch.equal(mine, old), name


@pytest.mark.pairwise
@pytest.mark.parametrize("options", SMMF_OPTIONS)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", BLOCK_PARTS)
def test_smmf_sums(part, dtype, transposed, options, backend="cpu"):
    parts = BlockParts([part], [dtype], transposed=transposed)
    ours, theirs = (parts.step(each, **SMMF_OPTIONS[options]) for each in (backend, "reference"))
    assert ours[0][0].stride() == parts.params[0].stride()
    smmf_agrees(parts, ours, theirs, backend)


def test_gradients_are_clipped(backend="cpu"):
    """As gradients that have been multiplied: by a power of two, of which no bit is lost. Kernels that multiply as they
    read write no gradient."""
    clip, dtypes = torch.tensor(0.25, dtype=torch.float64), [torch.float32, torch.bfloat16, torch.float64]
    matrices, blocks_ = MatrixParts(["rows", "odd tile", "no rows"], dtypes), BlockParts(list(BLOCK_PARTS)[3:6], dtypes)
    known = matrices.known()
    calls = [
        (matrices, lambda **more: sum(matrices.sums(backend, **more), [])),
        (matrices, lambda **more: matrices.apply(backend, known, **HFAC_OPTIONS["clipped"], **more)),
        (blocks_, lambda **more: blocks_.step(backend, **SMMF_OPTIONS["coupled"], **more)),
    ]
    for parts, call in calls:
        grads = parts.grads
        found = []
        for factor, more in ((1, {"clip": clip}), (0.25, {})):
            parts.grads = [grad * factor for grad in grads]
            given = [grad.clone() for grad in parts.grads]
            results = call(**more)
            found.append(results if isinstance(results, list) else [*results[0], *sum(results[1].values(), [])])
            assert backend == "cpu" or same_bits(parts.grads, given)
        parts.grads = grads
        assert same_bits(*found)


def test_found_inf_leaves_every_bit_alone(backend="cpu"):
    """Of gradients that are not finite; and where it is zero a step has the bits of one without it."""
    matrices = MatrixParts(["rows", "tile", "no columns"], [torch.float32, torch.bfloat16, torch.float64])
    blocks_ = BlockParts(["rows with a head and a tail", "runs from within a byte"], [torch.bfloat16, torch.float32])
    known, found = matrices.known(), torch.ones(())
    old = [matrices.params, *matrices.by_row.values(), *matrices.by_col.values()]
    of_codes = [matrices.params, matrices.codes, matrices.by_row["exp_avg_sq_rows"], matrices.by_col["exp_avg_sq_cols"]]
    of_blocks = [blocks_.params, *(blocks_.states[name] for name in SIGNED)]
    cases = (
        (matrices, lambda **more: matrices.apply(backend, known, **HFAC_OPTIONS["clipped"], **more), old),
        (matrices, lambda **more: matrices.apply_codes(backend, known, **HFAC_OPTIONS["clipped"], **more), of_codes),
        (blocks_, lambda **more: blocks_.step(backend, **SMMF_OPTIONS["decoupled"], **more), of_blocks),
    )
    for parts, act, before in cases:
        plain, given = _written(act()), parts.grads
        assert same_bits(_written(act(found_inf=torch.zeros(()))), plain)
        parts.grads = [torch.full_like(grad, torch.inf) for grad in given]
        ours = _written(act(found_inf=found))
        assert same_bits(ours, sum(map(list, before), []))
        parts.grads = given


#: of SMMF's lists those that are no sums
SIGNED = ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols", "exp_avg_signs")


def _written(found):
    """Parameters and states, without sums, of a step of parts."""
    params, states = found
    return [*params, *(tensor for name, entries in states.items() if "new" not in name for tensor in entries)]


def test_the_table_has_blocks_of_every_kind():
    """With strides, heads and tails, and a thousand of them."""
    found = {name: BlockParts([name], [torch.float32]).blocks[0] for name in BLOCK_PARTS}
    assert any(block.stride != block.cols and block.cols % 8 == 0 for block in found["columns that stride"])
    assert any(block.row_step > 1 for block in found["columns that stride"])
    assert len(found["rows with a head and a tail"]) == 3
    assert any(block.first % 8 and block.cols % 8 == 0 for block in found["runs from within a byte"])
    assert len(found["a block for each row"]) > 1000


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["coupled", "no first moment"])
def test_smmf_takes_a_list_of_both_arithmetics(options, grad_dtype, backend="cpu"):
    names = list(BLOCK_PARTS)
    parts = BlockParts(names, [DTYPES[k % len(DTYPES)] for k in range(len(names))], grad_dtype)
    ours, theirs = (parts.step(each, **SMMF_OPTIONS[options]) for each in (backend, "reference"))
    for k in range(len(names)):
        smmf_agrees(parts, ours, theirs, backend, slice(k, k + 1))


@pytest.mark.pairwise
@pytest.mark.parametrize("options", SMMF_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pieces", [1, 3])
def test_smmf_parts_make_the_whole(pieces, dtype, options, backend="cpu"):
    """With the columns' sums divided by their sum."""
    shape, options = (127, 129), SMMF_OPTIONS[options]
    wide, (n, m) = ops.state_dtype(dtype), square(127 * 129)
    param, grad = gradient(shape, 0, dtype), gradient(shape, 1, dtype)
    first, second = ([positive(count, wide, seed + k) for k, count in enumerate((n, m))] for seed in (0, 5))
    positive_signs = gradient(shape, 3) > 0
    sums = [torch.zeros(count, dtype=wide) for count in (n, m, n, m)]
    scalars = dict(lr=0.02, eps=1e-6, weight_decay=0.1, beta2=0.95, backend=backend) | options
    with_first = options["beta1"] is not None
    found, signs = [], []
    for k in range(pieces):
        a, b = k * 127 // pieces, (k + 1) * 127 // pieces
        mine, mine_signs = param[a:b].clone(), pack_signs(positive_signs[a:b])
        moments = [*([x] for x in first), [mine_signs]] if with_first else [None] * 3
        new = [*([x] for x in sums[:2])] if with_first else [None] * 2
        lists = (*moments, *([x] for x in second), *new, *([x] for x in sums[2:]))
        where = [blocks([(a * 129, (b - a) * 129)], m)]
        calls.smmf_sums_step_([mine], [grad[a:b]], *lists, blocks=where, **scalars)
        found.append(mine)
        signs.append(mine_signs)
    whole_signs = pack_signs(positive_signs)
    moments = [*([x.clone()] for x in first), [whole_signs]] if with_first else [None] * 3
    squares = [[x.clone()] for x in second]
    calls.smmf_step_([param], [grad], *moments, *squares, **scalars)
    assert torch.equal(torch.cat(found), param)
    close(sums[2], squares[0][0])
    close(sums[3] / sums[3].sum(), squares[1][0])
    if with_first:
        assert torch.equal(torch.cat(signs), whole_signs)
        close(sums[0], moments[0][0])
        close(sums[1] / sums[1].sum(), moments[1][0])


def everything(dtype, grad_dtype=None, backend="cpu"):
    """All that the ops leave behind on all parts of both tables."""
    parts = MatrixParts(list(MATRIX_PARTS), [dtype] * len(MATRIX_PARTS), grad_dtype)
    params, states = parts.apply(backend, parts.known(), **HFAC_OPTIONS["clipped"])
    found = [
        *params,
        *(s for side in states.values() for s in side),
        *(s for side in parts.sums(backend) for s in side),
    ]
    if backend == "cpu":  # CUDA has no kernels for these
        params, states = parts.apply_codes(backend, parts.known(), **HFAC_OPTIONS["clipped"])
        found += [*params, *(s for side in states.values() for s in side)]
    square_parts = BlockParts(list(BLOCK_PARTS), [dtype] * len(BLOCK_PARTS), grad_dtype)
    params, states = square_parts.step(backend, **SMMF_OPTIONS["decoupled"])
    return [*found, *params, *(s for side in states.values() for s in side)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_parts_do_not_depend_on_threads(dtype):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(everything(dtype))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_parts_do_not_depend_on_the_instruction_set(dtype):
    results = []
    for isa in cpu._C.info()["isa_usable"]:
        cpu._C.set_isa(isa)
        results.append(everything(dtype))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op", [op for op in spec.OPS.values() if op.shard])
def test_the_backend_has_every_op_on_parts(op):
    assert cpu.has(op) and not cpu.has(replace(op, name="hfac_unheard_of"))


def test_autograd_notices_the_write_of_a_part(backend="cpu"):
    parts, square_parts = MatrixParts(["rows"], [torch.float32]), BlockParts(["rows"], [torch.float32])
    for params, step in ((parts.params, parts.apply), (square_parts.params, square_parts.step)):
        counts = [p._version for p in params]
        options = HFAC_OPTIONS["clipped"] | {"known": parts.known()} if step == parts.apply else SMMF_OPTIONS["coupled"]
        written, _ = step(backend, **options)
        assert all(p._version > copy_of(p)._version for p in written) and [p._version for p in params] == counts


#: list -> an entry for the part "rows" that does not fit
WRONG = {
    "grads": lambda t: t[1:],
    "exp_avg_signs": lambda t: t[1:],
    "exp_avg_rows": lambda t: t[1:],
    "new_cols": lambda t: t[1:],
    "new_sq_rows": lambda t: t.double(),
    "exp_avg_sq_cols": lambda t: t[1:],
}


@pytest.mark.parametrize("name", WRONG)
def test_smmf_refuses_lists_that_do_not_fit(name):
    parts = BlockParts(["rows"], [torch.float32])
    lists = dict(parts.states, grads=parts.grads)
    lists[name][0] = WRONG[name](lists[name][0])
    parts.grads = lists.pop("grads")
    with pytest.raises(ValueError, match=rf"{name}\[0\]|moments of params\[0\]"):
        parts.step("cpu", **SMMF_OPTIONS["decoupled"])


@pytest.mark.parametrize("name", ["grads", "row_sums", "new_cols", "exp_avg_rows", "totals"])
def test_hfac_refuses_lists_that_do_not_fit(name):
    parts = MatrixParts(["rows"], [torch.float32])
    known = parts.known()
    lists = {"grads": parts.grads, **known, **parts.by_row}
    if name == "totals":
        known["totals"] = torch.ones(2)
    else:
        lists[name][0] = lists[name][0][1:]
    with pytest.raises(ValueError, match=rf"{name}|entries 0"):
        parts.apply("cpu", known, **HFAC_OPTIONS["clipped"])
    if name == "row_sums":
        rows = parts.by_row["exp_avg_sq_rows"]
        with pytest.raises(ValueError, match="row_sums"):
            calls.hfac_sums(parts.grads, rows, known["row_sums"], rows, cols=[96], beta2=0.9, eps=0.0, backend="cpu")


@pytest.mark.parametrize(
    "change",
    [dict(first=20480), dict(first=1), dict(row=241), dict(col=1), dict(stride=0), dict(rows=-1), dict(cols=0)],
)
def test_blocks_out_of_range_are_refused(change):
    parts = BlockParts(["rows"], [torch.float32])
    parts.blocks = [[parts.blocks[0][0]._replace(**change)]]
    with pytest.raises(ValueError, match="blocks"):
        parts.step("cpu", **SMMF_OPTIONS["decoupled"])


def test_a_block_is_what_the_extension_takes():
    assert Block._fields == ("first", "stride", "row", "row_step", "col", "rows", "cols")
