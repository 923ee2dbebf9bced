"""Training steps under torch.compile: the graph breaks at the optimizer, and nothing is compiled anew as it goes on."""

import pickle
from pathlib import Path

import pytest
import torch
from running import bits
from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import hfac
from hfac import SMMF, HFac, release_gradients

BOTH = pytest.mark.parametrize("cls", [HFac, SMMF], ids=["hfac", "smmf"])
STEPS = 20


@pytest.fixture(autouse=True)
def strictly():
    """No memory of other tests, and an error wherever something is compiled a second time."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


class Training:
    """Twenty steps with a scheduler, and everything that they leave."""

    def __init__(self, cls, lr=0.02, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.optimizer = cls(self.model.parameters(), lr=lr, weight_decay=0.1, **options)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.hooks = []
        self.optimizer.register_step_pre_hook(lambda *_: self.hooks.append("pre"))
        self.optimizer.register_step_post_hook(lambda *_: self.hooks.append("post"))

    def step(self, inputs):
        self.optimizer.zero_grad()
        loss = self.model(inputs).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def run(self, step):
        for i in range(STEPS):
            step(torch.randn(4, 6, generator=torch.Generator().manual_seed(i)))
            self.scheduler.step()
        assert self.hooks == ["pre", "post"] * STEPS
        assert {float(state["step"]) for state in self.optimizer.state.values()} == {STEPS}
        return bits([list(self.model.parameters()), self.optimizer.state_dict()])


@BOTH
@pytest.mark.parametrize(
    ("backend", "lr", "options"),
    [
        ("eager", 0.02, {}),
        ("aot_eager", torch.tensor(0.02), {}),
        ("eager", torch.tensor(0.02), {"max_grad_norm": 0.1, "nonfinite": "skip"}),
    ],
    ids=["number", "tensor", "clipped"],
)
def test_a_compiled_training_step(cls, backend, lr, options):
    """The same bits, one graph (the model's forward pass), no recompilation as steps and learning rates go on."""
    wanted, training = Training(cls, _copy(lr), **options), Training(cls, _copy(lr), **options)
    counter = CompileCounterWithBackend(backend)
    assert training.run(torch.compile(training.step, backend=counter)) == wanted.run(wanted.step)
    assert counter.frame_count == 1 and counters["stats"]["unique_graphs"] == 1


@BOTH
def test_frames_of_a_step_are_not_compiled(cls, monkeypatch):
    """Not even that of what decides whether to go through torch's wrapper."""
    seen, compile_frame = [], convert_frame._compile
    monkeypatch.setattr(
        convert_frame, "_compile", lambda code, *a, **k: seen.append(code) or compile_frame(code, *a, **k)
    )
    training = Training(cls)

    def step(inputs):
        training.optimizer.zero_grad()
        training.model(inputs).square().mean().backward()
        for param in training.model.parameters():
            training.optimizer.step_param(param)
        training.optimizer.zero_grad()
        training.optimizer.step()

    training.run(torch.compile(step, backend="eager"))
    assert __file__ in {code.co_filename for code in seen}
    assert not [code for code in seen if code.co_filename.startswith(str(Path(hfac.__file__).parent))]


@BOTH
def test_a_compiled_model_and_a_plain_step(cls):
    wanted, training = Training(cls), Training(cls)
    counter = CompileCounterWithBackend("aot_eager")
    training.model = torch.compile(training.model, backend=counter)
    plain = training.run(training.step)
    assert plain == wanted.run(wanted.step) and counter.frame_count == 1


@BOTH
def test_released_gradients_of_a_compiled_model(cls):
    wanted, training = Training(cls), Training(cls)
    release_gradients(training.model, training.optimizer)
    step = torch.compile(training.step, backend="aot_eager")
    assert training.run(step) == wanted.run(wanted.step)
    assert all(param.grad is None for param in training.model.parameters())


@BOTH
def test_unpickled_where_no_optimizer_has_been_made(cls, monkeypatch):
    """As in another process: there the class is as it was imported."""
    wanted, training = Training(cls), Training(cls)
    saved = pickle.dumps([training.model, training.optimizer])
    monkeypatch.delattr(cls, "step")
    assert not hasattr(cls.step, "hooked")
    training.model, training.optimizer = pickle.loads(saved)
    model, optimizer = training.model, training.optimizer
    assert optimizer.param_groups[0]["params"][0] is model[0].weight

    def step(inputs):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()

    inputs = torch.ones(4, 6)
    torch.compile(step, backend="eager")(inputs)
    wanted.step(inputs)
    assert bits(list(model.parameters())) == bits(list(wanted.model.parameters()))
    assert counters["stats"]["unique_graphs"] == 1


def _copy(lr):
    return lr.clone() if isinstance(lr, torch.Tensor) else lr
