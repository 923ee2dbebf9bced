"""torchtune's recipes for full finetuning as they are, with a tiny Llama, tokenizer and text made here: in one process,
and sharded over all; runs on every rank."""

import contextlib
import importlib.util
import logging
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import sentencepiece
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from sharded_models import everything
from sharded_steps import difference
from torch.distributed.fsdp import CPUOffloadPolicy
from torchtune import config, training

import hfac

logging.disable(logging.WARNING)  # torchtune sets the level of each of its loggers

EPOCHS, LINES, PER_STEP, WINDOW = 2, 12, 4, 16
WEIGHTS = "model-00001-of-00001.bin"  # under this name the recipes save them
OPTIONS = {"HFac": {"betas": [0.8, 0.99]}, "SMMF": {"decay_rate": -0.8}}  # a list, as YAML has it
#: what of a recipe's settings is changed
# From such a checkpoint torchtune resumes no schedule, whatever the optimizer: "param 'initial_lr' is not specified".
ASYNCHRONOUS = {"enable_async_checkpointing": True, "lr_scheduler": None}
CASES = {
    "recipe": {},
    "asynchronous checkpoints": ASYNCHRONOUS,
    "in the backward pass": {"optimizer_in_bwd": True},
    "both": {"optimizer_in_bwd": True, **ASYNCHRONOUS},
    "offloaded": {"fsdp_cpu_offload": True},
}


def settings(name, folder, batch, **changes):
    """A recipe's configuration, as its YAML file has it."""
    return OmegaConf.create(
        {
            "model": {
                "_component_": "torchtune.models.llama2.llama2",
                "vocab_size": 40,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 1,
                "embed_dim": 12,
                "intermediate_dim": 20,
                "max_seq_len": WINDOW,
            },
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": f"{folder}/tokenizer.model",
                "max_seq_len": WINDOW,
            },
            "dataset": {
                "_component_": "torchtune.datasets.text_completion_dataset",
                "source": "text",
                "data_files": f"{folder}/text",
                "split": "train",
                "cache_dir": f"{folder}/cache",
            },
            "optimizer": {"_component_": f"hfac.{name}", "lr": 1e-2, "weight_decay": 0.1, **OPTIONS[name]},
            "optimizer_in_bwd": False,
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                # With warmup, in the backward pass, torchtune would warm up only the first parameter in the first step.
                "num_warmup_steps": 0,
            },
            "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
                "checkpoint_dir": f"{folder}/start",
                "checkpoint_files": [WEIGHTS],
                "output_dir": "${output_dir}",
                "model_type": "LLAMA2",
            },
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": "${output_dir}",
            },
            "output_dir": f"{folder}/run",
            "resume_from_checkpoint": False,
            "device": "cpu",
            "dtype": "fp64",
            "seed": 0,
            "shuffle": False,
            "epochs": EPOCHS,
            "batch_size": batch,
            "max_steps_per_epoch": None,
            "gradient_accumulation_steps": 1,
            "compile": False,
            **changes,
        }
    )


@cache
def start(folder):
    """Writes what the recipes read: weights, a tokenizer, and text.

    Every line is longer than the window and cut there: the recipe for several processes weighs a short line's tokens
    otherwise than the one for one process.
    """
    folder = Path(folder)
    if dist.get_rank() == 0:
        lines = [" ".join("abcdefgh"[i % 3 : 2 + i % 5] for i in range(k, k + WINDOW)) for k in range(LINES)]
        (folder / "text").write_text("\n".join(lines))
        with (folder / "tokenizer.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, vocab_size=40, hard_vocab_limit=False,
                minloglevel=2,
            )  # fmt: skip
        torch.manual_seed(0)
        with in_float64(), training.set_default_dtype(torch.float64):
            net = config.instantiate(settings("HFac", folder, 1).model)
        (folder / "start").mkdir()
        torch.save(net.state_dict(), folder / "start" / WEIGHTS)
    dist.barrier()


