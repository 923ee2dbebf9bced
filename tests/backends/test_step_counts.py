"""Steps that the device counts: kernels that do it, on the host, and plain torch; and that a warm step leaves
everything to kernels where there are any."""

from typing import Any

import emulated
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import hfac
from hfac import ops, schedules, spec

pytestmark = pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)

HFAC = {"beta1": 0.9, "beta2": 0.999}
SMMF = {"beta": 0.9, "decay_rate": -0.5, "growth_rate": 0.999}
#: more than a block has threads, and none that is a whole number of blocks
MADE = [0.0, 1.0, 2.0, 9.0, 99.0, 12345.0, 2.0**24 - 2, *map(float, range(300))]


@pytest.fixture(params=["kernels", "torch"])
def counts(request):
    """(whether some are skipped) -> what counts, and its counts."""
    make = emulated.ops.step_counts if request.param == "kernels" else ops.StepCounts

    def found(skips: bool) -> tuple[Any, Tensor, Tensor | None]:
        made = torch.tensor(MADE)
        skipped = torch.arange(len(MADE), dtype=torch.int32) if skips else None
        return make(made, skipped), made, skipped

    return found


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("hfac", HFAC), ("hfac", {"beta1": 0.0, "beta2": 0.5}), ("smmf", SMMF), ("smmf", SMMF | {"beta": None})],
    ids=str,
)
def test_decays_are_those_of_the_schedules(algorithm, options, counts):
    """To two units of a double: powers are not the host's."""
    known, made, _ = counts(False)
    memory = known.memory()
    for row in memory.rows:
        row.fill_(torch.nan)
    known.find_decays(memory, spec.ALGORITHMS[algorithm].decay_rule(options))
    first, second, steps = memory.rows
    for i, before in enumerate(MADE):
        expected = spec.ALGORITHMS[algorithm].decays(before + 1, options)
        assert steps[i] == before + 1
        assert second[i].item() == pytest.approx(expected["beta2"], rel=4e-16)
        if expected["beta1"] is not None:
            assert first[i].item() == pytest.approx(expected["beta1"], rel=4e-16)
    assert torch.equal(made, torch.tensor(MADE))


def test_a_rule_that_nobody_knows_is_refused(counts):
    known, *_ = counts(False)
    with pytest.raises(ValueError, match="rule: 'hfac' or 'smmf' is needed, not 'adam'"):
        known.find_decays(known.memory(), schedules.DecayRule("adam", 0.9, 0.999, 0.0))


@pytest.mark.parametrize("skips", [False, True], ids=["none can be skipped", "some are skipped"])
def test_steps_are_counted_as_made_or_as_skipped(skips, counts):
    known, made, skipped = counts(skips)
    memory = known.memory()
    refused = torch.zeros(len(MADE), dtype=torch.int32)
    if skips:
        refused[::3] = 1
        memory.nonfinite.copy_(refused)
    known.add(memory)
    assert torch.equal(made, torch.tensor(MADE) + (1 - refused))
    if skips:
        assert torch.equal(skipped, torch.arange(len(MADE), dtype=torch.int32) + refused)
    else:
        assert memory.nonfinite is None


class Operations(TorchDispatchMode):
    """Names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"capturable": True}, {"capturable": True, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_a_warm_step_leaves_counts_and_decays_to_kernels(name, options, monkeypatch):
    """It makes no operation of torch, with the counts and parameters of a step that is told its number by the host; and
    its numbers are read anew where an option has changed."""
    monkeypatch.setattr(emulated.Host, "before_launch", lambda self, workspace: None)  # which fills it
    sizes = [(6, 8), (5,), (9, 4), ()]
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(size, generator=generator) for size in sizes]
    grads = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(6)]
    skipping = "nonfinite" in options
    grads[3][2][0, 0] = torch.inf if skipping else 1.0
    with emulated.registered():
        found = []
        for mine in (options, {"nonfinite": options.get("nonfinite", "propagate")}):
            params = [Parameter(value.clone()) for value in values]
            backend = emulated.NAME if mine is options else "reference"
            optimizer = getattr(hfac, name)(params, lr=0.01, backend=backend, **mine)
            for i, step in enumerate(grads):
                optimizer.param_groups[0]["lr"] = 0.01 if i < 4 else 0.02
                for param, grad in zip(params, step, strict=True):
                    param.grad = grad.clone() if param.grad is None else param.grad.copy_(grad)
                with Operations() as operations:
                    optimizer.step()
                if mine is options and i > 1:  # the first two find out what a step needs
                    assert operations.seen == []
            found.append((optimizer, params))
    (counted, params), (_, expected) = found
    for i, (param, twin) in enumerate(zip(params, expected, strict=True)):
        torch.testing.assert_close(param, twin, rtol=2e-6, atol=1e-7)
        assert counted.state[param]["step"] == (5 if skipping and i == 2 else 6)
        if skipping:
            assert counted.state[param]["skipped"] == (i == 2)


def test_memory_of_a_step_serves_its_stream_alone(monkeypatch):
    known = emulated.ops.step_counts(torch.tensor(MADE), None)
    memory = known.memory()
    assert known.serves(memory)
    monkeypatch.setattr(emulated.Host, "stream", lambda self, device: 1)
    assert not known.serves(memory) and known.serves(known.memory())
