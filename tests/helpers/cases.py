"""Tables of cases, shared by the tests and by bench/: shapes, types, options, and how close is close."""

import torch

from hfac.parity import gradient

__all__ = ["DTYPES", "OPTIONS", "SHAPES", "codes_agree", "gradient", "shape_id", "smmf_agrees"]

#: Hostile shapes: scalars, one row, one column, primes, odd byte counts, powers of two and one beyond, five
#: dimensions, empty.
SHAPES = [
    (),
    (1,),
    (2,),
    (7,),
    (24,),
    (1024,),
    (4097,),
    (1, 1),
    (1, 64),
    (64, 1),
    (24, 18),
    (18, 24),
    (17, 19),
    (31, 8),
    (127, 129),
    (3, 4097),
    (4097, 3),
    (256, 320),
    (6, 4, 3, 3),
    (16, 3, 7, 7),
    (2, 3, 5, 7, 2),
    (0,),
    (0, 5),
    (5, 0, 3),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

#: No option of any row is at its neutral value unless the row is there to show the neutral path.
OPTIONS = {
    "HFac": {
        "all": dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
        "unclipped": dict(lr=0.02, betas=(0.8, 0.95), clip_threshold=None, weight_decay=0.1, maximize=True),
        "flatten": dict(lr=0.02, betas=(0.9, 0.98), weight_decay=0.05, matricize="flatten", clip_threshold=0.9),
        "skip": dict(lr=0.02, weight_decay=0.1, nonfinite="skip"),
        "int8": dict(
            lr=0.02,
            betas=(0.8, 0.95),
            eps=1e-12,
            clip_threshold=0.7,
            weight_decay=0.1,
            maximize=True,
            first_moment="int8",
        ),
    },
    "SMMF": {
        "all": dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
        "coupled": dict(lr=0.02, beta=0.7, weight_decay=0.1, weight_decay_mode="adam", maximize=True),
        "no-first-moment": dict(lr=0.02, beta=None, weight_decay=0.1, decay_rate=-0.6),
        "vectors-whole": dict(lr=0.02, weight_decay=0.1, vector_reshape=False),
        "skip": dict(lr=0.02, weight_decay=0.1, nonfinite="skip"),
    },
}


#: Backends whose kernels take approximate roots and reciprocals for SMMF's parameters of 16 bits without a master
#: weight, and how far their updates may be from the reference's, relative to the update; of the parameters, which are
#: the same or neighbours, at most this share are neighbours, and of few elements as many more as chance may bring.
ROUGH, ROUGH_UPDATE, ROUGH_SHARE, ROUGH_FEW = ("cuda", "cuda-emulated", "triton"), 2.0**-18, 1e-3, 4


def smmf_agrees(
    ours: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor, lr: float, backend: str, exact: bool = False
) -> bool:
    """Whether a parameter of SMMF, which depends on no sum of the same step, is the other's to the bit; of 16 bits and
    a backend of `ROUGH` within its bounds. ``exact``: of 16 bits, with a master weight."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if exact or ours.dtype.itemsize != 2 or backend not in ROUGH:
        return bool(same.all())
    info, new, old = torch.finfo(ours.dtype), theirs.float(), before.float()
    update = (new - old).abs() + lr * old.abs()  # what weights decay by may be opposite to the rest
    bound = info.eps * new.abs().clamp(min=info.tiny) + ROUGH_UPDATE * update
    near = same | ((ours.float() - new).abs() <= bound)
    return bool(near.all()) and int((~same).sum()) <= ROUGH_FEW + ROUGH_SHARE * ours.numel()


def codes_agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Codes of 8 bits are equal or, of at most 1 in 1,000, neighbours, where two orders of summation part."""
    off = (ours.int() - theirs.int()).abs()
    return ours.dtype == theirs.dtype == torch.int8 and off.amax() <= 1 and off.sum() <= max(1, off.numel() / 1000)


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
