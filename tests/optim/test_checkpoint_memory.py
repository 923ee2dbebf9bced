"""How many copies of the state saving and loading make, in bytes that torch allocates: none that AdamW does not."""

import pytest
import torch
from torch.nn import Parameter

import hfac
from bench.memory import peak_transient_bytes

CPU = torch.device("cpu")
CASES = {"HFac": (hfac.HFac, {}), "int8": (hfac.HFac, {"first_moment": "int8"}), "SMMF": (hfac.SMMF, {})}
EACH = pytest.mark.parametrize("name", CASES)


def trained(name, seed=0):
    """After a step; four equal matrices, so that what is held for one tensor at a time is a quarter."""
    torch.manual_seed(seed)
    params = [Parameter(torch.randn(512, 256).bfloat16()) for _ in range(4)]
    cls, options = CASES[name]
    optimizer = cls(params, lr=1e-3, **options)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


def tensors(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


@EACH
def test_a_state_dict_is_no_copy(name):
    optimizer = trained(name)
    assert peak_transient_bytes(optimizer.state_dict, CPU) == 0
    saved = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    assert [value.data_ptr() for value in saved] == [value.data_ptr() for value in tensors(optimizer)]


@EACH
def test_state_that_was_filled_in_place_is_not_copied(name):
    """As torch.distributed.checkpoint fills what `state_dict` returned. Held is the check of one tensor's codes."""
    optimizer = trained(name)
    saved, before = optimizer.state_dict(), tensors(optimizer)
    for state in saved["state"].values():
        for value in state.values():
            value.copy_(torch.ones_like(value))
    held = peak_transient_bytes(lambda: optimizer.load_state_dict(saved), CPU)
    assert held <= max(value.nbytes for value in before) + 256
    assert [value.data_ptr() for value in tensors(optimizer)] == [value.data_ptr() for value in before]
    assert all(bool((value == 1).all()) for value in tensors(optimizer))


@EACH
def test_other_state_is_copied_once_in_its_own_type(name):
    """Torch's own loading would first copy it in the parameter's type: twice the bytes of codes, 16 times of signs."""
    optimizer, saved = trained(name), trained(name, 1).state_dict()
    state = sum(value.nbytes for value in tensors(optimizer))
    held = peak_transient_bytes(lambda: optimizer.load_state_dict(saved), CPU)
    assert state <= held + 256 <= 1.3 * state + 512
    theirs = {value.data_ptr() for entry in saved["state"].values() for value in entry.values()}
    assert not theirs & {value.data_ptr() for value in tensors(optimizer)}
