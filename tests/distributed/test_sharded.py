"""Sharded training gives the numbers of unsharded training: every placement and wrapper, with gloo on this machine."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded import TIMEOUT, on_ranks
from sharded_models import model, optimizer_of
from sharded_steps import CASES, OPTIONS, STORED
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hfac import backends

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def agree(found, tolerance):
    wrong = {}
    for case, errors in found.items():
        if isinstance(errors, str):
            wrong[case] = errors
        elif not all(error <= tolerance for error in errors.values()):
            wrong[case] = {key: error for key, error in errors.items() if not error <= tolerance}
    assert not wrong, "\n".join(f"{case}: {what}" for case, what in wrong.items())


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_placement_equals_whole_tensors(name, dtype):
    """For every backend and option; the float32 run is compared with that of whole tensors in float32."""
    here = [backend for backend in ("reference", "cpu") if not backends.TABLE[backend].why_not(torch.device("cpu"))]
    more = () if dtype == torch.float64 else (20,)  # steps
    everywhere = ("int8", "bytes")  # other kinds of state
    cases = [(name, "all", case, dtype, backend, *more) for case in CASES for backend in here]
    if dtype == torch.float64:
        cases += [
            (name, options, case, dtype, backend)
            for options in OPTIONS[name]
            for case in (CASES if options in everywhere else ("mixed", "fsdp-tp", "empty-shards", "fsdp-tp-bytes"))
            for backend in (here if options in everywhere else ["reference"])
            if options != "all"
        ]
    (found,) = on_ranks(4, ("sharded_steps:run_all", cases))
    agree(found, TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_is_stored_as_that_of_whole_tensors(name):
    """Random bits hang on the element's index in the whole: only where sums in another order took a number across the
    border of two draws may a bfloat16 differ, which happens once in 2^16. Master weights agree as float32 does."""
    here = ["reference", "cpu"]
    layouts = ("uneven", "columns", "fsdp-tp", "fsdp-tp-uneven", "three-dims", "columns-uneven")
    cases = [(name, stored, case, backend) for stored in STORED for case in layouts for backend in here]
    (found,) = on_ranks(4, ("sharded_steps:stored_all", cases))
    agree({case: errors for case, errors in found.items() if case[1] == "split"}, TOLERANCE[torch.float32])
    agree({case: errors for case, errors in found.items() if case[1] != "split"}, 0.02)


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
            ("fsdp-tp", ("own_clip", 0.5)),
            ("ddp",),
            ("fsdp-kept",),
            ("fsdp", ("accumulate", True), ("tied", True)),
        )
    ]
    (found,) = on_ranks(4, ("sharded_models:compare_all", cases))
    agree(found, TOLERANCE[torch.float64])


@pytest.mark.slow
def test_replicas_of_shards_of_tensor_parallel_layers_equal_the_bare_model():
    cases = [("hsdp-tp", name, *more) for name in OPTIONS for more in ((), (("own_clip", 0.5),))]
    (found,) = on_ranks(8, ("sharded_models:compare_all", cases))
    agree(found, TOLERANCE[torch.float64])


@pytest.mark.slow  # those of every wrapper are compared above, after a few steps
def test_replicas_are_equal_to_the_bit_after_200_steps():
    cases = [(kind, name) for kind in ("hsdp", "ddp") for name in OPTIONS]
    (found,) = on_ranks(4, ("sharded_models:replicas_all", cases))
    assert found == {(kind, name): (True, 2 if kind == "hsdp" else 4) for kind, name in cases}


def test_collectives_of_a_step():
    """One for FSDP, with a copy to the replicas for HSDP; for H-Fac under FSDP x TP sums over rows, columns and
    matrices, and copies of what is the same along the other dimension; and the optimizer knows them. SMMF adds up each
    mesh by itself: what tensor parallelism leaves alone lies on FSDP's. Norms of gradients are added up first, and all
    ranks take the first's; whether a step then clips changes nothing of what it sends."""
    cases = [
        *((kind, name) for kind in ("fsdp", "hsdp", "fsdp-tp", "ddp") for name in OPTIONS),
        ("fsdp", "SMMF", ("nonfinite", "skip")),
        ("fsdp", "HFac", ("nonfinite", "skip")),
        ("fsdp", "HFac", ("nonfinite", "skip-step")),
        ("fsdp-tp", "SMMF", ("nonfinite", "skip-step")),
        *(("fsdp", name, ("nonfinite", "skip-step"), ("capturable", True), ("watch", True)) for name in OPTIONS),
        *(("hsdp", name, ("capturable", True)) for name in OPTIONS),
        ("hsdp", "HFac", ("max_grad_norm", 1e6)),
        ("fsdp-tp", "HFac", ("max_grad_norm", 1e6)),
        ("fsdp-tp", "SMMF", ("max_grad_norm", 0.1)),
        ("hsdp", "HFac", ("max_grad_norm", 0.1)),
    ]
    found, on_one_mesh = on_ranks(
        4, ("sharded_traffic:counted", cases), ("sharded_traffic:counted_on_one_mesh", "fsdp-tp")
    )
    wanted = {
        ("fsdp-tp", "HFac"): 5 * [2],
        ("fsdp-tp", "SMMF"): [2, 2, 2, 2],
        ("fsdp", "SMMF", ("nonfinite", "skip")): [4, 4],
        ("fsdp", "HFac", ("nonfinite", "skip-step")): [4, 4, 4],
        ("fsdp-tp", "SMMF", ("nonfinite", "skip-step")): 4 * [2] + 2 * [2] + 4 * [2],
        **{
            ("fsdp", name, ("nonfinite", "skip-step"), ("capturable", True), ("watch", True)): [4, 4, 4, 4]
            for name in OPTIONS
        },
        ("hsdp", "HFac", ("max_grad_norm", 1e6)): 2 * [2] + 2 * [2] + 2 * [2],
        ("hsdp", "HFac", ("max_grad_norm", 0.1)): 2 * [2] + 2 * [2] + 2 * [2],
        ("fsdp-tp", "HFac", ("max_grad_norm", 1e6)): 4 * [2] + 2 * [2] + 5 * [2],
        ("fsdp-tp", "SMMF", ("max_grad_norm", 0.1)): 4 * [2] + 2 * [2] + 4 * [2],
    }
    for case, (counted, said) in found.items():
        assert counted == said, case
        ranks = wanted.get(case, {"fsdp": [4], "hsdp": [2, 2], "ddp": []}.get(case[0]))
        assert [count for count, _ in counted] == ranks, case
    for name, ranks in {"HFac": [2, 2, 2, 2, 2], "SMMF": [2, 2, 2], "HFac-int8": [2, 2, 2, 2, 2]}.items():
        counted, said = on_one_mesh[name]
        assert counted == said and [count for count, _ in counted] == ranks, name


