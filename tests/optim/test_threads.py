"""Threads: those that the system refuses, several that step one optimizer, and what a thread computes in. And memory
that the system refuses, which leaves a step unmade."""

import ctypes
import platform
import sys
import threading
from contextlib import contextmanager

import calls
import pytest
import torch
from processes import Forked
from running import bits
from suites import KERNELS
from torch.nn import Parameter

from hfac import SMMF, HFac, ops, release_gradients, spec

pytest.importorskip("hfac._C", reason="the extension is not built: hfac doctor says why")

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF], ids=["hfac", "smmf"])
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are Linux's")


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


#: What a process does to itself before it steps. What hangs is killed, long after any step is done.
PRELUDE = """
import os, resource, signal, torch, hfac
def address_space(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
def processes():
    if os.getuid() == 0:  # whom no limit of processes holds back
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
signal.alarm(900)
"""
REFUSED = """
def run(cls, limit=None):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 1 << 20).view(1024, 1024))
    param.grad = torch.linspace(1, -2, 1 << 20).view(1024, 1024)
    optimizer = cls([param])
    if limit:
        limit()
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[param]["step"] == 3
    return param.detach()
torch.set_num_threads(1)
expected = [run(cls) for cls in (hfac.HFac, hfac.SMMF)]
torch.set_num_threads(4)
assert all(torch.equal(run(cls, limit), one) for cls, one in zip((hfac.HFac, hfac.SMMF), expected))
if later:
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
    assert all(torch.equal(run(cls), one) for cls, one in zip((hfac.HFac, hfac.SMMF), expected))
print("stepped")
"""


def in_a_process(code):
    done = Forked(PRELUDE + code).ended()
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@LINUX
@pytest.mark.parametrize("kind", ["processes", "room for a stack"])
def test_a_thread_that_is_refused_leaves_a_step_to_the_others(kind):
    """The second limit is lifted again: threads start then."""
    limits = {"processes": "processes", "room for a stack": "lambda: address_space(6 << 20)"}
    code = f"limit, later = {limits[kind]}, {kind != 'processes'}\n{REFUSED}"
    assert in_a_process(code) == ["stepped"]


OPENMP = """
def count():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.full((8, 8), 0.5, dtype=DTYPE)) for _ in range(200)]
params += [torch.nn.Parameter(torch.full((8,), 0.5, dtype=DTYPE)) for _ in range(200)]
for param in params:
    param.grad = torch.full_like(param, 0.25)
optimizers = [cls(params, lr=1e-3, max_grad_norm=limit) for cls in (hfac.HFac, hfac.SMMF) for limit in (1e30, 1.0)]
before = count()
for optimizer in 2 * optimizers:
    optimizer.step()
own = count() - before
torch.rand(1 << 20).sqrt()
print(own, count() - before - own)
"""


@LINUX
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_with_a_norm_wakes_no_thread_of_openmp(dtype):
    """Those wait busily for milliseconds afterwards, on the cores that the kernels run on next. The first work of
    theirs starts them, so that they can be counted: here none but the one of the kernels' own pool, and one when torch
    computes a million square roots."""
    own, openmp = in_a_process(OPENMP.replace("DTYPE", str(dtype)))
    assert int(own) <= 1 and int(openmp) == 1


NO_MEMORY = """
from hfac import spec
from hfac.backends import Operands, cpu
torch.set_num_threads(2)
shape, kinds = (64, 1 << 16), (torch.float32, torch.float64)
params = [torch.ones(shape, dtype=kind) for kind in kinds for _ in range(2)]
grads = [torch.ones(shape[::-1], dtype=p.dtype).t() for p in params]
sides = {"row": 1 << 11, "col": 1 << 11} if OP == "smmf_step_" else {"row": 64, "col": 1 << 16}
states = {}
for name in (state.name for state in spec.OPS[OP].states):
    if name == "exp_avg_signs":
        states[name] = [torch.zeros(64, 1 << 13, dtype=torch.uint8) for p in params]
    else:
        states[name] = [torch.zeros(sides["row" if "rows" in name else "col"], dtype=p.dtype) for p in params]
options = dict(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0, maximize=False)
options |= {"decoupled_weight_decay": True} if OP.startswith("smmf") else {"clip_threshold": 1.0}
step = cpu.bind(Operands(spec.OPS[OP], params, states, {}))
before, refused = [t.clone() for t in params], 0
for more in range(0, 64 * STEP, STEP):
    address_space(more)
    try:
        step(grads, **options)
        break
    except MemoryError:
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
    assert all(map(torch.equal, params, before)) and not any(t.any() for side in states.values() for t in side)
assert not any(map(torch.equal, params, before))
print(refused)
"""


@LINUX
@pytest.mark.parametrize(("op", "step"), [("hfac_step_", 1 << 20), ("smmf_step_", 1 << 17)])
def test_memory_that_is_refused_leaves_all_as_it_was(op, step):
    """With a little more room every time: a step is made of all parameters of both arithmetics, or of none."""
    (refused,) = in_a_process(f"OP, STEP = {op!r}, {step}\n{NO_MEMORY}")
    assert int(refused) > 2


