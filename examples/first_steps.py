"""A first training with hfac: a small network learns a made-up function, on a GPU where there is one. Takes seconds.

    python examples/first_steps.py
    python examples/first_steps.py --optimizer smmf --steps 500

Prints the loss on the way, and the bytes of optimizer state beside the network's own.
"""

import argparse
import functools

import torch
from torch import nn

import hfac

#: class with its options, and learning rate: docs/choosing.md has more of both
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, 1e-3),
    "hfac": (hfac.HFac, 7e-4),
    "hfac-int8": (functools.partial(hfac.HFac, first_moment="int8"), 1.1e-3),
    "smmf": (functools.partial(hfac.SMMF, decay_rate=-0.8), 1.6e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="hfac-int8", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to(device).requires_grad_(False)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8)).to(device)
    make, lr = OPTIMIZERS[args.optimizer]
    # Weights decay; biases do not. AdamW would take the same groups.
    optimizer = make(hfac.param_groups(model, weight_decay=0.1), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(args.steps, 1))

    for step in range(1, args.steps + 1):
        batch = torch.randn(128, 32, device=device)
        loss = nn.functional.mse_loss(model(batch), teacher(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == 1 or step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    print(f"{args.optimizer} on {device}: {weights:,} bytes of weights, {state:,} of optimizer state")


if __name__ == "__main__":
    main()