def test_a_gradient_on_some_ranks_only():
    """In the step itself, and before anything is updated; SMMF, which adds up nothing before a plain step, completes it
    for all other parameters."""
    options = (("max_grad_norm", 0.1), ("nonfinite", "skip"), ("watch", True), ("amp_scaling", True))
    options += (("capturable", True), ("nonfinite", "skip-step"))
    cases = [(name, *more) for name in OPTIONS for more in ((), *((option,) for option in options))]
    found = on_ranks(4, *(("sharded_traffic:part_ways", *case) for case in cases))
    for case, (message, untouched, gradients_kept, step, steps, stale) in zip(cases, found, strict=True):
        assert re.match(r"parameter 1 of group 0 \(shape \(16, 4\)\) has a gradient on 3 of the 4 ranks", message), case
        assert gradients_kept and step == 1 and stale, case
        if case[0] == "SMMF" and not {"max_grad_norm", "nonfinite"}.intersection(dict(case[1:])):
            assert "checkpoint" in message and untouched == [False, False, False] and steps == [2, 1, 2], case
        else:
            assert message.endswith("Nothing was updated.") and all(untouched) and steps == [1, 1, 1], case


def test_state_is_the_state_between_steps():
    """Whoever copies it, moves it, holds it or loads it into another optimizer goes on as if nothing had been."""
    ways = ("entries", "inner-dicts", "moved-within", "deepcopied", "pickled", "held")
    cases = [(name, way) for name in OPTIONS for way in ways]
    (found,) = on_ranks(2, ("sharded_traffic:state_replaced", cases))
    agree(found, TOLERANCE[torch.float64])


