"""The parity gate: an op is timed only after it has agreed with the reference, in this run and on this machine."""

import torch
from torch.nn import Parameter

from bench.contestants import defaults, op_operands, op_scalars, optimizer_of
from bench.shapes import Shape, cases
from hfac import ops, parity

STEPS = 3
#: The tests' hostile shapes, and one that is large enough for several threads and chunks.
SHAPES: list[Shape] = [*cases.SHAPES, (520, 1030)]


def why_red(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None if the op of this backend agrees with the reference over three steps, each from the reference's state, on
    the hostile shapes and with no option at its neutral value; else where it does not."""
    options = defaults(optimizer_of(op), **cases.OPTIONS[optimizer_of(op)]["all"])
    params = [Parameter(cases.gradient(shape, 0, dtype).to(device)) for shape in SHAPES]
    theirs, states = op_operands(op, params)
    ours = [param.detach().clone() for param in theirs]
    twins = {name: [tensor.clone() for tensor in tensors] for name, tensors in states.items()}
    for step in range(1, STEPS + 1):
        grads = [cases.gradient(tuple(param.shape), step, dtype).to(device) for param in theirs]
        before = [param.detach().clone() for param in theirs]
        old = {name: [tensor.clone() for tensor in tensors] for name, tensors in states.items()}
        for mine, reference in [(ours, before), *((twins[name], old[name]) for name in old)]:
            for target, source in zip(mine, reference, strict=True):
                target.copy_(source)
        scalars = op_scalars(op, float(step), options)
        with torch.no_grad():
            ops.run(op, theirs, grads, **states, **scalars, backend="reference")
            try:
                ops.run(op, ours, grads, **twins, **scalars, backend=backend)
            except Exception as error:  # whatever it raises, it has not computed the step
                return f"step {step} raised {type(error).__name__}: {error}"
        for i, param in enumerate(theirs):
            was = {_key(name): tensors[i] for name, tensors in old.items()}
            wrong = parity.param_difference(ours[i], param.detach(), before[i])
            for name in states:
                pair = twins[name][i], states[name][i]
                wrong = wrong or parity.state_difference(_key(name), *pair, was, grads[i], scalars["beta1"])
            if wrong:
                return f"step {step}, shape {cases.shape_id(tuple(param.shape))}: {wrong}"
    return None


def _key(name: str) -> str:
    """The state's key for the name of an op's list."""
    return name.removesuffix("s")
