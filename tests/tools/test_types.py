"""What type checkers say of a user's script: nothing of a right one, and every misspelt option."""

import inspect
import json
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import hfac
from hfac import types

RIGHT = """
import torch
import hfac

model = torch.nn.Linear(4, 3)
optimizer = hfac.HFac(model.parameters(), 1e-3, (0.9, 0.99), first_moment="int8", rounding="stochastic", master=None)
other = hfac.SMMF(
    hfac.param_groups(model, weight_decay=0.1, signs="bits"), lr=torch.tensor(1e-3), beta=None, weight_decay_mode="adam"
)
named = hfac.HFac(model.named_parameters(), nonfinite="skip", max_grad_norm=1.0, backend="cpu")
groups = hfac.param_groups(model, dense="Embedding", lr=3e-4, beta=None, watch=True)
own: list[dict[str, typing.Any]] = [{"params": model.weight, "lr": 1e-2}, {"params": [model.bias]}]
grouped = hfac.HFac(own)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
nothing: None = optimizer.step()
loss: float = other.step(lambda: 1.0)
closed: torch.Tensor = named.step(lambda: torch.zeros(()))
optimizer.step_param(model.weight, lr_scale=0.5)
shares: dict[str, torch.Tensor] = optimizer.diagnostics()["weight"]
converted: dict[str, object] = hfac.convert(optimizer.state_dict(), model.parameters(), to="smmf", decay_rate=-0.8)
back: dict[str, object] = hfac.convert(converted, dict(model.named_parameters()), to="adamw", amsgrad=False)
again: dict[str, object] = hfac.convert(back, optimizer.param_groups, first_moment="int8")
with hfac.release_gradients(model, optimizer) as handle:
    handle.reset()
given: dict[str, typing.Any] = {"lr": "1e-3", "betas": "(0.9,0.95)"}  # of a command line
hfac.HFac(model.parameters(), **given)
"""
#: One mistake in each line.
WRONG = """
hfac.HFac(params, first_moment="int4")
hfac.HFac(params, matricize="square")
hfac.HFac(params, rounding="stochastik")
hfac.HFac(params, 1e-3, (0.9, 0.99), 1e-30, 0.1)
hfac.HFac(params, learning_rate=1e-3)
hfac.HFac(params, betas=0.9)
hfac.HFac(params, lr="1e-3")
hfac.HFac(params, eps="1e-30")
hfac.HFac(params, clip_threshold="none")
hfac.HFac(params, backend="gpu")
hfac.HFac(params, beta=0.9)
hfac.HFac("params")
hfac.SMMF(params, master="half")
hfac.SMMF(params, signs="bool")
hfac.SMMF(params, weight_decay_mode="decoupled")
hfac.SMMF(params, nonfinite=True)
hfac.SMMF(params, beta="0.9")
hfac.SMMF(params, growth_rate="1")
hfac.SMMF(params, max_grad_norm="1.0")
hfac.SMMF(params, batch_dims="1")
hfac.param_groups(model, learning_rate=5.0)
hfac.param_groups(model, rounding="up")
hfac.param_groups(model, lr="1e-3")
hfac.param_groups(model.parameters())
hfac.convert({}, to="adam")
hfac.convert({}, to="adamw", first_moment="int8")
hfac.convert({}, to="smmf", first_moment="int8")
hfac.convert({}, to="smmf", capturable=True)
hfac.convert({}, decay_rate=-0.8)
hfac.HFac(params).step(lambda x: x)
hfac.HFac(params).diagnostics(True)
hfac.release_gradients(model, torch.optim.SGD(params))
hfac.release_gradients(model, hfac.HFac(params), accumulate="2")
"""
PREAMBLE = """
import typing

import torch
import hfac

model = torch.nn.Linear(4, 3)
params = model.parameters()
"""


def lines_by_mypy(folder):
    """Of each script the lines that mypy --strict finds wrong, and all that it said."""
    api = pytest.importorskip("mypy.api", reason="mypy checks it")
    arguments = ["--strict", "--cache-dir", str(folder / "cache"), "--config-file", ""]
    told, problems, _ = api.run([*arguments, *map(str, sorted(folder.glob("*.py")))])
    assert not problems
    return {(name, int(line)) for name, line in re.findall(r"(\w+)\.py:(\d+): error", told)}, told


def lines_by_pyright(folder):
    """The same by pyright."""
    pytest.importorskip("pyright", reason="pyright checks it")
    if shutil.which("node") is None:
        pytest.skip("pyright runs in node, which is not here")
    # An editable install is found by a hook at import, which a type checker does not run; and files named on the
    # command line would make pyright leave its settings unread.
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(Path(hfac.__file__).parents[1])]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", folder]
    told = subprocess.run(command, capture_output=True, text=True)
    found = [each for each in json.loads(told.stdout)["generalDiagnostics"] if each["severity"] == "error"]
    places = {(re.search(r"(\w+)\.py$", each["file"])[1], each["range"]["start"]["line"] + 1) for each in found}
    return places, told.stdout


@pytest.mark.slow
@pytest.mark.parametrize("checked", [lines_by_mypy, lines_by_pyright])
def test_a_type_checker_knows_the_options(tmp_path, checked):
    right, wrong = "import typing\n" + RIGHT, PREAMBLE + WRONG
    (tmp_path / "right.py").write_text(right)
    (tmp_path / "wrong.py").write_text(wrong)
    found, told = checked(tmp_path)
    mistakes = range(len(PREAMBLE.splitlines()) + 2, len(wrong.splitlines()) + 1)
    assert found == {("wrong", line) for line in mistakes}, told


def test_the_options_by_name_are_those_of_the_constructors():
    """`hfac.types` lists them a second time, for arguments that are passed on."""

    def taken(cls):
        hints = typing.get_type_hints(cls.__init__)
        names = [each.name for each in inspect.signature(cls).parameters.values() if each.name != "params"]
        return {name: hints[name] for name in names}

    kept = {**typing.get_type_hints(types.HFacOptions), **typing.get_type_hints(types.SMMFOptions)}
    groups = typing.get_type_hints(types.GroupOptions)
    decided = {"weight_decay", "dense", "batch_dims", "views", "views_dim"}
    execution = {"capturable", "backend", "amp_scaling", "watch"}
    every = {**taken(hfac.HFac), **taken(hfac.SMMF)}
    for cls, options in ((hfac.HFac, types.HFacOptions), (hfac.SMMF, types.SMMFOptions)):
        own = {name: hint for name, hint in taken(cls).items() if name not in execution}
        assert typing.get_type_hints(options) == own
    assert groups == {name: hint for name, hint in every.items() if name not in decided}
    assert kept.keys() | execution == every.keys()
