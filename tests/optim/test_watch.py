"""watch=True: what a step tells of itself, against what is computed of it ahead, and against what it did."""

import contextlib

import pytest
import torch
from cases import gradient, shape_id
from running import VARIANTS, Int8, bits, gradients, parameters, train
from suites import BACKENDS
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import SMMF, HFac, ops

#: see test_estimates.py
pytestmark = pytest.mark.filterwarnings("ignore:hfac.SMMF.diagnostics:FutureWarning")
BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
SHAPES = [(24, 18), (7,), (24,), (6, 4, 3, 3), (31, 8), (300, 40), (1, 64), (), (0, 3), (5, 0)]
NAN = float("nan")


def agree(found, wanted, numel, tolerance, name=""):
    """Metrics of one parameter or slice. Counts may differ by one where a sum is rounded otherwise."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        ours = found[key]
        assert ours.shape == value.shape
        if key == "unmoved":
            assert ((ours - value).abs() <= (1 if tolerance > 1e-7 else 0) / numel + 1e-7).all(), (name, key)
        else:
            torch.testing.assert_close(
                ours.double(), value.double(), rtol=tolerance, atol=1e-12, equal_nan=True, msg=f"{name} {key}"
            )


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_as_it_was_foretold(cls, options, dtype, backend):
    """`diagnostics(ahead=True)`, an implementation of its own, of the step that is then made; and no bit of the step
    changes. Weights are near zero, so that float32 rounds their change little."""
    params, twins = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    for param in (*params, *twins):
        param.detach().mul_(1e-3)
    watched = cls(params, **options, backend=backend, watch=True)
    plain = cls(twins, **options, backend=backend)
    tolerance = 1e-7 if dtype == torch.float64 else 2e-5
    for step in range(4):
        for tensors in (params, twins):
            gradients(tensors, step)
            tensors[0].grad[3] = 0
            tensors[0].grad[:, 5:7] = 0
            tensors[3].grad = None if step == 2 else tensors[3].grad
        foretold = watched.diagnostics(ahead=True)
        watched.step()
        plain.step()
        told = watched.diagnostics()
        assert bits(params) == bits(twins) and bits(watched.state_dict()["state"]) == bits(plain.state_dict()["state"])
        assert set(told) == set(range(len(SHAPES) - 2))
        assert (float(told[0]["zero_rows"]), float(told[0]["zero_cols"])) == (1, 2)
        for index, wanted in foretold.items():
            agree(told[index], wanted, params[index].numel(), tolerance, f"step {step} parameter {index}")


@pytest.mark.pairwise
@BOTH
@pytest.mark.parametrize("how", [{}, {"rounding": "stochastic"}, {"master": "split"}, {"master": "split8"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_stays_is_that_of_what_is_stored(cls, how, dtype, backend):
    """Rounded to the nearest, whatever the step draws; master weights as they are stored. Here some stay."""
    if dtype == torch.float16 and "master" in how:
        return  # refused
    params = parameters([(64, 48), (127,)], dtype)
    options = dict(lr=3e-3 if dtype == torch.bfloat16 else 5e-4, **how)
    if how.get("master") == "split8":
        options["lr"] = 2e-5
    optimizer = cls(params, **options, backend=backend, watch=True)
    fractions = []
    for step in range(3):
        gradients(params, step)
        foretold = optimizer.diagnostics(ahead=True)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        for index, wanted in foretold.items():
            told = optimizer.diagnostics()[index]
            told["update_rms"] = wanted["update_rms"]  # weights of 1 are float32's as little as the change is large
            agree(told, wanted, params[index].numel(), 1e-4)
            if not how and backend != "triton":  # whose interpreter truncates where it should round
                assert float(told["unmoved"]) == pytest.approx((params[index] == before[index]).double().mean().item())
            fractions.append(float(told["unmoved"]))
    assert how == {"master": "split"} or 0.02 < sum(fractions) / len(fractions) < 0.98


@BOTH
def test_it_is_kept_when_gradients_are_gone(cls, backend):
    """And it is the last step's of each parameter, not that of a step that it did not make."""
    params = parameters([(6, 4), (5,)])
    optimizer = cls(params, backend=backend, watch=True)
    assert optimizer.diagnostics() == {}
    gradients(params, 0)
    optimizer.step()
    first = optimizer.diagnostics()
    optimizer.zero_grad()
    assert bits(optimizer.diagnostics()) == bits(first)
    gradients(params[:1], 1)
    optimizer.step()
    second = optimizer.diagnostics()
    assert bits(second[0]) != bits(first[0]) and bits(second[1]) == bits(first[1])
    found = optimizer.report_per_parameter_metrics(params[1], "w", {"loss": 1})
    assert found["loss"] == 1 and bits(found["update_rms/w"]) == bits(first[1]["update_rms"])
    optimizer.load_state_dict(optimizer.state_dict())
    params[0].grad = None
    assert optimizer.diagnostics() == {}


