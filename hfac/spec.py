"""Every op described once, as data: its lists of tensors, its numbers, and the algorithms that are made of ops.

Validation (`hfac.ops`), what backends are handed, the functional forms' lists and the keys of ``optimizer.state`` are
read off this; a test compares it with the signatures of `hfac.reference`. A new factored optimizer begins with an
`Algorithm` here, or in a module of its own that calls `register` (docs/adding-an-optimizer.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import schedules

#: Sizes of a list's entries: one number per row or column of the parameter's matrix; the parameter's own shape; sign
#: bits (`hfac.matricize.sign_shape`).
ROWS, COLS, WHOLE, SIGNS = "rows", "cols", "whole", "signs"
#: Numbers that a watched step adds up of each parameter (``watched`` of `hfac.reference`).
WATCHED = 5
#: Stands for "no default".
REQUIRED: Any = object()


@dataclass(frozen=True)
class Operand:
    """A list of tensors with one entry per parameter, beside parameters and gradients.

    Attributes:
        name: of the list, "exp_avg_rows".
        size: of an entry: `ROWS`, `COLS`, `WHOLE` or `SIGNS`.
        moment: 1 or 2 of what belongs to the first or second moment; 0 otherwise. An op whose ``beta1`` may be None
            goes without the lists of the first moment then.
        key: of a state, its key in ``optimizer.state``; None for sums, which live for one step.
        dtype: of every entry; None: the arithmetic's, float32, or float64 for float64 parameters.
        optional: may be None, together with all others that may.
        least: of whole numbers, the least that a step writes; None: any that the dtype has.
    """

    name: str
    size: str
    moment: int = 0
    key: str | None = None
    dtype: torch.dtype | None = None
    optional: bool = False
    least: int | None = None


@dataclass(frozen=True)
class Number:
    """A scalar of an op.

    Attributes:
        tensor: may be a 0-d tensor, which may lie on the device.
        each: may also be a 1-d tensor with one entry per parameter.
        none: may be None.
        default: what `hfac.ops` takes where it is not given; `REQUIRED`: it must be.
    """

    name: str
    tensor: bool = False
    each: bool = False
    none: bool = False
    default: Any = REQUIRED


@dataclass(frozen=True, eq=False)
class Op:
    """What one call needs. It is computed by the function of the same name in `hfac.reference`, whose arguments are, in
    this order: params (where the op ``updates`` them), grads, ``operands``, ``vectors``; by name ``counts`` and
    ``numbers``; and what `outputs` and `storage` name.

    Attributes:
        vectors: tensors with one number per parameter.
        counts: sequences on the host with one entry per parameter.
        matrix: how the parameter is seen as rows and columns: "cut" (`hfac.matricize.cut`: H-Fac), "square"
            (`hfac.matricize.square`: SMMF), or None: in any way whose rows times columns are its elements.
        updates: whether parameters are written; else the op only sums up gradients.
        reads_twice: whether a step begins with a read of the gradients from whose sums their norms are known, so that a
            backend may take these first (`hfac.ops.OpCall.statistics`).
        shard: whether the op takes shards, the pieces of parameters that one rank has.
        shard_vectors: ``vectors`` that may be given by name, where the parameters are shards.
        chosen_by: options that a group must have for the op to be taken, each with its value; () where others decide.
    """

    name: str
    operands: tuple[Operand, ...]
    numbers: tuple[Number, ...]
    matrix: str | None = None
    vectors: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    updates: bool = True
    reads_twice: bool = False
    shard: bool = False
    shard_vectors: tuple[str, ...] = ()
    chosen_by: tuple[tuple[str, Any], ...] = ()

    @property
    def states(self) -> tuple[Operand, ...]:
        return tuple(operand for operand in self.operands if operand.key is not None)

    @property
    def storage(self) -> tuple[str, ...]:
        """Arguments that say how parameters are stored (`hfac.rounding`)."""
        return (MASTER_LOW.name, "places", "seed", "step") if self.updates else ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is filled beside parameters and states, where it is given."""
        if self.shard:
            return ("watched",) if self.updates else ()
        return "nonfinite", "watched"

    @property
    def without_first(self) -> bool:
        """Whether the op can go without a first moment: its beta1 may be None."""
        return any(number.name == "beta1" and number.none for number in self.numbers)

    def operand(self, moment: int, size: str) -> Operand | None:
        """The state of this moment and size; None where there is none."""
        return next((state for state in self.states if (state.moment, state.size) == (moment, size)), None)


