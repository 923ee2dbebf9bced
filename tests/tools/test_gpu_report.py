"""`make gpu-report` without a GPU: its dry run, what it does with processes that fail, and what is compiled before."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import setuptools
import torch

from bench import (
    first_steps,
    gpu_child,
    gpu_objects,
    gpu_parts,
    gpu_report,
    gpu_steps,
    launches,
    options,
    session,
    shapes,
)
from bench.gpu_parts import DRY, FULL, PARTS, QUICK, UNCOMPILED, Step

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_report.main(["--out", str(tmp_path)]) == 2
    assert "there is no GPU that torch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def dry_run(folder, *options):
    command = [sys.executable, "-m", "bench.gpu_report", "--dry-run", "--out", str(folder), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def written(folder):
    """What stands in the JSON file; nothing before it is there."""
    path = next(folder.glob("*.json"), None)
    return json.loads(path.read_text()) if path else {"checks": [], "rows": {}}


def test_the_first_parts_of_a_dry_run(tmp_path):
    if emulated.native is None:
        pytest.skip(emulated.WHY_NOT)
    report = dry_run(tmp_path, "--only", "1,2")
    output = report.communicate()[0]
    assert report.returncode == 0, output[-3000:]
    found = written(tmp_path)
    results = {check["name"]: check["result"] for check in found["checks"]}
    assert results["1 versions"] == results["2 first steps"] == "ok" and results["1 build"].startswith("not run: ")
    assert [row["step"][:2] for row in found["tables"]["First steps"]] == ["ok"] * 4
    assert "8 options" not in output


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Killed while it measures the second list of part 4, it leaves parts 1 to 3 and the first list; another run does
    the rest and loses nothing of that."""
    if emulated.native is None:
        pytest.skip(emulated.WHY_NOT)
    report = dry_run(tmp_path, "--only", "1,2,3,4")
    while report.poll() is None and not written(tmp_path)["rows"]:
        time.sleep(0.02)
    report.kill()
    output = report.communicate()[0]
    found = written(tmp_path)
    results = {check["name"]: check["result"] for check in found["checks"]}
    early = ("1 versions", "2 first steps", "3 parity", "3 graphs", "3 large")
    assert all(results[name] == "ok" for name in early), (results, output[-3000:])
    assert results["1 build"].startswith("not run: ") and results["4 whole steps"].startswith("not finished")
    assert {row["dtype"] for row in found["rows"].values()} == {"bfloat16"}
    assert [row["step"][:2] for row in found["tables"]["First steps"]] == ["ok"] * len(found["tables"]["First steps"])

    report = dry_run(tmp_path, "--only", "steps,5,6,7,8")
    output = report.communicate()[0]
    assert report.returncode == 0, output[-3000:]
    found = written(tmp_path)
    results |= {check["name"]: check["result"] for check in found["checks"]}
    assert {name[0] for name in results} == set("12345678")
    for name, result in results.items():
        assert result == "ok" or re.fullmatch("not run: .+", result), (name, result)
    assert {"6 memcheck", "6 racecheck", "1 build"} >= {name for name, result in results.items() if result != "ok"}
    measured = {(row["name"], row["backend"], row["dtype"]) for row in found["rows"].values()}
    for dtype in ("float32", "bfloat16"):
        assert {("HFac", "cuda", dtype), ("SMMF", "cuda", dtype), ("AdamW", "torch fused", dtype)} <= measured
    assert {("Adafactor", "torch", "float32"), ("SMMF", "eager torch", "float32")} <= measured
    assert all(row["ms_samples"] and row["copy_gb_per_s_samples"] for row in found["rows"].values())
    assert {"Versions", "First steps", "Options"} <= found["tables"].keys()
    stem = next(tmp_path.glob("*.json")).stem
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.json", f"{stem}.md", f"{stem}-logs.tar.gz"}
    text = (tmp_path / f"{stem}.md").read_text()
    assert "| 3 parity | ok |" in text and "## Options" in text and "| SMMF | cuda |" in text
    last = output[output.index("part  ") :]
    assert len(last) < 8000 and "8 options" in last and "x AdamW" in last


def program(text):
    return [sys.executable, "-c", text]


