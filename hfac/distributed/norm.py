"""Norms of gradients that no rank has all of, and the norm of all gradients as one number on every rank.

Of parameters whose step needs sums, `Norms` adds up two numbers each over their mesh: the sum of squares, and on how
many ranks there is a gradient. Of those that a rank steps alone, `Total` adds up what its slices of stacks have.
"""

from __future__ import annotations  # not every torch has the types that are named here

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import clipping, schedules
from . import layout
from .bucket import Entries, Entry, Joint
from .lists import Members
from .schedule import Sent, Stage


class Norms(Entries):
    """The norms of the gradients of parameters on one mesh."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        device = layout.local(entries[0].param).device
        super().__init__(entries, schedules.step_dtype(device), device)  # squares overflow before norms do
        self.joint = Joint([entry.param for entry in entries])
        self._parts: dict[tuple[int, ...], Members] = {}

    @property
    def bytes(self) -> int:
        return 2 * len(self.entries) * self.dtype.itemsize

    def of(self, grads: Sequence[Tensor | None]) -> Tensor:
        """By parameter, the same on every rank; 0 where there is no gradient.

        Raises:
            RuntimeError: ranks do not agree on which parameters have a gradient.
        """
        own: list[Tensor | None] = list(grads)
        mine = [i for i, grad in enumerate(grads) if grad is not None and self.joint.contributes[i]]
        for i, found in zip(mine, clipping.norms([grad for i in mine if (grad := grads[i]) is not None]), strict=True):
            own[i] = found
        return self.of_shards(own)

    def of_shards(self, norms: Sequence[Tensor | None]) -> Tensor:
        """`of` gradients, of whose shards on this rank these are the norms. Those that it does not contribute are not
        read."""
        who, _ = self.with_gradient(norms)
        if "contributed" not in who.bound:
            who.bound["contributed"] = self.members([i for i in who.index if self.joint.contributes[i]])
        mine: Members = who.bound["contributed"]
        numbers = torch.zeros(2, len(norms), dtype=self.dtype, device=self.device)
        squares, present = numbers
        if mine.index:
            own = [found for i in mine.index if (found := norms[i]) is not None]
            mine.put(squares, clipping.stacked(own, self.dtype).square())
            present.copy_(mine.flags)
        for stage in self.joint.stages:
            stage.run(numbers)
        self.verify(present, who)
        double = any(entry.param.dtype == torch.float64 for entry in self.entries)
        return clipping.roots(squares, torch.float64 if double else torch.float32)

    def by_skip(self, norms: Tensor, skips: Mapping[int, bool]) -> list[Found]:
        """Norms by whether those that are not finite are left out, which ``skips`` says of each group."""
        found = []
        for skip in (False, True):
            index = tuple(i for i, entry in enumerate(self.entries) if skips[entry.group] == skip)
            if index:
                if index not in self._parts:
                    self._parts[index] = Members(index, len(self.entries), self.dtype, self.device)
                params = [self.entries[i].param for i in index]
                found.append(Found(self._parts[index].numbers(norms), params, skip))
        return found


def by_mesh(entries: Sequence[Entry]) -> list[Norms]:
    """In an order that is the same on every rank."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.param.device_mesh, []).append(entry)  # type: ignore[attr-defined]
    return [Norms(mine) for mine in found.values()]


@dataclass(frozen=True)
class Found:
    """Norms of whole gradients, or, of parameters that a rank steps alone, of those of its slices of stacks.

    Attributes:
        norms: 1-d.
        params: whose each of them is.
        skip: whether those that are not finite are left out.
    """

    norms: Tensor
    params: Sequence[Tensor]
    skip: bool