@dataclass(frozen=True, eq=False)
class Algorithm:
    """An optimizer's ops, and its numbers of a step.

    Attributes:
        name: of the functional form.
        ops: on whole parameters, each for another layout of state; a parameter takes the one whose states it has.
        shard_ops: on shards; () where sharded parameters are refused.
        options: of the functional form, beside lr, weight_decay and maximize.
        decays: (step t, options) -> beta1 and beta2.
        scalars: (options) -> the ops' other numbers, but for lr, weight_decay and maximize.
        has_first: (options) -> whether there is a first moment.
        takes_steps: whether ``decays`` takes `schedules.Steps` in place of a tensor of the device's numbers of steps.
        decay_rule: (options) -> the rule of ``decays``, for what finds them in memory that stays from step to step
            (`hfac.ops.StepCounts`, and kernels); None: there is no such rule.
    """

    name: str
    ops: tuple[Op, ...]
    shard_ops: tuple[Op, ...]
    options: tuple[str, ...]
    decays: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    scalars: Callable[[Mapping[str, Any]], dict[str, Any]]
    has_first: Callable[[Mapping[str, Any]], bool] = lambda options: True
    takes_steps: bool = False
    decay_rule: Callable[[Mapping[str, Any]], schedules.DecayRule] | None = None

    def constants(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A step's numbers that its number does not change."""
        rates = {name: schedules.as_scalar(name, options[name]) for name in ("lr", "weight_decay")}
        return {**self.scalars(options), "maximize": options["maximize"], **rates}

    @property
    def states(self) -> tuple[Operand, ...]:
        """States of all ops, in the order of the functional form's lists and of ``optimizer.state``."""
        return tuple(dict.fromkeys(state for op in self.ops for state in op.states))

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of ``optimizer.state``, but for those that all optimizers have."""
        return tuple(state.key for state in self.states if state.key is not None)

    def op_for(self, factored: bool, options: Mapping[str, Any]) -> Op:
        """The op of parameters in a group with these options, seen as matrices or kept whole."""
        return next(op for op in chosen(self.ops, options) if (op.matrix is not None) == factored)

    def op_of(self, present: Sequence[str]) -> Op:
        """The op that takes the most of the lists (or keys) in ``present``; the first of those that take as many."""
        return max(self.ops, key=lambda op: sum(s.name in present or s.key in present for s in op.states))


def chosen(ops: Sequence[Op], options: Mapping[str, Any]) -> list[Op]:
    """Those that a group with these options may take."""
    return [op for op in ops if all(options[name] == value for name, value in op.chosen_by)]


#: What a bfloat16 parameter lacks of its master weight: int16 or int8 of its shape (`hfac.rounding`).
MASTER_LOW = Operand("master_lows", WHOLE, key="master_low")


def _state(key: str, size: str, moment: int, dtype: torch.dtype | None = None) -> Operand:
    return Operand(f"{key}s", size, moment, key, dtype)


_SECOND = _state("exp_avg_sq_row", ROWS, 2), _state("exp_avg_sq_col", COLS, 2)
_FIRST = _state("exp_avg_row", ROWS, 1), _state("exp_avg_col", COLS, 1)
_SIGNS = _state("exp_avg_sign", SIGNS, 1, torch.uint8)
_DENSE = _state("exp_avg", WHOLE, 1), _state("exp_avg_sq", WHOLE, 2)
_CODES = Operand("exp_avg_qs", WHOLE, 1, "exp_avg_q", torch.int8, least=-127)

_LR, _WEIGHT_DECAY = Number("lr", tensor=True), Number("weight_decay", tensor=True)
_BETA1, _BETA2 = (Number(name, tensor=True, each=True) for name in ("beta1", "beta2"))
_EPS, _CLIP, _MAXIMIZE = Number("eps"), Number("clip_threshold", none=True), Number("maximize", default=False)
_HFAC = (_LR, _BETA1, _BETA2, _EPS, _CLIP, _WEIGHT_DECAY, _MAXIMIZE)
_SMMF = (
    _LR,
    Number("beta1", tensor=True, each=True, none=True),
    _BETA2,
    _EPS,
    _WEIGHT_DECAY,
    Number("decoupled_weight_decay", default=True),
    _MAXIMIZE,
)

HFAC_STEP = Op(
    "hfac_step_",
    (*_FIRST, *_SECOND),
    _HFAC,
    matrix="cut",
    reads_twice=True,
    chosen_by=(("first_moment", "factored"),),
)
HFAC_INT8_STEP = Op(
    "hfac_int8_step_",
    (_CODES, *_SECOND),
    _HFAC,
    matrix="cut",
    reads_twice=True,
    chosen_by=(("first_moment", "int8"),),
)
HFAC_DENSE_STEP = Op("hfac_dense_step_", _DENSE, _HFAC, shard_vectors=("mean_squares",))
HFAC_SUMS = Op(
    "hfac_sums",
    (
        *(Operand(name, ROWS) for name in ("old_rows", "row_sums", "new_rows")),
        *(Operand(name, COLS, optional=True) for name in ("col_sums", "col_squares", "col_ratios")),
    ),
    (_BETA2, _EPS),
    counts=("cols",),
    updates=False,
    shard=True,
)
HFAC_APPLY = Op(
    "hfac_apply_",
    (
        *(*_FIRST, *_SECOND),
        *(Operand(name, ROWS) for name in ("row_sums", "new_rows")),
        *(Operand(name, COLS) for name in ("col_sums", "new_cols")),
    ),
    (_LR, _BETA1, _CLIP, _WEIGHT_DECAY, _MAXIMIZE),
    vectors=("totals", "mean_squares"),
    counts=("rows", "cols"),
    shard=True,
    chosen_by=HFAC_STEP.chosen_by,
)
HFAC_INT8_APPLY = Op(
    "hfac_int8_apply_",
    (_CODES, *_SECOND, Operand("new_rows", ROWS), Operand("new_cols", COLS)),
    (_LR, _BETA1, _CLIP, _WEIGHT_DECAY, _MAXIMIZE),
    vectors=("old_totals", "totals", "mean_squares"),
    shard=True,
    chosen_by=HFAC_INT8_STEP.chosen_by,
)
SMMF_STEP = Op("smmf_step_", (*_FIRST, _SIGNS, *_SECOND), _SMMF, matrix="square")
SMMF_DENSE_STEP = Op("smmf_dense_step_", _DENSE, _SMMF)
SMMF_SUMS_STEP = Op(
    "smmf_sums_step_",
    (
        *(*_FIRST, _SIGNS, *_SECOND),
        *(Operand("new_rows", ROWS, 1), Operand("new_cols", COLS, 1)),
        *(Operand("new_sq_rows", ROWS, 2), Operand("new_sq_cols", COLS, 2)),
    ),
    _SMMF,
    counts=("blocks",),
    shard=True,
)


def _hfac_decays(step: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    beta1, beta2 = schedules.hfac_decays(step, (options["beta1"], options["beta2"]))
    return {"beta1": beta1, "beta2": beta2}


def _hfac_rule(options: Mapping[str, Any]) -> schedules.DecayRule:
    return schedules.DecayRule("hfac", options["beta1"], options["beta2"], 0.0)


def _hfac_scalars(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"eps": options["eps"], "clip_threshold": options["clip_threshold"]}


def _smmf_decays(step: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    beta = options["beta"]
    return {
        "beta1": None if beta is None else schedules.smmf_decay_first(step, beta, options["growth_rate"]),
        "beta2": schedules.smmf_decay_second(step, options["decay_rate"]),
    }


def _smmf_rule(options: Mapping[str, Any]) -> schedules.DecayRule:
    beta = options["beta"]
    return schedules.DecayRule("smmf", 0.0 if beta is None else beta, options["decay_rate"], options["growth_rate"])


def _smmf_scalars(options: Mapping[str, Any]) -> dict[str, Any]:
    mode = options["weight_decay_mode"]
    if mode not in ("adamw", "adam"):
        raise ValueError(f"weight_decay_mode must be 'adamw' or 'adam', got {mode!r}")
    return {"eps": options["eps"], "decoupled_weight_decay": mode == "adamw"}


ALGORITHMS: dict[str, Algorithm] = {}
#: Ops by name.
OPS: dict[str, Op] = {}


def register(algorithm: Algorithm) -> None:
    """Makes an algorithm and its ops known by their names."""
    ALGORITHMS[algorithm.name] = algorithm
    OPS.update({op.name: op for op in (*algorithm.ops, *algorithm.shard_ops)})


register(
    Algorithm(
        "hfac",
        (HFAC_STEP, HFAC_DENSE_STEP, HFAC_INT8_STEP),
        (HFAC_SUMS, HFAC_APPLY, HFAC_INT8_APPLY),
        ("beta1", "beta2", "eps", "clip_threshold"),
        _hfac_decays,
        _hfac_scalars,
        takes_steps=True,
        decay_rule=_hfac_rule,
    )
)
register(
    Algorithm(
        "smmf",
        (SMMF_STEP, SMMF_DENSE_STEP),
        (SMMF_SUMS_STEP,),
        ("beta", "eps", "decay_rate", "growth_rate", "weight_decay_mode"),
        _smmf_decays,
        _smmf_scalars,
        lambda options: options["beta"] is not None,
        takes_steps=True,
        decay_rule=_smmf_rule,
    )
)
