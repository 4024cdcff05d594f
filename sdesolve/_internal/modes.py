"""Evaluation mode for the networks that a call uses, given back afterwards as it was, module by module."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import inspect
import itertools
import os
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from sdesolve._internal.arguments import flag
from sdesolve._internal.copies import Copies

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARIES = frozenset(("torch", "numpy", "sdesolve", "sdesolve_kernels", "builtins"))
_MOST = 10_000  # objects looked at
_LEAVES = (Copies, Tensor, str, bytes, int, float, complex, type, types.ModuleType, type(None))


class _Hold(NamedTuple):
    """A module that calls have in a mode of theirs, each under a token of its own; the last one's mode is in force."""

    module: nn.Module
    before: bool
    wanted: dict[object, bool]


_holds: dict[int, _Hold] = {}
_lock = threading.RLock()
# What blocks around this one were begun for, by identity, and whether they let networks draw.
_begun: contextvars.ContextVar[frozenset[tuple[int, bool]]] = contextvars.ContextVar("begun", default=frozenset())
_drawing = contextvars.ContextVar("drawing", default=False)  # whether a block around this one lets networks draw


def _renew() -> None:
    """A forked child has the lock, but perhaps not the thread that would release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def evaluation_mode(*held: object, dropout: bool = False) -> Iterator[None]:
    """Within the block, the modules that ``held`` reaches are in evaluation mode; then each has its own mode again.

    Blocks may be nested and run in several threads: a module gets its mode back when the last block that holds it ends.
    Flags are set module by module, so that what was frozen stays frozen; `nn.Module.train` is not called.

    Args:
        held: scores, networks, functions, or objects that hold them.
        dropout: keep modules without buffers of their own in training mode, so that they draw. Those with buffers,
            which training mode rewrites (running statistics, power iterations), are in evaluation mode all the same.
            Holds for blocks within this one as well.
    """
    dropout = dropout or _drawing.get()
    begun = _begun.get()
    new = [thing for thing in held if (id(thing), dropout) not in begun]
    token, modules = object(), list[nn.Module]()
    outside, around = _drawing.set(dropout), _begun.set(begun | {(id(thing), dropout) for thing in new})
    try:
        modules += modules_within(new)
        _hold(modules, token, dropout)
        yield
    finally:
        _drawing.reset(outside)
        _begun.reset(around)
        _release(modules, token)


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into training mode, and after an error each part of it into the mode that it had before."""
    before = [(part, part.training) for part in module.modules()]
    try:
        module.train()
        yield
    except BaseException:
        for part, mode in before:
            _set(part, mode)
        raise


def in_evaluation(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are in `evaluation_mode` while it runs; its argument ``dropout`` is the one there."""

    @functools.wraps(function)
    def evaluating(*args: P.args, **kwargs: P.kwargs) -> R:
        with evaluation_mode(*args, *kwargs.values(), dropout=flag(kwargs.get("dropout", False), "dropout")):
            return function(*args, **kwargs)

    return evaluating


def modules_within(held: Iterable[object]) -> list[nn.Module]:
    """All modules that scores or functions reach (`within`)."""
    return within(held, (nn.Module,))


def within(held: Iterable[object], kinds: tuple[type, ...]) -> list[Any]:
    """All objects of some kinds that functions reach, in closures, defaults, attributes and global names as well."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = collections.deque(held)  # what is near comes first
    while waiting and len(seen) < _MOST:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen.add(id(value))
        if isinstance(value, kinds):
            found.append(value)
        if isinstance(value, nn.Module):
            waiting += value._modules.values()
            waiting += (v for v in vars(value).values() if isinstance(v, kinds))
            if type(value).__module__.startswith("sdesolve."):
                waiting += [v for v in vars(value).values() if callable(v)]  # a network that is a function
        elif isinstance(value, types.FunctionType):
            waiting += _read_by(value)
        elif isinstance(value, types.MethodType):
            waiting += (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            waiting += (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, dict):
            waiting += itertools.islice(value.values(), _MOST)
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += itertools.islice(value, _MOST)
        elif type(value).__module__.partition(".")[0] not in _LIBRARIES - {"sdesolve"}:
            with contextlib.suppress(Exception):  # whatever a property of that name does
                waiting += vars(value).values()
            waiting += _of_classes(value)
            call = inspect.getattr_static(type(value), "__call__", None)
            waiting += [call] if isinstance(call, types.FunctionType) else []
    return found


_drawing_modules: weakref.WeakKeyDictionary[Any, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()


def warn_of_training(sde: object) -> None:
    """Warns of dropout and batch statistics in training mode within an equation that is solved without gradients.

    What an equation holds is searched once.
    """
    modules = _drawing_modules.get(sde)
    if modules is None:
        found = (m for m in modules_within([sde]) if isinstance(m, _DropoutNd | _NormBase))
        modules = _drawing_modules[sde] = [weakref.ref(module) for module in found]
    for reference in modules:
        module = reference()
        if (
            module is not None
            and module.training
            and (module.p > 0 if isinstance(module, _DropoutNd) else module.track_running_stats)
        ):
            warnings.warn(
                f"the functions of this equation hold a {type(module).__name__} in training mode: runs of one seed "
                "differ, or rewrite its statistics. solve leaves the networks of an SDE or ODE as they are, so that "
                "they can be trained through it; call .eval() on the network before solving under torch.no_grad()",
                stacklevel=3,
            )
            return


def _read_by(function: types.FunctionType) -> Iterator[object]:
    """What a function reads that is not given to it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # still empty
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if _library(function.__module__):
        return
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        found = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        yield from found
        for module in found:
            if isinstance(module, types.ModuleType) and not _library(module.__name__):
                yield from (vars(module)[name] for name in code.co_names if name in vars(module))


def _of_classes(value: object) -> Iterator[object]:
    """What an object holds in slots, and modules that are attributes of its classes."""
    for kind in type(value).__mro__:
        if not _library(kind.__module__):
            for name, held in vars(kind).items():
                if isinstance(held, types.MemberDescriptorType):
                    yield getattr(value, name, None)
                elif isinstance(held, nn.Module):
                    yield held


def _library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _hold(modules: list[nn.Module], token: object, dropout: bool) -> None:
    with _lock:
        for module in modules:
            mode, hold = dropout and not module._buffers, _holds.get(id(module))
            if hold is None:
                if module.training == mode:
                    continue  # as it is wanted, and nobody is going to give it back in another mode
                hold = _holds[id(module)] = _Hold(module, module.training, {})
            hold.wanted[token] = mode
            _set(module, mode)


def _release(modules: list[nn.Module], token: object) -> None:
    with _lock:
        for module in modules:
            hold = _holds.get(id(module))
            if hold is not None and hold.wanted.pop(token, None) is not None:
                _set(module, next(reversed(hold.wanted.values()), hold.before))
            if hold is not None and not hold.wanted:
                del _holds[id(module)]


def _set(module: nn.Module, mode: bool) -> None:
    if module.training != mode:
        module.training = mode
