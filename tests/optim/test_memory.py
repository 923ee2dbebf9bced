"""Tensors that are not what kernels assume: lazy bits, elements or parameters that share memory, no memory at all.
What torch.optim.AdamW does with them is the yardstick: it leaves all of that to torch's operations."""

import copy

import calls
import pytest
import torch
from running import Int8, bits
from suites import KERNELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.utils._pytree import tree_map

from hfac import SMMF, HFac, memory, ops

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
SHAPES = [(12, 8), (9,), (3, 4, 5)]


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_twice(cls, params, grads, **options):
    """What two steps leave; ``grads`` makes a step's gradients."""
    optimizer = cls(params, lr=0.02, **options)
    for t in range(2):
        for param, grad in zip(params, grads(t), strict=True):
            param.grad = grad
        optimizer.step()
    return [p.detach().clone() for p in params] + [s for p in params for s in optimizer.state[p].values()]


def plain_grads(t):
    return [randn(shape, 10 * t + i) for i, shape in enumerate(SHAPES)]


def parameters():
    return [Parameter(randn(shape, 50 + i)) for i, shape in enumerate(SHAPES)]


def negated(values):
    """The same values, in memory that holds their negatives."""
    found = torch._neg_view(-values)
    assert found.is_neg() and torch.equal(found, values)
    return found


LAZY = {
    "negative": negated,
    "imaginary part of a conjugate": lambda g: torch.complex(torch.zeros_like(g), -g).conj().imag,
    "negative and transposed": lambda g: negated(g.t().contiguous()).t() if g.ndim == 2 else negated(g),
}


@BOTH
@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("limit", [None, 0.5, 1e4])
def test_gradients_that_negate(cls, kind, backend, limit):
    options = dict(backend=backend, max_grad_norm=limit)
    ours = step_twice(cls, parameters(), lambda t: list(map(LAZY[kind], plain_grads(t))), **options)
    assert bits(ours) == bits(step_twice(cls, parameters(), plain_grads, **options))


@BOTH
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_negated_gradient_of_autograd_that_is_scaled(cls, backend):
    re, im = (Parameter(torch.tensor(0.5)) for _ in range(2))
    optimizer = cls([re, im], lr=0.02, amp_scaling=True, backend=backend)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (torch.complex(re, im).conj() - torch.complex(torch.tensor(1.0), torch.tensor(2.0))).abs()
        (8.0 * loss).backward()
        assert im.grad.is_neg() and im.grad.is_contiguous()
        optimizer.step()
    assert im.item() == pytest.approx(-2.0, abs=0.1)


@BOTH
@pytest.mark.parametrize("backend", ["auto", *KERNELS], indirect=True)
def test_gradients_that_are_zero_and_nothing_else(cls, backend):
    def zeros(t):
        return [torch._efficientzerotensor(shape) for shape in SHAPES]

    options = dict(backend=backend, max_grad_norm=0.5, weight_decay=0.1)
    ours = step_twice(cls, parameters(), zeros, **options)
    assert bits(ours) == bits(step_twice(cls, parameters(), lambda t: list(map(torch.zeros, SHAPES)), **options))


@BOTH
@pytest.mark.parametrize("whose", ["parameters", "states"])
def test_what_is_written_may_negate(cls, whose):
    """By torch's operations, which know; kernels that were asked for say that they do not."""

    def run(lazy, **options):
        params = [
            Parameter(negated(p.detach()) if lazy and whose == "parameters" else p.detach()) for p in parameters()
        ]
        optimizer = cls(params, lr=0.02, **options)
        for state in optimizer.state.values():
            for key, value in state.items():
                if value.dtype == torch.float32 and lazy and whose == "states":
                    state[key] = negated(value)
        for t in range(2):
            for param, grad in zip(params, plain_grads(t), strict=True):
                param.grad = grad
            optimizer.step()
        assert all(p.is_neg() == (lazy and whose == "parameters") for p in params)
        return [p.detach().resolve_neg() for p in params], [int(s["step"]) for s in optimizer.state.values()]

    assert bits(run(True)) == bits(run(False, backend="reference"))
    with pytest.raises(RuntimeError, match=r"backend='cpu'.*is a view that negates.*backend='auto'"):
        run(True, backend="cpu")


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_gradients_of_parts_that_negate(backend):
    def sums(grad):
        out = {name: [torch.zeros(4)] for name in ("row_sums", "new_rows")}
        out |= {name: [torch.zeros(6)] for name in ("col_sums", "col_squares", "col_ratios")}
        calls.hfac_sums([grad], [torch.ones(4)], **out, cols=[6], beta2=0.9, eps=1e-8, backend=backend)
        return out

    grad = randn((4, 6), 0)
    assert bits(sums(negated(grad))) == bits(sums(grad))


