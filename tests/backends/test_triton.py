"""The Triton backend without a GPU: parity in Triton's interpreter (triton_interpreted.py and its like, in a
process of their own), launches of real lists, and what is said where it cannot be had."""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfac import backends, matricize
from hfac.backends import triton as backend

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run_python(arguments, tmp_path, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["TRITON_CACHE_DIR"] = str(tmp_path)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=kept | environment, capture_output=True, text=True
    )


#: file -> which tests of other backends run once more with Triton's kernels, and of these the few in `make test`
STEPS = {
    "backends/test_clipped_steps": (
        "triton and not large",
        "triton and not (large or several-1.0 or several-nan or (refused_parameters and (0.3 or nan or propagate)) "
        "or (refused_parameter_keeps and (inf or 1e+19)) or (of_smaller and not float32) or power_of_two "
        "or (are_divided and 3.0 and dense) or (other_ops and smmf))",
    ),
    "backends/test_stored_steps": (
        "triton",
        "triton and ((rounded_weight and float32) or parts or random_bits or stays_one or SMMF-host "
        "or (any_layout and split8-shifted))",
    ),
    "backends/test_watched_steps": (
        "triton and not large",
        "triton and ((every_type and True) or after_its_norm or every_bit or report "
        "or (any_layout and (split8 or nearest)))",
    ),
    "optim/test_clipping": ("triton", "triton and (matrices or slices or that_unscale)"),
    "backends/test_captures": (
        "HFac and (no_gradient or transposed-found or negated-moved or clipped) or goes_with or on_parts_cannot "
        "or (defaults and device and plain) or (several_streams and plain) or (first_step and HFac and plain) or "
        "(without_a_step and SMMF)",
        "HFac and no_gradient or goes_with or on_parts_cannot",
    ),
    "optim/test_threads": ("own_statistics and triton", "own_statistics and triton"),
    "optim/test_watch": ("triton and (not_made or gone or slice or clipped)", "triton and slice"),
    "optim/test_whole_moments": (
        "triton and (published or bits or plain or maximize or skip or split)",
        "triton and published",
    ),
}
KERNELS, MORE = ["backends/triton_interpreted"], ["backends/triton_statistics"]
SLOW = pytest.mark.slow
#: in processes of their own, which two cores share
MORE_STEPS = {
    "clipped-steps": ["backends/test_clipped_steps"],
    "watched-steps": ["backends/test_watched_steps"],
    "stored-steps": ["backends/test_stored_steps"],
    "steps": [*MORE, *(file for file in STEPS if "backends/test_c" not in file and "ed_steps" not in file)],
    "captures": ["backends/test_captures"],
}


def of_steps(k, files):
    """The tests of `STEPS` in these files as pytest's -k takes them; of other files all."""
    names = [(file.split("/")[1], STEPS.get(file)) for file in files]
    return " or ".join(name if parts is None else f"({name} and ({parts[k]}))" for name, parts in names)


