"""Batch dimensions: a stack of slices is stepped as its slices would be as parameters of their own, to the last bit.

Each test trains a stack with batch_dims and, beside it, its slices without; values, states and steps are compared.
Also here: what is refused, and stacks whose batch dimension is sharded.
"""

import copy
import io
import pickle

import pytest
import torch
from cases import gradient
from emulated import NAME as EMULATED
from emulated import native as emulated_native
from running import bits
from sharded import on_ranks
from torch import nn
from torch.nn import Parameter

from hfac import SMMF, HFac, backends, functional, param_groups

CLASSES = {"hfac": HFac, "smmf": SMMF}
BOTH = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
#: None of these options is at its neutral value.
OPTIONS = {
    HFac: dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
    SMMF: dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
}
VARIANTS = [
    (HFac, {}),
    (HFac, {"matricize": "flatten", "maximize": True}),
    (HFac, {"clip_threshold": None, "capturable": True}),
    (HFac, {"dense": True}),
    (HFac, {"nonfinite": "skip"}),
    (SMMF, {}),
    (SMMF, {"beta": None, "capturable": True}),
    (SMMF, {"vector_reshape": False, "weight_decay_mode": "adam"}),
    (SMMF, {"dense": True}),
    (SMMF, {"nonfinite": "skip", "capturable": True}),
]
#: batch_dims -> stacks: matrices, vectors, scalars, one of a kind, several cuts, odd bytes of signs, empty slices, none
STACKS = {
    1: [(3, 4, 6), (2, 5), (4, 3, 2, 4), (1, 17, 19), (2, 31, 8), (3, 1), (2, 1, 7), (2, 0, 5), (0, 4, 3)],
    2: [(2, 3, 4, 6), (3, 2, 5), (1, 2, 3, 2, 3), (2, 0, 4, 3)],
}


@pytest.fixture(autouse=True)
def _emulated(emulated_backend):
    pass


def backends_here():
    emulated = [pytest.param(EMULATED, marks=pytest.mark.skipif(emulated_native is None, reason="not built"))]
    return ["reference", *(["cpu"] if backends.TABLE["cpu"].why_not(torch.device("cpu")) is None else []), *emulated]


def slices(tensor, batch):
    return list(tensor.detach().flatten(0, batch - 1)) if batch else [tensor]


class Beside:
    """A stack's optimizer and, beside it, that of its slices."""

    def __init__(self, cls, shapes, batch, dtype=torch.float32, strided=False, **options):
        self.batch, self.options = batch, {**OPTIONS[cls], **options}
        values = [gradient(shape, 7 + i, dtype) for i, shape in enumerate(shapes)]
        if strided:  # the slices' dimensions in another order in memory
            values = [value.transpose(batch, -1).contiguous().transpose(batch, -1) for value in values]
        self.stacks = [Parameter(value) for value in values]
        self.singles = [[Parameter(part.clone()) for part in slices(stack, batch)] for stack in self.stacks]
        self.stacked = cls(self.stacks, batch_dims=batch, **self.options)
        self.single = cls([part for parts in self.singles for part in parts], **self.options)

    def gradients(self, seed, spoil=lambda i, grad: None, strided=False):
        for i, (stack, parts) in enumerate(zip(self.stacks, self.singles, strict=True)):
            stack.grad = gradient(tuple(stack.shape), 100 * seed + i, stack.dtype)
            if strided:
                stack.grad = stack.grad.transpose(0, -1).contiguous().transpose(0, -1)
            spoil(i, stack.grad)
            for part, grad in zip(parts, slices(stack.grad, self.batch), strict=True):
                part.grad = grad.clone()

    def step(self, seed, **kwargs):
        self.gradients(seed, **kwargs)
        self.stacked.step()
        self.single.step()

    def agree(self, steps=True):
        for stack, parts in zip(self.stacks, self.singles, strict=True):
            assert bits(slices(stack, self.batch)) == bits([part.detach() for part in parts])
            state = self.stacked.state[stack]
            assert all(value.is_contiguous() for value in state.values())
            for i, part in enumerate(parts):
                alone = self.single.state[part]
                assert state.keys() == alone.keys()
                for key, value in alone.items():
                    if key not in ("step", "skipped"):
                        assert bits(slices(state[key], self.batch)[i]) == bits(value), key
                    elif steps:
                        assert bits(state[key]) == bits(value), key


