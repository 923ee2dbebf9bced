"""The FSDP2 example, as its users start it: what some processes save, fewer go on with as if nothing had happened."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Forked

ROOT = Path(__file__).parents[2]
STEPS, SAVED_AT = 8, 4
#: Losses are printed with six digits; other numbers of ranks add up in other orders.
TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs gloo, as Linux and macOS have it")


EXAMPLE = ROOT / "examples" / "fsdp2_train.py"
#: without a GPU even where there is one: four processes need four
EVERYWHERE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(processes: int, *arguments: object, first_on_path: Path | None = None) -> subprocess.Popen[str]:
    path = os.pathsep.join(map(str, filter(None, [first_on_path, ROOT, os.environ.get("PYTHONPATH")])))
    environment = {**os.environ, **EVERYWHERE, "PYTHONPATH": path}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(EXAMPLE), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(processes: int, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Of each process, told what torchrun would tell it, which takes longer; of 0 one that is told nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {**EVERYWHERE, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    code = f"import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    started = [Forked(code, arguments, rank) for rank in ranks or [dict.fromkeys(("RANK", "LOCAL_RANK"))]]
    return [one.ended() for one in started]


def losses(ended: list[subprocess.CompletedProcess[str]]) -> dict[str, float]:
    """By step, and the last line's by "validation"."""
    assert not any(one.returncode for one in ended), ended
    output = ended[0].stdout
    found = {step: float(loss) for step, loss in re.findall(r"^step (\d+) loss ([\d.]+)$", output, re.MULTILINE)}
    (validation,) = re.findall(r"^validation loss ([\d.]+), optimizer state \d+ bytes per rank", output, re.MULTILINE)
    return {**found, "validation": float(validation)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some 25,000 bytes that a model can learn something about."""
    words = ["def", "return", "for", "in", "self", "(x)", "=", "import\n"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=5000)))
    return path


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [("hfac", 2, 1), *(pytest.param(name, 4, 2, marks=pytest.mark.slow) for name in ("hfac", "smmf"))],
)
def test_another_number_of_processes_goes_on(
    optimizer: str, before: int, after: int, text: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    common = ("--optimizer", optimizer, "--steps", STEPS, "--batch", 8, "--text", text)
    expected = losses(run(1, *common))
    saved = losses(run(before, *common, "--checkpoint", checkpoint, "--save-every", SAVED_AT))
    shutil.rmtree(checkpoint / f"step-{STEPS:07}")  # as if the run had ended after the save before
    resumed = losses(run(after, *common, "--checkpoint", checkpoint, "--resume"))
    assert list(expected) == [*map(str, range(STEPS)), "validation"]
    assert saved == pytest.approx(expected, abs=TOLERANCE)
    assert resumed == pytest.approx({key: expected[key] for key in list(expected)[SAVED_AT:]}, abs=TOLERANCE)


def test_a_user_error_is_one_sentence(text: Path, tmp_path: Path) -> None:
    """Of all processes one says it."""
    runs = {
        f"error: --resume requires a checkpoint in {tmp_path}, which holds none; start without --resume.": run(
            1, "--text", text, "--batch", 8, "--checkpoint", tmp_path, "--resume"
        ),
        "error: --batch must be a multiple of the number of processes (2), got 3.": run(2, "--batch", 3),
        "error: start it with torchrun, for example: torchrun --nproc-per-node 4": run(0),
    }
    for message, ended in runs.items():
        errors = "".join(one.stderr for one in ended)
        assert all(one.returncode for one in ended)
        assert errors.count(message) == 1, errors
        assert "UsageError" not in errors


#: One rank fails in its third step, and would wait for the others if it destroyed the process group, as NCCL does.
FAILS = """
import os
if os.environ.get("RANK") == "1":
    import time, torch, hfac
    torch.distributed.destroy_process_group = lambda *args: time.sleep(3600)
    real, steps = hfac.HFac.step, []
    def step(self, closure=None):
        steps.append(1)
        if len(steps) == 3:
            raise ArithmeticError("what happened on this rank")
        return real(self, closure)
    hfac.HFac.step = step
"""


def test_what_happens_on_one_rank_ends_all_and_is_shown(text: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS)
    started = torchrun(2, "--text", text, "--batch", 8, first_on_path=tmp_path)
    try:
        _, errors = started.communicate(timeout=240)
    finally:
        started.kill()
    assert started.returncode != 0
    assert "ArithmeticError: what happened on this rank" in errors
