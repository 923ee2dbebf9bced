"""Diagnostics as a person reads them: text, HTML, a picture."""

import math
import re

import pytest
import torch
from torch import nn

import hfac
from hfac.optim.table import Diagnostics


@pytest.fixture
def found():
    """Of a step of a matrix, a vector and a stack of two matrices with a name that HTML must escape."""
    torch.manual_seed(0)
    params = [("weight", nn.Parameter(torch.randn(8, 6))), ("bias", nn.Parameter(torch.randn(6)))]
    optimizer = hfac.HFac(params, lr=1e-3, watch=True)
    stack = nn.Parameter(torch.randn(2, 4, 4))
    optimizer.add_param_group({"params": [("experts<up>", stack)], "batch_dims": 1})
    for param in [*(param for _, param in params), stack]:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer.diagnostics()


def test_they_are_a_dict_of_dicts_of_tensors_as_before(found):
    assert isinstance(found, dict) and list(found) == ["weight", "bias", "experts<up>"]
    assert found["experts<up>"]["update_rms"].shape == (2,)
    assert repr(found).startswith("{")


def test_text_has_a_row_for_each_slice_and_the_numbers_themselves(found):
    head, line, *rows = str(found).splitlines()
    assert head.split() == ["parameter", *found["weight"]]
    assert [row.split()[0] for row in rows] == ["weight", "bias", "experts<up>[0]", "experts<up>[1]"]
    assert len({len(row) for row in (head, line, *rows)}) == 1, "columns are not aligned"
    column = head.split().index("update_rms")
    for row, value in zip(rows[2:], found["experts<up>"]["update_rms"].tolist(), strict=True):
        assert float(row.split()[column]) == pytest.approx(value, rel=0.01)


def test_html_escapes_names_and_bars_are_of_the_columns_largest(found):
    found["weight"]["unmoved"] = torch.tensor(0.25)
    found["bias"]["update_rms"] = 4 * found["weight"]["update_rms"]
    text = found._repr_html_()
    assert "experts&lt;up&gt;[0]" in text and "<up>" not in text
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    columns = re.findall(r"<th>(.*?)</th>", rows[0])
    cells = [re.findall(r"<td.*?</td>", row) for row in rows[1:]]
    assert " 25%" in cells[0][1 + columns.index("unmoved")]
    assert " 25%" in cells[0][1 + columns.index("update_rms")] and " 100%" in cells[1][1 + columns.index("update_rms")]


def test_what_is_missing_or_no_number_is_shown_as_such():
    found = Diagnostics({0: {"update_rms": torch.tensor(math.nan)}, 1: {"skipped": torch.tensor(3)}})
    assert [row.split() for row in str(found).splitlines()[2:]] == [["0", "nan"], ["1", "3"]]
    assert "nan" in found._repr_html_()


def test_the_picture_has_a_bar_for_each_row(found, tmp_path):
    pytest.importorskip("matplotlib")
    figure = found.plot()
    figure.savefig(tmp_path / "picture.png")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["update_rms", "clip_factor", "unmoved"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()][2] == "experts<up>[0]"
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    expected = [value for _, metrics in found.rows() for value in [metrics["update_rms"]]]
    assert widths == pytest.approx(expected)


def test_the_picture_without_matplotlib_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot()


def test_without_numbers_it_says_when_there_are_some():
    optimizer = hfac.HFac(torch.nn.Linear(3, 2).named_parameters())
    found = optimizer.diagnostics()
    assert found == {}
    for said in (str(found), found._repr_html_()):
        assert "watch=True" in said and "zero_grad()" in said
    with pytest.raises(KeyError, match="'weight': no numbers"):
        found["weight"]
    with pytest.raises(KeyError, match="'wieght': 'weight', 'bias'"):
        Diagnostics({"weight": {}, "bias": {}})["wieght"]
