"""transformers' Trainer and accelerate shard parameters after the optimizer has been made, and save its state in their
own ways: the losses are those of whole parameters, and go on from a checkpoint bit for bit."""

import os
from importlib.util import find_spec
from typing import Any

import pytest
from sharded import on_ranks

# The ranks import them; here that would cost a second in every process that collects tests.
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("accelerate", "transformers"))), reason="accelerate and transformers are not installed"
)
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

TRAINERS = ("accelerate", "accelerate, offloaded", "transformers")
EACH = pytest.mark.parametrize("name", ["HFac", pytest.param("SMMF", marks=pytest.mark.slow)], scope="module")


@pytest.fixture(scope="module")
def found(name: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One start of two ranks for all that is asked of an optimizer."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    (results,) = on_ranks(2, ("sharded_trainers:run_all", [name], folder))
    return results


@pytest.mark.parametrize("trainer", TRAINERS)
@EACH
def test_losses_are_those_of_whole_parameters(found: Any, trainer: str, name: str) -> None:
    assert len(found[trainer, name]["whole"]) == 8
    assert found[trainer, name]["sharded"] == pytest.approx(found[trainer, name]["whole"], abs=5e-6)
    states = found[trainer, name]["states"]
    assert not states.pop("step")
    assert states and all(states.values())


@pytest.mark.parametrize("trainer", TRAINERS)
@EACH
def test_a_checkpoint_goes_on(found: Any, trainer: str, name: str) -> None:
    assert found[trainer, name]["resumed"] == found[trainer, name]["sharded"][4:]


@EACH
def test_fsdp1_is_refused(found: Any, name: str) -> None:
    """With use_orig_params, the trainers' default, a rank has vectors, and would train them as such without a word."""
    for message in found["FSDP1", name]:
        assert message is not None
        assert "flat parameter of FSDP1" in message and "fully_shard" in message
