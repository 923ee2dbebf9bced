"""`python -m bench.cpu_table`: what it keeps of a case, and what gets no numbers. No time is asserted."""

import json
import statistics

import pytest
import torch

from bench import cpu_table
from hfac import backends

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.available(torch.device("cpu")), reason="hfac._C is not built: hfac doctor says why"
)
OPTIMIZERS = ["AdamW", "HFac", "HFac-int8", "SMMF"]


@pytest.fixture(autouse=True)
def threads_are_put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def table(folder, *options):
    status = cpu_table.main(["--rounds", "3", "--tries", "1", "--dtypes", "float32", "--out", str(folder), *options])
    files = list(folder.glob("*-cpu-table.json"))
    return status, json.loads(files[0].read_text())["rows"] if files else []


def test_each_list_has_a_row_for_each_optimizer_and_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_table, "LARGE_BYTES", 20_000)  # AdamW moves 12,096 and 26,880
    status, rows = table(tmp_path, "--shapes", "24x18", "40x24", "--threads", "1", "2")
    assert status == 0
    assert [(row["threads"], row["list"], row["optimizer"]) for row in rows] == [
        (threads, shape, name) for threads in (1, 2) for shape in ("24x18", "40x24") for name in OPTIMIZERS
    ]
    for at, row in enumerate(rows):
        adamw = rows[at - at % 4]
        assert len(row["ms_samples"]) == 3 and row["ms"] == pytest.approx(statistics.median(row["ms_samples"]))
        assert row["ms_least"] == min(row["ms_samples"])
        assert row["ratio"] == pytest.approx(adamw["ms"] / row["ms"])
        assert row["ratio_of_least"] == pytest.approx(adamw["ms_least"] / row["ms_least"])
        bytes_ = row["bytes_per_param_reread"] / adamw["bytes_per_param_reread"]
        assert row["share_of_rate"] == pytest.approx(row["ratio"] * bytes_)
        again = row["bytes_per_param_reread"] - row["bytes_per_param"]
        assert again == pytest.approx(4 if "HFac" in row["optimizer"] else 0)
        assert 0 <= row["others"] <= 1
        assert row["large"] == (row["list"] == "40x24")
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| float32, 2 threads | AdamW | HFac | HFac-int8 | SMMF | others |" in text
    assert text.count("\n| 24x18 | ") == text.count("\n| 40x24 | ") == 2


def test_what_disagrees_with_the_reference_gets_no_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_table, "why_red", lambda name, *_: "7 weights are others" if name == "SMMF" else None)
    status, rows = table(tmp_path, "--shapes", "24x18", "--threads", "1")
    assert status == 1 and [row["optimizer"] for row in rows] == OPTIMIZERS[:-1]
    red = "PARITY GATE RED: SMMF, float32: 7 weights are others. It gets no numbers."
    assert red in capsys.readouterr().err and red in next(tmp_path.glob("*.md")).read_text()


def test_a_case_is_measured_until_its_ratios_are_steady_and_the_steadiest_try_is_kept(monkeypatch):
    spreads = iter([1.5, 1.3, 1.4, 1.05, 1.0])

    def measured(contestants, rounds):
        spread = next(spreads)
        return [{"ratio_q20": 1.0, "ratio_q80": 1.0}, {"ratio_q20": 2.0, "ratio_q80": 2.0 * spread}]

    monkeypatch.setattr(cpu_table, "measured", measured)
    case = "8x8", torch.float32, {}, 3
    assert cpu_table.spread(cpu_table.steadiest(*case, 3)) == pytest.approx(1.3)
    assert cpu_table.spread(cpu_table.steadiest(*case, 9)) == pytest.approx(1.05) and next(spreads) == 1.0
