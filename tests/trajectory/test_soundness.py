"""Functions that a trace could get wrong: ``auto`` gives what eager gives, and leaves what they hold as eager does.

Every case makes its function afresh, so that both ways start from the same state, and solves twice with it.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import gc
import inspect
import itertools
import math
import os
import random
import sys
import threading
import time
import traceback
import types
import uuid
from typing import ClassVar

import numpy as np
import pytest
import torch
from sdesolve_kernels.trajectory import Unsupported
from sdesolve_kernels.trajectory import agree as agrees
from sdesolve_kernels.trajectory.tracing import Traced

import sdesolve as sds

nn = torch.nn
X0 = torch.linspace(-1.0, 1.0, 288, dtype=torch.float64).reshape(144, 2)
EYE = torch.eye(2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def solve(f, backend, x0=X0, steps=5, **options):
    sde = sds.SDE(f, lambda x, t: 0.1 * torch.ones_like(x))
    return sds.solve(sde, x0, 0.0, 1.0, steps, solver=sds.EulerMaruyama(), seed=1, backend=backend, **options)


def runs(make, backend, x0=X0):
    """Two solutions with one function, which is made anew; what the generators gave afterwards."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    f = make()
    first, second = solve(f, backend, x0), solve(f, backend, x0)
    after = torch.rand(3).tolist(), np.random.rand(), random.random()  # noqa: NPY002
    return (first, second), after


def agree(make, difference, x0=X0):
    """The stats of ``auto``, whose solutions are those of ``eager``."""
    (first, second), after = runs(make, "auto", x0)
    wanted, after_eager = runs(make, "eager", x0)
    assert difference(first.x1, wanted[0].x1) < 1e-12, first.stats.reason
    assert difference(second.x1, wanted[1].x1) < 1e-12, second.stats.reason
    assert after == after_eager
    return first.stats


# State that moves ------------------------------------------------------------------------------------------------
class Counting:
    """A drift that looks a table up with the number of its calls."""

    def __init__(self):
        self.calls, self.table = 0, torch.linspace(-5.0, 5.0, 50, dtype=torch.float64)

    def __call__(self, x, t):
        u = self.table[self.calls]
        self.calls += 1
        return u - x


class KeepsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(2, 2).double(), None

    def forward(self, x, t):
        y = self.layer(x) if self.last is None else 0.5 * self.last + self.layer(x)
        self.last = y
        return y


class OnClass:
    calls = 0

    def __call__(self, x, t):
        type_of_self = OnClass
        type_of_self.calls = (type_of_self.calls + 1) % 5
        return -x * (1 + OnClass.calls)


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return -x / self.calls


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x, t):
        self.calls += 1
        return -x / self.calls


def nonlocal_number():
    calls = 0

    def f(x, t):
        nonlocal calls
        calls += 1
        return -x / calls

    return f


def past():
    states = collections.deque([torch.zeros_like(X0)], maxlen=3)

    def f(x, t):
        states.append(x)
        return -states[0]

    return f


def appended():
    seen = []

    def f(x, t):
        seen.append(x.mean())
        return -x / len(seen)

    return f


def on_function():
    def f(x, t):
        f.calls = getattr(f, "calls", 0) + 1
        return -x / f.calls

    return f


def default():
    def f(x, t, seen=[]):  # noqa: B006
        seen.append(1)
        return -x / len(seen)

    return f


def in_array():
    counts = np.zeros(1)

    def f(x, t):
        counts[0] += 1
        return -x / float(counts[0])

    return f


def in_shared_memory():
    counts = np.zeros(1)
    tensor = torch.from_numpy(counts)

    def f(x, t):
        counts[0] += 1
        return -x / tensor

    return f


def first_differs():
    state = {"first": True}

    def f(x, t):
        if state["first"]:
            state["first"] = False
            return 0 * x
        return -x

    return f


def later_differs():
    state = {"left": 3}

    def f(x, t):
        state["left"] = max(0, state["left"] - 1)
        return -x if state["left"] else x

    return f


