"""What is installed: the sdist holds all that it is built from, a wheel from it equals one from the checkout, and one
without kernels says so by its name."""

import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import wheels

import hfac
from hfac import backends
from hfac.backends import cpu
from hfac.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this tree: packaging leaves files in the folder that it works in."""
    folder = tmp_path_factory.mktemp("copy") / "hfac"
    unwanted = shutil.ignore_patterns(".git", ".*cache", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=unwanted)


@pytest.fixture(scope="module")
def source(checkout, tmp_path_factory):
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    return wheels.unpacked(wheels.sdist(folder, checkout), folder)


def files_of(wheel):
    """Name -> content of a wheel's files but its own list of them; compiled code by its name alone."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: b"" if name.endswith(".so") else archive.read(name)
            for name in archive.namelist()
            if not name.endswith("RECORD")
        }


def test_the_sdist_holds_every_file_of_the_repository(source):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # this is an sdist itself
        pytest.skip("no git history here")
    missing = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file() and not (source / name).exists()}
    assert not missing


def test_a_wheel_without_kernels_has_the_tag_of_pure_python(source, tmp_path):
    found = wheels.wheel(source, tmp_path, environment={"HFAC_NATIVE": "0"})
    assert found.name.endswith("-py3-none-any.whl")
    files = files_of(found)
    assert not [name for name in files if name.endswith(".so") or ".data/" in name]
    assert "hfac/triton_kernels/__init__.py" in files and "hfac/py.typed" in files
    assert json.loads(files["hfac/_build_info.json"])["why_not"] == "built with HFAC_NATIVE=0"


def test_a_build_prints_no_line_for_each_file_that_it_copies(source, tmp_path):
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path)]
    mine = os.environ | {"HFAC_NATIVE": "0"}
    said = subprocess.run(command, cwd=source, env=mine, capture_output=True, text=True, check=True)
    assert list(tmp_path.glob("lib*/hfac/reference/__init__.py"))
    assert "copying" not in said.stdout + said.stderr


def test_a_compiler_that_fails_makes_a_pure_wheel_with_its_words_and_fails_where_kernels_are_demanded(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo it && exit 0\necho x.cpp:1: error: out of patience >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "HFAC_CUDA": "0"}
    found = wheels.wheel(source, tmp_path / "pure", environment=environment)
    assert found.name.endswith("-py3-none-any.whl")
    info = json.loads(files_of(found)["hfac/_build_info.json"])
    assert "out of patience" in info["why_not"] and "out of patience" in info["said"]
    with pytest.raises(subprocess.CalledProcessError):
        wheels.wheel(source, tmp_path / "demanded", environment=environment | {"HFAC_NATIVE": "1"})
    assert not list((tmp_path / "demanded").glob("*.whl"))


def test_a_tree_without_sources_is_refused(source, tmp_path):
    """As an sdist was that held no csrc: its wheel had no kernels, and nobody was told."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    said = subprocess.run([sys.executable, "setup.py", "-q", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode and "csrc" in said.stderr


@pytest.mark.slow  # compiles the CPU kernels twice
def test_a_wheel_from_the_sdist_equals_one_from_the_checkout_and_steps_without_a_compiler(source, checkout, tmp_path):
    environment = {"HFAC_CUDA": "0", "HFAC_NATIVE": "1", "CXXFLAGS": "-O0"}
    first = wheels.wheel(source, tmp_path / "sdist", environment=environment)
    second = wheels.wheel(checkout, tmp_path / "checkout", environment=environment)
    assert first.name == second.name and "none-any" not in first.name
    assert files_of(first) == files_of(second)
    assert [name for name in files_of(first) if name.endswith(".so")]
    assert "have stepped" in wheels.stepped(first, sys.executable, tmp_path / "empty")


@pytest.fixture
def unbuilt(monkeypatch):
    """As where the extension is not built, by a compiler that failed."""
    info = {"why_not": "g++ failed: error: no", "said": "x.cpp:1:\nerror: no"}
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "build_info", lambda: info)
    backends._resolved.cache_clear()
    backends._warn_unbuilt.cache_clear()
    yield
    backends._resolved.cache_clear()
    backends._warn_unbuilt.cache_clear()


def test_a_step_without_kernels_says_so_once(unbuilt):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for optimizer in (hfac.HFac, hfac.SMMF):
            param = torch.nn.Parameter(torch.ones(4, 4))
            param.grad = torch.ones(4, 4)
            optimizer([param]).step()
    (said,) = [str(warning.message) for warning in caught]
    assert "plain torch" in said and "g++ failed: error: no" in said and "pip install" in said


def test_a_checkout_that_hides_an_installed_hfac_with_kernels_says_so(unbuilt, monkeypatch, tmp_path):
    installed = tmp_path / "hfac"
    installed.mkdir()
    (tmp_path / "hfac-0.2.0.dist-info").mkdir()
    (tmp_path / "hfac-0.2.0.dist-info" / "METADATA").write_text("Name: hfac\nVersion: 0.2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert str(installed) not in cpu.why_not(torch.device("cpu"))  # it has no kernels either
    (installed / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    said = cpu.why_not(torch.device("cpu"))
    assert str(installed) in said and "another folder" in said and "pip install -e" in said


def test_the_doctor_shows_what_the_compiler_said(unbuilt, capsys):
    main(["doctor"])
    assert "the compiler said: x.cpp:1:\n      error: no" in capsys.readouterr().out
