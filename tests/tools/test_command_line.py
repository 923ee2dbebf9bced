"""However a command fails, it says so in one line, with a status, and loses nothing that was done."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest

import hfac
from bench import shapes as bench_shapes
from hfac.cli import footprints, main, memory, report, sources
from hfac.cli import plan as plan_module

ROOT = os.path.dirname(os.path.dirname(hfac.__file__))
COMMAND = [sys.executable, "-m", "hfac"]
COMPARE = ["compare", "--optimizers", "adamw", "hfac", "--d-model", "16", "--heads", "2", "--layers", "1"]
COMPARE += ["--context", "16", "--batch-size", "4", "--steps", "4", "--eval-every", "2", "--eval-batches", "2"]
#: name of a module -> its source, which fails in every way that a module can
BROKEN = {
    "exits": "raise SystemExit(0)",
    "says": "import sys; sys.exit('needs a GPU')",
    "own": "class Own(BaseException): pass\nraise Own('two\\nlines')",
    "syntax": "def (",
    "null": "x = 1\0",
    "library": "import ctypes; ctypes.CDLL('libno_such_library.so')",
    "mute": "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
    "attributes": "def __getattr__(name): raise RuntimeError(name)",
}
#: what a callable does -> its body, in a module that imports torch and nn
CALLABLES = {
    "lazy": "return nn.Sequential(nn.LazyLinear(3))",
    "lazy_convolution": "return nn.LazyConv2d(3, 3)",
    "exit": "raise SystemExit(3)",
    "deep": "return deep()",
    "giant": "return nn.Linear(2**40, 2**40)",
    "interrupted_group": "raise BaseExceptionGroup('x', [ValueError()])",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder from which the command runs, with modules in it."""
    for name, text in BROKEN.items():
        (tmp_path / f"broken_{name}.py").write_text(text)
    (tmp_path / f"broken_binary.{'abi3.so' if os.name == 'posix' else 'pyd'}").write_bytes(b"no library")
    functions = "".join(f"def {name}():\n    {body}\n" for name, body in CALLABLES.items())
    (tmp_path / "callables_here.py").write_text(
        "import atexit, os, sys\nimport torch\nfrom torch import nn\n"
        "print('of the module'); os.write(1, b'of its libraries\\n'); sys.__stdout__.write('of the first\\n')\n"
        "atexit.register(print, 'of its end')\n"
        "def model():\n    print('of the callable')\n    return nn.Linear(64, 64)\n"
        "class Wörter(nn.Linear): pass\n"
        "def words(): return Wörter(64, 64)\n" + functions
    )
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(3000))))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("broken_", "callables_here"))]:
        del sys.modules[name]


