"""`hfac plan` against reality: tensors of real models and optimizers, real shards, real checkpoints, real steps."""

import io
import json
import math
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import emulated
import pytest
import torch
import torch.distributed as dist
from torch import nn

import hfac
from bench.memory import peak_transient_bytes
from hfac.backends import cpu
from hfac.cli import configs, findings, footprints, main, memory, parameters, shapes, sources
from hfac.cli.model import ByteGPT

COUNTS = {
    "llama-3-8b": (8_030_261_248, 291),
    "llama-3-70b": (70_553_706_496, 723),
    "deepseek-v3": (671_026_404_352, 967),
    "gpt2": (124_439_808, 148),
    "resnet50": (25_557_032, 161),
    "sdxl-unet": (2_567_463_684, 1680),
}
#: a row of the plan -> (the optimizer that it is about, the type of weights for which it is)
REAL = {
    ("adamw-fp32", "fp32"): torch.optim.AdamW,
    ("adamw-bf16", "bf16"): torch.optim.AdamW,
    ("adafactor", "fp32"): torch.optim.Adafactor,
    ("adafactor", "bf16"): torch.optim.Adafactor,
    ("hfac", "fp32"): hfac.HFac,
    ("hfac", "bf16"): hfac.HFac,
    ("hfac-int8", "fp32"): partial(hfac.HFac, first_moment="int8"),
    ("hfac-int8", "bf16"): partial(hfac.HFac, first_moment="int8"),
    ("smmf", "fp32"): hfac.SMMF,
    ("smmf", "bf16"): hfac.SMMF,
}


def gpt():
    return ByteGPT(24, 2, 2, 18)


def convolutions():
    """A stem, a depthwise and a pointwise convolution, a norm, and a head of a prime length; one layer is frozen."""
    model = nn.Sequential(
        nn.Conv2d(3, 20, 7), nn.BatchNorm2d(20), nn.Conv2d(20, 20, 3, groups=20), nn.Conv2d(20, 6, 1), nn.Linear(6, 13)
    )
    model[2].requires_grad_(False)
    return model


MODELS = {"gpt": gpt, "convolutions": convolutions}


def modeled(module, dtype="bf16"):
    model = parameters.of_module(module, "model", "here")
    return model, memory.Load(model, memory.DTYPES[dtype])


def listed(*sizes, dtype="bf16"):
    model = parameters.Model(
        "list", "here", tuple(parameters.Parameter(f"p{i}", shape) for i, shape in enumerate(sizes))
    )
    return model, memory.Load(model, memory.DTYPES[dtype])