@pytest.mark.parametrize(
    ("files", "part", "mark"),
    [
        pytest.param(KERNELS, "", "not slow", id="kernels"),
        pytest.param([*MORE, *STEPS], of_steps(1, (*MORE, *STEPS)), "not slow", id="steps", marks=pytest.mark.partial),
        pytest.param(KERNELS, "HFac", "slow", id="more-of-HFac", marks=pytest.mark.slow),
        pytest.param(KERNELS, "not HFac", "slow", id="more-of-SMMF", marks=pytest.mark.slow),
        *(
            # Of tables every two values meet in one row: other backends step whole ones in seconds.
            pytest.param(files, of_steps(0, files), "not slow", id=f"more-{name}", marks=SLOW)
            for name, files in MORE_STEPS.items()
        ),
    ],
)
def test_parity_in_the_interpreter(files, part, mark, tmp_path):
    """In a process for many tests, because its start takes as long as some of them."""
    options = ["-q", "-p", "no:cacheprovider", "-k", part, "-m", mark]
    command = ["-m", "pytest", *options, *(f"tests/{file}.py" for file in files)]
    done = run_python(command, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def shapes_of(name):
    from bench import shapes

    return shapes.parse(name)


def plans(optimizer, shapes, dtype):
    """The plans of one step: of the factored parameters and of those with whole moments."""
    from bench import triton_plan

    return [made for made, _ in triton_plan.plans(optimizer, shapes, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "name", "most"),
    [
        ("HFac", "gpt2", 12),
        ("SMMF", "gpt2", 12),
        ("HFac", "resnet50", 20),
        ("SMMF", "resnet50", 20),
        ("HFac", "2000x 64x64", 12),
        ("SMMF", "2000x 64x64", 12),
        ("HFac", "400x 768 + 100x 64x64", 12),
        ("SMMF", "400x 768 + 100x 64x64", 12),
    ],
)
def test_launches_of_a_step(optimizer, name, most, dtype):
    """A list is a handful of launches, with every option that adds some; their number depends on what the kernels are
    compiled for, not on how many parameters there are."""
    shapes = shapes_of(name)
    launches = [launch for plan in plans(optimizer, shapes, dtype) for launch in plan.launches]
    assert len(launches) <= most, [launch.name for launch in launches]
    twice = [launch for plan in plans(optimizer, 2 * shapes, dtype) for launch in plan.launches]
    assert len(twice) == len(launches)
    for launch, double in zip(launches, twice, strict=True):
        assert len(double.tiles) == 2 * len(launch.tiles)


def plans_of_parts(shapes, dtype, ranks):
    """The plans of one step of H-Fac (sums, update; matrices only) and of SMMF on a rank's rows, the second rank's of
    so many."""
    from hfac.triton_kernels import plan

    sums, update, blocks = [], [], []
    for i, shape in enumerate(shapes):
        (rows, *_), numel = shape, math.prod(shape)
        slice, cut = numel // rows, -(-rows // ranks)
        mine = min(cut, rows - cut)
        k = matricize.cut(shape)
        if k is not None:
            m, n = mine * math.prod(shape[1:k]), math.prod(shape[k:])
            for items, param in ((sums, torch.float32), (update, dtype)):
                items.append(plan.Item(m, n, param, dtype, n % 8 == 0, all_rows=math.prod(shape[:k]), all_cols=n))
        n, m = matricize.square(numel)
        for block in matricize.blocks([(cut * slice, mine * slice)], m):
            item = plan.Item(block.rows, block.cols, dtype, dtype, slice=slice, owner=i, all_rows=n, all_cols=m)
            item.start, item.stride, item.row, item.row_step, item.col = block[:5]
            item.whole = item.signs != 3 and all(length % 8 == 0 for length in (block.cols, block.first, block.stride))
            blocks.append(item)
    ops = ("hfac_sums", sums), ("hfac_apply_", update), ("smmf_sums_step_", blocks)
    return [plan.make_plan(op, items) for op, items in ops]


def test_launches_of_a_sharded_step():
    """As few as of a whole one, however long the list and into how many blocks its parts fall."""
    for times in (1, 2):
        sums, update, smmf = plans_of_parts(times * shapes_of("gpt2"), torch.bfloat16, 8)
        assert [len(made.launches) for made in (sums, update, smmf)] == [3, 2, 3]
    blocks = [tiles for launch in smmf.launches if launch.name == "smmf_shard_fold" for tiles in launch.tiles]
    assert len(blocks) == len(set(blocks))  # no two programs add to the same sums


#: Launches of a plain step that clips its own update, of the lists of docs/launch-plan.md in float32 and bfloat16.
PLAIN = {
    ("llama-3-8b", "HFac"): (8, 8),
    ("llama-3-8b", "HFac-int8"): (8, 8),
    ("llama-3-8b", "SMMF"): (32, 32),
    ("gpt2", "HFac"): (8, 8),
    ("gpt2", "HFac-int8"): (8, 8),
    ("gpt2", "SMMF"): (4, 4),
    ("resnet50", "HFac"): (14, 14),
    ("resnet50", "HFac-int8"): (14, 14),
    ("resnet50", "SMMF"): (7, 7),
    ("2000x64x64", "HFac"): (4, 4),
    ("2000x64x64", "HFac-int8"): (4, 4),
    ("2000x64x64", "SMMF"): (3, 3),
}


@pytest.mark.parametrize(("name", "optimizer"), PLAIN)
def test_launches_do_not_grow(name, optimizer):
    """Whoever needs fewer lowers the numbers."""
    from bench import launch_plan, triton_plan

    shapes = launch_plan.shapes_of(name)
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        made = triton_plan.plans(optimizer, shapes, dtype)
        counts.append(sum(not x.when or "CLIPPED" in x.when for plan, _ in made for x in plan.launches))
    assert all(count <= most for count, most in zip(counts, PLAIN[name, optimizer], strict=True)), counts


def test_kernels_are_of_the_language_of_triton_3_3():
    """Which takes no chain of `and` or `or`, but in parentheses."""
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
                chains = [x for x in ast.walk(function) if isinstance(x, ast.BoolOp) and len(x.values) > 2]
                assert not chains, f"{path.name}: {function.name}: {ast.unparse(chains[0])}"


def test_divisions_are_products():
    """To the last of 2^31 numbers, of sizes around powers of two and others."""
    from hfac.triton_kernels import layouts

    top = (1 << 31) - 1
    sizes = {1 << k for k in range(31)} | {(1 << k) + d for k in range(2, 31) for d in (-1, 1)} | {3, 9, 4608, 50257}
    for size in sizes:
        factor = layouts.factor_of(size, top)
        shift, by = factor >> 32, factor & 0xFFFFFFFF
        assert factor < 1 << 63 and by << 32 >> 32 == by
        ends = {k * size + d for k in (0, 1, 2, top // size // 2, top // size) for d in (-1, 0, 1)} | {top}
        for n in ends:
            if 0 <= n <= top:
                assert n * by >> shift == n // size, (n, size)
    assert layouts.factor_of(3, 1 << 31) == layouts.factor_of(0, 5) == 0


def test_a_layout_is_there_once():
    from hfac.triton_kernels import layouts

    channels_last = layouts.merged_layout((4, 6, 3, 3), (54, 1, 18, 6))
    assert channels_last == [3, 9, 6, 6, 1, 4, 54]
    dims, *of = layouts.packed_layout(channels_last)
    assert dims == -3 and (of[::3], of[1::3]) == ([9, 6, 4], [6, 1, 54])
    assert layouts.packed_layout([1, 1 << 31, 2])[0] == 1  # offsets beyond 31 bits


def test_variants_are_bounded():
    """However many shapes a list has, the kernels that are compiled for it are few: what one type of parameters and
    gradients and one set of options can ask for."""
    shapes = [
        (rows, cols) for rows in (2, 3, 8, 24, 60, 100, 2048) for cols in (2, 9, 16, 63, 64, 200, 1000, 3000, 6000)
    ]
    shapes += [(n,) for n in (1, 7, 8, 9, 24, 1000, 4097, 65536)] + [(6, 4, 3, 3), (16, 3, 7, 7), (2, 3, 5, 7, 2)]
    for optimizer in ("HFac", "SMMF"):
        launches = [launch for plan in plans(optimizer, shapes, torch.bfloat16) for launch in plan.launches]
        assert len({(launch.name, *map(str, launch.constants.items())) for launch in launches}) <= 20


def test_partial_sums_are_bounded():
    """SMMF's take the same memory however long the list is; both optimizers' are a small share of the parameters."""
    from hfac.triton_kernels import plan

    shapes = 8 * [(8192, 8192)]
    elements = sum(map(math.prod, shapes))
    for optimizer in ("HFac", "SMMF"):
        (made,) = plans(optimizer, shapes, torch.bfloat16)
        assert made.workspace <= 0.1 * elements
    assert made.workspace <= plan.WORKSPACE


def test_partial_sums_of_a_long_list_take_fewer_tiles():
    """H-Fac's of Llama-3-8B would take 0.85 GB; the tiles of a matrix still cover it, and a matrix alone has enough to
    fill a GPU."""
    from hfac.triton_kernels import plan

    long, _ = plans("HFac", shapes_of("llama-3-8b"), torch.bfloat16)
    assert plan.HFAC_WORKSPACE / 2 < long.workspace <= plan.HFAC_WORKSPACE
    items = [plan.Item(4096, 4096, torch.bfloat16, torch.bfloat16) for _ in range(512)]
    for count in (1, 512):
        made = plan.make_plan("hfac_step_", items[:count])
        assert made.workspace <= plan.HFAC_WORKSPACE
        (stats,) = made.launches[: made.statistics]
        for item in items[:count]:
            assert item.row_tiles * item.stats_rows >= item.rows > (item.row_tiles - 1) * item.stats_rows
        assert len(stats.tiles) == sum(item.row_tiles for item in items[:count])
        assert item.stats_rows == 32 if count == 1 else item.stats_rows > 64


def test_statistics_of_a_short_list_fill_a_gpu():
    """As far as tiles of 16 rows, or of the rows in flight, do; a list that fills it is cut by its shapes alone."""
    from hfac.triton_kernels import items, plan

    def rows_of(*shapes):
        made = [plan.Item(*shape, torch.bfloat16, torch.bfloat16) for shape in shapes]
        (*stats,) = plan.make_plan("hfac_step_", made).launches[:1]
        assert sum(len(launch.tiles) for launch in stats) == sum(item.row_tiles for item in made)
        return [item.stats_rows for item in made], sum(item.row_tiles for item in made)

    assert rows_of((4096, 4096)) == ([32], plan.ENOUGH)
    assert rows_of((768, 768)) == ([items.FEWEST_ROWS], 48)
    assert rows_of((4096, 64)) == ([64], 64)
    alone = plan.Item(768, 768, torch.bfloat16, torch.bfloat16)
    items.cut_stats(alone)
    assert rows_of(*[(768, 768)] * 48)[0] == 48 * [alone.stats_rows] != 48 * [items.FEWEST_ROWS]


#: Columns -> at most so much of the statistics' tiles is beyond the last of them; of other kernels' an eighth.
BEYOND = {cols: 1 / 4 for cols in (64, 256, 512, 768, 1024, 1536, 1600, 2048, 3072, 4096, 6400, 14336)}
BEYOND |= {1280: 3 / 8, 2304: 7 / 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_fit_the_columns_of_usual_models(dtype):
    """All lanes of a tile compute, those beyond the last column for nothing."""
    from hfac.triton_kernels import plan

    for cols, most in BEYOND.items():
        item = plan.Item(max(4096, 1 << 22 // cols), cols, dtype, dtype, slice=8)
        for op in ("hfac_step_", "smmf_step_"):
            for launch in plan.make_plan(op, [item]).launches:
                width = launch.constants.get("C")
                if width:
                    beyond = 1 - cols / (width * -(-cols // width))
                    assert beyond <= (most if launch.name == "hfac_stats" else 1 / 8), (cols, launch.name, width)


def test_small_matrices_share_a_launch_of_their_statistics():
    """Which would take longer than what a tile that fits saves."""
    from hfac.triton_kernels import items, plan

    for rows, launches in ((1024, 1), (items.FINE // 512, 2)):
        both = [plan.Item(rows, cols, torch.bfloat16, torch.bfloat16) for cols in (512, 1024)]
        assert plan.make_plan("hfac_step_", both).statistics == launches


def test_rows_of_32_bits_whose_signs_are_bytes_have_narrow_tiles():
    """In wider ones Triton 3.9 spills registers (docs/triton-check.md)."""
    from hfac.triton_kernels import plan

    for low, dtype in ((0, torch.float32), (16, torch.bfloat16)):
        for slice, tile in ((1, (16, 64)), (8, (16, 128))):
            item = plan.Item(256, 256, dtype, dtype, slice=slice, low=low)
            (tiles,) = (x for x in plan.make_plan("smmf_step_", [item]).launches if x.name == "smmf_tiles")
            assert (tiles.constants["R"], tiles.constants["C"]) == tile
            assert len(tiles.tiles) == item.row_tiles * item.col_tiles == 4 * 256 // tile[1]


def test_a_vector_is_totalled_once():
    """And not by every program of its step."""
    from hfac.triton_kernels import plan

    items = [plan.Item(count, 1, torch.float32, torch.float32) for count in (1 << 20, 24)]
    launches = plan.make_plan("hfac_dense_step_", items).launches
    assert [launch.name for launch in launches] == ["hfac_dense_look", "hfac_dense_total", "hfac_dense"]
    assert launches[1].tiles == [(0, 0), (1, 0)] and launches[1].when == ("CLIPPED",)
    runs = -(-items[0].elements // 2048)
    assert items[1].spaces["space_totals"] >= 4 * (runs + 1)


def test_every_tile_is_taken_once():
    """Each kernel's tiles cover each matrix without overlap."""
    from hfac.triton_kernels import plan

    items = [plan.Item(rows, cols, torch.float32, torch.float32, slice=8) for rows, cols in ((6216, 6208), (72, 24))]
    for launch in plan.make_plan("smmf_step_", items).launches:
        if launch.name == "smmf_tiles":
            for i, item in enumerate(items):
                parts = [part for index, part in launch.tiles if index == i]
                assert sorted(parts) in ([], list(range(item.row_tiles * item.col_tiles)))
                if parts:
                    assert item.row_tiles * item.tile_rows >= item.rows > (item.row_tiles - 1) * item.tile_rows
                    assert item.col_tiles * launch.constants["C"] >= item.cols


def test_two_pieces_are_cut_as_float32():
    """Tilings and kernels' shapes of a float32 in two pieces are a float32's; random bits made one by one may take
    other rows in flight. The update, which sums nothing, has half as many of two pieces that are read one by one."""
    from hfac.triton_kernels import plan, table

    shapes = [(6216, 6208), (72, 24), (17, 19), (3, 4097), (300, 60)]
    for op in ("smmf_step_", "hfac_step_", "smmf_dense_step_", "hfac_dense_step_"):
        found = []
        for dtype, low in ((torch.float32, 0), (torch.bfloat16, 16)):
            items = [
                plan.Item(rows, cols, dtype, dtype, whole=cols % 8 == 0, slice=8 if "smmf" in op else 0, low=low)
                for rows, cols in shapes
            ]
            launches = plan.make_plan(op, items).launches
            kept = ("R", "C", "T", "WHOLE", "LAYOUT")
            found.append([(x.name, x.tiles, {k: x.constants.get(k) for k in kept}) for x in launches])
            for name, _, constants in found[-1]:
                if low and name == "hfac_update" and not constants["WHOLE"]:
                    constants["R"] *= 2
            assert {x.constants["LOW"] for x in launches if "LOW" in x.constants} == {low}
        assert found[0] == found[1]
    item = plan.Item(64, 60, torch.bfloat16, torch.bfloat16, whole=False, stochastic=table.EACH.value)
    assert plan.make_plan("smmf_step_", [item]).launches[1].constants["R"] == plan.SMMF_TILES[0][0] // 4


def test_how_random_bits_are_made():
    from hfac.triton_kernels import table
    from hfac.triton_kernels.layouts import bits_of, merged_layout

    for shape, strides, first, whole, wanted in (
        ((4, 16), None, 8, True, table.EIGHT),
        ((4, 16), None, 4, True, table.EACH),
        ((4, 16), None, 8, False, table.EACH),
        ((4, 16), (16, 1), 8, True, table.EIGHT),
        ((4, 16), (24, 1), 8, True, table.EIGHT_APART),
        ((2, 4, 16), (240, 24, 1), 0, True, table.EIGHT_APART),
        ((4, 16), (20, 1), 8, True, table.EACH),
        ((16, 16), (1, 16), 0, True, table.EACH),
        ((4, 4, 2), (8, 2, 1), 0, True, table.EIGHT),
        ((4, 4, 2), (16, 4, 1), 0, True, table.EACH),
    ):
        layout = [0] if strides is None else merged_layout(shape, strides)
        assert bits_of(layout, first, whole) == wanted.value, (shape, strides, first, whole)


def test_strides_are_merged():
    from hfac.triton_kernels.layouts import merged_layout

    assert merged_layout((4, 6), (6, 1)) == [1, 24, 1]
    assert merged_layout((4, 6), (1, 4)) == [2, 6, 4, 4, 1]
    assert merged_layout((2, 3, 4, 5), (60, 1, 15, 3)) == [3, 20, 3, 3, 1, 2, 60]
    assert merged_layout((4, 1, 6), (0, 7, 0)) == [1, 24, 0]
    assert merged_layout((1,), (5,)) == [0]


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' was asked for.*interpreter.*backend='auto'"):
        backends.resolve("triton", CPU)
    assert "triton" not in backends.available(CPU)


def test_auto_never_takes_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.available(CPU)[-1] == "triton"
    assert backends.resolve("auto", CPU) is not backend


def test_gpu_tensors_refuse_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "Unset it" in backend.why_not(torch.device("cuda"))


def test_gpu_tensors_need_a_driver(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_driver", lambda: "RuntimeError: 0 active drivers")
    assert "no driver for a GPU here (RuntimeError: 0 active drivers)" in backend.why_not(torch.device("cuda"))
    monkeypatch.setattr(backend, "_driver", lambda: None)
    for version in ("3.2.0", "2.3.1+git"):
        monkeypatch.setattr(backend, "_version", lambda version=version: version)
        assert f"Triton {version} is installed, and the kernels need 3.3 or later" in backend.why_not(
            torch.device("cuda")
        )
    monkeypatch.setattr(backend, "_version", lambda: "3.10.0a1+rocm")
    assert backend.why_not(torch.device("cuda")) is None
    assert backend.why_not(torch.device("xpu")) is None
    assert "not on mps" in backend.why_not(torch.device("mps"))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.why_not(torch.device("cuda"))


def test_cuda_comes_before_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_driver", lambda: None)
    assert list(backends.TABLE).index("cuda") < list(backends.TABLE).index("triton")
    assert "triton" in backends.available(torch.device("cuda"))


def test_choosing_a_backend_loads_no_kernels(tmp_path):
    """torch itself imports triton sooner or later; the kernels are loaded by the first step that takes them."""
    code = "import sys, hfac, torch; optimizer = hfac.HFac([torch.ones(4, 3, requires_grad=True)]); "
    code += "from hfac import backends; backends.available(torch.device('cpu')); "
    code += "sys.exit('hfac.triton_kernels' in sys.modules)"
    assert run_python(["-c", code], tmp_path).returncode == 0
