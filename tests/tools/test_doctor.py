"""`hfac doctor`: every backend of the table, with what it is made of or why it is not here."""

import json

import pytest
import torch

import hfac
from hfac import backends
from hfac.backends import cpu
from hfac.cli import main

NATIVE = {
    "version": "1.2.3",
    "compiler": "g++ 99",
    "isa": "avx2",
    "isa_compiled": ["plain", "avx2"],
    "isa_usable": ["plain", "avx2"],
}


class Extension:
    """Stands for hfac._C."""

    def __init__(self, **cuda):
        self.cuda = {"compiled": False, "devices": [], "driver_version": 0, "runtime_version": 0, "why_not": "no nvcc"}
        self.cuda |= cuda

    def info(self):
        return NATIVE

    def cuda_info(self):
        return self.cuda


def doctor(capsys, *options):
    assert main(["doctor", *options]) == 0
    return capsys.readouterr().out


def as_json(capsys):
    found = json.loads(doctor(capsys, "--json"))
    return found, {backend["name"]: backend for backend in found["backends"]}


def test_every_backend_is_named_with_its_state(capsys):
    found, rows = as_json(capsys)
    assert list(rows) == list(backends.TABLE)
    here = {name for name in rows if rows[name]["here"]}
    assert set(backends.available(torch.device("cpu"))) <= here
    for name, row in rows.items():
        assert (row["why_not"] is None) == (name in here), name
        assert bool(row["serves"]) == (name in here), name
    assert rows["reference"]["serves"][0] == "cpu"
    assert found["auto"]["cpu"] == backends.available(torch.device("cpu"))[0]
    assert (found["hfac"], found["torch"]) == (hfac.__version__, torch.__version__)
    assert found["threads"] == torch.get_num_threads()


def test_the_text_tells_what_the_json_tells(capsys):
    found, rows = as_json(capsys)
    text = doctor(capsys)
    for name, row in rows.items():
        assert f"{name} ({row['summary']}): {'here' if row['here'] else 'not here'}" in text
        assert row["here"] or row["why_not"] in text
        for value in row["details"].values():
            assert (", ".join(value) if isinstance(value, list) else str(value)) in text
    assert f"Python {found['python']}" in text


def without_extension(monkeypatch, why="it fell off the table"):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_IMPORT_ERROR", why, raising=False)
    monkeypatch.setattr(cpu, "_build_failure", lambda: why)


def on_a_machine_with(monkeypatch, *programs):
    """Which of nvidia-smi, nvcc and g++ are on the path."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name in programs else None)


def test_without_a_gpu_nothing_is_advised_for_one(capsys, monkeypatch):
    """Each lack is named once, with one command, where it can be mended."""
    without_extension(monkeypatch)
    on_a_machine_with(monkeypatch, "g++", "nvcc")
    _, rows = as_json(capsys)
    for name in ("cuda", "triton"):
        assert rows[name]["fix"] == "nothing to do here: it is for GPUs, and this machine has none with a driver"
    text = doctor(capsys)
    assert text.count("pip install") == 1 and "HFAC_CUDA" not in text and "nvidia-smi" not in text


def test_one_command_builds_the_kernels_for_both(capsys, monkeypatch):
    without_extension(monkeypatch)
    on_a_machine_with(monkeypatch, "g++", "nvcc", "nvidia-smi")
    _, rows = as_json(capsys)
    assert rows["cuda"]["fix"] == rows["cpu"]["fix"] and rows["cpu"]["fix"].startswith("HFAC_CUDA=1 ")
    text = doctor(capsys)
    assert text.count("-m pip install --force-reinstall") == 1
    assert text.index("HFAC_CUDA=1") < text.index("fix: the command above, which builds both")


def test_a_backend_of_someone_else_is_shown_with_its_own_words(capsys, monkeypatch):
    theirs = backends.Backend("theirs", "kernels for a TPU", lambda device: "No TPU. Buy one.", dict)
    monkeypatch.setitem(backends.TABLE, "theirs", theirs)
    _, rows = as_json(capsys)
    assert (rows["theirs"]["why_not"], rows["theirs"]["fix"]) == ("No TPU. Buy one.", None)
    assert "why not: No TPU. Buy one." in doctor(capsys)


def test_without_the_extension_it_says_why_and_what_to_run(capsys, monkeypatch):
    without_extension(monkeypatch)
    found, rows = as_json(capsys)
    assert found["auto"]["cpu"] == "reference"
    assert not rows["cpu"]["here"]
    assert "it fell off the table" in rows["cpu"]["why_not"]
    assert "-m pip install" in rows["cpu"]["fix"]
    text = doctor(capsys)
    assert "why not: the extension hfac._C is not built (it fell off the table)" in text
    assert f"fix: {rows['cpu']['fix']}" in text


def test_without_a_compiler_the_fix_begins_with_one(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_build_failure", lambda: "no C++ compiler")
    monkeypatch.setattr("shutil.which", lambda name: None)
    _, rows = as_json(capsys)
    assert rows["cpu"]["fix"].startswith("install a C++17 compiler")
    assert "-m pip install" in rows["cpu"]["fix"]


def test_the_extension_is_described(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "_C", Extension())
    _, rows = as_json(capsys)
    assert rows["cpu"]["here"]
    details = rows["cpu"]["details"]
    assert (details["version"], details["compiler"], details["instruction_set_in_use"]) == ("1.2.3", "g++ 99", "avx2")
    assert details["instruction_sets_compiled"] == ["plain", "avx2"]
    assert rows["cuda"]["details"] == {"extension": "no nvcc"}
    text = doctor(capsys)
    assert "compiler: g++ 99" in text
    assert "instruction sets compiled: plain, avx2" in text


def test_a_cuda_part_without_a_driver_is_described(capsys, monkeypatch):
    devices = [{"name": "H200", "capability": (9, 0)}]
    extension = Extension(compiled=True, devices=devices, driver_version=0, runtime_version=12040, why_not="no driver")
    monkeypatch.setattr(cpu, "_C", extension)
    _, rows = as_json(capsys)
    assert rows["cuda"]["details"] == {
        "runtime": "12.4",
        "driver": "none",
        "devices": ["H200 (sm_90)"],
        "extension": "no driver",
    }
    assert rows["triton"]["details"]["driver"] == "none"


@pytest.mark.parametrize(
    "cuda, wanted",
    [
        pytest.param({}, "HFAC_CUDA=1", id="built-without-cuda"),
        pytest.param({"compiled": True, "why_not": "no device"}, "an NVIDIA GPU and a driver", id="no-gpu"),
        pytest.param(
            {"compiled": True, "devices": [{"name": "H200", "capability": (9, 0)}], "why_not": "no code"},
            "HFAC_CUDA_ARCHS",
            id="no-code-for-it",
        ),
    ],
)
def test_what_makes_the_cuda_backend_work_is_said(capsys, monkeypatch, cuda, wanted):
    on_a_machine_with(monkeypatch, "g++", "nvidia-smi")
    monkeypatch.setattr(cpu, "_C", Extension(**cuda))
    _, rows = as_json(capsys)
    assert wanted in rows["cuda"]["fix"]
    assert f"fix: {rows['cuda']['fix']}" in doctor(capsys)


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["doctor", "--jsno"])
    assert refused.value.code == 2
    assert "--jsno" in capsys.readouterr().err