def on_this_rank(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def state_bytes(optimizer):
    """Of real tensors, on this rank."""
    return sum(on_this_rank(value) for state in optimizer.state.values() for value in state.values())


def with_gradients(module):
    """The parameters that are trained."""
    params = [param for param in module.parameters() if param.requires_grad]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


@contextmanager
def rank_of(rank, world):
    """One rank of a process group whose others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def plan(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("name", shapes.NAMED)
def test_named_lists_have_the_models_parameters(name):
    model = sources.read(name)
    assert (sum(p.numel for p in model.parameters), len(model.parameters)) == COUNTS[name]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("name", "dtype"), REAL, ids=map("-".join, REAL))
def test_bytes_are_those_of_real_tensors(name, dtype, make):
    module = make().to(memory.DTYPES[dtype])
    _, load = modeled(module, dtype)
    params = with_gradients(module)
    optimizer = REAL[name, dtype](params)
    optimizer.step()
    [row] = [row for row in footprints.rows(load, 1) if row.optimizer.name == name]
    weights = list(module.parameters())
    assert row.weights == sum(param.nbytes for param in weights)
    assert row.gradients == sum(param.grad.nbytes for param in params)
    assert row.state == state_bytes(optimizer)
    assert row.total == row.weights + row.gradients + row.state + row.transient.bytes

    file = io.BytesIO()
    torch.save({"weights": dict(module.named_parameters()), "optimizer": optimizer.state_dict()}, file)
    with zipfile.ZipFile(file) as archive:
        assert row.checkpoint == sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    # Beside them the file has, for each tensor, two headers, padding to 64 bytes and a description.
    tensors = len(weights) + sum(map(len, optimizer.state.values()))
    assert 0 < file.tell() - row.checkpoint <= 600 * tensors + 4096


def test_8_bit_adam_is_as_bitsandbytes_keeps_it():
    """Bytes as bitsandbytes 0.50.2 allocated them, step by step of its rule."""
    adam = footprints.OPTIMIZERS["adam-8bit"]
    seen = {(64, 63): 32256, (64, 64): 8320, (4097,): 8330, (100, 123): 24992, (5,): 40, (): 8}
    for dtype in memory.DTYPES.values():
        assert {shape: adam.state_bytes(shape, dtype) for shape in seen} == seen
    _, load = listed((64, 64), (64, 64), (5,))
    assert adam.load_bytes(load, memory.ALONE) == 2 * 8320 + 40 + 2048  # both tables of 256 numbers, once
    _, load = listed((64, 63), (5,))
    assert adam.load_bytes(load, memory.ALONE) == 32256 + 40


def test_8_bit_adam_saves_every_ranks_blocks():
    adam = footprints.OPTIMIZERS["adam-8bit"]
    for shape, world in (((100, 123), 3), ((100, 123), 7), ((5, 5000), 8), ((4097,), 1), ((), 3), ((0, 4), 2)):
        ranks = [memory.Rank(index, world) for index in range(world)] if shape else [memory.ALONE]
        saved = sum(adam.state_bytes(shape, torch.bfloat16, rank) for rank in ranks)
        assert adam.saved_bytes(shape, torch.bfloat16, world) == saved, (shape, world)


# One rank for each number of them: torch keeps a mesh for all equal ones that a process makes, and this process's place
# in the first of them with it. Numbers that no other test has, for the same reason.
@pytest.mark.parametrize(("world", "index"), [(3, 0), (5, 4), (7, 3), (9, 0), (11, 10), (40, 12)])
def test_shards_are_torchs(world, index):
    """A real `fully_shard`, on ranks with even, uneven and empty shards: weights and states are real DTensors."""
    from torch.distributed.fsdp import fully_shard

    rank = memory.Rank(index, world)
    with rank_of(index, world) as mesh:
        for make in MODELS.values():
            module = make()
            _, load = modeled(module, "fp32")
            fully_shard(module, mesh=mesh)
            assert load.weight_bytes(rank) == sum(map(on_this_rank, module.parameters()))
            for name in ("adamw-fp32", "adafactor", "hfac", "hfac-int8", "smmf"):
                params = with_gradients(module)
                assert load.gradient_bytes(rank) == sum(on_this_rank(param.grad) for param in params)
                optimizer = REAL[name, "fp32"](params)
                if name == "adamw-fp32":
                    optimizer.step()
                if name == "adafactor":
                    make_state(optimizer)
                assert footprints.OPTIMIZERS[name].load_bytes(load, rank) == state_bytes(optimizer), name
                if name in ("hfac", "hfac-int8", "smmf"):
                    sent = footprints.OPTIMIZERS[name].sent_bytes(load, rank)
                    assert sent == sum(size for _, size in optimizer.collectives())


#: options of every group, and of the matrices; the type of the weights
OPTIONS = {
    "master": ({"master": "split"}, {}, "bf16"),
    "master in 24 bits, stochastic": ({"master": "split8", "rounding": "stochastic"}, {}, "bf16"),
    "dense": ({}, {"dense": True}, "fp32"),
    "stacks": ({}, {"batch_dims": 1}, "fp32"),
    "stacks with masters": ({"master": "split"}, {"batch_dims": 1}, "bf16"),
    "signs in bytes": ({"signs": "bytes"}, {}, "fp32"),
    "stacks with signs in bytes": ({"signs": "bytes"}, {"batch_dims": 1}, "fp32"),
    "pieces of rows": ({}, {"views": 3}, "fp32"),
    "pieces of columns of stacks": ({}, {"batch_dims": 1, "views": 4, "views_dim": 1}, "fp32"),
}


def stacks():
    """Two stacks of matrices, a matrix and a vector."""
    shapes = {"experts_up": (6, 20, 12), "experts_down": (6, 12, 20), "gate": (20, 6), "bias": (20,)}
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def grouped(module, everywhere, some, dtype):
    """The model as it is planned, and the groups that its optimizers get."""
    dense = ["experts_*"] if some.get("dense") else []
    given = ({"experts_*": some[name]} if name in some else {} for name in ("batch_dims", "views", "views_dim"))
    model = parameters.of_module(module, "model", "here").grouped(dense, *given)
    chosen = {name: everywhere[name] for name in ("rounding", "master", "signs") if name in everywhere}
    load = memory.Load(model, memory.DTYPES[dtype], **chosen)
    experts = [param for name, param in module.items() if name.startswith("experts")]
    others = [param for name, param in module.items() if not name.startswith("experts")]
    return load, [{"params": experts, **everywhere, **some}, {"params": others, **everywhere}]


def taken(groups, name):
    """New groups, which take an optimizer's options, without those that it lacks."""
    return [{key: value for key, value in group.items() if key != "signs" or name == "smmf"} for group in groups]


@pytest.mark.parametrize("label", OPTIONS)
@pytest.mark.parametrize("name", ["hfac", "hfac-int8", "smmf"])
def test_bytes_under_options_are_those_of_real_tensors(name, label):
    everywhere, some, dtype = OPTIONS[label]
    module = stacks().to(memory.DTYPES[dtype])
    load, groups = grouped(module, everywhere, some, dtype)
    with_gradients(module)
    optimizer = REAL[name, dtype](taken(groups, name))
    optimizer.step()
    assert footprints.OPTIMIZERS[name].load_bytes(load, memory.ALONE) == state_bytes(optimizer)
    assert footprints.OPTIMIZERS[name].checkpoint_bytes(load, 3) == load.weight_bytes() + state_bytes(optimizer)


def test_bits_beside_signs_in_bytes_are_those_that_the_optimizer_keeps():
    module = stacks()
    for some in ({}, {"batch_dims": 1}, {"views": 2, "views_dim": 1}, {"batch_dims": 1, "views": 4, "views_dim": 1}):
        load, groups = grouped(module, {"signs": "bytes"}, some, "fp32")
        with_gradients(module)
        optimizer = hfac.SMMF(groups, backend="cpu")
        optimizer.step()
        planned, least = footprints.OPTIMIZERS["smmf"], 2 * 6 * 20 * 12  # temporaries, of the largest parameter
        assert planned._packed_bytes(load, memory.ALONE) == optimizer.workspace_bytes() + least
        if "views" in some:  # bits of pieces of columns are gathered, too
            continue
        bits, _ = grouped(module, {}, some, "fp32")
        more = planned.transient(load, memory.ALONE).bytes - planned.transient(bits, memory.ALONE).bytes
        assert more == optimizer.workspace_bytes() + least
        assert "bits of the signs" in planned.transient(load, memory.ALONE).origin


@pytest.mark.parametrize(("label", "world"), list(zip(OPTIONS, (13, 14, 15, 17, 18, 3, 19, 3, 5), strict=True)))
def test_shards_under_options_are_torchs(label, world):
    from torch.distributed.fsdp import fully_shard

    everywhere, some, dtype = OPTIONS[label]
    with rank_of(1, world) as mesh:
        module = stacks().to(memory.DTYPES[dtype])
        load, _ = grouped(module, everywhere, some, dtype)
        fully_shard(module, mesh=mesh)
        _, groups = grouped(module, everywhere, some, dtype)
        for name in ("hfac", "hfac-int8", "smmf"):
            optimizer = REAL[name, dtype](taken(groups, name))
            planned = footprints.OPTIMIZERS[name]
            assert planned.load_bytes(load, memory.Rank(1, world)) == state_bytes(optimizer), name
            sent = sum(size for _, size in optimizer.collectives())
            assert planned.sent_bytes(load, memory.Rank(1, world)) == sent, name


def make_state(adafactor):
    """Its step makes state and then fails where a matrix is sharded: what the plan says of torch 2.13."""
    with pytest.raises(RuntimeError, match="placement|Cannot flatten unevenly sharded"):
        adafactor.step()
    [group] = adafactor.param_groups
    adafactor._init_group(group, [], [], [], [], [], [])


def test_the_fullest_rank_is_reported():
    _, load = listed((7, 3), (64, 64), (100, 123), (5,), (1, 9), (3, 4000))
    for world in (2, 3, 5, 64):
        ranks = [memory.Rank(index, world) for index in range(world)]
        for row in footprints.rows(load, world):
            sizes = [row.optimizer.load_bytes(load, r) + load.weight_bytes(r) + load.gradient_bytes(r) for r in ranks]
            assert row.weights + row.gradients + row.state == max(sizes) == sizes[row.rank.index]
            if row.optimizer.name != "adam-8bit":
                assert row.rank.index == 0
        assert sum(map(load.weight_bytes, ranks)) == load.weight_bytes()


def test_smaller_parts_may_take_more_under_8_bit_adam():
    """100 rows of 123 on 3 ranks: 34, 34 and 32 rows, of which the last are fewer than 4096 elements."""
    [row] = [row for row in footprints.rows(listed((100, 123))[1], 3) if row.optimizer.name == "adam-8bit"]
    assert (row.rank.index, row.state, row.weights) == (2, 8 * 32 * 123, 2 * 32 * 123)


@pytest.mark.parametrize(
    "sizes",
    [
        [(300, 200), (96, 80), (200,)],
        [(96, 80), (300, 200), (9001,), (20, 30, 3, 3)],
        [(4000,), (5000,), (12, 7)],
        [(70, 16, 3, 3)],
    ],
)
@pytest.mark.parametrize(("name", "dtype"), [("adamw", "fp32"), ("adamw", "bf16"), ("adafactor", "fp32")])
def test_transient_bytes_said_to_be_measured_are(name, dtype, sizes):
    _, load = listed(*sizes, dtype=dtype)
    params = with_gradients(nn.ParameterList(nn.Parameter(torch.randn(s).to(load.dtype)) for s in sizes))
    row = "adafactor" if name == "adafactor" else f"adamw-{dtype}"
    optimizer = torch.optim.AdamW(params, foreach=True) if name == "adamw" else torch.optim.Adafactor(params)
    optimizer.step()
    said = footprints.OPTIMIZERS[row].transient(load, memory.ALONE)
    assert said.basis == "measured"
    assert peak_transient_bytes(optimizer.step, torch.device("cpu")) == pytest.approx(said.bytes, rel=0.01)


@pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)
@pytest.mark.usefixtures("emulated_backend")
@pytest.mark.parametrize("dtype", memory.DTYPES)
@pytest.mark.parametrize("name", ["hfac", "hfac-int8", "smmf"])
def test_transient_bytes_said_to_be_counted_are_what_the_kernels_keep(name, dtype):
    sizes = [(300, 200), (96, 80), (16, 3, 3, 3), (200,), (4001,)]
    _, load = listed(*sizes, dtype=dtype)
    params = with_gradients(nn.ParameterList(nn.Parameter(torch.randn(s).to(load.dtype)) for s in sizes))
    optimizer = REAL[name, dtype](params, backend=emulated.NAME)
    optimizer.step()
    said = footprints.OPTIMIZERS[name].transient(load, memory.ALONE)
    assert said.basis == "counted"
    steps = [bucket.call._call._plain for _, group in optimizer._bound.values() for bucket in group._buckets]
    assert sum(step.workspace.numel() for step in steps) == said.bytes
    # They also keep a table, which is not counted: a description of each tensor and an entry for each tile.
    assert 0 < optimizer.workspace_bytes() - said.bytes <= 1024 * len(sizes)


@pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)
@pytest.mark.usefixtures("emulated_backend")
@pytest.mark.parametrize("label", ["dense", "stacks"])
@pytest.mark.parametrize("name", ["hfac", "hfac-int8", "smmf"])
def test_transient_bytes_under_options_are_what_the_kernels_keep(name, label):
    everywhere, some, dtype = OPTIONS[label]
    module = stacks()
    load, groups = grouped(module, everywhere, some, dtype)
    with_gradients(module)
    optimizer = REAL[name, dtype](groups, backend=emulated.NAME)
    optimizer.step()
    steps = [bucket.call._call._plain for _, group in optimizer._bound.values() for bucket in group._buckets]
    said = footprints.OPTIMIZERS[name].transient(load, memory.ALONE)
    assert sum(step.workspace.numel() for step in steps) == said.bytes


def test_adafactors_transient_bytes_on_many_ranks_are_those_of_the_parts():
    adafactor = footprints.OPTIMIZERS["adafactor"]
    _, load = listed((300, 200), (96, 80), (200,), dtype="fp32")
    _, parts = listed((75, 200), (24, 80), (50,), dtype="fp32")
    said = adafactor.transient(load, memory.Rank(0, 4))
    assert said.bytes == adafactor.transient(parts, memory.ALONE).bytes > 0
    assert said.basis == "estimated"


