"""torchtitan's optimizers, schedulers and checkpoints around a model under fully_shard, beside the same training of
whole parameters; runs on every rank."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_models import everything, loss_of, model, sharded
from sharded_steps import difference
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.distributed.utils import clip_grad_norm_

import hfac

STEPS, SAVED_AT, CLIP = 6, 3, 0.1


class FactoredOptimizers(OptimizersContainer):
    """As docs/trainers.md has it."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name):
        ours = {"HFac": hfac.HFac, "SMMF": hfac.SMMF}
        return ours.get(name) or OptimizersContainer._resolve_optimizer_factory(name)


def config(name):
    """Weights by ours, vectors by AdamW: two optimizers in one container, whose states share a flat dict."""
    options = {"lr": 1e-2, "weight_decay": 0.1}
    vectors = ParamGroupConfig(pattern=r"bias$|norm", optimizer_name="AdamW", optimizer_kwargs=options)
    weights = ParamGroupConfig(pattern=r".*", optimizer_name=name, optimizer_kwargs=options)
    return FactoredOptimizers.Config(param_groups=[vectors, weights], implementation="for-loop")


class Run:
    """What torchtitan's trainer puts together."""

    def __init__(self, name, net, folder, asynchronous):
        self.net = net
        self.optimizers = config(name).build(model_parts=[net])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=STEPS)
        mode = "async" if asynchronous else "disabled"
        settings = CheckpointManager.Config(
            enable=True, folder=folder, interval=SAVED_AT, async_mode=mode, keep_latest_k=0
        )
        self.checkpoints = settings.build(
            dataloader=None, model_parts=[net], optimizers=self.optimizers, lr_schedulers=self.schedulers, states={},
            sd_adapter=None,
        )  # fmt: skip

    def train(self, steps, save=False):
        for step in steps:
            loss_of(self.net, step).backward()
            clip_grad_norm_(list(self.net.parameters()), CLIP, foreach=True)
            self.checkpoints.maybe_wait_for_staging()
            self.optimizers.step()
            self.schedulers.step()
            self.optimizers.zero_grad()
            if save:
                self.checkpoints.save(step + 1)

    def everything(self):
        """By name, whole weights and states, and the learning rates."""
        found = {}
        for index, optimizer in enumerate(self.optimizers):
            found |= everything(self.net, optimizer)
            found[f"lr {index}"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
        return found


def goes_on(name, folder, asynchronous):
    """Largest difference from the training of whole parameters; whether a run that was loaded is equal to the bit, and
    how many states it has."""
    folder = str(Path(folder) / f"{name}-{asynchronous}")
    plain, mesh = model(), init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    whole = Run(name, copy.deepcopy(plain), f"{folder}-whole", False)
    whole.train(range(STEPS))
    first = Run(name, sharded(copy.deepcopy(plain), mesh), folder, asynchronous)
    first.train(range(SAVED_AT), save=True)
    first.train(range(SAVED_AT, STEPS))
    first.checkpoints.maybe_wait_for_saving()
    for param in plain.parameters():
        torch.nn.init.zeros_(param)  # what is not loaded shows
    second = Run(name, sharded(plain, mesh), folder, asynchronous)
    assert second.checkpoints.load(SAVED_AT)
    second.train(range(SAVED_AT, STEPS))
    wanted, found, loaded = (run.everything() for run in (whole, first, second))
    assert wanted.keys() == found.keys() == loaded.keys()
    worst = max(difference(found[key], value) for key, value in wanted.items())
    return worst, all(torch.equal(found[key], value) for key, value in loaded.items()), len(found)
