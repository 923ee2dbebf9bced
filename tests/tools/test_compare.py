"""`hfac compare` end to end at tiny sizes: results, files, resuming, interruption and bad input."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import tracemalloc

import pytest
import torch

from bench.quality.contenders import CONTENDERS
from hfac.cli import checkpoint as checkpoint_module
from hfac.cli import main
from hfac.cli.checkpoint import load_checkpoint, save_checkpoint
from hfac.cli.corpus import load_corpus, training_batch, validation_batches
from hfac.cli.model import ByteGPT
from hfac.cli.optimizers import ADVISED, CHOICES, build_optimizer, state_bytes
from hfac.cli.report import best_runs, learning_rate_lines
from hfac.cli.runner import Comparison
from hfac.cli.settings import Settings, shown
from hfac.cli.training import TrainingRun, scheduled_lr

STEPS = 12
TINY = [
    "--d-model",
    "16",
    "--heads",
    "2",
    "--layers",
    "1",
    "--context",
    "16",
    "--batch-size",
    "4",
    "--steps",
    str(STEPS),
]
TINY += ["--eval-every", "5", "--eval-batches", "2", "--lr", "adamw=1e-2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on several threads, far slower where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of some 25,000 bytes that a model can learn something about."""
    words = ["def", "return", "for", "in", "self", "(x)", "=", "import\n"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=5000)))
    return path


@pytest.fixture
def no_plot(monkeypatch):
    """Spare the time of a plot that the test does not look at."""
    monkeypatch.setattr("hfac.cli.compare.write_plot", lambda path, runs: None)


@pytest.fixture
def compare(text, tmp_path):
    """Run `hfac compare` at a tiny size on `text`; return its exit status and compare.json."""

    def run(*options: str, settings=TINY) -> tuple[int, dict]:
        common = [] if settings is None else [*settings, "--text", str(text)]
        status = main(["compare", *common, "--out", str(tmp_path / "out"), *options])
        return status, json.loads((tmp_path / "out" / "compare.json").read_text())

    return run


def outcome(report: dict) -> list[dict]:
    """The runs without what may depend on whether the comparison was interrupted: the times."""
    return [{key: value for key, value in run.items() if "_ms_" not in key} for run in report["runs"]]


def interrupt(monkeypatch, optimizer: str, step: int, how) -> None:
    """Call `how` inside that step of that optimizer, when the weights are updated and the step not yet counted."""
    train_step = TrainingRun.train_step

    def patched(run: TrainingRun) -> None:
        if (run.name, run.step) == (optimizer, step):
            update = run.optimizer.step
            run.optimizer.step = lambda: (update(), how())
        train_step(run)
        run.optimizer.__dict__.pop("step", None)

    monkeypatch.setattr(TrainingRun, "train_step", patched)


@pytest.fixture
def ctrl_c():
    """Python's own reaction to Ctrl-C, which a test run in the background starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def stop_at_once() -> None:
    raise KeyboardInterrupt  # what a second Ctrl-C does


def error_of(capsys, *argv: str) -> str:
    """The message of a command line that must be refused before anything is trained, on one line."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as refused:
        patch.setattr(Comparison, "train_next", lambda *args: pytest.fail(f"not refused: {argv}"))
        main(["compare", *argv])
    assert refused.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_two_optimizers_end_to_end(compare, capsys, tmp_path):
    status, report = compare("--optimizers", "adamw", "hfac")
    assert status == 0 and report["complete"]
    assert report["settings"]["d_model"] == 16 and report["settings"]["warmup_steps"] == 1
    adamw, hfac_run = report["runs"]
    for run in (adamw, hfac_run):
        assert run["status"] == "finished" and run["steps"] == STEPS
        assert [point["step"] for point in run["history"]] == [0, 5, 10, 12]
        assert run["val_loss"] == run["history"][-1]["val_loss"] < run["history"][0]["val_loss"] - 0.2
        assert run["bits_per_byte"] == pytest.approx(run["val_loss"] / math.log(2))
        assert run["state_bytes_per_parameter"] == pytest.approx(run["state_bytes"] / run["parameters"])
        assert 0 < run["optimizer_ms_per_step"] < run["total_ms_per_step"]
    assert adamw["history"][0] == hfac_run["history"][0], "both must start from the same weights"
    assert hfac_run["state_bytes"] < adamw["state_bytes"] / 3
    assert report["best"] == {
        run["optimizer"]: {"lr": run["lr"], "val_loss": run["val_loss"]} for run in report["runs"]
    }
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")

    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("optimizer"))
    for column in ("val loss", "bits/byte", "state bytes", "bytes/param", "optimizer ms/step", "total ms/step"):
        assert column in header
    row = next(line for line in lines[lines.index(header) :] if line.startswith("hfac "))
    assert f"{hfac_run['val_loss']:.4f}" in row and f"{hfac_run['state_bytes']:,}" in row
    assert len(lines) < 30, "a log file is to stay readable"


