"""The plan of launches: few enough of them, and no more bytes than the algorithms need. Needs no GPU."""

import math
import struct

import pytest

from bench import launch_plan
from bench.shapes import gpt2, llama3_8b, resnet50

try:
    native = launch_plan.native()
except SystemExit as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("algorithm", ["hfac", "smmf"])
def test_gpt2_takes_at_most_twenty_launches(algorithm, dtype):
    launches = launch_plan.plan(algorithm, gpt2(), dtype)
    assert len(launches) <= 20, [launch["kernel"] for launch in launches]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_of_all_lengths_share_a_launch(dtype):
    """GPT-2's of 768, 2304 and 3072 columns; vectors have their own step."""
    found = [launch["kernel"] for launch in launch_plan.plan("hfac", gpt2(), dtype)]
    assert found == ["hfac_stats", "hfac_fold", "hfac_update", "hfac_dense"]
    shapes = [(512, 64), (512, 768), (512, 4096), (512, 8192), (512, 16384), (512, 20000)]
    stats = [la for la in launch_plan.plan("hfac", shapes, dtype) if la["kernel"] == "hfac_stats"]
    assert [la["width"] for la in stats] == ["rows", "four", "long", "wide"]


@pytest.mark.parametrize(("algorithm", "most"), [("hfac", 8.15), ("smmf", 6.5)])
def test_llama_moves_few_bytes(algorithm, most):
    shapes = llama3_8b()
    assert len(shapes) == 291 and sum(map(math.prod, shapes)) == 8_030_261_248
    assert launch_plan.summary(launch_plan.plan(algorithm, shapes, "bfloat16"), shapes)["bytes"] <= most


@pytest.mark.parametrize("algorithm", ["hfac", "smmf"])
def test_every_element_is_counted_once(algorithm):
    shapes = [(300, 2104), (127, 129), (9000,), (64, 3, 7, 7), (5, 0), ()]
    launches = launch_plan.plan(algorithm, shapes, "float32")
    bytes_ = 4 * sum(map(math.prod, shapes))
    assert sum(launch["param_written"] for launch in launches) == bytes_
    assert sum(launch["param_read"] for launch in launches) == bytes_


def plan_of_codes(shapes, dtype):
    """Of matrices whose first moment is whole, in 8 bits."""
    rows, cols = zip(*shapes, strict=True)
    return native.cuda_plan(op="hfac_int8_step", rows=rows, cols=cols, param_dtypes=dtype, grad_dtypes=dtype)[
        "launches"
    ]


@pytest.mark.parametrize(("dtype", "least"), [(1, 10), (0, 18)], ids=["bfloat16", "float32"])
def test_codes_of_8_bits_move_few_bytes(dtype, least):
    """The gradient twice, of which the cache has some, parameters and codes read and written; sums are the rest."""
    matrices = [shape for shape in llama3_8b() if len(shape) > 1]
    found, numel = plan_of_codes(matrices, dtype), sum(map(math.prod, matrices))
    assert least <= sum(launch["bytes"] + launch["grad_from_cache"] for launch in found) / numel <= least + 0.2
    assert {launch["kernel"] for launch in found} == {"hfac_stats", "hfac_int8_fold", "hfac_int8_update"}
    for part in ("param_read", "param_written"):
        assert sum(launch[part] for launch in found) == numel * (least - 2) // 4


def test_codes_of_8_bits_occupy_every_multiprocessor():
    """Of an H200, 132, with two blocks each, by one matrix alone."""
    found = plan_of_codes([(4096, 4096)], 1)
    assert [launch["blocks"] for launch in found if launch["kernel"] == "hfac_int8_update"] == [256]


