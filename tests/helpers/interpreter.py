"""Triton's interpreter without what costs it most of its time and changes nothing that it computes, and with any numpy:
up to 3.6 it makes integers of arrays with a dimension, which numpy has refused since 2.4."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def faster() -> Iterator[None]:
    """The interpreter patches the language anew for every function that a kernel calls, where once for every module is
    enough if nothing runs uninterpreted; it makes a table of types for every number, for every shape a type that only
    compilers ask for, and for every tensor its type and its shape anew."""
    from triton.language import core
    from triton.runtime import interpreter

    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None:  # another version's
        yield
        return
    patch, numpy_type, patch_tensor = interpreter._patch_lang, interpreter._get_np_dtype, interpreter._patch_lang_tensor
    make_block, make_tensor, equal = core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__
    patched: set[int] = set()
    numpy_types: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return scope()

    def known_type(type: Any) -> Any:
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    def known_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, vars(element_ty).get("const"), *map(core._unwrap_if_constexpr, shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            like = core.tensor.__new__(core.tensor)
            make_tensor(like, None, self)
            blocks[key] = {**vars(self), "of_tensors": {"numel": like.numel, "dtype": like.dtype, "shape": like.shape}}
        self.__dict__.update(blocks[key])

    def tensor_of_block(self: Any, handle: Any, type: Any) -> None:
        found = vars(type).get("of_tensors")
        if found is None:
            make_tensor(self, handle, type)
        else:
            self.__dict__.update(found, handle=handle, type=type)

    def patch_builtin(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        given = {"_semantic": interpreter.interpreter_semantic}
        plain = getattr(member, "__wrapped__", member)
        scope.set_attr(obj, name, lambda *args, **kwargs: plain(*args, **(kwargs | given)))

    def equal_shapes(self: Any, other: Any) -> Any:
        values = other.values if isinstance(other, core.tuple) else other
        if isinstance(values, list) and all(type(value) is int for value in values):
            return core.constexpr(self.values == values)
        return equal(self, other)

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor_and_index),
        mock.patch.object(interpreter, "_get_np_dtype", known_type),
        mock.patch.object(interpreter, "_patch_attr", patch_builtin),
        mock.patch.object(core.block_type, "__init__", known_block),
        mock.patch.object(core.tensor, "__init__", tensor_of_block),
        mock.patch.object(core.tuple, "__eq__", equal_shapes),
        mock.patch.object(core, "_type_for_tuple_values", lambda values, fields=None: None),
    ):
        yield
