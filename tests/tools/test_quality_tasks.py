"""What the study of losses trains: data, models, every optimizer over every model, and `--scale`."""

import csv
import gzip
import io
import json
import sys

import pytest
import torch

from bench.quality import __main__ as command
from bench.quality import contenders, images, scale
from bench.quality.contenders import CONTENDERS
from bench.quality.runs import ALL_TASKS, Spec, StudyRun, train
from bench.quality.tasks import TASKS

HERE = [name for name, contender in CONTENDERS.items() if not contender.missing]


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A package that has scikit-learn's name and its file of digits, of 50 random pictures."""
    data = torch.randint(17, (50, 65), generator=torch.Generator().manual_seed(0))
    data[:, -1] %= 10
    text = io.StringIO()
    csv.writer(text).writerows(data.tolist())
    folder = tmp_path / "packages" / "sklearn" / "datasets" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "packages" / "sklearn" / "__init__.py").write_text("")
    (folder / "digits.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    return data.to(torch.uint8)


@pytest.mark.parametrize("task", TASKS)
def test_runs_of_a_seed_are_equal_and_those_of_another_differ(task, digits):
    def losses(seed):
        run = train(Spec(task, 2, "adamw", 1e-3, seed, tiny=True))
        assert run["steps_made"] == 2 and run["status"] == "finished"
        return [point["val_loss"] for point in run["history"]]

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_moves_every_parameter_of_every_task_it_is_for(name, digits):
    for task in TASKS:
        if not command.usable(name, task):
            continue
        run = StudyRun(Spec(task, 2, name, 1e-2, 0, tiny=True))
        before = [param.detach().clone() for param in run.model.parameters()]
        run.train_step()
        run.train_step()
        still = [
            key
            for (key, param), old in zip(run.model.named_parameters(), before, strict=True)
            if torch.equal(param, old)
        ]
        assert still == [], task
        assert {group["lr"] for group in run.optimizer.param_groups} == {run.lr * 0.55}
        assert all(param.grad is None for param in run.model.parameters())


def test_the_study_has_every_optimizer_and_knows_how_to_draw_it():
    from bench.quality.pictures import STYLES

    assert STYLES.keys() >= CONTENDERS.keys()
    assert {"adamw", "adamw-0.95", "nadam", "adafactor", "smmf", "hfac", "hfac-int8", "hfac-dense"} <= set(HERE)


def test_state_is_counted_from_the_tensors(digits):
    def state(name, task="gpt"):
        run = StudyRun(Spec(task, 2, name, 1e-3, 0, tiny=True))
        run.train_step()
        return run, run.state_bytes()

    run, size = state("adamw")
    assert size == 8 * run.parameters + 4 * len(list(run.model.parameters()))  # two moments, and a step for each
    run, size = state("muon")
    matrices = sum(param.numel() for param in run.model.blocks.parameters() if param.dim() == 2)
    vectors = len(list(run.model.parameters())) - 4
    assert size == 4 * matrices + 8 * (run.parameters - matrices) + 4 * vectors
    run, _ = state("hfac-dense")
    whole = {name for name, param in run.model.named_parameters() if "exp_avg" in run.optimizer.state[param]}
    assert {"byte_embedding.weight", "position_embedding.weight"} == {name for name in whole if "embedding" in name}
    assert not any("blocks" in name and "norm" not in name for name in whole)
    shared = torch.zeros(10)

    class Twice:
        state = {1: {"qmap": shared, "step": 3}, 2: {"qmap": shared}}

    assert contenders.state_bytes(Twice()) == 40


def test_an_optimizer_whose_rates_are_tensors_keeps_them_under_a_schedule():
    param = torch.nn.Parameter(torch.ones(4))
    rate = torch.tensor(0.5)
    optimizer = contenders.with_its_rates(torch.optim.SGD([param], lr=rate))
    optimizer.param_groups[0]["lr"] = 0.25
    param.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.25
    assert torch.equal(param, torch.full((4,), 0.75))


def test_weight_decay_is_that_of_matrices_and_adafactors_is_a_tenth():
    """Adafactor's rate is relative to the size of the weights, about a tenth, and so ten times AdamW's."""
    for name, decay in (("adamw", 0.1), ("nadam", 0.1), ("adafactor", 0.01), ("smmf", 0.1), ("muon", 0.1)):
        run = StudyRun(Spec("gpt", 2, name, 1e-3, 0, tiny=True))
        for group in run.optimizer.param_groups:
            matrices = {param.dim() >= 2 for param in group["params"]}
            assert group["weight_decay"] == pytest.approx(decay if matrices == {True} else 0.0), name
    run = StudyRun(Spec("gpt", 2, "nadam", 1e-3, 0, tiny=True))
    assert all(group["decoupled_weight_decay"] for group in run.optimizer.param_groups)


def test_smmf_decays_as_its_authors_advise(digits):
    for task, decay in (("gpt", -0.8), ("vit", -0.8), ("cnn", -0.5)):
        run = StudyRun(Spec(task, 2, "smmf", 1e-3, 0, tiny=True))
        assert run.optimizer.defaults["decay_rate"] == decay


def test_every_fifth_digit_is_held_out_and_the_others_are_moved_by_a_pixel(digits):
    data = images.load_digits()
    assert torch.equal(data.validation, digits[::5]) and len(data.train) == 40
    pictures, labels = images.unpacked(data.train)
    assert pictures.shape == (40, 1, 8, 8) and torch.equal(labels, data.train[:, -1].long())
    assert torch.equal(pictures.view(40, 64), data.train[:, :-1] / 8 - 1)
    one = data.train[:1]
    wide = torch.nn.functional.pad(pictures[0, 0], (1, 1, 1, 1), value=-1)
    views = [wide[row : row + 8, column : column + 8] for row in range(3) for column in range(3)]
    seen = set()
    moved, _ = images.shifted_batch(one, 100, torch.Generator().manual_seed(0))
    for picture in moved:
        seen |= {(match := [torch.equal(picture[0], view) for view in views]).index(True)}
        assert sum(match) == 1
    assert seen == set(range(9))


def test_digits_that_are_missing_say_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as refused:
        command.main(["--tiny", "--tasks", "cnn", "--optimizers", "adamw", "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert "pip install --no-deps scikit-learn" in capsys.readouterr().err


# The larger model


def test_the_larger_model_has_126_million_parameters():
    settings = ALL_TASKS["scale"].settings(100, 0)
    with torch.device("meta"):
        model = ALL_TASKS["scale"].model(settings)
    assert sum(param.numel() for param in model.parameters()) == 126_658_560


def test_steps_that_fit_are_equal_for_all_and_leave_time_for_evaluations():
    # set-ups of 2 s and 21 evaluations of 1 s each: 46 of 101 seconds; the steps of both take 0.3 s
    assert scale.fitting([(2, 0.1, 1), (2, 0.2, 1)], 101) == 180
    assert scale.fitting([(2, 0.1, 1)], 1) == 20


def test_the_larger_model_runs_once_with_each_optimizer_in_bfloat16(tmp_path, capsys):
    options = ["--scale", "--tiny", "--optimizers", "adamw,hfac-int8", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main([*options, "--steps", "2"]) == 0
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    made = [(row["optimizer"], row["steps"], len(row["sweep"])) for row in rows]
    assert made == [("adamw", 2, 1), ("hfac-int8", 2, 1)]
    assert "no rate was swept" in (tmp_path / "scale.md").read_text()
    capsys.readouterr()
    assert command.main([*options, "--minutes", "0.02"]) == 0  # as many steps as the runs that are there
    assert capsys.readouterr().out.lstrip().startswith("### ")
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == rows

    spec = Spec("scale", 2, "adamw", 1e-3, 0, True, "cpu", True)
    mixed, plain = StudyRun(spec), StudyRun(Spec(**vars(spec) | {"autocast": False}))
    batch = plain.next_batch()
    assert mixed.model.loss(*batch).item() == pytest.approx(plain.model.loss(*batch).item(), rel=1e-2)
    assert mixed.model.loss(*batch).item() != plain.model.loss(*batch).item()
    assert all(param.dtype == torch.float32 for param in mixed.model.parameters())
