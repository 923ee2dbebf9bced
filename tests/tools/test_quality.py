"""The study of losses: what it trains next, that it goes on where it was interrupted, and the tables it makes. The
models are tiny and the steps few; no test looks at who wins."""

import json
import math

import pytest
import torch

from bench.quality import __main__ as command
from bench.quality import grid, study, tables
from bench.quality.contenders import CONTENDERS, Contender
from bench.quality.progress import Progress, duration
from bench.quality.runs import final_loss, train
from bench.quality.study import Cell, Plan, Study
from hfac.cli.errors import UsageError


@pytest.fixture
def narrow(monkeypatch):
    """A grid of three rates, so that a few steps, which like large rates, do not extend it far."""
    monkeypatch.setattr(grid, "LEAST", 4)
    monkeypatch.setattr(grid, "MOST", 6)


def quality(folder, *options):
    """The command with tiny models, in this process; its exit status and rows."""
    status = command.main(["--tiny", "--jobs", "0", "--tasks", "gpt", "--out", str(folder), *options])
    return status, json.loads((folder / "quality.json").read_text())["rows"]


def outcome(folder):
    """The finished runs' losses over steps by their files' names."""
    return {path.name: json.loads(path.read_text())["history"] for path in (folder / "runs").glob("*.json")}


def fake(loss):
    """In place of `runs.train`: no training, and a run whose losses are ``loss(spec)``."""

    def trained(spec, told=None):
        history = [{"step": step, "val_loss": loss(spec)} for step in range(spec.steps + 1)]
        sizes = {"parameters": 1000, "state_bytes_per_parameter": 8.0 if spec.optimizer == "adamw" else 1.0}
        more = {"history": history, "seconds": 1.0, "steps_made": spec.steps, "data": {"sha256": "same"}}
        return spec.identity() | sizes | more

    return trained


# What to train next


def sweep(loss, start, first=3, seeds=3):
    """All runs of one optimizer in the order in which they are trained, by losses of places and seeds."""
    losses = {}
    while missing := grid.wanted(losses, start, first, seeds):
        losses[missing[0]] = loss(*missing[0])
        assert len(losses) < 200
    return losses


def test_rates_are_one_grid_with_a_constant_ratio():
    assert grid.rate(0) == 1e-3
    ratios = [grid.rate(place + 1) / grid.rate(place) for place in range(grid.LEAST, grid.MOST)]
    assert ratios == pytest.approx([1.25] * len(ratios), rel=1e-3)
    assert all(grid.nearest(grid.rate(place)) == place for place in range(grid.LEAST, grid.MOST + 1))


@pytest.mark.parametrize("start", [0, 7, 15], ids=["below", "there", "above"])
def test_a_sweep_whose_best_is_at_its_edge_is_extended_until_it_is_inside(start):
    losses = sweep(lambda place, seed: (place - 7) ** 2 + seed, start)
    swept = sorted(place for place, seed in losses if seed == 0)
    assert swept == list(range(min(start - 1, 6), max(start + 1, 8) + 1))
    assert sorted(seed for place, seed in losses if place == 7) == [0, 1, 2]
    assert len(losses) == len(swept) + 2 and grid.settled(losses)


def test_first_rates_lie_around_the_start():
    assert grid.wanted({}, 10, 5, 1) == [(place, 0) for place in range(8, 13)]
    assert grid.wanted({}, 10, 1, 3, extend=False) == [(10, 0)]
    assert grid.wanted({(10, 0): 1.0}, 10, 1, 1, extend=False) == []


def test_a_run_that_diverged_is_the_worst_of_a_sweep():
    losses = sweep(lambda place, seed: math.inf if place > 3 else -place, start=10)
    assert grid.best(losses) == 3
    assert {(3, 0), (3, 1), (3, 2), (4, 0), (2, 0)} <= losses.keys()


def test_a_sweep_ends_at_the_end_of_the_grid_and_where_all_diverges():
    losses = sweep(lambda place, seed: -place, start=30)
    assert max(losses) == (grid.MOST, 2)
    losses = sweep(lambda place, seed: math.inf, start=-35)
    assert min(losses) == (grid.LEAST, 0) and all(seed == 0 for _, seed in losses)


# A study in its folder


def test_an_interrupted_study_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(
    tmp_path, monkeypatch, narrow, capsys
):
    options = ["--optimizers", "adamw,hfac", "--steps", "4", "--seeds", "2", "--first-rates", "2"]
    status, whole = quality(tmp_path / "whole", *options)
    assert status == 0
    assert [row["optimizer"] for row in whole] == ["adamw", "hfac"] and all(row["seeds"] == [0, 1] for row in whole)

    trained = []

    def interrupted(spec, told):
        run = train(spec, told)
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(spec.name)
        return run

    monkeypatch.setattr(study, "train", interrupted)
    assert quality(tmp_path / "parts", *options)[0] == 130
    assert "The same command continues" in capsys.readouterr().out
    assert {f"{name}.json" for name in trained} == outcome(tmp_path / "parts").keys()

    def counted(spec, told):
        trained.append(spec.name)
        return train(spec, told)

    monkeypatch.setattr(study, "train", counted)
    status, parts = quality(tmp_path / "parts", *options)
    assert status == 0
    assert sorted(trained) == sorted(set(trained)) and len(trained) == len(outcome(tmp_path / "whole"))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert [row["losses"] for row in parts] == [row["losses"] for row in whole]
    assert not list((tmp_path / "parts").rglob("*.tmp"))


