"""Codes of 8 bits for H-Fac's first moment in units of the second moment's root, X = M / sqrt(V): the definition.

X is of order one everywhere, so that no scales are needed; codes are dense near zero and go to 126.75.
"""

import torch
from torch import Tensor


def unit_change(r_old: Tensor, r: Tensor, total_old: Tensor, total: Tensor) -> Tensor:
    """rho [m]: what the rows' share of sqrt(V) was, divided by what it is; 0 before the first step, when there was
    none. In an order that stays finite."""
    rho = (r_old.sqrt() / r.sqrt()) * (total.sqrt() / total_old.sqrt())
    return torch.where(total_old == 0, 0, rho)


def decode(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What int8 codes stand for: sgn(q) y^2 / (1 - y^2) with y = |q| / 127.5, here multiplied by 127.5^2 above and
    below, which are then exact and rounded once."""
    q = q.to(dtype)
    return q * q.abs() / (127.5**2 - q * q)


def encode(X: Tensor, old: Tensor | None = None, X_old: Tensor | None = None) -> Tensor:
    """int8 codes of X: sgn(X) times 127.5 sqrt(|X| / (1 + |X|)), rounded to the nearest, ties to even, at most 127; 0
    for NaN.

    With the ``old`` codes and what they stand for, a code that would stay the same although |X| has become smaller goes
    one towards zero: rounding to the nearest would keep small codes for ever where no gradient comes.
    """
    magnitude = X.abs()
    q = (127.5 * (magnitude / (1 + magnitude)).sqrt()).round().clamp(max=127) * X.sgn()
    q = q.nan_to_num(0.0).to(torch.int8)
    if old is not None and X_old is not None:
        q -= torch.where((q == old) & (magnitude < X_old.abs()), old.sgn(), 0)
    return q
