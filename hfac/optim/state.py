"""State of both optimizers, which follows the parameters: they are checked before any is made."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from .. import backends, ops, rounding, signs, spec
from ..distributed import layout
from . import options
from .param_groups import ADDED, GroupedOptimizer, KnownOptions
from .slices import keeps_sign_bytes, needs_reduction, sliced

State = dict[str, Tensor]
#: by state key: global shape, dtype, and for each dimension of the state the parameter's dimension that it is sharded
#: with (None: whole on every rank)
Layout = dict[str, tuple[tuple[int, ...], torch.dtype, layout.Follows]]
#: shape of a factor of one slice, and the slice's dimensions that it is sharded with
Side = tuple[tuple[int, ...], layout.Follows]

#: state key of the bits that a bfloat16 parameter lacks of its master weight
LOW = str(spec.MASTER_LOW.key)
#: state keys beside factors, moments and ``LOW``: steps made, and steps skipped
COUNTERS = ("step", "skipped")
HOST = torch.device("cpu")


class StatefulOptimizer(GroupedOptimizer):
    """The base of both optimizers without their steps: parameter groups and state."""

    #: those of ``_state_options`` of which a state dict may have another value, because loading converts its state
    _converted_options: ClassVar[frozenset[str]] = frozenset()

    def _has_state(self, group: Mapping[str, Any]) -> bool:
        return any(has_state(self.state, param) for param in group["params"])

    @property
    def _own_keys(self) -> frozenset[str]:
        return own_keys(self._spec)

    def _sides(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> tuple[Side, Side] | None:
        """Row and column factors of a slice of ``shape``; None where it cannot be factored."""
        raise NotImplementedError

    def _op(self, param: Tensor, group: Mapping[str, Any]) -> spec.Op:
        """The op that steps a parameter which is not sharded."""
        _, shape = sliced(param, group)
        return self._spec.op_for(not group["dense"] and self._sides(shape, group) is not None, group)

    def _layout(self, param: Tensor, group: Mapping[str, Any]) -> Layout:
        """Layout of a parameter's factors or moments, the same at every step: factors of one slice, after what counts
        slices; whole moments, signs and the master weight's lower bits as the parameter."""
        batch, shape = sliced(param, group)
        dims, whole = group["batch_dims"], tuple(param.shape[group["batch_dims"] :])
        sides = None if group["dense"] else self._sides(shape, group)
        op = self._spec.op_for(sides is not None, group)
        in_bytes = any(state.size == spec.SIGNS for state in op.states) and keeps_sign_bytes(param, group)
        sizes: dict[str, Side] = {spec.WHOLE: (whole, tuple(range(len(whole))))}
        if sides is not None:
            sizes[spec.SIGNS] = sizes[spec.WHOLE] if in_bytes else (signs.bits_shape(whole), (0, 1))
            for name, (size, follows) in zip((spec.ROWS, spec.COLS), sides, strict=True):
                if len(batch) > dims:  # pieces lie where the dimension that they cut does, and are whole in it
                    along = group["views_dim"]
                    size, follows = (batch[dims], *size), (along, *(None if d == along else d for d in follows))
                sizes[name] = size, follows
        found: Layout = {}
        for state in (*op.states, spec.MASTER_LOW):
            master = state is spec.MASTER_LOW
            dtype = self._low_dtype(param, group) if master else state.dtype or ops.state_dtype(param.dtype)
            if state.size == spec.SIGNS and in_bytes:
                dtype = signs.BYTES
            if state.key is not None and dtype is not None and (state.moment != 1 or self._spec.has_first(group)):
                size, follows = sizes[state.size]
                moved = (None if d is None else dims + d for d in follows)
                found[state.key] = batch[:dims] + size, dtype, (*range(dims), *moved)
        return found

    def _needed_state(self, param: Tensor, group: Mapping[str, Any]) -> State:
        """The state that a step reads, without wrappers' entries."""
        needed = {*self._layout(param, group), *COUNTERS}
        return {key: value for key, value in self.state[param].items() if key in needed}

    @staticmethod
    def _low_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype | None:
        """Type of the master weight's lower bits; None where there is no master weight."""
        master = group["master"]
        return None if master is None or param.dtype != torch.bfloat16 else rounding.LOW_DTYPES[master]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Completes optimizers pickled by an older version: options that it lacked, and steps kept as numbers."""
        super().__setstate__(state)
        self._forget()
        self._known = KnownOptions(self._all_rules())
        for name, value in {**ADDED, **self._state_options}.items():
            self.defaults.setdefault(name, value)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # which torch's __setstate__ adds to the defaults; no step reads it
                    group.setdefault(name, value)
            for param in group["params"]:
                param_state = self.state.get(param, {})
                if "step" in param_state and not isinstance(param_state["step"], Tensor):
                    param_state["step"] = counter(param_state["step"], torch.float32, HOST)
        for index, group in enumerate(self.param_groups):
            self._known.keep(index, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may override any option, and creates the state of its parameters.

        Frozen parameters (requires_grad False) may be of any kind; they are checked, and get state, once they are
        trained. So are those of lazy modules, once a forward pass has given them a shape.

        Raises:
            TypeError, ValueError, RuntimeError: an invalid option or parameter, or an option that only the other
                optimizer has; the optimizer is unchanged.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            rules = self._all_rules()
            for name in param_group:  # keys that no optimizer has as an option may be other code's, as in torch
                if name in self._elsewhere and name not in rules:
                    end = options.instead(name, rules, self._elsewhere)
                    raise TypeError(f"{type(self).__name__} has no option {name!r}, which this group gives; {end}")
            param_group.update(self._checked(param_group))
            group = {**self.defaults, **param_group}
            first = next(iter(self.param_groups), group)  # existing groups agree with each other
            agrees = first.get("max_grad_norm") == group["max_grad_norm"]
            self._common_limit([group] if agrees else [*self.param_groups, group])
            if (first["nonfinite"] == "skip-step") != (group["nonfinite"] == "skip-step"):
                self._skips_steps([*self.param_groups, group])
            if not isinstance(param_group["params"], Tensor | set):
                param_group["params"] = list(param_group["params"])
            for index, param in enumerate(_tensors(param_group["params"])):
                # Frozen parameters may be of any kind; torch itself refuses what is not a tensor.
                frozen = isinstance(param, Parameter) and not is_trained(param)
                if isinstance(param, Tensor) and not frozen:
                    self._check_param(f"{type(self).__name__}: parameter {index} of the group", param, group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._known.keep(len(self.param_groups) - 1, group)
        for param in group["params"]:
            self._sync_param(param, group)

    def _check_param(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        """Checks a parameter that is to be trained, once it has a shape; messages begin with ``where``."""
        if is_lazy(param):
            return
        flat = layout.flat_refusal(param)
        if flat is not None:
            raise TypeError(f"{where} {flat}")
        ops.check_tensor(where, param)
        if param.is_nested:
            raise RuntimeError(
                f"{where} is a nested tensor, which has no rows and columns. Optimize its components as tensors of "
                "their own."
            )
        if param.dtype not in ops.PARAM_DTYPES:
            raise ValueError(
                f"{where} has dtype {param.dtype}; float16, bfloat16, float32 or float64 is required. Leave other "
                "tensors out of the optimizer, or keep a floating-point copy to train."
            )
        backends.resolve(group["backend"], param.device)
        if group["master"] is not None and param.dtype == torch.float16:
            raise ValueError(
                f"{where} is float16, and master={group['master']!r} stores the bits of a float32 that a bfloat16 "
                "lacks; float16's exponent differs. Use bfloat16, or rounding='stochastic'."
            )
        self._check_layout(where, param, group)
        if layout.is_dtensor(param):
            self._check_dtensor(where, param, group)
        if not needs_reduction(param, group):
            backends.resolve(group["backend"], param.device, self._op(param, group))

    def _check_layout(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        """Checks batch dimensions, and the options that exclude sharding, which may come after construction."""
        batch, views, along = group["batch_dims"], group["views"], group["batch_dims"] + group["views_dim"]
        slicing, whole = (f"batch_dims={batch}", "batch_dims=0") if views == 1 else (f"views={views}", "views=1")
        if group["watch"] and layout.is_sharded(param) and not needs_reduction(param, group):
            raise ValueError(
                f"{where} has {slicing} and is sharded; watch=True is not supported with both: no rank has all slices. "
                f"Leave watch=False, or {whole}."
            )
        if group["capturable"] and group["nonfinite"] == "skip" and needs_reduction(param, group):
            raise ValueError(
                f"{where} is sharded, and capturable=True is not supported with nonfinite='skip' then: the host waits "
                "in every step for which parameters the ranks leave alone. Use nonfinite='skip-step', which the device "
                "decides, or leave capturable=False."
            )
        if batch == 0 and views == 1:
            return
        if batch >= param.ndim:
            raise ValueError(
                f"{where} has shape {tuple(param.shape)}; batch_dims={batch} needs more than {batch} dimension(s), the "
                "rest being those of a slice. Put the parameter into another group, with fewer batch_dims."
            )
        if views > 1 and along >= param.ndim:
            raise ValueError(
                f"{where} has shape {tuple(param.shape)}; views={views} with views_dim={group['views_dim']} and "
                f"batch_dims={batch} cuts dimension {along}, which it does not have. Put the parameter into another "
                "group, or give the dimension to cut, counted after the batch dimensions, as views_dim."
            )
        if views > 1 and param.shape[along] % views:
            raise ValueError(
                f"{where} has shape {tuple(param.shape)}; views={views} cuts dimension {along} into so many equal "
                f"pieces, and {views} does not divide {param.shape[along]}. Put the parameter into another group."
            )
        if not layout.is_sharded(param):
            return
        if views > 1 and not layout.has_whole_pieces(param, along, param.shape[along] // views):
            raise ValueError(
                f"{where} has views={views}, shape {tuple(param.shape)} and placements {tuple(param.placements)}; "  # type: ignore[attr-defined]
                f"a rank would have part of a piece of {param.shape[along] // views} of dimension {along}. Shard that "
                "alone, over so many ranks that each has whole pieces, or leave views=1."
            )
        if needs_reduction(param, group):
            of_cut = "" if views == 1 else f" and dimension {along}, which views={views} cuts,"
            raise ValueError(
                f"{where} has batch_dims={batch}, shape {tuple(param.shape)} and placements {tuple(param.placements)}; "  # type: ignore[attr-defined]
                f"only the first {batch} dimension(s){of_cut} can be sharded then. Shard those alone, or leave {whole}."
            )
        if group["nonfinite"] == "skip":
            raise ValueError(
                f"{where} has {slicing} and is sharded; nonfinite='skip' is not supported with both: ranks would count "
                f"different steps. Use nonfinite='skip-step', which all ranks decide together, or {whole}."
            )

    def _check_dtensor(self, where: str, param: Tensor, group: Mapping[str, Any]) -> None:
        reason = layout.refusal(param)
        if reason is not None:
            raise ValueError(f"{where} {reason}")
        if not layout.is_sharded(param):
            return
        if group["rounding"] == "stochastic" and param.dtype in rounding.DTYPES:
            try:
                layout.bit_offset(param, 0)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if not needs_reduction(param, group):
            return
        if not self._spec.shard_ops:
            raise ValueError(f"{where} is sharded, which {self._algorithm} does not support. Replicate it.")
        for op in spec.chosen(self._spec.shard_ops, group):
            backends.resolve(group["backend"], param.device, op)
        reason = layout.group_refusal(param)
        if reason is not None:
            raise ValueError(f"{where} {reason}")

    def _sync_state(self) -> None:
        """Makes state follow the parameters, which trainers swap, regroup, move and convert after construction: creates
        missing state, moves it to the parameters' devices and types, and drops that of parameters that are gone.

        Raises:
            TypeError: vectors have taken the place of matrices.
        """
        self._check_not_flattened()
        live = set()
        for group in self.param_groups:
            for param in group["params"]:
                if self._sync_param(param, group):
                    live.add(id(param))
        gone = [key for key in self.state if isinstance(key, Tensor) and id(key) not in live]
        for param in gone:
            del self.state[param]
        if gone:
            self._forget()  # caches would keep it alive

    def _check_not_flattened(self) -> None:
        """Refuses vectors that a trainer has put in the place of matrices: DeepSpeed's ZeRO 1 and 2 and Megatron's
        distributed optimizer train pieces of flattened parameters, and mark them by nothing else."""
        params = [param for group in self.param_groups for param in group["params"]]
        if any(param.ndim > 1 or param in self.state for param in params):
            return
        gone = [key for key in self.state if isinstance(key, Tensor) and key.ndim > 1 and has_state(self.state, key)]
        if params and gone:
            raise TypeError(
                f"{type(self).__name__}: the {len(gone)} matrices that it was constructed with, such as one of shape "
                f"{tuple(gone[0].shape)}, have been replaced by vectors alone, such as one of {params[0].numel()} "
                "elements, which have no rows and columns to factor. DeepSpeed's ZeRO stages 1 and 2 and Megatron's "
                "distributed optimizer flatten parameters so: use ZeRO stage 0, or shard the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2). If the vectors are the model's own parameters, construct "
                "the optimizer with them."
            )

    def _sync_param(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """`_sync_state` of one parameter. False where it has no state: it is frozen, lazy, or of a kind that `step`
        refuses."""
        state = self.state.get(param)
        keys = state or ()
        held = "step" in keys and any(own.key in keys for own in self._spec.states if own.moment != 1)
        if not held and (not is_trained(param) or is_lazy(param) or not _is_supported(param, group)):
            return state is not None
        found = self.state.setdefault(param, {})
        if not held or not self._in_order(param, group, found):
            self._complete_state(param, group, found)
        return True

    def _in_order(self, param: Tensor, group: Mapping[str, Any], state: State) -> bool:
        """Whether a parameter's state has the devices and types it must have and can be written."""
        wide, low = ops.state_dtype(param.dtype), self._low_dtype(param, group)
        counters = _counters(param, group, state)
        kinds: dict[Any, Any] = {own.key: (own.dtype or wide, param.device) for own in self._spec.states}
        if any(own.size == spec.SIGNS and own.key in state for own in self._spec.states):
            kept = signs.BYTES if keeps_sign_bytes(param, group) else torch.uint8
            kinds |= {own.key: (kept, param.device) for own in self._spec.states if own.size == spec.SIGNS}
        kinds |= {LOW: (low, param.device), **counters}
        present = counters.keys() <= state.keys() and (LOW in state) == (low is not None)
        return present and all(
            isinstance(value, Tensor)
            and (value.dtype, value.device) == kinds[key]
            and not value.is_inference()
            and (value.ndim == 0 if key in counters else key == LOW or value.is_contiguous())
            for key, value in state.items()
            if key in kinds
        )

    @torch.inference_mode(False)  # state outlives the mode in which it is created
    @torch.no_grad()
    def _complete_state(self, param: Tensor, group: Mapping[str, Any], state: State) -> None:
        """Gives a parameter's state every key, on the right device and in the right type; new entries are zero."""
        needed, counters = self._layout(param, group), _counters(param, group, state)
        if not param.is_meta and any(
            isinstance(state.get(key), Tensor) and state[key].is_meta for key in (*needed, *counters)
        ):
            # Moments that were moved to the meta device are lost, so the step starts over with them.
            for key in [key for key in state if key in self._own_keys]:
                del state[key]
        if LOW in state and (LOW not in needed or state[LOW].dtype != needed[LOW][1]):
            del state[LOW]  # the option or the parameter's type has changed
        for key, (shape, dtype, follows) in needed.items():
            if key in state:
                state[key] = _writable(state[key].to(device=param.device, dtype=dtype)).contiguous()
            else:
                state[key] = layout.zeros(param, shape, follows, dtype, param.device)
        for key, (dtype, device) in counters.items():
            state[key] = counter(state.get(key, 0), dtype, device)


