"""Every op of the package in plain torch: the definition that each backend is checked against.

H-Fac: Nguyen, Chen, Liu, Liu, *Memory-Efficient Optimization with Factorized Hamiltonian Descent*, AISTATS 2025.
SMMF: Park, Lee, *SMMF: Square-Matricized Momentum Factorization for Memory-Efficient Optimization*, AAAI 2025.

An op takes lists, one entry per parameter, and writes parameters and states in place. Its arguments are valid
(`hfac.ops` checks them). Symbols are the papers': a parameter W with gradient G is a matrix of m rows and n columns
for H-Fac, of n rows and m columns for SMMF; names ending in `_row` have one entry per row, in `_col` one per column.

Arithmetic is done in the type of the states: float32, or float64 for float64 parameters; only the new parameter is
rounded to its own type. `lr`, `weight_decay`, `beta1` and `beta2` are floats or 0-d tensors; the two decays, which
arrive evaluated for the step (`hfac.schedules`), may also be 1-d with one entry per parameter.

`nonfinite`, where given, is an int32 tensor [len(params)] that the op fills: 1 where a gradient holds an element whose
square, times the number of elements, is not finite: inf, NaN, or so large that a sum of squares could overflow. Such a
parameter and its states keep every bit. The test is of elements, so that no order of summation can change its outcome.

A new parameter is rounded to the nearest number of its type, but for two options (`hfac.rounding`). `master_lows`,
where given, are int16 or int8 tensors of the parameters' shapes: with its entry a bfloat16 parameter makes a master
weight, which is what is read and written. `places`, where given, ask for stochastic rounding with the random bits of
`seed` and `step`, the number t of the step, a float or a tensor, also 1-d with one entry per parameter.

`watched`, where given, is a float64 tensor [len(params), 5], to whose rows what the step tells of itself is added,
unless it is refused: the sum of squares of W's change before it is stored; how many elements stay as they are once the
new ones are rounded to the nearest of what is stored; the sum of squares of the direction (H-Fac: U before clipping;
SMMF: M / (sqrt(V) + eps)); and, of H-Fac's matrices, how many rows and columns of the gradient hold nothing but zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import codes, rounding
from .matricize import Block
from .rounding import BitOffset
from .schedules import Scalar
from .signs import pack_signs, unpack_signs


def hfac_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: Sequence[Tensor],
    exp_avg_cols: Sequence[Tensor],
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
) -> None:
    """One step of H-Fac on matrices (H-Fac, Algorithm 1): u, r [m] and v, s [n] are the whole optimizer state."""
    for i, param in enumerate(params):
        u_row, v_col, r_row, s_col = exp_avg_rows[i], exp_avg_cols[i], exp_avg_sq_rows[i], exp_avg_sq_cols[i]
        m, n = u_row.numel(), v_col.numel()
        if m * n == 0:
            continue
        b1, b2 = _of(beta1, i), _of(beta2, i)
        stored = _Stored(param, i, master_lows, places, seed, step)
        W, G = _operands(stored, grads[i], (m, n), r_row.dtype, maximize)

        row_mean, col_mean = G.mean(1), G.mean(0)
        sq = G * G + eps
        u = b1 * u_row.view(m) + (1 - b1) * row_mean
        v = b1 * v_col.view(n) + (1 - b1) * col_mean
        r = b2 * r_row.view(m) + (1 - b2) * sq.sum(1)
        s = b2 * s_col.view(n) + (1 - b2) * sq.sum(0)

        U, D = _hfac_direction(G, (u, v, r, s), (row_mean, col_mean), (m, n), r.sum(), b1, clip_threshold)
        W = W - lr * (D + weight_decay * W)

        keep = _keep(G, nonfinite, i)
        if watched is not None:
            zero = G == 0
            _watch(watched[i], stored, W, U, keep, zero.all(1).sum(), zero.all(0).sum())
        stored.write(W, keep)
        for old, new in ((u_row, u), (v_col, v), (r_row, r), (s_col, s)):
            _write(old, new, keep)


def hfac_int8_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_qs: Sequence[Tensor],
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
) -> None:
    """One step of H-Fac on matrices whose first moment is whole, in 8 bits: `exp_avg_qs` are int8 of the parameters'
    shapes, codes (`hfac.codes`) of X = M / sqrt(V), V = r s^T / sum(r).

    X changes its unit with V, so the old one is multiplied by rho_i sigma_j = sqrt(V_old / V) before G / sqrt(V) is
    averaged in; the step is Adam's, b1 X + (1 - b1) G / sqrt(V), clipped as where moments are whole.
    """
    for i, param in enumerate(params):
        q, r_row, s_col = exp_avg_qs[i], exp_avg_sq_rows[i], exp_avg_sq_cols[i]
        m, n = r_row.numel(), s_col.numel()
        if m * n == 0:
            continue
        b1, b2 = _of(beta1, i), _of(beta2, i)
        stored = _Stored(param, i, master_lows, places, seed, step)
        W, G = _operands(stored, grads[i], (m, n), r_row.dtype, maximize)

        sq = G * G + eps
        r_old, s_old = r_row.view(m), s_col.view(n)
        r = b2 * r_old + (1 - b2) * sq.sum(1)
        s = b2 * s_old + (1 - b2) * sq.sum(0)
        squares, totals = (r_old, s_old, r, s), (r_old.sum(), r.sum())
        U, D, new_q = _hfac_whole_direction(G, q.view(m, n), squares, totals, b1, clip_threshold)
        W = W - lr * (D + weight_decay * W)

        keep = _keep(G, nonfinite, i)
        if watched is not None:
            zero = G == 0
            _watch(watched[i], stored, W, U, keep, zero.all(1).sum(), zero.all(0).sum())
        stored.write(W, keep)
        for old, new in ((q, new_q), (r_row, r), (s_col, s)):
            _write(old, new, keep)


def _hfac_whole_direction(
    G: Tensor,
    q: Tensor,
    squares: tuple[Tensor, Tensor, Tensor, Tensor],
    totals: tuple[Tensor, Tensor],
    b1: Scalar,
    clip_threshold: float | None,
    mean_square: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U of a matrix whose first moment is codes `q`, or of a part of one, before it is clipped; the direction of the
    step; and new codes. `squares` are r and s as they were and as they are, `totals` the sums of both r."""
    (r_old, s_old, r, s), (total_old, total) = squares, totals
    U = _hfac_normalized(G, r, s, total)
    rho, sigma = codes.unit_change(r_old, r, total_old, total), s_old.sqrt() / s.sqrt()
    X_old = codes.decode(q, r.dtype)
    X = (b1 * rho)[:, None] * sigma * X_old + (1 - b1) * U
    D = b1 * X + (1 - b1) * U
    if clip_threshold is not None:
        D = D * (1 / _clip_divisor(U, clip_threshold, mean_square))
    return U, D, codes.encode(X, q, X_old)


