"""What only the CUDA kernels have of stored parameters (test_stored_steps.py), compiled for the host: which accesses
their launches have, and what the bindings refuse."""

import emulated
import pytest
import torch
from suites import BF16, F32, OPS
from test_stored_steps import EACH_KIND, LAYOUTS, SHAPES, Pair, grads_of

from hfac.rounding import BitOffset

pytestmark = [
    pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT),
    pytest.mark.usefixtures("emulated_backend"),
]
MATRICES = pytest.mark.parametrize("op", [op for op in OPS if "dense" not in op])


@pytest.mark.parametrize("grad_dtype", [BF16, F32], ids=str)
@EACH_KIND
@pytest.mark.parametrize("op", OPS)
def test_aligned_ones_have_an_access_of_their_own(op, kind, grad_dtype):
    pair = Pair(op, kind, SHAPES[op[:4]], emulated.NAME)
    bulk = {kind.bulk[grad_dtype == F32]}
    pair.step(grads_of(SHAPES[op[:4]], 1, grad_dtype))
    assert pair.accesses() == bulk | {"any stored"}


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@EACH_KIND
@MATRICES
def test_others_have_any(op, kind, layouts):
    shapes = [(24, 16), (16, 8)]
    places = [BitOffset(1, 16, (64, 1)), BitOffset(2, 3, (1, 40))]
    pair = Pair(op, kind, shapes, emulated.NAME, [layouts] * 2, places)
    moved = layouts[0] != "contiguous" or (kind.low is not None and layouts[1] != "contiguous")
    scattered = kind.drawn and kind.low != torch.int16  # of 16 bits no place matters
    pair.step(grads_of(shapes, 1, BF16))
    assert pair.accesses() == {"any stored" if moved or scattered else kind.bulk[0]}


STEP = dict(numels=[12], param_dtypes=1, shapes=[(3, 4)])
STEP |= dict.fromkeys(("params", "exp_avgs", "exp_avg_sqs"), [4096])
LOW = dict(master_lows=[4096], low_bytes=[2])
NUMBERS = dict(lr=0.1, weight_decay=0.0, beta1=0.5, beta2=0.5, eps=1e-8)
NUMBERS |= dict(clip_threshold=None, maximize=False, decoupled_weight_decay=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (LOW | dict(param_dtypes=0), "master_lows: .*no bfloat16"),
        (LOW | dict(master_lows=[0]), "master_lows: .*null"),
        (LOW | dict(master_lows=[4096, 4096]), "master_lows: 2 entries"),
        (LOW | dict(low_bytes=[3]), "low_bytes: .*1 or 2 is needed"),
        (LOW | dict(low_bytes=None), "low_bytes: "),
        (LOW | dict(low_strides=[(1,)]), "low_strides: .*dimensions"),
        (LOW | dict(low_strides=[(4, 1)], shapes=None), "shapes: needed"),
        (dict(places=[(1, 0, None)], param_dtypes=0), "places: .*only bfloat16 and float16"),
        (dict(places=[]), "places: 0 entries"),
        (dict(places=[(1, 0)]), "places: .*position, first, strides"),
        (dict(places=[(2**32, 0, None)]), "places: .*32 bits"),
        (dict(places=[(-1, 0, None)]), "places: .*negative"),
        (dict(places=[(1, -1, None)]), "places: .*negative"),
        (dict(places=[(1, 2**63 - 4, None)]), "places: .*overflows"),
        (dict(places=[(1, 0, (1,))]), "places: .*dimensions"),
        (dict(places=[(1, 0, (-4, 1))]), "places: .*negative"),
        (dict(places=[(1, 0, (2**62, 2**62))]), "places: .*overflows"),
        (dict(places=[(1, 2**62, (2**61, 2**60))]), "places: .*overflows"),
        (dict(places=[(1, 0, (4, 1))], shapes=None), "shapes: needed"),
        (dict(places=[(1, 0, (4, 1))], shapes=[(3, 5)]), "shapes: .*elements"),
    ],
)
def test_bad_calls_are_refused(given, message):
    emulated.native.CudaStep.smmf_dense_step(**STEP, **LOW, places=[(1, 0, (4, 1))])
    with pytest.raises(ValueError, match=message):
        emulated.native.CudaStep.smmf_dense_step(**STEP | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(step=1.0), "seed: "),
        (dict(seed=-1, step=1.0), "seed: "),
        (dict(seed=2**64, step=1.0), "seed: "),
        (dict(seed=1.5, step=1.0), "seed: "),
        (dict(seed=0), "step: needed"),
        (dict(seed=0, step=-1.0), "step: "),
        (dict(seed=0, step=2.0**32), "step: "),
        (dict(seed=0, step=float("nan")), "step: "),
        (dict(seed=0, step=(0, 1, 0)), "step: .*null"),
    ],
)
def test_a_launch_without_seed_or_step_is_refused(given, message):
    step = emulated.native.CudaStep.smmf_dense_step(**STEP, places=[(1, 0, None)])
    with pytest.raises(ValueError, match=message):
        step.launch(NUMBERS | given, dict(table=4096, workspace=4096, counters=4096))