class Total:
    """The norm of all gradients of an optimizer, the same number on every rank.

    A step of sharded parameters sends something more where it clips, and the ranks that share it must agree on
    whether. Each rank may have the norm by itself, and yet they may differ: in a last bit, because another group added
    it up in another order, or because something that is no sharded parameter differs between ranks.

    Args:
        params: all of the optimizer's, in an order that is the same on every rank.
        alone: those of them that a rank steps without sums over ranks.
        declared: groups on whose ranks some parameters are different ones, not copies, and those that this rank has,
            perhaps none. Over several groups sums go one after the other. Of sharded parameters, beyond their meshes.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        alone: Sequence[Tensor],
        declared: Sequence[tuple[Sequence[dist.ProcessGroup], Collection[Tensor]]],
    ) -> None:
        #: sums over the groups that some declare, then those over the rest of these groups
        chains = {_names(groups[i:]): groups[i:] for groups, _ in declared for i in range(len(groups))}
        chain_of = {param: _names(groups) for groups, mine in declared for param in mine}
        cut: dict[tuple[object, Any], list[Tensor]] = {}
        for param in alone:
            if layout.is_sharded(param):
                cut.setdefault((param.device_mesh, chain_of.get(param, ())), []).append(param)  # type: ignore[attr-defined]
        joints = [Joint(mine) for mine in cut.values()]
        self._contributes = {
            param: contributes
            for joint, mine in zip(joints, cut.values(), strict=True)
            for param, contributes in zip(mine, joint.contributes, strict=True)
        }
        longest = sorted(chains, key=len, reverse=True)
        place = {names: len(joints) + i for i, names in enumerate(longest)}
        #: what the squares of a sum pass, in the order of the sums, and which sum they are then part of
        self._sums = [(joint.stages, place.get(names)) for joint, (_, names) in zip(joints, cut, strict=True)]
        self._sums += [([Stage(chains[names][0])], place.get(names[1:])) for names in longest]
        #: of a parameter, which sum its squares are part of
        self._sum_of = {param: place[names] for param, names in chain_of.items() if names}
        self._sum_of |= {param: i for i, mine in enumerate(cut.values()) for param in mine}
        # Also where all of this rank's parameters share one sum: others may have more, which changes their norm.
        self._agreement = everywhere(params, [group for groups, _ in declared for group in groups], copies=True)
        self._places: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._device = layout.local(params[0]).device if params else torch.device("cpu")
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32

    def _picked(self, norms: Tensor, index: tuple[int, ...]) -> Tensor:
        """Some of them, whose places the device is told once."""
        key = norms.device, index
        if key not in self._places:
            self._places[key] = torch.tensor(index, dtype=torch.int64, device="cpu").to(norms.device)
        return norms.index_select(0, self._places[key])

    @property
    def is_local(self) -> bool:
        """Whether there are no other ranks to agree with."""
        return not self._sums and not self._agreement

    def of(self, found: Sequence[Found]) -> Tensor | None:
        """The norm; None where there is no gradient at all. Every rank must call it.

        Args:
            found: by this rank alone, or on every rank that has some of a sharded parameter.
        """
        everywhere = []
        if not self._sums:
            everywhere += [(each.norms, each.skip) for each in found]
        else:
            dtype = schedules.step_dtype(self._device)
            sums = [torch.zeros((), dtype=dtype, device=self._device) for _ in self._sums]
            for each in found:
                mine: dict[int | None, list[int]] = {}
                for i, param in enumerate(each.params):
                    if self._contributes.get(param, True):
                        mine.setdefault(self._sum_of.get(param), []).append(i)
                for target, index in mine.items():
                    norms = each.norms if len(index) == len(each.norms) else self._picked(each.norms, tuple(index))
                    if target is None:
                        everywhere.append((norms, each.skip))
                        continue
                    norms = norms.to(self._device, dtype)
                    if each.skip:
                        norms = torch.nan_to_num(norms, nan=0.0, posinf=0.0)
                    sums[target] += norms.square().sum()
            for total, (stages, then) in zip(sums, self._sums, strict=True):
                for stage in stages:
                    stage.run(total)
                if then is None:
                    everywhere.append((total.sqrt().to(self._dtype), False))
                else:
                    sums[then] += total
        norm = clipping.total(everywhere)
        if norm is None and self._agreement:
            norm = torch.zeros((), dtype=self._dtype, device=self._device)
        if norm is not None and self._agreement:
            norm = norm.to(self._dtype)  # of which every rank sends the same number of bytes
            for stage in self._agreement:
                stage.run(norm)
        return norm

    def collectives(self) -> list[Sent]:
        """What `of` sends beside what the norms of sharded parameters have been added up with."""
        wide = schedules.step_dtype(self._device)
        sums = [Sent(stage, wide.itemsize, wide) for stages, _ in self._sums for stage in stages]
        return sums + [Sent(stage, self._dtype.itemsize, self._dtype) for stage in self._agreement]


def _names(groups: Sequence[dist.ProcessGroup]) -> tuple[str, ...]:
    return tuple(group.group_name for group in groups)


def everywhere(
    params: Sequence[Tensor], declared: Sequence[dist.ProcessGroup] = (), copies: bool = False
) -> list[Stage]:
    """Stages after which a number has reached all ranks that share a mesh or a group, directly or through others: with
    ``copies`` that of the first rank, else sums of what ranks have, in which each may count several times."""
    meshes = dict.fromkeys(param.device_mesh for param in params if layout.is_dtensor(param))  # type: ignore[attr-defined]
    groups = [[mesh.get_group(d) for d in range(mesh.ndim) if mesh.size(d) > 1] for mesh in meshes]
    groups += [[group] for group in declared if group.size() > 1]
    named = [{stage.name: stage for stage in (Stage(each, copies) for each in mine)} for mine in groups]
    largest = [mine for mine in named if not any(mine.keys() < other.keys() for other in named)]
    distinct = {frozenset(mine): mine for mine in largest if mine}.values()
    # Of several, the first may need what another finds after it.
    return len(distinct) * [stage for mine in distinct for stage in mine.values()]