def run(*arguments, **options):
    """The command as a process, with what it wrote."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    environment = {
        **os.environ,
        "PYTHONPATH": os.path.dirname(os.path.dirname(hfac.__file__)),
        **options.pop("env", {}),
    }
    return subprocess.run([*COMMAND, *map(str, arguments)], env=environment, check=False, **options)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", [*BROKEN, "binary"])
def test_a_module_that_fails_in_any_way_ends_in_one_line(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", f"broken_{name}:model"])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("hfac plan: error: ") and f"broken_{name}:model" in line


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", CALLABLES)
def test_a_callable_that_fails_in_any_way_ends_in_one_line(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", f"callables_here:{name}"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("hfac plan: error: ") and f"callables_here:{name}" in line
    assert ("forward pass" in line) == name.startswith("lazy")


@pytest.mark.usefixtures("home")
def test_what_other_code_prints_is_no_part_of_the_json():
    done = run("plan", "callables_here:model", "--json")
    assert json.loads(done.stdout)["model"]["parameters"] == 64 * 65
    for text in ("of the module", "of its libraries", "of the first", "of the callable", "of its end"):
        assert text in done.stderr


@pytest.mark.usefixtures("home")
def test_nor_where_standard_output_is_no_file(capsys):
    assert main(["plan", "callables_here:model", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) and "of the callable" in shown.err


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), RecursionError("deep"), KeyError("k")])
def test_an_error_that_nobody_expects_is_one_line_and_status_1(error, monkeypatch, capsys):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(plan_module.footprints, "rows", fails)
    assert main(["plan", "gpt2"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("hfac plan: error: ") and type(error).__name__ in line
    monkeypatch.setenv("HFAC_TRACEBACK", "1")
    main(["plan", "gpt2"])
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_that_a_library_has_turned_into_another_error_is_ctrl_c(monkeypatch):
    def fails(*arguments):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("a part of it") from interrupt

    monkeypatch.setattr(plan_module.footprints, "rows", fails)
    assert main(["plan", "gpt2"]) == 130


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("when", ["import torch", "import hfac.cli.plan"])
def test_ctrl_c_while_the_command_starts_ends_it_quietly(when, tmp_path):
    """The signal comes in the middle of an import, from a hook that stands in front of all finders."""
    name = when.partition(" ")[2]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Hook:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {name!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Hook())\n"
    )
    done = run("plan", "gpt2", env={"PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_importing_hfac_elsewhere_leaves_ctrl_c_alone():
    code = "import signal, hfac; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    subprocess.run([sys.executable, "-c", start + code], check=True)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_a_terminal_without_the_characters_gets_escapes(encoding):
    done = run("plan", "callables_here:words", env={"PYTHONIOENCODING": encoding}, text=None)
    assert done.returncode == 0
    name = "Wörter".encode(encoding, "backslashreplace")
    assert done.stdout.startswith(name) and b"SMMF" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (["plan", "gpt2"], ""),
        (["doctor"], ""),
        (["plan", "--help"], "1"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((["plan", "gpt2"], "1"), (["--version"], ""))),
    ],
)
def test_a_full_disk_is_one_line_and_status_1(arguments, unbuffered):
    with open("/dev/full", "w") as full:
        done = run(*arguments, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    [line] = done.stderr.strip().splitlines()
    assert done.returncode == 1 and os.strerror(errno.ENOSPC) in line


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_a_closed_output_is_one_line_and_status_1():
    done = run("plan", "gpt2", stdout=None, preexec_fn=lambda: os.close(1))
    [line] = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "standard output is closed" in line


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"hfac {hfac.__version__}\n")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv.pop(1)),))
from hfac.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize(("limit", "lost"), [(100, "compare.pt compare.json compare.png"), (10_000, "compare.png")])
def test_a_full_disk_does_not_lose_what_was_trained(limit, lost, home):
    """A limit on the size of files stands for the disk."""
    program = [sys.executable, "-c", LIMITED, str(limit), *COMPARE, "--text", "text.txt", "--save", "saved"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert len(lines) == len(lost.split()) and all(map(str.__contains__, lines, lost.split()))
    table = done.stdout.partition("\noptimizer ")[2]
    assert "\nadamw " in table and "\nhfac " in table
    for name in ("compare.json", "compare.png"):
        assert (home / "compare-out" / name).exists() == (name not in lost)
    assert not list(home.rglob("*.tmp"))


def test_an_error_in_a_later_run_does_not_lose_the_earlier_one(home, monkeypatch, capsys):
    from hfac.cli.training import TrainingRun

    step = TrainingRun.train_step

    def fails(run):
        if run.name == "hfac" and run.step == 2:
            raise RuntimeError("out of memory")
        step(run)

    monkeypatch.setattr(TrainingRun, "train_step", fails)
    assert main([*COMPARE, "--text", "text.txt"]) == 1
    shown = capsys.readouterr()
    assert "\nadamw " in shown.out.partition("\noptimizer ")[2] and "2/4 interrupted" in shown.out
    assert "out of memory" in shown.err
    assert len(json.loads((home / "compare-out" / "compare.json").read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name of a file"),
        ("x", "end it in .png"),
        ("folder", "end it in .png"),
        ("folder/", "the name of a file"),
        ("folder.png", "it is a directory"),
        ("x.", "end it in .png"),
        (".png", "end it in .png"),
        ("x.doc", "matplotlib writes"),
        ("none/x.png", "No such file"),
        ("text.txt/x.png", "Not a directory"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_the_work(name, message, home, capsys, monkeypatch):
    (home / "folder").mkdir()
    (home / "folder.png").mkdir()
    before = sorted(home.rglob("*"))
    monkeypatch.setattr(sources, "read", lambda target: pytest.fail("the work has begun"))
    assert message in refusal(capsys, "plan", "gpt2", "--plot", name)
    assert sorted(home.rglob("*")) == before


def test_a_picture_is_written_where_it_is_said(home, capsys):
    for name in ("a.PNG", "b.c.svg", "d.pdf"):
        assert main(["plan", "resnet50", "--plot", name]) == 0
        assert (home / name).stat().st_size > 1000
    capsys.readouterr()


def test_the_plan_is_printed_whatever_becomes_of_the_picture(home, capsys, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plan_module, "write_plot", fails)
    assert main(["plan", "gpt2", "--plot", "x.png"]) == 1
    shown = capsys.readouterr()
    assert "\nSMMF " in shown.out and "x.png could not be drawn" in shown.err and len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--out", "--save", "--resume"])
def test_a_folder_without_a_name_is_refused(option, home, capsys):
    assert "the name of a folder" in refusal(capsys, "compare", f"{option}=")
    assert not (home / "compare.json").exists()


@pytest.mark.parametrize("taken", ["compare.json", "compare.png"])
def test_a_folder_whose_files_cannot_be_written_is_refused(taken, home, capsys):
    (home / "out" / taken).mkdir(parents=True)
    assert f"{taken}: it is a directory" in refusal(capsys, *COMPARE, "--text", "text.txt", "--out", "out")


def test_a_folder_of_the_benchmark_without_a_name_is_refused(capsys):
    from bench.__main__ import main as bench

    with pytest.raises(SystemExit):
        bench(["--out", ""])
    assert "the name of a folder" in capsys.readouterr().err


def on_terminal(columns, monkeypatch):
    """Standard output as a terminal of that width, and what is written to it."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    return sys.stdout


