"""The example of a first training, with each optimizer that it offers."""

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "first_steps.py"
NAMES = ("adamw", "hfac", "hfac-int8", "smmf")


@pytest.fixture(autouse=True)
def one_thread():
    """More would wait for each other most of the time, so small is the network."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(name, capsys, monkeypatch):
    """The losses and the bytes of state that it prints."""
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--optimizer", name, "--steps", "100"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", said, re.M)]
    (state,) = re.findall(rf"^{name} on \w+: [\d,]+ bytes of weights, ([\d,]+) of optimizer state$", said, re.M)
    return losses, int(state.replace(",", ""))


@pytest.mark.filterwarnings("ignore:hfac steps in plain torch")  # where nothing has been compiled
def test_it_learns_with_less_state_than_adamw(capsys, monkeypatch):
    found = {name: trained(name, capsys, monkeypatch) for name in NAMES}
    for name, (losses, _) in found.items():
        assert len(losses) == 2 and losses[1] < losses[0] / 10, name
    state = {name: size for name, (_, size) in found.items()}
    assert state["hfac"] < state["smmf"] < state["hfac-int8"] < state["adamw"] / 4


def test_it_offers_what_is_tested(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "{" + ",".join(NAMES) + "}" in capsys.readouterr().out
