"""The CUDA kernels of `hfac._C`: lists of tensors become a plan and a table that stay from step to step.

`bind` takes what a step always has (parameters and states) and returns what makes steps of gradients and scalars. The
kernels find addresses and sizes in a table in device memory, copied anew only where an address changed. A step waits
for nothing and allocates nothing, but for the memory that grows with the list.

Everything here is written over a `Platform`, which knows the module with the launch functions and the device's memory;
the tests have one for kernels that run on the host.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # tells autograd of writes that it cannot see

from ..matricize import Block
from ..rounding import Place
from ..schedules import Scalar
from . import cpu
from .cpu import _addresses, _codes, _grads, _numels, _params, _resolved, _strides
from .planned import Planned, Platform, index_of

Tensors = Sequence[Tensor]

#: op -> the states that the kernels call first and second moment, by row and column
_STATES = {
    "hfac_step": ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "smmf_step": ("exp_avg_rows", "exp_avg_cols", "exp_avg_sq_rows", "exp_avg_sq_cols"),
    "hfac_dense_step": ("exp_avgs", None, "exp_avg_sqs", None),
    "smmf_dense_step": ("exp_avgs", None, "exp_avg_sqs", None),
}
#: Codes of the kernels' Low (csrc/cuda/table.h).
_LOWS = {torch.int16: 1, torch.int8: 2}
_L2_BYTES: dict[int, int] = {}


def why_not(device: torch.device) -> str | None:
    """None where these kernels serve ``device``, else the reason and what to do."""
    if device.type != "cuda":
        return f"the CUDA kernels serve tensors on a GPU, not on {device}. Use backend='auto'."
    if cpu._C is None:
        return cpu.why_not(torch.device("cpu"))
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _unserved(cpu._C, index)


@functools.cache
def _unserved(native: Any, index: int) -> str | None:
    """Why the extension serves no tensors on the CUDA device of this index; None where it does. Asked once for each:
    devices' properties take milliseconds."""
    info = native.cuda_info()
    if not info["compiled"]:
        return (
            "the extension hfac._C was built without CUDA. Build it again with nvcc on the path: HFAC_CUDA=1 python -m "
            "pip install -e . in a checkout of hfac."
        )
    if info["why_not"] is not None:
        return f"no CUDA device can be used ({info['why_not']}). Check the driver: nvidia-smi."
    if index >= len(info["devices"]):
        return f"there is no CUDA device cuda:{index}; there are {len(info['devices'])}, counted from 0."
    found = info["devices"][index]
    if found["why_not"] is not None:
        return f"the CUDA kernels cannot run on cuda:{index}, a {found['name']}: {found['why_not']}."
    return None


