"""Metrics of a parameter's step: read off the sums of a watched step, or computed on request.

A step that was not watched costs nothing until somebody asks. After it, before gradients are cleared, its update is a
function of the gradient, the new state and the new parameter; before it, after the backward pass, of the old ones. The
exceptions are SMMF's factored first moment, whose old signs a step overwrites, so that after the step it is estimated,
and H-Fac's in 8 bits, of which a step leaves codes.

What is computed here is plain torch on pieces of whole rows, of at most `CHUNK` elements (or one row): some ten
temporaries of that size, and some of the size of the factors. A tensor that is not contiguous is copied whole (of a
stack, slice by slice). Nothing is read on the host.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import codes, matricize, rounding, schedules, signs, spec
from ..distributed import layout
from ..slicing import slices
from .slices import piece_counts, sliced
from .state import COUNTERS, LOW

Metrics = dict[str, Tensor]
#: a matrix that is computed some rows at a time: slice of rows -> [rows, columns]
Rows = Callable[[slice], Tensor]

CHUNK = 1 << 20


def watched(param: Tensor, group: Mapping[str, Any], state: Mapping[str, Tensor], sums: Tensor) -> Metrics:
    """The metrics of one parameter, of shape param.shape[:batch_dims], from the sums [..., 5] that its watched step
    added up (``watched`` of `hfac.reference`)."""
    batch = sums.shape[:-1]
    change, unmoved, direction, zero_rows, zero_cols = sums.unbind(-1)
    count = math.prod(sliced(param, group)[1])
    rms = (direction / count).sqrt()
    metrics = {"update_rms": (change / count).sqrt(), "unmoved": unmoved / count, "direction_rms": rms}
    if "clip_threshold" in group:
        metrics["clip_factor"] = torch.where(rms.isnan(), rms, _clip_factor(rms, group["clip_threshold"]))
    metrics.update(zero_rows=zero_rows, zero_cols=zero_cols)
    return {**{key: value.float() for key, value in metrics.items()}, "skipped": _skipped(param, state, batch)}


def computed(
    algorithm: str,
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
    ahead: bool,
    norm_coefficient: Tensor | None = None,
    refused: Tensor | None = None,
) -> Metrics:
    """The metrics of one parameter that has a gradient, of shape param.shape[:batch_dims];
    `FactoredOptimizer.diagnostics` describes them.

    Args:
        ahead: of the step that would be made now, not of the last one.
        norm_coefficient: what the step multiplies the gradient by, where the gradient has not been.
        refused: with nonfinite="skip-step", whether the step is skipped (`clipping.refused`).
    """
    if layout.is_sharded(param):
        raise RuntimeError(
            f"diagnostics of a sharded parameter (shape {tuple(param.shape)}) are those of watched steps alone: no "
            "rank has all of it, and to ask the others all would have to ask. Set watch=True on all ranks; under "
            "Composer, which also adds them up over ranks, set OptimizerMonitor(log_optimizer_metrics=False)."
        )
    if algorithm not in _UPDATES:
        raise RuntimeError(f"diagnostics of {algorithm} are those of watched steps alone: set watch=True.")
    grad = layout.gradient(param, f"the parameter of shape {tuple(param.shape)}")
    assert grad is not None
    param, state = layout.local(param), {key: layout.local(value) for key, value in state.items()}
    views, along = piece_counts([param], group), group["views_dim"]
    step = state["step"].to(schedules.step_dtype(state["step"].device))
    made = torch.ones_like(step, dtype=torch.bool) if ahead else step > 0
    op = spec.ALGORITHMS[algorithm].op_of(list(state))
    dims, factors = group["batch_dims"], {own.key for own in op.states if own.size in (spec.ROWS, spec.COLS)}
    pieces = {
        key: slices([value], dims + (views is not None)) if key in factors else slices([value], dims, views, along)
        for key, value in state.items()
        if key not in COUNTERS
    }
    found = []
    both = (slices([tensor], dims, views, along) for tensor in (param, grad))
    for i, (W, G) in enumerate(zip(*both, strict=True)):
        states = {key: values[i] for key, values in pieces.items()}
        view = _View(op, W, G, group, states, step + 1 if ahead else step, ahead, norm_coefficient)
        metrics = _UPDATES[algorithm](view)
        known = view.finite() & made.to(param.device) if group["nonfinite"] == "skip" else made
        known = known if refused is None else known & (refused == 0).to(known.device)
        unknown = torch.where(known, 0.0, math.nan).to(torch.float32)  # 0-d, so it may be on another device
        metrics = {key: value.float() + unknown for key, value in metrics.items()}
        metrics["zero_rows"], metrics["zero_cols"] = _zeros(G, group)
        found.append(metrics)
    batch = sliced(param, group)[0]
    stacked = {key: torch.stack([metrics[key] for metrics in found]).view(batch) for key in found[0]}
    return {**stacked, "skipped": _skipped(param, state, batch)}


def is_estimated(algorithm: str, group: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """Whether `computed` estimates the update of a step that has been made: SMMF's factors do not determine the moments
    they were made of, where these had signs, or were of gradients with the old W added."""
    signed = group.get("beta") is not None or group.get("weight_decay_mode") == "adam"
    return spec.ALGORITHMS[algorithm].op_of(list(state)) is spec.SMMF_STEP and signed


def by_name(name: str, metrics: Metrics) -> Metrics:
    """0-d metrics as "<metric>/<name>", those of a stack as "<metric>/<name>.<index of the slice>"."""
    found = {}
    for metric, values in metrics.items():
        for index, value in zip(itertools.product(*map(range, values.shape)), values.reshape(-1).unbind(), strict=True):
            found[f"{metric}/{name}" + "".join(f".{i}" for i in index)] = value
    return found


def zeros(grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """[slices, 2]: of each slice, how many rows and columns of the gradient are all zero."""
    parts = slices([grad], group["batch_dims"], piece_counts([grad], group), group["views_dim"])
    return torch.stack([torch.stack(_zeros(part, group)) for part in parts])


def _zeros(grad: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    shape = tuple(grad.shape)
    k = matricize.cut(shape, group.get("matricize", "balanced")) or 1
    m, n = math.prod(shape[:k]), math.prod(shape[k:])
    G = grad.reshape(m, n)
    row = torch.zeros((), dtype=torch.int64, device=grad.device)
    col = torch.zeros(n, dtype=torch.uint8, device=grad.device)
    for rows in _pieces(m, n):
        nonzero = G[rows].bool().view(torch.uint8)  # amax is much faster on bytes than on bools
        row += (nonzero.amax(1) == 0).sum()
        col |= nonzero.amax(0)
    return row, (col == 0).sum()


def _skipped(param: Tensor, state: Mapping[str, Tensor], batch: Sequence[int]) -> Tensor:
    skipped = state.get("skipped", torch.zeros((), dtype=torch.int32, device=param.device))
    return skipped.expand(batch).clone()


def _clip_factor(rms: Tensor, threshold: float | None) -> Tensor:
    return torch.ones_like(rms) if threshold is None else (rms / threshold).clamp(min=1)


def _pieces(m: int, n: int) -> Iterator[slice]:
    rows = max(1, CHUNK // n)
    return (slice(i, min(i + rows, m)) for i in range(0, m, rows))


@dataclass
class _View:
    """A parameter and its gradient as matrices [m, n] in the arithmetic's type, read some rows at a time.

    ``t`` is the number of the step that is described; the rest is as for `computed`.
    """

    op: spec.Op
    param: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    states: Mapping[str, Tensor]
    t: Tensor
    ahead: bool
    norm_coefficient: Tensor | None

    def __post_init__(self) -> None:
        self.factored = self.op.matrix is not None
        second = self.state(2, spec.ROWS if self.factored else spec.WHOLE)
        self.dtype, self.m = second.dtype, second.numel()
        self.n = self.state(2, spec.COLS).numel() if self.factored else 1
        self._W, self._G = (tensor.reshape(self.m, self.n) for tensor in (self.param, self.grad))
        self._low = self.states[LOW].reshape(self.m, self.n) if LOW in self.states else None
        given = (self.group[name] for name in ("lr", "weight_decay"))
        self.lr, self.weight_decay = (x.reshape(()) if isinstance(x, Tensor) else x for x in given)

    def W(self, rows: slice) -> Tensor:
        return self._W[rows].to(self.dtype) if self._low is None else rounding.join(self._W[rows], self._low[rows])

    def G(self, rows: slice) -> Tensor:
        G = self._G[rows].to(self.dtype)
        if self.norm_coefficient is not None:
            G = G * self.norm_coefficient.to(G.dtype)
        return -G if self.group["maximize"] else G

    def stored(self, W: Tensor) -> Tensor:
        """New weights as they read once stored, rounded to nearest."""
        if self._low is None:
            return W.to(self.param.dtype).to(self.dtype)
        return rounding.join(*rounding.split(W, self._low.dtype))

    def state(self, moment: int, size: str) -> Tensor:
        """What is kept of a moment, flat."""
        operand = self.op.operand(moment, size)
        assert operand is not None and operand.key is not None
        return self.states[operand.key].reshape(-1)

    def sums(self, values: Rows) -> tuple[Tensor, Tensor]:
        """Row sums [m] and column sums [n]."""
        row, col = (torch.zeros(size, dtype=self.dtype, device=self.param.device) for size in (self.m, self.n))
        for rows in _pieces(self.m, self.n):
            piece = values(rows)
            row[rows] = piece.sum(1)
            col += piece.sum(0)
        return row, col

    def rms(self, values: Rows) -> Tensor:
        total = torch.zeros((), dtype=self.dtype, device=self.param.device)
        for rows in _pieces(self.m, self.n):
            total += values(rows).square().sum()
        return (total / self.param.numel()).sqrt()

    def finite(self) -> Tensor:
        """Whether nonfinite="skip" lets the step through: its test, element by element."""
        good = torch.ones((), dtype=torch.bool, device=self.param.device)
        for rows in _pieces(self.m, self.n):
            G = self.G(rows)
            good &= (G * G * self.param.numel()).isfinite().all()
        return good

    def dense(self, moment_index: int, decay: Tensor, new: Rows) -> Rows:
        """A dense moment after the step: decay * old + (1 - decay) * new."""
        moment = self.state(moment_index, spec.WHOLE).view(self.m, 1)
        return lambda rows: decay * moment[rows] + (1 - decay) * new(rows) if self.ahead else moment[rows]

    def applied(self, direction: Rows, new: Callable[[Tensor, Tensor], Tensor], decay: Any) -> Metrics:
        """Of the step W <- W - lr (direction + decay W): the RMS of W's change, and the fraction of W that it leaves as
        it is.

        Args:
            new: (W, direction) -> the new W, as the algorithm's definition computes it.
        """
        unmoved = torch.zeros((), dtype=torch.int64, device=self.param.device)

        def change(rows: slice) -> Tensor:
            D, W = direction(rows), self.W(rows)
            unmoved.add_((self.stored(new(W, D)) == W).sum())
            if not self.ahead:  # W is the new one: take the step back
                W = (W + self.lr * D) / (1 - self.lr * decay)
            return self.lr * (D + decay * W)

        return {"update_rms": self.rms(change), "unmoved": unmoved / self.param.numel()}


def _hfac(view: _View) -> Metrics:
    group, m, n, G = view.group, view.m, view.n, view.G
    b1, b2 = (schedules.hfac_decay(view.t, beta) for beta in group["betas"])

    def square(rows: slice) -> Tensor:
        return G(rows).square() + group["eps"]

    if view.factored:
        r_old, s_old = r, s = view.state(2, spec.ROWS), view.state(2, spec.COLS)
        if view.ahead:
            row_sq, col_sq = view.sums(square)
            r, s = b2 * r + (1 - b2) * row_sq, b2 * s + (1 - b2) * col_sq
        row, col = r.sum().sqrt() * (1 / r.sqrt()), 1 / s.sqrt()

        def U(rows: slice) -> Tensor:
            return G(rows) * col * row[rows, None]

        if view.op is spec.HFAC_INT8_STEP:
            q = view.state(1, spec.WHOLE).view(m, n)
            rho, sigma = codes.unit_change(r_old, r, r_old.sum(), r.sum()), s_old.sqrt() / s.sqrt()

            def D(rows: slice) -> Tensor:
                X = codes.decode(q[rows], view.dtype)
                if view.ahead:
                    X = (b1 * rho[rows])[:, None] * sigma * X + (1 - b1) * U(rows)
                return (b1 * X + (1 - b1) * U(rows)) * (1 / factor)

        else:
            u, v = view.state(1, spec.ROWS), view.state(1, spec.COLS)
            row_mean, col_mean = view.sums(G)
            row_mean, col_mean = row_mean / n, col_mean / m
            if view.ahead:
                u, v = b1 * u + (1 - b1) * row_mean, b1 * v + (1 - b1) * col_mean
            phi, psi = b1 * (u - row_mean) / (r / n).sqrt(), b1 * (v - col_mean) / (s / m).sqrt()

            def D(rows: slice) -> Tensor:
                return (phi[rows, None] + psi) / 2 + U(rows) / factor

    else:
        M, V = view.dense(1, b1, G), view.dense(2, b2, square)

        def U(rows: slice) -> Tensor:
            return G(rows) / V(rows).sqrt()

        def D(rows: slice) -> Tensor:
            return (b1 * M(rows) + (1 - b1) * G(rows)) / V(rows).sqrt() * (1 / factor)

    rms = view.rms(U)
    factor = _clip_factor(rms, group["clip_threshold"])
    lr, decay = view.lr, view.weight_decay
    update = view.applied(D, lambda W, D: W - lr * (D + decay * W), decay)
    return {**update, "direction_rms": rms, "clip_factor": factor}


def _smmf(view: _View) -> Metrics:
    group, t = view.group, view.t
    coupled = group["weight_decay_mode"] == "adam"
    b2 = schedules.smmf_decay_second(t, group["decay_rate"])
    b1 = None if group["beta"] is None else schedules.smmf_decay_first(t, group["beta"], group["growth_rate"])

    def G(rows: slice) -> Tensor:
        return view.G(rows) + view.weight_decay * view.W(rows) if coupled else view.G(rows)  # after a step, its new W

    def square(rows: slice) -> Tensor:
        return G(rows).square()

    M: Rows = G
    if not view.factored:
        V = view.dense(2, b2, square)
        M = G if b1 is None else view.dense(1, b1, G)
    else:
        row, col = _old_factors(view, 2, b2, square)
        V = _rank_one(row, col, b2, square)
        if b1 is not None:
            signed = _signs(view)
            old_row, old_col = _old_factors(view, 1, b1, lambda rows: signed(rows, G(rows)))
            if not view.ahead:  # where the second moment has no old part, an estimate would be divided by almost zero
                old_row, old_col = torch.where(row > 0, old_row, 0), torch.where(col > 0, old_col, 0)
            M = _rank_one(old_row, old_col, b1, G, signed)

    def D(rows: slice) -> Tensor:
        return M(rows) / (V(rows).sqrt() + group["eps"])

    lr, decay = view.lr, 0.0 if coupled else view.weight_decay
    update = view.applied(D, lambda W, D: W * (1 - lr * decay) - lr * D, decay)
    return {**update, "direction_rms": view.rms(D)}


_UPDATES: dict[str, Callable[[_View], Metrics]] = {"hfac": _hfac, "smmf": _smmf}
#: slice of rows and their values -> the values, each negated where the moment's sign is
_Signed = Callable[[slice, Tensor], Tensor]


def _rank_one(row: Tensor, col: Tensor, decay: Tensor, new: Rows, signed: _Signed = lambda rows, value: value) -> Rows:
    """A moment before it is compressed: the old part, of these factors, and (1 - decay) * new."""
    return lambda rows: signed(rows, row[rows, None] * col) + (1 - decay) * new(rows)


def _old_factors(view: _View, moment: int, decay: Tensor, new: Rows) -> tuple[Tensor, Tensor]:
    """Factors [m] and [n] of decay * old in a moment decay * old + (1 - decay) * new.

    After the step only the result's factors remain, which keep its row and column sums. Subtracting the new part's sums
    leaves those of the old part, which had rank 1: exact for the second moment. The first moment's sums are of absolute
    values, so ``new`` must come multiplied by the moment's signs; the old part then has rank 1 as far as no sign has
    changed. What is left within rounding error of zero counts as zero.
    """
    row, col = view.state(moment, spec.ROWS), view.state(moment, spec.COLS)
    if view.ahead:
        return decay * row, col
    row_sum, col_sum = view.sums(new)
    col = col * row.sum()
    least = 64 * torch.finfo(view.dtype).eps
    left_row, left_col = row - (1 - decay) * row_sum, col - (1 - decay) * col_sum
    left_row = torch.where(left_row > least * row, left_row, 0)
    left_col = torch.where(left_col > least * col, left_col, 0)
    total = left_row.sum()
    return left_row / torch.where(total == 0, 1, total), left_col


def _signs(view: _View) -> _Signed:
    """Reads SMMF's signs by rows of its matrix; bits are packed by slices of the parameter's first dimension."""
    inner, n = view.param[0].numel(), view.n
    kept = view.state(1, spec.SIGNS)
    if kept.dtype == signs.BYTES:
        positive = kept.view(-1, n)
        return lambda rows, value: torch.where(positive[rows], value, -value)
    packed = kept.view(len(view.param), -1)

    def signed(rows: slice, value: Tensor) -> Tensor:
        index = torch.arange(rows.start * n, rows.stop * n, device=packed.device)
        index, inside = index // inner, index % inner
        bits = packed[index, inside // 8] >> (inside % 8).to(torch.uint8)
        return torch.where((bits & 1).bool().view(-1, n), value, -value)

    return signed
