"""The state: what it is, how large, where it lies, and that no way of saving, moving or losing it changes a bit.

Checkpoints in the middle of a run (files, torch.distributed.checkpoint), parameters that are swapped, frozen, moved
between types and devices after construction, the layout of the sign bits against numpy, bytes per parameter, and steps
on gradients that are not finite.
"""

import copy
import io

import numpy as np
import pytest
import torch
from running import SHAPES, Int8, bits, gradients, parameters, train
from torch import nn
from torch.nn import Parameter

from hfac import SMMF, HFac, matricize

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = float("inf"), float("nan")
OPTIONS = {
    HFac: dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
    SMMF: dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
}
OPTIONS[Int8] = OPTIONS[HFac]
VARIANTS = [
    pytest.param(cls, options, id=f"{cls.__name__.lower()}-{name}")
    for cls, name, options in [
        (HFac, "plain", {}),
        (HFac, "skip", {"nonfinite": "skip"}),
        (HFac, "capturable", {"capturable": True}),
        (HFac, "flatten", {"matricize": "flatten"}),
        (HFac, "unclipped", {"clip_threshold": None}),
        (SMMF, "plain", {}),
        (SMMF, "skip", {"nonfinite": "skip"}),
        (SMMF, "capturable", {"capturable": True}),
        (SMMF, "vectors-whole", {"vector_reshape": False}),
        (SMMF, "no-first-moment", {"beta": None}),
        (SMMF, "coupled", {"weight_decay_mode": "adam"}),
    ]
]


def through_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def storages(value):
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()} if value.numel() else set()
    if isinstance(value, dict):
        return set().union(*map(storages, value.values()))
    return set().union(*map(storages, value)) if isinstance(value, list | tuple) else set()


# ---- what it is ------------------------------------------------------------------------------------------------------


def hfac_state(shape, options):
    """Keys and shapes as the definition of the algorithm gives them, written without the library's helpers."""
    cuts = [(int(np.prod(shape[:k])), int(np.prod(shape[k:])), k) for k in range(1, len(shape))]
    if options.get("matricize") == "flatten":
        cuts = cuts[:1]
    best = min(cuts, key=lambda cut: (cut[0] + cut[1], cut[2]), default=None)
    if best is None or 1 in best[:2]:
        return {"exp_avg": shape, "exp_avg_sq": shape}
    row, col = shape[: best[2]], shape[best[2] :]
    return {"exp_avg_row": row, "exp_avg_col": col, "exp_avg_sq_row": row, "exp_avg_sq_col": col}


