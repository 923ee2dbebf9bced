"""diagnostics() of watched steps tells of whole parameters, the same on every rank."""

import pytest
import torch
from sharded import on_ranks
from sharded_models import OPTIMIZERS
from sharded_steps import OPTIONS
from test_sharded import agree


@pytest.mark.parametrize("name", OPTIONS)
def test_watched_numbers_are_those_of_whole_tensors(name):
    """Metrics are float32."""
    layouts = ("uneven", "empty-shards", "columns", "mixed", "hsdp", "fsdp-tp", "columns-uneven")
    cases = [(name, "all", case, torch.float64, "auto") for case in layouts]
    cases += [(name, options, "mixed", torch.float64, "reference") for options in OPTIONS[name]]
    cases += [(name, "all", case, torch.bfloat16, "auto") for case in ("uneven", "fsdp-tp")]
    (found,) = on_ranks(4, ("sharded_watch:compare_all", cases))
    agree({case: errors for case, errors in found.items() if case[3] == torch.float64}, 3e-7)
    agree({case: errors for case, errors in found.items() if case[3] != torch.float64}, 2e-2)


def test_a_watched_step_sends_three_numbers_more_for_each_parameter():
    cases = [(kind, name) for kind in ("fsdp", "hsdp") for name in OPTIMIZERS]
    for (kind, _), (counted, said, unwatched, released) in zip(
        cases, on_ranks(4, *(("sharded_watch:sent", *case) for case in cases)), strict=True
    ):
        more = [(4, 14 * 3 * 8)] if kind == "fsdp" else 2 * [(2, 14 * 3 * 8)]
        assert counted == said == unwatched + more and released
