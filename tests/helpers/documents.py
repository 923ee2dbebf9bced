"""The blocks of code in README.md and docs/, and what they leave out: a page is run as it is printed.

An HTML comment in the line above a fence says how its block is run:

    <!-- run after: imports, model -->       executed, after the preambles of these names (below)
    <!-- run -->                             executed; it needs nothing
    <!-- part of: FILE -->                  its lines stand in that file, in this order; that is run
    <!-- not run: needs LIBRARY -->          only while LIBRARY is not installed; it has to compile
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import hfac
from hfac import codes, reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
#: what a block may use and change; a page has one for all its blocks
Names = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line``: of the page, from 1, where its text begins."""

    page: str
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def after(self, kind: str) -> str | None:
        """What the mark says after "kind:", "" where it is the kind alone, None if it is of another kind."""
        found = re.fullmatch(rf"{kind}(?:: (.*))?", self.mark)
        return (found[1] or "") if found else None

    def compiled(self) -> Any:
        """An error in it names the page and the line there."""
        return compile("\n" * (self.line - 1) + self.text, self.page, "exec", dont_inherit=True)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    return [
        Block(name, text.count("\n", 0, found.start("text")) + 1, found["language"], found["mark"] or "", found["text"])
        for found in FENCE.finditer(text)
    ]


def run(page: str | Path) -> None:
    """Runs the page's blocks of Python, one after the other, in the working folder."""
    names: Names = {"__name__": "__main__"}
    for block in blocks(ROOT / page):
        if block.language == "python":
            run_block(block, names)


def run_block(block: Block, names: Names) -> None:
    if block.mark == "run" or block.after("run after"):
        steps = [PREAMBLES[name] for name in (block.after("run after") or "").split(", ") if name]
        _through(steps, names, lambda: exec(block.compiled(), names))
    elif named := block.after("part of"):
        there = iter([line.strip() for line in (ROOT / named).read_text().splitlines()])
        for line in block.text.splitlines():
            assert line.strip() in there, f"{block}: not in {named}, or not in this order: {line}"
    elif block.after("not run"):
        block.compiled()
    else:
        raise AssertionError(f"{block}: the block says neither that it is run nor why not: see {__file__}")


def _through(steps: list[Any], names: Names, last: Callable[[], None]) -> None:
    if steps:
        steps[0](names, lambda: _through(steps[1:], names, last))
    else:
        last()


# Preambles: each puts into ``names`` what its block leaves out, calls ``block`` and may then check what that has done.


def imports(names: Names, block: Callable[[], None]) -> None:
    names.update(torch=torch, nn=nn, hfac=hfac)
    block()


class Model(nn.Module):
    """``model(batch)`` is the loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 1)).to(dtype)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layers(batch.to(self.layers[0].weight.dtype)).float().square().mean()


def model(names: Names, block: Callable[[], None]) -> None:
    """A model whose weights a block with an optimizer that steps has to move."""
    names.update(model=Model(), data=torch.randn(3, 5, 8), batch=torch.randn(5, 8))
    block()


def bfloat16(names: Names, block: Callable[[], None]) -> None:
    names.update(model=Model(torch.bfloat16), batch=torch.randn(5, 8))
    block()
    step(names, 30)


def step(names: Names, steps: int = 1) -> None:
    """The optimizer is the model's: steps move every matrix."""
    before = [param.detach().clone() for param in names["model"].parameters()]
    for _ in range(steps):
        names["model"](names["batch"]).backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    for old, param in zip(before, names["model"].parameters(), strict=True):
        assert param.ndim < 2 or not torch.equal(old, param)


def optimizer(names: Names, block: Callable[[], None]) -> None:
    """After steps, so that there is something to save."""
    names["optimizer"] = hfac.HFac(names["model"].parameters())
    step(names)
    block()
    step(names)


def writer(names: Names, block: Callable[[], None]) -> None:
    """A stand-in for TensorBoard's, which is to be given finite numbers of every parameter."""
    names.update(writer=mock.Mock(), step=1)
    block()
    given = {call.args[0]: float(call.args[1]) for call in names["writer"].add_scalar.call_args_list}
    for name, _ in names["model"].named_parameters():
        assert given[f"update_rms/{name}"] > 0


