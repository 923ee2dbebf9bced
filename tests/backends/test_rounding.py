"""Stochastic rounding and master weights in two pieces: the definition by itself, what only the CPU's kernels have of
it, and what the optimizers make of it. What all kernels store is in test_stored_steps.py."""

import copy

import calls
import pytest
import torch
from cases import gradient, smmf_agrees
from test_parity import SUMS, ieee_square_roots  # noqa: F401 (a fixture)
from torch import nn
from torch.nn import Parameter

import hfac
from hfac import rounding
from hfac.backends import cpu
from hfac.rounding import BitOffset

HOST = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16


needs_native = pytest.mark.skipif(cpu._C is None, reason="hfac._C is not built")

#: Options, and the types that can have them.
STORED = {
    "stochastic-bf16": (BF16, dict(rounding="stochastic", seed=2**64 - 3)),
    "stochastic-fp16": (FP16, dict(rounding="stochastic", seed=5)),
    "split": (BF16, dict(master="split")),
    "split8": (BF16, dict(master="split8")),
    "split8-stochastic": (BF16, dict(master="split8", rounding="stochastic", seed=2**32 + 1)),
}


def floats(patterns):
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(tensor):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])


def patterns(count=20000):
    """Floats of all magnitudes, and those that are on edges: zeros, subnormals, ties, the largest, inf and NaN."""
    generator = torch.Generator().manual_seed(3)
    some = torch.randint(0, 2**32, (count,), generator=generator)
    exponents = torch.randint(95, 150, (count,), generator=generator) << 23  # float16's
    small = some & 0x807FFFFF | exponents
    ties = torch.cat([some & 0xFFFF0000 | 0x8000, some & 0xFFFFFF00 | 0x80, small & 0xFFFFE000 | 0x1000])
    edges = torch.tensor(
        [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7FFF80, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF,
         0x477FE000, 0x477FEFFF, 0x477FF000, 0x38800000, 0x387FFFFF, 0x33000000, 0x33000001, 0x32FFFFFF]
    )  # fmt: skip
    u = torch.cat([some, small, ties, edges, edges | 1 << 31])
    return (u - (u >> 31 << 32)).to(torch.int32).view(torch.float32)


# The definition by itself


