"""Every backend against the reference: ops x shapes x types x options, twenty steps each, states compared.

Each step starts from the same state. Trajectories are not compared from end to end: SMMF's sign is discontinuous, so an
element of its first moment that is within rounding of zero may come back with the other sign and the full magnitude.
"""

import copy

import numpy as np
import pytest
import torch
from cases import DTYPES, OPTIONS, SHAPES, codes_agree, gradient, shape_id, smmf_agrees

import hfac
from hfac import backends

BACKENDS = [name for name in backends.available(torch.device("cpu")) if name != "reference"]
STEPS = 20


@pytest.fixture(autouse=True)
def ieee_square_roots(monkeypatch):
    """torch's CPU square root may come from a vector library that is allowed one ulp; IEEE's, which the backends use,
    is rounded correctly. With it the reference can be compared to the bit."""
    root = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.as_tensor(np.sqrt(x.numpy())) if x.is_cpu else root(x))


#: Two orders of summation differ by rounding: bounds relative to the largest magnitude that enters a sum.
SUMS = {torch.float32: 4e-6, torch.float64: 1e-14}


def states_agree(name, ours, theirs, grad, slack=1.0):
    """Compares two states of one parameter; sums relative to what was summed, with ``slack`` for very long ones."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if value.dtype == torch.uint8 or key in ("step", "skipped"):
            assert torch.equal(ours[key], value), key
            continue
        if value.numel() == 0 or grad.numel() == 0:
            assert torch.equal(ours[key], value), key
            continue
        if value.dtype == torch.int8:
            assert codes_agree(ours[key], value), key
            continue
        scale = value.abs().max()
        if name == "HFac" and key in ("exp_avg_row", "exp_avg_col"):  # means, whose terms may cancel
            scale = torch.maximum(scale, grad[grad.isfinite()].abs().max().to(value.dtype))
        error = (ours[key] - value).abs().max()
        assert error <= slack * SUMS[value.dtype] * scale, f"{key} is off by {error / scale:.3g} of {scale:.3g}"


def params_agree(name, ours, theirs, before, lr, slack=1.0, backend=""):
    """SMMF's parameter is the reference's to the bit (`smmf_agrees`). H-Fac's depends on all sums of this step."""
    if name == "SMMF":
        assert smmf_agrees(ours, theirs, before, lr, backend)
        return
    wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
    info = torch.finfo(ours.dtype)
    ulp = info.eps * theirs.to(wide).abs().clamp(min=info.tiny)  # subnormal numbers lie no closer
    error = (ours.to(wide) - theirs.to(wide)).abs()
    # The update is of order lr, and far larger where a row or a column has been quiet.
    bound = ulp + 20 * slack * SUMS[wide] * (lr + (theirs.to(wide) - before.to(wide)).abs())
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # a float16 may have become infinite
    assert (same | (error <= bound)).all(), f"off by {(error / bound)[~same].max():.3g} of the bound"


def truncated_agree(name, ours, theirs, before, lr, backend=""):
    """As `params_agree`, in Triton's interpreter, whose stores truncate: a bfloat16 may be one ulp off."""
    if ours.dtype != torch.bfloat16:
        params_agree(name, ours, theirs, before, lr, backend="triton")
        return
    ulp = torch.finfo(torch.bfloat16).eps * theirs.float().abs()
    off = (theirs.float() - ours.float()).abs()
    slack = 0 if name == "SMMF" else ulp + 1e-4 * (lr + (theirs.float() - before.float()).abs())
    assert (off <= ulp + slack).all(), f"off by {(off / ulp).max():.3g} ulp"


@pytest.mark.pairwise
@pytest.mark.skipif(not BACKENDS, reason="no backend but the reference is built here: hfac doctor says why")
@pytest.mark.parametrize("backend", BACKENDS or ["none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize(("name", "options"), [(name, key) for name, rows in OPTIONS.items() for key in rows])
def test_twenty_steps(backend, name, options, shape, dtype):
    kwargs = OPTIONS[name][options]
    param = torch.nn.Parameter(gradient(shape, 0, dtype))
    optimizer = getattr(hfac, name)([param], **kwargs, backend=backend)
    twin = torch.nn.Parameter(param.detach().clone())
    reference = getattr(hfac, name)([twin], **kwargs, backend="reference")
    for step in range(1, STEPS + 1):
        twin.data.copy_(param.data)
        reference.state[twin] = copy.deepcopy(optimizer.state[param])
        grad = gradient(shape, step, dtype)
        if options == "skip" and step in (3, 4, 11) and grad.numel():
            grad.view(-1)[step % grad.numel()] = float("inf") if step == 3 else float("nan")
        param.grad = twin.grad = grad
        before = param.detach().clone()
        optimizer.step()
        reference.step()
        params_agree(name, param.detach(), twin.detach(), before, kwargs["lr"], backend=backend)
        states_agree(name, optimizer.state[param], reference.state[twin], grad)
    if options == "skip" and param.numel():
        assert optimizer.state[param]["skipped"] == sum(step <= STEPS for step in (3, 4, 11))


def step_with(optimizer, params, grads):
    """A step on gradients that `.grad` does not take."""
    group = optimizer.param_groups[0]
    with torch.no_grad():
        bound = optimizer._bind(group, params, grads, range(len(params)))
        bound.prepare(grads, **optimizer._options(group)).apply()


@pytest.mark.pairwise
@pytest.mark.skipif(not BACKENDS, reason="no backend but the reference is built here: hfac doctor says why")
@pytest.mark.parametrize("backend", BACKENDS or ["none"])
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_list_with_gradients_of_another_type(backend, name, dtype, grad_dtype):
    shapes = [shape for shape in SHAPES if len(shape) != 5]
    kwargs = OPTIONS[name]["all"]
    params = [torch.nn.Parameter(gradient(shape, 0, dtype)) for shape in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = getattr(hfac, name)(params, **kwargs, backend=backend)
    reference = getattr(hfac, name)(twins, **kwargs, backend="reference")
    for step in range(1, 4):
        for p, q in zip(params, twins, strict=True):
            q.data.copy_(p.data)
            reference.state[q] = copy.deepcopy(optimizer.state[p])
        grads = [gradient(shape, step, grad_dtype) for shape in shapes]
        before = [p.detach().clone() for p in params]
        lists = ((optimizer, params), (reference, twins))
        for opt, tensors in lists:
            # A parameter's .grad must have its type, so lists go through the functional form.
            step_with(opt, tensors, grads)
        for p, q, old, grad in zip(params, twins, before, grads, strict=True):
            params_agree(name, p.detach(), q.detach(), old, kwargs["lr"], backend=backend)
            states_agree(name, optimizer.state[p], reference.state[q], grad)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", OPTIONS)
def test_autograd_notices_the_write(name, backend):
    """A graph that saved a parameter's old value must not be walked after the step, whoever wrote the new one."""
    param = torch.nn.Parameter(torch.ones(4, 6))
    vector = torch.nn.Parameter(torch.ones(7))
    optimizer = getattr(hfac, name)([param, vector], backend=backend)
    losses = [(p * p * p).sum() for p in (param, vector)]
    for p in (param, vector):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