def together(work, count=3, times=25):
    """Runs ``work`` so many times in each of some threads, which switch as often as they can; the exceptions."""
    errors, begin, interval = [], threading.Barrier(count), sys.getswitchinterval()

    def loop():
        begin.wait()
        try:
            for _ in range(times):
                work()
        except BaseException as error:
            errors.append(repr(error))

    running = [threading.Thread(target=loop) for _ in range(count)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return errors


OPTIONS = [
    {},
    {"max_grad_norm": 1e-3},
    {"max_grad_norm": 1e4},
    {"max_grad_norm": 1e4, "watch": True, "nonfinite": "skip"},
    {"batch_dims": 1, "max_grad_norm": 1e4},
]


@BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_threads_that_step_one_optimizer(cls, options, backend):
    """Hogwild: whoever comes first, every step is made and counted."""
    params = [Parameter(randn(shape, i)) for i, shape in enumerate([(3, 40, 30), (64, 31), (5, 7)])]
    for i, param in enumerate(params):
        param.grad = randn(param.shape, 10 + i)
    optimizer = cls(params, lr=1e-4, backend=backend, **options)
    assert together(optimizer.step) == []
    assert [state["step"].item() for state in optimizer.state.values()] == [75.0] * 3
    assert all(param.isfinite().all() for param in params)


@BOTH
@pytest.mark.parametrize("limit", [None, 1e4])
def test_threads_that_step_one_parameter(cls, limit):
    model = torch.nn.Linear(40, 30)
    optimizer = cls(model.parameters(), lr=1e-4, max_grad_norm=limit)
    grads = {param: randn(param.shape, 3) for param in model.parameters()}
    with release_gradients(model, optimizer):

        def work():
            for param, grad in grads.items():
                param.grad = grad
                optimizer.step_param(param, clip=torch.ones(()))

        assert together(work) == []
    assert [state["step"].item() for state in optimizer.state.values()] == [75.0] * 2


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("watch", [False, True])
def test_a_step_has_its_own_statistics(backend, watch):
    """Two steps of the same parameters, prepared side by side, whose gradients are not the same: each is made from
    what was found in its own, as if the other had not been."""

    def run(side_by_side):
        params = [randn((12, 8), 0), randn((30, 20), 1)]
        sides = [(p.shape[0], p.shape[1]) for p in params]
        states = {
            name: [torch.zeros(m if name.endswith("rows") else n) for m, n in sides]
            for name in calls.STATES["hfac_step_"]
        }
        bound = ops.OpCall("hfac_step_", params, states, backend=backend)
        scalars = dict(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-12, clip_threshold=1.0, weight_decay=0.1, maximize=False)
        steps, told = [], []
        for t in range(2):
            grads = [randn(p.shape, 10 * t + i) for i, p in enumerate(params)]
            watched = torch.zeros(2, spec.WATCHED, dtype=torch.float64) if watch else None
            inputs = bound.prepare(grads, watched=watched, **scalars)
            told.append(watched)
            steps.append((inputs, bound.statistics(inputs) if side_by_side else None))
        for inputs, found in steps:
            bound.apply(inputs, found or bound.statistics(inputs), torch.ones(()))
        return params, states, told

    # The second step's statistics are those of moments that the first has moved since, unless they are taken again.
    ours, theirs = run(True), run(False)
    first = [name for name in theirs[1] if "sq" not in name]
    assert bits([ours[1][name] for name in first]) == bits([theirs[1][name] for name in first])


@contextmanager
def rounding_upward():
    libm, nearest, upward = ctypes.CDLL("libm.so.6"), 0, 0x800
    libm.fesetround(upward)
    try:
        yield
    finally:
        libm.fesetround(nearest)


@contextmanager
def flushing_denormals():
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the modes are set as x86-64 has them")
@pytest.mark.parametrize("mode", [flushing_denormals, rounding_upward])
@BOTH
def test_every_thread_computes_in_the_callers_mode(cls, mode):
    """Set before the threads are started, or since, and no longer: all of them round as the caller does."""
    values, grad = randn((1024, 768), 0), randn((1024, 768), 1) * 1e-39  # which are denormal

    def run(count):
        with threads(count):
            param = Parameter(values.clone())
            param.grad = grad
            optimizer = cls([param], lr=1e-2)
            for _ in range(2):
                optimizer.step()
            return bits([param, *optimizer.state[param].values()])

    found = {}
    for name in ("in", "out", "in again"):
        if name == "out":
            found[name] = [run(count) for count in (1, 2, 3)]
        else:
            with mode():
                found[name] = [run(count) for count in (3, 2, 1)]
    for name, runs in found.items():
        assert runs[0] == runs[1] == runs[2], name
    assert found["in"][0] == found["in again"][0] != found["out"][0]
