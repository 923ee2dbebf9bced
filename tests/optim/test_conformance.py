"""Both classes behave as torch's own optimizers do, by the checks that torch runs on its own.

Parameter groups, learning-rate schedulers, hooks, closures, gradients that are absent or of another type, copies,
pickles and state of older versions, maximize, tensor learning rates, and that training goes downhill. What is compared
is compared to the last bit unless a tolerance is written down.
"""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from running import AMBIENT, Int8, bits, gradients, parameters, train
from torch.nn import Parameter
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hfac import SMMF, HFac

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
OPTIONS = {
    HFac: dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
    SMMF: dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
}
OPTIONS[Int8] = OPTIONS[HFac]
# Options of a single group, all away from their defaults, for each class
GROUP_OPTIONS = [
    (HFac, "lr", 0.5),
    (HFac, "weight_decay", 0.4),
    (HFac, "betas", (0.3, 0.5)),
    (HFac, "eps", 0.5),
    (HFac, "clip_threshold", 0.01),
    (HFac, "maximize", True),
    (HFac, "matricize", "flatten"),
    (SMMF, "lr", 0.5),
    (SMMF, "weight_decay", 0.4),
    (SMMF, "beta", 0.3),
    (SMMF, "beta", None),
    (SMMF, "eps", 0.5),
    (SMMF, "decay_rate", -0.3),
    (SMMF, "growth_rate", 0.1),
    (SMMF, "vector_reshape", False),
    (SMMF, "weight_decay_mode", "adam"),
    (SMMF, "maximize", True),
]


def everything(optimizer, params):
    return bits([list(params), optimizer.state_dict()])


@pytest.fixture(params=["none", *AMBIENT])
def ambient(request, monkeypatch):
    """Optimizers are made, and load, while something else is torch's default; the rest of a test is outside."""
    if request.param == "none":
        return
    around = AMBIENT[request.param]

    def inside(method):
        @functools.wraps(method)
        def wrapped(*args, **kwargs):
            with around():
                return method(*args, **kwargs)

        return wrapped

    for cls in (HFac, SMMF):
        for name in ("__init__", "load_state_dict", "add_param_group", "__setstate__"):
            monkeypatch.setattr(cls, name, inside(getattr(cls, name)))


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "name", "value"), GROUP_OPTIONS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v)
)
def test_option_of_one_group_is_used_there_and_only_there(cls, name, value):
    shapes = [(3, 2, 4), (5, 3), (6,)]
    mixed, plain, special = parameters(shapes * 2), parameters(shapes * 2), parameters(shapes * 2)
    optimizer = cls([{"params": mixed[:3]}, {"params": mixed[3:], name: value}], **OPTIONS[cls])
    train(optimizer, mixed, 3)
    train(cls(plain, **OPTIONS[cls]), plain, 3)
    train(cls(special, **{**OPTIONS[cls], name: value}), special, 3)
    assert bits(mixed[:3]) == bits(plain[:3])
    assert bits(mixed[3:]) == bits(special[3:])
    assert bits(mixed[3:]) != bits(plain[3:])


@pytest.mark.usefixtures("ambient")
@BOTH
def test_group_added_in_the_middle(cls):
    """The late parameters count their own steps from one; the early ones go on as if alone."""
    early, alone, late, late_alone = parameters(), parameters(), parameters(seed=1), parameters(seed=1)
    optimizer, reference = cls(early, **OPTIONS[cls]), cls(alone, **OPTIONS[cls])
    train(optimizer, early, 3)
    train(reference, alone, 3)
    optimizer.add_param_group({"params": iter(late), "lr": 0.1})
    assert list(map(id, optimizer.param_groups[1]["params"])) == list(map(id, late))
    assert all(float(optimizer.state[p]["step"]) == 0 for p in late)
    late_optimizer = cls(late_alone, **{**OPTIONS[cls], "lr": 0.1})
    for step in range(3, 6):
        for params in (early, alone, late, late_alone):
            gradients(params, step)
        for each in (optimizer, reference, late_optimizer):
            each.step()
    assert bits([early, late]) == bits([alone, late_alone])
    assert [float(optimizer.state[p]["step"]) for p in early + late] == [6.0] * len(early) + [3.0] * len(late)


