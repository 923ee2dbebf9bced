"""What a step sends, keeps and asks of the host on up to 16,384 ranks that are not there (bench/sharding.py), and that
docs/sharding-plan.md says so."""

import json

import pytest
import torch
from processes import Forked
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from bench import sharding
from bench.imagined import imagined_ranks
from hfac.cli import shapes
from hfac.distributed import layout

LLAMA, DEEPSEEK = shapes.llama3_8b(1), shapes.deepseek_v3(4)
#: small models on the layouts of the page: the fewest ranks, and the most
FSDP = [sharding.Case("Llama", LLAMA, ranks, "FSDP", sharding.fsdp(ranks)) for ranks in (8, 16384)]
HSDP = [sharding.Case("Llama", LLAMA, 64 * n, "HSDP", sharding.fsdp(64, n)) for n in (2, 256)]
EXPERTS = [
    sharding.Case("DeepSeek", DEEPSEEK, 256 * n, "experts", sharding.experts(256, 64, copies=n)) for n in (2, 64)
]
LAST_RANK = """
import json
from test_scale import FSDP, sharding
last = sharding.count(FSDP[1], 16383)
print(json.dumps([last.weights, last.sent]))
"""
PAIRS = pytest.mark.parametrize("pair", [FSDP, HSDP, EXPERTS], ids=lambda pair: pair[0].layout)


def test_llama_on_64_ranks_sends_what_the_design_says():
    """Three sums per column and matrix for H-Fac, two where the first moment is whole, four factors for SMMF, in one
    all-reduce."""
    found = sharding.count(sharding.LAYOUTS[0])
    for name, megabytes in {"HFac": 15.0, "HFac, int8": 10.0, "SMMF": 18.9}.items():
        assert [ranks for ranks, _ in found.sent[name]] == [64]
        assert found.sent[name][0][1] == pytest.approx(megabytes * 1e6, rel=0.01)
    assert sharding.table() in sharding.DOCUMENT.read_text(), "run python -m bench.sharding --write"


@PAIRS
def test_what_is_sent_does_not_grow(pair):
    few, many = map(sharding.count, pair)
    for name in sharding.OPTIMIZERS:
        assert [size for _, size in few.sent[name]] == [size for _, size in many.sent[name]], name
        assert few.state[name] >= many.state[name] > 0, name
    assert all(few.sent.values())


def test_a_rank_that_holds_nothing_sends_as_much():
    first = sharding.count(FSDP[1])
    done = Forked(LAST_RANK).ended()  # torch keeps meshes, and this process has been the first rank
    assert done.returncode == 0, done.stderr
    weights, sent = json.loads(done.stdout)
    assert weights == 0 < first.weights
    assert sent == {name: [list(each) for each in found] for name, found in first.sent.items()}


@PAIRS
@pytest.mark.parametrize("name", sharding.OPTIMIZERS)
def test_the_hosts_calls_do_not_grow(pair, name):
    few, many = (sharding.host(case, name, rounds=0).calls for case in pair)
    assert 0 < many == few


@pytest.mark.parametrize("case", [FSDP[1], EXPERTS[1]], ids=lambda case: case.layout)
def test_no_other_ranks_pieces_are_cut(case, monkeypatch):
    """torch's own split makes those of all ranks, which took half a minute for a model of 70e9 parameters."""

    def split(*args, **kwargs):
        raise AssertionError("a tensor is split into the pieces of all ranks")

    with imagined_ranks(case.ranks):
        params = sharding.parameters(case)
        for placement in (Shard, _StridedShard):
            monkeypatch.setattr(placement, "_split_tensor", split)
        for make in sharding.OPTIMIZERS.values():
            sharding.optimizer_of(make, params).collectives()


@pytest.mark.parametrize("placement", [Shard(0), *(_StridedShard(0, split_factor=n) for n in (2, 3, 8))], ids=str)
def test_a_piece_is_that_of_torch(placement):
    for size in (0, 1, 5, 8, 17, 64):
        whole = torch.arange(size)
        for count in (1, 2, 3, 8, 70):
            pieces, _ = placement._split_tensor(whole, count, with_padding=False, contiguous=False)
            for index in range(count):
                found = layout._piece(whole, placement, count, index)
                assert found.tolist() == pieces[index].tolist(), (size, count, index)


def test_the_model_of_a_collective():
    """1 MB among 1,024 ranks: up and down a tree of ten levels, and twice over the link."""
    hops, bytes_ = 2 * 10 * 10e-6, 2 * 1023 / 1024 * 1e6 / 50e9
    assert sharding.seconds([(1024, 10**6)]) == pytest.approx(hops + bytes_)
    assert sharding.seconds([(1024, 10**6), (8, 0)]) == pytest.approx(hops + bytes_ + 2 * 3 * 10e-6)
    assert sharding.seconds([]) == 0


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if (case.ranks, case.layout) == (16384, "FSDP") else pytest.mark.slow)
        for case in sharding.SCALES
        if case.model == "Llama-3-8B" or case in sharding.HOSTED and case.model == "DeepSeek-V3"
    ],
    ids=lambda case: f"{case.model}-{case.ranks}-{case.layout}",
)
def test_the_page_is_what_is_counted(case):
    text = sharding.DOCUMENT.read_text()
    for table in sharding.scale_tables([case]):
        assert table.splitlines()[2] in text, "run python -m bench.sharding --write"
    calls = {name: sharding.host(case, name, rounds=0).calls for name in sharding.OPTIMIZERS}
    if case in sharding.HOSTED:
        where = f"| {case.model} | {case.ranks:,} | {case.layout} | "
        (row,) = [line for line in text.splitlines() if line.startswith(where) and line.count(" ms, ") == 3]
        said = [cell.split(",")[0] for cell in row.removeprefix(where).split(" | ")]
        assert said == list(map(str, calls.values()))


def test_what_the_page_says_of_experts():
    """Sharded along their second dimension, as torchtitan does it where there are more ranks than experts."""
    assert "only the first 1 dimension(s) can be sharded" in (sharding.stacks_on_second_dimension() or "")
    assert sharding.ending() in sharding.DOCUMENT.read_text(), "run python -m bench.sharding --write"
