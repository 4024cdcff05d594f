"""Runs a function of tensors on tensors whose elements are expressions.

`Traced` tensors have shapes, strides and dtypes but no storage: every operation on them arrives in `Tracer`, which
carries it out on numpy arrays of expressions (`operations`). Views of a traced tensor are views of the same array, so
in-place changes inside the user's function mean what they mean in torch. What has no answer, such as the value of a
traced element for Python's ``if``, is refused with the line that asked for it.

``make_fx`` would give a graph to walk, but its first use imports the whole of torch's compiler (0.9 s), it takes the
values that ``Tensor.numpy()`` reads while tracing for constants, and it knows nothing of lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sdesolve_kernels.trajectory.evaluate import evaluate
from sdesolve_kernels.trajectory.expressions import BOOL, F32, F64, FLOATS, I64, Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import PathEntry, Shared

__all__ = ["TooCostly", "Traced", "Tracer", "Unsupported", "dtype_name"]

_NAMES = {torch.float32: F32, torch.float64: F64, torch.int64: I64, torch.bool: BOOL, torch.int32: I64}
_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Unsupported(Exception):
    """The function does something that no kernel is generated for.

    Attributes:
        line: ``file:line: source`` of the user's code that did it; empty if it is not known.
    """

    def __init__(self, message: str, line: str = "") -> None:
        super().__init__(message)
        self.line = line

    def __str__(self) -> str:
        return super().__str__() + (f", at {self.line}" if self.line else "")


class TooCostly(Unsupported):
    """A kernel could be made, but takes longer to compile than it may."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name expressions use for a torch dtype."""
    if dtype not in _NAMES:
        raise Unsupported(f"it makes a tensor of {dtype}; generated kernels compute in float32 and float64")
    return _NAMES[dtype]


@final
class Traced(Tensor):
    """A tensor of expressions.

    Attributes:
        elements: an object array of the tensor's shape; views share it.
    """

    elements: np.ndarray
    tracer: Tracer

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, elements: np.ndarray, dtype: torch.dtype, tracer: Tracer) -> Traced:
        made = Tensor._make_wrapper_subclass(
            cls, elements.shape, strides=tracer.strides(elements), dtype=dtype, device=tracer.device
        )
        made.elements, made.tracer = elements, tracer
        return made

    # `x.__class__ is torch.Tensor` holds in the trace as it does outside.
    __class__ = property(lambda self: Tensor)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if torch.utils._python_dispatch._get_current_dispatch_mode() is self.tracer:
            raise self.tracer.refuse(READS.format("repr()"))
        return f"Traced({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for a in tree_flatten((args, kwargs or {}))[0]:
            if isinstance(a, Traced):
                return a.tracer.run(func, args, kwargs or {})
        raise TypeError("no traced tensor among the arguments")


Handler = Callable[..., Any]

_READERS = {
    getattr(Tensor, name)
    for name in (
        "numpy",
        "tolist",
        "__format__",
        "__array__",
        "__dlpack__",
        "apply_",
        "map_",
        "data_ptr",
        "storage",
        "untyped_storage",
    )
}


