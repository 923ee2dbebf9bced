"""max_grad_norm: as torch.nn.utils.clip_grad_norm_ before the step; the kernels' part is in test_clipped_steps.py,
sharded gradients are in test_sharded.py."""

import emulated
import pytest
import torch
from running import Int8, bits, gradients, parameters
from suites import KERNELS
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfac import SMMF, HFac, backends, clipping

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
OPTIONS = {
    HFac: dict(lr=0.02, betas=(0.8, 0.95), eps=1e-12, clip_threshold=0.7, weight_decay=0.1),
    SMMF: dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.95),
}
OPTIONS[Int8] = OPTIONS[HFac]
NAN, INF = float("nan"), float("inf")
LIMIT = 5.0
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-6}


def two_groups(cls, params, **options):
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.005, "weight_decay": 0.0}]
    return cls(groups, **{**OPTIONS[cls], **options})


def farthest(ours, theirs):
    """Largest difference of parameters and of every state that is no sign bit, relative to the tensor's largest."""

    def of(a, b):
        return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0

    found = [of(p.detach().double(), q.detach().double()) for p, q in zip(ours[0], theirs[0], strict=True)]
    for p, q in zip(ours[0], theirs[0], strict=True):
        for key, value in theirs[1].state[q].items():
            if value.is_floating_point():
                found.append(of(ours[1].state[p][key].double(), value.double()))
    return max(found)


