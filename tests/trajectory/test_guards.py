"""Something that a function reads is changed between two solutions: the second is that of eager torch."""

from __future__ import annotations

import abc
import array
import builtins
import collections
import contextvars
import csv
import dataclasses
import datetime
import decimal
import enum
import functools
import inspect
import io
import itertools
import math
import operator
import queue
import random
import re
import struct
import sys
import threading
import types
import typing
import weakref
import zlib

import numpy as np
import pytest
import torch
from sdesolve_kernels.trajectory.snapshots import written_in_python

import sdesolve as sds
from sdesolve.sde import Noise

RATE = 1.0
ABOUT = {"rate": 1.0}


class Plain:
    rate = 1.0


class Real(float):
    pass


class Text(str):
    __slots__ = ()


class Entries(dict):
    pass


class Items(list):
    pass


class Described:
    """1.5"""

    a: int


class Subclassed:
    pass


class Matched:
    __match_args__ = ("value",)
    value = 1.0


class Registry(abc.ABC):  # noqa: B024
    pass


@typing.runtime_checkable
class Going(typing.Protocol):
    def go(self): ...


def matching(x, t):
    match MATCHED:
        case Matched(value):
            return x * value


def named():
    """As long as this."""


class Meta(type):
    rate = 1.0


class WithMeta(metaclass=Meta):
    pass


class Slotted:
    __slots__ = ("rate",)


class Private:
    __slots__ = ("__rate",)

    def __init__(self):
        self.set(1.0)

    def set(self, rate):
        self.__rate = rate

    def rate(self):
        return self.__rate


class Partial(functools.partial):
    pass


class Day(datetime.date):
    pass


class Rates:
    @property
    def of_global(self):
        return RATE

    @staticmethod
    def static():
        return 1.0

    @classmethod
    def of_class(cls):
        return HELD["rate"]


class Switch(enum.Enum):
    ON = 1

    @property
    def of_global(self):
        return RATE


class Setting(enum.Enum):
    HELD = types.SimpleNamespace(rate=1.0)


def through(held):
    return lambda x, t: x * held.rate


def switched(held):
    return lambda x, t: x * held.of_global


def set_to(held):
    return lambda x, t: x * held.value.rate


@functools.wraps(torch.nn.functional.softplus)
def wrapping(x, t):
    return x * RATE


@dataclasses.dataclass
class Settings:
    rate: float = 1.0
    names: tuple[str, ...] = ("a",)
    more: dict[str, float] = dataclasses.field(default_factory=dict)


Annotated = dataclasses.make_dataclass("Annotated", [("rate", float | None, 1.0), ("names", list[str] | None, None)])


class Pair(typing.NamedTuple):
    rate: float
    other: float


class Locked:
    def __init__(self):
        self.lock, self.again, self.rate = threading.Lock(), threading.RLock(), 1.0


@functools.lru_cache
def cached():
    return RATE


def helper(x):
    return x * RATE


def with_default(x, t, a=[1.0], *, b=1.0):  # the case  # noqa: B006
    return x * a[0] * b


def with_attribute(x, t):
    return x * with_attribute.rate


def swapped(x, t):
    return x


def importing(x, t):
    import usermodule

    return x * usermodule.rate


def importing_from(x, t):
    from usermodule.inner import rate

    return x * rate


