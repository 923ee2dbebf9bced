"""The bytes a step has to move at the least, counted from the tensors themselves.

Every implementation of an algorithm must read the gradient, read and write the parameter, and read and write the
state: a plain SGD stream plus the state, 28 bytes per parameter for AdamW in float32, 12.25 for SMMF on a large matrix
(12 + one sign bit read and written + the factors). What an implementation moves beyond that (temporaries, partial sums)
is not counted, so the rate it reaches is a useful rate.

Where statistics of the whole gradient enter the update of every element (H-Fac, Adafactor), the gradient is needed
twice. The second read costs memory traffic only where the gradient has left the caches by then: such a count has a
lower and an upper end.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step over a whole list.

    Attributes:
        least: with the gradient's second read, if there is one, from a cache.
        most: with that read from memory.
    """

    least: int
    most: int


def compulsory(params: Iterable[Tensor], grads: Iterable[Tensor], states: Iterable[Tensor], reread: int = 0) -> Traffic:
    """The traffic of one step. ``states`` are all tensors that it reads and writes; ``reread`` is the size in bytes of
    the gradients that are needed twice."""
    least = sum(map(size, grads)) + 2 * sum(map(size, params)) + 2 * sum(map(size, states))
    return Traffic(least, least + reread)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors themselves, and in the place of a wrapper subclass (torchao's 8-bit states) those that it holds."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from plain(getattr(tensor, name) for name in names)
        else:
            yield tensor
