"""What both optimizers keep: options, and state that follows the parameters, in memory and in checkpoints."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy
from torch.optim import Optimizer

from .. import backends, ops, rounding, spec
from ..distributed import layout
from . import options

State = dict[str, Tensor]
#: global shape and dtype of every factor or moment of a parameter, by state key, and for each dimension the parameter's
#: that it follows where the parameter is sharded (None: whole on every rank)
Layout = dict[str, tuple[tuple[int, ...], torch.dtype, layout.Follows]]

NONFINITE = ("propagate", "skip")
ROUNDING = ("nearest", "stochastic")
MASTER = tuple(rounding.LOW_DTYPES)
COMMON_RULES: dict[str, options.Rule] = {
    "lr": options.number(0.0, tensor=True),
    "weight_decay": options.number(0.0, tensor=True),
    "dense": options.flag,
    "batch_dims": options.whole(),
    "maximize": options.flag,
    "capturable": options.flag,
    "nonfinite": options.choice(*NONFINITE),
    "rounding": options.choice(*ROUNDING),
    "seed": options.whole(2**64 - 1),
    "master": options.choice(*MASTER, none="no master weights"),
    "amp_scaling": options.flag,
    "watch": options.flag,
    "max_grad_norm": options.number(0.0, open_low=True, none="no clipping by the norm"),
    "backend": lambda name, value: options.choice(*backends.names())(name, value),
}
#: options that an optimizer pickled by an earlier version does not have, and what it did
_ADDED = {
    "dense": False,
    "batch_dims": 0,
    "rounding": "nearest",
    "seed": 0,
    "master": None,
    "max_grad_norm": None,
    "watch": False,
}
#: how a step is carried out, not what it computes: kept from the running optimizer when a checkpoint is loaded
EXECUTION = ("capturable", "backend", "amp_scaling", "watch")
#: the state key of what a bfloat16 parameter lacks of its master weight
LOW = "master_low"
HOST = torch.device("cpu")


class StatefulOptimizer(Optimizer):
    """The base of `hfac.optim.base.FactoredOptimizer` that steps nothing: options by rule, state by layout, both
    checked before anything is kept."""

    #: name of the subclass's functional form
    _algorithm: ClassVar[str]
    #: every state key that the functional form takes lists of
    _state_keys: ClassVar[tuple[str, ...]]
    #: rule of every option of the subclass, beyond the common ones
    _rules: ClassVar[dict[str, options.Rule]] = {}
    #: an option that every version of the subclass has and no other optimizer: tells whose a state dict is
    _own_option: ClassVar[str]

    def _forget(self) -> None:
        """What earlier steps found in order is to be looked at again."""
        raise NotImplementedError

    def _common_limit(self, groups: Iterable[Mapping[str, Any]]) -> float | None:
        """The one ``max_grad_norm`` of the groups."""
        raise NotImplementedError

    def _is_own(self, key: Any) -> bool:
        """Whether a key of a parameter's state is the optimizer's; all others belong to wrappers and are left alone."""
        return key in self._state_keys or key in ("step", "skipped", LOW)

    def _slice_layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any]) -> Layout:
        """The layout of a parameter of ``shape`` without batch dimensions, its factors and moments being of
        ``dtype``."""
        raise NotImplementedError

    def _layout(self, param: Tensor, group: Mapping[str, Any]) -> Layout:
        """Global shapes and types of a parameter's state; the keys are the same for every step. Batch dimensions
        stand in front of what one slice has."""
        shape, batch = tuple(param.shape), group["batch_dims"]
        one = self._slice_layout(shape[batch:], ops.state_dtype(param.dtype), group)
        return {
            key: (shape[:batch] + sides, dtype, (*range(batch), *(None if d is None else batch + d for d in follows)))
            for key, (sides, dtype, follows) in one.items()
        }

    def _full_layout(self, param: Tensor, group: Mapping[str, Any]) -> Layout:
        """`_layout`, and what is kept of a master weight."""
        found, low = self._layout(param, group), self._low_dtype(param, group)
        return found if low is None else {**found, LOW: (tuple(param.shape), low, tuple(range(param.ndim)))}

    def _needed_state(self, param: Tensor, group: Mapping[str, Any]) -> State:
        """What a step goes by, without what wrappers keep beside it under whatever names."""
        needed = {*self._full_layout(param, group), "step", "skipped"}
        return {key: value for key, value in self.state[param].items() if key in needed}

    @staticmethod
    def _low_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype | None:
        """The type of what is kept of a master weight beside this parameter, if anything is."""
        master = group["master"]
        return None if master is None or param.dtype != torch.bfloat16 else rounding.LOW_DTYPES[master]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills in what an optimizer pickled by an older version, or by torch with steps as numbers, does not have."""
        super().__setstate__(state)
        self._forget()
        for name, value in _ADDED.items():
            self.defaults.setdefault(name, value)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own __setstate__ adds it to the defaults, where no step reads it
                    group.setdefault(name, value)
            for param in group["params"]:
                param_state = self.state.get(param, {})
                if "step" in param_state and not isinstance(param_state["step"], Tensor):
                    param_state["step"] = _counter(param_state["step"], torch.float32, HOST)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group at any time, with any option of its own, and makes the state of its parameters.

        A module's frozen parameters (requires_grad False) may be of any kind: they are checked, and have state, once
        they are trained. So are those of lazy modules, once a forward pass has given them a shape.

        Raises:
            TypeError, ValueError, RuntimeError: bad options or parameters; the optimizer is left as it was.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            param_group.update(self._checked(param_group))
            group = {**self.defaults, **param_group}
            first = next(iter(self.param_groups), group)  # those that are there agree
            agrees = first.get("max_grad_norm") == group["max_grad_norm"]
            self._common_limit([group] if agrees else [*self.param_groups, group])
            if not isinstance(param_group["params"], Tensor | set):
                param_group["params"] = list(param_group["params"])
            for index, param in enumerate(_tensors(param_group["params"])):
                # A model's frozen parameters may be of any kind. Of what is no tensor torch says what it thinks.
                frozen = isinstance(param, Parameter) and not is_trained(param)
                if isinstance(param, Tensor) and not frozen:
                    self._check_param(f"{type(self).__name__}: parameter {index} of the group", param, group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            self._sync_param(param, group)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim: {"state": {index: {key: tensor}}, "param_groups": [...]}, plain tensors that share memory
        with the state, and whatever else wrappers of the optimizer keep in its state."""
        self._sync_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of ``state_dict`` (as `state_dict` returns it) and goes on from there bit for bit.

        Everything is checked first. Tensors keep their own types: torch's own loading would cast factors and sign
        bits to the parameter's type. ``capturable`` and ``backend`` stay as they are in this optimizer: they say how
        a step is carried out on this machine. Entries under other keys than the optimizer's own, which wrappers keep in
        its state, are taken over as they are; their tensors are copied and move to the parameter's device, as in torch.

        Raises:
            TypeError, ValueError: the state does not fit; the message names the parameter's index, what was expected
                and what was found. The optimizer is left as it was.
        """
        if not isinstance(state_dict, Mapping):
            self._checked_state(state_dict)
        loaded: dict[Any, Any] = {}
        execution = [{name: group[name] for name in EXECUTION} for group in self.param_groups]

        # Hooks of the user may rewrite the state dict, so what is checked and copied is what they leave: the first of
        # these two runs after all other pre-hooks, the second before all other post-hooks.
        def check(optimizer: Optimizer, final: dict[str, Any]) -> None:
            loaded.update(self._checked_state(final))

        def restore(optimizer: Optimizer) -> None:
            for group, kept in zip(self.param_groups, execution, strict=True):
                group.update(self._checked(group))
                group.update(kept)
            params = [param for group in self.param_groups for param in group["params"]]
            self.state.clear()
            with torch.inference_mode(False), torch.no_grad():
                for key, state in loaded.items():
                    if not isinstance(key, int):  # of no parameter
                        self.state[key] = _copied(state, None)
                        continue
                    param = params[key]
                    self.state[param] = {
                        name: value.clone(memory_format=torch.contiguous_format)
                        if self._is_own(name)
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

        Other parameters of fewer bits are widened, float64 ones and buffers are as they are. Sharded parameters give
        DTensors. Tensors are new where they were converted, and else share memory with the model.
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
        """Loads what `fp32_state_dict` returned, or any state dict of the model: weights of more bits than a parameter
        has go into its master weight, and are rounded to nearest where there is none.

        Raises:
            ValueError: names or shapes are not the model's; nothing has been loaded then.
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

    def _checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options among ``values``, each by its rule."""
        rules = {**COMMON_RULES, **self._rules}
        return {
            name: rules[name](f"{type(self).__name__}: {name}", value)
            for name, value in values.items()
            if name in rules
        }

    def _check_param(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        """What is required of a parameter that is to be trained, once it has a shape; messages begin with ``where``."""
        if is_lazy(param):
            return
        if layout.is_flat(param):
            raise TypeError(
                f"{where} is a flat parameter of FSDP1, or a piece of one (use_orig_params=True), which has no rows "
                "and columns to factor. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead."
            )
        ops.check_tensor(where, param)
        if param.is_nested:
            raise RuntimeError(f"{where} is a nested tensor, which has no rows and columns. Optimize its pieces.")
        if param.dtype not in ops.PARAM_DTYPES:
            raise ValueError(
                f"{where} has dtype {param.dtype}; float16, bfloat16, float32 or float64 is required. Leave other "
                "tensors out of the optimizer, or keep a floating-point copy to train."
            )
        backends.resolve(group["backend"], param.device)
        if group["master"] is not None and param.dtype == torch.float16:
            raise ValueError(
                f"{where} is float16, and master={group['master']!r} keeps the bits that a bfloat16 lacks of a "
                "float32; a float16 has another exponent. Use bfloat16, or rounding='stochastic'."
            )
        self._check_layout(where, param, group)
        if layout.is_dtensor(param):
            self._check_dtensor(where, param, group)

    def _check_layout(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        """Batch dimensions, and what a parameter cannot have once it is sharded, which may be after construction."""
        if group["watch"] and layout.is_sharded(param):
            raise ValueError(
                f"{where} is sharded, and watch=True is not supported with sharded parameters: no rank has all of what "
                "a step would tell. Leave watch=False."
            )
        batch = group["batch_dims"]
        if batch == 0:
            return
        if batch >= param.ndim:
            raise ValueError(
                f"{where} has shape {tuple(param.shape)}; batch_dims={batch} needs more than {batch} dimension(s): the "
                "ones behind the batch are those of a slice. Put it into another group, with fewer batch_dims."
            )
        if not layout.is_sharded(param):
            return
        if needs_others(param, group):
            raise ValueError(
                f"{where} has batch_dims={batch}, shape {tuple(param.shape)} and placements {tuple(param.placements)}; "  # type: ignore[attr-defined]
                f"only the first {batch} dimension(s) can be sharded then. Shard those alone, or leave batch_dims=0."
            )
        if group["nonfinite"] == "skip":
            raise ValueError(
                f"{where} has batch_dims={batch} and is sharded; nonfinite='skip' is not supported with both: ranks"
                " would count different steps. Leave nonfinite='propagate', or batch_dims=0."
            )

    def _check_dtensor(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        reason = layout.refusal(param)
        if reason is not None:
            raise ValueError(f"{where} {reason}")
        if not layout.is_sharded(param):
            return
        if group["rounding"] == "stochastic" and param.dtype in rounding.DTYPES:
            try:
                layout.place(param, 0)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        for name in ("capturable", "amp_scaling"):
            if group[name]:
                raise ValueError(
                    f"{where} is sharded, and {name}=True is not supported with sharded parameters: whether ranks make "
                    f"a step is decided on the host. Leave {name}=False."
                )
        if needs_others(param, group):
            for op in spec.ALGORITHMS[self._algorithm].shard_ops:
                backends.resolve(group["backend"], param.device, op)

    def _sync_state(self) -> None:
        """Makes state follow the parameters: creates what is missing, moves what is elsewhere, drops what is gone.

        Trainers swap parameters and rewrite groups after construction, and models move between devices and types.
        """
        live = set()
        for group in self.param_groups:
            for param in group["params"]:
                if self._sync_param(param, group):
                    live.add(id(param))
        gone = [key for key in self.state if isinstance(key, Tensor) and id(key) not in live]
        for param in gone:
            del self.state[param]
        if gone:
            self._forget()  # nor is what is gone kept alive

    def _sync_param(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """The same for one parameter; False where it has no state, because it is frozen, or of a kind that no step
        takes, of which `step` complains."""
        state = self.state.get(param)
        if not state or "step" not in state or not ("exp_avg_sq_row" in state or "exp_avg_sq" in state):
            if not is_trained(param) or is_lazy(param) or not _is_supported(param, group):
                return state is not None
            if state is None:
                state = self.state[param] = {}
            self._complete_state(param, group, state)
        elif not self._in_order(param, group, state):
            self._complete_state(param, group, state)
        return True

    def _in_order(self, param: Tensor, group: Mapping[str, Any], state: State) -> bool:
        """Whether state that is there lies where it must lie, in the types it must have, and can be written."""
        device, wide = param.device, ops.state_dtype(param.dtype)
        for key in self._state_keys:
            value = state.get(key)
            if value is not None and (
                value.device != device or value.is_inference() or (value.dtype != wide and key != "exp_avg_sign")
            ):
                return False
        low = state.get(LOW)
        if (None if low is None else low.dtype) != self._low_dtype(param, group) or (
            low is not None and (low.device != device or low.is_inference())
        ):
            return False
        return _counts(state.get("step"), torch.float32, device if _steps_beside(group, param) else HOST) and (
            (group["nonfinite"] != "skip" and "skipped" not in state)
            or _counts(state.get("skipped"), torch.int32, device)
        )

    @torch.inference_mode(False)  # what is made here outlives the mode that a step or a trainer is in
    @torch.no_grad()
    def _complete_state(self, param: Tensor, group: Mapping[str, Any], state: State) -> None:
        """Every key of a parameter's state, on the device and of the type it must have; what is new is zero."""
        needed = self._full_layout(param, group)
        counters = {"step": (torch.float32, param.device if _steps_beside(group, param) else HOST)}
        if group["nonfinite"] == "skip" or "skipped" in state:
            counters["skipped"] = (torch.int32, param.device)
        if not param.is_meta and any(
            isinstance(state.get(key), Tensor) and state[key].is_meta for key in (*needed, *counters)
        ):
            # Moments that went to the meta device are lost, and the step counts them.
            for key in [key for key in state if self._is_own(key)]:
                del state[key]
        if LOW in state and (LOW not in needed or state[LOW].dtype != needed[LOW][1]):
            del state[LOW]  # of another option, or of the bfloat16 that the parameter was
        for key, (shape, dtype, follows) in needed.items():
            if key in state:
                state[key] = _writable(state[key].to(device=param.device, dtype=dtype))
            else:
                state[key] = layout.zeros(param, shape, follows, dtype, param.device)
        for key, (dtype, device) in counters.items():
            state[key] = _counter(state.get(key, 0), dtype, device)

    def _checked_state(self, state_dict: dict[str, Any]) -> dict[Any, Any]:
        """The state of every parameter that ``state_dict`` has one for, by the parameter's position in this
        optimizer; and what else wrappers keep in the state, by its key."""
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
        for index, saved in enumerate(saved_groups):
            if self._own_option not in saved:
                raise ValueError(
                    f"{name}: group {index} of the state dict has no {self._own_option!r}: it was saved by another "
                    "optimizer"
                )
        merged = [{**self.defaults, **self._checked(saved)} for saved in saved_groups]
        self._common_limit(merged)
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
        needed_layout = self._full_layout(param, group)
        needed = {*needed_layout, "step"}
        own = {key for key in state if self._is_own(key)}
        entry: dict[str, Any] = {key: value for key, value in state.items() if key not in own}
        if not own and not is_trained(param):
            return entry
        if not needed <= own or not own <= {*needed, "skipped"}:
            raise ValueError(
                f"{where} must have the keys {sorted(needed)}, got {sorted(map(str, state))}. It was saved by another "
                "optimizer, or with options that give another state."
            )
        for key, (shape, dtype, follows) in needed_layout.items():
            value = state[key]
            if not isinstance(value, Tensor):
                raise TypeError(f"{where}: '{key}' must be a tensor of shape {shape}, got {type(value).__name__}")
            if tuple(value.shape) != shape or value.layout is not torch.strided:
                raise ValueError(f"{where}: '{key}' must have shape {shape}, got {_described(value)}")
            if value.is_floating_point() != dtype.is_floating_point or (
                value.dtype != dtype and not dtype.is_floating_point
            ):
                raise ValueError(f"{where}: '{key}' must be {dtype}, got {value.dtype}")
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
                entry[key] = _counter(count, dtype, count.device if isinstance(count, Tensor) else HOST)
                if entry[key].device.type == "cpu" and not 0 <= entry[key].item() < math.inf:
                    raise ValueError(f"{where}: '{key}' must be a number >= 0, got {entry[key].item()}")
        return entry


def needs_others(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a step adds up over ranks: where slices are cut. Ranks that have whole slices need nobody."""
    return layout.is_sharded(param) and any(layout.cuts(param)[group["batch_dims"] :])


def _steps_beside(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a step lives beside its parameter: where only the device knows whether it was made, or reads it."""
    beside = group["nonfinite"] == "skip" or group["capturable"] or group["amp_scaling"]
    return beside and not needs_others(param, group)


def is_trained(param: Tensor) -> bool:
    """Whether a step may have to do with the parameter; what is frozen is none of the optimizer's business."""
    return param.requires_grad or param.grad is not None


def _is_supported(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether state can be made; `_check_param` says why not."""
    dense = param.layout == torch.strided and not param.is_nested
    return dense and param.dtype in ops.PARAM_DTYPES and (not group["batch_dims"] or param.ndim > group["batch_dims"])


def _counts(value: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a step, or a count of skipped ones, is kept as it must be."""
    return (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and value.ndim == 0
        and value.device == device
        and not value.is_inference()
    )


def _counter(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A count as it is kept: of a number, or of a tensor of one element of any type and shape."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=dtype, device=device)
    if value.ndim:
        value = value.reshape(()).clone()  # no view, which would hold what it is of
    return _writable(value.to(device=device, dtype=dtype))


def _writable(tensor: Tensor) -> Tensor:
    """The tensor itself; an ordinary copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _copied(value: Any, device: torch.device | None) -> Any:
    """What a wrapper keeps, its tensors copied (to ``device``, unless that is None), in containers as well."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device or value.device, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _copied(entry, device) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(entry, device) for entry in value)
    return value


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.layout is torch.strided else f" of layout {tensor.layout}")


def _tensors(params: Any) -> Iterable[Any]:
    """The tensors of a group's "params": one tensor, tensors, or (name, tensor) pairs."""
    if isinstance(params, Tensor):
        return [params]
    return [param[1] if isinstance(param, tuple) and len(param) == 2 else param for param in params]