def test_two_thousand_small_matrices_take_few_launches():
    shapes = [(64, 64)] * 2000
    assert [la["kernel"] for la in launch_plan.plan("hfac", shapes, "bfloat16")] == ["hfac_small"]
    assert [la["kernel"] for la in launch_plan.plan("hfac_int8", shapes, "bfloat16")] == ["hfac_int8_small"]
    assert len(launch_plan.plan("hfac", shapes, "bfloat16", norm=True)) <= 6
    (smmf,) = launch_plan.plan("smmf", shapes, "bfloat16")
    assert (smmf["kernel"], smmf["blocks"], smmf["small_blocks"]) == ("smmf_tiles", 250, 250)  # a warp each


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("algorithm", ["hfac", "hfac_int8"])
def test_a_matrix_that_a_block_holds_takes_one_launch(algorithm, dtype):
    """Gradient, parameter, factors and codes are read once, and nothing goes through a workspace."""
    for shape in [(64, 64), (16, 256), (32, 128), (3, 8)]:
        (launch,) = launch_plan.plan(algorithm, [shape], dtype)
        assert launch["kernel"] == f"{algorithm}_small" and launch["blocks"] == 1
        states = 4 * 4 * sum(shape) if algorithm == "hfac" else 2 * 4 * sum(shape) + 2 * math.prod(shape)
        assert launch["partial"] == 0 and launch["states"] == states
        assert launch["grad"] == launch["param_read"] == math.prod(shape) * (2 if dtype == "bfloat16" else 4)
    for shape in [(65, 64), (17, 256), (8, 264), (40, 60)]:  # one row more, of more than a warp, of no whole vectors
        assert launch_plan.plan(algorithm, [shape], dtype)[0]["kernel"] == "hfac_stats"
    assert {la["kernel"] for la in launch_plan.plan(algorithm, [(64, 64)], dtype, norm=True)} >= {"hfac_stats"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("algorithm", ["hfac", "hfac_int8"])
def test_few_small_matrices_share_the_launches_of_larger_ones(algorithm, dtype):
    """Where there are such, and reach their tensors in the same way: rows of 300 columns are not whole vectors, and
    longer than those of 60, which are taken one element at a time in the same launches."""
    three, small = ["hfac_stats", f"{algorithm}_fold", f"{algorithm}_update"], f"{algorithm}_small"
    for beside, count, found in [
        ((512, 512), 1, three),
        ((512, 512), 64, three),
        ((512, 512), 65, [small, *three]),
        ((40, 60), 1, three),
        ((40, 300), 1, [small, *three]),
        ((0, 512), 1, [small]),
    ]:
        launches = launch_plan.plan(algorithm, [(64, 64)] * count + [beside], dtype)
        assert [la["kernel"] for la in launches] == found


@pytest.mark.parametrize("algorithm", ["hfac", "hfac_int8"])
def test_short_rows_of_no_whole_vectors_share_the_launches_of_others(algorithm):
    """A thread of the statistics has no more than a vector of such a row: there are registers for one element at a
    time. ResNet-50 has 64 x 147."""
    fold, update = f"{algorithm}_fold", f"{algorithm}_update"
    for shapes in ([(512, 512), (64, 147)], [(3000, 5), (512, 4096)], [(40, 60)]):
        launches = launch_plan.plan(algorithm, shapes, "bfloat16")
        assert [(la["kernel"], la["access"]) for la in launches if la["kernel"] != fold] == [
            ("hfac_stats", "bfloat16"),
            (update, "bfloat16"),
        ]
        assert sum(la["grad"] + la["grad_from_cache"] for la in launches) == 4 * sum(map(math.prod, shapes))
    of_resnet = [la["kernel"] for la in launch_plan.plan(algorithm, resnet50(), "float32")]
    assert of_resnet == ["hfac_stats", fold, update, "hfac_dense"]


def stats_of(shapes):
    return [la for la in launch_plan.plan("hfac", shapes, "bfloat16") if la["kernel"] == "hfac_stats"]


def test_statistics_fill_the_multiprocessors():
    """132 with two blocks each: of GPT-2 nearly two full waves; of ResNet-50, whose largest matrices were a few tiles
    that all others waited for, nearly all at once."""
    (gpt,) = stats_of(gpt2())
    assert 0.95 * 528 <= gpt["blocks"] <= 528
    (resnet,) = stats_of(resnet50())
    assert 264 <= resnet["blocks"] <= 320
    assert [la["blocks"] for la in stats_of([(4096, 4096)])] == [128]


def test_statistics_add_up_few_partial_sums():
    """Of a list twice 12 bytes for a column of hundreds of rows, and of every row a few numbers."""
    for shapes, most in ((gpt2(), 0.12), ([(16384, 4096)] * 8, 0.11)):
        (launch,) = stats_of(shapes)
        assert launch["partial"] <= most * sum(math.prod(s) for s in shapes if len(s) > 1)


def test_partial_sums_of_a_group_have_a_bound():
    tiles = [launch for launch in launch_plan.plan("smmf", llama3_8b(), "bfloat16") if launch["kernel"] == "smmf_tiles"]
    for group in {launch["group"] for launch in tiles}:
        assert sum(launch["partial"] for launch in tiles if launch["group"] == group) <= 64 << 20


def test_a_gradient_larger_than_the_cache_is_updated_from_its_end():
    small = launch_plan.plan("hfac", [(1024, 1024)], "bfloat16")
    large = launch_plan.plan("hfac", [(16384, 8192)], "bfloat16")
    update = {name: [la for la in p if la["kernel"] == "hfac_update"][0] for name, p in (("s", small), ("l", large))}
    assert not update["s"]["backward"] and update["s"]["grad"] == 0
    assert update["l"]["backward"] and 0 < update["l"]["grad_from_cache"] < update["l"]["grad"]


def items_of(image, launch):
    """Of the launch's blocks, in order."""
    first, blocks = launch["first_tile"], launch["blocks"]
    return [struct.unpack_from("i", image["tiles"], 8 * t)[0] for t in range(first, first + blocks)]


def tiling_in(image, which, item=0):
    """Rows, columns, tiles of rows and of columns, lanes and vectors."""
    stride = len(image["items"]) // image["count"]
    return struct.unpack_from("6i", image["items"], item * stride + image[which])


def test_an_update_with_codes_begins_with_its_longest_blocks():
    """ResNet-50's gradients do not fit the cache: its blocks are taken from the end, where the longest are, and the
    statistics have read matrices in the same order, those that are updated first last."""
    (found, _), *_ = launch_plan.plans("hfac_int8", resnet50(), "float32", image=True, l2_bytes=50 << 20)
    image, launches = found["image"], {la["kernel"]: la for la in found["launches"] if la["access"] == "float32"}

    def elements(item):
        rows, cols, *_ = tiling_in(image, "update", item)
        return rows * cols

    update, stats = (dict.fromkeys(items_of(image, launches[name])) for name in ("hfac_int8_update", "hfac_stats"))
    assert launches["hfac_int8_update"]["backward"]
    sizes = [elements(item) for item in update]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3
    assert [item for item in stats if item in update] == [*update]


@pytest.mark.parametrize("algorithm", ["hfac", "hfac_int8"])
def test_a_fold_begins_with_its_longest_blocks(algorithm):
    """Those that add up most tiles and rows: ResNet-50's take two turns, and one that begins late ends alone."""
    (found, shapes), *_ = launch_plan.plans(algorithm, resnet50(), "float32", image=True)
    (fold,) = (la for la in found["launches"] if la["kernel"].endswith("fold"))
    blocks = [(shapes[i][0], tiling_in(found["image"], "tiling", i)[2]) for i in items_of(found["image"], fold)]
    assert len(set(blocks)) > 3
    long = [min(rows, 256) + 12 * tiles for rows, tiles in blocks]
    assert long == sorted(long, reverse=True)


def test_tiles_of_an_update_are_as_long_as_each_other():
    """But for what a block has in flight at once."""
    for rows, cols in ((20, 4096), (140, 2304), (4096, 4096), (50257, 768)):
        of_tile, _, row_tiles, _, lanes, _ = tiling_of("update", (rows, cols))
        at_once = 4 * 256 // lanes
        assert of_tile - rows / row_tiles < at_once and of_tile % at_once == 0, (rows, cols)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(4096, 1024), (4096, 4096), (14336, 4096), (4096, 14336), (65536, 64)])