HELD, LIST, OBJECT, SLOTTED, NUMBERS = {"rate": 1.0, "other": 3.0}, [1.0], Plain(), Slotted(), np.ones(2)
SUBCLASSED, ITEMS, ENTRIES, QUEUE = [Real(1.0), Text("a")], Items(), Entries(), collections.deque([1.0])
BYTES, TYPED, NAMES, VARIABLE = (
    bytearray(b"a"),
    array.array("d", [1.0]),
    {"a"},
    contextvars.ContextVar("v", default=1.0),
)
CLASSES, NAMESPACE = {Plain}, types.SimpleNamespace(rate=1.0)
RATES, GET, LAYER, WEAK = Rates(), HELD.get, torch.nn.Linear(2, 2).double(), weakref.ref(OBJECT)
ANNOTATED = Annotated()
SETTINGS, PAIRS, SLICES, LOCKED = Settings(), [Pair(1.0, 2.0)], [slice(0, 1)], Locked()
GETTERS, PATTERNS, PAIRED = [operator.itemgetter("rate")], [re.compile("a")], {(Noise.NONE, 1.0)}
PRIVATE, WEIGHT, KEY = Private(), torch.ones(2), "rate"
WEIGHT.rate = 1.0
WEAK_VALUES, OF_META, DAYS = weakref.WeakValueDictionary(a=OBJECT), WithMeta(), [Day(2000, 1, 1)]
COMPLEX, ONES = [complex(1.0, -0.0)], [frozenset({1})]
PARTIAL_SUBCLASS = Partial(lambda a, x, t: x * a[0], LIST)
MATCHED, GOING, ORDERED = Matched(), Plain(), collections.OrderedDict(a=1.0, b=2.0)
RANGES, DECIMALS, DOTTED = [range(0, 3, 2)], [decimal.Decimal("1.0")], operator.attrgetter("inner.rate")
VIEW, LARGE = types.MappingProxyType(HELD), np.zeros(100_000)
usermodule = types.ModuleType("usermodule")
usermodule.inner = types.ModuleType("usermodule.inner")
HOLDER = types.SimpleNamespace(module=usermodule)
SLOTTED.rate = with_attribute.rate = usermodule.rate = usermodule.inner.rate = ITEMS.rate = ENTRIES.rate = 1.0
PARTIAL, MAPPED = functools.partial(lambda a, x, t: x * a[0], LIST), torch.vmap(lambda y: y * RATE)
GRADIENT = torch.func.grad(lambda y: (y * RATE).sum())


def set_rate(value):
    global RATE
    RATE = value


