"""Steps on whole parameters: one function per op, and `Bound`, which checks once what stays from step to step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends, memory
from ..rounding import Place
from ..schedules import Scalar
from .checks import (
    FLOATING,
    LOWS,
    PARAM_DTYPES,
    Tensors,
    check_params,
    check_places,
    check_states,
    check_stores,
    check_tensor,
    checked_list,
    choose,
    names,
)
from .update import Update

#: State lists of each op.
STATES = {
    "hfac_step_": ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "hfac_dense_step_": ("exp_avgs", "exp_avg_sqs"),
    "smmf_step_": ("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "smmf_dense_step_": ("exp_avgs", "exp_avg_sqs"),
}
#: Numbers that a step tells of each parameter where it is watched.
WATCHED = 5
#: Those that SMMF does without where beta1 is None.
FIRST_MOMENT = frozenset(("exp_avg_rows", "exp_avg_cols", "exp_avg_signs", "exp_avgs"))
_LAYOUT, _DTYPE, _DEVICE, _SHAPE = (attrgetter(name) for name in ("layout", "dtype", "device", "shape"))
_IS_CPU = attrgetter("is_cpu")


def hfac_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors,
    exp_avg_cols: Tensors,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of H-Fac on parameters viewed as [m, n] matrices. Row states have m elements, column states n."""
    _call("hfac_step_", **locals())


def hfac_dense_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    clip_threshold: float | None,
    weight_decay: Scalar,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of H-Fac with both moments whole: states have their parameter's shape."""
    _call("hfac_dense_step_", **locals())


def smmf_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg_rows: Tensors | None,
    exp_avg_cols: Tensors | None,
    exp_avg_signs: Tensors | None,
    exp_avg_sq_rows: Tensors,
    exp_avg_sq_cols: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of SMMF on parameters viewed as [n, m] matrices, n >= m. Row states are [n], column states [m], signs
    uint8 of `hfac.matricize.sign_shape`. beta1 None: no first moment, and its three lists are None."""
    _call("smmf_step_", **locals())


def smmf_dense_step_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors | None,
    exp_avg_sqs: Tensors,
    nonfinite: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar | None,
    beta2: Scalar,
    eps: float,
    weight_decay: Scalar,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    master_lows: Tensors | None = None,
    places: Sequence[Place] | None = None,
    seed: int = 0,
    step: Scalar = 0.0,
    watched: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of SMMF with both moments whole: states have their parameter's shape. beta1 None: exp_avgs is None."""
    _call("smmf_dense_step_", **locals())


def _call(
    op: str,
    params: Tensors,
    grads: Tensors,
    nonfinite: Tensor | None,
    backend: str,
    places: Sequence[Place] | None,
    master_lows: Tensors | None,
    **arguments: Any,
) -> None:
    states = {name: arguments.pop(name) for name in STATES[op]}
    if arguments["beta1"] is None:
        states = {name: tensors for name, tensors in states.items() if name not in FIRST_MOMENT}
    if master_lows is not None:
        states[LOWS] = master_lows
    Bound(op, params, states, places=places, backend=backend).prepare(grads, nonfinite, **arguments)()


