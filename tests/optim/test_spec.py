"""`hfac.spec` says what the definition and the public functions say: names, order, defaults; and could say more."""

import inspect

import pytest
import torch

import hfac
from hfac import functional, reference, schedules, spec

POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
#: Lists that functional forms have had since a later version.
LATER = ("exp_avg_qs",)
#: What `Algorithm.options` leaves to all functional forms alike.
SHARED = ("lr", "weight_decay", "maximize", "places", "seed", "capturable", "backend", "batch_dims")


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def names(function, kind) -> list[str]:
    return [name for name, parameter in parameters(function).items() if parameter.kind == kind]


def test_every_op_of_the_definition_is_described():
    """`hfac_dense_squares` is a helper of sharded vectors, which every backend leaves to plain torch."""
    modules = [reference.hfac, reference.smmf]
    functions = {name: f for module in modules for name, f in vars(module).items() if inspect.isfunction(f)}
    ops = {name for name in functions if name.startswith(("hfac_", "smmf_"))}
    assert ops - {"hfac_dense_squares"} == set(spec.OPS)
    assert all(getattr(reference, name) is functions[name] for name in ops)


@pytest.mark.parametrize("op", spec.OPS.values(), ids=lambda op: op.name)
def test_an_op_is_what_the_reference_takes(op):
    function = getattr(reference, op.name)
    lists = [operand.name for operand in op.operands]
    before = ["params", "grads"] if op.updates else ["grads"]
    after = [name for name in op.outputs if name == "nonfinite"]
    assert names(function, POSITIONAL) == [*before, *lists, *op.vectors, *after]
    numbers = [number.name for number in op.numbers]
    watched = [name for name in op.outputs if name == "watched"]
    assert names(function, KEYWORD) == [*op.counts, *numbers, *op.storage, *watched, *op.shard_vectors]


@pytest.mark.parametrize("op", spec.OPS.values(), ids=lambda op: op.name)
def test_what_may_be_none_is_what_the_reference_lets_be_none(op):
    found = parameters(getattr(reference, op.name))
    for operand in op.operands:
        optional = operand.optional or (operand.moment == 1 and op.without_first)
        assert ("None" in str(found[operand.name].annotation)) == optional, operand.name
        assert (found[operand.name].default is None) == operand.optional, operand.name
    for number in op.numbers:
        annotation = str(found[number.name].annotation).replace("torch.", "")
        assert ("Tensor" in annotation) == number.tensor, number.name
        assert ("None" in annotation) == number.none, number.name
        assert number.tensor or not number.each
        assert (annotation == "<class 'bool'>") == isinstance(number.default, bool), number.name


@pytest.mark.parametrize("algorithm", spec.ALGORITHMS.values(), ids=lambda algorithm: algorithm.name)
def test_an_algorithm_is_what_its_functional_form_takes(algorithm):
    function = getattr(functional, algorithm.name)
    lists = [state.name for state in algorithm.states if state.name not in LATER]
    later = [state.name for state in algorithm.states if state.name in LATER]
    expected = ["params", "grads", *lists, "state_steps", "skipped", spec.MASTER_LOW.name, *later]
    assert names(function, POSITIONAL) == expected
    assert set(names(function, KEYWORD)) == {*algorithm.options, *SHARED}


@pytest.mark.parametrize("algorithm", spec.ALGORITHMS.values(), ids=lambda algorithm: algorithm.name)
def test_an_op_gets_the_numbers_that_it_needs(algorithm):
    options = {name: 0.5 for name in algorithm.options} | {"weight_decay_mode": "adamw"}
    given = {*algorithm.decays(1.0, options), *algorithm.scalars(options), "lr", "weight_decay", "maximize"}
    for op in algorithm.ops:
        assert {number.name for number in op.numbers} == given


@pytest.mark.parametrize("optimizer", [hfac.HFac, hfac.SMMF])
def test_the_states_of_an_optimizer_are_those_of_its_ops(optimizer):
    algorithm = spec.ALGORITHMS[optimizer.__name__.lower()]
    for shape in [(), (7,), (6, 4), (1, 9), (3, 4, 5)]:
        param = torch.nn.Parameter(torch.ones(shape))
        state = optimizer([param]).state[param]
        op = algorithm.op_of(list(state))
        assert {s.key for s in op.states} | {"step"} == set(state), shape
        for operand in op.states:
            assert state[operand.key].dtype == (operand.dtype or torch.float32), operand
            if operand.size == spec.WHOLE:
                assert state[operand.key].shape == param.shape


def test_an_op_is_found_by_the_states_that_are_there():
    algorithm = spec.ALGORITHMS["smmf"]
    assert algorithm.op_of(["exp_avg_sq_row", "exp_avg_sq_col"]) is spec.SMMF_STEP  # no first moment
    assert algorithm.op_of(["exp_avg_sqs"]) is spec.SMMF_DENSE_STEP


def test_options_choose_the_op_and_its_states_tell_it():
    algorithm, op = spec.ALGORITHMS["hfac"], spec.HFAC_INT8_STEP
    for mode, found in (("factored", spec.HFAC_STEP), ("int8", op)):
        assert algorithm.op_for(True, {"first_moment": mode}) is found
        assert algorithm.op_for(False, {"first_moment": mode}) is spec.HFAC_DENSE_STEP
        assert algorithm.op_of([*(state.key for state in found.states), "step"]) is found
    assert spec.ALGORITHMS["smmf"].op_for(True, {}) is spec.SMMF_STEP
    assert op.operand(1, spec.WHOLE) is op.states[0] and op.operand(1, spec.ROWS) is None


def test_lists_that_came_later_stand_last_in_the_functional_form():
    """Calls by position go on to mean what they meant."""
    assert names(functional.hfac, POSITIONAL)[8:] == ["state_steps", "skipped", spec.MASTER_LOW.name, "exp_avg_qs"]


@pytest.mark.parametrize("most", [64, 0], ids=["kept", "not kept"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)], ids=str)
def test_decays_of_both_moments_have_the_bits_of_one_alone(betas, most, monkeypatch):
    """On a device, of any number of parameters; where its constants are kept, and where they are made anew."""
    monkeypatch.setattr(schedules, "_kept", {})
    monkeypatch.setattr(schedules, "_MOST", most)
    for count in (1, 3, 100, 100):
        steps = torch.arange(1.0, count + 1, dtype=torch.float64)
        for given in (steps, schedules.following(steps.float() - 1)):
            for decays, beta in zip(schedules.hfac_decays(given, betas), betas, strict=True):
                assert torch.equal(decays, schedules.hfac_decay(steps, beta)) and decays[0] == 0
    assert len(schedules._kept) == (3 if most else 0)


def test_decays_of_the_steps_that_follow():
    """Of steps on a device: what one alone has."""
    steps = torch.arange(1.0, 9.0, dtype=torch.float64)
    following = schedules.following(steps.float() - 1)
    assert torch.equal(following.now, steps) and torch.equal(following.before, steps - 1)
    first, second = (schedules.smmf_decay_first(t, 0.9, 0.999) for t in (steps, following))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    first, second = (schedules.smmf_decay_second(t, -0.5) for t in (steps, following))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