# What a researcher's code is full of: looked into to the end, so that a kernel is found again.
SEEN_THROUGH = {
    "dataclass": (lambda x, t: x * SETTINGS.rate, lambda: setattr(SETTINGS, "rate", 2.0)),
    "field of a dataclass": (lambda x, t: x * SETTINGS.more.get("a", 1.0), lambda: SETTINGS.more.update(a=2.0)),
    "dataclass with annotations": (lambda x, t: x * ANNOTATED.rate, lambda: setattr(ANNOTATED, "rate", 2.0)),
    "named tuple": (lambda x, t: x * PAIRS[0].rate, lambda: PAIRS.__setitem__(0, Pair(2.0, 2.0))),
    "slice": (lambda x, t: x * sum([1.0, 2.0, 3.0][SLICES[0]]), lambda: SLICES.__setitem__(0, slice(0, 2))),
    "view of a dictionary": (lambda x, t: x * VIEW["rate"], lambda: HELD.update(rate=5.0)),
    "getter of an item": (
        lambda x, t: x * GETTERS[0](HELD),
        lambda: GETTERS.__setitem__(0, operator.itemgetter("other")),
    ),
    "pattern": (lambda x, t: x * bool(PATTERNS[0].match("a")), lambda: PATTERNS.__setitem__(0, re.compile("b"))),
    "beside locks": (lambda x, t: x * LOCKED.rate, lambda: setattr(LOCKED, "rate", 2.0)),
    "enumeration": (lambda x, t: x * bool(Switch.ON), lambda: setattr(Switch, "rate", 4.0)),
    "set of pairs": (lambda x, t: x * len(PAIRED), lambda: PAIRED.add((Noise.NONE, 2.0))),
}
CASES = {
    **SEEN_THROUGH,
    "global": (lambda x, t: x * RATE, lambda: set_rate(2.0)),
    "through a helper": (lambda x, t: helper(x), lambda: set_rate(2.0)),
    "inside a nested function": (lambda x, t: (lambda: x * RATE)(), lambda: set_rate(2.0)),
    "inside a comprehension": (lambda x, t: sum([x * RATE for _ in range(2)]), lambda: set_rate(2.0)),
    "cached function": (lambda x, t: x * cached(), lambda: set_rate(2.0)),
    "property": (lambda x, t: x * RATES.of_global, lambda: set_rate(2.0)),
    "vmap": (lambda x, t: MAPPED(x), lambda: set_rate(2.0)),
    "gradient": (lambda x, t: GRADIENT(x), lambda: set_rate(2.0)),
    "globals()": (lambda x, t: x * globals()["RATE"], lambda: set_rate(2.0)),
    "static method": (lambda x, t: x * RATES.static(), lambda: setattr(Rates, "static", staticmethod(lambda: 2.0))),
    "class method": (lambda x, t: x * RATES.of_class(), lambda: HELD.update(rate=2.0)),
    "dictionary": (lambda x, t: x * HELD["rate"], lambda: HELD.update(rate=3.0)),
    "method of a dictionary": (lambda x, t: x * GET("rate"), lambda: HELD.update(rate=4.0)),
    "list": (lambda x, t: x * LIST[0], lambda: LIST.append(2.0)),
    "partial": (PARTIAL, lambda: LIST.append(2.0)),
    "attribute": (lambda x, t: x * OBJECT.rate, lambda: setattr(OBJECT, "rate", 2.0)),
    "weak reference": (lambda x, t: x * WEAK().rate, lambda: setattr(OBJECT, "rate", 3.0)),
    "class attribute": (lambda x, t: x * Plain.rate, lambda: setattr(Plain, "rate", 2.0)),
    "class in a set": (lambda x, t: x * next(iter(CLASSES)).rate, lambda: setattr(Plain, "rate", 3.0)),
    "attribute of a metaclass": (lambda x, t: x * WithMeta.rate, lambda: setattr(Meta, "rate", 2.0)),
    "slot": (lambda x, t: x * SLOTTED.rate, lambda: setattr(SLOTTED, "rate", 2.0)),
    "namespace": (lambda x, t: x * NAMESPACE.rate, lambda: setattr(NAMESPACE, "rate", 2.0)),
    "subclass of float": (lambda x, t: x * SUBCLASSED[0], lambda: SUBCLASSED.__setitem__(0, Real(2.0))),
    "subclass of str": (lambda x, t: x * ord(SUBCLASSED[1]), lambda: SUBCLASSED.__setitem__(1, Text("b"))),
    "attribute of a list": (lambda x, t: x * ITEMS.rate, lambda: setattr(ITEMS, "rate", 2.0)),
    "attribute of a dictionary": (lambda x, t: x * ENTRIES.rate, lambda: setattr(ENTRIES, "rate", 2.0)),
    "attribute of an enumeration": (
        lambda x, t: x * getattr(Switch, "rate", 1.0),
        lambda: setattr(Switch, "rate", 2.0),
    ),
    "module": (lambda x, t: x * usermodule.rate, lambda: setattr(usermodule, "rate", 2.0)),
    "module by getattr": (lambda x, t: x * getattr(usermodule, "rate"), lambda: setattr(usermodule, "rate", 3.0)),  # noqa: B009
    "module in a module": (lambda x, t: x * usermodule.inner.rate, lambda: setattr(usermodule.inner, "rate", 2.0)),
    "import inside": (importing, lambda: setattr(usermodule, "rate", 4.0)),
    "import from inside": (importing_from, lambda: setattr(usermodule.inner, "rate", 3.0)),
    "array in place": (lambda x, t: x * NUMBERS[0], lambda: NUMBERS.__setitem__(0, 2.0)),
    "large array in place": (lambda x, t: x * LARGE[0], lambda: LARGE.__setitem__(0, 2.0)),
    "typed array": (lambda x, t: x * TYPED[0], lambda: TYPED.append(2.0)),
    "bytes": (lambda x, t: x * BYTES[0], lambda: BYTES.append(2)),
    "queue": (lambda x, t: x * QUEUE[0], lambda: QUEUE.append(2.0)),
    "set": (lambda x, t: x * len(NAMES), lambda: NAMES.add("b")),
    "context variable": (lambda x, t: x * VARIABLE.get(), lambda: VARIABLE.set(2.0)),
    "module in a cell": (through(usermodule), lambda: setattr(usermodule, "rate", 5.0)),
    "module as an attribute": (lambda x, t: x * HOLDER.module.rate, lambda: setattr(usermodule, "rate", 6.0)),
    "module by a name that is held": (lambda x, t: x * getattr(usermodule, KEY), lambda: setattr(usermodule, KEY, 7.0)),
    "private slot": (lambda x, t: x * PRIVATE.rate(), lambda: PRIVATE.set(2.0)),
    "attribute of a tensor": (lambda x, t: x * WEIGHT.rate, lambda: setattr(WEIGHT, "rate", 2.0)),
    "property of an enumeration": (switched(Switch.ON), lambda: set_rate(2.0)),
    "value of an enumeration": (set_to(Setting.HELD), lambda: setattr(Setting.HELD.value, "rate", 2.0)),
    "subclass of partial": (PARTIAL_SUBCLASS, lambda: LIST.append(2.0)),
    "function with another's name": (wrapping, lambda: set_rate(2.0)),
    "weak values": (lambda x, t: x * WEAK_VALUES["a"].rate, lambda: setattr(OBJECT, "rate", 4.0)),
    "metaclass of an instance": (lambda x, t: x * type(OF_META).rate, lambda: setattr(Meta, "rate", 4.0)),
    "subclass of a date": (lambda x, t: x * DAYS[0].day, lambda: DAYS.__setitem__(0, Day(2000, 1, 2))),
    "sign of a zero": (
        lambda x, t: x * math.copysign(1.0, COMPLEX[0].imag),
        lambda: COMPLEX.__setitem__(0, complex(1.0, 0.0)),
    ),
    "type in a set": (lambda x, t: x * next(iter(ONES[0])), lambda: ONES.__setitem__(0, frozenset({1.0}))),
    "default": (with_default, lambda: with_default.__defaults__[0].__setitem__(0, 2.0)),
    "keyword default": (with_default, lambda: with_default.__kwdefaults__.update(b=2.0)),
    "attribute of a function": (with_attribute, lambda: setattr(with_attribute, "rate", 2.0)),
    "code": (swapped, lambda: setattr(swapped, "__code__", (lambda x, t: -x).__code__)),
    "range of the same numbers": (lambda x, t: x * RANGES[0].stop, lambda: RANGES.__setitem__(0, range(0, 4, 2))),
    "equal decimal": (
        lambda x, t: x * len(DECIMALS[0].as_tuple().digits),
        lambda: DECIMALS.__setitem__(0, decimal.Decimal("1.00")),
    ),
    "order of a dictionary": (lambda x, t: x * next(iter(ORDERED.values())), lambda: ORDERED.move_to_end("a")),
    "getter with a dot": (lambda x, t: x * DOTTED(usermodule), lambda: setattr(usermodule.inner, "rate", 8.0)),
    "format": (
        lambda x, t: x * float(f"{usermodule.inner.rate:.3f}"),
        lambda: setattr(usermodule.inner, "rate", 9.0),
    ),
    "positional pattern": (matching, lambda: setattr(Matched, "value", 2.0)),
    "docstring": (lambda x, t: x * float(Described.__doc__), lambda: setattr(Described, "__doc__", "2.5")),
    "annotations": (lambda x, t: x * len(Described.__annotations__), lambda: Described.__annotations__.update(b=int)),
    "name of a class": (lambda x, t: x * len(Described.__name__), lambda: setattr(Described, "__name__", "D")),
    "name of a function": (lambda x, t: x * len(named.__name__), lambda: setattr(named, "__name__", "n")),
    "subclasses": (
        lambda x, t: x * (1 + len(Subclassed.__subclasses__())),
        lambda: LIST.append(type("Another", (Subclassed,), {})),
    ),
    "globals of a function": (lambda x, t: x * helper.__globals__["ABOUT"]["rate"], lambda: ABOUT.update(rate=2.0)),
    "registered class": (
        lambda x, t: x if isinstance(OBJECT, Registry) else -x,
        lambda: Registry.register(Plain) and None,
    ),
    "protocol": (lambda x, t: x if isinstance(GOING, Going) else -x, lambda: setattr(Plain, "go", lambda self: 1)),
    "list among the builtins": (
        lambda x, t: x * sdesolve_list[0],  # noqa: F821
        lambda: builtins.sdesolve_list.__setitem__(0, 2.0),
    ),
    "function among the builtins": (lambda x, t: sdesolve_function(x), lambda: set_rate(2.0)),  # noqa: F821
    "flag of a module": (lambda x, t: LAYER(x), lambda: LAYER.train(not LAYER.training)),
}


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.setitem(sys.modules, "usermodule", usermodule)
    monkeypatch.setitem(sys.modules, "usermodule.inner", usermodule.inner)
    monkeypatch.setattr(builtins, "sdesolve_list", [1.0], raising=False)
    monkeypatch.setattr(builtins, "sdesolve_function", lambda y: y * RATE, raising=False)


