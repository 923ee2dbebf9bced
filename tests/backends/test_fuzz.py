"""Random lists of tensors, layouts, types and options: every backend against the reference, from the same states.

Some in `make test`, more in `make test-all`, always the same ones; `make fuzz` takes new ones each time,
HFAC_FUZZ_LISTS of them.
"""

import copy
import os

import pytest
import torch
from cases import DTYPES, gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suites import KERNELS
from test_parity import ieee_square_roots, params_agree, states_agree  # noqa: F401 (a fixture)
from test_rounding import STORED, stored_agree, value_of, without_low
from torch.nn import Parameter

import hfac
from hfac.backends import cpu

LISTS = int(os.environ.get("HFAC_FUZZ_LISTS", "0"))
STEPS = 3

SIZES = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 257]))
LONG = st.integers(1000, 40000)
UNIT = st.floats(0.0, 0.999)


def shapes():
    short = st.lists(SIZES, max_size=4).map(tuple).filter(lambda shape: torch.Size(shape).numel() <= 70000)
    long = st.tuples(LONG) | st.tuples(LONG, st.integers(1, 3)) | st.tuples(st.integers(1, 3), LONG)
    return short | short | long | st.tuples(st.integers(129, 700), st.integers(129, 300))


@st.composite
def layouts(draw, ndim):
    """How a tensor of that many dimensions lies in memory: order of dimensions, steps between elements, offset."""
    plain = draw(st.booleans())
    order = list(range(ndim)) if plain else draw(st.permutations(range(ndim)))
    steps = [1] * ndim if plain else [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(ndim)]
    return order, steps, draw(st.sampled_from([0, 0, 1, 3]))


def laid_out(values, layout, expanded=False):
    """A tensor with these values that lies in memory as ``layout`` says; ``expanded``: its first dimension has stride
    0, and every slice is the first."""
    order, steps, offset = layout
    outer = [values.shape[d] * steps[d] for d in order]
    storage = torch.full((offset + torch.Size(outer).numel(),), float("nan"), dtype=values.dtype)
    view = storage[offset:].view(outer)
    view = view[tuple(slice(None, None, steps[d]) for d in order)]
    view = view.permute([order.index(d) for d in range(values.ndim)])
    view.copy_(values)
    if expanded and values.ndim and values.shape[0] > 1:
        return view[:1].expand(values.shape)
    return view


def options(name):
    """None of them at its neutral value for long, all of them at it now and then."""
    common = {
        # No power of two: SMMF's first update may be lr itself, and a weight less that halfway between two of 16 bits,
        # where the last place of an approximate root decides of many at once.
        "lr": st.floats(1e-4, 0.1).map(lambda lr: 0.99 * lr),
        "weight_decay": st.just(0.0) | st.floats(0.01, 0.5),
        "maximize": st.booleans(),
        "nonfinite": st.sampled_from(["propagate", "skip"]),
        "watch": st.booleans(),
        # Never reached: clipped or not, rounding of the norm would show in every number. H-Fac then steps in two calls.
        "max_grad_norm": st.sampled_from([None, None, 1e30]),
    }
    if name == "HFac":
        own = {
            "betas": st.tuples(UNIT, UNIT),
            "eps": st.sampled_from([1e-30, 1e-12, 1e-6]),
            "clip_threshold": st.none() | st.floats(0.1, 3.0),
            "matricize": st.sampled_from(["balanced", "flatten"]),
            "first_moment": st.sampled_from(["factored", "int8"]),
        }
    else:
        own = {
            "beta": st.none() | UNIT,
            "eps": st.floats(1e-8, 1e-3),
            "decay_rate": st.floats(-1.0, -0.1),
            "growth_rate": st.floats(0.1, 1.0),
            "vector_reshape": st.booleans(),
            "weight_decay_mode": st.sampled_from(["adamw", "adam"]),
        }
    return st.fixed_dictionaries({**common, **own})


