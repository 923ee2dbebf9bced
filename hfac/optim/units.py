"""Sharded parameters that are stepped in the backward pass, those whose gradients arrive together at once."""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import clipping, distributed, schedules
from ..distributed import Sent, layout
from .cache import SingleParamCache
from .slices import needs_reduction
from .state import has_state, is_trained

if TYPE_CHECKING:
    import torch.distributed as dist


class Unit:
    """Sharded parameters of an optimizer that are stepped together, with sums over ranks of their own.

    Args:
        params: in an order that is the same on every rank.
    """

    def __init__(self, optimizer: Any, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.on_host = layout.local(params[0].detach()).is_cpu
        self._optimizer, self._gradients = optimizer, distributed.Gradients()
        self._singles: list[SingleParamCache] = []
        self._sharded: distributed.Sharded | None = None

    def has_gradient(self) -> bool:
        return any(param.grad is not None for param in self.params)

    @property
    def groups(self) -> list[int]:
        """Those of the parameters that are bound."""
        return list(dict.fromkeys(single.group_index for single in self._singles))

    def settle(self) -> None:
        if self._sharded is not None:
            self._sharded.settle()

    def agree(self) -> None:
        """Finds out with the other ranks which gradients are placed otherwise than their parameters. Those that FSDP
        brings never are."""
        self._gradients.agree(self.params, self._optimizer._label)

    @torch.no_grad()
    def step(self, clip: Tensor | None, lr_scale: float) -> Generator[dist.Work | None, None, None]:
        """A step of those that have a gradient, multiplied by ``clip``, which every rank must make. It yields what is
        under way, to be waited for before it goes on; gradients must stay until it has ended.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient (`distributed.Sharded.preparing`).
        """
        sharded = self.bound()
        if sharded is None:
            return
        if sharded.capturing:
            raise RuntimeError(
                "a step in the backward pass of sharded parameters (hfac.release_gradients) cannot be part of the CUDA "
                "graph that is being captured. Step outside of graphs, or capture a step() without release_gradients."
            )
        sharded.settle()
        options = {}
        for index in self.groups:
            self._optimizer._check_changes(index)
            found = self._optimizer._shared(self._optimizer.param_groups[index])
            lr = schedules.as_scalar("lr", found.scalars["lr"]) * lr_scale
            options[index] = replace(found, scalars={**found.scalars, "lr": lr}, clip=clip)
        begin = yield from sharded.preparing(options, async_op=True)
        complete = begin()
        try:
            yield None  # SMMF's sums may be under way
        finally:
            complete()
        self._optimizer._watched |= sharded.watched

    def bound(self) -> distributed.Sharded | None:
        """The parameters that have state or are to get it, bound; None where there is none."""
        optimizer, sharded = self._optimizer, self._sharded
        groups, state = optimizer.param_groups, optimizer.state
        trained = [param for param in self.params if is_trained(param) or has_state(state, param)]
        if (
            sharded is not None
            and len(trained) == len(self._singles)
            and all(single.is_in(groups) and single.holds(groups, state) for single in self._singles)
            and all(single.bound is sharded for single in self._singles)
            and sharded.is_valid()
        ):
            return sharded
        self._singles, self._sharded = [], None
        entries = []
        for param in trained:
            found = optimizer._find(param)
            assert found is not None, "units are made anew when parameters change"
            group_index, index = found
            single = SingleParamCache(groups, group_index, index, optimizer._spec)
            optimizer._check_stepped(param, single.group)
            optimizer._sync_param(param, single.group)
            entries.append(optimizer._entry(param, group_index, single.position(groups)))
            self._singles.append(single)
        if not entries:
            return None
        self._sharded = distributed.Sharded(optimizer._algorithm, entries, self._gradients)
        for single in self._singles:
            single.keep(self._sharded, groups, state)
        return self._sharded


class Units:
    """The sharded parameters of a model that an optimizer steps in the backward pass.

    Attributes:
        fsdp: of every module that FSDP2 has sharded the parameters that it, and no module inside, manages.
        rest: the others, None where there are none: their gradients come one by one, perhaps on some ranks only, and
            are stepped together when all of them are there.
    """

    def __init__(self, optimizer: Any, model: nn.Module, params: Iterable[Tensor]) -> None:
        self._optimizer = optimizer
        by_module = _by_module(model)
        found: dict[nn.Module | None, list[Tensor]] = {}
        for param in params:
            position = optimizer._find(param)
            assert position is not None
            if needs_reduction(param, optimizer.param_groups[position[0]]):
                found.setdefault(by_module.get(param), []).append(param)
        rest = found.pop(None, None)
        self.rest = None if rest is None else Unit(optimizer, rest)
        self.fsdp = [Unit(optimizer, mine) for mine in found.values()]
        self.of = {param: unit for unit in (*self.fsdp, self.rest) if unit is not None for param in unit.params}
        self._norms: list[distributed.Norms] | None = None

    def settle(self) -> None:
        for unit in (*self.fsdp, self.rest):
            if unit is not None:
                unit.settle()
        distributed.settle(self._norms or ())

    def norm(self, found: Mapping[Tensor, Tensor]) -> Tensor | None:
        """The norm of all gradients of the optimizer, from those of this rank's shards of each, or of whole gradients.
        Every rank must ask for it: one all-reduce for each mesh."""
        optimizer = self._optimizer
        optimizer._validated()
        skips = {i: group["nonfinite"] == "skip" for i, group in enumerate(optimizer.param_groups)}
        norms: list[distributed.Found] = []
        for mesh in self._by_mesh():
            norms += mesh.by_skip(mesh.of_shards([found.get(entry.param) for entry in mesh.entries]), skips)
        for param, norm in found.items():
            position = optimizer._find(param)
            if param not in self.of and position is not None:
                norms.append(distributed.Found(norm.view(1), [param], skips[position[0]]))
        if optimizer._total is None:
            return clipping.total([(each.norms, each.skip) for each in norms])
        return optimizer._total.of(norms)

    def _by_mesh(self) -> list[distributed.Norms]:
        if self._norms is None:
            optimizer = self._optimizer
            entries = [
                distributed.Entry(optimizer._label(p), at[0], p, {}) for p in self.of if (at := optimizer._find(p))
            ]
            self._norms = distributed.norm.by_mesh(entries)
        return self._norms

    def collectives(self, clips: bool) -> list[Sent]:
        """Those of a backward pass and the step that ends it, the modules' in reverse order."""
        sent = []
        groups = self._optimizer.param_groups
        skips = {i: group["nonfinite"] == "skip" for i, group in enumerate(groups)}
        for unit in (*reversed(self.fsdp), self.rest):
            sharded = None if unit is None else unit.bound()
            if unit is not None and sharded is not None:
                sent += sharded.collectives(skips, False, [i for i in unit.groups if groups[i]["watch"]])[1]
        if clips:
            sent += [Sent(stage, mesh.bytes, mesh.dtype) for mesh in self._by_mesh() for stage in mesh.joint.stages]
        return sent


def _by_module(model: nn.Module) -> dict[Tensor, nn.Module]:
    """Which module manages a parameter, of those that FSDP2 has made its own. Modules come before those inside."""
    found: dict[Tensor, nn.Module] = {}
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync"):  # FSDPModule, which has lived in several places of torch
            found.update(dict.fromkeys(module.parameters(), module))
    return found
