"""Snapshots of tensors, which the extension takes through torch's C interface."""

import pytest
import torch
from torch.nn import Parameter

from hfac.backends import cpu, snapshots
from hfac.backends.snapshots import ALIKE, OTHER, SAME, Attributes, compare, snapshot

needs_extension = pytest.mark.skipif(cpu._C is None, reason="the extension is not built")


class Subclass(torch.Tensor):
    pass


def changed(tensor):
    """Tensors that lie where this one lies, and are other ones."""
    return {
        "shape": tensor.view(6, 4),
        "fewer dimensions": tensor.view(24),
        "strides": tensor.as_strided((4, 6), (1, 4)),
        "dtype": tensor.view(torch.int32),
        "class": Parameter(tensor),
        "subclass": tensor.as_subclass(Subclass),
    }


@pytest.fixture(params=["extension", "attributes"])
def read(request, monkeypatch):
    if request.param == "attributes":
        monkeypatch.setattr(snapshots, "_native", None)
    elif snapshots._native is None:
        pytest.skip("the extension is not built, or torch does not have the interface")


@needs_extension
def test_torch_has_what_the_extension_reads_with():
    """Else each step would cost several times as much, and nothing would say so."""
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 11):
        assert snapshots._native is cpu._C
        assert type(snapshot([torch.zeros(3), Parameter(torch.zeros(2))])) is cpu._C.Snapshot


@pytest.mark.parametrize("change", changed(torch.zeros(4, 6)))
def test_what_a_snapshot_tells_apart(change, read):
    tensor, seen = torch.zeros(4, 6), None
    seen = snapshot([torch.ones(2), tensor])
    other = changed(tensor)[change]
    assert other.data_ptr() == tensor.data_ptr()
    assert compare([torch.ones(2), other], seen) == OTHER
    assert compare([tensor], seen) == OTHER
    assert compare([torch.ones(2), None], seen) == OTHER
    assert compare([torch.ones(2), tensor.clone()], seen) == ALIKE


def test_the_same_tensors_are_the_same(read):
    tensors = [
        torch.zeros(4, 6),
        torch.zeros(()),
        Parameter(torch.zeros(2, 3).t()),
        torch.zeros(8)[3:],
        torch.zeros(0, 2),
    ]
    seen = snapshot(tensors)
    assert compare(tensors, seen) == SAME
    tensors[3].data = torch.zeros(9)[4:]
    assert compare(tensors, seen) == ALIKE


@needs_extension
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3).as_subclass(Subclass),
        torch.zeros(2, 3).to_sparse(),
        torch.zeros(2, 3, device="meta"),
        torch._efficientzerotensor((2, 3)),
        None,
    ],
    ids=["subclass", "sparse", "meta", "zerotensor", "none"],
)
def test_what_has_no_memory_to_read_is_left_to_attributes(tensor, capfd):
    """And torch's interface, which would report on stderr what it cannot tell, is not asked."""
    found, seen = snapshot([tensor]), snapshot([torch.zeros(2, 3)])
    assert found is None or isinstance(found, Attributes)
    assert compare([tensor], seen) == OTHER
    assert capfd.readouterr().err == ""


@needs_extension
@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("data_ptr", "aoti_torch_no_such_function"),
        ("data_ptr", "aoti_torch_get_numel"),
        ("dtype", "aoti_torch_get_device_type"),
    ],
)
def test_an_interface_that_tells_other_things_is_not_used(name, symbol, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(snapshots._FUNCTIONS, name, symbol)
        assert snapshots._extension() is None
    assert snapshots._extension() is snapshots._native


@needs_extension
def test_where_a_tensor_keeps_its_handle_must_be_one_place():
    tensor = torch.zeros(3)
    assert cpu._C.handle_offset(tensor, tensor._cdata) is not None
    assert cpu._C.handle_offset(tensor, tensor._cdata + 8) is None
