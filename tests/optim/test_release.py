"""Steps of single parameters, and gradients that are stepped and freed while the backward pass goes on."""

import copy
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from running import Int8, bits, gradients, parameters
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

import hfac
from hfac import SMMF, HFac, functional
from hfac.release import _clipping

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
OPTIONS = {
    HFac: dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
    SMMF: dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
}
OPTIONS[Int8] = OPTIONS[HFac]
NAN = float("nan")


def two_groups(cls, params, **options):
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.005, "maximize": True}]
    return cls(groups, **{**OPTIONS[cls], **options})


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "skip"},
        {"capturable": True},
        {"backend": "reference"},
        {"rounding": "stochastic", "seed": 5},
        {"rounding": "stochastic", "master": "split8"},
    ],
    ids=str,
)
def test_step_param_is_a_step_to_the_bit(cls, dtype, options):
    """In any order, mixed with whole steps, with gradients that are absent or not finite."""
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    one, whole = two_groups(cls, params, **options), two_groups(cls, others, **options)
    for step in range(6):
        for tensors in (params, others):
            gradients(tensors, step)
            tensors[step].grad = None
            if "nonfinite" in options:
                tensors[6].grad.view(-1)[-1] = NAN
        for optimizer in (one, whole):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        whole.step()
        if step == 3:
            one.step()
            continue
        groups = {param: group for group in one.param_groups for param in group["params"]}
        for i, param in enumerate(reversed(params)):
            one.step_param(param, groups[param] if i % 2 else None)
    assert bits(params) == bits(others)
    assert bits(one.state_dict()) == bits(whole.state_dict())


@BOTH
def test_step_param_follows_every_change(cls):
    """What was bound is bound anew where a state, the data, an option or the group is another."""

    def change(optimizer, param, step):
        if step == 1:
            optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
        elif step == 2:
            key = next(key for key in optimizer.state[param] if key.startswith("exp_avg_sq"))
            optimizer.state[param][key] = 2 * optimizer.state[param][key]
        elif step == 3:
            param.data = param.data.to(torch.bfloat16)
        elif step == 4:
            optimizer.param_groups[0]["nonfinite"] = "skip"
        elif step == 5:
            optimizer.param_groups.append({**optimizer.param_groups[0], "lr": 0.5})
            optimizer.param_groups[0]["params"] = []
        elif step == 6:
            optimizer.state.clear()
        elif step == 7:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif step == 8:  # as trainers rewrite groups
            optimizer.param_groups[:] = [{**group, "lr": 0.25} for group in optimizer.param_groups]

    pairs = [parameters([(4, 6)]), parameters([(4, 6)])]
    one, whole = cls(pairs[0], **OPTIONS[cls]), cls(pairs[1], **OPTIONS[cls])
    for step in range(10):
        for optimizer, (param,) in zip((one, whole), pairs, strict=True):
            change(optimizer, param, step)
            param.grad = None
            gradients([param], step)
            if step == 4:
                param.grad[0, 0] = NAN
        one.step_param(pairs[0][0])
        whole.step()
        assert bits(pairs[0]) == bits(pairs[1]), step
        assert bits(one.state_dict()) == bits(whole.state_dict()), step


@BOTH
def test_step_param_binds_once(cls, monkeypatch):
    params = parameters()
    optimizer = cls(params)
    bound = []
    init = functional.Group.__init__
    monkeypatch.setattr(functional.Group, "__init__", lambda self, *args: (bound.append(args), init(self, *args))[1])
    for step in range(4):
        gradients(params, step)
        for param in params:
            optimizer.step_param(param)
    assert len(bound) == len(params)


@BOTH
def test_step_param_refuses(cls):
    params = parameters([(4, 6), (5,)])
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}])
    gradients(params, 0)
    before = bits([params, optimizer.state_dict()])
    with pytest.raises(ValueError, match=r"step_param: the parameter of shape \(4, 6\) is in none of .*not a copy"):
        optimizer.step_param(Parameter(params[0].detach().clone()))
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 was given with another group"):
        optimizer.step_param(params[1], optimizer.param_groups[0])
    with pytest.raises(ValueError, match=r"another group"):
        optimizer.step_param(params[1], dict(optimizer.param_groups[1]))
    with pytest.raises(TypeError, match=r"takes a parameter of this optimizer, got dict"):
        optimizer.step_param({"params": params})
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 0 of group 1 has layout torch.sparse_coo"):
        optimizer.step_param(params[1])
    assert bits([params, optimizer.state_dict()]) == before
    optimizer.step_param(params[0], optimizer.param_groups[0])
    del optimizer.param_groups[0]
    with pytest.raises(ValueError, match=r"in none of the optimizer's groups"):
        optimizer.step_param(params[0])