@BOTH
def test_one_tensor_is_a_group(cls):
    (param,) = parameters([(4, 6)])
    optimizer = cls([{"params": param}], **OPTIONS[cls])
    train(optimizer, [param], 1)
    assert len(optimizer.param_groups[0]["params"]) == 1 and float(optimizer.state[param]["step"]) == 1


@pytest.mark.usefixtures("ambient")
@BOTH
def test_named_parameters(cls):
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    twin.load_state_dict(model.state_dict())
    named, plain = cls(model.named_parameters(), **OPTIONS[cls]), cls(twin.parameters(), **OPTIONS[cls])
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    train(named, list(model.parameters()), 3)
    train(plain, list(twin.parameters()), 3)
    assert bits(list(model.parameters())) == bits(list(twin.parameters()))
    plain.load_state_dict(named.state_dict())
    assert plain.param_groups[0]["param_names"] == ["weight", "bias"]
    other = cls([("a", model.weight), ("b", model.bias)])
    saved = named.state_dict()
    del saved["param_groups"][0]["param_names"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["a", "b"]


# ---- learning rates --------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "lambda": lambda o: lrs.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (t + 1)]),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.8),
    "step": lambda o: lrs.StepLR(o, gamma=0.5, step_size=2),
    "multistep": lambda o: lrs.MultiStepLR(o, [1, 3], gamma=0.3),
    "constant": lambda o: lrs.ConstantLR(o, factor=0.4, total_iters=3),
    "linear": lambda o: lrs.LinearLR(o, start_factor=0.2, total_iters=4),
    "exponential": lambda o: lrs.ExponentialLR(o, gamma=0.9),
    "polynomial": lambda o: lrs.PolynomialLR(o, total_iters=8, power=0.9),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=4),
    "warm-restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=2),
    "cyclic": lambda o: lrs.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, factor=0.5), lrs.ExponentialLR(o, gamma=0.9)]),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=2), lrs.CosineAnnealingLR(o, 4)], milestones=[2]
    ),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.5),
    # momentum would be cycled through betas[0], which H-Fac has and SMMF has not
    "one-cycle": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=10, cycle_momentum=False),
}


