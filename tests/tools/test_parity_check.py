"""hfac.parity and `hfac doctor --check`: a backend that computes something else is found, and its op named."""

import json
from types import SimpleNamespace

import calls
import pytest
import torch

import hfac
from hfac import backends, parity, reference
from hfac.backends import plain
from hfac.cli import check, main

CPU = torch.device("cpu")
SHAPES = [(), (7,), (17, 19), (24, 18), (6, 4, 3, 3), (0, 5)]


def replaced(monkeypatch, **functions):
    """Puts the reference in the place of the backend "cpu", but for these ops."""
    module = SimpleNamespace(**{**vars(reference), **functions})
    row = backends.Backend("cpu", "for a test", lambda device: None, lambda: plain.Formulas(module))
    monkeypatch.setitem(backends.TABLE, "cpu", row)


def changed(op, change):
    """The reference's op, and then a change of what it wrote: (params, states by the op's names)."""

    def step(params, grads, *lists, **scalars):
        getattr(reference, op)(params, grads, *lists, **scalars)
        states = {name: scalars[name] for name in calls.STATES[op]}
        change(params, states | {"master_lows": scalars.get("master_lows")})

    return step


def flip(lists):
    for signs in lists:
        signs.bitwise_xor_(torch.ones_like(signs))


def add(lists, amount):
    for tensor in lists:
        if tensor.numel():
            tensor.flatten()[0:1].add_(amount)


FAULTS = {
    "factor": ("hfac_step_", {}, lambda params, states: add(states["exp_avg_sq_cols"], 1e-3), "exp_avg_sq_col"),
    "moment": ("hfac_dense_step_", {}, lambda params, states: add(states["exp_avgs"], 0.1), "exp_avg is off"),
    "weight": ("hfac_step_", {}, lambda params, states: add(params, 1e-2), "the parameter is off"),
    "codes": (
        "hfac_int8_step_",
        {"first_moment": "int8"},
        lambda params, states: [codes.copy_(codes // 2) for codes in states["exp_avg_qs"]],
        "codes of exp_avg_q are off",
    ),
    "signs": ("smmf_step_", {}, lambda params, states: flip(states["exp_avg_signs"]), "signs of the first moment"),
    "low piece": (
        "hfac_step_",
        {"dtype": torch.bfloat16, "master": "split"},
        lambda params, states: add(states["master_lows"], 300),
        "the parameter",
    ),
    "rounding": (
        "hfac_step_",
        {"dtype": torch.bfloat16, "rounding": "stochastic"},
        lambda params, states: [p.view(torch.int16).add_(1) for p in params],
        "rounded otherwise",
    ),
}


def differences(name, dtype=torch.float32, **options):
    return parity.differences(getattr(hfac, name), SHAPES, dtype, CPU, "cpu", **check.COMMON, **options)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_op_named(monkeypatch, fault):
    op, options, change, said = FAULTS[fault]
    name = "HFac" if op.startswith("hfac") else "SMMF"
    replaced(monkeypatch)
    assert differences(name, **options) == []
    replaced(monkeypatch, **{op: changed(op, change)})
    (found,) = differences(name, **options)
    assert found.op == op and said in found.what


def test_what_is_written_although_it_is_not_finite_is_found(monkeypatch):
    def heedless(params, grads, *lists, nonfinite=None, **scalars):
        reference.hfac_step_(params, grads, *lists, **scalars)

    replaced(monkeypatch, hfac_step_=heedless)
    found = differences("HFac", nonfinite="skip")
    assert [difference.op for difference in found] == ["hfac_step_"] and found[0].step == 2


def test_what_raises_is_told(monkeypatch):
    def broken(*lists, **scalars):
        raise RuntimeError("an illegal memory access was encountered")

    replaced(monkeypatch, smmf_step_=broken)
    (found,) = differences("SMMF")
    assert found.op is None and "illegal memory access" in str(found)


def doctor(capsys, *options):
    status = main(["doctor", *options])
    return status, capsys.readouterr().out


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", SHAPES)
    monkeypatch.setitem(check.LARGE, "cpu", (64, 64))


@pytest.mark.skipif("cpu" not in backends.available(CPU), reason="hfac._C is not built: hfac doctor says why")
def test_the_check_of_the_cpu(capsys, small):
    status, text = doctor(capsys, "--check", "--backend", "cpu")
    assert status == 0, text
    for optimizer in ("HFac", "SMMF"):
        for case, _, options in check.CASES:
            taken = check.takes(getattr(hfac, optimizer), options)
            assert (f"cpu, {optimizer}, {case}: ok" in text) == taken
        assert f"cpu, {optimizer}: " in text.partition("Rate on cpu")[2]


def test_a_broken_kernel_is_named_and_gets_no_rate(capsys, small, monkeypatch):
    op = "smmf_step_"
    replaced(monkeypatch, **{op: changed(op, lambda params, states: add(states["exp_avg_sq_rows"], 1.0))})
    status, text = doctor(capsys, "--check", "--device", "cpu")
    assert status == 1
    assert "cpu, HFac, float32: ok" in text
    assert "cpu, SMMF, float32: DIFFERS\n    smmf_step_, shape 17x19, step 1: exp_avg_sq_row is off" in text
    assert "cpu: steps on cpu differ from the reference's" in text
    assert "GB/s" not in text
    status, text = doctor(capsys, "--check", "--json")
    found = json.loads(text)
    off = {(row["optimizer"], row["case"]) for row in found["checks"] if row["differences"]}
    assert off == {("SMMF", case) for case, _, options in check.CASES if check.takes(hfac.SMMF, options)}
    assert status == 1 and found["rates"] == []


def test_a_device_that_is_lost_ends_the_check(capsys, small, monkeypatch):
    def broken(*lists, **scalars):
        raise RuntimeError("an illegal memory access was encountered")

    replaced(monkeypatch, hfac_step_=broken)
    monkeypatch.setattr(check, "_alive", lambda device: False)
    status, text = doctor(capsys, "--check")
    assert status == 1 and "not checked: the error before has left cpu unusable" in text and "SMMF" not in text


def test_without_a_backend_there_is_nothing_to_check(capsys, monkeypatch):
    monkeypatch.setattr(backends, "available", lambda device: ["reference"])
    status, text = doctor(capsys, "--check")
    assert status == 0 and "only the reference is here" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu"], "give --check too"),
        (["--check", "--device", "tpu"], "required is a device that is here (cpu"),
        (["--check", "--device", "cuda:93"], "required is a device that is here (cpu"),
        (["--check", "--backend", "opencl"], "required is one of cuda, triton, cpu, reference, got 'opencl'"),
        (["--check", "--backend", "cuda", "--device", "cpu"], "'cuda' is not here: "),
    ],
)
def test_what_cannot_be_checked_is_refused(capsys, options, said):
    with pytest.raises(SystemExit) as refused:
        main(["doctor", *options])
    assert refused.value.code == 2
    assert said in capsys.readouterr().err
