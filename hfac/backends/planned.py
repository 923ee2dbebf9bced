"""A plan of the CUDA kernels over tensors that stay, and the memory that its launches and the graphs of them use.

While a CUDA graph is captured no memory is allocated on the host: a step finds what earlier ones left, or is refused
before anything is launched.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..schedules import Scalar
from .cpu import _addresses, _codes, _strides

Tensors = Sequence[Tensor]


class Platform(Protocol):
    """Where kernels run: a module with `CudaStep` and `CudaParts`, and memory."""

    @property
    def native(self) -> Any: ...
    def l2_bytes(self, device: torch.device) -> int: ...

    #: the current one: its address, or an object that has it as ``cuda_stream``
    def stream(self, device: torch.device) -> Any: ...
    #: what is launched from now on waits for what has been launched on ``stream``
    def after(self, stream: Any, device: torch.device) -> None: ...
    #: the current one is another than the one that the tensors were made on
    def used_on_another_stream(self, tensors: Sequence[Tensor], device: torch.device) -> None: ...
    def capturing(self) -> bool: ...
    def host_table(self, nbytes: int) -> Tensor: ...
    def before_launch(self, workspace: Tensor) -> None: ...


class Planned:
    """A plan over tensors that stay where they are, with the memory on the device that its launches use.

    Launches follow each other on the device, whatever streams they are made on, because they share that memory; replays
    of a graph are ordered by whoever makes them, as they are for parameters and states.
    """

    def __init__(self, platform: Platform, device: torch.device, step: Any, shapes: list[tuple[int, ...]]) -> None:
        self.platform, self.device, self.step, self.shapes = platform, device, step, shapes
        self.table: Tensor | None = None
        self.stale = True  # the table is not the plan's
        self.source: Tensor | None = None  # on the host: what replays of a graph copy to the table, and no step has yet
        self.frozen: Tensor | None = None  # a table that is in a graph
        self.spare: Tensor | None = None  # on the host, for the table of the next graph
        self.workspace: Tensor | None = None
        self.counters: Tensor | None = None
        self.resolved: Tensors = []  # copies of gradients whose statistics have been taken
        self.stream: Any = None  # of the last launch
        #: What a CUDA graph reads in every replay, and nobody may change or free. Only captures add to it; whoever
        #: keeps this replaces the list by one of its own, which then outlives it.
        self.captured: list[Any] = []

    def launch(
        self,
        grads: Tensors,
        nonfinite: Tensor | None,
        *,
        lr: Scalar,
        beta1: Scalar | None,
        beta2: Scalar,
        eps: float,
        weight_decay: Scalar,
        clip_threshold: float | None = None,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        seed: int | None = None,
        step: Scalar | None = None,
        clip: Tensor | None = None,
        squares: Tensor | None = None,
        watched: Tensor | None = None,
    ) -> None:
        """The step or, with ``squares``, what the plan has before it. ``clip``: that has been launched."""
        taken = clip is not None and bool(self.resolved)
        resolved = self._look(self.resolved if taken else grads, nonfinite, clip_threshold)
        capturing = self.platform.capturing()
        stream = self.platform.stream(self.device)
        if capturing:
            self.check_room()
        elif stream != self.stream:
            self._follow(stream, squares)
        self._bring(capturing)
        assert self.table is not None and self.workspace is not None and self.counters is not None
        flags = None if nonfinite is None else nonfinite.contiguous()
        kept: list[Tensor] = []
        scalars = {
            name: self._scalar(value, kept)
            for name, value in (
                ("lr", lr),
                ("weight_decay", weight_decay),
                ("beta1", beta1),
                ("beta2", beta2),
                ("step", step),
            )
        }
        if clip is None:  # else it holds statistics
            self.platform.before_launch(self.workspace)
        given = {"nonfinite": flags, "grad_scale": grad_scale, "found_inf": found_inf, "clip": clip}
        given |= {"squares": squares, "watched": watched}
        self.step.launch(
            table=self.table.data_ptr(),
            workspace=self.workspace.data_ptr(),
            counters=self.counters.data_ptr(),
            **scalars,
            eps=eps,
            clip_threshold=clip_threshold,
            maximize=maximize,
            coupled=not decoupled_weight_decay,
            **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in given.items()},
            seed=seed,
            device=index_of(self.device),
            stream=getattr(stream, "cuda_stream", stream),
        )
        if nonfinite is not None and flags is not None and flags is not nonfinite:
            nonfinite.copy_(flags)
        copies: list[Tensor] = []
        if resolved is not grads:
            copies = [mine for mine, grad in zip(resolved, grads, strict=True) if mine is not grad]
        self.resolved = resolved if copies and squares is not None else []
        if capturing:
            self.captured += [self.table, self.source, self.workspace, self.counters, *given.values(), *kept, *copies]

    def capturing(self) -> bool:
        """Whether a graph is being captured, in whose replays what is launched now will run."""
        return self.platform.capturing()

    def workspace_bytes(self) -> int:
        """Bytes on the device that are kept from step to step: partial sums, and the table."""
        kept = (self.table, self.workspace, self.counters)
        return sum(tensor.numel() for tensor in kept if tensor is not None)

    def _look(self, grads: Tensors, nonfinite: Tensor | None, clip_threshold: float | None) -> Tensors:
        """Tells the plan what this step brings, and returns the gradients as the kernels read them."""
        strides = None
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.resolve_neg() for grad in grads]
            strides = _strides(grads)
        changed = self.step.prepare(
            grads=_addresses(grads),
            grad_dtypes=_codes(grads),
            shapes=None if strides is None else self.shapes,
            grad_strides=strides,
            clip=clip_threshold is not None,
            nonfinite=nonfinite is not None,
        )
        if changed:  # until the table is written, whatever may fail before
            self.stale, self.source = True, None
        return grads

    def check_room(self) -> None:
        """That a graph can be captured of what `_look` has seen.

        Raises:
            RuntimeError: memory on the host is needed.
        """
        if self.counters is None:
            raise RuntimeError(_refused("this is the first step on these tensors"))
        if self.stale and (self.spare is None or self.spare.numel() < self.step.table_bytes):
            why = "its gradients are not where the last step found them, or not of the same kind"
            raise RuntimeError(_refused(why))

    def _follow(self, stream: Any, *more: Tensor | None) -> None:
        """Goes on on another stream: after what the last one was given, and with memory that is not handed out again
        before both are done with it."""
        if self.stream is not None:
            self.platform.after(self.stream, self.device)
            mine = (self.table, self.workspace, self.counters, *more)
            self.platform.used_on_another_stream([tensor for tensor in mine if tensor is not None], self.device)
        self.stream = stream

    def _bring(self, capturing: bool) -> None:
        """The plan's table to the device, where it is not there, and the other memory."""
        nbytes = max(self.step.table_bytes, 1)
        if self.stale:
            if capturing:  # no memory on the host can be pinned during a capture
                host, self.spare = self.spare, None
                assert host is not None
            else:
                host = self.platform.host_table(nbytes)
            self.step.write_table(host.data_ptr())
            # What is copied in replays of a graph is not there for other steps, and must stay as it is.
            frozen = capturing or self.table is self.frozen
            if self.table is None or frozen or self.table.numel() < nbytes:
                self.table = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self.stale, self.source = False, host
        assert self.table is not None
        if self.source is not None:
            self.table[:nbytes].copy_(self.source[:nbytes], non_blocking=True)
        if capturing:
            self.frozen = self.table
        else:
            self.source = None
            if self.spare is None or self.spare.numel() < nbytes:
                self.spare = self.platform.host_table(nbytes)
            if self.counters is None:
                self.counters = torch.zeros(max(self.step.counter_bytes, 1), dtype=torch.uint8, device=self.device)
        wanted = max(self.step.workspace_bytes, 1)
        if self.workspace is None or self.workspace.numel() < wanted:
            self.workspace = torch.empty(wanted, dtype=torch.uint8, device=self.device)

    def _scalar(self, value: Scalar | None, kept: list[Tensor]) -> Any:
        """A number, or the address of a tensor on the device, which is not read here."""
        if not isinstance(value, Tensor):
            return value
        if value.dtype not in (torch.float32, torch.float64) or value.device != self.device:
            value = value.to(device=self.device, dtype=torch.float64)
        value = value.contiguous()
        kept.append(value)
        return value.data_ptr(), value.dtype == torch.float64, value.ndim


def _refused(why: str) -> str:
    return (
        f"a step cannot be part of the CUDA graph that is being captured: {why}, and what it needs on the host cannot "
        "be allocated during a capture. Take one step outside of graphs first, with gradients of the same types for "
        "the same parameters and with the same options. It serves one graph, or any number whose gradients lie where "
        "it found them."
    )


def index_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index
