"""The ops of H-Fac: of matrices whose moments are factors, of those whose first moment is 8 bits, of parts of both, and
of whole moments. Nguyen, Chen, Liu, Liu, *Memory-Efficient Optimization with Factorized Hamiltonian Descent*, AISTATS
2025."""

from collections.abc import Sequence

from torch import Tensor

from .. import codes
from ..rounding import BitOffset
from ..schedules import Scalar
from .operands import Stored, entry, must_keep, operands, watch, write


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
        b1, b2 = entry(beta1, i), entry(beta2, i)
        stored = Stored(param, i, master_lows, places, seed, step)
        W, G = operands(stored, grads[i], (m, n), r_row.dtype, maximize)

        row_mean, col_mean = G.mean(1), G.mean(0)
        sq = G * G + eps
        u = b1 * u_row.view(m) + (1 - b1) * row_mean
        v = b1 * v_col.view(n) + (1 - b1) * col_mean
        r = b2 * r_row.view(m) + (1 - b2) * sq.sum(1)
        s = b2 * s_col.view(n) + (1 - b2) * sq.sum(0)

        U, D = _hfac_direction(G, (u, v, r, s), (row_mean, col_mean), (m, n), r.sum(), b1, clip_threshold)
        W = W - lr * (D + weight_decay * W)

        keep = must_keep(G, nonfinite, i)
        if watched is not None:
            zero = G == 0
            watch(watched[i], stored, W, U, keep, zero.all(1).sum(), zero.all(0).sum())
        stored.write(W, keep)
        for old, new in ((u_row, u), (v_col, v), (r_row, r), (s_col, s)):
            write(old, new, keep)


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
        b1, b2 = entry(beta1, i), entry(beta2, i)
        stored = Stored(param, i, master_lows, places, seed, step)
        W, G = operands(stored, grads[i], (m, n), r_row.dtype, maximize)

        sq = G * G + eps
        r_old, s_old = r_row.view(m), s_col.view(n)
        r = b2 * r_old + (1 - b2) * sq.sum(1)
        s = b2 * s_old + (1 - b2) * sq.sum(0)
        squares, totals = (r_old, s_old, r, s), (r_old.sum(), r.sum())
        U, D, new_q = _hfac_whole_direction(G, q.view(m, n), squares, totals, b1, clip_threshold)
        W = W - lr * (D + weight_decay * W)

        keep = must_keep(G, nonfinite, i)
        if watched is not None:
            zero = G == 0
            watch(watched[i], stored, W, U, keep, zero.all(1).sum(), zero.all(0).sum())
        stored.write(W, keep)
        for old, new in ((q, new_q), (r_row, r), (s_col, s)):
            write(old, new, keep)


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
        b2 = entry(beta2, i)
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
        b1 = entry(beta1, i)
        row_mean, col_mean = row_sums[i] / cols[i], col_sums[i] / rows[i]
        if maximize:
            row_mean, col_mean = -row_mean, -col_mean
        u = b1 * u_row.view(-1) + (1 - b1) * row_mean
        v = b1 * v_col.view(-1) + (1 - b1) * col_mean
        if param.numel():
            stored = Stored(param, i, master_lows, places, seed, step)
            W, G = operands(stored, grads[i], (u.numel(), v.numel()), r.dtype, maximize)
            whole, means, mean_square = (rows[i], cols[i]), (row_mean, col_mean), mean_squares[i]
            U, D = _hfac_direction(G, (u, v, r, s), means, whole, totals[i], b1, clip_threshold, mean_square)
            W = W - lr * (D + weight_decay * W)
            if watched is not None:
                watch(watched[i], stored, W, U, None)
            stored.write(W, None)
        for old, new in ((u_row, u), (v_col, v), (exp_avg_sq_rows[i], r), (exp_avg_sq_cols[i], s)):
            write(old, new, None)


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
            stored = Stored(param, i, master_lows, places, seed, step)
            W, G = operands(stored, grads[i], (m, n), r.dtype, maximize)
            squares, sums = (r_row.view(m), s_col.view(n), r, s), (old_totals[i].to(r.dtype), totals[i].to(r.dtype))
            of = q.reshape(m, n)
            U, D, new_q = _hfac_whole_direction(
                G, of, squares, sums, entry(beta1, i), clip_threshold, mean_squares[i].to(r.dtype)
            )
            W = W - lr * (D + weight_decay * W)
            if watched is not None:
                watch(watched[i], stored, W, U, None)
            stored.write(W, None)
            write(q, new_q, None)
        for old, new in ((r_row, r), (s_col, s)):
            write(old, new, None)


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
        b1, b2 = entry(beta1, i), entry(beta2, i)
        stored = Stored(param, i, master_lows, places, seed, step)
        W, G = operands(stored, grads[i], (-1,), exp_avg_sqs[i].dtype, maximize)

        m = b1 * exp_avgs[i].view(-1) + (1 - b1) * G
        q = _hfac_dense_square(exp_avg_sqs[i], G, b2, eps)
        U = G / q.sqrt()
        D = (b1 * m + (1 - b1) * G) / q.sqrt()
        if clip_threshold is not None:
            D = D * (1 / _clip_divisor(U, clip_threshold, None if mean_squares is None else mean_squares[i]))
        W = W - lr * (D + weight_decay * W)

        keep = must_keep(G, nonfinite, i)
        if watched is not None:
            watch(watched[i], stored, W, U, keep)
        stored.write(W, keep)
        for old, new in ((exp_avgs[i], m), (exp_avg_sqs[i], q)):
            write(old, new, keep)


def hfac_dense_squares(grad: Tensor, exp_avg_sq: Tensor, *, beta2: Scalar, eps: float) -> Tensor:
    """U^2 of every element of the step that `hfac_dense_step_` would make with this gradient, 1-d."""
    G = grad.reshape(-1).to(exp_avg_sq.dtype)
    return G * G / _hfac_dense_square(exp_avg_sq, G, beta2, eps)


def _hfac_dense_square(old: Tensor, G: Tensor, b2: Scalar, eps: float) -> Tensor:
    return b2 * old.view(-1) + (1 - b2) * (G * G + eps)


def _clip_divisor(U: Tensor, clip_threshold: float, mean_square: Tensor | None = None) -> Tensor:
    """max(1, rms(U) / d), 0-d, of the update clipping of Adafactor (Shazeer, Stern 2018, section 6)."""
    rms = ((U * U).mean() if mean_square is None else mean_square).sqrt()
    return (rms / clip_threshold).clamp(min=1)