def test_philox_known_answers():
    """From Random123's kat_vectors."""
    rows = [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, answer in rows:
        words = rounding.philox([torch.tensor(c) for c in counter], key)
        assert " ".join(f"{word.item():08x}" for word in words) == answer


def test_random_bits_are_those_of_the_counter():
    """Element 8 b + 2 w + h has half h of word w."""
    place, seed, step = BitOffset(7, 2**35 + 3), 2**63 + 9, 11.0
    bits = rounding.random_bits(place, (40,), seed, step, HOST)
    for k, mine in enumerate(bits.tolist()):
        index = place.first + k
        block = index // 8
        counter = [torch.tensor(c) for c in (block & 0xFFFFFFFF, block >> 32, 11, 7)]
        word = rounding.philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[index % 8 // 2].item()
        assert mine == (word >> 16 if index % 2 else word & 0xFFFF)


def test_random_bits_depend_on_all_that_they_must():
    def draw(place=None, seed=1, step=1.0):
        return rounding.random_bits(place or BitOffset(0), (20000,), seed, step, HOST)

    bits = draw()
    assert abs(bits.double().mean() - 32767.5) < 5 * 65536 / (12 * 20000) ** 0.5
    for other in (draw(BitOffset(1)), draw(BitOffset(0, 8)), draw(seed=2), draw(seed=2**32 + 1), draw(step=2.0)):
        assert (bits == other).double().mean() < 0.001
    assert torch.equal(bits, draw(step=torch.tensor(1.0)))


def test_bits_of_a_part_are_those_of_the_whole():
    whole = rounding.random_bits(BitOffset(3), (6, 5, 9), 1, 2.0, HOST)
    place = BitOffset(3, 2 * 45 + 1 * 9 + 4, (45, 9, 1))
    assert torch.equal(rounding.random_bits(place, (3, 4, 5), 1, 2.0, HOST), whole[2:5, 1:5, 4:])
    assert torch.equal(rounding.random_bits(BitOffset(3, 45), (2, 5, 9), 1, 2.0, HOST), whole[1:3])


def test_split_is_exact_in_sixteen_bits():
    W = patterns()
    high, low = rounding.split(W, torch.int16)
    nan = W.isnan()
    assert torch.equal(bits_of(rounding.join(high, low))[~nan], bits_of(W)[~nan])
    assert torch.equal(high.isnan(), nan) and not low[nan].any()
    # To nearest: no other bfloat16 is nearer; of two that are as near the one away from zero.
    finite = W.isfinite() & high.isfinite()
    error = (W.double() - high.double()).abs()[finite]
    other = (W.double() - W.to(BF16).double()).abs()[finite]
    assert torch.equal(error, other)
    tie = (bits_of(W)[finite] & 0xFFFF) == 0x8000
    assert tie.sum() > 1000 and (high.double().abs() > W.double().abs())[finite][tie].all()


def test_split_by_hand():
    W = floats([0x3F808000, 0xBF808000, 0x3F807FFF, 0x80000000, 0x00000001, 0x7F7FFFFF, 0x7F800000, 0x3F80FF80])
    high, low = rounding.split(W, torch.int16)
    assert [h & 0xFFFF for h in bits_of(high).tolist()] == [
        0x3F81, 0xBF81, 0x3F80, 0x8000, 0x0000, 0x7F80, 0x7F80, 0x3F81,
    ]  # fmt: skip
    assert low.tolist() == [-0x8000, -0x8000, 0x7FFF, 0, 1, -1, 0, -0x80]
    high, low = rounding.split(W, torch.int8)
    assert low.tolist() == [-0x80, -0x80, -0x80, 0, 0, 0, 0, 0]  # the last: a tie, to even, which is 0x3F810000
    assert bits_of(high).tolist()[-1] == 0x3F81


def test_split_in_eight_bits_rounds_to_even():
    W = patterns()
    W = W[W.isfinite()]
    joined = rounding.join(*rounding.split(W, torch.int8))
    u, v = (bits_of(t).to(torch.int64) & 0xFFFFFFFF for t in (W, joined))
    assert not (v & 0xFF).any() and ((v - u).abs() <= 0x80).all()
    tie = (v - u).abs() == 0x80
    assert tie.sum() > 1000 and not (v[tie] & 0x100).any()
    assert torch.equal(joined.signbit(), W.signbit())


@pytest.mark.parametrize("how", ["bfloat16", "float16", "split8"])
def test_rounding_is_unbiased(how):
    """Over all 65536 draws the mean is exact, to what 16 bits can tell; over 100000 it is within 5 standard errors."""

    def stored(W, bits):
        if how == "split8":
            return rounding.join(*rounding.split(W, torch.int8, bits)).double()
        return rounding.stochastic(W, getattr(torch, how), bits).double()

    every = torch.arange(65536)
    generator = torch.Generator().manual_seed(1)
    magnitudes = 2.0 ** torch.randint(-27, 15, (60,), generator=generator)
    values = torch.randn(60, generator=generator) * magnitudes
    for W in values:
        drawn = stored(W.expand(65536), every)
        assert drawn.unique().numel() <= 2
        span = drawn.max() - drawn.min()
        assert (drawn.mean() - W.double()).abs() <= span / 65536
        if W.abs() >= 2.0**-16 or how != "float16":  # no more than 16 bits are cut, and all of them count
            assert drawn.mean() == W.double()
    for W in values[:5]:
        bits = rounding.random_bits(BitOffset(1), (100000,), 3, 4.0, HOST)
        drawn = stored(W.expand(100000), bits)
        error = (drawn.mean() - W.double()).abs()
        assert error <= 5 * drawn.std() / 100000**0.5 + (drawn.max() - drawn.min()) / 65536


def test_what_is_exact_stays():
    for dtype in rounding.DTYPES:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        for bits in (0, 0x8000, 0xFFFF):
            again = rounding.stochastic(every.float(), dtype, torch.tensor(bits))
            assert torch.equal(again[~every.isnan()].view(torch.int16), every[~every.isnan()].view(torch.int16))
            assert again[every.isnan()].isnan().all()


# Near the reference


def in_layout(values, index):
    """The same values, in several layouts by turns: contiguous, transposed, channels last."""
    if index % 3 == 1 and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if index % 3 == 2 and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values


def value_of(param, state):
    """What a parameter stands for, in float32."""
    low = state.get("master_low")
    return param.detach().float() if low is None else rounding.join(param.detach(), low)


def stored_agree(name, param, state, twin, twin_state, before, lr, slack=1.0, backend=""):
    """SMMF's is the reference's to the bit (`smmf_agrees`). H-Fac's depends on sums of this step: it may be a neighbour
    of it, as what rounds to the one or the other lies as near as two orders of summation do. Returns the share that is
    equal."""
    low = state.get("master_low")
    ours, theirs = value_of(param, state), value_of(twin, twin_state)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if name == "SMMF":
        weights = (param.detach(), twin.detach()) if low is None else (ours, theirs)
        assert smmf_agrees(*weights, before, lr, backend)
        assert low is None or torch.equal(low, twin_state["master_low"])
    info = torch.finfo(param.dtype if low is None else torch.float32)
    eps = info.eps if low is None or low.dtype == torch.int16 else info.eps * 256
    bound = eps * theirs.abs().clamp(min=info.tiny) + 20 * slack * SUMS[torch.float32] * (lr + (theirs - before).abs())
    assert (same | ((ours - theirs).abs() <= bound)).all()
    return same.double().mean().item() if same.numel() else 1.0


def without_low(state):
    return {key: value for key, value in state.items() if key != "master_low"}


def trained(name, stored, backend, steps=3, shapes=((40, 33), (5000,), (6, 4, 3, 3), (7,)), **more):
    dtype, options = STORED[stored]
    params = [Parameter(in_layout(gradient(shape, i, dtype), i)) for i, shape in enumerate(shapes)]
    optimizer = getattr(hfac, name)(params, **{"lr": 0.01, **options, **more}, backend=backend)
    train(params, optimizer, range(steps))
    return params, optimizer


def train(params, optimizer, steps):
    for step in steps:
        for i, param in enumerate(params):
            param.grad = gradient(param.shape, 100 * step + i, param.dtype)
        optimizer.step()


def all_bits(params, optimizer):
    lows = [state["master_low"] for state in optimizer.state.values() if "master_low" in state]
    return torch.cat([bits_of(tensor).to(torch.int32) for tensor in (*params, *lows)])


@needs_native
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_same_bits_with_any_threads_and_instruction_set(name, stored):
    threads = torch.get_num_threads()
    results = []
    try:
        for isa in cpu._C.info()["isa_usable"]:
            for count in (1, 2):
                cpu._C.set_isa(isa)
                torch.set_num_threads(count)
                shapes = [(300, 130), (17011,), (6, 4, 3, 3)]
                results.append(all_bits(*trained(name, stored, "cpu", 2, shapes)))
    finally:
        cpu._C.set_isa("")
        torch.set_num_threads(threads)
    assert len(results) >= 2
    for other in results[1:]:
        assert torch.equal(results[0], other)


@needs_native
def test_edges_in_every_instruction_set():
    """Floats on edges, through a step of SMMF that adds nothing."""
    W = patterns(4000)
    try:
        for isa in cpu._C.info()["isa_usable"]:
            cpu._C.set_isa(isa)
            for dtype, options in STORED.values():
                results = []
                for backend in ("cpu", "reference"):
                    high, low = W.to(dtype), None
                    if "master" in options:
                        high, low = rounding.split(W, rounding.LOW_DTYPES[options["master"]])
                    low = None if low is None else [low]
                    grad, zero = torch.zeros_like(high), torch.zeros(high.shape)
                    calls.smmf_dense_step_(
                        [high], [grad], None, [zero], lr=0.5, beta1=None, beta2=0.5, eps=1.0, weight_decay=1e-3,
                        master_lows=low, places=[BitOffset(1, 3)], seed=9, step=2.0, backend=backend,
                    )  # fmt: skip
                    results.append((high, low))
                (ours, our_low), (theirs, their_low) = results
                nan = theirs.isnan()
                assert torch.equal(ours.isnan(), nan) and nan.any()
                assert torch.equal(bits_of(ours)[~nan], bits_of(theirs)[~nan])
                assert our_low is None or torch.equal(our_low[0], their_low[0])
    finally:
        cpu._C.set_isa("")


# Optimizers


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_resumes_bit_for_bit(name, stored):
    params, optimizer = trained(name, stored, "auto", 6)
    first, saved = trained(name, stored, "auto", 3)
    second, resumed = trained(name, stored, "auto", 0, seed=1)
    for param, old in zip(second, first, strict=True):
        param.data.copy_(old.data)
    resumed.load_state_dict(saved.state_dict())
    train(second, resumed, range(3, 6))
    assert torch.equal(all_bits(params, optimizer), all_bits(second, resumed))


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_the_seed_matters_where_bits_are_drawn(name):
    for stored in STORED:
        one, other = (all_bits(*trained(name, stored, "auto", seed=seed)) for seed in (1, 2))
        assert torch.equal(one, other) == ("stochastic" not in stored), stored


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_capturable_gives_the_same_bits(name, backend):
    for stored in ("stochastic-bf16", "split8-stochastic"):
        host, device = (all_bits(*trained(name, stored, backend, capturable=flag)) for flag in (False, True))
        # Decays that are computed on the device may be a neighbour of the host's.
        assert (host == device).double().mean() > 0.999


def test_small_updates_are_not_lost():
    """0.001 of a bfloat16's distance per step: nearest stands still, the others move."""
    ends = {}
    for key in (None, *STORED):
        dtype, options = (BF16, {}) if key is None else STORED[key]
        param = Parameter(torch.ones(4096, dtype=dtype))
        optimizer = hfac.HFac([param], lr=1e-5, clip_threshold=1.0, **options)
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[key] = value_of(param, optimizer.state[param]).double().mean().item()
    assert ends.pop(None) == 1.0
    assert ends.pop("split8") < 1.0  # off by what 24 bits round
    for key, end in ends.items():
        assert abs(end - (1 - 20e-5)) < (2e-5 if key.startswith("split") else 1e-4), key


def test_bad_options():
    param = Parameter(torch.ones(4, 4, dtype=BF16))
    rows = [
        (dict(rounding="up"), ValueError, r"rounding must be one of 'nearest', 'stochastic', got 'up'"),
        (dict(rounding=None), TypeError, r"rounding must be one of"),
        (dict(seed=-1), ValueError, r"seed must be a whole number in \[0, 18446744073709551615\], got -1"),
        (dict(seed=2**64), ValueError, r"seed must be a whole number"),
        (dict(seed=1.5), TypeError, r"seed must be a whole number"),
        (dict(seed=True), TypeError, r"seed must be a whole number"),
        (dict(master="whole"), ValueError, r"master must be one of 'split', 'split8' or None"),
        (dict(master=16), TypeError, r"master must be one of"),
    ]
    for cls in (hfac.HFac, hfac.SMMF):
        for options, error, message in rows:
            with pytest.raises(error, match=f"{cls.__name__}: {message}"):
                cls([param], **options)
        with pytest.raises(ValueError, match=r"float16, and master='split'.*Use bfloat16, or rounding='stochastic'"):
            cls([Parameter(torch.ones(4, dtype=FP16))], master="split")
        optimizer = cls([param])
        with pytest.raises(ValueError, match="float16, and master='split8'"):
            optimizer.add_param_group({"params": [Parameter(torch.ones(4, dtype=FP16))], "master": "split8"})
        assert len(optimizer.param_groups) == 1


def test_float32_parameters_are_left_alone():
    """Options of a whole model: what has enough bits is stored as ever."""
    ends = []
    for options in ({}, dict(rounding="stochastic", master="split8", seed=3)):
        params = [Parameter(gradient((20, 30), 1, dtype)) for dtype in (torch.float32, torch.float64)]
        optimizer = hfac.SMMF(params, **options)
        train(params, optimizer, range(3))
        assert not any("master_low" in state for state in optimizer.state.values())
        ends.append(params)
    assert all(map(torch.equal, *ends))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8, dtype=BF16)
        self.head = nn.Linear(8, 30, bias=False, dtype=BF16)
        self.norm = nn.BatchNorm1d(8, dtype=torch.float32)
        self.head.weight = self.embed.weight


def tied(master="split", steps=3):
    torch.manual_seed(0)
    model = Tied()
    optimizer = hfac.HFac(model.parameters(), lr=0.01, master=master)
    train(list(model.parameters()), optimizer, range(steps))
    return model, optimizer


def test_fp32_state_dict():
    model, optimizer = tied()
    weights = optimizer.fp32_state_dict(model)
    assert list(weights) == list(model.state_dict())
    joined = value_of(model.embed.weight, optimizer.state[model.embed.weight])
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(weights[name], joined) and not torch.equal(joined, model.embed.weight.float())
    assert weights["norm.weight"].data_ptr() == model.norm.weight.data_ptr()
    assert weights["norm.num_batches_tracked"].dtype == torch.int64
    nearest = joined.to(BF16)  # but for ties
    assert (nearest == model.embed.weight).double().mean() > 0.99

    model, optimizer = tied(master=None)
    weights = optimizer.fp32_state_dict(model)
    assert torch.equal(weights["head.weight"], model.head.weight.float())


@pytest.mark.parametrize("master", ["split", "split8", None])
def test_load_fp32_state_dict(master):
    source, _ = tied()
    weights = {name: value.detach().float().clone() for name, value in source.state_dict().items()}
    weights["embed.weight"] = weights["head.weight"] = weights["embed.weight"] * 1.0001
    model, optimizer = tied(master, steps=1)
    optimizer.load_fp32_state_dict(model, weights)
    back = optimizer.fp32_state_dict(model)
    kept = {"split": weights["head.weight"], None: weights["head.weight"].to(BF16).float()}
    kept["split8"] = rounding.join(*rounding.split(weights["head.weight"], torch.int8))
    assert torch.equal(back["embed.weight"], kept[master]) and torch.equal(back["head.weight"], kept[master])
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    again, other = tied(master, steps=0)
    other.load_fp32_state_dict(again, back)
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_bad_fp32_state_dicts_leave_everything():
    model, optimizer = tied()
    good = optimizer.fp32_state_dict(model)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    fresh = {name: torch.full_like(value, 3) for name, value in good.items()}
    rows = [
        ({k: v for k, v in fresh.items() if k != "head.weight"}, r"7 names, but \['head.weight'\] is in one"),
        ({**fresh, "more": torch.ones(1)}, r"\['more'\] is in one of them only"),
        ({**fresh, "norm.bias": torch.ones(9)}, r"'norm.bias' of the state dict must be a tensor of shape \(8,\)"),
        ({**fresh, "norm.bias": 3.0}, r"got float"),
    ]
    for bad, message in rows:
        with pytest.raises(ValueError, match=message):
            optimizer.load_fp32_state_dict(model, bad)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1]["state"][index][key]) for key, value in state.items())


