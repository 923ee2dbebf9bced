"""views=: pieces of fused weights, each stepped as a parameter of its own."""

import pytest
import torch
from running import Int8, bits, gradients, parameters
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import SMMF, HFac

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF, Int8], ids=["hfac", "smmf", "int8"])
NAN = float("nan")
SHAPES = [(12, 5), (12,), (24, 3, 4), (6, 0)]
OPTIONS = {
    "plain": {},
    "dense": {"dense": True},
    "limit": {"max_grad_norm": 0.5, "watch": True},
    "skip": {"nonfinite": "skip"},
    "skip-step": {"nonfinite": "skip-step"},
    "capturable": {"capturable": True},
    "stored": {"master": "split8", "rounding": "stochastic"},
}


def seen(tensor, pieces, dims=0):
    return tensor.detach().unflatten(dims, (pieces, -1)).clone()


def pair(cls, shapes=SHAPES, pieces=6, dtype=torch.float32, dims=0, **options):
    """An optimizer of fused weights, and one of stacks of their pieces; with their parameters."""
    ours = parameters(shapes, dtype)
    theirs = [Parameter(seen(p, pieces, dims)) for p in ours]
    more = dict(lr=0.02, weight_decay=0.1, **options)
    return (cls(ours, views=pieces, batch_dims=dims, **more), ours), (cls(theirs, batch_dims=dims + 1, **more), theirs)


def agree(one, ours, other, theirs, dims=0):
    """To the bit, with states of the parameter's shape where they have one entry per element."""
    for p, q in zip(ours, theirs, strict=True):
        assert bits(p.reshape(q.shape)) == bits(q)
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            wanted = other.state[q][key]
            assert bits(value.reshape(wanted.shape)) == bits(wanted), key
            if key in ("exp_avg", "exp_avg_sq", "exp_avg_q", "master_low"):
                assert value.shape == p.shape
            elif key.endswith(("_row", "_col")):
                assert value.shape == wanted.shape
            elif key == "exp_avg_sign":
                assert value.shape == (*p.shape[:dims], *hfac.matricize.sign_shape(p.shape[dims:]))


@BOTH
@pytest.mark.parametrize("options", OPTIONS)
def test_pieces_are_stepped_as_slices_of_a_stack(cls, options, backend):
    dtype = torch.bfloat16 if options == "stored" else torch.float32
    (one, ours), (other, theirs) = pair(cls, dtype=dtype, backend=backend, **OPTIONS[options])
    for step in range(4):
        gradients(ours, step)
        if step == 2 and options.startswith("skip"):
            ours[0].grad[3, 1] = NAN
        if step == 3:
            ours[1].grad = None
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else seen(p.grad, 6)
        one.step()
        other.step()
        if options != "plain":
            continue
        p = ours[0]  # its memory may move
        p.data = p.data.clone()
    agree(one, ours, other, theirs)
    assert one.grad_norm is None or one.grad_norm == other.grad_norm
    if options == "limit":
        for i in (0, 2):
            assert bits(one.diagnostics()[i]) == bits(other.diagnostics()[i])


@BOTH
def test_pieces_of_slices_and_gradients_that_are_not_contiguous(cls, backend):
    (one, ours), (other, theirs) = pair(cls, [(3, 8, 5), (2, 4)], 2, dims=1, backend=backend)
    for step in range(3):
        gradients(ours, step)
        ours[0].grad = ours[0].grad.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = seen(p.grad, 2, 1)
        one.step()
        other.step()
    agree(one, ours, other, theirs, 1)


@pytest.mark.parametrize("cls", [HFac, Int8], ids=["hfac", "int8"])
@pytest.mark.parametrize("ahead", [False, True])
def test_diagnostics_tell_of_each_piece(cls, ahead):
    (one, ours), (other, theirs) = pair(cls, [(12, 5), (12,)])
    gradients(ours, 0)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = seen(p.grad, 6)
    if not ahead:
        one.step()
        other.step()
    found, wanted = one.diagnostics(ahead=ahead), other.diagnostics(ahead=ahead)
    assert found[0]["update_rms"].shape == (6,) and bits(dict(found)) == bits(dict(wanted))


