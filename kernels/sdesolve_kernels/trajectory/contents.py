"""What a function holds: enough to tell, before a kernel is used again, that nothing it depends on has changed.

A trace is right for as long as the Python values it read are the same. `contents` goes through a function the way
Python would look names up: closure cells, defaults, the globals its code names, attributes of the objects it is bound
to or finds there. Numbers and text go into the key by value. Tensors go in by shape and dtype only and come back in a
list, in the order they were found: their values are arguments of the kernel.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import itertools
import operator
import random
import re
import sys
import threading
import types
from collections.abc import Hashable, Iterator
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory.tracing import Traced, Unsupported

__all__ = ["Contents", "contents"]

_MOST = 20_000  # objects looked at
_DEEPEST = 100  # objects within one another
_SMALL = 1 << 16  # bytes of a numpy array compared by value
_VALUES = (bool, int, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, range)
# Taken for what they are: nothing in them changes that a step's numbers depend on.
_SETTLED = (
    types.CodeType, types.BuiltinFunctionType, types.UnionType, types.GenericAlias, re.Pattern, type(threading.Lock()),
    type(threading.RLock()),
)  # fmt: skip
# What a class holds to find parts of its instances, which are looked into as such.
_FIELDS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    type(vars(collections.namedtuple("_Pair", "first"))["first"]),
)
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_PLAIN = (float, int, str, bytes, complex)
# Names of what can reach values that no name in the code tells of.
_BEYOND = frozenset(("globals", "locals", "vars", "eval", "exec", "__import__", "import_module", "environ", "getenv"))
_FILES = frozenset(("open", "read_text", "read_bytes", "load", "loadtxt", "genfromtxt", "fromfile"))
_OURS = frozenset(("torch", "numpy", "sdesolve", "sdesolve_kernels", "scipy", "jaxtyping", "builtins", "typing"))
_FOREIGN = frozenset(sys.stdlib_module_names) | _OURS


@final
@dataclasses.dataclass(frozen=True)
class Contents:
    """What was found.

    Attributes:
        key: equal for two walks that found the same values, and tensors of the same shapes.
        tensors: found on the way, each once.
        opaque: what could not be looked into, so that the key cannot be trusted; empty if there is nothing of the kind.
    """

    key: tuple[Hashable, ...]
    tensors: tuple[Tensor, ...]
    opaque: str = ""

    @property
    def complete(self) -> bool:
        """Whether everything could be looked into."""
        return not self.opaque


def contents(*roots: object, most_weights: int | None = None) -> Contents:
    """Everything that ``roots`` hold.

    Raises:
        Unsupported: there are parameters with more than ``most_weights`` elements in all. The search ends there: a
            large network need not be gone through each time that it is used.
    """
    walk = _Walk(most_weights)
    for root in roots:
        walk.visit(root)
    if not walk.opaque:
        walk.modules()
    return Contents(tuple(walk.key), tuple(walk.tensors), walk.opaque)


def _is_foreign(module: str | None) -> bool:
    """Whether code of a module is taken as fixed: the standard library's, torch's and this package's own."""
    return module is not None and module.partition(".")[0] in _FOREIGN


