"""torchtitan's own OptimizersContainer and CheckpointManager: sharded training gives the numbers of whole parameters,
and goes on from its checkpoints, synchronous and asynchronous, bit for bit."""

from importlib.util import find_spec

import pytest
from sharded import on_ranks

pytestmark = pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed")

CASES = [(name, asynchronous) for name in ("HFac", "SMMF") for asynchronous in (False, True)]


def test_training_is_that_of_whole_parameters_and_goes_on(tmp_path):
    found = on_ranks(2, *(("sharded_torchtitan:goes_on", name, str(tmp_path), way) for name, way in CASES))
    for case, (worst, equal, count) in zip(CASES, found, strict=True):
        assert worst <= 1e-12, case
        assert equal and count > 30, case
