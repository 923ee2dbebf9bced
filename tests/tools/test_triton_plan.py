"""The model of a step by the Triton kernels: launches, bytes and programs, with nothing compiled."""

import math

import pytest
import torch

pytest.importorskip("triton")

from hfac.triton_kernels import plan as triton_kernels_plan  # noqa: E402

from bench import launch_model, launch_plan, triton_check, triton_cost, triton_plan  # noqa: E402
from bench.cubin import Code  # noqa: E402
from bench.launch_model import Walked  # noqa: E402

LISTS = [*launch_plan.LISTS, "4096x4096"]
EACH = [(name, optimizer) for name in LISTS for optimizer in launch_plan.OPTIMIZERS]


@pytest.fixture
def model(monkeypatch):
    """Whose programs execute an instruction in all, and take a microsecond."""
    counts = dict.fromkeys(launch_model._COUNTS, 0.0) | {"instructions": 1.0}

    def walked(self, code, launch, item, index, rows, residents):
        return Walked(**counts, undecided=0, cycles={n: 1e-6 * self.gpu.clock for n in residents})

    monkeypatch.setattr(triton_plan.Model, "_code", lambda self, launch: (Code("", 128, 0, 0, ""), 1024))
    monkeypatch.setattr(triton_plan.Model, "_block", walked)
    return triton_plan.Model()


def plain_launches(name, optimizer, dtype=torch.bfloat16):
    plans = triton_plan.plans(optimizer, launch_plan.shapes_of(name), dtype)
    return [x for made, _ in plans for x in made.launches if not x.when or "CLIPPED" in x.when]


@pytest.mark.parametrize(("name", "optimizer"), EACH)
def test_every_program_of_every_launch_counts(model, name, optimizer):
    """Whatever stands for them when they are walked."""
    step = triton_plan.predicted(name, optimizer, "bfloat16", model)
    launches = plain_launches(name, optimizer)
    assert step.launches == len(launches)
    assert sum(x.blocks * x.launches for x in step.launched) == sum(len(x.tiles) for x in launches)
    assert sum(x.instructions * x.launches for x in step.launched) == sum(len(x.tiles) for x in launches)


@pytest.mark.parametrize("dtype", launch_plan.DTYPES)
@pytest.mark.parametrize(("name", "optimizer"), EACH)
def test_bytes_are_those_of_the_algorithm(model, name, optimizer, dtype):
    """SMMF reads the gradient once and the weight twice, and 2 bits of signs; H-Fac the gradient twice, and three times
    where rows are long; beside it the sums of tiles. Of ResNet-50 and 2,000 small matrices these are more."""
    step = triton_plan.predicted(name, optimizer, dtype, model)
    size = getattr(torch, dtype).itemsize
    exact = 3 * size + 0.25 if optimizer == "SMMF" else 4 * size + 2 * (optimizer == "HFac-int8")
    assert exact - 0.01 <= step.bytes_per_param <= exact + 1.6 + 0.25 * size * (optimizer != "SMMF")


def test_rows_of_tiles_are_all_rows():
    """4,100 rows are 33 tiles of at most 128, which are walked for their mean."""
    item = triton_kernels_plan.Item(4100, 4096, torch.bfloat16, torch.bfloat16, slice=8)
    made = triton_kernels_plan.make_plan("smmf_step_", [item])
    tiles = next(x for x in made.launches if x.name == "smmf_tiles")
    found = list(triton_plan._classes(tiles, item, len(tiles.tiles)))
    assert sum(n for n, _, _ in found) == len(tiles.tiles)
    assert sum(n * rows for n, _, rows in found) == pytest.approx(item.rows * item.col_tiles)
    assert [index for _, index, _ in found] == [0, item.col_tiles - 1]


def test_launches_that_are_alike_are_one(model):
    """Llama-3-8B is stepped in groups, by SMMF."""
    step = triton_plan.predicted("llama-3-8b", "SMMF", "bfloat16", model)
    assert len(step.launched) < step.launches
    one = step.launched[0]
    assert step.milliseconds > 1e3 * one.seconds * one.launches
    assert one.times["bytes"] == pytest.approx(one.bytes / triton_cost.GPU.copy)