def test_float32_masters_take_16_bytes_for_each_weight():
    """As mixed-precision trainers keep them, with the real optimizer on the copies."""
    module = gpt().to(torch.bfloat16)
    _, load = modeled(module)
    [row] = [row for row in footprints.rows(load, 1) if row.optimizer.name == "adamw-masters"]
    masters = [nn.Parameter(param.detach().float()) for param in module.parameters()]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters)
    optimizer.step()
    assert row.state == state_bytes(optimizer) + sum(master.nbytes for master in masters)
    steps = 4 * len(masters)
    assert row.weights + row.gradients + row.state - steps == 16 * load.elements()
    assert "adamw-masters" not in {row.optimizer.name for row in footprints.rows(modeled(gpt(), "fp32")[1], 1)}


def test_without_the_extension_transient_bytes_are_unknown(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_build_failure", lambda: "it was not built")
    found = json.loads(plan(capsys, "gpt2", "--json"))
    rows = {row["optimizer"]: row for row in found["world_sizes"][0]["optimizers"]}
    for name in ("hfac", "smmf"):
        assert rows[name]["transient_bytes"] is None and rows[name]["transient_basis"] == "unknown"
        parts = ("weights_bytes", "gradients_bytes", "state_bytes")
        assert rows[name]["total_bytes"] == sum(rows[name][part] for part in parts)
    assert "is not built" in plan(capsys, "gpt2")


def found_kinds(*sizes, share=findings.SHARE, worlds=(1,)):
    return {(f.optimizer, f.kind): f for f in findings.find(*listed(*sizes), worlds, share)}


def test_a_prime_length_is_named_with_what_padding_gives():
    finding = found_kinds((4099,))["smmf", "prime"]
    assert finding.state_bytes == 8 * 4099 + 4 == finding.adamw_bytes
    padded = footprints.OPTIMIZERS["smmf"].state_bytes((4160,), torch.bfloat16) / (8 * 4160 + 4)
    assert f"4160 instead of 4099 takes {padded:.1%}" in finding.advice


def test_a_length_that_is_nearly_prime_is_named():
    finding = found_kinds((2, 50021))["smmf", "nearly prime"]
    assert "2 x 50021 becomes 50021 x 2" in finding.why and "2 x 50048" in finding.advice
    assert ("smmf", "nearly prime") not in found_kinds((2, 50048))


def test_thin_factors_are_named_with_an_optimizer_that_suits_them():
    found = found_kinds((8, 4096), (4096, 8), (2, 50021), (1024, 1024), share=0.1)
    thin = [f for f in findings.find(*listed((8, 4096), (4096, 8), (2, 50021)), (1,)) if f.kind == "thin"]
    assert {tuple(p.shape for p in f.parameters) for f in thin} == {((8, 4096), (4096, 8)), ((2, 50021),)}
    lora = next(f for f in thin if len(f.parameters) == 2)
    assert lora.state_bytes == 2 * (8 * (8 + 4096) + 4)
    smmf = 2 * footprints.OPTIMIZERS["smmf"].state_bytes((8, 4096), torch.bfloat16)
    assert f"SMMF, which takes {smmf / lora.state_bytes:.0%}" in lora.advice
    assert "No other optimizer" in next(f for f in thin if f is not lora).advice
    assert all(p.shape != (1024, 1024) for f in found.values() for p in f.parameters)


def test_vectors_are_named_and_said_to_be_of_no_weight_where_they_are_few():
    few = found_kinds((2048, 2048), (2048,))["hfac", "vectors"]
    assert few.minor and few.advice.startswith("Nothing")
    many = found_kinds((100, 100), (2048,))["hfac", "vectors"]
    assert not many.minor and many.state_bytes == 8 * 2048 + 4
    assert "SMMF, which takes" in many.advice
    assert found_kinds((1, 2048))["hfac", "vectors"].elements == 2048  # one row is a vector too
    assert "convolutions" in found_kinds((64, 64, 3, 3))["adafactor", "last dimensions"].why
    assert found_kinds((1024, 1024)) == {}


def test_the_share_is_the_threshold():
    state = footprints.OPTIMIZERS["hfac"].state_bytes((8, 4096), torch.bfloat16)
    share = state / footprints.ADAMW.state_bytes((8, 4096), torch.bfloat16)
    assert ("hfac", "thin") in found_kinds((8, 4096), share=share * 0.999)
    assert ("hfac", "thin") not in found_kinds((8, 4096), share=share)


def test_experts_that_leave_ranks_empty_are_named():
    def empty(*worlds):
        return [f for f in findings.find(*listed((8, 64, 64), (64, 64)), worlds) if f.kind == "empty ranks"]

    assert empty(1, 8) == []
    [finding] = empty(1, 8, 16)
    assert [p.shape for p in finding.parameters] == [(8, 64, 64)] and "8 have none" in finding.why
    assert len(empty(16, 64)) == 2
    [finding] = [f for f in findings.find(*listed((10, 64, 64)), (8,)) if f.kind == "empty ranks"]
    assert "3 have none and the fullest has 20.0%" in finding.why  # 5 ranks with 2 slices each
    few = findings.find(*listed((8, 4), (1024, 1024)), (16,))
    assert not [f for f in few if f.kind == "empty ranks"]


def test_what_was_asked_for_is_no_finding():
    model, _ = listed((4, 4096), (1024, 1024))
    for load in (memory.Load(model, torch.bfloat16, master="split"), memory.Load(model, torch.bfloat16)):
        assert {f.kind for f in findings.find(model, load, (1,)) if f.optimizer == "hfac"} == {"thin"}
    model = model.grouped(["p0"], {})
    load = memory.Load(model, torch.bfloat16)
    assert not [f for f in findings.find(model, load, (1,)) if f.optimizer in ("hfac", "smmf")]


def test_options_are_planned_and_told(capsys):
    arguments = ["gpt2", "--dense", "*wpe*", "--batch-dims", "*.c_fc.weight=1", "--master", "split"]
    arguments += ["--rounding", "stochastic", "--signs", "bytes"]
    arguments += ["--views", "*.c_attn.weight=3", "--views-dim", "*.c_attn.weight=1"]
    found = json.loads(plan(capsys, *arguments, "--json"))
    assert found["dense"] == ["transformer.wpe.weight"] and len(found["batch_dims"]) == 12
    assert (found["master"], found["rounding"], found["signs"]) == ("split", "stochastic", "bytes")
    assert len(found["views"]) == 12 and set(map(tuple, found["views"].values())) == {(3, 1)}
    text = " ".join(plan(capsys, *arguments).split())
    told = "master=split, rounding=stochastic, signs=bytes, dense for 1 tensor, batch_dims for 12 tensors, views for 12"
    assert told in text
    bare = json.loads(plan(capsys, "gpt2", "--json"))
    for shown, plain in zip(*(entry["world_sizes"][0]["optimizers"] for entry in (found, bare)), strict=True):
        ours = shown["optimizer"] in ("hfac-int8", "hfac", "smmf")
        assert (shown["state_bytes"] > plain["state_bytes"] + 2 * 124_439_808 - 1) == ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dense", "nothing*"], "'nothing*' matches no parameter that is trained"),
        (["--batch-dims", "*wpe*=2"], "a number from 0 to 1 is required"),
        (["--batch-dims", "*wpe*"], "required is PATTERN=N"),
        (["--views", "*.c_attn.weight=5"], "a number is required into which dimension 0 can be cut"),
        (["--views", "*.c_attn.bias=3", "--views-dim", "*.c_attn.bias=1"], "into which dimension 1 can be cut"),
        (
            ["--views", "*.c_attn.weight=3", "--world-size", "1,8"],
            "FSDP2 gives each 96 of 768 rows, which are no whole",
        ),
        (["--batch-dims", "*wpe*=x"], "required is a whole number of at least 0"),
        (["--master", "split", "--dtype", "fp32"], "are for weights of fewer bits"),
        (["--rounding", "stochastic", "--dtype", "fp32"], "are for weights of fewer bits"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, message, capsys):
    assert message in refusal(capsys, "gpt2", *arguments)


def test_scalars_are_named_where_they_would_be_cut():
    assert (None, "scalars") in found_kinds((), (64, 64), worlds=(1, 2))
    assert (None, "scalars") not in found_kinds((), (64, 64), worlds=(1,))
    _, load = listed((), (4, 4), dtype="fp32")
    assert load.weight_bytes(memory.Rank(3, 4)) == 4 + 16  # every rank has it whole


def test_json_has_every_byte_and_the_text_the_same(capsys):
    found = json.loads(plan(capsys, "gpt2", "--dtype", "fp32", "--world-size", "1,8", "--json"))
    assert found["model"]["parameters"] == COUNTS["gpt2"][0] and found["dtype"] == "float32"
    assert [entry["world_size"] for entry in found["world_sizes"]] == [1, 8]
    load = memory.Load(sources.read("gpt2"), torch.float32)
    text = plan(capsys, "gpt2", "--dtype", "fp32", "--world-size", "1,8")
    for entry in found["world_sizes"]:
        for shown, row in zip(entry["optimizers"], footprints.rows(load, entry["world_size"]), strict=True):
            assert shown["optimizer"] == row.optimizer.name
            numbers = row.weights, row.gradients, row.state, row.transient.bytes, row.total, row.checkpoint
            keys = ("weights", "gradients", "state", "transient", "total", "checkpoint")
            assert tuple(shown[f"{key}_bytes"] for key in keys) == numbers
            [line] = [
                line
                for line in text.split("under FSDP2:")[entry["world_size"] > 1].splitlines()
                if line.startswith(f"{row.optimizer.title} ") and "measured" not in line and "  " in line
            ]
            assert line.split("  ")[0] == row.optimizer.title
            assert [cell.strip() for cell in line.split("  ")[1:] if cell] == [memory.human(n) for n in numbers]
            assert shown["transient_basis"] in text and row.transient.origin in " ".join(text.split())
    assert {f["kind"] for f in found["findings"]} == {"vectors", "signs"}
    assert "124,439,808 parameters in 148 tensors" in " ".join(text.split())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (65_540, "65.5 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (16_060_522_496, "16.1 GB"),
        (128_484_180_000, "128 GB"),
        (2 * 10**12, "2.00 TB"),
        (None, "?"),
    ],
)
def test_sizes_have_three_digits(count, text):
    assert memory.human(count) == text


