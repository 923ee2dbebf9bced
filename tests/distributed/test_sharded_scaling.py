"""A GradScaler's steps of sharded parameters are made on all ranks, or on none."""

from sharded import on_ranks
from sharded_models import OPTIMIZERS
from test_sharded import agree


def test_scaled_steps_equal_the_bare_model():
    limit, on_device = ("max_grad_norm", 0.2), ("capturable", True)
    of_both = ((), (limit,), (on_device, limit))
    options = (*of_both, (("nonfinite", "skip"),), (on_device,), (on_device, ("nonfinite", "skip-step")))
    cases = [("fsdp", name, False, *more) for name in OPTIMIZERS for more in options]
    cases += [("hsdp", name, False, *more) for name in OPTIMIZERS for more in of_both]
    cases += [("fsdp", name, True, limit) for name in OPTIMIZERS]
    (found,) = on_ranks(4, ("sharded_scaling:compare_all", cases))
    agree(found, 1e-12)


def test_one_rank_alone_finds_what_is_not_finite():
    """It tells the others, in a sum of one number along each mesh dimension, and nothing else is sent."""
    for made, changed, sent, said in on_ranks(4, *(("sharded_scaling:alone", name) for name in OPTIMIZERS)):
        assert made and not changed
        assert sent and sent == said[: len(sent)] and {size for _, size in sent} == {4}
