"""Compiles generated kernels to machine code that is kept on disk, and loads it without Numba.

A process that finds its kernel on disk needs neither Numba nor its type inference: LLVM's loader maps the object code,
and ctypes calls it, without the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import linecache
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["Entry", "cache_folder", "load"]

_ENTRY = "sdesolve_trajectory"
_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class Entry:
    """Machine code that was loaded, to be called with four integers. It is unloaded when nothing refers to it."""

    def __init__(self, code: bytes, llvm: Any) -> None:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm))
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engine = engine
        self._call = _TYPE(engine.get_function_address(_ENTRY))

    def __call__(self, arguments: int, scratch: int, start: int, stop: int) -> None:
        """Call it; `self` holds the code meanwhile."""
        self._call(arguments, scratch, start, stop)


def cache_folder() -> Path | None:
    """Where object code is kept: ``SDESOLVE_CACHE``, or a folder in the user's cache; nowhere for users without one."""
    chosen = os.environ.get("SDESOLVE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "sdesolve"
    try:
        return Path.home() / ".cache" / "sdesolve"
    except RuntimeError:  # no HOME, and a user that the system does not know, as in some containers
        return None


@functools.lru_cache(maxsize=256)
def load(source: str) -> Entry:
    """The kernel of a generated source, from this process, from disk, or compiled now."""
    import llvmlite.binding as llvm

    _initialise()
    key = _key(source, llvm)
    folder = cache_folder()
    if folder is None:
        return Entry(_compiled(source, key, llvm), llvm)
    path = folder / f"{key}.o"
    code = _read(path)
    if code is None:
        code = _compiled(source, key, llvm)
        _write(path, code)
        _write(path.with_suffix(".py"), source.encode())
    return Entry(code, llvm)


@functools.cache
def _initialise() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _key(source: str, llvm: Any) -> str:
    """Names everything that the machine code depends on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    about = [importlib.metadata.version("numba"), importlib.metadata.version("llvmlite"), platform.machine()]
    about += [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    digest.update("\n".join([*about, source]).encode())
    return digest.hexdigest()[:40]


def _read(path: Path) -> bytes | None:
    """Object code that is whole: a file ends with the digest of what comes before."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code, digest = data[:-32], data[-32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, data: bytes) -> None:
    """Keeps a file, whole or not at all; where nothing can be written, kernels are compiled in each process."""
    if path.suffix == ".o":
        data += hashlib.sha256(data).digest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        return


def _compiled(source: str, key: str, llvm: Any) -> bytes:
    import numba

    from .compile import compiling

    name = f"<sdesolve {key[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    integers = (numba.types.int64,) * 4
    with compiling():
        make: Any = numba.cfunc(numba.types.void(*integers), error_model="numpy")
        compiled = make(names["trajectory"])
    module = llvm.parse_assembly(compiled.inspect_llvm())
    for function in module.functions:
        if function.name.startswith("cfunc."):
            function.name = _ENTRY
    module.verify()
    code: bytes = _machine(llvm).emit_object(module)
    return code


def _machine(llvm: Any) -> Any:
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault",
        jit=True,
    )  # fmt: skip
