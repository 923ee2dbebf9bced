"""Stochastic rounding and split master weights, in plain torch: the definition that every backend implements.

Stochastic rounding needs 16 random bits per element. They come from a counter-based generator, Philox 4x32-10 (Salmon,
Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011), whose counter and key are the seed, the
step, the parameter's position in the optimizer and the element's index in the whole parameter. So there is no state,
and the bits are the same on any rank, in any tiling, on any backend and after a resume.

A float32 master weight is stored as a bfloat16, which is the parameter, and the bits that this lacks: 16 (int16) give
the whole float32, 8 (int8) a float of 24 bits. The parameter is the master weight rounded to nearest, ties away from
zero (with ties to even, as torch rounds, a tie could have come from either side). The lower piece is the signed
remainder.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .schedules import Scalar

#: Types of the lower piece, by the option ``master``.
LOW_DTYPES = {"split": torch.int16, "split8": torch.int8}
#: Types that support stochastic rounding.
DTYPES = (torch.bfloat16, torch.float16)

_MASK = 0xFFFFFFFF
#: Multipliers of a round, and increments of the key, from the paper.
_PHILOX = ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))
_ROUNDS = 10


class BitOffset(NamedTuple):
    """Where the random bits of a tensor's elements come from: the tensor is all of a parameter, a shard or a slice.

    Element (i, j, ...) of the tensor is element ``first + i * strides[0] + j * strides[1] + ...`` of the parameter at
    ``position``, an unsigned 32-bit number; without strides, its elements follow each other in row-major order from
    ``first`` on.
    """

    position: int
    first: int = 0
    strides: tuple[int, ...] | None = None

    def indices(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """int64 of ``shape``: every element's index in the whole parameter."""
        if self.strides is None:
            count = torch.Size(shape).numel()
            return torch.arange(self.first, self.first + count, device=device).view(tuple(shape))
        index = torch.full(tuple(shape), self.first, dtype=torch.int64, device=device)
        for d, (size, stride) in enumerate(zip(shape, self.strides, strict=True)):
            along = torch.arange(size, device=device) * stride
            index += along.view(-1, *[1] * (len(shape) - d - 1))
        return index

    def cut(self, shape: Sequence[int], to: int, d: int, count: int) -> "BitOffset":
        """Of a tensor of ``shape`` whose dimension ``d`` is cut into so many pieces, which a new dimension ``to`` at or
        before it counts."""
        if to == d and self.strides is None:
            return self
        strides = list(self.strides or (torch.Size(shape[k + 1 :]).numel() for k in range(len(shape))))
        strides.insert(to, shape[d] // max(count, 1) * strides[d])
        return self._replace(strides=tuple(strides))

    def slices(self, shape: Sequence[int], dims: int) -> "list[BitOffset]":
        """Those of the slices that the first ``dims`` dimensions of a tensor of ``shape`` index, row-major."""
        if not dims:
            return [self]
        strides = self.strides or [torch.Size(shape[d + 1 :]).numel() for d in range(dims)]
        rest = self.strides and self.strides[dims:]
        firsts = [self.first]
        for size, stride in zip(shape[:dims], strides, strict=False):
            firsts = [first + i * stride for first in firsts for i in range(size)]
        return [BitOffset(self.position, first, rest) for first in firsts]


#: The name that 0.1 gave it, which callers of `hfac.functional` may use.
Place = BitOffset


def philox(counter: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """Four random words for four words of a counter and two of a key; unsigned 32-bit numbers in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    (m0, m1), (w0, w1) = _PHILOX
    for _ in range(_ROUNDS):
        # The products wrap around in int64; all 64 bits are right.
        a, b = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = k0 + w0 & _MASK, k1 + w1 & _MASK
    return [c0, c1, c2, c3]


def random_bits(offset: BitOffset, shape: Sequence[int], seed: int, step: Scalar, device: torch.device) -> Tensor:
    """int64 of ``shape`` in [0, 2^16): each element's random bits.

    Eight elements share one call: index g takes the half g % 2 (1: upper) of word g % 8 // 2 of the counter
    (g // 8, low and high word; step; position) under the key (seed, low and high word).
    """
    index = offset.indices(shape, device)
    block = index >> 3
    t = step.to(device=device, dtype=torch.int64) if isinstance(step, Tensor) else int(step)
    zero = torch.zeros_like(block)
    words = philox([block & _MASK, block >> 32 & _MASK, zero + t, zero + offset.position], [seed & _MASK, seed >> 32])
    word = torch.stack(words).gather(0, (index >> 1 & 3)[None])[0]
    return word >> 16 * (index & 1) & 0xFFFF


def stochastic(W: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 ``W`` in ``dtype``, rounded up in magnitude with probability equal to the fraction that is cut off, to
    2^-16 of the distance between neighbouring values. NaN and inf are unchanged."""
    u = _bits(W)
    if dtype == torch.bfloat16:
        rounded = (u + bits & 0xFFFF0000) >> 16
    else:
        # Magnitude and exponent. Values below 2^-14 become multiples of 2^-24, for which `shift` bits are cut.
        u = u & 0x7FFFFFFF
        exponent = u >> 23
        shift = (126 - exponent).clamp(14, 24)
        significand = (u & 0x7FFFFF | 0x800000) >> (126 - exponent - shift).clamp(0, 31)
        drawn = torch.where(shift <= 16, bits >> (16 - shift).clamp(min=0), bits << (shift - 16).clamp(min=0))
        small = significand + drawn >> shift
        normal = (u + (bits >> 3) >> 13) - (112 << 10)
        rounded = torch.where(exponent >= 113, normal, small).clamp(max=0x7C00) | (_bits(W) >> 31 << 15)
    return torch.where(W.isfinite(), _as_signed(rounded, torch.int16).view(dtype), W.to(dtype))


def join(high: Tensor, low: Tensor) -> Tensor:
    """The master weight in float32 of a bfloat16 and its lower piece (int16 or int8)."""
    u = (high.view(torch.int16).to(torch.int64) << 16) + (low.to(torch.int64) << (0 if low.dtype == torch.int16 else 8))
    return _as_signed(u & _MASK, torch.int32).view(torch.float32)


def split(W: Tensor, low_dtype: torch.dtype, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Splits float32 master weights into a bfloat16 and its lower piece: exactly in int16; in int8 rounded to nearest
    even, or stochastically by the upper half of ``bits``. The lower piece of a NaN is 0."""
    u = _bits(W)
    if low_dtype == torch.int8:
        u = (u + ((u >> 8 & 1) + 0x7F if bits is None else bits >> 8)) & 0xFFFFFF00
    high = u + 0x8000 >> 16
    low = u - (high << 16) >> (0 if low_dtype == torch.int16 else 8)
    nan = W.isnan()
    return (
        torch.where(nan, W.to(torch.bfloat16), _as_signed(high, torch.int16).view(torch.bfloat16)),
        low.masked_fill(nan, 0).to(low_dtype),
    )


def _bits(W: Tensor) -> Tensor:
    return W.contiguous().view(torch.int32).to(torch.int64) & _MASK


def _as_signed(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Unsigned numbers as signed ones with the same bits."""
    size = 8 * dtype.itemsize
    return (u - (u >> size - 1 << size)).to(dtype)