def through_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("batch", STACKS)
@pytest.mark.parametrize(
    ("cls", "options"), VARIANTS, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v) or "plain"
)
def test_a_stack_is_its_slices(cls, options, batch, backend):
    """Several steps with a checkpoint in the middle, and with a gradient missing in one step."""
    for dtype in (torch.float32, torch.bfloat16)[: 2 if batch == 1 and backend != EMULATED else 1]:
        both = Beside(cls, STACKS[batch], batch, dtype, backend=backend, **options)
        both.step(1)
        both.step(2, strided=True)
        both.agree()
        saved = through_file(both.stacked.state_dict())
        both.stacked = cls(both.stacks, lr=0.7, backend=backend, capturable=options.get("capturable", False))
        both.stacked.load_state_dict(saved)
        assert both.stacked.param_groups[0]["batch_dims"] == batch
        both.agree()
        both.step(3)
        both.gradients(4)
        for tensor in (both.stacks[0], *both.singles[0]):
            tensor.grad = None
        both.stacked.step()
        both.single.step()
        both.step(5)
        both.agree()
        assert [both.stacked.state[stack]["step"].item() for stack in both.stacks] == [4, *[5] * (len(both.stacks) - 1)]


@BOTH
@pytest.mark.parametrize("batch", STACKS)
def test_whose_slices_do_not_lie_in_order(cls, batch):
    both = Beside(cls, STACKS[batch], batch, strided=True)
    assert not both.stacks[0].is_contiguous() and not both.stacks[0].detach().flatten(0, batch - 1)[0].is_contiguous()
    for seed in range(3):
        both.step(seed)
    both.agree()


#: state key -> shape, of a 3 x 2 x 4 x 6 parameter with so many batch dimensions
STATE = {
    (HFac, 1): {"exp_avg_row": (3, 2, 4), "exp_avg_col": (3, 6)},
    (HFac, 2): {"exp_avg_row": (3, 2, 4), "exp_avg_col": (3, 2, 6)},
    (HFac, 3): {"exp_avg": (3, 2, 4, 6)},
    (SMMF, 1): {"exp_avg_row": (3, 8), "exp_avg_col": (3, 6), "exp_avg_sign": (3, 2, 3)},
    (SMMF, 2): {"exp_avg_row": (3, 2, 6), "exp_avg_col": (3, 2, 4), "exp_avg_sign": (3, 2, 4, 1)},
    (SMMF, 3): {"exp_avg_row": (3, 2, 4, 3), "exp_avg_col": (3, 2, 4, 2), "exp_avg_sign": (3, 2, 4, 6, 1)},
}


@pytest.mark.parametrize(("cls", "batch"), STATE)
def test_state_of_a_stack(cls, batch):
    param = Parameter(torch.zeros(3, 2, 4, 6, dtype=torch.bfloat16))
    found = {key: tuple(value.shape) for key, value in cls([param], batch_dims=batch).state[param].items()}
    first = STATE[cls, batch]
    second = {key.replace("avg", "avg_sq"): shape for key, shape in first.items() if "sign" not in key}
    assert found == {**first, **second, "step": ()}