def both_ways(cls, dtype=torch.float32, steps=8, **options):
    """Steps with the option, and ordinary steps after clip_grad_norm_; scales so that some steps clip and some do
    not. In bfloat16 clip_grad_norm_ rounds every norm; it is compared with, and gradients are clipped by the norm in
    double."""
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    one, other = two_groups(cls, ours, **options, max_grad_norm=LIMIT), two_groups(cls, theirs, **options)
    clipped = 0
    for step in range(steps):
        for params in (ours, theirs):
            gradients(params, step, scale=0.01 if step % 4 == 2 else 1.0 + step)
            for i, param in enumerate(params):
                if i == step:
                    param.grad = None
        if dtype == torch.bfloat16:
            norm = nn.utils.get_total_norm([param.grad.double() for param in theirs if param.grad is not None])
            rounded = nn.utils.get_total_norm([param.grad for param in theirs if param.grad is not None])
            assert norm.item() == pytest.approx(rounded.item(), rel=1e-2)
            nn.utils.clip_grads_with_norm_(theirs, LIMIT, norm.float())
        else:
            norm = nn.utils.clip_grad_norm_(theirs, LIMIT)
        clipped += bool(norm > LIMIT)
        other.step()
        one.step()
        assert one.grad_norm.ndim == 0 and one.grad_norm.dtype == (
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        assert one.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert 0 < clipped < steps
    return (ours, one), (theirs, other)


@pytest.mark.pairwise
@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_as_clip_grad_norm_and_a_step(cls, dtype, backend, nonfinite):
    tolerance = TOLERANCE[dtype]
    if backend in (emulated.NAME, "triton"):
        # They take a float32 coefficient, and do not round the gradients that they have multiplied.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    runs = both_ways(cls, dtype, backend=backend, nonfinite=nonfinite)
    assert farthest(*runs) <= tolerance


@BOTH
@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "cpu"], indirect=True)
def test_kernels_that_unscale_leave_gradients_alone(cls, backend):
    """And step as after clip_grad_norm_."""
    params, twins, start = (parameters([(16, 24), (7,), (5, 8)]) for _ in range(3))
    optimizer, plain = cls(params, lr=0.02, max_grad_norm=0.1, backend=backend), cls(twins, lr=0.02, backend=backend)
    gradients(params, 0)
    gradients(twins, 0)
    before = bits([param.grad for param in params])
    norm = nn.utils.clip_grad_norm_(twins, 0.1)
    optimizer.step()
    plain.step()
    assert bits([param.grad for param in params]) == before
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6) and norm > 0.1
    for param, twin, old in zip(params, twins, start, strict=True):
        moved, wanted = param - old, twin - old
        assert (moved - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@BOTH
def test_below_the_limit_every_bit_is_an_unclipped_steps(cls):
    ours, theirs = parameters(), parameters()
    one, other = cls(ours, **OPTIONS[cls], max_grad_norm=1e4), cls(theirs, **OPTIONS[cls])
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        versions = [param.grad._version for param in ours]
        one.step()
        other.step()
        assert versions == [param.grad._version for param in ours]  # not written at all
    assert bits(ours) == bits(theirs)


@BOTH
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_under_a_grad_scaler_the_norm_is_of_unscaled_gradients(cls, amp_scaling, backend):
    runs, norms = [], []
    for option in (False, True):
        params = parameters()
        options = dict(max_grad_norm=LIMIT, amp_scaling=amp_scaling) if option else {}
        optimizer = two_groups(cls, params, **options, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        for step in range(5):
            gradients(params, step)
            for param in params:
                param.grad *= float(scaler.scale(torch.ones(())))
            if step == 2:
                params[3].grad.fill_(INF)
            if not option:
                scaler.unscale_(optimizer)
                norms.append(nn.utils.clip_grad_norm_(params, LIMIT))
            scaler.step(optimizer)
            scaler.update()
            if option and step != 2:
                assert optimizer.grad_norm.item() == pytest.approx(norms[step].item(), rel=1e-6)
        assert all(float(optimizer.state[param]["step"]) == 4 for param in params)
        runs.append((params, optimizer))
    assert all(norm > LIMIT for norm in norms) and farthest(*runs) <= 1e-6


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, 3e38])
@pytest.mark.parametrize("capturable", [False, True])
def test_skip_leaves_bad_gradients_out_of_the_norm(cls, bad, capturable):
    """The bad parameter keeps every bit; the others are clipped as if it had no gradient."""
    options = dict(max_grad_norm=LIMIT, capturable=capturable)
    ours, theirs = parameters(), parameters()
    one, other = two_groups(cls, ours, **options, nonfinite="skip"), two_groups(cls, theirs, **options)
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        if step == 2:
            ours[6].grad[3, 4] = bad
            theirs[6].grad = None
            before = bits([ours[6], {k: v for k, v in one.state[ours[6]].items() if k != "skipped"}])
        one.step()
        other.step()
        assert one.grad_norm > LIMIT and one.grad_norm.item() == pytest.approx(other.grad_norm.item(), rel=1e-6)
        if step == 2 and bad != 3e38:  # a finite number is clipped with the others, and may then be a good one
            assert bits([ours[6], {k: v for k, v in one.state[ours[6]].items() if k != "skipped"}]) == before
            assert int(one.state[ours[6]]["skipped"]) == 1
    if bad != 3e38:
        assert farthest((ours, one), (theirs, other)) <= 1e-6
    assert all(param.isfinite().all() for param in ours)


@BOTH
def test_skip_leaves_bad_slices_out_of_the_norm(cls, backend):
    """Of a stack the other slices are stepped, and count."""
    params = parameters([(3, 4, 5), (6,)])
    groups = [{"params": params[:1], "batch_dims": 1}, {"params": params[1:]}]
    optimizer = cls(groups, max_grad_norm=LIMIT, nonfinite="skip", backend=backend)
    gradients(params, 0)
    wanted = nn.utils.get_total_norm([params[0].grad[0], params[0].grad[2], params[1].grad])
    params[0].grad[1, 2, 3] = NAN
    before = params[0].detach().clone()
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    moved = [not torch.equal(params[0][i], before[i]) for i in range(3)]
    assert moved == [True, False, True]


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF])
def test_propagate_does_as_torch_does(cls, bad):
    runs = []
    for option in (False, True):
        params = parameters([(4, 6), (5,)])
        optimizer = cls(params, **OPTIONS[cls], **(dict(max_grad_norm=1.0) if option else {}))
        gradients(params, 0)
        params[0].grad[1, 2] = bad
        if not option:
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        runs.append(params)
    for ours, theirs in zip(*runs, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, equal_nan=True)
    assert not runs[0][0].isfinite().all()