def hfac_sums(
    grads: Sequence[Tensor],
    old_rows: Sequence[Tensor],
    row_sums: Sequence[Tensor],
    new_rows: Sequence[Tensor],
    col_sums: Sequence[Tensor] | None = None,
    col_squares: Sequence[Tensor] | None = None,
    col_ratios: Sequence[Tensor] | None = None,
    *,
    cols: Sequence[int],
    beta2: Scalar,
    eps: float,
) -> None:
    """What a step of H-Fac must know of gradients of which a rank has a part; one read of the part.

    A part is [m, n], some rows and columns of a matrix that has `cols` columns. With r = beta2 old_rows + (1 - beta2)
    (row sums of G^2 + cols eps) this fills row_sums [m] with sums of G, new_rows [m] with r, and col_sums, col_squares
    and col_ratios [n] with sums of G, G^2 and G_ij^2 / r_i. The last three, added up over all parts, give the clip norm
    without another look at G: sum_ij U_ij^2 = sum(r) sum_j ratio_j / s_j. Without lists for them only rows are summed.
    """
    for i, grad in enumerate(grads):
        old = old_rows[i].reshape(-1)
        if grad.numel() == 0:
            continue
        b2 = _of(beta2, i)
        G = grad.reshape(old.numel(), -1).to(old.dtype).contiguous()
        sq = G * G
        row_sums[i].copy_(G.sum(1))
        new_rows[i].copy_(b2 * old + (1 - b2) * (sq.sum(1) + cols[i] * eps))
        if col_sums is not None and col_squares is not None and col_ratios is not None:
            col_sums[i].copy_(G.sum(0))
            col_squares[i].copy_(sq.sum(0))
            col_ratios[i].copy_((sq / new_rows[i][:, None]).sum(0))


