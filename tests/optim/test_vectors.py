"""Trajectories of the published SMMF and of H-Fac's equations: six steps, the fourth on a zero gradient.

`data/published.json` lists the cases, `data/published.npz` their arrays: `w0`, gradients `g` [6, ...], `w` after
steps 1, 4 and 6, and the state after step 6, all computed in float64; SMMF by its authors' code.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hfac
from hfac.signs import unpack_signs

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "published.json").read_text())
ARRAYS = np.load(DATA / "published.npz")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}  # relative to the largest value of the array
SMMF_NAMES = {
    "momentum_m_row": "exp_avg_row",
    "momentum_m_col": "exp_avg_col",
    "momentum_v_row": "exp_avg_sq_row",
    "momentum_v_col": "exp_avg_sq_col",
    "momentum_m": "exp_avg",
    "momentum_v": "exp_avg_sq",
}


def published_state(case: dict, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The case's final state under our names, and whole where our state is whole."""
    state = {name: array for name, array in arrays.items() if name not in ("w0", "g", "w")}
    if case["optimizer"] == "HFac":
        return state
    sign = state.pop("sign", None)
    if "momentum_v_col" in state and len(state["momentum_v_col"]) == 1:
        state = {
            moment: state[f"{moment}_row"] * state[f"{moment}_col"]
            for moment in ("momentum_m", "momentum_v")
            if f"{moment}_row" in state
        }
        if sign is not None:
            state["momentum_m"] = torch.where(sign.flatten(), state["momentum_m"], -state["momentum_m"])
        sign = None
    state = {SMMF_NAMES[name]: value for name, value in state.items()}
    if sign is not None:
        state["sign"] = sign
    return state


def follow(case: dict, dtype: torch.dtype, backend: str) -> None:
    """Makes the case's steps, and fails where they leave its trajectory."""
    prefix = case["key"] + "_"
    arrays = {
        name.removeprefix(prefix): torch.from_numpy(ARRAYS[name]) for name in ARRAYS.files if name.startswith(prefix)
    }
    param = torch.nn.Parameter(arrays["w0"].to(dtype))
    optimizer = getattr(hfac, case["optimizer"])([param], **case["kwargs"], backend=backend)

    def agree(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        error = (ours.double().reshape(-1) - theirs.reshape(-1)).abs().max()
        assert error <= TOLERANCE[dtype] * theirs.abs().max(), f"{name} is off by {error}"

    for step, grad in enumerate(arrays["g"], start=1):
        param.grad = grad.to(dtype)
        optimizer.step()
        if step in (1, 4, 6):
            agree(f"w after step {step}", param.detach(), arrays["w"][(1, 4, 6).index(step)])

    state = optimizer.state[param]
    expected = published_state(case, arrays)
    assert state.keys() - {"step", "exp_avg_sign"} == expected.keys() - {"sign"}
    for name, value in expected.items():
        if name == "sign":
            signs = unpack_signs(state["exp_avg_sign"], param.shape)
            assert torch.equal(signs.reshape(value.shape), value)
        else:
            agree(name, state[name], value)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['key']}-{'x'.join(map(str, case['shape']))}")
def test_published_trajectory(case, dtype):
    follow(case, dtype, "reference")
