"""Checkpoints of sharded training, saved on one layout and continued on another."""

import itertools
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import everything, model, optimizer_of, train, wrap
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

BEFORE, AFTER = 3, 2
NAMES = ("HFac", "SMMF", "HFac-int8")
FORMATS = (False, True)  # flattened optimizer state
SAVED_ON = ("fsdp", "fsdp-tp")
CHECKPOINTS = tuple(itertools.product(SAVED_ON, NAMES, FORMATS))
#: half of them, among which any two of these three meet
PAIRS = tuple((on, name, flat) for on, name, flat in CHECKPOINTS if flat == ((on == "fsdp") == (name == "HFac")))


def place(folder, kind, name, flat):
    return str(Path(folder) / f"{kind}-{name}-{'flat' if flat else 'nested'}")


def save_all(folder):
    """Trains and saves, under every wrapper, with every optimizer, in both formats; the second in the background, while
    training goes on."""
    background = dist.new_group()
    for kind in SAVED_ON:
        for name in NAMES:
            net = wrap(kind, model())
            optimizer = optimizer_of(name, net)
            train(net, optimizer, BEFORE)
            for flat in FORMATS:
                options = StateDictOptions(flatten_optimizer_state_dict=flat)
                model_state, state = get_state_dict(net, optimizer, options=options)
                parts, where = {"model": model_state, "optimizer": state}, place(folder, kind, name, flat)
                if not flat:
                    dcp.save(parts, checkpoint_id=where)
                    continue
                saving = dcp.async_save(parts, checkpoint_id=where, process_group=background)
                train(net, optimizer, 2, first=BEFORE)
                saving.result()


def continue_all(folder, kind, checkpoints=PAIRS):
    """Loads these checkpoints under the wrapper ``kind``, trains on, and returns everything by (saved on, optimizer,
    flat)."""
    found = {}
    for saved_on, name, flat in checkpoints:
        net = wrap(kind, model())
        torch.nn.init.zeros_(net.head.weight)  # what is not loaded shows
        optimizer = optimizer_of(name, net)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model_state, state = get_state_dict(net, optimizer, options=options)
        parts = {"model": model_state, "optimizer": state}
        dcp.load(parts, checkpoint_id=place(folder, saved_on, name, flat))
        given = dict(model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        set_state_dict(net, optimizer, **given, options=options)
        train(net, optimizer, AFTER, first=BEFORE)
        found[saved_on, name, flat] = everything(net, optimizer)
    return found


@cache
def uninterrupted(name):
    net = model()
    optimizer = optimizer_of(name, net, backend="reference")
    train(net, optimizer, BEFORE + AFTER)
    return everything(net, optimizer)


def full_state(kind):
    """Full state gathered on rank 0 goes back through broadcast_from_rank0; returns what came of training on."""
    found = {}
    for name in NAMES:
        net = wrap(kind, model())
        optimizer = optimizer_of(name, net)
        train(net, optimizer, BEFORE)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model_state, state = get_state_dict(net, optimizer, options=options)
        net = wrap(kind, model())
        torch.nn.init.zeros_(net.head.weight)
        optimizer = optimizer_of(name, net)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # One by one: set_state_dict takes a rank's empty model state for "optimizer only", and ranks part ways.
        set_model_state_dict(net, model_state, options=options)
        set_optimizer_state_dict(net, optimizer, state, options=options)
        train(net, optimizer, AFTER, first=BEFORE)
        found[name] = everything(net, optimizer)
    return found


def keys_and_shapes(kind):
    """Key, global shape and type of all state: the same on every layout."""
    found = {}
    for name in NAMES:
        net = wrap(kind, model())
        optimizer = optimizer_of(name, net)
        state = get_optimizer_state_dict(net, optimizer)["state"]
        found[name] = {
            f"{param}.{key}": (tuple(value.shape), str(value.dtype))
            for param, entry in state.items()
            for key, value in entry.items()
        }
    return found
