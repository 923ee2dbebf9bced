"""Everything that must be refused, with what and with which words, and that a refusal leaves nothing half done.

One row per bad input: what is done to a running optimizer (or to an op), the exception, a pattern of its message. After
each refusal the parameters, the state and the parameter groups hold the very bits they held before. Below it, the texts
of a command line that are understood, each beside the value it stands for.
"""

import copy
from types import MappingProxyType

import calls
import pytest
import torch
from running import bits
from torch.nn import Parameter
from torch.optim import AdamW

from hfac import SMMF, HFac, functional

NAN, INF = float("nan"), float("inf")
CLASSES = {"hfac": HFac, "smmf": SMMF}
SHAPES = [(4, 6), (5,), (3, 2, 4), (1,)]


def snapshot(optimizer):
    """All that a refused call could have touched. Reads the attributes: state_dict() would tidy the state first."""
    order = {param: i for i, group in enumerate(optimizer.param_groups) for param in group["params"]}
    groups = [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]
    return (
        bits(list(order)),
        [(id(param), bits(state)) for param, state in optimizer.state.items()],
        bits(groups),
        bits(optimizer.defaults),
    )


def running(cls, **options):
    """An optimizer of two groups that has made two steps, with fresh gradients on its parameters."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape)) for shape in SHAPES]
    options = {"weight_decay": 0.1, **options}
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], **options)
    for _ in range(3):
        if params[0].grad is not None:
            optimizer.step()
        for param in params:
            param.grad = torch.randn_like(param)
    return optimizer


def matrix(dtype=torch.float32, **kwargs):
    return torch.ones(4, 6, dtype=dtype, **kwargs)


def new(cls=None, **options):
    """Constructing one with bad options."""

    def act(optimizer):
        (cls or type(optimizer))([Parameter(matrix())], **options)

    return act


def group(**options):
    """Adding a group with bad options, or of bad parameters."""

    def act(optimizer):
        optimizer.add_param_group({"params": [Parameter(matrix())], **options})

    return act


def of(make):
    """Constructing one on bad parameters."""

    def act(optimizer):
        type(optimizer)(make())

    return act


def load(change):
    """Loading the optimizer's own state dict, of one step earlier in time, after a change for the worse."""

    def act(optimizer):
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            for value in state.values():
                value.zero_()
        for saved_group in saved["param_groups"]:
            saved_group["lr"] = 0.5
        changed = change(saved)
        optimizer.load_state_dict(saved if changed is None else changed)

    return act


def put(index, key, value):
    """A state dict with one entry of the state of one parameter replaced (dropped where value is None)."""

    def change(saved):
        state = saved["state"][index]
        if value is None:
            del state[key]
        else:
            state[key] = value(state.get(key)) if callable(value) else value

    return load(change)


def options_of(index, **options):
    return load(lambda saved: saved["param_groups"][index].update(options))


def other(cls, shapes=SHAPES, steps=1):
    """Loading the state dict of another optimizer over parameters of the same shapes."""

    def act(optimizer):
        params = [Parameter(torch.ones(shape)) for shape in shapes]
        donor = cls([{"params": params[:2]}, {"params": params[2:]}])
        for param in params:
            param.grad = torch.ones_like(param)
        for _ in range(steps):
            donor.step()
        optimizer.load_state_dict(donor.state_dict())

    return act


def gradient(index, make):
    """A step in which one gradient is of a kind that cannot be; all others are good."""

    def act(optimizer):
        param = [param for group in optimizer.param_groups for param in group["params"]][index]
        param.grad = make(param)
        optimizer.step()

    return act


def complex_gradient(optimizer):
    """A parameter that has become complex since it was added, as `module.to(torch.complex64)` does."""
    param = Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [param]})
    del optimizer.param_groups[-1]
    optimizer.state.pop(param)
    param.data = param.data.to(torch.complex64)
    param.grad = torch.ones_like(param)
    optimizer.param_groups[1]["params"].append(param)
    try:
        optimizer.step()
    finally:
        optimizer.param_groups[1]["params"].pop()
        optimizer.state.pop(param, None)


def resized(shape):
    """The data of a parameter replaced by data of another shape, as resizing an embedding does: state made for the old
    shape must not be used, even where the number of elements is the same. Refused before anything is written."""

    def act(optimizer):
        param = optimizer.param_groups[0]["params"][0]
        data, grad, param.grad = param.data, param.grad, None
        param.data = torch.ones(shape)
        param.grad = torch.ones(shape)
        try:
            optimizer.step()
        finally:
            param.grad = None
            param.data, param.grad = data, grad

    return act


def step_with_failing_closure(optimizer):
    def closure():
        raise ArithmeticError("loss is lost")

    optimizer.step(closure)


def flat_param():
    param = Parameter(torch.ones(24))
    param._is_flat_param = True  # how torch's FSDP marks its flat parameters
    return [param]


