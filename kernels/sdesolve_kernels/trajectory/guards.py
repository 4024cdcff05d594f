"""What the functions of a step hold: looked into, put back after a trace, compared before a kernel is used again.

A trace is right for as long as everything that the functions can read is the same. `look_into` goes through them the
way Python looks names up: closure cells, defaults, the globals and attributes that code names, what objects hold. Each
kind of object has a rule in `_RULES`; what has none is refused, so a trace never calls a function that holds it.
"""

from __future__ import annotations

import abc
import builtins
import collections
import contextlib
import datetime
import decimal
import dis
import enum
import functools
import gc
import inspect
import itertools
import operator
import os
import random
import re
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory.snapshots import Snapshot, slots_of, written_in_python
from sdesolve_kernels.trajectory.tracing import Unsupported
from sdesolve_kernels.trajectory.watching import DENIED, Watch, is_library, is_pure, refusal

__all__ = ["Guards", "look_into"]

_MOST = 20_000  # objects looked at
_DEEPEST = 100  # objects within one another
_LARGEST_ARRAY = 1 << 16  # bytes of a NumPy array, which is compared by value
_BASES = frozenset(("object", "Module", "Generic", "Protocol", "ABC", "NamedTuple", "tuple"))

# With these in the code, any attribute of any class or module may be read.
_REFLECTIVE = frozenset(
    ("getattr", "vars", "__dict__", "__getattribute__", "attrgetter", "import_module", "getmembers")
)
_MODULE_FIELDS = frozenset(vars(torch.nn.Module()))
_MODULE_HOOKS = tuple(n for n in sorted(vars(torch.nn.modules.module)) if n.startswith("_global_"))
# Methods that Python calls where no name says so are looked into; these are called on other occasions only.
_UNCALLED = frozenset(
    ("__init__", "__new__", "__post_init__", "__repr__", "__str__", "__reduce__", "__reduce_ex__", "__getstate__",
     "__setstate__", "__init_subclass__", "__del__", "__copy__", "__deepcopy__", "__replace__")
)  # fmt: skip
_DESCRIPTIONS = frozenset(("__doc__", "__name__", "__qualname__", "__module__", "__annotations__", "__slots__"))
_UNSEEN = frozenset(("__subclasses__", "__globals__", "f_globals", "f_locals", "f_builtins"))
_MAKING = frozenset(("__init__", "__new__", "__post_init__", "__del__"))
_NO_MEMBERS = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__", "__parameters__",
     "__orig_bases__", "__abstractmethods__", "_abc_impl", "__qualname__", "__dataclass_fields__",
     "__dataclass_params__", "__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__")
)  # fmt: skip


@final
class Guards:
    """What `look_into` found.

    Attributes:
        key: equal for two searches that found the same values, and tensors of the same shapes and dtypes.
        tensors: found on the way, each once.
    """

    def __init__(self, key: tuple[Hashable, ...], tensors: tuple[Tensor, ...], walk: _Walk) -> None:
        self.key, self.tensors, self._walk = key, tensors, walk

    def holding(self, tensors: tuple[Tensor, ...]) -> Guards:
        """The same, with other tensors in place of those that were found."""
        return Guards(self.key, tensors, self._walk)

    @contextlib.contextmanager
    def preserved(self, *, watched: bool = True) -> Iterator[Watch]:
        """Calls of the functions inside the ``with`` block change nothing that they hold.

        Gives what is seen of the code that runs: its `Watch.bindings` tell whether a library was patched since.

        Raises:
            Unsupported: something had changed, and was put back.
        """
        snapshot = Snapshot(self._walk.held, self._walk.namespaces)
        watch = Watch(self._walk.codes, self._walk.cached)
        try:
            with watch if watched else contextlib.nullcontext():
                yield watch
        finally:
            changed = snapshot.put_back()
        watch.check()
        if changed:
            raise Unsupported(f"it changes Python values that it holds ({changed}) each time it is called")

    @contextlib.contextmanager
    def put_back_on_error(self) -> Iterator[Callable[[], str]]:
        """As `preserved`, but keeps changes unless an exception leaves the block; gives what says what changed."""
        snapshot = Snapshot(self._walk.held, self._walk.namespaces)
        try:
            yield snapshot.changed
        except BaseException:
            snapshot.put_back()
            raise