@pytest.mark.usefixtures("ctrl_c", "no_plot")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", CHOICES)
def test_resuming_after_ctrl_c_gives_the_uninterrupted_result(compare, optimizer, dtype, monkeypatch, capsys, tmp_path):
    options = ["--optimizers", "adamw", optimizer, "--lr-factors", "0.5", "--dtype", dtype]
    whole = compare(*options, settings=TINY[:-2])[1]
    saved = str(tmp_path / "saved")
    with monkeypatch.context() as patch:
        interrupt(patch, optimizer, 6, press_ctrl_c)
        status, partial = compare(*options, "--save", saved, settings=TINY[:-2])
    printed = capsys.readouterr().out
    assert status == 130 and not partial["complete"]
    assert partial["runs"][-1]["status"] == "interrupted" and partial["runs"][-1]["steps"] == 7
    assert f"7/{STEPS} interrupted" in printed and "at step 5" in printed and f"--resume {saved}" in printed
    status, resumed = compare("--resume", saved, settings=None)
    assert status == 0 and resumed["complete"]
    assert outcome(resumed) == outcome(whole)


@pytest.mark.usefixtures("no_plot")
def test_resuming_after_a_stop_within_a_step_starts_from_the_last_checkpoint(compare, monkeypatch, tmp_path):
    options = ["--optimizers", "adamw", "smmf"]
    whole = compare(*options)[1]
    saved = str(tmp_path / "saved")
    with monkeypatch.context() as patch:
        interrupt(patch, "smmf", 8, stop_at_once)
        status, partial = compare(*options, "--save", saved, "--save-every", "3")
    assert status == 130 and partial["runs"][1]["steps"] == 8
    assert load_checkpoint(tmp_path / "saved")["run"]["step"] == 6

    trained = []
    train_step = TrainingRun.train_step
    monkeypatch.setattr(TrainingRun, "train_step", lambda run: (trained.append((run.name, run.step)), train_step(run)))
    resumed = compare("--resume", saved, *options)[1]
    assert trained == [("smmf", step) for step in range(6, STEPS)], "only what was missing is to be trained"
    assert outcome(resumed) == outcome(whole)
    again = compare("--resume", saved)[1]
    assert len(trained) == STEPS - 6 and outcome(again) == outcome(whole)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_without_save(compare, monkeypatch, capsys, tmp_path):
    interrupt(monkeypatch, "hfac", 3, press_ctrl_c)
    status, report = compare("--optimizers", "adamw", "hfac")
    printed = capsys.readouterr().out
    assert status == 130 and [run["status"] for run in report["runs"]] == ["finished", "interrupted"]
    assert f"4/{STEPS} interrupted" in printed and "--resume" not in printed
    assert (tmp_path / "out" / "compare.png").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C must work as before afterwards"


