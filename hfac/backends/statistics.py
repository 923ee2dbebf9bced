"""What a backend finds in its first read of the gradients."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Sums over gradients, taken before the norm of all gradients is known, with which a step goes on from there. They
    own their memory: threads that step the same parameters have statistics of their own.

    Attributes:
        squares: float64 [len(params)], the sum of squares of every gradient as the step sees it.
        memory: the backend's own: sums of rows and columns.
    """

    squares: Tensor
    memory: Any