def test_an_update_has_blocks_for_all_multiprocessors(shape, dtype):
    """Alone two for nearly each of 132; beside others in a list, a launch of which is what the cache holds, one."""
    alone, listed, many = (
        [la["blocks"] for la in launch_plan.plan("hfac", shapes, dtype) if la["kernel"] == "hfac_update"]
        for shapes in ([shape], [shape] * 4, [(128, 64)] * 2000)
    )
    assert min(alone) >= 256 and min(listed) >= 128, (alone, listed)
    assert sum(many) == 2000


def tiling_of(which, shape, algorithm="hfac"):
    """`tiling_in` of a matrix of bfloat16."""
    ((found, _),) = launch_plan.plans(algorithm, [shape], "bfloat16", image=True)
    return tiling_in(found["image"], which)


@pytest.mark.parametrize("algorithm", ["hfac", "hfac_int8"])
def test_an_update_leaves_few_threads_idle(algorithm):
    """Of a tile's lanes, a power of two, of rows as models have them: ResNet-50's, GPT-2's, Llama's. A tile has as
    many elements as one of 2048 columns, and no more rows than its block prepares at once."""
    for cols in (64, 576, 768, 1152, 1536, 1600, 2304, 3072, 4096, 4608, 5120, 6400, 8192, 11008, 14336):
        rows, of_tile, row_tiles, tiles, lanes, _ = tiling_of("update", (4096, cols), algorithm)
        assert tiles * of_tile >= cols > (tiles - 1) * of_tile and row_tiles * rows >= 4096
        assert cols >= 0.89 * tiles * lanes * 8, cols
        assert rows * of_tile <= 1 << 17 and 4 * 256 // lanes <= rows <= 1024


