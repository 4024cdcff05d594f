"""What tells one computation from another, in any process: a digest of values, functions and modules."""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import math
import struct
import types
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of

# By their names: what they do is told by the versions that a run records.
_LIBRARIES = ("torch", "numpy", "scipy", "sdesolve", "sdesolve_kernels", "math", "cmath", "builtins", "operator")
_PLAIN = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, slice, range)


def digest(value: object, identity: str | None = None) -> str:
    """64 hexadecimal digits that are those of any value which does the same, whichever process asks.

    Functions are known by their code, their defaults, and all that they hold or read by name; modules and other
    objects by their class and their attributes; tensors by their contents. The code of functions and classes of torch,
    NumPy and this library is known by their names.

    Args:
        value: anything made of these.
        identity: stands for the code and what it reads, and for what cannot be told, wherever they are; tensors and
            numbers beside them count as ever.

    Raises:
        TypeError: something within cannot be told from others of its kind, such as an open file.
    """
    made = _Digest(identity)
    made.add(value)
    return made.hash.hexdigest()


@final
class _Digest:
    """Values are hashed apart, so that it does not matter whether two that are equal are one object."""

    def __init__(self, identity: str | None) -> None:
        self.hash, self._identity = hashlib.sha256(), identity
        self._known: dict[int, tuple[bytes, object]] = {}  # with the objects, whose addresses must not be used again
        self._within: list[int] = []  # what the value at hand is held by
        self._back = math.inf  # how far out it refers to one of those

    def _say(self, *words: object) -> None:
        for word in words:
            text = str(word).encode()
            self.hash.update(struct.pack("<q", len(text)) + text)

    def add(self, value: Any) -> None:
        if isinstance(value, float):  # -0.0 and the bits of nan count
            self._say("float", struct.pack("<d", value).hex())
        elif isinstance(value, enum.Enum):
            self._say("member", type(value).__qualname__, value.name)
        elif isinstance(value, _PLAIN):
            self._say(type(value).__name__, repr(value))
        elif id(value) in self._within:
            place = self._within.index(id(value))
            self._back = min(self._back, place)
            self._say("back", len(self._within) - place)
        elif id(value) in self._known:
            self.hash.update(self._known[id(value)][0])
        else:
            self._add_apart(value)

    def _add_apart(self, value: Any) -> None:
        outer, self.hash, back, self._back = self.hash, hashlib.sha256(), self._back, math.inf
        self._within.append(id(value))
        try:
            self._add_new(value)
        finally:
            self._within.pop()
            found, self.hash = self.hash.digest(), outer
        if self._back >= len(self._within):  # whole in itself: the same wherever it is held
            self._known[id(value)] = found, value
        self._back = min(back, self._back)
        self.hash.update(found)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value)
            if array.dtype.hasobject:
                self._all("array", array.shape, array.tolist())
            else:
                self._say("array", array.dtype.str, array.shape)
                self.hash.update(np.ascontiguousarray(array).tobytes())
        elif isinstance(value, Mapping):
            self._all(type(value).__name__, *(part for pair in value.items() for part in pair))
        elif isinstance(value, list | tuple):
            self._all(type(value).__qualname__, *value)
        elif isinstance(value, set | frozenset):
            self._say(type(value).__name__, *sorted(digest(v, self._identity) for v in value))
        elif isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, functools.partial):
            self._all("partial", value.func, value.args, value.keywords)
        elif isinstance(value, types.MethodType):
            self._all("method", value.__func__, value.__self__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            self._say("builtin", getattr(value, "__module__", None), value.__qualname__)
            bound = getattr(value, "__self__", None)
            if bound is not None and not isinstance(bound, types.ModuleType):
                self.add(bound)
        elif isinstance(value, staticmethod | classmethod | property | functools.cached_property):
            own = [getattr(value, name, None) for name in ("__func__", "fget", "fset", "func")]
            self._all(type(value).__name__, *own)
        elif callable(getattr(value, "__wrapped__", None)):
            self._all("wrapped", value.__wrapped__)
        else:
            self._add_object(value)

    def _all(self, kind: str, *parts: object) -> None:
        self._say(kind, len(parts))
        for part in parts:
            self.add(part)

    def _add_tensor(self, value: Tensor) -> None:
        if value.layout is not torch.strided or value.is_quantized:
            value = value.dequantize() if value.is_quantized else value.to_dense()
        self._say("tensor", value.dtype, tuple(value.shape))
        host = value.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
        self.hash.update(host.reshape(-1).view(torch.uint8).numpy().data)

    def _add_function(self, value: types.FunctionType) -> None:
        named: dict[str, object] = {}
        if value.__module__ and _is_library(value):
            self._say("function", value.__module__, value.__qualname__)  # what it holds may be the user's
        elif self._identity is not None:
            self._say("identity", self._identity)
            return
        else:
            self._say("function")
            self._add_code(value.__code__)
            held = value.__globals__
            named = {name: held[name] for name in sorted(_globals_read(value.__code__)) if name in held}
        cells = [_content(cell) for cell in value.__closure__ or ()]
        self._all("holds", value.__defaults__, value.__kwdefaults__, cells, named)

    def _add_code(self, code: types.CodeType) -> None:
        self._say("code", code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code.co_argcount)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            else:
                self.add(constant)

    def _add_class(self, value: type) -> None:
        self._say("class", value.__module__ if _is_library(value) else "", value.__qualname__)
        for base in value.__mro__:
            if _is_library(base) or self._identity is not None:
                self._say(base.__module__, base.__qualname__)
                continue
            for name, attribute in sorted(vars(base).items()):
                if not name.startswith("__") or callable(attribute):
                    if isinstance(attribute, types.GetSetDescriptorType | types.MemberDescriptorType):
                        continue
                    if name.startswith(("_abc_", "__annotate", "__annotations", "__subclasshook__", "__weakref__")):
                        continue
                    self._say(name)
                    self.add(attribute)

    def _add_object(self, value: Any) -> None:
        kind = type(value)
        self.add(kind)
        if dataclasses.is_dataclass(value) and not isinstance(value, nn.Module):
            self._all("fields", {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)})
        elif hasattr(value, "__dict__"):
            cached = {
                n for base in kind.__mro__ for n, a in vars(base).items() if isinstance(a, functools.cached_property)
            }
            self._all("attributes", {n: a for n, a in sorted(vars(value).items()) if n not in cached})
        else:
            try:
                parts = value.__reduce_ex__(2)
            except TypeError:
                if self._identity is not None:
                    self._say("identity", self._identity)
                    return
                raise TypeError(
                    f"a run has to be known again by what it computes, and {kind_of(value)} cannot be told from others "
                    "of its kind; give identity='a name of your own' for the functions that hold it"
                ) from None
            self._all("state", *parts)


def _is_library(value: Any) -> bool:
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0] in _LIBRARIES


def _globals_read(code: types.CodeType) -> set[str]:
    """The global names that code, and functions made within, look up."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_globals_read(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"