class Wrapped(torch.Tensor):
    """A tensor whose elements are another's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def inside(x):
            return x.inner if isinstance(x, Wrapped) else x

        out = func(*tree_map(inside, args), **tree_map(inside, kwargs or {}))
        if func._schema.name.endswith("_"):
            return args[0]
        return Wrapped(out) if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.clone) else out


class Named(torch.Tensor):
    """A subclass that has its memory."""


@BOTH
@pytest.mark.parametrize("wrapped", ["parameters", "gradients"])
def test_wrappers_are_stepped_through_their_operations(cls, wrapped):
    def run(wrap, **options):
        inner = [p.detach() for p in parameters()]
        params = [Parameter(Wrapped(p) if wrap and wrapped == "parameters" else p) for p in inner]
        optimizer = cls(params, lr=0.02, **options)
        for t in range(2):
            for param, grad in zip(params, plain_grads(t), strict=True):
                param.grad = Wrapped(grad) if wrap and wrapped == "gradients" else grad
            optimizer.step()
        return inner

    assert bits(run(True)) == bits(run(False, backend="reference"))
    with pytest.raises(RuntimeError, match=r"Wrapped, which has no elements in memory.*backend='auto' or 'reference'"):
        run(True, backend="cpu")


@BOTH
def test_one_wrapper_among_gradients_changes_nothing_before_it_is_refused(cls):
    """The matrices' call comes first, and could be made."""
    params = parameters()
    optimizer = cls(params, backend="cpu")
    for param, grad in zip(params, plain_grads(0), strict=True):
        param.grad = Wrapped(grad) if param.ndim == 1 else grad
    before = bits([params, optimizer.state_dict()])
    with pytest.raises(RuntimeError, match="Wrapped"):
        optimizer.step()
    assert bits([params, optimizer.state_dict()]) == before