def test_a_plot_is_drawn(tmp_path, capsys):
    file = tmp_path / "plan.svg"
    assert main(["plan", "resnet50", "--world-size", "1,2,4,8", "--plot", str(file)]) == 0
    drawn = file.read_text()
    assert drawn.count("<!-- ") > 60
    assert drawn.count('<g id="axes_') == 4, "a panel is empty"
    for text in ("ResNet-50", "one GPU", "each of 8 GPUs", "optimizer state", "8-bit Adam"):
        assert f"<!-- {text}" in drawn
    assert str(file) in capsys.readouterr().err


def test_a_plot_that_cannot_be_is_refused(tmp_path, capsys, monkeypatch):
    assert "--plot requires a PNG" in refusal(capsys, "gpt2", "--plot", str(tmp_path / "plan.nonsense"))
    assert "--plot requires a PNG" in refusal(capsys, "gpt2", "--plot", str(tmp_path / "no" / "plan.png"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "-m pip install matplotlib" in refusal(capsys, "gpt2", "--plot", str(tmp_path / "plan.png"))


@pytest.mark.skipif(cpu._C is None, reason="hfac._C is not built: hfac doctor says why")
def test_the_documents_example_is_what_comes_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    document = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    assert plan(capsys, "llama-3-8b", "--world-size", "1,64") == document.split("```\n")[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder from which the command runs, with a module in it."""
    (tmp_path / "models_of_plan.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from types import SimpleNamespace\n"
        "def tied():\n"
        "    a, b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)\n"
        "    b.weight = a.weight\n"
        "    return nn.Sequential(a, b, nn.Linear(4, 3).requires_grad_(False))\n"
        "def large(): return nn.Linear(10**6, 10**6)\n"
        "def frozen(): return nn.Linear(2, 2).requires_grad_(False)\n"
        "def number(): return 3\n"
        "def reads(): return nn.Linear(int(torch.ones(1).item()), 2)\n"
        "space, text = SimpleNamespace(tied=tied), 'text'\n"
        "def kinds(): return nn.ParameterList([nn.Parameter(torch.empty(3, dtype=torch.int8), requires_grad=False),\n"
        "    nn.Parameter(torch.empty(5))])\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("models_of_plan", None)


def test_a_callable_is_built_without_memory(home, capsys):
    assert sources.read("models_of_plan:large").parameters[0].numel == 10**12
    tied = sources.read("models_of_plan:space.tied")
    assert [(p.shape, p.trainable) for p in tied.parameters] == [((4, 6), True), ((3, 4), False), ((3,), False)]
    assert sys.path[0] != str(home)
    kinds = sources.read("models_of_plan:kinds")
    load = memory.Load(kinds, torch.bfloat16)
    assert (load.weight_bytes(), load.gradient_bytes()) == (3 + 2 * 5, 2 * 5)
    text = " ".join(plan(capsys, "models_of_plan:tied").split())
    assert "39 parameters in 3 tensors, 24 of them trained" in text


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("llama-4", "unknown model 'llama-4'"),
        ("llama3-8", "did you mean llama3-8b?"),
        ("no/such/config.json", "unknown model 'no/such/config.json'"),
        ("no_such_module_of_plan:make", "No module named 'no_such_module_of_plan'"),
        ("models_of_plan:nothing", "has no attribute 'nothing'"),
        ("models_of_plan:text", "required is a callable without arguments"),
        ("models_of_plan:number", "returns a torch.nn.Module; models_of_plan:number() is of type int"),
        ("models_of_plan:reads", "failed on the meta device"),
        ("models_of_plan:frozen", "no parameter that requires_grad"),
        ("empty", "required is a folder with a config.json"),
        ("text.json", "cannot be read as JSON"),
        ("list.json", "says its 'model_type'"),
        ("plain.json", "says its 'model_type'"),
    ],
)
def test_what_is_no_model_is_refused(target, message, home, capsys):
    (home / "empty").mkdir()
    (home / "text.json").write_text("{")
    (home / "list.json").write_text("[]")
    (home / "plain.json").write_text("{}")
    assert message in refusal(capsys, target)


@pytest.mark.parametrize("sizes", ["0", "1,", "8,x", "-1"])
def test_world_sizes_are_whole_numbers(sizes, capsys):
    assert "required is a whole number of at least 1" in refusal(capsys, "gpt2", f"--world-size={sizes}")


def test_without_transformers_a_config_is_refused_with_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "-m pip install transformers" in refusal(capsys, str(tmp_path))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


GPT2 = {"model_type": "gpt2", "architectures": ["OfAnotherLibrary"]}


@pytest.mark.parametrize(("name", "config"), [("llama-3-8b", LLAMA), ("gpt2", GPT2)])
def test_a_config_gives_the_parameters_of_the_named_list(name, config, tmp_path):
    """Names, shapes and order; gpt2's names no architecture of transformers, so that an auto class is asked."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    built, named = sources.read(str(tmp_path)), sources.read(name)
    assert [(p.name, p.shape) for p in built.parameters] == [(p.name, p.shape) for p in named.parameters]
    assert built.source == str(tmp_path / "config.json")


def test_a_config_is_built_as_the_architecture_that_it_names(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sources.read(str(tmp_path)).parameters[-1].name == "score.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-type"}, "does not know the model_type 'no-such-type'"),
        ({"model_type": "own", "auto_map": {}}, "The code that comes with such a model is not run here"),
        ({"model_type": "gpt2", "n_embd": "wide"}, "cannot build"),
        ({"model_type": "gpt2", "n_head": 5}, "cannot build"),
    ],
)
def test_a_config_that_gives_no_model_is_refused(config, message, tmp_path, capsys):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(config))
    assert message in refusal(capsys, str(file))