def test_the_statistics_leave_few_threads_idle():
    """One vector of a row of 64 columns each, three where one would leave a quarter of the threads idle, two of 512;
    of long rows six or eight. Small matrices have one: their step adds so, which a list with larger ones does not
    change."""
    expected = {64: (8, 1), 96: (4, 3), 128: (16, 1), 192: (8, 3), 256: (32, 1), 512: (32, 2), 768: (32, 3)}
    expected |= {1024: (64, 2), 6144: (256, 3), 8192: (256, 4), 9000: (192, 6), 12288: (256, 6), 16384: (256, 8)}
    for cols, (lanes, vectors) in expected.items():
        assert tiling_of("tiling", (4096, cols))[4:] == (lanes, vectors), cols
    for rows, cols, lanes in ((32, 96, 16), (16, 192, 32)):
        assert tiling_of("tiling", (rows, cols))[4:] == (lanes, 1)
        assert tiling_of("tiling", (rows + 1, cols))[5] == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336), (65536, 64), (50257, 768)])
def test_smmf_has_blocks_for_all_multiprocessors(shape, dtype):
    """Two for nearly each of 132 where there are 16 M elements; few partial sums beside that. A matrix is cut in the
    same way in every list, so that its sums have the same bits."""
    tiles, fold = launch_plan.plan("smmf", [shape], dtype)
    assert tiles["kernel"] == "smmf_tiles" and fold["kernel"] == "smmf_fold"
    assert tiles["blocks"] >= min(256, math.prod(shape) >> 16) and fold["blocks"] >= 16
    partial = tiles["partial"] + fold["partial"]
    assert partial <= 0.2 * math.prod(shape)
    listed = launch_plan.plan("smmf", [shape] * 100, dtype)
    assert sum(la["blocks"] for la in listed if la["kernel"] == "smmf_tiles") == 100 * tiles["blocks"]
    assert sum(la["partial"] for la in listed) == 100 * partial


