"""Every planted fault (faults.py) can be planted: its text stands once where it says, and its tests exist."""

import shlex

import planted
import pytest
from faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind.replace(" ", "_"))
def test_the_text_stands_once(fault):
    found = planted.places(fault)
    assert len(found) == 1, f"{fault.old!r} occurs {len(found)} times in {fault.area}/: see faults.py"
    assert fault.new != fault.old
    files = [part for part in shlex.split(fault.tests) if part.endswith(".py")]
    assert files and all((planted.ROOT / file).exists() for file in files)


def test_there_is_one_of_each_kind():
    assert len({fault.kind for fault in FAULTS}) == len(FAULTS) >= 30
    assert {fault.area for fault in FAULTS} == {"hfac", "csrc", "triton_kernels", "bench"}


def test_the_table_has_them_all_and_none_went_unnoticed():
    rows = planted.rows()
    assert [fault.kind for fault in FAULTS if fault.kind not in rows] == [], (
        "make planted ARGS=--write writes the table"
    )
    assert [kind for kind, row in rows.items() if row.endswith("| none |")] == []
