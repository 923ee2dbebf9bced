"""transformers' Trainer, accelerate, Lightning and axolotl end on the bits of a loop written by hand, clipping
gradients and moving learning rates, and go on from their checkpoints bit for bit."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import documents
import pytest
import torch
from running import bits
from torch import Tensor, nn

import hfac

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

STEPS, SAVED_AT, PER_STEP, VOCABULARY = 6, 3, 4, 11
LR, CLIP, DECAY = 1e-2, 0.5, 0.1
OPTIONS: dict[str, dict[str, Any]] = {"HFac": {"betas": (0.8, 0.99)}, "SMMF": {"decay_rate": -0.8}}
PRECISIONS = ("float32", "autocast", "bfloat16")
#: a run: what to train, and where it saves and finds a checkpoint; it returns weights and optimizer
Run = Callable[[str, str, Path, int, bool], tuple[nn.Module, torch.optim.Optimizer]]


class Model(nn.Module):
    """Matrices, vectors of an even and a prime length, a scalar, and an embedding with a row that has no gradient."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.scale = nn.Parameter(torch.ones(()))
        self.gain = nn.Parameter(torch.ones(8))
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.hidden = nn.Linear(8, 7, bias=False)
        self.head = nn.Linear(7, VOCABULARY, bias=False)
        self.norm = nn.LayerNorm(7)  # last, where `groups` has it too: gradients' norms are added up in this order

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.hidden(self.embedding(input_ids).mean(1) * self.gain))
        logits = self.head(self.norm(hidden) * self.scale)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels)}

    def groups(self) -> list[dict[str, Any]]:
        """As transformers makes them: what is a norm's does not decay."""
        norms = list(self.norm.parameters())
        others = [param for name, param in self.named_parameters() if not name.startswith("norm.")]
        return [{"params": others, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]


def model(precision: str, seed: int) -> Model:
    return Model(seed).bfloat16() if precision == "bfloat16" else Model(seed)


def optimizer(name: str, module: Model) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    made = getattr(hfac, name)(module.groups(), lr=LR, **OPTIONS[name])
    return made, torch.optim.lr_scheduler.LambdaLR(made, decline)


def decline(step: int) -> float:
    return (STEPS - step) / STEPS


def samples() -> list[dict[str, Tensor]]:
    """An epoch, at whose end the checkpoint is; inputs are padded with zeros."""
    ids = torch.randint(1, VOCABULARY, (SAVED_AT * PER_STEP, 5), generator=torch.Generator().manual_seed(7))
    ids[:, 4] = ids[::2, 3] = 0
    return [{"input_ids": row, "labels": row[0]} for row in ids]


def batches() -> Any:
    return torch.utils.data.DataLoader(samples(), batch_size=PER_STEP)


def by_hand(name: str, precision: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = model(precision, 0)
    made, scheduler = optimizer(name, module)
    for batch in [*batches(), *batches()]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = module(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        made.step()
        scheduler.step()
        made.zero_grad()
    return module, made


def with_transformers(
    name: str, precision: str, folder: Path, seed: int, resume: bool, instance: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=precision == "autocast",
        max_steps=STEPS,
        save_steps=SAVED_AT,
        per_device_train_batch_size=PER_STEP,
        train_sampling_strategy="sequential",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="linear",
        report_to=[],
        disable_tqdm=True,
    )
    module = model(precision, seed)
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": (getattr(hfac, name), {"lr": LR, **OPTIONS[name]})}
    if instance:
        given = {"optimizers": optimizer(name, module)}
    trainer = transformers.Trainer(model=module, args=arguments, train_dataset=samples(), **given)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}") if resume else None)
    assert trainer.state.global_step == STEPS
    return module, trainer.optimizer


def with_transformers_instance(*run: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    return with_transformers(*run, instance=True)


def with_accelerate(
    name: str, precision: str, folder: Path, seed: int, resume: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # else the first precision is the last
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16" if precision == "autocast" else "no")
    module = model(precision, seed)
    made, scheduler = optimizer(name, module)
    prepared, made, loader, scheduler = accelerator.prepare(module, made, batches(), scheduler)
    if resume:
        accelerator.load_state(str(folder))
    for epoch in (1,) if resume else (0, 1):
        for batch in loader:
            accelerator.backward(prepared(**batch)["loss"])
            accelerator.clip_grad_norm_(prepared.parameters(), CLIP)
            made.step()
            scheduler.step()
            made.zero_grad()
        if epoch == 0:
            accelerator.save_state(str(folder))
    accelerator.free_memory()
    return module, made.optimizer


def with_lightning(
    name: str, precision: str, folder: Path, seed: int, resume: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(seed)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> dict[str, Any]:
            made, scheduler = optimizer(name, self.model)
            return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    saving = lightning.callbacks.ModelCheckpoint(str(folder), "{step}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision={"float32": "32-true", "autocast": "bf16-mixed", "bfloat16": "bf16-true"}[precision],
        gradient_clip_val=CLIP,
        max_epochs=STEPS // SAVED_AT,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, batches(), ckpt_path=str(folder / f"step={SAVED_AT}.ckpt") if resume else None)
    assert trainer.global_step == STEPS
    return module.model, trainer.optimizers[0]


def with_axolotl(
    name: str, precision: str, folder: Path, seed: int, resume: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """By axolotl's own builder, with the plugin of docs/trainers.md: what `axolotl train` does with them, without the
    loading of models and data."""
    pytest.importorskip("axolotl")
    import datasets
    import transformers
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.trainer import setup_trainer

    (page,) = (page for page in documents.PAGES if page.name == "trainers.md")
    (block,) = (block for block in documents.blocks(page) if block.after("not run") == "needs axolotl")
    sys.modules["my_plugin"] = plugin = type(sys)("my_plugin")
    exec(block.compiled(), plugin.__dict__)
    hook = plugin.HFacPlugin.post_trainer_create

    def with_options(self: Any, cfg: Any, trainer: Any) -> None:
        hook(self, cfg, trainer)
        made, options = trainer.optimizer_cls_and_kwargs
        assert made is hfac.HFac
        trainer.optimizer_cls_and_kwargs = (getattr(hfac, name), options | OPTIONS[name])

    class OnCPU(BasePlugin):
        def get_training_args(self, cfg: Any) -> dict[str, Any]:
            return {"use_cpu": True, "train_sampling_strategy": "sequential", "disable_tqdm": True}

    plugin.HFacPlugin.post_trainer_create, plugin.OnCPU = with_options, OnCPU
    cfg = DictDefault(
        plugins=["my_plugin.HFacPlugin", "my_plugin.OnCPU"],
        optimizer="adamw_torch",
        output_dir=str(folder),
        bf16=precision == "autocast",
        max_steps=STEPS,
        num_epochs=1,
        save_steps=SAVED_AT,
        micro_batch_size=PER_STEP,
        gradient_accumulation_steps=1,
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler="linear",
        warmup_steps=0,
        val_set_size=0,
        sequence_len=5,
        seed=0,
    )
    plugins = PluginManager.get_instance()
    for each in cfg.plugins:
        plugins.register(each)
    plugins.cfg = cfg
    module = model(precision, seed)
    data = datasets.Dataset.from_list(samples()).with_format("torch")
    trainer = setup_trainer(cfg, data, None, module, None, None, STEPS)
    plugins.post_trainer_create(cfg, trainer)
    trainer.data_collator = trainer.train_data_collator = transformers.default_data_collator  # there is no text to pad
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}") if resume else None)
    assert trainer.state.global_step == STEPS
    return module, trainer.optimizer


RUNS: dict[str, Run] = {
    "transformers": with_transformers,
    "transformers, an instance": with_transformers_instance,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
    "axolotl": with_axolotl,
}


def left(run: tuple[nn.Module, torch.optim.Optimizer]) -> dict[str, Any]:
    """Every bit of weights, optimizer state and options, by name."""
    module, made = run
    saved = made.state_dict()
    found = dict(module.named_parameters())
    groups = {f"group {i}": group for i, group in enumerate(saved["param_groups"])}
    for place, entries in [*saved["state"].items(), *groups.items()]:
        found.update({f"{key} of {place}": value for key, value in entries.items()})
    return {name: bits(value) for name, value in found.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if name not in one or name not in other or one[name] != other[name]]


@pytest.mark.pairwise
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec", "ignore:Checkpoint directory")  # Lightning's
@pytest.mark.parametrize("trainer", RUNS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_that_of_a_loop_by_hand_and_goes_on(
    name: str, precision: str, trainer: str, tmp_path: Path
) -> None:
    whole = left(RUNS[trainer](name, precision, tmp_path, 0, False))
    assert not differing(whole, left(by_hand(name, precision)))
    assert not differing(whole, left(RUNS[trainer](name, precision, tmp_path, 1, True)))  # that began elsewhere


@pytest.mark.parametrize("name", ["hfac", "HFac", "hfac.HFac", "smmf"])
def test_transformers_takes_no_optimizer_of_another_package_by_name(name: str, tmp_path: Path) -> None:
    """Should this fail, docs/trainers.md has a shorter way to show."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=f"{name} is not a valid OptimizerNames"):
        transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=name)
