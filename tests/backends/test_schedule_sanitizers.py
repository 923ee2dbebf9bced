"""The CPU kernels' pool of threads and their schedule under ThreadSanitizer, and under AddressSanitizer with
UndefinedBehaviorSanitizer: three threads call at once, and some calls fail half-way (schedule_driver.cpp)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CPU = next(folder for folder in HERE.parents if (folder / "csrc").exists()) / "csrc" / "cpu"
#: sanitizer -> its flag, a fault that is planted, and what it then says
SANITIZERS = {
    "threads": ("-fsanitize=thread", "race", "data race"),
    "addresses": ("-fsanitize=address,undefined", "overrun", "heap-buffer-overflow"),
}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which(os.environ.get("CXX", "g++").split()[-1]) is None,
    reason="there is no g++, whose sanitizers these are",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "threads" else n for n in SANITIZERS])
def test_callers_at_once(name, tmp_path):
    flag, fault, said = SANITIZERS[name]
    program = tmp_path / "driver"
    sources = [HERE / "schedule_driver.cpp", *(CPU / f"{name}.cpp" for name in ("schedule", "threads", "team"))]
    compiler = os.environ.get("CXX", "g++").split()
    command = [*compiler, "-std=c++17", "-O1", "-g", "-pthread", flag, "-fno-sanitize-recover=all", "-o", str(program)]
    subprocess.run([*command, *map(str, sources)], check=True)
    # the pool's threads wait in it until the process ends
    environment = {**os.environ, "TSAN_OPTIONS": "report_thread_leaks=0", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right 72 thrown 18 wrong 0\n", "")
    found = subprocess.run([str(program), fault], capture_output=True, text=True, env=environment)
    assert found.returncode != 0 and said in found.stderr, "a fault that was planted went unreported"
