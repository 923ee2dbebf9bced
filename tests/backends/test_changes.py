"""What changes between two steps: a warm step is that of a new optimizer in the same state, or fails as that does."""

import copy
import random
from contextlib import nullcontext

import emulated
import pytest
import torch
from torch.nn import Parameter

import hfac
from hfac import functional, ops
from hfac.backends import cpu, snapshots

BACKENDS = ["reference", "cpu", emulated.NAME]
#: of the parameters: two matrices and a vector
SHAPES = [(24, 16), (16, 32), (40,)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu" and cpu._C is None:
        pytest.skip("the extension is not built")
    if request.param == emulated.NAME and emulated.native is None:
        pytest.skip(emulated.WHY_NOT)
    with emulated.registered() if request.param == emulated.NAME else nullcontext():
        yield request.param


class Run:
    """An optimizer that has made some steps."""

    def __init__(self, name, backend, dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.name, self.options = name, {"backend": backend, "lr": 0.1, **options}
        self.params = [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
        self.optimizer = getattr(hfac, name)(self.params, **self.options)
        for _ in range(3):
            self.receive_grads()
            self.optimizer.step()
        self.receive_grads()

    @property
    def group(self):
        return self.optimizer.param_groups[0]

    @property
    def state(self):
        return self.optimizer.state

    def receive_grads(self):
        for param in self.params:
            param.grad = torch.randn_like(param)

    def cold(self):
        """A new optimizer of copies of the parameters, their gradients and their states as they are now."""
        groups, twins = [], []
        for group in self.optimizer.param_groups:
            params = [twin_of(param) for param in group["params"]]
            twins += params
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": params})
        optimizer = getattr(hfac, self.name)(groups, **self.options)
        pairs = zip((p for group in self.optimizer.param_groups for p in group["params"]), twins, strict=True)
        for param, twin in pairs:
            if param in self.state:
                optimizer.state[twin] = {key: value.clone() for key, value in self.state[param].items()}
        return optimizer


def twin_of(param):
    if param.is_meta:
        twin = Parameter(param.detach().clone())
    else:
        twin = Parameter(torch.empty_strided(param.shape, param.stride(), dtype=param.dtype).copy_(param.detach()))
    twin.requires_grad_(param.requires_grad)
    if param.grad is not None:
        grad = param.grad.clone()
        twin.grad = torch.zeros_like(twin) if grad.layout == torch.strided else grad
        if grad.layout == torch.strided:
            twin.grad.data = grad
    return twin


def values_of(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [{key: value.clone() for key, value in optimizer.state.get(p, {}).items()} for p in params]
    return [p.detach().clone() for p in params], states


def stepped(optimizer, param=None):
    try:
        optimizer.step() if param is None else optimizer.step_param(param)
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error), str(error)
    return None


CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


@change
def nothing(run):
    pass


@change
def gradient_dtype(run):
    run.params[0].grad.data = run.params[0].grad.double()


@change
def every_gradients_dtype(run):
    for param in run.params:
        param.grad.data = param.grad.bfloat16()


@change
def gradient_shape(run):
    run.params[0].grad.data = torch.randn(16, 24)


@change
def gradient_shape_of_fewer_dimensions(run):
    run.params[0].grad.data = torch.randn(24 * 16)


@change
def gradient_strides(run):
    run.params[0].grad = torch.randn(16, 24).t()


@change
def gradient_expanded(run):
    run.params[0].grad = torch.randn(1, 16).expand(24, 16)


@change
def gradient_off_alignment(run):
    run.params[0].grad = torch.randn(24 * 16 + 1)[1:].view(24, 16)


@change
def gradient_sparse(run):
    run.params[0].grad = torch.randn(24, 16).to_sparse()


@change
def gradient_negated(run):
    run.params[0].grad = torch._neg_view(torch.randn(24, 16))


@change
def gradient_of_no_memory(run):
    run.params[2].grad = torch._efficientzerotensor(40)


class Sub(torch.Tensor):
    pass


@change
def gradient_subclass(run):
    run.params[0].grad = torch.randn(24, 16).as_subclass(Sub)


@change
def gradient_gone(run):
    run.params[0].grad = None


@change
def frozen(run):
    run.params[0].grad = None
    run.params[0].requires_grad_(False)


@change
def frozen_and_thawed(run):
    frozen(run)
    run.optimizer.step()
    run.params[0].requires_grad_(True)
    run.receive_grads()


@change
def requires_grad_off_with_a_gradient(run):
    run.params[0].requires_grad_(False)


@change
def data_moved(run):
    run.params[0].data = run.params[0].data.clone() + 1


@change
def data_dtype(run):
    run.params[0].grad = None
    run.params[0].data = run.params[0].data.double()
    run.params[0].grad = torch.randn_like(run.params[0])


@change
def data_shape(run):
    run.params[0].grad = None
    run.params[0].data = torch.randn(16, 24)
    run.params[0].grad = torch.randn(16, 24)


@change
def data_strides(run):
    run.params[0].data = run.params[0].data.t().contiguous().t()


@change
def data_where_it_was_with_other_strides(run):
    param = run.params[1]
    param.grad = None
    param.data = param.data.view(-1).as_strided((16, 32), (1, 16))
    param.grad = torch.randn(16, 32)


@change
def state_replaced(run):
    state = run.state[run.params[0]]
    key = next(key for key in state if key.endswith("sq_row"))
    state[key] = state[key] * 4


@change
def every_state_replaced(run):
    for state in run.state.values():
        state.update({key: value.clone() for key, value in state.items()})


@change
def state_moved(run):
    """As trainers move states between devices."""
    for state in run.state.values():
        for value in state.values():
            value.data = value.data.clone()


@change
def one_state_moved(run):
    state = run.state[run.params[1]]
    key = next(key for key in state if key.endswith("sq_col"))
    state[key].data = state[key].data * 4


@change
def state_dtype(run):
    state = run.state[run.params[0]]
    state.update({key: value.double() for key, value in state.items() if key.endswith("sq_row")})


@change
def state_dropped(run):
    del run.state[run.params[0]]


@change
def step_replaced(run):
    for state in run.state.values():
        state["step"] = torch.tensor(10.0)


@change
def step_written(run):
    run.state[run.params[1]]["step"].fill_(7.0)


@change
def step_moved(run):
    run.state[run.params[0]]["step"].data = torch.tensor(5.0)


@change
def parameter_swapped(run):
    run.group["params"][0] = run.params[0] = Parameter(torch.randn(24, 16))
    run.receive_grads()


@change
def parameter_on_another_device(run):
    run.group["params"][0] = Parameter(torch.empty(24, 16, device="meta"))
    run.group["params"][0].grad = torch.empty(24, 16, device="meta")


@change
def tensors_swapped(run):
    other = Parameter(torch.randn(24, 16))
    other.grad = torch.randn(24, 16)
    torch.utils.swap_tensors(run.params[0], other)


@change
def reordered(run):
    run.group["params"].reverse()


@change
def to_another_group(run):
    del run.group["params"][1]
    run.optimizer.add_param_group({"params": [run.params[1]], "lr": 0.5})


@change
def group_added(run):
    extra = Parameter(torch.randn(8, 8))
    extra.grad = torch.randn(8, 8)
    run.optimizer.add_param_group({"params": [extra]})


@change
def options_changed(run):
    run.group.update(lr=0.7, maximize=True)


@change
def eps_and_clipping_changed(run):
    run.group.update({"eps": 1e-2} | ({"clip_threshold": None} if "clip_threshold" in run.group else {}))


@change
def weight_decay_changed(run):
    run.group.update(
        {"weight_decay": 0.2} | ({"weight_decay_mode": "adam"} if "weight_decay_mode" in run.group else {})
    )


@change
def rates_as_tensors(run):
    run.group.update(lr=torch.tensor(0.3), weight_decay=torch.tensor(0.1))


@change
def state_dict_loaded(run):
    loaded = copy.deepcopy(run.optimizer.state_dict())
    for state in loaded["state"].values():
        state["step"].add_(3)
    run.optimizer.load_state_dict(loaded)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_a_warm_step_sees_what_has_changed(name, change, backend):
    run = Run(name, backend)
    CHANGES[change](run)
    before = values_of(run.optimizer)
    if change == "parameter_on_another_device" and backend != "reference":
        with pytest.raises(RuntimeError, match=f"backend='{backend}' was asked for tensors on meta"):
            run.optimizer.step()
        torch.testing.assert_close(values_of(run.optimizer)[0][1:], before[0][1:], rtol=0, atol=0)
        return
    other = run.cold()
    expected, found = stepped(other), stepped(run.optimizer)
    assert found == expected
    if found is not None:  # and nothing is half done
        torch.testing.assert_close(values_of(run.optimizer)[0], before[0], rtol=0, atol=0)
        return
    (params, states), (wanted, wanted_states) = values_of(run.optimizer), values_of(other)
    for mine, theirs in zip(params, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(states, wanted_states, strict=True):
        torch.testing.assert_close(mine, theirs)
    if change not in ("gradient_gone", "frozen"):
        moved = [not torch.equal(a, b) for a, b in zip(params, before[0], strict=True) if not a.is_meta]
        assert any(moved)
    run.receive_grads()  # and the step after it is warm again
    assert stepped(run.optimizer) is None or any(p.is_meta for p in params) or change == "data_shape"


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"parameter_on_another_device"}))
@pytest.mark.parametrize("backend", [BACKENDS[1]], indirect=True)
def test_a_warm_step_of_one_parameter_sees_what_has_changed(change, backend):
    """Where `step_param` has stepped all of them, and goes on."""
    run = Run("HFac", backend)
    for _ in range(3):
        for param in run.params:
            run.optimizer.step_param(param)
        give_grads_in_place(run)
    CHANGES[change](run)
    other = run.cold()
    pairs = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (run.optimizer, other)]
    for mine, theirs in zip(*pairs, strict=True):
        found = [stepped(run.optimizer, mine), stepped(other, theirs)]
        assert found[0] == found[1]
    torch.testing.assert_close(values_of(run.optimizer), values_of(other))