def test_a_matrix_of_one_tile_has_no_partial_sums():
    """Of each moment its factors are read and written."""
    (launch,) = launch_plan.plan("smmf", [(64, 64)], "float32")
    assert launch["partial"] == 0 and launch["states"] == 2 * 2 * 4 * (64 + 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_small_matrices_of_smmf_have_a_warp_each(dtype):
    """By the matrix alone, so that it steps to the same bits in every list; in the launch of all others, where they
    come first. Eight are a block."""

    def blocks(shapes):
        (tiles, *_) = [la for la in launch_plan.plan("smmf", shapes, dtype) if la["access"] == dtype] or [None]
        return (0, 0) if tiles is None else (tiles["small_blocks"], tiles["blocks"])

    for small in [(64, 64), (16, 256), (127, 8), (8, 8), (1, 64)]:
        assert blocks([small]) == (1, 1) and blocks([small] * 8) == (1, 1) and blocks([small] * 9) == (2, 2)
        assert blocks([(96, 64), *[small] * 9, (96, 64)]) == (2, 4)
    for larger in [(72, 64), (137, 8), (128, 128)]:  # of more elements, of more rows
        assert blocks([larger]) == (0, 1) and blocks([larger, (64, 64)]) == (1, 2)
    assert blocks([(31, 31)]) == (0, 0)  # no whole vectors
    (launch,) = launch_plan.plan("smmf", [(64, 64)] * 9, dtype)
    assert launch["grad"] == launch["param_read"] == 9 * 64 * 64 * (2 if dtype == "bfloat16" else 4)
    assert launch["partial"] == 0 and launch["states"] == 9 * 2 * 2 * 4 * (64 + 64)


def test_statistics_for_the_norm_come_first_and_again_where_it_clips():
    for shapes in (gpt2(), llama3_8b(), [(16384, 8192)], [(64, 64)] * 2000):
        matrices = [shape for shape in shapes if len(shape) > 1]
        size = 2 * sum(map(math.prod, matrices))
        plain = [la for la in launch_plan.plan("hfac", matrices, "bfloat16") if la["phase"] == "step"]
        found = launch_plan.plan("hfac", matrices, "bfloat16", norm=True)
        first, again, rest = (
            [la for la in found if la["phase"] == "squares"],
            [la for la in found if la["conditional"]],
            [la for la in found if la["phase"] == "step" and not la["conditional"]],
        )
        assert found == [*first, *(la for la in found if la["phase"] == "step")] and len(plain) > 0
        assert {la["kernel"] for la in first} == {la["kernel"] for la in again} == {"hfac_stats", "hfac_collect"}
        assert {la["kernel"] for la in rest} == {"hfac_fold", "hfac_update"}
        for launches in (first, again, rest):
            assert sum(la["grad"] + la["grad_from_cache"] for la in launches) == size
        for part in ("partial", "blocks"):
            assert sum(la[part] for la in first) == sum(la[part] for la in again)
        assert len(first) <= len(again)
        below = sum(la["bytes"] for la in first + rest)
        assert below < sum(la["bytes"] for la in plain) + size  # that of a plain step and of reading the norm apart


def test_what_lasts_for_the_norm_is_a_few_numbers_per_row_and_column():
    rows, cols = zip(*[shape for shape in llama3_8b() if len(shape) > 1], strict=True)
    given = dict(op="hfac_step", rows=rows, cols=cols, param_dtypes=1, grad_dtypes=1)
    found = native.cuda_plan(**given, norm=True)["workspace_bytes"]
    lasting = 4 * (2 * sum(rows) + 5 * sum(cols))
    assert lasting < found <= lasting * 1.03 + 0.6 * (50 << 20)


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="one of hfac_step, .*smmf_dense_step is needed, not 'adam'"):
        native.cuda_plan(op="adam", rows=[2], cols=[2], param_dtypes=0, grad_dtypes=0)
