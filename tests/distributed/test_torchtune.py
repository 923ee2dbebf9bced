"""torchtune's own recipes for full finetuning: sharded, in the backward pass and offloaded they give the numbers of
whole parameters and the reference's steps, and go on from their checkpoints bit for bit."""

import os
from importlib.util import find_spec

import pytest
from sharded import on_ranks

pytestmark = pytest.mark.skipif(find_spec("torchtune") is None, reason="torchtune is not installed")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")

STEPS, RESUMED = 6, 3
SHARDED = ("recipe", "in the backward pass", "asynchronous checkpoints", "both", "offloaded")
CASES = [(case, "distributed") for case in SHARDED] + [(case, "single_device") for case in SHARDED[:2]]


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_recipes_train_as_whole_parameters_and_go_on(name, tmp_path):
    found = on_ranks(2, *(("sharded_torchtune:goes_on", name, str(tmp_path), *case) for case in CASES))
    for case, (worst, equal, count, steps) in zip(CASES, found, strict=True):
        assert worst <= 1e-12, case
        assert equal and count > 50 and steps == (STEPS, RESUMED), case