@pytest.fixture
def report(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return gpu_report.Report(tmp_path / "out", FULL, folder, machine="some GPU")


def test_a_process_that_fails_is_written_and_does_not_stop_the_others(report, capsys):
    report.out.mkdir()
    steps = [
        Step("build", "versions", program("print('what went wrong'); raise SystemExit(3)")),
        Step("first", "slow", program("import time; time.sleep(60)")),
        Step("parity", "absent", ["no-such-program"]),
        Step("profile", "profile", program("raise SystemExit(3)"), wrong=()),
        Step("sanitize", "memcheck", program("raise SystemExit(9)"), wrong=(9,)),
        Step("sanitize", "racecheck", ["x"], missing="it is not on the path"),
        Step("more", "good", program("print('fine')")),
    ]
    results = []
    for step in steps:
        report.run(step, 8 if step.name != "slow" else 4)
        results.append(written(report.out)["checks"][-1]["result"])
    assert results[:1] + results[2:6] == [
        "WRONG",
        "could not be started",
        "failed: status 3",
        "WRONG",
        "not run: it is not on the path",
    ]
    assert re.fullmatch(r"cut off after \d+ s", results[1]) and results[-1] == "ok"
    assert not report.correct
    text = report.path.with_suffix(".md").read_text()
    assert "| 1 versions | WRONG |" in text and "what went wrong" in text
    assert len(list(report.out.iterdir())) == 3
    assert "8 good" in report.summary()


def test_nothing_that_a_process_started_is_left(report):
    """Neither a child in its group nor one in a session of its own, which a profiler may give the program it runs."""
    report.out.mkdir()
    child = "import subprocess, sys, time; time.sleep(60)"
    start = (
        f"import os, subprocess, sys, time; own = [sys.executable, '-c', {child!r}]; "
        "pids = [subprocess.Popen(own, start_new_session=new).pid for new in (False, True)]; "
        "print(*pids, os.getpgid(0) == os.getpid(), flush=True); "
    )
    for end in ("time.sleep(60)", "pass"):
        report.run(Step("profile", "profile", program(start + end), wrong=()), 6)
        *pids, own_group = (report.folder / "profile.log").read_text().splitlines()[0].split()
        assert len(pids) == 2 and own_group == "True"
        assert all_end(pids)


def running(pid):
    """Not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids):
    """Whether none is running; a process that has been killed may take a moment to give its memory back."""
    last = time.monotonic() + 20
    while any(map(running, pids)) and time.monotonic() < last:
        time.sleep(0.01)
    return not any(map(running, pids))


def test_a_report_that_is_ended_ends_what_it_started(tmp_path):
    if emulated.native is None:
        pytest.skip(emulated.WHY_NOT)
    process = dry_run(tmp_path, "--only", "2")
    while "first steps" not in process.stdout.readline():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not any(
        "bench.first_steps" in Path(f"/proc/{pid}/cmdline").read_text() for pid in children.read_text().split()
    ):
        time.sleep(0.01)
    pids = children.read_text().split()
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert all_end(pids)


def test_tests_that_were_cut_off_are_counted(report):
    report.out.mkdir()
    lines = ["a.py::b PASSED [ 1%]", "[gw1] [  2%] FAILED a.py::c", "[gw0] [  3%] PASSED a.py::d"]
    text = f"print({chr(10).join(lines)!r}, flush=True); import time; time.sleep(60)"
    report.run(Step("parity", "parity", program(text)), 6)
    (check,) = written(report.out)["checks"]
    assert (check["result"], check["said"]) == ("WRONG", "2 passed, 1 failed")


def test_numbers_are_in_the_files_while_a_process_runs(report):
    report.out.mkdir()
    seen = []
    text = (
        "import json, sys, time; path = sys.argv[-1]; "
        "open(path, 'a').write(json.dumps({'how': 'plain', 'ms': 1.5}) + chr(10)); time.sleep(1.5); "
        "open(path, 'a').write(json.dumps({'how': 'watch', 'ms': 2.5}) + chr(10) + '{'); time.sleep(60)"
    )
    write = report.write
    report.write = lambda: (write(), seen.append(len(written(report.out).get("tables", {}).get("Options", []))))
    report.run(Step("more", "options", program(text), rows="Options"), 6)
    assert seen == [0, 1, 2, 2]  # before it began, after each, at its end; half a line is not a row


def test_nothing_uses_kernels_that_were_not_built(report):
    report.out.mkdir()
    report.run(Step("build", "build", program("raise SystemExit(1)"), extension=False), 8)
    assert report.run(Step("parity", "parity", program("pass")), 8) is None
    assert report.run(Step("triton", "triton parity", program("pass"), extension=False), 8).status == 0
    results = [check["result"] for check in written(report.out)["checks"]]
    assert results == ["WRONG", "not run: the CUDA kernels were not built", "ok"]


def test_the_limits_keep_the_promise(tmp_path):
    """Seven minutes and three; where nothing was compiled before, the parts up to the measurements still fit."""
    assert sum(FULL.seconds.values()) <= FULL.whole - 5 <= 7 * 60 - 5
    assert sum(QUICK.seconds.values()) <= QUICK.whole - 5 <= 3 * 60 - 5
    steps, compiled = gpu_parts.steps(FULL, tmp_path, "90", tmp_path)
    assert not compiled
    names = ["versions", *(step.name for step in steps)]
    assert names == list(FULL.seconds) and list(dict.fromkeys(step.part for step in steps)) == list(PARTS)
    assert set(QUICK.seconds) < set(FULL.seconds) == set(DRY.seconds)
    until = names.index("whole steps") + 1
    assert sum(FULL.limit(name, compiled) for name in names[:until]) <= FULL.whole - 5
    assert FULL.limit("build", compiled) == UNCOMPILED["build"] > FULL.limit("build", True)
    for mode, said in ((FULL, r"in all .* (\d+) +\d+\n"), (QUICK, r"in all .* \d+ +(\d+)\n")):
        assert int(re.search(said, gpu_report.__doc__)[1]) == sum(mode.seconds.values())


def test_a_late_process_gets_what_is_left(report):
    """Not more than twice its own time, nor more than what is left of the whole; none at all when that is nothing."""
    report.out.mkdir()
    report.begin = time.monotonic() - FULL.whole + 8  # 8 s are left, 2 of them for the end
    report.promised = FULL.whole
    begin = time.monotonic()
    report.run(Step("more", "options", program("import time; time.sleep(60)")), 100)
    assert time.monotonic() - begin < 20
    assert report.run(Step("more", "more steps", program("pass")), 100) is None
    results = [check["result"] for check in written(report.out)["checks"]]
    assert results == ["cut off after 6 s", "not run: no time was left"]


def test_a_fault_of_the_report_does_not_stop_it(report, monkeypatch, capsys):
    def read(path):
        raise OSError("no more memory")

    steps = [Step("profile", "profile", program("pass")), Step("more", "options", program("print('fine')"))]
    monkeypatch.setattr(gpu_parts, "versions", lambda mode: Step("build", "versions", program("pass"), "Versions"))
    monkeypatch.setattr(gpu_parts, "steps", lambda *arguments: (steps, True))
    monkeypatch.setattr(gpu_parts, "profiled", read)
    assert gpu_report._run(report, PARTS, report.out) == 0
    assert "no more memory" in capsys.readouterr().out
    results = [check["result"] for check in written(report.out)["checks"]]
    assert results == ["ok", "failed: OSError('no more memory')", "ok"]


def test_parts_are_chosen_by_number_or_name(capsys):
    assert gpu_report.build_parser().parse_args(["--only", "5,more, 1"]).only == ("profile", "more", "build")
    with pytest.raises(SystemExit):
        gpu_report.build_parser().parse_args(["--only", "9"])
    assert "required are parts of build, first" in capsys.readouterr().err


def test_where_the_files_go(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    assert gpu_report.default_out(FULL) == gpu_report.default_out(QUICK) == ROOT / "bench" / "results"
    assert gpu_report.default_out(DRY) == ROOT / "bench-out"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert {gpu_report.default_out(mode) for mode in (FULL, QUICK, DRY)} == {tmp_path}
    names = {gpu_report.Report(tmp_path, mode, tmp_path, machine="A GPU").path.name for mode in (FULL, QUICK)}
    assert names == {"a-gpu.json", "a-gpu-quick.json"}  # numbers in a hurry never take the place of the others


def test_what_the_profiler_wrote_is_read(tmp_path):
    """As `ncu --csv --page raw` writes it: the program's lines, names, units, a line per launch."""
    heads = ["ID", "Kernel Name", "Block Size", "Grid Size", "gpu__time_duration.sum", "launch__registers_per_thread"]
    stalls = [f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in ("wait", "barrier", "lg")]
    lines = [[*heads, *stalls], ["", "", "", "", "us", "register/thread", "inst", "inst", "inst"]]
    lines.append(["0", "void hfac::smmf_tiles<hfac::BulkAccess<1>>(int)", "(256, 1, 1)", "(244, 1, 1)", "45.2", "128"])
    lines[-1] += ["1.50", "3.25", "0"]
    path = tmp_path / gpu_parts.PROFILED
    quoted = [",".join(f'"{cell}"' for cell in line) for line in lines]
    path.write_text("\n".join(["==PROF== Connected to process 1", *quoted]) + "\n")
    (row,) = gpu_parts.profiled(path)
    assert (row["kernel"], row["grid"], row["time"]) == ("smmf_tiles", "(244, 1, 1)", "45.2 us")
    assert row["registers"].startswith("128") and row["stalls"] == "barrier 3.2, wait 1.5"
    path.write_text("==ERROR== no permission\n")
    assert gpu_parts.profiled(path) == gpu_parts.profiled(tmp_path / "none") == []


def test_the_profiler_leaves_clocks_alone_and_sees_all_three_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "find", lambda tool: f"/opt/{tool}")
    steps, _ = gpu_parts.steps(FULL, tmp_path, "90", tmp_path)
    commands = {step.name: " ".join(step.command) for step in steps}
    assert "--clock-control none --profile-from-start off" in commands["profile"]
    assert "regex:smmf_tiles|hfac_stats|hfac_update" in commands["profile"]
    assert "--report-api-errors no" in commands["memcheck"] and "torch" not in commands["racecheck"]
    # Triton's cases have a part of their own, later: they compile, and would use up the time of the others.
    for name in ("parity", "graphs", "large"):
        assert "tests/backends/test_gpu.py" in commands[name].split()
    assert "tests/backends/test_gpu_triton.py" in commands["triton parity"].split()
    assert "tests/backends/test_gpu_triton.py" in commands["triton parity"] and "triton" not in commands["parity"]
    assert commands["parity"].endswith("-n 8") and " -x" not in commands["parity"]


