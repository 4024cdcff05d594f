"""Which implementation of an op runs: one place for all ops."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

__all__ = ["backend_for", "backend_module", "use_backend"]

# Backend -> the module with its entry points, and the kinds of device it runs on (None: any). Modules are imported at
# first use, so that importing this package imports neither numba nor triton.
_BACKENDS: dict[str, tuple[str, frozenset[str] | None]] = {
    "reference": ("sdesolve_kernels.reference", None),
    "numba": ("sdesolve_kernels._numba.fill", frozenset({"cpu"})),
}
# What "auto" tries, in order: the first that runs on the device.
_PREFERENCE = ("numba", "reference")

_requested: contextvars.ContextVar[str] = contextvars.ContextVar("sdesolve_backend", default="auto")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the ``with`` block on one backend.

    The choice is local to the calling thread or task. A backend that cannot run where the data is raises; it never
    falls back to another.

    Args:
        name: "auto" (the fastest that runs on the device), "reference" (plain torch, any device) or "numba" (CPU).

    Raises:
        ValueError: The name is unknown; from ops inside the block: the backend does not run on their device.
    """
    if name != "auto" and name not in _BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *_BACKENDS))
        raise ValueError(f"unknown backend {name!r}; expected one of {known}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def backend_for(op: str, device: torch.device) -> str:
    """Name of the backend on which `op` runs for tensors on `device`.

    Raises:
        ValueError: `use_backend` asked for a backend that does not run on `device`.
    """
    requested = _requested.get()
    for name in _PREFERENCE if requested == "auto" else (requested,):
        devices = _BACKENDS[name][1]
        if devices is None or device.type in devices:
            return name
    runs_on = ", ".join(sorted(_BACKENDS[requested][1] or ()))
    raise ValueError(
        f"{op}: backend {requested!r} was asked for by use_backend, but the data is on {str(device)!r} and it runs on "
        f"{runs_on} only; move the data there, or use_backend('auto')"
    )


@functools.cache
def backend_module(name: str) -> ModuleType:
    """The module of a backend, imported now if it was not yet."""
    return importlib.import_module(_BACKENDS[name][0])
