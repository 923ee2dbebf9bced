"""views=: pieces of fused weights, each stepped as a parameter of its own."""

import pytest
import torch
from running import Int8, bits, gradients, parameters
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import SMMF, HFac, signs

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


def seen(tensor, pieces, dims=0, along=0):
    """The pieces, which a dimension after ``dims`` others counts."""
    d = dims + along
    size = tensor.shape[d] // pieces
    return torch.stack([tensor.detach().narrow(d, i * size, size) for i in range(pieces)], dims)


def pair(cls, shapes=SHAPES, pieces=6, dtype=torch.float32, dims=0, along=0, **options):
    """An optimizer of fused weights, and one of stacks of their pieces; with their parameters."""
    ours = parameters(shapes, dtype)
    theirs = [Parameter(seen(p, pieces, dims, along)) for p in ours]
    more = dict(lr=0.02, weight_decay=0.1, **options)
    one = cls(ours, views=pieces, views_dim=along, batch_dims=dims, **more)
    return (one, ours), (cls(theirs, batch_dims=dims + 1, **more), theirs)


def agree(one, ours, other, theirs, dims=0, along=0, random=False):
    """To the bit, with states of the parameter's shape where they have one entry per element. ``random``: other random
    bits, so that an element may be rounded to either neighbour."""
    for p, q in zip(ours, theirs, strict=True):
        pieces = q.shape[dims]
        if not random:
            assert bits(seen(p, pieces, dims, along)) == bits(q)
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            wanted = other.state[q][key]
            if key in ("exp_avg", "exp_avg_sq", "exp_avg_q", "master_low"):
                assert value.shape == p.shape
                assert key == "master_low" and random or bits(seen(value, pieces, dims, along)) == bits(wanted), key
            elif key != "exp_avg_sign":
                assert bits(value) == bits(wanted), key
            elif value.dtype == torch.bool:
                assert value.shape == p.shape
                assert bits(signs.to_bits(seen(value, pieces, dims, along), dims + 1)) == bits(wanted), key
            else:
                assert value.shape == (*p.shape[:dims], *hfac.matricize.sign_shape(p.shape[dims:]))
                assert bits(seen(value, pieces, dims, along)) == bits(wanted), key


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


#: shapes that are cut into six pieces along this dimension; of some, bytes of sign bits hold elements of two pieces
COLUMNS = {1: [(5, 12), (4, 48), (3, 24, 5), (6, 0), (1, 6)], 2: [(3, 4, 12), (2, 3, 6, 2)]}