X0 = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)


def solved(f, backend):
    sde = sds.SDE(f, lambda x, t: 0.1 * torch.ones_like(x))
    return sds.solve(sde, X0, 0.0, 1.0, 2, solver=sds.EulerMaruyama(), seed=1, backend=backend)


def same(f, difference):
    auto, eager = solved(f, "auto"), solved(f, "eager")
    assert difference(auto.x1, eager.x1) < 1e-13, auto.stats
    return auto.stats.backend


@pytest.mark.parametrize(("function", "change"), list(CASES.values()), ids=list(CASES))
def test_a_change_of_what_is_read_changes_the_result(function, change, interpreted, difference):
    set_rate(1.0)
    with torch.no_grad():
        same(function, difference)
        change()
        same(function, difference)


@pytest.mark.parametrize("function", [case[0] for case in SEEN_THROUGH.values()], ids=list(SEEN_THROUGH))
def test_common_holders_are_looked_into_to_the_end(function, interpreted, difference):
    with torch.no_grad():
        assert same(function, difference) == "fused"
        assert same(function, difference) == "fused"
    assert interpreted.made == 1


def test_a_name_that_a_library_lacks_until_it_is_set(monkeypatch, interpreted, difference):
    """The search for what names stand for ends, though no name of ``math`` is among them."""

    def f(x, t):
        return x * getattr(math, "sdesolve_rate", 1.0)

    with torch.no_grad():
        assert same(f, difference) == "fused"
        monkeypatch.setattr(math, "sdesolve_rate", 2.0, raising=False)
        same(f, difference)