@st.composite
def problems(draw):
    name = draw(st.sampled_from(["HFac", "SMMF"]))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(shapes())
        tensors.append(
            {
                "shape": shape,
                "dtype": draw(st.sampled_from(DTYPES)),
                "layout": draw(layouts(len(shape))),
                "grad_layout": draw(layouts(len(shape))),
                "expanded": draw(st.sampled_from([False, False, False, True])),
                "bad": draw(st.sampled_from([None, None, None, float("inf"), float("nan")])),
            }
        )
    return {
        "name": name,
        "options": draw(options(name)),
        "tensors": tensors,
        "stored": draw(st.sampled_from([None, None, *STORED])),
        "seed": draw(st.integers(0, 2**16)),
        "threads": draw(st.integers(1, 3)),
        "isa": draw(st.sampled_from(cpu._C.info()["isa_usable"])) if cpu._C is not None else "",
    }


def rounding(tensor):
    """How much more the errors of a long sum may grow than those of the parity table's: as the root of its length, or,
    where all terms are equal and so round the same way, as the length."""
    length = max(tensor["shape"], default=1)
    return max(1.0, length / 64 if tensor["expanded"] else length**0.5 / 16)


@pytest.fixture
def threads_and_isa():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if cpu._C is not None:
        cpu._C.set_isa("")


#: The lists of a shorter run are the first of a longer one.
FEW, MANY = pytest.param(12, marks=pytest.mark.partial), pytest.param(100, marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("lists", [LISTS] if LISTS else [FEW, MANY])
def test_any_list(threads_and_isa, backend, lists):
    @settings(
        max_examples=lists,
        derandomize=not LISTS,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(problem=problems())
    def compare(problem):
        agrees(backend, problem)

    compare()


def agrees(backend, problem):
    name, kwargs = problem["name"], problem["options"]
    if cpu._C is not None:
        cpu._C.set_isa(problem["isa"])
    torch.set_num_threads(problem["threads"])
    tensors = problem["tensors"]
    if problem["stored"] is not None:
        # Of other types than the option's are those that it leaves alone, and float16, which has no master weights.
        wanted, more = STORED[problem["stored"]]
        tensors = [{**t, "dtype": t["dtype"] if t["dtype"].itemsize > 2 else wanted} for t in tensors]
        kwargs = {**kwargs, **more}
    params = [Parameter(laid_out(gradient(t["shape"], problem["seed"], t["dtype"]), t["layout"])) for t in tensors]
    twins = [Parameter(param.detach().clone()) for param in params]
    optimizer = getattr(hfac, name)(params, **kwargs, backend=backend)
    reference = getattr(hfac, name)(twins, **kwargs, backend="reference")
    for step in range(1, STEPS + 1):
        for param, twin, t in zip(params, twins, tensors, strict=True):
            twin.data.copy_(param.data)
            reference.state[twin] = copy.deepcopy(optimizer.state[param])
            grad = gradient(t["shape"], problem["seed"] + step, t["dtype"])
            if t["bad"] is not None and kwargs["nonfinite"] == "skip" and step == 2 and grad.numel():
                grad.view(-1)[problem["seed"] % grad.numel()] = t["bad"]
            param.grad = laid_out(grad, t["grad_layout"], t["expanded"])
            twin.grad = param.grad.clone(memory_format=torch.contiguous_format)
        before = [(param.detach().clone(), value_of(param, optimizer.state[param])) for param in params]
        optimizer.step()
        reference.step()
        for param, twin, (old, value), t in zip(params, twins, before, tensors, strict=True):
            slack, ours, theirs = rounding(t), optimizer.state[param], reference.state[twin]
            if param.dtype.itemsize == 2:
                stored_agree(name, param, ours, twin, theirs, value, kwargs["lr"], slack, backend)
            else:
                params_agree(name, param.detach(), twin.detach(), old, kwargs["lr"], slack)
            states_agree(name, without_low(ours), without_low(theirs), twin.grad, slack)