# What differs between a traced tensor and an ordinary one, or between two calls, and no key tells of.
_ACCESSORS = {
    **{getattr(Tensor, name): f"Tensor.{name}()" for name in (
        "stride", "is_contiguous", "storage_offset", "is_set_to", "is_shared", "is_inference", "_is_view")},
    **{getattr(Tensor, name).__get__: f"Tensor.{name}" for name in (
        "_version", "is_leaf", "grad_fn", "_base", "grad", "_backward_hooks")},
}  # fmt: skip
_DETACHING = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
_SETTERS = {getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")} | {Tensor.requires_grad_}


@final
class Unread(TorchFunctionMode):
    """Refuses what reads a tensor's memory, or tells a traced tensor from another, without an operation.

    Args:
        tracer: remembers what was refused.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS:
            if (
                func is Tensor.tolist
                and isinstance(args[0], Traced)
                and all(e.op == "const" for e in args[0].elements.flat)
            ):
                return np.frompyfunc(lambda e: e.data, 1, 1)(args[0].elements).tolist()
            raise self._tracer.refuse(READS.format(f"Tensor.{func.__name__}()"))
        if func in _ACCESSORS and _asked_by_user():
            raise self._tracer.refuse(f"it looks at {_ACCESSORS[func]}, which a trace cannot repeat")
        if func == _REQUIRES_GRAD and isinstance(args[0], Traced) and _asked_by_user():
            raise self._tracer.refuse("it looks at Tensor.requires_grad of the state, which a trace cannot repeat")
        if func in _SETTERS and not _symbolic(args[0]):
            raise self._tracer.refuse("it changes a tensor in place that lives outside it (data, grad, requires_grad)")
        if func in _HOOKS:
            raise self._tracer.refuse(f"it calls Tensor.{func.__name__}(), and a kernel calls no hooks")
        if func in _DETACHING:
            with self._tracer.detaching():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _symbolic(tensor: Tensor) -> bool:
    return type(tensor) is Traced or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _asked_by_user() -> bool:
    """Whether code outside this package and torch called the function that a mode is seeing."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in ("torch.overrides", "torch._tensor"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] not in ("torch", "sdesolve", "sdesolve_kernels")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """An operation of a trace, to be compared with those of other traces and of eager runs.

    Attributes:
        name: of the aten operation.
        facts: its arguments, a tensor as ``(shape, dtype)``.
        sources: for each tensor among them, the call that made it, or -1.
        constant: whether the result has known values.
        varies: axes of the result along which known values differ.
        shape: of the result.
    """

    name: str
    facts: tuple[Any, ...]
    sources: tuple[int, ...] = ()
    constant: bool = False
    varies: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


def facts_of(flat: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of an operation as `Call` keeps them."""
    return tuple((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in flat)


@final
class Deadline:
    """So many seconds of this thread from now on: what fuses does not depend on what else the machine does."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.thread_time() + seconds


@final
class Tracer(TorchDispatchMode):
    """Carries out operations on expressions while it is entered.

    Args:
        graph: makes the expressions.
        device: of the tensors the function sees.
        handlers: by the name of an aten operation, a function of ``(tracer, func, *args, **kwargs)``.
        rows: the traced batch.
        batch: the batch of the call the trace is for. A tensor of that many rows that the function holds is read as
            one row per path, if ``by_path``.
        by_path: see ``batch``.
        deadline: when to give up.
        graded: whether derivatives will be taken, so that it matters where the function stops them.
        pushed: whether forwards, which ``no_grad`` does not stop.

    Attributes:
        problem: the first thing that went wrong. Code that is traced may catch the exception and go on, and what it
            does then is not what it does otherwise.
        calls: operations in order, without those that one is made of.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        handlers: Mapping[str, Handler],
        rows: int,
        batch: int | None = None,
        by_path: bool = True,
        deadline: Deadline | None = None,
        graded: bool = False,
        pushed: bool = False,
    ) -> None:
        super().__init__()
        self.graded, self._pushed, self._detaching = graded, pushed, False
        self.graph, self.device, self.rows = graph, device, rows
        self._handlers, self._batch, self._by_path, self._deadline = handlers, batch, by_path, deadline
        self._depth = 0
        self.problem: Unsupported | None = None
        self.calls: list[Call] = []
        self._origins: dict[int, tuple[Any, int]] = {}
        graph.on_growth = self.check_time
        self.captured: list[Tensor] = []
        self.captured_by_path: list[bool] = []
        self.read: set[int] = set()
        self._inputs: dict[int, Traced] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its whole compiler (1 s) to guard a mode that it never meets

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def traced(self, elements: np.ndarray, dtype: torch.dtype) -> Traced:
        """A tensor of these expressions."""
        return Traced(self._within(elements, dtype), dtype, self)

    def _within(self, elements: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        """Whole numbers as a tensor of ``dtype`` holds them: int32 is computed as int64, and wraps."""
        if dtype != torch.int32 or all(map(self.graph.is_int32, elements.flat)):
            return elements
        return mapped(lambda e: self.graph.op("wrap32", e), elements)

    def strides(self, elements: np.ndarray) -> list[int]:
        """Those that torch sees."""
        return [s // elements.itemsize for s in elements.strides]

    def constant(self, value: Tensor) -> Traced:
        """A tensor of constants."""
        if not value.numel():
            return self.traced(np.empty(tuple(value.shape), dtype=object), value.dtype)
        name = dtype_name(value.dtype)
        flat = [self.graph.const(v, name) for v in value.detach().cpu().reshape(-1).tolist()]
        return self.traced(filled(flat, tuple(value.shape)), value.dtype)

    def input(self, tensor: Tensor, *, by_path: bool) -> Traced:
        """A tensor that exists outside the function: a runtime argument of the kernel, the same each time it is met."""
        known = self._inputs.get(id(tensor))
        if known is not None:
            return known
        index, name = len(self.captured), dtype_name(tensor.dtype)
        leaf = self.graph.leaf if tensor.dtype != torch.int32 else self.graph.int32_leaf
        shape = tuple(tensor.shape)
        if by_path:
            if math.prod(shape[1:]) > _MOST_INPUTS:
                raise Unsupported("the tensors that it uses have too many entries for a generated kernel")
            elements = self.per_row(lambda r, i: leaf(PathEntry(r, index, i), name), shape[1:])
        else:
            if sum(t.numel() for t in (*self.captured, tensor)) > _MOST_INPUTS:
                raise Unsupported("the tensors that it uses have too many entries for a generated kernel")
            elements = filled([leaf(Shared(index, i), name) for i in range(tensor.numel())], shape)
        elements.flags.writeable = False
        self.captured.append(tensor)  # kept alive, so that no other tensor gets its identity
        self.captured_by_path.append(by_path)
        made = self._inputs[id(tensor)] = self.traced(elements, tensor.dtype)
        return made

    def per_row(self, leaf: Callable[[int, int], Expression], shape: Sequence[int]) -> np.ndarray:
        """``(rows, *shape)`` leaves, from a function of row and place."""
        count = range(math.prod(shape))
        return filled([leaf(r, i) for r in range(self.rows) for i in count], (self.rows, *shape))

    def values(self, a: Traced) -> list[Any] | None:
        """Elements that depend on nothing but constants and small tensors from outside, whose values are now `read`."""
        flat = list(a.elements.flat)
        if all(e.op == "const" for e in flat):
            return [e.data for e in flat]
        order = topological(flat)
        used = {e.data.parameter for e in order if e.op == "shared"}
        used |= {e.data.parameter for e in order if e.op == "product"}
        if any(e.depends or e.op == "unknown" for e in order) or any(
            self.captured[i].numel() > _MOST_READ for i in used
        ):
            return None
        self.read |= used
        with torch.utils._python_dispatch._disable_current_modes():
            tensors = [c.detach().reshape(-1).cpu() if i in used else None for i, c in enumerate(self.captured)]
            parameters = [c.double() if c is not None and c.is_floating_point() else c for c in tensors]
            return [v.item() for v in evaluate(flat, {}, None, parameters)]

    def refuse(self, reason: str) -> Unsupported:
        """The exception to raise, remembered."""
        problem = Unsupported(reason, user_line())
        self.problem = self.problem or problem
        return problem

    def check_time(self) -> None:
        """Gives up when tracing has taken too long."""
        if self._deadline is not None and time.thread_time() > self._deadline.end:
            raise self.refuse(f"tracing takes longer than {self._deadline.seconds:g} s")

    def known(self, tensor: Tensor) -> Traced:
        """The tensor as a traced one."""
        if isinstance(tensor, Traced):
            if tensor.tracer is not self:
                raise Unsupported("it keeps what it computes in one call for the next")
            if tensor.elements.size and tensor.elements.flat[0] is None:
                raise Unsupported("it uses the index of a largest or smallest entry")
            return tensor
        if tensor.device.type == "meta":
            raise Unsupported("it uses a tensor on the meta device")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise Unsupported("it uses a sparse or nested tensor")
        # Torch takes the shapes of a recurrent cell's weights for granted, and reads past the end of others.
        rows = tensor.ndim > 0 and len(tensor) == self._batch and type(tensor) is not torch.nn.Parameter
        return self.input(tensor, by_path=self._by_path and rows)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation."""
        watch = sys.getprofile()
        if watch is not None and type(getattr(watch, "__self__", None)).__name__ == "Watch":
            sys.setprofile(None)  # it is not to see what the tracer does
        else:
            watch = None
        self._depth += 1
        try:
            return self._logged(func, args, kwargs)
        except BaseException as problem:
            if self.problem is None:
                self.problem = problem if isinstance(problem, Unsupported) else Unsupported(_failure(problem, func))
                self.problem.line = self.problem.line or user_line()
            raise
        finally:
            self._depth -= 1
            if watch is not None:
                sys.setprofile(watch)

    def _logged(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unsupported(f"it draws random numbers ({name}); all noise comes from the solver's increments")
        self.check_time()
        if len(self.graph) > _MOST_EXPRESSIONS:
            raise Unsupported("its step has too many operations for a generated kernel")
        flat, spec = tree_flatten((args, kwargs))
        made: Any
        lifted = name in ("lift_fresh", "lift_fresh_copy") and not isinstance(args[0], Traced)
        if lifted:
            facts, made = facts_of(flat), self.constant(args[0])
        elif not any(isinstance(a, Tensor) for a in flat):
            facts, made = facts_of(flat), self._factory(func, args, kwargs)
        else:
            flat = [self.known(a) if isinstance(a, Tensor) else a for a in flat]
            facts = facts_of(flat)  # before the tensors' shapes change in place
            args, kwargs = tree_unflatten(flat, spec)
            made = self._handle(func, name, args, kwargs)
        if self._depth == 1:
            if self._stops(name):
                made = tree_map(lambda a: self._detached(a, flat) if isinstance(a, Traced) else a, made)
            self._log(name, flat, facts, made, lifted)
        return made

    @contextlib.contextmanager
    def detaching(self) -> Iterator[None]:
        """Inside the ``with`` block the user's code calls ``detach``; autograd does so too, for reasons of its own."""
        self._detaching = True
        try:
            yield
        finally:
            self._detaching = False

    def _stops(self, name: str) -> bool:
        """Whether no derivative passes through the operation that is being carried out."""
        if not self.graded:
            return False
        if name == "detach_":
            raise Unsupported("it calls detach_() in place; write x = x.detach()")
        if not torch.is_grad_enabled() and _in_custom_function():
            way = "jvp" if self._pushed else "backward"
            raise Unsupported(f"it calls a torch.autograd.Function, whose {way} no kernel calls")
        return not (torch.is_grad_enabled() or self._pushed) or (name == "detach" and self._detaching)

    def _detached(self, a: Traced, given: Sequence[Any]) -> Traced:
        """A result through which no derivative passes; a view of other values is a copy, and cannot be written to."""
        if any(a is b for b in given):
            return a
        elements = mapped(lambda e: e if e is None else self.graph.op("detach", e), a.elements)
        if bool((elements == a.elements).all()):
            return a
        elements.flags.writeable = not any(
            isinstance(b, Traced) and np.may_share_memory(a.elements, b.elements) for b in given
        )
        return self.traced(elements, a.dtype)

    def _log(self, name: str, flat: Sequence[Any], facts: tuple[Any, ...], made: Any, lifted: bool) -> None:
        results = [a for a in tree_flatten(made)[0] if isinstance(a, Traced)]
        sources = tuple(self._origins.get(id(a), (a, -1))[1] for a in flat if isinstance(a, Tensor))
        constant = bool(results) and all(e is not None and e.op == "const" for a in results for e in a.elements.flat)
        first = results[0].elements if results else np.empty(0)
        varies = tuple(axis for axis in range(first.ndim) if _varies(first, axis)) if constant else ()
        if lifted:
            facts = (*facts, *((e.data if not varies else None) for e in first.flat[:1]))
        self.calls.append(Call(name, facts, sources, constant, varies, tuple(first.shape)))
        for a in results:
            self._origins[id(a)] = a, len(self.calls) - 1  # kept alive, so that no other gets its identity

    def _factory(self, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        made = func(*args, **kwargs)
        return tree_map(
            lambda a: self.constant(a.clone() if a._is_zerotensor() else a) if isinstance(a, Tensor) else a, made
        )

    def _handle(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        handler = self._handlers.get(name)
        if "out" in kwargs:
            raise Unsupported(f"it has {name} write its result into a tensor (out=)")
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        if name.endswith("_") and not name.startswith("_") and name[:-1] in self._handlers:
            return self._in_place(func, name[:-1], args, kwargs)
        with self:  # tensors that a decomposition makes are constants of the trace
            if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
                return func.decompose(*args, **kwargs)
            decomposition = torch._decomp.decomposition_table.get(func)
            if decomposition is not None:
                return decomposition(*args, **kwargs)
        raise Unsupported(f"it calls {name}, which no kernel is generated for")

    def _in_place(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        target, packet = args[0], getattr(torch.ops.aten, name)
        if torch.Tag.inplace_view in func.tags:  # squeeze_ and such change a tensor's shape, and no element
            target.elements = e = self._handlers[name](self, func, *args, **kwargs).elements
            with torch.utils._mode_utils.no_dispatch():
                return torch.Tensor.as_strided_(target, e.shape, self.strides(e))
        overload = getattr(packet, func._overloadname, packet.default if hasattr(packet, "default") else None)
        if overload is None:
            raise Unsupported(f"it calls {name}_, which no kernel is generated for")
        self.store(target, self._handlers[name](self, overload, *args, **kwargs))
        return target

    def store(self, target: Traced, value: Traced) -> None:
        """``target.copy_(value)``."""
        if not target.elements.flags.writeable:
            raise Unsupported(
                "it changes a tensor in place that it was given or that lives outside it; write x = x + 1, not x += 1"
            )
        elements = self._within(cast(self.graph, value.elements, dtype_name(target.dtype)), target.dtype)
        if self.graded and not (torch.is_grad_enabled() or self._pushed):
            if any(e.op not in ("const", "detach") and e.dtype in FLOATS for e in target.elements.flat):
                raise Unsupported("it changes a tensor in place under no_grad that it has computed outside of that")
            elements = mapped(lambda e: self.graph.op("detach", e), elements)
        target.elements[...] = elements


def _in_custom_function() -> bool:
    """Whether the current call comes from the ``forward`` of a `torch.autograd.Function`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "apply" and frame.f_globals.get("__name__") == "torch.autograd.function":
            return True
        frame = frame.f_back
    return False


def _varies(elements: np.ndarray, axis: int) -> bool:
    return elements.shape[axis] > 1 and not bool((elements == elements.take([0], axis)).all())


def _failure(problem: BaseException, func: Any) -> str:
    text = str(problem).strip().split("\n")[0]
    kind = type(problem).__name__
    if isinstance(problem, RuntimeError | ValueError | IndexError | TypeError):
        return f"it fails while it is traced, in {func} ({kind}: {text})"
    return f"{func} cannot be traced, a fault of sdesolve ({kind}: {text})"


READS = "it reads the value of a tensor in Python ({}); write it with torch operations, torch.where for a choice"
NOT_ALIKE = "its rows are not treated alike: it depends on a path's place in the batch, or on its size"
_MOST_READ = 4096  # entries of an index that lives outside
_MOST_INPUTS = 1 << 16  # entries of tensors that all paths share; a larger network runs better as matrix products
_MOST_EXPRESSIONS = 400_000


def filled(flat: Sequence[Expression], shape: tuple[int, ...]) -> np.ndarray:
    """An object array of expressions."""
    made = np.empty(len(flat), dtype=object)
    made[:] = flat
    return made.reshape(shape)


def cast(graph: Graph, elements: np.ndarray, dtype: str) -> np.ndarray:
    """Elements in another type."""
    return mapped(lambda e: graph.cast(e, dtype), elements)


def mapped(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """``function`` elementwise, with broadcasting; always an array."""
    out = np.frompyfunc(function, len(arrays), 1)(*arrays)
    if isinstance(out, np.ndarray):
        return out
    made = np.empty((), dtype=object)
    made[()] = out
    return made


def result_dtype(func: Any, args: Any, kwargs: Any) -> torch.dtype:
    """The dtype torch gives the result of an elementwise operation: that of the operation on single ones.

    Meta tensors would do, if their kernels did not import torch's compiler.
    """

    def single(a: Any) -> Any:
        return torch.ones((1,) * a.ndim, dtype=a.dtype) if isinstance(a, Tensor) else a

    with torch.utils._python_dispatch._disable_current_modes():
        made: torch.dtype = func(*tree_map(single, args), **tree_map(single, kwargs)).dtype
    return made


def user_line() -> str:
    """Where in code that belongs neither to torch nor to this package the current call comes from."""
    package = str(Path(__file__).parents[3])
    for frame in itertools.chain(reversed(traceback.extract_stack())):
        if frame.filename.startswith(_INTERNAL) or f"{package}/sdesolve" in frame.filename:
            continue
        if "sdesolve_kernels" in frame.filename or frame.filename.startswith("<"):
            continue
        return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return ""