# Bad calls


def a_call(**more):
    """A step of SMMF with both moments whole that is right but for what ``more`` says."""
    param = torch.ones(4, 6, dtype=BF16)
    arguments = dict(
        params=[param], grads=[param.clone()], exp_avgs=None, exp_avg_sqs=[torch.zeros(4, 6)], lr=0.1, beta1=None,
        beta2=0.5, eps=1e-8, weight_decay=0.0, master_lows=[torch.zeros(4, 6, dtype=torch.int16)],
        places=[BitOffset(0)], seed=1, step=1.0,
    )  # fmt: skip
    arguments.update(more)
    if "param" in more:
        arguments["params"] = [arguments.pop("param")]
        arguments["grads"] = [arguments["params"][0].clone()]
    return arguments


def test_bad_calls(backend):
    low = torch.zeros(4, 6, dtype=torch.int16)
    rows = [
        (dict(master_lows=[]), r"master_lows must have one entry per parameter \(1\), got 0"),
        (dict(master_lows=[low.int()]), r"master_lows\[0\] must be int16, int8 of the shape of a bfloat16 parameter"),
        (dict(master_lows=[low[:3]]), r"got torch.int16 \(3, 6\) for torch.bfloat16 \(4, 6\)"),
        (dict(param=torch.ones(4, 6), places=None), r"for torch.float32"),
        (dict(places=[]), r"places must have one entry per parameter \(1\), got 0"),
        (dict(places=[BitOffset(-1)]), r"places\[0\] must have an unsigned 32-bit position"),
        (dict(places=[BitOffset(2**32)]), r"places\[0\] must have an unsigned 32-bit position"),
        (dict(places=[BitOffset(0, -1)]), r"a first >= 0"),
        (dict(places=[BitOffset(0, 0, (1,))]), r"a stride >= 0 for each of 2 dimensions"),
        (dict(places=[BitOffset(0, 0, (6, -1))]), r"a stride >= 0 for each of 2 dimensions"),
        (dict(param=torch.ones(4, 6), master_lows=None), r"params\[0\] must be bfloat16, float16 to be rounded"),
    ]
    for more, message in rows:
        arguments = a_call(**more)
        before = [tensor.clone() for tensor in (*arguments["params"], *arguments["exp_avg_sqs"])]
        with pytest.raises(ValueError, match=message):
            calls.smmf_dense_step_(**arguments, backend=backend)
        assert all(map(torch.equal, before, (*arguments["params"], *arguments["exp_avg_sqs"])))
    lists = a_call()
    for name in ("params", "grads", "exp_avg_sqs", "places"):
        lists[name] = [copy.deepcopy(lists[name][0]) for _ in range(2)]
    lists["master_lows"] = [low.clone(), low.to(torch.int8)]
    with pytest.raises(ValueError, match="master_lows must be of one type, got int16, int8"):
        calls.smmf_dense_step_(**lists, backend=backend)
    calls.smmf_dense_step_(**a_call(), backend=backend)


