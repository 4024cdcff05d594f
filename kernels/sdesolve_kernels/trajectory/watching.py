"""What Python runs while a step is traced: code that was not looked into, and libraries that might be patched later."""

from __future__ import annotations

import functools
import gc
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from sdesolve_kernels.trajectory.tracing import Traced, Unsupported, user_line

__all__ = ["DENIED", "Bindings", "Watch", "is_library", "is_pure", "refusal", "unchanged"]

Bindings = tuple[tuple[Callable[[str], object], ...], tuple[str, ...], tuple[object, ...]]

# What code of these does depends on its arguments alone, or on what `Tracer` and the key of `Guards` see.
_PURE = frozenset(
    ("torch", "numpy", "scipy", "opt_einsum", "sdesolve", "sdesolve_kernels", "jaxtyping", "typing_extensions",
     "builtins", "math", "cmath", "operator", "_operator", "functools", "_functools", "itertools", "collections",
     "_collections", "dataclasses", "typing", "enum", "abc", "_abc", "copy", "copyreg", "types", "numbers",
     "fractions", "decimal", "_decimal", "re", "_sre", "string", "_string", "contextlib", "statistics", "bisect",
     "_bisect", "heapq", "_heapq", "reprlib", "_collections_abc", "weakref", "_weakref", "_weakrefset", "keyword",
     "__future__", "annotationlib")
)  # fmt: skip
_FOREIGN = frozenset(sys.stdlib_module_names) | _PURE
_IMPURE_MODULES = (
    "numpy.random", "torch.random", "torch.utils._python_dispatch", "torch.utils.data", "torch.cuda", "torch.backends",
    "torch.serialization", "torch.overrides", "torch.profiler", "torch.multiprocessing",
)  # fmt: skip
_IMPURE = frozenset(
    ("get_num_threads", "set_num_threads", "set_default_dtype", "set_default_device", "set_printoptions", "manual_seed",
     "initial_seed", "seed", "get_rng_state", "set_rng_state", "load", "save", "fromfile", "loadtxt", "savetxt",
     "genfromtxt", "_len_torch_dispatch_stack", "_len_torch_function_stack", "is_inference_mode_enabled", "memmap",
     "seterr", "geterr", "signature", "_getframe", "use_deterministic_algorithms", "set_float32_matmul_precision")
)  # fmt: skip
# Builtins whose results a trace or a batch of another size changes, or that reach what no name tells of.
DENIED = frozenset(
    ("id", "globals", "locals", "dir", "eval", "exec", "compile", "open", "print", "input", "breakpoint", "__import__")
)
# An exception instead of these would leave a lock closed for ever: a ``with`` statement enters unseen.
_ENDS = frozenset(("__exit__", "release", "close"))
_PATCHED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, float)


@functools.cache
def is_library(module: str | None) -> bool:
    """Whether code of a module is taken as it is: the standard library's, torch's, NumPy's and this package's own."""
    return module is not None and (module.partition(".")[0] in _FOREIGN or module.startswith("namedtuple_"))


def is_pure(module: str, name: str = "") -> bool:
    """Whether a function of a library may be called in a trace."""
    if module.startswith("namedtuple_"):  # methods that `collections.namedtuple` writes
        return True
    return module.partition(".")[0] in _PURE and not module.startswith(_IMPURE_MODULES) and name not in _IMPURE


