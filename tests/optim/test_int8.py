"""H-Fac with a whole first moment in 8 bits, ``first_moment="int8"``: the step against numpy in float64, written from
the definition's text; its codes; and what the option means for state, checkpoints and backends. What it shares with all
options is tested where those are: cases.OPTIONS has a row of it."""

import copy
import math

import numpy as np
import pytest
import suites
import torch
import torch.distributed as dist
from cases import codes_agree, gradient, shape_id
from running import bits, parameters, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

import hfac
from hfac import HFac, backends, codes, functional, reference, spec
from hfac.backends import cpu
from hfac.backends.plain import Formulas

BACKENDS = [name for name in suites.BACKENDS if name != "triton"]  # which has no kernels of it
EACH = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
OPTIONS = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1, first_moment="int8")


class Oracle:
    """The definition in float64, element by element where it speaks of elements."""

    def __init__(self, lr, betas, eps, clip_threshold, weight_decay, maximize=False, **other):
        self.lr, self.betas, self.eps, self.d, self.decay = lr, betas, eps, clip_threshold, weight_decay
        self.sign = -1.0 if maximize else 1.0

    @staticmethod
    def decode(q):
        y = abs(int(q)) / 127.5
        return math.copysign(y * y / (1 - y * y), q) if q else 0.0

    @staticmethod
    def encode(x, old):
        def nearest(size):  # round half to even, as Python does
            return min(127, round(127.5 * math.sqrt(size / (1 + size))))

        q = int(math.copysign(nearest(abs(x)), x))
        if q == old and abs(x) < abs(Oracle.decode(old)):
            q -= (q > 0) - (q < 0)
        return q

    def step(self, t, W, G, q, r, s):
        """The new W, q, r, s of step t."""
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in self.betas)
        G = self.sign * G
        squares = G**2 + self.eps
        r_old, s_old = r, s
        r, s = b2 * r + (1 - b2) * squares.sum(1), b2 * s + (1 - b2) * squares.sum(0)
        R, R_old = r.sum(), r_old.sum()
        U = G / np.sqrt(np.outer(r, s) / R)
        c = 1.0 if self.d is None else 1 / max(1.0, math.sqrt((U**2).mean()) / self.d)
        X = (1 - b1) * U
        if t > 1 and R_old > 0:
            held = np.array([[self.decode(code) for code in row] for row in q])
            X = X + b1 * np.sqrt(np.outer(r_old, s_old) / R_old) / np.sqrt(np.outer(r, s) / R) * held
        W = W - self.lr * (c * (b1 * X + (1 - b1) * U) + self.decay * W)
        q = np.array([[self.encode(x, old) for x, old in zip(*rows, strict=True)] for rows in zip(X, q, strict=True)])
        return W, q, r, s


