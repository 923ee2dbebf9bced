"""The benchmark end to end on tiny lists. No time is asserted: what is tested is what is counted, refused and kept."""

import json
import math
import statistics

import pytest
import torch
from cases import gradient
from subclasses import Codes
from torch.nn import Parameter

import hfac
from bench import against, contestants, machine, memory, options, problem, record, report, rivals, shapes, timing
from bench import bytes as traffic
from bench.__main__ import main
from bench.gate import why_red
from hfac import backends, reference, rounding
from hfac.backends import plain

CPU = torch.device("cpu")
NATIVE = "cpu" in backends.available(CPU)
needs_native = pytest.mark.skipif(not NATIVE, reason="hfac._C is not built: hfac doctor says why")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost more than these lists do; and --threads sets torch's own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench(folder, *options):
    status = main(["--rounds", "2", "--quick", "--threads", "1", "--out", str(folder), *options])
    files = list(folder.glob("*.json"))
    return status, json.loads(files[0].read_text())["rows"] if files else {}


def break_op(monkeypatch, op):
    """The reference's op with every parameter moved a little, in place of the op of the table's C++ backend."""

    def broken(params, *arguments, **options):
        getattr(reference, op)(params, *arguments, **options)
        for param in params:
            param.mul_(1.01)

    table = {name: getattr(reference, name) for name in contestants.OPS} | {op: broken}
    module = type("Broken", (), {name: staticmethod(function) for name, function in table.items()})
    row = backends.Backend("cpu", "broken", lambda device: None, lambda: plain.Formulas(module))
    monkeypatch.setitem(backends.TABLE, "cpu", row)