@final
class Watch:
    """Sees calls in this thread while it is entered, but for those inside a `Tracer`'s operations.

    Args:
        codes: of the user's functions that were looked into.
        cached: code that fills an ``lru_cache``: a symbolic tensor must not get into one.

    Attributes:
        problem: the first thing that no kernel can repeat; whatever the user's code does with the exception.
    """

    def __init__(self, codes: set[types.CodeType], cached: set[types.CodeType]) -> None:
        self._codes, self._cached = codes, cached
        self._known: set[types.CodeType] = set()
        self._spaces: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.problem: Unsupported | None = None

    def __enter__(self) -> Watch:
        self._before: Any = sys.getprofile()
        self._collecting = gc.isenabled()
        gc.disable()  # finalizers of others are not to be seen
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        if self._collecting:
            gc.enable()
        if hasattr(self._before, "enable"):  # cProfile
            self._before.enable()
        elif self._before is not None:
            sys.setprofile(self._before)

    def check(self) -> None:
        """Raises what was seen."""
        if self.problem is not None:
            raise self.problem

    def bindings(self) -> Bindings:
        """What names in the libraries' code that ran stand for; see `unchanged`."""
        found = [(space.get, name, value) for space, names in self._spaces.values() for name, value in names.items()]
        look_ups, names, values = zip(*found, strict=True) if found else ((), (), ())
        return look_ups, names, values

    def _refuse(self, reason: str, now: bool = True) -> None:
        problem = Unsupported(reason, user_line())
        self.problem = self.problem or problem
        if now:
            raise problem

    def _event(self, frame: types.FrameType, event: str, called: Any) -> None:
        if event == "call":
            code, module = frame.f_code, frame.f_globals.get("__name__")
            if not is_library(module):
                if code in self._cached:
                    self._refuse(f"it fills a cache in each call ({code.co_qualname} of an lru_cache)")
                if code not in self._codes and not _finalizing(frame):
                    self._refuse(f"it runs {code.co_qualname}, which no name in the functions' code leads to")
                return
            before = frame.f_back
            by_user = before is not None and not is_library(before.f_globals.get("__name__"))
            if by_user and not is_pure(module, code.co_name) and not _finalizing(frame):  # type: ignore[arg-type]  # a library's has a name
                self._refuse(refusal(f"calls {module}.{code.co_qualname}"))
            if by_user and code.co_name == "__hash__" and isinstance(frame.f_locals.get("self"), Traced):
                self._refuse("it looks a tensor up by its identity, in a dictionary, a set or a cache")
            if code not in self._known:
                self._known.add(code)
                self._bind(code, frame.f_globals)
        elif event == "c_call" and not is_library(frame.f_globals.get("__name__")):
            owner, name = getattr(called, "__self__", None), called.__name__
            if isinstance(owner, types.ModuleType):
                if (owner.__name__ == "builtins" and name in DENIED) or not is_pure(owner.__name__, name):
                    self._refuse(refusal(f"calls {owner.__name__}.{name}"))
            elif owner is not None and not isinstance(owner, Tensor):
                kind = owner if isinstance(owner, type) else type(owner)
                library = is_library(kind.__module__)
                if library and not is_pure(kind.__module__, name) and kind.__module__ not in ("datetime", "pathlib"):
                    reason = refusal(f"calls {kind.__module__}.{kind.__qualname__}.{name}")
                    self._refuse(reason, now=name not in _ENDS)
                if isinstance(owner, type) and kind.__module__ == "datetime":
                    self._refuse(refusal(f"calls datetime.{kind.__qualname__}.{name}"))

    def _bind(self, code: types.CodeType, space: dict[str, Any]) -> None:
        for name in code.co_names:
            value = space.get(name)
            if isinstance(value, _PATCHED):
                self._spaces.setdefault(id(space), (space, {}))[1][name] = value
            if isinstance(value, types.ModuleType):
                inside = vars(value)
                for part in code.co_names:
                    if isinstance(inside.get(part), _PATCHED):
                        self._spaces.setdefault(id(inside), (inside, {}))[1][part] = inside[part]


def _finalizing(frame: types.FrameType | None) -> bool:
    """Whether an object that nothing refers to any more is being taken down."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def unchanged(bindings: Bindings) -> bool:
    """Whether the names of `Watch.bindings` stand for the same things."""
    look_ups, names, values = bindings
    return all(map(operator.is_, map(operator.call, look_ups, names), values))


def refusal(deed: str) -> str:
    """Why a function that does something outside torch is not traced."""
    if "random" in deed or "secrets" in deed:
        return f"it draws random numbers (it {deed}); all noise comes from the solver's increments"
    return f"it {deed}, whose results or effects a kernel cannot repeat"
