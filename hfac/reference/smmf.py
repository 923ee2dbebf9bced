"""The ops of SMMF: of square matrices, of parts of them, and of whole moments. Park, Lee, *SMMF: Square-Matricized
Momentum Factorization for Memory-Efficient Optimization*, AAAI 2025."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..matricize import Block
from ..rounding import BitOffset
from ..schedules import Scalar
from ..signs import pack_signs, unpack_signs
from .operands import Stored, entry, must_keep, operands, watch, write


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
        b2 = entry(beta2, i)
        stored = Stored(param, i, master_lows, places, seed, step)
        W, G = operands(stored, grads[i], (n, m), r_V.dtype, maximize)
        keep = must_keep(G, nonfinite, i)
        W, G = _decay(W, G, lr, weight_decay, decoupled_weight_decay)

        M = G
        if beta1 is not None:
            assert exp_avg_rows is not None and exp_avg_cols is not None and exp_avg_signs is not None
            b1, r_M, c_M, sign = entry(beta1, i), exp_avg_rows[i], exp_avg_cols[i], exp_avg_signs[i]
            M = _smmf_first(G, b1, r_M, c_M, unpack_signs(sign, param.shape).reshape(n, m))
            r, c = nnmf(M.abs())
            for old, new in ((r_M, r), (c_M, c), (sign, pack_signs((M > 0).view(param.shape)))):
                write(old, new, keep)

        V = _smmf_second(G, b2, r_V, c_V)
        r, c = nnmf(V)
        D = M / (V.sqrt() + eps)
        W = W - lr * D
        if watched is not None:
            watch(watched[i], stored, W, D, keep)
        stored.write(W, keep)
        for old, new in ((r_V, r), (c_V, c)):
            write(old, new, keep)


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
        b2 = entry(beta2, i)
        stored = Stored(param, i, master_lows, places, seed, step)
        W, G = operands(stored, grads[i], (-1,), exp_avg_sq_rows[i].dtype, maximize)
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
                M = _smmf_first(g, entry(beta1, i), exp_avg_rows[i][rows], exp_avg_cols[i][cols], signs)
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
            watch(watched[i], stored, new, direction, None)
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
        b2 = entry(beta2, i)
        stored = Stored(param, i, master_lows, places, seed, step)
        W, G = operands(stored, grads[i], (-1,), exp_avg_sqs[i].dtype, maximize)
        keep = must_keep(G, nonfinite, i)
        W, G = _decay(W, G, lr, weight_decay, decoupled_weight_decay)

        M = G
        if beta1 is not None:
            assert exp_avgs is not None
            b1 = entry(beta1, i)
            M = b1 * exp_avgs[i].view(-1) + (1 - b1) * G
            write(exp_avgs[i], M, keep)
        V = b2 * exp_avg_sqs[i].view(-1) + (1 - b2) * (G * G)
        D = M / (V.sqrt() + eps)
        W = W - lr * D
        if watched is not None:
            watch(watched[i], stored, W, D, keep)
        stored.write(W, keep)
        write(exp_avg_sqs[i], V, keep)


def _decay(W: Tensor, G: Tensor, lr: Scalar, weight_decay: Scalar, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Weight decay on the parameter (AdamW) or through the gradient (Adam). The authors' code forms the coupled
    gradient and then does not use it; here it is used."""
    return (W * (1 - lr * weight_decay), G) if decoupled else (W, G + weight_decay * W)


def nnmf(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rank-1 factors of a non-negative [n, m] matrix, n >= m: row sums [n] and column sums [m], the latter summing
    to 1.

    (SMMF, Algorithm 4, which normalises the shorter side.) A zero matrix has zero factors.
    """
    row, col = matrix.sum(1), matrix.sum(0)
    total = col.sum()
    return row, col / torch.where(total == 0, 1, total)
