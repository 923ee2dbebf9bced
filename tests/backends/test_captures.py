"""CUDA graphs: what a captured step reads is there in every replay, whatever later steps find; what cannot be captured
is refused before anything is written; and steps on several streams. On stand-ins for a GPU (captured.py)."""

import copy
import gc
import os
import pickle
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import captured
import emulated
import pytest
import rehearsal
import torch
from running import bits
from test_parts import HFAC_OPTIONS, SMMF_OPTIONS, BlockParts, MatrixParts
from torch.nn import Parameter

import hfac
from hfac import backends, functional, ops
from hfac.backends import plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # test_triton.py runs these in a process of their own
BACKEND = "triton" if INTERPRETED else emulated.NAME
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu", emulated.NAME]
F32 = torch.float32
SHAPES = [(24, 18), (12,), (8, 16)]

pytestmark = pytest.mark.skipif(not INTERPRETED and emulated.native is None, reason=emulated.WHY_NOT)


@pytest.fixture(params=[BACKEND])
def device(request):
    with captured.stand_in(request.param) as found:
        yield found


def filled(tensor, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def run(name, shapes=SHAPES, steps=2, dtype=F32, **options):
    """An optimizer with a learning rate on the device, after a few steps; its parameters with fixed gradients."""
    params = [Parameter(filled(torch.empty(shape, dtype=dtype), k)) for k, shape in enumerate(shapes)]
    options = dict(lr=torch.tensor(0.01), capturable=True, backend=BACKEND) | options
    optimizer = getattr(hfac, name)(params, **options)
    for k, param in enumerate(params):
        param.grad = filled(param, 100 + k)
    for _ in range(steps):
        optimizer.step()
    return optimizer, params


def everything(optimizer, params):
    return bits([[param.detach() for param in params], [dict(optimizer.state[param]) for param in params]])


def twin(name, optimizer, params, grads, **options):
    """What a plain step would make of all as it is now."""
    other, twins = run(name, [tuple(param.shape) for param in params], steps=0, **options)
    for mine, param, grad in zip(twins, params, grads, strict=True):
        mine.data.copy_(param.data)
        mine.grad = grad.clone()
        other.state[mine] = copy.deepcopy(dict(optimizer.state[param]))
    other.step()
    return everything(other, twins)


def no_gradient(optimizer, params):
    params[0].grad = None
    optimizer.step()


def moved(optimizer, params):
    for param in params:
        param.grad = param.grad.clone()
    optimizer.step()


def transposed(optimizer, params):
    params[0].grad = params[0].grad.t().contiguous().t()
    optimizer.step()


def negated(optimizer, params):
    params[0].grad = torch._neg_view(params[0].grad.t().contiguous().t())
    optimizer.step()


def misaligned(optimizer, params):
    grad = params[2].grad
    params[2].grad = torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view_as(grad)
    optimizer.step()


def other_options(optimizer, params):
    changed = {"maximize": True} | ({"clip_threshold": None} if optimizer._algorithm == "hfac" else {})
    group = optimizer.param_groups[0]
    before = {key: group[key] for key in changed}
    group.update(changed)
    optimizer.step()
    group.update(before)


def added(optimizer, params):
    param = Parameter(torch.ones(6, 8))
    optimizer.add_param_group({"params": [param]})
    param.grad = torch.ones_like(param)
    optimizer.step()


def alone(optimizer, params):
    for param in params:
        param.grad = param.grad.clone()
        optimizer.step_param(param, **({"clip": torch.tensor(1.0)} if optimizer.max_grad_norm else {}))


def forgotten(optimizer, params):
    optimizer._forget()
    optimizer.step()


def other_state(optimizer, params):
    for param in params:
        optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
    optimizer.step()


CHANGES = [no_gradient, moved, transposed, negated, misaligned, other_options, added, alone, forgotten]
OPTIONS = {
    "plain": {},
    "clipped": dict(max_grad_norm=0.5),
    "skip": dict(nonfinite="skip"),
    "skip-step": dict(nonfinite="skip-step"),
    "watched": dict(watch=True),
    "stored": dict(rounding="stochastic"),
}


def check(device, name, changes, before=0, **options):
    """A graph, then steps that plan anew, then replays, whose numbers are a plain step's."""
    optimizer, params = run(name, **options)
    static = [param.grad for param in params]
    if before:  # the capture finds gradients that no step has found
        static = [grad.clone() for grad in static]
        for param, grad in zip(params, static, strict=True):
            param.grad = grad
    with device.capture() as graph:
        optimizer.step()
    for change in changes:
        for param, grad in zip(params, static, strict=True):
            param.grad = grad
        change(optimizer, params)
        gc.collect()
    for _ in range(2):
        for grad in static:
            grad.copy_(2 * grad)
        expected = twin(name, optimizer, params, static, **options)
        graph.replay()
        assert everything(optimizer, params) == expected
    for param, grad in zip(params, static, strict=True):  # and the replay leaves what other steps need
        param.grad = grad.clone()
    for _ in range(2):
        expected = twin(name, optimizer, params, static, **options)
        optimizer.step()
        assert everything(optimizer, params) == expected


@pytest.mark.pairwise
@pytest.mark.parametrize("before", [0, 1], ids=["found", "moved"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_replays_after_steps_that_plan_anew(device, name, change, before):
    check(device, name, [change], before)


@pytest.mark.parametrize("options", ["clipped", "skip", "skip-step", "watched"])
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_replays_with_options(device, name, options):
    check(device, name, [no_gradient, moved, transposed], 1, **OPTIONS[options])


@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_an_optimizer_that_has_loaded_still_owns_what_a_graph_reads_and_writes(device, name):
    """The graph goes on with the states and steps that it was captured with, as torch's optimizers would have it."""
    optimizer, params = run(name, nonfinite="skip")
    with device.capture() as graph:
        optimizer.step()
    weights = [param.detach().clone() for param in params]
    expected = twin(name, optimizer, params, [param.grad for param in params], nonfinite="skip")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_state(optimizer, params)
    gc.collect()
    for param, weight in zip(params, weights, strict=True):
        param.data.copy_(weight)
    graph.replay()
    assert bits([param.detach() for param in params]) == expected[0]


def test_only_captures_add_to_what_is_kept_and_copies_of_the_optimizer_have_none_of_it(device):
    optimizer, params = run("HFac")
    for change in (no_gradient, moved, transposed):
        for param in params:
            param.grad = torch.ones_like(param)
        change(optimizer, params)
    assert not optimizer._captured
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with device.capture():
        optimizer.step()
    kept = optimizer._captured
    count = len(kept)
    assert count
    assert not copy.deepcopy(optimizer)._captured
    assert not pickle.loads(pickle.dumps(optimizer))._captured
    optimizer.load_state_dict(optimizer.state_dict())
    moved(optimizer, params)
    assert optimizer._captured is kept and len(kept) == count


def test_what_is_kept_goes_with_the_optimizer(device):
    optimizer, params = run("HFac")
    with device.capture() as graph:
        optimizer.step()
    graph.pool.clear()
    del optimizer
    with pytest.raises(AssertionError, match="has been freed"):  # at once: there is no cycle to be collected
        graph.replay()


def test_a_group_without_an_optimizer_keeps_what_is_captured(device):
    optimizer, params = run("SMMF")
    states = [optimizer.state[param] for param in params]
    lists = {f"{key}s": [state.get(key) for state in states] for key in optimizer._spec.keys}
    steps, grads = [state["step"] for state in states], [param.grad for param in params]
    group = functional.Group("smmf", params, grads, lists, steps, None, True, True, BACKEND)
    options = optimizer._options(optimizer.param_groups[0])
    step = group.prepare(grads, **options)
    step.check_capture()
    step.apply()
    assert not group._captured
    with device.capture() as graph:
        step = group.prepare(grads, **options)
        step.check_capture()
        step.apply()
    step = group.prepare([grad.clone() for grad in grads], **options)
    step.check_capture()
    step.apply()
    expected = twin("SMMF", optimizer, params, grads)
    graph.replay()
    assert everything(optimizer, params) == expected
    assert group._captured and not optimizer._captured


REFUSED = "a step cannot be part of the CUDA graph that is being captured: {}.*Take one step outside of graphs first"


def refused(device, optimizer, params, why):
    before = everything(optimizer, params)
    with pytest.raises(RuntimeError, match=REFUSED.format(why)), device.capture() as graph:
        optimizer.step()
    graph.replay()
    assert everything(optimizer, params) == before


FIRST, ELSEWHERE = "this is the first step on these tensors", "its gradients are not where the last step found them"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_a_first_step_in_a_capture_is_refused_and_goes_well_afterwards(device, name, options):
    optimizer, params = run(name, steps=0, **options)
    refused(device, optimizer, params, FIRST)
    expected = twin(name, optimizer, params, [param.grad for param in params], **options)
    optimizer.step()
    assert everything(optimizer, params) == expected
    with device.capture() as graph:
        optimizer.step()
    expected = twin(name, optimizer, params, [param.grad for param in params], **options)
    graph.replay()
    assert everything(optimizer, params) == expected


def test_the_functional_forms_which_bind_anew_in_every_call_are_refused(device):
    optimizer, params = run("SMMF")
    lists = {f"{key}s": [optimizer.state[param].get(key) for param in params] for key in optimizer._spec.keys}
    steps, options = [optimizer.state[param]["step"] for param in params], optimizer._options(optimizer.param_groups[0])
    options.update(capturable=True, backend=BACKEND)
    grads, before = [param.grad for param in params], everything(optimizer, params)
    with pytest.raises(RuntimeError, match=REFUSED.format(FIRST)), device.capture():
        functional.smmf(params, grads, **lists, state_steps=steps, **options)
    assert everything(optimizer, params) == before


def test_a_capture_in_which_another_parameter_has_no_gradient_is_refused(device):
    optimizer, params = run("HFac")
    params[1].grad = None
    refused(device, optimizer, params, FIRST)


def test_nothing_of_a_step_is_captured_where_one_group_is_refused(device):
    """The first group has been stepped before, the second has not."""
    optimizer, params = run("SMMF")
    more = Parameter(torch.ones(4, 8))
    optimizer.add_param_group({"params": [more]})
    more.grad = torch.ones_like(more)
    refused(device, optimizer, [*params, more], FIRST)
    assert not optimizer._captured


@pytest.mark.parametrize("options", ["plain", "clipped"])
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_more_graphs_without_a_step_between(device, name, options):
    """As many as anybody likes of gradients that lie where they lay, one of others, and none after that."""
    options = OPTIONS[options]
    optimizer, params = run(name, **options)
    old, new, last = ([filled(param, k) for param in params] for k in (1, 2, 3))
    for param, grad in zip(params, old, strict=True):
        param.grad = grad
    optimizer.step()
    graphs = []
    for grads in (old, old, new, new):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        with device.capture() as graph:
            optimizer.step()
        graphs.append((graph, grads))
    for param, grad in zip(params, last, strict=True):
        param.grad = grad
    refused(device, optimizer, params, ELSEWHERE)
    for graph, grads in (*graphs, *reversed(graphs)):
        expected = twin(name, optimizer, params, grads, **options)
        graph.replay()
        assert everything(optimizer, params) == expected
    optimizer.step()  # and leaves room for one more
    for param, grad in zip(params, old, strict=True):
        param.grad = grad
    with device.capture() as graph:
        optimizer.step()
    expected = twin(name, optimizer, params, old, **options)
    graph.replay()
    assert everything(optimizer, params) == expected


def test_a_step_that_a_capture_could_not_bring_its_table_for_finds_it_missing(device):
    """What a graph copies is on the device after its first replay; a step before that cannot rely on it."""
    optimizer, params = run("HFac")
    for param in params:
        param.grad = param.grad.clone()
    with device.capture():
        optimizer.step()
    expected = twin("HFac", optimizer, params, [param.grad for param in params])
    optimizer.step()
    assert everything(optimizer, params) == expected


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
def test_steps_on_several_streams(device, name, options):
    """Each waits for the last, and memory is not handed out again before all are done that use it: the stand-in says
    at the end of a test where it was otherwise."""
    optimizer, params = run(name, **options)
    for stream, change in ((1, no_gradient), (2, transposed), (0, forgotten), (1, misaligned), (0, moved)):
        device.stream = stream
        for k, param in enumerate(params):
            param.grad = filled(param, k)
        optimizer.step()
        change(optimizer, params)
    del optimizer


@pytest.mark.skipif(INTERPRETED, reason="a rehearsal has no Triton")
def test_the_allocator_knows_of_the_streams_that_read_whose_slice_is_whose():
    with rehearsal.rehearse() as gpu:
        param = Parameter(torch.ones(3, 4, 8, device="cuda"))
        param.grad = torch.ones_like(param)
        optimizer = hfac.HFac([param], batch_dims=1, nonfinite="skip", backend="cuda")
        optimizer.step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        ((_, group),) = optimizer._bound.values()
        owners = group._together[0].owners
        for tensor in (owners._of, owners._counts):
            assert stream.cuda_stream in gpu.memory(tensor).recorded
        torch.cuda.synchronize()


@pytest.fixture(params=["device", "float64", "bfloat16"])
def ambient(request):
    """Makes another default device, or type, for a while."""

    @contextmanager
    def other():
        if request.param == "device":
            with torch.device("meta"):
                yield
            return
        torch.set_default_dtype(getattr(torch, request.param))
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return other


STEPPED = {
    **OPTIONS,
    "on the host": dict(capturable=False, lr=0.01),
    "master": dict(master="split8"),
    "slices": dict(batch_dims=1, nonfinite="skip"),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("options", STEPPED.values(), ids=STEPPED)
@pytest.mark.parametrize("name", ["HFac", "SMMF"])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_steps_have_the_same_bits_whatever_the_defaults_are(backend, name, options, ambient):
    dtype = torch.bfloat16 if "master" in options or "rounding" in options else torch.float32
    results = []
    for around in (nullcontext, ambient):
        optimizer, params = run(name, [(4, 6, 5), (3, 8)], steps=0, dtype=dtype, **options | dict(backend=backend))
        for _ in range(3):
            with around():
                optimizer.step()
            for param in params:
                param.grad = param.grad.mT.contiguous().mT
        results.append(everything(optimizer, params))
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_ops_on_parts_have_the_same_bits_whatever_the_defaults_are(backend, ambient):
    parts, blocks = MatrixParts(["tile", "rows"], [F32] * 2), BlockParts(["rows", "columns"], [F32] * 2)
    known, decays = parts.known(), torch.tensor([0.8, 0.9], dtype=torch.float64, device="cpu")
    results = []
    for around in (nullcontext, ambient):
        with around():
            sums = parts.sums(backend, beta2=decays)
            applied = parts.apply(backend, known, beta1=decays, **HFAC_OPTIONS["clipped"])
            stepped = blocks.step(backend, **SMMF_OPTIONS["decoupled"] | dict(beta1=decays, beta2=decays))
        results.append(bits([sums, applied, stepped]))
    assert results[0] == results[1]
    with ambient():
        assert ops.nonfinite(parts.grads, [1, 1]).device.type == "cpu"
        assert ops.nonfinite([], []).device.type == "cpu"


def test_ops_on_parts_cannot_be_captured(device):
    parts = MatrixParts(["tile"], [F32])
    known = parts.known()
    parts.sums(BACKEND)
    for op in (lambda: parts.sums(BACKEND), lambda: parts.apply(BACKEND, known, **HFAC_OPTIONS["clipped"])):
        with pytest.raises(RuntimeError, match="bring their tables from the host|first step on"), device.capture():
            op()


def test_ops_on_parts_ask_once_which_backend_serves_them(monkeypatch):
    """For as long as the table of backends is what it was."""
    asked = []
    for name in backends.TABLE:
        row = backends.TABLE[name]
        why_not = row.why_not
        monkeypatch.setitem(
            backends.TABLE,
            name,
            replace(row, why_not=lambda device, name=name, why_not=why_not: asked.append(name) or why_not(device)),
        )
    parts = MatrixParts(["tile"], [F32])
    for _ in range(3):
        parts.sums("auto")
        parts.sums("reference")
    assert len(asked) == sum(row.automatic for row in backends.TABLE.values()) + 1
    used = []
    row = replace(
        backends.TABLE["reference"], why_not=lambda device: None, load=lambda: used.append(1) or plain.FORMULAS
    )
    monkeypatch.setitem(backends.TABLE, "reference", row)
    parts.sums("reference")
    assert used