def test_one_optimizer_that_fails_does_not_hide_the_other(tmp_path, monkeypatch, capsys):
    def step(name, backend, dtype, device):
        if name == "HFac":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return "ok"

    monkeypatch.setattr(first_steps, "step", step)
    monkeypatch.setattr(first_steps.backends, "available", lambda device: ["cpu", "reference"])
    assert first_steps.main(["--device", "cpu", "--rows", str(tmp_path / "rows")]) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["optimizer"], row["step"][:5]) for row in rows] == 2 * [("HFac", "WRONG")] + 2 * [("SMMF", "ok")]
    assert "2 of 4 first steps are right" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "count"), [(first_steps, "--wrong"), (gpu_steps, "--failed")])
def test_a_device_that_is_lost_is_taken_anew(module, count, monkeypatch):
    """After an illegal access every call of the process fails: the rest is done in a new context."""
    again = []
    monkeypatch.setattr(first_steps, "step", lambda *case: 1 / 0)
    monkeypatch.setattr(first_steps.backends, "available", lambda device: ["cpu"])
    monkeypatch.setattr(gpu_steps, "measure", lambda *case: ["it failed"])
    monkeypatch.setattr(gpu_child, "usable", lambda device: False)
    monkeypatch.setattr(gpu_child, "start_anew", lambda *more: again.append(more))
    assert module.main(["--device", "cpu"]) == 1
    assert again[0] == ("--begin", "1", count, "1")