def attribute_of_library():
    def f(x, t):
        np.sdesolve_test = getattr(np, "sdesolve_test", 0) + 1
        return -x / (1 + np.sdesolve_test % 5)

    return f


def alternating():
    on = {True}

    def f(x, t):
        on.symmetric_difference_update({True})
        return -x if on else x

    return f


MOVING = {
    "counter": Counting, "last state": KeepsLast, "class attribute": OnClass, "slot": Slotted, "buffer": Buffered,
    "nonlocal": nonlocal_number, "delay": past, "list": appended, "attribute of the function": on_function,
    "default": default, "array": in_array, "shared memory": in_shared_memory, "first call": first_differs,
    "saturating": later_differs, "set": alternating, "attribute of a library": attribute_of_library,
    "iterator": lambda: (lambda x, t, it=itertools.cycle([1.0, 2.0, 3.0]): -x * next(it)),  # noqa: B008
    "generator": lambda: (lambda x, t, g=iter(lambda: 2.0, None): -x * next(g)),  # noqa: B008
    "batch norm": lambda: (lambda m: lambda x, t: -m(x))(nn.BatchNorm1d(2).double()),
    "spectral norm": lambda: (lambda m: lambda x, t: m(x))(
        nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2).double())),
    "NumPy's random state": lambda: lambda x, t: -x * np.random.rand(),  # noqa: NPY002
    "Python's random state": lambda: lambda x, t: -x * random.random(),
    "generator of NumPy": lambda: (lambda x, t, g=np.random.default_rng(0): -x * g.random()),  # noqa: B008
    "old generator of NumPy": lambda: (lambda x, t, g=np.random.RandomState(0): -x * g.rand()),  # noqa: B008
    "generator of Python": lambda: (lambda x, t, g=random.Random(0): -x * g.random()),  # noqa: B008
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the functions of this equation hold a BatchNorm1d in training mode")
@pytest.mark.parametrize("make", list(MOVING.values()), ids=list(MOVING))
def test_state_that_moves(make, difference, interpreted):
    torch.manual_seed(0)
    assert agree(make, difference).backend != "fused"
    with pytest.raises(ValueError, match="cannot be fused"):
        solve(make(), "fused")


@pytest.mark.parametrize("make", [KeepsLast, past, appended], ids=["attribute", "deque", "list"])
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_no_symbolic_tensor_outlives_a_trace(make, backend, interpreted):
    gc.freeze()  # what is there already is not looked at
    f = make()
    with contextlib.suppress(ValueError):
        solve(f, backend)
    gc.collect()
    assert not [a for a in gc.get_objects() if type(a) is Traced]


def test_a_refused_function_is_left_as_it_was(interpreted):
    f, g = Counting(), appended()
    for function in (f, g):
        with pytest.raises(ValueError, match="changes Python values"):
            solve(function, "fused")
    assert f.calls == 0
    assert g.__closure__[0].cell_contents == []


def lazily_filled():
    table = {}

    def f(x, t):
        if "w" not in table:
            table["w"] = 2 * torch.eye(2, dtype=torch.float64)
        return -x @ table["w"]

    f.table = table
    return f


class Cached:
    @functools.cached_property
    def w(self):
        return 2 * torch.eye(2, dtype=torch.float64)

    def __call__(self, x, t):
        return -x @ self.w


def layer_made_when_needed():
    held = {}

    def f(x, t):
        if "layer" not in held:
            held["layer"] = nn.Linear(2, 2).double()  # draws random numbers, once
        return held["layer"](x)

    return f


def least_recently_used():
    @functools.lru_cache
    def table(n):
        return torch.arange(1, n + 1, dtype=torch.float64)

    return lambda x, t: -x * table(2)


@pytest.mark.parametrize(
    "make",
    [lazily_filled, Cached, least_recently_used, layer_made_when_needed],
    ids=["dict", "property", "lru_cache", "layer"],
)
def test_caches_fill_as_they_do_eagerly(make, difference, interpreted):
    assert agree(make, difference).backend == "fused"
    f = make()
    solve(f, "fused")
    if hasattr(f, "table"):
        assert type(f.table["w"]) is torch.Tensor


