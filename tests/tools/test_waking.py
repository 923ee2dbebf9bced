"""bench.waking: rows that wake, and batches with rare text."""

import json

import pytest

from bench import waking


def test_rows_that_wake():
    """Whole moments are forgotten at the pace of AdamW's; factored ones let the row move several times as far."""
    rested = {name: waking.woken(name, 0)["first"] for name in ("adamw", "hfac")}
    woken = {name: waking.woken(name, 1000)["first"] for name in ("adamw", "hfac", "hfac-int8")}
    assert rested["hfac"] < 1.5 and rested["adamw"] < 0.5
    assert woken["hfac"] > 2 * rested["hfac"]
    assert woken["hfac-int8"] == pytest.approx(2 * woken["adamw"], rel=0.2)


def test_rare_text_comes_every_so_many_steps():
    run = waking.RareText("adamw", 1e-3, 6, 3, 0)
    rare = []
    for run.step in range(6):
        inputs, targets = run.next_batch()
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        rare.append((inputs >= waking.HIGH).all(1).sum().item())
    assert rare == [0, 0, 4, 0, 0, 4]


def test_tables_are_written(tmp_path, capsys):
    out = tmp_path / "waking.json"
    waking.main(["--optimizers", "hfac", "--idle", "2", "--steps", "2", "--every", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [row["idle steps"] for row in found["woken"]] == [2]
    assert [run["rare every"] for run in found["trained"]] == [2]
    assert found["trained"][0]["rare text"] > 1
    assert "rare text" in out.with_suffix(".md").read_text()