def _counters(
    param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, tuple[torch.dtype, torch.device]]:
    """By key, type and device that a parameter's counters must have. Where only the device knows whether a step is
    made, or reads its number, ``step`` is on the parameter's. With nonfinite="skip" ranks tell each other's hosts which
    parameters they leave alone."""
    counted = group["nonfinite"] != "propagate"
    beside = group["capturable"] or group["amp_scaling"] or group["nonfinite"] == "skip-step"
    beside = beside or (counted and not needs_reduction(param, group))
    found = {"step": (torch.float32, param.device if beside else HOST)}
    if counted or "skipped" in state:
        found["skipped"] = (torch.int32, param.device)
    return found


def own_keys(algorithm: spec.Algorithm) -> frozenset[str]:
    """Keys of an optimizer's own entries in a parameter's state; all others belong to wrappers."""
    return frozenset((*algorithm.keys, *COUNTERS, LOW))


def has_state(state: Mapping[Any, Any], param: Tensor) -> bool:
    """Whether ``optimizer.state`` has more of a parameter than wrappers' entries."""
    return "step" in state.get(param, ())


def is_trained(param: Tensor) -> bool:
    """Whether a step may update the parameter; frozen parameters are left alone."""
    return param.requires_grad or param.grad is not None


def _is_supported(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the parameter can have state; `_check_param` says why not."""
    dense = param.layout == torch.strided and not param.is_nested
    dims, views = group["batch_dims"], group["views"]
    if not dense or param.dtype not in ops.PARAM_DTYPES:
        return False
    along = dims + group["views_dim"]
    cut = views == 1 or (param.ndim > along and param.shape[along] % views == 0)
    return cut and (dims == 0 or param.ndim > dims)


def counter(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``step`` or ``skipped`` as a 0-d tensor, from a number or a one-element tensor."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=dtype, device=device)
    if value.ndim:
        value = value.reshape(()).clone()  # a view would keep its base alive
    return _writable(value.to(device=device, dtype=dtype))


def _writable(tensor: Tensor) -> Tensor:
    """The tensor itself, or an ordinary copy where it is an inference tensor."""
    return tensor.clone() if tensor.is_inference() else tensor


def _tensors(params: Any) -> Iterable[Any]:
    """The tensors of a group's "params": one tensor, tensors, or (name, tensor) pairs."""
    if isinstance(params, Tensor):
        return [params]
    return [param[1] if isinstance(param, tuple) and len(param) == 2 else param for param in params]
