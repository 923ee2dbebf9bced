"""Names optimizers by the keys of their state and options, to say what a state dict is that `hfac.convert` refuses."""

from collections.abc import Hashable
from typing import NamedTuple

_FRESH = (
    "Start the new optimizer without a state: a warmup of some hundred steps makes up for it, as at the start of any "
    "training."
)
_NOT_AVERAGES = f"Its state is no average of gradients and of their squares. {_FRESH}"
_NO_SECOND = f"It has no second moment. {_FRESH}"
_OWN_UNITS = f"Its moments are in units of the step size that it has found. {_FRESH}"


class _Stranger(NamedTuple):
    """Whose state has these keys, while its group has these options; why it is refused, and what to do."""

    name: str
    keys: set[str]
    options: set[str]
    why: str


_NORMALIZED = f"Its first moment averages gradients that are divided by their second moment already. {_FRESH}"
_KNOWN = (
    _Stranger("Prodigy", {"s"}, {"d", "d0", "d_coef"}, _OWN_UNITS),
    _Stranger("D-Adaptation", set(), {"d", "k"}, _OWN_UNITS),
    _Stranger("ADOPT", {"exp_avg", "exp_avg_sq"}, {"clip_lambda"}, _NORMALIZED),
    _Stranger("ADOPT", {"exp_avg", "exp_avg_sq"}, {"clip_exp"}, _NORMALIZED),
    _Stranger("LaProp", {"exp_avg_lr_1"}, set(), _NORMALIZED),
    _Stranger("Yogi", {"exp_avg", "exp_avg_sq"}, {"initial_accumulator"}, f"Its second moment is no average. {_FRESH}"),
    _Stranger(
        "bitsandbytes",
        {"state1"},
        set(),
        "It keeps moments as state1 and state2, in 8 bits as codes with tables beside them. Give convert a state dict "
        "with AdamW's options, 'step', and in the place of the two 'exp_avg' and 'exp_avg_sq', to which "
        "bitsandbytes.functional.dequantize_blockwise turns codes.",
    ),
    _Stranger("torch.optim.Adamax", {"exp_inf"}, set(), _NOT_AVERAGES),
    _Stranger("torch.optim.Adadelta", {"square_avg", "acc_delta"}, set(), _NOT_AVERAGES),
    _Stranger("torch.optim.RMSprop", {"square_avg"}, set(), f"It has no first moment. {_FRESH}"),
    _Stranger("torch.optim.Adagrad", {"sum"}, {"lr_decay"}, _NOT_AVERAGES),
    _Stranger("torch.optim.Rprop", {"prev"}, {"etas"}, _NOT_AVERAGES),
    _Stranger("torch.optim.ASGD", {"eta", "mu"}, set(), _NOT_AVERAGES),
    _Stranger("Muon", {"momentum_buffer"}, {"ns_steps"}, _NO_SECOND),
    _Stranger("SGD", {"momentum_buffer"}, set(), _NO_SECOND),
    _Stranger("schedule-free AdamW", {"z", "exp_avg_sq"}, set(), f"It has no first moment. {_FRESH}"),
    _Stranger("AdaBelief", {"exp_avg", "exp_avg_var"}, set(), f"Its second moment is that of differences. {_FRESH}"),
    _Stranger("SOAP", {"GG"}, set(), f"Its moments are in a basis of its own. {_FRESH}"),
    _Stranger("CAME", {"exp_avg_res_row"}, set(), f"Its first moment averages updates. {_FRESH}"),
    _Stranger("Sophia", {"exp_avg", "hessian"}, set(), f"It has a Hessian's diagonal as second moment. {_FRESH}"),
)
_ADAM = {"exp_avg", "exp_avg_sq", "step"}


def refusal(key: Hashable, names: set[str], options: set[str]) -> str:
    """Why the state of a parameter with the keys ``names``, in a group with ``options``, is not converted, and what to
    do; one or more sentences."""
    where = f"the state of parameter {key!r}"
    for stranger in _KNOWN:
        if stranger.keys <= names and stranger.options <= options:
            return f"{where} is that of {stranger.name}. {stranger.why}"
    if "exp_avg" in names and names <= {"exp_avg", "step"}:
        return f"{where} is that of Lion, or of another optimizer of one moment. {_NO_SECOND}"
    if names == {"exp_avg", "exp_avg_sq"}:
        return f"{where} has Adam's moments, but no 'step', which Apex keeps in the group. Add it to every state."
    if names > _ADAM:
        return (
            f"{where} has Adam's keys and {sorted(names - _ADAM)} besides: another optimizer's, or those of a wrapper "
            "around Adam. If Adam made the rest, take them out of every state."
        )
    return f"{where} has the keys {sorted(names)} and its group {sorted(options)}: none of the sources. {_FRESH}"