@BOTH
def test_two_groups_and_one_of_them_stacked(cls):
    stack, plain = Parameter(gradient((3, 4, 6), 1, torch.float32)), Parameter(gradient((3, 4, 6), 2, torch.float32))
    optimizer = cls([{"params": [stack], "batch_dims": 1}, {"params": [plain]}], **OPTIONS[cls])
    singles = [Parameter(part.clone()) for part in stack.detach()] + [Parameter(plain.detach().clone())]
    alone = cls(singles, **OPTIONS[cls])
    for seed in range(3):
        stack.grad, plain.grad = (gradient((3, 4, 6), 9 * seed + i, torch.float32) for i in (0, 1))
        for single, grad in zip(singles, [*stack.grad, plain.grad], strict=True):
            single.grad = grad.clone()
        optimizer.step()
        alone.step()
    assert bits([*stack.detach(), plain.detach()]) == bits([single.detach() for single in singles])


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("backend", backends_here())
@BOTH
def test_a_slice_with_a_bad_gradient_stays_and_the_others_go_on(cls, backend, capturable):
    shapes = [(3, 4, 6), (2, 5), (4, 3, 2, 4), (2, 31, 8), (0, 4, 3), (2, 0, 5)]
    both = Beside(cls, shapes, 1, nonfinite="skip", backend=backend, capturable=capturable)
    both.step(0)
    both.agree()
    before = slices(both.stacks[0], 1)[1].clone()
    old = {key: value[1].clone() for key, value in both.stacked.state[both.stacks[0]].items() if value.ndim}

    def spoil(i, grad):
        if i == 0:
            grad[1, 2, 3] = float("nan")  # one slice of three
        if i == 1:
            grad[:, 4] = float("inf")  # every slice

    both.step(1, spoil=spoil)
    both.agree(steps=False)
    assert bits(slices(both.stacks[0], 1)[1]) == bits(before)
    assert all(bits(both.stacked.state[both.stacks[0]][key][1]) == bits(value) for key, value in old.items())
    counts = [tuple(int(both.stacked.state[p][key]) for key in ("step", "skipped")) for p in both.stacks]
    assert counts == [(2, 1), (1, 1), (2, 0), (2, 0), (2, 0), (2, 0)]

    # what goes on is as if nothing had happened beside it; what stayed goes on from where it was, at the stack's step
    both.single.state[both.singles[0][1]]["step"].add_(1)
    both.step(2)
    both.agree(steps=False)
    counts = [tuple(int(both.stacked.state[p][key]) for key in ("step", "skipped")) for p in both.stacks]
    assert counts == [(3, 1), (2, 1), (3, 0), (3, 0), (3, 0), (3, 0)]


@pytest.mark.parametrize("backend", backends_here())
@BOTH
def test_what_a_grad_scaler_hands_over(cls, backend):
    both = Beside(cls, STACKS[1], 1, nonfinite="skip", amp_scaling=True, backend=backend)
    for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
        for optimizer in (both.stacked, both.single):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        both.step(seed)
        both.agree()
    assert both.stacked.state[both.stacks[0]]["step"] == 2


@BOTH
@pytest.mark.parametrize("what", ["param", "state", "pickle", "deepcopy"])
def test_memory_that_moves_between_steps(cls, what):
    """Slices are views: they would go on in memory that is no longer the parameter's, or the state's."""
    both = Beside(cls, [(3, 4, 6), (2, 5)], 1)
    both.step(0)
    if what == "param":
        for stack in both.stacks:
            stack.data = stack.data.clone()
    elif what == "state":
        for state in both.stacked.state.values():
            for value in state.values():
                value.data = value.data.clone()
    else:
        copied = [both.stacks, both.stacked]
        again = copy.deepcopy(copied) if what == "deepcopy" else pickle.loads(pickle.dumps(copied))
        both.stacks, both.stacked = again
    both.step(1)
    both.step(2)
    both.agree()


@BOTH
def test_what_earlier_versions_saved(cls):
    """Neither option is in their groups, nor in the defaults that a pickle holds."""
    param = Parameter(gradient((3, 4, 6), 1, torch.float32))
    optimizer = cls([param])
    names = ("dense", "batch_dims")
    saved = optimizer.state_dict()
    saved["param_groups"] = [{k: v for k, v in g.items() if k not in names} for g in saved["param_groups"]]
    target = cls([{"params": [param], "dense": True}])
    target.load_state_dict(saved)
    assert [target.param_groups[0][name] for name in names] == [False, 0]

    for options in (optimizer.defaults, *optimizer.param_groups):
        for name in names:
            del options[name]
    param, optimizer = pickle.loads(pickle.dumps([param, optimizer]))
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert [optimizer.param_groups[0][name] for name in names] == [False, 0]


