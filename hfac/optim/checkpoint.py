"""Saving and loading optimizer state, checked before anything is changed."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .. import rounding, signs, spec
from ..distributed import layout
from .param_groups import EXECUTION
from .state import HOST, LOW, StatefulOptimizer, counter, is_trained


class CheckpointedOptimizer(StatefulOptimizer):
    """State dicts of the optimizer, and float32 state dicts of its model."""

    def _settle(self) -> None:
        """Waits for what of the last step is not known on the host.

        Raises:
            RuntimeError: ranks did not agree on which parameters had a gradient.
        """

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim: {"state": {index: {key: tensor}}, "param_groups": [...]}. Tensors share memory with the
        state. Entries that wrappers of the optimizer keep in its state are included.

        Raises:
            RuntimeError: in the last step a sharded parameter had a gradient on some ranks only, which a GPU tells the
                host after the step.
        """
        self._settle()
        self._sync_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of ``state_dict``, as `state_dict` returns it; training resumes bit for bit. Tensors that are
        this optimizer's own, which torch.distributed.checkpoint fills in place, are not copied.

        Everything is validated first. Tensors keep their own types, where torch's own loading would cast factors and
        sign bits to the parameter's. ``capturable``, ``backend``, ``amp_scaling`` and ``watch`` keep this optimizer's
        values: they say how a step runs on this machine, not what it computes. So does SMMF's ``signs``; signs of the
        other kind are converted. Entries that wrappers keep in the state under keys of their own are loaded unchanged;
        their tensors are copied to the parameter's device, as in torch.

        Raises:
            TypeError, ValueError: the state does not fit. The message names the parameter's index, what was expected
                and what was found; the optimizer is unchanged.
        """
        if not isinstance(state_dict, Mapping):
            self._checked_state(state_dict)
        loaded: dict[Any, Any] = {}
        keep = (*EXECUTION, *self._state_options)
        execution = [{name: group[name] for name in keep} for group in self.param_groups]
        before = {param: dict(state) for param, state in self.state.items()}

        # The user's hooks may rewrite the state dict, so their result is what must be checked and copied: the first of
        # these two hooks runs after all other pre-hooks, the second before all other post-hooks.
        def check(optimizer: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._checked_state(final))
            return {**final, "state": {}}  # torch would make a copy of each tensor in the parameter's type

        def restore(optimizer: Optimizer) -> None:
            for index, (group, kept) in enumerate(zip(self.param_groups, execution, strict=True)):
                group.update(self._checked(group))
                group.update(kept)
                self._known.keep(index, group)
            params = [param for group in self.param_groups for param in group["params"]]
            self.state.clear()
            with torch.inference_mode(False), torch.no_grad():
                for key, state in loaded.items():
                    if not isinstance(key, int):  # a wrapper's entry, not a parameter's
                        self.state[key] = _copied(state, None)
                        continue
                    param = params[key]
                    self.state[param] = {
                        name: _taken(value, before.get(param, {}).get(name))
                        if name in self._own_keys
                        else _copied(value, None if param.is_meta else param.device)
                        for name, value in state.items()
                    }
            self._sync_state()

        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def fp32_state_dict(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with parameters in float32: the master weights where the optimizer has them.

        Other 16-bit parameters are widened; float64 parameters and buffers are unchanged. Sharded parameters give
        DTensors. Converted tensors are new; all others share memory with the model.
        """
        return {
            name: self._fp32(value) if isinstance(value, torch.nn.Parameter) else value
            for name, value in model.state_dict(keep_vars=True).items()
        }

    def _fp32(self, param: Tensor) -> Tensor:
        low, value = self.state.get(param, {}).get(LOW), param.detach()
        if low is None:
            return value.float() if value.dtype in rounding.DTYPES else value
        joined = rounding.join(layout.local(value), layout.local(low))
        return layout.like(param, joined)

    @torch.no_grad()
    def load_fp32_state_dict(self, model: torch.nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Loads what `fp32_state_dict` returned, or any other state dict of the model. Precision that a parameter's
        type lacks goes into its master weight; without one, weights are rounded to nearest.

        Raises:
            ValueError: names or shapes differ from the model's; nothing has been loaded.
        """
        mine = model.state_dict(keep_vars=True)
        if mine.keys() != state_dict.keys():
            odd = sorted(mine.keys() ^ state_dict.keys())
            raise ValueError(
                f"{type(self).__name__}: the state dict must have the model's {len(mine)} names, but {odd[:5]} "
                f"{'are' if len(odd) > 1 else 'is'} in one of them only"
            )
        values = {}
        for name, target in mine.items():
            where = f"{type(self).__name__}: {name!r} of the state dict"
            value = state_dict[name]
            if not isinstance(value, Tensor) or value.shape != target.shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{where} must be a tensor of shape {tuple(target.shape)}, got {found}")
            try:
                values[name] = layout.local(layout.placed(target, value.detach(), tuple(range(value.ndim))))
            except ValueError as error:
                raise ValueError(f"{where} {error}") from None
        self._sync_state()
        for name, target in mine.items():
            value, to = values[name], layout.local(target.detach())
            low = self.state.get(target, {}).get(LOW) if isinstance(target, torch.nn.Parameter) else None
            if low is not None:
                high, rest = rounding.split(value.to(to.device, torch.float32), low.dtype)
                layout.local(low).copy_(rest)
                value = high
            to.copy_(value)

    def _checked_state(self, state_dict: dict[str, Any]) -> dict[Any, Any]:
        """The validated state in ``state_dict``: by a parameter's position in this optimizer, and wrappers' entries by
        their own keys."""
        name = type(self).__name__
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            given = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise TypeError(
                f"{name}: a state dict has the keys 'state' and 'param_groups', as state_dict() returns; got {given}"
            )
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if not isinstance(state_dict["state"], Mapping) or not all(
            isinstance(saved, Mapping) and "params" in saved for saved in saved_groups
        ):
            raise TypeError(
                f"{name}: in a state dict 'state' is a dict and 'param_groups' a list of dicts with 'params', as "
                "state_dict() returns"
            )
        sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"{name}: the optimizer has {len(sizes)} groups of {sizes} parameters, the state dict "
                f"{len(saved_sizes)} of {saved_sizes}. Build the optimizer with the parameter groups it was saved with."
            )
        for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
            if self._own_option not in saved:
                kept = {key: group[key] for key, usual in self._state_options.items() if group[key] != usual}
                target = ", ".join([f"to={self._algorithm!r}", *(f"{key}={value!r}" for key, value in kept.items())])
                raise ValueError(
                    f"{name}: group {index} of the state dict has no {self._own_option!r}: it was saved by another "
                    f"optimizer. hfac.convert(state_dict, params, {target}) translates what it knows."
                )
        checked_groups = [
            {**self._state_options, **self._checked(saved), **{name: group[name] for name in self._converted_options}}
            for saved, group in zip(saved_groups, groups, strict=True)
        ]
        self._check_state_options(checked_groups)
        merged = [{**self.defaults, **saved} for saved in checked_groups]
        self._common_limit(merged)
        self._skips_steps(merged)
        owners = [(param, group) for group, target in zip(merged, groups, strict=True) for param in target["params"]]
        positions = {key: i for i, key in enumerate(key for g in saved_groups for key in g["params"])}
        for index, (param, group) in enumerate(owners):
            if is_trained(param) and not is_lazy(param):
                self._check_layout(f"{name}: with the options of the state dict, parameter {index}", param, group)
        named = any(isinstance(key, str) for key in positions)
        checked: dict[Any, Any] = {}
        for key, state in state_dict["state"].items():
            if key not in positions:
                if not isinstance(key, int) and not named:
                    checked[key] = state
                    continue
                raise ValueError(
                    f"{name}: the state dict has state for parameter {key!r}, which is in none of its groups"
                )
            if state:
                checked[positions[key]] = self._checked_entry(positions[key], *owners[positions[key]], state)
        return checked

    def _check_state_options(self, saved_groups: Sequence[Mapping[str, Any]]) -> None:
        """That the state is of the kind that this optimizer keeps: a state dict's options replace its own, and would
        undo without a word what it was constructed with."""
        for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            for name in self._state_options.keys() - self._converted_options:
                if saved[name] != group[name]:
                    raise ValueError(
                        f"{type(self).__name__}: group {index} of the state dict was saved with {name}={saved[name]!r},"
                        f" this optimizer's has {name}={group[name]!r}, which keeps another state. Translate it with "
                        f"hfac.convert(state_dict, params, {name}={group[name]!r}), or construct the optimizer with "
                        f"{name}={saved[name]!r}."
                    )

    def _checked_entry(
        self, index: int, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        if is_lazy(param):
            raise ValueError(
                f"{type(self).__name__}: the state dict has state for parameter {index}, which has no shape yet. Run a "
                "forward pass first: it initializes the parameters of lazy modules."
            )
        where = f"{type(self).__name__}: state of parameter {index} (shape {tuple(param.shape)})"
        if not isinstance(state, Mapping):
            raise TypeError(f"{where} must be a dict of tensors, got {type(state).__name__}")
        needed_layout = self._layout(param, group)
        needed = {*needed_layout, "step"}
        own = state.keys() & self._own_keys
        entry: dict[str, Any] = {key: value for key, value in state.items() if key not in own}
        if not own and not is_trained(param):
            return entry
        if not needed <= own or not own <= {*needed, "skipped"}:
            raise ValueError(
                f"{where} must have the keys {sorted(needed)}, got {sorted(map(str, state))}. It was saved by another "
                "optimizer, or with options that give another state; hfac.convert translates both."
            )
        sign_keys = {own.key for own in self._spec.states if own.size == spec.SIGNS}
        for key, (shape, dtype, follows) in needed_layout.items():
            value = state[key]
            if not isinstance(value, Tensor):
                raise TypeError(f"{where}: '{key}' must be a tensor of shape {shape}, got {type(value).__name__}")
            if key in sign_keys:
                try:
                    value = _signs_as(value, param, group, dtype)
                except ValueError as error:
                    raise ValueError(f"{where}: '{key}' {error}") from None
            if tuple(value.shape) != shape or value.layout is not torch.strided:
                raise ValueError(f"{where}: '{key}' must have shape {shape}, got {_described(value)}")
            if value.is_floating_point() != dtype.is_floating_point or (
                value.dtype != dtype and not dtype.is_floating_point
            ):
                raise ValueError(f"{where}: '{key}' must be {dtype}, got {value.dtype}")
            least = next((own.least for own in self._spec.states if own.key == key), None)
            here = layout.local(value)
            if least is not None and not here.is_meta and bool((here < least).any()):
                raise ValueError(
                    f"{where}: '{key}' has a code of {int(here.min())}; they go from {least} to {-least}. The state "
                    "dict is damaged, or another optimizer's."
                )
            try:
                entry[key] = layout.placed(param, value.to(dtype), follows)
            except ValueError as error:
                raise ValueError(f"{where}: '{key}' {error}") from None
        for key, dtype in (("step", torch.float32), ("skipped", torch.int32)):
            if key in state:
                count = state[key]
                if not isinstance(count, Tensor | Real) or (isinstance(count, Tensor) and count.numel() != 1):
                    found = f"shape {tuple(count.shape)}" if isinstance(count, Tensor) else type(count).__name__
                    raise ValueError(f"{where}: '{key}' must be one number, got {found}")
                entry[key] = counter(count, dtype, count.device if isinstance(count, Tensor) else HOST)
                if entry[key].device.type == "cpu" and not 0 <= entry[key].item() < math.inf:
                    raise ValueError(f"{where}: '{key}' must be a number >= 0, got {entry[key].item()}")
        return entry


def _signs_as(value: Tensor, param: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """A parameter's signs (`hfac.signs`) as those of this type, where they are of the other kind; anything else is left
    for others to check.

    Raises:
        ValueError: they are sharded in a way in which a rank cannot convert its own; the message says what to do.
    """
    batch, shape, dims = group["batch_dims"], tuple(param.shape), tuple(range(param.ndim))
    kinds: dict[torch.dtype, tuple[tuple[int, ...], layout.Follows]] = {
        torch.uint8: (signs.bits_shape(shape, batch), dims[: batch + 2]),
        signs.BYTES: (shape, dims),
    }
    if value.dtype == dtype or value.dtype not in kinds or tuple(value.shape) != kinds[value.dtype][0]:
        return value
    sharded = layout.is_dtensor(value) and layout.is_sharded(value)
    if sharded and layout.is_dtensor(param) and layout.splits_sign_bytes(param):
        raise ValueError(
            "is sharded, and this parameter's placement would split bytes of sign bits, which only whole ones convert "
            "to. Gather it with .full_tensor() on every rank first."
        )
    here = layout.local(layout.placed(param, value, kinds[value.dtype][1]) if sharded else value)
    local = tuple(layout.local(param.detach()).shape) if sharded else shape
    found = signs.to_bits(here, batch) if dtype == torch.uint8 else signs.to_bytes(here, local, batch)
    return layout.as_dtensor(param, *kinds[dtype], found) if sharded else found


def _taken(value: Tensor, own: Any) -> Tensor:
    """A copy of a tensor, or ``own`` where that is the same memory."""
    here = layout.local(value)
    if isinstance(own, Tensor) and own.is_contiguous() and not own.is_inference():
        mine = layout.local(own)
        same = (mine.shape, mine.dtype, mine.data_ptr()) == (here.shape, here.dtype, here.data_ptr())
        if same and here.is_contiguous() and layout.is_dtensor(own) == layout.is_dtensor(value):
            return own
    return value.clone(memory_format=torch.contiguous_format)


def _copied(value: Any, device: torch.device | None) -> Any:
    """A wrapper's entry with its tensors copied, inside containers as well; to ``device`` unless that is None."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device or value.device, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _copied(entry, device) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(entry, device) for entry in value)
    return value


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.layout is torch.strided else f" of layout {tensor.layout}")
