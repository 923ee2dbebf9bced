"""FSDP2's parameters are stepped in the backward pass, those of a module together, as those of the bare model are."""

import re

from sharded import on_ranks
from sharded_models import OPTIMIZERS
from test_sharded import agree

LIMIT = (("max_grad_norm", 0.2),)
CASES = (
    ("fsdp",),
    ("fsdp", ("tied", True), ("uneven", True)),
    ("fsdp", ("max_grad_norm", 0.2)),
    ("fsdp", ("max_grad_norm", 0.2), ("resumes", True), ("nonfinite", "skip")),
    ("fsdp", ("accumulate", 3), ("max_grad_norm", 0.2)),
    ("fsdp", ("accumulate", 3), ("sync", False)),
    ("fsdp", ("accumulate", 2), ("exact", False)),
    ("fsdp", ("unfreezes", True)),
    ("fsdp", ("calls_step", False), ("max_grad_norm", 0.2)),
    ("fsdp-kept",),
    ("hsdp", ("max_grad_norm", 0.2)),
    ("fsdp-tp", ("max_grad_norm", 0.2)),
)


def test_released_steps_equal_the_bare_model():
    cases = [(kind, name, *options) for name in OPTIMIZERS for kind, *options in CASES]
    (found,) = on_ranks(4, ("sharded_release:compare_all", cases))
    agree(found, 1e-12)


def test_collectives_of_a_released_step():
    """One for each module that FSDP shards (two blocks, and the model with the rest), with a copy to the replicas for
    HSDP; at the end one for all norms, and a copy of what they add up to."""
    cases = [(kind, name, *more) for kind in ("fsdp", "hsdp") for name in OPTIMIZERS for more in ((), LIMIT)]
    (found,) = on_ranks(4, ("sharded_release:counted", cases))
    for (kind, name, *more), (counted, said, at_once) in found.items():
        copies = 2 if kind == "hsdp" else 1
        assert len(said) == (3 + 2 * bool(more)) * copies, (kind, name, more, said)
        for each in said:
            counted.remove(each)
        assert len(counted) == (3 if kind == "hsdp" else 0), counted  # FSDP's own, between replicas
        if not more:
            assert sum(size for _, size in said) == sum(size for _, size in at_once), (kind, name)


def test_gradients_of_one_module_are_there_at_once():
    """Of 12 equal blocks on 4 ranks. Whole gradients of one, this rank's quarter of them, and that of the block before,
    whose sums are under way; without release a quarter of all."""
    (found,) = on_ranks(4, ("sharded_release:peaks", ["HFac", "SMMF"]))
    for name in ("AdamW", "HFac", "SMMF"):
        assert found[name, False] == 3.75, found  # the last block's whole ones are gone when its shards are there
        assert found[name, True] == (1.0 if name == "AdamW" else 1.25), found


def test_the_backward_pass_goes_on_while_sums_are_under_way():
    """The first block's begins when the second's gradients have been sent off, and are still there."""
    for seen, sent in on_ranks(4, *(("sharded_release:overlap", name) for name in OPTIMIZERS)):
        assert seen == [(1, 0, []), (0, 1, [1])] and sent == 3


def test_a_gradient_on_some_ranks_only_ends_the_backward_pass():
    """On every rank, and names the parameter; SMMF, which adds up its sums behind the step, has made it."""
    for name, (message, changed) in zip(
        OPTIMIZERS, on_ranks(4, *(("sharded_release:part_ways", name) for name in OPTIMIZERS)), strict=True
    ):
        assert re.match(r"parameter \d+ of group 0 \(shape \(16,\)\) has a gradient on 3 of the 4 ranks", message), (
            message
        )
        assert changed == (name == "SMMF") and ("checkpoint" in message) == changed
