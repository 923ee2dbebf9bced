"""The model of launches on a GPU that is not there: times of multiprocessors and launches, rows, budgets.

Blocks stand in for those that a walk would find (test_walk.py), so that nothing has to be compiled.
"""

import json
import shutil
import sys

import pytest

from bench import budgets, launch_model, launch_plan
from bench.cubin import Code
from bench.launch_model import Model, Walked
from bench.multiprocessor import GPUS, ISSUE_SHARE, cycles, makespan
from bench.walk import Load, Wait, Warp

H200 = GPUS["h200"]


def warp(*events):
    return Warp(events=list(events))


END = Wait(0, 0, -2)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 128, 17408, 2),  # smmf_tiles: 64 K registers
        (512, 118, 25600, 1),  # hfac_stats: 120 each, of which 16 warps take 60 K
        (256, 245, 25600, 1),
        (256, 96, 9216, 2),
        (256, 32, 2052, 8),  # 2048 threads
        (64, 32, 100 << 10, 2),  # shared memory
        (32, 16, 0, 32),  # no more blocks than that
    ],
)
def test_blocks_that_a_multiprocessor_holds(threads, registers, shared, blocks):
    assert H200.resident(threads, registers, shared) == blocks


def test_a_load_is_waited_for_where_it_is_used():
    """3 instructions at 75 % of one a cycle, then the load, then one that uses it."""
    assert cycles([[warp(Load(3, 3, 1, None, 512), Wait(1, 1, 1), END)]], 1000) == 4 + 1000
    assert cycles([[warp(Load(3, 3, 1, 36, 512), Wait(60, 60, 1), END)]], 1000) == pytest.approx(4 + 60 / ISSUE_SHARE)


def test_warps_meet_at_a_barrier():
    """The second warp has nothing to do until the first is there; they have a scheduler each."""
    first, second = warp(Wait(75, 75, -1), Wait(3, 3, -2)), warp(Wait(0, 0, -1), Wait(30, 30, -2))
    assert cycles([[first, second]], 0) == 100 + 40
    assert cycles([[first], [second]], 0) == 100 + 4  # another block does not wait


def test_warps_of_one_scheduler_take_turns():
    one = warp(Wait(75, 75, -2))
    assert cycles([[one] * 4], 0) == 100
    assert cycles([[one] * 5], 0) == pytest.approx(200)


def test_results_that_are_needed_take_their_time():
    assert cycles([[warp(Wait(3, 50, -2))]], 0) == 50


def test_a_warp_that_is_done_is_not_waited_for():
    assert cycles([[warp(Wait(0, 0, -2)), warp(Wait(3, 3, -1), Wait(3, 3, -2))]], 0) == 8


def test_blocks_are_taken_in_their_order():
    assert makespan([(3, 2.0)], 2) == 4
    assert makespan([(1, 5.0), (2, 1.0)], 2) == 5
    assert makespan([(1001, 1.0)], 10) == 101  # as many whole rounds as there are, and one more
    assert makespan([(1, 7.0), (1000, 1.0)], 10) == pytest.approx(101, abs=1)


def block_of(instructions, in_flight=10_000, lasting=3500):
    numbers = dict.fromkeys(launch_model._COUNTS, 0.0) | {"instructions": instructions, "in_flight": in_flight}
    return Walked(**numbers, undecided=0, cycles=dict.fromkeys(range(1, 33), lasting))


@pytest.fixture
def model(monkeypatch):
    """Blocks of 128 registers a thread that execute 6,000 instructions and take 3,500 cycles, 2 microseconds."""
    try:
        launch_plan.native()
    except SystemExit as error:
        pytest.skip(str(error))
    monkeypatch.setattr(launch_model, "code_of", lambda launch, arch: Code("kernel", 128, 1024, 0, ""))
    monkeypatch.setattr(Model, "_walk", lambda self, *given: block_of(6000))
    monkeypatch.setattr(Model, "_small", lambda self, *given: block_of(6000))
    return Model(H200)