def raising_pre_hook(optimizer):
    def hook(optimizer, state_dict):
        raise LookupError("no such file")

    with_hook = optimizer.register_load_state_dict_pre_hook(hook)
    try:
        load(lambda saved: None)(optimizer)
    finally:
        with_hook.remove()


def breaking_pre_hook(optimizer):
    """What a hook makes of a good state dict is what must be checked."""

    def hook(optimizer, state_dict):
        state = {index: dict(entry) for index, entry in state_dict["state"].items()}
        del state[1]["step"]
        return {**state_dict, "state": state}

    with_hook = optimizer.register_load_state_dict_pre_hook(hook)
    try:
        load(lambda saved: None)(optimizer)
    finally:
        with_hook.remove()


def own_parameter_again(optimizer):
    optimizer.add_param_group({"params": [Parameter(matrix()), optimizer.param_groups[0]["params"][0]]})


BOTH = ("hfac", "smmf")
H, S = ("hfac",), ("smmf",)
# id, classes, what is done, exception, pattern of the message
# fmt: off
ROWS = [
    # ---- options
    ("lr-negative", BOTH, new(lr=-1e-3), ValueError, r"lr must be a number in \[0, inf\).* got -0\.001"),
    ("lr-nan", BOTH, new(lr=NAN), ValueError, r"lr must be a number .* got nan"),
    ("lr-inf", BOTH, new(lr=INF), ValueError, r"lr must be a number .* got inf"),
    ("lr-text", BOTH, new(lr="abc"), ValueError, r"lr must be a number .* got 'abc'"),
    ("lr-text-nan", BOTH, new(lr="nan"), ValueError, r"lr must be a number .* got nan"),
    ("lr-text-none", BOTH, new(lr="none"), TypeError, r"lr must be a number .* got None"),
    ("lr-bool", BOTH, new(lr=True), TypeError, r"lr must be a number .* got True"),
    ("lr-list", BOTH, new(lr=[0.1]), TypeError, r"lr must be a number .* got \[0\.1\]"),
    ("lr-tensor-of-two", BOTH, new(lr=torch.ones(2)), TypeError,
     r"lr must be .* 0-d tensor, got a tensor of shape \(2,\)"),
    ("lr-tensor-negative", BOTH, new(lr=torch.tensor(-1.0)), ValueError, r"lr must be .* got -1\.0"),
    ("lr-tensor-complex", BOTH, new(lr=torch.tensor(1j)), TypeError, r"lr must be .* got a tensor .*complex64"),
    ("weight-decay-negative", BOTH, new(weight_decay=-0.1), ValueError, r"weight_decay must be .* got -0\.1"),
    ("weight-decay-text", BOTH, new(weight_decay="much"), ValueError, r"weight_decay must be .* got 'much'"),
    ("betas-first-is-one", H, new(betas=(1.0, 0.999)), ValueError,
     r"betas\[0\] must be a number in \[0, 1\), got 1\.0"),
    ("betas-second-is-one", H, new(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be a number in \[0, 1\), got 1\.0"),
    ("betas-negative", H, new(betas=(-0.1, 0.9)), ValueError, r"betas\[0\] must be .* got -0\.1"),
    ("betas-nan", H, new(betas=(0.9, NAN)), ValueError, r"betas\[1\] must be .* got nan"),
    ("betas-one-number", H, new(betas=0.9), TypeError, r"betas must be a pair of numbers .* got 0\.9"),
    ("betas-three", H, new(betas=(0.9, 0.99, 0.999)), ValueError, r"betas must be a pair of numbers"),
    ("betas-text-of-one", H, new(betas="0.9"), ValueError, r"betas must be a pair of numbers"),
    ("betas-text", H, new(betas="(0.9,x)"), ValueError, r"betas\[1\] must be a number .* got 'x'"),
    ("betas-none", H, new(betas=None), TypeError, r"betas must be a pair of numbers .* got None"),
    ("hfac-eps-zero", H, new(eps=0.0), ValueError, r"eps must be a number in \(0, inf\), got 0\.0"),
    ("smmf-eps-negative", S, new(eps=-1e-8), ValueError, r"eps must be a number in \[0, inf\), got -1e-08"),
    ("eps-tensor", BOTH, new(eps=torch.tensor(1e-8)), TypeError, r"eps must be a number .* got a tensor"),
    ("clip-zero", H, new(clip_threshold=0.0), ValueError,
     r"clip_threshold must be .*\(0, inf\).* None \(no clipping\)"),
    ("clip-negative", H, new(clip_threshold=-1), ValueError, r"clip_threshold must be .* got -1"),
    ("matricize-unknown", H, new(matricize="square"), ValueError,
     r"matricize must be one of 'balanced', 'flatten', got 'sq"),
    ("matricize-number", H, new(matricize=1), TypeError, r"matricize must be one of .* got 1"),
    ("beta-is-one", S, new(beta=1.0), ValueError, r"beta must be a number in \[0, 1\).* got 1\.0"),
    ("beta-negative", S, new(beta=-0.5), ValueError, r"beta must be .* None \(no first moment\), got -0\.5"),
    ("decay-rate-positive", S, new(decay_rate=0.5), ValueError, r"decay_rate must be a number in \[-1, 0\], got 0\.5"),
    ("decay-rate-below-minus-one", S, new(decay_rate=-1.1), ValueError, r"decay_rate must be .* got -1\.1"),
    ("growth-rate-negative", S, new(growth_rate=-0.1), ValueError,
     r"growth_rate must be a number in \[0, 1\], got -0\.1"),
    ("growth-rate-above-one", S, new(growth_rate=1.001), ValueError, r"growth_rate must be .* got 1\.001"),
    ("weight-decay-mode-unknown", S, new(weight_decay_mode="sgd"), ValueError,
     r"weight_decay_mode must be one of 'adamw', 'a"),
    ("vector-reshape-number", S, new(vector_reshape=1), TypeError, r"vector_reshape must be True or False, got 1"),
    ("maximize-number", BOTH, new(maximize=1), TypeError, r"maximize must be True or False, got 1"),
    ("maximize-text", BOTH, new(maximize="maybe"), ValueError, r"maximize must be true or false, got 'maybe'"),
    ("capturable-none", BOTH, new(capturable=None), TypeError, r"capturable must be True or False, got None"),
    ("nonfinite-unknown", BOTH, new(nonfinite="ignore"), ValueError, r"nonfinite must be one of 'propagate', 'skip'"),
    ("backend-unknown", BOTH, new(backend="rocm"), ValueError,
     r"backend must be one of 'auto'.*'reference', got 'rocm'"),
    ("backend-none", BOTH, new(backend=None), TypeError, r"backend must be one of"),
    ("option-unknown", BOTH, new(momentum=0.9), TypeError, r"has no argument 'momentum'; the nearest: "),
    ("option-misspelt", BOTH, new(weight_dacay=0.1), TypeError, r"has no argument 'weight_dacay'.* weight_decay, "),
    ("option-long-form", BOTH, new(learning_rate=0.1), TypeError, r"has no argument 'learning_rate'; the nearest: lr$"),
    ("option-of-adamw", BOTH, new(fused=True), TypeError, r"has no argument 'fused'; instead, leave it out"),
    ("betas", S, new(betas=(0.9, 0.99)), TypeError, r"has no argument 'betas'; instead, pass beta="),
    # ---- parameters
    ("params-empty", BOTH, of(list), ValueError, r"empty parameter list"),
    ("params-one-tensor", BOTH, of(lambda: Parameter(matrix())), TypeError,
     r"should be an iterable of Tensors or dicts"),
    ("params-not-tensors", BOTH, of(lambda: [1.0]), TypeError, r"can only optimize Tensors"),
    ("params-non-leaf", BOTH, of(lambda: [Parameter(matrix()) * 2]), ValueError, r"non-leaf"),
    ("params-integer", BOTH, of(lambda: [matrix(torch.int64)]), ValueError,
     r"parameter 0 .* has dtype torch\.int64; float16, b"),
    ("params-bool", BOTH, of(lambda: [Parameter(matrix()), matrix(torch.bool)]), ValueError,
     r"parameter 1 .* torch\.bool"),
    ("params-float8", BOTH, of(lambda: [matrix().to(torch.float8_e5m2)]), ValueError, r"parameter 0 .*float8_e5m2"),
    ("params-complex", BOTH, of(lambda: [matrix(torch.complex64)]), RuntimeError,
     r"parameter 0 .* is complex .*view_as_real"),
    ("params-sparse", BOTH, of(lambda: [matrix().to_sparse()]), RuntimeError,
     r"parameter 0 .* torch\.sparse_coo; .*to_dense"),
    ("params-some-unnamed", BOTH, of(lambda: [("w", Parameter(matrix())), Parameter(matrix())]), ValueError,
     r"with/without names"),
    ("params-fsdp1-flat", BOTH, of(flat_param), TypeError, r"parameter 0 .* flat parameter of FSDP1.*fully_shard"),
    # ---- groups added to a running optimizer
    ("group-lr", BOTH, group(lr=-1.0), ValueError, r"lr must be a number"),
    ("group-weight-decay", BOTH, group(weight_decay="x"), ValueError, r"weight_decay must be a number"),
    ("group-betas", H, group(betas=(0.9, 2.0)), ValueError, r"betas\[1\] must be a number"),
    ("group-beta", S, group(beta=2.0), ValueError, r"beta must be a number"),
    ("group-flag", BOTH, group(maximize=0), TypeError, r"maximize must be True or False"),
    ("group-backend", BOTH, group(backend="opencl"), ValueError, r"backend must be one of"),
    ("group-integer", BOTH, group(params=[Parameter(matrix()), matrix(torch.int32)]), ValueError,
     r"parameter 1 .*int32"),
    ("group-complex", BOTH, group(params=[matrix(torch.complex128)]), RuntimeError, r"parameter 0 .* is complex"),
    ("group-sparse", BOTH, group(params=matrix().to_sparse()), RuntimeError, r"parameter 0 .*sparse_coo"),
    ("group-flat", BOTH, group(params=flat_param()), TypeError, r"flat parameter of FSDP1"),
    ("group-set", BOTH, group(params={Parameter(matrix())}), TypeError, r"ordered collections"),
    ("group-named", BOTH, group(params=[("w", Parameter(matrix()))]), ValueError, r"with/without names"),
    ("group-not-a-dict", BOTH, lambda optimizer: optimizer.add_param_group([matrix()]), TypeError, r"must be a dict"),
    ("group-own-parameter", BOTH, own_parameter_again, ValueError, r"appear in more than one parameter group"),
    # ---- gradients
    ("grad-sparse", BOTH, gradient(0, lambda p: p.detach().to_sparse()), RuntimeError,
     r"gradient of parameter 0 of group 0 has layout torch\.sparse_coo; .*sparse=False .*SparseAdam"),
    ("grad-sparse-in-the-second-group", BOTH, gradient(2, lambda p: p.detach().to_sparse()), RuntimeError,
     r"gradient of parameter 0 of group 1 has layout"),
    ("grad-complex", BOTH, complex_gradient, RuntimeError,
     r"parameter 2 of group 1 is complex .*view_as_real"),
    ("data-longer", BOTH, resized((8, 6)), ValueError,
     r"elements, which do not make the 48 elements .* shape \(8, 6\)"),
    ("data-transposed", H, resized((6, 4)), ValueError,
     r"has 4 elements, which no leading dimensions .* shape \(6, 4\) make"),
    ("data-transposed", S, resized((6, 4)), ValueError,
     r"exp_avg_signs\[\d\] .* shape \(6, 4\) must have shape \(6, 1\), got"),
    ("closure-raises", BOTH, step_with_failing_closure, ArithmeticError, r"loss is lost"),
    # ---- state dicts: the whole
    ("load-number", BOTH, load(lambda saved: 0), TypeError, r"keys 'state' and 'param_groups'.* got int"),
    ("load-list", BOTH, load(lambda saved: [saved]), TypeError, r"keys 'state' and 'param_groups'.* got list"),
    ("load-empty", BOTH, load(lambda saved: {}), TypeError, r"keys 'state' and 'param_groups'.* got \[\]"),
    ("load-no-groups", BOTH, load(lambda saved: {"state": saved["state"]}), TypeError, r"got \['state'\]"),
    ("load-model", BOTH, load(lambda saved: {"weight": matrix()}), TypeError, r"got \['weight'\]"),
    ("load-state-list", BOTH, load(lambda saved: {**saved, "state": []}), TypeError, r"'state' is a dict"),
    ("load-no-params", BOTH, load(lambda saved: saved["param_groups"][1].pop("params") and None), TypeError,
     r"with 'params'"),
    ("load-fewer-groups", BOTH, load(lambda saved: saved["param_groups"].pop() and None), ValueError,
     r"has 2 groups of \[2, 2\] parameters, the state dict 1 of \[2\]"),
    ("load-smaller-group", BOTH, load(lambda saved: saved["param_groups"][1]["params"].pop() and None), ValueError,
     r"has 2 groups of \[2, 2\] parameters, the state dict 2 of \[2, 1\]"),
    ("load-unknown-index", BOTH, load(lambda saved: saved["state"].update({9: saved["state"][0]})), ValueError,
     r"state for parameter 9, which is in none of its groups"),
    ("load-adamw", BOTH, other(AdamW), ValueError, r"saved by another optimizer"),
    ("load-adamw-never-stepped", BOTH, other(AdamW, steps=0), ValueError, r"saved by another optimizer"),
    ("load-smmf-into-hfac", H, other(SMMF), ValueError,
     r"group 0 .* no 'matricize': it was saved by another optimizer. hfac.convert\(.*to='hfac'\) translates"),
    ("load-hfac-into-smmf", S, other(HFac), ValueError,
     r"group 0 .* no 'vector_reshape': it was saved by another optimizer"),
    ("load-vectors-of-another", H, other(SMMF, [(5,), (7,), (3,), (1,)]), ValueError, r"saved by another optimizer"),
    ("load-other-shapes", BOTH, lambda optimizer: other(type(optimizer), [(4, 6), (5,), (7, 2, 4), (1,)])(optimizer),
     ValueError,
     r"state of parameter 2 \(shape \(3, 2, 4\)\): 'exp_avg_\w+' must have shape \(\d+,( \d+)*\), got \(\d+,( \d+)*\)"),
    # ---- state dicts: one parameter's state
    ("load-state-not-a-dict", BOTH, load(lambda s: s["state"].update({1: [1, 2]})), TypeError,
     r"parameter 1 .* got list"),
    ("load-missing-step", BOTH, put(1, "step", None), ValueError,
     r"parameter 1 \(shape \(5,\)\) must have the keys .*'step'"),
    ("load-missing-moment", BOTH, put(0, "exp_avg_row", None), ValueError, r"parameter 0 .* must have the keys"),
    ("load-key-of-another-layout", BOTH, put(0, "exp_avg", matrix()), ValueError,
     r"must have the keys .* got .*'exp_avg',"),
    ("load-transposed", H, put(0, "exp_avg_row", torch.ones(6)), ValueError,
     r"'exp_avg_row' must have shape \(4,\), got \(6,\)"),
    ("load-signs-shape", S, put(0, "exp_avg_sign", torch.ones(3, dtype=torch.uint8)), ValueError,
     r"shape \(4, 1\), got \(3,\)"),
    ("load-signs-float", S, put(0, "exp_avg_sign", lambda s: s.float()), ValueError,
     r"'exp_avg_sign' must be torch\.uint8, got"),
    ("load-signs-bool", S, put(0, "exp_avg_sign", lambda s: s.bool()), ValueError,
     r"must be torch\.uint8, got torch\.bool"),
    ("load-factor-integer", BOTH, put(0, "exp_avg_row", lambda s: s.long()), ValueError,
     r"must be torch\.float32, got torch\.int64"),
    ("load-factor-complex", BOTH, put(2, "exp_avg_col", lambda s: s + 0j), ValueError,
     r"parameter 2 .* got torch\.complex64"),
    ("load-factor-sparse", BOTH, put(0, "exp_avg_row", lambda s: s.to_sparse()), ValueError,
     r"of layout torch\.sparse_coo"),
    ("load-factor-list", BOTH, put(0, "exp_avg_sq_row", [1.0]), TypeError,
     r"'exp_avg_sq_row' must be a tensor .* got list"),
    ("load-step-of-two", BOTH, put(0, "step", torch.ones(2)), ValueError,
     r"'step' must be one number, got shape \(2,\)"),
    ("load-step-text", BOTH, put(0, "step", "3"), ValueError, r"parameter 0 .*'step' must be one number, got str"),
    ("load-step-nan", BOTH, put(3, "step", torch.tensor(NAN)), ValueError,
     r"parameter 3 .*'step' must be a number >= 0, got nan"),
    ("load-step-negative", BOTH, put(0, "step", -1), ValueError, r"'step' must be a number >= 0, got -1\.0"),
    ("load-skipped-negative", BOTH, put(0, "skipped", torch.tensor(-1)), ValueError,
     r"'skipped' must be a number >= 0, got -1"),
    # ---- state dicts: options of a group
    ("load-lr", BOTH, options_of(1, lr=-1.0), ValueError, r"lr must be a number"),
    ("load-weight-decay", BOTH, options_of(0, weight_decay=None), TypeError, r"weight_decay must be a number"),
    ("load-betas", H, options_of(0, betas=[0.9]), ValueError, r"betas must be a pair"),
    ("load-decay-rate", S, options_of(1, decay_rate=3), ValueError, r"decay_rate must be a number"),
    ("load-flag", BOTH, options_of(1, maximize="up"), ValueError, r"maximize must be true or false"),
    ("load-other-matricize", H, load(lambda s: s["state"].pop(0) and s["param_groups"][1].update(matricize="flatten")),
     ValueError, r"parameter 2 \(shape \(3, 2, 4\)\): 'exp_avg_row' must have shape \(3,\), got \(3, 2\)"),
    ("load-without-first-moment", S, options_of(0, beta=None), ValueError,
     r"parameter 0 .* must have the keys .*exp_avg_sq_col"),
    # ---- state dicts: hooks
    ("load-hook-raises", BOTH, raising_pre_hook, LookupError, r"no such file"),
    ("load-hook-breaks-it", BOTH, breaking_pre_hook, ValueError, r"parameter 1 .* must have the keys"),
]
# fmt: on
TABLE = [
    pytest.param(CLASSES[cls], act, error, pattern, id=f"{name}-{cls}")
    for name, classes, act, error, pattern in ROWS
    for cls in classes
]


@pytest.mark.parametrize(("cls", "act", "error", "pattern"), TABLE)
def test_refused_and_nothing_changed(cls, act, error, pattern):
    optimizer = running(cls)
    before = snapshot(optimizer)
    with pytest.raises(error, match=pattern) as refusal:
        act(optimizer)
    assert type(refusal.value) is error  # not a subclass that happens to match, such as KeyError for LookupError
    assert snapshot(optimizer) == before
    # and it still works: same result as one that was never asked the impossible
    untouched = running(cls)
    for a, b in zip(optimizer.param_groups, untouched.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            p.grad = q.grad
    optimizer.step()
    untouched.step()
    assert bits(optimizer.state_dict()) == bits(untouched.state_dict())


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_snapshot_notices_a_change(cls):
    """The guard of every row above: it sees a step, a changed option and a changed default."""
    for change in (
        lambda optimizer: optimizer.step(),
        lambda optimizer: optimizer.param_groups[1].update(lr=0.5),
        lambda optimizer: optimizer.defaults.update(lr=0.5),
        lambda optimizer: optimizer.state.popitem(),
        lambda optimizer: optimizer.param_groups[0]["params"][0].data[0, 0].neg_(),
    ):
        optimizer = running(cls)
        before = snapshot(optimizer)
        change(optimizer)
        assert snapshot(optimizer) != before


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("where", ["construction", "group"])
@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_absent_backend_asked_for(cls, where, name):
    """An explicit request is met or refused: why, what is there, what to do. Never replaced."""
    from hfac import backends

    here = torch.device("cpu")
    optimizer = running(cls)
    before = snapshot(optimizer)
    ask = (
        (lambda: cls([Parameter(matrix())], backend=name))
        if where == "construction"
        else (lambda: group(backend=name)(optimizer))
    )
    if name in backends.available(here):
        ask()
        return
    pattern = (
        rf"backend='{name}' was asked for tensors on cpu, but .* (Use|Build|Install) .* Present for cpu: .*'reference'"
    )
    with pytest.raises(RuntimeError, match=pattern):
        ask()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_same_parameter_twice_in_a_group_warns(cls):
    param = Parameter(matrix())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        cls([param, param])


# ---- ops and functional forms ----------------------------------------------------------------------------------------


def f32(*shape, **kwargs):
    return torch.full(shape, 0.5, **kwargs)


def u8(*shape):
    return torch.ones(shape, dtype=torch.uint8)


HFAC = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-30, clip_threshold=1.0, weight_decay=0.1)
SMMF_OP = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
SMMF_STEP = dict(lr=0.1, beta=0.9, eps=1e-8, weight_decay=0.1, decay_rate=-0.5, growth_rate=0.99)


def good_call(name):
    """Arguments, two parameters each, that the function of this name takes."""
    two = [(4, 6), (3, 8)]
    hfac = dict(
        exp_avg_rows=[f32(4), f32(3)],
        exp_avg_cols=[f32(6), f32(8)],
        exp_avg_sq_rows=[f32(4), f32(3)],
        exp_avg_sq_cols=[f32(6), f32(8)],
    )
    smmf = dict(
        exp_avg_rows=[f32(6), f32(6)],
        exp_avg_cols=[f32(4), f32(4)],
        exp_avg_signs=[u8(4, 1), u8(3, 1)],
        exp_avg_sq_rows=[f32(6), f32(6)],
        exp_avg_sq_cols=[f32(4), f32(4)],
    )
    dense = dict(exp_avgs=[f32(4, 6), f32(3, 8)], exp_avg_sqs=[f32(4, 6), f32(3, 8)])
    whole = dict(exp_avgs=[None, None], exp_avg_sqs=[None, None], state_steps=[f32(), f32()])
    call = {"params": [f32(*s) for s in two], "grads": [f32(*s) for s in two]}
    call |= {
        "hfac_step_": {**hfac, **HFAC},
        "hfac_dense_step_": {**dense, **HFAC},
        "smmf_step_": {**smmf, **SMMF_OP},
        "smmf_dense_step_": {**dense, **SMMF_OP},
        "hfac": {**hfac, **whole, **HFAC},
        "smmf": {**smmf, **whole, **SMMF_STEP},
    }[name]
    return call


META = torch.device("meta")
OPS = ("hfac_step_", "hfac_dense_step_", "smmf_step_", "smmf_dense_step_")
FORMS = ("hfac", "smmf")
FACTORED = ("hfac_step_", "smmf_step_", *FORMS)
DENSE = ("hfac_dense_step_", "smmf_dense_step_")
# id, functions, the argument changed in its second entry (or as a whole), to what, exception, pattern
# fmt: off
CALLS = [
    ("grads-fewer", OPS + FORMS, "grads", [f32(4, 6)], ValueError,
     r"grads must have one entry per parameter \(2\), got 1"),
    ("states-fewer", OPS, "exp_avg_sq_rows|exp_avg_sqs", [f32(4)], ValueError,
     r"exp_avg_sq\w+ must have one entry per param"),
    ("signs-fewer", ("smmf_step_", "smmf"), "exp_avg_signs", [u8(4, 1)], ValueError,
     r"exp_avg_signs must have one entry per p"),
    ("steps-fewer", FORMS, "state_steps", [f32()], ValueError,
     r"state_steps must have one entry per parameter \(2\), got 1"),
    ("skipped-fewer", FORMS, "skipped", [], ValueError, r"skipped must have one entry per parameter \(2\), got 0"),
    ("first-moment-absent", ("smmf_step_",), "exp_avg_rows", None, ValueError,
     r"exp_avg_rows is required .* unless beta1 is None"),
    ("whole-absent", ("smmf_dense_step_",), "exp_avgs", None, ValueError,
     r"exp_avgs is required .* unless beta1 is None"),
    ("grad-shape", OPS + FORMS, "grads", (f32(8, 3),), ValueError,
     r"grads\[\d\] must have its parameter's shape \(3, 8\), got \(8, 3\)"),
    ("grad-meta", OPS + FORMS, "grads", (f32(3, 8, device=META),), RuntimeError,
     r"grads\[\d\] on meta, expected both on cpu"),
    ("param-meta", OPS, "params", (f32(3, 8, device=META),), RuntimeError,
     r"params\[1\] is on meta, but params\[0\] is on cpu"),
    ("grad-sparse", OPS + FORMS, "grads", (f32(3, 8).to_sparse(),), RuntimeError,
     r"grads\[\d\] has layout torch\.sparse_coo"),
    ("grad-complex", OPS + FORMS, "grads", (f32(3, 8) + 0j,), RuntimeError, r"grads\[\d\] is complex"),
    ("grad-integer", OPS + FORMS, "grads", (f32(3, 8).int(),), ValueError,
     r"grads\[\d\] must be one of float16, .* got torch\.int32"),
    ("grad-none", FORMS, "grads", (None,), TypeError, r"grads\[1\] must be a tensor, got NoneType"),
    ("param-integer", OPS, "params", (f32(3, 8).int(),), ValueError,
     r"params\[1\] must be one of float16, .* got torch\.int32"),
    ("param-complex", OPS, "params", (f32(3, 8) + 0j,), RuntimeError, r"params\[1\] is complex"),
    ("state-float64", FACTORED, "exp_avg_sq_rows", (f32(3, dtype=torch.float64),), ValueError,
     r"must be torch\.float32 for a torch"),
    ("state-bfloat16", FACTORED, "exp_avg_cols", (f32(8, dtype=torch.bfloat16),), ValueError,
     r"must be torch\.float32 for a torch"),
    ("state-meta", FACTORED, "exp_avg_cols", (f32(8, device=META),), RuntimeError,
     r"exp_avg_cols\[\d\] must be on cpu like its par"),
    ("state-strided", FACTORED, "exp_avg_cols", (f32(16)[::2],), ValueError, r"exp_avg_cols\[\d\] must be contiguous"),
    ("state-none", FACTORED, "exp_avg_sq_rows", (None,), ValueError, r"exp_avg_sq_rows\[\d\] is None"),
    ("factor-longer", FACTORED, "exp_avg_sq_rows", (f32(5),), ValueError,
     r"have 5 and \d elements, which do not make the 24 ele"),
    ("factor-of-first-moment", FACTORED, "exp_avg_rows", (f32(5),), ValueError,
     r"exp_avg_rows\[\d\] and exp_avg_cols\[\d\] have 5"),
    ("whole-shape", DENSE, "exp_avg_sqs", (f32(24),), ValueError,
     r"exp_avg_sqs\[1\] must have its parameter's shape \(3, 8\), got \(24,"),
    ("whole-float64", DENSE, "exp_avgs", (f32(3, 8, dtype=torch.float64),), ValueError,
     r"exp_avgs\[1\] must be torch\.float32"),
    ("signs-shape", ("smmf_step_", "smmf"), "exp_avg_signs", (u8(3),), ValueError,
     r"exp_avg_signs\[\d\] .* must have shape \(3, 1\)"),
    ("signs-float", ("smmf_step_", "smmf"), "exp_avg_signs", (f32(3, 1),), ValueError,
     r"exp_avg_signs\[\d\] must be torch\.uint8"),
    ("nonfinite-float", OPS, "nonfinite", f32(2), ValueError,
     r"nonfinite must be an int32 tensor of shape \(2,\) on cpu"),
    ("nonfinite-longer", OPS, "nonfinite", torch.zeros(3, dtype=torch.int32), ValueError,
     r"nonfinite must be an int32 tensor"),
    ("steps-not-tensors", FORMS, "state_steps", [1.0, 1.0], TypeError, r"state_steps\[0\] must be a tensor, got float"),
    ("skipped-float", FORMS, "skipped", [f32(), f32()], RuntimeError,
     r"skipped\[0\] \(int32\) must be on the device of params\[0\]"),
    ("skipped-elsewhere", FORMS, "skipped",
     [torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.int32, device=META)], RuntimeError,
     r"state_steps\[1\] and skipped\[1\] .*device of params\[1\], cpu"),
    ("backend-unknown", OPS + FORMS, "backend", "metal", ValueError, r"backend must be one of .* got 'metal'"),
    ("weight-decay-mode", ("smmf",), "weight_decay_mode", "AdamW", ValueError,
     r"weight_decay_mode must be 'adamw' or 'adam'"),
]
# fmt: on


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "pattern"),
    [pytest.param(name, *row[2:], id=f"{row[0]}-{name.strip('_')}") for row in CALLS for name in row[1]],
)
def test_call_refused_and_nothing_written(name, argument, value, error, pattern):
    call = good_call(name)
    argument = next(key for key in argument.split("|") if key in call or "|" not in argument)
    if isinstance(value, tuple):  # the second entry only, so that work on the first could have begun
        call[argument] = [call[argument][0], *value]
    else:
        call[argument] = value
    tensors = {key: entry for key, entry in call.items() if isinstance(entry, list)}
    before = bits(
        {
            key: [None if t is None or t.__class__ is float or t.is_sparse else t for t in e]
            for key, e in tensors.items()
        }
    )
    function = getattr(calls if name in OPS else functional, name)
    with pytest.raises(error, match=pattern):
        function(**call)
    after = bits(
        {
            key: [None if t is None or t.__class__ is float or t.is_sparse else t for t in e]
            for key, e in tensors.items()
        }
    )
    assert after == before