def matrix(tensor, k=1):
    return tensor.detach().double().reshape(math.prod(tensor.shape[:k]), -1).numpy().copy()


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"clip_threshold": None, "betas": (0.9, 0.999)}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(17, 19), (3, 130), (6, 4, 3, 3)], ids=shape_id)
@EACH
def test_steps_are_those_of_the_definition(backend, shape, dtype, options):
    """Each from the same state; the third gradient is zero, and the fifth has a row and a column that are zero."""
    options, k = OPTIONS | options, hfac.matricize.cut(shape)
    oracle, param = Oracle(**options), Parameter(gradient(shape, 0, dtype))
    optimizer = HFac([param], **options, backend=backend)
    state, rounding = optimizer.state[param], 1e-11 if dtype == torch.float64 else 2e-5
    for t in range(1, 9):
        param.grad = gradient(shape, t, dtype) * (t != 3)
        if t == 5:
            param.grad[1], param.grad[..., 2] = 0, 0
        W, G, q = matrix(param, k), matrix(param.grad, k), matrix(state["exp_avg_q"], k)
        wanted = oracle.step(
            t, W, G, q, *(state[f"exp_avg_sq_{side}"].double().flatten().numpy() for side in ("row", "col"))
        )
        optimizer.step()
        change = np.abs(wanted[0] - W).max()
        ulp = torch.finfo(dtype).eps * np.abs(W).max()
        assert np.abs(matrix(param, k) - wanted[0]).max() <= rounding * change + ulp
        assert codes_agree(state["exp_avg_q"], torch.from_numpy(wanted[1]).to(torch.int8).view(shape)), t
        for side, sums in zip(("row", "col"), wanted[2:], strict=True):
            np.testing.assert_allclose(state[f"exp_avg_sq_{side}"].double().flatten().numpy(), sums, rtol=rounding)
        if t == 1 and dtype == torch.float64:
            assert np.abs(wanted[1]).max() > 100 and (wanted[1] == 0).any()


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_codes_by_hand(dtype):
    def code(*values):
        return codes.encode(torch.tensor(values, dtype=dtype)).tolist()

    every = torch.arange(-127, 128).to(torch.int8)
    values = codes.decode(every, dtype)
    exact = torch.tensor([Oracle.decode(q) for q in every.tolist()], dtype=torch.float64)
    assert torch.allclose(values.double(), exact, rtol=max(1e-13, 4 * torch.finfo(dtype).eps), atol=0)
    assert torch.equal(codes.encode(values), every)
    assert code(0.0, -0.0, 1.0, -1.0) == [0, 0, 90, -90]  # 127.5 / sqrt(2) is 90.2
    assert code(1e9, -3e38, 126.0, float("nan")) == [127, -127, 127, 0]


