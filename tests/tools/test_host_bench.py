"""`python -m bench.host`: rows of what a warm step costs the host, and that nothing but the host works meanwhile."""

import json

import emulated
import pytest
import torch

from bench import host

pytestmark = pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(host, "LISTS", {"tiny": lambda: [(64, 32), (64,)]})
    monkeypatch.setattr(host, "TURN", 2)


def test_rows_of_every_backend_optimizer_and_mode(tiny, capsys):
    host.main(["--json", "--backends", "cuda", "cpu", "torch", "--seconds", "0.001"])
    rows = json.loads(capsys.readouterr().out)
    found = {(row["backend"], row["optimizer"], row["mode"]) for row in rows}
    assert found == {
        *((backend, name, mode) for backend in ("cuda", "cpu") for name in host.OPTIMIZERS for mode in host.MODES),
        *(("torch", name, mode) for name in host.RIVALS for mode in ("plain", "clipped")),
    }
    for row in rows:
        assert row["list"] == "tiny" and row["us"] > 0
        assert row["us_per_tensor"] == pytest.approx(row["us"] / 2)


def test_launches_are_counted_and_do_nothing(tiny):
    with host.idle_cuda(), host.unread():
        one = host.contestant("cuda", "SMMF", "tiny", "plain", [(64, 32), (64,)])
        before = [param.detach().fill_(2).clone() for param in one.params]  # contestants' memory is whatever was there
        one.time()
        emulated.native.take_launches()
        one.step()
        assert emulated.native.take_launches() > 0
        assert all(torch.equal(param, old) for param, old in zip(one.params, before, strict=True))
    emulated.native.take_launches()
    optimizer = host.hfac.SMMF(one.params, backend="cpu")
    optimizer.step()  # outside, backends are what they were
    assert emulated.native.take_launches() == 0