def test_an_array_is_locked_for_each_model(interpreted):
    for _ in range(2):
        table = np.ones(2)

        def f(x, t, table=table):
            table.flags.writeable = False
            return -x * table[0]

        solve(f, "fused")
        assert not table.flags.writeable


def test_what_the_first_call_does_is_done_for_each_model(difference, interpreted):
    """A kernel of one model is used for another like it, but not before that is in the state that the first was in."""

    def make():
        layer = nn.Linear(2, 2).double()
        layer.weight.grad = torch.ones_like(layer.weight)

        def f(x, t):
            layer.zero_grad()
            return layer(x)

        f.layer = layer
        return f

    for _ in range(2):
        f = make()
        assert difference(solve(f, "fused").x1, solve(f, "eager").x1) < 1e-13
        g = make()
        solve(g, "fused")
        assert g.layer.weight.grad is None


# Exceptions ------------------------------------------------------------------------------------------------------
def caught(kind):
    def f(x, t):
        try:
            k = 1 + 5 * float(t)
        except kind:
            k = 1.0
        return -k * x

    return f


def suppressed(x, t):
    k = 1.0
    with contextlib.suppress(Exception):
        k = 1 + 5 * t.item()
    return -k * x


def finally_left(x, t):
    k = 1.0
    try:
        k = 1 + 5 * t.item()
    finally:
        return -k * x  # noqa: B012


class Late:
    def __init__(self, t):
        self.t = t

    @property
    def rate(self):
        try:
            return float(self.t)
        except Exception:
            raise AttributeError from None


class Deleted:
    out: ClassVar = [1.0]

    def __init__(self, t):
        self.t = t

    def __del__(self):
        with contextlib.suppress(Exception):
            Deleted.out[0] = 1 + float(self.t)


def deleted(x, t):
    Deleted(t)
    return -x * Deleted.out[0]


def other_shape(x, t):
    try:
        y = x @ torch.ones(3, 2, dtype=x.dtype)
    except RuntimeError:
        y = x @ EYE
    return -y


def numpy_caught(x, t):
    try:
        scale = float(np.abs(x.numpy()).max())
    except Exception:
        scale = 1.0
    return -x * scale


def random_caught(x, t):
    try:
        k = 1.0 + torch.rand(()).item()
    except Exception:
        k = 1.0
    return -x * k


CAUGHT = {
    "Exception": caught(Exception), "BaseException": caught(BaseException), "suppress": suppressed,
    "finally": finally_left, "getattr": lambda x, t: -x * (0.5 + getattr(Late(t), "rate", 1.0)),
    "hasattr": lambda x, t: -x if hasattr(Late(t), "rate") else x, "del": deleted, "shape": other_shape,
    "NumPy": numpy_caught, "random": random_caught,
}  # fmt: skip


@pytest.mark.parametrize("f", list(CAUGHT.values()), ids=list(CAUGHT))
def test_exceptions_that_the_function_catches(f, difference, interpreted):
    assert agree(lambda: f, difference).backend != "fused"


# What a trace could be told from ---------------------------------------------------------------------------------
class Mixin:
    pass