@pytest.mark.parametrize("scaled", [False, True])
@BOTH
def test_expanded_gradients(cls, scaled):
    """Their elements share memory and cannot be written one by one."""
    params = parameters([(4, 6), (5, 3), (7,)])
    twins = parameters([(4, 6), (5, 3), (7,)])
    optimizer, plain = (cls(p, **OPTIONS[cls], max_grad_norm=0.5, amp_scaling=scaled) for p in (params, twins))
    if scaled:
        optimizer.grad_scale = plain.grad_scale = torch.tensor(2.0)
    for tensors in (params, twins):
        gradients(tensors, 0)
        tensors[0].grad = torch.full((), 2.0).expand(4, 6)
        tensors[1].grad = torch.arange(3.0).expand(5, 3)
    for param in twins:
        param.grad = param.grad.contiguous()
    optimizer.step()
    plain.step()
    assert bits(params) == bits(twins)
    assert optimizer.grad_norm > 0.5 and params[0].grad[0, 0] == 2.0


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("limit", [1e4, 0.1])
def test_matrices_are_not_read_for_their_norm(backend, limit, monkeypatch):
    """H-Fac has it from its statistics, also of slices; vectors are read, on a GPU by its kernels."""
    read = []
    norms = clipping.norms
    monkeypatch.setattr(clipping, "norms", lambda grads: read.extend(grads) or norms(grads))
    params, stack = parameters([(4, 6), (3, 5), (7,)]), parameters([(3, 4, 5)])
    groups = [{"params": params}, {"params": stack, "batch_dims": 1}]
    optimizer = HFac(groups, max_grad_norm=limit, backend=backend)
    for step in range(3):
        gradients(params + stack, step)
        wanted = nn.utils.get_total_norm([param.grad for param in params + stack])
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert [tuple(grad.shape) for grad in read] == [(7,)] * 3 * (backend == "cpu")


@BOTH
def test_nothing_but_empty_gradients(cls, backend):
    params = parameters([(0, 5), (3, 0), (0,)])
    optimizer = cls(params, max_grad_norm=1.0, backend=backend, watch=True)
    gradients(params, 0)
    optimizer.step()
    assert optimizer.grad_norm == 0 and optimizer.diagnostics() == {}


@BOTH
def test_no_value_is_read_on_the_host(cls):
    """On the meta device any read of a value raises."""
    params = [Parameter(torch.empty(shape, device="meta")) for shape in ((4, 6), (5,), ())]
    optimizer = cls(params, max_grad_norm=1.0, capturable=True, nonfinite="skip")
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    assert optimizer.grad_norm.is_meta and optimizer.grad_norm.shape == ()


@BOTH
def test_one_number_for_all_groups(cls):
    params = parameters([(4, 6), (5,), (3,)])
    pattern = r"max_grad_norm must be the same in every group, .* got \[1\.0, 2\.0\]"
    with pytest.raises(ValueError, match=pattern):
        cls([{"params": params[:1]}, {"params": params[1:], "max_grad_norm": 2}], max_grad_norm=1)
    optimizer = cls([{"params": params[:1]}, {"params": params[1:2]}], max_grad_norm="1")
    with pytest.raises(ValueError, match=r"got \[1\.0, 1\.0, None\]"):
        optimizer.add_param_group({"params": params[2:], "max_grad_norm": None})
    assert len(optimizer.param_groups) == 2
    gradients(params, 0)
    before = bits([params, optimizer.state_dict()["state"]])
    optimizer.param_groups[1]["max_grad_norm"] = 2.0
    with pytest.raises(ValueError, match=pattern):
        optimizer.step()
    assert bits([params, optimizer.state_dict()["state"]]) == before
    saved = optimizer.state_dict()
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=pattern):
        optimizer.load_state_dict(saved)
    for value, error in (
        (0, ValueError),
        (-1.0, ValueError),
        (NAN, ValueError),
        ("much", ValueError),
        ([1], TypeError),
    ):
        with pytest.raises(error, match=r"max_grad_norm must be a number in \(0, inf\) or None \(no clipping"):
            cls(params, max_grad_norm=value)


