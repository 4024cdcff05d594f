"""Runs a function of tensors on tensors whose elements are expressions.

`Traced` tensors have shapes, strides and dtypes but no storage: every operation on them arrives in `Tracer`, which
carries it out on numpy arrays of expressions (`operations`). Views of a traced tensor are views of the same array, so
in-place changes inside the user's function mean what they mean in torch. What has no answer, such as the value of a
traced element for Python's ``if``, is refused with the line that asked for it.

``make_fx`` would give a graph to walk, but its first use imports the whole of torch's compiler (0.9 s), it takes the
values that ``Tensor.numpy()`` reads while tracing for constants, and it knows nothing of lines.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sdesolve_kernels.trajectory.alike import mapped, overwritten, repeated
from sdesolve_kernels.trajectory.evaluate import evaluate
from sdesolve_kernels.trajectory.expressions import BOOL, F32, F64, I64, Expression, Graph, topological
from sdesolve_kernels.trajectory.kept import note
from sdesolve_kernels.trajectory.leaves import PathEntry, Shared

__all__ = ["Traced", "Tracer", "Unsupported", "dtype_name"]

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
        note(made)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
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


@final
class Unread(TorchFunctionMode):
    """Refuses what reads a tensor's memory without an operation, which a `Tracer` does not get to see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS:
            if (
                func is Tensor.tolist
                and isinstance(args[0], Traced)
                and all(e.op == "const" for e in args[0].elements.flat)
            ):
                return np.frompyfunc(lambda e: e.data, 1, 1)(args[0].elements).tolist()
            raise Unsupported(READS.format(f"Tensor.{func.__name__}()"), user_line())
        return func(*args, **(kwargs or {}))


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
        alike: give all rows the inputs of the first.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        handlers: Mapping[str, Handler],
        rows: int,
        batch: int | None = None,
        by_path: bool = True,
        alike: bool = False,
    ) -> None:
        super().__init__()
        self.graph, self.device, self.rows = graph, device, rows
        self._handlers, self._batch, self._by_path, self._alike = handlers, batch, by_path, alike
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
        """Those that torch sees; rows that are alike lie in one place, and torch is not to know."""
        if self._alike:
            elements = np.empty(elements.shape, dtype=np.bool_)
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
        """``(rows, *shape)`` leaves, from functions of row and place; those of the first row in all, if ``alike``."""
        count = range(math.prod(shape))
        if self._alike:
            return repeated(filled([leaf(0, i) for i in count], tuple(shape)), self.rows)
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

    def forget(self) -> None:
        """Lets go of the traced form of tensors from outside."""
        self._inputs.clear()

    def known(self, tensor: Tensor) -> Traced:
        """The tensor as a traced one."""
        if isinstance(tensor, Traced):
            if tensor.elements.size and tensor.elements.flat[0] is None:
                raise Unsupported("it uses the index of a largest or smallest entry")
            return tensor if tensor.tracer is self else self._of_another_call(tensor)
        if tensor.device.type == "meta":
            raise Unsupported("it uses a tensor on the meta device")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise Unsupported("it uses a sparse or nested tensor")
        return self.input(tensor, by_path=self._by_path and tensor.ndim > 0 and len(tensor) == self._batch)

    def _of_another_call(self, tensor: Traced) -> Traced:
        """What a function made when it was traced before, and kept; other traces have other expressions."""
        if any(e is None or e.op != "const" for e in tensor.elements.flat):
            raise Unsupported("it keeps what it computes in one call for the next")
        made = mapped(lambda e: self.graph.const(e.data, e.dtype), tensor.elements)
        return self.traced(made, tensor.dtype)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation."""
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unsupported(
                f"it draws random numbers ({name}); all noise comes from the solver's increments", user_line()
            )
        if len(self.graph) > _MOST_EXPRESSIONS:
            raise Unsupported("its step has too many operations for a generated kernel")
        flat, spec = tree_flatten((args, kwargs))
        if not any(isinstance(a, Tensor) for a in flat):
            return self._factory(func, args, kwargs)
        if name in ("lift_fresh", "lift_fresh_copy") and not isinstance(args[0], Traced):
            return self.constant(args[0])
        try:
            flat = [self.known(a) if isinstance(a, Tensor) else a for a in flat]
            args, kwargs = tree_unflatten(flat, spec)
            return self._handle(func, name, args, kwargs)
        except Unsupported as problem:
            if not problem.line:
                problem.line = user_line()
            raise

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
        if not overwritten(target.elements, elements):
            raise Unsupported(NOT_ALIKE)
        target.elements[...] = elements


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
