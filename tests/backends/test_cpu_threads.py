"""The CPU kernels compute on torch's threads where those can be had, and on their own where not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import gradient

import hfac

pytest.importorskip("hfac._C", reason="the extension is not built: hfac doctor says why")


@pytest.fixture(autouse=True)
def threads_are_put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stepped(threads):
    torch.set_num_threads(threads)
    params = [torch.nn.Parameter(gradient((640, 520), k, torch.float32)) for k in range(4)]
    for param in params:
        param.grad = gradient((640, 520), 9, torch.float32)
    hfac.SMMF(params, backend="cpu").step()
    return params


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list a process's threads")
def test_the_threads_are_those_that_torch_has():
    torch.set_num_threads(7)  # more than any test before has had
    torch.ones(1 << 20).add_(1)
    before = set(os.listdir("/proc/self/task"))
    several = stepped(7)
    assert set(os.listdir("/proc/self/task")) <= before
    assert all(map(torch.equal, several, stepped(1)))


def test_a_child_forked_before_the_first_step_does_not_wait_for_torchs_threads():
    code = (
        "import os, torch, hfac\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(1 << 20).add_(1)\n"  # starts threads, which the child will not have
        "param = torch.nn.Parameter(torch.ones(640, 520)); param.grad = torch.ones(640, 520)\n"
        "optimizer = hfac.SMMF([param], backend='cpu')\n"
        "child = os.fork()\n"
        "if child == 0: optimizer.step(); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "7\n", done.stderr