def test_a_run_keeps_every_field_and_says_what_the_columns_mean(tmp_path, capsys):
    status, rows = bench(tmp_path, "--shapes", "24x18", "3x 16 + 7", "--dtypes", "float32", "--plot")
    assert status == 0
    text = capsys.readouterr().out
    for column, meaning in report.COLUMNS.items():
        assert column in text and meaning.split()[0] in text
    seen = {(row["kind"], row["name"], row["backend"], row["shapes"]) for row in rows.values()}
    for rival in rivals.RIVALS:
        assert ("step", *rival, "24x18") in seen
    for backend in backends.available(CPU):
        assert {("step", "HFac", backend, "24x18"), ("step", "SMMF", backend, "3x 16 + 7")} <= seen
        assert {("op", "hfac_step_", backend, "24x18"), ("op", "smmf_step_", backend, "24x18")} <= seen
        assert {("op", f"{name}_dense_step_", backend, "3x 16 + 7") for name in ("hfac", "smmf")} <= seen
        assert ("op", "hfac_step_", backend, "3x 16 + 7") not in seen  # nothing there can be factored
    for key, row in rows.items():
        assert key == row["key"] == record.row_key(row)
        assert row["ms_q20"] <= row["ms"] <= row["ms_q80"]
        assert row["ns_per_param"] == pytest.approx(row["ms"] * 1e6 / row["parameters"])
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_param"] / row["ns_per_param"])
        assert row["copy_share"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
        assert row["bytes_per_param_reread"] >= row["bytes_per_param"] > 0
        assert row["transient_bytes_per_param"] >= 0 and row["state_bytes_per_param"] > 0
        assert (row["threads"], row["rounds"], row["quick"], row["dtype"]) == (1, 2, True, "float32")
        assert row["torch"] == torch.__version__ and row["hfac"] == hfac.__version__
        assert {"machine", "cores", "python", "extension", "commit", "dirty", "date"} <= row.keys()
        yardstick = (row["name"], row["backend"]) == ("AdamW", "torch fused")
        assert ("AdamW, torch fused" in row["speedup"]) != yardstick
    tables = next(tmp_path.glob("*.md")).read_text()
    assert tables.count("### ") == len({row["case"] for row in rows.values()})
    for name in ("roofline", "step-times"):
        picture = next(tmp_path.glob(f"*-{name}.png")).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_later_run_replaces_its_rows_and_leaves_the_others(tmp_path):
    options = ("--dtypes", "float32", "--backends", "reference", "--ops", "hfac_step_")
    _, first = bench(tmp_path, "--shapes", "4x6", *options)
    _, second = bench(tmp_path, "--shapes", "6x4", *options)
    assert len(second) == 2 * len(first) and first.keys() < second.keys()
    _, third = bench(tmp_path, "--shapes", "4x6", *options)
    assert third.keys() == second.keys()
    assert all(third[key]["ms"] != second[key]["ms"] for key in first)
    assert all(third[key] == second[key] for key in second.keys() - first.keys())


def test_a_broken_op_gets_no_numbers(tmp_path, capsys, monkeypatch):
    break_op(monkeypatch, "hfac_step_")
    status, rows = bench(tmp_path, "--shapes", "24x18", "--dtypes", "float32", "--backends", "cpu", "reference")
    assert status == 1
    seen = {(row["name"], row["backend"]) for row in rows.values()}
    assert not {("hfac_step_", "cpu"), ("HFac", "cpu")} & seen
    assert {("hfac_step_", "reference"), ("smmf_step_", "cpu"), ("SMMF", "cpu")} <= seen
    said = capsys.readouterr()
    assert "PARITY GATE RED: hfac_step_ of backend 'cpu' in float32" in said.out
    assert "the parameter is off by" in said.err


def test_values_that_mislead_get_no_numbers(tmp_path, capsys, monkeypatch):
    def subnormal(self, shapes, dtype, device):
        original(self, shapes, dtype, device)
        self.params[0].data.view(-1)[3] = 1e-40

    original = problem.Problem.__init__
    monkeypatch.setattr(problem.Problem, "__init__", subnormal)
    monkeypatch.setattr(contestants, "LR", 0.0)
    monkeypatch.setattr(rivals, "LR", 0.0)
    status, rows = bench(
        tmp_path, "--shapes", "24x18", "--dtypes", "float32", "--ops", "smmf_step_", "--backends", "reference"
    )
    assert (status, rows) == (1, {})
    assert "holds subnormal values; the case gets no numbers" in capsys.readouterr().err


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", contestants.OPS)
def test_the_gate_is_green_for_the_kernels(op, dtype):
    assert why_red(op, "cpu", dtype, CPU) is None


@pytest.mark.parametrize(
    ("op", "state", "complaint"),
    [
        ("hfac_step_", "exp_avg_sq_rows", "exp_avg_sq_row is off"),
        ("hfac_dense_step_", "exp_avgs", "exp_avg is off"),
        ("smmf_step_", "exp_avg_cols", "exp_avg_col is off"),
        ("smmf_step_", "exp_avg_signs", "signs of the first moment are wrong"),
        ("smmf_dense_step_", "exp_avg_sqs", "exp_avg_sq is off"),
    ],
)
def test_the_gate_sees_a_wrong_state(op, state, complaint, monkeypatch):
    def broken(params, grads, **named):
        getattr(reference, op)(params, grads, **named)
        for tensor in named[state]:
            tensor.add_(1) if tensor.dtype == torch.uint8 else tensor.mul_(1.001)

    module = type("Broken", (), {op: staticmethod(broken)})
    row = backends.Backend("cpu", "broken", lambda device: None, lambda: plain.Formulas(module))
    monkeypatch.setitem(backends.TABLE, "cpu", row)
    assert complaint in why_red(op, "cpu", torch.float32, CPU)


def test_the_gate_tells_what_an_op_raised(monkeypatch):
    row = backends.Backend("cpu", "broken", lambda device: None, lambda: plain.Formulas(None))
    monkeypatch.setitem(backends.TABLE, "cpu", row)
    assert "cannot make this step (smmf_step_)" in why_red("smmf_step_", "cpu", torch.float32, CPU)


def test_counted_bytes_of_a_matrix_by_hand():
    m, n = 24, 16
    of = problem.Problem([(m, n)], torch.bfloat16, CPU)
    stream = m * n * (2 + 2 + 2)  # the gradient read, the parameter read and written
    hfac_step = contestants.op_contestant("hfac_step_", "reference", of)
    factors = 4 * (2 * m + 2 * n)
    assert hfac_step.state_bytes() == factors
    assert hfac_step.traffic() == traffic.Traffic(stream + 2 * factors, stream + 2 * factors + m * n * 2)
    smmf_step = contestants.op_contestant("smmf_step_", "reference", of)
    rows, cols = 24, 16  # the most nearly square of 384 elements
    state = 4 * (2 * rows + 2 * cols) + m * n // 8
    assert smmf_step.state_bytes() == state
    assert smmf_step.traffic() == traffic.Traffic(stream + 2 * state, stream + 2 * state)
    adamw = contestants.rival_contestant(("AdamW", "torch fused"), of.params)
    adamw.call()
    assert adamw.traffic() == traffic.Traffic(m * n * 14, m * n * 14)
    assert adamw.state_bytes() == m * n * 4 + 4  # and its step


def test_counted_bytes_of_a_large_matrix_are_those_of_the_plan():
    of = problem.Problem([(4096, 512)], torch.float32, CPU)
    params, states = contestants.op_operands("smmf_step_", of.params)
    tensors = [tensor for row in states.values() for tensor in row]
    per_param = traffic.compulsory(params, [p.grad for p in params], tensors).least / of.elements
    assert 12.25 < per_param < 12.29


def test_transient_memory_is_what_was_allocated():
    held = []

    def step():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        held.append(torch.empty(250))
        del second

    assert memory.peak_transient_bytes(step, CPU) == 4 * (1000 + 500)


@needs_native
def test_transient_memory_includes_the_extensions_workspace():
    of = problem.Problem([(256, 256)], torch.float32, CPU)
    step = contestants.op_contestant("hfac_step_", "cpu", of)
    step.call()
    assert memory.peak_transient_bytes(step.call, CPU) >= 4 * 256  # at the least the sums of the columns
    assert memory.peak_transient_bytes(step.call, CPU) < of.elements


@pytest.mark.parametrize("shape", [(24, 18), (6, 4, 3, 3), (4097,), (31, 8), (1,)], ids=str)
def test_the_eager_smmf_is_smmf(shape):
    options = dict(lr=0.02, beta=0.8, eps=1e-6, weight_decay=0.0, decay_rate=-0.8, growth_rate=0.95)
    ours, theirs = (Parameter(gradient(shape, 0)) for _ in range(2))
    eager = rivals.EagerSMMF([ours], **options)
    definition = hfac.SMMF([theirs], backend="reference", **options)
    for step in range(1, 6):
        ours.grad = theirs.grad = gradient(shape, step)
        eager.step()
        definition.step()
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours, gradient(shape, 0), atol=1e-3)


