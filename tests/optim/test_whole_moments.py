"""H-Fac's whole moments on every backend: the published trajectories, and steps that never go against their gradient,
however large it is. Where Triton's kernels are interpreted, tests/backends/test_triton.py runs this file once more."""

import copy
from functools import cache

import pytest
import torch
from running import bits, gradients, parameters
from suites import KERNELS
from test_parity import ieee_square_roots
from test_vectors import CASES, TOLERANCE, follow
from torch.nn import Parameter

from hfac import HFac

__all__ = ["ieee_square_roots"]  # a fixture of every test here
LARGER = (1.0, 2.0, 5.0, 20.0, 100.0)
#: shape -> options: vectors of one and of several of a kernel's runs, what is dense, a stack of vectors
SHAPES = {
    (): {},
    (1,): {},
    (300,): {},
    (9001,): {},
    (1, 64): {},
    (64, 1): {},
    (24, 18): {"dense": True},
    (3, 700): {"batch_dims": 1},
}
VARIANTS = {
    "plain": {},
    "tight": {"clip_threshold": 0.1},
    "maximize": {"maximize": True},
    "skip": {"nonfinite": "skip"},
    "watch": {"watch": True},
    "capturable": {"capturable": True},
    "max-grad-norm": {"max_grad_norm": 1.0},
    "stochastic": {"rounding": "stochastic"},
    "split": {"master": "split"},
    "float64": {},
}
DTYPES = {"stochastic": torch.bfloat16, "split": torch.bfloat16, "float64": torch.float64}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_published_trajectories(backend, dtype):
    """Those of vectors, scalars and single rows; tests/optim/test_vectors.py has them all, of the reference."""
    whole = [case for case in CASES if case["optimizer"] == "HFac" and min(case["shape"], default=1) in (1, 7)]
    whole = [case for case in whole if len(case["shape"]) < 2 or 1 in case["shape"]]
    assert len(whole) == 12
    for case in whole:
        follow(case, dtype, backend)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize(
    ("threshold", "shapes"),
    [(None, SHAPES), (1e6, SHAPES), (0.7, [(), (1,)])],
    ids=["unclipped", "not-reached", "clipped"],
)
def test_bits_are_those_of_the_reference(backend, threshold, shapes):
    """One order of operations: where nothing is summed, or a sum does not matter, no bit differs."""
    left = []
    for name in (backend, "reference"):
        params = parameters(shapes)
        optimizer = HFac(params, clip_threshold=threshold, weight_decay=0.1, lr=0.02, dense=True, backend=name)
        for step in range(6):
            gradients(params, step, scale=1.0 + step)
            optimizer.step()
        left.append(bits([params, optimizer.state_dict()["state"]]))
    assert left[0] == left[1]


def optimizer_of(variant):
    """Weights of 0 and their optimizer."""
    params = [Parameter(torch.zeros(shape, dtype=DTYPES.get(variant, torch.float32))) for shape in SHAPES]
    groups = [{"params": [param], **options} for param, options in zip(params, SHAPES.values(), strict=True)]
    return params, HFac(groups, **VARIANTS[variant])


def drawn(seed):
    return [param.detach() for param in parameters(SHAPES, torch.float64, seed)]


@cache
def after_usual_steps(variant, alike):
    """State after 20 steps of the reference: with the gradients of one seed, or of one after the other."""
    params, optimizer = optimizer_of(variant)
    for group in optimizer.param_groups:
        group["backend"] = "reference"
    for seed in range(20):
        for param, grad in zip(params, drawn(0 if alike else seed), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()
    for state in optimizer.state.values():
        if "master_low" in state:
            state["master_low"].zero_()
    return optimizer.state_dict()


def steps_along(alike, larger, backend, variant):
    """[(gradient, step)] of each parameter, where the gradient is ``larger`` than the 20 before were. Weights are 0
    before the step, so that what is stored of the new ones is the step."""
    params, optimizer = optimizer_of(variant)
    optimizer.load_state_dict(copy.deepcopy(after_usual_steps(variant, alike)))
    for group in optimizer.param_groups:
        group["backend"] = backend
    for param, grad in zip(params, drawn(0 if alike else 20), strict=True):
        param.grad = (larger * grad).to(param.dtype)
    grads = [param.grad.double() for param in params]
    optimizer.step()
    sign = 1 if VARIANTS[variant].get("maximize") else -1
    return [(grad, sign * param.detach().double()) for grad, param in zip(grads, params, strict=True)]


@pytest.mark.pairwise
@pytest.mark.parametrize("larger", LARGER)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_element_goes_against_a_gradient_that_only_grows(backend, variant, larger):
    for grad, step in steps_along(True, larger, backend, variant):
        assert (grad * step > 0).all(), f"{tuple(grad.shape)}: {(grad * step).min()}"


@pytest.mark.pairwise
@pytest.mark.parametrize("larger", LARGER)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_goes_against_a_gradient_among_others(backend, variant, larger):
    """Gradients that have nothing in common, as noise has not; of a stack no slice."""
    for grad, step in steps_along(False, larger, backend, variant):
        if grad.numel() == 1:
            continue  # its first moment may well point the other way
        along = (grad * step).reshape(3 if grad.shape == (3, 700) else 1, -1).sum(1)
        assert (along > 0).all(), f"{tuple(grad.shape)}: {along}"
