"""The road of a warm step, from `optimizer.step()` to the CUDA kernels' launch: how many calls, how many files."""

import sys
from collections import Counter
from pathlib import Path

import emulated
import pytest
import torch
from torch.nn import Parameter

import hfac

pytestmark = pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)
PACKAGE = str(Path(hfac.__file__).parent)


class Road:
    """What of the package one step calls: by function, and the calls that are open where the kernels are launched."""

    def __init__(self, step, platform, monkeypatch):
        self.calls, self.files, self.open, self.launches = Counter(), set(), [], []
        before = platform.before_launch
        monkeypatch.setattr(platform, "before_launch", lambda room: before(room) or self.launches.append([*self.open]))
        sys.setprofile(self._note)
        try:
            step()
        finally:
            sys.setprofile(None)

    def _note(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            self.calls[code.co_qualname] += 1
            self.files.add(code.co_filename)
            self.open.append(code.co_qualname)
        elif event == "return":
            self.open.pop()


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_warm_step_is_five_calls_in_eighteen_files(name, moved, options, emulated_backend, monkeypatch):
    """One descent to check, one to launch: no layer is asked twice. The last calls are repeated, wherever gradients
    lie, and nothing else is made anew for them, whoever counts steps."""
    param = Parameter(torch.randn(24, 16))
    optimizer = getattr(hfac, name)([param], backend=emulated.NAME, **options)
    for _ in range(2):
        param.grad = torch.randn(24, 16)
        optimizer.step()
        old = param.grad  # whose memory the next one does not get
    if moved:
        param.grad = torch.randn(24, 16)
        assert param.grad.data_ptr() != old.data_ptr()
    road = Road(optimizer.step, emulated.ops.platform, monkeypatch)
    (launch,) = road.launches
    wrappers = [call for call in launch if ".<locals>." in call]
    assert launch[: len(wrappers)] == wrappers and len(wrappers) <= 3  # of torch's compiler, of hooks, of autograd
    del launch[: len(wrappers)]
    expected = ["FactoredOptimizer.step", "Repeated.apply", "OpCall.again", "CudaCall.again", "Planned.again"]
    assert launch == expected  # and the extension's launch is the last
    assert len(road.files) <= 18, sorted(road.files)
    once = (*expected, "Group.repeated", "Group.look", *["Planned.look"] * moved)
    assert {call: road.calls[call] for call in once} == dict.fromkeys(once, 1)
    assert not any(road.calls[call] for call in ("OpCall.prepare", "OpCall.apply", "Group.prepare", "Step.apply"))


@pytest.mark.parametrize("moved", [False, True])
def test_a_clipped_step_repeats_statistics_and_update(moved, emulated_backend, monkeypatch):
    """Each of them once, from what the norm has left."""
    params = [Parameter(torch.randn(24, 16)), Parameter(torch.randn(40))]
    optimizer = hfac.HFac(params, backend=emulated.NAME, max_grad_norm=1.0)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        old = [param.grad for param in params]
    if moved:
        for param in params:
            param.grad = torch.randn_like(param)
        assert all(param.grad.data_ptr() != grad.data_ptr() for param, grad in zip(params, old, strict=True))
    road = Road(optimizer.step, emulated.ops.platform, monkeypatch)
    assert {call: road.calls[call] for call in ("CudaCall.statistics_again", "CudaCall.again", "Planned.again")} == {
        "CudaCall.statistics_again": 2,
        "CudaCall.again": 2,
        "Planned.again": 4,
    }
    assert not any(road.calls[call] for call in ("OpCall.prepare", "OpCall.apply", "Group.prepare", "Step.apply"))
    assert road.calls["Planned.look"] == 2 * moved
    assert len(road.launches) == 2  # whose workspace is filled before: statistics, from which the updates go on