@final
class _Walk:
    def __init__(self, most_weights: int | None) -> None:
        self._most_weights = most_weights
        self._weights = self._depth = 0
        self.key: list[Hashable] = []
        self.tensors: list[Tensor] = []
        self.opaque = ""
        self._seen: dict[int, int] = {}
        self._names: set[str] = set()
        self._modules: list[types.ModuleType] = []
        self._alive: list[object] = []  # so that no identity is used twice

    def visit(self, value: Any) -> None:
        key = self.key
        kind = type(value)
        if kind is float:
            key.append((float, value, str(value)) if value == 0 or value != value else (float, value))
            return
        if kind is complex:
            key.append((complex, repr(value)))
            return
        if kind in _VALUES:
            key.append((kind, value))
            if kind is str:
                self._names.add(value)
            return
        known = self._seen.get(id(value))
        if known is not None:
            key.append(("again", known))
            return
        if len(self._seen) > _MOST:
            self.opaque = f"more than {_MOST} objects"
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if self._depth == _DEEPEST:
            self.opaque = f"more than {_DEEPEST} objects within one another"
            return
        self._depth += 1
        self._look_into(value, kind)
        self._depth -= 1

    def _look_into(self, value: Any, kind: type) -> None:
        key = self.key
        if isinstance(value, Tensor):
            key.append((kind, tuple(value.shape), value.dtype, value.device))
            self.tensors.append(value)
            if not isinstance(value, Traced):
                self._extras(value, kind)
            if isinstance(value, torch.nn.Parameter):
                self._weights += value.numel()
                self._limit_weights(self._weights)
        elif kind is types.FunctionType:
            self._function(value)
        elif kind is types.MethodType:
            key.append("method")
            self.visit(value.__func__)
            self.visit(value.__self__)
        elif isinstance(value, functools.partial):
            key.append(("partial", kind))
            for part in (value.func, value.args, value.keywords):
                self.visit(part)
            self._extras(value, kind)
        elif issubclass(kind, dict):
            key.append((kind, len(value)))
            for name, item in value.items():
                self.visit(name)
                self.visit(item)
            self._extras(value, kind)
        elif kind is types.MappingProxyType:
            key.append("view")
            self.visit(dict(value))
        elif issubclass(kind, list | tuple | collections.deque):
            key.append((kind, len(value)))
            for item in value:
                self.visit(item)
            self._extras(value, kind)
        elif _is_our_enum(value):
            key.append(("is", value))
        elif kind is slice:
            key.append("slice")
            for part in (value.start, value.stop, value.step):
                self.visit(part)
        elif kind in (operator.itemgetter, operator.attrgetter, operator.methodcaller):
            key.append(kind)
            self.visit(value.__reduce__()[1])
        elif issubclass(kind, set | frozenset):
            if _is_value(frozenset(value)):
                key.append((kind, _typed(frozenset(value))))
            else:
                self.opaque = "a set of objects"
        elif issubclass(kind, float | int | str | bytes | complex) and not isinstance(value, enum.Enum | np.generic):
            key.append((kind, repr(next(b for b in _PLAIN if issubclass(kind, b))(value))))
            self._extras(value, kind)
        elif isinstance(value, enum.Enum):
            key.append(("is", value))
            self._extras(value, kind)
        elif isinstance(value, types.ModuleType):
            key.append(("is", value))
            if not _is_foreign(value.__name__):
                self._modules.append(value)
        elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            key.append((kind, value.getstate()))
        elif isinstance(value, np.random.Generator):
            key.append((kind, repr(value.bit_generator.state)))
        elif isinstance(value, np.ndarray | np.generic):
            if value.nbytes > _SMALL or value.dtype.hasobject:
                self.opaque = "a large array of numpy"
            else:
                key.append((kind, value.shape, value.dtype, value.tobytes()))
        elif isinstance(value, _SETTLED):
            key.append(("is", value))
            owner = getattr(value, "__self__", None)
            if not isinstance(owner, types.ModuleType | type):
                self.visit(owner)
        elif isinstance(value, type):
            key.append(("class", value))
            self._class(value)
            if type(value) is not type:
                self.visit(type(value))
        else:
            self._object(value, kind)

    def _function(self, function: types.FunctionType) -> None:
        self.key.append(("function", function.__code__))
        module = function.__globals__.get("__name__")  # `functools.wraps` changes __module__
        if _is_foreign(module) and not function.__closure__:
            return
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:
                self.key.append("empty cell")
        self.visit(function.__defaults__)
        self.visit(function.__kwdefaults__)
        for name, item in vars(function).items():
            self.key.append(name)
            self.visit(item)
        if not _is_foreign(module):
            self._globals(function)

    def modules(self) -> None:
        """What names of any function stand for in modules that were met as values: in a cell, as an attribute."""
        found: set[tuple[int, str]] = set()
        while new := [(m, n) for m in self._modules for n in self._names & vars(m).keys() if (id(m), n) not in found]:
            for module, name in sorted(new, key=lambda pair: pair[1]):
                found.add((id(module), name))
                self.key.append(name)
                self.visit(vars(module)[name])

    def _globals(self, function: types.FunctionType) -> None:
        names = set(_names(function.__code__))
        self._names |= names
        if not names.isdisjoint(_BEYOND | _FILES):
            self.opaque = f"{min(names & (_BEYOND | _FILES))}, which reaches beyond them"
        for name in sorted(names & function.__globals__.keys()):
            self.key.append(name)
            self._named(function.__globals__[name], names)
        for name in sorted(names & sys.modules.keys() - function.__globals__.keys()):  # imported by the function itself
            self._named(sys.modules[name], names)

    def _named(self, value: object, names: set[str], inside: tuple[object, ...] = ()) -> None:
        """A value that goes by one of some names; of a module, what they stand for in it."""
        if not isinstance(value, types.ModuleType):
            self.visit(value)
        elif not _is_foreign(value.__name__) and value not in inside:
            if "getattr" in names:
                self._modules.append(value)
            for name in sorted(names & vars(value).keys()):
                self.key.append(name)
                self._named(vars(value)[name], names, (*inside, value))

    def _class(self, kind: type) -> None:
        """Values and methods that instances of a user's class find on it."""
        for base in kind.__mro__:
            if _is_foreign(base.__module__) or (id(base) in self._seen and base is not kind):
                continue
            self._seen.setdefault(id(base), len(self._seen))
            for name, value in vars(base).items():
                if name in ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__"):
                    continue
                if isinstance(value, staticmethod | classmethod):
                    value = value.__func__
                if isinstance(value, property):
                    value = value.fget
                if isinstance(value, functools.cached_property):
                    value = value.func
                if isinstance(value, _FIELDS):
                    continue
                self.key.append(name)
                self.visit(value)

    def _extras(self, value: Any, kind: type) -> None:
        """What an instance of a user's subclass of a builtin type has besides its value."""
        if not _is_foreign(kind.__module__) or hasattr(value, "__dict__"):
            self._class(kind)
            for name, item in vars(value).items() if hasattr(value, "__dict__") else ():
                self.key.append(name)
                self.visit(item)

    def _limit_weights(self, weights: int) -> None:
        if self._most_weights is not None and weights > self._most_weights:
            raise Unsupported(
                "the functions hold a network whose layers run better as matrix products over the whole batch"
            )

    def _object(self, value: Any, kind: type) -> None:
        self.key.append(("object", kind))
        if self._most_weights is not None and self._weights == 0 and isinstance(value, torch.nn.Module):
            for weights in itertools.accumulate(p.numel() for p in value.parameters()):
                self._limit_weights(weights)  # before a search through all its modules
        state = getattr(value, "__dict__", None)
        slots = list(_slots(kind))
        own = [base for base in kind.__mro__ if base not in (object, types.SimpleNamespace)]
        if isinstance(value, random.SystemRandom) or not all(base.__flags__ & _MADE_IN_PYTHON for base in own):
            self.opaque = f"an object of {kind.__module__}.{kind.__qualname__}"  # such as a date, a weak reference
        if state is None and not slots:
            if kind.__module__ not in ("_abc", "builtins") or kind.__name__ not in ("_abc_data", "object"):
                self.opaque = f"an object of {kind.__module__}.{kind.__qualname__}"
            return
        self._class(kind)
        if type(kind) is not type:
            self.visit(type(kind))
        for name, item in (state or {}).items():
            self.key.append(name)
            self.visit(item)
        for slot in slots:
            self.key.append(slot.__name__)
            try:
                self.visit(slot.__get__(value))
            except AttributeError:
                self.key.append("empty slot")


def _is_our_enum(item: object) -> bool:
    return isinstance(item, enum.Enum) and _is_foreign(type(item).__module__)


def _is_value(item: object) -> bool:
    """Whether equal objects of this kind are the same to any function, but for what `_typed` tells apart."""
    if type(item) in (tuple, frozenset):
        return all(_is_value(part) for part in item)  # type: ignore[attr-defined]  # a tuple or a frozenset
    return type(item) in _VALUES or type(item) is float or _is_our_enum(item)


def _typed(item: Hashable) -> Hashable:
    """Tells 1 from 1.0 and from True."""
    kind = type(item)
    return (kind, kind(_typed(part) for part in item)) if kind in (tuple, frozenset) else (kind, item)  # type: ignore[attr-defined]


def _names(code: types.CodeType) -> Iterator[str]:
    """Global and attribute names that code, and code inside it, uses; text is taken for the name of an attribute."""
    for name in code.co_names:
        yield name
        if "." in name:  # import a.b
            yield from name.split(".")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


def _slots(kind: type) -> Iterator[types.MemberDescriptorType]:
    for base in kind.__mro__:
        if "__slots__" in vars(base):
            yield from (a for a in vars(base).values() if isinstance(a, types.MemberDescriptorType))
