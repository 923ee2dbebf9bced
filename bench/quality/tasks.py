"""What is trained: models, their data, and where a sweep of learning rates begins."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality import images
from hfac.cli.corpus import Corpus, load_corpus, training_batch, validation_batches
from hfac.cli.model import ByteGPT
from hfac.cli.settings import Settings

#: evaluations of a run; what is reported is the mean of the last `FINAL_EVALUATIONS`
EVALUATIONS, FINAL_EVALUATIONS = 20, 3


@dataclass(frozen=True)
class Task:
    """One model on one set of data.

    Attributes:
        title: as tables and pictures name it.
        unit: of the loss.
        convolutional: whether it is a convolutional network, for which SMMF's authors advise another decay.
        rate: AdamW's learning rate where its sweep begins.
        sizes: of `Settings`, where they are not its defaults.
        tiny: the same, to try the command within seconds.
        load: reads the data.
        model: builds the model.
        batch: inputs and targets of one step.
        held_out: the batches of an evaluation.
    """

    title: str
    unit: str
    convolutional: bool
    rate: float
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    load: Callable[[Settings], Corpus]
    model: Callable[[Settings], nn.Module]
    batch: Callable[[Tensor, Settings, torch.Generator], tuple[Tensor, Tensor]]
    held_out: Callable[[Tensor, Settings], Iterable[tuple[Tensor, Tensor]]]

    def settings(self, steps: int, seed: int, tiny: bool = False, **more: Any) -> Settings:
        """The settings of a run."""
        given = {"steps": steps, "seed": seed, "eval_every": max(1, steps // EVALUATIONS), **self.sizes}
        found = Settings(**(given | (self.tiny if tiny else {}) | more))
        found.check()
        return found


def _gpt(rate: float, sizes: dict[str, Any], tiny: dict[str, Any]) -> Task:
    return Task(
        "byte-level GPT",
        "nats per byte",
        False,
        rate,
        sizes,
        tiny,
        lambda settings: load_corpus(settings.text, settings.max_bytes, settings.context),
        lambda settings: ByteGPT(settings.d_model, settings.layers, settings.heads, settings.context),
        lambda data, settings, generator: training_batch(data, settings.batch_size, settings.context, generator),
        lambda data, settings: validation_batches(data, settings.batch_size, settings.context, settings.eval_batches),
    )


def _digits(title: str, convolutional: bool, model: Callable[[Settings], nn.Module], rate: float, **sizes: Any) -> Task:
    return Task(
        title,
        "nats per picture",
        convolutional,
        rate,
        {"batch_size": 64, **sizes},
        {"batch_size": 8, "d_model": 8, "layers": 1, "heads": 2},
        lambda settings: images.load_digits(),
        model,
        lambda data, settings, generator: images.shifted_batch(data, settings.batch_size, generator),
        lambda data, settings: [images.unpacked(data)],  # so few that one batch holds them
    )


def _vit(settings: Settings) -> nn.Module:
    return images.ViT(settings.d_model, settings.layers, settings.heads)


def _cnn(settings: Settings) -> nn.Module:
    return images.CNN(settings.d_model)


_SMALL_GPT = {"d_model": 16, "layers": 1, "heads": 2, "context": 16, "batch_size": 4, "max_bytes": 2**16}

TASKS = {
    "gpt": _gpt(3e-3, {}, _SMALL_GPT | {"eval_batches": 2}),
    "vit": _digits("vision transformer", False, _vit, 2e-3, d_model=64, layers=4),
    "cnn": _digits("convolutional network", True, _cnn, 4e-3, d_model=32),
}
#: the larger model of `--scale`: 126 million parameters
SCALE = _gpt(
    6e-4,
    {"d_model": 1024, "layers": 10, "heads": 16, "context": 512, "batch_size": 32, "eval_batches": 8},
    _SMALL_GPT | {"eval_batches": 2},
)