def test_runs_in_processes_of_their_own_are_those_of_this_process_and_one_that_fails_does_not_end_the_study(
    tmp_path, monkeypatch
):
    plan = Plan((Cell("gpt", 2, "adamw"), Cell("gpt", 2, "nadam")), seeds=1, first=1, tiny=True, sweep=False)
    found = Study(plan, tmp_path)
    file = found.file
    nowhere = tmp_path / "nowhere" / "run.json"
    monkeypatch.setattr(found, "file", lambda spec: nowhere if spec.optimizer == "nadam" else file(spec))
    said = []
    found.train(jobs=2, say=said.append)
    ((name, why),) = found.failures.items()
    assert "nadam" in name and "No such file" in why and any("FAILED" in line for line in said)
    assert not found.complete
    (run,) = found.found[plan.cells[0]].values()
    here = train(plan.spec(plan.cells[0], plan.cells[0].start, 0))
    assert [point["val_loss"] for point in run["history"]] == [point["val_loss"] for point in here["history"]]


def test_a_diverging_run_is_the_worst_and_does_not_end_the_study(tmp_path, monkeypatch, narrow):
    class Breaks(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.fill_(math.nan)

    broken = Contender("Broken", lambda model, lr, weight_decay, task: Breaks(model.parameters(), lr=lr))
    monkeypatch.setitem(CONTENDERS, "broken", broken)
    status, (bad, good) = quality(tmp_path, "--optimizers", "broken,adamw", "--steps", "4", "--seeds", "1")
    assert status == 0
    assert bad["mean"] is None and len(bad["sweep"]) == 3 and bad["seeds"] == [0]
    assert good["mean"] > 0 and good["seeds"] == [0]
    assert "| diverged |" in (tmp_path / "quality.md").read_text()


def test_a_folder_of_other_settings_or_data_is_refused(tmp_path, monkeypatch, narrow):
    monkeypatch.setattr(study, "train", fake(lambda spec: 1.0))
    quality(tmp_path, "--optimizers", "adamw", "--steps", "4", "--seeds", "1")
    cell = Cell("gpt", 4, "adamw")
    with pytest.raises(UsageError, match="differs in tiny, settings"):
        Study(Plan((cell,), 1), tmp_path)
    path = next((tmp_path / "runs").glob("*.json"))
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"data": {"sha256": "other"}}))
    with pytest.raises(UsageError, match="differs in data"):
        Study(Plan((cell,), 1, tiny=True), tmp_path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="holds runs of this command"):
        Study(Plan((cell,), 1, tiny=True), tmp_path)


def test_no_minutes_are_tables_of_what_is_there(tmp_path, monkeypatch, narrow, capsys):
    monkeypatch.setattr(study, "train", fake(lambda spec: 1.0))
    options = ["--optimizers", "adamw", "--steps", "4", "--seeds", "1"]
    status, rows = quality(tmp_path, *options, "--minutes", "0")
    assert (status, rows) == (0, []) and "Not complete" in capsys.readouterr().out
    assert "No run is finished yet." in (tmp_path / "quality.md").read_text()
    quality(tmp_path, *options)
    capsys.readouterr()
    status, (row,) = quality(tmp_path, *options, "--minutes", "0")
    assert status == 0 and row["mean"] == 1.0 and "Not complete" not in capsys.readouterr().out


def test_time_left_is_that_of_the_runs_left(tmp_path):
    plan = Plan((Cell("gpt", 10, "adamw"), Cell("gpt", 20, "hfac")), seeds=3, first=5, tiny=True)
    found = Study(plan, tmp_path)
    said = []
    progress = Progress(found, 2, said.append)
    ((cell, spec), *_) = found.wanted()
    progress.began(cell, spec)
    found.add(cell, fake(lambda spec: 1.0)(spec))
    progress.ended(cell, spec, found.found[cell][grid.nearest(spec.lr), 0])
    # 4 and 2 runs of AdamW of one second, 5 and 2 of HFac with twice as many steps, two at a time
    assert said == [f"[1 of at least 14 runs, about 10 s left] gpt 10 adamw lr {spec.lr:g} seed 0: loss 1.0000 (1 s)"]
    assert [duration(seconds) for seconds in (59, 60, 3600, 5400)] == ["59 s", "1 min", "1 h 00 min", "1 h 30 min"]


def test_steps_are_for_all_tasks_or_for_one():
    steps = [("", 600), ("", 1800), ("cnn", 100)]
    found = command.cells(["gpt", "cnn"], steps, ["adamw", "hfac-dense"])
    kept = [("gpt", 600, "adamw"), ("gpt", 600, "hfac-dense"), ("gpt", 1800, "adamw"), ("gpt", 1800, "hfac-dense")]
    assert [(cell.task, cell.steps, cell.optimizer) for cell in found] == [*kept, ("cnn", 100, "adamw")]
    assert command.cells(["vit"], [], ["adamw"]) == (Cell("vit", command.STEPS, "adamw"),)


