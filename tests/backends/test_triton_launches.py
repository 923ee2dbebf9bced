"""Launches of the Triton kernels as they are on a GPU, with a driver in place of the GPU's: Triton compiles, and hands
its launches to a function."""

import dataclasses
import os

import pytest
import torch

import hfac
from hfac import backends, ops, schedules
from hfac.cli import check, doctor

triton = pytest.importorskip("triton")

from hfac.triton_kernels import launcher, room, table  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from bench import triton_driver  # noqa: E402

CPU = torch.device("cpu")
SHAPES = ((16, 24), (24,), (16, 64))


@pytest.fixture
def driver(monkeypatch):
    """The driver, and in ``launches`` (kernel, programs, arguments) of what it was given since the list was cleared."""
    row = dataclasses.replace(backends.TABLE["triton"], why_not=lambda device: None)
    monkeypatch.setitem(backends.TABLE, "triton", row)
    with triton_driver.active(GPUTarget("cuda", 90, 32)) as made:
        made.launches = []
        made.launched = lambda name, grid, arguments: made.launches.append((name, grid, arguments))
        yield made


@pytest.fixture
def asked(monkeypatch):
    """Names of kernels that went through Triton's own launch, which finds out what to compile for."""
    names, run = [], triton.runtime.jit.JITFunction.run

    def observed(self, *arguments, **options):
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", observed)
    return names


def stepped(**options):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = hfac.SMMF(params, backend="triton", vector_reshape=False, **options)
    return params, optimizer


def give_grads(params):
    for p in params:
        p.grad = torch.ones_like(p)


def test_only_the_first_step_goes_through_triton(driver, asked):
    """A hundred steps launch the same kernels over as many programs, compiled once, with gradients that lie elsewhere
    and other numbers in each."""
    params, optimizer = stepped()
    seen = []
    for t in range(101):
        give_grads(params)
        optimizer.param_groups[0].update(lr=1.0 / (1 + t), weight_decay=0.1 * t)
        optimizer.step()
        seen.append([(name, grid) for name, grid, _ in driver.launches])
        driver.launches.clear()
        if t == 0:
            first = list(asked)
    assert [name for name, _ in seen[0]] == asked == first
    assert all(step == seen[0] for step in seen) and len(seen[0]) > 3


def test_arguments_are_those_of_the_first_launch(driver):
    """By address in place of by tensor; constants in their places."""
    params, optimizer = stepped()
    give_grads(params)
    for _ in range(2):
        optimizer.step()
    half = len(driver.launches) // 2
    assert half > 3
    for (name, grid, first), (again, same, later) in zip(driver.launches[:half], driver.launches[half:], strict=True):
        assert (again, same) == (name, grid)
        assert [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in first] == list(later)


def test_what_a_kernel_is_compiled_for_is_asked_again(driver, asked):
    """Other options of the step, and memory that 16 does not divide."""
    params, optimizer = stepped()
    give_grads(params)
    optimizer.step()
    del asked[:]
    optimizer.param_groups[0]["maximize"] = True
    optimizer.step()
    assert set(asked) == {"smmf_tiles", "smmf_dense"}
    del asked[:]
    for maximize in (False, True):
        optimizer.param_groups[0]["maximize"] = maximize
        optimizer.step()
    assert not asked


def test_memory_of_another_alignment_is_another_kernel(driver, asked):
    from hfac.triton_kernels import plan

    made = plan.make_plan("smmf_dense_step_", [plan.Item(24, 1, torch.float32, torch.float32)])
    memory = torch.zeros(64, dtype=torch.int64)
    of = launcher.Launcher()
    of.device, of.items, of.grad_table, of.scalars, of.flags = CPU, memory, memory, memory.double(), memory.int()
    options = dict.fromkeys(("FIRST", "COUPLED", "NEGATE", "SKIP", "LOOK", "SCALED", "WATCH"), False)
    tiles = [torch.zeros(16, dtype=torch.int32) for _ in made.launches]
    for shift, times in ((0, 1), (0, 0), (1, 1), (1, 0), (0, 0)):
        del asked[:]
        of.items = memory[shift:]
        of.run(made.launches, tiles, options)
        assert len(asked) == times, shift


def test_a_launch_that_compiles_nothing_is_made_again(driver, asked, monkeypatch):
    """Triton gives no kernel where a hook says that it need not be compiled."""
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda self, *given, **named: asked.append(self))
    params, optimizer = stepped()
    give_grads(params)
    optimizer.step()
    count = len(asked)
    optimizer.step()
    assert len(asked) == 2 * count and not driver.launches


