"""Snapshots of tensors, which the extension takes of the words in which torch keeps them."""

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
        "negated": torch._neg_view(tensor),
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


def test_what_is_copied_before_it_is_written_lies_elsewhere(read):
    """Its address is that of what it is a copy of, until somebody asks for it."""
    tensor = torch.zeros(4, 6)
    seen = snapshot([tensor])
    copies = [torch._lazy_clone(tensor)]
    assert compare(copies, seen) != SAME
    assert compare(copies, snapshot(copies)) == SAME
    assert copies[0].data_ptr() != tensor.data_ptr()


def test_memory_that_is_freed_is_seen(read):
    tensor = torch.zeros(4, 6)
    seen = snapshot([tensor])
    tensor.untyped_storage().resize_(0)  # as FSDP does it
    assert compare([tensor], seen) == OTHER


def test_tensors_of_many_dimensions_are_told_apart(read):
    tensor = torch.zeros(1, 2, 3, 1, 2, 2)
    seen = snapshot([tensor])
    assert compare([tensor], seen) == SAME
    assert compare([tensor.clone()], seen) == ALIKE
    assert compare([tensor.transpose(4, 5)], seen) == compare([tensor.view(torch.int32)], seen) == OTHER


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
    [("data_ptr", "aoti_torch_no_such_function"), ("data_ptr", "aoti_torch_get_numel")],
)
def test_an_interface_that_tells_other_things_is_not_used(name, symbol, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(snapshots._FUNCTIONS, name, symbol)
        refused = snapshots._extension()
    assert snapshots._extension() is snapshots._native
    assert refused is None


@needs_extension
@pytest.mark.parametrize("place", ["sizes", "strides", "offset", "types", "keys", "deleter"])
@pytest.mark.parametrize("by", [-1, 1])
def test_places_where_other_things_lie_are_not_used(place, by, monkeypatch):
    """Those of addresses are where these very addresses stand."""
    found = snapshots._places(torch.zeros(4, 6)[1:, 1:])
    assert found is not None
    with monkeypatch.context() as patched:
        patched.setattr(snapshots, "_places", lambda tensor: found._replace(**{place: getattr(found, place) + by}))
        refused = snapshots._extension()
    assert snapshots._extension() is snapshots._native  # which sets the places right
    assert refused is None


def test_a_word_must_stand_in_one_place():
    assert snapshots._only([5, 7, 9, 7], [7, 9]) == 1
    assert snapshots._only([5, 7, 9, 7], [7]) is None
    assert snapshots._only([5, 7, 9, 7], [9, 9]) is None


@pytest.mark.parametrize("native", [True, False])
def test_lists_of_the_same_objects(native):
    if native and cpu._C is None:
        pytest.skip("the extension is not built")
    identical = snapshots.identical if native else snapshots._identical
    values_are = snapshots.values_are if native else snapshots._values_are
    one, two, like_one = [1], [2], [1]
    assert identical([], []) and identical([one, two], [one, two])
    assert not identical([one, two], [one]) and not identical([one], [one, two]) and not identical([one], [like_one])
    entry, other = {"a": one, "b": two}, {"c": one}
    assert values_are([], []) and values_are([entry, other], [one, two, one])
    assert not values_are([entry, other], [one, two]) and not values_are([entry], [one, two, one])
    assert not values_are([entry], [two, one]) and not values_are([entry], [like_one, two])
    assert not values_are([[one, two]], [one, two])


@needs_extension
def test_what_is_no_list_is_refused():
    for function in (snapshots.compare, snapshots.identical, snapshots.values_are):
        with pytest.raises(TypeError, match="list"):
            function((1, 2), [1, 2])
    for function in (snapshots.identical, snapshots.values_are):
        with pytest.raises(TypeError, match="two lists"):
            function([{}], (1, 2))
