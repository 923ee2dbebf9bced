"""One training run, in a process of its own: ``python -m bench.quality.runs SPEC``, which a study starts."""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality import contenders
from bench.quality.contenders import CONTENDERS
from bench.quality.tasks import FINAL_EVALUATIONS, SCALE, TASKS
from hfac.cli.report import environment, write_json
from hfac.cli.settings import Settings
from hfac.cli.training import TrainingRun

#: the tasks by the names that specs have; `scale` is not for studies
ALL_TASKS = TASKS | {"scale": SCALE}


@dataclass(frozen=True)
class Spec:
    """What determines a run, and its file's name. `lr` is exactly what a name of four digits says."""

    task: str
    steps: int
    optimizer: str
    lr: float
    seed: int
    tiny: bool = False
    device: str = "cpu"
    autocast: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}-{self.steps}-{self.optimizer}-lr{self.lr:g}-seed{self.seed}"

    def settings(self) -> Settings:
        """The settings of the run, complete."""
        more = CONTENDERS[self.optimizer].settings | {"device": self.device}
        return ALL_TASKS[self.task].settings(self.steps, self.seed, self.tiny, **more)

    def identity(self) -> dict[str, Any]:
        """All that the run's losses depend on besides data, versions and machine, as JSON gives it back."""
        return json.loads(json.dumps(asdict(self) | {"settings": self.settings().as_dict()}))


class InBfloat16(nn.Module):
    """A model whose arithmetic is bfloat16 where torch's autocast has it so, with its weights as they are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return self.model.loss(inputs, targets)


class StudyRun(TrainingRun):
    """A run of `hfac compare` with the task's model and data, and any optimizer."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.task = spec, ALL_TASKS[spec.task]
        settings = spec.settings()
        self.data = self.task.load(settings)
        super().__init__(settings, self.data, spec.optimizer, spec.lr)

    def new_model(self) -> nn.Module:
        model = self.task.model(self.settings)
        return InBfloat16(model) if self.spec.autocast else model

    def new_optimizer(self) -> Any:
        return CONTENDERS[self.name].build(self.model, self.lr, self.settings.weight_decay, self.task)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.task.batch(self.train_data, self.settings, self.batches)
        return self._as_weights(inputs), targets

    def held_out(self) -> Iterable[tuple[Tensor, Tensor]]:
        for inputs, targets in self.task.held_out(self.validation_data, self.settings):
            yield self._as_weights(inputs), targets

    def state_bytes(self) -> int:
        return contenders.state_bytes(self.optimizer)

    def _as_weights(self, inputs: Tensor) -> Tensor:
        """Pictures in the weights' dtype; bytes are indices and stay."""
        return inputs.to(next(self.model.parameters()).dtype) if inputs.is_floating_point() else inputs


def final_loss(history: list[dict[str, Any]]) -> float:
    """The mean of the last evaluations, those after the last steps of the schedule; infinite where one of them is not
    a number. The untrained model's does not count."""
    losses = [point["val_loss"] for point in history if point["step"] > 0][-FINAL_EVALUATIONS:]
    # None is what JSON has for a loss that is no number
    if not losses or any(loss is None or not math.isfinite(loss) for loss in losses):
        return math.inf
    return statistics.fmean(losses)


def train(spec: Spec, told: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Trains to the end, or until the loss is no number, and returns the run as its file has it.

    ``told`` hears of the number of steps made, at every evaluation. On the CPU with one thread: another number would
    change the last digits, and runs of one study would not be comparable.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained(spec, told)
    finally:
        torch.set_num_threads(threads)


def _trained(spec: Spec, told: Callable[[int], None]) -> dict[str, Any]:
    begin = time.perf_counter()
    run = StudyRun(spec)
    run.evaluate()
    while not run.finished:
        run.train_step()
        if run.step % run.settings.eval_interval == 0 or run.step == run.settings.steps:
            run.evaluate()
            told(run.step)
    result = run.result("finished")
    return {
        **spec.identity(),
        **{key: value for key, value in result.items() if key not in ("bits_per_byte", "steps")},
        "final_loss": final_loss(run.history),
        "steps_made": run.step,
        "seconds": time.perf_counter() - begin,
        "data": {"source": run.data.source.split(" (")[0], "sha256": run.data.sha256},
        "environment": environment(spec.device),
    }


def main(argv: list[str]) -> None:
    """Trains the run of a spec in JSON, prints the number of steps made, and writes the file named beside it."""
    given = json.loads(argv[0])
    spec = Spec(**given["spec"])
    write_json(Path(given["file"]), train(spec, lambda step: print(step, flush=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
