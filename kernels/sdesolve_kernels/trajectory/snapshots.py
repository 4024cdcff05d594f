"""What objects hold at one moment, to be put back later."""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import random
import struct
import types
from collections.abc import Callable, Iterable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory.watching import is_library

__all__ = ["GENERATORS", "Snapshot", "random_states", "same", "slots_of", "written_in_python"]

_LARGEST = 1 << 20  # elements of a tensor that is copied; no operation of a trace reaches its values anyway
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_NUMBERS = "it draws random numbers"
GENERATORS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
)
_PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.Size)


@final
class Snapshot:
    """Contents of containers, attributes, cells, functions, classes, namespaces, arrays, tensors and generators."""

    def __init__(self, held: Iterable[object], namespaces: dict[int, dict[str, Any]]) -> None:
        self._parts: list[tuple[str, Any, Callable[[], Any], Callable[[Any], object]]] = []
        seen: set[int] = set()
        for thing in held:
            self._note(thing, seen)
        for space in namespaces.values():
            if is_library(space.get("__name__")):  # libraries import parts of themselves when they are first used
                self._add(functools.partial(_settings, space), functools.partial(_put_settings, space))
            else:
                self._entries(space, seen)
        for get, put in GENERATORS:
            self._add(get, put, _NUMBERS)

    def changed(self) -> str:
        """Names what is not as it was; empty if all is."""
        return next((what for what, _, _ in self._differences()), "")

    def put_back(self) -> str:
        """Puts back what is not as it was, and names the first of it."""
        what = ""
        for name, before, put in self._differences():
            put(before)
            what = what or name
        return what

    def _differences(self) -> list[tuple[str, Any, Callable[[Any], object]]]:
        found = []
        for what, before, get, put in self._parts:
            now = get()
            if not same(before, now):
                found.append((_difference(before, now) or what, before, put))
        return found

    def _add(self, get: Callable[[], Any], put: Callable[[Any], object], what: str = "a container or a cell") -> None:
        self._parts.append((what, get(), get, put))

    def _entries(self, entries: dict[Any, Any], seen: set[int]) -> None:
        if id(entries) not in seen:
            seen.add(id(entries))
            kind = collections.OrderedDict if isinstance(entries, collections.OrderedDict) else dict
            self._add(lambda: dict(kind.items(entries)), functools.partial(_put_entries, kind, entries))

    def _note(self, thing: Any, seen: set[int]) -> None:
        if id(thing) in seen:
            return
        match thing:
            case dict():
                self._entries(thing, seen)
            case list():
                self._add(lambda: tuple(list.__iter__(thing)), lambda old: list.__setitem__(thing, slice(None), old))
            case collections.deque():
                self._add(lambda: tuple(thing), functools.partial(_put_queue, thing))
            case set():
                self._add(lambda: tuple(sorted(thing, key=id)), lambda old: (set.clear(thing), set.update(thing, old)))
            case types.CellType():
                self._add(lambda: (thing.cell_contents,), lambda old: setattr(thing, "cell_contents", old[0]))
            case types.FunctionType():
                names = ("__code__", "__defaults__", "__kwdefaults__")
                self._add(
                    lambda: tuple((n, getattr(thing, n)) for n in names), functools.partial(_put_attributes, thing)
                )
            case type():
                self._add(lambda: dict(vars(thing)), functools.partial(_put_class, thing))
            case np.ndarray():
                self._add(thing.copy, lambda old: np.copyto(thing, old), "an array in place")
            case Tensor():
                self._tensor(thing)
            case random.Random():
                self._add(thing.getstate, thing.setstate, _NUMBERS)
            case np.random.Generator():
                bits = thing.bit_generator
                self._add(lambda: bits.state, lambda old: setattr(bits, "state", old), _NUMBERS)
            case np.random.RandomState():
                self._add(thing.get_state, thing.set_state, _NUMBERS)
            case torch.Generator():
                self._add(thing.get_state, thing.set_state, _NUMBERS)
        seen.add(id(thing))
        if not isinstance(thing, type | types.ModuleType):
            state = getattr(thing, "__dict__", None)
            if type(state) is dict:
                self._entries(state, seen)
            kind: type = type(thing)
            for slot in slots_of(kind):
                self._add(functools.partial(_slot, slot, thing), functools.partial(_put_slot, slot, thing))

    def _tensor(self, thing: Tensor) -> None:
        names = ("grad", "requires_grad") if thing.is_leaf else ()
        self._add(lambda: {n: getattr(thing, n) for n in names}, functools.partial(_put_attributes, thing))
        if thing.layout is torch.strided and thing.numel() <= _LARGEST and not thing.is_meta:
            self._add(lambda: thing.detach().clone(), lambda old: thing.detach().copy_(old), "a tensor in place")