def test_lists_have_the_sizes_of_their_models():
    def elements(name):
        return sum(map(math.prod, shapes.parse(name)))

    assert (len(shapes.parse("gpt2")), elements("gpt2")) == (148, 124_439_808)
    assert (len(shapes.parse("resnet50")), elements("resnet50")) == (161, 25_557_032)
    assert shapes.parse("400x 768 + 100x 64x64") == [(768,)] * 400 + [(64, 64)] * 100
    assert shapes.parse("hostile") == shapes.cases.SHAPES


def test_rounds_are_interleaved_and_slow_ones_sit_out(monkeypatch):
    order = []
    costs = {"fast": 0.001, "slow": 10.0}
    monkeypatch.setattr(timing, "_warm_up", lambda call, device: costs[call()])
    monkeypatch.setattr(timing, "_seconds", lambda call, repeats, device: order.append(call()) or costs[call()])
    samples = timing.measure({name: (lambda name=name: name) for name in costs}, CPU, rounds=12, seconds=1.0)
    assert order[:4] == ["fast", "slow", "fast", "fast"]
    assert list(samples["fast"]) == list(range(12))
    assert list(samples["slow"]) == [0, 4, 8]


def test_a_fast_call_is_made_once_before_it_is_timed(monkeypatch):
    made = {"fast": 0, "slow": 0}
    timed = []
    costs = {"fast": 0.001, "slow": 0.2}

    def call(name):
        made[name] += 1
        return name

    monkeypatch.setattr(timing, "_warm_up", lambda call, device: costs[call()])
    monkeypatch.setattr(timing, "_seconds", lambda call, repeats, device: timed.append(call()) or 0.01)
    timing.measure({name: (lambda name=name: call(name)) for name in costs}, CPU, rounds=5, seconds=100.0)
    assert timed == ["fast", "slow"] * 5
    assert made == {"fast": 1 + 2 * 5, "slow": 1 + 5}