def scheduler(names: Names, block: Callable[[], None]) -> None:
    """Of an optimizer that the block makes, and steps: a stand-in that counts."""

    class Scheduler:
        steps = 0

        def step(self) -> None:
            self.steps += 1

    names["scheduler"] = Scheduler()
    before = [param.detach().clone() for param in names["model"].parameters()]
    block()
    assert names["scheduler"].steps == len(names["data"])
    assert not any(map(torch.equal, before, names["model"].parameters()))
    assert all(param.grad is None for param in names["model"].parameters())


def adamw_checkpoint(names: Names, block: Callable[[], None]) -> None:
    """checkpoint.pt, of a training by AdamW; the block makes of it the optimizer that goes on."""
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters(), lr=2e-3)
    step(names)
    saved = {"model": names["model"].state_dict(), "optimizer": names["optimizer"].state_dict()}
    torch.save(saved, "checkpoint.pt")
    block()
    assert isinstance(names["optimizer"], hfac.HFac)
    assert names["optimizer"].param_groups[0]["lr"] == 2e-3
    step(names)


class Batches(torch.utils.data.Dataset[dict[str, Any]]):
    """Inputs of `Labelled`."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((8,), 0.1 * index), "labels": torch.tensor(float(index))}


class Labelled(Model):
    """As transformers' models: it takes a batch's entries by name and returns an object with the loss."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:  # type: ignore[override]
        import transformers

        output = self.layers(x).squeeze(-1)
        return transformers.utils.ModelOutput(loss=(output - labels).float().square().mean(), logits=output)


def labelled(names: Names, block: Callable[[], None]) -> None:
    """For trainers, which are told to stay on the CPU: bf16=True would look for a GPU."""
    import transformers

    arguments = functools.partial(transformers.TrainingArguments, use_cpu=True, report_to=[])
    names.update(model=Labelled(), dataset=Batches(), steps=2)
    names["loader"] = torch.utils.data.DataLoader(names["dataset"], batch_size=4)
    before = [param.detach().clone() for param in names["model"].parameters()]
    inner = names["model"]
    with mock.patch.object(transformers, "TrainingArguments", arguments):
        block()
    assert not any(map(torch.equal, before, inner.parameters()))


def stepping_hooks(names: Names, block: Callable[[], None]) -> None:
    """An optimizer whose parameters the block's hooks step in the backward pass."""
    names.update(model=Model(), batch=torch.randn(5, 8))
    names["optimizer"] = hfac.HFac(names["model"].parameters())
    before = [param.detach().clone() for param in names["model"].parameters()]
    block()
    names["model"](names["batch"]).backward()
    assert not any(map(torch.equal, before, names["model"].parameters()))
    assert all(param.grad is None for param in names["model"].parameters())


def grouped(names: Names, block: Callable[[], None]) -> None:
    """A model and its groups are the block's; a step from random gradients moves what is in them."""
    block()
    for param in names["model"].parameters():
        param.grad = torch.randn_like(param)
    before = [param.detach().clone() for param in names["model"].parameters()]
    names["optimizer"].step()
    assert not any(map(torch.equal, before, names["model"].parameters()))


# Formulas in NumPy, of a matrix of 7 x 5 in float64, which have to be what `hfac.reference` computes.

ROWS, COLS = 7, 5
RATES: dict[str, Any] = dict(lr=0.01, weight_decay=0.1, maximize=False)
B1, B2, EPS = 0.9, 0.99, 1e-8


def draw(names: Names, **shapes: Any) -> dict[str, torch.Tensor]:
    """Random numbers as arrays for the block, and as tensors for the reference. Lower-case names are positive."""
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        drawn = random.standard_normal(shape)
        names[name] = drawn if name in ("W", "G", "u", "v") else abs(drawn) + 0.1
    return {name: torch.tensor(names[name]) for name in shapes}