@BOTH
def test_the_option_can_be_turned_on_and_off_and_is_saved(cls):
    params = parameters()
    optimizer = cls(params, **OPTIONS[cls])
    assert optimizer.grad_norm is None
    for limit in (0.5, None, 0.5):
        optimizer.param_groups[0]["max_grad_norm"] = limit
        gradients(params, 0)
        optimizer.step()
        assert (optimizer.grad_norm is None) == (limit is None)
    kept = optimizer.grad_norm.item()
    optimizer.zero_grad()
    optimizer.step()  # no gradients: nothing happens
    assert optimizer.grad_norm.item() == kept
    fresh = cls(parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["max_grad_norm"] == 0.5


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_norms_of_large_and_strided_tensors(dtype, native, monkeypatch):
    """In pieces, whichever dimension is the long one, and in float32 where 16 bits would round."""
    monkeypatch.setattr(clipping, "_PIECE", 100)
    if not native:
        monkeypatch.setattr(backends, "host_counters", lambda: None)
    made = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = [made, made.t(), made[::2, 3:7], made.view(4, 300), made.view(-1), made[:0], made[0, 0]]
    for tensor, norm in zip(tensors, clipping.norms(tensors), strict=True):
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and norm.ndim == 0
        assert norm.item() == pytest.approx(tensor.double().norm().item(), rel=1e-6)


def test_norms_of_a_list_of_16_bits_are_one_call(monkeypatch):
    """However many there are and however large: threads meet once. And their bits do not depend on how many did."""
    native = pytest.importorskip("hfac._C").squares
    grads = [torch.randn(300, 700).to(dtype) for dtype in (torch.bfloat16, torch.float16) for _ in range(5)]
    grads += [grads[0].t(), torch._neg_view(grads[1]), torch.zeros(0).bfloat16()]
    calls = []

    class Spy:
        def squares(self, **given):
            calls.append(len(given["numels"]))
            return native(**given)

    monkeypatch.setattr(backends.cpu, "_C", Spy())
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(clipping.norms(grads))
    finally:
        torch.set_num_threads(threads)
    assert calls == [8, 5] * 3
    assert bits(found[0]) == bits(found[1]) == bits(found[2])
    assert torch.equal(found[0][0], found[0][10]) and torch.equal(found[0][1], found[0][11])
    for grad, norm in zip(grads, found[0], strict=True):
        assert norm.item() == pytest.approx(grad.double().norm().item(), rel=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_makes_nothing_of_a_gradients_size(cls, dtype, monkeypatch):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "vector_norm" in str(function) and args[0].itemsize == 2:  # on the CPU torch widens it, unseen from here
                self.largest = max(self.largest, 4 * args[0].numel())
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                    self.largest = max(self.largest, tensor.nbytes)
            return out

    monkeypatch.setattr(clipping, "_PIECE", 64)
    params = parameters([(64, 48), (48,)], dtype)
    optimizer = cls(params, max_grad_norm=0.1)
    for step in range(2):
        gradients(params, step)
        known = {param.grad.untyped_storage().data_ptr() for param in params}
        with Sizes() as sizes:
            optimizer.step()
        # of the first read, kept until the norm is known, behind the sums of squares
        statistics = 64 + 4 * (2 * 64 + 3 * 48) if issubclass(cls, HFac) else 0
    assert 0 < sizes.largest <= max(4 * 64, statistics)
