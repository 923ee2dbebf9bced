"""What a backend is given to bind, and what it finds in its first read of the gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..rounding import BitOffset
from ..spec import MASTER_LOW, Op

#: A snapshot of gradients, and gradients of the same types, shapes and strides that lie elsewhere.
Moved = tuple[Any, Sequence[Tensor]]


@dataclass(frozen=True)
class Operands:
    """An op and its tensors, checked, which stay where they are for as long as it is bound to them.

    Attributes:
        params: the parameters; of an op that updates none, the gradients that will be read, for their sizes and types.
        lists: the op's lists by name, without those that it goes without, and ``master_lows`` where there are any.
        counts: the op's ``counts`` by name.
        places: where random bits come from, or None where nothing is drawn.
    """

    op: Op
    params: Sequence[Tensor]
    lists: Mapping[str, Sequence[Tensor]]
    counts: Mapping[str, Sequence[Any]]
    places: Sequence[BitOffset] | None = None

    @property
    def lows(self) -> Sequence[Tensor] | None:
        """The lower pieces of master weights; None where there are none."""
        return self.lists.get(MASTER_LOW.name)

    @property
    def written(self) -> Sequence[Tensor]:
        return self.params if self.op.updates else ()


@dataclass(frozen=True)
class Statistics:
    """Sums over gradients, taken before the norm of all gradients is known, with which a step goes on from there. They
    own their memory: threads that step the same parameters have statistics of their own.

    Attributes:
        squares: float64 [len(params)], the sum of squares of every gradient as the step sees it.
        memory: the backend's own: where sums of rows and columns are.
    """

    squares: Tensor
    memory: Any