@BOTH
@pytest.mark.parametrize("along", COLUMNS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.pairwise
def test_pieces_of_columns_are_stepped_as_slices_of_a_stack(cls, options, along, backend):
    """Along any dimension; and states that ops cannot take as they lie are gathered for them."""
    dtype = torch.bfloat16 if options == "stored" else torch.float32
    (one, ours), (other, theirs) = pair(
        cls, COLUMNS[along], dtype=dtype, along=along, backend=backend, **OPTIONS[options]
    )
    for step in range(4):
        gradients(ours, step)
        if options == "limit":  # norms in any order of elements are the same to the bit
            for p in ours:
                p.grad.mul_(16).round_().div_(16)
        if step == 2 and options.startswith("skip"):
            ours[0].grad.view(-1)[4] = NAN
        if step == 3:
            ours[1].grad = None
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else seen(p.grad, 6, 0, along)
        one.step()
        other.step()
    agree(one, ours, other, theirs, along=along, random=options == "stored")
    if options == "stored":  # weights of which one more step of rounding is at most another
        for p, q in zip(ours, theirs, strict=True):
            mine, wanted = (seen(p, 6, 0, along) - q).float().abs(), q.detach().float().abs()
            assert (mine <= 2**-7 * wanted.clamp(min=1e-2)).all()
    if options == "limit":
        for i in (0, 2) if along == 1 else (0,):
            assert bits(one.diagnostics()[i]) == bits(other.diagnostics()[i])


@BOTH
def test_columns_of_stacks_and_what_is_kept_beside(cls):
    """Two batch dimensions' slices have pieces each; what ops take for states that do not lie as they need is told."""
    (one, ours), (other, theirs) = pair(cls, [(3, 4, 16), (2, 5, 8)], 2, dims=1, along=1, backend="cpu")
    for step in range(3):
        gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = seen(p.grad, 2, 1, 1)
        one.step()
        other.step()
    agree(one, ours, other, theirs, 1, 1)
    beside = {HFac: 0, SMMF: 3 * 2 * 4 * 1 + 2 * 2 * 5 * 1, Int8: 3 * 4 * 16 + 2 * 5 * 8}
    assert one.workspace_bytes() == beside[cls] and other.workspace_bytes() == 0


@BOTH
def test_random_bits_of_an_element_are_those_of_its_place_in_the_whole(cls):
    """However the weight is cut: with moments that no cut changes, weights are the same to the bit."""
    found = []
    for views, along in ((1, 0), (3, 0), (3, 1)):
        params = parameters([(6, 12)], torch.bfloat16)
        more = {"clip_threshold": None} if cls is not SMMF else {}
        optimizer = cls(params, lr=0.02, dense=True, rounding="stochastic", views=views, views_dim=along, **more)
        for step in range(3):
            gradients(params, step)
            optimizer.step()
        found.append(bits(params))
    assert found[0] == found[1] == found[2]


@BOTH
def test_columns_are_converted_saved_and_resumed(cls):
    (one, ours), (other, theirs) = pair(cls, [(5, 12), (4, 48)], 3, along=1)
    for step in range(2):
        gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = seen(p.grad, 3, 0, 1)
        one.step()
        other.step()
    name, cut = "smmf" if cls is SMMF else "hfac", dict(views=3, views_dim=1)
    given = {"first_moment": "int8"} if cls is Int8 else {}
    # A pass through whole moments and back, and the stack's through the same.
    mine = hfac.convert(hfac.convert(one.state_dict(), ours, to=name, dense=True), ours, to=name, dense=False, **given)
    stack = hfac.convert(other.state_dict(), theirs, to=name, dense=True)
    stack = hfac.convert(stack, theirs, to=name, dense=False, **given)
    assert mine["param_groups"][0]["views_dim"] == 1
    again, twin = cls(ours, lr=0.02, weight_decay=0.1, **cut), cls(theirs, lr=0.02, weight_decay=0.1, batch_dims=1)
    again.load_state_dict(mine)
    twin.load_state_dict(stack)
    agree(again, ours, twin, theirs, along=1)
    copies = [Parameter(p.detach().clone()) for p in ours]
    resumed = cls(copies, lr=0.02, weight_decay=0.1, **cut)
    resumed.load_state_dict(one.state_dict())
    for params, optimizer in ((ours, one), (copies, resumed)):
        gradients(params, 7)
        optimizer.step()
    assert bits(ours) == bits(copies)


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


def test_param_groups_knows_which_dimension_is_cut():
    class Conv1D(nn.Module):
        """As transformers' own: in x out."""

        def __init__(self):
            super().__init__()
            self.weight, self.bias = Parameter(torch.ones(8, 24)), Parameter(torch.zeros(24))

    model = nn.ModuleDict({"c_attn": Conv1D(), "mlp": nn.Linear(8, 8)})
    groups = hfac.param_groups(model, views={"c_attn.*": 3}, views_dim={"c_attn.weight": 1})
    found = {name: (group["views"], group["views_dim"]) for group in groups for name, _ in group["params"]}
    assert found == {"c_attn.weight": (3, 1), "c_attn.bias": (3, 0), "mlp.weight": (1, 0), "mlp.bias": (1, 0)}
    optimizer = hfac.HFac(groups)
    state = optimizer.state[model["c_attn"].weight]
    assert state["exp_avg_row"].shape == (3, 8) and state["exp_avg_col"].shape == (3, 8)
    with pytest.raises(ValueError, match=r"views is 3 for c_attn.weight, .*\(8, 24\): dimension 2 cannot be cut"):
        hfac.param_groups(model, views={"c_attn.weight": 3}, views_dim={"c_attn.weight": 2})
    with pytest.raises(ValueError, match="views_dim of 'c_attn.weight' must be a whole number"):
        hfac.param_groups(model, views={"c_attn.weight": 3}, views_dim={"c_attn.weight": -1})
    with pytest.raises(TypeError, match="views_dim must be a mapping from patterns"):
        hfac.param_groups(model, views_dim=1)


@BOTH
def test_what_is_refused(cls):
    params = parameters([(12, 5)])
    with pytest.raises(ValueError, match=r"views=3 with views_dim=2 and batch_dims=0 cuts dimension 2, which it"):
        cls(params, views=3, views_dim=2)
    with pytest.raises(ValueError, match=r"views=3 cuts dimension 1 into so many equal pieces, and 3 does not"):
        cls(params, views=3, views_dim=1)
    with pytest.raises(ValueError, match="views_dim must be a whole number"):
        cls(params, views_dim=-1)
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
