"""Options as users of other optimizers write them, and options that change after construction."""

import copy
import inspect
import warnings
from functools import partial

import pytest
import torch
from cases import gradient
from torch.nn import Parameter
from torch.optim import lr_scheduler

import hfac
from hfac import SMMF, HFac, types

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF])


def params_of(dtype=torch.float32):
    params = [Parameter(gradient(shape, i, dtype)) for i, shape in enumerate([(4, 6), (5,)])]
    for i, param in enumerate(params):
        param.grad = gradient(param.shape, 10 + i, dtype)
    return params


def warned(make):
    """What constructing warns of, and where from."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make()
    assert all(each.filename == __file__ for each in found)
    return [str(each.message) for each in found]


def test_adamws_line_of_arguments_is_refused():
    """Its fifth is weight_decay, and was clip_threshold here."""
    with pytest.raises(TypeError, match=r"at most 4 positional arguments \(to eps\), got 5.*weight_decay.*clip_thresh"):
        HFac(params_of(), 1e-3, (0.9, 0.99), 1e-30, 0.1)
    kept = HFac(params_of(), 1e-3, (0.9, 0.99), 1e-30, weight_decay=0.1).param_groups[0]
    assert (kept["weight_decay"], kept["clip_threshold"], kept["betas"]) == (0.1, 1.0, (0.9, 0.99))
    assert list(inspect.signature(HFac).parameters)[:5] == ["params", "lr", "betas", "eps", "clip_threshold"]


def test_adamws_state_dict_names_the_conversion():
    """Into the state that this optimizer keeps, so that what it returns loads."""
    params = params_of()
    adamw = torch.optim.AdamW(params)
    adamw.step()
    for cls, target in ((HFac, {"to": "hfac"}), (HFac, {"to": "hfac", "first_moment": "int8"}), (SMMF, {"to": "smmf"})):
        made = cls(params, **{name: value for name, value in target.items() if name != "to"})
        given = ", ".join(f"{name}={value!r}" for name, value in target.items())
        with pytest.raises(ValueError, match=rf"hfac\.convert\(state_dict, params, {given}\) translates"):
            made.load_state_dict(adamw.state_dict())
        made.load_state_dict(hfac.convert(adamw.state_dict(), params, **{"lr": 1e-3, **target}))


def test_adamws_eps():
    found = warned(lambda: HFac([{"params": params_of()[:1], "eps": 1e-8}, {"params": params_of(), "eps": 1e-7}]))
    assert len(found) == 1 and "eps=1e-07 is added to every squared gradient" in found[0] and "1e-30" in found[0]
    assert warned(lambda: (HFac(params_of(), eps=1e-12), SMMF(params_of(), eps=1e-8))) == []


@BOTH
@pytest.mark.parametrize(
    ("option", "value", "dtypes"),
    [("rounding", "stochastic", (torch.bfloat16, torch.float16)), ("master", "split", (torch.bfloat16,))],
)
def test_options_of_16_bit_parameters(cls, option, value, dtypes):
    """Some of a model's parameters are usually float32; where all are, the option was hardly meant."""
    others = {"weight_decay": 0.1, "params": params_of()}
    found = warned(lambda: cls([{"params": params_of(), option: value}, others]))
    assert len(found) == 1 and f"{option}={value!r} does nothing here" in found[0]
    for dtype in dtypes:
        assert warned(lambda dtype=dtype: cls([*params_of(), *params_of(dtype)], **{option: value})) == []
        assert warned(lambda dtype=dtype: cls(params_of(dtype))) == []


def test_what_convert_makes_is_not_advised_on():
    saved = HFac(params_of()).state_dict()
    assert warned(lambda: hfac.convert(saved, params_of(), eps=1e-8)) == []


@pytest.mark.parametrize(
    ("name", "nearest"), [("learning_rate", "lr"), ("weight_decays", "weight_decay"), ("clip_treshold", "clip_thresh")]
)
def test_misspelt_options_of_groups(name, nearest):
    with pytest.raises(TypeError, match=f"got {name!r}; the nearest of them: {nearest}"):
        hfac.param_groups(torch.nn.Linear(2, 2), **{name: 5.0})


