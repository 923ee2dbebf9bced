"""One training run of `hfac compare`: one optimizer at one learning rate, step by step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from hfac.cli.corpus import Corpus, training_batch, validation_batches
from hfac.cli.errors import DamagedCheckpoint
from hfac.cli.model import ByteGPT
from hfac.cli.optimizers import build_optimizer, state_bytes
from hfac.cli.settings import DTYPES, Settings

FINAL_LR_FRACTION = 0.1  # where the cosine and linear schedules end, as a fraction of the peak


def scheduled_lr(settings: Settings, peak: float, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warmup to `peak`, then the schedule of the settings.

    It depends on the step alone, so a resumed run needs no scheduler state.
    """
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[settings.schedule]
    return peak * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * remaining)


class TrainingRun:
    """A model, its optimizer, and all that is needed to continue bit for bit from any step.

    Runs of the same settings start from the same weights and see the same batches, whatever their optimizer.
    `bench.quality` trains other models on other data by overriding `new_model`, `new_optimizer`, `next_batch`,
    `held_out` and `state_bytes`.
    """

    def __init__(self, settings: Settings, corpus: Corpus, optimizer: str, lr: float) -> None:
        self.settings, self.name, self.lr = settings, optimizer, lr
        self.device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        # Initialized in float32 on the CPU: every device and dtype starts from the same (rounded) weights.
        self.model = self.new_model().to(self.device, DTYPES[settings.dtype])
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizer = self.new_optimizer()
        self.train_data, self.validation_data = corpus.train.to(self.device), corpus.validation.to(self.device)
        self.batches = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.train_loss = math.nan
        self.train_losses: list[float] = []  # since the last evaluation
        self.history: list[dict] = []
        self.optimizer_ms: list[float] = []
        self.total_ms: list[float] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def new_model(self) -> ByteGPT:
        """The model to train, with a method `loss(inputs, targets)`; torch's generator has just been seeded."""
        settings = self.settings
        return ByteGPT(settings.d_model, settings.layers, settings.heads, settings.context)

    def new_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `self.model`."""
        settings = self.settings
        stored = {"rounding": settings.rounding, "master": settings.master}
        return build_optimizer(self.name, self.model, self.lr, settings.weight_decay, **stored)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step, drawn with the generator `self.batches`."""
        return training_batch(self.train_data, self.settings.batch_size, self.settings.context, self.batches)

    def held_out(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of an evaluation, the same at every call."""
        settings = self.settings
        return validation_batches(self.validation_data, settings.batch_size, settings.context, settings.eval_batches)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return state_bytes(self.optimizer)

    @property
    def diverged(self) -> bool:
        """Whether the last validation loss was infinite or not a number."""
        return bool(self.history) and not math.isfinite(self.history[-1]["val_loss"])

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.diverged or self.step == self.settings.steps

    def train_step(self) -> None:
        """One batch: forward, backward, clip, optimizer step. Times the optimizer step, and all of it together."""
        settings = self.settings
        begin = self._now()
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_lr(settings, self.lr, self.step)
        loss = self.model.loss(*self.next_batch())
        loss.backward()
        if settings.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        before_step = self._now()
        self.optimizer.step()
        end = self._now()
        self.optimizer.zero_grad()
        self.step += 1
        self.train_loss = loss.item()
        self.train_losses.append(self.train_loss)
        self.optimizer_ms.append(1e3 * (end - before_step))
        self.total_ms.append(1e3 * (end - begin))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Validation loss in nats per byte on the fixed batches, appended to the history."""
        total, count = 0.0, 0
        for inputs, targets in self.held_out():
            total += self.model.loss(inputs, targets).item() * len(inputs)  # the last batch may be smaller
            count += len(inputs)
        val_loss = total / count
        train_loss = statistics.fmean(self.train_losses) if self.train_losses else math.nan
        self.history.append({"step": self.step, "val_loss": val_loss, "train_loss": train_loss})
        self.train_losses = []
        return val_loss

    def result(self, status: str) -> dict:
        """What is known so far, as plain values. Times are medians, so a busy moment of the machine counts little."""
        val_loss = self.history[-1]["val_loss"] if self.history else math.nan
        size = self.state_bytes()
        cuda = self.device.type == "cuda"
        return {
            "optimizer": self.name,
            "lr": self.lr,
            "status": "diverged" if self.diverged else status,
            "steps": self.step,
            "val_loss": val_loss,
            "bits_per_byte": val_loss / math.log(2),
            "state_bytes": size,
            "state_bytes_per_parameter": size / self.parameters,
            "optimizer_ms_per_step": statistics.median(self.optimizer_ms) if self.optimizer_ms else math.nan,
            "total_ms_per_step": statistics.median(self.total_ms) if self.total_ms else math.nan,
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "parameters": self.parameters,
            "history": list(self.history),
        }

    def state_dict(self) -> dict:
        """Everything needed to continue from this step, in types that `torch.load(weights_only=True)` reads."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.get_state(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "train_losses": list(self.train_losses),
            "history": list(self.history),
            "optimizer_ms": list(self.optimizer_ms),
            "total_ms": list(self.total_ms),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned, for the same settings, optimizer and learning rate.

        Raises:
            DamagedCheckpoint: it does not hold that.
        """
        mine = self.state_dict().keys()
        for what, names in (("lacks", mine - state.keys()), ("has an unknown", state.keys() - mine)):
            if names:
                raise DamagedCheckpoint(f"its run under way {what} {', '.join(sorted(map(str, names)))}")
        if not isinstance(state["step"], int) or not 0 <= state["step"] <= self.settings.steps:
            raise DamagedCheckpoint(f"its run under way is at step {state['step']!r} of {self.settings.steps}")
        try:
            missing = len(list(self.model.parameters())) - len(state["optimizer"]["state"])
            if state["step"] and missing:  # an optimizer would begin anew there
                raise ValueError(f"the optimizer's state of {missing} parameters is missing")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.set_state(state["batches"])
            torch.set_rng_state(state["cpu_rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DamagedCheckpoint(f"its run under way cannot be loaded ({reason})") from error
        for name in ("step", "train_losses", "history", "optimizer_ms", "total_ms"):
            setattr(self, name, state[name])

    def _now(self) -> float:
        """The time once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