def give_grads_in_place(run):
    for param in run.params:
        param.grad.copy_(torch.randn_like(param))


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"capturable": True, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_a_step_repeats_the_last_calls(name, released, moved, options, backend, monkeypatch):
    """With the bits of a new optimizer's step, other rates among them, gradients that are skipped, and such as lie
    elsewhere; what the calls were handed is not made anew."""
    run, held = Run(name, backend, **options), []

    def step():
        if released:
            for param in run.params:
                run.optimizer.step_param(param)
        else:
            run.optimizer.step()

    for _ in range(2):
        step()
        give_grads_in_place(run)
    prepared = []
    prepare = ops.OpCall.prepare
    monkeypatch.setattr(ops.OpCall, "prepare", lambda call, *a, **k: prepared.append(call) or prepare(call, *a, **k))
    for rate, bad in ((0.3, 1), (0.05, 2), (0.2, None)):
        if moved:
            held += [param.grad for param in run.params]  # whose memory the next ones do not get
            run.receive_grads()
        else:
            give_grads_in_place(run)
        if bad is not None and "nonfinite" in options:
            run.params[bad].grad.view(-1)[3] = torch.inf
        run.group.update(lr=rate, weight_decay=rate / 2)
        before = len(prepared)
        other = run.cold()
        step()
        if rate == 0.3 or not options or "capturable" in options:  # the host binds anew where steps have come apart
            assert (len(prepared) > before) == (backend == "reference")
        other.step()
        torch.testing.assert_close(values_of(run.optimizer), values_of(other), rtol=0, atol=0)
    if "nonfinite" in options:
        assert [int(run.state[param]["skipped"]) for param in run.params] == [0, 1, 1]


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"capturable": True, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_a_clipped_step_of_one_parameter_repeats_its_last_call(name, options, backend, monkeypatch):
    """By whatever it is clipped, a bad gradient and clipping by the same tensor among it, unless gradients have to be
    written; and a limit without what clips is refused as ever."""
    run = Run(name, backend, max_grad_norm=1.0, **options)
    prepared, prepare = [], ops.OpCall.prepare
    monkeypatch.setattr(ops.OpCall, "prepare", lambda call, *a, **k: prepared.append(call) or prepare(call, *a, **k))
    factors = 0.5, 0.25, 1.0, 1.0, 0.125, 0.125, 0.75
    for k, factor in enumerate(factors):
        give_grads_in_place(run)
        if k == 5:
            run.params[1].grad.view(-1)[3] = torch.nan
        run.group.update(lr=0.1 / (1 + k))
        other, before = run.cold(), len(prepared)
        clip = ops.Clip(torch.tensor(factor)) if k % 2 else torch.tensor(factor)
        for param in run.params:
            run.optimizer.step_param(param, clip=clip)
        if k > 1:
            written = backend == "cpu" and {*factors[k - 1 : k + 1]} != {1.0}
            assert (len(prepared) > before) == (backend == "reference" or written)
        for param in other.param_groups[0]["params"]:
            other.step_param(param, clip=torch.tensor(factor))
        torch.testing.assert_close(values_of(run.optimizer), values_of(other), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="step_param: max_grad_norm clips by the norm of all gradients"):
        run.optimizer.step_param(run.params[0])


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_where_a_group_is_refused_those_before_it_are_not_stepped(name, backend):
    params = [Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = getattr(hfac, name)([{"params": [param]} for param in params], backend=backend)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    with torch.no_grad():
        params[-1].grad = torch.randn(SHAPES[-1]).to_sparse()
    before = values_of(optimizer)
    assert stepped(optimizer) is not None
    torch.testing.assert_close(values_of(optimizer), before, rtol=0, atol=0)
    params[-1].grad = torch.randn_like(params[-1])
    assert stepped(optimizer) is None
    assert not any(torch.equal(mine, old) for mine, old in zip(values_of(optimizer)[0], before[0], strict=True))


def test_the_table_has_errors_and_results(backend):
    """Else the comparison above would compare less than it says."""
    errors = set()
    for name in CHANGES:
        run = Run("HFac", backend)
        CHANGES[name](run)
        if stepped(run.optimizer) is not None:
            errors.add(name)
    assert {"gradient_shape", "gradient_shape_of_fewer_dimensions", "gradient_sparse", "data_shape"} <= errors
    assert len(CHANGES) - len(errors) >= 25


def gradient_at(arena, rng):
    """A gradient at the arena's first byte: its dtype, shape and strides are drawn."""
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    shape = rng.choice([(4, 6), (6, 4), (24,), (2, 12), (4, 3, 2)])
    flat = arena.view(dtype)[:24].view(shape)
    return flat if len(shape) != 2 or rng.random() < 0.7 else turned(flat)


def turned(flat):
    rows, cols = flat.shape
    return flat.as_strided((rows, cols), (1, rows))


def tries(count):
    return pytest.param(count, marks=pytest.mark.slow) if count > 10**4 else count


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("count", [tries(3000), tries(10**5)])
def test_another_gradient_in_the_place_of_one_that_was_freed(count, native, monkeypatch):
    """Gradients of other types, shapes and strides at one address: what was checked of one holds for its like only."""
    if not native:
        monkeypatch.setattr(snapshots, "_native", None)
    rng, arena = random.Random(count), torch.zeros(24 * 8, dtype=torch.uint8)
    param = torch.randn(4, 6)
    states = {"exp_avgs": [torch.zeros(4, 6)], "exp_avg_sqs": [torch.zeros(4, 6)]}
    options = dict(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, clip_threshold=None, weight_decay=0.0, maximize=False)

    def bound_to(grad):
        steps = [torch.zeros(())]
        return functional.Group("hfac", [param], [grad], states, steps, None, True, False, "reference")

    group, dtype, known, seen = bound_to(param), param.dtype, None, 0
    for _ in range(count):
        grad = gradient_at(arena, rng)
        kind = grad.dtype, grad.shape, grad.stride()
        assert (group.look([grad])[1] is not None) == (kind == known)
        seen += kind == known
        if grad.shape == param.shape:
            if group.prepare([grad], **options) is None:  # it is of another type
                group = bound_to(grad)
                assert group.prepare([grad], **options) is not None
            known = kind
            dtype = grad.dtype
        elif rng.random() < 0.1:
            if grad.dtype == dtype:
                with pytest.raises(ValueError, match="must have its parameter's shape"):
                    group.prepare([grad], **options)
            else:
                assert group.prepare([grad], **options) is None
            known = None
    assert count // 100 < seen < count // 2


def test_gradients_that_are_freed_and_made_anew(backend):
    """Through the optimizer, with memory that the allocator hands out again."""
    run, rng, places = Run("HFac", backend), random.Random(0), set()
    reused = 0
    for _ in range(60):
        for param in run.params:
            param.grad = None
        for param in run.params:
            grad = torch.randn(param.shape)
            if rng.random() < 0.3:
                grad = grad.to(rng.choice([torch.bfloat16, torch.float64]))
            if rng.random() < 0.3 and grad.ndim == 2:
                grad = grad.t().contiguous().t()
            param.grad = torch.zeros_like(param)
            param.grad.data = grad
            reused += grad.data_ptr() in places
            places.add(grad.data_ptr())
        other = run.cold()
        run.optimizer.step()
        other.step()
        torch.testing.assert_close(values_of(run.optimizer), values_of(other))
    assert reused > 30