def snapshot(optimizer):
    groups = [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]
    return bits([groups, list(map(list, (optimizer.state.keys(), optimizer.state.values())))])


@BOTH
@pytest.mark.parametrize(
    ("value", "error", "pattern"),
    [
        (2, ValueError, r"shape \(3, 4\); batch_dims=2 needs more than 2 dimension"),
        (3, ValueError, "batch_dims=3 needs more than 3"),
        (-1, ValueError, "batch_dims must be a whole number >= 0, got -1"),
        (1.0, TypeError, "batch_dims must be a whole number >= 0, got 1.0"),
        (True, TypeError, "batch_dims must be a whole number >= 0, got True"),
        ("one", ValueError, "batch_dims must be a whole number >= 0, got 'one'"),
    ],
)
def test_batch_dims_that_cannot_be(cls, value, error, pattern):
    params = [Parameter(torch.ones(3, 4, 6)), Parameter(torch.ones(3, 4))]
    with pytest.raises(error, match=pattern):
        cls(params, batch_dims=value)
    optimizer = cls([{"params": params[:1], "batch_dims": "2"}])  # as a command line has it
    assert optimizer.param_groups[0]["batch_dims"] == 2
    before = snapshot(optimizer)
    with pytest.raises(error, match=pattern):
        optimizer.add_param_group({"params": params[1:], "batch_dims": value})
    saved = {"state": {}, "param_groups": [{**optimizer.state_dict()["param_groups"][0], "lr": 0.5}]}
    saved["param_groups"][0]["batch_dims"] = 3 if value == 2 else value  # the parameter has room for 2
    with pytest.raises(error, match="batch_dims"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@BOTH
def test_a_state_of_other_batch_dimensions_is_not_loaded(cls):
    param = Parameter(torch.ones(3, 4, 6))
    optimizer, other = cls([param]), cls([param], batch_dims=1)
    saved = other.state_dict()
    saved["param_groups"][0]["batch_dims"] = 0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="must have shape"):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


@BOTH
def test_sparse_gradient_of_a_stack(cls):
    params = [Parameter(torch.ones(3, 4, 6)), Parameter(torch.ones(2, 5, 2))]
    optimizer = cls([params[0]])
    optimizer.add_param_group({"params": params[1:], "batch_dims": 1})
    params[0].grad, params[1].grad = torch.ones(3, 4, 6), torch.ones(2, 5, 2).to_sparse()
    with pytest.raises(RuntimeError, match="gradient of parameter 0 of group 1 has layout torch.sparse_coo"):
        optimizer.step()
    assert bool((params[0] == 1).all())


def call(change, **options):
    """A functional step of one 3 x 4 x 6 stack, after a change."""
    param = torch.ones(3, 4, 6)
    factors = [torch.zeros(3, 4), torch.zeros(3, 6), torch.zeros(3, 4), torch.zeros(3, 6)]
    lists = [[param], [torch.ones(3, 4, 6)], *([factor] for factor in factors), [None], [None], [torch.zeros(())]]
    change(lists)
    scalars = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-12, clip_threshold=1.0, weight_decay=0.0, batch_dims=1)
    functional.hfac(*lists, **{**scalars, **options})
    return param