def test_first_steps_are_compared_with_the_reference(monkeypatch):
    assert first_steps.step("HFac", "reference", torch.bfloat16, torch.device("cpu")).startswith("ok")
    monkeypatch.setattr(first_steps, "LR", 1.0)  # both alike
    assert first_steps.step("SMMF", "reference", torch.float32, torch.device("cpu")).startswith("ok")
    calls = []

    class Wrong(torch.optim.Optimizer):
        def __init__(self, params, **options):
            super().__init__(params, {})

        def step(self):
            calls.append(self)
            for param in self.param_groups[0]["params"]:
                param.data.add_(0.1 * len(calls))

    monkeypatch.setattr(first_steps.hfac, "HFac", Wrong)
    with pytest.raises(AssertionError, match="is off by"):
        first_steps.step("HFac", "reference", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_the_gate_of_options_gives_every_step_the_same_gradients(name, emulated_backend):
    """The CUDA kernels clip as they read, the reference clips in place: the same gradients would be clipped again."""
    if emulated.native is None:
        pytest.skip(emulated.WHY_NOT)
    clipped = options.CLIPPED["max_grad_norm, clipped"]
    assert options.why_red(name, clipped, emulated.NAME, torch.float32, torch.device("cpu")) is None


def test_one_optimizer_that_cannot_be_measured_does_not_cost_the_other(tmp_path, monkeypatch):
    original = session.step_contestant

    def contestant(optimizer, *rest):
        if optimizer == "HFac":
            raise RuntimeError("no kernel image is available")
        return original(optimizer, *rest)

    monkeypatch.setattr(session, "step_contestant", contestant)
    settings = ["--device", "cpu", "--backends", "reference", "--rounds", "2", "--seconds", "0.01"]
    assert gpu_steps.main(["--cases", "dry", "--rows", str(tmp_path / "rows"), *settings]) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {(row["name"], row["dtype"]) for row in rows} == {
        (name, dtype) for name in ("SMMF", "AdamW") for dtype in ("float32", "bfloat16")
    }


def test_lists_of_the_report():
    sizes = [torch.Size(shape).numel() for shape in shapes.parse("llama-3-8b")]
    assert len(sizes) == 291 and sum(sizes) == 8_030_261_248
    assert sum(torch.Size(shape).numel() for shape in shapes.parse("gpt2")) == 124_439_808
    assert len(shapes.parse("2000x 64x64")) == 2000
    for cases in gpu_steps.CASES.values():
        assert all(shapes.parse(case.shapes) and hasattr(torch, case.dtype) for case in cases)
    first = [(case.shapes, case.dtype) for case in gpu_steps.CASES["first"]]
    assert first == [("llama-3-8b", "bfloat16"), ("gpt2", "bfloat16")]


def test_launches_are_counted_on_a_gpu_only():
    assert launches.count(lambda: None, torch.device("cpu")) is None


@pytest.fixture
def build(tmp_path, monkeypatch):
    """setup.py over a tree of its own."""
    module = gpu_objects._setup()
    for folder in ("cpu", "cuda", "math", "bindings"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    for name in ("cpu/hfac.cpp", "cpu/hfac.h", "cuda/plan.cpp", "bindings.cpp"):
        (tmp_path / "csrc" / name).write_text(f"// {name}\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(module, "BINDINGS", [tmp_path / "csrc" / "bindings.cpp"])
    return module


def test_an_object_is_of_its_sources_and_flags(build, tmp_path):
    source = tmp_path / "csrc" / "cpu" / "hfac.cpp"

    def digest(compiler="g++", flags=("-O3",)):
        return build.digest(("hfac", source, [compiler, *flags]), None)

    first = digest()
    assert first == digest("/opt/bin/g++") != digest(flags=["-O1"])
    header = source.with_suffix(".h")
    header.write_text("// other\n")
    changed = digest()
    assert changed != first
    header.rename(header.with_name("moved.h"))
    assert digest() not in (first, changed)
    assert build.digest(("bindings", tmp_path / "csrc" / "bindings.cpp", ["g++"]), None) is None


def test_objects_of_these_sources_are_linked_and_others_compiled(build, tmp_path, monkeypatch):
    jobs = [
        (name, tmp_path / "csrc" / file, ["g++", "-O3"])
        for name, file in (("hfac", "cpu/hfac.cpp"), ("cuda_plan", "cuda/plan.cpp"), ("bindings", "bindings.cpp"))
    ]
    ready = tmp_path / "ready"
    ready.mkdir()
    record = {"hfac": build.digest(jobs[0], None), "cuda_plan": "of other sources", "bindings": None}
    (ready / "objects.json").write_text(json.dumps({"objects": record}))
    for name in record:
        (ready / f"{name}.o").touch()
    monkeypatch.setenv("HFAC_CUDA_OBJECTS", str(ready))
    monkeypatch.setattr(build, "jobs", lambda compiler, nvcc: jobs)
    seen = []
    monkeypatch.setattr(build, "run", lambda *arguments: seen.append(arguments))
    command = SimpleNamespace(build_temp=str(tmp_path / "temp"))
    build.BuildNative.make(command, ["g++"], None, tmp_path / "hfac.so")
    ((steps, link, objects, _, _),) = seen
    assert [step[1].name for step in steps] == ["plan.cpp", "bindings.cpp"]
    assert objects == [str(ready / "hfac.o"), *(str(tmp_path / "temp" / f"{n}.o") for n in ("cuda_plan", "bindings"))]
    assert set(objects) < set(link)


def test_an_old_setuptools_builds_the_extension_and_refuses_the_rest(build, monkeypatch):
    """It would end with an error about the license in pyproject.toml."""
    read = []
    monkeypatch.setattr(
        setuptools.Distribution, "parse_config_files", lambda self, filenames=None, **options: read.append(filenames)
    )
    for version, arguments in (("70.0.0", ["-q", "build_ext"]), ("84.2.1", ["sdist"]), ("84.2.1", ["build_ext"])):
        monkeypatch.setattr(setuptools, "__version__", version)
        build.Distribution({"script_args": arguments}).parse_config_files()
    assert read == [[], None, None]
    monkeypatch.setattr(setuptools, "__version__", "76.1.0")
    with pytest.raises(
        SystemExit, match=r"needs setuptools 77 or later .* this is 76.1.0: run python -m pip install -U"
    ):
        build.Distribution({"script_args": ["sdist"]}).parse_config_files()