TOLD = {
    "type": lambda x, t: -x if type(x) is torch.Tensor else x,
    "type in": lambda x, t: -x if type(x) in (torch.Tensor, nn.Parameter) else x,
    "type of time": lambda x, t: -x if type(t).__name__ == "Tensor" else x,
    "class": lambda x, t: -x if x.__class__ is torch.Tensor else x,
    "isinstance": lambda x, t: x if isinstance(x, Mixin) else -x,
    "gradients": lambda x, t: x if torch.is_grad_enabled() else -x,
    "inference": lambda x, t: x if torch.is_inference_mode_enabled() else -x,
    "length": lambda x, t: -x if len(x) > 3 else x,
    "shape": lambda x, t: -x if x.shape[0] > 100 else x,
    "size, rarely": lambda x, t: -(x.clamp(-100, 100) if x.size(0) > 100 else x),
    "numel, rarely": lambda x, t: x.clamp(max=[100.0, 200.0][x.numel() > 200]),
    "parity": lambda x, t: -x if x.shape[0] % 2 == 0 and x.shape[0] > 2 else x,
    "stride": lambda x, t: -x if x.stride() == (2, 1) else x,
    "stride of one axis": lambda x, t: -x * x.stride(0),
    "contiguous": lambda x, t: -x if x.is_contiguous() else x,
    "pointer": lambda x, t: -x if x.data_ptr() % 8 == 0 else x,
    "version": lambda x, t: -x if x._version == 0 else x,
    "leaf": lambda x, t: -x if x.is_leaf else x,
    "base": lambda x, t: -x if x._base is None else x,
    "identity": lambda x, t: -x * (1 + 0 * id(x)),
    "hash": lambda x, t: x if x in {0: 1} else -x,
    "frame": lambda x, t: -x * (1 + 0 * sys._getframe(0).f_lineno),
    "stack": lambda x, t: -x if len(inspect.stack()) > 0 else x,
    "traceback": lambda x, t: -x if len(traceback.extract_stack()) < 900 else x,
    "compiling": lambda x, t: x if torch.compiler.is_compiling() else -x,
    "modes": lambda x, t: x if torch._C._len_torch_dispatch_stack() else -x,
    "time": lambda x, t: -x * (1 + 0 * time.time()),
    "counter": lambda x, t: -x if time.perf_counter() > 0 else x,
    "bytes": lambda x, t: -x * (1 + 0 * os.urandom(1)[0]),
    "now": lambda x, t: -x * (1 + 0 * datetime.datetime.now().microsecond),
    "unique": lambda x, t: -x * (1 + 0 * uuid.uuid4().int),
    "thread": lambda x, t: -x if threading.get_ident() else x,
    "environment": lambda x, t: -x * float(os.environ.get("SDESOLVE_TEST_RATE", "2")),
    "threads": lambda x, t: -x if torch.get_num_threads() else x,
    "printed": lambda x, t: (print(end=""), -x)[1],
    "names": lambda x, t: -x * len([n for n in globals() if n == "X0"]),
}  # fmt: skip


@pytest.mark.parametrize("f", list(TOLD.values()), ids=list(TOLD))
def test_what_a_trace_could_be_told_from(f, difference, interpreted):
    agree(lambda: f, difference)
    with torch.enable_grad():
        agree(lambda: f, difference)
    if f is not TOLD["version"]:  # inference tensors have none
        with torch.inference_mode():
            agree(lambda: f, difference)


def test_the_size_of_the_batch_may_be_used_for_shapes(difference, interpreted):
    def f(x, t):
        batch, width = x.shape
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        return -torch.cat([x, t.expand(x.size(0), 1), ones], 1).reshape(batch, -1)[:, :width]

    sde = sds.SDE(f, lambda x, t: 0.1 * torch.ones_like(x))
    for n in (1, 2, 3, 5, 144):
        sol = sds.solve(sde, X0[:n], 0.0, 1.0, 3, solver=sds.EulerMaruyama(), seed=1, backend="fused")
        assert difference(sol.x1, solve(f, "eager", X0[:n], 3).x1) < 1e-13
    assert interpreted.made == 2  # a single path has a kernel of its own