@needs_native
def test_bindings_check_what_they_are_told():
    param, grad = (torch.ones(4, 6, dtype=BF16) for _ in range(2))
    low, moment = torch.zeros(4, 6, dtype=torch.int16), torch.zeros(4, 6)
    good = dict(
        params=[param.data_ptr()], grads=[grad.data_ptr()], numels=[24], param_dtypes=1, grad_dtypes=1, exp_avgs=None,
        exp_avg_sqs=[moment.data_ptr()], beta1=None, beta2=0.5, lr=0.1, eps=1e-8, weight_decay=0.0,
        decoupled_weight_decay=True, maximize=False, shapes=[(4, 6)], master_lows=[low.data_ptr()], low_bytes=2,
        low_strides=[(6, 1)], places=[(0, 0, (6, 1))], seed=1, step=1.0,
    )  # fmt: skip
    rows = [
        (dict(master_lows=[]), "master_lows: 0 entries, but params has 1"),
        (dict(master_lows=[0]), "master_lows: entry 0: a null address"),
        (dict(master_lows=["x"]), "master_lows: entry 0: an address is needed"),
        (dict(master_lows=3), "master_lows: a list is needed"),
        (dict(param_dtypes=2), "master_lows: entry 0: of a parameter that is no bfloat16"),
        (dict(param_dtypes=7), "param_dtypes: entry 0: unknown dtype code 7"),
        *((dict(low_bytes=value), "low_bytes: entry 0: 1 or 2 is needed") for value in (0, 3, -1)),
        *((dict(low_bytes=value), "low_bytes: .* is needed") for value in (None, "2", 1.0)),
        (dict(low_strides=[]), "low_strides: 0 entries"),
        (dict(low_strides=[(6,)]), "low_strides: entry 0: not as many as dimensions"),
        (dict(low_strides=[(6, -1)]), "low_strides: entry 1: negative"),
        (dict(shapes=None), "shapes: needed where low_strides is given"),
        (dict(shapes=None, low_strides=None), "shapes: needed where places is given"),
        (dict(shapes=[(4, 5)]), "shapes: entry 0: 20 elements, numels has 24"),
        (dict(places=[]), "places: 0 entries"),
        (dict(places=[(0, 0)]), r"places: entry 0: \(position, first, strides\) is needed"),
        (dict(places=[(-1, 0, None)]), r"places: entry 0: a position in \[0, 2\^32\) is needed"),
        (dict(places=[(2**32, 0, None)]), r"places: entry 0: a position in"),
        (dict(places=[(1.5, 0, None)]), "places: entry 0: an integer is needed"),
        (dict(master_lows=None, param_dtypes=0), "places: entry 0: of a parameter of more than 16 bits"),
        (dict(places=[(0, -1, None)]), "places: entry 1: negative"),
        (dict(places=[(0, 2**63, None)]), "places: entry 1: an integer is needed"),
        (dict(places=[(0, 2**63 - 5, (6, 1))]), "places: entry 0: the elements' indices overflow"),
        (dict(places=[(0, 2**63 - 5, None)]), "the elements' indices overflow"),
        (dict(places=[(0, 0, (2**62, 1))]), "the elements' indices overflow"),
        (dict(places=[(0, 0, (6,))]), "places: entry 0: not as many as dimensions"),
        *((dict(seed=value), r"seed: an integer in \[0, 2\^64\)") for value in (-1, 2**64, 1.0, None, "1")),
        *((dict(step=value), "step") for value in (None, -1.0, 2.0**32, float("nan"), [], [1.0, 2.0], "one")),
    ]  # fmt: skip
    before = param.clone()
    for bad, message in rows:
        with pytest.raises(ValueError, match=message):
            cpu._C.smmf_dense_step(**{**good, **bad})
    with pytest.raises(TypeError, match="unexpected keyword argument 'master_low'"):
        cpu._C.smmf_dense_step(**good, master_low=[0])
    assert torch.equal(param, before) and not low.any() and not moment.any()
    cpu._C.smmf_dense_step(**good)
    assert low.any() and moment.any()


def test_the_former_name_of_bit_offsets_is_theirs():
    assert rounding.Place is BitOffset  # callers of hfac.functional may use it