@BOTH
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(cls, name, tensor_lr):
    """Steps under a scheduler equal steps whose learning rates are written into the groups by hand."""
    params, by_hand = parameters(), parameters()
    # numbers that are the same in every float type, so that a float32 tensor says what a float says
    rates = [torch.tensor(0.25), torch.tensor(0.125)] if tensor_lr else [0.25, 0.125]
    groups = lambda ps: [{"params": ps[:2], "lr": rates[0]}, {"params": ps[2:], "lr": rates[1]}]  # noqa: E731
    optimizer = cls(groups(params), **{**OPTIONS[cls], "weight_decay": 0.1})
    manual = cls(groups(by_hand), **{**OPTIONS[cls], "weight_decay": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR passes its epochs in a way that torch itself has deprecated
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(6):
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
            for group, lr in zip(manual.param_groups, seen[-1], strict=True):
                group["lr"] = lr
            gradients(params, step)
            gradients(by_hand, step)
            optimizer.step()
            manual.step()
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert len({tuple(rates) for rates in seen}) > 1  # it did schedule
    if name != "plateau":  # which, in older versions of torch, puts a number in the tensor's place
        assert all(isinstance(group["lr"], torch.Tensor) == tensor_lr for group in optimizer.param_groups)
    assert bits(params) == bits(by_hand)


def test_one_cycle_cycles_first_beta_of_hfac():
    params = parameters()
    optimizer = HFac(params, **OPTIONS[HFac])
    scheduler = lrs.OneCycleLR(optimizer, max_lr=0.1, total_steps=6, base_momentum=0.5, max_momentum=0.9)
    seen = set()
    for step in range(5):
        seen.add(optimizer.param_groups[0]["betas"])
        train(optimizer, params, 1, start=step)
        scheduler.step()
    assert len({first for first, _ in seen}) > 2 and {second for _, second in seen} == {0.95}


@BOTH
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
@pytest.mark.parametrize(
    "make", [torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor(v).double()], ids=["0d", "1d", "f64"]
)
def test_tensor_option_equals_float(cls, option, make):
    params, others = parameters(), parameters()
    train(cls(params, **{**OPTIONS[cls], option: make(0.25)}), params, 4)
    train(cls(others, **{**OPTIONS[cls], option: 0.25}), others, 4)
    assert bits(params) == bits(others)


@BOTH
def test_tensor_lr_is_not_written(cls):
    lr = torch.tensor(0.25)
    params = parameters()
    optimizer = cls(params, lr=lr)
    train(optimizer, params, 2)
    assert lr.item() == 0.25 and optimizer.param_groups[0]["lr"] is lr


@BOTH
def test_zero_lr_leaves_parameters(cls):
    params = parameters()
    before = bits(params)
    optimizer = cls(params, **{**OPTIONS[cls], "lr": 0.0})
    train(optimizer, params, 2)
    assert bits(params) == before


# ---- hooks -----------------------------------------------------------------------------------------------------------


@BOTH
def test_step_hooks(cls):
    params, calls = parameters(), []
    optimizer = cls(params, **OPTIONS[cls])
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("global post")),
    ]
    try:
        optimizer.step(lambda: calls.append("closure"))
        assert calls == ["global pre", "pre", "closure", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    optimizer.step()
    assert calls == []


@pytest.mark.parametrize("which", ["pre", "post", "global pre", "global post", "profiler"])
@BOTH
def test_a_warm_step_is_seen_by_each_that_looks(cls, which):
    """Hooks come and go, and a profiler is there for some steps."""
    params, calls = parameters(), []
    optimizer = cls(params, **OPTIONS[cls])
    optimizer.step()
    if which == "profiler":
        with torch.autograd.profiler.profile() as profile:
            optimizer.step()
        assert f"Optimizer.step#{cls.__name__}.step" in [event.name for event in profile.function_events]
        return
    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[which]
    handle = register(lambda *given: calls.append(which))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert calls == [which]


@BOTH
def test_step_pre_hook_changes_arguments(cls):
    params, losses = parameters(), []
    optimizer = cls(params, **OPTIONS[cls])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], lambda: losses.append(1) or 7.0), {}))
    assert optimizer.step() == 7.0 and losses == [1]


@BOTH
def test_step_hook_that_swaps_gradients_is_seen(cls):
    """Gradient clipping in a pre-hook: the step reads what the hook left."""
    params, others = parameters(), parameters()
    hooked, plain = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    hooked.register_step_pre_hook(lambda o, args, kwargs: gradients(params, 77))
    gradients(params, 1)
    gradients(others, 77)
    hooked.step()
    plain.step()
    assert bits(params) == bits(others)


@BOTH
def test_state_dict_hooks(cls):
    params, calls = parameters(), []
    optimizer = cls(params, **OPTIONS[cls])
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("first"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("zeroth"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": "x"})
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "keys": sorted(saved)}, prepend=True)
    saved = optimizer.state_dict()
    assert calls == ["zeroth", "first"]
    assert saved["keys"] == ["param_groups", "state"] and saved["note"] == "x"
    optimizer.load_state_dict(saved)  # what hooks add is no reason to refuse


