"""What a type checker says of a user's script: nothing of a right one, and every misspelt option."""

import re

import pytest

RIGHT = """
import torch
import hfac

model = torch.nn.Linear(4, 3)
optimizer = hfac.HFac(model.parameters(), 1e-3, (0.9, 0.99), first_moment="int8", rounding="stochastic", master=None)
other = hfac.SMMF(
    hfac.param_groups(model, weight_decay=0.1), lr=torch.tensor(1e-3), beta=None, weight_decay_mode="adam"
)
named = hfac.HFac(model.named_parameters(), nonfinite="skip", max_grad_norm=1.0)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
optimizer.step()
loss: float = other.step(lambda: 1.0)
optimizer.step_param(model.weight, lr_scale=0.5)
converted: dict[str, object] = hfac.convert(optimizer.state_dict(), model.parameters(), to="smmf")
"""
WRONG = """
import torch
import hfac

params = torch.nn.Linear(4, 3).parameters()
hfac.HFac(params, first_moment="int4")
hfac.HFac(params, rounding="stochastik")
hfac.HFac(params, 1e-3, (0.9, 0.99), 1e-30, 0.1)
hfac.HFac(params, learning_rate=1e-3)
hfac.HFac(params, betas=0.9)
hfac.SMMF(params, master="half")
hfac.SMMF(params, weight_decay_mode="decoupled")
hfac.SMMF(params, nonfinite=True)
hfac.SMMF(params, beta="0.9")
hfac.convert({}, to="adam")
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_options(tmp_path):
    api = pytest.importorskip("mypy.api", reason="mypy checks it")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    cache = ["--strict", "--cache-dir", str(tmp_path / "cache"), "--config-file", ""]
    told, problems, _ = api.run([*cache, str(tmp_path / "right.py"), str(tmp_path / "wrong.py")])
    assert not problems
    found = {name: set(map(int, re.findall(rf"{name}\.py:(\d+): error", told))) for name in ("right", "wrong")}
    lines = WRONG.splitlines()
    first = lines.index('hfac.HFac(params, first_moment="int4")') + 1
    assert found == {"right": set(), "wrong": set(range(first, len(lines) + 1))}, told