@BOTH
def test_a_step_that_was_not_made(cls, backend):
    params = parameters([(6, 4), (3, 5), (5,), (4,)])
    optimizer = cls(params, backend=backend, watch=True, nonfinite="skip")
    gradients(params, 0)
    params[1].grad[1, 1] = params[3].grad[2] = NAN
    optimizer.step()
    told = optimizer.diagnostics()
    for index in range(4):
        made = index % 2 == 0
        assert told[index]["skipped"] == (not made)
        for key, value in told[index].items():
            assert key == "skipped" or value.isfinite() == made, key
    amp = cls(parameters([(6, 4)]), backend=backend, watch=True, amp_scaling=True)
    gradients(amp.param_groups[0]["params"], 0)
    amp.grad_scale, amp.found_inf = torch.tensor([2.0]), torch.tensor([1.0])
    amp.step()
    assert amp.diagnostics()[0]["update_rms"].isnan() and amp.diagnostics()[0]["direction_rms"].isnan()


@BOTH
def test_of_stacks_each_slice(cls, backend):
    param = Parameter(torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = cls([param], batch_dims=2, backend=backend, watch=True, nonfinite="skip")
    for step in range(2):
        gradients([param], step)
        param.grad[1, 0, 0] = 0
        if step:
            param.grad[0, 2, 3, 3] = NAN
        foretold = optimizer.diagnostics(ahead=True)[0]
        optimizer.step()
    told = optimizer.diagnostics()[0]
    for i in range(2):
        for j in range(3):
            metrics = {key: value[i, j] for key, value in told.items()}
            if (i, j) == (0, 2):
                assert metrics["update_rms"].isnan()
                continue
            wanted = {key: value[i, j] for key, value in foretold.items()} | {"skipped": metrics["skipped"]}
            agree(metrics, wanted, 24, 1e-4, f"slice {i} {j}")
    assert told["zero_rows"][1, 0] == 1


@BOTH
@pytest.mark.parametrize("limit", [0.5, 1e4])
def test_clipped_gradients_count_as_they_are_stepped(cls, limit, backend):
    """Told by the step, computed after it, and computed ahead: whether gradients are multiplied in place or as they
    are read."""
    params = parameters([(24, 18), (7,), (3, 5)])
    for param in params:
        param.detach().mul_(1e-3)
    options = dict(max_grad_norm=limit, backend=backend, eps=1e-3)
    optimizer = cls(params, **options, watch=True)
    for step in range(3):
        gradients(params, step)
        foretold = optimizer.diagnostics(ahead=True)
        optimizer.step()
    told = optimizer.diagnostics()
    optimizer.param_groups[0]["watch"] = False
    after = optimizer.diagnostics()
    for index, param in enumerate(params):
        agree(told[index], foretold[index], param.numel(), 2e-5)
        if cls is HFac or index == 1:  # the rest is an estimate
            agree(after[index], told[index], param.numel(), 2e-5)


@BOTH
def test_released_gradients(cls):
    """They are gone when the backward pass is over; what their steps did is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = cls(model.named_parameters(), watch=True)
    with hfac.release_gradients(model, optimizer):
        for _ in range(2):
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
    assert all(param.grad is None for param in model.parameters())
    told = optimizer.diagnostics()
    assert set(told) == {name for name, _ in model.named_parameters()}
    assert all(entry["update_rms"] > 0 for entry in told.values())


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ kernels here: hfac doctor says why")
@BOTH
def test_any_number_of_threads_tells_the_same(cls):
    def told():
        params = parameters([(700, 300), (40_000,)])
        optimizer = cls(params, backend="cpu", watch=True)
        train(optimizer, params, 2)
        return bits(optimizer.diagnostics())

    before = torch.get_num_threads()
    found = []
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(told())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("shape", [(24, 18), (300, 40), (7,)], ids=shape_id)
@BOTH
def test_large_and_small_numbers(cls, shape, backend):
    """Gradients over five orders of magnitude: sums are made in double."""
    param = Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = cls([param], backend=backend, watch=True)
    for step in range(3):
        param.grad = gradient(shape, step)
        before = param.detach().clone()
        optimizer.step()
        told = optimizer.diagnostics()[0]["update_rms"]
        assert told.item() == pytest.approx((param.detach() - before).square().mean().sqrt().item(), rel=1e-6)


def test_a_bad_table_is_refused(backend):
    param = torch.ones(3)
    states = {"exp_avgs": [torch.zeros(3)], "exp_avg_sqs": [torch.zeros(3)]}
    bound = ops.OpCall("hfac_dense_step_", [param], states, backend=backend)
    scalars = dict(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, clip_threshold=1.0, weight_decay=0.0, maximize=False)
    wide = torch.zeros(1, 10, dtype=torch.float64)
    for bad in (wide[:, :4], wide[:, ::2], torch.zeros(1, 5)):
        with pytest.raises(ValueError, match=r"watched must be a contiguous float64 tensor of shape \(1, 5\) on cpu"):
            bound.prepare([param], watched=bad, **scalars)


@BOTH
def test_option(cls):
    with pytest.raises(TypeError, match="watch must be True or False"):
        cls(parameters([(3, 2)]), watch=1)
    optimizer = cls(parameters([(3, 2)]), watch=True)
    other = cls(parameters([(3, 2)]))
    other.load_state_dict(optimizer.state_dict())  # how a step is carried out is not part of a checkpoint
    assert not other.param_groups[0]["watch"]