@BOTH
def test_step_param_leaves_hooks_to_the_step(cls):
    params = parameters()
    optimizer = cls(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    gradients(params, 0)
    optimizer.step_param(params[0])
    assert not seen and params[0].grad is not None


class Net(nn.Module):
    """Tied weights, a frozen layer, a parameter that no pass uses, and one that is used where `skip` is False."""

    def __init__(self, width=12, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.extra = nn.Linear(width, width)
        self.unused = nn.Parameter(torch.ones(3, 4))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, skip=False):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        x = self.frozen(x)
        return self.head(x if skip else x + self.extra(x))


def loss_of(net, seed, **kwargs):
    tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(tokens, **kwargs).flatten(0, 1), tokens.roll(1).flatten())


def pair(cls, **options):
    nets = Net(), Net()
    return nets, [two_groups(cls, list(net.parameters()), **options) for net in nets]


def same(nets, optimizers):
    return bits(list(nets[0].parameters())) == bits(list(nets[1].parameters())) and bits(
        optimizers[0].state_dict()
    ) == bits(optimizers[1].state_dict())


@BOTH
@pytest.mark.parametrize("accumulate", [1, 3])
def test_released_steps_are_ordinary_steps_to_the_bit(cls, accumulate):
    """Tied, frozen, unfrozen and unused parameters, micro-batches in which some have no gradient, and a scheduler."""
    nets, optimizers = pair(cls)
    handle = hfac.release_gradients(nets[0], optimizers[0], accumulate)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9) for optimizer in optimizers]
    for step in range(6):
        for net, optimizer, scheduler in zip(nets, optimizers, schedulers, strict=True):
            if step == 3:
                net.frozen.requires_grad_(True)
            if step == 4:
                net.layers[1].requires_grad_(False)
            for micro in range(accumulate):
                # in step 2 the last micro-batch leaves `extra` out, in step 3 the first, in step 5 all of them
                skip = (step, micro) in {(2, accumulate - 1), (3, 0)} or step == 5
                (loss_of(net, 10 * step + micro, skip=skip) / accumulate).backward()
            if net is nets[0] and step not in (2, 3):
                assert all(param.grad is None for param in net.parameters())
            optimizer.step()
            if net is nets[0]:
                assert all(param.grad is None for param in net.parameters())
            optimizer.zero_grad()
            scheduler.step()
        assert same(nets, optimizers), step
    handle.remove()
    for net, optimizer in zip(nets, optimizers, strict=True):
        loss_of(net, 99).backward()
        assert net.embed.weight.grad is not None
        optimizer.step()
    assert same(nets, optimizers)


@BOTH
def test_a_tied_parameter_is_stepped_once(cls, monkeypatch):
    net = Net()
    optimizer = cls(net.parameters())
    stepped = []
    step_param = cls.step_param
    monkeypatch.setattr(
        cls, "step_param", lambda self, param, **kwargs: (stepped.append(param), step_param(self, param, **kwargs))[1]
    )
    with hfac.release_gradients(net, optimizer):
        loss_of(net, 0).backward()
    assert len(stepped) == len(set(stepped)) == 2 * 4 + 1 and any(param is net.embed.weight for param in stepped)
    loss_of(net, 0).backward()
    assert len(stepped) == 9


@BOTH
def test_every_micro_batch_steps_with_a_part_of_the_learning_rate(cls):
    nets, optimizers = pair(cls)
    hfac.release_gradients(nets[0], optimizers[0], accumulate=4, exact=False)
    for step in range(2):
        for micro in range(4):
            loss_of(nets[0], 4 * step + micro).backward()
            assert all(param.grad is None for param in nets[0].parameters())
            loss_of(nets[1], 4 * step + micro).backward()
            lrs = [group["lr"] for group in optimizers[1].param_groups]
            for group in optimizers[1].param_groups:
                group["lr"] /= 4
            optimizers[1].step()
            optimizers[1].zero_grad()
            for group, lr in zip(optimizers[1].param_groups, lrs, strict=True):
                group["lr"] = lr
        optimizers[0].step()
    assert same(nets, optimizers)


