"""What the optimizers are measured against: torch's own, and SMMF as one writes it down in eager torch."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.problem import LR, WEIGHT_DECAY
from hfac import matricize, ops


class EagerSMMF(Optimizer):
    """SMMF (Park, Lee, AAAI 2025, Algorithm 1) in straightforward torch, tensor by tensor, as its authors' code
    behaves: the signs are a bool matrix of the parameter's size, each moment is decompressed into a whole matrix, and
    the normalisation asks the host whether the sum is zero, twice per tensor.

    Decoupled weight decay. Written from the algorithm, apart from `hfac.reference`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_rate: float = -0.5,
        growth_rate: float = 0.999,
    ) -> None:
        super().__init__(
            params,
            dict(lr=lr, beta=beta, eps=eps, weight_decay=weight_decay, decay_rate=decay_rate, growth_rate=growth_rate),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient and is not empty."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    self._update(param, param.grad, self.state[param], group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        n, m = matricize.square(param.numel())
        if not state:
            like = dict(dtype=ops.state_dtype(param.dtype), device=param.device)
            state.update(step=0, sign=torch.zeros(n, m, dtype=torch.bool, device=param.device))
            for moment in ("m", "v"):
                state[f"{moment}_row"], state[f"{moment}_col"] = torch.zeros(n, **like), torch.zeros(m, **like)
        state["step"] += 1
        beta_m = group["beta"] * group["growth_rate"] ** (state["step"] - 1)
        beta_v = 1 - state["step"] ** group["decay_rate"]
        G = grad.reshape(n, m)

        M = torch.outer(state["m_row"], state["m_col"])
        M = torch.where(state["sign"], M, -M)
        M.mul_(beta_m).add_(G, alpha=1 - beta_m)
        V = torch.outer(state["v_row"], state["v_col"])
        V.mul_(beta_v).add_(G**2, alpha=1 - beta_v)

        torch.gt(M, 0, out=state["sign"])
        self._nnmf(M.abs(), state["m_row"], state["m_col"])
        self._nnmf(V, state["v_row"], state["v_col"])

        update = M / (V.sqrt() + group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.view(param.shape), alpha=-group["lr"])

    @staticmethod
    def _nnmf(matrix: Tensor, row: Tensor, col: Tensor) -> None:
        torch.sum(matrix, 1, out=row)
        torch.sum(matrix, 0, out=col)
        total = col.sum()
        if total != 0:
            col.div_(total)


def _adamw(**how: bool) -> Callable[[Iterable[Tensor]], Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **how)


#: (optimizer, how it is carried out) -> what builds it; the first is what all ratios are taken against
RIVALS: dict[tuple[str, str], Callable[[Iterable[Tensor]], Optimizer]] = {
    ("AdamW", "torch fused"): _adamw(fused=True),
    ("AdamW", "torch foreach"): _adamw(foreach=True),
    ("AdamW", "torch for-loop"): _adamw(foreach=False, fused=False),
    ("Adafactor", "torch"): lambda params: torch.optim.Adafactor(params, lr=LR, weight_decay=WEIGHT_DECAY),
    ("SMMF", "eager torch"): lambda params: EagerSMMF(params, lr=LR, weight_decay=WEIGHT_DECAY),
}


def peers() -> dict[tuple[str, str], Callable[[Iterable[Tensor]], Optimizer]]:
    """Optimizers of other packages with little state, of those that can be imported."""
    found: dict[tuple[str, str], Callable[[Iterable[Tensor]], Optimizer]] = {}
    for package, module, name, options in (
        ("torchao", "torchao.optim", "AdamW8bit", {}),
        ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", {}),
        ("flashoptim", "flashoptim", "FlashAdamW", {}),
        ("adv_optm", "adv_optm", "AdamW_adv", {"nnmf_factor": True}),
    ):
        if importlib.util.find_spec(package) is None:
            continue

        def build(params: Iterable[Tensor], module=module, name=name, options=options) -> Optimizer:
            cls = getattr(importlib.import_module(module), name)
            return cls(params, lr=LR, weight_decay=WEIGHT_DECAY, **options)

        found[name, package] = build
    return found


YARDSTICK = ("AdamW", "torch fused")
EAGER_SMMF = ("SMMF", "eager torch")
RIVALS.update(peers())
