"""Sharded training gives the numbers of unsharded training: every placement and wrapper, with gloo on this machine."""

import pytest
import torch
from sharded import on_ranks
from sharded_steps import CASES, OPTIONS

from hfac import backends

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def placements(name):
    return [case for case in CASES if not (name == "SMMF" and case.endswith("-hfac"))]


def agree(found, tolerance):
    wrong = {}
    for case, errors in found.items():
        if isinstance(errors, str):
            wrong[case] = errors
        elif not all(error <= tolerance for error in errors.values()):
            wrong[case] = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not wrong, "\n".join(f"{case}: {what}" for case, what in wrong.items())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_placement_equals_whole_tensors(name, dtype, backend):
    if backend != "reference" and backends.TABLE[backend].why_not(torch.device("cpu")):
        pytest.skip("hfac._C is not built here")
    cases = [(name, "all", case, dtype, backend) for case in placements(name)]
    agree(on_ranks(4, "sharded_steps:run_all", cases), TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_under_sharding(name):
    cases = [
        (name, options, case, torch.float64, "reference")
        for options in OPTIONS[name]
        for case in ("mixed", "fsdp-tp", "empty-shards")
        if options != "all"
    ]
    agree(on_ranks(4, "sharded_steps:run_all", cases), TOLERANCE[torch.float64])


def test_every_wrapper_equals_the_bare_model():
    cases = [
        (kind, name, *more)
        for name in OPTIONS
        for kind, *more in (
            ("fsdp",),
            ("fsdp", ("uneven", True)),
            ("fsdp", ("clip", 0.5)),
            ("hsdp",),
            ("fsdp-tp",),
            ("ddp",),
        )
    ]
    agree(on_ranks(4, "sharded_models:compare_all", cases), TOLERANCE[torch.float64])


def test_replicas_are_equal_to_the_bit_after_200_steps():
    cases = [(kind, name) for kind in ("hsdp", "ddp") for name in OPTIONS]
    found = on_ranks(4, "sharded_models:replicas_all", cases)
    assert found == {(kind, name): (True, 2 if kind == "hsdp" else 4) for kind, name in cases}