def test_a_launch_takes_the_largest_of_four_times(model):
    (small,) = [
        x for x in launch_plan.predicted("64x64", "HFac", "bfloat16", H200).launched if x.kernel == "hfac_small"
    ]
    assert small.blocks == 1 and small.bound == "waves" and small.seconds == pytest.approx(2e-6)
    assert small.times["issue"] == pytest.approx(6000 / (132 * 3 * 1.75e9))
    assert small.times["latency"] == pytest.approx(2e-6 / (132 * 2))
    large = launch_plan.predicted("65536x64", "SMMF", "bfloat16", H200).launched
    (tiles,) = [x for x in large if x.kernel == "smmf_tiles"]
    assert tiles.resident == 2 and tiles.in_flight == 20_000
    assert tiles.times["waves"] == pytest.approx(2e-6 * -(-tiles.blocks // 264))
    assert tiles.times["bytes"] == tiles.bytes / 4.3e12
    assert tiles.instructions == 6000 * tiles.blocks and tiles.elements == 65536 * 64


def test_a_block_of_small_matrices_is_one_walk(model, monkeypatch):
    """Eight to a block, but for the last, which are other launches' ninth tiles; others' tiles follow."""
    walked = []

    def small(self, code, image, k, launch, items, shapes, block, residents):
        walked.append((block, items, [*shapes]))
        return block_of(1000 * len(items))

    monkeypatch.setattr(Model, "_small", small)
    monkeypatch.setitem(launch_plan.LISTS, "mixed", lambda: [(512, 64), *[(64, 64)] * 9, (16, 16)])
    (tiles,) = launch_plan.predicted("mixed", "SMMF", "bfloat16", H200).launched
    assert walked == [(0, [*range(1, 9)], [(64, 64)] * 8), (1, [9, 10], [(64, 64), (16, 16)])]
    assert tiles.blocks == 3 and tiles.elements == 512 * 64 + 9 * 64 * 64 + 16 * 16
    assert tiles.instructions == 8000 + 2000 + 6000 and tiles.seconds == pytest.approx(2e-6)


def test_long_tiles_are_a_line_through_two_walks(model, monkeypatch):
    """16 and 32 rows of the 4096 columns' tile are walked; the rest is as if each row took 100 instructions more."""
    walked = []

    def walk(self, code, image, k, launch, item, shape, position, rows, last, residents):
        walked.append(rows)
        return block_of(1000 + 100 * (rows or 0), lasting=70 * (rows or 1))

    monkeypatch.setattr(Model, "_walk", walk)
    found = launch_plan.predicted("16384x4096", "HFac", "bfloat16", H200).launched
    (stats,) = [launch for launch in found if launch.kernel == "hfac_stats"]
    assert walked[:2] == [16, 32]
    assert stats.instructions == pytest.approx(256 * 1000 + 16384 * 100)
    assert stats.times["waves"] == pytest.approx(70 * 16384 / stats.blocks / 1.75e9)


def test_warps_without_rows_are_walked_by_themselves(monkeypatch):
    """Of 256 threads 192 share a row of 3072 columns, two vectors each: two warps of eight have nothing to do."""

    def keys(columns, lanes):
        monkeypatch.setattr(Model, "_tiling", lambda self, image, field, item: (32, columns, 1, 1, lanes))
        return Model(H200)._alike({}, "tiling", 0, 256, (64, columns), 32)

    assert keys(4096, 256) == [0, 1, -1, -1, -1, -1, -1, -1]
    assert keys(3072, 192) == [0, 1, -1, -1, -1, -1, 6, 7]


def test_a_tensors_last_block_goes_on_alone(model, monkeypatch):
    def walk(self, code, image, k, launch, item, shape, position, rows, last, residents):
        return block_of(100, lasting=8750 if last else 1750)

    monkeypatch.setattr(Model, "_walk", walk)
    monkeypatch.setattr(launch_model, "_LAST", ("smmf_fold",))  # one that there is for sure
    found = launch_plan.predicted("4096x4096", "SMMF", "bfloat16", H200).launched
    (fold,) = [launch for launch in found if launch.kernel == "smmf_fold"]
    assert fold.blocks == 64 and fold.seconds == pytest.approx(5e-6)
    assert fold.instructions == 64 * 100  # the last is one of them


def test_what_the_last_block_does_alone_is_measured_by_its_own_kind(model, monkeypatch):
    """Of 8192 x 128 a block of the fold has rows and columns, 31 have rows alone and are done soon."""

    def walk(self, code, image, k, launch, item, shape, position, rows, last, residents):
        return block_of(100, lasting=7000 if last else 5250 if position == 0 else 1750)

    monkeypatch.setattr(Model, "_walk", walk)
    found = launch_plan.predicted("8192x128", "HFac", "bfloat16", H200).launched
    (fold,) = [launch for launch in found if launch.kernel == "hfac_fold"]
    assert fold.blocks == 32 and fold.seconds == pytest.approx(4e-6)


def test_a_launch_from_the_end_takes_its_blocks_from_the_end(model, monkeypatch):
    """Of gradients that do not fit the cache, whose update begins with the second matrix."""
    orders = {}

    def walk(self, code, image, k, launch, item, shape, position, rows, last, residents):
        return block_of(100, lasting=1750 * (item + 1))

    def record(durations, slots):
        orders.setdefault(len(orders), [seconds for _, seconds in durations])
        return 1e-6

    monkeypatch.setattr(Model, "_walk", walk)
    monkeypatch.setattr(launch_model, "makespan", record)
    monkeypatch.setitem(launch_plan.LISTS, "two", lambda: [(8192, 4096), (8192, 4096)])
    found = launch_plan.predicted("two", "HFac", "float32", H200).launched
    assert [launch.kernel for launch in found] == ["hfac_stats", "hfac_fold", "hfac_update"]
    assert orders[0] == sorted(orders[0]) and orders[2] == sorted(orders[0], reverse=True)


def command(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["launch_plan", *given])
    launch_plan.main()


def test_json_rows(model, monkeypatch, capsys, tmp_path):
    command(monkeypatch, "64x64", "4096x4096", "--gpu", "h200", "h100", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 2 * 2 * 3 * 2  # lists, GPUs, optimizers, types
    for row in rows:
        assert [*row] == ["parameters", "optimizer", "dtype", "gpu", "launches", "bytes_per_param", "ms", "kernels"]
        columns = "kernel launches blocks_least blocks_median registers resident in_flight_kb instructions_per_element"
        for kernel in row["kernels"]:
            assert [*kernel] == [*columns.split(), "bound", "ms"] and kernel["bound"] in launch_model.TIMES
        assert row["launches"] == sum(kernel["launches"] for kernel in row["kernels"])
        total = sum(kernel["ms"] for kernel in row["kernels"]) + 3e-3 * row["launches"]
        assert row["ms"] == pytest.approx(total)
    command(monkeypatch, "64x64", "--json", "--optimizer", "SMMF", "--dtype", "float32")
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["parameters"], row["optimizer"], row["dtype"], row["gpu"]) == ("64x64", "SMMF", "float32", "h200")


@pytest.mark.parametrize("name", ["4096", "0x64", "64x64x64", "llama"])
def test_lists_are_named_or_one_matrix(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, name, "--json")
    assert stopped.value.code == 2
    assert "required is one of llama-3-8b, gpt2, resnet50, 2000x64x64, or ROWSxCOLUMNS" in capsys.readouterr().err


def row_of(**changed):
    row = dict(instructions_per_element=19.0, in_flight_kb=32.8, blocks_least=16, local=0, undecided=0)
    return row | changed


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (dict(instructions_per_element=19.2), "19.20 instructions per element, more than 19.1"),
        (dict(in_flight_kb=32.0), "32.0 KB in flight, less than 32.7"),
        (dict(blocks_least=15), "15 blocks in the smallest launch, less than 16: multiprocessors are idle"),
        (dict(local=1), "local memory"),
        (dict(undecided=2), "2 branches were not decided"),
    ],
)
def test_a_budget_is_exceeded(changed, says):
    budget = budgets.Budget("4096x4096", "HFac", "bfloat16", "hfac_stats", (19.1, 13.5), (32.7, 40), (16, 264))
    assert list(budget.faults(row_of())) == []
    (fault,) = budget.faults(row_of(**changed))
    assert says in fault and fault.startswith("hfac_stats of HFac for 4096x4096 in bfloat16: ")


