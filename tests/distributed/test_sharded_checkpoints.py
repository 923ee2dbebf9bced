"""A checkpoint saved on any layout goes on, on any other, as if nothing had happened."""

import pytest
from sharded import on_ranks
from sharded_checkpoints import CHECKPOINTS, NAMES, PAIRS, continue_all, keys_and_shapes, uninterrupted
from sharded_steps import difference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of four ranks: FSDP, and FSDP x TP; nested and flat."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    on_ranks(4, ("sharded_checkpoints:save_all", folder))
    return folder


def goes_on(found, name):
    wanted = uninterrupted(name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert difference(found[key], value) <= 1e-12, key


LAYOUTS = [(1, ["fsdp"]), (2, ["fsdp"]), (4, ["hsdp", "fsdp-tp"])]
SLOW = [(world, kinds, CHECKPOINTS) for world, kinds in (*LAYOUTS, (3, ["fsdp"]))]


@pytest.mark.parametrize(
    ("world", "kinds", "checkpoints"),
    [*((*layout, PAIRS) for layout in LAYOUTS), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_continued_on_another_layout(saved, world, kinds, checkpoints):
    for found in on_ranks(world, *(("sharded_checkpoints:continue_all", saved, kind, checkpoints) for kind in kinds)):
        assert found.keys() == set(checkpoints)
        for (_, name, _), everything in found.items():
            goes_on(everything, name)


def test_continued_without_a_process_group(saved):
    for (_, name, _), found in continue_all(saved, "plain", CHECKPOINTS).items():
        goes_on(found, name)


def test_full_state_from_rank_0_and_keys_and_global_shapes():
    """Those of whole tensors, under any layout."""
    found, keys = on_ranks(
        4, ("sharded_checkpoints:full_state", "fsdp"), ("sharded_checkpoints:keys_and_shapes", "fsdp-tp")
    )
    assert found.keys() == set(NAMES)
    for name, everything in found.items():
        goes_on(everything, name)
    assert keys == keys_and_shapes("plain")