def test_options_of_groups_are_those_of_the_optimizers():
    for cls in (HFac, SMMF):
        options = dict(cls(params_of()).defaults)
        for other in (
            "weight_decay",
            "dense",
            "batch_dims",
            "views",
            "views_dim",
            "momentum",
        ):  # of which groups differ; a scheduler's
            options.pop(other, None)
        assert len(hfac.param_groups(torch.nn.Linear(2, 2), **options)) == 2


def test_all_arguments_that_are_not_ours_are_named_at_once():
    with pytest.raises(TypeError, match="no argument 'fused'; .* no argument 'learning_rate'; the nearest: lr"):
        HFac(params_of(), fused=True, lr=1e-3, learning_rate=1e-3)


def test_options_of_the_other_optimizer_are_refused_in_groups():
    """They were ignored: hfac.param_groups takes the options of both. The optimizer is left as it was."""
    takers = {HFac: types.HFacOptions.__optional_keys__, SMMF: types.SMMFOptions.__optional_keys__}
    for cls, other in ((HFac, SMMF), (SMMF, HFac)):
        foreign = takers[other] - takers[cls]
        assert len(foreign) >= 4
        for name in foreign:
            value = other(params_of()).defaults[name]  # the default is refused too: it would say what is not so
            message = rf"{cls.__name__} has no option '{name}', which this group gives; instead, \w+ "
            with pytest.raises(TypeError, match=message):
                cls(hfac.param_groups(torch.nn.Linear(2, 2), **{name: value}))
            optimizer = cls(params_of())
            with pytest.raises(TypeError, match=message):
                optimizer.add_param_group({"params": params_of(), name: value})
            with pytest.raises(TypeError, match=rf"{cls.__name__} has no argument '{name}'; instead, \w+ "):
                cls(params_of(), **{name: value})
            assert len(optimizer.param_groups) == 1
    assert HFac([{"params": params_of(), "layer": 3, "lr_scale": 0.5}]).param_groups[0]["layer"] == 3  # other code's


WRONG = [
    ("lr", -1.0, ValueError, "lr must be a number in"),
    ("lr", "fast", ValueError, "lr must be a number in"),
    ("weight_decay", float("nan"), ValueError, "weight_decay must be"),
    ("seed", 0.5, TypeError, "seed must be a whole number"),
    ("maximize", 1, TypeError, "maximize must be True or False"),
    ("nonfinite", "ignore", ValueError, "nonfinite must be one of"),
    ("backend", "gpu", ValueError, "backend must be one of"),
    ("rounding", None, TypeError, "rounding must be one of"),
    ("dense", True, ValueError, "dense of group 0 cannot change.*was False and is True"),
    ("batch_dims", 1, ValueError, "batch_dims of group 0 cannot change"),
]
OWN = {
    HFac: [
        ("betas", (1.5, 0.9), ValueError, r"betas\[0\] must be"),
        ("matricize", "flatten", ValueError, "matricize of group 0 cannot change.*'balanced'.*'flatten'"),
        ("first_moment", "int8", ValueError, "first_moment of group 0 cannot change"),
    ],
    SMMF: [
        ("decay_rate", 0.5, ValueError, "decay_rate must be"),
        ("vector_reshape", False, ValueError, "vector_reshape of group 0 cannot change"),
        ("signs", "bytes", ValueError, "signs of group 0 cannot change.*was 'bits' and is 'bytes'"),
        ("beta", None, ValueError, "beta of group 0 cannot change.*was 0.9 and is None"),
    ],
}


@pytest.mark.parametrize("by", ["step", "step_param"])
@pytest.mark.parametrize("after", ["construction", "steps", "loading", "copying"])
@pytest.mark.parametrize(("cls", "row"), [(cls, row) for cls, own in OWN.items() for row in WRONG + own])
def test_changed_options_are_checked(cls, row, after, by):
    """Before the next step writes anything; what they were put back to is taken again."""
    name, value, error, pattern = row
    optimizer = cls(params_of())
    if after == "steps":
        optimizer.step()
    if after == "loading":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if after == "copying":
        optimizer = copy.deepcopy(optimizer)
    (group,) = optimizer.param_groups
    param = group["params"][0]
    param.grad = torch.ones_like(param)
    before, old = param.detach().clone(), group[name]
    step = optimizer.step if by == "step" else lambda: optimizer.step_param(param)
    group[name] = value
    for _ in range(2):
        with pytest.raises(error, match=f"^{cls.__name__}: {pattern}"):
            step()
    assert torch.equal(param, before)
    group[name] = old
    step()
    assert not torch.equal(param, before)