def test_the_check_fails_where_a_budget_is_exceeded(model, monkeypatch, capsys):
    """6,000 instructions of a warp for 64 x 64 elements, and one block of the 132 that there could be."""
    of_element = 6000 * 32 / 4096
    kept = budgets.Budget("64x64", "HFac", "float32", "hfac_small", (of_element, 1), (20.0, 40), (1, 264))
    for budget, status in (
        (kept, 0),
        (budgets.Budget("64x64", "HFac", "float32", "hfac_small", (of_element - 0.1, 1)), 1),
        (budgets.Budget("64x64", "HFac", "float32", "hfac_small", (50, 1), None, (2, 264)), 1),
        (budgets.Budget("64x64", "HFac", "float32", "hfac_updates", (50, 1)), 1),  # of no kernel
    ):
        monkeypatch.setattr(budgets, "BUDGETS", (budget,))
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, "--check")
        assert stopped.value.code == status
        assert f"1 budgets, {status} exceeded" in capsys.readouterr().out


def test_targets_stand_beside_budgets_that_miss_them(monkeypatch):
    missed = budgets.Budget("64x64", "HFac", "float32", "hfac_update", (20, 15.5), (65.5, 40), (32, 264))
    monkeypatch.setattr(budgets, "BUDGETS", (missed,))
    assert "| 20 (15.5) | 65.5 | 32 (264) |" in budgets.table()


@pytest.mark.slow  # compiles the kernels of a plain step
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_the_kernels_keep_their_budgets():
    mine = [budget for budget in budgets.BUDGETS if budget.parameters == "4096x4096" and budget.dtype == "bfloat16"]
    assert {budget.kernel for budget in mine} == {"hfac_stats", "hfac_update", "hfac_int8_update", "smmf_tiles"}
    assert list(budgets.faults(mine)) == []