def test_quantiles_and_speedups_of_known_samples():
    ours, rival = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 4.0, 2: 6.0}
    assert timing.quantiles(ours) == timing.Quantiles(2.0, pytest.approx(1.4), pytest.approx(2.6))
    faster = timing.speedup(ours, rival)
    assert faster == timing.Quantiles(2.5, pytest.approx(2.4), pytest.approx(3.6))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shapes", "4by4"], "required is one of gpt2"),
        (["--shapes", "0x5"], "at least one element"),
        (["--rounds", "0"], "whole number of at least 1, got '0'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--ops", "adam"], "invalid choice: 'adam'"),
        (["--backends", "triton"], "'triton': backend='triton' was asked for tensors on cpu"),
        (["--device", "tpu"], "required is cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "Use --device cpu"),
    ],
)
def test_bad_values_are_refused(options, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as refused:
        main(["--out", str(tmp_path), *options])
    assert refused.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_file_of_something_else_is_not_overwritten(capsys, tmp_path):
    options = ("--shapes", "4x6", "--dtypes", "float32", "--backends", "reference", "--ops", "hfac_step_")
    assert bench(tmp_path, *options)[1]
    path = next(tmp_path.glob("*.json"))
    path.write_text('{"mine": 1}')
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        bench(tmp_path, *options)
    assert refused.value.code == 2
    said = capsys.readouterr()
    assert "move it away" in said.err
    assert not said.out  # it has not measured first
    assert path.read_text() == '{"mine": 1}'


def test_the_gate_of_options(monkeypatch):
    """Green as it is, red where the random bits are others, and where a norm is."""
    backend = backends.available(CPU)[0]

    def why_red(name, how):
        asked = options.options_of(name, torch.bfloat16)
        return options.why_red(name, asked[how], backend, torch.bfloat16, CPU)

    for name in ("HFac", "SMMF"):
        for how in options.options_of(name, torch.bfloat16):
            assert why_red(name, how) is None, (name, how)
    drawn = rounding.random_bits
    monkeypatch.setattr(rounding, "random_bits", lambda *args: drawn(*args) ^ 0x8000)
    reason = why_red("SMMF", "stochastic")
    assert (reason is None) == (backend == "reference") and "are others" in (reason or "are others")


def test_table_of_options(tmp_path, capsys):
    hurried = ["--rounds", "3", "--seconds", "0.01"]
    assert options.main(["--shapes", "24x16", "2x 7", *hurried, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-options.md")
    text = path.read_text()
    assert text in capsys.readouterr().out
    for dtype in (torch.float32, torch.bfloat16):
        asked = options.options_of("HFac", dtype)
        for how in ("plain", *asked, options.BY_HAND, options.AFTERWARDS, "fused AdamW"):
            assert f"| {how} | " in text
    assert text.count("| plain | 1.00 [1.00-1.00], ") == 2


class Holding(torch.optim.SGD):
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            self.state[param].setdefault("held", Codes(torch.zeros(param.shape, dtype=torch.uint8), torch.ones(2)))


def test_rivals_whose_states_are_subclasses_are_measured_by_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.setitem(rivals.RIVALS, ("Holding", "theirs"), lambda params: Holding(params, lr=0.1))
    status, rows = bench(tmp_path, "--shapes", "16x16", "--dtypes", "float32", "--ops", "step")
    (row,) = [row for row in rows.values() if row["name"] == "Holding"]
    assert status == 0
    assert row["state_bytes_per_param"] == pytest.approx((256 + 8) / 256)
    assert row["bytes_per_param"] == pytest.approx(12 + 2 * (256 + 8) / 256)


def test_a_rival_that_fails_in_any_way_is_left_out(tmp_path, capsys, monkeypatch):
    def build(params):
        raise LookupError("no kernel of theirs for this processor")

    monkeypatch.setitem(rivals.RIVALS, ("Broken", "theirs"), build)
    status, rows = bench(tmp_path, "--shapes", "16x16", "--dtypes", "float32", "--ops", "step")
    assert status == 0 and "AdamW" in {row["name"] for row in rows.values()}
    assert "Broken, theirs: left out, it cannot be carried out here (no kernel of theirs" in capsys.readouterr().out


def test_without_fused_kernels_it_says_how_to_build_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(backends.TABLE, "cpu", backends.Backend("cpu", "", lambda device: "build it with make.", None))
    options = ("--shapes", "8x8", "--dtypes", "float32", "--ops", "hfac_step_")
    assert bench(tmp_path, *options)[0] == 0
    assert capsys.readouterr().out.count("No fused kernels are here") == 2
    monkeypatch.undo()
    if NATIVE:
        assert bench(tmp_path, *options)[0] == 0
        assert "No fused kernels" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratio", "noisy"), [((1.5, 1.4, 1.6), False), ((1.5, 1.6, 1.7), True), ((1.5, 0.9, 2.0), True), (None, False)]
)
def test_a_ratio_that_means_little_is_marked(ratio, noisy):
    found = {} if ratio is None else {"AdamW, torch fused": dict(zip(("median", "q20", "q80"), ratio, strict=True))}
    row = {"name": "HFac", "backend": "cpu", "speedup": found}
    assert report.is_noisy(row) == noisy
    said = report.noise([row])
    assert said is None if not noisy else said.startswith("Noisy: the ratio to AdamW of HFac cpu ")


#: Another checkout, of which one optimizer's backend makes other steps than its reference.
ANOTHER = """
import torch
class SMMF(torch.optim.SGD):
    off = 1
    def __init__(self, params, lr, backend, weight_decay=0, **more):
        super().__init__(params, lr=lr * (1 if backend == "reference" else self.off))
    def fp32_state_dict(self, modules):
        return dict(modules.named_parameters())
class HFac(SMMF):
    off = 1.001
"""


def test_two_checkouts_step_in_turns_and_only_what_is_right_gets_numbers(tmp_path, capsys):
    (tmp_path / "hfac").mkdir()
    (tmp_path / "hfac" / "__init__.py").write_text(ANOTHER)
    out = tmp_path / "found.json"
    arguments = ["--shapes", "24x18 + 7", "--dtypes", "float32", "--rounds", "3", "--threads", "1", "--out", str(out)]
    assert against.main([str(tmp_path), *arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.count("PARITY GATE RED: 24x18 + 7; float32; HFac") == 2 and "SMMF" not in errors
    rows = json.loads(out.read_text())["rows"]
    assert [(row["optimizer"], row["step"]) for row in rows] == [key for key in against.STEPS if key[0] == "SMMF"]
    for row in rows:
        assert len(row["samples_before"]) == len(row["samples_now"]) == 3
        medians = [statistics.median(row[f"samples_{when}"]) for when in ("before", "now")]
        assert [row["before"], row["now"]] == pytest.approx(medians)
        assert row["ratio"] == pytest.approx(medians[0] / medians[1])
    assert out.with_suffix(".md").read_text().count("\n| 24x18 + 7 |") == 2


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        against.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("AMD EPYC", "AMD EPYC, family 25, model 1"),
        ("Intel(R)  Xeon(R) Processor @ 2.50GHz", "Intel(R) Xeon(R) Processor @ 2.50GHz"),
    ],
)
def test_a_processor_whose_name_has_no_model_is_told_apart_by_family_and_model(model, wanted, monkeypatch):
    text = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: {model}\npower management:\n\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda path: text)
    assert machine.processor() == wanted


def test_a_processor_that_nothing_is_told_of_has_a_name(monkeypatch):
    monkeypatch.setattr(machine.Path, "read_text", lambda path: "")
    assert machine.processor()
