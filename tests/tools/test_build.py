"""What setup.py compiles, for which GPUs, and what it says meanwhile, with compilers that only write down how they were
called."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case $1 in
    --version) echo "a compiler, release 1.2,"; exit;;
    --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_100\\n'; exit;;
    --query-gpu=compute_cap) cat "$CAPABILITIES"; exit;;
esac
while [ $# -gt 0 ]; do
    case $1 in -o) out=$2;; -MF) dependencies=$2;; esac
    shift
done
[ -z "$dependencies" ] || echo "$out:" > "$dependencies"
echo built > "$out"
"""


@pytest.fixture
def build(tmp_path):
    """Builds the extension; returns what was printed, the calls of each compiler, and what the build noted down."""

    def built(*, gpus=None, path="", **environment):
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        for name in ("g++", "nvcc", *(["nvidia-smi"] if gpus is not None else [])):
            (programs / name).write_text(COMPILER)
            (programs / name).chmod(0o755)
        (tmp_path / "capabilities").write_text("".join(f"{gpu}\n" for gpu in gpus or ()))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HFAC_", "CUDA_", "CXX"))}
        kept |= {"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": path, "HFAC_NATIVE": "1", "MAX_JOBS": "2"}
        kept |= {"CALLS": str(tmp_path / "calls"), "CAPABILITIES": str(tmp_path / "capabilities")}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
        done = subprocess.run(
            [*command, "--build-temp", tmp_path / "temp"],
            cwd=ROOT,
            env=kept | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        calls = [call.split(" ", 1) for call in (tmp_path / "calls").read_text().splitlines()]
        by_name = {name: [words for program, words in calls if program == name] for name in ("g++", "nvcc")}
        return done.stdout, by_name, json.loads((tmp_path / "lib" / "hfac" / "_build_info.json").read_text())

    return built


def targets(nvcc_calls):
    """The machine code, and the PTX, in what is linked: the same in every object."""
    of_each = {
        (tuple(re.findall(r"code=sm_(\d+)", call)), tuple(re.findall(r"code=compute_(\d+)", call)))
        for call in nvcc_calls
        if " -c " in call
    }
    (found,) = of_each
    names = {re.search(r'-DHFAC_ARCHITECTURES="([^"]*)"', call)[1] for call in nvcc_calls if " -c " in call}
    assert names == {",".join([*(f"sm_{arch}" for arch in found[0]), *(f"compute_{arch}" for arch in found[1])])}
    return found


@pytest.mark.parametrize("ninja", [True, False])
def test_every_finished_file_is_a_line(build, tmp_path, ninja):
    """A build of all GPUs takes minutes: [done/all] and the name, with ninja and where there is none."""
    if ninja:
        pytest.importorskip("ninja")
    else:
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "ninja.py").write_text("raise ImportError('not here')")
    printed, calls, _ = build(path="" if ninja else str(tmp_path / "hidden"))
    lines = re.findall(r"^hfac: \[(\d+)/(\d+)\] (\S+)$", printed, re.M)
    compiled = [call for each in calls.values() for call in each if " -c " in call]
    assert [int(done) for done, _, _ in lines] == list(range(1, len(lines) + 1))
    assert {int(every) for _, every, _ in lines} == {len(lines)} and len(lines) >= len(compiled) > 15
    named = {Path(name).stem for _, _, name in lines}
    for call in compiled:
        source, out = re.search(r" -c (\S+) -o (\S+)", call).groups()
        assert Path(out).stem in named or Path(source).stem in named


def test_without_cuda_nvcc_is_not_called(build):
    _, calls, noted = build(HFAC_CUDA="0")
    assert calls["nvcc"] == [] and calls["g++"]
    assert (noted["native"], noted["cuda"], noted["cuda_why_not"]) == (True, False, "HFAC_CUDA=0")


@pytest.mark.parametrize("asked", ["80;90;100", "8.0, 9.0, 10.0"])
def test_the_gpus_asked_for_and_ptx_of_the_last(build, asked):
    _, calls, noted = build(gpus=["8.6"], HFAC_CUDA_ARCHS=asked)
    assert targets(calls["nvcc"]) == (("80", "90", "100"), ("100",))
    assert noted["cuda"]


@pytest.mark.parametrize(
    ("gpus", "found"),
    [
        pytest.param(None, ["90"], id="no-gpu"),
        pytest.param([], ["90"], id="a-driver-without-gpus"),
        pytest.param(["8.6"], ["86"], id="one"),
        pytest.param(["10.0", "8.0", "8.0"], ["80", "100"], id="several"),
        pytest.param(["12.0"], ["90"], id="one-that-nvcc-does-not-know"),
    ],
)
def test_by_default_this_machines_gpus_or_90(build, gpus, found):
    _, calls, _ = build(gpus=gpus)
    assert targets(calls["nvcc"]) == (tuple(found), (found[-1],))


def test_as_many_compilers_at_a_time_as_allowed(build, tmp_path):
    """MAX_JOBS reaches ninja, whose own default is more than there are cores."""
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/ninja\nwhile [ $# -gt 1 ]; do shift; done\n')
    ninja.chmod(0o755)
    (tmp_path / "calls").touch()
    build(MAX_JOBS="3")
    assert (tmp_path / "ninja").read_text().startswith("-j 3 -C ")


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize(("gpu", "asked", "given"), [(False, None, "0"), (True, None, ""), (False, "1", "1")])
def test_make_compiles_cuda_kernels_where_a_gpu_is_or_when_asked(tmp_path, gpu, asked, given):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "find", "git"):
        (tools / tool).symlink_to(shutil.which(tool))
    if gpu:
        (tools / "nvidia-smi").write_text("#!/bin/sh\n")
        (tools / "nvidia-smi").chmod(0o755)
    environment = {"PATH": str(tools)} | ({} if asked is None else {"HFAC_CUDA": asked})
    command = ["make", "-n", "install", f"VENV={tmp_path / 'venv'}"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    (setting,) = re.findall(r"^(HFAC_CUDA=\S+) \S+ -m pip install .* -e ", said, re.M)
    shell = ["/bin/sh", "-c", f'{setting}; echo "$HFAC_CUDA"']
    assert subprocess.run(shell, env=environment, capture_output=True, text=True).stdout == given + "\n"
