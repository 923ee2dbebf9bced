"""Tables of cases, shared by the tests and by bench/: shapes, types, options, and how close is close."""

import torch

from hfac.parity import gradient

__all__ = ["DTYPES", "OPTIONS", "SHAPES", "codes_agree", "gradient", "in_codes", "shape_id"]

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


def in_codes(options: dict) -> bool:
    """Whether matrices have a first moment in codes of 8 bits, of which not all backends have kernels."""
    return options.get("first_moment") == "int8"


def codes_agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Codes of 8 bits are equal or, of at most 1 in 1,000, neighbours, where two orders of summation part."""
    off = (ours.int() - theirs.int()).abs()
    return ours.dtype == theirs.dtype == torch.int8 and off.amax() <= 1 and off.sum() <= max(1, off.numel() / 1000)


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