def test_doctor_says_what_a_first_step_compiles(driver, tmp_path, monkeypatch):
    """Each kernel that a step launches, with a cache of its own, which is gone afterwards as the variable is."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(check, "FIRST_SHAPES", ((16, 64), (24,)))
    caches, run = set(), triton.runtime.jit.JITFunction.run

    def observed(self, *arguments, **options):
        caches.add(os.environ["TRITON_CACHE_DIR"])
        return run(self, *arguments, **options)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", observed)
    found, said = {}, []
    doctor._first_steps(CPU, found, said.append)
    rows = {row["optimizer"]: row for row in found["first_steps"]}
    names = [name for name, _, _ in driver.launches]
    assert rows.keys() == {"HFac", "SMMF"} and sum(row["kernels"] for row in rows.values()) == len(names)
    assert rows["SMMF"]["kernels"] == sum(name.startswith("smmf") for name in names) > 0
    assert all(row["seconds"] > 0 for row in rows.values())
    assert f"{rows['HFac']['kernels']} kernels compiled in {rows['HFac']['seconds']:.1f} s" in said[1]
    assert len(caches) == 2 and str(tmp_path) not in caches and not any(map(os.path.exists, caches))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


def test_later_steps_are_not_first_ones(driver):
    params, optimizer = stepped()
    give_grads(params)
    with launcher.timed() as found:
        optimizer.step()
        first = len(found)
        optimizer.step()
    assert 0 < first == len(found) == len(driver.launches) // 2


def test_a_step_of_gradients_where_they_lay_repeats_the_launches(driver, monkeypatch):
    """On the same memory, with its own numbers, and nothing else is told of it; other options are launched anew."""
    params, optimizer = stepped()
    give_grads(params)
    for _ in range(3):
        optimizer.step()
    before = driver.launches[-(len(driver.launches) // 3) :]
    driver.launches.clear()
    ran, run = [], launcher.Launcher.run
    monkeypatch.setattr(launcher.Launcher, "run", lambda *given: ran.append(given) or run(*given))
    optimizer.param_groups[0].update(lr=0.25, weight_decay=0.5)
    optimizer.step()
    assert driver.launches == before and not ran
    for bucket in optimizer._bound[0][1]._buckets:
        (room,) = bucket.call._call._rooms
        assert room.scalars[[table.LR.value, table.WEIGHT_DECAY.value]].tolist() == [0.25, 0.5]
    optimizer.param_groups[0].update(weight_decay_mode="adam")
    optimizer.step()
    assert ran


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"capturable": True}, {"max_grad_norm": 1.0}], ids=str)
def test_steps_that_are_told_more_repeat_their_launches_too(options, driver, monkeypatch):
    """Whatever numbers they bring; those of the device are where the kernels look for them."""
    params, optimizer = stepped(**options)
    give_grads(params)
    for _ in range(3):
        optimizer.step()
    before = driver.launches[-(len(driver.launches) // 3) :]
    driver.launches.clear()
    ran, run = [], launcher.Launcher.run
    monkeypatch.setattr(launcher.Launcher, "run", lambda *given: ran.append(given) or run(*given))
    for param in params:
        param.grad.mul_(2)
        optimizer.state[param]["step"].fill_(8.0)
    optimizer.param_groups[0].update(lr=0.25)
    for bucket in optimizer._bound[0][1]._buckets if "max_grad_norm" in options else ():
        bucket.call._call._rooms[0].squares.fill_(4.0)  # as kernels would
    optimizer.step()
    assert driver.launches == before and not ran
    for bucket in optimizer._bound[0][1]._buckets:
        (room,) = bucket.call._call._rooms
        assert room.scalars[table.LR.value] == 0.25
        decays = room.scalars[table.OWN.value :].view(-1, table.OWNED.value)[:, :2]
        mine = decays[1:] if "capturable" in options else decays[:1]
        wanted = [schedules.smmf_decay_first(9.0, 0.9, 0.999), schedules.smmf_decay_second(9.0, -0.5)]
        assert mine.tolist() == [wanted] * len(mine)
        if "max_grad_norm" in options:
            assert room.scalars[table.COEFFICIENT.value] == optimizer._norm_coefficient < 1
            assert room.scalars[table.GRAD_SCALE.value] == 1 / optimizer._norm_coefficient


def test_numbers_are_copied_where_others_may_lie(driver):
    """Not where they lie already; a replay of a graph writes its own."""
    params, optimizer = stepped(capturable=True)
    give_grads(params)
    for _ in range(3):
        optimizer.step()
    bucket = optimizer._bound[0][1]._buckets[0]
    (room,) = bucket.call._call._rooms
    numbers = {"lr": 0.5, "weight_decay": 0.25, "beta1": 0.5, "beta2": 0.75, "eps": 1e-8}
    for change in ({}, {"lr": 0.125}, {"lr": torch.tensor(3.0, dtype=torch.float64)}, {"lr": 0.0}):
        room.set_scalars(numbers | change, False)
        assert room.scalars[table.LR.value] == (numbers | change)["lr"]
    others = (
        lambda: room.scale({"grad_scale": torch.tensor(4.0)}),
        lambda: room.multiply(torch.tensor(0.5)),
        lambda: room.set_scalars(numbers, True),
        lambda: room.own_scalars.fill_(9.0),  # a replay
        lambda: room.own_scalars.fill_(8.0),
    )
    for write in others:
        room.set_scalars(numbers, False)
        write()
        room.set_scalars(numbers, False)
        assert room.scalars[[table.LR.value, table.GRAD_SCALE.value, table.COEFFICIENT.value]].tolist() == [0.5, 1, 1]


@pytest.mark.parametrize("released", [False, True])
def test_launches_are_repeated_for_gradients_that_lie_elsewhere(released, driver, monkeypatch):
    """What kernels find of them in device memory is where they lie now."""
    params, optimizer = stepped()
    held = []

    def make():
        held.extend(param.grad for param in params)  # whose memory the next ones do not get
        give_grads(params)
        driver.launches.clear()
        for param in params if released else [None]:
            optimizer.step_param(param) if released else optimizer.step()

    for _ in range(3):
        make()
    before = [*driver.launches]
    ran, run = [], launcher.Launcher.run
    monkeypatch.setattr(launcher.Launcher, "run", lambda *given: ran.append(given) or run(*given))
    make()
    assert driver.launches == before and not ran
    groups = [optimizer._single[id(param)].bound for param in params] if released else [optimizer._bound[0][1]]
    for group, mine in zip(groups, [[p] for p in params] if released else [params], strict=True):
        for bucket in group._buckets:
            (room,) = bucket.call._call._rooms
            found = room.grad_table.view(-1, 2)[:, 0].tolist()
            assert found == [grad.data_ptr() for grad in bucket.of([param.grad for param in mine])]


@pytest.mark.parametrize("factor", [None, 0.25])
def test_parameters_that_are_stepped_one_by_one_share_their_numbers(factor, driver, monkeypatch):
    """One copy of them goes to the device for each step, with what the gradients are divided by, and kernels look for
    it there; another group has numbers of its own."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in 2 * SHAPES]
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    optimizer = hfac.SMMF(groups, backend="triton", vector_reshape=False)
    give_grads(params)
    clip = None if factor is None else ops.Clip(torch.tensor(factor))

    def release():
        for param in params:
            optimizer.step_param(param, clip=clip)

    for _ in range(3):
        release()
    copies, copy = [], room._copy
    monkeypatch.setattr(room, "_copy", lambda values, to: copies.append(to) or copy(values, to))
    for t in (4.0, 5.0):
        driver.launches.clear()
        del copies[:]
        optimizer.param_groups[0]["lr"] = 0.25 / t
        release()
        assert len(copies) == 2 and copies[0] is copies[1]
        shared = copies[0].data_ptr()
        where = {name: shared in arguments for name, _, arguments in driver.launches}
        assert where["smmf_tiles"] and where["smmf_dense"]
    optimizer.step_param(params[0], clip=clip)
    assert copies[-1][table.LR.value] == 0.05
    assert copies[-1][table.GRAD_SCALE.value] == (1.0 if factor is None else 1 / factor)
    assert copies[-1][table.OWN.value + 1] == schedules.smmf_decay_second(6.0, -0.5)


def test_whoever_observes_launches_is_told_of_each(driver, monkeypatch):
    """As profilers do, which come and go. Else nothing is made for them."""
    params, optimizer = stepped()
    give_grads(params)
    for _ in range(3):
        optimizer.step()
    told, tell = [], launcher.CompiledKernel.launch_metadata
    monkeypatch.setattr(launcher.CompiledKernel, "launch_metadata", lambda *given: told.append(1) or tell(*given))
    hook = launcher._hooks.launch_enter_hook
    for observed in (False, True, False):
        if hook is None:  # of versions in which there is at most one
            monkeypatch.setattr(launcher._hooks, "launch_enter_hook", print if observed else None)
        else:
            (hook.add if observed else hook.remove)(print)
        assert launcher.observed() == observed
        for _ in range(2):
            driver.launches.clear()
            del told[:]
            optimizer.step()
            assert driver.launches and len(told) == observed * len(driver.launches)