@pytest.mark.parametrize(
    ("change", "options", "error", "pattern"),
    [
        (lambda ls: ls[1].__setitem__(0, torch.ones(2, 4, 6)), {}, ValueError, r"grads\[0\] must have .*\(3, 4, 6\)"),
        (lambda ls: ls[1].__setitem__(0, torch.ones(3, 4, 6).to_sparse()), {}, RuntimeError, r"grads\[0\] has layout"),
        (lambda ls: ls[2].__setitem__(0, torch.zeros(2, 4)), {}, ValueError, r"exp_avg_rows\[0\].* must begin with"),
        (lambda ls: ls[2].__setitem__(0, torch.zeros(1, 4).expand(3, 4)), {}, ValueError, "must be contiguous"),
        (lambda ls: None, {"batch_dims": 3}, ValueError, "nothing behind batch_dims=3"),
        (lambda ls: None, {"batch_dims": -1}, ValueError, "batch_dims must be a whole number >= 0"),
    ],
    ids=["grad-shape", "grad-sparse", "state-shape", "state-expanded", "too-many", "negative"],
)
def test_functional_calls_that_cannot_be(change, options, error, pattern):
    assert bool((call(lambda lists: None) != 1).all())
    kept = []
    with pytest.raises(error, match=pattern):
        call(lambda lists: (change(lists), kept.append(lists[0][0])), **options)
    assert bool((kept[0] == 1).all())


