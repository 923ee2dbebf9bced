"""Triton's interpreter without what costs it most of its time and changes nothing that it computes, and with any numpy:
up to 3.6 it makes integers of arrays with a dimension, which numpy has refused since 2.4."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def faster() -> Iterator[None]:
    """The interpreter patches the language anew for every function that a kernel calls, where once for every module is
    enough if nothing runs uninterpreted; it makes a table of types for every number, and for every shape a type that
    only compilers ask for."""
    from triton.language import core
    from triton.runtime import interpreter

    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None:  # another version's
        yield
        return
    patch, numpy_type, patch_tensor = interpreter._patch_lang, interpreter._get_np_dtype, interpreter._patch_lang_tensor
    patched: set[int] = set()
    numpy_types: dict[str, Any] = {}

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return scope()

    def known_type(type: Any) -> Any:
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor_and_index),
        mock.patch.object(interpreter, "_get_np_dtype", known_type),
        mock.patch.object(core, "_type_for_tuple_values", lambda values, fields=None: None),
    ):
        yield
