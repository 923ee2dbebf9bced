"""optimizer.diagnostics() against the change that a real step makes, with the old weights kept beside."""

import copy

import pytest
import torch
from cases import gradient, shape_id
from running import VARIANTS, bits, gradients, parameters, train
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from hfac import SMMF, HFac, matricize, rounding
from hfac.distributed import layout
from hfac.optim import diagnostics

#: see test_estimates.py
pytestmark = pytest.mark.filterwarnings("ignore:hfac.SMMF.diagnostics:FutureWarning")
BOTH = pytest.mark.parametrize("cls", [HFac, SMMF], ids=["hfac", "smmf"])
SHAPES = [(24, 18), (7,), (24,), (6, 4, 3, 3), (31, 8), (1, 64), ()]
TIMES = pytest.mark.parametrize("ahead", [False, True], ids=["after", "ahead"])


def stepped(optimizer, params, step, ahead):
    """Diagnostics of one step, and the parameters before it."""
    gradients(params, step)
    before = [param.detach().clone() for param in params]
    found = optimizer.diagnostics(ahead=True) if ahead else None
    optimizer.step()
    return (found if ahead else optimizer.diagnostics()), before


def estimated(cls, param, options, ahead):
    """SMMF's factored first moment, once a step has been made, and weight decay through the gradient."""
    if issubclass(cls, HFac) or ahead or matricize.square(param.numel())[1] == 1:
        return False
    whole = not options.get("vector_reshape", True) and sum(side > 1 for side in param.shape) == 1
    return not whole and (options.get("beta", 0.9) is not None or options.get("weight_decay_mode") == "adam")


def rms(value):
    return value.double().square().mean().sqrt()


@TIMES
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_update_rms_is_that_of_the_change(cls, options, dtype, ahead):
    """To 1e-5 in float32 (weights near zero, where their own rounding is less), 1e-7 in float64; SMMF's estimate
    within 15 percent, what codes of 8 bits tell within 1."""
    params = parameters(SHAPES, dtype)
    for param in params:
        param.detach().mul_(1e-3)
    optimizer = cls(params, **options)
    for step in range(4):
        found, before = stepped(optimizer, params, step, ahead)
        for index, (param, old) in enumerate(zip(params, before, strict=True)):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-7
            if estimated(cls, param, options, ahead):
                tolerance = 0.15
            if options.get("first_moment") == "int8" and not ahead:
                tolerance = 0.01
            actual = found[index]["update_rms"]
            torch.testing.assert_close(
                actual.double(), rms(param.detach() - old), rtol=tolerance, atol=1e-12, msg=f"{step} {index}"
            )