@BOTH
def test_subclasses_with_memory_have_the_kernels(cls):
    def named(t):
        return [grad.as_subclass(Named) for grad in plain_grads(t)]

    ours = step_twice(cls, parameters(), named, backend="cpu")
    assert bits(ours) == bits(step_twice(cls, parameters(), plain_grads, backend="cpu"))


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "reference"},
        {"capturable": True},
        {"max_grad_norm": 1.0},
        {"nonfinite": "skip", "watch": True},
        {"batch_dims": 1},
        {"dense": True},
    ],
    ids=str,
)
def test_a_step_of_fake_tensors(cls, options):
    with FakeTensorMode():
        params = [Parameter(torch.randn(shape)) for shape in [(6, 12, 8), (5, 9)]]
        optimizer = cls(params, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.step()
        assert all(isinstance(value, FakeTensor) for state in optimizer.state.values() for value in state.values())


@BOTH
def test_fake_tensors_have_no_kernels(cls):
    with FakeTensorMode():
        params = [Parameter(torch.randn(4, 6))]
        optimizer = cls(params, backend="cpu")
        params[0].grad = torch.randn(4, 6)
        with pytest.raises(RuntimeError, match=r"FakeTensor, which has no elements in memory"):
            optimizer.step()


@BOTH
def test_nothing_is_written_where_a_mode_fakes_operations(cls):
    """Parameters that are real in FakeTensorMode: torch's operations refuse them, and leave them as they were."""
    params = parameters()
    optimizer = cls(params)
    for t in range(2):
        for param, grad in zip(params, plain_grads(t), strict=True):
            param.grad = grad
        if t == 0:
            optimizer.step()
    before = bits([params, copy.deepcopy(optimizer.state_dict())])
    with FakeTensorMode(), pytest.raises(Exception, match="FakeTensor"):
        optimizer.step()
    assert bits([params, optimizer.state_dict()]) == before
    optimizer.step()
    assert bits([params]) != before[:1]


@BOTH
def test_meta_tensors(cls):
    params = [Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = cls(params)
    for param in params:
        param.grad = torch.empty(param.shape, device="meta")
    optimizer.step()
    assert all(state["step"].item() == 1 for state in optimizer.state.values())


OVERLAPPING = {
    "expanded": lambda: torch.ones(1, 6).expand(4, 6),
    "a scalar": lambda: torch.ones(()).expand(8),
    "windows": lambda: torch.ones(9).as_strided((4, 6), (1, 1)),
    "interleaved that meet": lambda: torch.ones(40).as_strided((4, 5), (6, 4)),
}


@pytest.mark.parametrize("kind", OVERLAPPING)
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@BOTH
def test_elements_that_share_memory_are_refused(cls, backend, batch_dims, kind):
    """With batch dimensions, too, where every slice by itself would do."""
    params = [Parameter(torch.ones(3, 5)), Parameter(OVERLAPPING[kind]())]
    batch_dims = min(batch_dims, params[1].ndim - 1)
    optimizer = cls([{"params": params, "batch_dims": batch_dims}], backend=backend)
    for param in params:
        param.grad = torch.ones(param.shape)
    before = bits([params, optimizer.state_dict()])
    with pytest.raises(RuntimeError, match=r"params\[\d\] .* elements that share memory.*a clone"):
        optimizer.step()
    assert bits([params, optimizer.state_dict()]) == before


def test_which_strides_meet():
    def found(shape, strides):
        return memory.overlaps_itself(torch.empty(1000).as_strided(shape, strides))

    def meet(shape, strides):
        places = torch.arange(1000).as_strided(shape, strides).flatten().tolist()
        return len(set(places)) < len(places)

    cases = [((3, 4), (a, b)) for a in range(8) for b in range(8)]
    cases += [((2, 3, 2), (a, b, c)) for a in (1, 4, 6) for b in (1, 2, 3) for c in (0, 1, 5)] + [((1, 5), (0, 1))]
    assert [found(*case) for case in cases] == [meet(*case) for case in cases]


def tied(sources):
    """Two parameters in one place, by .data, with others between."""
    first, between, second = (Parameter(t.clone()) for t in (sources[0], sources[1], sources[0]))
    second.data = first.data
    return [first, between, second]


def windows(sources):
    """Parameters that are windows of one flat tensor, each reaching into the next; a vector among the matrices."""
    flat = torch.cat([sources[0].flatten()] * 4)
    return [
        Parameter(flat[a : a + 64 * 64].view(shape)) for a, shape in ((0, (64, 64)), (4000, (4096,)), (8000, (64, 64)))
    ]


@pytest.mark.parametrize("arrange", [tied, windows])
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@BOTH
def test_parameters_that_share_memory_are_stepped_in_order(cls, backend, arrange):
    """As if each had an optimizer of its own, one after the other: every bit, on three threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def run(apart):
            params = arrange([randn((64, 64), 0), randn((64, 64), 1)])
            each = [[p] for p in params] if apart else [params]
            optimizers = [cls(some, lr=0.02, weight_decay=0.1, backend=backend) for some in each]
            for t in range(3):
                for i, param in enumerate(params):
                    param.grad = randn(param.shape, 10 * t + i)
                for optimizer in optimizers:
                    optimizer.step()
            return [p.detach().clone() for p in params]

        assert bits(run(apart=False)) == bits(run(apart=True))
    finally:
        torch.set_num_threads(threads)


@BOTH
def test_parameters_that_share_their_state_are_stepped_in_order(cls):
    def run(backend):
        params = [Parameter(randn((30, 20), i)) for i in range(3)]
        optimizer = cls(params, lr=0.02, backend=backend)
        kept = optimizer.state[params[0]]
        for key, value in optimizer.state[params[2]].items():
            optimizer.state[params[2]][key] = kept[key] if key != "step" else value
        for t in range(3):
            for i, param in enumerate(params):
                param.grad = randn(param.shape, 10 * t + i)
            optimizer.step()
        return [p.detach() for p in params]

    for ours, theirs in zip(run("cpu"), run("reference"), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_a_parameter_in_its_own_state():
    """Whatever comes of it, torch's operations make it, one after the other; kernels are not asked."""
    param = Parameter(randn((12, 8), 0))
    optimizer = HFac([param])
    optimizer.state[param]["exp_avg_row"] = param.data.view(-1)[:12]
    param.grad = randn((12, 8), 1)
    bound = optimizer._bind(optimizer.param_groups[0], [param], [param.grad], [0])
    assert [hasattr(bucket.call._call, "statistics") for bucket in bound._buckets] == [False]
    optimizer.step()
    optimizer = HFac([param], backend="cpu")
    optimizer.state[param]["exp_avg_row"] = param.data.view(-1)[:12]
    with pytest.raises(RuntimeError, match=r"params\[0\] and its states share memory.*backend='reference'"):
        optimizer.step()


@BOTH
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_a_parameter_that_is_its_own_gradient(cls, backend):
    def run(copied):
        params = parameters()
        optimizer = cls(params, lr=0.02, weight_decay=0.1, backend=backend)
        for _ in range(3):
            for param in params:
                param.grad = param.detach().clone() if copied else param.detach()
            optimizer.step()
        return params

    assert bits(run(copied=False)) == bits(run(copied=True))


def test_neighbours_share_nothing():
    """Windows of a flat tensor that end where the next begins are one call still."""
    flat = torch.randn(3 * 24)
    params = [Parameter(part.view(4, 6)) for part in flat.split(24)]
    optimizer = HFac(params)
    for param in params:
        param.grad = torch.ones(4, 6)
    optimizer.step()
    (_, bound), *_ = optimizer._bound.values()
    assert len(bound._buckets) == 1


def test_inference_tensors_are_refused_before_anything_is_written():
    with torch.inference_mode():
        frozen = torch.ones(4, 6)
    states = {name: [torch.zeros(n)] for name, n in zip(calls.STATES["hfac_step_"], (4, 6, 4, 6), strict=True)}
    with pytest.raises(RuntimeError, match=r"params\[0\] is an inference tensor"):
        ops.OpCall("hfac_step_", [frozen], states)


def test_a_module_of_wrappers_trains_as_adamw_does():
    """A layer whose weight is a wrapper beside one whose is not, in one list."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
    inner = model[0].weight.detach().clone()
    model[0].weight = Parameter(Wrapped(inner))
    for cls in (torch.optim.AdamW, HFac, SMMF):
        optimizer, before = cls(model.parameters()), inner.clone()
        for param in model.parameters():
            param.grad = torch.ones(param.shape)
        optimizer.step()
        assert not torch.equal(inner, before)