def look_into(*roots: object, most_weights: int | None = None) -> Guards:
    """Everything that ``roots`` can read.

    Raises:
        Unsupported: something is of a kind that cannot be looked into and put back; or there are parameters with more
            than ``most_weights`` elements in all, at which the search ends: a large network need not be gone through
            each time that it is used.
    """
    walk = _Walk(most_weights)
    for root in roots:
        walk.visit(root)
    walk.finish()
    return Guards(tuple(walk.key), tuple(walk.tensors), walk)


class _Walk:
    """One search.

    Attributes:
        key, tensors: see `Guards`.
        held: objects that were looked into.
        namespaces: of the functions' modules.
        codes: of functions that were looked into.
        cached: code that an ``lru_cache`` calls.
    """

    def __init__(self, most_weights: int | None) -> None:
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self.held: list[object] = []
        self.namespaces: dict[int, dict[str, Any]] = {}
        self.codes: set[types.CodeType] = set()
        self.cached: set[types.CodeType] = set()
        self._most_weights, self._weights, self._depth, self._modular = most_weights, 0, 0, False
        self._seen: dict[int, int] = {}
        self._classes: set[type] = set()
        self._passed: set[int] = set()  # modules that are used otherwise than for an attribute
        self._names: set[str] = {"forward"}
        self._modules: list[Any] = []
        self._members: dict[str, list[object]] = {}
        self._unread: list[tuple[str, Unsupported]] = []
        self._name = ""
        self._asked: set[tuple[int, str]] = set()

    def visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _VALUES:
            self.key += (kind, value)
            if kind is str:
                self._names |= _names_in(value)
            return
        if kind is float or kind is complex:
            self.key += (kind, value if value and value == value and kind is float else repr(value))
            return
        seen = self._seen
        known = seen.get(id(value))
        if known is not None:
            self.key.append(known)
            return
        seen[id(value)] = len(seen)
        self.held.append(value)  # kept alive as well, so that no identity is used twice
        self._depth += 1
        if len(seen) > _MOST or self._depth > _DEEPEST:
            few = f"{_DEEPEST} objects within one another" if self._depth > _DEEPEST else f"{_MOST} objects"
            raise Unsupported(f"the functions hold more than {few}")
        (_RULES.get(kind) or _rule(kind))(self, value, kind)  # type: ignore[arg-type]  # a class is hashable
        self._depth -= 1

    def _named(self, name: str, value: object) -> None:
        self.key.append(name)
        self._name = name
        self.visit(value)

    def refuse(self, value: Any, kind: type) -> None:
        name = f"`{self._name}`, " if self._name else ""
        raise Unsupported(
            f"the functions hold {name}an object of {kind.__module__}.{kind.__qualname__}, which cannot be looked into "
            "and put back"
        )

    # Rules -------------------------------------------------------------------------------------------------------
    def tensor(self, value: Tensor, kind: type) -> None:
        own: Any = kind
        if own.__torch_function__ not in _TORCHS_OWN or own.__torch_dispatch__ != Tensor.__torch_dispatch__:
            self.refuse(value, kind)  # any look at it would run the user's code
        if value.is_quantized:
            self.refuse(value, kind)  # torch has no safe way to compare its memory
        graded = value.is_leaf and value.grad is not None
        self.key += (kind, value.shape, value.dtype, value.device, value.requires_grad, graded)
        self.tensors.append(value)
        if kind is not Tensor and isinstance(value, torch.nn.Parameter):
            self._weights += value.numel()
            self._limit_weights(self._weights)
        if kind not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            self._class(kind)
        if value.__dict__:
            self._state(value.__dict__, kind)

    def sequence(self, value: Any, kind: type) -> None:
        self.key += (kind, len(value))
        for item in value:  # a set's have the same order for as long as it is not changed
            self.visit(item)
        self._extras(value, kind)

    def dictionary(self, value: Any, kind: type) -> None:
        self.key += (kind, len(value))
        ordered = isinstance(value, collections.OrderedDict)  # in an order of its own
        for name, item in (collections.OrderedDict if ordered else dict).items(value):
            if type(name) is str:
                self._names |= _names_in(name)
                self._named(name, item)
            else:
                self.visit(name)
                self.visit(item)
        if kind is collections.defaultdict:
            self.visit(value.default_factory)
        self._extras(value, kind)

    def reduced(self, value: Any, kind: type) -> None:
        """What pickling takes apart, without running code of the user."""
        self.key.append(kind)
        self.visit(value.__reduce__()[1])

    def partial(self, value: Any, kind: type) -> None:
        self.key.append(kind)
        for part in (value.func, value.args, value.keywords):
            self.visit(part)
        self._extras(value, kind)

    def slice_(self, value: Any, kind: type) -> None:
        self.key.append(kind)
        for part in (value.start, value.stop, value.step):
            self.visit(part)

    def view(self, value: Any, kind: type) -> None:
        self.key.append(kind)
        self.visit(dict(value))

    def reference(self, value: Any, kind: type) -> None:
        self.key.append(kind)
        self.visit(value())

    def array(self, value: Any, kind: type) -> None:
        if value.nbytes > _LARGEST_ARRAY or value.dtype.hasobject:
            raise Unsupported(
                f"the functions hold `{self._name}`, a NumPy array of {value.nbytes} bytes, more than the "
                f"{_LARGEST_ARRAY} that are compared in each call, or of objects; make it a tensor"
            )
        writeable = isinstance(value, np.ndarray) and value.flags.writeable
        self.key += (kind, value.shape, value.dtype, value.strides, writeable, value.tobytes())

    def plain(self, value: Any, kind: type) -> None:
        """A subclass of a number or of text, or a member of an enumeration."""
        if isinstance(value, enum.Enum) and is_library(kind.__module__):
            self.key.append(value)
            return
        base = next((b for b in (float, int, str, bytes, complex) if issubclass(kind, b)), None)
        self.key += (kind, repr(base(value)) if base else value)
        self._extras(value, kind)

    def generator(self, value: Any, kind: type) -> None:
        self.key += (kind, id(value))  # drawing from it is noticed, and put back

    def builtin(self, value: Any, kind: type) -> None:
        owner = getattr(value, "__self__", None)
        module = getattr(value, "__module__", None) if isinstance(owner, types.ModuleType | None) else None
        if module is not None and not is_pure(module, value.__name__):
            raise Unsupported(refusal(f"uses {module}.{value.__name__}"))
        self.key.append(value if owner is None or isinstance(owner, types.ModuleType) else value.__name__)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.visit(owner)

    def as_it_is(self, value: Any, kind: type) -> None:
        self.key.append(value)

    def operation(self, value: Any, kind: type) -> None:
        """``torch.ops.aten.sin``: what torch's dispatcher calls by a name, and what was given to it in Python."""
        self.as_it_is(value, kind)
        if str(value).partition(".")[0] not in ("aten", "prims"):
            self.refuse(value, kind)
        self.visit(getattr(value, "py_kernels", None))

    def wrapper(self, value: Any, kind: type) -> None:
        """Properties, static and class methods, cached functions."""
        self.key.append(kind)
        if hasattr(value, "cache_parameters"):
            if isinstance(value.__wrapped__, types.FunctionType):
                self.cached.add(value.__wrapped__.__code__)
            for part in gc.get_referents(value):  # what it was called with and returned, and the table of that
                for entry in part.values() if type(part) is dict and part is not vars(value) else (part,):
                    kind = type(entry)
                    if entry is not vars(value) and kind not in _CACHE_PARTS and kind.__name__ != "_lru_list_elem":
                        self.visit(entry)
        for name in ("__wrapped__", "__func__", "fget", "fset", "func"):
            inner = getattr(value, name, None)
            if inner is not None:
                self.visit(inner)
                if name == "__wrapped__" or name == "__func__":
                    break

    def module(self, value: Any, kind: type) -> None:
        self.key.append(value)
        if is_library(value.__name__) and not is_pure(value.__name__):
            raise Unsupported(refusal(f"uses the module {value.__name__}"))
        self._modules.append(value)
        self._passed.add(id(value))

    def method(self, value: Any, kind: type) -> None:
        self.key.append(kind)
        self.visit(value.__func__)
        self.visit(value.__self__)

    def function(self, value: Any, kind: type) -> None:
        module = value.__globals__.get("__name__")  # `functools.wraps` changes __module__
        library = is_library(module)
        if library and not is_pure(module, value.__name__):
            raise Unsupported(refusal(f"uses {module}.{value.__name__}"))
        if library and not value.__closure__:
            self.key.append(value)
            return
        self.key.append(value.__code__)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                inner = cell.cell_contents
            except ValueError:
                continue
            self.held.append(cell)
            self._global(name, inner, value.__code__)
        if library:
            return
        code = _facts(value.__code__)
        if code.problem:
            raise Unsupported(code.problem)
        self.codes |= code.codes
        self._names |= code.names
        if value.__defaults__:
            self.visit(value.__defaults__)
        if value.__kwdefaults__:
            self.visit(value.__kwdefaults__)
        if value.__dict__:
            self.visit(value.__dict__)
        namespace = value.__globals__
        self.namespaces[id(namespace)] = namespace
        for name in code.globals:
            if name in namespace:
                self._global(name, namespace[name], value.__code__)
            elif name in DENIED:
                raise Unsupported(refusal(f"calls {name}()"), code.line)
            else:
                part = _BUILTINS.get(name)
                if part is None or getattr(part, "__module__", "") == "builtins":
                    self.key.append(part)
                else:  # put there by the user
                    self._named(name, part)
        for name in code.imports:
            self.visit(sys.modules.get(name))

    def _global(self, name: str, value: Any, code: types.CodeType) -> None:
        known = id(value) in self._passed
        self._named(name, value)
        if type(value) is types.ModuleType and not known and name not in _facts(code).passed:
            self._passed.discard(id(value))

    def class_(self, value: Any, kind: type) -> None:
        if value is type:
            raise Unsupported(_TYPE)
        self.key.append(value)
        if is_library(value.__module__) and not (is_pure(value.__module__, value.__name__) or _RULES.get(value)):
            raise Unsupported(refusal(f"uses {value.__module__}.{value.__name__}"))
        self._class(value)
        for base in value.__mro__:
            if not is_library(base.__module__):
                for name in sorted(vars(base).keys() & _MAKING):  # it may be called, to make an instance
                    self._named(name, vars(base)[name])
        if kind is not type:
            self._class(kind)

    def instance(self, value: Any, kind: type) -> None:
        """An object of a class that is written in Python."""
        if not _open(kind):
            self.refuse(value, kind)
        if is_library(kind.__module__) and not is_pure(kind.__module__) and kind.__module__ not in _HOLDERS:
            self.refuse(value, kind)
        self.key.append(kind)
        module = isinstance(value, torch.nn.Module)
        if module and not self._modular:
            self._modular = True
            if self._most_weights is not None:
                self._limit_weights(_weights(value, self._most_weights))  # before a search through all its modules
            for name in _MODULE_HOOKS:
                if getattr(torch.nn.modules.module, name):
                    self._named(name, getattr(torch.nn.modules.module, name))
        self._class(kind)
        state = getattr(value, "__dict__", None)
        if state:
            self._state(state, kind, module)
        for slot in slots_of(kind):
            with contextlib.suppress(AttributeError):
                self._named(slot.__name__, slot.__get__(value))

    # Parts -------------------------------------------------------------------------------------------------------
    def _state(self, state: dict[str, Any], kind: type, module: bool = False) -> None:
        self.key.append(len(state))
        for name, item in state.items():
            if module and name in _MODULE_FIELDS:
                if item or item is False or item is None:
                    self.key.append(name)
                    self.visit(item)
                continue
            depth, length = self._depth, len(self.key)
            try:
                self._named(name, item)
            except Unsupported as problem:
                # What no code names is not read. Code of a library might, other than that of a plain base class.
                plain = all(b.__name__ in _BASES for b in kind.__mro__ if is_library(b.__module__))
                if not plain or isinstance(item, Tensor | torch.nn.Module):
                    raise
                self._depth = depth
                del self.key[length:]
                self.key.append(name)
                self._unread.append((name, problem))

    def _extras(self, value: Any, kind: type) -> None:
        """What an instance of a subclass has besides its value."""
        if kind in _RULES:
            return
        self._class(kind)
        state = getattr(value, "__dict__", None)
        if state:
            self._state(state, kind)

    def _class(self, kind: type) -> None:
        """What instances find on their class: methods when their names are met, as with modules."""
        if kind in self._classes:
            return
        if type(kind).__eq__ is not type.__eq__:
            self.refuse(kind, type(kind))
        for base in kind.__mro__:
            if base in self._classes:
                continue
            self._classes.add(base)
            if not written_in_python(base):
                continue
            self.held.append(base)
            if is_library(base.__module__):
                self.key.append(version(base))
                continue
            if isinstance(base, abc.ABCMeta):
                self.key.append(abc.get_cache_token())  # another one whenever a class is registered
                if getattr(base, "_is_protocol", False):
                    self._names |= vars(base).keys()  # isinstance asks for attributes of these names
            for name, value in vars(base).items():
                if name in _NO_MEMBERS or type(value) in _FIELDS:
                    continue
                called = name[:2] == "__" or any(name in vars(b) for b in base.__mro__[1:] if b is not object)
                if (called and name not in _UNCALLED) or name in self._names:
                    self._named(name, value)
                else:
                    self._members.setdefault(name, []).append(value)

    def finish(self) -> None:
        """Looks into what names stand for in modules and on classes, until no new names are met."""
        done: dict[int, set[str]] = {}
        for name in sorted(_UNSEEN & self._names):
            raise Unsupported(f"it reads {name}, by which it can get at anything")
        versioned: set[int] = set()
        before = -1
        while before != len(self.key):
            before = len(self.key)
            self._described()
            reflective = not _REFLECTIVE.isdisjoint(self._names)
            for module in [torch.Tensor, *self._modules]:
                space, known = vars(module), done.setdefault(id(module), set())
                library = module is torch.Tensor or is_library(module.__name__)
                every = reflective and id(module) in self._passed
                if every and library and id(module) not in versioned:
                    versioned.add(id(module))
                    self.key.append(version(module))
                for name in sorted((space.keys() if every and not library else space.keys() & self._names) - known):
                    known.add(name)
                    part = space[name]
                    if module is builtins and (part is type or name in DENIED):
                        raise Unsupported(refusal(f"uses builtins.{name}"))
                    if library and type(part) in _LIBRARY_PARTS:
                        self.key += (name, part)
                    elif library and type(part) is types.ModuleType and not is_pure(part.__name__):
                        continue  # an attribute of another object may have this name; calls are watched
                    elif name[:2] != "__" or name == "__getattr__":
                        self._named(name, part)
                if module is not torch.Tensor:
                    self.namespaces[id(space)] = space
            for name in sorted(self._members if reflective else self._members.keys() & self._names):
                for value in self._members.pop(name):
                    self._named(name, value)
            for name, problem in self._unread:
                if reflective or name in self._names:
                    raise problem

    def _described(self) -> None:
        """What classes and functions say of themselves, where code asks for it."""
        for name in sorted(_DESCRIPTIONS & self._names):
            for thing in [h for h in self.held if isinstance(h, type | types.FunctionType)]:
                if (id(thing), name) not in self._asked and not is_library(thing.__module__):
                    self._asked.add((id(thing), name))
                    self._named(name, getattr(thing, name, None))

    def _limit_weights(self, weights: int) -> None:
        if self._most_weights is not None and weights > self._most_weights:
            raise Unsupported(
                "the functions hold a network whose layers run better as matrix products over the whole batch"
            )