class NoDict:
    rate = 1.0

    @property
    def __dict__(self):
        raise RuntimeError("no dict")


class WithoutHash(type):
    def __eq__(cls, other):
        return True

    __hash__ = None


class Unhashable(metaclass=WithoutHash):
    rate = 1.0


class Counted(torch.Tensor):
    looks = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Counted.looks += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def scripted():
    layer = torch.jit.script(torch.nn.Linear(2, 2).double())

    def f(x, t):
        return layer(x)

    return f


NOT_SEEN_INTO = {
    "__dict__": lambda: through(NoDict()),
    "class": lambda: through(Unhashable()),
    "signature": lambda: lambda x, t, s=inspect.signature(lambda a=[1]: a): x * len(s.parameters),  # noqa: B008
    "lazy layer": lambda: (lambda layer: lambda x, t: layer(x))(torch.nn.LazyLinear(2).double()),
    "script": scripted,
    "quantised": lambda: (lambda q: lambda x, t: x * q.dequantize().double())(
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    ),
}


def test_compiled_classes_are_told_by_the_size_of_their_instances():
    """On every Python: which of them are made at run time, as those written in Python are, differs."""

    @dataclasses.dataclass(slots=True, weakref_slot=True)
    class Slots:
        a: int = 1

    class Mixed(Slots, Described):
        pass

    class Numbers(typing.NamedTuple):
        a: int

    python = (Slots, Mixed, Numbers, Plain, Real, Text, Entries, Items, torch.nn.Linear, random.Random, queue.Queue)
    compiled = (
        itertools.cycle([]), itertools.count(), iter([]), map(str, ()), zip(), csv.reader([]), array.array("d"),
        io.BytesIO(), zlib.compressobj(), struct.Struct("d"), queue.SimpleQueue(), re.compile(""), torch._C.Graph(),
        object(),
    )  # fmt: skip
    assert all(map(written_in_python, python))
    assert not any(all(map(written_in_python, type(value).__mro__[:-1] or (object,))) for value in compiled)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("make", list(NOT_SEEN_INTO.values()), ids=list(NOT_SEEN_INTO))
def test_objects_that_cannot_be_seen_into_are_reasons(make, interpreted, difference):
    with torch.no_grad():
        with pytest.raises(ValueError, match="cannot be fused"):
            solved(make(), "fused")
        torch.manual_seed(0)
        auto = solved(make(), "auto")
        torch.manual_seed(0)
        assert difference(auto.x1, solved(make(), "eager").x1) < 1e-13


def test_a_tensor_that_the_user_watches_is_not_looked_at(interpreted):
    weights = torch.ones(2, dtype=torch.float64).as_subclass(Counted)

    def f(x, t):
        return (x * weights).as_subclass(torch.Tensor)

    looks = []
    with torch.no_grad():
        for backend in ("auto", "eager"):
            Counted.looks = 0
            solved(f, backend)
            looks.append(Counted.looks)
        assert looks[0] == looks[1]
        with pytest.raises(ValueError, match="cannot be looked into"):
            solved(f, "fused")


def test_a_lock_is_open_again_after_a_trace(interpreted, difference):
    lock = threading.Lock()

    def f(x, t):
        with lock:
            return -x

    with torch.no_grad():
        same(f, difference)
        assert not lock.locked()
        with pytest.raises(ValueError, match="cannot be fused"):
            solved(f, "fused")
    assert not lock.locked()


def test_tensors_as_keys(interpreted, difference):
    weights = torch.ones(2, dtype=torch.float64)
    table = {weights: 2.0}

    def f(x, t):
        return -x * table[weights] * weights

    with torch.no_grad():
        same(f, difference)
        table[weights] = 3.0
        same(f, difference)