def close(names: Names, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        np.testing.assert_allclose(names[name], tensor.numpy(), rtol=1e-12, atol=1e-14, err_msg=name)


def smmf(names: Names, block: Callable[[], None]) -> None:
    tensors = draw(names, W=(ROWS, COLS), G=(ROWS, COLS), r_M=ROWS, r_V=ROWS, c_M=COLS, c_V=COLS)
    plus = np.random.default_rng(1).random((ROWS, COLS)) < 0.5
    names.update(np=np, sign=np.where(plus, 1.0, -1.0), b1=B1, b2=B2, eps=EPS, lr=RATES["lr"])
    packed = torch.tensor(np.packbits(plus, axis=1, bitorder="little"))
    block()
    tensors["packed"] = packed
    lists = [[tensors[name]] for name in ("W", "G", "r_M", "c_M", "packed", "r_V", "c_V")]
    without = RATES | {"weight_decay": 0.0, "decoupled_weight_decay": True}
    reference.smmf_step_(*lists, beta1=B1, beta2=B2, eps=EPS, **without)
    del tensors["packed"]
    close(names, tensors)
    assert np.array_equal(np.packbits(names["sign"] > 0, axis=1, bitorder="little"), packed.numpy())


def hfac_matrix(names: Names, block: Callable[[], None]) -> None:
    tensors = draw(names, W=(ROWS, COLS), G=(ROWS, COLS), u=ROWS, v=COLS, r=ROWS, s=COLS)
    names.update(np=np, sqrt=np.sqrt, rms=lambda x: np.sqrt((x**2).mean()), m=ROWS, n=COLS)
    names.update(b1=B1, b2=B2, eps=EPS, lr=RATES["lr"], wd=RATES["weight_decay"], d=0.5)
    block()
    lists = [[tensors[name]] for name in ("W", "G", "u", "v", "r", "s")]
    reference.hfac_step_(*lists, beta1=B1, beta2=B2, eps=EPS, clip_threshold=0.5, **RATES)
    close(names, tensors)


def hfac_codes(names: Names, block: Callable[[], None]) -> None:
    """Of which the block has the update; what comes before it, r and s and the clip factor, is formed here."""
    tensors = draw(names, W=(ROWS, COLS), G=(ROWS, COLS), r=ROWS, s=COLS)
    q = np.random.default_rng(1).integers(-100, 100, (ROWS, COLS)).astype(np.int8)
    tensors["q"] = torch.tensor(q)
    r, s, G = names["r"], names["s"], names["G"]
    new_r, new_s = (B2 * old + (1 - B2) * (G**2 + EPS).sum(axis) for old, axis in ((r, 1), (s, 0)))
    rho = np.sqrt(r / new_r * new_r.sum() / r.sum())
    U = G / np.sqrt(np.outer(new_r, new_s) / new_r.sum())
    c = 1 / max(1.0, np.sqrt((U**2).mean()) / 0.5)
    names.update(q=q, held=None, g=G, w=names["W"], lr=RATES["lr"], wd=RATES["weight_decay"], b1=B1, c=c)
    names.update(rho_i=rho[:, None], sigma_j=np.sqrt(s / new_s))
    names.update(rowscale_i=np.sqrt(new_r.sum() / new_r)[:, None], colscale_j=1 / np.sqrt(new_s))

    def encode(x: np.ndarray) -> np.ndarray:
        return codes.encode(torch.tensor(x), torch.tensor(q), torch.tensor(names["held"])).numpy()

    names.update(encode=encode, decode=lambda q: codes.decode(torch.tensor(q), torch.float64).numpy())
    block()
    lists = [[tensors[name]] for name in ("W", "G", "q", "r", "s")]
    reference.hfac_int8_step_(*lists, beta1=B1, beta2=B2, eps=EPS, clip_threshold=0.5, **RATES)
    close(names, {"w": tensors["W"]})
    assert np.array_equal(names["q"], tensors["q"].numpy())


def triton_program(names: Names, block: Callable[[], None]) -> None:
    """Runs the block as a program of Triton's interpreter: 3 x 8 numbers, of which the last row is masked."""
    global tl  # where the interpreter looks for the language
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    def program(grad: Any, out: Any) -> None:
        rows, cols = tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :]
        names.update(tl=tl, grad=grad, out=out, at=rows * 8 + cols, mask=rows < 3, i=tl.arange(0, 4))
        names["in_rows"] = names["i"] < 3
        block()

    class AsWritten(InterpretedFunction):  # it would look for the source of ``program``
        def rewrite(self) -> Any:
            return self.fn

    grad, out = torch.randn(3, 8), torch.zeros(3)
    AsWritten(program)[(1,)](grad, out)
    assert torch.allclose(out, grad.sum(1))


PREAMBLES: dict[str, Callable[[Names, Callable[[], None]], None]] = {
    "imports": imports,
    "model": model,
    "model in bfloat16": bfloat16,
    "optimizer": optimizer,
    "scheduler": scheduler,
    "writer": writer,
    "checkpoint of AdamW": adamw_checkpoint,
    "model with labels": labelled,
    "stepping hooks": stepping_hooks,
    "step of groups": grouped,
    "Triton program": triton_program,
    "SMMF's arrays": smmf,
    "HFac's arrays": hfac_matrix,
    "HFac's arrays and codes": hfac_codes,
}