@pytest.mark.usefixtures("no_plot")
def test_resume_refuses_what_differs(compare, text, capsys, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    saved = str(tmp_path / "saved")
    compare("--optimizers", "adamw", "--text", str(copy), "--save", saved)
    capsys.readouterr()
    message = error_of(capsys, "--resume", saved, "--d-model", "32", "--seed", "0", "--steps", "99")
    assert "--d-model (saved: 16, given: 32)" in message and "--steps (saved: 12, given: 99)" in message
    assert "--seed" not in message.partition("differ")[2]
    assert "holds one" in error_of(capsys, "--save", saved, "--text", str(copy))
    copy.write_bytes(text.read_bytes()[::-1])
    assert "has changed since" in error_of(capsys, "--resume", saved)


def test_a_failed_save_leaves_the_last_checkpoint(monkeypatch, tmp_path):
    content = {"settings": {}, "text_sha256": "", "environment": {}, "plan": [], "finished": [], "run": None}
    save_checkpoint(tmp_path, {**content, "plan": [1]})
    monkeypatch.setattr(checkpoint_module.os, "fsync", lambda handle: stop_at_once())
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {**content, "plan": [2]})
    assert load_checkpoint(tmp_path)["plan"] == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["compare.pt"]


def test_what_a_killed_save_has_left_is_removed(tmp_path):
    (tmp_path / "compare.pt.a1b2.tmp").write_bytes(b"half of it")
    (tmp_path / "notes.tmp").write_text("not ours")
    save_checkpoint(tmp_path, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["compare.pt", "notes.tmp"]


def without(content, *path):
    *parents, last = path
    for key in parents:
        content = content[key]
    del content[last]


DAMAGED = {
    "no settings": (lambda c: without(c, "settings"), "it has no settings"),
    "missing setting": (lambda c: without(c, "settings", "steps"), "it has no setting steps"),
    "unknown setting": (lambda c: c["settings"].update(dropout=0.1), "it has an unknown setting dropout"),
    "another type": (lambda c: c["settings"].update(steps="many"), "its setting steps is 'many'"),
    "no number": (lambda c: c["settings"].update(lr=(("all", "fast"),)), "its setting lr is"),
    "another plan": (lambda c: c.update(plan=[("smmf", 1e-3)]), "its plan is not that of its settings"),
    "foreign runs": (lambda c: c.update(finished=[{"optimizer": "adamw"}]), "its finished runs are not those"),
    "missing tensor": (
        lambda c: without(c, "run", "model", next(iter(c["run"]["model"]))),
        "its run under way cannot be loaded (Error(s) in loading",
    ),
    "another shape": (
        lambda c: c["run"]["optimizer"]["state"][0].update(exp_avg_sq_row=torch.zeros(3)),
        "'exp_avg_sq_row' must have shape",
    ),
    "no state of a parameter": (
        lambda c: without(c, "run", "optimizer", "state", 0),
        "the optimizer's state of 1 parameters is missing",
    ),
    "no generator": (lambda c: without(c, "run", "batches"), "its run under way lacks batches"),
    "unknown part": (lambda c: c["run"].update(scaler={}), "its run under way has an unknown scaler"),
    "beyond the end": (lambda c: c["run"].update(step=99), "at step 99 of 12"),
}


@pytest.mark.usefixtures("no_plot", "ctrl_c")
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_checkpoint_is_not_trusted(compare, monkeypatch, capsys, tmp_path, damage):
    with monkeypatch.context() as patch:
        interrupt(patch, "hfac", 6, press_ctrl_c)
        compare("--optimizers", "hfac", "--lr", "hfac=1e-2", "--save", str(tmp_path / "saved"))
    path = tmp_path / "saved" / "compare.pt"
    content = torch.load(path, weights_only=True)
    change, said = DAMAGED[damage]
    change(content)
    torch.save(content, path)
    capsys.readouterr()
    message = error_of(capsys, "--resume", str(tmp_path / "saved"))
    assert "--resume cannot continue" in message and said in message and "start anew" in message


@pytest.mark.usefixtures("no_plot")
def test_settings_are_shown_as_they_are_given(compare, capsys, tmp_path):
    saved = str(tmp_path / "saved")
    compare("--optimizers", "adamw", "--save", saved)
    capsys.readouterr()
    message = error_of(capsys, "--resume", saved, "--lr", "adamw=1e-3", "--warmup-steps", "2", "--optimizers", "hfac")
    assert "--lr (saved: adamw=0.01, given: adamw=0.001)" in message
    assert shown("lr", ()) == "one for each optimizer" and shown("lr", (("all", 0.5),)) == "0.5"
    assert "--warmup-steps (saved: a tenth of the steps, given: 2)" in message
    assert "--optimizers (saved: adamw, given: hfac)" in message


def test_a_checkpoint_is_data_only_and_of_this_format(tmp_path, capsys):
    save_checkpoint(tmp_path, {"settings": Settings()})  # an object, which only running code could rebuild
    assert "damaged, or no checkpoint" in error_of(capsys, "--resume", str(tmp_path))
    save_checkpoint(tmp_path, {"format": 99})
    assert "format 1" in (message := error_of(capsys, "--resume", str(tmp_path))) and "has 99" in message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--optimizers", "adam"], ["adamw, adafactor, hfac, smmf", "'adam'"]),
        (["--optimizers", ","], ["at least one of adamw", "','"]),
        (["--lr", "1,,2"], ["--lr", "number", "''"]),
        (["--steps", "0"], ["--steps", "at least 1", "'0'"]),
        (["--layers", "-2"], ["--layers", "at least 1", "'-2'"]),
        (["--d-model", "many"], ["--d-model", "whole number", "'many'"]),
        (["--d-model", "10", "--heads", "4"], ["multiple of --heads", "10", "4", "--d-model 12"]),
        (["--rounding", "stochastic"], ["--rounding", "--dtype float32", "--dtype bfloat16"]),
        (["--master", "split", "--rounding", "stochastic"], ["--rounding and --master", "--dtype bfloat16"]),
        (["--warmup-steps", "9", "--steps", "9"], ["--warmup-steps", "less than --steps", "9"]),
        (["--lr", "-1"], ["--lr", "above 0", "'-1'"]),
        (["--lr", "hfac=nan"], ["--lr", "above 0", "'nan'"]),
        (["--lr", "sgd=1"], ["--lr", "adamw, adafactor, hfac, smmf", "'sgd'"]),
        (["--lr", "hfac=1", "--optimizers", "smmf"], ["--lr", "smmf", "got hfac", "drop"]),
        (["--weight-decay", "inf"], ["--weight-decay", "at least 0", "'inf'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["--device", "tpu"], ["--device", "cuda:N", "'tpu'"]),
        (["--text", "no/such/file"], ["--text", "exist", "no/such/file"]),
        (["--text", "EMPTY"], ["no text", "--text"]),
        (["--text", "BINARY"], ["no file with text in it", "NUL bytes are left out", "--text"]),
        (["--seed", str(2**64)], ["--seed", "from 0 to 18446744073709551615", "'18446744073709551616'"]),
        (["--text", "SHORT"], ["too short", "at least 650 bytes", "649", "--context"]),
        (["--resume", "nowhere"], ["--resume", "--save", "nowhere", "does not exist"]),
        (["--resume", "BROKEN"], ["--resume", "cannot read", "compare.pt", "start anew"]),
        (["--text", "SHORT", "--context", "8", "--out", "SHORT"], ["--out", "directory", "give another"]),
    ],
)
def test_bad_input(options, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BINARY").mkdir()
    (tmp_path / "BINARY" / "weights").write_bytes(b"\0" * 1000)
    (tmp_path / "SHORT").write_text("x" * 649)
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "compare.pt").write_bytes(b"PK not a checkpoint")
    message = error_of(capsys, *(str(tmp_path / word) if word.isupper() else word for word in options))
    for part in parts:
        assert part in message


def test_cuda_asked_and_absent(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = error_of(capsys, "--device", "cuda:1")
    assert "requires a CUDA device" in message and "--device cpu" in message


def test_without_rich_and_matplotlib(compare, monkeypatch, capsys, tmp_path):
    for name in ("rich.progress", "rich.console", "rich.table", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert compare("--optimizers", "adamw")[0] == 0
    printed = capsys.readouterr().out
    assert "python -m pip install matplotlib" in printed and "optimizer ms/step" in printed
    assert not (tmp_path / "out" / "compare.png").exists()


@pytest.mark.usefixtures("no_plot")
def test_on_a_terminal(compare, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run = compare("--optimizers", "adamw")[1]["runs"][0]
    printed = capsys.readouterr().out
    assert (
        f"{STEPS}/{STEPS}" in printed and "Comparison of optimizers" in printed and f"{run['val_loss']:.4f}" in printed
    )


def test_sweep_reports_each_optimizer_at_its_best(compare, capsys):
    report = compare("--optimizers", "adamw,hfac", "--sweep", "--lr", "1e-2")[1]
    assert [(run["optimizer"], run["lr"]) for run in report["runs"]] == [
        (name, lr) for name in ("adamw", "hfac") for lr in (0.005, 0.01, 0.02)
    ]
    for name, best in report["best"].items():
        assert best["val_loss"] == min(run["val_loss"] for run in report["runs"] if run["optimizer"] == name)
    printed = capsys.readouterr().out
    assert f"{report['best']['hfac']['lr']:.3g}: {report['best']['hfac']['val_loss']:.4f}*" in printed


def test_best_run_ignores_diverged_and_interrupted_ones():
    runs = [
        {"optimizer": "hfac", "lr": lr, "status": status, "val_loss": loss, "steps": 0, "history": []}
        for lr, status, loss in [(1, "diverged", math.nan), (2, "finished", 3.0), (3, "interrupted", 1.0)]
    ]
    assert best_runs(runs) == [runs[1]]
    assert learning_rate_lines(runs)[0].count("*") == 1 and "edge" not in learning_rate_lines(runs)[0]
    assert "edge" in learning_rate_lines(runs[1:])[0]


def test_a_diverged_run_ends_early(compare, capsys):
    status, report = compare("--optimizers", "adamw", "--lr", "1e30", "--grad-clip", "0")
    (run,) = report["runs"]
    assert status == 0 and run["status"] == "diverged" and run["val_loss"] is None and run["steps"] == 5
    assert f"5/{STEPS} diverged" in capsys.readouterr().out


def test_text_of_a_directory(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.txt").write_text("b" * 50)
    (tmp_path / "a.txt").write_text("a" * 50)
    (tmp_path / ".hidden").write_text("h" * 50)
    (tmp_path / "binary").write_bytes(b"\0" * 50)
    corpus = load_corpus([str(tmp_path)], 1000, 4)
    assert bytes(corpus.train) == b"a" * 50 + b"b" * 40 and bytes(corpus.validation) == b"b" * 10 and corpus.files == 2
    assert len(load_corpus([str(tmp_path)], 60, 4).train) == 54


def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path):
    path = tmp_path / "large.txt"
    with path.open("wb") as stream:
        stream.truncate(2**28)
    tracemalloc.start()
    try:
        corpus = load_corpus([str(path)], 1000, 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(corpus.train) + len(corpus.validation) == 1000
    assert peak < 2**24


def test_text_of_the_standard_library():
    corpus = load_corpus([], 200_000, 64)
    assert len(corpus.train) == 180_000 and len(corpus.validation) == 20_000
    assert b"import" in bytes(corpus.train) and corpus.sha256 == load_corpus([], 200_000, 64).sha256


def test_batches():
    data = torch.arange(100, dtype=torch.uint8)
    inputs, targets = training_batch(data, 8, 10, torch.Generator().manual_seed(1))
    assert inputs.shape == (8, 10) and torch.equal(inputs + 1, targets)
    assert torch.equal(inputs, training_batch(data, 8, 10, torch.Generator().manual_seed(1))[0])
    assert inputs[:, 0].unique().numel() > 1
    batches = list(validation_batches(data, 2, 10, 3))
    assert len(batches) == 3 and all(torch.equal(inputs + 1, targets) for inputs, targets in batches)
    seen = torch.cat([inputs for inputs, _ in batches]).flatten()
    assert seen.unique().numel() == seen.numel() == 60
    assert sum(len(inputs) for inputs, _ in validation_batches(data, 4, 10, 100)) == 9, "as many as there are"


def test_model_is_causal_and_starts_out_ignorant():
    torch.manual_seed(0)
    model = ByteGPT(32, 2, 4, 16)
    inputs = torch.randint(256, (2, 16))
    changed = inputs.clone()
    changed[:, 9] += 1 - 2 * (changed[:, 9] == 255)
    before, after = model(inputs), model(changed)
    assert before.shape == (2, 16, 256)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])
    assert model.loss(inputs, inputs.roll(-1, 1)).item() == pytest.approx(math.log(256), abs=0.8)


def test_schedule():
    settings = Settings(steps=110, warmup_steps=10)
    rates = [scheduled_lr(settings, 2.0, step) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1) and rates[109] == pytest.approx(0.2, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert scheduled_lr(Settings(steps=110, warmup_steps=0, schedule="constant"), 2.0, 109) == 2.0
    assert scheduled_lr(Settings(steps=100, warmup_steps=0, schedule="linear"), 2.0, 50) == pytest.approx(1.1)


def test_learning_rates_are_the_advised_ones():
    """As docs/choosing.md has them, relative to AdamW's; the study of losses begins its sweeps at the same."""
    for name, least, most in (("hfac", 0.6, 0.9), ("hfac-int8", 1.0, 1.25), ("smmf", 1.4, 2.0), ("adafactor", 10, 10)):
        assert least <= CHOICES[name].learning_rate / CHOICES["adamw"].learning_rate <= most, name
    assert CHOICES["adamw"].learning_rate == 4e-3 and ADVISED.keys() == CHOICES.keys()
    assert {name: CONTENDERS[name].relative for name in ADVISED} == ADVISED
    assert CONTENDERS["smmf"].relative == (1.6, 2.5)


def test_every_step_takes_its_learning_rate_from_the_schedule(text):
    settings = Settings(d_model=8, heads=1, layers=1, context=8, batch_size=2, steps=4, warmup_steps=2)
    run = TrainingRun(settings, load_corpus([str(text)], 1000, 8), "smmf", 0.5)
    taken = []
    for _ in range(4):
        run.train_step()
        taken.append({group["lr"] for group in run.optimizer.param_groups})
    assert taken == [{scheduled_lr(settings, 0.5, step)} for step in range(4)]


def test_how_weights_are_stored_reaches_our_optimizers(text, compare, capsys):
    options = ("--dtype", "bfloat16", "--rounding", "stochastic", "--master", "split8", "--optimizers", "adamw", "smmf")
    status, report = compare(*options)
    assert status == 0 and report["settings"]["master"] == "split8"
    assert "smmf round stochastically, master=split8." in capsys.readouterr().out
    settings = Settings(d_model=8, heads=1, layers=1, dtype="bfloat16", rounding="stochastic", master="split8")
    corpus = load_corpus([str(text)], 1000, 8)
    for name in ("hfac", "smmf"):
        groups = TrainingRun(settings, corpus, name, 0.1).optimizer.param_groups
        assert {(group["rounding"], group["master"]) for group in groups} == {("stochastic", "split8")}


def test_state_bytes_and_weight_decay_groups():
    model = torch.nn.Linear(6, 5)
    optimizer = build_optimizer("adamw", model, 1e-3, 0.1)
    model(torch.ones(6)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 4 * 35 + 2 * 4
    assert [(group["params"][0].dim(), group["weight_decay"]) for group in optimizer.param_groups] == [
        (2, 0.1),
        (1, 0.0),
    ]


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "hfac", "compare", "--help"], capture_output=True, text=True, check=True
    )
    assert "--optimizers" in done.stdout and "usage: hfac compare" in done.stdout