def random_states() -> Callable[[], None]:
    """What puts the global generators back to where they are now."""
    states = [(put, get()) for get, put in GENERATORS]

    def put_back() -> None:
        for put, state in states:
            put(state)

    return put_back


@functools.lru_cache(4096)
def written_in_python(kind: type) -> bool:
    """Whether all that a class adds to its instances is a ``__dict__``, weak references and slots.

    A class that is compiled may keep more, which nothing shows but the size of its instances. That it is made at run
    time (``Py_TPFLAGS_HEAPTYPE``) does not tell: those of itertools are from Python 3.12 on.
    """
    if not kind.__flags__ & 1 << 9 or kind.__base__ is None:
        return False
    own, fields = vars(kind), (kind.__basicsize__ - kind.__base__.__basicsize__) // struct.calcsize("P")
    fields -= ("__dict__" in own) + ("__weakref__" in own)
    return fields <= 0 or fields <= sum(type(a) is types.MemberDescriptorType for a in own.values())


@functools.lru_cache(4096)
def slots_of(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """Descriptors of the slots that instances of a class have."""
    return tuple(
        a for b in kind.__mro__ if "__slots__" in vars(b) and written_in_python(b) for a in vars(b).values()
        if type(a) is types.MemberDescriptorType
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same, to the bit, for all that is known of their kinds."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is dict:
        # No __eq__ of a key's class is called: a key that was replaced by an equal one counts as a change.
        return len(a) == len(b) and all(map(operator.is_, a, b)) and all(map(same, a.values(), b.values()))
    if type(a) is tuple:
        if set(map(type, a)) == {int}:  # states of generators are long
            return bool(a == b)
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        # A shape or dtype that has changed differs in memory; nan is compared by its bits.
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and ((a.dtype == torch.uint8 and torch.equal(a, b)) or bool((_bits(a) == _bits(b)).all()))
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and (a.dtype.hasobject or a.tobytes() == b.tobytes())
    return type(a) in _PLAIN and (a == b or a != a)


def _bits(a: Tensor) -> Tensor:
    dense = a.resolve_conj().resolve_neg().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # one element may have any stride


def _difference(before: Any, now: Any) -> str:
    """The name of an attribute or entry that has changed, if it has one."""
    if type(before) is not dict:
        return ""
    names = (n for n in {**now, **before} if n not in before or n not in now or not same(before[n], now[n]))
    return f"`{next(names, '')}`"


def _put_queue(queue: collections.deque[Any], old: tuple[Any, ...]) -> None:
    queue.clear()
    queue.extend(old)


def _put_entries(kind: Any, entries: dict[Any, Any], old: dict[Any, Any]) -> None:
    kind.clear(entries)
    kind.update(entries, old)


def _settings(space: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in space.items() if type(value) not in _CODE}


def _put_settings(space: dict[str, Any], old: dict[str, Any]) -> None:
    for name in _settings(space).keys() - old.keys():
        del space[name]
    space.update(old)


def _put_attributes(thing: Any, old: dict[str, Any]) -> None:
    for name, value in old.items():
        setattr(thing, name, value)


def _put_class(thing: type, old: dict[str, Any]) -> None:
    for name in vars(thing).keys() - old.keys():
        delattr(thing, name)
    for name, value in old.items():
        if vars(thing).get(name, old) is not value:
            with contextlib.suppress(AttributeError, TypeError):
                setattr(thing, name, value)


def _slot(slot: types.MemberDescriptorType, thing: object) -> dict[str, Any]:
    try:
        return {slot.__name__: slot.__get__(thing)}
    except AttributeError:
        return {}


def _put_slot(slot: types.MemberDescriptorType, thing: object, old: dict[str, Any]) -> None:
    if old:
        slot.__set__(thing, old[slot.__name__])
    else:
        slot.__delete__(thing)