@BOTH
def test_changed_options_are_taken(cls):
    """Texts are read as the constructor reads them, schedules and tensors pass, and so do keys of others."""
    optimizer, expected = cls(params_of()), cls(params_of(), lr=0.5, weight_decay=0.25)
    optimizer.param_groups[0].update(lr="0.5", weight_decay=torch.tensor(0.25), initial_lr=3, layer="w")
    for each in (optimizer, expected):
        each.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    for ours, theirs in zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        assert torch.equal(ours, theirs)


def test_what_fixes_the_state_may_change_before_there_is_any():
    param = params_of()[0].requires_grad_(False)
    param.grad = None
    optimizer = HFac([param])
    optimizer.param_groups[0].update(dense=True)
    optimizer.step()
    param.requires_grad_().grad = torch.ones_like(param)
    optimizer.step()
    assert "exp_avg" in optimizer.state[param]


CYCLING = {
    "one-cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9, pct_start=0.4),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=True),
}


@BOTH
@pytest.mark.parametrize("scheduler", CYCLING.values(), ids=CYCLING)
@pytest.mark.parametrize("saved", [False, True])
def test_schedulers_that_cycle_momentum(cls, saved, scheduler):
    """The first moment's decay follows them as AdamW's does, also in a run that is resumed."""
    optimizer, adamw = cls(params_of()), torch.optim.AdamW(params_of(), betas=(0.9, 0.999))
    schedules = [scheduler(each) for each in (optimizer, adamw)]
    seen = set()
    for step in range(8):
        for each, schedule in zip((optimizer, adamw), schedules, strict=True):
            each.step()
            schedule.step()
        if saved and step == 4:
            other = cls(params_of())
            schedule = scheduler(other)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            schedule.load_state_dict(schedules[0].state_dict())
            optimizer, schedules[0] = other, schedule
        optimizer.step()  # sees what has been written
        group = optimizer.param_groups[0]
        decay = group["beta"] if cls is SMMF else group["betas"][0]
        assert decay == adamw.param_groups[0]["betas"][0]
        seen.add(decay)
    assert len(seen) > 3


def test_smmfs_beta_and_momentum_are_one():
    optimizer = SMMF([{"params": params_of()[:1], "beta": 0.5}, {"params": params_of()[1:]}], beta=0.8)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.8]
    optimizer.param_groups[0]["beta"] = 0.6
    optimizer.param_groups[1]["momentum"] = 0.7
    optimizer.step()
    assert [(group["beta"], group["momentum"]) for group in optimizer.param_groups] == [(0.6, 0.6), (0.7, 0.7)]
    optimizer.param_groups[0]["momentum"] = 1.5
    with pytest.raises(ValueError, match="beta must be a number"):
        optimizer.step()
    del optimizer.param_groups[0]["momentum"]  # as in optimizers and state dicts of earlier versions
    optimizer.param_groups[0]["beta"] = 0.6
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == 0.6


@BOTH
@pytest.mark.parametrize("how", ["watched", "computed", "ahead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_that_rounding_loses(cls, how, dtype):
    """Said once, where nothing moves though the gradient is not zero, and the type is rounded to nearest."""

    def told(lr, scale=1.0, **options):
        params = params_of(dtype)
        for param in params:
            param.data += 4
            param.grad *= scale
        optimizer = cls(params, lr=lr, watch=how == "watched", **options)
        if how != "ahead":
            optimizer.step()
        found = [warned(lambda: optimizer.diagnostics(ahead=how == "ahead")) for _ in range(2)]
        return [[text for text in each if "16-bit" in text] for each in found]

    first, second = told(1e-5)
    assert len(first) == 1 and "moved no weight of 2 of 2 16-bit parameters" in first[0] and "stochastic" in first[0]
    assert second == []
    assert told(0.1) == told(1e-5, rounding="stochastic") == told(1e-5, scale=0.0) == [[], []]
    if dtype == torch.bfloat16:
        assert told(1e-5, master="split") == [[], []]