_WORD = re.compile(r"[^\W\d]\w*")


# Kinds -----------------------------------------------------------------------------------------------------------
_BUILTINS = vars(builtins)
_TORCHS_OWN = (Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
_CACHE_PARTS = (type, types.FunctionType, object)
_HOLDERS = frozenset(("argparse", "types", "uuid", "pathlib"))
_PLAIN_BASES = (object, types.SimpleNamespace)
_VALUES = frozenset(
    (bool, int, str, bytes, type(None), type(Ellipsis), type(NotImplemented), torch.dtype, torch.device,
     torch.Size, torch.layout, torch.memory_format, types.CodeType)
)  # fmt: skip
_LIBRARY_PARTS = frozenset(
    (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, types.GetSetDescriptorType,
     types.WrapperDescriptorType, np.ufunc, type(np.mean))
)  # fmt: skip
# What a class holds to find parts of its instances, which are looked into as such.
_FIELDS = frozenset(
    (types.MemberDescriptorType, types.GetSetDescriptorType,
     type(vars(collections.namedtuple("_Pair", "first"))["first"]))
)  # fmt: skip

Rule = Callable[[_Walk, Any, type], None]
_RULES: dict[type, Rule] = {
    Tensor: _Walk.tensor, list: _Walk.sequence, tuple: _Walk.sequence, collections.deque: _Walk.sequence,
    dict: _Walk.dictionary, collections.OrderedDict: _Walk.dictionary, collections.defaultdict: _Walk.dictionary,
    collections.Counter: _Walk.dictionary, set: _Walk.sequence, frozenset: _Walk.sequence,
    types.MappingProxyType: _Walk.view, slice: _Walk.slice_, range: _Walk.slice_, functools.partial: _Walk.partial,
    weakref.ReferenceType: _Walk.reference, types.FunctionType: _Walk.function, types.MethodType: _Walk.method,
    types.ModuleType: _Walk.module, type: _Walk.class_, np.ndarray: _Walk.array, np.generic: _Walk.array,
    enum.Enum: _Walk.plain, float: _Walk.plain, int: _Walk.plain, str: _Walk.plain, bytes: _Walk.plain,
    complex: _Walk.plain, random.Random: _Walk.generator, torch.Generator: _Walk.generator,
    np.random.Generator: _Walk.generator, np.random.RandomState: _Walk.generator,
    **dict.fromkeys((torch._ops.OpOverload, torch._ops.OpOverloadPacket), _Walk.operation),
    **dict.fromkeys((types.BuiltinFunctionType, types.MethodWrapperType, types.MethodDescriptorType,
                     types.WrapperDescriptorType, types.ClassMethodDescriptorType), _Walk.builtin),
    **dict.fromkeys((property, staticmethod, classmethod, functools.cached_property,
                     type(functools.lru_cache(len))), _Walk.wrapper),
    **dict.fromkeys((operator.itemgetter, operator.attrgetter, operator.methodcaller, datetime.date, datetime.datetime,
                     datetime.timedelta, datetime.time, decimal.Decimal), _Walk.reduced),
    **dict.fromkeys((re.Pattern, inspect.Signature, type(threading.Lock()), type(threading.RLock()),
                     types.GenericAlias, types.UnionType, np.ufunc, np.dtype, type(np.mean)), _Walk.as_it_is),
}  # fmt: skip
for _kind in (
    type(os.environ),
    random.SystemRandom,
    weakref.WeakValueDictionary,
    weakref.WeakKeyDictionary,
    torch.jit.ScriptModule,
    torch.jit.ScriptFunction,
):
    _RULES[_kind] = _Walk.refuse


@functools.lru_cache(1024)
def _rule(kind: type) -> Rule:
    """That of the nearest base class that has one."""
    if issubclass(kind, enum.Enum):
        return _Walk.plain
    return next((_RULES[base] for base in kind.__mro__ if base in _RULES), _Walk.instance)


@functools.lru_cache(4096)
def _open(kind: type) -> bool:
    """Whether instances of a class hold nothing that cannot be looked at."""
    return all(written_in_python(base) for base in kind.__mro__ if base not in _PLAIN_BASES)


def _weights(module: torch.nn.Module, most: int) -> int:
    """How many a network has; once they are more than `most`, how many were found by then."""
    weights, modules, seen = 0, [module], set[int]()
    for inner in modules:  # which grows meanwhile
        for part in inner._parameters.values():
            if part is not None and id(part) not in seen:
                seen.add(id(part))
                weights += part.numel()
        if weights > most:
            break
        modules += [m for m in inner._modules.values() if m is not None and id(m) not in seen]
        seen.update(map(id, inner._modules.values()))
    return weights


_versions: dict[Any, tuple[list[object], str]] = {}


def version(space: Any) -> str:
    """A name that changes when an attribute of a class or module of a library does."""
    now = [*vars(space).values()]
    known = _versions.get(space)
    if known is not None:
        try:
            if now == known[0]:
                return known[1]
        except Exception:  # what is compared may be anything, an array for one
            pass
    number = f"{space.__name__} {len(_versions)} {time.monotonic_ns()}"
    _versions[space] = now, number
    return number


@functools.lru_cache(4096)
def _names_in(text: str) -> frozenset[str]:
    """Names of attributes that a text can be made to read: ``rate``, ``model.rate``, ``{0.rate:.3f}``."""
    if "." in text and ("{" in text or text.replace(".", "_").isidentifier()):
        return frozenset((text, *_WORD.findall(text)))
    return frozenset((text,))


class _Facts:
    """What code reads by name, code inside it included."""

    def __init__(self, code: types.CodeType) -> None:
        self.code, self.codes = code, {code}
        self.names: frozenset[str] = frozenset()
        found: set[str] = set()
        attributes: set[str] = set()
        imports: set[str] = set()
        self.passed: set[str] = set()
        self.problem = ""
        self.line = f"{code.co_filename}:{code.co_firstlineno}"
        instructions = [i for i in dis.get_instructions(code) if i.opname not in ("PRECALL", "CACHE", "PUSH_NULL")]
        for i, after in itertools.pairwise([*instructions, instructions[-1]]):
            name = i.argval
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_CLOSURE"):
                found.add(name)
                if i.opname == "LOAD_CLOSURE" or after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    self.passed.add(name)
                if name == "type" and not (after.opname == "LOAD_FAST" and after.argval in ("self", "cls")):
                    self.problem = f"{_TYPE}, at {self.line}"
            elif i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                found.add(name)
            elif i.opname == "IMPORT_NAME":
                imports |= {name, name.partition(".")[0]}
            elif i.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "IMPORT_FROM", "LOAD_SUPER")):
                attributes.add(name)
        attributes |= {part for name in imports for part in name.split(".")}
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                inner = _facts(constant)
                self.codes |= inner.codes
                found |= {*inner.globals} - {*code.co_cellvars, *code.co_varnames}
                self.passed |= inner.passed
                attributes.update(inner.names)
                imports |= {*inner.imports}
                self.problem = self.problem or inner.problem
            elif isinstance(constant, str):
                attributes |= _names_in(constant)
            elif isinstance(constant, tuple):
                attributes.update(*(_names_in(part) for part in constant if isinstance(part, str)))
        free = {*code.co_freevars, *code.co_cellvars}
        self.globals: list[str] = sorted(found - free)
        self.imports: list[str] = sorted(imports)
        self.names = frozenset(attributes | found)


_TYPE = "it asks for the type of a value by type(), which a trace changes; use isinstance"
_known: dict[int, _Facts] = {}


def _facts(code: types.CodeType) -> _Facts:
    found = _known.get(id(code))
    if found is None:
        if len(_known) > 10_000:
            _known.clear()
        found = _known[id(code)] = _Facts(code)  # which keeps the code, and so its identity, alive
    return found
