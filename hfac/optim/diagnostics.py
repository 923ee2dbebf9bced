"""What a step does to a parameter: `told` by a step that was watched, or else measured when it is asked for and at no
other time, so that the step pays nothing.

After a step, before gradients are cleared, the update just made is a function of the gradient, the new state and the
new parameter. Not quite for SMMF's factored first moment, whose compression keeps no trace of the elements' old signs:
there it is estimated. Ahead of a step, after the backward pass, the update is a function of what is there for both.

Everything is plain torch on pieces of whole rows, of at most `CHUNK` elements (or one row): a dozen temporaries of that
size, and some of the size of the factors; a tensor that is not contiguous is copied as a whole (of a stack: each slice
in its turn). Nothing is read on the host.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import matricize, rounding, schedules
from ..distributed import layout

Metrics = dict[str, Tensor]
#: of some rows: what they are, as a slice -> [rows, columns]
Piece = Callable[[slice], Tensor]

CHUNK = 1 << 20
#: one number for the parameter, also where it is a stack
_COUNTERS = ("step", "skipped")


def told(
    algorithm: str, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Tensor], numbers: Tensor
) -> Metrics:
    """The metrics of one parameter, of shape param.shape[:batch_dims], from what a watched step told of it: [..., 5]
    (`hfac.reference`)."""
    batch = numbers.shape[:-1]
    change, unmoved, direction, zero_rows, zero_cols = numbers.unbind(-1)
    count = param.shape[len(batch) :].numel()
    rms = (direction / count).sqrt()
    found = {"update_rms": (change / count).sqrt(), "unmoved": unmoved / count, "direction_rms": rms}
    if algorithm == "hfac":
        threshold = group["clip_threshold"]
        factor = torch.ones_like(rms) if threshold is None else (rms / threshold).clamp(min=1)
        found["clip_factor"] = torch.where(rms.isnan(), rms, factor)
    found.update(zero_rows=zero_rows, zero_cols=zero_cols)
    return {**{key: value.float() for key, value in found.items()}, "skipped": _skipped(param, state, batch)}


def _skipped(param: Tensor, state: Mapping[str, Tensor], batch: torch.Size) -> Tensor:
    skipped = state.get("skipped", torch.zeros((), dtype=torch.int32, device=param.device))
    return skipped.expand(batch).clone()


def measure(
    algorithm: str,
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
    ahead: bool,
    times: Tensor | None = None,
) -> Metrics:
    """The metrics of one parameter that has a gradient, of shape param.shape[:batch_dims];
    `FactoredOptimizer.diagnostics` describes them. ``times``: what the gradient has yet to be multiplied by."""
    if layout.is_sharded(param):
        raise RuntimeError(
            f"diagnostics of a sharded parameter (shape {tuple(param.shape)}) are not supported: no rank has all of it."
            " Ask in a run on one process; under Composer set OptimizerMonitor(log_optimizer_metrics=False)."
        )
    grad = layout.gradient(param, f"the parameter of shape {tuple(param.shape)}")
    assert grad is not None
    param, state = layout.local(param), {key: layout.local(value) for key, value in state.items()}
    batch = param.shape[: group["batch_dims"]]
    parts = [slices(tensor, len(batch)) for tensor in (param, grad)]
    states = {key: slices(value, len(batch)) for key, value in state.items() if key not in _COUNTERS}
    measured = [
        _of_slice(
            algorithm, W, G, group, {key: values[i] for key, values in states.items()}, state["step"], ahead, times
        )
        for i, (W, G) in enumerate(zip(*parts, strict=True))
    ]
    metrics = {key: torch.stack([one[key] for one in measured]).view(batch) for key in measured[0]}
    return {**metrics, "skipped": _skipped(param, state, batch)}


def by_name(name: str, metrics: Metrics) -> Metrics:
    """0-d metrics as "<metric>/<name>", those of a stack as "<metric>/<name>.<index of the slice>"."""
    found = {}
    for metric, values in metrics.items():
        for index, value in zip(itertools.product(*map(range, values.shape)), values.reshape(-1).unbind(), strict=True):
            found[f"{metric}/{name}" + "".join(f".{i}" for i in index)] = value
    return found


def slices(tensor: Tensor, batch_dims: int) -> list[Tensor]:
    """Views of the slices that the first dimensions count, row-major."""
    found = [tensor]
    for _ in range(batch_dims):
        found = [part for each in found for part in each.unbind()]
    return found


def _of_slice(
    algorithm: str,
    param: Tensor,
    grad: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
    step: Tensor,
    ahead: bool,
    times: Tensor | None,
) -> Metrics:
    """All but what is counted, 0-d; without batch dimensions the parameter is the only slice."""
    step = step.to(schedules.step_dtype(step.device))
    made = torch.ones_like(step, dtype=torch.bool) if ahead else step > 0
    view = _View(param, grad, group, state, step + 1 if ahead else step, ahead, times)
    update = (_hfac if algorithm == "hfac" else _smmf)(view)
    if group["nonfinite"] == "skip":
        made = view.finite() & made.to(param.device)
    unknown = torch.where(made, 0.0, math.nan)  # 0-d, so it may be on another device than what it is added to
    metrics = {key: value.float() + unknown.to(torch.float32) for key, value in update.items()}
    metrics["zero_rows"], metrics["zero_cols"] = _zeros(grad, group)
    return metrics


class _View:
    """A parameter and its gradient as matrices, to be read some rows at a time in the arithmetic's type."""

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Tensor],
        t: Tensor,
        ahead: bool,
        times: Tensor | None,
    ) -> None:
        self.param, self.group, self.state, self.t, self.ahead, self._times = param, group, state, t, ahead, times
        self.factored = "exp_avg_sq_row" in state
        second = state["exp_avg_sq_row" if self.factored else "exp_avg_sq"]
        self.dtype = second.dtype
        self.m = second.numel()
        self.n = state["exp_avg_sq_col"].numel() if self.factored else 1
        self._W, self._G = param.reshape(self.m, self.n), grad.reshape(self.m, self.n)
        self._low = state["master_low"].reshape(self.m, self.n) if "master_low" in state else None
        self.lr, self.weight_decay = (_scalar(group[name]) for name in ("lr", "weight_decay"))

    def pieces(self) -> Iterator[slice]:
        rows = max(1, CHUNK // self.n)
        return (slice(i, min(i + rows, self.m)) for i in range(0, self.m, rows))

    def W(self, rows: slice) -> Tensor:
        return self._W[rows].to(self.dtype) if self._low is None else rounding.join(self._W[rows], self._low[rows])

    def G(self, rows: slice) -> Tensor:
        G = self._G[rows].to(self.dtype)
        if self._times is not None:
            G = G * self._times.to(G.dtype)
        return -G if self.group["maximize"] else G

    def stored(self, W: Tensor) -> Tensor:
        """What is left of new weights once they are stored, rounded to nearest."""
        if self._low is None:
            return W.to(self.param.dtype).to(self.dtype)
        return rounding.join(*rounding.split(W, self._low.dtype))

    def states(self, *names: str) -> list[Tensor]:
        """The states as vectors."""
        return [self.state[name].reshape(-1) for name in names]

    def sums(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Row sums [m] and column sums [n]."""
        row = self.state_like(self.m)
        col = self.state_like(self.n)
        for rows in self.pieces():
            values = piece(rows)
            row[rows] = values.sum(1)
            col += values.sum(0)
        return row, col

    def state_like(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.param.device)

    def rms(self, piece: Piece) -> Tensor:
        total = torch.zeros((), dtype=self.dtype, device=self.param.device)
        for rows in self.pieces():
            total += piece(rows).square().sum()
        return (total / self.param.numel()).sqrt()

    def finite(self) -> Tensor:
        """Whether a step with nonfinite="skip" is made: its test, of elements."""
        good = torch.ones((), dtype=torch.bool, device=self.param.device)
        for rows in self.pieces():
            G = self.G(rows)
            good &= (G * G * self.param.numel()).isfinite().all()
        return good

    def applied(self, direction: Piece, new: Callable[[Tensor, Tensor], Tensor], decay: Any) -> Metrics:
        """Of the step W <- W - lr (direction + decay W): the RMS of W's change, and how much of W stays where it is.

        Args:
            new: W and direction -> the new W, as the algorithm's definition forms it.
        """
        unmoved = torch.zeros((), dtype=torch.int64, device=self.param.device)

        def change(rows: slice) -> Tensor:
            D, W = direction(rows), self.W(rows)
            unmoved.add_((self.stored(new(W, D)) == W).sum())
            if not self.ahead:  # W is what the step made of the old one
                W = (W + self.lr * D) / (1 - self.lr * decay)
            return self.lr * (D + decay * W)

        return {"update_rms": self.rms(change), "unmoved": unmoved / self.param.numel()}


def _hfac(view: _View) -> Metrics:
    group, m, n = view.group, view.m, view.n
    b1, b2 = (schedules.hfac_decay(view.t, beta) for beta in group["betas"])

    if view.factored:
        u, v, r, s = view.states("exp_avg_row", "exp_avg_col", "exp_avg_sq_row", "exp_avg_sq_col")
        row_mean, col_mean = view.sums(view.G)
        row_mean, col_mean = row_mean / n, col_mean / m
        if view.ahead:
            row_sq, col_sq = view.sums(lambda rows: view.G(rows).square() + group["eps"])
            u, v = b1 * u + (1 - b1) * row_mean, b1 * v + (1 - b1) * col_mean
            r, s = b2 * r + (1 - b2) * row_sq, b2 * s + (1 - b2) * col_sq
        phi, psi = b1 * (u - row_mean) / (r / n).sqrt(), b1 * (v - col_mean) / (s / m).sqrt()
        row, col = r.sum().sqrt() * (1 / r.sqrt()), 1 / s.sqrt()

        def U(rows: slice) -> Tensor:
            return view.G(rows) * col * row[rows, None]

        def D(rows: slice, clip: Tensor) -> Tensor:
            return (phi[rows, None] + psi) / 2 + U(rows) / clip

    else:
        avg, avg_sq = (state.reshape(m, 1) for state in view.states("exp_avg", "exp_avg_sq"))

        def root(rows: slice) -> Tensor:
            q = avg_sq[rows]
            return (b2 * q + (1 - b2) * (view.G(rows).square() + group["eps"]) if view.ahead else q).sqrt()

        def U(rows: slice) -> Tensor:
            return view.G(rows) / root(rows)

        def D(rows: slice, clip: Tensor) -> Tensor:
            G, M = view.G(rows), avg[rows]
            M = b1 * M + (1 - b1) * G if view.ahead else M
            return (b1 * M + (1 - b1) * G) / root(rows) * (1 / clip)

    rms, threshold = view.rms(U), group["clip_threshold"]
    factor = torch.ones_like(rms) if threshold is None else (rms / threshold).clamp(min=1)
    lr, decay = view.lr, view.weight_decay
    update = view.applied(lambda rows: D(rows, factor), lambda W, D: W - lr * (D + decay * W), decay)
    return {**update, "direction_rms": rms, "clip_factor": factor}


def _smmf(view: _View) -> Metrics:
    group, t = view.group, view.t
    coupled = group["weight_decay_mode"] == "adam"
    b2 = schedules.smmf_decay_second(t, group["decay_rate"])
    b1 = None if group["beta"] is None else schedules.smmf_decay_first(t, group["beta"], group["growth_rate"])

    def G(rows: slice) -> Tensor:
        G = view.G(rows)  # after a coupled step the new W stands for the old one
        return G + view.weight_decay * view.W(rows) if coupled else G

    def square(rows: slice) -> Tensor:
        return G(rows).square()

    signs = _Signs(view) if view.factored and b1 is not None else None
    if not view.factored:
        V = _whole(view, "exp_avg_sq", b2, square)
        M = G if b1 is None else _whole(view, "exp_avg", b1, G)
    else:
        row, col = _old_part(view, "exp_avg_sq", b2, square, None)
        V = _rank_one(row, col, b2, square, None)
        M = G
        if b1 is not None:
            old_row, old_col = _old_part(view, "exp_avg", b1, G, signs)
            if not view.ahead:  # where the second moment's is nothing, an estimate would be divided by it
                old_row, old_col = torch.where(row > 0, old_row, 0), torch.where(col > 0, old_col, 0)
            M = _rank_one(old_row, old_col, b1, G, signs)

    def D(rows: slice) -> Tensor:
        return M(rows) / (V(rows).sqrt() + group["eps"])

    lr, decay = view.lr, 0.0 if coupled else view.weight_decay
    update = view.applied(D, lambda W, D: W * (1 - lr * decay) - lr * D, decay)
    return {**update, "direction_rms": view.rms(D)}


def _whole(view: _View, key: str, decay: Tensor, new: Piece) -> Piece:
    """A moment that is kept whole, as the step forms it: decay * old + (1 - decay) * new."""
    (moment,) = (state.reshape(view.m, 1) for state in view.states(key))
    return lambda rows: decay * moment[rows] + (1 - decay) * new(rows) if view.ahead else moment[rows]


def _rank_one(row: Tensor, col: Tensor, decay: Tensor, new: Piece, signs: "_Signs | None") -> Piece:
    """A moment as the step forms it before it is compressed; ``row`` and ``col`` are factors of its old part."""
    return lambda rows: _signed(row[rows, None] * col, signs, rows) + (1 - decay) * new(rows)


def _old_part(view: _View, key: str, decay: Tensor, new: Piece, signs: "_Signs | None") -> tuple[Tensor, Tensor]:
    """Factors [m] and [n] of decay * old in a moment decay * old + (1 - decay) * new.

    After the step only the factors of the result are there, which keep its row and column sums. Taking the new part's
    off leaves those of the old part, which was of rank 1: exact for the second moment. Of the first, sums are known
    after each element has been multiplied by its sign, and the old part then is of rank 1 as far as the old sign was
    the new one. What is left within rounding of nothing is taken for nothing.
    """
    row, col = view.states(f"{key}_row", f"{key}_col")
    if view.ahead:
        return decay * row, col
    row_sum, col_sum = view.sums(lambda rows: _signed(new(rows), signs, rows))
    col = col * row.sum()
    least = 64 * torch.finfo(view.dtype).eps
    left_row, left_col = row - (1 - decay) * row_sum, col - (1 - decay) * col_sum
    left_row = torch.where(left_row > least * row, left_row, 0)
    left_col = torch.where(left_col > least * col, left_col, 0)
    total = left_row.sum()
    return left_row / torch.where(total == 0, 1, total), left_col


def _signed(value: Tensor, signs: "_Signs | None", rows: slice) -> Tensor:
    return value if signs is None else torch.where(signs(rows), value, -value)


class _Signs:
    """Rows of SMMF's square matrix of sign bits, which are packed by slices of the parameter's first dimension."""

    def __init__(self, view: _View) -> None:
        self._bytes = view.state["exp_avg_sign"]
        self._inner, self._n = view.param[0].numel(), view.n

    def __call__(self, rows: slice) -> Tensor:
        index = torch.arange(rows.start * self._n, rows.stop * self._n, device=self._bytes.device)
        index, inside = index // self._inner, index % self._inner
        found = self._bytes[index, inside // 8] >> (inside % 8).to(torch.uint8)
        return (found & 1).bool().view(-1, self._n)


def zeros(grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """[slices, 2]: of each slice how many rows and columns of the gradient hold nothing but zeros."""
    return torch.stack([torch.stack(_zeros(part, group)) for part in slices(grad, group["batch_dims"])])


def _zeros(grad: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """How many rows and columns of the gradient hold nothing but zeros."""
    shape = tuple(grad.shape)
    k = matricize.cut(shape, group.get("matricize", "balanced")) or 1
    m, n = math.prod(shape[:k]), math.prod(shape[k:])
    G = grad.reshape(m, n)
    row = torch.zeros((), dtype=torch.int64, device=grad.device)
    col = torch.zeros(n, dtype=torch.uint8, device=grad.device)
    rows = max(1, CHUNK // n)
    for i in range(0, m, rows):
        found = G[i : i + rows].bool().view(torch.uint8)  # whose largest is found much faster than any of bools
        row += (found.amax(1) == 0).sum()
        col |= found.amax(0)
    return row, (col == 0).sum()


def _scalar(value: Any) -> Any:
    return value.reshape(()) if isinstance(value, Tensor) else value
