"""Trains the byte-level GPT of `hfac compare`, sharded with FSDP2, on CPUs (gloo) or GPUs (NCCL).

    torchrun --nproc-per-node 4 examples/fsdp2_train.py --optimizer hfac --checkpoint out --save-every 100
    torchrun --nproc-per-node 2 examples/fsdp2_train.py --optimizer hfac --checkpoint out --save-every 100 --resume

Losses do not depend on the number of processes, and a resumed run goes on with the same ones, up to rounding.
"""

import argparse
import functools
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import hfac
from hfac.cli.arguments import nonnegative_int, positive_float, positive_int
from hfac.cli.corpus import load_corpus, training_batch, validation_batches
from hfac.cli.errors import UsageError
from hfac.cli.model import ByteGPT

#: class and peak learning rate; SMMF's authors advise decay_rate=-0.8 for Transformers
OPTIMIZERS = {
    "hfac": (hfac.HFac, 2.5e-3),
    "hfac-int8": (functools.partial(hfac.HFac, first_moment="int8"), 4.4e-3),
    "smmf": (functools.partial(hfac.SMMF, decay_rate=-0.8), 4e-3),
    "adamw": (torch.optim.AdamW, 4e-3),
}
CONTEXT = 64
MAX_BYTES = 16 * 2**20
VALIDATION_BATCHES = 32

Batch = tuple[torch.Tensor, torch.Tensor]


class Training(Stateful):
    """All that a checkpoint holds; torch.distributed.checkpoint calls the methods when it saves and loads."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        # Keyed by the parameters' names and made of DTensors, so that any number of processes can load it.
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model, optimizer = state_dict["model"], state_dict["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.step = state_dict["step"]


def build(args: argparse.Namespace, device: torch.device) -> Training:
    # Every rank makes the whole model, the same one, and keeps its shards. A model too large for that is made on the
    # meta device, sharded, and initialized or loaded shard by shard.
    torch.manual_seed(args.seed)
    model = ByteGPT(d_model=128, layers=2, heads=4, context=CONTEXT)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    # Parameters and optimizer state stay in float32, whatever the layers compute with.
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    # The optimizer comes after fully_shard, which replaces the parameters.
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer_class, default_lr = OPTIMIZERS[args.optimizer]
    return Training(model, optimizer_class(groups, lr=args.lr or default_lr))


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warmup over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = steps // 10
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def batch_of_step(data: torch.Tensor, args: argparse.Namespace, step: int) -> Batch:
    """The batch of all ranks: a function of seed and step alone, so that a resumed run sees what comes next."""
    generator = torch.Generator().manual_seed(1_000_003 * args.seed + step)
    return training_batch(data, args.batch, CONTEXT, generator)


def share(batch: Batch, device: torch.device) -> list[torch.Tensor]:
    """This rank's part. All parts are of one size, so the mean of the ranks' means is the mean of the batch."""
    return [windows.chunk(dist.get_world_size())[dist.get_rank()].to(device) for windows in batch]


def mean_over_ranks(value: torch.Tensor) -> float:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@torch.no_grad()
def validation_loss(model: torch.nn.Module, data: torch.Tensor, batch: int, device: torch.device) -> float:
    batches = validation_batches(data, batch, CONTEXT, VALIDATION_BATCHES)
    # A last batch that is smaller is left out: it could not be shared evenly.
    losses = [model.loss(*share(windows, device)) for windows in batches if len(windows[0]) == batch]
    return mean_over_ranks(torch.stack(losses).mean())


def largest_state_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Bytes of optimizer state on the rank that keeps most."""
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    size = torch.tensor(sum(part.numel() * part.element_size() for part in parts), device=device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    return int(size)


def last_checkpoint(folder: Path) -> Path:
    # The metadata is written last: a folder without it is what a save that was cut short has left.
    found = sorted(metadata.parent for metadata in folder.glob("step-*/.metadata"))
    if not found:
        raise UsageError(f"--resume requires a checkpoint in {folder}, which holds none; start without --resume.")
    return found[-1]


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.batch % ranks:
        raise UsageError(f"--batch must be a multiple of the number of processes ({ranks}), got {args.batch}.")
    if args.checkpoint is None and (args.resume or args.save_every):
        raise UsageError("--resume and --save-every require --checkpoint DIR, the folder of the checkpoints.")
    # One tenth of the text is for validation, where one whole batch must find room.
    corpus = load_corpus(args.text, MAX_BYTES, CONTEXT * args.batch)
    training = build(args, device)
    model, optimizer = training.model, training.optimizer
    peaks = [group["lr"] for group in optimizer.param_groups]
    if args.resume:
        dcp.load({"training": training}, checkpoint_id=last_checkpoint(args.checkpoint))

    for step in range(training.step, args.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate_factor(step, args.steps)
        loss = model.loss(*share(batch_of_step(corpus.train, args, step), device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        training.step = step + 1
        last = training.step == args.steps
        if last or step % max(1, args.steps // 20) == 0:
            mean = mean_over_ranks(loss)
            if rank == 0:
                print(f"step {step} loss {mean:.6f}", flush=True)
        if args.save_every and (last or training.step % args.save_every == 0):
            dcp.save({"training": training}, checkpoint_id=args.checkpoint / f"step-{training.step:07}")

    loss = validation_loss(model, corpus.validation, args.batch, device)
    state_bytes = largest_state_bytes(optimizer, device)
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"validation loss {loss:.6f}, optimizer state {state_bytes} bytes per rank, {parameters} parameters")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="hfac")
    parser.add_argument("--lr", type=positive_float, help="peak learning rate (default: one that suits the optimizer)")
    parser.add_argument("--steps", type=positive_int, default=700)
    parser.add_argument("--batch", type=positive_int, default=16, help="windows of text in a step, of all ranks")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what layers compute with")
    parser.add_argument("--text", action="append", default=[], help="file or folder (default: the standard library)")
    parser.add_argument("--seed", type=nonnegative_int, default=0)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder of the checkpoints")
    parser.add_argument("--save-every", type=positive_int, metavar="N", help="save after every N steps and the last")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun, for example: torchrun --nproc-per-node 4 examples/fsdp2_train.py")

    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    status = 0
    try:
        train(args, device)
    except UsageError as error:  # the same on every rank
        if local_rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist.barrier()  # torchrun ends all ranks with the first, and the message must be out by then
        status = 2
    except BaseException:  # on this rank alone: the others wait in a collective that will not come
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # to destroy the process group would wait for them; torchrun ends them now
    dist.destroy_process_group()
    if device.type == "cpu":
        # Functional collectives, as DTensor makes them, keep the group and its threads alive. Such a thread needs
        # Python when it lets go of the last collective's tensors, and aborts a Python that is ending
        # (pytorch/pytorch issue 190489).
        time.sleep(1)
    return status


if __name__ == "__main__":
    sys.exit(main())
