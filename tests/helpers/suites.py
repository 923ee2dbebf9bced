"""What the suites over backends share: which backends there are, how tensors may lie in memory, how parameters may be
stored, and an op in the middle of a run."""

from dataclasses import dataclass

import calls
import emulated
import torch
from cases import gradient

from hfac import backends, matricize, ops, rounding, spec
from hfac.signs import pack_signs

#: Those of tensors on the CPU. Triton's kernels are one where they are interpreted: tests/backends/test_triton.py runs
#: suites once more with TRITON_INTERPRET=1.
BACKENDS = [*backends.available(torch.device("cpu")), emulated.NAME]
KERNELS = [name for name in BACKENDS if name != "reference"]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def same(a, b):
    """To the bit, but for the bits of a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    either = a.isnan() | b.isnan()
    bits = [x.contiguous().view(ints).masked_fill(either, 0) for x in (a, b)]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


def laid_out(values, how):
    """The same elements elsewhere in memory, between NaN (zeros, of whole numbers) where there is anything between."""
    shape, filler = tuple(values.shape), float("nan") if values.is_floating_point() else 0
    if how == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if how in ("transposed", "permuted"):  # the last two dimensions, or all
        order = [*range(values.ndim)]
        order = order[::-1] if how == "permuted" else [*order[:-2], *order[:-3:-1]]
        return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if how == "shifted":  # off any vector's boundary
        found = values.new_full((values.numel() + 1,), filler)[1:].view(shape)
    elif how == "padded":
        found = values.new_full((*shape[:-1], shape[-1] + 3), filler)[..., 1:-2]
    else:
        assert how == "every second"
        found = values.new_full((*shape[:-1], 2 * shape[-1]), filler)[..., ::2]
    return found.copy_(values)


@dataclass(frozen=True)
class Kind:
    """How parameters are stored, and the accesses of the aligned ones with bfloat16 and with float gradients."""

    dtype: torch.dtype = BF16
    low: torch.dtype | None = None
    drawn: bool = False
    bulk: tuple[str, str] = ("any stored", "any stored")


KINDS = {
    "stochastic": Kind(drawn=True, bulk=("bfloat16 drawn", "bfloat16 drawn/float32")),
    "float16": Kind(F16, drawn=True),
    "split": Kind(low=torch.int16, bulk=("bfloat16+int16", "bfloat16+int16/float32")),
    "split stochastic": Kind(low=torch.int16, drawn=True, bulk=("bfloat16+int16", "bfloat16+int16/float32")),
    "split8": Kind(low=torch.int8, bulk=("bfloat16+int8", "bfloat16+int8/float32")),
    "split8 stochastic": Kind(low=torch.int8, drawn=True, bulk=("bfloat16+int8", "bfloat16+int8/float32")),
}
OPS = ["hfac_step_", "hfac_dense_step_", "smmf_step_", "smmf_dense_step_"]
#: With those of which only some backends have kernels: a test of an ``op`` and the fixture `backend` skips the others.
ALL_OPS = [*OPS, "hfac_int8_step_"]
#: That begin with a read of the gradients.
TWICE = ["hfac_step_", "hfac_int8_step_"]


#: Of a parameter its shape, its type, its gradient's, and how both lie: several tiles of rows and of columns, rows that
#: are read twice, odd ones, one row, nothing.
SEVERAL = [
    ((16, 24), F32, F32, "contiguous"),
    ((70, 300), F32, F32, "contiguous"),
    ((3, 4100), F32, F32, "contiguous"),
    ((5, 7), F32, F32, "contiguous"),
    ((16, 24), BF16, BF16, "contiguous"),
    ((12, 16), BF16, F32, "contiguous"),
    ((9, 10), F16, F16, "contiguous"),
    ((16, 24), F64, F64, "contiguous"),
    ((6, 8), F32, F64, "contiguous"),
    ((16, 24), F32, F32, "transposed"),
    ((11, 8), F32, F32, "padded"),
    ((4, 3, 8, 5), F32, BF16, "permuted"),
    ((130, 7), F32, F32, "every second"),
    ((24, 16), F32, F32, "shifted"),
    ((300, 20), F32, F32, "contiguous"),
    ((0, 5), F32, F32, "contiguous"),
]
#: Those that are a tile each: Triton's interpreter takes a while for more.
SMALLER = [case for case in SEVERAL if torch.Size(case[0]).numel() < 500]


def cases(shapes, dtype=F32, grad_dtype=None, how="contiguous"):
    return [(shape, dtype, grad_dtype or dtype, how) for shape in shapes]


class Run:
    """An op in the middle of a run: parameters, gradients and states that are the same every time.

    Args:
        cases: as in `SEVERAL`.
        kind: how parameters are stored; their type is that of the cases.
        first: False without a first moment.
    """

    def __init__(self, op, cases, backend, *, kind=None, first=True, device="cpu"):
        self.op, self.cases, self.device = op, cases, device
        self.numbers = dict(lr=0.02, weight_decay=0.1, beta1=0.75 if first else None, beta2=0.5, maximize=True)
        if op.startswith("hfac"):
            self.numbers |= dict(eps=1e-12, clip_threshold=0.7)
        else:
            self.numbers |= dict(eps=1e-6, decoupled_weight_decay=False)
        self.params = [laid_out(gradient(s, i, dtype).to(device), how) for i, (s, dtype, _, how) in enumerate(cases)]
        self.states = {name: [] for name in calls.STATES[op] if first or "sq" in name}
        for i, (shape, dtype, *_) in enumerate(cases):
            for k, (name, states) in enumerate(self.states.items()):
                states.append(self._state(name, shape, 150 + 10 * k + i, ops.state_dtype(dtype)).to(device))
        given, places = dict(self.states), None
        if kind is not None and kind.low is not None:
            pieces = [rounding.split(p.float() * 1.001, kind.low) for p in self.params]
            for param, (high, _) in zip(self.params, pieces, strict=True):
                param.copy_(high)
            lows = [laid_out(low, how) for (_, low), (*_, how) in zip(pieces, cases, strict=True)]
            given[spec.MASTER_LOW.name] = lows
        if kind is not None and kind.drawn:
            places = [rounding.BitOffset(3 * i) for i in range(len(cases))]
            self.numbers |= dict(seed=5, step=3.0)
        self.lows = given.get(spec.MASTER_LOW.name)
        self.call = ops.OpCall(op, self.params, given, places=places, backend=backend)

    def _state(self, name, shape, seed, dtype):
        if name == "exp_avg_signs":
            signs = gradient(shape, seed, F32) > 0
            packed = torch.zeros(matricize.sign_shape(shape), dtype=torch.uint8)
            return pack_signs(signs) if signs.numel() else packed
        size = shape if "dense" in self.op else (self.sides(shape)["cols" in name],)
        if name == "exp_avg_qs":
            return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
        values = gradient(size, seed, dtype)
        return values.abs() + 1e-3 if "sq" in name or self.op == "smmf_step_" else values

    def sides(self, shape):
        """Rows and columns of the matrix."""
        if self.op == "smmf_step_":
            numel = torch.Size(shape).numel()
            return shape if len(shape) == 2 and shape[0] >= shape[1] else matricize.square(numel) if numel else (1, 0)
        k = matricize.cut(shape) or 1
        return torch.Size(shape[:k]).numel(), torch.Size(shape[k:]).numel()

    def grads(self, t=0):
        return [
            laid_out(gradient(shape, 50 + 100 * t + i, dtype).to(self.device), how)
            for i, (shape, _, dtype, how) in enumerate(self.cases)
        ]

    def flags(self):
        return torch.full((len(self.params),), 7, dtype=torch.int32, device=self.device)

    def step(self, grads, flags=None, *, clip=None, norm=False, **numbers):
        """A step, with ``clip`` of gradients multiplied by it; with ``norm`` their statistics are taken before, which
        are returned."""
        inputs = self.call.prepare(grads, flags, **self.numbers | numbers)
        found = self.call.statistics(inputs) if norm else None
        self.call.apply(inputs, found, clip)
        return found

    def everything(self):
        return [*self.params, *(self.lows or []), *(t for tensors in self.states.values() for t in tensors)]

    def kept(self):
        return [tensor.clone() for tensor in self.everything()]

    def agrees(self, other):
        """Whether every bit is another run's, or a list's."""
        other = other if isinstance(other, list) else other.everything()
        return all(map(same, self.everything(), other))
