"""The settings that determine the result of `hfac compare`, and that a resumed run must share with the first."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields

import torch

from hfac.cli.errors import DamagedCheckpoint, UsageError
from hfac.cli.optimizers import CHOICES, USUAL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEDULES = ("cosine", "linear", "constant")
EVERY_OPTIMIZER = "all"  # the key in `Settings.lr` of a learning rate given without a name


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison. The defaults finish in under 4 minutes on 2 CPU cores.

    `None` means a tenth of the steps, for warmup and between evaluations.
    """

    optimizers: tuple[str, ...] = USUAL
    lr: tuple[tuple[str, float], ...] = ()
    lr_factors: tuple[float, ...] = (1.0,)
    text: tuple[str, ...] = ()
    max_bytes: int = 16 * 2**20
    d_model: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 64
    batch_size: int = 16
    steps: int = 700
    warmup_steps: int | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.1  # what GPTs are usually trained with; each optimizer applies it in its own way
    grad_clip: float = 1.0
    eval_every: int | None = None
    eval_batches: int = 32
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    rounding: str = "nearest"
    master: str | None = None

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises linearly to its peak."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def eval_interval(self) -> int:
        """Steps between two evaluations of the validation loss."""
        return max(1, self.steps // 10) if self.eval_every is None else self.eval_every

    def check(self) -> None:
        """Raise `UsageError` for settings that are valid by themselves but not in combination or on this machine."""
        if self.d_model % self.heads:
            raise UsageError(
                f"--d-model is required to be a multiple of --heads, got --d-model {self.d_model} and --heads"
                f" {self.heads}; give for example --d-model {(self.d_model // self.heads + 1) * self.heads}"
            )
        if self.warmup >= self.steps:
            raise UsageError(
                f"--warmup-steps is required to be less than --steps, got {self.warmup} and {self.steps};"
                " lower the one or raise the other"
            )
        stored = [flag(name) for name in ("rounding", "master") if getattr(self, name) != getattr(Settings, name)]
        if stored and self.dtype == "float32":
            raise UsageError(
                f"{' and '.join(stored)} {'is' if len(stored) == 1 else 'are'} for weights of fewer bits than the"
                f" arithmetic's, got --dtype float32; add --dtype bfloat16 or leave {' and '.join(stored)} out"
            )
        unused = [name for name, _ in self.lr if name not in (*self.optimizers, EVERY_OPTIMIZER)]
        if unused:
            raise UsageError(
                f"--lr is required to name optimizers being compared ({', '.join(self.optimizers)}), got"
                f" {', '.join(unused)}; drop them from --lr or add them to --optimizers"
            )
        device = torch.device(self.device)
        if device.type == "cuda":
            available = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if not available:
                raise UsageError(
                    f"--device {self.device} requires a CUDA device, and this PyTorch ({torch.__version__}) sees none;"
                    " use --device cpu, or install PyTorch for CUDA and check that nvidia-smi lists the GPU"
                )
            if (device.index or 0) >= available:
                raise UsageError(
                    f"--device {self.device} requires at least {device.index + 1} CUDA devices, and there are"
                    f" {available}; use --device cuda:{available - 1} or lower"
                )

    def plan(self) -> list[tuple[str, float]]:
        """The (optimizer, learning rate) pairs to train, in order."""
        given = dict(self.lr)
        return [
            # Twelve digits are more than any learning rate needs and spare the reader 0.0015000000000000002.
            (name, float(f"{given.get(name, given.get(EVERY_OPTIMIZER, CHOICES[name].learning_rate)) * factor:.12g}"))
            for name in self.optimizers
            for factor in self.lr_factors
        ]

    def as_dict(self) -> dict:
        """The settings as plain values, for JSON and for checkpoints."""
        return asdict(self)


def resolve(given: dict, saved: dict | None) -> Settings:
    """Settings from those `given` on the command line over the `saved` ones of a checkpoint, or the defaults.

    A setting given that differs from the saved one raises `UsageError`: continuing with another model,
    text, seed or schedule would be neither the old run nor a new one. `DamagedCheckpoint`: `saved` does not have
    exactly these settings, each of its type.
    """
    if "text" in given:
        given = given | {"text": tuple(os.path.abspath(path) for path in given["text"])}
    if saved is None:
        settings = Settings(**given)
    else:
        settings = _restored(saved)
        different = [name for name in given if given[name] != getattr(settings, name)]
        if different:
            pairs = (
                f"{flag(name)} (saved: {shown(name, saved[name])}, given: {shown(name, given[name])})"
                for name in different
            )
            raise UsageError(
                f"--resume requires the settings the checkpoint was saved with, and these differ: {', '.join(pairs)};"
                " leave them out (saved settings are used by themselves) or start anew without --resume"
            )
    settings.check()
    return settings


def _restored(saved: dict) -> Settings:
    """The settings of a checkpoint. A missing one is an error: today's default might make it a different run."""
    for what, names in (("no", set(NAMES) - saved.keys()), ("an unknown", saved.keys() - set(NAMES))):
        if names:
            raise DamagedCheckpoint(f"it has {what} setting {', '.join(sorted(map(str, names)))}")
    for name, value in saved.items():
        default = getattr(Settings, name)
        kinds = _OPTIONAL.get(name, (float, int) if isinstance(default, float) else (type(default),))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise DamagedCheckpoint(f"its setting {name} is {value!r}")
    try:
        return Settings(**{**saved, "lr": tuple((str(name), float(lr)) for name, lr in saved["lr"])})
    except (TypeError, ValueError):
        raise DamagedCheckpoint(f"its setting lr is {saved['lr']!r}") from None


def shown(name: str, value: object) -> str:
    """A setting as it is written on the command line."""
    if name in _WITHOUT and value in (None, ()):
        return _WITHOUT[name]
    if name == "lr":
        pairs = value if isinstance(value, tuple) else ()
        return " ".join(f"{lr:g}" if which == EVERY_OPTIMIZER else f"{which}={lr:g}" for which, lr in pairs)
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flag(name: str) -> str:
    """The command-line option that sets a field of `Settings`."""
    return "--" + name.replace("_", "-")


NAMES = tuple(field.name for field in fields(Settings))
#: settings that may be None, and their type otherwise
_OPTIONAL = {
    "warmup_steps": (int, type(None)),
    "eval_every": (int, type(None)),
    "master": (str, type(None)),
}
#: how a default that is not a single value is described
_WITHOUT = {
    "lr": "one for each optimizer",
    "text": "the Python standard library's source",
    "warmup_steps": "a tenth of the steps",
    "eval_every": "a tenth of the steps",
    "master": "none",
}
