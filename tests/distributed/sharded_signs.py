"""SMMF's signs in bits and in bytes, saved under one placement and continued under another; runs on every rank."""

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from sharded_models import loss_of, model, wrap
from sharded_steps import S0, S1, S2, STRIDED, R, _mesh, difference, part_of, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

import hfac
from hfac import signs

BEFORE, AFTER = 3, 2
OPTIONS = dict(lr=0.01, weight_decay=0.1, decay_rate=-0.8)
SHAPES = [(6, 10), (3, 5, 7), (4, 3, 6), (13,)]
#: by name, the mesh of so many ranks and the placements of each of the shapes; None: no mesh
LAYOUTS = {
    "columns": ((4,), [[S1], [S2], [S1], [S0]]),
    "rows": ((4,), [[S0], [S0], [S0], [S0]]),
    "columns-of-2": ((2,), [[S1], [S1], [S2], [R]]),
    "both": ((2, 2), [[S0, S1], [S2, S1], [S1, S1], [R, S0]]),
    "strided": ((2, 2), [STRIDED, [S0, S2], [S1, S0], [S0, R]]),
    "plain": None,
}


class Weights(nn.Module):
    """Parameters whose gradients are given."""

    def __init__(self, layout, start=None):
        super().__init__()
        self.layout = LAYOUTS[layout]
        generator = torch.Generator().manual_seed(0)
        full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        self.values = nn.ParameterList(self.placed(i, p) for i, p in enumerate(start or full))

    def placed(self, i, tensor):
        return tensor.clone() if self.layout is None else part_of(tensor, _mesh(self.layout[0]), self.layout[1][i])

    def train(self, optimizer, steps, first=0):
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(1000 + step)
            for i, param in enumerate(self.values):
                param.grad = self.placed(i, torch.randn(SHAPES[i], generator=generator, dtype=torch.float64))
            optimizer.step()

    def everything(self, optimizer):
        """Whole parameters and states, signs in bits."""
        found = {f"{i}": whole(param.detach()) for i, param in enumerate(self.values)}
        for i, param in enumerate(self.values):
            found |= {f"{i}.{key}": whole(value) for key, value in optimizer.state[param].items()}
        return {key: signs.to_bits(value) if value.dtype == torch.bool else value for key, value in found.items()}


def made(layout, start=None, **options):
    weights = Weights(layout, start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weights, hfac.SMMF(weights.values, **OPTIONS, **options)


def save(folder, layouts):
    """DCP checkpoints of optimizers with signs="bytes"."""
    for layout in layouts:
        weights, optimizer = made(layout, signs="bytes")
        weights.train(optimizer, BEFORE)
        state = {"model": weights.state_dict(), "optimizer": get_optimizer_state_dict(weights, optimizer)}
        dcp.save(state, checkpoint_id=str(Path(folder) / layout))


def go_on(folder, saved, layout):
    """Everything after a run that another layout has begun."""
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    weights, optimizer = made(layout, zeros, signs="bytes")
    state = {"model": weights.state_dict(), "optimizer": get_optimizer_state_dict(weights, optimizer)}
    dcp.load(state, checkpoint_id=str(Path(folder) / saved))
    weights.load_state_dict(state["model"])
    set_optimizer_state_dict(weights, optimizer, state["optimizer"])
    weights.train(optimizer, AFTER, first=BEFORE)
    return weights.everything(optimizer)


def unbroken():
    weights, optimizer = made("plain")
    weights.train(optimizer, BEFORE + AFTER)
    return weights.everything(optimizer)


def resumed(layout, given, wanted, sharded):
    """Differences from the unbroken run, of one whose state dict, with signs of one kind, is loaded by an optimizer
    with those of the other: of the optimizer's own shards, or gathered."""
    weights, optimizer = made(layout, signs=given)
    weights.train(optimizer, BEFORE)
    saved = copy.deepcopy(optimizer.state_dict())
    if not sharded:
        saved["state"] = {i: {k: whole(v) for k, v in entry.items()} for i, entry in saved["state"].items()}
    weights, optimizer = made(layout, [whole(param.detach()) for param in weights.values], signs=wanted)
    optimizer.load_state_dict(saved)
    kinds = {optimizer.state[p]["exp_avg_sign"].dtype for p in weights.values if "exp_avg_sign" in optimizer.state[p]}
    # Where bits would be split there are bytes whatever the option says.
    assert wanted == "bits" or kinds == {torch.bool}, kinds
    weights.train(optimizer, AFTER, first=BEFORE)
    found = weights.everything(optimizer)
    return {key: difference(found[key], value) for key, value in unbroken().items()}


def refused_shards():
    """What is said of signs of another placement, whose conversion would take a collective."""
    weights, optimizer = made("rows")
    saved = optimizer.state_dict()
    other, target = made("columns", signs="bytes")
    again, alike = made("rows", signs="bytes")
    bits, found = saved["state"][0]["exp_avg_sign"], []
    otherwise = part_of(whole(bits), _mesh((4,)), [S1])
    for taking, value in ((target, bits), (target, signs.to_bytes(whole(bits), (6, 10))), (alike, otherwise)):
        state = copy.copy(taking.state_dict())
        state["state"] = {0: {**state["state"][0], "exp_avg_sign": value}}
        try:
            taking.load_state_dict(state)
            found.append("taken")
        except ValueError as error:
            found.append(str(error))
    return found


def said():
    """What constructing an optimizer warns of, and what becomes of its signs."""
    found = {}
    for layout in ("rows", "columns"):
        for options in ({}, {"signs": "bytes"}):
            weights = Weights(layout)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer = hfac.SMMF(weights.values, **options)
            state = optimizer.state_dict()["state"]
            kinds = {i: str(e["exp_avg_sign"].dtype) for i, e in state.items() if "exp_avg_sign" in e}
            assert all(isinstance(e["exp_avg_sign"], DTensor) for e in state.values() if "exp_avg_sign" in e)
            found[(layout, *options.values())] = [str(each.message) for each in caught], kinds
    return found


def released(kind):
    """Differences of steps in the backward pass from the bare model with signs in bits."""
    bare = model(uneven=True)
    nets = copy.deepcopy(bare), wrap(kind, copy.deepcopy(bare))
    optimizers = [
        hfac.SMMF(net.parameters(), **OPTIONS, signs=mode) for net, mode in zip(nets, ("bits", "bytes"), strict=True)
    ]
    with hfac.release_gradients(nets[1], optimizers[1]):
        for step in range(3):
            for net, optimizer in zip(nets, optimizers, strict=True):
                loss_of(net, step).backward()
                optimizer.step()
                optimizer.zero_grad()
    pairs = zip(nets[1].parameters(), nets[0].parameters(), strict=True)
    return {str(i): difference(whole(p.detach()), q.detach()) for i, (p, q) in enumerate(pairs)}