def hfac_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: Sequence[Tensor],
    exp_avg_cols: Sequence[Tensor],
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    row_sums: Sequence[Tensor],
    new_rows: Sequence[Tensor],
    col_sums: Sequence[Tensor],
    new_cols: Sequence[Tensor],
    totals: Tensor,
    mean_squares: Tensor,
    *,
    rows: Sequence[int],
    cols: Sequence[int],
    lr: Scalar,
    beta1: Scalar,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
) -> None:
    """The rest of a step of H-Fac, on parts [m, n] of matrices of `rows` rows and `cols` columns.

    row_sums [m] and col_sums [n] are the sums of G over whole rows and columns, new_rows [m] and new_cols [n] the new
    second moments r and s; totals and mean_squares, one entry per parameter, are sum(r) and the mean of U^2. A part
    without rows still has columns, whose moments go on, and the other way round.
    """
    for i, param in enumerate(params):
        u_row, v_col, r, s = exp_avg_rows[i], exp_avg_cols[i], new_rows[i], new_cols[i]
        b1 = _of(beta1, i)
        row_mean, col_mean = row_sums[i] / cols[i], col_sums[i] / rows[i]
        if maximize:
            row_mean, col_mean = -row_mean, -col_mean
        u = b1 * u_row.view(-1) + (1 - b1) * row_mean
        v = b1 * v_col.view(-1) + (1 - b1) * col_mean
        if param.numel():
            stored = _Stored(param, i, master_lows, places, seed, step)
            W, G = _operands(stored, grads[i], (u.numel(), v.numel()), r.dtype, maximize)
            whole, means, mean_square = (rows[i], cols[i]), (row_mean, col_mean), mean_squares[i]
            U, D = _hfac_direction(G, (u, v, r, s), means, whole, totals[i], b1, clip_threshold, mean_square)
            W = W - lr * (D + weight_decay * W)
            if watched is not None:
                _watch(watched[i], stored, W, U, None)
            stored.write(W, None)
        for old, new in ((u_row, u), (v_col, v), (exp_avg_sq_rows[i], r), (exp_avg_sq_cols[i], s)):
            _write(old, new, None)


def hfac_int8_apply_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_qs: Sequence[Tensor],
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    new_rows: Sequence[Tensor],
    new_cols: Sequence[Tensor],
    old_totals: Tensor,
    totals: Tensor,
    mean_squares: Tensor,
    *,
    lr: Scalar,
    beta1: Scalar,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
) -> None:
    """The rest of a step of `hfac_int8_step_` on parts [m, n] of matrices: as `hfac_apply_`, but for `exp_avg_qs`, the
    codes of a part, and old_totals, the sum of the whole r as it was."""
    for i, param in enumerate(params):
        q, r_row, s_col, r, s = exp_avg_qs[i], exp_avg_sq_rows[i], exp_avg_sq_cols[i], new_rows[i], new_cols[i]
        if param.numel():
            m, n = r.numel(), s.numel()
            stored = _Stored(param, i, master_lows, places, seed, step)
            W, G = _operands(stored, grads[i], (m, n), r.dtype, maximize)
            squares, sums = (r_row.view(m), s_col.view(n), r, s), (old_totals[i].to(r.dtype), totals[i].to(r.dtype))
            of = q.reshape(m, n)
            U, D, new_q = _hfac_whole_direction(
                G, of, squares, sums, _of(beta1, i), clip_threshold, mean_squares[i].to(r.dtype)
            )
            W = W - lr * (D + weight_decay * W)
            if watched is not None:
                _watch(watched[i], stored, W, U, None)
            stored.write(W, None)
            _write(q, new_q, None)
        for old, new in ((r_row, r), (s_col, s)):
            _write(old, new, None)