@pytest.fixture
def meshes():
    """(sizes, rank) -> a mesh of ranks that never speak to each other: whoever needs others gets no sums."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(sizes, rank):
        if dist.is_initialized():
            dist.destroy_process_group()
        world = torch.Size(sizes).numel()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        return init_device_mesh("cpu", sizes)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def sharded(whole, mesh, dims):
    """The part of this rank, cut in each of ``dims`` by one mesh dimension."""
    from torch.distributed.tensor import DTensor, Shard

    part = whole
    for dim, size, coordinate in zip(dims, mesh.shape, mesh.get_coordinate(), strict=True):
        pieces = part.chunk(size, dim)
        part = pieces[coordinate] if coordinate < len(pieces) else part.narrow(dim, 0, 0)
    return DTensor.from_local(
        part.clone(), mesh, [Shard(d) for d in dims], run_check=False, shape=whole.shape, stride=whole.stride()
    )


# torch remembers of a mesh which rank this is: no two cases have meshes of one size and different ranks
@BOTH
@pytest.mark.parametrize(("experts", "world", "rank"), [(4, 2, 0), (5, 3, 2), (2, 4, 3)], ids=["even", "odd", "none"])
def test_ranks_that_have_whole_slices_need_nobody(cls, experts, world, rank, meshes):
    whole = Beside(cls, [(experts, 4, 6), (experts, 5)], 1)
    mesh = meshes((world,), rank)
    params = [Parameter(sharded(stack.detach(), mesh, (0,))) for stack in whole.stacks]
    optimizer = cls(params, batch_dims=1, **OPTIONS[cls])
    assert optimizer.collectives() == []
    for seed in range(3):
        whole.step(seed)
        for param, stack in zip(params, whole.stacks, strict=True):
            param.grad = sharded(stack.grad, mesh, (0,))
        optimizer.step()
        if seed == 1:  # a checkpoint of this rank, and one of whole tensors
            for saved in (optimizer.state_dict(), through_file(whole.stacked.state_dict())):
                optimizer = cls(params, batch_dims=1, **OPTIONS[cls])
                optimizer.load_state_dict(saved)
    whole.agree()
    each = -(-experts // world)
    mine = slice(each * rank, each * (rank + 1))
    for param, stack in zip(params, whole.stacks, strict=True):
        assert bits(param.to_local()) == bits(stack.detach()[mine])
        for key, wanted in whole.stacked.state[stack].items():
            value = optimizer.state[param][key]
            assert value.shape == wanted.shape, key
            assert bits(value if key == "step" else value.to_local()) == bits(wanted if key == "step" else wanted[mine])


@BOTH
def test_stacks_that_are_cut_otherwise(cls, meshes):
    mesh = meshes((2, 2), 0)
    value = torch.ones(4, 4, 6)
    across = Parameter(sharded(value, mesh, (0, 1)))
    with pytest.raises(ValueError, match=r"batch_dims=1, shape \(4, 4, 6\).* only the first 1 dimension"):
        cls([across], batch_dims=1)
    cls([across], batch_dims=2)  # nor do signs mind: slices are whole

    along = Parameter(sharded(value, meshes((2,), 0), (0,)))
    with pytest.raises(ValueError, match="nonfinite='skip' is not supported with both"):
        cls([along], batch_dims=1, nonfinite="skip")
    own = Parameter(along.to_local().detach().clone())  # this rank's slices, which it steps by itself
    for param, ones in ((along, sharded(torch.ones_like(value), meshes((2,), 0), (0,))), (own, torch.ones(2, 4, 6))):
        param.grad = ones
        cls([param], batch_dims=1, capturable=True).step()
    assert torch.equal(along.to_local(), own) and not own.eq(1).any()

    # trainers swap parameters for sharded ones
    swapped = Parameter(value.clone())
    optimizer = cls([swapped], batch_dims=1)
    swapped.grad = torch.ones_like(value)
    optimizer.step()
    cut = Parameter(sharded(value, meshes((2,), 0), (2,)))
    optimizer.param_groups[0]["params"][0] = cut
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 has batch_dims=1.* can be sharded"):
        optimizer.step()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(6, 8), nn.Linear(6, 6)
        self.up = Parameter(torch.randn(5, 8, 6))

    def forward(self, x):
        return self.out(torch.einsum("bi,eij->bej", self.into(x), self.up).tanh().sum(1)).square().sum()


def fully_sharded(cls):
    """Largest difference from the whole model, in parameters and states, each relative to its largest entry, and what a
    step adds up."""
    from sharded_steps import difference, whole  # imports what only ranks need
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    models = [Experts().double(), Experts().double()]
    fully_shard(models[1])
    optimizers = [
        cls(param_groups(model, dense=["out.weight"], batch_dims={"up": 1}), **OPTIONS[cls]) for model in models
    ]
    sent = optimizers[1].collectives()
    for seed in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(gradient((4, 6), seed)).backward()
            optimizer.step()
        if seed == 1:
            saved = get_optimizer_state_dict(models[1], optimizers[1])
            set_optimizer_state_dict(models[1], optimizers[1], saved)
    pairs = list(zip(*(model.parameters() for model in models), strict=True))
    for one, other in list(pairs):
        states = (optimizer.state[param] for optimizer, param in zip(optimizers, (one, other), strict=True))
        pairs += [(value, twin) for value, twin in zip(*map(dict.values, states), strict=True)]
    return max(difference(whole(other).double(), one.double()) for one, other in pairs), sent


def test_stacks_and_whole_moments_under_fsdp2():
    """Nothing of the stack is sent. H-Fac sends three sums for each column of the 8 x 6 weight and three numbers, and
    three numbers each of a dense weight and two biases; SMMF four factors and one number, and one of the dense one."""
    found = on_ranks(2, *(("test_batch_dims:fully_sharded", cls) for cls in (HFac, SMMF)))
    numbers = [3 * (6 + 1) + 3 * 3, (2 * (8 + 6) + 1) + 1 + (2 * (4 + 2) + 1) + (2 * (3 + 2) + 1)]
    assert [sent for _, sent in found] == [[(2, 8 * count)] for count in numbers]
    assert all(error < 1e-12 for error, _ in found)


@pytest.mark.parametrize("cls", [HFac, SMMF])
@pytest.mark.parametrize("stored", [dict(rounding="stochastic", seed=3), dict(master="split8", rounding="stochastic")])
def test_slices_are_rounded_with_bits_of_their_own(cls, stored):
    """Those of the elements' places in the whole stack, whichever way it is cut; one slice's are not another's."""
    grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    stacks = []
    for shape, batch in (((4, 6, 5), 1), ((2, 2, 6, 5), 2)):
        stack = torch.nn.Parameter(torch.full(shape, 0.3, dtype=torch.bfloat16))
        optimizer = cls([stack], lr=1e-3, batch_dims=batch, **stored)
        for _ in range(3):
            stack.grad = grad.expand(shape).bfloat16()
            optimizer.step()
        (weights,) = optimizer.fp32_state_dict(nn.ParameterList([stack])).values()
        stacks.append(weights.view(4, 6, 5))
    assert torch.equal(*stacks)
    assert all((stacks[0][0] != other).any() for other in stacks[0][1:])