@BOTH
def test_a_loop_without_step(cls):
    nets, optimizers = pair(cls)
    hfac.release_gradients(nets[0], optimizers[0], 2)
    for step in range(3):
        for micro in range(2):
            for net in nets:
                loss_of(net, 2 * step + micro).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert same(nets, optimizers)


@BOTH
def test_a_closure_that_makes_the_backward_pass(cls):
    nets, optimizers = pair(cls)
    hfac.release_gradients(nets[0], optimizers[0])

    def closure(net, optimizer):
        def evaluate():
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        return evaluate

    losses = [optimizer.step(closure(net, optimizer)) for net, optimizer in zip(nets, optimizers, strict=True)]
    assert losses[0] == losses[1] and same(nets, optimizers)


@BOTH
def test_an_error_in_the_backward_pass(cls):
    """It comes out as it was raised, leaves the parameter alone, and after a reset all goes on as ever."""
    nets, optimizers = pair(cls)
    handle = hfac.release_gradients(nets[0], optimizers[0], 2)

    def broken(grad):
        raise ArithmeticError("broken on purpose")

    loss_of(nets[0], 7).backward()
    before = bits([list(nets[0].parameters()), optimizers[0].state_dict()])
    hook = nets[0].layers[1].weight.register_hook(broken)
    kept = nets[0].layers[2].weight.detach().clone()
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        loss_of(nets[0], 8).backward()
    hook.remove()
    assert not torch.equal(kept, nets[0].layers[2].weight)  # stepped before it broke
    assert nets[0].layers[1].weight.grad is not None
    assert bits([list(nets[0].parameters()), optimizers[0].state_dict()]) != before
    handle.reset()
    assert all(param.grad is None for param in nets[0].parameters())
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for micro in range(2):
        for net in nets:
            loss_of(net, micro).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert same(nets, optimizers)

    # an error of the step itself
    weight = nets[0].layers[1].weight
    handle.remove()
    handle = hfac.release_gradients(nets[0], optimizers[0])
    optimizers[0].param_groups[0]["lr"] = optimizers[0].param_groups[1]["lr"] = "fast"
    before = bits([weight, optimizers[0].state[weight]])
    with pytest.raises(ValueError, match=r"lr must be a number"):
        loss_of(nets[0], 8).backward()
    assert bits([weight, optimizers[0].state[weight]]) == before


@BOTH
def test_release_refuses(cls):
    net = Net()
    optimizer = cls(net.parameters())
    shared_norm = cls(net.parameters(), max_grad_norm=1.0)
    shared_norm.norm_group = world = SimpleNamespace(size=lambda: 2, group_name="0")
    for act, error, pattern in [
        (lambda: hfac.release_gradients(list(net.parameters()), optimizer), TypeError, r"torch.nn.Module, got list"),
        (lambda: hfac.release_gradients(net, torch.optim.SGD(net.parameters())), TypeError, r"HFac or .* got SGD"),
        (lambda: hfac.release_gradients(Net(), optimizer), ValueError, r"none of the optimizer's parameters"),
        (lambda: hfac.release_gradients(net, cls(net.parameters(), amp_scaling=True)), RuntimeError, r"bfloat16"),
        (lambda: hfac.release_gradients(net, shared_norm), RuntimeError, r"norm_group=None or max_grad_norm=None"),
        (lambda: setattr(optimizer, "norm_group", "world"), TypeError, r"norm_group must be .*, got 'world'"),
        *(
            (
                lambda key=key: setattr(optimizer, "norm_group", {key: world}),
                ValueError,
                r"keys .* and .*(w|\(2,\)).* is",
            )
            for key in ("net.w", torch.zeros(2))
        ),
        *(
            (lambda k=k: hfac.release_gradients(net, optimizer, k), ValueError, r"accumulate must be .* >= 1, got")
            for k in (0, -1, 1.5, True, None)
        ),
    ]:
        with pytest.raises(error, match=pattern):
            act()
    assert not any(param._post_accumulate_grad_hooks for param in net.parameters())
    handle = hfac.release_gradients(net, optimizer)
    with pytest.raises(RuntimeError, match=r"already\. Call remove\(\)"):
        hfac.release_gradients(net, optimizer)
    handle.remove()
    handle.remove()
    hfac.release_gradients(net, optimizer).remove()
    assert not any(param._post_accumulate_grad_hooks for param in net.parameters())
    assert not optimizer._optimizer_step_pre_hooks