@pytest.mark.usefixtures("ambient")
@BOTH
@pytest.mark.parametrize("prepend", [False, True])
def test_load_pre_hook_rewrites(cls, prepend):
    """What the hooks leave is what is loaded, and in the order torch gives them."""
    params, others, order = parameters(), parameters(), []
    source, target = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    train(source, params, 2)

    def doubled(optimizer, state_dict):
        order.append("doubled")
        state = {
            index: {key: value * 2 if value.is_floating_point() else value for key, value in entry.items()}
            for index, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def rewritten(optimizer, state_dict):
        order.append("rewritten")
        state_dict["param_groups"] = [{**group, "lr": 0.75} for group in state_dict["param_groups"]]

    target.register_load_state_dict_pre_hook(doubled)
    target.register_load_state_dict_pre_hook(rewritten, prepend=prepend)
    before = bits(source.state_dict())
    target.load_state_dict(source.state_dict())
    assert order == (["rewritten", "doubled"] if prepend else ["doubled", "rewritten"])
    assert bits(source.state_dict()) == before
    assert target.param_groups[0]["lr"] == 0.75 and source.param_groups[0]["lr"] == 0.02
    for p, q in zip(params, others, strict=True):
        for key, value in source.state[p].items():
            wanted = value * 2 if value.is_floating_point() else value
            assert bits(target.state[q][key]) == bits(wanted), key


@BOTH
def test_load_post_hooks_see_the_loaded_state(cls):
    params, others, seen = parameters(), parameters(), []
    source, target = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    train(source, params, 2)
    for prepend in (False, True):
        target.register_load_state_dict_post_hook(lambda o: seen.append(bits(o.state_dict())), prepend=prepend)
    target.load_state_dict(source.state_dict())
    assert seen == [bits(source.state_dict())] * 2


@BOTH
def test_loading_leaves_no_hook_behind(cls):
    optimizer = cls(parameters(), **OPTIONS[cls])
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(TypeError):
        optimizer.load_state_dict({})
    assert not optimizer._optimizer_load_state_dict_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks


@BOTH
def test_profiler_names_the_step(cls):
    params = parameters()
    optimizer = cls(params, **OPTIONS[cls])
    gradients(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert names.count(f"Optimizer.step#{cls.__name__}.step") == 1
    assert f"Optimizer.zero_grad#{cls.__name__}.zero_grad" in names


@BOTH
def test_step_warns_of_nothing(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = parameters()
        optimizer = cls(params, **OPTIONS[cls])
        train(optimizer, params, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        copy.deepcopy(optimizer).step()


# ---- gradients -------------------------------------------------------------------------------------------------------


@BOTH
def test_no_gradient_is_no_step(cls):
    params = parameters()
    optimizer = cls(params, **OPTIONS[cls])
    before = everything(optimizer, params)
    optimizer.step()
    optimizer.step(lambda: None)
    assert everything(optimizer, params) == before
    # and where some have one, the others and their state stay
    gradients(params, 0)
    params[0].grad = params[2].grad = None
    kept = bits([params[0], params[2], optimizer.state[params[0]], optimizer.state[params[2]]])
    optimizer.step()
    assert bits([params[0], params[2], optimizer.state[params[0]], optimizer.state[params[2]]]) == kept
    assert [float(optimizer.state[p]["step"]) for p in params] == [0, 1, 0, 1, 1, 1, 1, 1]


@pytest.mark.usefixtures("ambient")
@BOTH
def test_parameters_that_skip_steps_count_their_own(cls):
    """Two parameters of one group whose gradients come at different steps equal two optimizers."""
    params, first, second = parameters([(4, 6)] * 2), parameters([(4, 6)] * 2), parameters([(4, 6)] * 2)
    together, one, two = cls(params, **OPTIONS[cls]), cls(first[:1], **OPTIONS[cls]), cls(second[1:], **OPTIONS[cls])
    for step in range(5):
        for ps in (params, first, second):
            gradients(ps, step)
        if step in (1, 2):
            params[0].grad = first[0].grad = None
        if step == 3:
            params[1].grad = second[1].grad = None
        for optimizer in (together, one, two):
            optimizer.step()
    assert bits(params) == bits([first[0], second[1]])


@BOTH
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 4)], ids=str)
def test_no_elements(cls, shape):
    params, alone = parameters([shape, (4, 6)]), parameters([shape, (4, 6)])[1:]
    optimizer, reference = cls(params, **OPTIONS[cls]), cls(alone, **OPTIONS[cls])
    for step in range(2):
        gradients(params, step)
        alone[0].grad = params[1].grad
        optimizer.step()
        reference.step()
    assert bits(params[1]) == bits(alone[0]) and params[0].shape == shape
    saved = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert bits(optimizer.state_dict()) == bits(saved)


@BOTH
def test_closure(cls):
    params = parameters([(4, 6)])
    optimizer = cls(params, **OPTIONS[cls])
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == calls[0] and len(calls) == 1
    assert params[0].square().sum() < calls[0]
    assert optimizer.step() is None


@BOTH
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(cls, set_to_none):
    params = parameters()
    optimizer = cls(params, **OPTIONS[cls])
    gradients(params, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(param.grad is None for param in params)
    else:
        assert all(param.grad is not None and not param.grad.any() for param in params)
        optimizer.step()  # a zero gradient is a gradient: the step counts and everything stays finite
        assert all(float(optimizer.state[param]["step"]) == 1 and param.isfinite().all() for param in params)


@BOTH
def test_gradients_are_not_written(cls):
    params = parameters()
    for options in ({}, {"maximize": True}, {"nonfinite": "skip"}):
        optimizer = cls(params, **{**OPTIONS[cls], **options})
        gradients(params, 0)
        before = bits([param.grad for param in params])
        optimizer.step()
        assert bits([param.grad for param in params]) == before


def test_coupled_weight_decay_does_not_write_gradients():
    params = parameters()
    optimizer = SMMF(params, weight_decay=0.5, weight_decay_mode="adam")
    gradients(params, 0)
    before = bits([param.grad for param in params])
    optimizer.step()
    assert bits([param.grad for param in params]) == before


def test_coupled_weight_decay_is_in_the_gradient():
    params, others = parameters(), parameters()
    coupled = SMMF(params, lr=0.02, weight_decay=0.25, weight_decay_mode="adam")
    by_hand = SMMF(others, lr=0.02)
    for step in range(3):
        gradients(params, step)
        gradients(others, step)
        for other in others:
            other.grad += 0.25 * other.detach()
        coupled.step()
        by_hand.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@BOTH
def test_decoupled_weight_decay_shrinks_the_parameter(cls):
    """With weight decay the step takes lr * weight_decay * W more off, and no moment knows of it."""
    params, others = parameters(), parameters()
    starts = [param.detach().clone() for param in params]
    decayed, plain = cls(params, lr=0.5, weight_decay=0.25), cls(others, lr=0.5)
    train(decayed, params, 1)
    train(plain, others, 1)
    for param, other, start in zip(params, others, starts, strict=True):
        torch.testing.assert_close(param.detach(), other.detach() - 0.125 * start, rtol=1e-5, atol=1e-6)
    assert bits(decayed.state_dict()["state"]) == bits(plain.state_dict()["state"])


@BOTH
def test_maximize_equals_negated_gradients(cls):
    params, others = parameters(), parameters()
    up, down = cls(params, **OPTIONS[cls], maximize=True), cls(others, **OPTIONS[cls])
    for step in range(4):
        gradients(params, step)
        gradients(others, step, scale=-1.0)
        up.step()
        down.step()
    assert bits(params) == bits(others)
    assert bits(up.state_dict()["state"]) == bits(down.state_dict()["state"])


@BOTH
def test_parameter_that_needs_no_gradient_but_has_one(cls):
    """As in torch.optim: a gradient is enough."""
    param, twin = torch.ones(4, 6), Parameter(torch.ones(4, 6))
    optimizer, reference = cls([param], **OPTIONS[cls]), cls([twin], **OPTIONS[cls])
    gradients([param, twin], 0)
    twin.grad = param.grad.clone()
    optimizer.step()
    reference.step()
    assert bits(param) == bits(twin.detach())


@pytest.mark.usefixtures("ambient")
@BOTH
def test_mixed_types_in_one_optimizer(cls):
    """Each parameter as if alone in an optimizer."""
    types = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    make = lambda: [parameters([(4, 6)], dtype, seed)[0] for seed, dtype in enumerate(types)]  # noqa: E731
    together, alone = make(), make()
    optimizer = cls(together, **OPTIONS[cls])
    singles = [cls([param], **OPTIONS[cls]) for param in alone]
    for step in range(3):
        gradients(together, step)
        for param, twin in zip(together, alone, strict=True):
            twin.grad = param.grad.clone()
        optimizer.step()
        for single in singles:
            single.step()
    assert bits(together) == bits(alone)
    assert [param.dtype for param in together] == types


@BOTH
@pytest.mark.parametrize(
    ("param_type", "grad_type"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
def test_gradient_of_another_type(cls, param_type, grad_type):
    """The arithmetic is float32 (float64 for float64 parameters) whatever the gradient is stored in."""
    (param,), (twin,) = parameters([(4, 6)], param_type), parameters([(4, 6)], param_type)
    optimizer, reference = cls([param], **OPTIONS[cls]), cls([twin], **OPTIONS[cls])
    value = torch.randn(4, 6, generator=torch.Generator().manual_seed(5)).to(grad_type)
    exact = torch.float64 if param_type == torch.float64 else torch.float32
    for p, grad in ((param, value), (twin, value.to(exact))):
        # torch lets the gradient differ only where the parameter's own type has moved since
        data, p.data = p.data, p.data.to(grad.dtype)
        p.grad = grad.clone()
        p.data = data
    assert param.grad.dtype == grad_type and twin.grad.dtype == exact
    for _ in range(2):
        optimizer.step()
        reference.step()
    assert bits(param) == bits(twin) and param.dtype == param_type
    assert bits(dict(optimizer.state[param])) == bits(dict(reference.state[twin]))


@BOTH
def test_two_devices_in_one_optimizer(cls):
    """The meta device stands in for a second one: each device has its own calls, and the host's numbers are its own."""
    here, alone = parameters([(4, 6), (5,)]), parameters([(4, 6), (5,)])
    there = [Parameter(torch.empty(shape, device="meta")) for shape in ((4, 6), (5,))]
    optimizer = cls([here[0], there[0], here[1], there[1]], **OPTIONS[cls])
    reference = cls(alone, **OPTIONS[cls])
    for step in range(2):
        gradients(here, step)
        gradients(alone, step)
        for param in there:
            param.grad = torch.empty_like(param)
        optimizer.step()
        reference.step()
    assert bits(here) == bits(alone)
    assert all(value.is_meta for p in there for key, value in optimizer.state[p].items() if key != "step")


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ambient")
@BOTH
def test_state_dict_is_the_same_twice_and_for_a_twin(cls):
    params, others = parameters(), parameters()
    optimizer, twin = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    for steps in (0, 3):
        train(optimizer, params, steps)
        train(twin, others, steps)
        first, second, third = optimizer.state_dict(), optimizer.state_dict(), twin.state_dict()
        assert bits(first) == bits(second) == bits(third)
        assert [list(entry) for entry in first["state"].values()] == [list(entry) for entry in third["state"].values()]
        assert list(first["state"]) == list(range(len(params)))
    # loading gives the keys in the same order, and no option more
    twin.load_state_dict(first)
    loaded = twin.state_dict()
    assert [list(entry) for entry in loaded["state"].values()] == [list(entry) for entry in first["state"].values()]
    assert loaded["param_groups"] == first["param_groups"]


def public(optimizer):
    return {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}


@BOTH
def test_deepcopy_copies_all_public_attributes(cls):
    params = parameters()
    optimizer = cls(params, **{**OPTIONS[cls], "lr": torch.tensor(0.25)})
    for round_ in range(2):
        twin = copy.deepcopy(optimizer)
        assert public(twin).keys() >= public(optimizer).keys() == {"defaults", "state", "param_groups"}
        assert bits(twin.state_dict()) == bits(optimizer.state_dict())
        assert bits({k: v for k, v in twin.defaults.items() if k != "differentiable"}) == bits(optimizer.defaults)
        train(optimizer, params, 2, start=round_)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch-save": lambda optimizer: saved_whole(optimizer),
}


def saved_whole(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.usefixtures("ambient")
@BOTH
@pytest.mark.parametrize("way", COPIES)
def test_copy_goes_on_bit_for_bit(cls, way):
    params = parameters()
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], **OPTIONS[cls], nonfinite="skip")
    train(optimizer, params, 3)
    twin = COPIES[way](optimizer)
    twins = [param for group in twin.param_groups for param in group["params"]]
    assert bits(twins) == bits(params) and not any(a is b for a, b in zip(twins, params, strict=True))
    train(optimizer, params, 3, start=3)
    half = bits(twins)
    assert half != bits(params)  # no memory shared
    train(twin, twins, 3, start=3)
    assert everything(twin, twins) == everything(optimizer, params)
    twin.add_param_group({"params": parameters(seed=9)})  # and it is whole


@pytest.mark.usefixtures("ambient")
@BOTH
def test_older_state(cls):
    """A pickle from before some options existed, with steps as plain numbers, as torch.optim once had them."""
    params, others = parameters(), parameters()
    optimizer, reference = cls(params, lr=0.02), cls(others, lr=0.02)
    train(optimizer, params, 3)
    train(reference, others, 3)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for name in ("nonfinite", "capturable", "backend", "maximize"):
            del group[name]
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    old = cls.__new__(cls)
    old.__setstate__(state)
    assert old.param_groups[0]["nonfinite"] == "propagate" and old.param_groups[0]["maximize"] is False
    for entry in old.state.values():
        assert entry["step"].dtype == torch.float32 and entry["step"].shape == ()
    train(old, params, 2, start=3)
    train(reference, others, 2, start=3)
    assert everything(old, params) == everything(reference, others)


@pytest.mark.usefixtures("ambient")
@BOTH
def test_older_state_dict(cls):
    params, others = parameters(), parameters()
    optimizer, target = cls(params, lr=0.02), cls(others, lr=0.5)
    train(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("nonfinite", "capturable", "backend", "maximize", "weight_decay"):
        del saved["param_groups"][0][name]
    for entry in saved["state"].values():
        entry["step"] = float(entry["step"])
    target.load_state_dict(saved)
    assert bits(target.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    assert target.param_groups[0] | {"params": 0} == optimizer.param_groups[0] | {"params": 0}


@BOTH
def test_step_of_older_state_is_float32_whatever_the_default(cls):
    params = parameters()
    optimizer = cls(params)
    state = optimizer.__getstate__()
    for entry in state["state"].values():
        entry["step"] = 3
    torch.set_default_dtype(torch.float64)
    try:
        optimizer.__setstate__(state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {entry["step"].dtype for entry in optimizer.state.values()} == {torch.float32}


@BOTH
def test_subclass(cls):
    class Mine(cls):
        def step(self, closure=None):
            return super().step(closure)

    params, others = parameters(), parameters()
    train(Mine(params, **OPTIONS[cls]), params, 2)
    train(cls(others, **OPTIONS[cls]), others, 2)
    assert bits(params) == bits(others)


@BOTH
def test_repr_names_class_and_options(cls):
    text = repr(cls(parameters(), **OPTIONS[cls]))
    assert text.startswith(cls.__name__) and "lr: 0.02" in text and "weight_decay: 0.1" in text


# ---- it trains -------------------------------------------------------------------------------------------------------


@BOTH
def test_rosenbrock(cls):
    """From (1.5, 1.5), as torch's own test: downhill, by a factor of a hundred in 1000 steps of a decaying rate."""
    point = Parameter(torch.tensor([1.5, 1.5], dtype=torch.float64))
    optimizer = cls([point], lr=0.01)
    scheduler = lrs.ExponentialLR(optimizer, gamma=0.998)

    def loss():
        x, y = point
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    start = loss().item()
    for _ in range(1000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    assert loss().item() < start / 100


@BOTH
@pytest.mark.parametrize("maximize", [False, True])
def test_regression(cls, maximize):
    """A linear model finds the matrix that made the data (the negated loss climbed, where maximize)."""
    torch.manual_seed(0)
    truth, inputs = torch.randn(6, 9), torch.randn(200, 9)
    targets = inputs @ truth.T + 1.0
    model = torch.nn.Linear(9, 6)
    optimizer = cls(model.parameters(), lr=0.05, maximize=maximize)
    scheduler = lrs.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        (-loss if maximize else loss).backward()
        optimizer.step()
        scheduler.step()
    assert loss.item() < 1e-3
    torch.testing.assert_close(model.weight.detach(), truth, rtol=0, atol=0.05)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_goes_downhill_from_the_first_step(cls, dtype):
    (weight,) = parameters([(16, 24)], dtype)
    optimizer = cls([weight], lr=0.02)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = weight.float().square().sum()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0] and losses[-1] < losses[0] / 2
