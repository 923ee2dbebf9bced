"""Diagnostics of SMMF after a step that was not watched are estimates in places. They are deprecated: they warn there,
and nowhere else."""

import warnings

import pytest
from running import VARIANTS, gradients, parameters, train
from test_diagnostics import SHAPES, estimated

from hfac import SMMF, HFac

DEPRECATED = r"estimate is deprecated.* watch=True.* diagnostics\(ahead=True\)"


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_estimates_warn_and_exact_metrics_do_not(cls, options):
    """By parameter, through the call that Composer makes."""
    params = parameters(SHAPES)
    optimizer = cls(params, **options)
    train(optimizer, params, 2)
    for param in params:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert "update_rms/w" in optimizer.report_per_parameter_metrics(param, "w", {})
        wanted = [FutureWarning] if estimated(cls, param, options, ahead=False) else []
        assert [warning.category for warning in caught] == wanted, param.shape


def test_one_warning_for_all_parameters_names_the_caller():
    params = parameters(SHAPES)
    optimizer = SMMF(params)
    train(optimizer, params, 1)
    with pytest.warns(FutureWarning, match=DEPRECATED) as caught:
        assert len(optimizer.diagnostics()) == len(params)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("options", [{"watch": True}, {"beta": None}, {"dense": True}], ids=str)
def test_what_is_exact_is_silent(options):
    params = parameters(SHAPES)
    optimizer = SMMF(params, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 1)
        gradients(params, 1)
        assert optimizer.diagnostics(ahead=True).keys() == optimizer.diagnostics().keys()


def test_hfac_is_silent():
    params = parameters(SHAPES)
    optimizer = HFac(params)
    train(optimizer, params, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.diagnostics()