class Cuda:
    """The GPU, through torch's allocators and streams."""

    @property
    def native(self) -> Any:
        return cpu._C

    def l2_bytes(self, device: torch.device) -> int:
        index = index_of(device)
        if index not in _L2_BYTES:
            _L2_BYTES[index] = getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0)
        return _L2_BYTES[index]

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def after(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        torch.cuda.current_stream(device).wait_stream(stream)

    def used_on_another_stream(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        for tensor in tensors:  # so that torch's allocator waits for that stream before it hands the memory out again
            tensor.record_stream(torch.cuda.current_stream(device))

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def host_table(self, nbytes: int) -> Tensor:
        # torch's allocator of pinned memory does not hand a buffer out again before the copies from it are done.
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def before_launch(self, workspace: Tensor) -> None:
        pass


class Bound(Planned):
    """Steps of one op on one list of parameters; see `bind`."""

    def __init__(
        self,
        platform: Platform,
        op: str,
        params: Tensors,
        states: dict[str, list[Tensor]],
        places: Sequence[Place] | None = None,
    ) -> None:
        self.op, self.params = op, list(params)
        self.states = {name: list(tensors) for name, tensors in states.items()}
        device = params[0].device if params else torch.device("cpu")
        first_rows, first_cols, second_rows, second_cols = (
            None if name is None else self.states.get(name) for name in _STATES[op]
        )
        assert second_rows is not None
        numels = _numels(params)
        arguments: dict[str, Any] = {
            "op": op,
            "params": _addresses(params),
            "numels": numels,
            "param_dtypes": _codes(params),
            "rows": _numels(second_rows) if second_cols is not None else numels,
            "cols": _numels(second_cols) if second_cols is not None else [1] * len(numels),
            "first_rows": None if first_rows is None else _addresses(first_rows),
            "first_cols": None if first_cols is None else _addresses(first_cols),
            "second_rows": _addresses(second_rows),
            "second_cols": None if second_cols is None else _addresses(second_cols),
            "l2_bytes": platform.l2_bytes(device),
        }
        signs = self.states.get("exp_avg_signs")
        if signs is not None:
            arguments.update(
                exp_avg_signs=_addresses(signs),
                sign_bytes=_numels(signs),
                sign_slices=[sign.shape[0] for sign in signs],
            )
        shapes = [tuple(p.shape) for p in params]
        stored = _stored(self.states.get("master_lows"), places)
        if stored or not all(map(Tensor.is_contiguous, params)):
            arguments.update(shapes=shapes, param_strides=_strides(params), **stored)
        super().__init__(platform, device, platform.native.CudaStep(**arguments), shapes)
        self._arguments = arguments
        self._lock = threading.Lock()  # several threads may step one list, whose tables and workspace there are once

    # H-Fac on matrices: a plan whose statistics are taken before the norm of all gradients is known, made when it is
    # first asked for. Where all steps clip, the plain plan takes no memory.
    _clipping: Planned | None = None
    _squares: Tensor | None = None
    _taken: Tensor | None = None  # what `squares` returned with statistics that no step has used yet

    def __call__(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        clip: Tensor | None = None,
        squares: Tensor | None = None,
        **scalars: Any,
    ) -> None:
        """One step. ``grad_scale``, ``found_inf``: 0-d float32 tensors on the device, as torch's fused optimizers take
        them: gradients are divided by the one, and nothing is written where the other is not zero. ``seed`` and
        ``step`` are needed where there are places; a graph replays the seed, and reads a step that is a tensor.

        ``clip``, a 0-d float32 tensor on the device, says that `squares` was called before, with the same gradients
        and scalars, but that ``grad_scale`` has since been divided by it. Where it is exactly 1 the step goes on from
        the statistics that were taken, else it takes them again: either way the bits are those of a step without it.
        ``nonfinite`` is then the tensor that `squares` has set; of statistics taken again its flags are new.
        ``squares``, what that call returned, shows whether another thread has taken others since, or made a step: this
        one is then made from the beginning.

        ``watched``, a contiguous float64 tensor [parameters, 5] on the device: the step adds to it, for each parameter,

        0. the sum of (new - old)^2, as they are before the new weight is rounded to what is stored of it;
        1. how many elements keep what is stored of them when that is rounded to the nearest, even where it is not;
        2. the sum of squares of the direction: G / sqrt(V) before it is clipped, or M / (sqrt(V) + eps);
        3. and 4. H-Fac on matrices: how many rows and columns of the gradient are zero.

        Nothing is added for a parameter that keeps every bit. Numbers 0 and 2 are added up in any order.
        """
        if not self.params:
            return
        increment_version(self.params)
        with self._lock:
            if clip is None or (squares is not None and squares is not self._taken):
                self.launch(grads, nonfinite, **scalars)
            elif self._clipping is None or self._taken is None:
                raise RuntimeError("clip is given, but squares was not called since the last step")
            else:
                self._clipping.launch(grads, nonfinite, clip=clip, **scalars)
            self._taken = None

    def squares(self, grads: Tensors, nonfinite: Tensor | None = None, **scalars: Any) -> Tensor | None:
        """H-Fac on matrices takes the statistics of the step that it would make of the same arguments; None for other
        ops. Returns for every gradient, as the step sees it (divided by ``grad_scale``), the sum of its squares:
        float64 on the device, 0 for what is empty, NaN where ``found_inf`` is not zero; squares are float32, so their
        sums may be inf. The tensor is written again by the next call, and in every replay of a graph. ``nonfinite`` is
        set as the step sets it."""
        if self.op != "hfac_step":
            return None
        with self._lock:
            if self._clipping is None:
                step = self.platform.native.CudaStep(**self._arguments, norm=True)
                self._clipping = Planned(self.platform, self.device, step, self.shapes)
                self._clipping.captured = self.captured
            if self._squares is None:
                if self.params and self.platform.capturing():
                    self._clipping.check_room()
                self._squares = torch.zeros(len(self.params), dtype=torch.float64, device=self.device)
            squares = self._squares
            if not self.params:
                return squares
            self._clipping.launch(grads, nonfinite, squares=squares, **scalars)
            self._taken = squares.view(-1)  # another object for every call
            return self._taken

    def check_capture(
        self,
        grads: Tensors,
        nonfinite: Tensor | None = None,
        *,
        taken: bool = False,
        clip_threshold: float | None = None,
        **scalars: Any,
    ) -> None:
        """That a step of these arguments can be part of the graph that is being captured; ``taken``: as `squares` is.

        Raises:
            RuntimeError: it needs memory on the host; the message says what to do.
        """
        if self.params and not taken:  # else that has been checked
            self._look(grads, nonfinite, clip_threshold)
            self.check_room()

    def workspace_bytes(self) -> int:
        """As of `Planned`, for steps with clip and without."""
        return super().workspace_bytes() + (0 if self._clipping is None else self._clipping.workspace_bytes())


def _stored(lows: Tensors | None, places: Sequence[Place] | None) -> dict[str, Any]:
    """What the kernels are told of how parameters are stored; they need shapes with it."""
    found: dict[str, Any] = {}
    if lows is not None:
        found.update(master_lows=_addresses(lows), master_low_dtypes=[_LOWS[low.dtype] for low in lows])
        found.update(master_low_strides=_strides(lows))
    if places is not None:
        found.update(places=list(places))
    return found


class Ops:
    """The ops of `hfac.reference` on one platform."""

    #: The kernels divide by a GradScaler's scale and look at its found_inf themselves.
    UNSCALES = True
    #: They know `master_lows` and `places`.
    STORES = True

    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def bind(
        self,
        op: str,
        params: Tensors,
        states: dict[str, list[Tensor]],
        *,
        places: Sequence[Place] | None = None,
    ) -> Callable[..., None]:
        """The op of that name on these parameters and states, for as long as they lie where they lie."""
        return Bound(self.platform, op.removesuffix("_"), params, states, places)

    def hfac_sums(
        self,
        grads: Tensors,
        old_rows: Tensors,
        row_sums: Tensors,
        new_rows: Tensors,
        col_sums: Tensors | None = None,
        col_squares: Tensors | None = None,
        col_ratios: Tensors | None = None,
        *,
        cols: Sequence[int],
        beta2: Scalar,
        eps: float,
    ) -> None:
        grads, strides = _resolved(grads)
        columns = {"col_sums": col_sums, "col_squares": col_squares, "col_ratios": col_ratios}
        plan = self.platform.native.CudaParts.hfac_sums(
            **_grads(grads, strides),
            numels=_numels(grads),
            state_dtypes=_codes(old_rows),
            rows=_numels(old_rows),
            whole_cols=cols,
            old_rows=_addresses(old_rows),
            row_sums=_addresses(row_sums),
            new_rows=_addresses(new_rows),
            **{name: None if tensors is None else _addresses(tensors) for name, tensors in columns.items()},
        )
        self._launch(plan, grads, {"beta2": beta2}, {}, eps=eps)

    def hfac_apply_(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avg_rows: Tensors,
        exp_avg_cols: Tensors,
        exp_avg_sq_rows: Tensors,
        exp_avg_sq_cols: Tensors,
        row_sums: Tensors,
        new_rows: Tensors,
        col_sums: Tensors,
        new_cols: Tensors,
        totals: Tensor,
        mean_squares: Tensor,
        *,
        rows: Sequence[int],
        cols: Sequence[int],
        lr: Scalar,
        beta1: Scalar,
        clip_threshold: float | None,
        weight_decay: Scalar,
        maximize: bool,
        master_lows: Tensors | None = None,
        places: Sequence[Place] | None = None,
        seed: int | None = None,
        step: Scalar | None = None,
    ) -> None:
        operands, (grads, strides) = _params(params), _resolved(grads)
        stored = _stored(master_lows, places)
        plan = self.platform.native.CudaParts.hfac_apply(
            **operands,
            **_grads(grads, strides, bool(stored) or "param_strides" in operands),
            **stored,
            rows=_numels(exp_avg_sq_rows),
            cols=_numels(exp_avg_sq_cols),
            whole_rows=rows,
            whole_cols=cols,
            exp_avg_rows=_addresses(exp_avg_rows),
            exp_avg_cols=_addresses(exp_avg_cols),
            exp_avg_sq_rows=_addresses(exp_avg_sq_rows),
            exp_avg_sq_cols=_addresses(exp_avg_sq_cols),
            row_sums=_addresses(row_sums),
            new_rows=_addresses(new_rows),
            col_sums=_addresses(col_sums),
            new_cols=_addresses(new_cols),
        )
        scalars = {"lr": lr, "weight_decay": weight_decay, "beta1": beta1, "step": step}
        given = {"totals": totals, "mean_squares": mean_squares}
        self._launch(plan, params, scalars, given, clip_threshold=clip_threshold, maximize=maximize, seed=seed)
        increment_version(params)

    def smmf_sums_step_(
        self,
        params: Tensors,
        grads: Tensors,
        exp_avg_rows: Tensors | None,
        exp_avg_cols: Tensors | None,
        exp_avg_signs: Tensors | None,
        exp_avg_sq_rows: Tensors,
        exp_avg_sq_cols: Tensors,
        new_rows: Tensors | None,
        new_cols: Tensors | None,
        new_sq_rows: Tensors,
        new_sq_cols: Tensors,
        *,
        blocks: Sequence[Sequence[Block]],
        lr: Scalar,
        beta1: Scalar | None,
        beta2: Scalar,
        eps: float,
        weight_decay: Scalar,
        decoupled_weight_decay: bool,
        maximize: bool,
        master_lows: Tensors | None = None,
        places: Sequence[Place] | None = None,
        seed: int | None = None,
        step: Scalar | None = None,
    ) -> None:
        operands, (grads, strides) = _params(params), _resolved(grads)
        stored = _stored(master_lows, places)
        first = {"exp_avg_rows": exp_avg_rows, "exp_avg_cols": exp_avg_cols, "new_rows": new_rows, "new_cols": new_cols}
        signs = exp_avg_signs
        plan = self.platform.native.CudaParts.smmf_sums_step(
            **operands,
            **_grads(grads, strides, bool(stored) or "param_strides" in operands),
            **stored,
            rows=_numels(exp_avg_sq_rows),
            cols=_numels(exp_avg_sq_cols),
            **{name: None if tensors is None else _addresses(tensors) for name, tensors in first.items()},
            exp_avg_signs=None if signs is None else _addresses(signs),
            sign_bytes=None if signs is None else _numels(signs),
            sign_slices=None if signs is None else [sign.shape[0] for sign in signs],
            exp_avg_sq_rows=_addresses(exp_avg_sq_rows),
            exp_avg_sq_cols=_addresses(exp_avg_sq_cols),
            new_sq_rows=_addresses(new_sq_rows),
            new_sq_cols=_addresses(new_sq_cols),
            blocks=blocks,
        )
        scalars = {"lr": lr, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "step": step}
        coupled = not decoupled_weight_decay
        self._launch(plan, params, scalars, {}, eps=eps, maximize=maximize, coupled=coupled, seed=seed)
        increment_version(params)

    def _launch(
        self, plan: Any, tensors: Tensors, scalars: dict[str, Scalar | None], given: dict[str, Tensor], **options: Any
    ) -> None:
        """Runs a plan on parts whose table is for this once. ``given`` lies on the device; scalars on the host that
        have one entry per parameter go there with the table, in the same copy, so that nothing waits for the device."""
        if not plan.table_bytes:
            return
        if self.platform.capturing():
            raise RuntimeError(
                "an op on parts of parameters brings its table from the host in every call, and cannot be part of the "
                "CUDA graph that is being captured. Step sharded parameters outside of graphs."
            )
        device = tensors[0].device
        end = -(-plan.table_bytes // 8) * 8
        found: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "beta1": 0.0, "beta2": 0.0}
        given, places = dict(given), {}
        for name, value in scalars.items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                found[name] = value
            elif not value.is_cpu:
                given[name] = value
            elif not value.ndim:
                found[name] = value.item()
            else:
                places[name] = value, end, end + 8 * value.numel()
                end = places[name][2]
        host = self.platform.host_table(end)
        table = torch.empty(end, dtype=torch.uint8, device=device)
        plan.write_table(host.data_ptr())
        for name, (value, first, last) in places.items():
            host[first:last].view(torch.float64).copy_(value)
            found[name] = table.data_ptr() + first, True, 1
        table.copy_(host, non_blocking=True)
        for name, value in given.items():
            given[name] = value.contiguous() if value.dtype in (torch.float32, torch.float64) else value.double()
            found[name] = given[name].data_ptr(), given[name].dtype == torch.float64, value.ndim
        workspace = torch.empty(max(plan.workspace_bytes, 1), dtype=torch.uint8, device=device)
        self.platform.before_launch(workspace)
        stream = self.platform.stream(device)
        plan.launch(
            table=table.data_ptr(),
            workspace=workspace.data_ptr(),
            counters=0,
            **({"eps": 0.0, "clip_threshold": None, "maximize": False, "coupled": False} | options | found),
            device=index_of(device),
            stream=getattr(stream, "cuda_stream", stream),
        )


_ops = Ops(Cuda())
UNSCALES = _ops.UNSCALES
STORES = _ops.STORES
bind = _ops.bind
hfac_sums = _ops.hfac_sums
hfac_apply_ = _ops.hfac_apply_
smmf_sums_step_ = _ops.smmf_sums_step_