def test_what_is_not_installed_is_left_out_by_name(tmp_path, monkeypatch, narrow, capsys):
    monkeypatch.setattr(study, "train", fake(lambda spec: 1.0))
    absent = Contender("Absent", lambda *given: None, missing="absent, which is not installed")
    monkeypatch.setitem(CONTENDERS, "absent", absent)
    status, rows = quality(tmp_path, "--optimizers", "adamw,absent", "--steps", "4", "--seeds", "1")
    assert status == 0 and [row["optimizer"] for row in rows] == ["adamw"]
    said = capsys.readouterr().out
    assert "Left out: absent, which requires absent" in said and "Left out: absent (requires absent" in said
    with pytest.raises(SystemExit) as refused:
        quality(tmp_path, "--optimizers", "absent")
    assert refused.value.code == 2 and "add adamw" in capsys.readouterr().err


# Tables


def test_the_paired_difference_is_that_of_runs_with_the_same_seed():
    base = {0: 2.0, 1: 4.0, 2: 1.0}
    mean, sd = tables.paired({0: 1.98, 1: 3.88}, base)
    assert (mean, sd) == (pytest.approx(-2.0), pytest.approx(math.sqrt(2)))
    assert tables.paired({3: 1.0}, base) is None
    mean, sd = tables.paired({0: 2.2}, base)
    assert mean == pytest.approx(10) and math.isnan(sd)
    mean, sd = tables.paired({0: 2.0, 1: math.inf}, base)
    assert math.isinf(mean) and math.isnan(sd)


def test_the_final_loss_is_the_mean_of_the_last_evaluations():
    def history(*losses):
        return [{"step": step, "val_loss": loss} for step, loss in enumerate(losses)]

    assert final_loss(history(9, 8, 3, 2, 1)) == 2
    assert final_loss(history(9, 3)) == 3  # the untrained model's does not count
    assert final_loss(history(9)) == final_loss(history(9, 1, None)) == final_loss(history(9, 1, math.nan)) == math.inf


def known(spec):
    """AdamW best at place 5, HFac at 4 and always 2 % better, and SMMF without a bottom within two seeds."""
    place = grid.nearest(spec.lr)
    if spec.optimizer == "adamw":
        return 2 + 0.1 * spec.seed + 0.01 * (place - 5) ** 2
    return 0.98 * (2 + 0.1 * spec.seed) + 0.01 * (place - 4) ** 2


def test_the_table_of_known_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "train", fake(known))
    options = ["--optimizers", "adamw,hfac", "--steps", "1200"]
    status, (base, row) = quality(tmp_path, *options)
    assert status == 0
    assert (base["lr"], row["lr"]) == (grid.rate(5), grid.rate(4))
    assert (base["against"], row["against"]) == (None, pytest.approx(-2.0))
    text = (tmp_path / "quality.md").read_text()
    assert "### Byte-level GPT, 1,200 steps\n\n1,000 parameters; losses in nats per byte." in text
    assert "| AdamW | 8 | 0.00305 | 1 | 2.1000 ± 0.1000 |  | 3 |" in text
    assert "| HFac | 1 | 0.00244 | 0.8 | 2.0580 ± 0.0980 | -2.00 ± 0.00 % | 3 |" in text
    assert "Not settled" not in text and text in capsys.readouterr().out
    for picture in ("quality-loss-gpt-1200.png", "quality-frontier.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_a_table_says_what_is_missing_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", fake(known))
    plan = Plan((Cell("gpt", 4, "adamw"),), seeds=3, first=5, tiny=True)
    found = Study(plan, tmp_path)
    for cell, spec in list(found.wanted())[:2]:  # the two lowest rates, far below the best
        found.add(cell, fake(known)(spec))
    setting = {"machine": "M", "torch": "T", "hfac": "H", "commit": None, "date": "D"}
    text = tables.markdown(found, {}, setting)
    assert " ? |" in text and "| 1 of 3 |" in text
    assert "Not settled, the best rate may lie outside those tried: AdamW." in text
    assert "these losses say nothing" in text and "M, torch T, hfac H (no commit), D." in text


def test_tables_go_into_a_page_between_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", fake(known))
    real = command.PAGE.read_text()
    page = tmp_path / "quality.md"
    page.write_text(real)
    monkeypatch.setattr(command, "PAGE", page)
    quality(tmp_path / "out", "--optimizers", "adamw", "--steps", "4", "--docs")
    text = page.read_text()
    assert "| AdamW | 8 |" in text and (tmp_path / "quality-frontier.png").exists()
    for line in real.split("<!-- begin")[0].splitlines():
        assert line in text
    assert "| AdamW | 8 |" not in (anew := tables.into_page(text, "quality", "Anew.")) and anew.count("Anew.") == 1
    with pytest.raises(ValueError, match="required are the lines"):
        tables.into_page("no marks", "quality", "")
