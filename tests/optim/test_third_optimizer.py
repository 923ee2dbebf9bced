"""A third optimizer, added from outside of the package: its description, formulas and class, in the shared suites.

Adam's second moment as rank-1 factors, whole where a tensor is no matrix, and no first moment: of Adafactor what is
needed to show the way (docs/adding-an-optimizer.md).
"""

import sys
from unittest import mock

import pytest
import test_conformance as conformance
import test_state as state
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from hfac import matricize, schedules, spec
from hfac.backends import plain
from hfac.optim import options
from hfac.optim.base import FactoredOptimizer

NUMBERS = (
    *(spec.Number("lr", tensor=True), spec.Number("beta2", tensor=True, each=True), spec.Number("eps")),
    *(spec.Number("weight_decay", tensor=True), spec.Number("maximize", default=False)),
)
ROWS = spec.Operand("exp_avg_sq_rows", spec.ROWS, 2, "exp_avg_sq_row")
COLS = spec.Operand("exp_avg_sq_cols", spec.COLS, 2, "exp_avg_sq_col")
WHOLE = spec.Operand("exp_avg_sqs", spec.WHOLE, 2, "exp_avg_sq")
STEP = spec.Op("third_step_", (ROWS, COLS), NUMBERS, matrix="cut")
DENSE_STEP = spec.Op("third_dense_step_", (WHOLE,), NUMBERS)
THIRD = spec.Algorithm(
    "third",
    (STEP, DENSE_STEP),
    (),  # no ops on shards: sharded parameters are refused
    ("beta2", "eps"),
    lambda step, options: {"beta2": schedules.hfac_decay(step, options["beta2"])},
    lambda options: {"eps": options["eps"]},
)


def third_step_(params, grads, exp_avg_sq_rows, exp_avg_sq_cols, nonfinite=None, *, beta2, eps, **update):
    for i, (p, g, r, s) in enumerate(zip(params, grads, exp_avg_sq_rows, exp_avg_sq_cols, strict=True)):
        if p.numel():
            G, b2 = g.to(r.dtype).reshape(r.numel(), s.numel()), beta2[i] if getattr(beta2, "ndim", 0) else beta2
            r.mul_(b2).add_((1 - b2) * (G * G + eps).sum(1).view_as(r))
            s.mul_(b2).add_((1 - b2) * (G * G + eps).sum(0).view_as(s))
            move(p, G * (r.sum() / r.view(-1, 1) / s.view(1, -1)).sqrt(), **update)


def third_dense_step_(params, grads, exp_avg_sqs, nonfinite=None, *, beta2, eps, **update):
    for i, (p, g, q) in enumerate(zip(params, grads, exp_avg_sqs, strict=True)):
        G, b2 = g.to(q.dtype), beta2[i] if getattr(beta2, "ndim", 0) else beta2
        q.mul_(b2).add_((1 - b2) * (G * G + eps))
        move(p, G / q.sqrt(), **update)


def move(param, direction, lr, weight_decay, maximize):
    wide, sign = param.to(direction.dtype), -1 if maximize else 1
    param.copy_(wide - lr * (sign * direction.view_as(wide) + weight_decay * wide))


class Third(FactoredOptimizer):
    _algorithm, _own_option = "third", "beta2"
    _rules = {"beta2": options.number(0.0, 1.0, open_high=True), "eps": options.number(0.0, open_low=True)}

    def __init__(self, params, lr=1e-3, beta2=0.999, eps=1e-30, weight_decay=0.0, **common):
        rest = dict(dense=False, batch_dims=0, views=1, views_dim=0, maximize=False, capturable=False, backend="auto")
        rest |= dict(nonfinite="propagate", amp_scaling=False, rounding="nearest", seed=0, master=None)
        rest |= dict(max_grad_norm=None, watch=False)
        super().__init__(params, dict(lr=lr, beta2=beta2, eps=eps, weight_decay=weight_decay, **(rest | common)))

    def _sides(self, shape, group):
        k, dims = matricize.cut(shape, "balanced"), tuple(range(len(shape)))
        return None if k is None else ((shape[:k], dims[:k]), (shape[k:], dims[k:]))


plain.FORMULAS.add(sys.modules[__name__])


@pytest.fixture(autouse=True)
def registered():
    with mock.patch.dict(spec.ALGORITHMS), mock.patch.dict(spec.OPS):
        spec.register(THIRD)
        yield


OPTIONS = dict(lr=0.02, beta2=0.95, eps=1e-12, weight_decay=0.1)
CONFORM = "group_added_in_the_middle one_tensor_is_a_group closure no_gradient_is_no_step gradients_are_not_written"
CONFORM += " mixed_types_in_one_optimizer parameters_that_skip_steps_count_their_own maximize_equals_negated_gradients"
CONFORM += " decoupled_weight_decay_shrinks_the_parameter state_dict_is_the_same_twice_and_for_a_twin"
STATE = "loading_own_live_state_dict execution_options_stay swapped_for_as_many_others nothing_is_kept_alive"


@pytest.mark.parametrize(
    "suite, name", [(s, n) for s, names in ((conformance, CONFORM), (state, STATE)) for n in names.split()]
)
def test_it_passes_the_shared_suites(suite, name, monkeypatch):
    monkeypatch.setitem(suite.OPTIONS, Third, OPTIONS)
    getattr(suite, f"test_{name}")(Third)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_goes_on(dtype, monkeypatch):
    monkeypatch.setitem(state.OPTIONS, Third, OPTIONS)
    state.test_resumed_run_equals_uninterrupted_run(Third, {}, dtype)


def test_sharded_parameters_are_refused():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(ValueError, match="is sharded, which third does not support"):
            Third([Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))])
    finally:
        dist.destroy_process_group()