@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["noise", "signal"])
@pytest.mark.parametrize("growth_rate", [1.0, 0.95])
def test_estimate_of_smmf(mean, growth_rate):
    """What it says after the step, beside what it said ahead of it: within 15 percent, in every step."""
    param = Parameter(torch.zeros(64, 48, dtype=torch.float64))
    optimizer = SMMF([param], growth_rate=growth_rate, weight_decay=0.1)
    centre = mean * torch.randn(64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in range(40):
        gradients([param], step)
        param.grad.add_(centre)
        ahead = optimizer.diagnostics(ahead=True)[0]
        optimizer.step()
        after = optimizer.diagnostics()[0]
        for name in ("update_rms", "direction_rms"):
            torch.testing.assert_close(after[name], ahead[name], rtol=1e-7 if step == 0 else 0.15, atol=0)


def test_estimate_of_smmf_is_exact_while_signs_stay():
    param = Parameter(torch.randn(24, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = SMMF([param], weight_decay=0.1)
    for step in range(5):
        gradients([param], step)
        param.grad.abs_()
        ahead = optimizer.diagnostics(ahead=True)[0]
        optimizer.step()
        torch.testing.assert_close(optimizer.diagnostics()[0]["update_rms"], ahead["update_rms"], rtol=1e-9, atol=0)


def test_estimate_of_smmf_where_gradients_explode():
    """The second moment's old part is lost in rounding then, and what is left of the first is not divided by it."""
    param = Parameter(torch.zeros(24, 18))
    optimizer = SMMF([param])
    for size in (1e-4, 1.0):
        gradients([param], 0, size)
        param.grad[:, ::3] = 0 if size == 1.0 else 1e-4
        ahead = optimizer.diagnostics(ahead=True)[0]
        optimizer.step()
    after = optimizer.diagnostics()[0]
    assert 0.5 < float(after["direction_rms"] / ahead["direction_rms"]) < 1.2


@TIMES
@pytest.mark.parametrize("threshold", [None, 0.5, 100.0])
def test_clip_factor(threshold, ahead):
    """By the definition: rms(U) / d where it is more than 1; U = G / sqrt(V)."""
    params = parameters([(24, 18), (7,)], torch.float64)
    optimizer = HFac(params, clip_threshold=threshold, betas=(0.8, 0.95), eps=0.1)
    train(optimizer, params, 2)
    found, _ = stepped(optimizer, params, 2, ahead)
    matrix, vector = (optimizer.state[param] for param in params)
    r, s = matrix["exp_avg_sq_row"], matrix["exp_avg_sq_col"]
    directions = [
        params[0].grad / (torch.outer(r, s) / r.sum()).sqrt(),
        params[1].grad / vector["exp_avg_sq"].sqrt(),
    ]
    for index, U in enumerate(directions):
        torch.testing.assert_close(found[index]["direction_rms"].double(), rms(U), rtol=1e-6, atol=0)
        factor = 1.0 if threshold is None else max(1.0, float(rms(U)) / threshold)
        assert float(found[index]["clip_factor"]) == pytest.approx(factor, rel=1e-6)


@pytest.mark.pairwise
@TIMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(
    "cls, options", [(HFac, {}), (SMMF, {}), (SMMF, {"beta": None})], ids=["hfac", "smmf", "smmf-no-first"]
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_unmoved_weights(cls, options, dtype, decay, backend, ahead):
    """Of a real step. After it the new weight stands for the old one, which differs where one of them is a power of 2
    or half-way between two numbers; SMMF's estimate is another matter."""
    params = parameters([(64, 48), (127,)], dtype)
    optimizer = cls(
        params, lr=3e-3 if dtype == torch.bfloat16 else 5e-4, weight_decay=decay, backend=backend, **options
    )
    fractions = []
    for step in range(4):
        found, before = stepped(optimizer, params, step, ahead)
        for index, (param, old) in enumerate(zip(params, before, strict=True)):
            actual = float((param == old).double().mean())
            allowed = 1 / param.numel() if ahead else 0.02
            if estimated(cls, param, options, ahead):
                allowed = 0.08
            assert abs(float(found[index]["unmoved"]) - actual) <= allowed + 1e-7
            fractions.append(actual)
    assert 0.05 < sum(fractions) / len(fractions) < 0.95  # something to be told


@BOTH
@TIMES
def test_unmoved_by_no_learning_rate(cls, ahead):
    params = parameters([(6, 4), (5,)])
    optimizer = cls(params, lr=0.0)
    found, _ = stepped(optimizer, params, 0, ahead)
    assert [(float(entry["unmoved"]), float(entry["update_rms"])) for entry in found.values()] == [(1.0, 0.0)] * 2


@BOTH
@pytest.mark.parametrize(
    ("shape", "rows", "cols"), [((6, 5), [1, 4], [0]), ((6, 2, 3), [2], [1, 5]), ((4, 1), [0, 3], []), ((7,), [2], [])]
)
def test_rows_and_columns_without_gradient(cls, shape, rows, cols):
    param = Parameter(torch.ones(shape))
    optimizer = cls([param])
    matrix = torch.ones(shape[0], torch.Size(shape[1:]).numel())
    matrix[rows] = 0
    matrix[:, cols] = -0.0
    param.grad = matrix.reshape(shape)
    optimizer.step()
    found = optimizer.diagnostics()[0]
    assert (int(found["zero_rows"]), int(found["zero_cols"])) == (len(rows), len(cols))


def test_rows_are_those_of_the_matrix():
    param = Parameter(torch.ones(2, 3, 4))  # 6 x 4, or 2 x 12
    param.grad = torch.ones(2, 3, 4)
    param.grad[0, 1] = 0
    for how, rows in (("balanced", 1), ("flatten", 0)):
        optimizer = HFac([param], matricize=how)
        optimizer.step()
        assert int(optimizer.diagnostics()[0]["zero_rows"]) == rows


@BOTH
def test_skipped_steps(cls):
    """Counted; and of a step that was skipped, or not made, there is nothing to tell."""
    params = parameters([(6, 4), (5,)])
    optimizer = cls(params, nonfinite="skip")
    gradients(params, 0)
    found = optimizer.diagnostics()
    assert all(float(entry["update_rms"]) != float(entry["update_rms"]) for entry in found.values())
    optimizer.step()
    params[0].grad[0, 0] = float("inf")
    ahead = optimizer.diagnostics(ahead=True)
    optimizer.step()
    for found, count in ((ahead, 0), (optimizer.diagnostics(), 1)):
        first, second = found.values()
        names = {"update_rms", "direction_rms", "unmoved"} | ({"clip_factor"} if cls is HFac else set())
        assert all(bool(first[name].isnan()) and bool(second[name].isfinite()) for name in names)
        assert names | {"zero_rows", "zero_cols", "skipped"} == first.keys()
        assert (int(first["skipped"]), int(second["skipped"])) == (count, 0)


@BOTH
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_pieces_do_not_change_what_they_say(cls, chunk, monkeypatch):
    shapes = [(24, 18), (127,), (6, 4, 3, 3), (5, 3, 7)]
    params = parameters(shapes, torch.float64)
    optimizer = cls(params, weight_decay=0.1)
    train(optimizer, params, 2)
    whole = [optimizer.diagnostics(), optimizer.diagnostics(ahead=True)]
    monkeypatch.setattr(diagnostics, "CHUNK", chunk)
    for found, expected in zip([optimizer.diagnostics(), optimizer.diagnostics(ahead=True)], whole, strict=True):
        for index, entry in expected.items():
            torch.testing.assert_close(found[index], entry, rtol=1e-6, atol=0)


@BOTH
@TIMES
@pytest.mark.parametrize("options", [{}, {"batch_dims": 1, "master": "split8"}], ids=["plain", "stack"])
def test_temporaries_are_pieces(cls, ahead, options, monkeypatch):
    """No tensor that is made on the way has the parameter's size, or a slice's."""
    monkeypatch.setattr(diagnostics, "CHUNK", 64)
    param = Parameter(torch.randn(2, 32, 48, dtype=torch.bfloat16))
    if not options:
        param.data = param.data.view(64, 48)
    optimizer = cls([param], weight_decay=0.1, **options)
    gradients([param], 0)
    optimizer.step()
    known = {tensor.untyped_storage().data_ptr() for tensor in (param, param.grad, *optimizer.state[param].values())}
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            done = func(*args, **(kwargs or {}))
            if isinstance(done, torch.Tensor) and done.untyped_storage().data_ptr() not in known:
                largest.append(done.untyped_storage().nbytes() // done.element_size())
            return done

    with Watch():
        optimizer.diagnostics(ahead=ahead)
    assert 0 < max(largest) <= 64


class NothingRead(TorchDispatchMode):
    """No value of a tensor reaches the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


@TIMES
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_nothing_is_read_on_the_host(cls, options, ahead):
    params = parameters(SHAPES)
    for more in ({}, {"capturable": True}, {"lr": torch.tensor(0.02)}):
        optimizer = cls(params, **{**options, **more})
        train(optimizer, params, 1)
        with NothingRead():
            found = optimizer.diagnostics(ahead=ahead)
        assert all(value.ndim == 0 for entry in found.values() for value in entry.values())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingRead():
        found[0]["skipped"].item()  # and would be noticed


@BOTH
@TIMES
def test_nothing_is_read_of_stacks_and_master_weights(cls, ahead):
    params = parameters([(2, 6, 4), (3, 5)], torch.bfloat16)
    optimizer = cls(params, batch_dims=1, master="split8", rounding="stochastic", nonfinite="skip")
    train(optimizer, params, 1)
    with NothingRead():
        found = optimizer.diagnostics(ahead=ahead)
    assert [set(value.shape for value in entry.values()) for entry in found.values()] == [{(2,)}, {(3,)}]


@BOTH
def test_the_step_and_the_state_do_not_notice(cls):
    params, others = parameters(), parameters()
    asked, unasked = cls(params, weight_decay=0.1), cls(others, weight_decay=0.1)
    for step in range(3):
        stepped(asked, params, step, True)
        grads = bits([param.grad for param in params])
        asked.diagnostics()
        assert bits([param.grad for param in params]) == grads
        train(unasked, others, 1, start=step)
    assert bits(params) == bits(others)
    assert bits(asked.state_dict()) == bits(unasked.state_dict())


@BOTH
def test_whom_it_tells_of(cls):
    """Parameters with a gradient, by name where they have one, else by position in all groups."""
    params = parameters([(4, 6), (5,), (0,), (3, 2)])
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}])
    train(optimizer, params, 1)
    params[1].grad = None
    assert list(optimizer.diagnostics()) == [0, 3]
    named = cls([("a", params[0]), ("b", params[1]), ("c", params[3])])
    named.step()
    assert list(named.diagnostics()) == ["a", "c"]


@BOTH
@pytest.mark.parametrize("layout_of", ["transposed", "channels-last"])
def test_other_memory_layouts(cls, layout_of):
    shape = (6, 4, 3, 3) if layout_of == "channels-last" else (24, 18)
    param, other = parameters([shape])[0], parameters([shape])[0]
    if layout_of == "channels-last":
        other.data = other.data.to(memory_format=torch.channels_last)
    else:
        other.data = other.data.t().contiguous().t()
    found = []
    for one in (param, other):
        optimizer = cls([one])
        one.grad = torch.empty_like(one).copy_(gradient(shape, 1, torch.float32))
        optimizer.step()
        found.append(optimizer.diagnostics()[0])
    torch.testing.assert_close(*found)


@BOTH
def test_composer(cls):
    """What OptimizerMonitor does at the end of a batch, as far as it concerns the optimizer."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    optimizer = cls(model.parameters())
    model(torch.ones(3, 6)).sum().backward()
    model[0].bias.grad = None
    optimizer.step()
    metrics = {"l2_norm/grad/0.weight": torch.tensor(1.0)}
    for name, param in model.named_parameters():
        metrics = optimizer.report_per_parameter_metrics(param, name, metrics)
    told = optimizer.diagnostics()
    expected = {
        f"{metric}/{name}": value
        for name, entry in zip(("0.weight", "1.weight", "1.bias"), told.values(), strict=True)
        for metric, value in entry.items()
    }
    assert bits(metrics) == bits({"l2_norm/grad/0.weight": torch.tensor(1.0), **expected})
    stranger = Parameter(torch.ones(2))
    stranger.grad = torch.ones(2)
    assert optimizer.report_per_parameter_metrics(stranger, "stranger", {}) == {}
    optimizer.param_groups[0]["params"].append(stranger)  # swapped in, and not yet stepped
    assert optimizer.report_per_parameter_metrics(stranger, "stranger", {}) == {}
    assert stranger not in optimizer.state


@BOTH
def test_sharded_parameters_are_refused(cls, monkeypatch):
    params = parameters([(4, 6)])
    optimizer = cls(params)
    train(optimizer, params, 1)
    before = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(layout, "is_sharded", lambda param: True)
    with pytest.raises(RuntimeError, match=r"sharded parameter \(shape \(4, 6\)\).*log_optimizer_metrics=False"):
        optimizer.diagnostics()
    with pytest.raises(RuntimeError, match="sharded"):
        optimizer.report_per_parameter_metrics(params[0], "w", {})
    monkeypatch.undo()
    assert bits(optimizer.state_dict()) == bits(before)


@pytest.mark.parametrize("shape", [(4097, 3), (17, 19), (2, 3, 5, 7, 2)], ids=shape_id)
@BOTH
def test_gradients_of_all_scales(cls, shape):
    """Rows and columns that began without a gradient, and numbers that differ by orders of magnitude."""
    param = Parameter(torch.zeros(shape))
    optimizer = cls([param])
    for step in range(3):
        param.grad = gradient(shape, step, torch.float32)
        if step == 0:
            param.grad[0] = 0
        before = param.detach().clone()
        optimizer.step()
        found = optimizer.diagnostics()[0]
        tolerance = 1e-5 if cls is HFac else 0.15
        torch.testing.assert_close(found["update_rms"].double(), rms(param.detach() - before), rtol=tolerance, atol=0)


STACKS = {1: [(3, 8, 6), (2, 5), (2, 3, 2, 4)], 2: [(2, 3, 8, 6), (1, 2, 5)]}


@BOTH
@TIMES
@pytest.mark.parametrize("batch", STACKS)
@pytest.mark.parametrize(
    "options", [{}, {"dense": True}, {"nonfinite": "skip", "capturable": True}, {"master": "split"}], ids=str
)
def test_a_stack_is_its_slices(cls, options, batch, ahead):
    """Every metric of a slice has the bits that it has where the slice is a parameter of its own."""
    stacks = parameters(STACKS[batch], torch.bfloat16 if "master" in options else torch.float32)
    singles = [[Parameter(part.clone()) for part in stack.detach().flatten(0, batch - 1)] for stack in stacks]
    options = {"weight_decay": 0.1, **options}
    stacked = cls(stacks, batch_dims=batch, **options)
    single = cls([part for parts in singles for part in parts], **options)
    for step in range(3):
        gradients(stacks, step)
        for stack in stacks:
            stack.grad[..., 0] = 0
        if step == 2 and "nonfinite" in options:
            stacks[0].grad.flatten(0, batch - 1)[1] = float("inf")
        for stack, parts in zip(stacks, singles, strict=True):
            for part, grad in zip(parts, stack.grad.flatten(0, batch - 1), strict=True):
                part.grad = grad.clone()
        found = [optimizer.diagnostics(ahead=True) for optimizer in (stacked, single)]
        stacked.step(), single.step()
        if not ahead:
            found = [optimizer.diagnostics() for optimizer in (stacked, single)]
    told, alone = found[0], iter(found[1].values())
    for index, stack in enumerate(stacks):
        assert all(value.shape == stack.shape[:batch] for value in told[index].values())
        skipped = told[index].pop("skipped")
        expected = [next(alone) for _ in singles[index]]
        counts = torch.stack([entry.pop("skipped") for entry in expected])
        assert (skipped == counts.max()).all()  # one count for the stack
        for name, values in told[index].items():
            assert bits(values.flatten()) == bits(torch.stack([entry[name] for entry in expected])), name
    assert bool(told[0]["update_rms"].flatten()[1].isnan()) == ("nonfinite" in options)
    assert int(told[0]["update_rms"].isnan().sum()) == int("nonfinite" in options)


@BOTH
def test_composer_sees_slices(cls):
    params = parameters([(4, 3, 2), (2, 3, 4, 5)])
    optimizer = cls([{"params": params[:1], "batch_dims": 1}, {"params": params[1:], "batch_dims": 2}])
    train(optimizer, params, 1)
    one, two = optimizer.diagnostics().values()
    metrics = optimizer.report_per_parameter_metrics(params[0], "up", {})
    metrics = optimizer.report_per_parameter_metrics(params[1], "down", metrics)
    expected = {f"{metric}/up.{i}": values[i] for metric, values in one.items() for i in range(4)}
    expected |= {
        f"{metric}/down.{i}.{j}": values[i, j] for metric, values in two.items() for i in range(2) for j in range(3)
    }
    assert "unmoved/up.3" in metrics and "skipped/down.1.2" in metrics
    assert bits(metrics) == bits(expected)


@BOTH
@TIMES
def test_whole_moments(cls, ahead):
    """With dense=True of SMMF's step, too, nothing is estimated; and rows of the gradient are still the matrix's."""
    params = parameters([(24, 18), (6, 4, 3, 3)], torch.float64)
    for param in params:
        param.detach().mul_(1e-3)
    optimizer = cls(params, weight_decay=0.1, dense=True)
    for step in range(3):
        found, before = stepped(optimizer, params, step, ahead)
        for index, (param, old) in enumerate(zip(params, before, strict=True)):
            actual = found[index]["update_rms"].double()
            torch.testing.assert_close(actual, rms(param.detach() - old), rtol=1e-6, atol=0)
    params[0].grad[:5] = 0
    assert int(optimizer.diagnostics(ahead=True)[0]["zero_rows"]) == 5


@BOTH
@TIMES
@pytest.mark.parametrize("options", [{}, {"dense": True, "weight_decay_mode": "adam"}], ids=["factored", "dense"])
def test_split_master_weights_are_float32_parameters(cls, options, ahead):
    """All that is said of them, to the last bit, with updates of which some are too small for a float32."""
    if cls is HFac:
        options = {name: value for name, value in options.items() if name == "dense"}
    wide = parameters([(24, 18), (7,)])
    pieces = [rounding.split(param.detach(), torch.int16) for param in wide]
    narrow = [Parameter(high) for high, _ in pieces]
    split, plain = (
        cls(params, lr=1e-7, weight_decay=0.1, master=master, **options)
        for params, master in ((narrow, "split"), (wide, None))
    )
    for param, (_, low) in zip(narrow, pieces, strict=True):
        split.state[param]["master_low"].copy_(low)
    for step in range(3):
        gradients(narrow, step)
        for param, other in zip(narrow, wide, strict=True):
            other.grad = param.grad.float()
        found = [optimizer.diagnostics(ahead=True) for optimizer in (split, plain)]
        split.step(), plain.step()
        if not ahead:
            found = [optimizer.diagnostics() for optimizer in (split, plain)]
        assert bits(found[0]) == bits(found[1])
    assert 0.05 < float(found[0][0]["unmoved"]) < 0.95


@BOTH
@TIMES
def test_eight_more_bits(cls, ahead):
    """Of a real step with master="split8": how many weights of 24 bits stay; the change of those so small that hardly
    anything is rounded off."""
    params = parameters([(64, 48), (127,)], torch.bfloat16)
    params[1].detach().mul_(1e-4)
    optimizer = cls(params, lr=2e-5, weight_decay=0.1, master="split8")

    def masters():
        return [rounding.join(param.detach(), optimizer.state[param]["master_low"]) for param in params]

    for step in range(3):
        before = masters()
        found, _ = stepped(optimizer, params, step, ahead)
        (matrix, vector), (old_matrix, old_vector) = masters(), before
        actual = float((matrix == old_matrix).double().mean())
        assert 0.05 < actual < 0.95  # something to be told
        allowed = 1 / matrix.numel() if ahead else 0.08 if estimated(cls, params[0], {}, ahead) else 0.02
        assert abs(float(found[0]["unmoved"]) - actual) <= allowed + 1e-7
        change = rms(vector.double() - old_vector)
        torch.testing.assert_close(found[1]["update_rms"].double(), change, rtol=1e-3, atol=0)


@BOTH
@pytest.mark.parametrize("master", [None, "split8"])
def test_stochastic_rounding_moves_some_of_the_unmoved(cls, master):
    """`unmoved` is about rounding to nearest, whatever the step does."""
    found, stayed = {}, {}
    for how in ("nearest", "stochastic"):
        params = parameters([(64, 48)], torch.bfloat16)
        optimizer = cls(params, lr=5e-4 if master is None else 3e-6, rounding=how, master=master)
        gradients(params, 0)
        found[how] = optimizer.diagnostics(ahead=True)[0]
        old = optimizer._fp32(params[0]).clone()
        optimizer.step()
        stayed[how] = float((optimizer._fp32(params[0]) == old).double().mean())
    assert bits(found["nearest"]) == bits(found["stochastic"])
    assert stayed["nearest"] == pytest.approx(float(found["nearest"]["unmoved"]), abs=1e-3)
    assert 0 < stayed["stochastic"] < stayed["nearest"] - 0.02