def test_a_config_that_no_auto_class_takes_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(configs, "_auto_classes", lambda config: ("AutoModelForCausalLM",))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "has none of AutoModelForCausalLM for the model_type 'vit'" in refusal(capsys, str(tmp_path))


def test_bytes_of_every_optimizer_are_counted_by_hand():
    """One matrix of 64 x 96, in bfloat16, on 4 ranks: 16 rows each."""
    _, load = listed((64, 96))
    numel, part = 64 * 96, 16 * 96
    expected = {
        "adamw-masters": (12 * part + 4, 12 * numel + 4),
        "adamw-fp32": (8 * part + 4, 8 * numel + 4),
        "adamw-bf16": (4 * part + 4, 4 * numel + 4),
        "adam-8bit": (8 * part, 8 * numel),  # a part is below 4096 elements
        "adafactor": (2 * (64 + 96) + 4, 2 * (64 + 96) + 4),
        "hfac-int8": (part + 4 * (16 + 96) + 4, numel + 4 * (64 + 96) + 4),
        "hfac": (2 * 4 * (16 + 96) + 4, 2 * 4 * (64 + 96) + 4),
        "smmf": (2 * 4 * (96 + 64) + part // 8 + 4, 2 * 4 * (96 + 64) + numel // 8 + 4),
    }
    for row in footprints.rows(load, 4):
        assert (row.weights, row.gradients) == (2 * part, 2 * part)
        assert (row.state, row.checkpoint - 2 * numel) == expected[row.optimizer.name], row.optimizer.name
    assert math.prod(memory.Rank(3, 4).part((64, 96))) == part


def test_a_reader_that_has_read_enough_ends_it_quietly():
    program = [sys.executable, "-m", "hfac", "plan", "gpt2"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 141