# Coupled rows ----------------------------------------------------------------------------------------------------
PERMUTATION = torch.randperm(144, generator=torch.Generator().manual_seed(0))
COUPLED = {
    "chain": lambda x, t: x.roll(12, 0) + x.roll(-12, 0) - 2 * x,
    "roll by 6": lambda x, t: x.roll(6, 0) - x,
    "roll by 30": lambda x, t: x.roll(30, 0) - x,
    "roll by a part": lambda x, t: x.roll(len(x) // 4, 0) - x,
    "held permutation": lambda x, t: x[PERMUTATION] - x,
    "index_select": lambda x, t: x.index_select(0, PERMUTATION) - x,
    "gather": lambda x, t: x.gather(0, PERMUTATION[:, None].expand(144, 2)) - x,
    "computed permutation": lambda x, t: x[(torch.arange(len(x)) + 12) % len(x)] - x,
    "index_copy": lambda x, t: torch.zeros_like(x).index_copy(0, (torch.arange(len(x)) + 6) % len(x), x) - x,
    "pairs": lambda x, t: (x.view(-1, 2, 2).flip(1).reshape(-1, 2) if len(x) == 144 else x) - x,
    "blocks": lambda x, t: (x.view(-1, 72, 2).mean(0).repeat(2, 1) if len(x) % 72 == 0 else x) - x,
    "cat of parts": lambda x, t: torch.cat([x[6:], x[:6]]) - x,
    "sorted": lambda x, t: x.sort(0)[0] - x,
    "place": lambda x, t: torch.where(torch.arange(len(x))[:, None] < 100, x, -x),
    "place, rarely": lambda x, t: torch.where(torch.arange(len(x))[:, None] < 100, x, x.clamp(-100, 100)),
    "place by linspace": lambda x, t: torch.where(torch.linspace(0, 1, len(x))[:, None] < 2, x, -x),
    "place by list": lambda x, t: x * torch.tensor([1.0 if i < 100 else 2.0 for i in range(len(x))])[:, None],
    "chunks, rarely": lambda x, t: torch.cat([c if i < 2 else c.clamp(-100, 100) for i, c in enumerate(x.split(50))]),
    "last rows": lambda x, t: torch.cat([-x[:100], x[100:]]),
    "at some times": lambda x, t: torch.where((t > 0.15) & (t < 0.25), x.roll(12, 0), -x),
    "flat, at some times": lambda x, t: torch.where((t > 0.15) & (t < 0.25), x.roll(12), -x),
    "indexed, at some times": lambda x, t: torch.where(
        (t > 0.15) & (t < 0.25), x[(torch.arange(len(x)) + 12) % len(x)], -x),
    "a row at a time": lambda x, t: torch.stack([-x[i] if i < 100 else x[i] for i in range(len(x))]),
}  # fmt: skip


@pytest.mark.parametrize("f", list(COUPLED.values()), ids=list(COUPLED))
def test_rows_that_are_coupled_or_told_apart(f, difference, interpreted):
    assert agree(lambda: f, difference).backend != "fused"
    assert agree(lambda: f, difference, torch.zeros_like(X0)).backend != "fused"  # rows that begin alike


OWN = {
    "roll": lambda x, t: x.roll(1, 1) - x + x.roll((1, 1), (1, 1)),
    "arange": lambda x, t: -x[torch.arange(len(x)), 1][:, None] * x,
    "numbers": lambda x, t: -x * torch.arange(2) * torch.linspace(0, 1, 2),
}


@pytest.mark.parametrize("f", list(OWN.values()), ids=list(OWN))
def test_moves_within_a_row_are_fused(f, difference, interpreted):
    assert agree(lambda: f, difference).backend == "fused"


def test_a_kernel_of_one_batch_is_not_used_for_another_that_it_is_wrong_for(difference, interpreted):
    def f(x, t):
        return x.roll(12, 0) - 2 * x

    for n in (1, 2, 3, 4, 6, 12, 24, 144, 12, 25):
        assert difference(solve(f, "auto", X0[:n]).x1, solve(f, "eager", X0[:n]).x1) < 1e-13


# Results ---------------------------------------------------------------------------------------------------------
OBSERVABLES = {
    "float64": lambda x: (x.double() + 1e9).sum(1),
    "int64": lambda x: (x * 16).long(),
    "bool": lambda x: x > 0,
}


@pytest.mark.parametrize("observable", list(OBSERVABLES.values()), ids=list(OBSERVABLES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_observables_keep_their_dtype(observable, dtype, interpreted):
    results = [solve(lambda x, t: -x, b, X0.to(dtype), observable=observable).xs for b in ("auto", "eager")]
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("save_at", [None, [1.0], [0.0, 1.0], [0.2, 0.5, 1.0]], ids=str)
@pytest.mark.parametrize("backend", ["eager", "kernel", "fused"])
def test_results_have_memory_of_their_own(backend, save_at, interpreted):
    x0 = X0.clone()
    sol = solve(lambda x, t: -x, backend, x0, save_at=save_at)
    last = sol.xs[-1].clone()
    sol.x1.zero_()
    x0.zero_()
    assert torch.equal(sol.xs[-1], last)


def negated(*shape):
    """A view with torch's negative bit: its memory holds what it is not."""
    view = torch.linspace(-1.0, 1.0, 2 * math.prod(shape), dtype=torch.float64).reshape(*shape, 2)
    view = torch.view_as_complex(view).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("backend", ["kernel", "fused"])
def test_views_that_torch_negates(backend, difference):
    one, two = negated(1, 1), negated(2)

    def f(x, t):
        return -x * two[: x.shape[1]] * one[0, 0]

    for x0 in (one, negated(3, 2)):
        sde = sds.SDE(f, lambda x, t: one.expand_as(x))
        runs = [
            sds.solve(sde, x0, 0.0, 1.0, 5, solver=sds.EulerMaruyama(), seed=1, backend=b) for b in (backend, "eager")
        ]
        assert difference(runs[0].x1, runs[1].x1) < 1e-13


def test_int32_wraps_round(difference, interpreted):
    big = torch.tensor(2**31 - 1, dtype=torch.int32)
    for f in (
        lambda x, t: x * (big + 1),
        lambda x, t: -x * ((x * 1e9).int() * 4).sign(),
        lambda x, t: -x * ((1e9 * x).int() + 2_000_000_000).sign(),
    ):
        agree(lambda f=f: f, difference)


# Cost ------------------------------------------------------------------------------------------------------------
def test_tracing_has_a_deadline(monkeypatch, interpreted):
    from sdesolve.integrate import fused as fusing

    monkeypatch.setattr(fusing, "_SECONDS", 0.05)
    weights = [torch.randn(64, 64, dtype=torch.float64) for _ in range(3)]

    def f(x, t):
        y = torch.cat([x] * 32, 1)
        for w in weights:
            y = torch.tanh(y @ (w / w.norm(dim=1, keepdim=True)).T)
        return y[:, :2]

    assert "tracing takes longer than 0.05 s" in solve(f, "auto").stats.reason
    with pytest.raises(ValueError, match="tracing takes longer"):
        solve(f, "fused")


def test_faults_of_the_compiler_are_reasons(monkeypatch, difference, interpreted):
    from sdesolve.integrate import fused as fusing

    for problem in (AssertionError("mapped0"), RecursionError(), KeyError("x"), MemoryError()):

        def broken(*_, problem=problem):
            raise problem

        with monkeypatch.context() as patch:
            patch.setattr(fusing, "compile_trajectory", broken)
            stats = agree(lambda: lambda x, t: -x, difference)
        assert "a fault of sdesolve" in stats.reason
        fusing._kernels.clear()


def test_a_module_that_was_replaced_in_sys_modules_is_not_missed(difference, interpreted):
    name = "sdesolve_test_settings"
    for rate in (1.0, 2.0):
        module = types.ModuleType(name)
        module.rate = rate
        sys.modules[name] = module

        def f(x, t):
            import sdesolve_test_settings

            return -x * sdesolve_test_settings.rate

        assert difference(solve(f, "auto").x1, solve(f, "eager").x1) < 1e-13
    del sys.modules[name]


def test_a_comparison_tells_infinities_apart():
    x = torch.ones(4, 2)
    agrees(lambda y: y * math.inf, lambda y: y * math.inf, x)
    with pytest.raises(Unsupported, match="first in row 0 of 4"):
        agrees(lambda y: y * math.inf, lambda y: y * -math.inf, x)