def _hfac_direction(
    G: Tensor,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    means: tuple[Tensor, Tensor],
    shape: tuple[int, int],
    total: Tensor,
    b1: Scalar,
    clip_threshold: float | None,
    mean_square: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """U of a matrix of `shape`, or of a part of one, before it is clipped, and the direction of the step. `moments` are
    the new u, v, r and s, `means` those of G's rows and columns, and `total` is sum(r)."""
    (u, v, r, s), (row_mean, col_mean), (m, n) = moments, means, shape
    phi = b1 * (u - row_mean) / (r / n).sqrt()
    psi = b1 * (v - col_mean) / (s / m).sqrt()

    U = _hfac_normalized(G, r, s, total)
    clipped = U if clip_threshold is None else U / _clip_divisor(U, clip_threshold, mean_square)
    return U, (phi[:, None] + psi) / 2 + clipped


def _hfac_normalized(G: Tensor, r: Tensor, s: Tensor, total: Tensor) -> Tensor:
    """U = G / sqrt(V) with V = r s^T / sum(r).

    V is never formed and sum(r) / r_i never divided: the first would underflow float32 (eps = 1e-30), the second can
    overflow. |G_ij| <= sqrt(s_j / (1 - b2)) keeps the first product finite."""
    return G * (1 / s.sqrt()) * (total.sqrt() * (1 / r.sqrt()))[:, None]


def hfac_dense_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
    mean_squares: Tensor | None = None,
) -> None:
    """One step of H-Fac where nothing can be factored (vectors, scalars, one row or one column): both moments are
    whole.

    Without clipping the formula is that of `hfac_step_` with u = v = m and rowmean = colmean = G. The clip factor
    scales the whole direction, where `hfac_step_` clips U alone: b1 (m - G) / sqrt(q) beside a clipped U would point
    against a gradient that is larger than usual. `mean_squares`, one entry per parameter, replaces the mean of U^2 by
    which a parameter is clipped where it is part of a larger one.
    """
    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        b1, b2 = _of(beta1, i), _of(beta2, i)
        stored = _Stored(param, i, master_lows, places, seed, step)
        W, G = _operands(stored, grads[i], (-1,), exp_avg_sqs[i].dtype, maximize)

        m = b1 * exp_avgs[i].view(-1) + (1 - b1) * G
        q = _hfac_dense_square(exp_avg_sqs[i], G, b2, eps)
        U = G / q.sqrt()
        D = (b1 * m + (1 - b1) * G) / q.sqrt()
        if clip_threshold is not None:
            D = D * (1 / _clip_divisor(U, clip_threshold, None if mean_squares is None else mean_squares[i]))
        W = W - lr * (D + weight_decay * W)

        keep = _keep(G, nonfinite, i)
        if watched is not None:
            _watch(watched[i], stored, W, U, keep)
        stored.write(W, keep)
        for old, new in ((exp_avgs[i], m), (exp_avg_sqs[i], q)):
            _write(old, new, keep)


def hfac_dense_squares(grad: Tensor, exp_avg_sq: Tensor, *, beta2: Scalar, eps: float) -> Tensor:
    """U^2 of every element of the step that `hfac_dense_step_` would make with this gradient, 1-d."""
    G = grad.reshape(-1).to(exp_avg_sq.dtype)
    return G * G / _hfac_dense_square(exp_avg_sq, G, beta2, eps)


def _hfac_dense_square(old: Tensor, G: Tensor, b2: Scalar, eps: float) -> Tensor:
    return b2 * old.view(-1) + (1 - b2) * (G * G + eps)


def smmf_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: Sequence[Tensor] | None,
    exp_avg_cols: Sequence[Tensor] | None,
    exp_avg_signs: Sequence[Tensor] | None,
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
) -> None:
    """One step of SMMF (SMMF, Algorithm 1): decompress the old moments, update, compress (`nnmf`), step.

    Row states have n entries and column states m, n >= m, n m = numel: the parameter, row-major, as its most nearly
    square matrix. `exp_avg_signs` are uint8 as `pack_signs` lays them out. With beta1 None there is no first moment,
    the three first-moment lists are None, and the update is G / (sqrt(V) + eps).
    """
    for i, param in enumerate(params):
        r_V, c_V = exp_avg_sq_rows[i], exp_avg_sq_cols[i]
        n, m = r_V.numel(), c_V.numel()
        if n * m == 0:
            continue
        b2 = _of(beta2, i)
        stored = _Stored(param, i, master_lows, places, seed, step)
        W, G = _operands(stored, grads[i], (n, m), r_V.dtype, maximize)
        keep = _keep(G, nonfinite, i)
        W, G = _decay(W, G, lr, weight_decay, decoupled_weight_decay)

        M = G
        if beta1 is not None:
            assert exp_avg_rows is not None and exp_avg_cols is not None and exp_avg_signs is not None
            b1, r_M, c_M, sign = _of(beta1, i), exp_avg_rows[i], exp_avg_cols[i], exp_avg_signs[i]
            M = _smmf_first(G, b1, r_M, c_M, unpack_signs(sign, param.shape).reshape(n, m))
            r, c = nnmf(M.abs())
            for old, new in ((r_M, r), (c_M, c), (sign, pack_signs((M > 0).view(param.shape)))):
                _write(old, new, keep)

        V = _smmf_second(G, b2, r_V, c_V)
        r, c = nnmf(V)
        D = M / (V.sqrt() + eps)
        W = W - lr * D
        if watched is not None:
            _watch(watched[i], stored, W, D, keep)
        stored.write(W, keep)
        for old, new in ((r_V, r), (c_V, c)):
            _write(old, new, keep)


