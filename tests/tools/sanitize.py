"""Runs the parity table, the tests of parts, rounding, clipping, watched steps and memory, the native tests and the
fuzz on a build of the extension with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

The build lies beside the installed one, in build/sanitize. First a call that lies about a tensor's size must be
reported: sanitizers that are not there find nothing.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = ROOT / "build" / "sanitize"
TESTS = [
    "tests/backends/test_parity.py",
    "tests/backends/test_native.py",
    "tests/backends/test_parts.py",
    "tests/backends/test_rounding.py",
    "tests/backends/test_stored_steps.py",
    "tests/backends/test_fuzz.py",
    "tests/optim/test_clipping.py",
    "tests/optim/test_int8.py",
    "tests/optim/test_watch.py",
    "tests/optim/test_memory.py",
]

CHECK = """
import hfac
from hfac import _C
assert "build/sanitize" in hfac.__file__, hfac.__file__
assert _C.info()["sanitize"] == "address,undefined", _C.info()
print("sanitized:", _C.info())
"""

OVERFLOW = """
import torch
from hfac import _C
param, grad, moment = (torch.zeros(n) for n in (1024, 1024, 1000))
_C.smmf_dense_step(params=[param.data_ptr()], grads=[grad.data_ptr()], numels=[1024], param_dtypes=0, grad_dtypes=0,
                   exp_avgs=None, exp_avg_sqs=[moment.data_ptr()], beta1=None, beta2=0.5, lr=0.1, eps=1e-8,
                   weight_decay=0.0, decoupled_weight_decay=True, maximize=False)
"""


def library(name: str) -> str:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    found = subprocess.run([*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main(arguments: list[str]) -> int:
    build = dict(os.environ, HFAC_SANITIZE="address,undefined", HFAC_CUDA="0")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", BASE, "--build-lib", BASE / "lib"],
        cwd=ROOT,
        env=build,
        check=True,
    )
    run = dict(
        os.environ,
        PYTHONPATH=str(BASE / "lib"),
        LD_PRELOAD=" ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    python = [sys.executable, "-P"]  # not the checkout's own hfac
    subprocess.run([*python, "-c", CHECK], env=run, check=True, cwd=BASE)
    lie = subprocess.run([*python, "-c", OVERFLOW], env=run, capture_output=True, text=True, cwd=BASE)
    if lie.returncode == 0 or "ERROR: AddressSanitizer" not in lie.stderr:
        print(f"a moment of 1000 elements that was said to have 1024 went unreported:\n{lie.stderr}", file=sys.stderr)
        return 1
    print("a lie about a tensor's size is reported")
    tests = subprocess.run(
        [*python, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *(arguments or TESTS)], env=run, cwd=ROOT
    )
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