def test_codes_go_towards_zero_where_nothing_comes():
    """Any code times anything below 1 becomes smaller, with its sign, until it is zero; what has grown stays."""
    every = torch.arange(-127, 128).to(torch.int8)
    values = codes.decode(every)
    for factor in (0.9, 0.98, 0.9999):
        fresh = codes.encode(factor * values, every, values)
        assert torch.equal(fresh.sgn(), every.sgn() * (fresh != 0)) and (fresh.abs() < every.abs())[every != 0].all()
        assert fresh[127] == 0
    assert torch.equal(codes.encode(values, every, values), every)
    assert torch.equal(codes.encode(1.0001 * values, every, values), every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EACH
def test_the_codes_of_numbers_that_are_not_usual(backend, dtype):
    """Elements too small to be told from zero, of which some are subnormal, and one too large for any code; where one
    is not finite no element's moment is."""
    grad = torch.full((24, 32), 1000.0, dtype=dtype)
    grad[3] = torch.tensor([1e-45, 1e-40, -1e-38, 1e-30] * 8, dtype=dtype)
    grad[:, 5], grad[7] = 0, 0
    grad[7, 5] = -1
    for value in (None, math.nan, math.inf, -math.inf):
        given, found = grad.clone(), []
        if value is not None:
            given[8, 9] = value
        for name in (backend, "reference"):
            param = Parameter(torch.ones_like(grad))
            optimizer = HFac([param], first_moment="int8", backend=name)
            param.grad = given
            optimizer.step()
            found.append(optimizer.state[param]["exp_avg_q"])
        assert codes_agree(*found), value
        if value is None:
            assert found[0][7, 5] == -127 and not found[0][3].any() and (found[0][4] != 0).sum() == 31
        else:
            assert not found[0].any()


# ---- over many steps -------------------------------------------------------------------------------------------------


class Exact:
    """The same steps with a first moment that is not rounded to codes, in float64; and with lr 1, no decay."""

    def __init__(self, shape, betas, eps=1e-30):
        self.W, self.X = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.r, self.s = (torch.zeros(n, dtype=torch.float64) for n in shape)
        self.betas, self.eps, self.t = betas, eps, 0

    def step(self, grad):
        self.t += 1
        b1, b2 = (beta * (1 - beta ** (self.t - 1)) / (1 - beta**self.t) for beta in self.betas)
        squares, before = grad.double() ** 2 + self.eps, (self.r, self.s, self.r.sum())
        self.r = b2 * self.r + (1 - b2) * squares.sum(1)
        self.s = b2 * self.s + (1 - b2) * squares.sum(0)
        root = (torch.outer(self.r, self.s) / self.r.sum()).sqrt()
        if self.t > 1:
            self.X = self.X * (torch.outer(*before[:2]) / before[2]).sqrt() / root
        U = grad.double() / root
        self.X = b1 * self.X + (1 - b1) * U
        self.W = self.W - (b1 * self.X + (1 - b1) * U) / max(1.0, float(U.square().mean().sqrt()))


@pytest.mark.parametrize("idle", [1000, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("beta1", [0.9, 0.95, 0.98])
def test_an_idle_row_drifts_no_further_than_with_a_float_moment(beta1, idle):
    """As an embedding's row does whose token does not come: nearest rounding alone would keep its last codes for ever,
    and carry it on with every step."""
    shape, draws = (8, 24), torch.Generator().manual_seed(5)
    param, exact = Parameter(torch.zeros(shape)), Exact(shape, (beta1, 0.999))
    optimizer = HFac([param], lr=1.0, betas=(beta1, 0.999), first_moment="int8")
    for t in range(60 + idle):
        param.grad = torch.randn(shape, generator=draws) + 0.3
        if t >= 60:
            param.grad[3] = 0
        if t == 60:
            before = param.detach()[3].double(), exact.W[3]
        optimizer.step()
        exact.step(param.grad)
    drift, wanted = (param.detach()[3] - before[0]).abs().mean(), (exact.W[3] - before[1]).abs().mean()
    assert wanted > 1 and drift <= 1.5 * wanted
    assert not optimizer.state[param]["exp_avg_q"][3].any()


@pytest.mark.parametrize(("beta1", "share"), [(0.9, 0.99), (0.95, 0.97), (0.98, 0.9)])
def test_the_momentum_of_a_constant_gradient_stays(beta1, share):
    param = Parameter(torch.zeros(8, 12))
    optimizer = HFac([param], betas=(beta1, 0.999), first_moment="int8")
    for _ in range(300):
        param.grad = torch.full((8, 12), 0.37)
        optimizer.step()
    momentum = codes.decode(optimizer.state[param]["exp_avg_q"])
    assert (momentum >= share).all() and (momentum <= 2 - share).all()


@pytest.mark.parametrize("times", [2.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("threshold", [1.0, 0.3, None])
@EACH
def test_a_step_never_goes_against_a_larger_gradient_of_the_same_kind(backend, threshold, times):
    """Nor does any element's against its own."""
    param, grad = Parameter(torch.zeros(12, 20)), torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    optimizer = HFac([param], first_moment="int8", clip_threshold=threshold, backend=backend)
    for t in range(12):
        before = param.detach().clone()
        param.grad = grad * (times if t == 10 else 1.0)
        optimizer.step()
        along = (before - param.detach()) * grad
        assert along.sum() > 0 and along.min() >= 0, t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EACH
def test_a_gradient_that_is_no_number_leaves_codes_of_zero(backend, dtype):
    """Its payload is no part of them, whatever the registers' width. (nonfinite="skip" would leave the codes as they
    are.)"""
    usable = cpu._C.info()["isa_usable"] if backend == "cpu" else [""]
    try:
        for isa in usable:
            if isa:
                cpu._C.set_isa(isa)
            param = Parameter(gradient((5, 37), 0, dtype))
            optimizer = HFac([param], first_moment="int8", backend=backend)
            for t in (1, 2):
                param.grad = gradient((5, 37), t, dtype)
                if t == 2:
                    assert optimizer.state[param]["exp_avg_q"].any()
                    ones = torch.full((1,), -1, dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
                    param.grad[1, 3] = ones.view(dtype)[0]
                optimizer.step()
            assert not optimizer.state[param]["exp_avg_q"].any(), isa
    finally:
        if backend == "cpu":
            cpu._C.set_isa("")


# ---- the option ------------------------------------------------------------------------------------------------------


def test_only_the_matrices_of_the_groups_that_have_it():
    params = parameters([(4, 6), (5,), (1, 7), (2, 3, 4), (4, 6), (4, 6)])
    first, dense = {"params": params[4:5], "first_moment": "factored"}, {"params": params[5:], "dense": True}
    optimizer = HFac([{"params": params[:4]}, first, dense], first_moment="int8")
    keys = [sorted(key for key in optimizer.state[p] if key.startswith("exp")) for p in params]
    eight, whole = ["exp_avg_q", "exp_avg_sq_col", "exp_avg_sq_row"], ["exp_avg", "exp_avg_sq"]
    factored = ["exp_avg_col", "exp_avg_row", "exp_avg_sq_col", "exp_avg_sq_row"]
    assert keys == [eight, whole, whole, eight, factored, whole]
    assert all(optimizer.state[p]["exp_avg_q"].shape == p.shape for p in (params[0], params[3]))
    assert optimizer.state[params[0]]["exp_avg_q"].dtype == torch.int8
    assert HFac(params).param_groups[0]["first_moment"] == "factored"
    with pytest.raises(ValueError, match=r"HFac: first_moment must be one of 'factored', 'int8', got 'int4'"):
        HFac(params, first_moment="int4")


@EACH
def test_vectors_have_the_bits_that_they_have_without_it(backend):
    found = []
    for mode in ("int8", "factored"):
        params = parameters([(5,), (1, 7), (), (12,)])
        optimizer = HFac(params, **OPTIONS | {"first_moment": mode}, backend=backend)
        train(optimizer, params, 3)
        found.append(bits([params, *optimizer.state.values()]))
    assert found[0] == found[1]


@EACH
def test_slices_are_parameters_of_their_own(backend):
    stack, (*apart,) = parameters([(3, 17, 9)])[0], parameters([(3, 17, 9)])[0].detach().unbind()
    alone = [Parameter(piece.clone()) for piece in apart]
    batched, single = HFac([stack], batch_dims=1, **OPTIONS, backend=backend), HFac(alone, **OPTIONS, backend=backend)
    for t in range(3):
        stack.grad = gradient((3, 17, 9), t, torch.float32)
        for param, grad in zip(alone, stack.grad, strict=True):
            param.grad = grad.clone()
        batched.step()
        single.step()
    assert batched.state[stack]["exp_avg_q"].shape == stack.shape
    assert bits(list(stack)) == bits(alone)
    for key in ("exp_avg_q", "exp_avg_sq_row", "exp_avg_sq_col"):
        assert bits(list(batched.state[stack][key])) == bits([single.state[param][key] for param in alone])


@EACH
def test_the_functional_form_makes_the_same_step(backend):
    (param,), (twin,) = parameters([(6, 8)]), parameters([(6, 8)])
    optimizer = HFac([param], **OPTIONS, backend=backend)
    q, row, col = torch.zeros(6, 8, dtype=torch.int8), torch.zeros(6), torch.zeros(8)
    beta1, beta2 = OPTIONS["betas"]
    numbers = {name: OPTIONS[name] for name in ("lr", "eps", "clip_threshold", "weight_decay")}
    steps, none = [torch.zeros(())], [None]
    for t in range(3):
        param.grad = gradient((6, 8), t, torch.float32)
        optimizer.step()
        with torch.no_grad():
            functional.hfac([twin], [param.grad], none, none, [row], [col], none, none, steps, exp_avg_qs=[q],
                            beta1=beta1, beta2=beta2, backend=backend, **numbers)  # fmt: skip
    assert bits([twin, q, row, col]) == bits([param, *(optimizer.state[param][k] for k in KEYS)])
    assert steps[0] == 3


KEYS = ("exp_avg_q", "exp_avg_sq_row", "exp_avg_sq_col")


def test_a_backend_that_lacks_the_step_is_refused_at_construction(monkeypatch):
    class Without(Formulas):
        def has(self, op):
            return op is not spec.HFAC_INT8_STEP and super().has(op)

    backend = backends.Backend("without", "", lambda device: None, lambda: Without(reference), automatic=False)
    monkeypatch.setitem(backends.TABLE, "without", backend)
    (param,) = parameters([(4, 6)])
    with pytest.raises(RuntimeError, match=r"backend='without' was asked for, but .*hfac_int8_step_"):
        HFac([param], first_moment="int8", backend="without")
    HFac([param], first_moment="int8", dense=True, backend="without")


def test_sharded_parameters_have_codes_of_their_shards():
    """tests/distributed/test_sharded.py has their steps. A backend without kernels for these is refused."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        param = Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
        q = HFac([param], first_moment="int8").state[param]["exp_avg_q"]
        assert q.shape == (4, 6) and q.placements == param.placements and q.to_local().shape == (2, 6)
        with pytest.raises(RuntimeError, match=r"backend='cuda' was asked for"):
            HFac([param], first_moment="int8", backend="cuda")
    finally:
        dist.destroy_process_group()


# ---- state dicts -----------------------------------------------------------------------------------------------------


def trained(mode="int8", steps=3):
    params = parameters([(4, 6), (5,)])
    optimizer = HFac(params, **OPTIONS | {"first_moment": mode})
    train(optimizer, params, steps)
    return params, optimizer


@pytest.mark.parametrize("mode", ["int8", "factored"])
def test_a_state_dict_of_the_other_mode_is_refused(mode):
    """Its options would replace those of the constructor without a word."""
    other = "factored" if mode == "int8" else "int8"
    (_, optimizer), (params, target) = trained(mode), trained(other)
    before = bits([params, target.state_dict()])
    match = rf"group 0 of the state dict was saved with first_moment='{mode}'.*hfac\.convert\(.*first_moment='{other}'"
    with pytest.raises(ValueError, match=match):
        target.load_state_dict(optimizer.state_dict())
    assert bits([params, target.state_dict()]) == before


def test_a_state_dict_without_the_key_is_factored():
    (_, optimizer), (params, target) = trained("factored"), trained("factored", steps=1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["first_moment"]
    target.load_state_dict(saved)
    assert target.param_groups[0]["first_moment"] == "factored"
    assert bits(target.state_dict()["state"]) == bits(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="saved with first_moment='factored', this optimizer's has"):
        trained("int8")[1].load_state_dict(saved)
    # Nor does a group that is factored among others become what the constructor said of these.
    mixed = HFac([{"params": params, "first_moment": "factored"}], first_moment="int8")
    mixed.load_state_dict(saved)
    assert mixed.param_groups[0]["first_moment"] == "factored"
    train(mixed, params, 1)


def test_training_resumes_to_the_bit():
    (params, optimizer), (others, target) = trained(), trained(steps=1)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    target.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 3, start=3)
    train(target, others, 3, start=3)
    assert bits([params, optimizer.state_dict()]) == bits([others, target.state_dict()])


def test_a_code_that_stands_for_nothing_is_refused():
    params, optimizer = trained()
    saved, before = copy.deepcopy(optimizer.state_dict()), bits(optimizer.state_dict())
    saved["state"][0]["exp_avg_q"][2, 3] = -128
    with pytest.raises(ValueError, match=r"state of parameter 0 .*'exp_avg_q' has a code of -128; .* -127 to 127"):
        optimizer.load_state_dict(saved)
    assert bits(optimizer.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.bfloat16], ids=str)
def test_codes_of_another_type_are_refused(dtype):
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg_q"] = saved["state"][0]["exp_avg_q"].to(dtype)
    with pytest.raises(ValueError, match="state of parameter 0 .*'exp_avg_q' must be torch.int8"):
        optimizer.load_state_dict(saved)


def test_an_optimizer_of_an_earlier_version_is_factored():
    params, optimizer = trained("factored")
    optimizer.defaults.pop("first_moment")
    optimizer.param_groups[0].pop("first_moment")
    again = copy.deepcopy(optimizer)
    assert again.defaults["first_moment"] == again.param_groups[0]["first_moment"] == "factored"
    train(again, again.param_groups[0]["params"], 1)


# ---- conversion ------------------------------------------------------------------------------------------------------


def half_a_code(state, M, eps=0.0):
    """Of each element of M, how many codes its own is away from it, from the state's second moment."""
    r, s = state["exp_avg_sq_row"].double().reshape(-1, 1), state["exp_avg_sq_col"].double().reshape(1, -1)
    X = M.double().reshape(len(r), -1) / (r * s / r.sum()).sqrt()
    return (127.5 * (X.abs() / (1 + X.abs())).sqrt() * X.sgn() - state["exp_avg_q"].reshape(len(r), -1)).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_adamw_within_half_a_code(dtype):
    params = parameters([(17, 19), (5,), (6, 4, 3, 3)], dtype)
    adam = torch.optim.AdamW(params, betas=(0.8, 0.95))
    train(adam, params, 5)
    converted = hfac.convert(adam.state_dict(), first_moment="int8")
    assert converted["param_groups"][0]["first_moment"] == "int8"
    factored = hfac.convert(adam.state_dict())["state"]
    for index in (0, 2):
        state = converted["state"][index]
        assert half_a_code(state, adam.state[params[index]]["exp_avg"] / (1 - 0.8**5)).max() <= 0.5001
        assert all(torch.equal(state[key], factored[index][key]) for key in KEYS[1:])
    assert bits(converted["state"][1]) == bits(factored[1])
    target = HFac(params, first_moment="int8")
    target.load_state_dict(converted)
    train(target, params, 1, start=5)


def test_what_no_code_stands_for_is_counted():
    (param,) = parameters([(8, 12)])
    adam = torch.optim.AdamW([param])
    train(adam, [param], 2)
    moments = adam.state[param]
    moments["exp_avg"][2, 3:5] = torch.tensor([1e6, -1e6])
    with pytest.warns(UserWarning, match=r"^convert: 2 elements have a first moment of more than 127 times the root"):
        state = hfac.convert(adam.state_dict(), first_moment="int8")["state"][0]
    assert state["exp_avg_q"][2, 3:5].tolist() == [127, -127]


def test_from_int8_to_the_others_and_back():
    params, optimizer = trained()
    state = optimizer.state[params[0]]
    r, s = state["exp_avg_sq_row"].double()[:, None], state["exp_avg_sq_col"].double()
    M = codes.decode(state["exp_avg_q"], torch.float64) * (r * s / r.sum()).sqrt()
    factored = hfac.convert(optimizer.state_dict(), first_moment="factored")
    assert factored["param_groups"][0]["first_moment"] == "factored"
    for side, dim in (("row", 1), ("col", 0)):
        torch.testing.assert_close(factored["state"][0][f"exp_avg_{side}"].double(), M.mean(dim), rtol=1e-5, atol=1e-7)
    trained("factored")[1].load_state_dict(factored)
    same = hfac.convert(optimizer.state_dict())
    assert same["param_groups"][0]["first_moment"] == "int8"
    assert torch.equal(same["state"][0]["exp_avg_q"], state["exp_avg_q"])
    dense = hfac.convert(optimizer.state_dict(), dense=True)
    torch.testing.assert_close(dense["state"][0]["exp_avg"].double(), M, rtol=1e-5, atol=0)
    back = hfac.convert(dense, dense=False, first_moment="int8")
    assert (back["state"][0]["exp_avg_q"].int() - state["exp_avg_q"]).abs().max() <= 1
    smmf = hfac.convert(optimizer.state_dict(), to="smmf")
    hfac.SMMF(parameters([(4, 6), (5,)])).load_state_dict(smmf)


def test_stacks_are_converted_slice_by_slice():
    (stack,) = parameters([(3, 8, 6)])
    optimizer = HFac([stack], batch_dims=1, dense=True)
    train(optimizer, [stack], 3)
    converted = hfac.convert(optimizer.state_dict(), dense=False, first_moment="int8")["state"][0]
    for i in range(3):
        one = {key: converted[key][i] for key in KEYS}
        assert half_a_code(one, optimizer.state[stack]["exp_avg"][i]).max() <= 0.5001


@pytest.mark.parametrize(
    ("q", "match"),
    [
        (torch.full((4, 6), -128, dtype=torch.int8), "holds -128"),
        (torch.zeros(4, 6), "has dtype torch.float32"),
        (torch.zeros(4, 6, dtype=torch.int16), "has dtype torch.int16"),
    ],
)
def test_damaged_codes_are_not_converted(q, match):
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "exp_avg_q": q}
    with pytest.raises(ValueError, match=f"convert: state of parameter 0: 'exp_avg_q' .*{match}"):
        hfac.convert(saved, first_moment="factored")