@BOTH
def test_saved_and_resumed_to_the_bit(cls):
    (one, ours), _ = pair(cls)
    gradients(ours, 0)
    one.step()
    copies = [Parameter(p.detach().clone()) for p in ours]
    other = cls(copies, lr=0.02, weight_decay=0.1, views=(2, 3))
    other.load_state_dict(one.state_dict())
    for params, optimizer in ((ours, one), (copies, other)):
        gradients(params, 1)
        optimizer.step()
    assert bits(ours) == bits(copies) and other.param_groups[0]["views"] == 6


@BOTH
def test_converted_from_whole_weights_and_back(cls):
    """Of factors rows are split and columns repeated, up to the scale that the sums of a piece have; where the moments
    are whole nothing changes. The other way the averages of the pieces are one factorization."""
    params = parameters([(12, 5)])
    whole = cls(params, lr=0.02)
    for step in range(2):
        gradients(params, step)
        whole.step()
    pieces = cls(params, lr=0.02, views=3)
    name = "smmf" if cls is SMMF else "hfac"
    found = hfac.convert(whole.state_dict(), params, to=name, views=3)
    pieces.load_state_dict(found)
    if cls is not SMMF:
        r, s = (whole.state[params[0]][f"exp_avg_sq_{side}"].double() for side in ("row", "col"))
        V = r[:, None] * s / r.sum()
        mine = pieces.state[params[0]]
        for i, part in enumerate(V.split(4)):
            row, col = mine["exp_avg_sq_row"][i].double(), mine["exp_avg_sq_col"][i].double()
            assert torch.allclose(row[:, None] * col / row.sum(), part, rtol=1e-5)
        back = hfac.convert(pieces.state_dict(), params, to=name, views=1)
        fresh = cls(params, lr=0.02)
        fresh.load_state_dict(back)
        for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
            assert torch.allclose(fresh.state[params[0]][key], whole.state[params[0]][key], rtol=1e-5)
    gradients(params, 3)
    pieces.step()
    stacked = [Parameter(seen(params[0], 3))]
    assert hfac.convert(whole.state_dict(), params, to=name, views=3)["param_groups"][0]["views"] == 3
    assert pieces.state[params[0]]["exp_avg_sq_col"].shape[0] == 3 and stacked[0].shape[0] == 3


def test_param_groups_finds_fused_weights():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    model = nn.Sequential(Attention(), nn.LayerNorm(8))
    groups = hfac.param_groups(model, views={"*.qkv.*": (3, 2)})
    found = {name: group["views"] for group in groups for name, _ in group["params"]}
    assert found == {name: 6 if "qkv" in name else 1 for name, _ in model.named_parameters()}
    optimizer = hfac.HFac(groups)
    assert optimizer.state[model[0].qkv.weight]["exp_avg_row"].shape == (6, 4)
    assert optimizer.state[model[0].qkv.bias]["exp_avg"].shape == (24,)
    with pytest.raises(ValueError, match=r"views is 5 for 0.qkv.weight, .*\(24, 8\): dimension 0 cannot be cut"):
        hfac.param_groups(model, views={"*.qkv.*": 5})
    with pytest.raises(ValueError, match="views: '.*kqv' matches no parameter"):
        hfac.param_groups(model, views={"*.kqv": 5})
    with pytest.raises(TypeError, match="views must be a mapping from patterns"):
        hfac.param_groups(model, views=3)


@BOTH
def test_what_is_refused(cls):
    params = parameters([(12, 5)])
    with pytest.raises(
        ValueError, match=r"views=5 cuts dimension 0 into so many equal pieces, and 5 does not divide 12"
    ):
        cls(params, views=5)
    for value, error in ((0, ValueError), ((3, 0), ValueError), (1.5, TypeError), ((), ValueError)):
        with pytest.raises(error, match="views must be a whole number"):
            cls(params, views=value)
    with pytest.raises(ValueError, match="needs more than 0 dimension"):
        cls([Parameter(torch.ones(()))], views=2)
    optimizer = cls(params, views="3,2")
    assert optimizer.param_groups[0]["views"] == 6
    optimizer.param_groups[0]["views"] = 3
    gradients(params, 0)
    with pytest.raises(ValueError, match="views of group 0 cannot change once state exists"):
        optimizer.step()