class Watch:
    """Bytes of gradients that are there: of each its storage, from when autograd has made it until nobody, be it
    ``.grad``, the optimizer or autograd itself, holds it any more."""

    def __init__(self, params):
        self.peak, self._there = 0, []
        for param in params:
            param.register_hook(self._made)

    def _made(self, grad):
        storage = grad.untyped_storage()
        self._there = [entry for entry in self._there if not entry[0].expired()]
        self._there.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._there))


def deep():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(12)]
    return nn.Sequential(*layers)


@BOTH
@pytest.mark.parametrize(
    ("accumulate", "exact", "backend"),
    [(1, True, "auto"), (1, True, "reference"), (2, False, "auto")],
    ids=["cpu", "reference", "approximate"],
)
def test_peak_of_gradients_is_a_layers(cls, accumulate, exact, backend):
    """At most 1.3 times the gradients of the largest layer, where without release it is the sum of all."""
    sizes = [sum(param.nbytes for param in layer.parameters()) for layer in deep()]
    peaks = {}
    for release in (False, True):
        net = deep()
        optimizer = cls(net.parameters(), backend=backend)
        if release:
            hfac.release_gradients(net, optimizer, accumulate, exact=exact)
        watch = Watch(net.parameters())
        for step in range(3):
            net(torch.randn(4, 128, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks[release] = watch.peak
    assert peaks[False] == sum(sizes)
    assert max(sizes) / 2 < peaks[True] <= 1.3 * max(sizes)


def test_exact_accumulation_frees_in_the_last_pass():
    net = deep()
    optimizer = HFac(net.parameters())
    hfac.release_gradients(net, optimizer, 2)
    there = []
    for param in net.parameters():
        param.register_hook(lambda _: there.append(sum(p.grad is not None for p in net.parameters())))
    for seed in range(2):
        net(torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    assert there[:24] == sorted(there[:24]) and there[24:] == sorted(there[24:], reverse=True) and there[-1] <= 2
    assert there[24] == 24


LIMIT = 12.0


@BOTH
@pytest.mark.parametrize(("accumulate", "ends"), [(1, True), (1, False), (2, True)])
def test_clipped_by_the_norm_of_the_step_before(cls, accumulate, ends):
    """Unused, frozen and late parameters are in the norm as in torch's; with and without `step()` at the end."""
    nets, optimizers = pair(cls)
    for group in optimizers[0].param_groups:
        group["max_grad_norm"] = LIMIT
    hfac.release_gradients(nets[0], optimizers[0], accumulate)
    norm, norms = None, []
    for step in range(5):
        if step == 3 and ends:
            nets[0].frozen.requires_grad_(True)
            nets[1].frozen.requires_grad_(True)
        for micro in range(accumulate):
            skip = ends and step == 2 and micro == accumulate - 1
            for net in nets:
                (loss_of(net, 10 * step + micro, skip=skip) * (1 + step)).backward()
        mine = [param for param in nets[1].parameters() if param.grad is not None]
        before, norm = norm, nn.utils.get_total_norm([param.grad for param in mine])
        norms.append(norm)
        factor = 1.0 if before is None else min(1.0, LIMIT / (before.item() + 1e-6))
        for param in mine:
            param.grad *= factor
        optimizers[1].step()
        optimizers[1].zero_grad()
        if ends:
            optimizers[0].step()
            assert optimizers[0].grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), step
    assert min(norms) < LIMIT < max(norms)


@BOTH
def test_a_bad_gradient_is_left_out_of_the_norm(cls):
    net = Net()
    optimizer = cls(net.parameters(), nonfinite="skip", max_grad_norm=LIMIT)
    hfac.release_gradients(net, optimizer)
    hook = net.extra.weight.register_hook(lambda grad: grad * NAN)
    loss_of(net, 0).backward()
    optimizer.step()
    hook.remove()
    assert int(optimizer.state[net.extra.weight]["skipped"]) == 1
    assert optimizer.grad_norm.isfinite() and optimizer.grad_norm > 0
    loss_of(net, 1).backward()
    assert all(param.isfinite().all() for param in net.parameters())


@pytest.mark.parametrize("stepped", [True, False], ids=["step", "no-step"])
@BOTH
def test_a_resumed_run_clips_as_the_run_that_went_on(cls, stepped):
    """Also in a loop that never calls step(), where nothing says that a backward pass was the last one."""

    def run(steps, net, optimizer, handle):
        for step in steps:
            loss_of(net, step).backward()
            if stepped:
                optimizer.step()
        return handle

    def made():
        net = Net()
        optimizer = two_groups(cls, list(net.parameters()), max_grad_norm=0.05)
        return net, optimizer, hfac.release_gradients(net, optimizer)

    net, optimizer, handle = made()
    run(range(2), net, optimizer, handle)
    saved = copy.deepcopy([net.state_dict(), optimizer.state_dict(), handle.state_dict()])
    run(range(2, 4), net, optimizer, handle)
    ends = []
    for with_handle in (True, False):
        other = made()
        for part, state in zip(other, saved[: 3 if with_handle else 2], strict=False):
            part.load_state_dict(copy.deepcopy(state))
        run(range(2, 4), *other)
        ends.append(bits([list(other[0].parameters()), other[1].state_dict(), other[2].state_dict()]))
    wanted = bits([list(net.parameters()), optimizer.state_dict(), handle.state_dict()])
    assert ends[0] == wanted != ends[1]
    for bad, error in (({}, TypeError), (1.0, TypeError), ({"grad_norm": 1.0}, ValueError)):
        with pytest.raises(error, match=r"grad_norm"):
            handle.load_state_dict(bad)
    with pytest.raises(ValueError, match=r"grad_norm"):
        handle.load_state_dict({"grad_norm": torch.ones(2)})
    assert bits(handle.state_dict()) == wanted[2]


@BOTH
def test_clipping_needs_all_parameters_and_step_param_a_coefficient(cls):
    net = Net()
    optimizer = cls([*net.parameters(), Parameter(torch.ones(3))], max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"has 12 of the optimizer's 13 parameters, .*ModuleList"):
        hfac.release_gradients(net, optimizer)
    loss_of(net, 0).backward()
    weight = net.extra.weight
    before = bits([weight, optimizer.state[weight]])
    with pytest.raises(RuntimeError, match=r"step_param: max_grad_norm clips by the norm of all .*release_gradients"):
        optimizer.step_param(weight)
    assert bits([weight, optimizer.state[weight]]) == before
    twin = copy.deepcopy(net)
    plain = cls([twin.extra.weight])
    twin.extra.weight.grad = weight.grad * 0.25
    plain.step()
    optimizer.step_param(weight, clip=torch.tensor(0.25))
    assert bits(weight) == bits(twin.extra.weight)


def test_nothing_is_kept_alive():
    net = Net()
    handle = hfac.release_gradients(net, SMMF(net.parameters()))
    loss_of(net, 0).backward()
    left = weakref.ref(net.embed.weight)
    handle.remove()
    del handle, net
    gc.collect()
    assert left() is None


def test_clipping_what_has_been_released_is_said_once():
    clip, inner = nn.utils.clip_grad_norm_, nn.utils.clip_grad._clip_grads_with_norm_
    net, other = Net(), nn.Linear(3, 2)
    with hfac.release_gradients(net, SMMF(net.parameters())), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(3):
            loss_of(net, seed).backward()
            other.weight.grad = torch.full((2, 3), 10.0)
            assert clip(other.parameters(), 1.0) > 20 and abs(other.weight.grad.norm() - 1) < 1e-4
            assert len(said) == (seed > 0)  # nothing was asked of the net before
            assert clip(net.parameters(), 1.0) == 0
        (only,) = said
        assert "clip_grad_norm_ finds no gradients" in str(only.message) and only.filename == __file__
        assert nn.utils.clip_grad_norm_ is clip
    assert nn.utils.clip_grad._clip_grads_with_norm_ is inner


def test_clipping_is_torchs_own_when_the_last_handle_has_gone():
    for left in list(_clipping.handles):  # by other tests
        left.remove()
    inner = nn.utils.clip_grad._clip_grads_with_norm_
    nets = [Net(), Net()]
    handles = [hfac.release_gradients(net, SMMF(net.parameters())) for net in nets]
    handles.pop().remove()
    assert nn.utils.clip_grad._clip_grads_with_norm_ is not inner
    handles.pop().remove()
    assert nn.utils.clip_grad._clip_grads_with_norm_ is inner


def test_accumulated_gradients_are_clipped_without_a_word(recwarn):
    net = Net()
    with hfac.release_gradients(net, SMMF(net.parameters()), accumulate=2):
        loss_of(net, 0).backward()
        assert nn.utils.clip_grad_norm_(net.parameters(), 1e-3) > 1e-3
    assert not recwarn.list
