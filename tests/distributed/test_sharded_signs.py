"""SMMF's signs in bytes: under placements that split bytes of bits, saved and continued under any other."""

import re

import pytest
from sharded import on_ranks
from sharded_signs import go_on, unbroken
from sharded_steps import difference

SAVED = ("columns", "rows", "both")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("signs"))
    on_ranks(4, ("sharded_signs:save", folder, SAVED))
    return folder


def goes_on(found):
    wanted = unbroken()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert difference(found[key], value) <= 1e-12, key


def test_checkpoints_continue_under_other_placements_and_on_other_ranks(saved):
    pairs = [("rows", "columns"), ("columns", "both"), ("both", "strided")]
    for found in on_ranks(4, *(("sharded_signs:go_on", saved, *pair) for pair in pairs)):
        goes_on(found)
    for found in on_ranks(2, *(("sharded_signs:go_on", saved, name, "columns-of-2") for name in SAVED)):
        goes_on(found)
    goes_on(go_on(saved, "columns", "plain"))


def test_loading_converts_and_equals_the_unbroken_run():
    """From bits to bytes and back, of the optimizer's own shards and of whole tensors."""
    cases = [
        (layout, given, wanted, sharded)
        for layout in ("rows", "columns", "both")
        for given, wanted in (("bits", "bytes"), ("bytes", "bits"))
        for sharded in (True, False)
    ]
    for case, errors in zip(cases, on_ranks(4, *(("sharded_signs:resumed", *case) for case in cases)), strict=True):
        assert max(errors.values()) <= 1e-12, (case, errors)


def test_what_keeps_bytes_is_said():
    """Parameters whose placement would split bytes keep them without being told to, and a warning names the option; in
    a state of the parameter's shape all others keep bits."""
    found, refused = on_ranks(4, ("sharded_signs:said",), ("sharded_signs:refused_shards",))
    for (layout, *given), (messages, kinds) in found.items():
        split = {0, 1, 2} if layout == "columns" else set()
        expected = {i: "torch.bool" if given or i in split else "torch.uint8" for i in kinds}
        assert kinds == expected and split <= kinds.keys()
        assert len(messages) == (layout == "columns" and not given), messages
    (message,) = found[("columns",)][0]
    assert re.match(r"SMMF: 3 parameter\(s\), the first being parameter 0 .*\(6, 10\).*signs='bytes'", message)
    assert "parameter 0 (shape (6, 10)): 'exp_avg_sign' is sharded, and this parameter's placement" in refused[0]
    assert ".full_tensor()" in refused[0] and refused[1] == "taken"
    assert "'exp_avg_sign' is not sharded as its parameter is" in refused[2]


def test_released_in_the_backward_pass():
    (errors,) = on_ranks(4, ("sharded_signs:released", "fsdp"))
    assert max(errors.values()) <= 1e-12, errors
