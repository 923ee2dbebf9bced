"""`make gpu-report` without a GPU: it says so, and its dry run goes through everything that it can."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from bench import gpu_report, launches, shapes  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_report.main([]) == 2
    assert "there is no GPU that torch" in capsys.readouterr().err


def test_dry_run(tmp_path, capfd):
    """On the CPU, through the CUDA kernels' emulation."""
    emulated = pytest.importorskip("emulated")
    if emulated.native is None:
        pytest.skip(emulated.WHY_NOT)
    assert gpu_report.main(["--dry-run", "--out", str(tmp_path)]) == 0, capfd.readouterr().out[-3000:]
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert {check["name"]: check["result"] for check in written["checks"]} == {"one-step": "ok", "measurements": "ok"}
    measured = {(row["name"], row["backend"], row["dtype"]) for row in written["rows"].values()}
    for dtype in ("float32", "bfloat16"):
        assert {(name, "cuda-emulated", dtype) for name in ("HFac", "SMMF")} <= measured
        assert {("AdamW", "torch fused", dtype), ("AdamW", "torch foreach", dtype), ("Adafactor", "torch", dtype)} <= (
            measured
        )
    text = path.with_suffix(".md").read_text()
    assert "## Checks" in text and "| one-step | ok |" in text and "cuda-emulated" in text


def test_a_part_that_fails_is_written_and_does_not_stop_the_others(tmp_path):
    report = gpu_report.Report(tmp_path, torch.device("cpu"), ())
    assert not report.run("broken", [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"], 60)
    assert not report.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert not report.run("absent", ["no-such-program"], 1)
    assert report.run("good", [sys.executable, "-c", "print('fine')"], 60)
    assert [check["result"] for check in report.checks] == ["WRONG", "cut off after 1 s", "could not be started", "ok"]
    assert [check["said"] for check in report.checks][0] == "what went wrong"
    assert not report.correct
    text = report.write().with_suffix(".md").read_text()
    assert "| broken | WRONG |" in text and "what went wrong" in text


def test_lists_of_the_report():
    sizes = [torch.Size(shape).numel() for shape in shapes.parse("llama3-8b")]
    assert len(sizes) == 291 and sum(sizes) == 8_030_261_248
    assert sum(torch.Size(shape).numel() for shape in shapes.parse("gpt2")) == 124_439_808
    assert len(shapes.parse("2000x 64x64")) == 2000
    for cases in (gpu_report.CASES, gpu_report.QUICK_CASES, gpu_report.DRY_CASES):
        for name, _, _ in cases:
            assert shapes.parse(name)


def test_launches_are_counted_on_a_gpu_only():
    assert launches.count(lambda: None, torch.device("cpu")) is None


def test_it_stays_below_ten_minutes():
    times = gpu_report.FULL
    assert times.build + times.parity + 2 * times.sanitizer + times.bench + times.options + times.profile <= 540
    times = gpu_report.QUICK
    assert times.build + times.parity + times.bench + times.profile <= 120