def test_sharded_parameters_that_are_unfrozen_later():
    (found,) = on_ranks(2, ("sharded_traffic:unfrozen", tuple(OPTIONS)))
    agree(found, TOLERANCE[torch.float64])


def test_a_gradient_that_is_placed_otherwise():
    for error in on_ranks(4, *(("sharded_steps:partial_gradient", name) for name in OPTIONS)):
        assert error <= 1e-12


def test_whole_moments_never_go_against_a_gradient_that_only_grows():
    larger = (1.0, 2.0, 5.0, 20.0, 100.0)
    for times, least in zip(
        larger, on_ranks(4, *(("sharded_steps:along_grown_gradient", c) for c in larger)), strict=True
    ):
        assert least > 0, times


def test_what_cannot_be_sharded_is_refused():
    (found,) = on_ranks(4, ("sharded_traffic:refusals",))
    patterns = {
        "partial": r"ValueError: HFac: parameter 0 .* Partial placement.*redistribute",
        "capturable-skip": r"ValueError: HFac: parameter 0 .* sharded, and capturable=True .*nonfinite='skip-step'",
        "skip-later": r"ValueError: SMMF: parameter 0 .* sharded, and capturable=True .*nonfinite='skip-step'",
        "watch-slices": r"ValueError: HFac: parameter 0 .* batch_dims=1 and is sharded; watch=True is not supported",
        "part-of-slices": r"ValueError: SMMF: parameter 0 .* only the first 1 dimension\(s\) can be sharded then",
        "triton": r"RuntimeError: backend='cuda' was asked for",
        "release-ddp": r"RuntimeError: release_gradients: DistributedDataParallel averages .*fully_shard",
        "step-param": r"RuntimeError: HFac.step_param: parameter 0 of group 0 .* is sharded, .*Call step\(\)",
    }
    for case, pattern in patterns.items():
        assert re.match(pattern, found[case] or "nothing"), (case, found[case])


@pytest.mark.parametrize("mode", ["", "released", "scaled", "watched", "skip-step", "capturable", "offloaded"])
@pytest.mark.parametrize("how", ["dies", "raises"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.pairwise
def test_a_rank_that_is_lost_ends_the_others(name, how, mode, tmp_path):
    """With an error, within the time that a collective may take; and the last checkpoint loads."""
    with pytest.raises(FileNotFoundError):  # no rank comes to its end, so rank 0 leaves no result
        on_ranks(4, ("sharded_traffic:lose_one", str(tmp_path), name, how, mode))
    for rank in (0, 1, 3):
        outcome, seconds = (tmp_path / str(rank)).read_text().split()
        assert outcome != "nothing" and float(seconds) < TIMEOUT.total_seconds() + 15, rank
    net = model()
    optimizer = optimizer_of(name, net)
    model_state, state = get_state_dict(net, optimizer)
    parts = {"model": model_state, "optimizer": state}
    dcp.load(parts, checkpoint_id=str(tmp_path / "checkpoint"))
    set_state_dict(net, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_fused_weights_of_which_ranks_have_whole_pieces():
    """As whole tensors, without a word to other ranks but for the norm; state in global shapes, so that it loads
    unsharded. Pieces of rows and of columns."""
    more = ((), (("max_grad_norm", 0.5), ("nonfinite", "skip-step")), (("dense", True),))
    cases = [(name, options) for name in OPTIONS for options in more]
    cases += [(name, options, 1) for name, options in cases]
    cases += [("HFac", (("first_moment", "int8"),), along) for along in (0, 1)]
    cases.append(("SMMF", (("signs", "bytes"),), 1))
    (found,) = on_ranks(4, ("sharded_steps:fused_all", cases))
    agree(found, TOLERANCE[torch.float64])
