"""How the kernels are compiled: options, and an on-disk cache that notices edits and survives read-only installs."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numba
from numba.core import compiler
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

__all__ = ["compiling", "inline", "kernel", "optimised"]


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Compile although ``NUMBA_DISABLE_JIT`` is set: kernels work on addresses, which Python cannot."""
    config: Any = numba.config
    disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
    try:
        yield
    finally:
        config.DISABLE_JIT = disabled


def _njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        with compiling():
            # Numba's annotations describe each combination of arguments apart and fit no dictionary of options.
            njit: Any = numba.njit
            compiled = njit(**options)(function)
        config: Any = numba.config
        if config.DISABLE_JIT:  # Numba looks again when it compiles, at the first call
            compile_now = compiled.compile

            def compile_always(signature: Any) -> Any:
                with compiling():
                    return compile_now(signature)

            compiled.compile = compile_always
        return compiled

    return decorate


# No fastmath: it lets LLVM contract and reassociate differently in a vector body and in its scalar tail, and then the
# same normal has different bits in different places. Fused multiply-adds are written out (intrinsics.fma) instead.
_OPTIONS = {"error_model": "numpy", "boundscheck": False, "fastmath": False}


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_DIGEST = _source_digest()


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a helper so that it is always inlined: a call inside a loop body keeps LLVM from vectorising it."""
    # Nobody calls one from Python: without what that takes, compiling them all is quicker by a fifth.
    options = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled: Any = _njit(forceinline=True, **options)(function)
    template = compiled.get_call_template

    def of_types(args: Sequence[Any], kws: Any) -> Any:
        return template(tuple([numba.types.unliteral(a) for a in args]), kws)

    # Numba would compile it anew for each list of constants that it is called with: LLVM has them after inlining.
    compiled.get_call_template = of_types
    made: Callable[..., Any] = compiled
    return made


def kernel(function: Callable[..., Any], variant: str = "") -> Callable[..., Any]:
    """Compile a kernel that runs without the GIL, cached on disk where that is possible.

    Numba's cache notices a change of the file that holds the kernel, but not of the helpers it inlines from other
    files; so the digest of this whole folder goes into the name under which the kernel is cached. It also tells
    closures apart by a hash of what they close over, which for compiled functions holds a number drawn anew in each
    process: such a kernel would be compiled, and stored once more, every time (4 s before a first training step). So
    the name says which variant a closure is, and that hash is left out. Numba itself falls back from ``__pycache__`` to
    the user's cache folder; where neither can be written the kernel is compiled in each process.

    Args:
        function: The kernel.
        variant: What the closure depends on; together with the function's name it must say all of it.
    """
    function.__qualname__ = f"{function.__qualname__}-{variant}-{_DIGEST}"
    try:
        compiled: Any = _njit(nogil=True, cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        compiled = _njit(nogil=True, **_OPTIONS)(function)
    if variant:
        compiled._cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), _DIGEST)
    named: Callable[..., Any] = compiled
    return named


class _Untranslated(CPUCodeLibrary):
    """LLVM code that Numba links and optimises, and does not hand to its own engine, which would hold it for good."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _Inlined(_Untranslated):
    """Code of a helper, which is optimised where it is inlined: once, and knowing what it is called with."""

    def _optimize_functions(self, ll_module: Any) -> None:
        pass

    def _optimize_final_module(self) -> None:
        pass

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # nobody calls it


def optimised(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, str]:
    """Optimised LLVM code of a function that returns nothing, and the name in it of its entry for C.

    What `numba.cfunc` makes before it makes machine code, which the caller makes of this: that takes a sixth of the
    time in which a kernel compiles, once. No garbage is collected meanwhile: each collection goes through all of torch.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with compiling(), global_compiler_lock:
            flags: Any = compiler.Flags()
            cpu_target.options.parse_as_flags(flags, {**_OPTIONS, "no_cpython_wrapper": True})
            flags.no_compile = True
            context: Any = cpu_target.target_context
            codegen = context.codegen()
            library = _Untranslated(codegen, function.__name__)
            codegen._library_class, codegen.set_env = _Inlined, lambda name, environment: None
            try:
                found: Any = compiler.compile_extra(
                    cpu_target.typing_context, context, function, arguments, numba.types.void, flags, {},
                    library=library,
                )  # fmt: skip
            finally:
                del codegen._library_class, codegen.set_env
            library.finalize()
            return library.get_llvm_str(), found.fndesc.llvm_cfunc_wrapper_name
    finally:
        if collects:
            gc.enable()
