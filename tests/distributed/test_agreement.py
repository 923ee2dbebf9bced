"""Ranks clip together or not at all, by one norm, and replicas end with the same bits."""

import pytest
from sharded import on_ranks
from test_sharded import agree

NAMES = ("HFac", "SMMF")


def test_the_norm_of_what_each_rank_steps_alone():
    """Experts that are cut, or declared to differ by rank, count on all ranks; also where some rank has no gradient of
    them, or one that is not finite."""
    ways = ("cut", "plain", "absent", "skip", "propagate")
    cases = [(name, how, backend) for name in NAMES for how in ways for backend in ("reference", "cpu")]
    (found,) = on_ranks(2, ("sharded_agreement:norms_of_experts", cases))
    agree(found, 1e-12)


def test_a_last_bit_decides_for_all_ranks_or_for_none():
    cases = [(name, how) for name in NAMES for how in ("fsdp-tp", "plain", "two-meshes")]
    (found,) = on_ranks(4, ("sharded_agreement:last_bits", cases))
    agree(found, 0)


@pytest.mark.parametrize("options", [(), (("max_grad_norm", 0.5), ("nonfinite", "skip"))], ids=["plain", "clipped"])
def test_replicas_are_the_same_however_each_group_adds_up(options):
    cases = [(name, layout, options) for name in NAMES for layout in ("hsdp", "both", "hsdp-tp")]
    (found,) = on_ranks(4, ("sharded_agreement:noisy_replicas", cases))
    agree(found, 0)