def in_float64():
    """Norms, positions and logits of torchtune call `float()`, whose rounding would be most of what differs."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


MEMORY = ("peak_memory_active", "peak_memory_alloc", "peak_memory_reserved")


@contextlib.contextmanager
def without_gpus(recipe):
    """Replaces what the recipe for several processes does with GPUs: pin, measure and empty their memory. And the
    processes here have a process group already."""
    unpinned = partial(CPUOffloadPolicy, pin_memory=False)
    with (
        mock.patch.object(recipe, "init_process_group", lambda *_: None, create=True),
        mock.patch.object(training, "get_memory_stats", lambda **_: dict.fromkeys(MEMORY, 0.0)),
        mock.patch.object(training, "cleanup_before_training", lambda: None),
        mock.patch("torchtune.training._distributed.CPUOffloadPolicy", unpinned),
    ):
        yield


@cache
def recipe_of(kind):
    """The module of a recipe, which is a script beside the package."""
    path = Path(importlib.util.find_spec("torchtune").origin).parent.parent / "recipes" / f"full_finetune_{kind}.py"
    spec = importlib.util.spec_from_file_location(f"full_finetune_{kind}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(kind, cfg):
    """By name, whole weights and states after training, and how many steps it took."""
    module = recipe_of(kind)
    made = {"single_device": "FullFinetuneRecipeSingleDevice", "distributed": "FullFinetuneRecipeDistributed"}[kind]
    with without_gpus(module), in_float64():
        recipe = getattr(module, made)(cfg)
        if cfg.get("enable_async_checkpointing"):
            # With GPUs the checkpoint has gloo for itself, while the training goes on over NCCL.
            recipe._checkpoint_client._get_dcp_checkpointer()._process_group = dist.new_group()
        recipe.setup(cfg)
        first = recipe.global_step
        recipe.train()
    if cfg.get("enable_async_checkpointing") and not cfg.resume_from_checkpoint:
        recipe._checkpoint_client._get_dcp_checkpointer()._checkpoint_future.result()
    optimizers = [recipe._optimizer]
    if cfg.optimizer_in_bwd:
        optimizers = list(recipe._optim_ckpt_wrapper.optim_map.values())
    assert all(type(optimizer).__module__.startswith(hfac.__name__) for optimizer in optimizers)
    states = {param: state for optimizer in optimizers for param, state in optimizer.state.items()}
    found = everything(recipe._model, SimpleNamespace(state=states))
    rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    return found | {"lr": torch.tensor(sorted(rates))}, recipe.global_step - first


@cache
def whole(name, folder, rates, in_backward):
    """Weights and states after the recipe for one process with the reference's steps."""
    cfg = settings(name, folder, PER_STEP, optimizer_in_bwd=in_backward)
    cfg.output_dir = f"{folder}/whole {name} {rates} {in_backward} {dist.get_rank()}"
    cfg.optimizer.backend = "reference"
    if not rates:
        cfg.lr_scheduler = None
    return trained("single_device", cfg)[0]


def goes_on(name, folder, case, kind="distributed"):
    """Largest difference from `whole`; whether a run that was resumed from the first epoch's checkpoint is equal to the
    bit; how many tensors were compared; how many steps the run and the resumed one made."""
    start(folder)
    cfg = settings(name, folder, PER_STEP, **CASES[case])
    cfg.output_dir = f"{folder}/{name} {case} {kind}"
    if kind == "distributed":
        cfg.batch_size //= dist.get_world_size()
    else:
        cfg.output_dir += f" {dist.get_rank()}"
    # The recipe for one process does not divide gradients by the number of tokens if it steps in the backward pass.
    wanted = whole(name, folder, cfg.lr_scheduler is not None, kind == "single_device" and cfg.optimizer_in_bwd)
    found, steps = trained(kind, cfg)
    dist.barrier()
    resumed = {"resume_from_checkpoint": True}
    if not cfg.get("enable_async_checkpointing"):  # an asynchronous one the recipe finds by itself
        resumed["checkpointer"] = {"checkpoint_files": [f"epoch_{EPOCHS - 2}/{WEIGHTS}"]}
    loaded, others = trained(kind, OmegaConf.merge(cfg, resumed))
    assert wanted.keys() == found.keys() == loaded.keys()
    equal = all(torch.equal(found[key], value) for key, value in loaded.items())
    if name == "HFac":
        # Gradients of a cross-entropy add up to zero over the tokens there are.
        assert max(tensors.pop("output.weight.exp_avg_col").abs().max() for tensors in (wanted.copy(), found)) < 1e-12
    worst = max(difference(value, wanted[key]) for key, value in found.items())
    return worst, equal, len(found), (steps, others)