def test_the_cuda_kernels_stand_beside(model):
    names = "gpt2", "HFac", "float32"
    step = triton_plan.predicted(*names, model)
    other = launch_plan.Step(*names, triton_cost.GPU, step.bytes_per_param, step.launched[:1])
    elsewhere = launch_plan.Step(*names, launch_plan.GPUS["a100"], step.bytes_per_param, step.launched[:1])
    row = triton_plan.beside([step], [elsewhere, other]).splitlines()[-1]
    assert row.count("|") == 9 and f"{step.milliseconds / other.milliseconds:.2f}" in row
    assert triton_plan.beside([step], [elsewhere]).splitlines()[-1].endswith("| | |")


def test_bytes_of_every_kernel_that_a_step_launches_are_known():
    for optimizer in launch_plan.OPTIMIZERS:
        for made, items in triton_plan.plans(optimizer, launch_plan.shapes_of("gpt2"), torch.float32):
            for launch in made.launches:
                if launch.name != "look":
                    assert math.isfinite(triton_cost.moved(launch.name, items[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["hfac_step_", "hfac_int8_step_", "smmf_step_", "hfac_sums", "smmf_sums_step_"])
def test_whatever_a_plain_step_launches_is_checked(op, dtype):
    """`make triton-check` compiles it, whatever the matrix and however its signs lie."""
    compiled = {(variant.kernel, variant.label) for variant in triton_check.variants()}
    for cols in (8, 64, 72, 256, 512, 768, 1024, 2048, 2304, 4096, 4104, 16384):
        for rows in (64, 1 << 15):
            for slice in (1, 8) if "smmf" in op else (0,):
                item = triton_kernels_plan.Item(rows, cols, dtype, dtype, slice=slice, codes="int8" in op)
                for launch in triton_kernels_plan.make_plan(op, [item]).launches:
                    plain = triton_check.plain(launch)
                    assert (plain.kernel, plain.label) in compiled, (rows, cols, plain.label)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["hfac_step_", "hfac_int8_step_", "smmf_step_", "hfac_sums", "smmf_sums_step_"])
def test_a_program_fits_a_multiprocessor(op, dtype):
    """One whose lanes may have more registers than there are is compiled, and not launched."""
    for cols in (64, 256, 512, 1024, 2048, 4096, 16384):
        for whole, aligned in ((True, 16), (True, dtype.itemsize), (False, 16)):
            item = triton_kernels_plan.Item(1 << 13, cols, dtype, dtype, whole, 8 * ("smmf" in op), aligned=aligned)
            item.codes = "int8" in op
            for launch in triton_kernels_plan.make_plan(op, [item]).launches:
                constants = triton_check.plain(launch, SCALED=True, WATCH=True).constants
                options = triton_kernels_plan.compile_options(constants, launch.warps, "cuda")
                assert 32 * options["num_warps"] * options["maxnreg"] <= 1 << 16, (launch.name, constants, options)


def test_elements_of_many_rows_have_as_many_waves():
    """On AMD's GPUs a row's mask that all lanes share takes a register of the wave: of 16 rows they spilled."""

    def waves(aligned):
        item = triton_kernels_plan.Item(4096, 16384, torch.bfloat16, torch.bfloat16, aligned=aligned)
        launch = triton_kernels_plan.make_plan("hfac_step_", [item]).launches[0]
        return triton_kernels_plan.compile_options(launch.constants, launch.warps, "hip")["num_warps"]

    assert (waves(16), waves(2)) == (4, 8)


def test_an_update_read_element_by_element_has_fewer_rows_of_two_pieces():
    """Two addresses of each element are too many for as many."""

    def rows(low, whole):
        item = triton_kernels_plan.Item(4096, 4096, torch.bfloat16, torch.bfloat16, whole, low=low)
        launches = triton_kernels_plan.make_plan("hfac_step_", [item]).launches
        return next(x.constants["R"] for x in launches if x.name == "hfac_update")

    assert (rows(0, False), rows(16, False), rows(16, True)) == (8, 4, 16)