@pytest.mark.parametrize("columns", [24, 40, 60, 70, 77, 78, 79, 80, 81, 100, 200])
def test_no_number_is_cut_whatever_the_width(columns, monkeypatch):
    rows = footprints.rows(memory.Load(sources.read("llama-3-8b"), memory.DTYPES["bf16"]), 8)
    cells = [plan_module._cells(row) for row in rows]
    written = on_terminal(columns, monkeypatch)
    report.print_rows(None, plan_module.HEADERS, cells)
    text = written.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for row in cells:
        assert all(cell in text for cell in row)
    runs = ["hfac", "0.0025", "700", "1.6012", "2.3101", "1,205,296", "0.7043", "10.36", "123.58"]
    written = on_terminal(columns, monkeypatch)
    report.print_rows("Comparison of optimizers", report.HEADERS, [runs])
    assert all(cell in written.getvalue() for cell in runs)


def test_a_table_is_one_where_it_fits(monkeypatch):
    written = on_terminal(100, monkeypatch)
    report.print_rows(None, ("name", "size"), [["a", "1 GB"]])
    assert any(line.split() == ["a", "1", "GB"] for line in written.getvalue().splitlines())


def test_both_names_of_a_list_are_understood_by_plan_and_bench():
    assert sources.read("llama3-8b") == sources.read("llama-3-8b")
    assert bench_shapes.parse("llama3-8b") == bench_shapes.parse("llama-3-8b")
    assert bench_shapes.parse("llama3-8b-4") == bench_shapes.parse("llama-3-8b-4")
