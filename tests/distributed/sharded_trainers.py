"""transformers' Trainer and accelerate train under FSDP2 beside the same training of whole parameters; runs on every
rank."""

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, FullyShardedDataParallel, OffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hfac

STEPS, SAVED_AT = 8, 4
VOCABULARY, WINDOW, PER_RANK = 31, 16, 2


def let_fsdp_train_on_cpus() -> None:
    """Makes accelerate do on CPUs what it does on GPUs.

    AcceleratorState takes up an FSDP plugin only where it knows the accelerator; on CPUs it forgets the plugin without
    a word, and Accelerator.prepare makes the model a DistributedDataParallel.
    """
    made = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            # Every AcceleratorState made later reads it there again.
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    made = GPT2LMHeadModel(config)
    for block in made.transformer.h:
        # A bias of the keys does not change the output: its gradient is rounding, which H-Fac would scale up to a step
        # of full size, and another one on another number of ranks.
        block.attn.c_attn.bias.requires_grad_(False)
    return made


def windows(start: int, count: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(start, start + count)]
    return torch.stack([torch.randint(VOCABULARY, (WINDOW,), generator=g) for g in generators])


def with_accelerate(name: str, folder: str, offload: bool = False) -> dict[str, Any]:
    """Losses of whole parameters, of sharded ones, and of those that went on from a checkpoint; what the state is.

    ``offload``: under FSDP2's CPUOffloadPolicy, which without a GPU has no memory to pin, and with the weights loaded
    as accelerate does it by default: on rank 0, which sends them to the others.
    """

    def run(model: torch.nn.Module, optimizer: Any, steps: range, accelerator: Accelerator | None) -> list[float]:
        losses = []
        for step in steps:
            inputs = windows(step * PER_RANK * dist.get_world_size(), PER_RANK * dist.get_world_size())
            if accelerator is not None:
                inputs = inputs.chunk(dist.get_world_size())[dist.get_rank()]
            loss = model(input_ids=inputs, labels=inputs).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((loss if accelerator is None else accelerator.reduce(loss.detach(), "mean")).item())
        return losses

    whole = model()
    expected = run(whole, getattr(hfac, name)(whole.parameters(), lr=1e-2), range(STEPS), None)

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_offload=CPUOffloadPolicy(pin_memory=False) if offload else False,
        cpu_ram_efficient_loading=offload,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    losses = {}
    for seed in (0, 1):  # a model that starts elsewhere owes everything to the checkpoint
        sharded = model(seed)
        prepared, optimizer = accelerator.prepare(sharded, getattr(hfac, name)(sharded.parameters(), lr=1e-2))
        if seed == 0:
            before = run(prepared, optimizer, range(SAVED_AT), accelerator)
            accelerator.save_state(folder)
        else:
            accelerator.load_state(folder)
        losses[seed] = run(prepared, optimizer, range(SAVED_AT, STEPS), accelerator)
        accelerator.free_memory()
    units = [each for each in prepared.modules() if isinstance(each, FSDPModule)]
    policies = {type(unit._get_fsdp_state()._fsdp_param_group.offload_policy) for unit in units}
    assert policies == {CPUOffloadPolicy if offload else OffloadPolicy}
    sharded_states = states(optimizer)
    forget()
    return {"whole": expected, "sharded": before + losses[0], "resumed": losses[1], "states": sharded_states}


def with_trainer(name: str, folder: str) -> dict[str, Any]:
    """As `with_accelerate`; what is whole is DistributedDataParallel's."""
    data = [{"input_ids": row, "labels": row} for row in windows(0, 64)]

    def run(fsdp: bool, seed: int, resume: str | None) -> tuple[list[float], Trainer]:
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]} if fsdp else None
        arguments = TrainingArguments(
            output_dir=folder if fsdp else f"{folder}-whole",
            use_cpu=True,
            fsdp=fsdp,
            fsdp_config=config,
            max_steps=STEPS,
            save_steps=SAVED_AT,
            per_device_train_batch_size=PER_RANK,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        # Trainer takes no optimizer that has been made already under FSDP.
        optimizer = (getattr(hfac, name), {"lr": 1e-2})
        trainer = Trainer(model=model(seed), args=arguments, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
        trainer.train(resume_from_checkpoint=resume)
        forget()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer

    expected, _ = run(False, 0, None)
    losses, _ = run(True, 0, None)
    resumed, trainer = run(True, 1, f"{folder}/checkpoint-{SAVED_AT}")
    return {
        "whole": expected,
        "sharded": losses,
        "resumed": resumed[-(STEPS - SAVED_AT) :],
        "states": states(trainer.optimizer),
    }


def refused_by(name: str) -> list[str | None]:
    """What the class says of FSDP1's flat parameters, and of the pieces of them that keep the names of parameters."""

    def refusal(use_orig_params: bool) -> str | None:
        sharded = FullyShardedDataParallel(
            torch.nn.Linear(5, 3), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        try:
            getattr(hfac, name)(sharded.parameters())
        except TypeError as error:
            return str(error)
        return None

    return [refusal(False), refusal(True)]


def states(optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    """Whether the state of the first parameter is sharded as the parameter is, by key."""
    first = optimizer.param_groups[0]["params"][0]
    return {key: isinstance(value, DTensor) for key, value in optimizer.state[first].items()}


def forget() -> None:
    """Lets the next Accelerator of this process choose anew between FSDP and DistributedDataParallel."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # an Accelerator with a plugin leaves it behind


def run_all(names: list[str], folder: str) -> dict[tuple[str, str], Any]:
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    refused = {("FSDP1", name): refused_by(name) for name in names}  # before accelerate changes anything
    let_fsdp_train_on_cpus()
    trainers = {
        "accelerate": with_accelerate,
        "accelerate, offloaded": partial(with_accelerate, offload=True),
        "transformers": with_trainer,
    }
    trained = {
        (trainer, name): train(name, f"{folder}/{trainer}-{name}")
        for trainer, train in trainers.items()
        for name in names
    }
    return trained | refused