def smmf_sums_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_rows: Sequence[Tensor] | None,
    exp_avg_cols: Sequence[Tensor] | None,
    exp_avg_signs: Sequence[Tensor] | None,
    exp_avg_sq_rows: Sequence[Tensor],
    exp_avg_sq_cols: Sequence[Tensor],
    new_rows: Sequence[Tensor] | None,
    new_cols: Sequence[Tensor] | None,
    new_sq_rows: Sequence[Tensor],
    new_sq_cols: Sequence[Tensor],
    *,
    blocks: Sequence[Sequence[Block]],
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
) -> None:
    """One step of SMMF on parts of parameters. The factors of the whole, [n] and [m], are read and stay as they are;
    row and column sums of |M| and V over the part are added to the lists `new_...` of the same shapes.

    Added up over all parts they make the next factors: rows as they stand, columns divided by their sum (`nnmf`).
    Signs are those of the part, `pack_signs` of its shape. `blocks` says where the elements of the part lie in the
    square matrix (`Block`).
    """
    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        b2 = _of(beta2, i)
        stored = _Stored(param, i, master_lows, places, seed, step)
        W, G = _operands(stored, grads[i], (-1,), exp_avg_sq_rows[i].dtype, maximize)
        W, G = _decay(W.contiguous(), G, lr, weight_decay, decoupled_weight_decay)
        positive = None
        if beta1 is not None:
            assert exp_avg_signs is not None
            positive = unpack_signs(exp_avg_signs[i], param.shape).reshape(-1).contiguous()  # a vector's is a view
        new, direction = torch.empty_like(W), torch.empty_like(W)
        for block in blocks[i]:
            rows, cols = block.row_slice, block.col_slice
            g = block.of(G)
            M = g
            if beta1 is not None:
                assert exp_avg_rows is not None and exp_avg_cols is not None
                assert new_rows is not None and new_cols is not None and positive is not None
                signs = block.of(positive)
                M = _smmf_first(g, _of(beta1, i), exp_avg_rows[i][rows], exp_avg_cols[i][cols], signs)
                new_rows[i][rows] += M.abs().sum(1)
                new_cols[i][cols] += M.abs().sum(0)
                signs.copy_(M > 0)
            V = _smmf_second(g, b2, exp_avg_sq_rows[i][rows], exp_avg_sq_cols[i][cols])
            new_sq_rows[i][rows] += V.sum(1)
            new_sq_cols[i][cols] += V.sum(0)
            D = M / (V.sqrt() + eps)
            block.of(direction).copy_(D)
            block.of(new).copy_(block.of(W) - lr * D)
        if watched is not None:
            _watch(watched[i], stored, new, direction, None)
        stored.write(new, None)
        if positive is not None:
            assert exp_avg_signs is not None
            exp_avg_signs[i].copy_(pack_signs(positive.view(param.shape)))


def _smmf_first(G: Tensor, b1: Scalar, r_M: Tensor, c_M: Tensor, positive: Tensor) -> Tensor:
    magnitude = torch.outer(b1 * r_M, c_M)
    return torch.where(positive, magnitude, -magnitude) + (1 - b1) * G


def _smmf_second(G: Tensor, b2: Scalar, r_V: Tensor, c_V: Tensor) -> Tensor:
    return torch.outer(b2 * r_V, c_V) + (1 - b2) * (G * G)


def smmf_dense_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor] | None,
    exp_avg_sqs: Sequence[Tensor],
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool,
    maximize: bool,
    master_lows: Sequence[Tensor] | None = None,
    places: Sequence[BitOffset] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
) -> None:
    """One step of SMMF with both moments whole: where the square matrix has one column, or vector_reshape is off."""
    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        b2 = _of(beta2, i)
        stored = _Stored(param, i, master_lows, places, seed, step)
        W, G = _operands(stored, grads[i], (-1,), exp_avg_sqs[i].dtype, maximize)
        keep = _keep(G, nonfinite, i)
        W, G = _decay(W, G, lr, weight_decay, decoupled_weight_decay)

        M = G
        if beta1 is not None:
            assert exp_avgs is not None
            b1 = _of(beta1, i)
            M = b1 * exp_avgs[i].view(-1) + (1 - b1) * G
            _write(exp_avgs[i], M, keep)
        V = b2 * exp_avg_sqs[i].view(-1) + (1 - b2) * (G * G)
        D = M / (V.sqrt() + eps)
        W = W - lr * D
        if watched is not None:
            _watch(watched[i], stored, W, D, keep)
        stored.write(W, keep)
        _write(exp_avg_sqs[i], V, keep)