@pytest.mark.parametrize("name", OPS + FORMS)
def test_good_calls_are_taken(name):
    """What the rows above spoil is good before they do."""
    call = good_call(name)
    before = bits(call["params"])
    getattr(calls if name in OPS else functional, name)(**call)
    assert bits(call["params"]) != before


# ---- text that is understood -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "name", "text", "value"),
    [
        pytest.param(CLASSES[cls], name, text, value, id=f"{cls}-{name}-{text}")
        for cls, name, text, value in [
            ("hfac", "lr", "0.9", 0.9),
            ("hfac", "lr", " 1e-3 ", 1e-3),
            ("hfac", "lr", 1, 1.0),
            ("hfac", "weight_decay", "0", 0.0),
            ("hfac", "betas", "(0.9,0.95)", (0.9, 0.95)),
            ("hfac", "betas", "0.9,0.95", (0.9, 0.95)),
            ("hfac", "betas", "[0.9, 0.95]", (0.9, 0.95)),
            ("hfac", "betas", ["0.9", 0.95], (0.9, 0.95)),
            ("hfac", "eps", "1e-20", 1e-20),
            ("hfac", "clip_threshold", "none", None),
            ("hfac", "clip_threshold", "None", None),
            ("hfac", "clip_threshold", "null", None),
            ("hfac", "clip_threshold", "2", 2.0),
            ("hfac", "maximize", "true", True),
            ("hfac", "maximize", "True", True),
            ("hfac", "maximize", "yes", True),
            ("hfac", "maximize", "1", True),
            ("hfac", "capturable", "false", False),
            ("hfac", "capturable", "0", False),
            ("hfac", "capturable", "No", False),
            ("hfac", "matricize", "flatten", "flatten"),
            ("smmf", "lr", "2e-2", 2e-2),
            ("smmf", "beta", "0.5", 0.5),
            ("smmf", "beta", "none", None),
            ("smmf", "eps", "0", 0.0),
            ("smmf", "decay_rate", "-0.8", -0.8),
            ("smmf", "growth_rate", "1", 1.0),
            ("smmf", "vector_reshape", "false", False),
            ("smmf", "weight_decay_mode", "adam", "adam"),
            ("smmf", "nonfinite", "skip", "skip"),
        ]
    ],
)
def test_text_means_the_same_as_the_value(cls, name, text, value):
    typed, texted = running(cls, **{name: value}), running(cls, **{name: text})
    param = Parameter(matrix())
    grouped = cls([{"params": [param], name: text}])
    assert type(grouped.param_groups[0][name]) is type(value) and grouped.param_groups[0][name] == value
    assert texted.defaults == typed.defaults
    typed.step()
    texted.step()
    assert snapshot(texted)[0] == snapshot(typed)[0]
    assert bits(texted.state_dict()) == bits(typed.state_dict())


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_read_only_mapping_is_a_state_dict(cls):
    optimizer, fresh = running(cls), running(cls)
    optimizer.step()
    fresh.load_state_dict(MappingProxyType(optimizer.state_dict()))
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())


@pytest.mark.parametrize(("option", "value"), [("lr", "abc"), ("weight_decay", None), ("backend", "cuda")])
@pytest.mark.parametrize("cls", [HFac, SMMF], ids=lambda cls: cls.__name__)
def test_a_bad_later_group_leaves_the_earlier_ones_alone(cls, option, value):
    """Options written into a group after construction are first seen by the step."""
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = cls([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones(4, 3)
    optimizer.step()
    before = bits(optimizer.state_dict()["state"]), bits(params)
    optimizer.param_groups[1][option] = value
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    assert (bits(optimizer.state_dict()["state"]), bits(params)) == before