def smmf_state(shape, options):
    numel = int(np.prod(shape))
    n, m = min(
        ((numel // m, m) for m in range(1, numel + 1) if numel % m == 0 and numel // m >= m), key=lambda s: s[0] - s[1]
    )
    if m == 1 or (options.get("vector_reshape") is False and sum(side != 1 for side in shape) == 1):
        state = {"exp_avg": shape, "exp_avg_sq": shape}
    else:
        signs = (shape[0], -(-int(np.prod(shape[1:])) // 8))
        state = {
            "exp_avg_row": (n,),
            "exp_avg_col": (m,),
            "exp_avg_sign": signs,
            "exp_avg_sq_row": (n,),
            "exp_avg_sq_col": (m,),
        }
    if options.get("beta", 0.9) is None:
        state = {key: side for key, side in state.items() if key.startswith("exp_avg_sq")}
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_keys_shapes_and_types(cls, options, dtype):
    params = parameters(SHAPES + [(2, 3, 5, 7), (64, 3, 7, 7)], dtype)
    optimizer = cls(params, **{**OPTIONS[cls], **options})
    for steps in (0, 1):
        train(optimizer, params, steps)
        for param in params:
            shape = tuple(param.shape)
            layout = (hfac_state if cls is HFac else smmf_state)(shape, options)
            scalars = {"step"} | ({"skipped"} if options.get("nonfinite") == "skip" else set())
            state = optimizer.state[param]
            assert {key: tuple(value.shape) for key, value in state.items()} == layout | dict.fromkeys(scalars, ())
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            types = {"exp_avg_sign": torch.uint8, "step": torch.float32, "skipped": torch.int32}
            assert {key: value.dtype for key, value in state.items()} == {key: types.get(key, wide) for key in state}
            assert all(type(value) is torch.Tensor and value.is_contiguous() for value in state.values())
            assert float(state["step"]) == steps
    assert list(optimizer.state_dict()["state"]) == list(range(len(params)))


@pytest.mark.parametrize(("cls", "limit"), [(HFac, 0.017), (SMMF, 0.16)], ids=["hfac", "smmf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_parameter(cls, limit, dtype):
    param = Parameter(torch.zeros(1024, 1024, dtype=dtype))
    optimizer = cls([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = sum(value.untyped_storage().nbytes() for value in optimizer.state[param].values())
    assert held / param.numel() <= limit
    assert held == sum(value.nbytes for value in optimizer.state[param].values())  # no larger storage behind a view


def numpy_signs(positive):
    """The layout of the sign bits, written a second time: slices of the first dimension, each in whole bytes, element
    8b + k of a slice in bit k of its byte b."""
    rows = positive.reshape(positive.shape[0], -1)
    packed = np.zeros((rows.shape[0], -(-rows.shape[1] // 8)), dtype=np.uint8)
    for row in range(rows.shape[0]):
        for element in range(rows.shape[1]):
            if rows[row, element]:
                packed[row, element // 8] |= 1 << (element % 8)
    return packed


@pytest.mark.parametrize("shape", [(4, 6), (12,), (3, 2, 4), (17, 19), (2, 8), (5, 1, 9), (1, 24), (24, 1)], ids=str)
def test_sign_bits(shape):
    """After one step M = (1 - beta) G, after two the factored M with G: the signs of both, zeros as negative."""
    (param,) = parameters([shape])
    optimizer = SMMF([param], lr=0.0, beta=0.5, growth_rate=1.0)
    first = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    first.view(-1)[::5] = 0.0
    first.view(-1)[1::7] = -0.0
    param.grad = first
    optimizer.step()
    state = optimizer.state[param]
    np.testing.assert_array_equal(state["exp_avg_sign"].numpy(), numpy_signs(first.numpy() > 0))

    n, m = matricize.square(param.numel())
    signed = np.where(first.numpy().reshape(n, m) > 0, 1.0, -1.0)
    momentum = signed * np.outer(state["exp_avg_row"].double().numpy(), state["exp_avg_col"].double().numpy())
    second = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    param.grad = second
    optimizer.step()
    momentum = 0.5 * momentum + 0.5 * second.numpy().reshape(n, m)
    assert np.abs(momentum).min() > 1e-6  # no sign hangs on rounding
    np.testing.assert_array_equal(
        optimizer.state[param]["exp_avg_sign"].numpy(), numpy_signs(momentum.reshape(shape) > 0)
    )


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_resumed_run_equals_uninterrupted_run(cls, options, dtype):
    options = {**OPTIONS[cls], **options}
    params = parameters(dtype=dtype)
    optimizer = cls([{"params": params[:3]}, {"params": params[3:], "lr": 0.05}], **options)
    train(optimizer, params, 3)
    saved, weights = through_file(optimizer.state_dict()), [param.detach().clone() for param in params]
    before = bits(optimizer.state_dict())
    assert bits(saved) == before
    train(optimizer, params, 3, start=3)

    # into an optimizer whose options, parameters and state are all other ones
    others = [Parameter(weight) for weight in weights]
    kinds = {name: options[name] for name in ("capturable",) if name in options}
    resumed = cls([{"params": others[:3]}, {"params": others[3:]}], lr=0.7, **kinds)
    saved_bits = bits(saved)
    resumed.load_state_dict(saved)
    assert bits(saved) == saved_bits  # what is loaded from is left alone
    assert bits(resumed.state_dict()) == before
    assert not storages(list(resumed.state.values())) & storages(saved)  # and not shared
    train(resumed, others, 3, start=3)
    assert bits(saved) == saved_bits
    assert bits(others) == bits(params)
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())


@BOTH
def test_state_dict_shares_memory_with_the_state_as_in_torch(cls):
    params = parameters()
    optimizer = cls(params)
    assert storages(optimizer.state_dict()["state"]) == storages(list(optimizer.state.values()))


@BOTH
def test_loading_own_live_state_dict(cls):
    """Without a copy in between: source and target are the same tensors."""
    params = parameters()
    optimizer = cls(params, **OPTIONS[cls])
    train(optimizer, params, 2)
    before = bits(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert bits(optimizer.state_dict()) == before


@BOTH
@pytest.mark.parametrize(
    ("saved_type", "loaded_type"), [("float32", "float64"), ("float64", "float32"), ("float32", "bfloat16")]
)
def test_loading_into_parameters_of_another_type(cls, saved_type, loaded_type):
    params, others = parameters(dtype=getattr(torch, saved_type)), parameters(dtype=getattr(torch, loaded_type))
    optimizer, target = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    train(optimizer, params, 2)
    target.load_state_dict(optimizer.state_dict())
    wide = torch.float64 if loaded_type == "float64" else torch.float32
    for p, q in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            wanted = value.to(wide) if key.startswith("exp_avg") and key not in ("exp_avg_sign", "exp_avg_q") else value
            assert bits(target.state[q][key]) == bits(wanted)
    train(target, others, 1)


@BOTH
def test_execution_options_stay(cls):
    """capturable and backend say how this machine makes a step, not what it computes."""
    params, others = parameters(), parameters()
    optimizer, target = cls(params, capturable=True, backend="reference", maximize=True), cls(others)
    train(optimizer, params, 2)
    target.load_state_dict(optimizer.state_dict())
    group = target.param_groups[0]
    assert (group["capturable"], group["backend"], group["maximize"]) == (False, "auto", True)


@BOTH
def test_capturable_computes_the_same(cls):
    params, others = parameters(), parameters()
    optimizer, capturable = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls], capturable=True)
    train(optimizer, params, 20)
    train(capturable, others, 20)
    assert bits(params) == bits(others)
    assert bits(optimizer.state_dict()["state"]) == bits(capturable.state_dict()["state"])


@BOTH
def test_state_of_some_parameters(cls):
    """A checkpoint made while some were frozen has no state for them: they begin anew, the others go on."""
    params, others = parameters([(4, 6), (5, 4)]), parameters([(4, 6), (5, 4)])
    params[1].requires_grad_(False)
    optimizer, target = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    gradients(params[:1], 0)
    optimizer.step()
    train(target, others, 4)
    assert list(optimizer.state_dict()["state"]) == [0]
    target.load_state_dict(optimizer.state_dict())
    assert [float(target.state[param]["step"]) for param in others] == [1.0, 0.0]
    assert not any(value.any() for value in target.state[others[1]].values())


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dummy_step_before_loading_leaves_no_trace(cls, options, dtype):
    """Checkpoint libraries make state by a step on zero gradients with a learning rate of 0, then load."""
    options = {**OPTIONS[cls], **options}
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, resumed = cls(params, **options), cls(others, **options)
    train(optimizer, params, 3)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.detach())
    weights = bits(others)
    for other in others:
        other.grad = torch.zeros_like(other)
    for group in resumed.param_groups:
        group["lr"] = torch.tensor(0.0) if dtype == torch.bfloat16 else 0.0
    resumed.step(closure=None)
    assert bits(others) == weights
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    train(optimizer, params, 2, start=3)
    train(resumed, others, 2, start=3)
    assert bits(others) == bits(params)


@BOTH
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("empty", [False, True], ids=["fresh", "state-cleared"])
def test_distributed_checkpoint_state_dict(cls, flatten, empty):
    from torch.distributed.checkpoint import state_dict as dcp

    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)).bfloat16()
        groups = [
            {"params": list(model[0].parameters())},
            {"params": [*model[1].parameters(), *model[2].parameters()], "lr": 0.05},
        ]
        return model, cls(groups, **OPTIONS[cls], nonfinite="skip")

    (model, optimizer), (other, resumed) = build(0), build(1)
    train(optimizer, list(model.parameters()), 3)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = through_file(copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options)))
    if empty:
        resumed.state.clear()  # then the library makes state by a dummy step
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, resumed, saved, options=options)
    assert bits(list(other.parameters())) == bits(list(model.parameters()))
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    train(optimizer, list(model.parameters()), 2, start=3)
    train(resumed, list(other.parameters()), 2, start=3)
    assert bits(list(other.parameters())) == bits(list(model.parameters()))
    # and once more, out of an optimizer that has itself been loaded
    again = dcp.get_optimizer_state_dict(other, resumed, options=options)
    assert again.keys() == dcp.get_optimizer_state_dict(model, optimizer, options=options).keys()
    dcp.set_optimizer_state_dict(model, optimizer, again, options=options)


# ---- state follows the parameters ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("look", ["step", "state_dict"])
def test_swapped_parameters(cls, look):
    """Entries of parameters that are gone are dropped, missing ones are made; those that stay keep their bits."""
    params, fresh = parameters([(4, 6), (5,), (3, 8)]), parameters([(2, 6), (8, 8)], seed=1)
    optimizer = cls(params, **OPTIONS[cls])
    train(optimizer, params, 3)
    kept = bits(dict(optimizer.state[params[2]]))
    optimizer.param_groups[0]["params"][:2] = fresh
    optimizer.zero_grad()
    optimizer.step() if look == "step" else optimizer.state_dict()
    assert list(map(id, optimizer.state)) == [id(params[2]), id(fresh[0]), id(fresh[1])]
    assert bits(dict(optimizer.state[params[2]])) == kept
    saved = optimizer.state_dict()
    assert (
        sorted(saved["state"]) == [0, 1, 2] and float(saved["state"][2]["step"]) == 3 and not saved["state"][0]["step"]
    )
    others = parameters([(2, 6), (8, 8)], seed=1)
    train(optimizer, fresh, 2)
    train(cls(others, **OPTIONS[cls]), others, 2)
    assert bits(fresh) == bits(others)


@BOTH
def test_swapped_for_as_many_others(cls):
    """As many go as come: nothing is told by counting alone."""
    params, fresh = parameters([(4, 6), (5,)]), parameters([(4, 6), (5,)], seed=1)
    optimizer = cls(params, **OPTIONS[cls])
    train(optimizer, params, 2)
    optimizer.param_groups[0]["params"] = list(fresh)
    train(optimizer, fresh, 1)
    assert set(map(id, optimizer.state)) == set(map(id, fresh))
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


@BOTH
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_swapped_for_one_twice(cls):
    params = parameters([(4, 6), (5,)])
    optimizer = cls(params, **OPTIONS[cls])
    optimizer.param_groups[0]["params"] = [params[0], params[0]]
    assert len(optimizer.state_dict()["state"]) == 1 and list(map(id, optimizer.state)) == [id(params[0])]


@BOTH
def test_rewritten_groups(cls):
    params, others = parameters([(4, 6), (5,), (3, 8)]), parameters([(4, 6), (5,), (3, 8)])
    optimizer, reference = (
        cls(params, **OPTIONS[cls]),
        cls([{"params": others[:1]}, {"params": others[1:], "lr": 0.3}], **OPTIONS[cls]),
    )
    train(optimizer, params, 0)
    group = optimizer.param_groups[0]
    optimizer.param_groups = [{**group, "params": params[:1]}, {**group, "params": params[1:], "lr": 0.3}]
    train(optimizer, params, 3)
    train(reference, others, 3)
    assert bits(params) == bits(others) and bits(optimizer.state_dict()) == bits(reference.state_dict())
    del optimizer.param_groups[0]
    optimizer.step()
    assert list(map(id, optimizer.state)) == list(map(id, params[1:]))


@BOTH
def test_nothing_is_kept_alive(cls):
    """A parameter that was swapped out is freed, and so is its state."""
    import gc
    import weakref

    params = parameters([(4, 6), (5,)])
    optimizer = cls(params, **OPTIONS[cls])
    train(optimizer, params, 2)
    gone = [weakref.ref(params[0]), *map(weakref.ref, optimizer.state[params[0]].values())]
    optimizer.param_groups[0]["params"][0] = parameters([(2, 3)])[0]
    del params[0]
    optimizer.step()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


@BOTH
def test_requires_grad_toggled(cls):
    params = parameters([(4, 6), (3, 8)])
    params[0].requires_grad_(False)
    optimizer = cls(params, **OPTIONS[cls])
    assert list(map(id, optimizer.state)) == [id(params[1])]
    gradients(params[1:], 0)
    optimizer.step()
    frozen = bits(params[0])
    params[0].requires_grad_(True)
    params[1].requires_grad_(False)
    params[1].grad = None
    kept = bits(dict(optimizer.state[params[1]]))
    gradients(params[:1], 0)
    optimizer.step()
    assert bits(params[0]) != frozen
    assert bits(dict(optimizer.state[params[1]])) == kept  # a frozen parameter does not lose what it had
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]


@BOTH
def test_state_cleared(cls):
    params, others = parameters(), parameters()
    optimizer = cls(params, **OPTIONS[cls])
    train(optimizer, params, 2)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.detach())
    optimizer.state.clear()
    train(optimizer, params, 2)
    train(cls(others, **OPTIONS[cls]), others, 2)
    assert bits(params) == bits(others)


@BOTH
@pytest.mark.parametrize(("begin", "end"), [("float32", "bfloat16"), ("bfloat16", "float64"), ("float64", "float32")])
@pytest.mark.parametrize("after", [0, 2])
def test_model_moved_to_another_type(cls, begin, end, after):
    """module.to(dtype) keeps the parameter objects: the state follows, with its values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).to(getattr(torch, begin))
    params = list(model.parameters())
    optimizer = cls(params, **OPTIONS[cls])
    train(optimizer, params, after)
    before = [{key: value.clone() for key, value in optimizer.state[param].items()} for param in params]
    model.zero_grad()
    model.to(getattr(torch, end))
    wide = torch.float64 if end == "float64" else torch.float32
    optimizer.state_dict()
    for param, state in zip(params, before, strict=True):
        for key, value in optimizer.state[param].items():
            moved = key.startswith("exp_avg") and key not in ("exp_avg_sign", "exp_avg_q")
            assert bits(value) == bits(state[key].to(wide) if moved else state[key]), key
    if after == 0:
        others = [Parameter(param.detach().clone()) for param in params]
        train(cls(others, **OPTIONS[cls]), others, 2)
        train(optimizer, params, 2)
        assert bits(params) == bits(others)
    train(optimizer, params, 1, start=after)
    assert all(param.isfinite().all() and param.dtype == getattr(torch, end) for param in params)


@BOTH
def test_made_on_meta_then_materialised(cls):
    """Deferred initialisation: constructed over meta parameters, whose real ones are swapped in later."""
    with torch.device("meta"):
        model = nn.Linear(6, 4)
    optimizer = cls(model.parameters(), **OPTIONS[cls])
    assert all(v.is_meta for s in optimizer.state.values() for k, v in s.items() if k != "step")
    model.to_empty(device="cpu")
    for param, value in zip(model.parameters(), parameters([(4, 6), (4,)]), strict=True):
        param.data.copy_(value.detach())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    others = parameters([(4, 6), (4,)])
    train(optimizer, list(model.parameters()), 2)
    train(cls(others, **OPTIONS[cls]), others, 2)
    assert bits(list(model.parameters())) == bits(others)


@BOTH
@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "skip"}, {"capturable": True}], ids=["plain", "skip", "capturable"]
)
def test_to_meta_and_back_begins_anew(cls, options):
    """The same parameter objects lose their data and get others: moments and the step that counts them go together."""
    params, others = parameters([(4, 6), (5,)]), parameters([(4, 6), (5,)])
    optimizer = cls(params, **OPTIONS[cls], **options)
    start = [param.detach().clone() for param in params]
    train(optimizer, params, 3)
    optimizer.zero_grad()
    for param in params:
        torch.utils.swap_tensors(param, Parameter(torch.empty_like(param, device="meta")))
    assert all(
        value.is_meta
        for state in optimizer.state_dict()["state"].values()
        for k, value in state.items()
        if k != "step" or options
    )
    for param, value in zip(params, start, strict=True):
        torch.utils.swap_tensors(param, Parameter(value))
    assert [float(entry["step"]) for entry in optimizer.state_dict()["state"].values()] == [0.0, 0.0]
    train(optimizer, params, 2)
    train(cls(others, **OPTIONS[cls], **options), others, 2)
    assert bits(params) == bits(others)


@BOTH
def test_option_switched_on_between_steps(cls):
    """nonfinite and capturable move the step beside the parameter; nothing else changes."""
    params, others = parameters(), parameters()
    optimizer, plain = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    for step, change in enumerate(
        [{}, {"nonfinite": "skip"}, {"capturable": True}, {"nonfinite": "propagate"}, {"capturable": False}]
    ):
        optimizer.param_groups[0].update(change)
        train(optimizer, params, 1, start=step)
        train(plain, others, 1, start=step)
    assert bits(params) == bits(others)
    assert all(int(optimizer.state[param]["skipped"]) == 0 for param in params)


@BOTH
def test_nothing_hangs_on_addresses_or_order_of_creation(cls):
    """Two optimizers over the same numbers in objects made in another order have the same state dict."""
    params = parameters()
    others = [Parameter(torch.empty(0)) for _ in params][::-1]
    for other, param in zip(others, params, strict=True):
        other.data = param.detach().clone()
    optimizer, twin = cls(params, **OPTIONS[cls]), cls(others, **OPTIONS[cls])
    train(optimizer, params, 2)
    train(twin, others, 2)
    assert bits(optimizer.state_dict()) == bits(twin.state_dict())
    assert all(isinstance(key, int) and key < len(params) for key in optimizer.state_dict()["state"])


def _replace_state_tensors(optimizer, params):
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def _replace_state_dicts(optimizer, params):
    for param in params:
        optimizer.state[param] = {key: 2 * value for key, value in optimizer.state[param].items()}


def _move_state_data(optimizer, params):
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def _move_params(optimizer, params):
    for param in params:
        param.data = param.data.clone()


def _transpose_in_place(optimizer, params):
    for param in params:
        if param.ndim == 2 and param.shape[0] == param.shape[1]:
            param.data = param.data.t()  # same address, same shape


def _set_one_step(optimizer, params):
    optimizer.state[params[1]]["step"].fill_(7.0)


def _set_all_steps(optimizer, params):
    for state in optimizer.state.values():
        state["step"].fill_(7.0)


def _other_options(optimizer, params):
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.3, maximize=True)


def _capturable(optimizer, params):
    optimizer.param_groups[0]["capturable"] = True


def _skip(optimizer, params):
    optimizer.param_groups[0]["nonfinite"] = "skip"


def _reference(optimizer, params):
    optimizer.param_groups[0]["backend"] = "reference"


def _to_bfloat16(optimizer, params):
    for param in params:
        param.grad = None
        param.data = param.data.bfloat16()


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        _replace_state_tensors,
        _replace_state_dicts,
        _move_state_data,
        _move_params,
        _transpose_in_place,
        _set_one_step,
        _set_all_steps,
        _other_options,
        _capturable,
        _skip,
        _reference,
        _to_bfloat16,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_what_a_step_found_in_order_is_not_trusted_after_a_change(cls, change):
    """Every bit as from an optimizer that looks at everything in every step."""
    shapes = [*SHAPES, (8, 8)]
    runs = []
    for forgetful in (False, True):
        params = parameters(shapes)
        optimizer = cls(params, **OPTIONS[cls])
        for step in range(6):
            gradients(params, step)
            if step == 3:
                change(optimizer, params)
                gradients(params, step)
            if step == 4:
                params[0].grad = params[3].grad = None
            if forgetful:
                optimizer._forget()
            optimizer.step()
            if step == 2:
                assert optimizer._cache.is_valid(
                    optimizer.param_groups, optimizer.state
                )  # else this test shows nothing
        runs.append(bits([params, [optimizer.state[param] for param in params]]))
    assert runs[0] == runs[1]


# ---- gradients that are not finite -----------------------------------------------------------------------------------

BAD = {
    "nan": NAN,
    "inf": INF,
    "minus-inf": -INF,
    "square-overflows": 2e19,  # beyond the root of the largest float32
}
SKIPPED_SHAPES = [(4, 6), (5,), (), (17, 19), (1, 3)]


@pytest.mark.pairwise
@BOTH
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("which", range(len(SKIPPED_SHAPES)), ids=lambda i: str(SKIPPED_SHAPES[i]))
@pytest.mark.parametrize("bad", BAD)
def test_skip(cls, bad, which, capturable):
    """The parameter and its state keep every bit, step included; the others go on as if alone; the count says so."""
    options = {**OPTIONS[cls], "nonfinite": "skip", "capturable": capturable}
    params, others = parameters(SKIPPED_SHAPES), parameters(SKIPPED_SHAPES)
    optimizer, clean = cls(params, **options), cls(others, **OPTIONS[cls])
    train(optimizer, params, 2)
    train(clean, others, 2)
    for step in (2, 3, 4):
        gradients(params, step)
        gradients(others, step)
        victim = params[which]
        if step != 4:  # twice in a row, then a good one
            victim.grad.view(-1)[-1] = BAD[bad]
            others[which].grad = None
            before = bits([victim, {k: v for k, v in optimizer.state[victim].items() if k != "skipped"}])
        optimizer.step()
        clean.step()
        if step != 4:
            assert bits([victim, {k: v for k, v in optimizer.state[victim].items() if k != "skipped"}]) == before
            assert int(optimizer.state[victim]["skipped"]) == step - 1
    assert bits(params) == bits(others)
    for index, (param, other) in enumerate(zip(params, others, strict=True)):
        state = dict(optimizer.state[param])
        assert int(state.pop("skipped")) == (2 if index == which else 0)
        assert bits(state) == bits(dict(clean.state[other]))


@BOTH
def test_skip_counts_survive_a_checkpoint(cls):
    params = parameters([(4, 6)])
    optimizer = cls(params, nonfinite="skip")
    params[0].grad = torch.full((4, 6), NAN)
    optimizer.step()
    target = cls(parameters([(4, 6)]))
    target.load_state_dict(through_file(optimizer.state_dict()))
    (state,) = target.state.values()
    assert int(state["skipped"]) == 1 and state["skipped"].dtype == torch.int32 and float(state["step"]) == 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_skip_other_types(cls, dtype):
    (param,) = parameters([(4, 6)], dtype)
    optimizer = cls([param], **OPTIONS[cls], nonfinite="skip")
    train(optimizer, [param], 1)
    before = bits([param, {k: v for k, v in optimizer.state[param].items() if k != "skipped"}])
    param.grad = torch.ones_like(param)
    param.grad[2, 3] = INF
    optimizer.step()
    assert bits([param, {k: v for k, v in optimizer.state[param].items() if k != "skipped"}]) == before
    # the largest float16, and a float64 whose square has no float32, are ordinary numbers
    param.grad[2, 3] = torch.finfo(torch.float16).max if dtype != torch.float64 else 1e30
    optimizer.step()
    assert int(optimizer.state[param]["skipped"]) == 1 and float(optimizer.state[param]["step"]) == 2
    assert param.isfinite().all()


@BOTH
@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("shape", [(4, 6), (5,)], ids=str)
def test_propagate(cls, bad, shape):
    """The default does as torch.optim does: a gradient that is not finite shows in the parameter."""
    params = parameters([shape, (3, 3)])
    optimizer = cls(params, **OPTIONS[cls])
    gradients(params, 0)
    params[0].grad.view(-1)[-1] = BAD[bad]
    optimizer.step()
    assert not params[0].isfinite().all() and params[1].isfinite().all()
    assert "skipped" not in optimizer.state[params[0]] and float(optimizer.state[params[0]]["step"]) == 1


@BOTH
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_skip_when_only_the_sum_of_squares_overflows(cls, backend):
    """Every square is finite and their sum is not: let in, the gradient would leave infinite sums in the state."""
    param = parameters([(64, 64)])[0]
    optimizer = cls([param], nonfinite="skip", backend=backend)
    train(optimizer, [param], 1)
    before = bits([param, {k: v for k, v in optimizer.state[param].items() if k != "skipped"}])
    param.grad = torch.full((64, 64), 1e18)
    optimizer.step()
    assert bits([param, {k: v for k, v in optimizer.state[param].items() if k != "skipped"}]) == before
    assert int(optimizer.state[param]["skipped"]) == 1


@BOTH
def test_skip_reads_nothing_on_the_host(cls):
    """On the meta device any read of a value raises: a step that skips, or is capturable, makes none."""
    for options in ({"nonfinite": "skip"}, {"capturable": True}, {"nonfinite": "skip", "capturable": True}):
        params = [Parameter(torch.empty(shape, device="meta")) for shape in SKIPPED_SHAPES]
        optimizer = cls(params, **OPTIONS[cls], **options)
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
        assert all(value.is_meta for state in optimizer.state.values() for value in state.values())


@BOTH
@pytest.mark.parametrize("clip", [False, True], ids=["scaled", "unscaled-before"])
def test_amp_scaling_leaves_the_scaler_nothing_to_do(cls, clip):
    """Every bit as where the scaler unscales and decides by itself, and no step is counted that was not made."""
    runs = []
    for amp_scaling in (False, True):
        params = parameters()
        optimizer = cls(params, **OPTIONS[cls], amp_scaling=amp_scaling)
        assert optimizer._step_supports_amp_scaling == amp_scaling
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            gradients(params, step)
            for param in params:
                param.grad *= float(scaler.scale(torch.ones(())))
            if step in (0, 2):
                params[3].grad.fill_(INF)
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 256.0
        assert all(float(optimizer.state[param]["step"]) == 3 for param in params)
        runs.append(bits([params, [optimizer.state[param] for param in params]]))
    assert runs[0] == runs[1]


@BOTH
def test_amp_scaling_takes_what_a_scaler_passes_and_nothing_else(cls):
    params = parameters()
    optimizer = cls(params, amp_scaling=True)
    gradients(params, 0)
    before = bits(params)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(2), torch.zeros(())
    with pytest.raises(ValueError, match=r"grad_scale must be one float32 on cpu, .*GradScaler"):
        optimizer.step()
    assert bits(params) == before


@BOTH
def test_grad_scaler_on_the_cpu(cls):
    """The scaler skips the whole step where a gradient overflowed, and unscales before any other step."""
    model, twin = nn.Linear(6, 4), nn.Linear(6, 4)
    twin.load_state_dict(model.state_dict())
    optimizer, plain = cls(model.parameters(), **OPTIONS[cls]), cls(twin.parameters(), **OPTIONS[cls])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        loss = model(inputs).square().mean() * (INF if step == 1 else 1.0)
        scaler.scale(loss).backward()
        before = bits([list(model.parameters()), optimizer.state_dict()])
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert bits([list(model.parameters()), optimizer.state_dict()]) == before
            continue
        twin(inputs).square().mean().backward()
        plain.step()
    assert scaler.get_scale() == 2.0**9
    assert bits(list(model.parameters())) == bits(list(twin.parameters()))  # a power of two scales exactly
    assert float(optimizer.state[model.weight]["step"]) == 3