def nnmf(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rank-1 factors of a non-negative [n, m] matrix, n >= m: row sums [n] and column sums [m], the latter summing
    to 1.

    (SMMF, Algorithm 4, which normalises the shorter side.) A zero matrix has zero factors.
    """
    row, col = matrix.sum(1), matrix.sum(0)
    total = col.sum()
    return row, col / torch.where(total == 0, 1, total)


class _Stored:
    """A parameter as it is stored: what is read as W, and what becomes of the new one."""

    def __init__(
        self,
        param: Tensor,
        i: int,
        master_lows: Sequence[Tensor] | None,
        places: Sequence[BitOffset] | None,
        seed: int,
        step: Scalar,
    ) -> None:
        self.param, self._seed, self._step = param, seed, _of(step, i)
        self._low = None if master_lows is None else master_lows[i]
        self._offset = None if places is None else places[i]

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.param.to(dtype) if self._low is None else rounding.join(self.param, self._low)

    def nearest(self, new: Tensor) -> Tensor:
        """What is read of new weights once they are stored, rounded to the nearest."""
        if self._low is None:
            return new.to(self.param.dtype).to(new.dtype)
        return rounding.join(*rounding.split(new, self._low.dtype))

    def write(self, new: Tensor, keep: Tensor | None) -> None:
        new, param = new.view(self.param.shape), self.param
        bits = None
        if self._offset is not None:
            bits = rounding.random_bits(self._offset, param.shape, self._seed, self._step, param.device)
        if self._low is not None:
            new, low = rounding.split(new, self._low.dtype, bits)
            _write(self._low, low, keep)
        elif bits is not None:
            new = rounding.stochastic(new, param.dtype, bits)
        _write(param, new, keep)


def _watch(row: Tensor, stored: _Stored, new: Tensor, direction: Tensor, keep: Tensor | None, *zeros: Tensor) -> None:
    """Adds to a row of `watched`, before the new weights are written."""
    old = stored.read(new.dtype).reshape(new.shape)
    sums = [(new - old).double().square().sum(), (stored.nearest(new) == old).sum(), direction.double().square().sum()]
    numbers = torch.stack([number.double() for number in (*sums, *zeros)])
    row[: len(numbers)] += numbers if keep is None else torch.where(keep, 0, numbers)


def _operands(
    stored: _Stored, grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype, maximize: bool
) -> tuple[Tensor, Tensor]:
    """Parameter and gradient as row-major matrices (or vectors) of the arithmetic's type.

    The gradient is made contiguous because torch's order of summation follows the strides."""
    G = grad.reshape(shape).to(dtype).contiguous()
    return stored.read(dtype).reshape(shape), -G if maximize else G


def _decay(W: Tensor, G: Tensor, lr: Scalar, weight_decay: Scalar, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Weight decay on the parameter (AdamW) or through the gradient (Adam). The authors' code forms the coupled
    gradient and then does not use it; here it is used."""
    return (W * (1 - lr * weight_decay), G) if decoupled else (W, G + weight_decay * W)


def _clip_divisor(U: Tensor, clip_threshold: float, mean_square: Tensor | None = None) -> Tensor:
    """max(1, rms(U) / d), 0-d, of the update clipping of Adafactor (Shazeer, Stern 2018, section 6)."""
    rms = ((U * U).mean() if mean_square is None else mean_square).sqrt()
    return (rms / clip_threshold).clamp(min=1)


def _of(decay: Scalar, i: int) -> Scalar:
    return decay[i] if isinstance(decay, Tensor) and decay.ndim == 1 else decay


def _keep(G: Tensor, nonfinite: Tensor | None, i: int) -> Tensor | None:
    """0-d bool: the parameter must keep its value; None where the caller did not ask. Nothing is read back to the
    host."""
    if nonfinite is None:
        return None
    keep = ~(G * G * G.numel()).isfinite().all()
    nonfinite[i] = keep
    return keep


def _write(old: Tensor, new: Tensor, keep: Tensor | None) -> None:
    new = new.view(old.shape).to(old.dtype)
    old.copy_(new if keep is None else torch.where(keep, old, new))
