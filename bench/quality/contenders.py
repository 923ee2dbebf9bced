"""The optimizers of the study, each built over a model with the same weight decay and one learning rate."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import hfac
from bench import bytes as traffic
from bench.quality.tasks import Task
from hfac.cli.optimizers import ADVISED

#: parameters of the byte-GPT, the ViT and larger models that look up or project tokens, by `fnmatch`
EMBEDDINGS = ("*embedding*", "lm_head*")
_NOT_FOR_MUON = re.compile("embedding|head")


@dataclass(frozen=True)
class Contender:
    """One optimizer, with its class's defaults but for what `build` sets.

    Attributes:
        title: as tables and pictures name it.
        build: from the model, the learning rate, the matrices' weight decay and the task.
        relative: the learning rate relative to AdamW's where its sweep begins; on convolutional networks the second.
        settings: of the run, where they differ from the task's.
        tasks: those that it is meant for; None for all.
        missing: what has to be installed for it; "" where it can be built.
        usual: whether a study that names no optimizers has it.
    """

    title: str
    build: Callable[[nn.Module, float, float, Task], Any]
    relative: tuple[float, float] = (1.0, 1.0)
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    missing: str = ""
    usual: bool = True

    def rate(self, task: Task) -> float:
        """The learning rate where its sweep begins."""
        return task.rate * self.relative[task.convolutional]


class Pair:
    """Two optimizers as one: Muon for the matrices in the middle of a model, AdamW for the rest.

    Muon takes only matrices, so a convolution's weights are shown to it as one, a row per output channel.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        named = list(model.named_parameters())
        chosen = [p for name, p in named if p.dim() >= 2 and not _NOT_FOR_MUON.search(name)]
        self.shown = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in chosen]
        taken = set(map(id, chosen))
        # As large an update as AdamW's, so that one rate serves both.
        muon = torch.optim.Muon([matrix for _, matrix in self.shown], lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        rest = [p for _, p in named if id(p) not in taken]
        self.optimizers = (muon, torch.optim.AdamW(_decayed(rest, weight_decay), lr))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {param: state for optimizer in self.optimizers for param, state in optimizer.state.items()}

    def step(self) -> None:
        for param, matrix in self.shown:
            matrix.grad = None if param.grad is None else param.grad.view_as(matrix)
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for param, matrix in self.shown:
            param.grad = matrix.grad = None
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def _decayed(params: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Groups: matrices and convolutions decay, vectors do not."""
    params = list(params)
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def _plain(cls: Callable[..., Optimizer], decay: float = 1.0, **options: Any) -> Callable[..., Optimizer]:
    """A class over the usual groups; `decay` multiplies the weight decay."""
    return lambda model, lr, weight_decay, task: cls(
        _decayed(model.parameters(), decay * weight_decay), lr=lr, **options
    )


def _smmf(**options: Any) -> Callable[..., Optimizer]:
    def build(model: nn.Module, lr: float, weight_decay: float, task: Task) -> Optimizer:
        # as its authors advise for convolutional networks and for Transformers
        rate = -0.5 if task.convolutional else -0.8
        return hfac.SMMF(_decayed(model.parameters(), weight_decay), lr=lr, decay_rate=rate, **options)

    return build


def _dense_embeddings(model: nn.Module, lr: float, weight_decay: float, task: Task) -> Optimizer:
    named = list(model.named_parameters())
    whole = {id(p) for name, p in named if any(fnmatchcase(name, pattern) for pattern in EMBEDDINGS)}
    factored = _decayed([p for _, p in named if id(p) not in whole], weight_decay)
    dense = _decayed([p for _, p in named if id(p) in whole], weight_decay)
    return hfac.HFac(factored + [group | {"dense": True} for group in dense if group["params"]], lr=lr)


def _eight_bit(package: str) -> Callable[..., Optimizer]:
    def build(model: nn.Module, lr: float, weight_decay: float, task: Task) -> Optimizer:
        cls = importlib.import_module(f"{package}.optim").AdamW8bit
        return with_its_rates(cls(_decayed(model.parameters(), weight_decay), lr=lr))

    return build


def with_its_rates(optimizer: Optimizer) -> Optimizer:
    """The optimizer; where its learning rates are tensors (torchao's, for its compiled step) they stay tensors when a
    schedule sets numbers in their place."""
    rates = [group["lr"] for group in optimizer.param_groups]

    def restore(optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if isinstance(rate, Tensor) and not isinstance(group["lr"], Tensor):
                group["lr"] = rate.fill_(group["lr"])

    optimizer.register_step_pre_hook(restore)
    return optimizer


def _unless_installed(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package}, which is not installed"


CONTENDERS = {
    "adamw": Contender("AdamW", _plain(torch.optim.AdamW)),
    "adamw-0.95": Contender("AdamW, beta2 0.95", _plain(torch.optim.AdamW, betas=(0.9, 0.95))),
    "nadam": Contender("NAdam", _plain(torch.optim.NAdam, decoupled_weight_decay=True)),
    "adafactor": Contender(
        "Adafactor (PyTorch)",
        _plain(torch.optim.Adafactor, 1 / ADVISED["adafactor"][0]),  # the rate is relative to parameters, the decay not
        ADVISED["adafactor"],
    ),
    "muon": Contender(
        "Muon + AdamW",
        lambda model, lr, weight_decay, task: Pair(model, lr, weight_decay),
        missing="" if hasattr(torch.optim, "Muon") else f"torch 2.9 or later (here: {torch.__version__})",
    ),
    "adam8bit": Contender("8-bit AdamW (torchao)", _eight_bit("torchao"), missing=_unless_installed("torchao")),
    "adam8bit-bnb": Contender(
        "8-bit AdamW (bitsandbytes)", _eight_bit("bitsandbytes"), missing=_unless_installed("bitsandbytes")
    ),
    "smmf": Contender("SMMF", _smmf(), ADVISED["smmf"]),
    # its momentum fades by growth_rate^t: does that matter in long runs?
    "smmf-0.9": Contender("SMMF, beta 0.9 throughout", _smmf(growth_rate=1.0), (0.8, 0.8), usual=False),
    "smmf-0.5": Contender("SMMF, beta 0.5 throughout", _smmf(beta=0.5, growth_rate=1.0), ADVISED["smmf"], usual=False),
    "hfac": Contender("HFac", _plain(hfac.HFac), ADVISED["hfac"]),
    "hfac-dense": Contender("HFac, dense embeddings", _dense_embeddings, (0.8, 0.8), tasks=("gpt", "vit", "scale")),
    "hfac-int8": Contender("HFac, int8 moment", _plain(hfac.HFac, first_moment="int8"), ADVISED["hfac-int8"]),
    "hfac-int8-bf16": Contender(
        "HFac, int8 moment, bfloat16 weights",
        _plain(hfac.HFac, first_moment="int8", rounding="stochastic"),
        ADVISED["hfac-int8"],
        settings={"dtype": "bfloat16", "rounding": "stochastic"},
        tasks=("gpt",),
    ),
}
#: what all others are compared with
BASE = "adamw"


def state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors in `optimizer.state`, each counted once, and of wrapper subclasses what they hold."""
    states = optimizer.state.values()
    tensors = {id(value): value for state in states for value in state.values() if isinstance(value, Tensor)}
    return sum(map(traffic.size, traffic.plain(tensors.values())))
