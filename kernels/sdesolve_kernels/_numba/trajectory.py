"""Compiles generated kernels to machine code that is kept on disk, and loads it without Numba.

A process that finds its kernel on disk needs neither Numba nor its type inference: LLVM's loader maps the object code,
and ctypes calls it, without the GIL.
"""

from __future__ import annotations

import contextlib
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

__all__ = ["Entry", "cache_folder", "is_kept", "load"]

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
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        if base:
            return Path(base) / "sdesolve"
        return Path.home() / ".cache" / "sdesolve"
    except RuntimeError:  # no HOME, and a user that the system does not know, as in some containers
        return None


def is_kept(source: str) -> bool:
    """Whether the kernel of a generated source is on disk."""
    import llvmlite.binding as llvm

    _initialise()
    folder = cache_folder()
    return folder is not None and (folder / f"{_key(source, llvm)}.o").exists()


@functools.lru_cache(maxsize=256)
def load(source: str) -> Entry:
    """The kernel of a generated source, from this process, from disk, or compiled now."""
    import llvmlite.binding as llvm

    _initialise()
    key = _key(source, llvm)
    folder = cache_folder()
    path = None if folder is None else folder / f"{key}.o"
    code = None if path is None else _read(path)
    if code is not None:
        with contextlib.suppress(RuntimeError):  # it is no object code, and is made anew
            return Entry(code, llvm)
    code, self_contained = _compiled(source, key, llvm)
    if path is not None and self_contained:
        _write(path, code)
        _write(path.with_suffix(".py"), source.encode())
    return Entry(code, llvm)


# What object code refers to: functions that LLVM calls of itself, and what Numba's wrapper would report an exception
# with, which kernels never raise. If one name is not found, LLVM resolves none of them, and says nothing.
_LIBRARY = {"memset": ctypes.memset, "memcpy": ctypes.memmove, "memmove": ctypes.memmove}
_MATHS = ("sqrt", "sqrtf")  # nearly always an instruction
_NUMBA = ("numba_gil_ensure", "numba_gil_release")
_PYTHON = (
    "PyErr_Clear", "PyErr_SetNone", "PyErr_SetString", "PyErr_WriteUnraisable", "PyExc_StopIteration",
    "PyExc_SystemError", "PyUnicode_FromString", "Py_DecRef",
)  # fmt: skip
_nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda state: None)


@functools.cache
def _initialise() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in _LIBRARY.items()}
    addresses |= {name: ctypes.cast(_nothing, ctypes.c_void_p).value for name in _NUMBA}
    addresses |= {name: ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, name)) for name in _PYTHON}
    if os.name == "posix":
        process: Any = ctypes.CDLL(None)
        found = {name: getattr(process, name, None) for name in _MATHS}
        addresses |= {name: ctypes.cast(f, ctypes.c_void_p).value for name, f in found.items() if f is not None}
    for name, address in addresses.items():
        if address is not None and llvm.address_of_symbol(name) is None:
            llvm.add_symbol(name, address)


def _unknown(module: Any, text: str) -> set[str]:
    """Names that a module calls or reads and that another process might not find."""
    declared = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    declared |= {v.name for v in module.global_variables if v.is_declaration}
    return {name for name in declared - {*_LIBRARY, *_MATHS, *_NUMBA, *_PYTHON} if text.count(f"@{name}") > 1}


def _key(source: str, llvm: Any) -> str:
    """Names everything that the machine code depends on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    about = [importlib.metadata.version("numba"), importlib.metadata.version("llvmlite"), platform.machine()]
    about += [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    digest.update("\n".join([*about, source]).encode())
    return digest.hexdigest()[:40]


def _is_ours(about: os.stat_result) -> bool:
    """Whether a file or folder is this user's (or root's) and nobody else can write it."""
    return not hasattr(os, "geteuid") or (about.st_uid in (0, os.geteuid()) and not about.st_mode & 0o022)


def _read(path: Path) -> bytes | None:
    """Object code that is whole, and that nobody else could have put there; else ``None``.

    A file begins with the digest of what follows and of its own name.
    """
    try:
        if not _is_ours(path.parent.stat()):
            return None
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            data = file.read() if _is_ours(os.fstat(file.fileno())) else b""
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    return code if code and digest == _digest(path, code) else None


def _digest(path: Path, code: bytes) -> bytes:
    return hashlib.sha256(path.stem.encode() + code).digest()


def _write(path: Path, data: bytes) -> None:
    """Keeps a file, whole or not at all; where nothing can be written, kernels are compiled in each process."""
    if path.suffix == ".o":
        data = _digest(path, data) + data
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(path.parent.stat()):
            return
        handle, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if not isinstance(problem, OSError):
            raise


def _compiled(source: str, key: str, llvm: Any) -> tuple[bytes, bool]:
    """Object code, and whether every process can load it."""
    import numba

    from .compile import optimised
    from .paths import namespace

    name = f"<sdesolve {key[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = namespace()
    exec(compile(source, name, "exec"), names)
    text, entry = optimised(names["trajectory"], (numba.types.int64,) * 4)
    linecache.cache.pop(name, None)
    module = llvm.parse_assembly(text)
    module.get_function(entry).name = _ENTRY
    module.verify()
    return _machine(llvm).emit_object(module), not _unknown(module, text)


def _machine(llvm: Any) -> Any:
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault",
        jit=True,
    )  # fmt: skip