class Bound:
    """An op with the parameters and states it updates, found right once; every step brings gradients and scalars.

    To look at every state of many small tensors anew in every step would cost more than the step. What a step must
    know is whether a tensor lies where it lay: `holds`.

    Args:
        op: name of the op.
        states: lists by the names that the op gives them; SMMF without a first moment leaves its lists out, and
            `LOWS` is there where there are master weights.
        places: as the op takes it. A step then brings ``seed`` and ``step`` among its scalars.
        backend: as the op takes it.
        captured: a list to which the op adds its own memory that a CUDA graph reads in every replay, when a step is
            captured; it must live as long as the graph. None: it lives as long as this op.

    Raises:
        ValueError, RuntimeError: as every op, see above.
    """

    def __init__(
        self,
        op: str,
        params: Tensors,
        states: Mapping[str, Tensors],
        *,
        places: Sequence[Place] | None = None,
        backend: str = "auto",
        captured: list[Any] | None = None,
    ) -> None:
        self.op, self._backend = op, backend
        self._first = not op.startswith("smmf") or not FIRST_MOMENT.isdisjoint(states)
        needed = STATES[op] if self._first else [name for name in STATES[op] if name not in FIRST_MOMENT]
        self._params = list(params)
        if LOWS in states:
            needed = [*needed, LOWS]
        self._states = {name: checked_list(name, states.get(name), op, len(params)) for name in needed}
        self.step: Callable[..., None] | None = None
        #: whether the kernels divide gradients by a scale as they read them
        self.unscales = False
        if not params:
            return
        self.device = params[0].device
        self._on_cpu = self.device.type == "cpu"
        check_params(self._params)
        check_states(op, self._params, self._states)
        self._stochastic = places is not None
        stored: dict[str, Any] = {}
        if places is not None:
            check_places(self._params, places, self._states.get(LOWS))
            stored["places"] = list(places)
        if LOWS in states or stored:
            check_stores(backend, self.device)
        self._stored = stored
        reason = memory.reason({"params": self._params, **self._states})
        module = choose(backend, self.device, reason)
        self.unscales = getattr(module, "UNSCALES", False)
        if hasattr(module, "bind"):
            self.step = module.bind(op, self._params, self._states, **stored)
        else:
            self.step = self._op_of(module)
        if captured is not None and hasattr(self.step, "captured"):
            self.step.captured = captured
        self._reads_memory = hasattr(module, "bind")
        self._address = Tensor.data_ptr if reason is None else memory.address
        self._layout = whereabouts(self._params, self._states.values(), self._address)
        self._shapes = self._layout[2]

    def _op_of(self, module: ModuleType) -> Callable[..., None]:
        """The op of a backend that has plain functions."""
        missing = dict.fromkeys(set(STATES[self.op]) - self._states.keys())
        return partial(getattr(module, self.op), self._params, **self._states, **missing, **self._stored)

    def holds(self) -> bool:
        """Parameters and states have the places, shapes and types that they had."""
        if self.step is None:
            return True
        try:
            return whereabouts(self._params, self._states.values(), self._address) == self._layout
        except RuntimeError:  # something has no memory any more
            return False

    def workspace_bytes(self) -> int:
        """Bytes on the device that the backend keeps from step to step."""
        return getattr(self.step, "workspace_bytes", lambda: 0)()

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, in whose replays what is launched now will run."""
        if hasattr(self.step, "capturing"):
            return self.step.capturing()
        return self.step is not None and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def tensors(self) -> list[Tensor]:
        """The states that a step reads and writes."""
        return [tensor for tensors in self._states.values() for tensor in tensors]

    def prepare(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int = 0,
        step: Scalar = 0.0,
        watched: Tensor | None = None,
        **scalars: Any,
    ) -> Update:
        """Checks a step with these gradients and returns it, yet to be made.

        ``seed`` and ``step`` are read where the op has places. ``grad_scale`` and ``found_inf`` are what
        `torch.amp.GradScaler` hands to an optimizer that unscales gradients itself: float32 tensors of one element.
        Gradients are divided by the one, and nothing is written where the other is not zero.
        """
        if len(grads) != len(self._params):
            raise ValueError(f"grads must have one entry per parameter ({len(self._params)}), got {len(grads)}")
        if (scalars["beta1"] is not None) != self._first:
            raise ValueError("states of the first moment are required by SMMF exactly where beta1 is not None")
        scaling = {"grad_scale": grad_scale, "found_inf": found_inf}
        grads, make, unscales, lazy = list(grads), self.step, self.unscales, False
        if make is not None:
            self._check_grads(grads)
            self._check_given(len(grads), nonfinite, watched, scaling)
            if self._stochastic:
                scalars.update(seed=seed, step=step)
            # The C++ kernels' backend sees by a null address which gradients are zeros without memory.
            zeros = unscales and any(map(Tensor._is_zerotensor, grads))
            if self._reads_memory and (zeros or memory.bypassed() or not memory.plain(grads)):
                grads = memory.without_zerotensors(grads)
                reason = memory.reason({"grads": grads}, negated=True)
                if reason is not None:
                    make, unscales = self._op_of(choose(self._backend, self.device, reason)), False
                elif unscales:
                    grads = memory.materialized(grads)
                else:
                    lazy = True  # they may have to be multiplied in place first
        return Update(self, make, unscales, grads, lazy, nonfinite, watched, scaling, scalars)

    def _check_given(
        self, count: int, nonfinite: Tensor | None, watched: Tensor | None, scaling: Mapping[str, Tensor | None]
    ) -> None:
        if watched is not None and (
            watched.shape != (count, WATCHED)
            or watched.dtype != torch.float64
            or watched.device != self.device
            or not watched.is_contiguous()
        ):
            raise ValueError(
                f"watched must be a contiguous float64 tensor of shape ({count}, {WATCHED}) on {self.device}, got "
                f"{watched.dtype} {tuple(watched.shape)} on {watched.device}"
            )
        if nonfinite is not None and (
            nonfinite.shape != (count,) or nonfinite.dtype != torch.int32 or nonfinite.device != self.device
        ):
            raise ValueError(
                f"nonfinite must be an int32 tensor of shape ({count},) on {self.device}, got {nonfinite.dtype} "
                f"{tuple(nonfinite.shape)} on {nonfinite.device}"
            )
        for name, tensor in scaling.items():
            if tensor is None:
                continue
            if tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device != self.device:
                raise ValueError(
                    f"{name} must be one float32 on {self.device}, as torch.amp.GradScaler passes it, got "
                    f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"
                )

    def _check_grads(self, grads: Tensors) -> None:
        if (
            list(map(_SHAPE, grads)) == self._shapes
            and list(map(_LAYOUT, grads)).count(torch.strided) == len(grads)
            and FLOATING.issuperset(map(_DTYPE, grads))
            and (all(map(_IS_CPU, grads)) if self._on_cpu else {self.device}.issuperset(map(_DEVICE, grads)))
        ):
            return
        for i, (param, grad) in enumerate(zip(self._params, grads, strict=True)):
            check_tensor(f"grads[{i}]", grad)
            if grad.dtype not in PARAM_DTYPES:
                raise ValueError(f"grads[{i}] must be one of {names(PARAM_DTYPES)}, got {grad.dtype}")
            if grad.shape != param.shape:
                raise ValueError(
                    f"grads[{i}] must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
                )
            if grad.device != self.device:
                raise RuntimeError(
                    f"params[{i}] is on {param.device} and grads[{i}] on {grad.device}, expected both on {self.device}"
                )


def whereabouts(
    params: Tensors, states: Iterable[Tensors], address: Callable[[Tensor], int] = Tensor.data_ptr
) -> list[list[Any]]:
    """Of parameters all that ``p.data = ...`` can change; states are contiguous, and only move."""
    found = [list(map(get, params)) for get in (address, _DTYPE, _SHAPE, Tensor.stride)]
    return found + [list(map(address, tensors)) for tensors in states]


def read_steps(steps: Tensors, native: bool = True) -> list[float]:
    """The values of 0-d tensors on the host; ``native``: `counted_natively`."""
    counters = backends.host_counters() if native else None
    return [step.item() for step in steps] if counters is None else counters.read_steps(steps)


def counted_natively(steps: Tensors) -> bool:
    """Whether these are float32 on the host that lie in memory, so that the extension may read and advance them."""
    return all(step.is_cpu and memory.why_not(step) is None for step in steps)


def advance_steps_(steps: Tensors, native: bool = True) -> None:
    """Adds one to 0-d tensors, which all lie on the host or all on one device; ``native`` as for `read_steps`."""
    counters = backends.host_counters() if native and steps[0].is_cpu else None
    if counters is not None:
        counters.advance_steps_(steps)
    else:
        # A tensor of one, made once: a number would be wrapped anew for every step that lives on the host.
        one = torch.ones((), dtype=torch.float32, device=steps[0].device)
        if steps[0].is_cpu:
            for step in steps:
                step.add_(one)
        else:
            torch._foreach_add_(list(steps), one, alpha=1)
